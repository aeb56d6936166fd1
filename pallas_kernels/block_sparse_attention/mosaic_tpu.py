"""Attention over listed blocks on TPU: Pallas Mosaic, flash-style.

Memory plan of forward and backward_q. Grid (batch, heads, query blocks, 1): a program
holds a tile of queries, of ``config.group`` heads that share a list and keys, and the
float32 sums. Keys and values stay in HBM; a loop with a traced trip count, the list's
own, copies the listed blocks of both, ``config.unroll`` to a step, into one of two
buffers while the other one is at work. The last step starts the copies of the next
program's first one. The list is a row in SMEM, brought by the pipeline together with
the next program's row, so that neither its length nor the number of heads is bounded by
SMEM. Slots beyond the count are never read.

backward_kv. Grid (batch, key heads, key blocks, list heads of a key head): a program
holds a tile of keys and values and the float32 sums of both gradients, and brings tiles
of queries, their gradients, log-sums and deltas by the transposed lists. Heads that
share a list come as one tile; the others take turns at the same sums. The products are
transposed: a row is a key's, so that what belongs to a query lies along the lanes.

Elements. A step whose blocks are all full asks no predicate. Otherwise the predicate is
asked for 128 keys (in backward_kv queries) at a time: a number for each row of the tile
is spread over the lanes once per program, keys' numbers are copied with their blocks,
dense operands too, a byte for each element. Entries that fill the last step up, and
keys beyond the true length, are forbidden the same way.

Exponents. The running maximum, and in the backward kernels the log-sum, is subtracted
from the products before they are scaled, where there is no cap and no bias: one
multiplication by scale * log2(e). Sums over keys stay one per lane until the end. A
forbidden logit is so low that its exponential is 0 beside any maximum a row may have.

Blocks of few rows (decoding) are folded: a group's rows become one tile, with padding.

Dtypes: bfloat16 and float32; sums, maxima and exponentials are float32. Products of
float32 go at the precision of ``jax.default_matmul_precision``, as those of XLA do.
Chips: compiled for v4, v5e, v5p, v6e and tpu7x, jax 0.10.2. Not yet run on a TPU. By
the compiler's schedule for v5e, bfloat16, head size 128, blocks of 512 x 512, wholly
allowed: 0.84 of the matrix peak forward, 0.98 and 1.00 backward (jax's splash attention
at the same tiles: 0.51).
"""

import functools
import math
from typing import NamedTuple

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_sparse_attention._spec import (
    TPU_LANES,
    TPU_ROWS,
    Config,
    Elements,
)
from pallas_kernels.block_sparse_attention._tiles_tpu import (
    Stream,
    columns_of,
    pad,
    tiles_of,
    zero,
)
from pallas_kernels.block_sparse_attention._walk_tpu import Inputs
from pallas_kernels.grouped_matmul.mosaic_tpu import dot, out_shape

_LOG2E = math.log2(math.e)
# A forbidden logit, and the least maximum of a row: exp(forbidden - least) is 0.
_FORBIDDEN = -3e38
_LEAST = -1e30
# Dimensions contracted: rows with columns, or the last ones of both.
_NN, _NT = (1, 0), (1, 1)


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lists: tuple[jax.Array, jax.Array, jax.Array],
    elements: Elements,
    *,
    scale: float,
    soft_cap: float | None = None,
    block_bias: jax.Array | None = None,
    page_table: jax.Array | None = None,
    config: Config,
    interpret=False,
) -> tuple[jax.Array, jax.Array]:
    """Output and log-sum-exp; the contract is in ``_spec``.

    Args:
        q: ``[b, h, t, d]``.
        k: ``[b, h_kv, s, d]``, or pages ``[pages, h_kv, block_k, d]``.
        v: ``[b, h_kv, s, dv]``, or pages.
        lists: kv_idx, kv_cnt, kv_full.
        elements: the predicate and its operands.
        scale: of the products.
        soft_cap: bound of the logits, or None.
        block_bias: float32, or None.
        page_table: int32 ``[b, nk]``, or None.
        config: tile sizes.
        interpret: True or ``pltpu.InterpretParams()`` to run without a TPU.

    Returns:
        ``[b, h, t, dv]`` of q's dtype, or float32 if ``config.exact``, and float32
        ``[b, h, t]``.
    """
    tiles = tiles_of(q, k, lists[1], elements, block_bias, config, config.group)
    (group, rows), dv = tiles.shape, v.shape[3]
    logits = _Logits(scale, soft_cap, block_bias is not None)
    inputs, streams = _of_queries(
        tiles, k, v, lists, elements, block_bias, page_table, config.block_k
    )
    inputs.tile(tiles.tile(q))
    for a in tiles.positions(elements):
        inputs.vmem("lines", a)
    kernel = functools.partial(
        _forward_kernel,
        logits=logits,
        widen=bool(interpret),
    )
    line = (tiles.b, tiles.heads, tiles.blocks, 1, group * rows)
    dtype = jnp.float32 if config.exact else q.dtype
    out, lse = inputs.call(
        kernel,
        streams,
        grid=(*line[:3], 1),
        out_specs=[
            inputs.tile_spec(dv),
            pl.BlockSpec((None, None, None, *line[3:]), inputs.own),
        ],
        out_shape=[
            out_shape((*line[:2], group, tiles.blocks * rows, dv), dtype, q, k, v),
            out_shape(line, jnp.float32, q, k, v),
        ],
        sums=[
            pltpu.VMEM((group, rows, TPU_LANES), jnp.float32),
            pltpu.VMEM((group, rows, TPU_LANES), jnp.float32),
            pltpu.VMEM((group, rows, dv), jnp.float32),
        ],
        config=config,
        interpret=interpret,
        name="block_sparse_attention_forward",
    )
    return tiles.untile(out), tiles.unline(lse)


