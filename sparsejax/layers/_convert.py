"""A whole parameter tree between dense, masked and block form."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.layouts import BlockLayout, gather_blocks, scatter_blocks


def convert(
    params: Mapping[str, Any],
    topology: Mapping[str, Any],
    *,
    to: str,
    block_shape: tuple[int, int] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Converts every sparse kernel of a model, and its topology with it.

    A parameter ``kernel`` is sparse if the topology has ``kernel_layout`` or
    ``kernel_mask`` beside its path. Forms: dense ``[k, n]`` with zeros, no topology;
    masked, ``[k, n]`` with zeros and a mask; block, ``[capacity, bk, bn]`` and a
    layout. Values do not change, so a model computes the same in every form. Leading
    axes of layers under scan stay.

    Args:
      params: Nested dicts of arrays (``nnx.to_pure_dict`` of a state, or Linen's
        params).
      topology: Nested dicts with the same keys, a BlockLayout or a boolean mask per
        sparse kernel. A kernel may be in any form: its shape tells.
      to: The form wanted.
      block_shape: For masks that become layouts: a block is stored if any of its
        entries is kept.

    Returns:
      (params, topology).

    Raises:
      ValueError: An entry of the topology has no kernel, shapes do not fit, or
        ``block_shape`` is missing; ``to`` is none of the three.

    Example:
      >>> mask = jnp.array([[True, False], [False, True]])
      >>> params, topology = sparsejax.layers.convert(
      ...     {"kernel": jnp.ones((2, 2))}, {"kernel_mask": mask}, to="dense")
      >>> print(params["kernel"], topology)
      [[1. 0.]
       [0. 1.]] {}
    """
    if to not in ("dense", "masked", "block"):
        raise ValueError(f"to: got {to!r}, needed 'dense', 'masked' or 'block'")
    new_params: dict[str, Any] = {}
    new_topology: dict[str, Any] = {}
    used = set()
    for name, value in params.items():
        if isinstance(value, Mapping):
            used.add(name)
            below = topology.get(name, {})
            new_params[name], inner = convert(
                value, below, to=to, block_shape=block_shape
            )
            if inner:
                new_topology[name] = inner
            continue
        places = [f"{name}_layout", f"{name}_mask"]
        place = next((p for p in places if p in topology), None)
        if place is None:
            new_params[name] = value
            continue
        used.update([place, f"{name}_probe"])
        where = topology[place]
        dense = _to_dense(name, value, where)
        if to == "block":
            layout = where
            if not isinstance(where, BlockLayout):
                layout = _layout_of(name, where, block_shape)
            gather = _over_stack(gather_blocks, layout.rows.ndim - 1)
            new_params[name] = gather(dense, layout)
            new_topology[f"{name}_layout"] = layout
            if f"{name}_probe" in topology:
                new_topology[f"{name}_probe"] = topology[f"{name}_probe"]
        else:
            new_params[name] = dense
            if to == "masked":
                new_topology[f"{name}_mask"] = _element_mask(where)
    unused = [key for key in topology if key not in used]
    if unused:
        raise ValueError(
            f"topology: {unused} belong to no parameter; params has {list(params)}"
        )
    return new_params, new_topology


def _to_dense(name, kernel, where):
    """The dense kernel, zeros outside ``where``."""
    if not isinstance(where, BlockLayout):
        if kernel.shape != where.shape:
            raise ValueError(
                f"{name}: got shape {kernel.shape}, needed its mask's {where.shape}"
            )
        return jnp.where(where, kernel, jnp.zeros((), kernel.dtype))
    stack = where.rows.ndim - 1
    if kernel.shape == where.blocks_shape:
        return _over_stack(scatter_blocks, stack)(kernel, where)
    if kernel.shape[stack:] != where.shape:
        raise ValueError(
            f"{name}: got shape {kernel.shape}, needed {where.blocks_shape} (blocks) "
            f"or {where.shape} (dense) of its layout"
        )
    return jnp.where(_element_mask(where), kernel, jnp.zeros((), kernel.dtype))


def _element_mask(where):
    if not isinstance(where, BlockLayout):
        return where
    (bk, bn), (k, n) = where.block_shape, where.shape
    mask = jnp.repeat(jnp.repeat(where.to_mask(), bk, axis=-2), bn, axis=-1)
    return mask[..., :k, :n]


def _layout_of(name, mask, block_shape):
    """The layout of the blocks that hold a kept entry; equal capacity over a stack."""
    if block_shape is None:
        raise ValueError(
            f"block_shape: got None, needed (bk, bn) to store {name} by blocks"
        )
    (bk, bn), (k, n) = block_shape, mask.shape[-2:]
    kb, nb = -(-k // bk), -(-n // bn)
    lead = mask.shape[:-2]
    edges = [(0, 0)] * len(lead) + [(0, kb * bk - k), (0, nb * bn - n)]
    tiles = np.pad(np.asarray(mask), edges).reshape(-1, kb, bk, nb, bn)
    kept = np.any(tiles, axis=(2, 4))
    capacity = int(kept.sum(axis=(1, 2)).max()) if kept.size else 0
    layouts = [
        BlockLayout.from_mask(each, (bk, bn), capacity=capacity, shape=(k, n))
        for each in kept
    ]
    return jax.tree.map(lambda *a: jnp.stack(a).reshape(*lead, capacity), *layouts)


def _over_stack(fn, depth):
    for _ in range(depth):
        fn = jax.vmap(fn)
    return fn
