"""From a dense network to a mixture of experts."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sparsejax.upcycling import _names
from sparsejax.upcycling._modes import Adapters, Granular, Shared
from sparsejax.upcycling._optimizer import convert_state
from sparsejax.upcycling._plan import (
    Layer,
    Plan,
    check_leaves,
    make_plan,
    place,
    taken,
)
from sparsejax.upcycling._report import Report, gain_of, judge
from sparsejax.upcycling._spec import Move, Spec

# Modes that leave the dense layer in the model, its moments with it.
_KEEP_DENSE = Shared | Adapters


class Upcycled(NamedTuple):
    """What ``upcycle`` returns.

    Attributes:
      params: In the containers of ``spec.target``.
      opt_state: As the MoE's optimizer has it; None if none was given.
      report: Whether the network computes what it did.
    """

    params: Any
    opt_state: Any
    report: Report


def upcycle(params: Any, opt_state: Any = None, *, spec: Spec, key: Array) -> Upcycled:
    """Makes a mixture of experts of a dense model, its optimizer state with it.

    Pure: trees in, trees out, and what is given stays as it is. Leaves that do not
    change are the same arrays, not copies: donate neither while the other is in use.
    Leaves are matched by
    their paths joined by '/', so that Linen's ``params``, an ``nnx.State``, pure dicts
    and any other pytree are all the same. Everything is checked before anything is
    computed: each leaf of the target is made exactly once, in its shape and dtype.
    Works under ``jit`` (the spec closed over; the report comes out as a constant) and
    on sharded arrays, whose sharding experts and their moments inherit, their own axis
    whole, unless ``spec.target`` has shardings.

    Args:
      params: Parameters of the dense model.
      opt_state: State of ``spec.optimizer`` for them, also as ``nnx.Optimizer`` holds
        it; None: none is made.
      spec: What to make.
      key: For the routers' kernels, and the modes that draw.

    Returns:
      An ``Upcycled``, (params, opt_state, report).

    Raises:
      ValueError: By path, what in the target has no source or two, which shape or dtype
        does not fit, which rule matches nothing, which field of the optimizer state
        cannot be converted.

    Example:
      >>> import functools
      >>> from sparsejax import routing, upcycling
      >>> dense = {"mlp": {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 4))}}
      >>> shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
      >>> target = {"mlp": {
      ...     "router": shape(4, 2), "w_in": shape(2, 4, 8), "w_out": shape(2, 8, 4)}}
      >>> spec = upcycling.Spec(
      ...     target=target,
      ...     ffns=[upcycling.Ffn(source="mlp", w_in="up", w_out="down")],
      ...     router=functools.partial(routing.top_k, k=1, normalize="sum_stopgrad"))
      >>> params, _, report = upcycling.upcycle(dense, spec=spec, key=jax.random.key(0))
      >>> params["mlp"]["w_in"].shape
      (2, 4, 8)
      >>> print(report)
      exact: yes (experts identical, gates sum to 1, no drops)
      layers: mlp

    References:
      Komatsuzaki et al., "Sparse Upcycling: Training Mixture-of-Experts from Dense
      Checkpoints", ICLR 2023.
    """
    source = _names.named(params, "params")
    target = _names.named(spec.target, "target")
    plan = make_plan(source, target, spec)
    gains = [gain_of(spec.mode, spec.router, _experts(x)) for x in plan.layers]

    def make(source, key):
        keys = jax.random.split(key, len(plan.layers) + 1)
        made = _kept(plan, source) | _given(plan, target, keys[0])
        for layer, gain, key in zip(plan.layers, gains, keys[1:], strict=True):
            made = _layer_weights(layer, gain, spec, source, key) | made
        return {name: made[name] for name in target}

    check_leaves("target", jax.eval_shape(make, source, key), target)
    report = _report(plan, spec, source)

    def convert(moments, power, wanted):
        """By name in the source -> by name in the target; zeros for what is new."""
        keys = jax.random.split(key, len(plan.layers) + 1)
        degree = power if spec.opt_state == "rescale" else 0
        made = _kept(plan, moments)
        for layer, gain, k in zip(plan.layers, gains, keys[1:], strict=True):
            experts = _layer_moments(layer, gain, spec, moments, k, degree)
            if spec.opt_state == "zeros" and not isinstance(spec.mode, _KEEP_DENSE):
                # Of what they would be, so that they are sharded as that.
                experts = {name: jnp.zeros_like(m) for name, m in experts.items()}
            made |= experts
        return {
            name: made[name] if name in made else jnp.zeros(leaf.shape, leaf.dtype)
            for name, leaf in wanted.items()
        }

    new_state = None
    if opt_state is not None:
        new_state, warnings = convert_state(params, opt_state, plan, spec, convert)
        report = dataclasses.replace(report, warnings=(*report.warnings, *warnings))
    made = make(source, key)
    made = {name: place(made[name], target[name]) for name in target}
    tree = jax.tree.structure(spec.target)
    return Upcycled(jax.tree.unflatten(tree, [*made.values()]), new_state, report)


# ---- values ------------------------------------------------------------------------


def _experts(layer):
    return layer.like["w_in"].shape[0]


def _kept(plan: Plan, source: dict[str, Any]) -> dict[str, Any]:
    return {
        name: taken(source[old], move)
        for name, (old, move) in plan.kept.items()
        if old in source
    }


def _given(plan, target, key):
    made = {}
    for i, (name, value) in enumerate(plan.given.items()):
        leaf = target[name]
        if callable(value):
            value = value(jax.random.fold_in(key, i), leaf.shape, leaf.dtype)
        made[name] = jnp.asarray(value)
    return made


def _layer_weights(layer: Layer, gain, spec, source, key):
    """All leaves of a MoE layer, or of a stack of them, by name in the target."""

    def one(ffn, key):
        router_key, key = jax.random.split(key)
        like = layer.like
        made = spec.mode.weights(ffn, like, gain, key)
        draw = jax.random.normal(router_key, like["router"].shape) * spec.router_std
        if isinstance(spec.mode, Granular):
            draw = spec.mode.router(draw)
        made["router"] = draw.astype(like["router"].dtype)
        if "balance" in like:
            made["balance"] = jnp.zeros_like(like["balance"])
        return made

    ffn = {role: source[name] for role, name in layer.sources.items()}
    return _over_stack(one, layer, ffn, key)


def _layer_moments(layer: Layer, gain, spec, moments, key, power):
    """Those that the mode makes of the dense layer's moments, by name in the target."""

    def one(ffn, key):
        _, key = jax.random.split(key)
        return spec.mode.moments(ffn, layer.like, gain, key, power)

    ffn = {r: moments[n] for r, n in layer.sources.items() if n in moments}
    return _over_stack(one, layer, ffn, key) if ffn else {}