def backward_q(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    dout: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    lists: tuple[jax.Array, jax.Array, jax.Array],
    elements: Elements,
    *,
    scale: float,
    soft_cap: float | None = None,
    block_bias: jax.Array | None = None,
    config: Config,
    interpret=False,
):
    """The gradient of q, and of the bias; the contract is in ``_spec``.

    Args:
        q: ``[b, h, t, d]``.
        k: ``[b, h_kv, s, d]``.
        v: ``[b, h_kv, s, dv]``.
        dout: ``[b, h, t, dv]``.
        lse: float32 ``[b, h, t]``.
        delta: float32 ``[b, h, t]``.
        lists: kv_idx, kv_cnt, kv_full.
        elements: the predicate and its operands.
        scale: of the products.
        soft_cap: bound of the logits, or None.
        block_bias: float32, or None.
        config: tile sizes.
        interpret: True or ``pltpu.InterpretParams()`` to run without a TPU.

    Returns:
        ``[b, h, t, d]`` of q's dtype; with block_bias also float32
        ``[bias's b, h, nq, capacity]``.
    """
    # A block's sum is one head's.
    group = config.group if block_bias is None else 1
    tiles = tiles_of(q, k, lists[1], elements, block_bias, config, group)
    (group, rows), d = tiles.shape, q.shape[3]
    logits = _Logits(scale, soft_cap, block_bias is not None)
    inputs, streams = _of_queries(
        tiles, k, v, lists, elements, block_bias, None, config.block_k
    )
    for a in (q, dout):
        inputs.tile(tiles.tile(a))
    for a in (_threshold(lse, logits), delta):
        inputs.vmem("lines", tiles.line(a))
    for a in tiles.positions(elements):
        inputs.vmem("lines", a)
    kernel = functools.partial(
        _backward_q_kernel,
        logits=logits,
        scale=scale,
        widen=bool(interpret),
    )
    grid = (tiles.b, tiles.heads, tiles.blocks, 1)
    shape = (*grid[:2], group, tiles.blocks * rows, d)
    out_specs = [inputs.tile_spec(d)]
    shapes = [out_shape(shape, q.dtype, q, k, v, dout)]
    if block_bias is not None:
        block = (1, lists[0].shape[3])
        out_specs.append(
            pl.BlockSpec(
                (None, None, None, *block), inputs.own, memory_space=pltpu.SMEM
            )
        )
        shapes.append(out_shape((*grid[:3], *block), jnp.float32, q, k, v, dout))
    dq, *dbias = inputs.call(
        kernel,
        streams,
        grid=grid,
        out_specs=out_specs,
        out_shape=shapes,
        sums=[pltpu.VMEM((group, rows, d), jnp.float32)],
        config=config,
        interpret=interpret,
        name="block_sparse_attention_backward_q",
    )
    dq = tiles.untile(dq)
    if block_bias is None:
        return dq
    dbias = dbias[0][:, :, :, 0]
    if block_bias.shape[0] == 1:
        dbias = jnp.sum(dbias, axis=0, keepdims=True)
    return dq, dbias


