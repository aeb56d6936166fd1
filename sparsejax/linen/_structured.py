"""Linear modules with structured weights."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from sparsejax import layers, structured


class KroneckerSparseLinear(nn.Module):
    """y = x F_0 F_1 ... + b; see ``layers.KroneckerSparseLinearSpec``."""

    in_features: int
    out_features: int
    pattern: structured.Pattern | structured.Chain
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    implementation: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "*batch k"]) -> Float[Array, "*batch n"]:
        """Computes y ``[..., n]`` of x ``[..., k]``."""
        return _apply_chain(self, self.pattern, x)


class MonarchLinear(nn.Module):
    """y = x L R + b, L and R of ``blocks`` blocks each with a shuffle between.

    ``structured.monarch`` says what blocks and rank are, and
    ``layers.KroneckerSparseLinearSpec`` the other fields.
    """

    in_features: int
    out_features: int
    blocks: int
    rank: int | None = None
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    implementation: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "*batch k"]) -> Float[Array, "*batch n"]:
        """Computes y ``[..., n]`` of x ``[..., k]``."""
        chain = structured.monarch(
            self.in_features, self.out_features, blocks=self.blocks, rank=self.rank
        )
        return _apply_chain(self, chain, x)


class ButterflyLinear(nn.Module):
    """y = x F_0 F_1 ... + b, log2 of the padded size factors of 2 x 2 blocks.

    ``structured.butterfly`` says which, ``layers.KroneckerSparseLinearSpec`` the other
    fields.
    """

    in_features: int
    out_features: int
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    implementation: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "*batch k"]) -> Float[Array, "*batch n"]:
        """Computes y ``[..., n]`` of x ``[..., k]``."""
        chain = structured.butterfly(self.in_features, self.out_features)
        return _apply_chain(self, chain, x)


class LowRankLinear(nn.Module):
    """y = (x down) up + b; see ``layers.LowRankLinearSpec``."""

    in_features: int
    out_features: int
    rank: int
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch k"]) -> Float[Array, "*batch n"]:
        """Computes y ``[..., n]`` of x ``[..., k]``."""
        spec = layers.LowRankLinearSpec(
            in_features=self.in_features,
            out_features=self.out_features,
            rank=self.rank,
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        params = _params(self, layers.init_low_rank_linear, spec)
        return layers.apply_low_rank_linear(spec, params, x)


class PixelflyLinear(nn.Module):
    """y = x B + (x down) up + b; see ``layers.PixelflyLinearSpec``."""

    in_features: int
    out_features: int
    block_shape: tuple[int, int]
    size: int
    rank: int
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    implementation: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "*batch k"]) -> Float[Array, "*batch n"]:
        """Computes y ``[..., n]`` of x ``[..., k]``."""
        spec = layers.PixelflyLinearSpec(
            in_features=self.in_features,
            out_features=self.out_features,
            block_shape=tuple(self.block_shape),
            size=self.size,
            rank=self.rank,
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            implementation=self.implementation,
        )
        params = _params(self, layers.init_pixelfly_linear, spec)
        return layers.apply_pixelfly_linear(spec, params, x)


def _apply_chain(module, pattern, x):
    spec = layers.KroneckerSparseLinearSpec(
        in_features=module.in_features,
        out_features=module.out_features,
        pattern=pattern,
        use_bias=module.use_bias,
        dtype=module.dtype,
        param_dtype=module.param_dtype,
        implementation=module.implementation,
    )
    params = _params(module, layers.init_kronecker_sparse_linear, spec)
    return layers.apply_kronecker_sparse_linear(spec, params, x)


def _params(module, init, spec):
    """Draws the parameters at initialisation, reads them later."""
    if module.is_initializing():
        params = init(module.make_rng("params"), spec)
        return {
            name: module.param(name, lambda _, value=value: value)
            for name, value in params.items()
        }
    return {**module.variables["params"]}
