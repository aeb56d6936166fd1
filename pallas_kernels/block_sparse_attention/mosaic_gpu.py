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
are computed transposed, so that keys are their rows. Registers hold both sums for head
sizes of 64 only; with ``split`` two warpgroups have the same keys, one sums for dk, the
other for dv, and both compute the logits.

Elements. A block that is full is not asked. In others the predicate is evaluated on
registers: positions follow from the step's place, operands of rows and columns come by
TMA. Logits that are not allowed are -inf and the running maximum begins at the lowest
finite number; the backward kernels take lse as +inf where it is -inf. So rows that
allow nothing are no case of their own and make no NaN.

Grid. One axis, ``program``: batch, key head, tile of rows, query heads of the group
innermost, for L2. Queries are taken from the last on, keys from the first on: under a
causal mask these have most to do.

Dtypes: bfloat16 and float16, float32 sums. Chips: compiled with ptxas for H100 and H200
(sm_90a) under jax 0.10.2, 0.11.2 and 0.12.0, no spills; results proven by simulation.
Not yet run on a GPU: speed is unmeasured.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_sparse_attention._spec import HOPPER_ROWS as _ROWS
from pallas_kernels.block_sparse_attention._spec import Config, Elements

# Registers per thread: 64 K of them are shared by 128 threads of each warpgroup. By
# number of computing warpgroups.
_COPY_REGISTERS, _COMPUTE_REGISTERS = {1: 96, 2: 40}, {1: 240, 2: 232}
# Exponentials are of base 2, as the hardware has them.
_LOG2E = math.log2(math.e)
_LOWEST = float(jnp.finfo(jnp.float32).min)
_LAYOUT = plgpu.Layout.WGMMA


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
        out [b, h, t, dv] of q's dtype; lse, float32 [b, h, t].
    """
    (b, h, t, d), dv = q.shape, v.shape[3]
    shape, warpgroups = (_ROWS, config.tile), config.warpgroups
    ins = _operands(
        elements, q=q, k=k, v=v, lists=lists, bias=block_bias, pages=page_table
    )

    def body(ins, outs, home, streams, own):
        out_smem, lse_smem, turn, spare = own
        place = _query_place(ins, config)
        walk, fetch = _key_steps(ins, place, streams, config)
        q_smem, *rows_smem = home.buffers
        k_smem, *cols_smem = streams[0].buffers
        (v_smem,) = streams[1].buffers
        mine = place.warpgroup

        def one(step, slot, carry):
            out, high, total = carry
            streams[0].wait(slot)
            z = _product(q_smem.at[mine], k_smem.at[slot], shape, turn)
            z, _ = _logits(z, scale, soft_cap, step.bias)
            rows = [ref.at[mine] for ref in rows_smem]
            cols = [ref.at[slot, place.member] for ref in cols_smem]
            z = _masked(z, elements, place, step, rows, cols, config)
            streams[0].release(slot)
            higher = jnp.maximum(high, z.max(axis=1))
            fade = jnp.exp2(high - higher)
            p = jnp.exp2(z - _spread(higher, shape, 0))
            total = total * fade + p.sum(axis=1)
            out = out * _spread(fade, out.shape, 0)
            left = p.astype(v.dtype)
            if turn is not None:
                plgpu.barrier_arrive(turn)
            streams[1].wait(slot)
            if turn is not None:
                plgpu.barrier_wait(turn)
            out = _accumulate(out, _left(left, spare, mine), v_smem.at[slot])
            streams[1].release(slot)
            return out, higher, total

        def compute():
            home.fill(mine, _of_rows(place, home, [ins["q"], *ins["rows"]]))
            home.wait(mine)
            high = jnp.full((_ROWS,), _LOWEST, jnp.float32)
            high = plgpu.layout_cast(high, _LAYOUT.reduce(1))
            total = plgpu.layout_cast(jnp.zeros_like(high), _LAYOUT.reduce(1))
            # The second warpgroup follows half a step behind the first.
            pl.when(mine == 1)(lambda: _take_turns(turn))
            out, high, total = walk(one, (_zeros((_ROWS, dv)), high, total))
            pl.when(mine == 0)(lambda: _take_turns(turn))
            some = jnp.where(total > 0, total, jnp.ones_like(total))
            result_smem = q_smem if out_smem is None else out_smem
            result_smem[mine] = (out / _spread(some, out.shape, 0)).astype(q.dtype)
            lse_smem[mine] = high * (1 / _LOG2E) + jnp.log(total)
            _store(
                (result_smem.at[mine], outs[0].at[place.rows]),
                (lse_smem.at[mine], outs[1].at[place.rows]),
            )

        _run(place, walk, fetch, compute, streams, config)

    own = [
        None if d == dv else _buffer((warpgroups, _ROWS, dv), q.dtype),
        plgpu.SMEM((warpgroups, _ROWS), jnp.float32),
        plgpu.Barrier(num_arrivals=2) if warpgroups == 2 else None,
        _spare(q.dtype, config, interpret),
    ]
    out, lse = _launch(
        body,
        ins,
        [
            jax.ShapeDtypeStruct((b, h, t, dv), q.dtype),
            jax.ShapeDtypeStruct((b, h, t), jnp.float32),
        ],
        home=_home([d], 0, elements.rows, q.dtype, config),
        streams=_key_streams(d, dv, elements, q.dtype, config),
        own=own,
        name="block_sparse_attention",
        programs=b * h * t // (_ROWS * warpgroups),
        config=config,
        interpret=interpret,
    )
    return out, lse


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
    shape, warpgroups = (_ROWS, config.tile), config.warpgroups
    ins = _operands(elements, q=q, k=k, v=v, lists=lists, bias=block_bias)
    ins |= dict(dout=dout, lse=_base_2(lse), delta=delta)
    capacity, parts = lists[0].shape[3], config.block_k // config.tile

    def body(ins, outs, home, streams, own):
        (spare,) = own
        place = _query_place(ins, config)
        walk, fetch = _key_steps(ins, place, streams, config)
        q_smem, dout_smem, lse_smem, delta_smem, *rows_smem = home.buffers
        k_smem, *cols_smem = streams[0].buffers
        (v_smem,) = streams[1].buffers
        mine = place.warpgroup

        def one(sums, step, slot, carry):
            streams[0].wait(slot)
            z = _product(q_smem.at[mine], k_smem.at[slot], shape)
            z, slope = _logits(z, scale, soft_cap, step.bias)
            rows = [ref.at[mine] for ref in rows_smem]
            cols = [ref.at[slot, place.member] for ref in cols_smem]
            z = _masked(z, elements, place, step, rows, cols, config)
            p = _probabilities(z, lse_smem.at[mine], 0, step.bias)
            streams[1].wait(slot)
            dp = _product(dout_smem.at[mine], v_smem.at[slot], shape)
            streams[1].release(slot)
            dz = p * (dp - _numbers(delta_smem.at[mine], shape, 0))
            if block_bias is not None:
                at = place.batch, place.head, lax.div(place.row, jnp.int32(_ROWS))
                outs[1][(*at, step.number)] = dz.sum(axis=1).sum()
            dz = dz if slope is None else dz * slope
            _add(sums[0], dz.astype(q.dtype), k_smem.at[slot], spare, mine)
            streams[0].release(slot)
            return carry

        def compute():
            arrays = [ins[name] for name in ("q", "dout", "lse", "delta")]
            home.fill(mine, _of_rows(place, home, [*arrays, *ins["rows"]]))
            home.wait(mine)
            (dq,) = _sum(walk, one, d)
            q_smem[mine] = (dq * scale).astype(q.dtype)
            _store((q_smem.at[mine], outs[0].at[place.rows]))

        _run(place, walk, fetch, compute, streams, config)

    outs = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    if block_bias is not None:
        # One number per step of 64 rows.
        steps = b, h, t // _ROWS, capacity * parts
        outs.append(jax.ShapeDtypeStruct(steps, jnp.float32))
    dq, *dbias = _launch(
        body,
        ins,
        outs,
        home=_home([d, dv], 2, elements.rows, q.dtype, config),
        streams=_key_streams(d, dv, elements, q.dtype, config),
        own=[_spare(q.dtype, config, interpret)],
        name="block_sparse_attention_dq",
        programs=b * h * t // (_ROWS * warpgroups),
        config=config,
        interpret=interpret,
    )
    if block_bias is None:
        return dq
    nq = lists[0].shape[2]
    dbias = dbias[0].reshape(b, h, nq, t // _ROWS // nq, capacity, parts)
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
    shape, across = (_ROWS, config.tile), _across_keys(config)
    ins = _operands(elements, q=q, k=k, v=v, lists=tuple(transposed), bias=block_bias)
    ins |= dict(dout=dout, lse=_base_2(lse), delta=delta)

    def body(ins, outs, home, streams, own):
        spare, done = own
        place = _key_place(ins, config)
        walk, fetch = _query_steps(ins, place, streams, config)
        q_smem, lse_smem, *operands = streams[0].buffers
        rows_smem = operands[: len(ins["rows"])]
        cols_smem = operands[len(ins["rows"]) :]
        dout_smem, delta_smem = streams[1].buffers
        k_smem, v_smem = (buffer.at[place.member] for buffer in home.buffers)
        mine = place.warpgroup

        def one(wanted, sums, step, slot, carry):
            """Adds a step to the ``wanted`` sums: of keys (0), of values (1)."""
            streams[0].wait(slot)
            z = _product(k_smem, q_smem.at[slot], shape)
            z, slope = _logits(z, scale, soft_cap, step.bias)
            rows = [ref.at[slot] for ref in rows_smem]
            cols = [ref.at[slot, place.member] for ref in cols_smem]
            z = _masked(z, elements, place, step, rows, cols, config, transposed=True)
            p = _probabilities(z, lse_smem.at[slot], 1, step.bias)
            streams[1].wait(slot)
            if 1 in wanted:
                _add(sums[-1], p.astype(q.dtype), dout_smem.at[slot], spare, mine)
            if 0 in wanted:
                dp = _product(v_smem, dout_smem.at[slot], shape)
                dz = p * (dp - _numbers(delta_smem.at[slot], shape, 1))
                dz = dz if slope is None else dz * slope
                _add(sums[0], dz.astype(q.dtype), q_smem.at[slot], spare, mine)
            streams[1].release(slot)
            streams[0].release(slot)
            return carry

        def compute():
            rows = place.batch, place.head_kv, pl.ds(place.row, _ROWS)
            pairs = [(ins["k"].at[rows], k_smem), (ins["v"].at[rows], v_smem)]
            results = [(k_smem, outs[0].at[rows]), (v_smem, outs[1].at[rows])]

            def work(*wanted):
                sums = [(d, dv)[i] for i in wanted]
                sums = _sum(walk, functools.partial(one, wanted), *sums)
                if done is not None:
                    # Both are through with keys and values, whose place results take.
                    plgpu.barrier_arrive(done)
                    plgpu.barrier_wait(done)
                for i, x in zip(wanted, sums, strict=True):
                    x = x if i else x * scale
                    results[i][0][...] = x.astype(q.dtype)
                _store(*(results[i] for i in wanted))

            if not config.split:
                home.fill(mine, pairs)
                home.wait(mine)
                return work(0, 1)
            pl.when(mine == 0)(lambda: home.fill(0, pairs))
            home.wait(0)
            return lax.cond(mine == 0, lambda: work(0), lambda: work(1))

        _run(place, walk, fetch, compute, streams, config)

    dk, dv = _launch(
        body,
        ins,
        [jax.ShapeDtypeStruct(x.shape, q.dtype) for x in (k, v)],
        home=_home([d, dv], 0, (), q.dtype, config, across),
        streams=_query_streams(d, dv, elements, q.dtype, config),
        own=[
            _spare(q.dtype, config, interpret),
            plgpu.Barrier(num_arrivals=2) if config.split else None,
        ],
        name="block_sparse_attention_dkv",
        programs=b * h_kv * s // (_ROWS * across),
        config=config,
        interpret=interpret,
    )
    return dk, dv


def _base_2(lse):
    """lse of base 2, and +inf for rows that allow nothing: there exp2(z - lse) is 0."""
    return jnp.where(jnp.isneginf(lse), jnp.inf, lse * _LOG2E)


# --- Where rows, steps and operands are -----------------------------------------------


class _Place(NamedTuple):
    """What a warpgroup works on; int32 scalars."""

    warpgroup: Any
    batch: Any
    head: Any
    head_kv: Any
    member: Any  # which of the heads that the program holds
    first_head: Any  # the first of these
    block: Any
    row: Any  # position of the first row
    query_heads: int

    @property
    def rows(self):
        """Index of the rows in an array [b, h, t, ...]."""
        return self.batch, self.head, pl.ds(self.row, _ROWS)

    def of(self, x, head=None):
        """Index of a head in an operand [b or 1, heads, ...]."""
        heads, head = x.shape[1], self.head if head is None else head
        batch = self.batch if x.shape[0] > 1 else 0
        return batch, lax.div(head, jnp.int32(self.query_heads // heads))


class _Step(NamedTuple):
    """What the rows meet in a step; int32 scalars."""

    number: Any
    column: Any  # position of the first
    partial: Any  # whether to ask for elements; bool
    source: Any  # index in the arrays that are copied
    bias: Any  # float32, or None
    scalars: Any  # the predicate's


def _query_place(ins, config: Config) -> _Place:
    """Rows of a program that has queries, the last ones first."""
    h, h_kv = ins["q"].shape[1], ins["k"].shape[1]
    group, packs = config.group, h // h_kv // config.group
    across = config.warpgroups // group
    warpgroup = lax.axis_index("warpgroup")
    tiles = ins["q"].shape[2] // (across * _ROWS)
    number, pack = _divide(lax.axis_index("program"), packs)
    number, tile = _divide(number, tiles)
    batch, head_kv = _divide(number, h_kv)
    tile = tiles - 1 - tile
    first = (head_kv * packs + pack) * group
    # Warpgroups are of different heads or of different rows. The one that copies is of
    # some head, too: what it reads along is in range.
    member = jnp.minimum(warpgroup, group - 1)
    row = tile * (across * _ROWS) + (0 if group > 1 else warpgroup * _ROWS)
    block = lax.div(tile, jnp.int32(config.block_q // (across * _ROWS)))
    return _Place(
        warpgroup, batch, first + member, head_kv, member, first, block, row, h
    )


def _key_steps(ins, place: _Place, streams, config: Config):
    """``walk(visit, carry)`` over the steps of a query block, and what they fetch."""
    index, count, full = ins["lists"]
    listed = (*place.of(count), place.block)
    parts = config.block_k // config.tile

    def walk(visit, carry):
        def one(number, carry):
            entry, part = _divide(number, parts)
            block = index[(*listed, entry)]
            partial = full[(*listed, entry)] == 0
            if config.keys % config.block_k:
                partial |= block == config.keys // config.block_k
            column = block * config.block_k + part * config.tile
            source = place.batch, place.head_kv, pl.ds(column, config.tile)
            if "pages" in ins:
                page = ins["pages"][place.batch, block]
                source = page, place.head_kv, pl.ds(part * config.tile, config.tile)
            bias = None
            if "bias" in ins:
                bias = ins["bias"][(*place.of(ins["bias"]), place.block, entry)]
            scalars = tuple(x[place.of(x)] for x in ins["scalars"])
            step = _Step(number, column, partial, source, bias, scalars)
            slot = lax.rem(number, jnp.int32(config.stages))
            return visit(step, slot, carry)

        return lax.fori_loop(jnp.int32(0), count[listed] * parts, one, carry)

    def fetch(step, slot):
        keys, *cols = streams[0].buffers
        first = [(ins["k"].at[step.source], keys.at[slot])]
        for array, buffer in zip(ins["cols"], cols, strict=True):
            for member in range(config.group):
                at = place.of(array, place.first_head + member)
                columns = pl.ds(step.column, config.tile)
                first.append((array.at[(*at, columns)], buffer.at[slot, member]))
        second = [(ins["v"].at[step.source], streams[1].buffers[0].at[slot])]
        return first, second

    return walk, fetch


def _across_keys(config: Config) -> int:
    """Pieces of 64 keys in a program."""
    return 1 if config.split else config.warpgroups


def _key_place(ins, config: Config) -> _Place:
    """Rows of a program that has keys, the first ones first; of no query head."""
    across = _across_keys(config)
    tiles = ins["k"].shape[2] // (across * _ROWS)
    warpgroup = lax.axis_index("warpgroup")
    number, tile = _divide(lax.axis_index("program"), tiles)
    batch, head_kv = _divide(number, ins["k"].shape[1])
    member = jnp.minimum(warpgroup, across - 1)
    row = (tile * across + member) * _ROWS
    block = lax.div(tile, jnp.int32(config.block_k // (across * _ROWS)))
    head = head_kv * (ins["q"].shape[1] // ins["k"].shape[1])
    return _Place(
        *(warpgroup, batch, head, head_kv, member, head, block, row, ins["q"].shape[1])
    )


def _query_steps(ins, place: _Place, streams, config: Config):
    """``walk(visit, carry)`` over a key block's query blocks, and what they fetch."""
    index, full, pointers, slots = ins["lists"]
    group = ins["q"].shape[1] // ins["k"].shape[1]
    parts = config.block_q // config.tile
    last = config.keys // config.block_k

    def walk(visit, carry):
        def member(number, state):
            head = place.head + number
            listed = place.of(pointers, head)
            begin = pointers[(*listed, place.block)]
            end = pointers[(*listed, place.block + 1)]

            def one(number, state):
                turn, carry = state
                entry, part = _divide(number, parts)
                at = (*listed, begin + entry)
                partial = full[at] == 0
                if config.keys % config.block_k:
                    partial |= place.block == last
                column = index[at] * config.block_q + part * config.tile
                bias = None
                if "bias" in ins:
                    of, capacity = place.of(ins["bias"], head), ins["bias"].shape[3]
                    bias = ins["bias"][(*of, *_divide(slots[at], capacity))]
                scalars = tuple(x[place.of(x, head)] for x in ins["scalars"])
                step = _Step(number, column, partial, head, bias, scalars)
                slot = lax.rem(turn, jnp.int32(config.stages))
                return turn + 1, visit(step, slot, carry)

            return lax.fori_loop(jnp.int32(0), (end - begin) * parts, one, state)

        state = jnp.int32(0), carry
        return lax.fori_loop(jnp.int32(0), jnp.int32(group), member, state)[1]

    def fetch(step, slot):
        columns, head = pl.ds(step.column, config.tile), step.source
        of = lambda x: x.at[(*place.of(x, head), columns)]
        q, lse, *operands = streams[0].buffers
        rows, cols = operands[: len(ins["rows"])], operands[len(ins["rows"]) :]
        first = [(of(ins["q"]), q.at[slot]), (of(ins["lse"]), lse.at[slot])]
        first += [
            (of(array), buffer.at[slot])
            for array, buffer in zip(ins["rows"], rows, strict=True)
        ]
        # The copying warpgroup's own place is the last piece.
        first_row = place.row - place.member * _ROWS
        for array, buffer in zip(ins["cols"], cols, strict=True):
            for piece in range(_across_keys(config)):
                at = pl.ds(first_row + piece * _ROWS, _ROWS)
                at = (*place.of(array, head), at)
                first.append((array.at[at], buffer.at[slot, piece]))
        arrays = zip([ins["dout"], ins["delta"]], streams[1].buffers, strict=True)
        return first, [(of(array), buffer.at[slot]) for array, buffer in arrays]

    return walk, fetch


