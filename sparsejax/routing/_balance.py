"""Balance without a loss: a bias per expert, moved by counts."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from sparsejax.routing._choices import check_option


def update_bias(
    bias: Float[Array, "..."],
    counts: Shaped[Array, "..."],
    *,
    rate: float | Float[Array, ""] = 1e-3,
    rule: str = "sign",
) -> Float[Array, "..."]:
    r"""Raises the bias of experts with few tokens, lowers that of those with many.

    .. math::
      b'_i = b_i + u\, \mathrm{sign}(\bar c - c_i)
      \quad \text{or} \quad b_i + u\, \frac{\bar c - c_i}{\bar c},
      \qquad b \leftarrow b' - \bar{b'}

    A pure function to call once per step, outside the gradient and the optimizer. The
    bias only chooses (`top_k` takes it as ``bias``); a constant in it would change
    nothing but grow, so its mean is kept at 0.

    Args:
      bias: What was added to the scores, float32 ``[e]``.
      counts: Choices per expert ``[e]`` before any was turned away, such as ``demand``
        of a ``Routing``, summed over devices and micro-batches: every replica must be
        given the same.
      rate: Size of a step, u.
      rule: "sign": equal steps, as published. "proportional": by the excess relative to
        the mean, which comes to rest at balance.

    Returns:
      The next bias, of mean 0; the bias centred, where nothing was counted.

    Raises:
      ValueError: Shapes differ, or an unknown rule.

    Example:
      >>> print(update_bias(jnp.zeros(4), jnp.array([5, 1, 1, 1]), rate=0.1))
      [-0.15  0.05  0.05  0.05]

    References:
      Wang et al., `Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts
      <https://arxiv.org/abs/2408.15664>`_, 2024.
    """
    if bias.ndim != 1 or counts.shape != bias.shape:
        raise ValueError(
            f"counts: got shape {counts.shape} for bias {bias.shape}, needed [e] both"
        )
    check_option("rule", rule, ("sign", "proportional"))
    # From the smallest on: a mean of large equal counts would round to another number.
    fewest = counts.min()
    excess = (counts - fewest).astype(jnp.float32)
    lack = excess.mean() - excess
    if rule == "sign":
        step = jnp.sign(lack)
    else:
        mean = fewest.astype(jnp.float32) + excess.mean()
        step = lack / jnp.where(mean == 0, 1, mean)
    moved = bias + (jnp.asarray(rate, jnp.float32) * step).astype(bias.dtype)
    return moved - moved.mean()
