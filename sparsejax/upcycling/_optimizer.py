"""The optimizer state of a dense model -> that of its mixture of experts."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sparsejax.masks._paths import path_name
from sparsejax.upcycling import _names
from sparsejax.upcycling._modes import Copy
from sparsejax.upcycling._plan import Layer, Plan, check_leaves, place, taken
from sparsejax.upcycling._spec import MOMENTS, Spec


class _Slot:
    """A tree of the parameters' structure inside an optimizer state; a leaf."""

    def __init__(self, tree: Any):
        self.tree = tree


def convert_state(
    params: Any,
    opt_state: Any,
    plan: Plan,
    spec: Spec,
    convert: Callable[..., dict[str, Any]],
) -> tuple[Any, tuple[str, ...]]:
    """Converts what mirrors the parameters, and keeps the rest.

    ``optax.tree_map_params`` tells which is which, so chain, masked, partition,
    MultiSteps and inject_hyperparams are as optax knows them. The state of the target's
    optimizer, as ``jax.eval_shape`` of its init has it, says what is needed.

    Args:
      params: Of the dense model.
      opt_state: Its optimizer's.
      plan: Which leaf comes from where.
      spec: With the optimizer.
      convert: (moments of parameters' shapes by name, power, shapes by name) -> new
        moments by name.

    Returns:
      The state of the target's optimizer; what to know of it.

    Raises:
      ValueError: The optimizer is missing or not that of the state; a field is not
        known, or its shapes cannot be converted (Adafactor's factors but for copies).
    """
    if spec.optimizer is None:
        raise ValueError(
            "optimizer: got None in the spec, needed the optax transformation that "
            "opt_state is of"
        )
    pair = type(spec.optimizer) is tuple
    dense, moe = spec.optimizer if pair else (spec.optimizer, spec.optimizer)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        needed = jax.eval_shape(dense.init, params)
        wanted = jax.eval_shape(moe.init, spec.target)
        if _paths(opt_state) != _paths(needed):
            raise ValueError(
                "opt_state: got a state that is not of the spec's optimizer, needed "
                f"leaves {_paths(needed)}, got {_paths(opt_state)}"
            )
        # In optax's containers, whatever nnx.Optimizer or a file has made of them.
        tree = jax.tree.structure(needed)
        opt_state = jax.tree.unflatten(tree, jax.tree.leaves(opt_state))
        old, _ = _with_slots(dense, opt_state)
        new, tree = _with_slots(moe, wanted)
    if old.keys() != new.keys():
        raise ValueError(
            "optimizer: got two whose states differ in structure, needed the same but "
            f"for masks and labels: {sorted(old.keys() ^ new.keys())}"
        )

    shapes = {name: x.shape for name, x in _names.named(params, "params").items()}
    target = _names.named(spec.target, "target")
    leaves, warnings = [], []
    for where, to in new.items():
        was, field = old[where], where.rsplit("/", 1)[-1]
        if isinstance(to, _Slot):
            power = {**MOMENTS, **spec.moments}.get(field)
            if field == "v" and f"{where}_row" not in new:  # not Adafactor's
                power = spec.moments.get(field)
            if power is None:
                raise ValueError(
                    f"opt_state: got {where}, of which it is not known what power of "
                    "the gradient it is a mean of, needed that in the spec, such as "
                    f"moments={{{field!r}: 1}}"
                )
            moments = _names.named(was.tree, where)
            wanted = _names.named(to.tree, where)
            if not moments.keys() <= shapes.keys():
                raise ValueError(
                    f"opt_state: got {where} with {', '.join(moments)}, which cannot "
                    f"be converted, needed an array for each of {', '.join(shapes)}"
                )
            full = {n: m for n, m in moments.items() if m.shape == shapes[n]}
            made = convert(full, power, wanted)
            made |= _factors(where, moments, full, power, wanted, plan, spec)
            check_leaves(f"opt_state: {where} of the target", made, wanted)
            warnings += _lost(where, moments, wanted, plan, spec)
            slot = jax.tree.structure(to.tree)
            placed = [place(made[name], target[name]) for name in wanted]
            leaves.append(jax.tree.unflatten(slot, placed))
        elif jnp.shape(was) != jnp.shape(to):
            raise ValueError(
                f"opt_state: got {where} {jnp.shape(was)} that is {jnp.shape(to)} in "
                "the target, needed the same"
            )
        else:
            reset = spec.reset_count and field == "count"
            leaves.append(jnp.zeros_like(was) if reset else was)
    return jax.tree.unflatten(tree, leaves), tuple(warnings)


