"""Linear layers y = x W + b with a masked or a block-sparse W."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparsejax._dispatch import Choice
from sparsejax.layouts import BlockLayout
from sparsejax.masks import topk_mask
from sparsejax.ops import block_sparse_matmul, masked_matmul
from sparsejax.topology import growth_probe


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedLinearSpec:
    """What a masked linear layer is made of.

    Attributes:
      in_features: Size of x's last axis.
      out_features: Size of y's last axis.
      sparsity: Fraction of the kernel's entries that the first mask drops, at random;
        exactly round((1 - sparsity) * size) are kept.
      use_bias: Whether b is there.
      dtype: In which the product is computed; None: promoted from x and the kernel.
      param_dtype: In which kernel and bias are kept.
      implementation: As for ``ops.masked_matmul``.
    """

    in_features: int
    out_features: int
    sparsity: float = 0.0
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    implementation: Choice = None

    def __post_init__(self):
        _check(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSparseLinearSpec:
    """What a block-sparse linear layer is made of.

    Attributes:
      in_features: Size of x's last axis; need not be a multiple of the block.
      out_features: Size of y's last axis.
      block_shape: (bk, bn), along the input and the output.
      sparsity: Fraction of the blocks that the first layout leaves out, at random;
        exactly round((1 - sparsity) * number of blocks) are stored.
      use_bias: Whether b is there.
      dtype: In which the product is computed; None: promoted from x and the kernel.
        The kernel's gradient is in param_dtype, from float32 sums, whatever dtype is.
      param_dtype: In which kernel and bias are kept.
      implementation: As for ``ops.block_sparse_matmul``.
    """

    in_features: int
    out_features: int
    block_shape: tuple[int, int]
    sparsity: float
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    implementation: Choice = None

    def __post_init__(self):
        _check(self)


def init_masked_linear(
    key: Array, spec: MaskedLinearSpec
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Draws parameters and a random mask.

    Kept entries are normal with variance 1 / (fan-in of their column), so that y has
    the variance of x at any sparsity; pruned entries are zero.

    Args:
      key: PRNG key.
      spec: The layer.

    Returns:
      ({"kernel" [k, n], "bias" [n]}, {"kernel_mask" bool [k, n]}).
    """
    shape = (spec.in_features, spec.out_features)
    mask_key, kernel_key = jax.random.split(key)
    size = shape[0] * shape[1]
    count = round((1 - spec.sparsity) * size)
    mask = topk_mask(jax.random.uniform(mask_key, shape), count)
    fan_in = jnp.maximum(jnp.sum(mask, axis=0, dtype=jnp.float32), 1.0)
    kernel = jax.random.normal(kernel_key, shape, jnp.float32) / jnp.sqrt(fan_in)
    kernel = jnp.where(mask, kernel, 0.0).astype(spec.param_dtype)
    return {"kernel": kernel, **_bias(spec)}, {"kernel_mask": mask}


def apply_masked_linear(
    spec: MaskedLinearSpec,
    params: dict[str, Array],
    mask: Bool[Array, "k n"],
    x: Float[Array, "*batch k"],
) -> Float[Array, "*batch n"]:
    """Computes y = x (mask W) + b.

    Args:
      spec: The layer.
      params: {"kernel", "bias"} as from ``init_masked_linear``.
      mask: True where the kernel is kept.
      x: ``[..., k]``.

    Returns:
      y ``[..., n]``.
    """
    dtype = spec.dtype or jnp.promote_types(x.dtype, params["kernel"].dtype)
    kernel = params["kernel"].astype(dtype)
    y = masked_matmul(x.astype(dtype), kernel, mask, implementation=spec.implementation)
    return _add_bias(spec, params, y)


def init_block_sparse_linear(
    key: Array, spec: BlockSparseLinearSpec
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Draws parameters and a random layout.

    Entries are normal with variance 1 / (fan-in of their column), so that y has the
    variance of x at any sparsity and for uneven columns.

    Args:
      key: PRNG key.
      spec: The layer.

    Returns:
      ({"kernel" [capacity, bk, bn], "bias" [n]}, {"kernel_layout": BlockLayout,
      "kernel_probe": float32 zeros [kb, nb]}).
    """
    layout_key, kernel_key = jax.random.split(key)
    layout = BlockLayout.random(
        layout_key,
        (spec.in_features, spec.out_features),
        spec.block_shape,
        density=1 - spec.sparsity,
    )
    per_column = jnp.sum(layout.to_mask(), axis=0, dtype=jnp.float32)
    # A block of the last row may reach over the edge: its fan-in is what is inside.
    fan_in = per_column * (spec.in_features / layout.grid[0])
    std = jax.lax.rsqrt(jnp.maximum(fan_in, 1.0))
    std = std.at[layout.cols].get(mode="fill", fill_value=0)
    blocks = jax.random.normal(kernel_key, layout.blocks_shape, jnp.float32)
    blocks = (blocks * std[:, None, None]).astype(spec.param_dtype)
    topology = {
        "kernel_layout": layout,
        "kernel_probe": jnp.zeros(layout.grid, jnp.float32),
    }
    return {"kernel": blocks, **_bias(spec)}, topology


def apply_block_sparse_linear(
    spec: BlockSparseLinearSpec,
    params: dict[str, Array],
    layout: BlockLayout,
    x: Float[Array, "*batch k"],
    probe: Float[Array, "kb nb"] | None = None,
) -> Float[Array, "*batch n"]:
    """Computes y = x W + b, W zero outside the layout.

    Args:
      spec: The layer.
      params: {"kernel", "bias"} as from ``init_block_sparse_linear``.
      layout: Places of the kernel's blocks.
      x: ``[..., k]``.
      probe: Zeros ``[kb, nb]`` whose gradient is to be the growth scores
        (``topology.growth_probe``), or None.

    Returns:
      y ``[..., n]``.
    """
    dtype = spec.dtype or jnp.promote_types(x.dtype, params["kernel"].dtype)
    x = x.astype(dtype)
    y = block_sparse_matmul(
        x, params["kernel"], layout, dtype=dtype, implementation=spec.implementation
    )
    if probe is not None:
        y = growth_probe(y, x, probe, layout)
    return _add_bias(spec, params, y)


def _check(spec):
    if min(spec.in_features, spec.out_features) < 1:
        raise ValueError(
            f"in_features, out_features: got {spec.in_features}, {spec.out_features}, "
            "needed positive ints"
        )
    if not 0 <= spec.sparsity <= 1:
        raise ValueError(f"sparsity: got {spec.sparsity}, needed a number in [0, 1]")


def _bias(spec):
    if not spec.use_bias:
        return {}
    return {"bias": jnp.zeros(spec.out_features, spec.param_dtype)}


def _add_bias(spec, params, y):
    return y + params["bias"].astype(y.dtype) if spec.use_bias else y
