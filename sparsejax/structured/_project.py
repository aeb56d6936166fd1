"""The nearest chain of factors to a matrix, by singular values of disjoint slices.

The product of two factors of patterns (a1, b1, c1, d1) and (a2, b2, c2, d2), the first
applied first, is itself Kronecker-sparse if a2 divides a1 and d1 divides d2: with
inputs ``(i, u, j, k)`` and outputs ``(i, o, v, k)``, where i < a2, u < a1 / a2,
v < d2 / d1 and k < d1, it is for all i, u, v, k a matrix ``[j, o]`` of rank
r = c2 a2 / a1 = b1 d1 / d2, made of entries that no other of these slices has. So a
truncated singular value decomposition of every slice is the best approximation.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from sparsejax.structured._composite import composite, digits_of, with_rank
from sparsejax.structured._pattern import Chain
from sparsejax.structured._permutations import Candidates, candidates
from sparsejax.structured._sweeps import (
    back,
    balanced,
    forth,
    from_first,
    from_last,
    once,
    squares,
)


def project(
    w: Shaped[Array, "*batch k n"],
    chain: Chain,
    *,
    rank: int | Sequence[int] | None = None,
    permutations: Candidates | None = None,
    out_permutations: Candidates | None = None,
) -> tuple[Any, ...]:
    """Approximates a matrix by a chain of factors, in closed form.

    Two factors: the best approximation in the Frobenius norm, by a batched singular
    value decomposition of disjoint slices, each cut to the chain's rank,

    ``error^2 = (sum of squares of the singular values cut off) / |w|^2``,

    to which come the entries of w where such products are zero, if there are any.

    More factors: they are split off from the first on, each with orthonormal columns,
    so that what is cut off later is orthogonal to what was cut off before; and from the
    last on, with orthonormal rows. The error has the same form, exactly, and is at most
    sqrt(p - 1) times that of the best p factors; a matrix that is such a chain, of any
    length, ranks and sizes, is recovered to rounding. Where that is not so, each two
    factors are decomposed once more between the others, from the other end, which never
    makes it worse. The nearest of all is given.

    The factors are balanced: along every path each has an equal part of its scale, of
    two the square root of a singular value.

    Works under ``jit`` and ``vmap``. The cost is that of decomposing slices of k n
    entries in all, and for each further factor of what is left, half as many in a
    butterfly; four times over where there are more than two factors. No product is
    computed. Gradients are not meant to be taken through it: those of singular vectors
    are not finite where values coincide, as zeros do in a matrix that is recovered.

    Args:
      w: Multiplies rows from the right. Leading axes are matrices apart.
      chain: Patterns and sizes, such as from ``monarch``; where it is padded zeros are
        added to w, of which nothing is lost.
      rank: Replaces the chain's: one, or one for each two factors, the first first.
      permutations: Orders of the inputs to try, of which each matrix gets the best:
        "identity"; "bit_reversal", which reverses the digits of an index in the radices
        of the chain; "default_8", three elementary moves (separate by the last digit,
        reverse the first part, reverse the others), each on or off, at all levels; an
        array ``[inputs with padding]``; or several of these.
      out_permutations: The same for outputs. All pairs are tried.

    Returns:
      (factors, relative error). The factors are ``[*batch, a, d, c, b]``, in the dtype
      of w or float32 where that is lower, the error ``[*batch]``. With permutations
      (factors, relative error, p, q), such that ``w[p][:, q]``, w with its padding, is
      what the factors approximate: ``y[..., q] = butterfly_matmul(x[..., p], factors)``
      sets y to x w.

    Raises:
      ValueError: w is not of floats, or has not the chain's sizes; the patterns do not
        follow one another as they must (a of each divides that before, d is divided by
        that before, c a by the a before); the rank is below 1 or above the smaller side
        of the slices, or there is only one factor; a permutation is not known.

    Example:
      >>> from sparsejax import structured
      >>> w = jax.random.normal(jax.random.key(0), (64, 48))
      >>> chain = structured.monarch(64, 48, blocks=4)
      >>> factors, error = structured.project(w, chain, rank=2)
      >>> _, again = structured.project(structured.to_dense(factors), chain, rank=2)
      >>> [f.shape for f in factors], bool(error > 0.5), bool(again < 1e-5)
      ([(4, 1, 16, 8), (1, 4, 8, 12)], True, True)

      The Fourier transform of 16 entries is four factors, of its inputs in bit-reversed
      order:

      >>> dft = jnp.fft.fft(jnp.eye(16))
      >>> factors, error, p, q = structured.project(
      ...     dft, structured.butterfly(16), permutations="bit_reversal")
      >>> len(factors), bool(error < 1e-5), p[:4].tolist()
      (4, True, [0, 8, 4, 12])

    References:
      Dao et al., `Monarch: Expressive Structured Matrices for Efficient and Accurate
      Training <https://arxiv.org/abs/2204.00595>`_, 2022.

      Le et al., `Butterfly Factorization with Error Guarantees
      <https://arxiv.org/abs/2411.04506>`_, 2024.

      Dao et al., `Learning Fast Algorithms for Linear Transforms Using Butterfly
      Factorizations <https://arxiv.org/abs/1903.05895>`_, 2019, for the eight orders.

    Note:
      A circulant is no such chain, but two of them: ``project_circulant``.

      Nothing of the kind is near to a matrix without structure: ``compare_low_rank``
      says what low rank gives at as many parameters.

      Of several matrices of one chain, give them with a leading axis. Two calls in one
      ``jit`` can stand still for ever on a CPU of few cores, as two batches of
      ``jnp.linalg.svd`` can there: XLA runs both at once, and each waits for threads
      that the other holds. One call after the other is safe.
    """
    chain = with_rank(chain, rank)
    if not jnp.issubdtype(w.dtype, jnp.inexact):
        raise ValueError(f"w: got {w.dtype}, needed floats or complex numbers")
    if w.ndim < 2 or w.shape[-2:] != chain.shape:
        raise ValueError(f"w: got shape {w.shape}, needed {chain.shape}, the chain's")
    one = lambda w: _project(w, chain.patterns)
    if permutations is not None or out_permutations is not None:
        first, last = digits_of(chain.patterns)
        p = candidates(permutations, first, "permutations")
        q = candidates(out_permutations, last, "out_permutations")
        one = lambda w: _best(w, jnp.asarray(p), jnp.asarray(q), chain.patterns)
    for _ in w.shape[:-2]:
        one = jax.vmap(one)
    return one(w)


# ---- one matrix --------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="patterns")
def _project(w, patterns):
    """w [k, n] -> factors, relative error."""
    w, scale = scaled(w)
    whole = composite(patterns)
    rows, columns = whole.in_size - w.shape[0], whole.out_size - w.shape[1]
    rest, lost = _on_support(jnp.pad(w, ((0, rows), (0, columns))), whole)
    factors, cut, stages = from_first(rest, patterns)
    if len(patterns) > 2:
        last, less, ends = from_last(once(cut, rest), patterns)
        again = back([once(less, w) for w in stages], patterns)
        latest = forth([once(again[1], w) for w in ends], patterns)
        for others, lost_too in ((last, less), again, latest):
            pick = functools.partial(jnp.where, lost_too < cut)
            factors = list(map(pick, others, factors))
            cut = jnp.minimum(cut, lost_too)
    factors = balanced(factors)
    total, lost = squares(w), lost + cut
    error = jnp.sqrt(jnp.where(total == 0, 0, lost / jnp.where(total == 0, 1, total)))
    part = (scale ** (1 / len(factors))).astype(w.dtype)
    return tuple(f * part for f in factors), error


@functools.partial(jax.jit, static_argnames="patterns")
def _best(w, p, q, patterns):
    """w [k, n], orders of inputs and outputs -> factors, error, and the best orders."""
    whole = composite(patterns)
    w = jnp.pad(w, ((0, whole.in_size - w.shape[0]), (0, whole.out_size - w.shape[1])))
    ordered = lambda i, j: w[p[i]][:, q[j]]
    i, j = (x.ravel() for x in jnp.indices((len(p), len(q))))
    # Only errors are kept, so that no more than one projection is in memory.
    errors = jax.lax.map(lambda ij: _project(ordered(*ij), patterns)[1], (i, j))
    best = jnp.argmin(errors)
    i, j = i[best], j[best]
    return *_project(ordered(i, j), patterns), p[i], q[j]


def scaled(w):
    """(w / its largest entry, that), so that no square over- or underflows."""
    w = w.astype(jnp.float32) if jnp.finfo(w.dtype).bits < 32 else w
    scale = jnp.max(jnp.abs(w))
    return w / jnp.where(scale == 0, 1, scale).astype(w.dtype), scale


def _on_support(w, p):
    """The factor [a, d, c, b] nearest to w, and the squares that are not its."""
    if p.a == p.d == 1:
        return w[None, None], jnp.zeros((), jnp.real(w).dtype)
    w = w.reshape(p.a, p.c, p.d, p.a, p.b, p.d)
    at = jnp.eye(p.a, dtype=bool)[:, None, None, :, None, None]
    at = at & jnp.eye(p.d, dtype=bool)[:, None, None, :]
    inside = jnp.einsum("icdibd->idcb", jnp.where(at, w, 0))
    return inside, squares(jnp.where(at, 0, w))