def _lost(where, moments, wanted, plan, spec):
    """Says which moments are asked for that the dense model's optimizer has not."""
    origins = {name: old for name, (old, _) in plan.kept.items()}
    if spec.opt_state != "zeros":
        for layer in plan.layers:
            for role, name in layer.sources.items():
                shared = role.replace("w_", "shared_")
                origins[layer.leaves.get(shared, layer.leaves[role])] = name
    lost = [n for n in wanted if n in origins and origins[n] not in moments]
    if not lost:
        return []
    return [
        f"opt_state: {where} of {', '.join(lost)} begins at zero, as the dense model's "
        "optimizer has none"
    ]


def _with_slots(optimizer, state):
    """({path: leaf or slot}, treedef), slots being trees of the parameters' form."""
    try:
        state = optax.tree_utils.tree_map_params(
            optimizer, _Slot, state, is_leaf=lambda _: True
        )
    except Exception as error:
        raise ValueError(
            "optimizer: got one whose state optax.tree_utils.tree_map_params cannot "
            f"map ({error}), needed one that it can"
        ) from error
    flat, tree = jax.tree_util.tree_flatten_with_path(state)
    return {_path(path): leaf for path, leaf in flat}, tree


def _path(path):
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _paths(tree):
    """Names as of parameters: variables and arrays, tuples and lists are the same."""
    return [
        path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]


def _factors(where, moments, full, power, wanted, plan, spec):
    """What is not of its parameter's shape, such as Adafactor's rows and columns.

    Copies have copies of a mean over an axis, the axis of experts in front. Anything
    else is refused: what a mean over hidden units is of a part of them, or a norm of
    all experts, is not to be known.
    """
    made = {}
    for name, (old, move) in plan.kept.items():
        if old in moments and old not in full and name in wanted:
            made[name] = _kept_factor(where, old, moments[old], move, wanted[name])
    for layer in plan.layers:
        for role, name in layer.sources.items():
            leaf = layer.leaves[role]
            if name not in moments or name in full or leaf not in wanted:
                continue
            shared = layer.leaves.get(role.replace("w_", "shared_"))
            m, like = moments[name], wanted[leaf]
            if shared is not None:
                made[shared] = m
            elif spec.opt_state == "zeros" or m.shape == like.shape == (1,):
                # Adafactor has zeros [1] in the place of what it does not keep.
                made[leaf] = jnp.zeros(like.shape, like.dtype)
            elif isinstance(spec.mode, Copy) and layer.ffn.layers is None and m.ndim:
                made[leaf] = _copies(m, layer, power if _rescales(spec) else 0)
            else:
                raise ValueError(
                    f"opt_state: got {where} {m.shape} of {name}, means over an axis, "
                    f"which mode {type(spec.mode).__name__} cannot convert; needed "
                    "opt_state='zeros' in the spec"
                )
    return made


def _kept_factor(where, name, m, move, like):
    """Of some of the stacked layers, if the axis of layers is in front."""
    if move is None or move.layers is None or m.shape == like.shape == (1,):
        return m
    if move.axis == 0 and m.ndim and taken(m, move).shape == like.shape:
        return taken(m, move)
    raise ValueError(
        f"opt_state: got {where} {m.shape} of {name}, means over an axis, of which the "
        f"layers {move.layers} of axis {move.axis} cannot be told; needed the axis of "
        "layers in front"
    )


def _copies(m, layer: Layer, power):
    e = layer.like["w_in"].shape[0]
    stacked = int(layer.ffn.axis is not None)
    return jnp.repeat(jnp.expand_dims(m, stacked), e, stacked) / e**power


def _rescales(spec):
    return spec.opt_state == "rescale"
