"""Products with Kronecker-sparse factors by XLA: the CPU product, right everywhere.

    product   y[i, o, k] = sum_j x[i, j, k] factor[i, k, j, o]       factor after factor
    sampled   factor[i, k, j, o] = sum of x[i, j, k] y[i, o, k] over the rows

On a CPU, a product goes block by block, the blocks outermost. One of several factors
and many rows has a product of its own for each block, if there are few of them, which
the threads share; of more and small blocks, a loop over tiles of rows that stay in
cache from x to y. In both, columns are arranged so that what is between two factors
moves in runs. Bfloat16 and float16 become float32 there. Elsewhere, one einsum per
factor. Not differentiable in reverse mode; it sits inside the operators'
``custom_vjp``.
"""

import itertools

import jax.numpy as jnp
import numpy as np
from jax import lax

from sparsejax._dispatch import vary_alike
from sparsejax.ops._checks import accumulator
from sparsejax.ops._merged_factors import prefers_dense
from sparsejax.structured import Pattern

# Entries of a row times rows of a tile: x's, what is between and y's are in L2 and L3.
_TILE = 208 * 1024
# Rows from which, and sides of blocks up to which, that is the quicker form.
_MANY, _SMALL = 1024, 64
# Tiles that a step of the loop has at work: XLA runs what does not depend on each other
# at the same time, where a product of small blocks is one thread's.
_AT_WORK = 4
# Blocks of a factor that each have a product. XLA gives other threads a part of what is
# ready from nine pieces on, and compiles every piece.
_FEW = range(8, 17)
# Entries of x or y up to which all rows go at once, and those of a slab of more: x, y
# and what is between are in L3.
_WHOLE, _SLAB = 2**22, 2**21
# Arrays that one loop reads side by side: of a power of two in size, more than a cache
# set has ways push each other out.
_SIDE_BY_SIDE, _STACKED = 8, 4


def product(x, *factors):
    """Multiplies every row by the factors, the first first.

    Args:
      x: [m, a * c * d], as the first factor takes.
      *factors: Each [a, d, c, b], of the dtype of x.

    Returns:
      y [m, a * b * d], as the last factor gives; dtype of x.
    """
    return lax.platform_dependent(x, *factors, cpu=_on_cpu, default=_einsum_by_einsum)


def sampled(x, y, *, pattern, dtype):
    """Computes the sum over the rows of x y at the places of a factor.

    Args:
      x: [m, a * c * d].
      y: [m, a * b * d], dtype of x.
      pattern: (a, b, c, d).
      dtype: That of the result.

    Returns:
      [a, d, c, b].
    """
    a, b, c, d = pattern
    wide = accumulator(x.dtype)

    def summed(x, y):
        x, y = x.reshape(-1, a, c, d), y.reshape(-1, a, b, d)
        return jnp.einsum("mijk,miok->ikjo", x, y, preferred_element_type=wide)

    on_cpu = lambda x, y: summed(x.astype(wide), y.astype(wide))
    return lax.platform_dependent(x, y, cpu=on_cpu, default=summed).astype(dtype)


def _einsum_by_einsum(x, *factors):
    for factor in factors:
        a, d, c, b = factor.shape
        x = jnp.einsum(
            "mijk,ikjo->miok",
            x.reshape(-1, a, c, d),
            factor,
            preferred_element_type=accumulator(x.dtype),
        )
        x = x.reshape(-1, a * b * d).astype(factor.dtype)
    return x


def _on_cpu(x, *factors):
    patterns = [Pattern.of(factor) for factor in factors]
    if prefers_dense(patterns, x.shape[0]):
        wide = accumulator(x.dtype)
        eye = jnp.eye(x.shape[1], dtype=wide)
        w = _einsum_by_einsum(eye, *(factor.astype(wide) for factor in factors))
        return (x.astype(wide) @ w).astype(x.dtype)
    if len(factors) > 1 and x.shape[0] >= _MANY:
        if all(p.a * p.d in _FEW for p in patterns):
            return _over_slabs(x, *factors)
        if max(max(p.b, p.c) for p in patterns) <= _SMALL:
            return _over_tiles(x, *factors)
    return _block_by_block(x, *factors)


