"""What a mixture of experts is made of, and its first parameters."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sparsejax._dispatch import Choice
from sparsejax.routing import Routing, SoftRouting

# Logits begin with this variance for inputs of variance 1: a tenth of what keeps
# variance, as Switch Transformers found stable.
_LOGITS_VARIANCE = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoESpec:
    """What a mixture of experts is made of.

    Attributes:
      features: d, size of x's and y's last axis.
      hidden_features: f, hidden units of each expert.
      num_experts: e, experts that are routed to.
      router: Function of logits float32 ``[t, e]`` to a ``routing.Routing`` or
        ``SoftRouting``, such as ``functools.partial(routing.top_k, k=2,
        normalize="sum_stopgrad")``. It is handed ``mask`` and ``ids`` where the call
        has them, ``bias`` where ``balance`` is set, ``key`` where the call has one and
        the router takes it, and whatever else the call was given.
      router_outputs: Logits per token, where they are not one for each expert: of
        ``routing.soft`` e for each slot, of ``routing.tree`` 2 e - 1 for each tree. The
        router is to part them, ``lambda z, mask=None: routing.soft(z.reshape(-1, e, p),
        mask=mask)``. None: e.
      gated: Whether experts are gated, (activation(x W_gate) * (x W_in)) W_out, instead
        of activation(x W_in) W_out.
      activation: Of hidden units, elementwise.
      shared_experts: How many experts of f hidden units every token passes through
        besides, without a weight; they are one product of shared_experts * f units.
      jitter: The router sees x times a uniform draw from [1 - jitter, 1 + jitter) where
        the call has a key.
      balance: Whether there is a bias of logits for auxiliary-loss-free balancing.
      gain: Factor of the initial w_out, see ``init_moe``; None: sqrt(k) where the
        router is a partial function whose ``k`` is set, as above; 1 for others.
      dtype: In which experts are computed; None: promoted from x and w_in. The router
        computes in float32 whatever it is.
      param_dtype: In which experts are kept. The router's kernel is float32.
      implementation: As for ``ops.moe_mlp``.
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
    implementation: Choice = None

    def __post_init__(self):
        for name in ("features", "hidden_features", "num_experts", "router_outputs"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"{name}: got {size}, needed a positive int")
        if self.shared_experts < 0:
            raise ValueError(
                f"shared_experts: got {self.shared_experts}, needed at least 0"
            )
        if not 0 <= self.jitter < 1:
            raise ValueError(f"jitter: got {self.jitter}, needed a number in [0, 1)")
        if self.balance and not takes(self.router, "bias"):
            raise ValueError("balance: got True, needed a router that takes bias=")


def init_moe(key: Array, spec: MoESpec) -> tuple[dict[str, Array], dict[str, Array]]:
    """Draws parameters.

    All are normal. Logits have variance 0.1 for x of variance 1; w_in, w_gate and the
    shared experts have variance 1 / fan-in, as in a dense layer; w_out has gain^2 / f.
    A sum of k independent terms of weights 1 / k has 1 / k of the variance of one, so
    gain = sqrt(k) gives y the variance that it has in a dense layer. For other weights
    it is (sum w) / sqrt(sum w^2). With shared experts both halves have half of it.

    Args:
      key: PRNG key.
      spec: The layer.

    Returns:
      ({"router" float32 [d, e], or [d, router_outputs], "w_in" [e, d, f], "w_gate"
      [e, d, f] where gated, "w_out" [e, f, d], and, where there are shared experts,
      "shared_in" [d, s], "shared_gate" [d, s] where gated, "shared_out" [s, d]},
      {"balance" float32 zeros [e]} where ``spec.balance``, else {}).
    """
    d, f, e = spec.features, spec.hidden_features, spec.num_experts
    s = spec.shared_experts * f
    half = 0.5**0.5 if s else 1.0
    shapes = {
        "router": ((d, spec.router_outputs or e), (_LOGITS_VARIANCE / d) ** 0.5),
        "w_in": ((e, d, f), d**-0.5),
        "w_gate": ((e, d, f), d**-0.5),
        "w_out": ((e, f, d), half * f**-0.5),
        "shared_in": ((d, s), d**-0.5),
        "shared_gate": ((d, s), d**-0.5),
        "shared_out": ((s, d), half * max(s, 1) ** -0.5),
    }
    keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
    params = {}
    for name in _names(spec):
        shape, std = shapes[name]
        value = std * jax.random.normal(keys[name], shape, jnp.float32)
        if name == "w_out":
            value = _gain(spec) * value
        params[name] = value if name == "router" else value.astype(spec.param_dtype)
    return params, {"balance": jnp.zeros(e, jnp.float32)} if spec.balance else {}


def _names(spec):
    """Of the parameters that the spec has."""
    names = ["router", "w_in", *(["w_gate"] if spec.gated else []), "w_out"]
    if spec.shared_experts:
        gate = ["shared_gate"] if spec.gated else []
        names += ["shared_in", *gate, "shared_out"]
    return names


def _gain(spec):
    if spec.gain is not None:
        return spec.gain
    k = inspect.signature(spec.router).parameters.get("k")
    return k.default**0.5 if k is not None and isinstance(k.default, int) else 1.0


def takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a function can be handed the argument."""
    parameters = inspect.signature(function).parameters
    catches_all = (p.kind is p.VAR_KEYWORD for p in parameters.values())
    return name in parameters or any(catches_all)
