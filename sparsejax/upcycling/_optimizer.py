"""The optimizer state of a dense model -> that of its mixture of experts."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sparsejax.upcycling import _names
from sparsejax.upcycling._modes import Copy
from sparsejax.upcycling._plan import Layer, Plan, check_leaves
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
) -> Any:
    """Converts what mirrors the parameters, and keeps the rest.

    ``optax.tree_map_params`` tells which is which, so chain, masked, partition,
    MultiSteps and inject_hyperparams are as optax knows them. The state of the target's
    optimizer, as ``jax.eval_shape`` of its init has it, says what is needed.

    Args:
      params: Of the dense model.
      opt_state: Its optimizer's.
      plan: Which leaf comes from where.
      spec: With the optimizer.
      convert: (moments by name, power, shapes by name) -> new moments by name.

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
        old, _ = _with_slots(dense, opt_state)
        new, tree = _with_slots(moe, wanted)
    if old.keys() != new.keys():
        raise ValueError(
            "optimizer: got two whose states differ in structure, needed the same but "
            f"for masks and labels: {sorted(old.keys() ^ new.keys())}"
        )

    shapes = {name: x.shape for name, x in _names.named(params, "params").items()}
    leaves = []
    for where, to in new.items():
        was, field = old[where], where.rsplit("/", 1)[-1]
        if isinstance(to, _Slot):
            power = {**MOMENTS, **spec.moments}.get(field)
            if power is None:
                raise ValueError(
                    f"opt_state: got {where}, of which it is not known what power of "
                    "the gradient it is a mean of, needed that in the spec, such as "
                    f"moments={{{field!r}: 1}}"
                )
            moments = _names.named(was.tree, where)
            wanted = _names.named(to.tree, where)
            full = {n: m for n, m in moments.items() if m.shape == shapes[n]}
            made = convert(moments, full, power, wanted)
            made |= _factors(where, moments, full, power, wanted, plan, spec)
            check_leaves(f"opt_state: {where} of the target", made, wanted)
            slot = jax.tree.structure(to.tree)
            leaves.append(jax.tree.unflatten(slot, [made[n] for n in wanted]))
        elif jnp.shape(was) != jnp.shape(to):
            raise ValueError(
                f"opt_state: got {where} {jnp.shape(was)} that is {jnp.shape(to)} in "
                "the target, needed the same"
            )
        else:
            reset = spec.reset_count and field == "count"
            leaves.append(jnp.zeros_like(was) if reset else was)
    return jax.tree.unflatten(tree, leaves)


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
    return [_path(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def _factors(where, moments, full, power, wanted, plan, spec):
    """Means over an axis of the dense layer, such as Adafactor's rows and columns.

    Copies have copies of them, the axis of experts in front. Anything else is refused:
    what a mean over hidden units is of a part of them is not to be known.
    """
    made = {}
    for layer in plan.layers:
        for role, name in layer.sources.items():
            if name not in moments or name in full:
                continue
            shared = layer.leaves.get(role.replace("w_", "shared_"))
            m, leaf = moments[name], layer.leaves[role]
            if shared is not None:
                made[shared] = m
            elif m.shape == wanted[leaf].shape or spec.opt_state == "zeros":
                # Not factored on either side: a stand-in of zeros.
                made[leaf] = jnp.zeros(wanted[leaf].shape, wanted[leaf].dtype)
            elif isinstance(spec.mode, Copy) and layer.ffn.layers is None:
                made[leaf] = _copies(m, layer, power if _rescales(spec) else 0)
            else:
                raise ValueError(
                    f"opt_state: got {where} {m.shape} of {name}, means over an axis, "
                    f"which mode {type(spec.mode).__name__} cannot convert; needed "
                    "opt_state='zeros' in the spec"
                )
    return made


def _copies(m, layer: Layer, power):
    e = layer.like["router"].shape[-1]
    stacked = int(layer.ffn.axis is not None)
    return jnp.repeat(jnp.expand_dims(m, stacked), e, stacked) / e**power


def _rescales(spec):
    return spec.opt_state == "rescale"