def _divide(number, by: int):
    return lax.div(number, jnp.int32(by)), lax.rem(number, jnp.int32(by))


# --- Copies ---------------------------------------------------------------------------


class _Stream(NamedTuple):
    """Buffers of several slots, each ``full`` when copied into, ``free`` when read."""

    buffers: Any
    full: Any
    free: Any

    def fill(self, slot, pieces):
        """Copies (source, buffer) pairs, as many as ``full`` waits for."""
        for source, buffer in pieces:
            plgpu.copy_gmem_to_smem(source, buffer, self.full.at[slot])

    def wait(self, slot):
        plgpu.barrier_wait(self.full.at[slot])

    def release(self, slot):
        plgpu.barrier_arrive(self.free.at[slot])


def _run(place: _Place, walk, fetch, compute, streams, config: Config):
    """Computes, while a warpgroup of its own copies what ``walk`` goes through."""
    slots = [(stream, slot) for stream in streams for slot in range(config.stages)]

    def copy():
        plgpu.set_max_registers(_COPY_REGISTERS[config.warpgroups], action="decrease")

        def one(step, slot, carry):
            for stream, pieces in zip(streams, fetch(step, slot), strict=True):
                plgpu.barrier_wait(stream.free.at[slot])
                stream.fill(slot, pieces)
            return carry

        walk(one, ())
        # No arrival is left behind.
        for stream, slot in slots:
            plgpu.barrier_wait(stream.free.at[slot])

    def start():
        plgpu.set_max_registers(
            _COMPUTE_REGISTERS[config.warpgroups], action="increase"
        )
        for stream, slot in slots:
            stream.release(slot)
        compute()

    lax.cond(place.warpgroup < config.warpgroups, start, copy)


