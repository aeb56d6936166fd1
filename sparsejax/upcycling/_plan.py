"""Which leaf of the target comes from where; nothing is computed here."""

import dataclasses
import re
from typing import Any, NamedTuple

import jax

from sparsejax.upcycling import _modes, _names
from sparsejax.upcycling._report import arguments_of
from sparsejax.upcycling._spec import Ffn, Move, Spec

ROLES = (
    *("router", "w_in", "w_gate", "w_out"),
    *("shared_in", "shared_gate", "shared_out", "balance"),
)


class Layer(NamedTuple):
    """One MoE layer, or a stack of them, and the dense layer it comes from."""

    ffn: Ffn
    name: str  # path in the target
    sources: dict[str, str]  # kernels: w_in, w_gate, w_out -> name in the source
    leaves: dict[str, str]  # router, w_in, ... -> name in the target
    like: dict[str, Any]  # shapes of one layer of the target


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where every leaf of the target comes from: exactly one of the three.

    Attributes:
      layers: MoE layers.
      kept: Name in the target -> name in the source and what moves it.
      given: Name in the target -> array or initializer.
      unmatched: Leaves of the source that nothing is made of.
    """

    layers: tuple[Layer, ...]
    kept: dict[str, tuple[str, Move | None]]
    given: dict[str, Any]
    unmatched: tuple[str, ...]


def make_plan(source: dict[str, Any], target: dict[str, Any], spec: Spec) -> Plan:
    """Matches names of the source with names of the target.

    Raises:
      ValueError: A rule matches nothing, a leaf of the target has no source or two, a
        layer's shapes do not fit.
    """
    given = _given(target, spec)
    layers = [layer for ffn in spec.ffns for layer in _layers(ffn, source, target)]
    claims: dict[str, list[str]] = {}  # names in the target: who makes them
    for layer in layers:
        for name in layer.leaves.values():
            if name not in given:
                claims.setdefault(name, []).append(f"the layer {layer.name}")
    kept: dict[str, tuple[str, Move | None]] = {}
    for move in spec.moves:
        for old, new in _moved(move, source):
            _check_stack(old, source[old], move.axis, move.layers)
            if new in target and new not in given:
                claims.setdefault(new, []).append(old)
                kept[new] = (old, move)
    made_of = {name for layer in layers for name in layer.sources.values()}
    for name in target:
        if name not in claims and name not in given and name in source:
            claims[name] = [name]
            kept[name] = (name, None)

    twice = {name: who for name, who in claims.items() if len(who) > 1}
    if twice:
        raise ValueError(
            "target: every leaf must have one source, got "
            + "; ".join(f"{name} from {' and '.join(w)}" for name, w in twice.items())
        )
    used = made_of | {old for old, _ in kept.values()}
    unmatched = tuple(name for name in source if name not in used)
    missing = [name for name in target if name not in claims and name not in given]
    if missing:
        raise ValueError(
            f"target: no source for {', '.join(missing)}; of the source are left "
            f"{', '.join(unmatched) or 'none'}: name them in ffns or moves, or give "
            "values in given"
        )
    for layer in layers:
        _check_layer(layer, source, spec)
    return Plan(tuple(layers), kept, given, unmatched)


def _given(target, spec):
    found: dict[str, Any] = {}
    for pattern, value in spec.given.items():
        fits = [name for name in target if _names.match(pattern, name) is not None]
        if not fits:
            raise ValueError(
                f"given: got {pattern!r}, which matches no leaf of the target, needed "
                f"some of {', '.join(target)}"
            )
        for name in fits:
            found.setdefault(name, value)
    return found


def _layers(ffn, source, target):
    """The layers that a rule matches and whose place in the target has a router."""
    found, dense, near = [], [], []
    for name in source:
        prefix = _prefix(name, ffn.w_in)
        if prefix is None:
            continue
        near.append(prefix)
        stars = _names.match(ffn.source, prefix)
        if stars is None:
            continue
        to = _names.fill(ffn.target, stars)
        places = {role: _names.join(to, ffn.names.get(role, role)) for role in ROLES}
        if places["balance"] not in target:  # Linen has it in a collection of its own
            places["balance"] = re.sub("^params/", "balance/", places["balance"])
        leaves = {role: place for role, place in places.items() if place in target}
        if "router" not in leaves:
            dense.append(places["router"])
            continue
        sources = {r: _names.join(prefix, path) for r, path in ffn.kernels.items()}
        absent = [name for name in sources.values() if name not in source]
        if absent:
            raise ValueError(
                f"ffns: got no leaf {' and no '.join(absent)} in the source beside "
                f"{name}, needed the kernels of {ffn.source}"
            )
        like = {role: target[leaf] for role, leaf in leaves.items()}
        if ffn.axis is not None and not isinstance(ffn.layers, int):
            like = {role: _one(leaf, ffn.axis) for role, leaf in like.items()}
        found.append(Layer(ffn, to, sources, leaves, like))
    if not found:
        raise ValueError(
            f"ffns: got source {ffn.source!r} with {ffn.w_in!r}, needed such layers in "
            f"the source (there {ffn.w_in!r} is below: {', '.join(near) or 'nothing'}) "
            + (f"and in the target {', '.join(dense)}" if dense else "")
        )
    return found


def _prefix(name, path):
    """What is before ``path`` at the end of a name; None if that is not its end."""
    if name == path:
        return ""
    return name.removesuffix("/" + path) if name.endswith("/" + path) else None


def _one(leaf, axis):
    """The shape of one layer of a stack."""
    shape = list(leaf.shape)
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"axis: got {axis}, needed an axis of {leaf.shape}")
    del shape[axis]
    return jax.ShapeDtypeStruct(tuple(shape), leaf.dtype)


def _moved(move, source):
    pairs = [
        (name, _names.fill(move.target, stars))
        for name in source
        if (stars := _names.match(move.source, name)) is not None
    ]
    if not pairs:
        raise ValueError(
            f"moves: got source {move.source!r}, which matches no leaf, needed some of "
            f"{', '.join(source)}"
        )
    return pairs


def _check_layer(layer, source, spec):
    """Raises for shapes of a layer that do not fit one another."""
    like, kernels = layer.like, {}
    roles = _modes.roles_of(spec.mode, "w_gate" in layer.sources, like)
    mode = type(spec.mode).__name__
    if roles != set(like):
        raise ValueError(
            f"target: {layer.name} has {', '.join(sorted(like))}, needed "
            f"{', '.join(sorted(roles))} of mode {mode}"
        )
    for role, name in layer.sources.items():
        leaf = source[name]
        stacked = layer.ffn.axis is not None
        if len(leaf.shape) != 2 + stacked:
            raise ValueError(
                f"{name}: got shape {leaf.shape}, needed "
                + ("two axes and that of layers" if stacked else "[in, out]")
                + f" (axis of {layer.ffn.source} is {layer.ffn.axis})"
            )
        if stacked:
            _check_stack(name, leaf, layer.ffn.axis, layer.ffn.layers)
        kernels[role] = _one(leaf, layer.ffn.axis) if stacked else leaf
    d, f = kernels["w_in"].shape
    for role, leaf in kernels.items():
        needed = (f, d) if role == "w_out" else (d, f)
        if leaf.shape != needed:
            raise ValueError(
                f"{layer.sources[role]}: got {leaf.shape}, needed {needed} beside "
                f"{layer.sources['w_in']}"
            )
    wide = like["w_in"].shape or (0,)
    e, hidden = wide[0], wide[-1]
    # What an unknown router does with its logits is its own.
    own = spec.router is not None and arguments_of(spec.router) is None
    logits = like["router"].shape[-1] if own and like["router"].shape else e
    shapes = {
        "router": (d, logits),
        "w_in": (e, d, hidden),
        "w_gate": (e, d, hidden),
        "w_out": (e, hidden, d),
        "shared_in": (d, f),
        "shared_gate": (d, f),
        "shared_out": (f, d),
        "balance": (e,),
    }
    for role, leaf in like.items():
        if leaf.shape != shapes[role] or 0 in leaf.shape:
            raise ValueError(
                f"{layer.leaves[role]}: got {leaf.shape} of one layer in the target, "
                f"needed {shapes[role]} for {layer.sources['w_in']} {(d, f)} and "
                f"{e} experts"
            )
    wrong = _modes.fit(spec.mode, kernels, like)
    if wrong is not None:
        raise ValueError(f"{layer.name}: got {wrong}")


def _check_stack(name, leaf, axis, layers):
    """Raises unless there are such layers: jax would take the last in silence."""
    if layers is None:
        return
    size = leaf.shape[axis] if axis < len(leaf.shape) else 0
    one = isinstance(layers, int)
    if not (-size <= layers < size if one else range(size)[layers]):
        raise ValueError(
            f"layers: got {layers} of {name} {leaf.shape}, which has {size} on axis "
            f"{axis}, needed some of them"
        )


def taken(x: Any, move: Move | None) -> Any:
    """The layers that a move takes of a stack."""
    if move is None or move.layers is None:
        return x
    return x[(slice(None),) * (move.axis % x.ndim) + (move.layers,)]


def place(x: Any, leaf: Any) -> Any:
    """Where the target has it, or the moments of it."""
    sharding = getattr(leaf, "sharding", None)
    if sharding is None or x.shape != leaf.shape:
        return x
    return jax.device_put(x, sharding)


def check_leaves(argument: str, made: dict[str, Any], needed: dict[str, Any]) -> None:
    """Raises unless what was made has the shapes and dtypes needed."""
    wrong = [
        f"{name}: got {made[name].dtype} {made[name].shape}, needed {leaf.dtype} "
        f"{leaf.shape}"
        for name, leaf in needed.items()
        if (made[name].shape, made[name].dtype) != (leaf.shape, leaf.dtype)
    ]
    if wrong:
        raise ValueError(f"{argument}: {'; '.join(wrong)}")