def _block_by_block(x, *factors):
    """With the blocks outermost, whole rows: what XLA's CPU library takes as it is."""
    wide, dtype = accumulator(x.dtype), x.dtype
    for factor in factors:
        a, d, c, b = factor.shape
        x = x.reshape(-1, a, c, d).transpose(1, 3, 0, 2).astype(wide)
        y = lax.dot_general(x, factor.astype(wide), (((3,), (2,)), ((0, 1), (0, 1))))
        x = y.transpose(2, 0, 3, 1).reshape(-1, a * b * d)
    return x.astype(dtype)


def _over_slabs(x, *factors):
    """Each block by itself, as many rows at a time as stay in the last cache."""
    m, entries = len(x), len(x) * max(x.shape[1], Pattern.of(factors[-1]).out_size)
    if entries <= _WHOLE:
        return _apart(x, *factors)
    rows = -(-m // -(-entries // _SLAB))
    return _by_rows(_apart, x, factors, rows, at_work=1)


def _apart(x, *factors):
    """A product for each block of each factor."""
    wide, dtype = accumulator(x.dtype), x.dtype
    a, d, c, _ = factors[0].shape
    x = x.reshape(-1, a, c, d)
    parts = [x[:, i, :, k].astype(wide) for i in range(a) for k in range(d)]
    blocks = [f.astype(wide).reshape(-1, *f.shape[2:]) for f in factors]
    given = [_given(one, after) for one, after in itertools.pairwise(factors)]
    for n, (columns, rows, _) in enumerate(given):
        blocks[n] = _arranged(blocks[n], columns, 2)
        blocks[n + 1] = _arranged(blocks[n + 1], rows, 1)
    for n, own in enumerate(blocks):
        if n:
            parts = _passed_on(parts, given[n - 1][2])
        parts = [part @ block for part, block in zip(parts, own, strict=True)]
    a, d, _, _ = factors[-1].shape
    copies = [_interleaved(parts[i : i + d]) for i in range(0, a * d, d)]
    return jnp.concatenate(copies, axis=1).astype(dtype)


def _given(one, after):
    """What each block of a factor gives to each of the next.

    Returns:
      columns [a * d, b]: Those of each block, by the block that takes them.
      rows [i * j, c]: Those of each of the next, by the block that gives them.
      sizes [a * d, i * j]: How many.
    """
    (a, d, _, b), (i, j, c, _) = one.shape, after.shape
    place = np.arange(a * b * d)
    giver, column = place // (b * d) * d + place % d, place // d % b
    taker, row = place // (c * j) * j + place % j, place // j % c
    sizes = np.zeros((a * d, i * j), int)
    np.add.at(sizes, (giver, taker), 1)
    columns = column[np.lexsort((place, taker, giver))].reshape(-1, b)
    return columns, row[np.lexsort((place, giver, taker))].reshape(-1, c), sizes


def _arranged(blocks, order, axis):
    """Each block's columns (axis 2) or rows (1) in its own order."""
    if (np.diff(order) == 1).all():
        return blocks
    order = np.expand_dims(order, 3 - axis)
    return jnp.take_along_axis(blocks, order, axis, mode="promise_in_bounds")


def _passed_on(parts, sizes):
    """Runs of columns of what the blocks gave, side by side for each that takes."""
    if len(parts) > _SIDE_BY_SIDE and len(parts) % 2 == 0 and np.ptp(sizes) == 0:
        # Runs twice as long, of half as many arrays.
        runs = [part.reshape(len(part), sizes.shape[1], -1) for part in parts]
        pairs = zip(runs[::2], runs[1::2], strict=True)
        pairs = lax.optimization_barrier([jnp.concatenate(p, axis=2) for p in pairs])
        parts = [pair.reshape(len(pair), -1) for pair in pairs]
        sizes = 2 * sizes[::2]
    cuts = np.cumsum(sizes, axis=1)[:, :-1]
    runs = [jnp.split(part, cut, axis=1) for part, cut in zip(parts, cuts, strict=True)]
    return [jnp.concatenate(own, axis=1) for own in zip(*runs, strict=True)]


def _interleaved(parts):
    """[rows, b * d] of d arrays [rows, b]."""
    if len(parts) == 1:
        return parts[0]
    cuts = range(0, len(parts), _STACKED)
    stacks = [jnp.stack(parts[cut : cut + _STACKED], axis=2) for cut in cuts]
    return jnp.concatenate(stacks, axis=2).reshape(len(parts[0]), -1)


def _over_tiles(x, *factors):
    """Block by block too, but a tile of rows at a time through all factors."""
    sizes = [Pattern.of(factor).out_size for factor in factors]
    rows = tile_rows(*x.shape, *sizes)
    pairs = itertools.pairwise(factors)
    factors = *(_in_runs(one, after) for one, after in pairs), factors[-1]
    return _by_rows(_tile, x, factors, rows, at_work=_AT_WORK)


def _by_rows(product, x, factors, rows, *, at_work):
    """A product by a loop over so many rows at a time, ``at_work`` of these a step."""
    (m, n), width = x.shape, Pattern.of(factors[-1]).out_size
    # Before the loop: XLA writes a slice of bfloat16 by converting the whole array.
    wide, dtype = accumulator(x.dtype), x.dtype
    x, *factors = (array.astype(wide) for array in (x, *factors))

    def step(i, y):
        # The last rows overlap those before them and write the same values again.
        starts = [(i * at_work + j) * rows for j in range(at_work)]
        starts = [jnp.minimum(start, m - rows) for start in starts]
        cuts = [lax.dynamic_slice(x, (start, 0), (rows, n)) for start in starts]
        pieces = [product(cut, *factors) for cut in cuts]
        for start, piece in zip(starts, pieces, strict=True):
            y = lax.dynamic_update_slice(y, piece, (start, 0))
        return y

    y = vary_alike(jnp.zeros((m, width), wide), x)[0]
    y = lax.fori_loop(0, -(-m // (rows * at_work)), step, y)
    return y.astype(dtype)


def tile_rows(m: int, *widths: int) -> int:
    """Tiles of a step share the rows; an odd number puts columns in many cache sets."""
    steps = -(-m * max(widths) // (_TILE * _AT_WORK))
    return min(m, -(-m // (steps * _AT_WORK)) | 1)


def _tile(x, *factors):
    """All factors' product of a few rows, the blocks outermost on the way.

    The columns of all factors but the last are those of ``_in_runs``.
    """
    a, d, c, _ = factors[0].shape
    y = _blocks(x.reshape(-1, a, c, d).transpose(1, 3, 0, 2), factors[0])
    for one, after in itertools.pairwise(factors):
        y = _blocks(_regrouped(y, one, after), after)
    return y.transpose(2, 0, 3, 1).reshape(x.shape[0], -1)


def _blocks(x, factor):
    """[a, d, rows, b]: each block's product, of x [a, d, rows, c]."""
    return lax.dot_general(x, factor, (((3,), (2,)), ((0, 1), (0, 1))))


def _regrouped(y, one, after):
    """What a factor gave, [a, d, rows, b], as the next takes it, [i, j, rows, c]."""
    (a, d, _, b), (i, j, c, _) = one.shape, after.shape
    if runs := _runs(one, after):
        y = y.reshape(i, a // i, d, -1, runs, b // runs).transpose(0, 4, 2, 3, 1, 5)
        return y.reshape(i, j, -1, c)
    return y.transpose(2, 0, 3, 1).reshape(-1, i, c, j).transpose(1, 3, 0, 2)


def _in_runs(one, after):
    """A factor, those columns of a block side by side that go to one block of the next.

    What is between the two products then moves in runs, not an entry at a time.
    """
    a, d, c, b = one.shape
    runs = _runs(one, after) or 1
    return one.reshape(a, d, c, b // runs, runs).swapaxes(3, 4).reshape(one.shape)


def _runs(one, after):
    """How many blocks of the next factor a block's columns go to; 0: in no such order.

    Entries (a, b, d) of a row, a = (i, g) and b = (h, run), are to be the next factor's
    (i, c, j) with c = (g, h) and j = (run, d).
    """
    (a, d, _, b), (i, j, _, _) = one.shape, after.shape
    fits = a % i == 0 and j % d == 0 and b % (j // d) == 0
    return j // d if fits else 0
