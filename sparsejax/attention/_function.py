"""A mask given by a function of positions."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.attention import _predicates as pred
from sparsejax.attention._expressions import STATIC, Expression, expression
from sparsejax.attention._lowering import as_array, grid, host, value


@expression
class _Function(Expression):
    fn: Callable = dataclasses.field(metadata=STATIC)
    bounds: Callable | None = dataclasses.field(metadata=STATIC)
    batch: int = dataclasses.field(metadata=STATIC)
    heads: int = dataclasses.field(metadata=STATIC)

    @property
    def lowers(self):
        return False

    def _lower(self, at):
        b = np.arange(self.batch, dtype=np.int32)[:, None]
        h = np.arange(self.heads, dtype=np.int32)[None]
        queries, keys = value(at.queries), value(at.keys)
        call = pred.Call(self.fn, *(at.number(x, None) for x in (b, h, queries, keys)))

        def bounds(blocks):
            spread = lambda x: x if isinstance(x, int) else x[..., None, None]
            at_b, at_h, q, k = (spread(x) for x in (b, h, queries, keys))
            if self.bounds is None:
                return _by_tiles(self.fn, at, blocks.block_shape, at_b, at_h, q, k)
            ends = (*(e + q for e in blocks.i), *(e + k for e in blocks.j))
            return tuple(_boolean("bounds", x) for x in self.bounds(at_b, at_h, *ends))

        return at.given(call, bounds, None)


def from_function(
    fn: Callable,
    bounds: Callable | None = None,
    *,
    batch: int = 1,
    heads: int = 1,
) -> Expression:
    """A mask computed by any function.

    The kernels of the chips cannot ask it; ``implementation=None`` and "xla" can.

    Args:
      fn: ``fn(b, h, i, j) -> bool``, elementwise in integers that broadcast: numbers of
        the batch entry and the head, positions of query and key. It is static: what it
        closes over must not be traced, and another function compiles again.
      bounds: ``bounds(b, h, i_low, i_high, j_low, j_high) -> (some, every)``, which
        bounds the blocks of these positions (both ends belong): ``some`` may be False
        only where no element is allowed, ``every`` True only where all are. Default:
        ``fn`` is asked of all elements, one block at a time, in quadratic time and the
        memory of a block.
      batch: Entries of the batch, if ``fn`` depends on b; 1: it is always 0.
      heads: Heads, if ``fn`` depends on h.

    Returns:
      The expression.

    Raises:
      ValueError: ``batch`` or ``heads`` is below 1. On use: the function's result is
        not boolean.

    Example:
      >>> at = sparsejax.attention
      >>> at.from_function(lambda b, h, i, j: i + j < 3).to_mask(2, 3).astype(int)
      Array([[1, 1, 1],
             [1, 1, 0]], dtype=int32)
    """
    for name, size in (("batch", batch), ("heads", heads)):
        if size < 1:
            raise ValueError(f"{name}: got {size}, needed at least 1")
    return _Function(fn, bounds, batch, heads)


def _by_tiles(fn, at, block_shape, b, h, queries, keys) -> tuple[Any, Any]:
    """(some, every) of every block, by looking at each element of one at a time."""
    (bq, bk), (nq, nk) = block_shape, grid(at.t, at.s, block_shape)

    def tile(n):
        # Beyond the edge, the edge again: changes neither any nor all.
        i = jnp.minimum(n // nk * bq + jnp.arange(bq, dtype=jnp.int32), at.t - 1)
        j = jnp.minimum(n % nk * bk + jnp.arange(bk, dtype=jnp.int32), at.s - 1)
        allowed = _boolean("fn", fn(b, h, i[:, None] + queries, j + keys))
        whole = (1,) * (4 - allowed.ndim) + allowed.shape[:-2] + (bq, bk)
        allowed = jnp.broadcast_to(allowed, whole)
        return allowed.any((2, 3)), allowed.all((2, 3))

    found = jax.lax.map(tile, jnp.arange(nq * nk, dtype=jnp.int32))
    some, every = (
        host(jnp.moveaxis(x, 0, 2).reshape(*x.shape[1:], nq, nk)) for x in found
    )
    return some, every


def _boolean(name: str, found: Any) -> Any:
    found = as_array(name, found)
    if found.dtype != np.bool_:
        raise ValueError(f"{name}: got a result of {found.dtype}, needed bool")
    return host(found)