def _over_stack(one, layer, ffn, key):
    """Maps a function of one layer over the stacked ones; names its result."""
    axis = layer.ffn.axis
    if axis is None:
        made = one(ffn, key)
    else:
        move = Move(source="", axis=axis, layers=layer.ffn.layers)
        ffn = {role: taken(w, move) for role, w in ffn.items()}
        if isinstance(layer.ffn.layers, int):
            made = one(ffn, key)
        else:
            count = next(iter(ffn.values())).shape[axis]
            keys = jax.random.split(key, count)
            made = jax.vmap(one, (axis, 0), axis)(ffn, keys)
    return {layer.leaves[role]: w for role, w in made.items()}


# ---- checks and the report ---------------------------------------------------------


def _report(plan: Plan, spec: Spec, source: dict[str, Any]) -> Report:
    routers = {layer.leaves["router"] for layer in plan.layers}
    biases = {x.leaves["balance"] for x in plan.layers if "balance" in x.leaves}
    judgement = judge(
        spec.mode,
        spec.router,
        spec.tokens,
        [_experts(layer) for layer in plan.layers],
        [layer.like["w_out"].shape[-2] for layer in plan.layers],
        router_given=bool((routers | biases) & set(plan.given)),
    )
    doubts = []
    if plan.unmatched:
        doubts.append("leaves of the source are unmatched")
    strange = [name for name in plan.given if name not in routers | biases]
    if strange:
        doubts.append("values other than the router's were given")
    doubts += _not_used_once(plan, source)
    exact, reasons = judgement.exact, judgement.reasons
    if doubts:
        exact, reasons = False, (*doubts, *(() if exact else reasons))
    shared = [role for role in ("shared_in", "shared_gate", "shared_out")]
    frozen = [x.leaves[r] for x in plan.layers for r in shared if r in x.leaves]
    return Report(
        exact=exact,
        reasons=tuple(reasons),
        router_gradient=judgement.router_gradient,
        warnings=judgement.warnings,
        layers=tuple(layer.name for layer in plan.layers),
        unmatched=plan.unmatched,
        given=tuple(plan.given),
        frozen=tuple(frozen) if isinstance(spec.mode, Adapters) else (),
    )


def _not_used_once(plan: Plan, source: dict[str, Any]) -> list[str]:
    """Leaves of the source of which a layer goes nowhere, or to several places."""
    uses = [
        (old, move.axis if move else 0, move.layers if move else None)
        for old, move in plan.kept.values()
    ] + [
        (name, layer.ffn.axis or 0, layer.ffn.layers)
        for layer in plan.layers
        for name in layer.sources.values()
    ]
    counts: dict[str, np.ndarray] = {}
    for name, axis, layers in uses:
        # A use of the whole is one of every layer.
        size = source[name].shape[axis] if source[name].ndim else 1
        count = counts.setdefault(name, np.zeros(size, int))
        count[slice(None) if layers is None else layers] += 1
    return [
        f"{name} is not used exactly once"
        for name, count in counts.items()
        if (count != 1).any()
    ]
