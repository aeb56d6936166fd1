"""Sharded weights: where the masks of each lie, and rules that need not know."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def place(found: Any, leaves: dict[str, Any]) -> Any:
    """`found` on the devices of the weights: what is by leaf name lies as its weight.

    A rule draws masks from shapes alone, on one device, or without a sharding in their
    type. Taken as they are they would make the second step, whose masks come from the
    first, another program than the first. On one device nothing is moved.

    Args:
      found: A pytree of arrays, such as masks by leaf name.
      leaves: Weights by name.
    """
    mesh = next(filter(None, map(_mesh_of, leaves.values())), None)

    def put(path, array):
        if not isinstance(array, jax.Array):  # an optimizer may keep numbers
            return array
        by_name = path and isinstance(path[0], jax.tree_util.DictKey)
        weight = leaves.get(path[0].key) if by_name else None
        if weight is not None and weight.shape != array.shape:
            weight = None
        if isinstance(array, jax.core.Tracer):
            # In a mesh that is not explicit the compiler decides.
            if weight is None or not _explicit_axes(jax.typeof(weight).sharding.mesh):
                return array
            return jax.sharding.reshard(array, jax.typeof(weight).sharding)
        if mesh is None:
            return array
        if weight is not None and hasattr(weight, "sharding"):
            return jax.device_put(array, weight.sharding)
        if array.committed:
            return array
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec()))

    return jax.tree_util.tree_map_with_path(put, found)


def automatic(rule: Callable[..., Any], like: Any, *args: Any) -> Any:
    """`rule(*args)`, with results sharded as the arrays of the tree `like`.

    In a mesh whose axes are explicit the sharding is part of an array's type, and a
    selection would have to name one for everything that it compares, counts or cuts
    into blocks. There the rule runs with axes that the compiler looks after.
    """
    kinds = [jax.typeof(leaf).sharding for leaf in jax.tree.leaves((like, args))]
    mesh = next((kind.mesh for kind in kinds if _explicit_axes(kind.mesh)), None)
    if mesh is None:
        return rule(*args)

    def sharding_of(leaf):
        found = jax.typeof(leaf).sharding
        return found if found.mesh == mesh else NamedSharding(mesh, PartitionSpec())

    with jax.sharding.use_abstract_mesh(mesh):
        return jax.sharding.auto_axes(
            rule,
            axes=_explicit_axes(mesh),
            out_sharding=jax.tree.map(sharding_of, like),
        )(*args)


def _explicit_axes(mesh: Any) -> tuple[str, ...]:
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind == AxisType.Explicit)


def _mesh_of(weight: Any) -> Any:
    """The mesh that a concrete weight is spread over, or None."""
    sharding = getattr(weight, "sharding", None)
    if isinstance(weight, jax.core.Tracer) or not isinstance(sharding, NamedSharding):
        return None
    return sharding.mesh if sharding.mesh.size > 1 else None
