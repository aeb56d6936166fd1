"""Linear modules with condensed kernels."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from sparsejax import layers
from sparsejax.linen._linear import _variables


class NMLinear(nn.Module):
    """y = x W + b, W condensed N:M; see ``layers.NMLinearSpec`` for the fields."""

    in_features: int
    out_features: int
    n: int
    m: int
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    implementation: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "*batch k"]) -> Float[Array, "*batch n"]:
        """Computes y ``[..., out]`` of x ``[..., in]``."""
        spec = layers.NMLinearSpec(
            in_features=self.in_features,
            out_features=self.out_features,
            n=self.n,
            m=self.m,
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            implementation=self.implementation,
        )
        params, _ = _variables(self, layers.init_nm_linear, spec)
        indices = self.get_variable("topology", "kernel_indices")
        return layers.apply_nm_linear(spec, params, indices, x)


class FanInLinear(nn.Module):
    """y = x W + b, W of constant fan-in; see ``layers.FanInLinearSpec``."""

    in_features: int
    out_features: int
    fan_in: int
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    implementation: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "*batch k"]) -> Float[Array, "*batch n"]:
        """Computes y ``[..., out]`` of x ``[..., in]``."""
        spec = layers.FanInLinearSpec(
            in_features=self.in_features,
            out_features=self.out_features,
            fan_in=self.fan_in,
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            implementation=self.implementation,
        )
        params, _ = _variables(self, layers.init_fan_in_linear, spec)
        indices = self.get_variable("topology", "kernel_indices")
        return layers.apply_fan_in_linear(spec, params, indices, x)