def _of_rows(place: _Place, home: _Stream, arrays):
    """What a warpgroup has of its queries throughout: (source, buffer) pairs."""
    rows = lambda x: (*place.of(x), pl.ds(place.row, _ROWS))
    return [
        (array.at[rows(array)], buffer.at[place.warpgroup])
        for array, buffer in zip(arrays, home.buffers, strict=True)
    ]


def _store(*pairs):
    """Copies (buffer, destination) pairs out."""
    plgpu.commit_smem()
    for buffer, destination in pairs:
        plgpu.copy_smem_to_gmem(buffer, destination)
    plgpu.wait_smem_to_gmem(0)


def _buffer(shape, dtype):
    """Tiles in SMEM as wgmma reads them: the widest swizzle that divides a row."""
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = math.gcd(shape[-1] * itemsize, 128)
    tiling = plgpu.TilingTransform((8, swizzle // itemsize))
    return plgpu.SMEM(
        shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle))
    )


def _home(sizes, floats: int, operands, dtype, config: Config, count=None) -> _Stream:
    """Buffers for a warpgroup's rows: head sizes, float32 numbers, int32 operands."""
    count = config.warpgroups if count is None else count
    of_rows = count, _ROWS
    buffers = [
        *(_buffer((*of_rows, size), dtype) for size in sizes),
        *(plgpu.SMEM(of_rows, jnp.float32) for _ in range(floats)),
        *(plgpu.SMEM(of_rows, jnp.int32) for _ in operands),
    ]
    full = plgpu.Barrier(num_arrivals=len(buffers), num_barriers=count)
    return _Stream(buffers, full, None)


