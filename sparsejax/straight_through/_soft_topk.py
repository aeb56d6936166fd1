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
_MAX_STEPS = 64


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
    passes (a safeguarded Newton iteration, typically 5 to 15) over the scores.

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
    soft = jax.nn.sigmoid(z - _shift(z, hard, count))
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


def _shift(z, hard, count):
    """The number by which `sum(sigmoid(z - shift))` is `count`, 0 < count < size.

    `z` is 0 at the count-th largest. The bracket: with L = log(count), the shift
    `next - L` puts count + 1 entries at sigmoid(L) or above, which sum to count at
    least; and with L = log(size - count), the shift L puts all but count - 1 at
    sigmoid(-L) or below, which sum to 1 at most.
    """
    kept = count.astype(z.dtype)
    after = jnp.max(z, where=~hard, initial=-_FAR)
    low = after - jnp.log(jnp.maximum(kept, 1))
    high = jnp.log(jnp.maximum(z.size - kept, 1))
    close = 4 * jnp.finfo(z.dtype).eps

    def excess(shift):
        soft = jax.nn.sigmoid(z - shift)
        return jnp.sum(soft) - kept, jnp.sum(soft * (1 - soft))

    def unfinished(state):
        low, high, shift, step = state
        wide = high - low > close * jnp.maximum(1, jnp.abs(shift))
        return wide & (step < _MAX_STEPS)

    def narrow(state):
        low, high, shift, step = state
        error, slope = excess(shift)
        low, high = jnp.where(error > 0, shift, low), jnp.where(error > 0, high, shift)
        newton = shift + error / jnp.maximum(slope, jnp.finfo(z.dtype).tiny)
        inside = (newton > low) & (newton < high)
        found = jnp.abs(error) <= close * kept
        bracket = jnp.where(found, shift, jnp.stack([low, high]))
        following = jnp.where(inside, newton, (low + high) / 2)
        return *bracket, jnp.where(found, shift, following), step + 1

    # Between the count-th and the next: right at once where the mask is all but hard.
    start = (low, high, after / 2, jnp.int32(0))
    return jax.lax.while_loop(unfinished, narrow, start)[2]
