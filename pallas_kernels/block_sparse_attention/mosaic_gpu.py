"""Attention over listed blocks on Hopper: Pallas Mosaic GPU, TMA copies and wgmma.

Memory plan. Operands and lists stay in GMEM; a program reads its count and its entries
from there as scalars, so the contents of a mask are data. A program has 64 rows per
computing warpgroup, of which there are one or two, and a warpgroup that copies: TMA
brings what the rows meet, ``tile`` positions per step, into one of ``stages`` sets of
buffers in SMEM, swizzled, ahead of the products and up to the list's count. A step's
logits stay in registers, as do the float32 sums; probabilities, rounded, are wgmma's
left operand from there. Results leave through SMEM once.

``forward``: rows are queries, 64 or 128 of one head, or 64 of two heads that share keys
and lists. Of two warpgroups one takes exponentials while the other multiplies.
``backward_q``: the same rows and steps.
``backward_kv``: rows are keys, and the steps go through the query heads of the group
and their transposed lists: the group is summed in registers, in a fixed order. Logits
are computed transposed, so that keys are their rows.

Registers. Sums take half a register for each column, a step's logits half a one for
each position. Where that is too much, by ptxas, steps have 64 or 32 positions instead
of 128, and with ``split`` two warpgroups have the same 64 rows: one sums for dk, the
other for dv, or each for half of dq's columns, and both compute the logits.

Elements. A block that is full is not asked. In others the predicate is evaluated on
registers: positions follow from the step's place, operands of rows and columns come by
TMA. So do given masks, packed before: a row's elements are the bits of a word for each
32 positions. Logits that are not allowed are -inf and the running maximum begins at the
lowest finite number; the backward kernels take lse as +inf where it is -inf. So rows
that allow nothing are no case of their own and make no NaN.

Grid. One axis, ``program``: batch, key head, tile of rows, query heads of the group
innermost, for L2. Queries are taken from the last on, keys from the first on: under a
causal mask these have most to do.

Dtypes: bfloat16 and float16, float32 sums. Head sizes: multiples of 16 to 192, and 256.
Chips: compiled with ptxas for H100 and H200 (sm_90a) under jax 0.10.2, 0.11.2 and
0.12.0, no spills; results proven by simulation. Not yet run on a GPU: speed is
unmeasured.
"""

import jax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_sparse_attention._backward_gpu import backward_kv, backward_q
from pallas_kernels.block_sparse_attention._copies_gpu import (
    bring_rows,
    key_streams,
    launch,
    operands_of,
    row_buffers,
    run_warpgroups,
    spare_tiles,
    store,
    swizzled,
)
from pallas_kernels.block_sparse_attention._spec import HOPPER_ROWS as ROWS
from pallas_kernels.block_sparse_attention._spec import Config, Elements
from pallas_kernels.block_sparse_attention._tiles_gpu import (
    LAYOUT,
    LOG2E,
    LOWEST,
    accumulate,
    left_operand,
    logits,
    masked,
    of_each_row,
    of_step,
    product,
    spread,
    take_turns,
    zeros,
)
from pallas_kernels.block_sparse_attention._walk_gpu import key_steps, query_place

