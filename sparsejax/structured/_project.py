"""The nearest chain of factors to a matrix, by singular values of disjoint slices.

The product of two factors of patterns (a1, b1, c1, d1) and (a2, b2, c2, d2), the first
applied first, is itself Kronecker-sparse if a2 divides a1 and d1 divides d2: with
inputs ``(i, u, j, k)`` and outputs ``(i, o, v, k)``, where i < a2, u < a1 / a2,
v < d2 / d1 and k < d1, it is for all i, u, v, k a matrix ``[j, o]`` of rank
r = c2 a2 / a1 = b1 d1 / d2, made of entries that no other of these slices has. So a
truncated singular value decomposition of every slice is the best approximation.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from sparsejax.structured._pattern import Chain, Pattern
from sparsejax.structured._permutations import Candidates, candidates


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
    """
    chain = with_rank(chain, rank)
    if not jnp.issubdtype(w.dtype, jnp.inexact):
        raise ValueError(f"w: got {w.dtype}, needed floats or complex numbers")
    if w.ndim < 2 or w.shape[-2:] != chain.shape:
        raise ValueError(f"w: got shape {w.shape}, needed {chain.shape}, the chain's")
    one = lambda w: _project(w, chain.patterns)
    if permutations is not None or out_permutations is not None:
        first, last = _digits(chain.patterns)
        p = candidates(permutations, first, "permutations")
        q = candidates(out_permutations, last, "out_permutations")
        one = lambda w: _best(w, jnp.asarray(p), jnp.asarray(q), chain.patterns)
    for _ in w.shape[:-2]:
        one = jax.vmap(one)
    return one(w)


# ---- patterns ----------------------------------------------------------------------


