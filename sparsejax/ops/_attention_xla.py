"""Attention over listed blocks as plain GEMMs in loops: the CPU product.

With query block i, key block j among the ``kv_cnt[i]`` that its list ``kv_idx[i]``
counts, and everything of one tile in cache:

    z[j]   = k[j] (scale q[i])^T, capped, plus the block's bias, -inf where not allowed
    p[j]   = exp(z[j] - lse)
    out^T  = sum over j of v[j]^T p[j]

A tile stands keys by queries, and sums queries last, so that the softmax goes down the
columns and products transpose at most what is narrow. One loop over the heads (those
that share keys and a list at once), in it one over query blocks, in it one over the
list, whose trip count is traced. The backward goes the same way, once: a tile is
computed again, and from it what it adds to dq, and in place to dk and dv. Tiles are cut
out of the arrays as they come, out of pages too, and are float32 from there on. Not
differentiable in reverse mode; it sits inside the operator's ``custom_vjp``.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sparsejax._dispatch import vary_alike
from sparsejax.ops._attention_operands import How, Operands, heads_alike
from sparsejax.ops._block_sparse_xla import (
    _bits,
    _cut,
    _dot,
    _int32,
    _put,
    _values,
)
from sparsejax.ops._checks import accumulator


def forward(how: How, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """(out [b, t, h, dv] of the query's dtype unless exact, lse [b, t, h])."""
    q, v = operands.query, operands.value
    (b, t, h, _), dv, wide = q.shape, v.shape[3], accumulator(q.dtype)
    dtype = wide if how.exact else q.dtype
    loop = _Loop.of(how, operands)
    queries = loop.rows_of(q)

    def query_block(place, carry):
        out, lse = carry
        q_i = (how.scale * queries(place)).T

        def key_block(r, state):
            top, total, so_far = state
            j = loop.listed(place, r)
            z, _ = loop.logits(place, r, j, q_i)
            new = jnp.maximum(top, z.max(0))
            p = jnp.exp(z - new)
            shrink = jnp.exp(top - new)
            part = _dot(loop.value(place, j), p, (0, 0))
            so_far = so_far * shrink + part
            return new, total * shrink + p.sum(0), so_far

        # Logits that are not allowed are -inf: exp takes them to 0 against any number.
        rows = q_i.shape[1]
        start = (
            jnp.full(rows, jnp.finfo(wide).min, wide),
            jnp.zeros(rows, wide),
            jnp.zeros((dv, rows), wide),
        )
        top, total, out_i = loop.over_list(key_block, place, loop.vary(start))
        some = total > 0
        total = jnp.where(some, total, 1)
        lse_i = jnp.where(some, top + jnp.log(total), -jnp.inf)
        out = loop.put(out, place, (out_i / total).T.astype(dtype))
        return out, loop.put(lse, place, lse_i)

    out = _bits(jnp.zeros((b, loop.t, h, dv), dtype))
    lse = jnp.zeros((b, loop.t, h), wide)
    out, lse = loop.over_query_blocks(query_block, loop.vary((out, lse)))
    return _values(out, dtype)[:, :t], lse[:, :t]


def gradients(how: How, operands: Operands, lse, dout, delta) -> tuple[Any, ...]:
    """(dq, dk, dv, dbias), each like its operand.

    Args:
      how: As for ``forward``.
      operands: As for ``forward``.
      lse: As ``forward`` gave it.
      dout: [b, t, h, dv], dtype of the query.
      delta: [b, t, h]; the sum over dv of dout out, less the gradient of lse.
    """
    q, k, v, bias, *_ = operands
    t, wide = q.shape[1], accumulator(q.dtype)
    loop = _Loop.of(how, operands)
    queries, grads = loop.rows_of(q), loop.rows_of(dout)
    # Against +inf every element of an empty row, and of one beyond the end, has p = 0.
    lse_of = loop.numbers_of(jnp.where(lse == -jnp.inf, jnp.inf, lse), jnp.inf)
    delta_of = loop.numbers_of(delta, 0)

    def query_block(place, carry):
        dq, *sums = carry
        q_i, dout_i = how.scale * queries(place), grads(place)
        q_t, dout_t = q_i.T, dout_i.T
        lse_i, delta_i = lse_of(place), delta_of(place)

        def key_block(r, state):
            dq_i, dk, dv, dbias = state
            j = loop.listed(place, r)
            z, slope = loop.logits(place, r, j, q_t)
            p = jnp.exp(z - lse_i)
            dz = p * (_dot(loop.value(place, j), dout_t, (1, 0)) - delta_i)
            if dbias is not None:
                dbias = loop.put_sums(dbias, place, r, dz)
            dz = dz * slope
            dk = loop.add(dk, place, j, _dot(dz, q_i, (1, 0)))
            dv = loop.add(dv, place, j, _dot(p, dout_i, (1, 0)))
            return dq_i + _dot(loop.key(place, j), dz, (0, 0)), dk, dv, dbias

        (dq_i,) = loop.vary((jnp.zeros(q_t.shape, wide),))
        state = dq_i, *sums
        dq_i, *sums = loop.over_list(key_block, place, state)
        return loop.put(dq, place, (how.scale * dq_i.T).astype(q.dtype)), *sums

    zeros = lambda a: None if a is None else jnp.zeros(a.shape, wide)
    dq = _bits(jnp.zeros((q.shape[0], loop.t, *q.shape[2:]), q.dtype))
    carry = dq, zeros(loop.keys), zeros(loop.values), zeros(bias)
    dq, dk, dv, dbias = loop.over_query_blocks(query_block, loop.vary(carry))
    s = k.shape[1]
    dk, dv = dk[:, :s].astype(k.dtype), dv[:, :s].astype(v.dtype)
    dbias = None if bias is None else dbias.astype(bias.dtype)
    return _values(dq, q.dtype)[:, :t], dk, dv, dbias


@dataclasses.dataclass(frozen=True)
class _Loop:
    """The loops, and how their tiles are cut out of the arrays.

    A place is (batch member, first query head, query block).

    Attributes:
      how: What is fixed.
      operands: As given but for the lengths, which whole blocks fill.
      heads: Query heads that go together.
      block_shape: (bq, bk), no longer than the sequences.
      keys: As ``operands.key``, of whole blocks; as ``_bits`` makes them.
      values: Likewise.
      ragged: Whether the last block of keys reaches over the end.
    """

    how: How
    operands: Operands
    heads: int
    block_shape: tuple[int, int]
    keys: jax.Array
    values: jax.Array
    ragged: bool

    @classmethod
    def of(cls, how, operands):
        (bq, bk), (t, s), (_, nk) = how.block_shape, how.lengths, how.blocks
        bq, paged = min(bq, t), operands.page_table is not None
        bk = bk if paged else min(bk, s)
        whole = lambda a: a if paged else _pad(a, 1, nk * bk)
        where = operands.where
        where = where._replace(
            rows=tuple(_pad(a, 2, how.blocks[0] * bq) for a in where.rows),
            cols=tuple(_pad(a, 2, nk * bk) for a in where.cols),
            dense=tuple(
                _pad(_pad(a, 2, how.blocks[0] * bq), 3, nk * bk) for a in where.dense
            ),
        )
        return cls(
            how,
            operands._replace(where=where),
            heads_alike(operands),
            (bq, bk),
            _bits(whole(operands.key)),
            _bits(whole(operands.value)),
            s != nk * bk,
        )

    @property
    def t(self):
        return self.how.blocks[0] * self.block_shape[0]

    def vary(self, carry):
        """Marked as varying over the mesh axes that any operand varies over."""
        leaves, tree = jax.tree.flatten(carry)
        others = jax.tree.leaves(self.operands)
        return jax.tree.unflatten(tree, vary_alike(*leaves, *others)[: len(leaves)])

    def over_query_blocks(self, body, carry):
        """Folds ``body(place, carry)`` over all heads and query blocks."""
        b, _, h, _ = self.operands.query.shape
        groups = h // self.heads

        def unit(u, carry):
            of, head = u // groups, u % groups * self.heads
            step = lambda i, carry: body((of, head, i), carry)
            return _fold(self.how.blocks[0], step, carry)

        return _fold(b * groups, unit, carry)

    def over_list(self, body, place, carry):
        """Folds ``body(r, carry)`` over the entries of a query block's list."""
        count = self.operands.where.kv_cnt
        return _fold(count[*self.at(count, place), place[2]], body, carry)

    # --- Lists ---

    def at(self, a, place):
        """The batch member and head that a [b or 1, heads, ...] holds for the place."""
        of, head, _ = place
        h = self.operands.query.shape[2]
        return of if a.shape[0] > 1 else 0, head // (h // a.shape[1])

    def listed(self, place, r):
        idx = self.operands.where.kv_idx
        return idx[*self.at(idx, place), place[2], r]

    # --- Tiles: rows are queries of all heads that go together, or keys ---

    def rows_of(self, a):
        """A function of a place: a tile [bq * heads, d] of a [b, t, h, d]."""
        (bq, _), bits = self.block_shape, _bits(_pad(a, 1, self.t))

        def rows(place):
            of, head, i = place
            shape = (1, bq, self.heads, a.shape[3])
            tile = _cut(bits, (of, i * bq, head, 0), shape, a.dtype)
            return self.wide(tile).reshape(bq * self.heads, a.shape[3])

        return rows

    def numbers_of(self, a, beyond):
        """The same of numbers [b, t, h], ``beyond`` after the end."""
        bq, a = self.block_shape[0], _pad(a, 1, self.t, beyond)

        def numbers(place):
            of, head, i = place
            tile = _cut(a, (of, i * bq, head), (1, bq, self.heads), a.dtype)
            return tile.reshape(bq * self.heads)

        return numbers

    def put(self, bits, place, tile):
        """Overwrites a tile of queries."""
        of, head, i = place
        shape = (1, self.block_shape[0], self.heads, *bits.shape[3:])
        start = (of, i * self.block_shape[0], head, 0)[: bits.ndim]
        return _put(bits, tile.reshape(shape), start)

    def key(self, place, j):
        return self._of_keys(self.keys, place, j)

    def value(self, place, j):
        return self._of_keys(self.values, place, j)

    def _of_keys(self, a, place, j):
        start, shape = self._where(a, place, j)
        tile = _cut(a, start, shape, self.operands.query.dtype)
        return self.wide(tile).reshape(shape[1], -1)

    def add(self, a, place, j, part):
        """Adds to a tile of keys in place."""
        start, shape = self._where(a, place, j)
        return _put(a, _cut(a, start, shape, a.dtype) + part.reshape(shape), start)

    def _where(self, a, place, j):
        (of, head, _), (_, bk) = place, self.block_shape
        head = head // (self.operands.query.shape[2] // a.shape[2])
        shape = (1, bk, 1, a.shape[3])
        if self.operands.page_table is None:
            return (of, j * bk, head, 0), shape
        return (self.operands.page_table[of, j], 0, head, 0), shape

    def wide(self, a):
        return a.astype(accumulator(a.dtype))

    # --- Logits ---

    def logits(self, place, r, j, q_t):
        """z [bk, rows], and its derivative by the product below the cap."""
        z, slope, cap = _dot(self.key(place, j), q_t, (1, 0)), 1, self.how.soft_cap
        if cap is not None:
            bent = jnp.tanh(z / cap)
            z, slope = cap * bent, 1 - jnp.square(bent)
        bias = self.operands.bias
        if bias is not None:
            (of, head, i), (bq, _) = place, self.block_shape
            own = _cut(bias, (of, head, i, r), (1, self.heads, 1, 1), bias.dtype)
            z = z + jnp.tile(self.wide(own.reshape(self.heads)), bq)
        allowed = self.allowed(place, r, j)
        return z if allowed is None else jnp.where(allowed, z, -jnp.inf), slope

    def allowed(self, place, r, j):
        """bool [bk, rows], or None: all."""
        (*_, i), (bq, bk) = place, self.block_shape
        keys = j * bk + jnp.arange(bk, dtype=jnp.int32)[:, None]
        inside = keys < self.how.lengths[1]
        if self.how.predicate is None:
            return inside if self.ragged else None
        full = self.operands.where.kv_full
        full = full[*self.at(full, place), i, r]

        def asked():
            where = self.operands.where
            queries = i * bq + jnp.arange(bq, dtype=jnp.int32)
            spread = lambda a: jnp.repeat(a, self.heads)[None]
            part = lambda a, start, size: lax.dynamic_slice(
                a, _int32([*self.at(a, place), start]), (1, 1, size)
            )[0, 0]
            tile = lambda a: (
                lax.dynamic_slice(
                    a, _int32([*self.at(a, place), i * bq, j * bk]), (1, 1, bq, bk)
                )[0, 0].T
            )
            yes = self.how.predicate(
                spread(queries),
                keys,
                tuple(spread(part(a, i * bq, bq)) for a in where.rows),
                tuple(part(a, j * bk, bk)[:, None] for a in where.cols),
                tuple(a[*self.at(a, place)] for a in where.scalars),
                tuple(jnp.repeat(tile(a), self.heads, 1) for a in where.dense),
            )
            return jnp.broadcast_to(yes, (bk, bq * self.heads))

        yes = full | asked()
        return yes & inside if self.ragged else yes

    def put_sums(self, dbias, place, r, dz):
        of, head, i = place
        sums = dz.sum(0).reshape(-1, self.heads).sum(0).reshape(1, self.heads, 1, 1)
        return _put(dbias, sums, (of, head, i, r))


def _fold(trips, body, carry):
    """``fori_loop`` from 0, of one type also where 64-bit types are on."""
    zero = jnp.int32(0)
    return lax.fori_loop(zero, lax.convert_element_type(trips, jnp.int32), body, carry)


def _pad(a, axis, size, value=0):
    widths = [(0, 0)] * a.ndim
    widths[axis] = (0, size - a.shape[axis])
    return jnp.pad(a, widths, constant_values=value) if widths[axis][1] else a
