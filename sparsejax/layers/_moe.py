"""A feed-forward layer of experts, of which every token uses a few."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparsejax import ops, routing
from sparsejax._dispatch import Choice
from sparsejax.routing import Routing, RoutingMetrics

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
      router: Function of logits float32 ``[t, e]`` to a ``routing.Routing``, such as
        ``functools.partial(routing.top_k, k=2, normalize="sum_stopgrad")``. It is
        handed ``mask`` where the call has one, ``bias`` where ``balance`` is set,
        ``key`` where the call has one and the router takes it, and whatever else the
        call was given.
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
    router: Callable[..., Routing]
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
        for name in ("features", "hidden_features", "num_experts"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name}: got {getattr(self, name)}, needed a positive int"
                )
        if self.shared_experts < 0:
            raise ValueError(
                f"shared_experts: got {self.shared_experts}, needed at least 0"
            )
        if not 0 <= self.jitter < 1:
            raise ValueError(f"jitter: got {self.jitter}, needed a number in [0, 1)")
        if self.balance and not _takes(self.router, "bias"):
            raise ValueError("balance: got True, needed a router that takes bias=")


class MoEAux(NamedTuple):
    """What a mixture of experts returns beside y; scalars and small arrays.

    Attributes:
      load_balance: ``routing.load_balance_loss`` of these tokens; 1 at perfect balance.
      z: ``routing.z_loss`` of the router's logits.
      counts: Choices of each expert before any was turned away, int32 ``[e]``: what
        ``routing.update_bias`` takes, after a sum over devices and micro-batches.
      metrics: ``routing.routing_metrics``: load per expert, share dropped, entropies.
      routing: The ``Routing`` itself, for any other loss, such as that of the balance
        over all devices.
    """

    load_balance: Float[Array, ""]
    z: Float[Array, ""]
    counts: Array
    metrics: RoutingMetrics
    routing: Routing


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
      ({"router" float32 [d, e], "w_in" [e, d, f], "w_gate" [e, d, f] where gated,
      "w_out" [e, f, d], and, where there are shared experts, "shared_in" [d, s],
      "shared_gate" [d, s] where gated, "shared_out" [s, d]},
      {"balance" float32 zeros [e]} where ``spec.balance``, else {}).
    """
    d, f, e = spec.features, spec.hidden_features, spec.num_experts
    s = spec.shared_experts * f
    half = 0.5**0.5 if s else 1.0
    shapes = {
        "router": ((d, e), (_LOGITS_VARIANCE / d) ** 0.5),
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


def apply_moe(
    spec: MoESpec,
    params: dict[str, Array],
    x: Float[Array, "*batch d"],
    *,
    balance: Float[Array, " e"] | None = None,
    mask: Bool[Array, "..."] | None = None,
    key: Array | None = None,
    **router_arguments: Any,
) -> tuple[Float[Array, "*batch d"], MoEAux]:
    """Computes y = sum_j w_j expert_j(x) + shared(x), over the experts chosen for x.

    Nothing is kept between calls: losses, metrics and counts are returned, so the layer
    works under ``jax.checkpoint``, ``lax.scan`` and ``vmap`` like any function.

    Args:
      spec: The layer.
      params: As from ``init_moe``.
      x: ``[..., d]``. All leading axes together are the tokens that capacities and
        losses are about.
      balance: The bias float32 ``[e]``, where ``spec.balance``; it moves the choice and
        neither weights nor gradients.
      mask: True for tokens, False for padding, ``[...]``. Padding is routed nowhere,
        its y is 0, and what its x holds has no influence, NaN included.
      key: For jitter and for routers that draw; None: neither, as in evaluation.
      **router_arguments: More arguments of the router; arrays over tokens are flat.

    Returns:
      y ``[..., d]`` and a ``MoEAux``.

    Raises:
      ValueError: ``balance`` is given and ``spec.balance`` is not set, or the other way
        round; the shape of mask is not that of x's leading axes; the router returned
        something else than a ``Routing`` of these tokens and experts.

    Example:
      >>> import functools
      >>> from sparsejax import layers, routing
      >>> router = functools.partial(routing.top_k, k=2, normalize="sum_stopgrad")
      >>> spec = layers.MoESpec(
      ...     features=8, hidden_features=16, num_experts=4, router=router,
      ...     balance=True)
      >>> params, state = layers.init_moe(jax.random.key(0), spec)
      >>> x = jax.random.normal(jax.random.key(1), (3, 5, 8))
      >>> y, aux = layers.apply_moe(spec, params, x, **state)
      >>> y.shape, int(aux.counts.sum())
      ((3, 5, 8), 30)

    References:
      Shazeer et al., "Outrageously Large Neural Networks: The Sparsely-Gated
      Mixture-of-Experts Layer", ICLR 2017. Fedus, Zoph, Shazeer, "Switch Transformers",
      JMLR 2022. Shared experts: Dai et al., "DeepSeekMoE", ACL 2024. Balance by a bias:
      Wang et al., "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts",
      2024.
    """
    if (balance is not None) != spec.balance:
        raise ValueError(
            f"balance: got {'None' if balance is None else 'a bias'}, needed "
            f"{'a bias' if spec.balance else 'None'}, as the spec has balance="
            f"{spec.balance}"
        )
    if x.shape[-1] != spec.features:
        raise ValueError(f"x: got {x.shape}, needed [..., {spec.features}]")
    if mask is not None and mask.shape != x.shape[:-1]:
        raise ValueError(f"mask: got {mask.shape}, needed {x.shape[:-1]}, as x has")
    batch, x = x.shape[:-1], x.reshape(-1, spec.features)
    if mask is not None:
        mask = mask.reshape(-1)
        x = jnp.where(mask[:, None], x, jnp.zeros_like(x))
    logits = _logits(spec, params["router"], x, key)
    chosen = _route(spec, logits, mask, balance, key, router_arguments)

    dtype = spec.dtype or jnp.promote_types(x.dtype, params["w_in"].dtype)
    x = x.astype(dtype)
    y = ops.moe_mlp(
        x,
        chosen,
        params["w_in"],
        params["w_out"],
        w_gate=params.get("w_gate"),
        activation=spec.activation,
        dtype=dtype,
        implementation=spec.implementation,
    ).astype(dtype)
    if spec.shared_experts:
        y = y + _shared(spec, params, x, mask)
    aux = MoEAux(
        load_balance=routing.load_balance_loss(chosen),
        z=routing.z_loss(logits, mask=mask),
        counts=chosen.counts() if chosen.demand is None else chosen.demand,
        metrics=routing.routing_metrics(chosen),
        routing=chosen,
    )
    return y.reshape(*batch, spec.features), aux


def _logits(spec, router, x, key):
    """Float32 in earnest: a TPU's default product of float32 would round to bf16."""
    x = x.astype(jnp.float32)
    if spec.jitter and key is not None:
        low, high = 1 - spec.jitter, 1 + spec.jitter
        draw = jax.random.uniform(_jitter_key(key), x.shape, minval=low, maxval=high)
        x = x * draw
    return jnp.matmul(
        x, router.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )


def _jitter_key(key):
    """Apart from the router's own draws."""
    return jax.random.fold_in(key, 1)


def _route(spec, logits, mask, balance, key, arguments):
    if mask is not None:
        arguments = {"mask": mask, **arguments}
    if balance is not None:
        # No gradient: the bias is moved by counts alone.
        arguments = {"bias": jax.lax.stop_gradient(balance), **arguments}
    if key is not None and _takes(spec.router, "key"):
        arguments = {"key": key, **arguments}
    chosen = spec.router(logits, **arguments)
    if not isinstance(chosen, Routing):
        raise ValueError(
            f"router: got one that returns {type(chosen).__name__}, needed a Routing"
        )
    if chosen.probs.shape != (len(logits), spec.num_experts):
        raise ValueError(
            f"router: got a routing of {chosen.probs.shape}, needed "
            f"{(len(logits), spec.num_experts)}, tokens and experts"
        )
    return chosen


def _shared(spec, params, x, mask):
    product = lambda a, name: jnp.matmul(
        a, params[name].astype(a.dtype), preferred_element_type=jnp.float32
    ).astype(a.dtype)
    hidden = product(x, "shared_in")
    if spec.gated:
        hidden = spec.activation(product(x, "shared_gate")) * hidden
    else:
        hidden = spec.activation(hidden)
    y = product(hidden, "shared_out")
    # An activation may have a value at 0.
    return y if mask is None else jnp.where(mask[:, None], y, jnp.zeros_like(y))


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


def _takes(function, name):
    parameters = inspect.signature(function).parameters
    catches_all = (p.kind is p.VAR_KEYWORD for p in parameters.values())
    return name in parameters or any(catches_all)
