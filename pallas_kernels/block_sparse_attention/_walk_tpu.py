"""A TPU kernel whose programs walk a list of blocks, copies one step ahead."""

import itertools
from typing import NamedTuple

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_sparse_attention._spec import TPU_LANES
from pallas_kernels.block_sparse_attention._tiles_tpu import placer, zero


class Inputs:
    """The operands of a kernel by kind, each with its block, and the call.

    The grid is (batch, heads, blocks, each): ``each`` list heads of one key head take
    turns, and with 1 the heads are those of the tiles.
    """

    KINDS = ("now", "next", "bias", "pages", "scalars", "tiles", "lines")

    def __init__(self, tiles, elements, each, by_key):
        self.tiles, self.elements = tiles, elements
        self.each, self.by_key = each, by_key
        self.kinds = {kind: [] for kind in self.KINDS}

    def add(self, kind, array, spec):
        self.kinds[kind].append((array, spec))

    def own(self, batch, head, block, turn):
        """The place of the program's block in [b, heads, blocks, .., ..]."""
        head = head * self.each + turn if self.each > 1 else head
        return batch, head, block, zero(), zero()

    def _rows(self, kind, array, memory_space, after=0):
        """One [.., ..] of [b or 1, heads, blocks or 1, .., ..]."""
        place = placer(array, self.tiles)

        def index(batch, head, block, turn):
            if after:
                head, block, turn = self.later(head, block, turn)
                block = jnp.minimum(block, array.shape[2] - 1)
            batch, head, block, *rest = self.own(batch, head, block, turn)
            block = block if array.shape[2] > 1 else zero()
            return *place(batch, head), block, *rest

        shape = (None, None, None, *array.shape[3:])
        self.add(kind, array, pl.BlockSpec(shape, index, memory_space=memory_space))

    def later(self, head, block, turn):
        """The program after this one; the last one of a head stays."""
        if self.each == 1:
            return head, block + 1, turn
        turn = turn + 1
        wrap = lax.div(turn, jnp.int32(self.each))
        return head, block + wrap, turn - wrap * self.each

    def smem(self, kind, array, after=0):
        self._rows(kind, array, pltpu.SMEM, after)

    def vmem(self, kind, array):
        self._rows(kind, array, pltpu.VMEM)

    def tile_spec(self, d):
        group, rows = self.tiles.shape
        index = lambda batch, head, block, turn: (batch, head, zero(), block, zero())
        return pl.BlockSpec((None, None, group, rows, d), index)

    def tile(self, array):
        self.add("tiles", array, self.tile_spec(array.shape[4]))

    def call(
        self,
        kernel,
        streams,
        *,
        grid,
        out_specs,
        out_shape,
        sums,
        config,
        interpret,
        name,
    ):
        """The pallas_call; ``kernel`` takes a ``Program``."""
        kinds = {**self.kinds}
        any_spec = pl.BlockSpec(memory_space=pl.ANY)
        kinds["streams"] = [(stream.array, any_spec) for stream in streams]
        arrays, specs = zip(*itertools.chain(*kinds.values()), strict=True)
        lines = [array for array, _ in kinds["lines"]]
        scratch = {
            "base": [pltpu.SMEM((1,), jnp.int32)],
            "sem": [pltpu.SemaphoreType.DMA((2,))],
            "held": [
                pltpu.VMEM((2, config.unroll, *stream.block), stream.array.dtype)
                for stream in streams
            ],
            "columns": [pltpu.VMEM((a.shape[4], TPU_LANES), a.dtype) for a in lines],
            "sums": sums,
        }
        kinds.update(outs=out_specs, **scratch)
        sizes = {kind: len(members) for kind, members in kinds.items()}

        def body(*refs):
            refs, groups = iter(refs), {}
            for kind, size in sizes.items():
                groups[kind] = list(itertools.islice(refs, size))
            kernel(Program(groups, streams, config, self))

        return pl.pallas_call(
            body,
            grid=grid,
            in_specs=list(specs),
            out_specs=out_specs,
            out_shape=out_shape,
            scratch_shapes=list(itertools.chain(*scratch.values())),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
                vmem_limit_bytes=config.vmem or None,
            ),
            interpret=interpret,
            name=name,
        )(*arrays)


class Entry(NamedTuple):
    """A listed block, as scalars.

    number: its place in the list. key: the block of keys, query: that of queries.
    limit: the key from which on none is allowed.
    """

    number: jax.Array
    query: jax.Array
    key: jax.Array
    full: jax.Array
    exists: jax.Array
    limit: jax.Array
    bias: jax.Array | None


