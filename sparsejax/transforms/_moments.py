"""The inner optimizer's per-weight state where the mask changes.

Nothing here knows an optimizer. A leaf of the state belongs to a weight if its path
ends in the weight's path and its shape is the weight's: that is how every optax
state built by mapping over the parameters looks, under any nesting of wrappers.
Other leaves, such as the factors of adafactor or a step count, are left alone.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax.masks import path_name
from sparsejax.masks._structure import at_least_float32

POLICIES = ("keep", "zero", "mean")

# What optax calls the momentum of sgd, and of adam and its kin.
_MOMENTA = ("trace", "mu")


def settle(
    inner_state: Any,
    params: Any,
    masks: dict[str, Any],
    old: dict[str, Any],
    *,
    policy: str,
    iterates: Sequence[bool],
    dense: bool,
) -> Any:
    """Brings per-weight state in line with new masks, before the inner update.

    Iterates, state that starts as the weights themselves (the z of schedule-free),
    are zero wherever the mask is False, under every policy. Moments at dropped and
    grown entries: `keep` leaves them, `zero` clears both, `mean` clears the dropped
    and gives the grown the mean over entries that were kept before and after. Pruned
    entries have none, unless the optimizer sees `dense` gradients.
    """

    def leaf(index, name, value):
        mask = masks[name]
        if iterates[index]:
            return jnp.where(mask, value, 0)
        if policy == "keep":
            return value
        # Without the old masks, where that will do, there is less to read each step.
        stays = mask == old[name] if dense else mask
        cleared = jnp.where(stays, value, 0)
        if policy == "zero":
            return cleared
        stayed = mask & old[name]
        # float16 could not hold the count.
        wide = at_least_float32(value.dtype)
        count = jnp.maximum(jnp.sum(stayed), 1).astype(wide)
        mean = jnp.sum(value.astype(wide), where=stayed) / count
        mean = mean.astype(value.dtype)
        grown = mask & ~old[name]
        return jnp.where(grown, mean, cleared)

    return _map_weights(leaf, inner_state, params, masks)


def sweep(
    inner_state: Any, params: Any, masks: dict[str, Any], iterates: Sequence[bool]
) -> Any:
    """Clears iterates at pruned entries, after the inner update.

    Moments are not swept: seeing zeros, optimizers leave zeros, or as little as
    adafactor's 1e-30. A second masked copy would also keep XLA from sharing the new
    moments between the state and the update, and from working in place: that made
    an AdamW step three times as slow.
    """
    if not any(iterates):
        return inner_state

    def leaf(index, name, value):
        return jnp.where(masks[name], value, 0) if iterates[index] else value

    return _map_weights(leaf, inner_state, params, masks)


def find_iterates(init: Callable[[Any], Any], params: Any) -> list[bool]:
    """Which leaves of the state `init(params)` are computed from values of `params`.

    Moments start from shapes alone; a copy of the weights does not. Read off the
    jaxpr, so no array is made.
    """
    leaves = lambda p: jax.tree.leaves(init(p))
    arrays = lambda p: [x if hasattr(x, "dtype") else 0 for x in leaves(p)]
    closed = jax.make_jaxpr(arrays)(params)
    return _depends(closed.jaxpr, [True] * len(closed.jaxpr.invars))


def _depends(jaxpr: Any, inputs: list[bool]) -> list[bool]:
    """For each output, whether it depends on an input that is marked."""
    marked = {var for var, mark in zip(jaxpr.invars, inputs, strict=True) if mark}
    is_marked = lambda atom: not hasattr(atom, "val") and atom in marked
    for eqn in jaxpr.eqns:
        into = [is_marked(atom) for atom in eqn.invars]
        inner = eqn.params.get("jaxpr")
        if inner is not None and len(inner.jaxpr.invars) == len(into):
            out = _depends(inner.jaxpr, into)
        else:
            out = [any(into)] * len(eqn.outvars)
        marked |= {var for var, mark in zip(eqn.outvars, out, strict=True) if mark}
    return [is_marked(atom) for atom in jaxpr.outvars]


def find_momentum(
    inner_state: Any, params: Any, masks: dict[str, Any]
) -> dict[str, Any] | None:
    """The inner optimizer's momentum by leaf name; None unless each has just one."""
    found: dict[str, list[Any]] = {name: [] for name in masks}
    for before, name, value in _owned(inner_state, params):
        field = getattr(before[-1], "name", None) if before else None
        if name in found and field in _MOMENTA and _fits(value, masks[name]):
            found[name].append(value)
    if not all(len(values) == 1 for values in found.values()):
        return None
    return {name: values[0] for name, values in found.items()}


def begun(momentum: dict[str, Any], gradients: dict[str, Any]) -> dict[str, Any]:
    """The momentum, or before there is any the gradients; 0 where not finite."""
    started = jnp.any(jnp.stack([jnp.any(m != 0) for m in momentum.values()]))
    out = {}
    for name, m in momentum.items():
        wide = at_least_float32(m.dtype)
        m = jnp.where(started, m.astype(wide), gradients[name].astype(wide))
        out[name] = jnp.where(jnp.isfinite(m), m, 0)
    return out


def _map_weights(fn: Callable, state: Any, params: Any, masks: dict[str, Any]) -> Any:
    """Maps `fn(index, name, leaf)` over leaves of `state` that belong to a mask."""
    out = [
        fn(index, name, value) if name in masks and _fits(value, masks[name]) else value
        for index, (_, name, value) in enumerate(_owned(state, params))
    ]
    return jax.tree.unflatten(jax.tree.structure(state), out)


def _owned(state: Any, params: Any) -> list[tuple[Any, str | None, Any]]:
    """For each leaf of `state`: keys before the weight's own, weight's name, leaf."""
    keys = lambda path: tuple(str(key) for key in path)
    weights = {
        keys(path): path_name(path)
        for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]
    }
    out = []
    for path, value in jax.tree_util.tree_flatten_with_path(state)[0]:
        # The longest end that is a weight's path: `a/kernel` before `kernel`.
        starts = range(len(path) + 1)
        start = next((i for i in starts if keys(path[i:]) in weights), None)
        name = None if start is None else weights[keys(path[start:])]
        out.append((path[:start], name, value))
    return out


def _fits(value: Any, mask: Any) -> bool:
    return jnp.shape(value) == mask.shape
