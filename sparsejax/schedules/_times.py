"""The steps at which masks change, as a Python range."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

_FOREVER = 2**31 - 1  # step counts are int32


def update_steps(begin: int, end: int | None, every: int) -> range:
    """The steps begin, begin + every, ... up to and including `end`.

    Args:
      begin: First update, as a count of finished optimizer steps; 0 is the first
        step.
      end: No update comes after it. None: updates never end.
      every: Steps between updates.

    Returns:
      A range; its last element is the last update.

    Raises:
      ValueError: No step would be an update, or a number is out of range.

    Example:
      >>> list(update_steps(begin=10, end=45, every=10))
      [10, 20, 30, 40]
    """
    for name, value in (("begin", begin), ("end", end), ("every", every)):
        if not isinstance(value, int | np.integer) and (name, value) != ("end", None):
            raise ValueError(f"{name} must be an integer, got {value!r}")
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")
    if not 0 <= begin < _FOREVER:
        raise ValueError(f"begin must be in [0, 2**31 - 1), got {begin}")
    if end is not None and end < begin:
        raise ValueError(
            f"end must be at least begin, or nothing would ever be updated, got "
            f"begin={begin}, end={end}"
        )
    return range(begin, min(_FOREVER, _FOREVER if end is None else end + 1), every)


def is_update(step: int | Int[Array, "..."], steps: range) -> bool | Bool[Array, "..."]:
    """Whether masks change at `step`, which may be traced.

    Args:
      step: Count of finished steps.
      steps: What `update_steps` returned; an empty range never updates.

    Returns:
      A bool, or a boolean array shaped like `step`.

    Example:
      >>> is_update(20, update_steps(begin=10, end=45, every=10))
      True
    """
    if isinstance(step, int):
        return step in steps
    if not steps:
        return jnp.zeros(jnp.shape(step), bool)
    in_time = (step >= steps[0]) & (step <= steps[-1])
    return in_time & ((step - steps[0]) % steps.step == 0)


def next_update(step: Any, steps: range) -> Int[Array, ""]:
    """The first update at `step` or later; -1 if there is none.

    Args:
      step: Count of finished steps, traced or not.
      steps: What `update_steps` returned.

    Returns:
      An int32 scalar.

    Example:
      >>> print(next_update(11, update_steps(begin=10, end=45, every=10)))
      20
    """
    step = jnp.asarray(step, jnp.int32)
    if not steps:
        return jnp.full_like(step, -1)
    # The clip keeps the sum below from overflowing near the last step of int32.
    index = jnp.clip(step, steps[0], steps[-1]) - steps[0] + steps.step - 1
    index = index // steps.step
    return jnp.where(step <= steps[-1], steps[0] + index * steps.step, -1)
