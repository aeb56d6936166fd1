"""Cases of the TPU kernels for a static schedule tool.

``cases()`` yields (name, function, arguments, {"flops": ..., "trips": {...}}): the
useful floating-point operations of one grid step, and the mean trips of the loops
inside by depth (the grid loop is depth 1; the loop over unused slots, which makes no
trip here, is given the same mean). Both come from the layout and the Config.
Padding is no useful work: not the entries that fill up the last inner step, not the
entry of an empty column, not the rows that a last tile repeats.
"""

import functools
import math
import os

import jax
import numpy as np
from jax import numpy as jnp

from pallas_kernels.block_sparse_attention import _spec as attention_spec
from pallas_kernels.block_sparse_attention import mosaic_tpu as attention_tpu
from pallas_kernels.block_sparse_matmul import _spec, mosaic_tpu
from pallas_kernels.grouped_matmul import _spec as grouped_spec
from pallas_kernels.grouped_matmul import mosaic_tpu as grouped_tpu
from pallas_kernels.kronecker_sparse_matmul import _spec as kronecker_spec
from pallas_kernels.kronecker_sparse_matmul import mosaic_tpu as kronecker_tpu
from pallas_kernels.monarch_matmul import _spec as monarch_spec
from pallas_kernels.monarch_matmul import mosaic_tpu as monarch_tpu
from sparsejax.layouts import BlockLayout

# Tiles are those of this chip; the tool that compiles is told the same name.
CHIP = os.environ.get("SPARSEJAX_CHIP", "v5e")

OPS = {"forward": "dsd", "dx": "dsd_transposed", "dw": "sdd"}
GROUPED_OPS = {
    "forward": "grouped",
    "dx": "grouped_transposed",
    "dw": "grouped_sampled",
}


