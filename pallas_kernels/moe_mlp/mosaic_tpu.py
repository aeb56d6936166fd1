"""The two halves of a mixture of experts' layer on TPU: Pallas Mosaic.

Grid (columns of the result, visits, contraction): a visit is one expert's choices in
one tile of choices, as ``grouped_matmul.mosaic_tpu`` lists them. A tile of an expert's
matrix stays in VMEM while the expert's choices pass, so matrices are read once.

``hidden``. The rows of x that a tile's choices are of come from HBM by a copy each,
into one of two buffers: while a tile is multiplied the next one's rows are on their
way. Both products of a gated layer share them; their float32 sums meet in registers,
and only h is written.

``down``. Rows of h come as blocks, are multiplied, weighted in float32, and leave by a
copy each for the place that ``choices`` names, while the next visit computes.

A copy moves words of 32 bits, and in VMEM a register pairs rows of 16 bits: a row of
bfloat16 moves as words that hold two columns, half a tile apart. XLA packs x and
unpacks z, one pass over each; shifts and masks do the same in the kernel.

Dtypes: bfloat16 and float32. Chips: compiled for v4, v5e, v5p, v6e, tpu7x. Not yet run
on a TPU: speed is unmeasured.
"""

import functools
from collections.abc import Callable

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._chips import TPU_LANES as _LANES
from pallas_kernels.grouped_matmul import mosaic_tpu as grouped
from pallas_kernels.moe_mlp._activation import check_activation, inlined
from pallas_kernels.moe_mlp._spec import Config

# Copies that one step of a loop starts or awaits.
_COPIES = 8
# Rows that are unpacked at a time: those of a 16-bit register pair.
_STEP = 16
# The upper half of a word.
_UPPER = -(2**16)


def hidden(
    x: jax.Array,
    w_in: jax.Array,
    w_gate: jax.Array | None,
    tokens: jax.Array,
    sizes: jax.Array,
    *,
    activation: Callable[[jax.Array], jax.Array],
    config: Config,
    interpret=False,
) -> jax.Array:
    """The hidden layer of each choice's expert, as ``_spec`` defines it.

    Args:
        x: [t, d], bfloat16 or float32.
        w_in: [experts, d, f] of x's dtype.
        w_gate: the same, or None.
        tokens: int32 [c].
        sizes: int32 [experts].
        activation: elementwise function that ``check_activation`` passes.
        config: tile sizes.
        interpret: True or ``pltpu.InterpretParams()`` to run without a TPU.

    Returns:
        [c, f] of x's dtype; zeros in the tail.
    """
    check_activation(activation, "mosaic_tpu", w_in.shape[2])
    (count,), inner = tokens.shape, x.shape[1]
    weights = (w_in,) if w_gate is None else (w_gate, w_in)
    weights = [grouped.at_least(grouped.SUBLANES, w, 1) for w in weights]
    tile_m, tile_k, tile_n = config.tile_m, config.tile_k, config.tile_n
    experts, depth, outer = weights[0].shape
    steps = pl.cdiv(depth, tile_k)
    words = _pack(x, steps * tile_k)
    visits, number = grouped.visits_of(sizes, count, tile_m, tail=True)
    tokens = jnp.pad(tokens, (0, -count % tile_m))
    # A product needs whole registers; rows beyond the choices are cut off again.
    m = max(count, grouped.SUBLANES)

    def w_index(out, visit, step, group, tile, bounds, tokens):
        return jnp.minimum(group[visit], experts - 1), step, out

    scratch = [pltpu.VMEM((2, tile_m, words.shape[1]), words.dtype)]
    scratch += [pltpu.SemaphoreType.DMA((2,))]
    if words.dtype != x.dtype:
        scratch += [pltpu.VMEM((tile_m, steps * tile_k), x.dtype)]
    if steps > 1:
        scratch += [pltpu.VMEM((tile_m, tile_n), jnp.float32)] * len(weights)
    h = pl.pallas_call(
        functools.partial(
            _hidden_kernel,
            gates=len(weights),
            steps=steps,
            activation=inlined(activation),
            inner=inner,
            rows=config.rows,
            widen=bool(interpret),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(pl.cdiv(outer, tile_n), number, steps),
            in_specs=[
                pl.BlockSpec(memory_space=pl.ANY),
                *[pl.BlockSpec((None, tile_k, tile_n), w_index)] * len(weights),
            ],
            out_specs=pl.BlockSpec(
                (tile_m, tile_n),
                lambda out, visit, step, group, tile, *_: (tile[visit], out),
            ),
            scratch_shapes=scratch,
        ),
        out_shape=grouped.out_shape((m, outer), x.dtype, x),
        compiler_params=grouped.params(config),
        interpret=interpret,
        name="moe_hidden" + ("" if w_gate is None else "_gated"),
    )(*visits, tokens, words, *weights)
    return h if m == count else h[:count]


