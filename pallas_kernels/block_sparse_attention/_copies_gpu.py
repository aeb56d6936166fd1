"""Buffers of the Hopper kernels, what fills them, and their launch."""

import math
from typing import Any, NamedTuple

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_sparse_attention._spec import HOPPER_ROWS as ROWS
from pallas_kernels.block_sparse_attention._spec import HOPPER_WORD as WORD
from pallas_kernels.block_sparse_attention._spec import Config, Elements
from pallas_kernels.block_sparse_attention._walk_gpu import Place, row_pieces

# Registers per thread: 64 K of them are shared by 128 threads of each warpgroup. By
# number of computing warpgroups.
_COPY_REGISTERS, _COMPUTE_REGISTERS = {1: 96, 2: 32}, {1: 240, 2: 240}


class Stream(NamedTuple):
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


def run_warpgroups(place: Place, walk, fetch, compute, streams, config: Config):
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


def bring_rows(place: Place, home: Stream, arrays, config: Config):
    """Copies what a warpgroup has of its rows throughout."""
    rows = lambda x: (*place.of(x), pl.ds(place.row, ROWS))
    pairs = [
        (array.at[rows(array)], buffer.at[place.piece])
        for array, buffer in zip(arrays, home.buffers, strict=True)
    ]
    fill = lambda: home.fill(place.piece, pairs)
    pl.when(place.warpgroup == 0)(fill) if config.split else fill()
    home.wait(place.piece)


def store(*pairs):
    """Copies (buffer, destination) pairs out."""
    plgpu.commit_smem()
    for buffer, destination in pairs:
        plgpu.copy_smem_to_gmem(buffer, destination)
    plgpu.wait_smem_to_gmem(0)


def swizzled(shape, dtype, config: Config):
    """Tiles in SMEM as wgmma reads them, or SMEM for them.

    The widest swizzle that divides a row and, as a sum over a step's positions takes
    so many of them at a time, ``tile``.
    """
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = math.gcd(math.gcd(shape[-1], config.tile) * itemsize, 128)
    tiling = plgpu.TilingTransform((8, swizzle // itemsize))
    return plgpu.SMEM(
        shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle))
    )


def row_buffers(sizes, floats: int, operands, dtype, config: Config) -> Stream:
    """Buffers for a warpgroup's rows: head sizes, float32 numbers, int32 operands."""
    count = row_pieces(config)
    of_rows = count, ROWS
    buffers = [
        *(swizzled((*of_rows, size), dtype, config) for size in sizes),
        *(plgpu.SMEM(of_rows, jnp.float32) for _ in range(floats)),
        *(plgpu.SMEM(of_rows, jnp.int32) for _ in operands),
    ]
    full = plgpu.Barrier(num_arrivals=len(buffers), num_barriers=count)
    return Stream(buffers, full, None)


def _stream(buffers, copies: int, config: Config) -> Stream:
    """Buffers of ``stages`` slots, filled by so many copies."""
    return Stream(
        buffers,
        plgpu.Barrier(num_arrivals=copies, num_barriers=config.stages),
        plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=config.stages),
    )


def key_streams(d: int, dv: int, elements: Elements, dtype, config: Config):
    slots = config.stages, config.tile
    cols = [
        plgpu.SMEM((config.stages, config.group, config.tile), jnp.int32)
        for _ in elements.cols
    ]
    words = _words(elements, config)
    first = swizzled((*slots, d), dtype, config), cols, words
    copies = 1 + config.group * len(cols) + row_pieces(config) * len(words)
    second = [swizzled((*slots, dv), dtype, config)]
    return [_stream(first, copies, config), _stream(second, 1, config)]


def query_streams(d: int, dv: int, elements: Elements, dtype, config: Config):
    slots, across = (config.stages, config.tile), row_pieces(config)
    first = (
        swizzled((*slots, d), dtype, config),
        plgpu.SMEM(slots, jnp.float32),
        [plgpu.SMEM(slots, jnp.int32) for _ in elements.rows],
        [plgpu.SMEM((config.stages, across, ROWS), jnp.int32) for _ in elements.cols],
        _words(elements, config),
    )
    of_rows = len(elements.cols) + len(elements.dense)
    copies = 2 + len(elements.rows) + across * of_rows
    second = [swizzled((*slots, dv), dtype, config), plgpu.SMEM(slots, jnp.float32)]
    return [_stream(first, copies, config), _stream(second, 2, config)]


def _words(elements: Elements, config: Config):
    """Buffers for a step's words of each row, of the operands that are dense."""
    shape = config.stages, row_pieces(config), config.tile // WORD, ROWS
    return [plgpu.SMEM(shape, jnp.int32) for _ in elements.dense]


def spare_tiles(dtype, config: Config, interpret):
    """Where left operands are put for jax's interpreter; see ``accumulate``."""
    shape = config.warpgroups, ROWS, config.tile
    return swizzled(shape, dtype, config) if interpret else None


# --- Launch ---------------------------------------------------------------------------


def operands_of(elements: Elements, along: int, **arrays):
    """What a kernel reads, without what is None; steps are ``along`` t (2) or s (3)."""
    operands = ("rows", "cols", "scalars")
    arrays |= {name: tuple(getattr(elements, name)) for name in operands}
    arrays["words"] = tuple(_packed(mask, along) for mask in elements.dense)
    return {name: array for name, array in arrays.items() if array is not None}


def _packed(mask, along: int):
    """bool [b, heads, t, s] as int32 [b, heads, words, rows], an element per bit."""
    b, heads, n, rows = jnp.moveaxis(mask, along, 2).shape
    mask = jnp.moveaxis(mask, along, 2).reshape(b, heads, n // WORD, WORD, rows)
    bits = mask.astype(jnp.uint32) << jnp.arange(WORD, dtype=jnp.uint32)[:, None]
    return lax.bitcast_convert_type(bits.sum(3, dtype=jnp.uint32), jnp.int32)


def launch(
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