def block_sparse_matmul(
    name, m, shape, block_shape, density, dtype="bfloat16", out_dtype=None, chip=CHIP
):
    """One case of ``block_sparse_matmul``: forward, dx or dw."""
    layout = BlockLayout.random(jax.random.key(0), shape, block_shape, density=density)
    (k, n), (bk, bn) = shape, block_shape
    rows, cols = np.asarray(layout.rows), np.asarray(layout.cols)
    slots = len(rows)
    op = OPS[name]
    problem = _spec.Problem(op, m, k, n, block_shape, slots, dtype, out_dtype or dtype)
    _spec.check_mosaic_tpu(problem, chip)
    config = _spec.config_mosaic_tpu(problem, chip)
    tile_m = min(config.tile_m, -(-m // 16) * 16)
    steps = -(-m // tile_m)
    if op == "sdd":
        # Chunks of slots; the last one may be short, slots in use come first.
        size = -(-slots // config.splits)
        size = -(-size // config.unroll) * config.unroll
        parts = [min(size, slots - low) for low in range(0, slots, size)]
    else:
        # Entries of each part of the columns; an empty column has one of its own.
        tiles, index = (n // bn, cols) if op == "dsd" else (k // bk, rows)
        visits = np.maximum(np.bincount(index, minlength=tiles), 1)
        width = -(-tiles // config.splits)
        parts = [visits[low : low + width].sum() for low in range(0, tiles, width)]
    trips = sum(math.ceil(part / config.unroll) for part in parts) / len(parts)
    flops = 2 * m * slots * bk * bn / (steps * len(parts))
    f = functools.partial
    i32 = jnp.int32
    s = jax.ShapeDtypeStruct
    x, dy = s((m, k), dtype), s((m, n), dtype)
    blocks, index = s((slots, bk, bn), dtype), s((slots,), i32)
    if op == "sdd":
        fn = f(
            mosaic_tpu.sdd,
            block_shape=block_shape,
            dtype=jnp.dtype(problem.out_dtype),
            config=config,
        )
        args = (x, dy, index, index, s((), i32))
    elif op == "dsd":
        fn = lambda x, blocks, source, ptr: mosaic_tpu.dsd(
            x, blocks, None, source, ptr, transpose=False, config=config
        )
        args = (x, blocks, index, s((n // bn + 1,), i32))
    else:
        fn = f(mosaic_tpu.dsd, transpose=True, config=config)
        args = (dy, blocks, index, index, s((k // bk + 1,), i32))
    side = "x".join(map(str, block_shape))
    title = f"{name} {side} {dtype} {problem.out_dtype} m={m} {k}x{n} {density:g}"
    return title, fn, args, {"flops": flops, "trips": {2: trips}}


def grouped_matmul(name, m, k, n, groups, dtype="bfloat16", out_dtype=None, chip=CHIP):
    """One case of ``grouped_matmul``, groups of equal size: forward, dx or dw.

    A grid step is a visit of a group to a tile of rows; the loop inside takes the
    group's rows there by windows.
    """
    op = GROUPED_OPS[name]
    out_dtype = out_dtype or dtype
    problem = grouped_spec.Problem(op, m, k, n, groups, dtype, out_dtype)
    grouped_spec.check_mosaic_tpu(problem, chip)
    config = grouped_spec.config_mosaic_tpu(problem, chip)
    visits, windows = 0, 0
    for start in range(0, m, m // groups):
        end = start + m // groups
        for low in range(start - start % config.tile_m, end, config.tile_m):
            # Windows begin at whole registers of 16 rows.
            first, last = max(start - low, 0), min(end - low, config.tile_m)
            visits += 1
            windows += math.ceil((last - first // 16 * 16) / config.rows)
    steps = visits * math.ceil(k / config.tile_k) * math.ceil(n / config.tile_n)
    s = jax.ShapeDtypeStruct
    x, y, w = s((m, k), dtype), s((m, n), dtype), s((groups, k, n), dtype)
    if op == "grouped_sampled":
        out = jnp.dtype(out_dtype)
        fn = functools.partial(grouped_tpu.sampled, dtype=out, config=config)
        args = (x, y)
    else:
        transpose = op == "grouped_transposed"
        fn = functools.partial(grouped_tpu.product, transpose=transpose, config=config)
        args = (y if transpose else x, w)
    title = f"grouped {name} {dtype} {out_dtype} m={m} {k}x{n} E={groups}"
    work = {"flops": 2 * m * k * n / steps, "trips": {2: windows / visits}}
    return title, fn, (*args, s((groups,), jnp.int32)), work


def kronecker_sparse_matmul(name, m, pattern, dtype="bfloat16", chip=CHIP):
    """One case of ``kronecker_sparse_matmul``: forward (dx is one too) or dw.

    Work is that of the stored entries: what units add on their diagonals is none.
    """
    a, b, c, d = pattern
    op = "kronecker_sampled" if name == "dw" else "kronecker"
    problem = kronecker_spec.Problem(op, m, a, b, c, d, dtype, dtype)
    kronecker_spec.check_mosaic_tpu(problem, chip)
    config = kronecker_spec.config_mosaic_tpu(problem, chip)
    units, wide_k, wide_n = kronecker_spec.units_mosaic_tpu(problem, config)
    steps = units // config.units * math.ceil(m / config.tile_m)
    steps *= wide_k // config.tile_k * (wide_n // config.tile_n)
    s = jax.ShapeDtypeStruct
    x, y = s((m, a * c * d), dtype), s((m, a * b * d), dtype)
    if name == "dw":
        fn = functools.partial(
            kronecker_tpu.sampled,
            pattern=pattern,
            dtype=jnp.dtype(dtype),
            config=config,
        )
        args = (x, y)
    else:
        fn = functools.partial(kronecker_tpu.product, config=config)
        args = (x, s((a, d, c, b), dtype))
    title = f"kronecker {name} {dtype} m={m} a={a} b={b} c={c} d={d}"
    return title, fn, args, {"flops": 2 * m * a * b * c * d / steps}


def monarch_matmul(m, n, blocks, dtype="bfloat16", chip=CHIP):
    """One case of ``monarch_matmul``, n x n; a loop inside goes over a tile's rows."""
    side = n // blocks
    problem = monarch_spec.Problem(
        "monarch", m, blocks, side, side, blocks, side, side, dtype
    )
    monarch_spec.check_mosaic_tpu(problem, chip)
    config = monarch_spec.config_mosaic_tpu(problem, chip)
    fn = functools.partial(monarch_tpu.product, config=config)
    s = jax.ShapeDtypeStruct
    left, right = s((blocks, 1, side, side), dtype), s((1, blocks, side, side), dtype)
    work = {
        "flops": 2 * m * 2 * blocks * side**2 / math.ceil(m / config.tile_m),
        "trips": {2: config.tile_m / config.rows},
    }
    title = f"monarch {dtype} m={m} {n}x{n} {blocks} blocks"
    return title, fn, (s((m, n), dtype), left, right), work


# Products of a head's size that an element takes part in.
ATTENTION_PRODUCTS = {"forward": 2, "backward_q": 3, "backward_kv": 4}


def attention(op, t, block, heads=(4, 4), causal=False, dtype="bfloat16", chip=CHIP):
    """One case of ``block_sparse_attention``: every block, head size 128.

    A grid step is a tile of queries (backward_kv: of keys), the loop inside goes over
    its list. With ``causal`` the loop has a body with masks and one without, of which
    one runs and both are counted; the work is that of all blocks.
    """
    (h, h_kv), (bq, bk), d = heads, block, 128
    nq, nk = t // bq, t // bk
    problem = attention_spec.Problem(
        op, 1, h, h_kv, t, t, d, d, bq, bk, nk, 1, 1, dtype
    )
    attention_spec.check_mosaic_tpu(problem, chip)
    config = attention_spec.config_mosaic_tpu(problem, chip)
    predicate = (lambda i, j, *_: i >= j) if causal else None
    s, i32 = jax.ShapeDtypeStruct, jnp.int32
    q, k, line = s((1, h, t, d), dtype), s((1, h_kv, t, d), dtype), s((1, h, t), "f4")
    if op == "backward_kv":
        flat = s((1, 1, nq * nk), i32)
        lists, listed = (flat, flat, s((1, 1, nk + 1), i32), flat), nq
        held = h // h_kv
    else:
        entries = s((1, 1, nq, nk), i32)
        lists, listed, held = (entries, s((1, 1, nq), i32), entries), nk, config.group
    arrays = (q, k, k) if op == "forward" else (q, k, k, q, line, line)
    kernel = functools.partial(getattr(attention_tpu, op), scale=d**-0.5, config=config)
    fn = lambda arrays, lists: kernel(
        *arrays, lists, attention_spec.Elements(predicate)
    )
    flops = 2 * ATTENTION_PRODUCTS[op] * bq * bk * d * listed * held
    steps = listed * (held // config.group) / config.unroll
    title = f"attention {op} {bq}x{bk} {dtype} {h}/{h_kv} heads{' causal' * causal}"
    return title, fn, (arrays, lists), {"flops": flops, "trips": {2: steps}}


def splash(t, block, causal=False):
    """The anchor: jax's own attention of the same tiles, 4 heads of size 128.

    A grid step is one tile of queries and keys; a mask that is computed costs every
    step. Causal work is counted as that of all elements.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    bq, bk = block
    kind = "CausalMask" if causal else "FullMask"
    mask = getattr(splash_attention_mask, kind)((t, t))
    fn = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * 4),
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=bq, block_kv=bk, block_kv_compute=bk
        ),
        head_shards=1,
        q_seq_shards=1,
    )
    q = jax.ShapeDtypeStruct((4, t, 128), "bfloat16")
    title = f"splash {bq}x{bk}{' causal' * causal}"
    return title, lambda q, k, v: fn(q, k, v), (q, q, q), 4 * bq * bk * 128


def attentions():
    for block in ((512, 512), (1024, 512)):
        yield splash(8192, block)
        yield splash(8192, block, causal=True)
        yield attention("forward", 8192, block)
        yield attention("forward", 8192, block, causal=True)
    for op in ATTENTION_PRODUCTS:
        if op != "forward":
            yield attention(op, 8192, (512, 512))
        yield attention(op, 8192, (512, 512), dtype="float32")
        yield attention(op, 8192, (128, 128))
        yield attention(op, 8192, (128, 128), heads=(8, 2))


def cases():
    yield from attentions()
    square = (4096, 4096)
    for name in OPS:
        yield block_sparse_matmul(name, 4096, square, (128, 128), 0.1)
    yield block_sparse_matmul("dw", 4096, square, (128, 128), 0.1, out_dtype="float32")
    for name in OPS:
        yield block_sparse_matmul(name, 4096, square, (256, 256), 0.1)
        yield block_sparse_matmul(name, 4096, square, (256, 128), 0.1)
        yield block_sparse_matmul(name, 4096, square, (128, 128), 0.5)
        yield block_sparse_matmul(name, 8192, (1024, 4096), (128, 128), 0.1)
        yield block_sparse_matmul(name, 4096, square, (128, 128), 0.1, "float32")
    for name in GROUPED_OPS:
        for dtype in ("bfloat16", "float32"):
            yield grouped_matmul(name, 8192, 4096, 4096, 8, dtype)
        yield grouped_matmul(name, 8192, 2048, 1408, 64)
    yield grouped_matmul("dw", 8192, 4096, 4096, 8, out_dtype="float32")
    for dtype in ("bfloat16", "float32"):
        yield monarch_matmul(4096, 4096, 32, dtype)
        for name in ("forward", "dw"):
            yield kronecker_sparse_matmul(name, 4096, (32, 128, 128, 1), dtype)
    yield monarch_matmul(4096, 4096, 16)
    yield monarch_matmul(4096, 1024, 16)
    # Blocks that are interleaved: XLA moves the columns of x and y.
    yield kronecker_sparse_matmul("forward", 4096, (1, 128, 128, 32))
    # A butterfly's level of stride 16: 64 zeros for each entry, and time to spare.
    yield kronecker_sparse_matmul("forward", 4096, (128, 2, 2, 16))
