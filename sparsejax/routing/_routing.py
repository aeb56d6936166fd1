"""Routing: which token goes to which expert, with which weight."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("indices", "weights", "valid", "probs", "mask", "demand"),
    meta_fields=("by_expert",),
)
@dataclasses.dataclass(frozen=True, eq=False)
class Routing:
    """Which token goes to which expert: what every router returns and operators take.

    A pytree of arrays with static shapes; t tokens, e experts. A router of variable k
    fills ``valid`` under a static bound.

    Attributes:
      indices: Experts of each token, int32 ``[t, k]``; tokens of each expert,
        ``[e, c]``, where ``by_expert``. In range also where not valid.
      weights: Weight of each choice in the combination, float32, of the same shape;
        exactly 0 where not valid.
      valid: Which choices count, bool, of the same shape: False for padding tokens, for
        choices beyond a capacity, for unused places of a router of variable k.
      probs: The router's scores of all experts, float32 ``[t, e]``, for losses and
        metrics; 0 for padding tokens.
      mask: True for tokens, False for padding, bool ``[t]``; None: all are tokens.
      demand: How many tokens asked for each expert before any was turned away, int32
        ``[e]``; None: all who asked were served.
      by_expert: Whether the choices are listed by expert (static).
    """

    # Not annotated with shapes: a pytree's leaves may be anything while JAX rebuilds
    # it.
    indices: Any
    weights: Any
    valid: Any
    probs: Any
    mask: Any = None
    demand: Any = None
    by_expert: bool = False

    @property
    def num_tokens(self) -> int:
        """T, padding included."""
        return self.probs.shape[0]

    @property
    def num_experts(self) -> int:
        """E."""
        return self.probs.shape[1]

    def choices(
        self,
    ) -> tuple[Int[Array, "..."], Int[Array, "..."], Float[Array, "..."]]:
        """The choices as flat lists, in storage order.

        Returns:
          tokens int32 ``[c]``, experts int32 ``[c]``, weights float32 ``[c]``, c the
          number of places; a choice that is not valid has expert e, which is none.
        """
        lists = jax.lax.broadcasted_iota(jnp.int32, self.indices.shape, 0)
        tokens, experts = lists, self.indices
        if self.by_expert:
            tokens, experts = experts, tokens
        experts = jnp.where(self.valid, experts, self.num_experts)
        return tokens.ravel(), experts.ravel(), self.weights.ravel()

    def counts(self) -> Int[Array, "..."]:
        """Tokens that each expert serves, int32 ``[e]``."""
        _, experts, _ = self.choices()
        ones = jnp.ones_like(experts)
        return jnp.zeros(self.num_experts, jnp.int32).at[experts].add(ones, mode="drop")
