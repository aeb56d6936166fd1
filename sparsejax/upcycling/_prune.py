"""From many experts to a few, or to a dense network."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsejax.upcycling import _names
from sparsejax.upcycling._plan import check_leaves
from sparsejax.upcycling._spec import Ffn

# The axis of experts of each array of one MoE layer.
_AXES = {"router": 1, "w_in": 0, "w_gate": 0, "w_out": 0, "balance": 0}


class Pruned(NamedTuple):
    """What ``prune_experts`` returns.

    Attributes:
      params: Of the smaller model.
      kept: Experts that stay, int32 ``[keep]``, rising, by path of the MoE layer;
        ``[layers, keep]`` of stacked layers.
      share: Of the tokens of ``usage`` those that went to them, likewise; 0 where there
        were none.
    """

    params: Any
    kept: dict[str, jax.Array]
    share: dict[str, jax.Array]


def prune_experts(
    params: Any,
    usage: Any,
    *,
    keep: int = 1,
    ffns: Sequence[Ffn] = (),
    target: Any = None,
) -> Pruned:
    """Keeps the experts that a task uses most; the inverse of ``upcycle``.

    Columns of the router (and entries of ``balance``) go with their experts, so tokens
    of an expert that left go to the next in their order. With ``target`` the most used
    expert of each layer becomes a dense layer, of weight 1, its hidden units joined
    with those of the shared experts. Pure; works under ``jit`` with traced usage.

    Args:
      params: Parameters of the MoE model, any pytree, matched by path as in
        ``upcycle``.
      usage: Tokens per expert on the task, such as the sum of ``MoEAux.counts``: an
        array ``[e]`` by path of the MoE layer, * as in ``Ffn``, or one array
        ``[layers, e]`` in order of the layers in the tree. Of layers that are stacked
        under one path ``[layers, e]``.
      keep: How many experts of each layer stay. With ``target``, 1.
      ffns: The rules by which the model was upcycled: here ``target`` is where the MoE
        is, ``source`` where the dense layer goes. Needed with ``target`` and for other
        names or stacked layers; none: every path with ``router``, ``w_in`` and
        ``w_out``.
      target: Shapes of the dense model's parameters, as from ``jax.eval_shape``; None:
        experts stay experts.

    Returns:
      A ``Pruned``, in the containers of ``params`` or of ``target``.

    Raises:
      ValueError: There is no MoE layer, or usage has no entry for one; shapes do not
        fit; ``keep`` is not from 1 to the number of experts; a leaf of the target has
        no source.

    Example:
      >>> layer = {"router": jnp.ones((4, 3)), "w_in": jnp.ones((3, 4, 8)),
      ...          "w_out": jnp.ones((3, 8, 4))}
      >>> pruned = prune_experts({"moe": layer}, {"moe": jnp.array([5, 0, 15])}, keep=1)
      >>> pruned.params["moe"]["w_in"].shape, pruned.kept["moe"].tolist()
      ((1, 4, 8), [2])
      >>> pruned.share["moe"].item()
      0.75

    References:
      Chen et al., "Task-Specific Expert Pruning for Sparse Mixture-of-Experts", 2022.
    """
    leaves = _names.named(params, "params")
    layers = _layers(leaves, ffns)
    records = _records(usage, [name for name, _, _ in layers])
    if target is not None and keep != 1:
        raise ValueError(f"keep: got {keep}, needed 1 for a dense target")
    if target is not None and not ffns:
        raise ValueError("ffns: got none, needed where the target's dense layers are")

    made, kept, share = dict(leaves), {}, {}
    for name, ffn, arrays in layers:
        axis = ffn.axis if ffn is not None else None
        used = jnp.asarray(records[name])
        _check_layer(name, ffn, arrays, used, keep)

        def one(arrays, used, ffn=ffn):
            best, part = _most_used(used, keep)
            cut = {r: _cut(r, w, best) for r, w in arrays.items()}
            return (_dense(cut) if target is not None else cut), best, part

        if axis is None:
            cut, kept[name], share[name] = one(arrays, used)
        else:
            over = jax.vmap(one, (axis, 0), (axis, 0, 0))
            cut, kept[name], share[name] = over(arrays, used)
        for role in arrays:
            made.pop(_place(name, ffn, role))
        if target is None:
            made |= {_place(name, ffn, role): w for role, w in cut.items()}
        else:
            stars = _names.match(ffn.target, name) or ()
            dense = _names.fill(ffn.source, stars)
            made |= {_names.join(dense, ffn.kernels[r]): w for r, w in cut.items()}

    if target is None:
        tree, names = jax.tree.structure(params), list(leaves)
    else:
        shapes = _names.named(target, "target")
        missing = [name for name in shapes if name not in made]
        if missing:
            raise ValueError(
                f"target: no source for {', '.join(missing)}; there are "
                f"{', '.join(made)}"
            )
        check_leaves("target", made, shapes)
        tree, names = jax.tree.structure(target), list(shapes)
    params = jax.tree.unflatten(tree, [made[name] for name in names])
    return Pruned(params, kept, share)


def _most_used(used, keep):
    """(Indices of the largest, rising, ties to the lowest; their share)."""
    order = jnp.argsort(used, stable=True, descending=True)
    best = jnp.sort(order[:keep]).astype(jnp.int32)
    total = used.astype(jnp.float32)
    share = total[best].sum() / jnp.maximum(total.sum(), jnp.finfo(jnp.float32).tiny)
    return best, share


def _cut(role, w, best):
    return jnp.take(w, best, axis=_AXES[role]) if role in _AXES else w


def _dense(arrays):
    """The only expert of a layer, joined with the shared ones."""
    made = {}
    for role in ("w_in", "w_gate", "w_out"):
        if role in arrays:
            parts = [arrays[role][0]]
            shared = role.replace("w_", "shared_")
            if shared in arrays:
                parts.append(arrays[shared])
            made[role] = jnp.concatenate(parts, axis=0 if role == "w_out" else 1)
    return made


# ---- which layers ------------------------------------------------------------------

_ROLES = (*_AXES, "shared_in", "shared_gate", "shared_out")


def _place(name, ffn, role):
    path = role if ffn is None else ffn.names.get(role, role)
    return _names.join(name, path)


def _layers(leaves, ffns):
    """[(path, rule, arrays by role)] of the MoE layers, in order of the tree."""
    found: dict[str, Any] = {}
    for ffn in ffns or (None,):
        router = "router" if ffn is None else ffn.names.get("router", "router")
        for leaf in leaves:
            if leaf != router and not leaf.endswith("/" + router):
                continue
            name = leaf.removesuffix(router).removesuffix("/")
            if ffn is not None and _names.match(ffn.target, name) is None:
                continue
            arrays = {
                role: leaves[place]
                for role in _ROLES
                if (place := _place(name, ffn, role)) in leaves
            }
            if {"w_in", "w_out"} <= set(arrays):
                found.setdefault(name, (name, ffn, arrays))
    if not found:
        raise ValueError(
            "params: got no MoE layer (router, w_in and w_out below one path), needed "
            f"one in {', '.join(leaves)}"
        )
    return list(found.values())


def _records(usage, names):
    """Usage by path."""
    if not isinstance(usage, Mapping):
        if len(names) == 1 and jnp.ndim(usage) == 1:
            usage = jnp.asarray(usage)[None]
        if jnp.ndim(usage) < 2 or len(usage) != len(names):
            raise ValueError(
                f"usage: got shape {jnp.shape(usage)}, needed a row per layer of "
                f"{', '.join(names)}"
            )
        return dict(zip(names, usage, strict=True))
    found, unused = {}, []
    for pattern, record in usage.items():
        fits = [name for name in names if _names.match(pattern, name) is not None]
        unused += [] if fits else [pattern]
        for name in fits:
            found.setdefault(name, record)
    missing = [name for name in names if name not in found]
    if missing or unused:
        raise ValueError(
            f"usage: got none for {', '.join(missing) or 'no layer'}, and what is of "
            f"no layer: {', '.join(unused) or 'nothing'}; needed one for each of "
            f"{', '.join(names)}"
        )
    return found


def _check_layer(name, ffn, arrays, used, keep):
    """Raises unless every array is of as many experts as the record."""
    axis = None if ffn is None else ffn.axis
    stack = () if axis is None else (arrays["router"].shape[axis],)
    e = _experts("router", arrays["router"], axis)
    for role, w in arrays.items():
        if role in _AXES and _experts(role, w, axis) != e:
            raise ValueError(
                f"{_place(name, ffn, role)}: got {w.shape}, needed {e} experts, as "
                f"{_place(name, ffn, 'router')} has"
            )
    if used.shape != (*stack, e):
        raise ValueError(
            f"usage: got {used.shape} for {name}, needed {(*stack, e)}, its experts"
        )
    if not 1 <= keep <= e:
        raise ValueError(f"keep: got {keep}, needed 1 to {e}, the experts of {name}")


def _experts(role, w, axis):
    """How many experts an array of one layer, or of a stack, is of."""
    shape = [n for i, n in enumerate(w.shape) if i != axis]
    return shape[_AXES[role]] if len(shape) > _AXES[role] else 0
