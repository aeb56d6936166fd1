"""Where the programs, steps and operands of the Hopper kernels are."""

from typing import Any, NamedTuple

from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.block_sparse_attention._spec import HOPPER_ROWS as ROWS
from pallas_kernels.block_sparse_attention._spec import HOPPER_WORD as WORD
from pallas_kernels.block_sparse_attention._spec import Config


class Place(NamedTuple):
    """What a warpgroup works on; int32 scalars."""

    warpgroup: Any
    piece: Any  # which 64 rows of the program
    batch: Any
    head: Any
    head_kv: Any
    member: Any  # which of the heads that the program holds
    first_head: Any  # the first of these
    block: Any
    row: Any  # position of the first row
    query_heads: int

    def of(self, x, head=None):
        """Index of a head in an operand [b or 1, heads, ...]."""
        heads, head = x.shape[1], self.head if head is None else head
        batch = self.batch if x.shape[0] > 1 else 0
        return batch, lax.div(head, jnp.int32(self.query_heads // heads))


class Step(NamedTuple):
    """What the rows meet in a step; int32 scalars."""

    number: Any
    column: Any  # position of the first
    partial: Any  # whether to ask for elements; bool
    source: Any  # index in the arrays that are copied
    bias: Any  # float32, or None
    scalars: Any  # the predicate's


def row_pieces(config: Config) -> int:
    """How many times 64 rows a program has, of one head or of ``group`` heads."""
    return 1 if config.split else config.warpgroups


def _piece(config: Config):
    """A warpgroup, and which 64 rows are its.

    The warpgroup that copies has the last ones, too: what it reads along is in range.
    """
    warpgroup = lax.axis_index("warpgroup")
    return warpgroup, jnp.minimum(warpgroup, row_pieces(config) - 1)


def query_place(ins, config: Config) -> Place:
    """Rows of a program that has queries, the last ones first."""
    h, h_kv = ins["q"].shape[1], ins["k"].shape[1]
    group, packs = config.group, h // h_kv // config.group
    across = row_pieces(config) // group
    warpgroup, piece = _piece(config)
    tiles = ins["q"].shape[2] // (across * ROWS)
    number, pack = divide(lax.axis_index("program"), packs)
    number, tile = divide(number, tiles)
    batch, head_kv = divide(number, h_kv)
    tile = tiles - 1 - tile
    first = (head_kv * packs + pack) * group
    # Pieces are of different heads or of different rows.
    member = jnp.minimum(piece, group - 1)
    row = tile * (across * ROWS) + (0 if group > 1 else piece * ROWS)
    block = lax.div(tile, jnp.int32(config.block_q // (across * ROWS)))
    head = first + member
    return Place(
        *(warpgroup, piece, batch, head, head_kv, member, first, block, row, h)
    )


def key_steps(ins, place: Place, streams, config: Config):
    """``walk(visit, carry)`` over the steps of a query block, and what they fetch."""
    index, count, full = ins["lists"]
    listed = (*place.of(count), place.block)
    parts = config.block_k // config.tile

    def walk(visit, carry):
        def one(number, carry):
            entry, part = divide(number, parts)
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
            step = Step(number, column, partial, source, bias, scalars)
            slot = lax.rem(number, jnp.int32(config.stages))
            return visit(step, slot, carry)

        return lax.fori_loop(jnp.int32(0), count[listed] * parts, one, carry)

    def fetch(step, slot):
        keys, cols, words = streams[0].buffers
        first = [(ins["k"].at[step.source], keys.at[slot])]
        for array, buffer in zip(ins["cols"], cols, strict=True):
            for member in range(config.group):
                at = place.of(array, place.first_head + member)
                columns = pl.ds(step.column, config.tile)
                first.append((array.at[(*at, columns)], buffer.at[slot, member]))
        if config.group > 1:
            heads = [place.first_head + member for member in range(config.group)]
            rows = [(head, place.row) for head in heads]
        else:
            rows = [(place.head, row) for row in _rows(place, config)]
        first += _bring_words(ins["words"], words, place, rows, step, slot, config)
        second = [(ins["v"].at[step.source], streams[1].buffers[0].at[slot])]
        return first, second

    return walk, fetch


def key_place(ins, config: Config) -> Place:
    """Rows of a program that has keys, the first ones first; of no query head."""
    across = row_pieces(config)
    warpgroup, piece = _piece(config)
    tiles = ins["k"].shape[2] // (across * ROWS)
    number, tile = divide(lax.axis_index("program"), tiles)
    batch, head_kv = divide(number, ins["k"].shape[1])
    row = (tile * across + piece) * ROWS
    block = lax.div(tile, jnp.int32(config.block_k // (across * ROWS)))
    h = ins["q"].shape[1]
    head = head_kv * (h // ins["k"].shape[1])
    return Place(*(warpgroup, piece, batch, head, head_kv, 0, head, block, row, h))


def query_steps(ins, place: Place, streams, config: Config):
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
                entry, part = divide(number, parts)
                at = (*listed, begin + entry)
                partial = full[at] == 0
                if config.keys % config.block_k:
                    partial |= place.block == last
                column = index[at] * config.block_q + part * config.tile
                bias = None
                if "bias" in ins:
                    of, capacity = place.of(ins["bias"], head), ins["bias"].shape[3]
                    bias = ins["bias"][(*of, *divide(slots[at], capacity))]
                scalars = tuple(x[place.of(x, head)] for x in ins["scalars"])
                step = Step(number, column, partial, head, bias, scalars)
                slot = lax.rem(turn, jnp.int32(config.stages))
                return turn + 1, visit(step, slot, carry)

            return lax.fori_loop(jnp.int32(0), (end - begin) * parts, one, state)

        state = jnp.int32(0), carry
        return lax.fori_loop(jnp.int32(0), jnp.int32(group), member, state)[1]

    def fetch(step, slot):
        columns, head = pl.ds(step.column, config.tile), step.source
        of = lambda x: x.at[(*place.of(x, head), columns)]
        q, lse, rows, cols, words = streams[0].buffers
        first = [(of(ins["q"]), q.at[slot]), (of(ins["lse"]), lse.at[slot])]
        first += [
            (of(array), buffer.at[slot])
            for array, buffer in zip(ins["rows"], rows, strict=True)
        ]
        for array, buffer in zip(ins["cols"], cols, strict=True):
            for piece, row in enumerate(_rows(place, config)):
                at = (*place.of(array, head), pl.ds(row, ROWS))
                first.append((array.at[at], buffer.at[slot, piece]))
        pairs = [(head, row) for row in _rows(place, config)]
        first += _bring_words(ins["words"], words, place, pairs, step, slot, config)
        arrays = zip([ins["dout"], ins["delta"]], streams[1].buffers, strict=True)
        return first, [(of(array), buffer.at[slot]) for array, buffer in arrays]

    return walk, fetch


def _rows(place: Place, config: Config):
    """Where each piece of the program begins; pieces of one head."""
    first = place.row - place.piece * ROWS
    return [first + piece * ROWS for piece in range(row_pieces(config))]


def _bring_words(arrays, buffers, place: Place, rows, step: Step, slot, config: Config):
    """Of each piece, (its head, its first row), the words of the step's positions."""
    words = pl.ds(lax.div(step.column, jnp.int32(WORD)), config.tile // WORD)
    return [
        (array.at[(*place.of(array, head), words, pl.ds(row, ROWS))], buffer.at[at])
        for array, buffer in zip(arrays, buffers, strict=True)
        for piece, (head, row) in enumerate(rows)
        for at in [(slot, piece)]
    ]


def divide(number, by: int):
    return lax.div(number, jnp.int32(by)), lax.rem(number, jnp.int32(by))
