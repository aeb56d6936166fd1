"""What every operator checks or does before it computes."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

_FLOATING = ("float32", "bfloat16", "float16", "float64")


def check_floating(**arrays):
    """Raises ValueError, with the argument's name, unless the dtypes are supported."""
    for name, array in arrays.items():
        if jnp.dtype(array.dtype).name not in _FLOATING:
            wanted = ", ".join(_FLOATING)
            raise ValueError(f"{name}: got dtype {array.dtype}, needed one of {wanted}")


def accumulator(dtype):
    """In which products of ``dtype`` are summed: float32, or float64."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def over_explicit_axes(fn, x, *operands, keep_rows):
    """Calls ``fn(x, *operands)`` under shard_map over a mesh's explicit axes, if any.

    A Mosaic kernel cannot be partitioned by XLA; with explicit axes the types tell how
    x is cut, so the cut can be made by hand. x keeps the cut of its leading axes, its
    last axis and all other operands are brought together; a second operand with x's
    leading axes (``keep_rows=False``: a product that sums over rows) is cut as x is,
    and the result is summed over those axes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    explicit = () if mesh.empty else mesh.explicit_axes
    if not explicit:
        return fn(x, *operands)
    lead = tuple(jax.typeof(x).sharding.spec)[: x.ndim - 1]
    rows = P(*lead, None)
    names = {name for axis in lead if axis is not None for name in _names(axis)}

    if keep_rows:
        in_specs = (rows, *(jax.tree.map(lambda _: P(), each) for each in operands))
        out_specs, body = rows, fn
    else:
        y, *rest = operands
        in_specs = (rows, rows, *(jax.tree.map(lambda _: P(), each) for each in rest))
        out_specs = P()

        def body(*args):
            out = fn(*args)
            return jax.lax.psum(out, tuple(sorted(names))) if names else out

    args = jax.tree.map(
        lambda spec, a: jax.sharding.reshard(a, spec), in_specs, (x, *operands)
    )
    mapped = jax.shard_map(
        body, in_specs=in_specs, out_specs=out_specs, axis_names=set(explicit)
    )
    return mapped(*args)


def _names(axis):
    return axis if isinstance(axis, tuple) else (axis,)
