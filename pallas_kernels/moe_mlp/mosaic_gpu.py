"""The two halves of a mixture of experts' layer on Hopper: Pallas Mosaic GPU, wgmma.

Both are the persistent kernel of ``grouped_matmul.mosaic_gpu``, whose memory plan and
grid they have, with another end to a tile.

``hidden``. With a gate, a step brings a piece of ``w_in``, the same of ``w_gate``, and
one of x that serves both. The two sums meet in the registers of the warpgroup that
computed them, ``activation`` works on float32 there, and only h leaves.

``down``. The gate's weights, one per row, are multiplied with the float32 sums in
registers. What gates the tail has does not matter.

What stays with XLA, and why. TMA gathers rows on Blackwell and later only, and the
other asynchronous copy that Mosaic GPU has takes no indices. So the gather of tokens is
XLA's, ahead of the kernel: 2 * c * d numbers moved, beside products of 2 * c * d * f
operations or more. A scatter in the store could go row by row, from SMEM that is not
swizzled; but tiles here leave through the warpgroups that compute, which would wait,
whereas a gather of the sorted rows fuses with what sums up a token's choices, which
reads them anyway: it takes no memory (tests/compile/test_moe_mlp_gpu.py).

Dtypes: bfloat16 and float16. Chips: compiled with ptxas for H100 and H200 (sm_90a)
under jax 0.10.2 and 0.11.2, no spills; results proven by simulation. Not yet run on a
GPU: speed is unmeasured.
"""

from collections.abc import Callable

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul.mosaic_gpu import (
    COMPUTE,
    ROWS,
    Plan,
    persistent,
    places,
    row_tiles,
    share,
    store_rows,
    store_rows_scratch,
    whole_tiles,
)
from pallas_kernels.moe_mlp._activation import check_activation, inlined
from pallas_kernels.moe_mlp._spec import Config

# jax 0.10 wants an index beside the reference, later ones do not take it.
_WHOLE = (...,) if jax.__version_info__ < (0, 11) else ()


def hidden(
    x: jax.Array,
    w_in: jax.Array,
    w_gate: jax.Array | None,
    tokens: jax.Array,
    sizes: jax.Array,
    *,
    activation: Callable[[jax.Array], jax.Array],
    config: Config,
    interpret=None,
) -> jax.Array:
    """The hidden layer of each choice's expert, as ``_spec`` defines it.

    Args:
        x: [t, d], bfloat16 or float16.
        w_in: [experts, d, f] of x's dtype.
        w_gate: the same, or None.
        tokens: int32 [c].
        sizes: int32 [experts].
        activation: elementwise function that ``check_activation`` passes.
        config: tile sizes.
        interpret: True or ``plgpu.InterpretGPUParams`` to simulate, from jax 0.11 on.

    Returns:
        [c, f] of x's dtype; zeros in the tail.
    """
    weights = (w_in,) if w_gate is None else (w_gate, w_in)
    check_activation(activation, "mosaic_gpu", w_in.shape[2])
    act = inlined(activation)

    def end(results, row):
        del row
        return act(results[0]) if w_gate is None else act(results[0]) * results[1]

    name = "moe_hidden" + ("" if w_gate is None else "_gated")
    return _rows(x[tokens], weights, (), sizes, end, name, config, interpret)


def down(
    h: jax.Array,
    w_out: jax.Array,
    choices: jax.Array,
    weights: jax.Array,
    sizes: jax.Array,
    *,
    config: Config,
    interpret=None,
) -> jax.Array:
    """The output of each choice's expert times its gate, as ``_spec`` defines it.

    Args:
        h: [c, f], bfloat16 or float16.
        w_out: [experts, f, d] of h's dtype.
        choices: int32 [c], a permutation.
        weights: float32 [c].
        sizes: int32 [experts].
        config: tile sizes.
        interpret: True or ``plgpu.InterpretGPUParams`` to simulate, from jax 0.11 on.

    Returns:
        [c, d] of h's dtype, in the order of ``choices``; zeros in the tail.
    """

    def end(results, row, weights_gmem):
        [result] = results
        gates = plgpu.load(
            weights_gmem.at[pl.ds(row, result.shape[0])],
            *_WHOLE,
            layout=plgpu.Layout.WGMMA.reduce(1),
            optimized=False,
        )
        return result * lax.broadcast_in_dim(gates, result.shape, (0,))

    # A tile's rows may begin before the first choice's and end beyond the last.
    padded = jnp.pad(weights, (0, config.tile_m + ROWS))
    z = _rows(h, (w_out,), (padded,), sizes, end, "moe_down", config, interpret)
    sorted_place = jnp.arange(choices.shape[0], dtype=choices.dtype)
    place = jnp.zeros_like(choices).at[choices].set(sorted_place, unique_indices=True)
    return z[place]


def _rows(x, weights, more, sizes, end, name, config: Config, interpret):
    """Computes ``end([x @ w of its group for w in weights], row, *more refs)``."""
    count = x.shape[0]
    x = whole_tiles(x)
    m = x.shape[0]
    groups, inner, width = weights[0].shape
    tile_m, deep, wide = config.tile_m, config.tile_k, config.tile_n
    tiles, total = row_tiles(sizes, m, tile_m)

    def plan(x_gmem, *refs):
        refs, pieces = refs[:-COMPUTE], refs[-COMPUTE:]
        *refs, tiles_gmem, total_gmem, y_gmem = refs
        weights_gmem, more_gmem = refs[: len(weights)], refs[len(weights) :]
        row, column, shape = share(tile_m, wide)
        total, place = places(
            tiles_gmem, total_gmem, pl.cdiv(width, wide), config.group
        )

        def steps(tile):
            return jnp.where(tile.group < groups, jnp.int32(inner // deep), 0)

        def fetch(tile, i):
            along, across = pl.ds(i * deep, deep), pl.ds(tile.column * wide, wide)
            rows = pl.ds(tile.start * ROWS, tile_m)
            pieces = [w_gmem.at[tile.group, along, across] for w_gmem in weights_gmem]
            return x_gmem.at[rows, along], *pieces

        def multiply(tile, i, accs, x_smem, *weights_smem):
            del tile, i
            rows, columns = pl.ds(row, shape[0]), pl.ds(column, shape[1])
            for acc, w_smem in zip(accs, weights_smem, strict=True):
                plgpu.wgmma(acc, x_smem.at[rows], w_smem.at[:, columns])

        def finish(tile, results):
            at = tile.start * ROWS + row, tile.column * wide + column
            result = lax.cond(
                tile.group < groups,
                lambda: end(results, at[0], *more_gmem).astype(x.dtype),
                # Of the tail: zeros, whatever activation and gates make of them.
                lambda: results[0].astype(x.dtype),
            )
            store_rows(result, y_gmem, *at, tile, pieces)

        return Plan(total, place, steps, fetch, multiply, finish)

    y = persistent(
        (x, *weights, *more, tiles, total),
        plan,
        name=name,
        out_type=jax.ShapeDtypeStruct((m, width), x.dtype),
        buffers=[(tile_m, deep), *[(deep, wide)] * len(weights)],
        tile=(tile_m, wide),
        sums=len(weights),
        scratch=store_rows_scratch(x.dtype),
        stages=config.stages,
        programs=config.programs,
        interpret=interpret,
    )
    return y if m == count else y[:count]
