"""Linear layers y = x W + b with a structured W: chains of factors, low rank, Pixelfly.

The factors of a chain are the parameters ``factor_0``, ``factor_1`` and so on, each
``[a, d, c, b]``, the first to be applied first.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsejax._dispatch import Choice
from sparsejax.layers._linear import _add_bias, _bias
from sparsejax.layouts import BlockLayout
from sparsejax.ops import block_sparse_matmul, butterfly_matmul, monarch_matmul
from sparsejax.structured import Chain, LowRank, Pattern, Pixelfly, init_chain


@dataclasses.dataclass(frozen=True, kw_only=True)
class KroneckerSparseLinearSpec:
    """What a linear layer with a chain of Kronecker-sparse factors is made of.

    Attributes:
      in_features: Size of x's last axis; need not be what the first factor takes.
      out_features: Size of y's last axis; need not be what the last factor gives.
      pattern: Of the one factor, or a chain of both sizes, such as
        ``structured.monarch`` makes.
      use_bias: Whether b is there.
      dtype: In which the products are computed; None: promoted from x and the factors.
        The factors' gradients are in param_dtype, from float32 sums, whatever dtype is.
      param_dtype: In which factors and bias are kept.
      implementation: As for ``ops.monarch_matmul``.
    """

    in_features: int
    out_features: int
    pattern: Pattern | Chain
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    implementation: Choice = None

    def __post_init__(self):
        _check(self)
        if self.chain.shape != (self.in_features, self.out_features):
            raise ValueError(
                f"pattern: got a chain from {self.chain.in_size} to "
                f"{self.chain.out_size} entries, needed one from {self.in_features} to "
                f"{self.out_features}, in_features and out_features"
            )

    @property
    def chain(self) -> Chain:
        """The factors' patterns, between the true sizes."""
        if isinstance(self.pattern, Chain):
            return self.pattern
        return Chain((self.pattern,), self.in_features, self.out_features)

    @property
    def parameter_count(self) -> int:
        """Weights and biases that take part: those that meet padding do not."""
        return self.chain.params + self.use_bias * self.out_features


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRankLinearSpec:
    """What a linear layer of low rank is made of: ``y = (x down) up + b``.

    Attributes:
      in_features: Size of x's last axis.
      out_features: Size of y's last axis.
      rank: Columns of down and rows of up.
      use_bias: Whether b is there.
      dtype: In which the products are computed; None: promoted from x and the weights.
      param_dtype: In which weights and bias are kept.
    """

    in_features: int
    out_features: int
    rank: int
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        _check(self)
        _ = self.family  # its checks

    @property
    def family(self) -> LowRank:
        """The matrices that W can be."""
        return LowRank(self.in_features, self.out_features, self.rank)

    @property
    def parameter_count(self) -> int:
        """Weights and biases."""
        return self.family.params + self.use_bias * self.out_features


@dataclasses.dataclass(frozen=True, kw_only=True)
class PixelflyLinearSpec:
    """What a Pixelfly layer is made of: ``y = x B + (x down) up + b``.

    B keeps the blocks of ``structured.flat_butterfly``, which do not move.

    Attributes:
      in_features: Size of x's last axis; need not be a multiple of the block.
      out_features: Size of y's last axis.
      block_shape: (bk, bn), along the input and the output.
      size: Of the butterfly, a power of two: 1 keeps the diagonal alone.
      rank: Columns of down and rows of up.
      use_bias: Whether b is there.
      dtype: In which the products are computed; None: promoted from x and the weights.
        The blocks' gradients are in param_dtype, from float32 sums, whatever dtype is.
      param_dtype: In which weights and bias are kept.
      implementation: As for ``ops.block_sparse_matmul``.
    """

    in_features: int
    out_features: int
    block_shape: tuple[int, int]
    size: int
    rank: int
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    implementation: Choice = None

    def __post_init__(self):
        _check(self)
        _ = self.family  # its checks

    @property
    def family(self) -> Pixelfly:
        """The matrices that W can be."""
        sizes = self.in_features, self.out_features
        return Pixelfly(*sizes, self.block_shape, self.size, self.rank)

    @property
    def layout(self) -> BlockLayout:
        """Places of the blocks; concrete, inside jit too."""
        with jax.ensure_compile_time_eval():
            return BlockLayout.from_mask(
                self.family.block_mask, self.block_shape, shape=self.family.shape
            )

    @property
    def parameter_count(self) -> int:
        """Weights and biases that take part: those over the edge do not."""
        return self.family.params + self.use_bias * self.out_features


def init_kronecker_sparse_linear(
    key: Array, spec: KroneckerSparseLinearSpec
) -> dict[str, Array]:
    """Draws the factors so that y has the variance of x, as of a dense layer.

    Args:
      key: PRNG key.
      spec: The layer.

    Returns:
      {"factor_0" [a, d, c, b], ..., "bias" [n]}.
    """
    factors = init_chain(key, spec.chain, jnp.float32)
    named = {f"factor_{i}": f.astype(spec.param_dtype) for i, f in enumerate(factors)}
    return {**named, **_bias(spec)}