def backward_kv(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    dout: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    transposed: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
    elements: Elements,
    *,
    scale: float,
    soft_cap: float | None = None,
    block_bias: jax.Array | None = None,
    config: Config,
    interpret=False,
) -> tuple[jax.Array, jax.Array]:
    """The gradients of k and v; the contract is in ``_spec``.

    Args:
        q: ``[b, h, t, d]``.
        k: ``[b, h_kv, s, d]``.
        v: ``[b, h_kv, s, dv]``.
        dout: ``[b, h, t, dv]``.
        lse: float32 ``[b, h, t]``.
        delta: float32 ``[b, h, t]``.
        transposed: q_idx, q_full, ptr, slot.
        elements: the predicate and its operands.
        scale: of the products.
        soft_cap: bound of the logits, or None.
        block_bias: float32, or None.
        config: tile sizes.
        interpret: True or ``pltpu.InterpretParams()`` to run without a TPU.

    Returns:
        ``[b, h_kv, s, d]`` and ``[b, h_kv, s, dv]``, dtypes of k and v.
    """
    q_idx, q_full, ptr, slot = transposed
    tiles = tiles_of(q, k, ptr, elements, block_bias, config, config.group)
    bk = config.block_k
    (b, h_kv, s, d), dv = k.shape, v.shape[3]
    each = tiles.heads // h_kv
    nk = s // bk

    logits = _Logits(scale, soft_cap, block_bias is not None)
    inputs = Inputs(tiles, elements, each=each, by_key=True)
    # Each key block's entries, one after the other.
    begin, count = ptr[..., :-1], jnp.diff(ptr, axis=-1)
    entries = _cuts(_packed(q_idx, q_full, elements), begin, tiles.blocks)
    now = jnp.concatenate([count[..., None], entries], axis=-1)[:, :, :, None]
    inputs.smem("now", now)
    inputs.smem("next", now, after=1)
    if block_bias is not None:
        flat = block_bias.reshape(*block_bias.shape[:2], -1)
        shape = [max(flat.shape[axis], slot.shape[axis]) for axis in (0, 1)]
        flat, slot, begin = (_spread(a, *shape) for a in (flat, slot, begin))
        chosen = jnp.take_along_axis(flat, slot, axis=2)
        inputs.smem("bias", _cuts(chosen, begin, tiles.blocks)[:, :, :, None])
    for a in elements.scalars:
        inputs.smem("scalars", a[:, :, None, None, None])
    kv_tile = lambda batch, kv, j, e: (batch, kv, j, zero())
    for a in (k, v):
        inputs.add("tiles", a, pl.BlockSpec((None, None, bk, a.shape[3]), kv_tile))
    for a in elements.cols:
        inputs.vmem("lines", columns_of(a, nk, bk))
    lines = [_threshold(lse, logits), delta]
    lines = [tiles.line(a) for a in lines] + tiles.positions(elements)
    streams = [Stream.tiles(a, tiles) for a in (q, dout)]
    streams += [Stream.lines(a, tiles) for a in lines]
    streams += [Stream.dense(a, tiles, bk, nk, True) for a in elements.dense]
    kernel = functools.partial(
        _backward_kv_kernel,
        logits=logits,
        scale=scale,
        widen=bool(interpret),
    )
    return inputs.call(
        kernel,
        streams,
        grid=(b, h_kv, nk, each),
        out_specs=[pl.BlockSpec((None, None, bk, a.shape[3]), kv_tile) for a in (k, v)],
        out_shape=[out_shape(a.shape, a.dtype, q, k, v, dout) for a in (k, v)],
        sums=[
            pltpu.VMEM((bk, d), jnp.float32),
            pltpu.VMEM((bk, dv), jnp.float32),
        ],
        config=config,
        interpret=interpret,
        name="block_sparse_attention_backward_kv",
    )


