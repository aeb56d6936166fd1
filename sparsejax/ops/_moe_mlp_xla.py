"""moe_mlp as plain GEMMs in one loop: the CPU product, right everywhere.

With choice i, of token t = tokens[i], among the ``sizes[e]`` choices of expert e:

    h[i] = hidden(x[t] w[e], ...)          activation(a), or activation(gate) * a
    y[t] = sum over i of (weights[i] h[i]) w_out[e]

One loop over the experts, in it one over tiles of an expert's choices, as
``_grouped_matmul_xla`` has them: a tile's rows are gathered, go through all products
while they are in cache, and are added to y. Nothing as long as the list of choices and
as wide as x or the hidden layer exists; nor anything that grows with the number of
experts but the weights' gradients, which are summed in place. The backward computes the
hidden layer again: on a CPU that takes no longer than writing and reading it. Not
differentiable in reverse mode; it sits inside the operator's ``custom_vjp``.
"""

import jax
import jax.numpy as jnp

from sparsejax._dispatch import vary_alike
from sparsejax.ops._block_sparse_xla import _bits, _cut, _dot, _put, _values
from sparsejax.ops._checks import accumulator
from sparsejax.ops._grouped_matmul_xla import (
    add,
    close_sums,
    open_sums,
    over_groups,
    over_tiles,
    tile_heights,
)


def forward(x, ws, w_out, weights, tokens, sizes, *, hidden):
    """Computes y.

    Args:
      x: [t, d], of the dtype that is computed in.
      ws: What ``hidden`` takes products with, each [e, d, f].
      w_out: [e, f, d].
      weights: float32 [c], of the choices sorted by expert.
      tokens: int32 [c], in range.
      sizes: int32 [e]; choices beyond their sum are nobody's.
      hidden: Elementwise function of ``len(ws)`` arrays, differentiable.

    Returns:
      y [t, d], dtype of x.
    """
    wide = accumulator(x.dtype)
    one, gather = _one_of((*ws, w_out), x.dtype), _gather(x, tokens)
    part = _part(weights.astype(wide))

    def expert(e, start, end, y):
        *ws_e, w_out_e = one(e)

        def tile(row, mine, y):
            t, x_i = gather(row, mine)
            h_i = hidden(*(_dot(x_i, w, (1, 0)) for w in ws_e)) * part(row, mine)
            y_i = _dot(h_i.astype(x.dtype), w_out_e, (1, 0))
            return y.at[t].add(jnp.where(mine, y_i, 0), mode="promise_in_bounds")

        return over_tiles(tile, tokens.size, heights, start, end, y)

    heights = _heights(tokens, w_out)
    y = jnp.zeros(x.shape, wide)
    y = vary_alike(y, x, *ws, w_out, weights, tokens, sizes)[0]
    return over_groups(expert, sizes, y).astype(x.dtype)


def gradients(x, ws, w_out, weights, tokens, sizes, dy, *, hidden):
    """Computes the gradients of ``forward``.

    Args:
      x: As all down to sizes, for ``forward``.
      ws: See x.
      w_out: See x.
      weights: See x.
      tokens: See x.
      sizes: See x.
      dy: [t, d], dtype of x.
      hidden: As for ``forward``.

    Returns:
      dx, dws, dw_out and dweights, of their operands' dtypes.
    """
    wide, every = accumulator(x.dtype), (*ws, w_out)
    one = _one_of(every, x.dtype)
    gather, gather_dy = _gather(x, tokens), _gather(dy, tokens)
    part = _part(weights.astype(wide))

    def expert(e, start, end, carry):
        *ws_e, w_out_e = one(e)
        dx, dparts, dws = carry
        opened = [
            open_sums(dw, e, w.dtype, wide) for dw, w in zip(dws, every, strict=True)
        ]

        def tile(row, mine, carry):
            dx, dparts, sums = carry
            own = lambda a: jnp.where(mine, a, 0).astype(x.dtype)
            t, x_i = gather(row, mine)
            _, dy_i = gather_dy(row, mine)
            part_i = part(row, mine)
            h_i, vjp = jax.vjp(hidden, *(_dot(x_i, w, (1, 0)) for w in ws_e))
            # d weights and d h, from what both hold: dy w_out^T.
            back = _dot(dy_i, w_out_e, (1, 1))
            dparts = _put_own(dparts, mine[:, 0], jnp.sum(back * h_i, 1), row)
            das = [own(da) for da in vjp(back * part_i)]
            dx_i = sum(_dot(da, w, (1, 1)) for da, w in zip(das, ws_e, strict=True))
            dx = dx.at[t].add(jnp.where(mine, dx_i, 0), mode="promise_in_bounds")
            factors = [*((x_i, da) for da in das), (own(h_i * part_i), dy_i)]
            sums = [
                add(sum_, at, _dot(a, b, (0, 0)))
                for sum_, (_, at), (a, b) in zip(sums, opened, factors, strict=True)
            ]
            return dx, dparts, sums

        carry = dx, dparts, [sums for sums, _ in opened]
        carry = over_tiles(tile, tokens.size, heights, start, end, carry)
        dx, dparts, sums = carry
        dws = [
            close_sums(dw, e, w.dtype, sum_)
            for dw, w, sum_ in zip(dws, every, sums, strict=True)
        ]
        return dx, dparts, dws

    heights = _heights(tokens, w_out)
    zeros = (
        jnp.zeros(x.shape, wide),
        jnp.zeros(weights.shape, wide),
        [_bits(jnp.zeros(w.shape, w.dtype)) for w in every],
    )
    alike = lambda a: vary_alike(a, x, *every, weights, tokens, sizes, dy)[0]
    dx, dparts, dws = over_groups(expert, sizes, jax.tree.map(alike, zeros))
    *dws, dw_out = (_values(dw, w.dtype) for dw, w in zip(dws, every, strict=True))
    return dx.astype(x.dtype), dws, dw_out, dparts.astype(weights.dtype)


def _heights(tokens, w_out):
    experts, f, _ = w_out.shape
    return tile_heights(tokens.size, experts, f)


def _one_of(ws, dtype):
    """Each weight of one expert, of the dtype that is computed in."""
    bits = [_bits(w) for w in ws]

    def one(e):
        return [
            _cut(b, (e, 0, 0), (1, *w.shape[1:]), w.dtype)[0].astype(dtype)
            for b, w in zip(bits, ws, strict=True)
        ]

    return one


def _gather(x, tokens):
    """Tokens of a tile, and their rows of x; zeros where the choice is another's."""
    bits = _bits(x)

    def tile(row, mine):
        t = _cut(tokens, (row,), (mine.shape[0],), tokens.dtype)
        rows = _values(bits.at[t].get(mode="promise_in_bounds"), x.dtype)
        return t, jnp.where(mine, rows, 0).astype(x.dtype)

    return tile


def _part(weights):
    """Weights of a tile's choices, as a column; 0 where the choice is another's."""

    def tile(row, mine):
        w = _cut(weights, (row,), (mine.shape[0],), weights.dtype)
        return jnp.where(mine, w[:, None], 0)

    return tile


def _put_own(a, mine, part, row):
    """Overwrites the places from row on that are a tile's own."""
    other = _cut(a, (row,), part.shape, a.dtype)
    return _put(a, jnp.where(mine, part, other), (row,))