def _stream(buffers, pieces: int, config: Config) -> _Stream:
    """Buffers of ``stages`` slots, filled by so many copies."""
    return _Stream(
        buffers,
        plgpu.Barrier(num_arrivals=pieces, num_barriers=config.stages),
        plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=config.stages),
    )


def _key_streams(d: int, dv: int, elements: Elements, dtype, config: Config):
    slots = config.stages, config.tile
    cols = [
        plgpu.SMEM((config.stages, config.group, config.tile), jnp.int32)
        for _ in elements.cols
    ]
    return [
        _stream(
            [_buffer((*slots, d), dtype), *cols], 1 + config.group * len(cols), config
        ),
        _stream([_buffer((*slots, dv), dtype)], 1, config),
    ]


def _query_streams(d: int, dv: int, elements: Elements, dtype, config: Config):
    slots, across = (config.stages, config.tile), _across_keys(config)
    first = [
        _buffer((*slots, d), dtype),
        plgpu.SMEM(slots, jnp.float32),
        *(plgpu.SMEM(slots, jnp.int32) for _ in elements.rows),
        *(plgpu.SMEM((config.stages, across, _ROWS), jnp.int32) for _ in elements.cols),
    ]
    pieces = 2 + len(elements.rows) + across * len(elements.cols)
    second = [_buffer((*slots, dv), dtype), plgpu.SMEM(slots, jnp.float32)]
    return [_stream(first, pieces, config), _stream(second, 2, config)]