def down(
    h: jax.Array,
    w_out: jax.Array,
    choices: jax.Array,
    weights: jax.Array,
    sizes: jax.Array,
    *,
    config: Config,
    interpret=False,
) -> jax.Array:
    """The output of each choice's expert times its gate, as ``_spec`` defines it.

    Args:
        h: [c, f], bfloat16 or float32.
        w_out: [experts, f, d] of h's dtype.
        choices: int32 [c], a permutation.
        weights: float32 [c].
        sizes: int32 [experts].
        config: tile sizes.
        interpret: True or ``pltpu.InterpretParams()`` to run without a TPU.

    Returns:
        [c, d] of h's dtype, in the order of ``choices``; zeros in the tail.
    """
    count, inner = h.shape
    h = grouped.at_least(grouped.SUBLANES, h, 0)
    h = grouped.at_least(grouped.SUBLANES, h, 1)
    w_out = grouped.at_least(grouped.SUBLANES, w_out, 1)
    tile_m, tile_k, tile_n = config.tile_m, config.tile_k, config.tile_n
    experts, depth, outer = w_out.shape
    steps, outs = pl.cdiv(depth, tile_k), pl.cdiv(outer, tile_n)
    # The tail is one more group: its rows are written too.
    sizes = jnp.maximum(sizes, 0)
    sizes = jnp.append(sizes, jnp.maximum(count - jnp.sum(sizes, dtype=jnp.int32), 0))
    visits, number = grouped.visits_of(sizes, count, tile_m, tail=True)

    def h_index(out, visit, step, group, tile, bounds, choices):
        # The tail's visits read nothing: they stay with the last tile of any expert.
        last = lax.div(jnp.maximum(bounds[experts], 1) - 1, jnp.int32(tile_m))
        return jnp.minimum(tile[visit], last), step

    def w_index(out, visit, step, group, tile, bounds, choices):
        return jnp.minimum(group[visit], experts - 1), step, out

    word = jnp.int32 if h.dtype == jnp.bfloat16 else h.dtype
    wide = tile_n // (4 // h.dtype.itemsize)
    words = pl.pallas_call(
        functools.partial(
            _down_kernel,
            experts=experts,
            steps=steps,
            inner=inner,
            rows=config.rows,
            widen=bool(interpret),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(outs, number, steps),
            in_specs=[
                pl.BlockSpec((tile_m, tile_k), h_index),
                pl.BlockSpec((None, tile_k, tile_n), w_index),
                pl.BlockSpec(
                    (tile_m, 1), lambda *indices: (h_index(*indices)[0], jnp.int32(0))
                ),
            ],
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[
                pltpu.VMEM((2, tile_m, wide), word),
                pltpu.SemaphoreType.DMA((2,)),
                *[pltpu.VMEM((tile_m, tile_n), jnp.float32)] * (steps > 1),
            ],
        ),
        out_shape=grouped.out_shape((count, outs * wide), word, h),
        compiler_params=grouped.params(config),
        interpret=interpret,
        name="moe_down",
    )(*visits, choices, h, w_out, grouped.at_least(h.shape[0], weights[:, None], 0))
    return _unpack(words, wide, h.dtype)[:, :outer]


