"""Linear modules."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sparsejax import layers
from sparsejax.nnx._variables import GrowthProbe, Layout, Mask


class MaskedLinear(nnx.Module):
    """y = x (mask W) + b; see ``layers.MaskedLinearSpec`` for the arguments."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        sparsity: float = 0.0,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        implementation: Any = None,
        rngs: nnx.Rngs,
    ):
        """Draws the parameters and a random mask from ``rngs.params()``."""
        self.spec = layers.MaskedLinearSpec(
            in_features=in_features,
            out_features=out_features,
            sparsity=sparsity,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            implementation=implementation,
        )
        params, topology = layers.init_masked_linear(rngs.params(), self.spec)
        self.kernel = nnx.Param(params["kernel"])
        self.bias = nnx.Param(params["bias"]) if use_bias else nnx.data(None)
        self.kernel_mask = Mask(topology["kernel_mask"])

    def __call__(self, x: Float[Array, "*batch k"]) -> Float[Array, "*batch n"]:
        """Computes y ``[..., n]`` of x ``[..., k]``."""
        params, mask = _params(self), self.kernel_mask.get_value()
        return layers.apply_masked_linear(self.spec, params, mask, x)


class BlockSparseLinear(nnx.Module):
    """y = x W + b, W stored as blocks; see ``layers.BlockSparseLinearSpec``."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        block_shape: tuple[int, int],
        sparsity: float,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        implementation: Any = None,
        rngs: nnx.Rngs,
    ):
        """Draws the parameters and a random layout from ``rngs.params()``."""
        self.spec = layers.BlockSparseLinearSpec(
            in_features=in_features,
            out_features=out_features,
            block_shape=block_shape,
            sparsity=sparsity,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            implementation=implementation,
        )
        params, topology = layers.init_block_sparse_linear(rngs.params(), self.spec)
        self.kernel = nnx.Param(params["kernel"])
        self.bias = nnx.Param(params["bias"]) if use_bias else nnx.data(None)
        self.kernel_layout = Layout(topology["kernel_layout"])
        self.kernel_probe = GrowthProbe(topology["kernel_probe"])

    def __call__(self, x: Float[Array, "*batch k"]) -> Float[Array, "*batch n"]:
        """Computes y ``[..., n]`` of x ``[..., k]``."""
        layout, probe = self.kernel_layout.get_value(), self.kernel_probe.get_value()
        return layers.apply_block_sparse_linear(
            self.spec, _params(self), layout, x, probe
        )


def _params(module):
    params = {"kernel": module.kernel.get_value()}
    if module.spec.use_bias:
        params["bias"] = module.bias.get_value()
    return params
