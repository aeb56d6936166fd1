"""What growing a block would be worth: norms of the dense gradient's blocks."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from sparsejax._dispatch import varying_axes
from sparsejax.layouts import BlockLayout
from sparsejax.layouts._block import pad_to
from sparsejax.ops._checks import check_floating


def block_scores(
    x: Shaped[Array, "... _k"], dy: Shaped[Array, "... _n"], layout: BlockLayout
) -> Float[Array, "kb nb"]:
    """Frobenius norms of the blocks of the dense weight gradient ``x^T dy``.

    ``scores[r, c] = || x[..., r]^T dy[..., c] ||``, summed over leading axes before the
    norm, where r and c stand for a block's whole range. Costs the multiply-adds of the
    dense weight gradient, but never holds it: one strip ``[bk, n]`` at a time.

    Args:
      x: Inputs of the layer ``[..., k]``.
      dy: Gradient at its output ``[..., n]``.
      layout: Says the blocks' size and the matrix's; its contents do not matter.

    Returns:
      Scores ``[kb, nb]``, float32.

    Raises:
      ValueError: Shapes or dtypes do not fit.

    Example:
      >>> layout = sparsejax.layouts.BlockLayout.from_mask(
      ...     jnp.array([[True, False]]), (8, 8))
      >>> x, dy = jnp.ones((2, 8)), jnp.ones((2, 16))
      >>> print(sparsejax.topology.block_scores(x, dy, layout))
      [[16. 16.]]

    References:
      Evci et al., `RigL <https://arxiv.org/abs/1911.11134>`_, 2020, for growth by the
      gradient; blocks in place of single weights are ours.

    Note:
      Inside shard_map, where rows are spread over devices, the norms must be of the
      sum: ``growth_probe`` sees to that.
    """
    if x.shape[-1] != layout.shape[0] or dy.shape != (*x.shape[:-1], layout.shape[1]):
        raise ValueError(
            f"x, dy: got shapes {x.shape} and {dy.shape}, needed [..., "
            f"{layout.shape[0]}] and [..., {layout.shape[1]}] with equal leading axes"
        )
    check_floating(x=x, dy=dy)
    return _scores(x, dy, layout, axes=())


def _scores(x, dy, layout, axes):
    """block_scores of the sum over the mesh axes ``axes``."""
    (kb, nb), (bk, bn) = layout.grid, layout.block_shape
    dtype = jnp.promote_types(x.dtype, dy.dtype)
    x = pad_to(x.reshape(-1, x.shape[-1]).astype(dtype), kb * bk)
    dy = pad_to(dy.reshape(-1, dy.shape[-1]).astype(dtype), nb * bn)

    def strip(r):
        x_r = jax.lax.dynamic_slice_in_dim(x, r * bk, bk, axis=1)
        g = jnp.matmul(x_r.T, dy, preferred_element_type=jnp.float32)
        # Signed gradients are summed over devices before the norm, or noise would
        # count.
        g = jax.lax.psum(g, axes) if axes else g
        return jnp.sum(jnp.square(g.reshape(bk, nb, bn)), axis=(0, 2))

    return jnp.sqrt(jax.lax.map(strip, jnp.arange(kb))).astype(jnp.float32)


def growth_probe(
    y: Float[Array, "*batch n"],
    x: Float[Array, "*batch k"],
    probe: Float[Array, "kb nb"],
    layout: BlockLayout,
) -> Float[Array, "*batch n"]:
    """Returns ``y`` unchanged; its gradient in ``probe`` is ``block_scores``.

    With ``y = x w``, differentiating a loss with respect to ``probe`` gives
    ``block_scores(x, dloss/dy, layout)``: what growing a block would be worth,
    collected from any depth of a model, under scan and checkpoint, by ``jax.grad``
    alone. Nothing is computed for it where that gradient is not asked for.

    Args:
      y: Output of a block-sparse product ``[..., n]``.
      x: Its input ``[..., k]``.
      probe: Zeros ``[kb, nb]``, float32; the value is not read.
      layout: Of the product.

    Returns:
      y.
    """
    # Rows that shard_map spreads over axes which the probe does not vary over are
    # summed.
    axes = (varying_axes(x) | varying_axes(y)) - varying_axes(probe)
    static = layout.shape, layout.block_shape, tuple(sorted(axes))
    return _probe(static, y, x, probe, layout.rows, layout.cols)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _probe(static, y, x, probe, rows, cols):
    return y


def _probe_fwd(static, y, x, probe, rows, cols):
    # The input is kept only where somebody differentiates in the probe.
    kept = (x.value, rows.value, cols.value) if probe.perturbed else None
    return y.value, kept


def _probe_bwd(static, kept, dy):
    if kept is None or isinstance(dy, jax.custom_derivatives.SymbolicZero):
        return dy, None, None, None, None
    x, rows, cols = kept
    shape, block_shape, axes = static
    layout = BlockLayout(rows, cols, shape, block_shape)
    return dy, None, _scores(x, dy, layout, axes), None, None


_probe.defvjp(_probe_fwd, _probe_bwd, symbolic_zeros=True)
