"""Linear modules with structured weights."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sparsejax import layers, structured


class KroneckerSparseLinear(nnx.Module):
    """y = x F_0 F_1 ... + b; see ``layers.KroneckerSparseLinearSpec``."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        pattern: structured.Pattern | structured.Chain,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        implementation: Any = None,
        rngs: nnx.Rngs,
    ):
        """Draws the parameters from ``rngs.params()``."""
        self.spec = layers.KroneckerSparseLinearSpec(
            in_features=in_features,
            out_features=out_features,
            pattern=pattern,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            implementation=implementation,
        )
        _set(self, layers.init_kronecker_sparse_linear(rngs.params(), self.spec))

    def __call__(self, x: Float[Array, "*batch k"]) -> Float[Array, "*batch n"]:
        """Computes y ``[..., n]`` of x ``[..., k]``."""
        return layers.apply_kronecker_sparse_linear(self.spec, _params(self), x)


class MonarchLinear(KroneckerSparseLinear):
    """y = x L R + b, L and R of ``blocks`` blocks each with a shuffle between.

    ``structured.monarch`` says what blocks and rank are, and
    ``layers.KroneckerSparseLinearSpec`` the other arguments.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        blocks: int,
        rank: int | None = None,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        implementation: Any = None,
        rngs: nnx.Rngs,
    ):
        """Draws the parameters from ``rngs.params()``."""
        chain = structured.monarch(in_features, out_features, blocks=blocks, rank=rank)
        super().__init__(
            in_features,
            out_features,
            pattern=chain,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            implementation=implementation,
            rngs=rngs,
        )


class ButterflyLinear(KroneckerSparseLinear):
    """y = x F_0 F_1 ... + b, log2 of the padded size factors of 2 x 2 blocks.

    ``structured.butterfly`` says which, ``layers.KroneckerSparseLinearSpec`` the other
    arguments.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        implementation: Any = None,
        rngs: nnx.Rngs,
    ):
        """Draws the parameters from ``rngs.params()``."""
        super().__init__(
            in_features,
            out_features,
            pattern=structured.butterfly(in_features, out_features),
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            implementation=implementation,
            rngs=rngs,
        )


class LowRankLinear(nnx.Module):
    """y = (x down) up + b; see ``layers.LowRankLinearSpec``."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Draws the parameters from ``rngs.params()``."""
        self.spec = layers.LowRankLinearSpec(
            in_features=in_features,
            out_features=out_features,
            rank=rank,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
        )
        _set(self, layers.init_low_rank_linear(rngs.params(), self.spec))

    def __call__(self, x: Float[Array, "*batch k"]) -> Float[Array, "*batch n"]:
        """Computes y ``[..., n]`` of x ``[..., k]``."""
        return layers.apply_low_rank_linear(self.spec, _params(self), x)


class PixelflyLinear(nnx.Module):
    """y = x B + (x down) up + b; see ``layers.PixelflyLinearSpec``."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        block_shape: tuple[int, int],
        size: int,
        rank: int,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        implementation: Any = None,
        rngs: nnx.Rngs,
    ):
        """Draws the parameters from ``rngs.params()``."""
        self.spec = layers.PixelflyLinearSpec(
            in_features=in_features,
            out_features=out_features,
            block_shape=block_shape,
            size=size,
            rank=rank,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            implementation=implementation,
        )
        _set(self, layers.init_pixelfly_linear(rngs.params(), self.spec))

    def __call__(self, x: Float[Array, "*batch k"]) -> Float[Array, "*batch n"]:
        """Computes y ``[..., n]`` of x ``[..., k]``."""
        return layers.apply_pixelfly_linear(self.spec, _params(self), x)


def _set(module, params):
    for name, value in {"bias": None, **params}.items():
        setattr(module, name, nnx.data(None) if value is None else nnx.Param(value))


def _params(module):
    held = vars(module).items()
    return {name: v.get_value() for name, v in held if isinstance(v, nnx.Variable)}