def _of_queries(tiles, k, v, lists, elements, block_bias, page_table, block_k):
    """Operands of the kernels that hold queries and bring keys."""
    kv_idx, kv_cnt, kv_full = lists
    nk = k.shape[2] // block_k if page_table is None else page_table.shape[1]
    inputs = Inputs(tiles, elements, each=1, by_key=False)
    entries = _packed(kv_idx, kv_full, elements)
    now = jnp.concatenate([kv_cnt[..., None], entries], axis=-1)[:, :, :, None]
    inputs.smem("now", now)
    inputs.smem("next", now, after=1)
    if block_bias is not None:
        inputs.smem("bias", block_bias[:, :, :, None])
    if page_table is not None:
        inputs.smem("pages", page_table[:, None, None, None])
    for a in elements.scalars:
        inputs.smem("scalars", a[:, :, None, None, None])
    paged = page_table is not None
    streams = [Stream.keys(a, tiles, block_k, paged) for a in (k, v)]
    streams += [Stream.lines(columns_of(a, nk, block_k), tiles) for a in elements.cols]
    streams += [Stream.dense(a, tiles, block_k, nk, False) for a in elements.dense]
    return inputs, streams


def _packed(index, full, elements):
    """2 * index + full, in which every block is full where there is no predicate."""
    full = jnp.ones_like(index) if elements.predicate is None else full
    return 2 * index.astype(jnp.int32) + full.astype(jnp.int32)


def _cuts(flat, begin, size):
    """``size`` numbers of [.., n] from each begin [.., m] on: [.., m, size]."""
    flat = pad(flat, flat.ndim - 1, flat.shape[-1] + size)
    cut = lambda row, first: lax.dynamic_slice(row, (first,), (size,))
    cut = jax.vmap(cut, in_axes=(None, 0))
    return jax.vmap(jax.vmap(cut))(flat, begin)


