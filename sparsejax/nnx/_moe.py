"""Mixture-of-experts modules."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from sparsejax import layers
from sparsejax.routing import Routing, SoftRouting


class Balance(nnx.Variable):
    """Bias of logits ``[e]`` that balances experts without a loss.

    Moved by ``routing.update_bias`` from a step's counts, never by an optimizer:
    ``nnx.grad`` and ``nnx.Optimizer(..., wrt=nnx.Param)`` pass it by.
    """


class MoE(nnx.Module):
    """y = sum_j w_j expert_j(x) + shared(x); see ``layers.MoESpec`` for the arguments.

    Example:
      >>> import functools
      >>> from flax import nnx
      >>> import sparsejax.nnx
      >>> from sparsejax import routing
      >>> router = functools.partial(routing.top_k, k=2, normalize="sum_stopgrad")
      >>> moe = sparsejax.nnx.MoE(
      ...     8, 16, num_experts=4, router=router, balance=True, rngs=nnx.Rngs(0))
      >>> y, aux = moe(jnp.ones((3, 5, 8)))
      >>> moe.balance[...] = routing.update_bias(moe.balance[...], aux.counts)
      >>> int(aux.counts.sum())
      30
    """

    def __init__(
        self,
        features: int,
        hidden_features: int,
        *,
        num_experts: int,
        router: Callable[..., Routing | SoftRouting],
        router_outputs: int | None = None,
        gated: bool = False,
        activation: Callable[[Array], Array] = jax.nn.silu,
        shared_experts: int = 0,
        jitter: float = 0.0,
        balance: bool = False,
        gain: float | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        implementation: Any = None,
        rngs: nnx.Rngs,
    ):
        """Draws the parameters from ``rngs.params()``."""
        self.spec = layers.MoESpec(
            features=features,
            hidden_features=hidden_features,
            num_experts=num_experts,
            router=router,
            router_outputs=router_outputs,
            gated=gated,
            activation=activation,
            shared_experts=shared_experts,
            jitter=jitter,
            balance=balance,
            gain=gain,
            dtype=dtype,
            param_dtype=param_dtype,
            implementation=implementation,
        )
        params, state = layers.init_moe(rngs.params(), self.spec)
        self.names = tuple(params)
        for name, value in params.items():
            setattr(self, name, nnx.Param(value))
        self.balance = Balance(state["balance"]) if balance else nnx.data(None)

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
        params = {name: getattr(self, name).get_value() for name in self.names}
        balance = self.balance
        return layers.apply_moe(
            self.spec,
            params,
            x,
            balance=None if balance is None else balance.get_value(),
            mask=mask,
            ids=ids,
            key=key,
            **router_arguments,
        )


class GroupedProjection(nnx.Module):
    """A projection per expert; see ``layers.GroupedProjectionSpec``."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        num_experts: int,
        form: str = "mix",
        gain: float = 1.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        implementation: Any = None,
        rngs: nnx.Rngs,
    ):
        """Draws the kernel from ``rngs.params()``."""
        self.spec = layers.GroupedProjectionSpec(
            in_features=in_features,
            out_features=out_features,
            num_experts=num_experts,
            form=form,
            gain=gain,
            dtype=dtype,
            param_dtype=param_dtype,
            implementation=implementation,
        )
        params = layers.init_grouped_projection(rngs.params(), self.spec)
        self.kernel = nnx.Param(params["kernel"])

    def __call__(self, x: Float[Array, "..."], routing: Routing) -> Float[Array, "..."]:
        """Projects x by ``routing``; see ``layers.apply_grouped_projection``."""
        params = {"kernel": self.kernel.get_value()}
        return layers.apply_grouped_projection(self.spec, params, x, routing)
