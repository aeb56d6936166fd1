"""Linear modules."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from sparsejax import layers


class MaskedLinear(nn.Module):
    """y = x (mask W) + b; see ``layers.MaskedLinearSpec`` for the fields."""

    in_features: int
    out_features: int
    sparsity: float = 0.0
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    implementation: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "*batch k"]) -> Float[Array, "*batch n"]:
        """Computes y ``[..., n]`` of x ``[..., k]``."""
        spec = layers.MaskedLinearSpec(
            in_features=self.in_features,
            out_features=self.out_features,
            sparsity=self.sparsity,
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            implementation=self.implementation,
        )
        params, topology = _variables(self, layers.init_masked_linear, spec)
        return layers.apply_masked_linear(spec, params, topology["kernel_mask"], x)


class BlockSparseLinear(nn.Module):
    """y = x W + b, W stored as blocks; see ``layers.BlockSparseLinearSpec``."""

    in_features: int
    out_features: int
    block_shape: tuple[int, int]
    sparsity: float
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    implementation: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "*batch k"]) -> Float[Array, "*batch n"]:
        """Computes y ``[..., n]`` of x ``[..., k]``."""
        spec = layers.BlockSparseLinearSpec(
            in_features=self.in_features,
            out_features=self.out_features,
            block_shape=tuple(self.block_shape),
            sparsity=self.sparsity,
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            implementation=self.implementation,
        )
        params, topology = _variables(self, layers.init_block_sparse_linear, spec)
        return layers.apply_block_sparse_linear(
            spec,
            params,
            topology["kernel_layout"],
            x,
            topology.get("kernel_probe"),
        )


def _variables(module, init, spec):
    """Draws all variables at initialisation, reads them later."""
    names = ("kernel", "bias") if spec.use_bias else ("kernel",)
    if not module.has_variable("params", "kernel"):
        params, topology = init(module.make_rng("params"), spec)
        for name, value in params.items():
            module.param(name, lambda _, value=value: value)
        for name, value in topology.items():
            collection = "probes" if name.endswith("_probe") else "topology"
            module.variable(collection, name, lambda value=value: value)
        return params, topology
    params = {name: module.get_variable("params", name) for name in names}
    topology = {
        name: module.get_variable(collection, name)
        for collection in ("topology", "probes")
        for name in ("kernel_mask", "kernel_layout", "kernel_probe")
        if module.has_variable(collection, name)
    }
    return params, topology