def _spare(dtype, config: Config, interpret):
    """Where left operands are put for jax's interpreter; see ``_accumulate``."""
    shape = config.warpgroups, _ROWS, config.tile
    return _buffer(shape, dtype) if interpret else None


# --- Logits and products --------------------------------------------------------------


def _logits(z, scale: float, soft_cap: float | None, bias):
    """Products as logits of base 2; with a cap also its derivative."""
    slope = None
    if soft_cap is None:
        z = z * (scale * _LOG2E)
    else:
        # The hardware's tanh is good to 2**-11 only.
        ratio = 1 - 2 / (jnp.exp2(z * (2 * _LOG2E * scale / soft_cap)) + 1)
        z, slope = ratio * (soft_cap * _LOG2E), 1 - ratio * ratio
    return (z if bias is None else z + bias * _LOG2E), slope


def _masked(z, elements: Elements, place, step, rows, cols, config, transposed=False):
    """Sets to -inf what is not allowed; ``rows`` and ``cols`` are the operands' refs.

    With ``transposed`` the rows of z are keys.
    """
    ragged = config.keys % config.block_k
    if elements.predicate is None and not ragged:
        return z
    queries = 1 if transposed else 0

    def ask(z):
        place_of = lambda axis: plgpu.broadcasted_iota(
            jnp.int32, z.shape, axis, layout=_LAYOUT
        )
        first = (step.column, place.row) if transposed else (place.row, step.column)
        i, j = first[0] + place_of(queries), first[1] + place_of(1 - queries)
        allowed = j < config.keys
        if elements.predicate is not None:
            of = lambda refs, axis: tuple(_numbers(x, z.shape, axis) for x in refs)
            some = _without_not(elements.predicate)(
                i, j, of(rows, queries), of(cols, 1 - queries), step.scalars, ()
            )
            allowed = allowed & some if ragged else some
        return jnp.where(allowed, z, -jnp.inf)

    return lax.cond(step.partial, ask, lambda z: z, z)


