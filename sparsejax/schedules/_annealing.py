"""A number that falls or rises over an interval: linear, cosine, exponential and so on.

All are pure functions of the step: `initial` up to `begin`, `final` exactly from `end`
on. Nothing is kept between calls, so that an annealed factor cannot compound and a run
that is resumed finds the value it left.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def linear(
    step: Any, *, initial: float = 1.0, final: float = 0.0, begin: int = 0, end: int
) -> Any:
    r"""Goes from `initial` at `begin` to `final` at `end` along a line.

    .. math:: v_t = v_1 + (v_0 - v_1) \left(1 - \frac{t - t_0}{T - t_0}\right)

    Args:
      step: Count of finished steps. A traced or jax value gives float32; a Python
        or numpy number gives a numpy float64.
      initial: Value up to `begin`.
      final: Value from `end` on.
      begin: Where it starts to change, t_0.
      end: Where it ends, T; equal to `begin` it jumps.

    Returns:
      The value at `step`.

    Raises:
      ValueError: `end` comes before `begin`, `begin` is negative, or a value is not
        finite.

    Example:
      >>> [float(linear(t, begin=10, end=20)) for t in (0, 10, 15, 20, 99)]
      [1.0, 1.0, 0.5, 0.0, 0.0]
    """
    return _anneal(step, lambda p, _, xp: 1 - p, initial, final, begin, end)


def cosine(
    step: Any, *, initial: float = 1.0, final: float = 0.0, begin: int = 0, end: int
) -> Any:
    r"""Goes from `initial` at `begin` to `final` at `end` along half a cosine.

    .. math::
      v_t = v_1 + \frac{v_0 - v_1}{2}
            \left(1 + \cos \pi \frac{t - t_0}{T - t_0}\right)

    Args:
      step: Count of finished steps. A traced or jax value gives float32; a Python
        or numpy number gives a numpy float64.
      initial: Value up to `begin`.
      final: Value from `end` on.
      begin: Where it starts to change, t_0.
      end: Where it ends, T; equal to `begin` it jumps.

    Returns:
      The value at `step`.

    Raises:
      ValueError: `end` comes before `begin`, `begin` is negative, or a value is not
        finite.

    Example:
      >>> [round(float(cosine(t, initial=0.5, end=4)), 4) for t in (0, 1, 2, 4)]
      [0.5, 0.4268, 0.25, 0.0]
    """
    shape = lambda p, _, xp: _half_cosine(p, xp)
    return _anneal(step, shape, initial, final, begin, end)


def exponential(
    step: Any,
    *,
    rate: float = 2e-4,
    initial: float = 1.0,
    final: float = 0.0,
    begin: int = 0,
    end: int,
) -> Any:
    r"""Decays from `initial` towards `final`, and is `final` from `end` on.

    .. math:: v_t = v_1 + (v_0 - v_1) e^{-c (t - t_0)}

    The curve itself never arrives: the value drops the rest of the way at `end`, by a
    fraction :math:`e^{-c (T - t_0)}` of the whole.

    Args:
      step: Count of finished steps. A traced or jax value gives float32; a Python
        or numpy number gives a numpy float64.
      rate: Decay per step, c; mask decay's code has 2e-4.
      initial: Value up to `begin`.
      final: Value from `end` on.
      begin: Where it starts to change, t_0.
      end: Where it ends, T.

    Returns:
      The value at `step`.

    Raises:
      ValueError: `rate` is not positive, `end` comes before `begin`, `begin` is
        negative, or a value is not finite.

    Example:
      >>> [round(float(exponential(t, end=9_000)), 4) for t in (0, 5_000, 9_000)]
      [1.0, 0.3679, 0.0]

    References:
      Bambhaniya et al., `Progressive Gradient Flow
      <https://arxiv.org/abs/2402.04744>`_, 2024.
    """
    if not 0 < rate < math.inf:
        raise ValueError(f"rate must be positive and finite, got {rate}")
    shape = lambda _, elapsed, xp: xp.exp(-rate * elapsed)
    return _anneal(step, shape, initial, final, begin, end)


def cosine_sigmoid(
    step: Any,
    *,
    initial: float = 0.75,
    final: float = 0.0,
    begin: int = 0,
    end: int,
    reset: int | None = None,
) -> Any:
    r"""Stays high along a sigmoid, then falls slowly along a cosine: AutoSparse's.

    .. math::
      v_t = v_1 + (v_0 - v_1) \max\left(\frac{1 + \cos \pi p}{2},
            1 - \sigma(-6 + 12 p)\right), \qquad p = \frac{t - t_0}{T - t_0}

    The value is `initial` times the curve at t, never the value before times the
    curve: multiplied up step by step it would be gone within the first half.

    Args:
      step: Count of finished steps. A traced or jax value gives float32; a Python
        or numpy number gives a numpy float64.
      initial: Value up to `begin`; the paper's ResNet50 has 0.75.
      final: Value from `end` on.
      begin: Where it starts to change, t_0.
      end: Where it ends, T: the end of training in the paper.
      reset: From this step on the value is `final` already; the paper takes 90% of
        training. None: `end`.

    Returns:
      The value at `step`.

    Raises:
      ValueError: `end` comes before `begin`, `reset` lies outside them, `begin` is
        negative, or a value is not finite.

    Example:
      >>> f = lambda t: cosine_sigmoid(t, initial=1.0, end=100, reset=90)
      >>> [round(float(f(t)), 4) for t in (0, 30, 50, 89, 90)]
      [1.0, 0.9168, 0.5, 0.0296, 0.0]

    References:
      Kundu et al., `AutoSparse <https://arxiv.org/abs/2304.06941>`_, 2023.
    """
    if reset is not None and not begin <= reset <= end:
        raise ValueError(
            f"reset must be in [begin, end], [{begin}, {end}], got {reset}"
        )

    def shape(p, _, xp):
        return xp.maximum(_half_cosine(p, xp), 1 / (1 + xp.exp(12 * p - 6)))

    return _anneal(step, shape, initial, final, begin, end, reset)


def stage(step: Any, *, stages: int, begin: int = 0, end: int) -> Any:
    r"""Counts the stages that have begun: 0 before `begin`, then 1 to `stages`.

    .. math:: i_t = \#\{i < k : t \ge t_0 + \lfloor i (T - t_0) / k \rfloor\}

    so that each of the k stages has an equal share of [begin, end), the last of them
    to its end and beyond.

    Args:
      step: Count of finished steps, traced or not.
      stages: How many stages, k.
      begin: Where stage 1 begins, t_0.
      end: Where the last stage's share ends, T.

    Returns:
      The stage at `step`: an int32 scalar, or shaped like `step`; an int for an int.

    Raises:
      ValueError: `stages` is below 1, `begin` is negative, or [begin, end) has fewer
        steps than stages, so that one would be left out.

    Example:
      >>> [stage(t, stages=3, begin=10, end=40) for t in (9, 10, 19, 20, 30, 99)]
      [0, 1, 1, 2, 3, 3]
    """
    if stages < 1:
        raise ValueError(f"stages must be at least 1, got {stages}")
    _check_interval(begin, end)
    if end - begin < stages:
        raise ValueError(
            f"end must leave each of the {stages} stages a step, got begin={begin}, "
            f"end={end}"
        )
    # Compared one by one, because step * stages could overflow int32.
    begun = [step >= begin + index * (end - begin) // stages for index in range(stages)]
    if isinstance(step, jax.Array):
        return sum(each.astype(jnp.int32) for each in begun)
    return sum(begun)


def _anneal(step, shape, initial, final, begin, end, reset=None):
    """Goes from initial to final as `shape(progress, elapsed, xp)` goes from 1 to 0."""
    _check_interval(begin, end)
    for name, value in (("initial", initial), ("final", final)):
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
    traced = isinstance(step, jax.Array)
    xp = jnp if traced else np
    dtype = jnp.float32 if traced else np.float64
    step = xp.asarray(step)
    # Integers up to here: float32 cannot tell steps beyond 2**24 apart.
    elapsed = (xp.clip(step, begin, end) - begin).astype(dtype)
    value = final + (initial - final) * shape(
        elapsed / max(end - begin, 1), elapsed, xp
    )
    # The ends exactly: sums may round, and some curves do not arrive.
    value = xp.where(step < begin, initial, value)
    value = xp.where(step >= (end if reset is None else reset), final, value)
    return value.astype(jnp.float32) if traced else value[()]


def _half_cosine(progress: Any, xp: Any) -> Any:
    return (1 + xp.cos(np.pi * progress)) / 2


def _check_interval(begin: int, end: int) -> None:
    if begin < 0:
        raise ValueError(f"begin must be at least 0, got {begin}")
    if end < begin:
        raise ValueError(f"end must be at least begin, got begin={begin}, end={end}")