__all__ = ["backward_kv", "backward_q", "forward"]


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
    interpret=None,
) -> tuple[jax.Array, jax.Array]:
    """Attends to the listed blocks, as ``_spec`` defines it.

    Args:
        q: [b, h, t, d], bfloat16 or float16.
        k: [b, h_kv, s, d] of q's dtype; with ``page_table`` [pages, h_kv, block_k, d].
        v: like k, of head size dv.
        lists: (kv_idx, kv_cnt, kv_full).
        elements: the predicate and its operands.
        scale: of the products.
        soft_cap: bound of the logits, or None.
        block_bias: float32 [b or 1, heads, nq, capacity] or None; heads divides h.
        page_table: int32 [b, nk] or None.
        config: tile sizes.
        interpret: True or ``plgpu.InterpretGPUParams`` to simulate, from jax 0.11 on.

    Returns:
        out [b, h, t, dv] of q's dtype, or float32 if ``config.exact``; lse, float32
        [b, h, t].
    """
    (b, h, t, d), dv = q.shape, v.shape[3]
    shape, warpgroups = (ROWS, config.tile), config.warpgroups
    ins = operands_of(
        elements, 3, q=q, k=k, v=v, lists=lists, bias=block_bias, pages=page_table
    )

    def body(ins, outs, home, streams, own):
        out_smem, lse_smem, turn, spare = own
        place = query_place(ins, config)
        walk, fetch = key_steps(ins, place, streams, config)
        q_smem, *rows_smem = home.buffers
        k_smem, cols_smem, words_smem = streams[0].buffers
        (v_smem,) = streams[1].buffers
        mine = place.piece

        def one(step, slot, carry):
            out, high, total = carry
            streams[0].wait(slot)
            z = product(q_smem.at[mine], k_smem.at[slot], shape, turn)
            z, _ = logits(z, scale, soft_cap, step.bias)
            asked = of_step(
                elements,
                (rows_smem, mine),
                (cols_smem, (slot, place.member)),
                (words_smem, (slot, mine)),
            )
            z = masked(z, asked, place, step, config)
            streams[0].release(slot)
            higher = jnp.maximum(high, z.max(axis=1))
            fade = jnp.exp2(high - higher)
            p = jnp.exp2(z - spread(higher, shape, 0))
            total = total * fade + p.sum(axis=1)
            out = out * spread(fade, out.shape, 0)
            left = p.astype(v.dtype)
            # What rounding took, as a second left operand.
            rest = (p - left.astype(p.dtype)).astype(v.dtype) if config.exact else None
            if turn is not None:
                plgpu.barrier_arrive(turn)
            streams[1].wait(slot)
            if turn is not None:
                plgpu.barrier_wait(turn)
            for part in (left,) if rest is None else (left, rest):
                out = accumulate(out, left_operand(part, spare, mine), v_smem.at[slot])
            streams[1].release(slot)
            return out, higher, total

        def compute():
            bring_rows(place, home, [ins["q"], *ins["rows"]], config)
            high, total = of_each_row(LOWEST), of_each_row(0)
            # The second warpgroup follows half a step behind the first.
            pl.when(mine == 1)(lambda: take_turns(turn))
            out, high, total = walk(one, (zeros((ROWS, dv)), high, total))
            pl.when(mine == 0)(lambda: take_turns(turn))
            some = jnp.where(total > 0, total, jnp.ones_like(total))
            result_smem = q_smem if out_smem is None else out_smem
            out = out / spread(some, out.shape, 0)
            result_smem[mine] = out.astype(q.dtype)
            lse_smem[mine] = high * (1 / LOG2E) + jnp.log(total)
            rows = place.batch, place.head, pl.ds(place.row, ROWS)
            store(
                (result_smem.at[mine], outs[0].at[rows]),
                (lse_smem.at[mine], outs[1].at[rows]),
            )
            if config.exact:
                rounded = plgpu.layout_cast(result_smem[mine], LAYOUT)
                result_smem[mine] = (out - rounded.astype(out.dtype)).astype(q.dtype)
                store((result_smem.at[mine], outs[2].at[rows]))

        run_warpgroups(place, walk, fetch, compute, streams, config)

    own = [
        None if d == dv else swizzled((warpgroups, ROWS, dv), q.dtype, config),
        plgpu.SMEM((warpgroups, ROWS), jnp.float32),
        plgpu.Barrier(num_arrivals=2) if warpgroups == 2 else None,
        spare_tiles(q.dtype, config, interpret),
    ]
    outs = [
        jax.ShapeDtypeStruct((b, h, t, dv), q.dtype),
        jax.ShapeDtypeStruct((b, h, t), jnp.float32),
    ]
    out, lse, *rest = launch(
        body,
        ins,
        # Two numbers of 16 bits leave through the buffer that one does.
        [*outs, outs[0]] if config.exact else outs,
        home=row_buffers([d], 0, elements.rows, q.dtype, config),
        streams=key_streams(d, dv, elements, q.dtype, config),
        own=own,
        name="block_sparse_attention",
        programs=b * h * t // (ROWS * warpgroups),
        config=config,
        interpret=interpret,
    )
    if rest:
        out = out.astype(jnp.float32) + rest[0].astype(jnp.float32)
    return out, lse
