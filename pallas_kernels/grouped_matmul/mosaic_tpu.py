"""Grouped products on TPU: Pallas Mosaic."""

import functools

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_matmul._spec import Config

# Rows of a 16-bit register pair: chunks begin at multiples of it.
_ALIGN = 16
SUBLANES = 8


def product(
    x: jax.Array,
    w: jax.Array,
    sizes: jax.Array,
    *,
    transpose: bool,
    config: Config,
    interpret=False,
) -> jax.Array:
    """Rows times the matrix of their group; the contract is in ``_spec``.

    Args:
        x: ``[m, k]``, or ``[m, n]`` with ``transpose``.
        w: ``[groups, k, n]``, dtype of x.
        sizes: int32 ``[groups]``, rows of each group.
        transpose: multiply by the transposed matrices.
        config: tile sizes.
        interpret: True or ``pltpu.InterpretParams()`` to run without a TPU.

    Returns:
        ``[m, n]``, or ``[m, k]`` with ``transpose``, dtype of x.
    """
    rows, columns = x.shape[0], w.shape[1 if transpose else 2]
    x = at_least(SUBLANES, x, 0)
    w = at_least(SUBLANES, w, 1)
    if not transpose:
        x = at_least(SUBLANES, x, 1)
    m, inner = x.shape
    groups, k, n = w.shape
    tile_m, tile_k, tile_n = config.tile_m, config.tile_k, config.tile_n
    if transpose:
        outer, tile_in, tile_out = k, tile_n, tile_k
        weight = lambda out, step: (out, step)
    else:
        outer, tile_in, tile_out = n, tile_k, tile_n
        weight = lambda out, step: (step, out)
    steps = pl.cdiv(inner, tile_in)
    visits, count = visits_of(sizes, m, tile_m, tail=True)

    def x_index(out, visit, step, group, tile, bounds):
        # The tail's visits read nothing: they stay with the last tile of any group.
        last = lax.div(jnp.maximum(bounds[groups], 1) - 1, jnp.int32(tile_m))
        return jnp.minimum(tile[visit], last), step

    def w_index(out, visit, step, group, tile, bounds):
        return jnp.minimum(group[visit], groups - 1), *weight(out, step)

    def y_index(out, visit, step, group, tile, bounds):
        return tile[visit], out

    kernel = functools.partial(
        _product_kernel,
        inner=inner,
        rows=config.rows,
        transpose=transpose,
        widen=bool(interpret),
    )
    y = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(pl.cdiv(outer, tile_out), count, steps),
            in_specs=[
                pl.BlockSpec((tile_m, tile_in), x_index),
                pl.BlockSpec((None, tile_k, tile_n), w_index),
            ],
            out_specs=pl.BlockSpec((tile_m, tile_out), y_index),
            scratch_shapes=[pltpu.VMEM((tile_m, tile_out), jnp.float32)]
            if steps > 1
            else [],
        ),
        out_shape=out_shape((m, outer), x.dtype, x, w),
        compiler_params=params(config),
        interpret=interpret,
        name="grouped_matmul" + ("_transposed" if transpose else ""),
    )(*visits, x, w)
    return y if y.shape == (rows, columns) else y[:rows, :columns]


