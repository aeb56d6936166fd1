"""What products with a sparse weight have in common: derivatives and batching.

A weight w is zero outside some places ("where": block slots, N:M places, groups of
rows). Its three products are each other's derivatives, so reverse mode works to any
order and every derivative is computed as the products are:

    y = x w          product                 dx = dy w^T     transposed product
    dvalues = (x^T dy) at the places         sampled product
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.custom_batching import custom_vmap

PRODUCT, TRANSPOSED, SAMPLED = "product", "transposed", "sampled"


def closed_products(
    call: Callable[..., jax.Array],
) -> tuple[Callable[..., jax.Array], ...]:
    """Three products closed under differentiation.

    Args:
      call: ``call(static, op, a, b, where)`` computes the product ``op``, multiplied in
        ``static.compute``; a sampled product comes out in ``static.out``. ``static`` is
        a frozen dataclass with these fields, and whatever else ``call`` needs.

    Returns:
      ``product(static, x, values, where)``, ``transposed(static, y, values, where)``
      and ``sampled(static, x, y, where)``. Gradients have their operands' dtypes.
    """

    def rule(op):
        @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
        def fn(static, a, b, where):
            return call(static, op, a, b, where)

        return fn

    product, transposed, sampled = rule(PRODUCT), rule(TRANSPOSED), rule(SAMPLED)

    def keep(fn):
        """Forward rule: the operands are the residuals."""
        return lambda static, a, b, where: (fn(static, a, b, where), (a, b, where))

    def sampled_as(static, x, y, values, where):
        return sampled(dataclasses.replace(static, out=values.dtype), x, y, where)

    def product_bwd(static, residuals, dy):
        x, values, where = residuals
        dx = transposed(static, dy, values, where).astype(x.dtype)
        return dx, sampled_as(static, x, dy, values, where), None

    def transposed_bwd(static, residuals, dx):
        y, values, where = residuals
        dy = product(static, dx, values, where).astype(y.dtype)
        return dy, sampled_as(static, dx, y, values, where), None

    def sampled_bwd(static, residuals, dvalues):
        x, y, where = residuals
        dx = transposed(static, y, dvalues, where).astype(x.dtype)
        dy = product(static, x, dvalues, where).astype(y.dtype)
        return dx, dy, None

    product.defvjp(keep(product), product_bwd)
    transposed.defvjp(keep(transposed), transposed_bwd)
    sampled.defvjp(keep(sampled), sampled_bwd)
    return product, transposed, sampled


def batched_by_loop(
    fn: Callable[..., jax.Array], *, more_rows: bool
) -> Callable[..., jax.Array]:
    """``fn(x, *rest)`` whose batch members are computed in turn.

    A kernel's scalar-prefetched index lists cannot be batched, and a padded batch of
    loops would cost its longest member.

    Args:
      fn: Of arrays (or pytrees of them); x is ``[m, k]``.
      more_rows: Whether a batch of x alone is just more rows of x.
    """
    batching = custom_vmap(fn)

    @batching.def_vmap
    def _(size, batched, x, *rest):
        if more_rows and batched[0] and not any(jax.tree.leaves(batched[1:])):
            y = batching(x.reshape(-1, x.shape[-1]), *rest)
            return y.reshape(size, x.shape[1], -1), True
        out = in_turn(batching, batched, (x, *rest))
        return out, jax.tree.map(lambda _: True, out)

    return batching


def in_turn(fn: Callable[..., Any], batched: Any, args: Any) -> Any:
    """``fn(*args)`` of one member of a batch after the other, by ``custom_vmap``."""
    leaves, tree = jax.tree.flatten(args)
    batched = jax.tree.leaves(batched)
    own = [leaf for leaf, is_batched in zip(leaves, batched, strict=True) if is_batched]

    def one(own):
        own = iter(own)
        member = [
            next(own) if is_batched else leaf
            for leaf, is_batched in zip(leaves, batched, strict=True)
        ]
        return fn(*jax.tree.unflatten(tree, member))

    return jax.lax.map(one, own)
