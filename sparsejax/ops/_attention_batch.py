"""Attention of more batch members: by ``jax.vmap``, and over a mesh's explicit axes."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.sharding import PartitionSpec as P

from sparsejax.ops._attention_operands import How, Operands


def in_one_batch(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn(operands, *others)`` whose batch under vmap is just more batch members.

    ``others`` and all results have the batch in front, as the operands have.
    """
    batching = custom_vmap(fn)

    @batching.def_vmap
    def _(size, batched, operands, *others):
        of, *of_others = batched
        # Gradients of pages that members share would be summed over them: each gets
        # its own.
        own = bool(others) or of.key or of.value
        paged = operands.page_table is not None

        def every(a, is_batched):
            """[size, b, ...] in one axis."""
            if not is_batched:
                a = jnp.broadcast_to(a, (size, *a.shape))
            return a.reshape(size * a.shape[1], *a.shape[2:])

        def shared(a, is_batched):
            """The same of what may be one for all."""
            if not is_batched and a.shape[0] == 1:
                return a
            a = a if is_batched else jnp.broadcast_to(a, (size, *a.shape))
            shape = (size, max(a.shape[1], members), *a.shape[2:])
            return jnp.broadcast_to(a, shape).reshape(-1, *a.shape[2:])

        members = operands.query.shape[1 if of.query else 0]
        k, v = operands.key, operands.value
        if own or not paged:
            k, v = every(k, of.key), every(v, of.value)
        flat = Operands(
            every(operands.query, of.query),
            k,
            v,
            jax.tree.map(every, operands.bias, of.bias),
            jax.tree.map(shared, operands.where, of.where),
            jax.tree.map(every, operands.page_table, of.page_table),
        )
        if own and paged:
            pages = operands.key.shape[1 if of.key else 0]
            first = jnp.arange(size, dtype=jnp.int32) * pages
            table = flat.page_table + jnp.repeat(first, members)[:, None]
            flat = flat._replace(page_table=table)
        out = batching(flat, *map(every, others, of_others))
        split = lambda a: a.reshape(size, -1, *a.shape[1:])
        return jax.tree.map(split, out), jax.tree.map(lambda _: True, out)

    return batching


def over_explicit_axes(
    fn: Callable[..., Any], how: How, operands: Operands
) -> tuple[jax.Array, jax.Array]:
    """``fn(how, operands)`` under shard_map over a mesh's explicit axes, if any.

    A Mosaic kernel cannot be partitioned by XLA. The cut of the query's batch and heads
    is kept, if keys and lists can be cut likewise; sequences are brought together.
    """
    mesh = jax.sharding.get_abstract_mesh()
    explicit = () if mesh.empty else mesh.explicit_axes
    if not explicit:
        return fn(how, operands)
    batch, _, heads, _ = tuple(jax.typeof(operands.query).sharding.spec)
    parts = math.prod(mesh.shape[name] for name in axis_names(heads))
    per_head = [operands.key.shape[2]]
    per_head += [n for a in jax.tree.leaves(operands.where) if (n := a.shape[1]) > 1]
    if any(n % parts for n in per_head):
        heads = None
    paged = operands.page_table is not None
    whole = P(None if paged else batch, None, heads)

    def listed(a):
        return P(batch if a.shape[0] > 1 else None, heads if a.shape[1] > 1 else None)

    specs = Operands(
        P(batch, None, heads),
        whole,
        whole,
        None if operands.bias is None else P(batch, heads),
        jax.tree.map(listed, operands.where),
        P(batch) if paged else None,
    )
    is_spec = lambda a: isinstance(a, P)
    operands = jax.tree.map(
        lambda spec, a: jax.sharding.reshard(a, spec), specs, operands, is_leaf=is_spec
    )
    rows = P(batch, None, heads)
    mapped = jax.shard_map(
        lambda operands: fn(how, operands),
        in_specs=(specs,),
        out_specs=(rows, rows),
        axis_names=set(explicit),
    )
    return mapped(operands)


def axis_names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes that one entry of a PartitionSpec names."""
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)
