"""A feed-forward layer of experts, of which every token uses a few."""

import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparsejax import ops, routing
from sparsejax.layers._moe_spec import MoESpec, takes
from sparsejax.routing import Routing, RoutingMetrics, SoftRouting


class MoEAux(NamedTuple):
    """What a mixture of experts returns beside y; scalars and small arrays.

    Attributes:
      load_balance: ``routing.load_balance_loss`` of these tokens; 1 at perfect balance.
      z: ``routing.z_loss`` of the router's logits.
      counts: Choices of each expert before any was turned away, int32 ``[e]``: what
        ``routing.update_bias`` takes, after a sum over devices and micro-batches.
      metrics: ``routing.routing_metrics``: load per expert, share dropped, entropies.
      routing: What the router returned, for any other loss, such as that of the balance
        over all devices. Of a ``SoftRouting`` the figures above are those of a router
        that sends every token to all experts.
    """

    load_balance: Float[Array, ""]
    z: Float[Array, ""]
    counts: Array
    metrics: RoutingMetrics
    routing: Routing | SoftRouting


def apply_moe(
    spec: MoESpec,
    params: dict[str, Array],
    x: Float[Array, "*batch d"],
    *,
    balance: Float[Array, " e"] | None = None,
    mask: Bool[Array, "..."] | None = None,
    ids: Int[Array, "..."] | None = None,
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
      ids: What ``routing.hash_routing`` chooses by, integers ``[...]``: bytes, words,
        modalities.
      key: For jitter and for routers that draw; None: neither, as in evaluation.
      **router_arguments: More arguments of the router, such as a temperature; arrays
        over tokens are flat.

    Returns:
      y ``[..., d]`` and a ``MoEAux``.

    Raises:
      ValueError: ``balance`` is given and ``spec.balance`` is not set, or the other way
        round; the shape of mask or ids is not that of x's leading axes; the router
        returned something else than a ``Routing`` of these tokens and experts.
      NotImplementedError: ``implementation`` names one that cannot serve.

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
    for name, given in (("mask", mask), ("ids", ids)):
        if given is not None and given.shape != x.shape[:-1]:
            raise ValueError(
                f"{name}: got {given.shape}, needed {x.shape[:-1]}, as x has"
            )
    batch, x = x.shape[:-1], x.reshape(-1, spec.features)
    if mask is not None:
        mask = mask.reshape(-1)
        x = jnp.where(mask[:, None], x, jnp.zeros_like(x))
    given = {
        "mask": mask,
        "ids": None if ids is None else ids.reshape(-1),
        # No gradient: the bias is moved by counts alone.
        "bias": None if balance is None else jax.lax.stop_gradient(balance),
        "key": key if takes(spec.router, "key") else None,
    }
    given = {name: value for name, value in given.items() if value is not None}
    logits = _logits(spec, params["router"], x, key)
    chosen = _route(spec, logits, {**given, **router_arguments})

    dtype = spec.dtype or jnp.promote_types(x.dtype, params["w_in"].dtype)
    x = x.astype(dtype)
    y = _experts(spec, params, x, chosen, dtype)
    if spec.shared_experts:
        y = y + _shared(spec, params, x, mask)
    counted = chosen if isinstance(chosen, Routing) else _every_expert(chosen)
    aux = MoEAux(
        load_balance=routing.load_balance_loss(counted),
        z=routing.z_loss(logits, mask=mask),
        counts=counted.counts() if counted.demand is None else counted.demand,
        metrics=routing.routing_metrics(counted),
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


def _route(spec, logits, arguments):
    # By name where it has that name: the first argument of hash_routing are ids.
    if "logits" in inspect.signature(spec.router).parameters:
        chosen = spec.router(logits=logits, **arguments)
    else:
        chosen = spec.router(logits, **arguments)
    if not isinstance(chosen, Routing | SoftRouting):
        raise ValueError(
            f"router: got one that returns {type(chosen).__name__}, needed a Routing"
        )
    scores = chosen.probs if isinstance(chosen, Routing) else chosen.combine
    if scores.shape[:2] != (len(logits), spec.num_experts):
        raise ValueError(
            f"router: got a routing of {scores.shape[:2]}, needed "
            f"{(len(logits), spec.num_experts)}, tokens and experts"
        )
    return chosen


def _experts(spec, params, x, chosen, dtype):
    arrays = (x, chosen, params["w_in"], params["w_out"])
    how = dict(w_gate=params.get("w_gate"), activation=spec.activation, dtype=dtype)
    if isinstance(chosen, Routing):
        return ops.moe_mlp(*arrays, **how, implementation=spec.implementation)
    if spec.implementation not in (None, "xla"):
        raise NotImplementedError(
            f"implementation: got {spec.implementation!r}, needed 'xla' or None for a "
            "SoftRouting: its products are dense"
        )
    return routing.soft_mlp(*arrays, **how)


def _every_expert(soft):
    """A soft routing as choices: each token at all experts."""
    shares = soft.combine.sum(axis=2)
    among = True if soft.mask is None else soft.mask[:, None]
    return Routing(
        indices=jax.lax.broadcasted_iota(jnp.int32, shares.shape, 1),
        weights=shares,
        valid=jnp.broadcast_to(among, shares.shape),
        probs=shares,
        mask=soft.mask,
    )


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
