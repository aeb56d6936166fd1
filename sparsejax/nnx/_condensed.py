"""Linear modules with condensed kernels."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sparsejax import layers
from sparsejax.nnx._linear import _params


class Indices(nnx.Variable):
    """Places of a condensed kernel's entries."""


class NMLinear(nnx.Module):
    """y = x W + b, W condensed N:M; see ``layers.NMLinearSpec`` for the arguments."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        n: int,
        m: int,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        implementation: Any = None,
        rngs: nnx.Rngs,
    ):
        """Draws the parameters and random places from ``rngs.params()``."""
        self.spec = layers.NMLinearSpec(
            in_features=in_features,
            out_features=out_features,
            n=n,
            m=m,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            implementation=implementation,
        )
        params, topology = layers.init_nm_linear(rngs.params(), self.spec)
        self.kernel = nnx.Param(params["kernel"])
        self.bias = nnx.Param(params["bias"]) if use_bias else nnx.data(None)
        self.kernel_indices = Indices(topology["kernel_indices"])

    def __call__(self, x: Float[Array, "*batch k"]) -> Float[Array, "*batch n"]:
        """Computes y ``[..., out]`` of x ``[..., in]``."""
        params, indices = _params(self), self.kernel_indices.get_value()
        return layers.apply_nm_linear(self.spec, params, indices, x)


class FanInLinear(nnx.Module):
    """y = x W + b, W of constant fan-in; see ``layers.FanInLinearSpec``."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        fan_in: int,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        implementation: Any = None,
        rngs: nnx.Rngs,
    ):
        """Draws the parameters and random places from ``rngs.params()``."""
        self.spec = layers.FanInLinearSpec(
            in_features=in_features,
            out_features=out_features,
            fan_in=fan_in,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            implementation=implementation,
        )
        params, topology = layers.init_fan_in_linear(rngs.params(), self.spec)
        self.kernel = nnx.Param(params["kernel"])
        self.bias = nnx.Param(params["bias"]) if use_bias else nnx.data(None)
        self.kernel_indices = Indices(topology["kernel_indices"])

    def __call__(self, x: Float[Array, "*batch k"]) -> Float[Array, "*batch n"]:
        """Computes y ``[..., out]`` of x ``[..., in]``."""
        params, indices = _params(self), self.kernel_indices.get_value()
        return layers.apply_fan_in_linear(self.spec, params, indices, x)
