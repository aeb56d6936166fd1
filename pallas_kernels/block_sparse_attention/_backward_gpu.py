"""The gradients of attention over listed blocks on Hopper; see ``mosaic_gpu``."""

import functools

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_sparse_attention._copies_gpu import (
    bring_rows,
    key_streams,
    launch,
    operands_of,
    query_streams,
    row_buffers,
    run_warpgroups,
    spare_tiles,
    store,
)
from pallas_kernels.block_sparse_attention._spec import HOPPER_ROWS as ROWS
from pallas_kernels.block_sparse_attention._spec import Config, Elements
from pallas_kernels.block_sparse_attention._tiles_gpu import (
    LOG2E,
    add,
    left_operand,
    logits,
    masked,
    numbers,
    of_step,
    probabilities,
    product,
    summed,
    take_turns,
)
from pallas_kernels.block_sparse_attention._walk_gpu import (
    key_place,
    key_steps,
    query_place,
    query_steps,
    row_pieces,
)


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
    interpret=None,
):
    """The gradients to queries and bias, as ``_spec`` defines them.

    Args:
        q: [b, h, t, d], bfloat16 or float16.
        k: [b, h_kv, s, d] of q's dtype.
        v: [b, h_kv, s, dv] of q's dtype.
        dout: [b, h, t, dv] of q's dtype.
        lse: float32 [b, h, t].
        delta: float32 [b, h, t].
        lists: (kv_idx, kv_cnt, kv_full).
        elements: the predicate and its operands.
        scale: of the products.
        soft_cap: bound of the logits, or None.
        block_bias: float32 [b or 1, heads, nq, capacity] or None; heads divides h.
        config: tile sizes.
        interpret: True or ``plgpu.InterpretGPUParams`` to simulate, from jax 0.11 on.

    Returns:
        dq [b, h, t, d]; with a bias also dbias, float32 [its b, h, nq, capacity].
    """
    (b, h, t, d), dv = q.shape, v.shape[3]
    shape = ROWS, config.tile
    ins = operands_of(elements, 3, q=q, k=k, v=v, lists=lists, bias=block_bias)
    ins |= dict(dout=dout, lse=_base_2(lse), delta=delta)
    capacity, parts = lists[0].shape[3], config.block_k // config.tile

    def body(ins, outs, home, streams, own):
        spare, done = own
        place = query_place(ins, config)
        walk, fetch = key_steps(ins, place, streams, config)
        q_smem, dout_smem, lse_smem, delta_smem, *rows_smem = home.buffers
        k_smem, cols_smem, words_smem = streams[0].buffers
        (v_smem,) = streams[1].buffers
        mine = place.piece

        def one(columns, sums, step, slot, carry):
            """Adds a step to the sum of some columns, (first, number)."""
            streams[0].wait(slot)
            z = product(q_smem.at[mine], k_smem.at[slot], shape)
            z, slope = logits(z, scale, soft_cap, step.bias)
            asked = of_step(
                elements,
                (rows_smem, mine),
                (cols_smem, (slot, place.member)),
                (words_smem, (slot, mine)),
            )
            z = masked(z, asked, place, step, config)
            p = probabilities(z, lse_smem.at[mine], 0, step.bias)
            streams[1].wait(slot)
            dp = product(dout_smem.at[mine], v_smem.at[slot], shape)
            streams[1].release(slot)
            dz = p * (dp - numbers(delta_smem.at[mine], shape, 0))
            if block_bias is not None and columns[0] == 0:
                at = place.batch, place.head, lax.div(place.row, jnp.int32(ROWS))
                outs[1][(*at, step.number)] = dz.sum(axis=1).sum()
            dz = dz if slope is None else dz * slope
            left = left_operand(dz.astype(q.dtype), spare, place.warpgroup)
            add(sums[0], left, k_smem.at[slot, :, pl.ds(*columns)])
            streams[0].release(slot)
            return carry

        def work(*columns):
            (dq,) = summed(walk, functools.partial(one, columns), columns[1])
            # Both are through with the queries, whose place results take.
            take_turns(done)
            q_smem[mine, :, pl.ds(*columns)] = (dq * scale).astype(q.dtype)
            plgpu.commit_smem()
            take_turns(done)

        def compute():
            arrays = [ins[name] for name in ("q", "dout", "lse", "delta")]
            bring_rows(place, home, [*arrays, *ins["rows"]], config)
            rows = place.batch, place.head, pl.ds(place.row, ROWS)
            results = q_smem.at[mine], outs[0].at[rows]
            if not config.split:
                work(0, d)
                return store(results)
            is_first = place.warpgroup == 0
            half = d // 2
            lax.cond(is_first, lambda: work(0, half), lambda: work(half, half))
            return pl.when(is_first)(lambda: store(results))

        run_warpgroups(place, walk, fetch, compute, streams, config)

    outs = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    if block_bias is not None:
        # One number per step of 64 rows.
        steps = b, h, t // ROWS, capacity * parts
        outs.append(jax.ShapeDtypeStruct(steps, jnp.float32))
    dq, *dbias = launch(
        body,
        ins,
        outs,
        home=row_buffers([d, dv], 2, elements.rows, q.dtype, config),
        streams=key_streams(d, dv, elements, q.dtype, config),
        own=_own(q.dtype, config, interpret),
        name="block_sparse_attention_dq",
        programs=b * h * t // (ROWS * row_pieces(config)),
        config=config,
        interpret=interpret,
    )
    if block_bias is None:
        return dq
    nq = lists[0].shape[2]
    dbias = dbias[0].reshape(b, h, nq, t // ROWS // nq, capacity, parts)
    # What no step has written is anything.
    count = lists[1]
    count = jnp.repeat(
        jnp.broadcast_to(count, (b, *count.shape[1:])), h // count.shape[1], 1
    )
    used = jnp.arange(capacity) < count[..., None]
    dbias = jnp.where(used[:, :, :, None, :, None], dbias, 0).sum((3, 5))
    return dq, dbias if block_bias.shape[0] == b else dbias.sum(0, keepdims=True)


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
    interpret=None,
) -> tuple[jax.Array, jax.Array]:
    """The gradients to keys and values, as ``_spec`` defines them.

    Args:
        q: [b, h, t, d], bfloat16 or float16.
        k: [b, h_kv, s, d] of q's dtype.
        v: [b, h_kv, s, dv] of q's dtype.
        dout: [b, h, t, dv] of q's dtype.
        lse: float32 [b, h, t].
        delta: float32 [b, h, t].
        transposed: (q_idx, q_full, ptr, slot).
        elements: the predicate and its operands.
        scale: of the products.
        soft_cap: bound of the logits, or None.
        block_bias: float32 [b or 1, heads, nq, capacity] or None; heads divides h.
        config: tile sizes.
        interpret: True or ``plgpu.InterpretGPUParams`` to simulate, from jax 0.11 on.

    Returns:
        dk [b, h_kv, s, d] and dv [b, h_kv, s, dv] of q's dtype.
    """
    (b, h_kv, s, d), dv = k.shape, v.shape[3]
    shape = ROWS, config.tile
    ins = operands_of(
        elements, 2, q=q, k=k, v=v, lists=tuple(transposed), bias=block_bias
    )
    ins |= dict(dout=dout, lse=_base_2(lse), delta=delta)

    def body(ins, outs, home, streams, own):
        spare, done = own
        place = key_place(ins, config)
        walk, fetch = query_steps(ins, place, streams, config)
        q_smem, lse_smem, rows_smem, cols_smem, words_smem = streams[0].buffers
        dout_smem, delta_smem = streams[1].buffers
        k_smem, v_smem = (buffer.at[place.piece] for buffer in home.buffers)

        def one(wanted, sums, step, slot, carry):
            """Adds a step to the ``wanted`` sums: of keys (0), of values (1)."""
            streams[0].wait(slot)
            z = product(k_smem, q_smem.at[slot], shape)
            z, slope = logits(z, scale, soft_cap, step.bias)
            asked = of_step(
                elements,
                (rows_smem, slot),
                (cols_smem, (slot, place.piece)),
                (words_smem, (slot, place.piece)),
            )
            z = masked(z, asked, place, step, config, transposed=True)
            p = probabilities(z, lse_smem.at[slot], 1, step.bias)
            streams[1].wait(slot)
            if 1 in wanted:
                left = left_operand(p.astype(q.dtype), spare, place.warpgroup)
                add(sums[-1], left, dout_smem.at[slot])
            if 0 in wanted:
                dp = product(v_smem, dout_smem.at[slot], shape)
                dz = p * (dp - numbers(delta_smem.at[slot], shape, 1))
                dz = dz if slope is None else dz * slope
                left = left_operand(dz.astype(q.dtype), spare, place.warpgroup)
                add(sums[0], left, q_smem.at[slot])
            streams[1].release(slot)
            streams[0].release(slot)
            return carry

        def compute():
            bring_rows(place, home, [ins["k"], ins["v"]], config)
            rows = place.batch, place.head_kv, pl.ds(place.row, ROWS)
            results = [(k_smem, outs[0].at[rows]), (v_smem, outs[1].at[rows])]

            def work(*wanted):
                sums = [(d, dv)[i] for i in wanted]
                sums = summed(walk, functools.partial(one, wanted), *sums)
                # Both are through with keys and values, whose place results take.
                take_turns(done)
                for i, x in zip(wanted, sums, strict=True):
                    x = x if i else x * scale
                    results[i][0][...] = x.astype(q.dtype)
                store(*(results[i] for i in wanted))

            if not config.split:
                return work(0, 1)
            return lax.cond(place.warpgroup == 0, lambda: work(0), lambda: work(1))

        run_warpgroups(place, walk, fetch, compute, streams, config)

    dk, dv = launch(
        body,
        ins,
        [jax.ShapeDtypeStruct(x.shape, q.dtype) for x in (k, v)],
        home=row_buffers([d, dv], 0, (), q.dtype, config),
        streams=query_streams(d, dv, elements, q.dtype, config),
        own=_own(q.dtype, config, interpret),
        name="block_sparse_attention_dkv",
        programs=b * h_kv * s // (ROWS * row_pieces(config)),
        config=config,
        interpret=interpret,
    )
    return dk, dv


def _base_2(lse):
    """lse of base 2, and +inf for rows that allow nothing: there exp2(z - lse) is 0."""
    return jnp.where(jnp.isneginf(lse), jnp.inf, lse * LOG2E)


def _own(dtype, config: Config, interpret):
    """Left operands if simulated; a barrier of two warpgroups with the same rows."""
    done = plgpu.Barrier(num_arrivals=2) if config.split else None
    return [spare_tiles(dtype, config, interpret), done]
