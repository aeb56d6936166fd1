"""Linear layers y = x W + b with a condensed N:M or constant fan-in W."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt

from sparsejax._dispatch import Choice
from sparsejax.layers._linear import _add_bias, _bias, _check
from sparsejax.layouts import condense_nm
from sparsejax.masks import nm_mask
from sparsejax.ops import fan_in_matmul, nm_matmul


@dataclasses.dataclass(frozen=True, kw_only=True)
class NMLinearSpec:
    """What a linear layer with a condensed N:M kernel is made of.

    Attributes:
      in_features: Size of x's last axis; a multiple of m.
      out_features: Size of y's last axis.
      n: How many of each group along the input are KEPT.
      m: Group size, at most 256.
      use_bias: Whether b is there.
      dtype: In which the product is computed; None: promoted from x and the kernel.
        The kernel's gradient is in param_dtype, from float32 sums, whatever dtype is.
      param_dtype: In which kernel and bias are kept.
      implementation: As for ``ops.nm_matmul``.
    """

    in_features: int
    out_features: int
    n: int
    m: int
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    implementation: Choice = None

    @property
    def sparsity(self) -> float:
        """Fraction of the kernel's entries that are left out."""
        return 1 - self.n / self.m

    def __post_init__(self):
        if not 1 <= self.n <= self.m <= 256:
            raise ValueError(
                f"n, m: got {self.n}:{self.m}, needed 1 <= n <= m <= 256, n KEPT of "
                "every m"
            )
        _check(self)
        if self.in_features % self.m:
            raise ValueError(
                f"in_features: got {self.in_features}, needed a multiple of m={self.m}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FanInLinearSpec:
    """What a linear layer with a constant fan-in kernel is made of.

    Attributes:
      in_features: Size of x's last axis.
      out_features: Size of y's last axis.
      fan_in: Entries kept per column, in [0, in_features].
      use_bias: Whether b is there.
      dtype: In which the product is computed; None: promoted from x and the kernel.
        The kernel's gradient is in param_dtype, from float32 sums, whatever dtype is.
      param_dtype: In which kernel and bias are kept.
      implementation: As for ``ops.fan_in_matmul``.
    """

    in_features: int
    out_features: int
    fan_in: int
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    implementation: Choice = None

    @property
    def sparsity(self) -> float:
        """Fraction of the kernel's entries that are left out."""
        return 1 - self.fan_in / self.in_features

    def __post_init__(self):
        if not 0 <= self.fan_in <= self.in_features:
            raise ValueError(
                f"fan_in: got {self.fan_in}, needed an int in [0, {self.in_features}], "
                "in_features"
            )
        _check(self)


def init_nm_linear(
    key: Array, spec: NMLinearSpec
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Draws parameters and random places.

    Entries are normal with variance 1 / (fan-in of their column, in_features * n / m),
    so that y has the variance of x.

    Args:
      key: PRNG key.
      spec: The layer.

    Returns:
      ({"kernel" [in * n / m, out], "bias" [out]}, {"kernel_indices": packed places,
      uint32, as from ``layouts.condense_nm``}).
    """
    places_key, kernel_key = jax.random.split(key)
    shape = (spec.in_features, spec.out_features)
    mask = nm_mask(jax.random.uniform(places_key, shape), spec.n, spec.m, axis=0)
    fan_in = spec.in_features // spec.m * spec.n
    w = jax.random.normal(kernel_key, shape, jnp.float32) * fan_in**-0.5
    values, indices = condense_nm(w, mask, n=spec.n, m=spec.m)
    params = {"kernel": values.astype(spec.param_dtype), **_bias(spec)}
    return params, {"kernel_indices": indices}


def apply_nm_linear(
    spec: NMLinearSpec,
    params: dict[str, Array],
    indices: UInt[Array, "words out"],
    x: Float[Array, "*batch k"],
) -> Float[Array, "*batch n"]:
    """Computes y = x W + b, W the condensed N:M kernel.

    Args:
      spec: The layer.
      params: {"kernel", "bias"} as from ``init_nm_linear``.
      indices: Packed places of the kernel's entries.
      x: ``[..., in]``.

    Returns:
      y ``[..., out]``.
    """
    kernel = params["kernel"]
    y = nm_matmul(
        x,
        kernel,
        indices,
        n=spec.n,
        m=spec.m,
        dtype=_dtype(spec, x, kernel),
        implementation=spec.implementation,
    )
    return _add_bias(spec, params, y)


def init_fan_in_linear(
    key: Array, spec: FanInLinearSpec
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Draws parameters and random places.

    Entries are normal with variance 1 / fan_in, so that y has the variance of x.

    Args:
      key: PRNG key.
      spec: The layer.

    Returns:
      ({"kernel" [out, fan_in], "bias" [out]}, {"kernel_indices": int32 [out, fan_in],
      distinct and rising in a row}).
    """
    places_key, kernel_key = jax.random.split(key)
    shape = (spec.out_features, spec.fan_in)
    scores = jax.random.uniform(places_key, (spec.out_features, spec.in_features))
    indices = jnp.sort(jnp.argsort(scores, axis=1)[:, : spec.fan_in], axis=1)
    kernel = jax.random.normal(kernel_key, shape, jnp.float32)
    kernel = kernel * max(spec.fan_in, 1) ** -0.5
    params = {"kernel": kernel.astype(spec.param_dtype), **_bias(spec)}
    return params, {"kernel_indices": indices.astype(jnp.int32)}


def apply_fan_in_linear(
    spec: FanInLinearSpec,
    params: dict[str, Array],
    indices: Int[Array, "out fan_in"],
    x: Float[Array, "*batch k"],
) -> Float[Array, "*batch n"]:
    """Computes y = x W + b, W of constant fan-in.

    Args:
      spec: The layer.
      params: {"kernel", "bias"} as from ``init_fan_in_linear``.
      indices: Rows of W that the kernel's entries stand in.
      x: ``[..., in]``.

    Returns:
      y ``[..., out]``.
    """
    kernel = params["kernel"]
    y = fan_in_matmul(
        x,
        kernel,
        indices,
        dtype=_dtype(spec, x, kernel),
        implementation=spec.implementation,
    )
    return _add_bias(spec, params, y)


def _dtype(spec, x, kernel):
    return spec.dtype or jnp.promote_types(x.dtype, kernel.dtype)
