"""Long convolutions."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from sparsejax import layers


class LongConv(nn.Module):
    """A kernel per feature, as long as x; see ``layers.LongConvSpec``."""

    features: int
    kernel_size: int
    causal: bool = True
    keep_frequencies: int | None = None
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    implementation: Any = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*batch t h"],
        *,
        pre_gate: Float[Array, "..."] | None = None,
        post_gate: Float[Array, "..."] | None = None,
    ) -> Float[Array, "*batch t h"]:
        """Computes y ``[..., t, h]``; see ``layers.apply_long_conv``."""
        names = [field.name for field in dataclasses.fields(layers.LongConvSpec)]
        spec = layers.LongConvSpec(**{name: getattr(self, name) for name in names})
        if self.is_initializing():
            params = layers.init_long_conv(self.make_rng("params"), spec)
            for name, value in params.items():
                self.param(name, lambda _, value=value: value)
        return layers.apply_long_conv(
            spec,
            dict(self.variables["params"]),
            x,
            pre_gate=pre_gate,
            post_gate=post_gate,
        )
