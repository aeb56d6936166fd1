"""Capacity: how many tokens an expert may take, and who is served."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def capacity(tokens: int, experts: int, k: int, factor: float = 1.0) -> int:
    r"""Tokens per expert at a given factor over a perfectly even load.

    .. math:: c = \min(t, \lceil \varphi k t / e \rceil)

    Args:
      tokens: Tokens that are routed together, t; padding is counted by who counts it.
      experts: Experts, e.
      k: Choices per token.
      factor: How many times the even share fits, :math:`\varphi`; common are 1 to 2.

    Returns:
      The capacity, at least 1.

    Raises:
      ValueError: `factor` is not positive and finite, a count is below 1, or `k`
        exceeds `experts`.

    Example:
      >>> capacity(4096, 8, 2, 1.25)
      1280
    """
    for name, value in (("tokens", tokens), ("experts", experts), ("k", k)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, needed at least 1")
    if k > experts:
        raise ValueError(f"k: got {k}, needed an int from 1 to the {experts} experts")
    if not 0 < factor < math.inf:
        raise ValueError(f"factor: got {factor}, needed a positive finite number")
    # Rounded first: 1.1 * 80 / 8 is a little above 11, which is not meant.
    return min(tokens, max(1, math.ceil(round(factor * k * tokens / experts, 6))))


def served(
    experts: Int[Array, "n"],
    num_experts: int,
    capacity: int,
    priority: Float[Array, "n"] | None = None,
) -> Bool[Array, "n"]:
    """Which choices the experts have room for: the first `capacity` of each.

    Args:
      experts: Expert of each choice; `num_experts` for none, which is never served.
      num_experts: How many experts there are.
      capacity: How many choices each takes.
      priority: The highest are served first, ties in order of the list. None: all in
        order of the list.

    Returns:
      Whether each choice is served.
    """
    n = experts.size
    places = jnp.arange(n, dtype=jnp.int32)
    if priority is None:
        by_expert, order = jax.lax.sort((experts, places), num_keys=1, is_stable=True)
    else:
        by_expert, _, order = jax.lax.sort(
            (experts, -priority, places), num_keys=2, is_stable=True
        )
    # The place in the queue: how far from the first choice of the same expert.
    first = jnp.searchsorted(by_expert, by_expert, side="left").astype(jnp.int32)
    fits = (places - first < capacity) & (by_expert < num_experts)
    return jnp.zeros(n, bool).at[order].set(fits, unique_indices=True)