def sampled(
    x: jax.Array,
    y: jax.Array,
    sizes: jax.Array,
    *,
    dtype,
    config: Config,
    interpret=False,
) -> jax.Array:
    """``x.T @ y`` over the rows of each group; the contract is in ``_spec``.

    Args:
        x: ``[m, k]``.
        y: ``[m, n]``, dtype of x.
        sizes: int32 ``[groups]``, rows of each group.
        dtype: of the result, that of x or float32.
        config: tile sizes.
        interpret: True or ``pltpu.InterpretParams()`` to run without a TPU.

    Returns:
        ``[groups, k, n]`` of ``dtype``.
    """
    x, y = at_least(SUBLANES, x, 0), at_least(SUBLANES, y, 0)
    (m, k), n = x.shape, y.shape[1]
    groups = sizes.shape[0]
    tile_m, tile_k, tile_n = config.tile_m, config.tile_k, config.tile_n
    visits, count = visits_of(sizes, m, tile_m, tail=False)
    kernel = functools.partial(_sampled_kernel, rows=config.rows, widen=bool(interpret))
    # A float32 result is its own accumulator.
    scratch = [pltpu.VMEM((tile_k, tile_n), jnp.float32)]
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(pl.cdiv(k, tile_k), pl.cdiv(n, tile_n), count),
            in_specs=[
                pl.BlockSpec(
                    (tile_m, tile_k), lambda i, j, v, group, tile, bounds: (tile[v], i)
                ),
                pl.BlockSpec(
                    (tile_m, tile_n), lambda i, j, v, group, tile, bounds: (tile[v], j)
                ),
            ],
            out_specs=pl.BlockSpec(
                (None, tile_k, tile_n),
                lambda i, j, v, group, tile, bounds: (group[v], i, j),
            ),
            scratch_shapes=scratch if jnp.dtype(dtype) != jnp.float32 else [],
        ),
        out_shape=out_shape((groups, k, n), dtype, x, y),
        compiler_params=params(config),
        interpret=interpret,
        name="grouped_matmul_sampled",
    )(*visits, x, y)


def _product_kernel(
    group_ref,
    tile_ref,
    bounds_ref,
    x_ref,
    w_ref,
    y_ref,
    *accs,
    inner,
    rows,
    transpose,
    widen,
):
    visit, step, steps = pl.program_id(1), pl.program_id(2), pl.num_programs(2)
    tile_m, tile_in = x_ref.shape
    tile = tile_ref[visit]
    start, end = rows_of(group_ref[visit], tile, bounds_ref, tile_m)

    @pl.when((step == 0) & fresh(tile_ref, visit))
    def _():
        y_ref[...] = jnp.zeros_like(y_ref)

    def chunk(window, own):
        a, b = x_ref[window], w_ref[...]
        if inner % tile_in:
            left = inner - step * tile_in
            a, b = cut(a, 1, left), cut(b, 1 if transpose else 0, left)
        product = dot(a, b, (1, 1 if transpose else 0), widen)
        if not accs:
            y_ref[window] = merge(own, product, y_ref[window])
            return
        [acc_ref] = accs
        acc = acc_ref[window]
        acc_ref[window] = jnp.where(own, product + jnp.where(step == 0, 0.0, acc), acc)

        @pl.when(step == steps - 1)
        def _():
            y_ref[window] = merge(own, acc_ref[window], y_ref[window])

    windows(start, end, rows, tile_m, chunk)


def _sampled_kernel(
    group_ref,
    tile_ref,
    bounds_ref,
    x_ref,
    y_ref,
    w_ref,
    acc_ref=None,
    *,
    rows,
    widen,
):
    visit, visits = pl.program_id(2), pl.num_programs(2)
    start, end = rows_of(group_ref[visit], tile_ref[visit], bounds_ref, x_ref.shape[0])
    sum_ref = w_ref if acc_ref is None else acc_ref

    @pl.when(fresh(group_ref, visit))
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    def chunk(window, own):
        a, b = (
            jnp.where(own, ref[window], jnp.zeros((), ref.dtype))
            for ref in (x_ref, y_ref)
        )
        sum_ref[...] += dot(a, b, (0, 0), widen)

    windows(start, end, rows, x_ref.shape[0], chunk)
    if acc_ref is not None:
        after = group_ref[jnp.minimum(visit + 1, visits - 1)]

        @pl.when((visit == visits - 1) | (after != group_ref[visit]))
        def _():
            w_ref[...] = acc_ref[...].astype(w_ref.dtype)


def merge(own, new, old):
    """New rows where they are the group's own, as float32, which every chip selects."""
    return jnp.where(own, new, old.astype(jnp.float32)).astype(old.dtype)


def windows(start, end, rows, tile_m, chunk):
    """Calls ``chunk(window, own)`` for windows of rows that cover [start, end).

    Windows begin at whole registers; ``own [rows, 1]`` says which rows are meant, each
    by one window.
    """
    first = lax.div(start, jnp.int32(_ALIGN)) * _ALIGN
    # Without rows there is nothing to cover, wherever the range begins.
    trips = jnp.where(start < end, lax.div(end - first + rows - 1, jnp.int32(rows)), 0)

    def step(index, carry):
        begin = first + index * rows
        # The last window begins early enough to be whole.
        low = pl.multiple_of(jnp.minimum(begin, tile_m - rows), _ALIGN)
        row = low + lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
        chunk(pl.ds(low, rows), (row >= jnp.maximum(start, begin)) & (row < end))
        return carry

    lax.fori_loop(0, trips, step, None)


