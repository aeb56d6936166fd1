"""Fraction of the kept weights that an update exchanges."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.schedules._times import update_steps


def cosine_drop_fraction(
    step: Any, *, fraction: float, begin: int = 0, end: int
) -> Any:
    r"""Falls from `fraction` at `begin` to 0 at `end` along half a cosine.

    .. math:: f_t = \frac{\alpha}{2} \left(1 + \cos \pi \frac{t - t_0}{T - t_0}\right)

    Time is counted from `begin`, so that a late begin still starts at `fraction`.

    Args:
      step: Count of finished steps. A traced or jax value gives float32; a Python
        or numpy number gives a numpy float64.
      fraction: Fraction at `begin`, alpha.
      begin: First update, t_0.
      end: Step at which the fraction is 0, T; equal to `begin` it has no effect.

    Returns:
      The fraction at `step`.

    Raises:
      ValueError: `fraction` is outside [0, 1] or `end` comes before `begin`.

    Example:
      >>> f = lambda t: cosine_drop_fraction(t, fraction=0.3, begin=100, end=300)
      >>> [round(float(f(t)), 4) for t in (100, 200, 300)]
      [0.3, 0.15, 0.0]

    References:
      Evci et al., `Rigging the Lottery <https://arxiv.org/abs/1911.11134>`_, 2020.
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction must be in [0, 1], got {fraction}")
    update_steps(begin, end, 1)
    traced = isinstance(step, jax.Array)
    xp = jnp if traced else np
    at = step.astype(jnp.float32) if traced else np.asarray(step, np.float64)
    progress = xp.clip((at - begin) / max(end - begin, 1), 0, 1)
    return fraction / 2 * (1 + xp.cos(np.pi * progress))
