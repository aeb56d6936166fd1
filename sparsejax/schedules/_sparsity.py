"""Sparsity as a function of the step."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.schedules._times import update_steps


def cubic_sparsity(
    step: Any,
    *,
    final: float,
    initial: float = 0.0,
    begin: int = 0,
    end: int,
    every: int = 1,
) -> Any:
    r"""Rises from `initial` to `final` sparsity, fast at first.

    .. math:: s_t = s_f + (s_i - s_f) \left(1 - \frac{t - t_0}{t_n - t_0}\right)^3

    where :math:`t_0` is `begin` and :math:`t_n` the last update: `end`, or the
    multiple of `every` before it, so that the last update reaches `final` exactly.
    Before `begin` it is `initial`; where there is one update only it is `final`.

    Args:
      step: Count of finished steps. A traced or jax value gives float32; a Python
        or numpy number gives a numpy float64.
      final: Sparsity at the last update.
      initial: Sparsity at the first update.
      begin: First update.
      end: No update comes after it.
      every: Steps between updates.

    Returns:
      The sparsity at `step`.

    Raises:
      ValueError: A sparsity is outside [0, 1] or nothing would ever be updated.

    Example:
      >>> [float(cubic_sparsity(t, final=0.5, end=20)) for t in (0, 10, 20)]
      [0.0, 0.4375, 0.5]

    References:
      Zhu and Gupta, `To prune, or not to prune <https://arxiv.org/abs/1710.01878>`_,
      2017.
    """
    for name, value in (("final", final), ("initial", initial)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} must be in [0, 1], got {value}")
    last = update_steps(begin, end, every)[-1]
    traced = isinstance(step, jax.Array)
    xp = jnp if traced else np
    at = step.astype(jnp.float32) if traced else np.asarray(step, np.float64)
    left = 1 - xp.clip((at - begin) / max(last - begin, 1), 0, 1)
    sparsity = final + (initial - final) * left**3
    # The ends exactly: 1 - 1 + ... may round.
    sparsity = xp.where(at >= last, final, xp.where(at < begin, initial, sparsity))
    return sparsity.astype(jnp.float32) if traced else sparsity[()]