def _without_not(predicate: Callable) -> Callable:
    """The same with ``~x`` as ``x != True``: Mosaic GPU cannot lower the former."""

    def run(jaxpr, constants, *args):
        values = dict(
            zip(jaxpr.constvars + jaxpr.invars, [*constants, *args], strict=True)
        )
        value = lambda v: v.val if hasattr(v, "val") else values[v]
        for equation in jaxpr.eqns:
            operands, params = [value(v) for v in equation.invars], equation.params
            inner = params.get("jaxpr")
            if equation.primitive is lax.not_p and operands[0].dtype == bool:
                results = [operands[0] != True]  # noqa: E712
            elif inner is not None:
                results = run(inner.jaxpr, inner.consts, *operands)
            else:
                results = equation.primitive.bind(*operands, **params)
                if not equation.primitive.multiple_results:
                    results = [results]
            values.update(zip(equation.outvars, results, strict=True))
        return [value(v) for v in jaxpr.outvars]

    def call(*args):
        closed = jax.make_jaxpr(predicate)(*args)
        return run(closed.jaxpr, closed.consts, *jax.tree.leaves(args))[0]

    return call


def _probabilities(z, lse, axis: int, bias):
    """exp2(z - lse), the latter of the rows (axis 0) or columns of z."""
    p = jnp.exp2(z - _numbers(lse, z.shape, axis))
    # Rows of padding have an lse of 0, above which a bias may lie.
    return p if bias is None else jnp.minimum(p, 1)


