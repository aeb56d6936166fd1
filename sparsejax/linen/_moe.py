"""Mixture-of-experts modules."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from sparsejax import layers
from sparsejax.routing import Routing, SoftRouting


class MoE(nn.Module):
    """y = sum_j w_j expert_j(x) + shared(x); see ``layers.MoESpec`` for the fields.

    The bias of auxiliary-loss-free balancing is the variable ``balance`` of the
    collection "balance", which no apply changes: hand it to ``routing.update_bias``
    with the step's counts.
    """

    features: int
    hidden_features: int
    num_experts: int
    router: Callable[..., Routing | SoftRouting]
    router_outputs: int | None = None
    gated: bool = False
    activation: Callable[[Array], Array] = jax.nn.silu
    shared_experts: int = 0
    jitter: float = 0.0
    balance: bool = False
    gain: float | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    implementation: Any = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*batch d"],
        *,
        mask: Bool[Array, "..."] | None = None,
        ids: Int[Array, "..."] | None = None,
        key: Array | None = None,
        **router_arguments: Any,
    ) -> tuple[Float[Array, "*batch d"], layers.MoEAux]:
        """Computes y ``[..., d]`` and what was chosen; see ``layers.apply_moe``."""
        spec = _spec(self, layers.MoESpec)
        if self.is_initializing():
            params, state = layers.init_moe(self.make_rng("params"), spec)
            for name, value in params.items():
                self.param(name, lambda _, value=value: value)
            for name, value in state.items():
                self.variable("balance", name, lambda value=value: value)
        params = dict(self.variables["params"])
        return layers.apply_moe(
            spec,
            params,
            x,
            balance=self.get_variable("balance", "balance"),
            mask=mask,
            ids=ids,
            key=key,
            **router_arguments,
        )


class GroupedProjection(nn.Module):
    """A projection per expert; see ``layers.GroupedProjectionSpec``."""

    in_features: int
    out_features: int
    num_experts: int
    form: str = "mix"
    gain: float = 1.0
    dtype: Any = None
    param_dtype: Any = jnp.float32
    implementation: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "..."], routing: Routing) -> Float[Array, "..."]:
        """Projects x by ``routing``; see ``layers.apply_grouped_projection``."""
        spec = _spec(self, layers.GroupedProjectionSpec)
        init = lambda key: layers.init_grouped_projection(key, spec)["kernel"]
        params = {"kernel": self.param("kernel", init)}
        return layers.apply_grouped_projection(spec, params, x, routing)


def _spec(module, kind):
    """The module's fields are the spec's."""
    names = [field.name for field in dataclasses.fields(kind)]
    return kind(**{name: getattr(module, name) for name in names})
