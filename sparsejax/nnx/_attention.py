"""Attention modules."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sparsejax import layers
from sparsejax.attention import Expression
from sparsejax.nnx._variables import Layout


class SparseAttention(nnx.Module):
    """y = concat_h(softmax(mask(q_h k^T / sqrt(d))) v) W_out.

    ``layers.SparseAttentionSpec`` says what the arguments are, and
    ``layers.apply_sparse_attention`` what a mask can be; None is everything. The arrays
    of one, if it has any, are the variable ``mask``, a ``Layout``.

    Example:
      >>> from flax import nnx
      >>> import sparsejax.nnx
      >>> from sparsejax import attention
      >>> layer = sparsejax.nnx.SparseAttention(
      ...     16, 4, mask=attention.causal() & attention.sliding_window(8),
      ...     num_kv_heads=2, block_shape=(8, 8), rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 32, 16))).shape
      (2, 32, 16)
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        mask: layers.AttentionMask | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        block_shape: tuple[int, int] = (128, 128),
        capacity: int | None = None,
        rotary_base: float | int | None = None,
        scale: float | None = None,
        logits_soft_cap: float | None = None,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        implementation: Any = None,
        rngs: nnx.Rngs,
    ):
        """Draws the parameters from ``rngs.params()``."""
        self.spec = layers.SparseAttentionSpec(
            features=features,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            block_shape=block_shape,
            capacity=capacity,
            rotary_base=rotary_base,
            scale=scale,
            logits_soft_cap=logits_soft_cap,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            implementation=implementation,
        )
        holds = layers.mask_holds_arrays(mask)
        self.mask = Layout(mask) if holds else nnx.static(mask)
        params = layers.init_sparse_attention(rngs.params(), self.spec)
        self.names = tuple(params)
        for name, value in params.items():
            setattr(self, name, nnx.Param(value))

    def __call__(
        self,
        x: Float[Array, "b t n"],
        x_kv: Float[Array, "b s _n"] | None = None,
        *,
        mask: layers.AttentionMask | None = None,
        positions: Int[Array, "..."] | None = None,
        return_stats: bool = False,
        dense: Expression | None = None,
    ) -> Any:
        """Computes y ``[b, t, d_model]``; see ``layers.apply_sparse_attention``.

        A mask given here takes the place of the module's.
        """
        return layers.apply_sparse_attention(
            self.spec,
            self._params(),
            self._mask(mask),
            x,
            x_kv,
            positions=positions,
            return_stats=return_stats,
            dense=dense,
        )

    def decode(
        self,
        x: Float[Array, "b t n"],
        cache: layers.KVCache,
        *,
        mask: layers.AttentionMask | None = None,
    ) -> tuple[Float[Array, "b t n"], layers.KVCache]:
        """Computes y of the next tokens; see ``layers.decode_sparse_attention``."""
        return layers.decode_sparse_attention(
            self.spec, self._params(), self._mask(mask), x, cache
        )

    def _params(self):
        return {name: getattr(self, name).get_value() for name in self.names}

    def _mask(self, given):
        if given is not None:
            return given
        return self.mask.get_value() if isinstance(self.mask, Layout) else self.mask