def _spread(array, b, heads):
    """[b, heads, ..] of an array that may have fewer of both."""
    array = jnp.repeat(array, heads // array.shape[1], axis=1)
    return jnp.broadcast_to(array, (b, *array.shape[1:]))


def _threshold(lse, logits):
    """What logits are compared with; large for an empty row: nothing is left."""
    lse = lse * (_LOG2E / logits.factor)
    return jnp.where(jnp.isneginf(lse), -_LEAST, lse)


# --- Inside the kernels ---------------------------------------------------------------

# Constants have a type of 32 bits, also where Python's numbers are of 64.
_f32 = jnp.float32


class _Logits(NamedTuple):
    """Products to logits: scaled, capped, with the block's bias."""

    scale: float
    soft_cap: float | None
    bias: bool

    @property
    def factor(self):
        """What a logit is still to be multiplied by, to be an exponent of 2."""
        plain = self.soft_cap is None and not self.bias and self.scale > 0
        return self.scale * _LOG2E if plain else _LOG2E

    def __call__(self, product, bias):
        """(logit, its derivative by the scaled product or None)."""
        if self.factor != _LOG2E:
            return product, None
        logit, slope = product * _f32(self.scale), None
        if self.soft_cap is not None:
            bent = jnp.tanh(logit * _f32(1 / self.soft_cap))
            logit, slope = bent * _f32(self.soft_cap), _f32(1) - bent * bent
        return (logit + bias if self.bias else logit), slope


def _forward_kernel(program, *, logits, widen):
    [q_ref], [out_ref, lse_ref] = program.tiles, program.outs
    k_held, v_held, *elements = program.held
    max_ref, sum_ref, out_sums = program.sums
    factor = _f32(logits.factor)
    max_ref[...] = jnp.full(max_ref.shape, _f32(_LEAST))
    sum_ref[...] = jnp.zeros_like(sum_ref)
    out_sums[...] = jnp.zeros_like(out_sums)

    def step(slot, entries):
        def compute(masked):
            k, v = (_flat(held[slot]) for held in (k_held, v_held))
            for part in _parts(q_ref, program.config.rows):
                products = dot(q_ref[part], k, _NT, widen)
                z = [
                    logits(product, entries[u].bias)[0]
                    for u, product in _panels(products, entries)
                ]
                if masked:
                    z = _masked(program, entries, elements, slot, part, z)
                old = max_ref[part]
                new = functools.reduce(jnp.maximum, z)
                new = jnp.maximum(old, jnp.max(new, axis=1, keepdims=True))
                p = [jnp.exp2((a - new) * factor) for a in z]
                decay = jnp.exp2((old - new) * factor)
                max_ref[part] = new
                sum_ref[part] = decay * sum_ref[part] + functools.reduce(jnp.add, p)
                more = _times(p, v, widen, program.config.exact)
                out_sums[part] = _lanes(decay, more.shape[1]) * out_sums[part] + more

        program.masked_or_not(entries, compute)

    program.walk(step)
    for part in _parts(q_ref, program.config.rows):
        sums = jnp.sum(sum_ref[part], axis=1, keepdims=True)
        some = sums > _f32(0)
        inverse = jnp.where(some, _f32(1) / jnp.where(some, sums, _f32(1)), _f32(0))
        out_ref[part] = (out_sums[part] * inverse).astype(out_ref.dtype)
        least = max_ref[part] * _f32(logits.factor / _LOG2E)
        max_ref[part] = jnp.where(some, least + jnp.log(sums), _f32(-jnp.inf))
    lse_ref[...] = _flat(max_ref[...]).T[:1]


def _backward_q_kernel(program, *, logits, scale, widen):
    [q_ref, dout_ref], [dq_ref, *dbias_ref] = program.tiles, program.outs
    lse_ref, delta_ref = program.columns[:2]
    k_held, v_held, *elements = program.held
    [dq_sums] = program.sums
    dq_sums[...] = jnp.zeros_like(dq_sums)
    for ref in dbias_ref:

        def clear(number, carry, ref=ref):
            ref[0, number] = jnp.float32(0)
            return carry

        lax.fori_loop(jnp.int32(0), jnp.int32(ref.shape[1]), clear, None)

    def step(slot, entries):
        def compute(masked):
            k, v = (_flat(held[slot]) for held in (k_held, v_held))
            sums = [_f32(0)] * len(entries)
            for part in _parts(q_ref, program.config.rows):
                own = _own(part, q_ref)
                lse, delta = lse_ref[own], delta_ref[own]
                products = dot(q_ref[part], k, _NT, widen)
                dp = dot(dout_ref[part], v, _NT, widen)
                bent = [
                    logits(product, entries[u].bias)
                    for u, product in _panels(products, entries)
                ]
                z = [logit for logit, _ in bent]
                if masked:
                    z = _masked(program, entries, elements, slot, part, z)
                dz = []
                for a, (_, slope), (u, b) in zip(
                    z, bent, _panels(dp, entries), strict=True
                ):
                    d = jnp.exp2((a - lse) * _f32(logits.factor)) * (b - delta)
                    if dbias_ref:
                        sums[u] += jnp.sum(d, axis=0, keepdims=True)
                    dz.append((d if slope is None else d * slope).astype(k.dtype))
                dq_sums[part] += dot(jnp.concatenate(dz, axis=1), k, _NN, widen)
            for ref in dbias_ref:
                for entry, total in zip(entries, sums, strict=True):

                    @pl.when(entry.exists)
                    def _(entry=entry, total=total, ref=ref):
                        ref[0, entry.number] = jnp.sum(total)

        program.masked_or_not(entries, compute)

    program.walk(step)
    dq_ref[...] = (dq_sums[...] * _f32(scale)).astype(dq_ref.dtype)


def _backward_kv_kernel(program, *, logits, scale, widen):
    [k_ref, v_ref], [dk_ref, dv_ref] = program.tiles, program.outs
    q_held, dout_held, lse_held, delta_held, *elements = program.held
    dk_sums, dv_sums = program.sums
    rows = _part(k_ref.shape[0], program.config.rows)

    @pl.when(program.turn == 0)
    def _():
        dk_sums[...] = jnp.zeros_like(dk_sums)
        dv_sums[...] = jnp.zeros_like(dv_sums)

    def step(slot, entries):
        def compute(masked):
            q, dout = (_flat(held[slot]) for held in (q_held, dout_held))
            for low in range(0, k_ref.shape[0], rows):
                part = pl.ds(low, rows)
                products = dot(k_ref[part], q, _NT, widen)
                dp = dot(v_ref[part], dout, _NT, widen)
                p, dz = [], []
                for u, head, first, panel in _query_panels(q_held, entries):
                    a, b = products[:, panel], dp[:, panel]
                    own = _line_panel(q_held, head, first)
                    logit, slope = logits(a, entries[u].bias)
                    if masked:
                        place = (u, head, first, part)
                        logit = _masked_by_key(
                            program, entries[u], elements, slot, place, own, logit
                        )
                    above = logit - lse_held[slot, u, :, own]
                    p.append(jnp.exp2(above * _f32(logits.factor)))
                    d = p[-1] * (b - delta_held[slot, u, :, own])
                    dz.append(d if slope is None else d * slope)
                join = lambda panels: jnp.concatenate(
                    [panel.astype(q.dtype) for panel in panels], axis=1
                )
                dv_sums[part] += dot(join(p), dout, _NN, widen)
                dk_sums[part] += dot(join(dz), q, _NN, widen)

        program.masked_or_not(entries, compute)

    program.walk(step)

    @pl.when(program.turn == program.turns - 1)
    def _():
        dk_ref[...] = (dk_sums[...] * _f32(scale)).astype(dk_ref.dtype)
        dv_ref[...] = dv_sums[...].astype(dv_ref.dtype)


def _times(panels, right, widen, exact):
    """Panels of float32, rounded, times ``right``; if exact, also what that loses."""
    high = [panel.astype(right.dtype) for panel in panels]
    total = dot(jnp.concatenate(high, axis=1), right, _NN, widen)
    if not exact:
        return total
    pairs = zip(panels, high, strict=True)
    low = [(panel - a.astype(panel.dtype)).astype(right.dtype) for panel, a in pairs]
    return total + dot(jnp.concatenate(low, axis=1), right, _NN, widen)


def _parts(ref, most):
    """Rows of a tile [heads, rows, d], some of one head at a time."""
    heads, size = ref.shape[:2]
    rows = _part(size, most)
    for head in range(heads):
        for low in range(0, size, rows):
            yield head, pl.ds(low, rows)


def _part(size, most):
    """The largest part of ``most`` rows at most that divides the size."""
    return max(
        rows
        for rows in range(TPU_ROWS, min(most, size) + 1, TPU_ROWS)
        if size % rows == 0
    )


def _own(part, ref):
    """The same rows in an array [heads * rows, ..]."""
    head, window = part
    return pl.ds(head * ref.shape[1] + window.start, window.size)


def _panels(products, entries):
    """(entry, 128 columns) of the products with all entries' keys."""
    each = products.shape[1] // len(entries)
    for low in range(0, products.shape[1], TPU_LANES):
        yield low // each, products[:, low : low + TPU_LANES]


def _masked(program, entries, elements, slot, part, panels):
    """Panels of logits, low where an element is not allowed."""
    head, window = part
    block_k, masked = program.config.block_k, []
    [q_ref, *_] = program.tiles
    columns = program.columns[-program.rows :] if program.rows else []
    own = _own(part, q_ref)
    i, *rows = [column[own] for column in columns] or [None]
    cols, dense = elements[: program.cols], elements[program.cols :]
    for number, panel in enumerate(panels):
        u, low = divmod(number * TPU_LANES, block_k)
        lanes = pl.ds(low, TPU_LANES)
        allowed = program.allowed(
            entries[u],
            panel.shape,
            i,
            entries[u].key * block_k + low,
            tuple(rows),
            tuple(col[slot, u, :, lanes] for col in cols),
            tuple(d[slot, u, window, lanes].astype(jnp.int32) != 0 for d in dense),
        )
        masked.append(jnp.where(allowed, panel, _f32(_FORBIDDEN)))
    return masked


def _query_panels(held, entries):
    """(entry, head, first row, columns) of the products with all entries' queries."""
    _, _, heads, rows, _ = held.shape
    start = 0
    for u in range(len(entries)):
        for head in range(heads):
            for first in range(0, rows, TPU_LANES):
                width = min(TPU_LANES, rows - first)
                yield u, head, first, slice(start, start + width)
                start += width


def _line_panel(held, head, first):
    """The same rows in a line of the tile's."""
    rows = held.shape[3]
    return pl.ds(head * rows + first, min(TPU_LANES, rows - first))


def _masked_by_key(program, entry, elements, slot, place, own, logit):
    """As ``_masked``, for a panel whose rows are keys."""
    u, head, first, part = place
    lines, dense = elements[: program.rows], elements[program.rows :]
    i, *rows = [line[slot, u, :, own] for line in lines] or [None]
    lanes = pl.ds(first, own.size)
    allowed = program.allowed(
        entry,
        logit.shape,
        i,
        program.block * program.config.block_k + part.start,
        tuple(rows),
        tuple(column[part, : own.size] for column in program.columns),
        tuple(d[slot, u, part, lanes].astype(jnp.int32) != 0 for d in dense),
    )
    return jnp.where(allowed, logit, _f32(_FORBIDDEN))


def _flat(tile):
    """[.., rows, d] as [all rows, d]."""
    return tile.reshape(-1, tile.shape[-1])


def _lanes(column, width):
    """A number for each row, in as many lanes."""
    copies = pl.cdiv(width, TPU_LANES)
    return jnp.concatenate([column] * copies, axis=1)[:, :width]
