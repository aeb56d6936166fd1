"""Products with a Kronecker-sparse factor on TPU: Pallas Mosaic.

Memory plan. The matrix units are 128 or 256 wide, and x's columns come to VMEM in
panels of 128. Blocks are joined to units that are as wide: ``config.blocks`` of them on
the diagonal of one matrix, whose zeros cost no more time than idle matrix units would.
The d interleaved blocks of an outer one are such a matrix too, ``[c * d, b * d]``
(``config.spread``), as long as that is not too wide. Where it is, XLA first brings each
block's columns together, and y's back: one pass over each in HBM. The matrices of the
units are made by XLA, at ``blocks`` (or d) times the memory of the factor.

Grid of ``product``: (units, tiles of columns, row tiles, steps of the contraction), a
unit's matrix stays in VMEM while rows stream. Grid of ``sampled``: (units, tiles of
rows, tiles of columns, row tiles): each unit's whole product is summed in float32, and
XLA takes the blocks out of it.

Padding, outside: columns, where units do not cover them exactly. An infinity or NaN in
one block's columns of x makes NaN of a row's results from the others of its unit too.

Dtypes: bfloat16 and float32, accumulated in float32. Products of float32 go at the
precision of ``jax.default_matmul_precision``, as those of XLA do.
Chips: compiled for v4, v5e, v5p, v6e and tpu7x, jax 0.10.2. Not yet run on a TPU. By
the compiler's schedule for v5e, bfloat16, 32 blocks of 128 x 128: 0.97 of the matrix
peak for the product, 0.68 for the sampled one; XLA's passes for interleaved blocks are
not in these.
"""

import functools

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._chips import TPU_LANES
from pallas_kernels.grouped_matmul.mosaic_tpu import at_least, dot, out_shape
from pallas_kernels.kronecker_sparse_matmul._spec import Config

_SUBLANES = 8


