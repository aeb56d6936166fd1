"""Attention modules."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from sparsejax import layers
from sparsejax.attention import Expression


class SparseAttention(nn.Module):
    """y = concat_h(softmax(mask(q_h k^T / sqrt(d))) v) W_out.

    ``layers.SparseAttentionSpec`` says what the fields are, and
    ``layers.apply_sparse_attention`` what a mask can be; None is everything. A mask
    with arrays in it is the variable ``mask`` of the collection "topology", which may
    be left out when the module is applied.
    """

    features: int
    num_heads: int
    mask: layers.AttentionMask | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    block_shape: tuple[int, int] = (128, 128)
    capacity: int | None = None
    rotary_base: float | int | None = None
    scale: float | None = None
    logits_soft_cap: float | None = None
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    implementation: Any = None

    @nn.compact
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
        if self.is_initializing():
            params = layers.init_sparse_attention(self.make_rng("params"), self.spec)
            for name, value in params.items():
                self.param(name, lambda _, value=value: value)
            if layers.mask_holds_arrays(self.mask):
                self.variable("topology", "mask", lambda: self.mask)
        return layers.apply_sparse_attention(
            self.spec,
            dict(self.variables["params"]),
            self._chosen(mask),
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
        """Computes y of the next tokens; see ``layers.decode_sparse_attention``.

        For ``apply(..., method="decode")``, with the variables of ``__call__``.
        """
        return layers.decode_sparse_attention(
            self.spec, dict(self.variables["params"]), self._chosen(mask), x, cache
        )

    @property
    def spec(self) -> layers.SparseAttentionSpec:
        """What the layer is made of."""
        names = [field.name for field in dataclasses.fields(layers.SparseAttentionSpec)]
        fields = {name: getattr(self, name) for name in names}
        fields["block_shape"] = tuple(self.block_shape)
        return layers.SparseAttentionSpec(**fields)

    def _chosen(self, given):
        if given is not None:
            return given
        return self.get_variable("topology", "mask", self.mask)