def apply_kronecker_sparse_linear(
    spec: KroneckerSparseLinearSpec,
    params: dict[str, Array],
    x: Float[Array, "*batch k"],
) -> Float[Array, "*batch n"]:
    """Computes y = x F_0 F_1 ... + b.

    Two factors without a shuffle before the first or after the last, a Monarch matrix,
    are one kernel where there is one (``ops.monarch_matmul``); others are applied one
    by one.

    Args:
      spec: The layer.
      params: {"factor_0", ..., "bias"} as from ``init_kronecker_sparse_linear``.
      x: ``[..., k]``.

    Returns:
      y ``[..., n]``.

    Raises:
      ValueError: x's last axis is not ``spec.in_features``.

    Example:
      >>> from sparsejax import layers, structured
      >>> spec = layers.KroneckerSparseLinearSpec(
      ...     in_features=30, out_features=50,
      ...     pattern=structured.monarch(30, 50, blocks=4, rank=2))
      >>> params = layers.init_kronecker_sparse_linear(jax.random.key(0), spec)
      >>> {name: value.shape for name, value in params.items()}
      {'factor_0': (4, 1, 8, 8), 'factor_1': (1, 4, 8, 13), 'bias': (50,)}
      >>> layers.apply_kronecker_sparse_linear(spec, params, jnp.ones((2, 30))).shape
      (2, 50)
    """
    _check_input(spec, x)
    patterns = spec.chain.patterns
    factors = [params[f"factor_{i}"] for i in range(len(patterns))]
    options: dict[str, Any] = dict(
        out_size=spec.out_features,
        dtype=spec.dtype,
        implementation=spec.implementation,
    )
    if len(patterns) == 2 and patterns[0].d == patterns[1].a == 1:
        y = monarch_matmul(x, *factors, **options)
    else:
        y = butterfly_matmul(x, factors, **options)
    return _add_bias(spec, params, y)


def init_low_rank_linear(key: Array, spec: LowRankLinearSpec) -> dict[str, Array]:
    """Draws down and up so that y has the variance of x, as of a dense layer.

    Args:
      key: PRNG key.
      spec: The layer.

    Returns:
      {"down" [k, rank], "up" [rank, n], "bias" [n]}.
    """
    return {**spec.family.init(key, spec.param_dtype), **_bias(spec)}


def apply_low_rank_linear(
    spec: LowRankLinearSpec,
    params: dict[str, Array],
    x: Float[Array, "*batch k"],
) -> Float[Array, "*batch n"]:
    """Computes y = (x down) up + b.

    Args:
      spec: The layer.
      params: {"down", "up", "bias"} as from ``init_low_rank_linear``.
      x: ``[..., k]``.

    Returns:
      y ``[..., n]``.

    Raises:
      ValueError: x's last axis is not ``spec.in_features``.
    """
    _check_input(spec, x)
    return _add_bias(spec, params, _low_rank(spec.family, spec, params, x))


def init_pixelfly_linear(key: Array, spec: PixelflyLinearSpec) -> dict[str, Array]:
    """Draws both parts so that y has the variance of x, half of it from each.

    Args:
      key: PRNG key.
      spec: The layer.

    Returns:
      {"blocks" [count, bk, bn], "down" [k, rank], "up" [rank, n], "bias" [n]}.
    """
    return {**spec.family.init(key, spec.param_dtype), **_bias(spec)}


def apply_pixelfly_linear(
    spec: PixelflyLinearSpec,
    params: dict[str, Array],
    x: Float[Array, "*batch k"],
) -> Float[Array, "*batch n"]:
    """Computes y = x B + (x down) up + b, B the kept blocks.

    Args:
      spec: The layer.
      params: {"blocks", "down", "up", "bias"} as from ``init_pixelfly_linear``.
      x: ``[..., k]``.

    Returns:
      y ``[..., n]``.

    Raises:
      ValueError: x's last axis is not ``spec.in_features``.

    Example:
      >>> from sparsejax import layers
      >>> spec = layers.PixelflyLinearSpec(
      ...     in_features=48, out_features=96, block_shape=(16, 16), size=2, rank=4)
      >>> params = layers.init_pixelfly_linear(jax.random.key(0), spec)
      >>> {name: value.shape for name, value in params.items()}
      {'blocks': (10, 16, 16), 'down': (48, 4), 'up': (4, 96), 'bias': (96,)}
    """
    _check_input(spec, x)
    blocks = params["blocks"]
    y = block_sparse_matmul(
        x,
        blocks,
        spec.layout,
        dtype=spec.dtype or jnp.promote_types(x.dtype, blocks.dtype),
        implementation=spec.implementation,
    )
    y = y + _low_rank(spec.family.low_rank, spec, params, x)
    return _add_bias(spec, params, y)


def _low_rank(family, spec, params, x):
    dtype = spec.dtype or jnp.promote_types(x.dtype, params["down"].dtype)
    cast = {name: params[name].astype(dtype) for name in ("down", "up")}
    return family.apply(cast, x.astype(dtype))


def _check(spec):
    if min(spec.in_features, spec.out_features) < 1:
        raise ValueError(
            f"in_features, out_features: got {spec.in_features}, {spec.out_features}, "
            "needed positive ints"
        )
    if not jnp.issubdtype(spec.param_dtype, jnp.floating):
        raise ValueError(
            f"param_dtype: got {jnp.dtype(spec.param_dtype)}, needed a floating dtype: "
            "layers are real"
        )


def _check_input(spec, x):
    # The operators pad a narrower x, and so would take one that misses features.
    if x.shape[-1] != spec.in_features:
        raise ValueError(
            f"x: got shape {x.shape}, needed [..., {spec.in_features}], in_features"
        )