class Program:
    """One program's refs, and the loop over its list."""

    def __init__(self, refs, streams, config, inputs):
        self.refs, self.streams, self.config = refs, streams, config
        elements, each = inputs.elements, inputs.each
        self.predicate, self.by_key = elements.predicate, inputs.by_key
        # The rows that a predicate asks for follow their own positions.
        self.rows = 0 if self.predicate is None else 1 + len(elements.rows)
        self.cols = len(elements.cols)
        batch, head, self.block, turn = (pl.program_id(axis) for axis in range(4))
        self.turn, self.turns = turn, each
        self.place = (batch, head * each + turn, self.block)
        later = lax.div(turn + 1, jnp.int32(each))
        after = turn + 1 - later * each
        self.next_place = (batch, head * each + after, self.block + later)
        self.first = (self.block == 0) & (turn == 0)
        self.last = (self.block == pl.num_programs(2) - 1) & (turn == each - 1)
        for line, column in zip(refs["lines"], refs["columns"], strict=True):
            wide = jnp.broadcast_to(line[...], (TPU_LANES, line.shape[1]))
            column[...] = wide.T

    def __getattr__(self, kind):
        return self.refs[kind]

    def walk(self, body):
        """Calls ``body(slot, entries)`` for each step.

        Copies are one step ahead: the last step starts those of the next program.
        """
        [now], [after], [base_ref], [sem] = self.now, self.next, self.base, self.sem
        unroll = self.config.unroll
        count = now[0, 0]
        steps = lax.div(count + (unroll - 1), jnp.int32(unroll))

        def copies(entries, place, step, slot):
            for u in range(unroll):
                entry = jnp.minimum(step * unroll + u, entries[0, 0] - 1)
                index = lax.shift_right_logical(entries[0, entry + 1], jnp.int32(1))
                for stream, hbm, held in zip(
                    self.streams, self.refs["streams"], self.held, strict=True
                ):
                    source = self.pages[0][0, index] if stream.paged else index
                    yield pltpu.make_async_copy(
                        hbm.at[stream.pick(*place, source)],
                        held.at[slot, jnp.int32(u)],
                        sem.at[slot],
                    )

        def start(entries, place, step, slot):
            for copy in copies(entries, place, step, slot):
                copy.start()

        @pl.when(self.first)
        def _():
            base_ref[0] = zero()
            pl.when(count > 0)(lambda: start(now, self.place, zero(), zero()))

        base = base_ref[0]
        end = (base + steps) & 1

        def ahead():
            @pl.when(jnp.logical_not(self.last) & (after[0, 0] > 0))
            def _():
                start(after, self.next_place, zero(), end)

        def step(number, carry):
            slot = (base + number) & 1
            pl.when(number + 1 < steps)(
                lambda: start(now, self.place, number + 1, 1 - slot)
            )
            pl.when(number + 1 == steps)(ahead)
            for copy in copies(now, self.place, number, slot):
                copy.wait()
            body(slot, [self.entry(number * unroll + u) for u in range(unroll)])
            return carry

        lax.fori_loop(zero(), steps, step, None)
        pl.when(steps == 0)(ahead)
        base_ref[0] = end

    def entry(self, number):
        [now] = self.now
        exists = number < now[0, 0]
        place = jnp.minimum(number, now[0, 0] - 1)
        packed = now[0, place + 1]
        listed = lax.shift_right_logical(packed, jnp.int32(1))
        return Entry(
            number,
            *((listed, self.block) if self.by_key else (self.block, listed)),
            packed & 1,
            exists,
            jnp.where(exists, jnp.int32(self.config.keys), zero()),
            self.bias[0][0, place] if self.bias else None,
        )

    def masked_or_not(self, entries, compute):
        """Calls ``compute(masked)``: masks are asked for only where they matter."""
        config = self.config
        ragged = config.keys % config.block_k
        if self.predicate is None and not ragged and config.unroll == 1:
            compute(False)
            return
        plain = entries[0].exists
        for entry in entries:
            plain &= entry.exists & (entry.full == 1)
            if ragged:
                plain &= (entry.key + 1) * config.block_k <= config.keys
        pl.when(plain)(lambda: compute(False))
        pl.when(jnp.logical_not(plain))(lambda: compute(True))

    def allowed(self, entry, shape, i, first_key, rows, cols, dense):
        """Which elements of a part of the block are allowed.

        i: positions of the queries, or None; first_key: the first one of the part.
        """
        axis = 0 if self.by_key else 1
        j = first_key + lax.broadcasted_iota(jnp.int32, shape, axis)
        allowed = j < entry.limit
        if self.predicate is None:
            return allowed
        scalars = tuple(ref[0, 0] for ref in self.scalars)
        chosen = self.predicate(i, j, rows, cols, scalars, dense)
        if chosen.shape != shape:
            chosen = jnp.broadcast_to(chosen.astype(jnp.int32), shape) > 0
        return allowed & (chosen | (jnp.full(shape, entry.full) > 0))
