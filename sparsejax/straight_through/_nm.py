"""N:M recipes: SR-STE, and the decays of Progressive Gradient Flow."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from sparsejax.masks import nm_mask
from sparsejax.straight_through._leaky import Scalar, check_floating, leaky_mask

_BACKWARD = ("straight_through", "scaled")


def sr_ste(
    w: Shaped[Array, "*shape"],
    *,
    n: int,
    m: int,
    axis: int | None = None,
    decay: Scalar | None = 2e-4,
) -> Float[Array, "*shape"]:
    r"""Keeps N of M; all weights get the gradient, pruned ones a pull to zero.

    .. math::
      \tilde w = m \odot w, \qquad
      \frac{\partial L}{\partial w} = g + \lambda\, \bar m \odot w

    where m keeps the N largest magnitudes of every M along the contraction axis. The
    pull keeps masks from flipping back and forth. The paper's optimizer is SGD; one
    that divides by gradient statistics, such as Adam, would divide the pull too. For
    those pass `decay=None` and subtract `learning_rate * decay * pruned_part(w, ...)`
    from the parameters beside the optimizer's update, as AdamW does.

    Costs a `masks.nm_mask`, one elementwise pass each way, and one byte per weight
    kept for the backward pass.

    Args:
      w: Weight; floating.
      n: How many of each group are KEPT.
      m: Group size; divides the size of the axis.
      axis: The contraction axis of the product that `w` enters. None: axis -2, the
        input axis of a Flax kernel.
      decay: The pull, λ; may be traced. None: the plain straight-through form.

    Returns:
      The weight to use, shaped and typed like `w`.

    Raises:
      ValueError: As `masks.nm_mask` does, or `w` is not floating.

    Example:
      >>> w = jnp.array([[4.0], [-1.0], [2.0], [3.0]])
      >>> print(sr_ste(w, n=2, m=4)[:, 0])
      [4. 0. 0. 3.]
      >>> print(jax.grad(lambda w: sr_ste(w, n=2, m=4, decay=0.5).sum())(w)[:, 0])
      [1.  0.5 2.  1. ]

    References:
      Zhou et al., `Learning N:M Fine-grained Structured Sparse Neural Networks From
      Scratch <https://arxiv.org/abs/2102.04010>`_, 2021.
    """
    return leaky_mask(w, _mask(w, n, m, axis), backward=1.0, decay=decay)


def pruned_part(
    w: Shaped[Array, "*shape"], *, n: int, m: int, axis: int | None = None
) -> Float[Array, "*shape"]:
    r"""What an N:M mask takes away, :math:`\bar m \odot w`.

    SR-STE's decay on its own, to be subtracted beside an optimizer whose
    preconditioner must not see it.

    Args:
      w: Weight; floating.
      n: How many of each group are KEPT.
      m: Group size; divides the size of the axis.
      axis: The contraction axis. None: axis -2, the input axis of a Flax kernel.

    Returns:
      An array shaped and typed like `w`, zero where kept.

    Raises:
      ValueError: As `masks.nm_mask` does, or `w` is not floating.

    Example:
      >>> w = jnp.array([[4.0], [-1.0], [2.0], [3.0]])
      >>> updates = jax.tree.map(jnp.zeros_like, w)  # what the optimizer gave
      >>> updates -= 0.1 * 0.5 * pruned_part(w, n=2, m=4)  # learning rate, decay
      >>> print(optax.apply_updates(w, updates)[:, 0])
      [ 4.   -0.95  1.9   3.  ]
    """
    return jnp.where(_mask(w, n, m, axis), jnp.zeros((), w.dtype), w)


def mask_decay(
    w: Shaped[Array, "*shape"],
    b: Scalar,
    *,
    n: int,
    m: int,
    axis: int | None = None,
    backward: str = "straight_through",
) -> Float[Array, "*shape"]:
    r"""Fades out what N:M prunes: mask decay of Progressive Gradient Flow.

    .. math::
      \tilde w = (m + b\, \bar m) \odot w, \qquad
      \frac{\partial L}{\partial w} = \begin{cases}
        g & \text{straight\_through} \\
        (m + b\, \bar m) \odot g & \text{scaled} \end{cases}

    b falls from 1, dense, to 0, N:M. With the rate c = 2e-4 of the authors' code that
    is `schedules.linear` over 1 / c = 5000 steps, or `schedules.exponential`, whose
    `end` is where the last, binary phase begins. Costs as much as `sr_ste`.

    Args:
      w: Weight; floating.
      b: What is left of pruned weights; may be traced, has gradient zero.
      n: How many of each group are KEPT.
      m: Group size; divides the size of the axis.
      axis: The contraction axis. None: axis -2, the input axis of a Flax kernel.
      backward: "straight_through", as the authors' code has it; or "scaled", as their
        text reads, where b restricts the gradient as well.

    Returns:
      The weight to use, shaped and typed like `w`.

    Raises:
      ValueError: As `masks.nm_mask` does, `backward` is unknown, `b` is no scalar, or
        `w` is not floating.

    Example:
      >>> w = jnp.array([[4.0], [-1.0], [2.0], [3.0]])
      >>> print(mask_decay(w, 0.5, n=2, m=4)[:, 0])
      [ 4.  -0.5  1.   3. ]

    References:
      Bambhaniya et al., `Progressive Gradient Flow
      <https://arxiv.org/abs/2402.04744>`_, 2024.
    """
    if backward not in _BACKWARD:
        raise ValueError(f"backward must be one of {_BACKWARD}, got {backward!r}")
    share = b if backward == "scaled" else 1.0
    return leaky_mask(w, _mask(w, n, m, axis), forward=b, backward=share)


def structure_decay(
    w: Shaped[Array, "*shape"],
    stage: int | Int[Array, ""],
    *,
    sequence: Sequence[tuple[int, int]],
    axis: int | None = None,
) -> Float[Array, "*shape"]:
    r"""Tightens N:M in stages: structure decay of Progressive Gradient Flow.

    .. math::
      \tilde w = m_i \odot w, \qquad \frac{\partial L}{\partial w} = g

    where :math:`m_i` is the mask of the i-th N:M of a sequence, and all of `w` at stage
    0. The stage follows from the step alone (`schedules.stage`), so that a run resumed
    in the middle of one goes on with it. Only the mask of the present stage is worked
    out; all are compiled once.

    Args:
      w: Weight; floating.
      stage: 0: dense; i: the i-th of `sequence`, counted from 1; beyond: the last. May
        be traced.
      sequence: (N kept, M) of each stage, such as `stepwise_sequence(n, m)` or
        `geometric_sequence(n, m)`. The last is what is trained for.
      axis: The contraction axis. None: axis -2, the input axis of a Flax kernel.

    Returns:
      The weight to use, shaped and typed like `w`.

    Raises:
      ValueError: `sequence` is empty, `w` is not floating, or as `masks.nm_mask` does
        for any of the sequence, at once.

    Example:
      >>> w = jnp.array([[4.0], [-1.0], [2.0], [3.0]])
      >>> for step in (0, 100, 200):
      ...     i = sparsejax.schedules.stage(step, stages=2, begin=100, end=300)
      ...     print(structure_decay(w, i, sequence=stepwise_sequence(2, 4))[:, 0])
      [ 4. -1.  2.  3.]
      [4. 0. 2. 3.]
      [4. 0. 0. 3.]

    References:
      Bambhaniya et al., `Progressive Gradient Flow
      <https://arxiv.org/abs/2402.04744>`_, 2024.
    """
    check_floating(w)
    if not sequence:
        raise ValueError("sequence must hold at least one (n, m), got none")
    dense = lambda scores: jnp.ones(scores.shape, bool)
    masks = [functools.partial(nm_mask, n=n, m=m, axis=axis) for n, m in sequence]
    scores = jnp.abs(jax.lax.stop_gradient(w))
    mask = jax.lax.switch(jnp.asarray(stage, jnp.int32), [dense, *masks], scores)
    return leaky_mask(w, mask, backward=1.0)


def stepwise_sequence(n: int, m: int) -> tuple[tuple[int, int], ...]:
    """From M-1 of M by halves to N of M: (M-1):M, M/2:M, M/4:M, ..., N:M.

    Args:
      n: How many of each group are KEPT at the end.
      m: Group size.

    Returns:
      `log2(m / n) + 1` pairs; one where that is N = M - 1 already.

    Raises:
      ValueError: `m / n` is not a power of two of at least 2.

    Example:
      >>> stepwise_sequence(1, 8)
      ((7, 8), (4, 8), (2, 8), (1, 8))
    """
    ratio = m // n if n >= 1 and m % n == 0 else 0
    if ratio < 2 or ratio & (ratio - 1):
        raise ValueError(
            f"m must be n times a power of two, 2 or more, got n={n}, m={m}"
        )
    halves = [m >> i for i in range(1, ratio.bit_length())]
    return tuple((kept, m) for kept in dict.fromkeys([m - 1, *halves]))


def geometric_sequence(
    n: int, m: int, *, factors: Sequence[int] = (8, 4, 2, 1)
) -> tuple[tuple[int, int], ...]:
    """N:M at one density in ever smaller groups: 8N:8M, 4N:4M, 2N:2M, N:M.

    A mask costs as many comparisons per entry as its group has entries, so that the
    first stages cost the most.

    Args:
      n: How many of each group are KEPT at the end.
      m: Group size at the end.
      factors: What both are multiplied by, stage by stage.

    Returns:
      A pair for each of `factors`.

    Raises:
      ValueError: `factors` do not fall to 1, or n is outside [1, m].

    Example:
      >>> geometric_sequence(1, 4)
      ((8, 32), (4, 16), (2, 8), (1, 4))
    """
    if not 1 <= n <= m:
        raise ValueError(f"n must be in [1, m], got n={n}, m={m}")
    factors = tuple(factors)
    falls = all(one > two for one, two in zip(factors, factors[1:], strict=False))
    if not factors or not falls or factors[-1] != 1:
        raise ValueError(f"factors must fall to 1, got {factors}")
    return tuple((factor * n, factor * m) for factor in factors)


def _mask(w, n, m, axis):
    check_floating(w)
    return nm_mask(jnp.abs(jax.lax.stop_gradient(w)), n, m, axis)
