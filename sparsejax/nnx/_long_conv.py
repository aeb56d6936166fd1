"""Long convolutions."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sparsejax import layers
from sparsejax.nnx._linear import _params


class LongConv(nnx.Module):
    """A kernel per feature, as long as x; see ``layers.LongConvSpec``.

    Example:
      >>> from flax import nnx
      >>> import sparsejax.nnx
      >>> conv = sparsejax.nnx.LongConv(4, 32, rngs=nnx.Rngs(0))
      >>> conv(jnp.ones((2, 32, 4))).shape
      (2, 32, 4)
    """

    def __init__(
        self,
        features: int,
        kernel_size: int,
        *,
        causal: bool = True,
        keep_frequencies: int | None = None,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        implementation: Any = None,
        rngs: nnx.Rngs,
    ):
        """Draws the kernels from ``rngs.params()``."""
        self.spec = layers.LongConvSpec(
            features=features,
            kernel_size=kernel_size,
            causal=causal,
            keep_frequencies=keep_frequencies,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            implementation=implementation,
        )
        params = layers.init_long_conv(rngs.params(), self.spec)
        self.kernel = nnx.Param(params["kernel"])
        self.bias = nnx.Param(params["bias"]) if use_bias else nnx.data(None)

    def __call__(
        self,
        x: Float[Array, "*batch t h"],
        *,
        pre_gate: Float[Array, "..."] | None = None,
        post_gate: Float[Array, "..."] | None = None,
    ) -> Float[Array, "*batch t h"]:
        """Computes y ``[..., t, h]``; see ``layers.apply_long_conv``."""
        return layers.apply_long_conv(
            self.spec, _params(self), x, pre_gate=pre_gate, post_gate=post_gate
        )