def _numbers(ref, shape, axis: int):
    """A buffer's numbers of rows (axis 0) or columns (1), over all of these."""
    x = plgpu.layout_cast(ref[...], _LAYOUT.reduce(1 - axis))
    return _spread(x, shape, axis)


def _product(left, right, shape, turn=None):
    """``left @ right.T``, both in SMEM."""

    def multiply(acc):
        plgpu.wgmma(acc, left, right.transpose((1, 0)))
        _take_turns(turn)
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def _accumulate(total, left, right):
    """``total + left @ right``, left from registers."""
    if isinstance(left, jax.Array):
        run = lambda acc: plgpu.wgmma(acc, left, right)
        return pl.run_state(run)(plgpu.ACC.init(total))

    # In jax's interpreter a product is of SMEM, into a sum that begins at zero.
    return total + _product(left, right.transpose((1, 0)), total.shape)


def _sum(walk, one, *sizes: int):
    """Sums of so many columns, over the steps that are walked."""

    def run(*sums):
        walk(functools.partial(one, sums), ())
        return [acc[...] for acc in sums]

    return pl.run_scoped(run, *(plgpu.ACC((_ROWS, n), jnp.float32) for n in sizes))


def _add(acc, left, right, spare, mine):
    """Adds ``left @ right`` to a sum, left from registers."""
    plgpu.wgmma(acc, _left(left, spare, mine), right)
    plgpu.wgmma_wait(0)