def _hidden_kernel(
    group_ref,
    tile_ref,
    bounds_ref,
    tokens_ref,
    x_ref,
    *refs,
    gates,
    steps,
    activation,
    inner,
    rows,
    widen,
):
    w_refs, (h_ref, words_ref, sem_ref, *more) = refs[:gates], refs[gates:]
    accs = more[len(more) - gates :] if steps > 1 else ()
    paired = len(more) > len(accs)
    visit, step = pl.program_id(1), pl.program_id(2)
    tile, tile_m, tile_k = tile_ref[visit], words_ref.shape[1], w_refs[0].shape[0]
    slot = lax.rem(tile, jnp.int32(2))
    total = bounds_ref[bounds_ref.shape[0] - 1]

    def count_of(tile):
        return jnp.clip(total - tile * tile_m, 0, tile_m)

    def fetch(tile):
        slot = lax.rem(tile, jnp.int32(2))

        def start(i):
            token = tokens_ref[tile * tile_m + i]
            pltpu.make_async_copy(
                x_ref.at[pl.ds(token, 1)],
                words_ref.at[slot, pl.ds(i, 1)],
                sem_ref.at[slot],
            ).start()

        _each(count_of(tile), start)

    @pl.when((step == 0) & grouped.fresh(tile_ref, visit))
    def _():
        h_ref[...] = jnp.zeros_like(h_ref)

        @pl.when(visit == 0)
        def _():
            fetch(tile)

        fetch(tile + 1)
        _wait(count_of(tile), words_ref.at[slot], sem_ref.at[slot])
        if paired:
            _spread(words_ref.at[slot], more[0])

    def operand(window):
        columns = pl.ds(pl.multiple_of(step * tile_k, _LANES), tile_k)
        columns = columns if steps > 1 else slice(None)
        return more[0][window, columns] if paired else words_ref[slot, window, columns]

    def chunk(window, own):
        a = operand(window)

        def product(w_ref):
            b = w_ref[...]
            if inner % tile_k:  # x has zeros there already
                b = grouped.cut(b, 0, inner - step * tile_k)
            return grouped.dot(a, b, (1, 0), widen)

        def finish(sums):
            h = activation(sums[0])
            h = h if gates == 1 else h * sums[1]
            h_ref[window] = grouped.merge(own, h, h_ref[window])

        sums = [product(w_ref) for w_ref in w_refs]
        if steps == 1:
            finish(sums)
            return
        for acc_ref, new in zip(accs, sums, strict=True):
            old = acc_ref[window]
            new = new + jnp.where(step == 0, 0.0, old)
            acc_ref[window] = jnp.where(own, new, old)

        @pl.when(step == steps - 1)
        def _():
            finish([acc_ref[window] for acc_ref in accs])

    start, end = grouped.rows_of(group_ref[visit], tile, bounds_ref, tile_m)
    grouped.windows(start, end, rows, tile_m, chunk)


def _down_kernel(
    group_ref,
    tile_ref,
    bounds_ref,
    choices_ref,
    h_ref,
    w_ref,
    gates_ref,
    z_ref,
    words_ref,
    sem_ref,
    *accs,
    experts,
    steps,
    inner,
    rows,
    widen,
):
    visit, visits, step = pl.program_id(1), pl.num_programs(1), pl.program_id(2)
    tile_m, tile_k = h_ref.shape
    wide = words_ref.shape[2]
    columns = pl.ds(pl.multiple_of(pl.program_id(0) * wide, _LANES), wide)
    slot = lax.rem(visit, jnp.int32(2))
    group, tile = group_ref[visit], tile_ref[visit]
    start, end = grouped.rows_of(group, tile, bounds_ref, tile_m)

    def chunk(window, own):
        a, b = h_ref[window], w_ref[...]
        if inner % tile_k:
            left = inner - step * tile_k
            a, b = grouped.cut(a, 1, left), grouped.cut(b, 0, left)
        new = grouped.dot(a, b, (1, 0), widen)
        if accs:
            [acc_ref] = accs
            old = acc_ref[window]
            new = new + jnp.where(step == 0, 0.0, old)
            new = jnp.where(own, new, old)
            acc_ref[window] = new

        # Rows of other groups are not sent from this buffer.
        @pl.when(step == steps - 1)
        def _():
            words_ref[slot, window] = _words(new * gates_ref[window], words_ref.dtype)

    @pl.when(group < experts)
    def _():
        grouped.windows(start, end, rows, tile_m, chunk)

    @pl.when((group == experts) & (step == steps - 1))
    def _():
        words_ref[slot] = jnp.zeros(words_ref.shape[1:], words_ref.dtype)

    def wait(visit):
        slot = lax.rem(visit, jnp.int32(2))
        start, end = grouped.rows_of(
            group_ref[visit], tile_ref[visit], bounds_ref, tile_m
        )
        _wait(end - start, words_ref.at[slot], sem_ref.at[slot])

    @pl.when(step == steps - 1)
    def _():
        def send(i):
            place = choices_ref[tile * tile_m + start + i]
            pltpu.make_async_copy(
                words_ref.at[slot, pl.ds(start + i, 1)],
                z_ref.at[pl.ds(place, 1), columns],
                sem_ref.at[slot],
            ).start()

        _each(end - start, send)

        # The next visit computes in the other buffer.
        @pl.when(visit > 0)
        def _():
            wait(visit - 1)

        @pl.when(visit == visits - 1)
        def _():
            wait(visit)


