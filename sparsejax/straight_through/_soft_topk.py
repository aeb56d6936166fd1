"""A soft mask that sums to k and hardens to the k largest."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from sparsejax.masks import topk_mask
from sparsejax.straight_through._leaky import (
    Scalar,
    accumulator,
    check_floating,
    scalar_like,
)

# A sigmoid is 0 or 1 to every digit long before its argument is this far out.
_FAR = 400.0
# Of 60,000 random clusters none took more than 20.
_MAX_STEPS = 32


def soft_topk(
    scores: Shaped[Array, "*shape"],
    count: int | Int[Array, ""],
    temperature: Scalar,
) -> Float[Array, "*shape"]:
    r"""Relaxes the mask of the k largest scores into sigmoids that sum to k.

    .. math::
      \mu_i = \sigma\left(\frac{s_i - \tau}{\theta}\right), \qquad
      \sum_i \mu_i = k

    The threshold :math:`\tau` is solved for, and the gradient goes through it (by the
    implicit function theorem), so that what one entry gains the others lose:

    .. math::
      \frac{\partial L}{\partial s_i} = \frac{\mu_i'}{\theta} \left(
        g_i - \frac{\sum_j \mu_j' g_j}{\sum_j \mu_j'}\right), \qquad
      \mu' = \mu (1 - \mu)

    As the temperature :math:`\theta` falls to 0 the mask hardens to that of
    `masks.topk_mask`, which it is at 0. Entries that equal the k-th largest share what
    is left of k among them at every temperature above. Use it as
    `w * soft_topk(jnp.abs(w), count, temperature)`. Costs a `topk_mask` and a few
    passes (Newton's iteration, 3 to 20) over the scores.

    Args:
      scores: Scores of any shape, all in one competition (`jax.vmap` for one per row);
        floating. NaN counts as -inf and gets no gradient.
      count: k: an int, or a traced int32 scalar.
      temperature: :math:`\theta`, in units of the scores; may be traced, has gradient
        zero. 0 or below: the hard mask, whose gradient is zero.

    Returns:
      The soft mask in [0, 1], shaped and typed like `scores`. It is worked out in
      float32 at least; the sum is k up to the rounding of the dtype.

    Raises:
      ValueError: An int `count` outside [0, size], `scores` is not floating, or
        `temperature` is no scalar.

    Example:
      >>> scores = jnp.array([3.0, 1.0, 2.0, -1.0])
      >>> [round(share, 3) for share in soft_topk(scores, 2, 1.0).tolist()]
      [0.84, 0.415, 0.658, 0.087]
      >>> print(soft_topk(scores, 2, 0.001))
      [1. 0. 1. 0.]
    """
    check_floating(scores)
    wide = scores.astype(accumulator(scores))
    wide = jnp.where(jnp.isnan(wide), -jnp.inf, wide)
    temperature = scalar_like(temperature, wide, "temperature")
    if scores.size == 0:
        return scores
    if isinstance(count, int) and not 0 <= count <= scores.size:
        raise ValueError(f"count must be in [0, {scores.size}], got {count}")
    count = jnp.clip(jnp.asarray(count, jnp.int32), 0, scores.size)
    return _soft(wide, count, temperature).astype(scores.dtype)


@jax.custom_vjp
def _soft(scores, count, temperature):
    hard = topk_mask(scores, count)
    kth = jnp.min(scores, where=hard, initial=jnp.inf)
    # Distances to the k-th largest, which are exact near it, in units of temperature.
    unit = jnp.where(temperature > 0, temperature, 1)
    z = jnp.clip((scores - kth) / unit, -_FAR, _FAR)
    z = jnp.where(scores == kth, 0, z)  # not inf - inf
    soft = jax.nn.sigmoid(z - _shift(z, hard))
    proper = (temperature > 0) & (count > 0) & (count < scores.size)
    return jnp.where(proper, soft, hard.astype(scores.dtype))


def _soft_fwd(scores, count, temperature):
    soft = _soft(scores, count, temperature)
    return soft, (soft, temperature)


def _soft_bwd(saved, g):
    soft, temperature = saved
    slope = soft * (1 - soft)  # zero everywhere in a hard mask
    total = jnp.sum(slope)
    mean = jnp.sum(slope * g) / jnp.where(total > 0, total, 1)
    scale = jnp.where(temperature > 0, temperature, 1)
    return slope * (g - mean) / scale, None, jnp.zeros_like(temperature)


_soft.defvjp(_soft_fwd, _soft_bwd)


def _shift(z, hard):
    """The number by which `sum(sigmoid(z - shift))` is the count of `hard`.

    Newton's iteration on the tails: what kept entries lack and what the others have.
    `z` is 0 at the count-th largest, and the start lies between it and the next, where
    no tail exceeds 1/2 and a step is 2 at most.
    """
    side = jnp.where(hard, -1, 1).astype(z.dtype)
    eps = jnp.finfo(z.dtype).eps

    def step(shift):
        tail = jax.nn.sigmoid(side * (z - shift))
        excess, slope = jnp.sum(side * tail), jnp.sum(tail * (1 - tail))
        move = jnp.clip(excess / jnp.maximum(slope, eps), -2, 2)
        # As good as right: tails that small would only be chased about by rounding.
        return jnp.where(jnp.abs(excess) <= eps, 0, move)

    def unfinished(state):
        shift, move, steps = state
        close = 16 * eps * jnp.maximum(1, jnp.abs(shift))
        return (jnp.abs(move) > close) & (steps < _MAX_STEPS)

    def improve(state):
        shift, _, steps = state
        move = step(shift)
        return shift + move, move, steps + 1

    following = jnp.max(z, where=~hard, initial=-_FAR)
    start = (following / 2, jnp.ones((), z.dtype), jnp.int32(0))
    return jax.lax.while_loop(unfinished, improve, start)[0]