def _left(x, spare, mine):
    """The left operand of a product: registers, or SMEM where simulated."""
    if spare is None:
        return x
    spare[mine] = x
    plgpu.commit_smem()
    return spare.at[mine]


def _take_turns(turn):
    """Waits for the other warpgroup to come here as well."""
    if turn is not None:
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)


def _spread(x, shape, axis: int):
    """Numbers of rows (axis 0) or columns (1), over all of these."""
    return lax.broadcast_in_dim(x, shape, [axis])


def _zeros(shape):
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), _LAYOUT)


# --- Launch ---------------------------------------------------------------------------


def _operands(elements: Elements, **arrays):
    """What a kernel reads, without what is None."""
    operands = ("rows", "cols", "scalars")
    arrays |= {name: tuple(getattr(elements, name)) for name in operands}
    return {name: array for name, array in arrays.items() if array is not None}


def _launch(
    body, ins, outs, *, home, streams, own, name, programs: int, config, interpret
):
    """Runs ``body(ins, outs, home, streams, own)`` in each program, on references."""
    flat, tree = jax.tree.flatten(ins)
    kwargs = {}
    if interpret:
        # Simulates the warpgroups, TMA and barriers on the CPU; not in jax 0.10.
        if interpret is True:
            # pyrefly: ignore[missing-attribute]
            interpret = plgpu.InterpretGPUParams()
        kwargs["interpret"] = interpret

    def run(*refs):
        refs, scratch = refs[: len(flat) + len(outs)], refs[len(flat) + len(outs) :]
        body(tree.unflatten(refs[: len(flat)]), refs[len(flat) :], *scratch)

    results = plgpu.kernel(
        run,
        out_type=outs,
        scratch_types=[home, streams, own],
        grid=(programs,),
        grid_names=("program",),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(
            # Exponentials and quotients as the hardware has them.
            approx_math=True,
            # The default differs between versions of jax: say which.
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        ),
        **kwargs,
    )(*flat)
    return [_varying(out, flat) for out in results]


def _varying(out, operands):
    """Gives ``out`` the operands' varying axes, inside shard_map.

    ``plgpu.kernel`` forgets them, and a result that differs between devices would pass
    as replicated.
    """
    axes = [jax.typeof(a).manual_axis_type.varying for a in operands]
    missing = frozenset().union(*axes) - jax.typeof(out).manual_axis_type.varying
    return lax.pcast(out, tuple(missing), to="varying") if missing else out