def rows_of(group, tile, bounds_ref, tile_m):
    """The group's rows of a tile, counted from the tile's first one."""
    base = tile * tile_m
    start = jnp.clip(bounds_ref[group] - base, 0, tile_m)
    return start, jnp.clip(bounds_ref[group + 1] - base, 0, tile_m)


def fresh(ids_ref, visit):
    """Whether this visit is the first one of its id."""
    before = ids_ref[jnp.maximum(visit - 1, 0)]
    return (visit == 0) | (ids_ref[visit] != before)


def visits_of(sizes, m, tile_m, tail):
    """Which (group, row tile) each grid step is at.

    A tile is visited once for each group that has rows in it. With ``tail`` the tiles
    of the tail alone are visited as those of a group without rows, number ``groups``;
    else a group without rows is visited once.

    Returns:
        ``((group [most], tile [most], bounds [groups + 2]), count)``: ``bounds[g]`` is
        the first row of group g; of the visits the first ``count`` are real.
    """
    groups, tiles = sizes.shape[0], pl.cdiv(m, tile_m)
    total = jnp.cumsum(jnp.maximum(sizes, 0), dtype=jnp.int32)
    end = jnp.minimum(total, m)
    start = jnp.concatenate([jnp.zeros((1,), jnp.int32), end[:-1]])
    first = start // tile_m
    count = jnp.where(end > start, (end - 1) // tile_m + 1 - first, 0 if tail else 1)
    if tail:
        used = (end[-1:] + tile_m - 1) // tile_m
        first = jnp.concatenate([first, used])
        count = jnp.concatenate([count, tiles - used])
    most = tiles + groups
    bounds = jnp.concatenate([start, end[-1:], end[-1:]])
    after = jnp.cumsum(count, dtype=jnp.int32)
    visit = jnp.arange(most, dtype=jnp.int32)
    group = jnp.sum(after <= visit[:, None], axis=1, dtype=jnp.int32)
    group = jnp.minimum(group, count.shape[0] - 1)
    # The group's entry, by comparison: a gather of single numbers is slow here.
    own = group[:, None] == jnp.arange(count.shape[0], dtype=jnp.int32)
    base = jnp.sum(jnp.where(own, first - (after - count), 0), axis=1, dtype=jnp.int32)
    tile = jnp.minimum(base + visit, tiles - 1)
    return (group, tile, bounds), after[-1]


def cut(tile, axis, left):
    """Zeros from index ``left`` of an axis on: a tile may reach out of its array."""
    index = lax.broadcasted_iota(jnp.int32, tile.shape, axis)
    return jnp.where(index < left, tile, jnp.zeros((), tile.dtype))


def dot(a, b, contracted, widen):
    """Contracts one axis of each tile, in float32.

    Widened first where the kernel is interpreted: XLA has no such product of bfloat16
    for every shape on CPU. It changes nothing, products of bfloat16 are exact there.
    """
    if widen:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    dims = (((contracted[0],), (contracted[1],)), ((), ()))
    return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def at_least(size, array, axis):
    """Zeros at the end of an axis up to the size: narrow arrays are tiled otherwise."""
    more = [(0, 0)] * array.ndim
    more[axis] = (0, max(size - array.shape[axis], 0))
    return jnp.pad(array, more) if more[axis][1] else array


def params(config):
    """Cores share the tiles of columns; the rest of the grid goes in order."""
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary", "arbitrary"),
        vmem_limit_bytes=config.vmem or None,
    )


def out_shape(shape, dtype, *arrays):
    """The result's type: it varies over the mesh axes that the arrays vary over."""
    return jax.ShapeDtypeStruct(
        shape, dtype, manual_axis_type=jax.typeof(arrays[0]).manual_axis_type
    )