def _each(count, act):
    """Calls ``act(i)`` for i below ``count``, several to a step."""

    def several(step, carry):
        for i in range(_COPIES):
            act(step * _COPIES + i)
        return carry

    def one(i, carry):
        act(i)
        return carry

    whole = lax.div(count, jnp.int32(_COPIES))
    lax.fori_loop(0, whole, several, None)
    lax.fori_loop(whole * _COPIES, count, one, None)


def _wait(count, words_ref, sem_ref):
    """Waits for the copies of ``count`` rows to or from a buffer."""

    def some(size):
        def step(index, carry):
            rows = words_ref.at[pl.ds(0, size)]
            pltpu.make_async_copy(rows, rows, sem_ref).wait()
            return carry

        return step

    lax.fori_loop(0, lax.div(count, jnp.int32(_COPIES)), some(_COPIES), None)
    lax.fori_loop(0, lax.rem(count, jnp.int32(_COPIES)), some(1), None)


def _spread(words_ref, rows_ref):
    """Columns out of words: the lower halves, then the upper ones."""
    half = words_ref.shape[1]

    def step(index, carry):
        window = pl.ds(pl.multiple_of(index * _STEP, _STEP), _STEP)
        words = words_ref[window]
        for first, bits in (
            (0, lax.shift_left(words, jnp.int32(16))),
            (half, words & _UPPER),
        ):
            # The bits of float32 numbers, which bfloat16 has.
            part = pltpu.bitcast(bits, jnp.float32).astype(rows_ref.dtype)
            rows_ref[window, first : first + half] = part
        return carry

    steps = jnp.int32(words_ref.shape[0] // _STEP)
    lax.fori_loop(0, steps, step, None)


def _words(values, dtype):
    """float32 columns as words to be copied; as ``_pack`` does it."""
    if dtype == jnp.float32:
        return values
    bits = pltpu.bitcast(values.astype(jnp.bfloat16).astype(jnp.float32), jnp.int32)
    half = bits.shape[1] // 2
    return lax.shift_right_logical(bits[:, :half], jnp.int32(16)) | (
        bits[:, half:] & _UPPER
    )


def _pack(x, width):
    """Rows of ``width`` columns; of bfloat16 as words of columns j and j + half."""
    x = jnp.pad(x, ((0, 0), (0, width - x.shape[1])))
    if x.dtype == jnp.float32:
        return x
    pairs = jnp.stack([x[:, : width // 2], x[:, width // 2 :]], axis=2)
    return lax.bitcast_convert_type(pairs, jnp.int32)


def _unpack(words, wide, dtype):
    """The columns of words that ``_words`` made, tile by tile."""
    if words.dtype == dtype:
        return words
    pairs = lax.bitcast_convert_type(words.reshape(words.shape[0], -1, wide), dtype)
    return pairs.swapaxes(2, 3).reshape(words.shape[0], -1)