def composite(patterns: Sequence[Pattern]) -> Pattern:
    """The pattern of the product of factors that follow one another."""
    first, last = patterns[0], patterns[-1]
    return Pattern(
        a=last.a,
        b=last.b * (last.d // first.d),
        c=first.c * (first.a // last.a),
        d=first.d,
    )


def ranks_of(patterns: Sequence[Pattern]) -> tuple[int, ...]:
    """The rank of the slices of the product of each factor and the next.

    Raises:
      ValueError: There is no one rank of such slices.
    """
    for one, two in itertools.pairwise(patterns):
        if one.a % two.a or two.d % one.d or two.c * two.a % one.a:
            raise ValueError(
                f"chain: got {two} after {one}, whose product has no slices of one "
                "rank; needed an a that divides the one before, a d that is divided by "
                "the one before, and c * a divided by the a before"
            )
    return tuple(two.c * two.a // one.a for one, two in itertools.pairwise(patterns))


def with_rank(chain: Chain, rank: int | Sequence[int] | None) -> Chain:
    """The chain with other ranks between its factors.

    Raises:
      ValueError: The chain has no ranks, or none such.
    """
    old = ranks_of(chain.patterns)
    if rank is None:
        return chain
    ranks = (rank,) * max(1, len(old)) if isinstance(rank, int) else tuple(rank)
    if len(ranks) != len(old):
        raise ValueError(
            f"rank: got {rank} for a chain of {len(old) + 1}, needed one for each two "
            "of its factors"
        )
    for t, r in enumerate(ranks, 1):
        rows = composite(chain.patterns[:t]).c
        columns = composite(chain.patterns[t:]).b
        if not 1 <= r <= min(rows, columns):
            raise ValueError(
                f"rank: got {r}, needed 1 to {min(rows, columns)}, the smaller side of "
                f"a block of {rows}x{columns}"
            )
    patterns = tuple(
        Pattern(a=p.a, b=p.b // a_old * a_new, c=p.c // b_old * b_new, d=p.d)
        for p, b_old, b_new, a_old, a_new in zip(
            chain.patterns, (1, *old), (1, *ranks), (*old, 1), (*ranks, 1), strict=True
        )
    )
    return Chain(patterns, chain.in_size, chain.out_size)


def _digits(patterns):
    """Of inputs and outputs of the chain: outer copies, digits, inner copies."""
    first, last = patterns[0], patterns[-1]
    pairs = list(itertools.pairwise(patterns))
    inputs = [*(one.a // two.a for one, two in pairs[::-1]), first.c]
    outputs = [last.b, *(two.d // one.d for one, two in pairs[::-1])]
    return (last.a, inputs, first.d), (last.a, outputs, first.d)


# ---- one matrix --------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="patterns")
def _project(w, patterns):
    """w [k, n] -> factors, relative error."""
    w, scale = scaled(w)
    whole = composite(patterns)
    rows, columns = whole.in_size - w.shape[0], whole.out_size - w.shape[1]
    rest, lost = _on_support(jnp.pad(w, ((0, rows), (0, columns))), whole)
    factors, cut, stages = _from_first(rest, patterns)
    if len(patterns) > 2:
        *last, ends = _from_last(_once(cut, rest), patterns)
        back = _back([_once(last[1], w) for w in stages], patterns)
        forth = _forth([_once(back[1], w) for w in ends], patterns)
        for others, less in (last, back, forth):
            pick = functools.partial(jnp.where, less < cut)
            factors, cut = list(map(pick, others, factors)), jnp.minimum(cut, less)
    factors = _balanced(factors)
    total, lost = _squares(w), lost + cut
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


def _once(number, w):
    """w, when the number is known, so that one decomposition follows another.

    XLA's CPU runs what is independent at the same time, and batches of LAPACK's that
    do wait for threads that the other one holds, for ever.
    """
    return w * jnp.where(jnp.isnan(number), number, 1).astype(w.dtype)


def scaled(w):
    """(w / its largest entry, that), so that no square over- or underflows."""
    w = w.astype(jnp.float32) if jnp.finfo(w.dtype).bits < 32 else w
    scale = jnp.max(jnp.abs(w))
    return w / jnp.where(scale == 0, 1, scale).astype(w.dtype), scale


def _squares(w):
    return jnp.sum(jnp.real(w) ** 2 + jnp.imag(w) ** 2)


def _on_support(w, p):
    """The factor [a, d, c, b] nearest to w, and the squares that are not its."""
    if p.a == p.d == 1:
        return w[None, None], jnp.zeros((), jnp.real(w).dtype)
    w = w.reshape(p.a, p.c, p.d, p.a, p.b, p.d)
    at = jnp.eye(p.a, dtype=bool)[:, None, None, :, None, None]
    at = at & jnp.eye(p.d, dtype=bool)[:, None, None, :]
    inside = jnp.einsum("icdibd->idcb", jnp.where(at, w, 0))
    return inside, _squares(jnp.where(at, 0, w))


def _from_first(w, patterns):
    """Factors, all but the last of orthonormal columns, and the squares cut off.

    Also w, and what of it is left for the others after each but the last.
    """
    factors, lost, stages = [], 0, []
    for t, rank in enumerate(ranks_of(patterns), 1):
        one, rest = patterns[t - 1], composite(patterns[t:])
        stages.append(w)
        factor, values, w, cut = _split(w, one, rest, rank)
        w = _times_rows(w, values)
        factors.append(factor)
        lost += cut
    return [*factors, w], lost, stages


def _from_last(w, patterns):
    """The same from the other end: as if all but the first had orthonormal rows."""
    factors, lost, stages = [], 0, []
    for t, rank in reversed(list(enumerate(ranks_of(patterns), 1))):
        one = composite(patterns[:t])
        stages.insert(0, w)
        w, values, factor, cut = _split(w, one, patterns[t], rank)
        w = _times_columns(w, values)
        factors.insert(0, factor)
        lost += cut
    return _scaled_to_last([w, *factors], patterns), lost, stages


def _back(stages, patterns):
    """As ``_from_first`` left it, each two factors decomposed anew among the others.

    From the last on; never worse than it was. The factors, and the squares cut off.
    """
    factors = []
    for t, rank in reversed(list(enumerate(ranks_of(patterns), 1))):
        two = stages[t - 1]
        for n, factor in reversed(list(enumerate(factors, t + 1))):
            two = _before(two, composite(patterns[t - 1 : n]), patterns[n], factor)
        first, values, factor, _ = _split(two, patterns[t - 1], patterns[t], rank)
        first = _times_columns(first, values)
        factors.insert(0, factor)
    return _scaled_to_last([first, *factors], patterns), _missing(stages[0], first)


def _forth(stages, patterns):
    """The same of what ``_from_last`` left, from the first on."""
    factors = []
    for t, rank in enumerate(ranks_of(patterns), 1):
        two = stages[t - 1]
        for n, factor in enumerate(factors):
            two = _after(two, patterns[n], composite(patterns[n + 1 : t + 1]), factor)
        factor, values, last, _ = _split(two, patterns[t - 1], patterns[t], rank)
        last = _times_rows(last, values)
        factors.append(factor)
    return [*factors, last], _missing(stages[-1], last)


def _missing(w, kept):
    """Squares that w has more. Where these are few, rounding's: then infinite."""
    total = _squares(w)
    lost = total - _squares(kept)
    return jnp.where(lost > 1e-3 * total, lost, jnp.inf)


def _scaled_to_last(factors, patterns):
    """The same product; all but the last have columns of length 1."""
    for t, after in enumerate(patterns[1:]):
        norm = _rows_of_next(jnp.linalg.norm(factors[t], axis=2), after)
        factors[t] = _times_columns(factors[t], 1 / jnp.where(norm == 0, 1, norm))
        factors[t + 1] = _times_rows(factors[t + 1], norm)
    return factors


def _split(w, one, rest, rank):
    """[a, d, c, b] of both in two, and the squares cut off.

    The first is of orthonormal columns, the other of orthonormal rows; between them are
    the singular values of each row of the other, [a, d, c].
    """
    i, u, k, v = rest.a, one.a // rest.a, one.d, rest.d // one.d
    w = w.reshape(i, k, u, one.c, rest.b, v).transpose(0, 2, 1, 5, 3, 4)
    left, values, right = jnp.linalg.svd(w, full_matrices=False)  # [i, u, k, v, ...]
    more = max(0, rank - values.shape[-1])  # of a rank that no slice can have
    ends = lambda *last: [(0, 0)] * 4 + list(last)
    left = jnp.pad(left[..., :rank], ends((0, 0), (0, more)))
    right = jnp.pad(right[..., :rank, :], ends((0, more), (0, 0)))
    kept = jnp.pad(values[..., :rank], ends((0, more)))
    left = left.transpose(0, 1, 2, 4, 5, 3).reshape(one.factor_shape)
    right = right.transpose(0, 3, 2, 1, 4, 5).reshape(rest.factor_shape)
    kept = kept.transpose(0, 3, 2, 1, 4).reshape(rest.factor_shape[:3])
    return left, kept, right, _squares(values[..., rank:])


def _before(w, one, rest, right):
    """What w, as ``_split`` takes it, is before a factor of orthonormal rows."""
    i, u, k, v = rest.a, one.a // rest.a, one.d, rest.d // one.d
    w = w.reshape(i, k, u, one.c, rest.b, v)
    right = right.reshape(i, v, k, u, one.b // v, rest.b)
    left = jnp.einsum("ikucov,ivkuro->iukcrv", w, right.conj())
    return left.reshape(one.factor_shape)


def _after(w, one, rest, left):
    """What it is after a factor of orthonormal columns."""
    i, u, k, v = rest.a, one.a // rest.a, one.d, rest.d // one.d
    w = w.reshape(i, k, u, one.c, rest.b, v)
    left = left.reshape(i, u, k, one.c, one.b // v, v)
    right = jnp.einsum("iukcrv,ikucov->ivkuro", left.conj(), w)
    return right.reshape(rest.factor_shape)


def _times_rows(factor, numbers):
    """Each row [a, d, c] times its number."""
    return factor * numbers.astype(factor.dtype)[..., None]


def _times_columns(factor, numbers):
    """Each column times the number of the next factor's row that it is, [a, d, c]."""
    a, d, _, b = factor.shape
    columns = numbers.transpose(0, 2, 1).reshape(a, b, d).transpose(0, 2, 1)
    return factor * columns.astype(factor.dtype)[:, :, None, :]


def _rows_of_next(columns, after):
    """Numbers of a factor's columns [a, d, b] as those of the next one's rows."""
    rows = columns.transpose(0, 2, 1).reshape(after.a, after.c, after.d)
    return rows.transpose(0, 2, 1)


def _balanced(factors):
    """Moves scale of the last to those before, so that all of p have the p-th root."""
    for t in reversed(range(1, len(factors))):
        moved = jnp.linalg.norm(factors[t], axis=-1) ** (t / (t + 1))  # of each row
        factors[t] = _times_rows(factors[t], 1 / jnp.where(moved == 0, 1, moved))
        factors[t - 1] = _times_columns(factors[t - 1], moved)
    return factors