def product(
    x: jax.Array,
    factor: jax.Array,
    *,
    config: Config,
    interpret=False,
) -> jax.Array:
    """Rows times a Kronecker-sparse factor; the contract is in ``_spec``.

    Args:
        x: ``[m, a * c * d]``.
        factor: ``[a, d, c, b]``, dtype of x.
        config: tile sizes.
        interpret: True or ``pltpu.InterpretParams()`` to run without a TPU.

    Returns:
        ``[m, a * b * d]``, dtype of x.
    """
    rows = x.shape[0]
    a, d, c, b = factor.shape
    x = at_least(_SUBLANES, _to_units(x, (a, c, d), config), 0)
    w = _unit_matrices(factor, config)
    units, wide_k, wide_n = w.shape
    each, tile_m, tile_k, tile_n = (
        config.units, config.tile_m, config.tile_k, config.tile_n
    )  # fmt: skip
    steps, tiles = wide_k // tile_k, wide_n // tile_n
    y = pl.pallas_call(
        functools.partial(_product_kernel, widen=bool(interpret)),
        grid=(units // each, tiles, pl.cdiv(x.shape[0], tile_m), steps),
        in_specs=[
            pl.BlockSpec(
                (tile_m, each * tile_k), lambda unit, n, m, k: (m, unit * steps + k)
            ),
            pl.BlockSpec((each, tile_k, tile_n), lambda unit, n, m, k: (unit, k, n)),
        ],
        out_specs=pl.BlockSpec(
            (tile_m, each * tile_n), lambda unit, n, m, k: (m, unit * tiles + n)
        ),
        scratch_shapes=[pltpu.VMEM((tile_m, tile_n), jnp.float32)] * (steps > 1),
        out_shape=out_shape((x.shape[0], units * wide_n), x.dtype, x, w),
        compiler_params=_params(config),
        interpret=interpret,
        name="kronecker_sparse_matmul",
    )(x, w)
    return _from_units(y[:rows], (a, b, d), config)


def sampled(
    x: jax.Array,
    y: jax.Array,
    *,
    pattern: tuple[int, int, int, int],
    dtype,
    config: Config,
    interpret=False,
) -> jax.Array:
    """The entries of ``x.T @ y`` in a factor; the contract is in ``_spec``.

    Args:
        x: ``[m, a * c * d]``.
        y: ``[m, a * b * d]``, dtype of x.
        pattern: (a, b, c, d).
        dtype: of the result, that of x or float32.
        config: tile sizes.
        interpret: True or ``pltpu.InterpretParams()`` to run without a TPU.

    Returns:
        ``[a, d, c, b]`` of ``dtype``.
    """
    a, b, c, d = pattern
    x = at_least(_SUBLANES, _to_units(x, (a, c, d), config), 0)
    y = at_least(_SUBLANES, _to_units(y, (a, b, d), config), 0)
    count = a if config.spread else a * d
    units = -(-count // config.blocks)
    wide_k, wide_n = x.shape[1] // units, y.shape[1] // units
    each, tile_m, tile_k, tile_n = (
        config.units, config.tile_m, config.tile_k, config.tile_n
    )  # fmt: skip
    tiles_k, tiles_n = wide_k // tile_k, wide_n // tile_n
    # A float32 result is its own accumulator.
    scratch = [pltpu.VMEM((each, tile_k, tile_n), jnp.float32)]
    w = pl.pallas_call(
        functools.partial(_sampled_kernel, rows=x.shape[0], widen=bool(interpret)),
        grid=(units // each, tiles_k, tiles_n, pl.cdiv(x.shape[0], tile_m)),
        in_specs=[
            pl.BlockSpec(
                (tile_m, each * tile_k), lambda unit, k, n, m: (m, unit * tiles_k + k)
            ),
            pl.BlockSpec(
                (tile_m, each * tile_n), lambda unit, k, n, m: (m, unit * tiles_n + n)
            ),
        ],
        out_specs=pl.BlockSpec(
            (each, tile_k, tile_n), lambda unit, k, n, m: (unit, k, n)
        ),
        scratch_shapes=scratch * (jnp.dtype(dtype) != jnp.float32),
        out_shape=out_shape((units, wide_k, wide_n), dtype, x, y),
        compiler_params=_params(config),
        interpret=interpret,
        name="kronecker_sparse_matmul_sampled",
    )(x, y)
    return _from_unit_matrices(w, pattern, config)


def _product_kernel(x_ref, w_ref, y_ref, *accs, widen):
    each, tile_k, tile_n = w_ref.shape
    if not accs:
        for unit in range(each):
            columns = pl.ds(unit * tile_k, tile_k)
            part = dot(x_ref[:, columns], w_ref[unit], (1, 0), widen)
            y_ref[:, pl.ds(unit * tile_n, tile_n)] = part.astype(y_ref.dtype)
        return
    [acc_ref] = accs
    step, steps = pl.program_id(3), pl.num_programs(3)
    part = dot(x_ref[...], w_ref[0], (1, 0), widen)

    @pl.when(step == 0)
    def _():
        acc_ref[...] = part

    @pl.when(step > 0)
    def _():
        acc_ref[...] += part

    @pl.when(step == steps - 1)
    def _():
        y_ref[...] = acc_ref[...].astype(y_ref.dtype)


def _sampled_kernel(x_ref, y_ref, w_ref, acc_ref=None, *, rows, widen):
    each, tile_k, tile_n = w_ref.shape
    step, steps = pl.program_id(3), pl.num_programs(3)
    sum_ref = w_ref if acc_ref is None else acc_ref

    @pl.when(step == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    for unit in range(each):
        x = x_ref[:, pl.ds(unit * tile_k, tile_k)]
        y = y_ref[:, pl.ds(unit * tile_n, tile_n)]
        if rows % x.shape[0]:
            # The last tile reaches out of the arrays.
            x, y = (_cut(tile, rows - step * x.shape[0]) for tile in (x, y))
        sum_ref[unit] += dot(x, y, (0, 0), widen)

    if acc_ref is not None:

        @pl.when(step == steps - 1)
        def _():
            w_ref[...] = acc_ref[...].astype(w_ref.dtype)


def _cut(tile, left):
    """Zeros from row ``left`` on."""
    row = lax.broadcasted_iota(jnp.int32, tile.shape, 0)
    return jnp.where(row < left, tile, jnp.zeros((), tile.dtype))


def _to_units(x, axes, config):
    """Columns (i j k) as those of units: ``[m, units * wide]``."""
    a, c, d = axes
    rows = x.shape[0]
    if config.spread:
        count, side = a, c * d
    else:
        x = jnp.swapaxes(x.reshape(rows, a, c, d), 2, 3).reshape(rows, -1)
        count, side = a * d, c
    units, wide = _wide(count, side, config)
    if units * wide == count * side:
        return x
    group = config.blocks * side
    x = jnp.pad(x, ((0, 0), (0, units * group - count * side)))
    x = jnp.pad(x.reshape(rows, units, group), ((0, 0), (0, 0), (0, wide - group)))
    return x.reshape(rows, units * wide)


def _from_units(y, axes, config):
    """The inverse of ``_to_units``."""
    a, b, d = axes
    rows = y.shape[0]
    count, side = (a, b * d) if config.spread else (a * d, b)
    units, wide = _wide(count, side, config)
    if units * wide != count * side:
        y = y.reshape(rows, units, wide)[:, :, : config.blocks * side]
        y = y.reshape(rows, -1)[:, : count * side]
    if config.spread:
        return y
    return jnp.swapaxes(y.reshape(rows, a, d, b), 2, 3).reshape(rows, -1)


def _wide(count, side, config):
    wide = -(-config.blocks * side // TPU_LANES) * TPU_LANES
    return -(-count // config.blocks), wide


def _unit_matrices(factor, config):
    """The factor as matrices of units, ``[units, wide_k, wide_n]``."""
    a, d, c, b = factor.shape
    if config.spread:
        # [a, j, k, o, k'], zero but where k is k'.
        w = _diagonal(jnp.moveaxis(factor, 1, 2), 2, 4).reshape(a, c * d, b * d)
    else:
        w = factor.reshape(a * d, c, b)
    count, side_k, side_n = w.shape
    units, wide_k = _wide(count, side_k, config)
    _, wide_n = _wide(count, side_n, config)
    group = config.blocks
    w = jnp.pad(w, ((0, units * group - count), (0, 0), (0, 0)))
    w = _diagonal(w.reshape(units, group, side_k, side_n), 1, 3)
    w = w.reshape(units, group * side_k, group * side_n)
    more = (wide_k - group * side_k, wide_n - group * side_n)
    return jnp.pad(w, ((0, 0), (0, more[0]), (0, more[1])))


def _from_unit_matrices(w, pattern, config):
    """The factor's entries of the units' matrices."""
    a, b, c, d = pattern
    count, side_k, side_n = (a, c * d, b * d) if config.spread else (a * d, c, b)
    units, group = w.shape[0], config.blocks
    w = w[:, : group * side_k, : group * side_n]
    w = w.reshape(units, group, side_k, group, side_n)
    w = _on_diagonal(w, 1, 3).reshape(units * group, side_k, side_n)[:count]
    if not config.spread:
        return w.reshape(a, d, c, b)
    return jnp.moveaxis(_on_diagonal(w.reshape(a, c, d, b, d), 2, 4), 2, 1)


def _diagonal(w, axis, other):
    """Axis ``axis`` once more, as axis ``other``: zeros where the two differ."""
    size = w.shape[axis]
    if size == 1:
        return jnp.expand_dims(w, other)
    shape = [1] * (w.ndim + 1)
    shape[axis] = shape[other] = size
    eye = jnp.eye(size, dtype=bool).reshape(shape)
    return jnp.where(eye, jnp.expand_dims(w, other), jnp.zeros((), w.dtype))


def _on_diagonal(w, axis, other):
    """The entries where two axes agree, without axis ``other``."""
    size = w.shape[axis]
    if size == 1:
        return jnp.squeeze(w, other)
    shape = [1] * w.ndim
    shape[axis] = shape[other] = size
    eye = jnp.eye(size, dtype=bool).reshape(shape)
    # A sum of one number and zeros.
    return jnp.sum(jnp.where(eye, w, jnp.zeros((), w.dtype)), other, dtype=w.dtype)


def _params(config):
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
        vmem_limit_bytes=config.vmem,
    )
