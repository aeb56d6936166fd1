"""A long convolution: one learned kernel per feature, as long as the sequence."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsejax._dispatch import Choice
from sparsejax.ops import long_conv


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongConvSpec:
    """What a long convolution is made of.

    Attributes:
      features: h, size of x's last axis; each has its own kernel.
      kernel_size: l, taps of a kernel; as many as the longest sequence has entries for
        a full convolution, fewer for a partial one. Of a shorter sequence a causal
        layer uses the first taps alone; a circular one needs l entries at least.
      causal: Whether y[i] sees entries up to i alone; else the sequence is periodic.
      keep_frequencies: As for ``ops.long_conv``; of the sequence's own length, so that
        it means another cut-off at another length.
      use_bias: Whether b is there.
      dtype: In which the convolution is computed; None: promoted from x and the kernel.
      param_dtype: In which kernel and bias are kept.
      implementation: As for ``ops.long_conv``.
    """

    features: int
    kernel_size: int
    causal: bool = True
    keep_frequencies: int | None = None
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    implementation: Choice = None

    def __post_init__(self):
        for name in ("features", "kernel_size"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name}: got {getattr(self, name)}, needed a positive int"
                )


def init_long_conv(key: Array, spec: LongConvSpec) -> dict[str, Array]:
    """Draws the kernels, normal with variance 1 / l.

    So y keeps the variance of a white x where all taps meet it; earlier entries of a
    causal layer have less, in proportion to the taps that do.

    Args:
      key: PRNG key.
      spec: The layer.

    Returns:
      {"kernel" [h, l], "bias" [h]}.
    """
    shape = (spec.features, spec.kernel_size)
    kernel = jax.random.normal(key, shape, jnp.float32) * spec.kernel_size**-0.5
    params = {"kernel": kernel.astype(spec.param_dtype)}
    if spec.use_bias:
        params["bias"] = jnp.zeros(spec.features, spec.param_dtype)
    return params


def apply_long_conv(
    spec: LongConvSpec,
    params: dict[str, Array],
    x: Float[Array, "*batch t h"],
    *,
    pre_gate: Float[Array, "..."] | None = None,
    post_gate: Float[Array, "..."] | None = None,
) -> Float[Array, "*batch t h"]:
    """Computes y = post_gate (k * (pre_gate x) + b), features on the last axis.

    Args:
      spec: The layer.
      params: {"kernel", "bias"} as from ``init_long_conv``.
      x: ``[..., t, h]``.
      pre_gate: As x, or None.
      post_gate: As x, or None.

    Returns:
      y ``[..., t, h]``.

    Raises:
      ValueError: x is not of ``spec.features``, or a gate not of x's shape; as for
        ``ops.long_conv``.

    Example:
      >>> from sparsejax import layers
      >>> spec = layers.LongConvSpec(features=4, kernel_size=32)
      >>> params = layers.init_long_conv(jax.random.key(0), spec)
      >>> x = jax.random.normal(jax.random.key(1), (2, 32, 4))
      >>> layers.apply_long_conv(spec, params, x, pre_gate=jnp.tanh(x)).shape
      (2, 32, 4)
    """
    if x.ndim < 2 or x.shape[-1] != spec.features:
        raise ValueError(f"x: got shape {x.shape}, needed [..., t, {spec.features}]")
    for name, gate in dict(pre_gate=pre_gate, post_gate=post_gate).items():
        if gate is not None and gate.shape != x.shape:
            raise ValueError(f"{name}: got shape {gate.shape}, needed x's {x.shape}")
    kernel = params["kernel"]
    dtype = spec.dtype or jnp.promote_types(x.dtype, kernel.dtype)
    v = (
        x.astype(dtype)
        if pre_gate is None
        else x.astype(dtype) * pre_gate.astype(dtype)
    )
    y = long_conv(
        v.swapaxes(-1, -2),
        kernel[:, : x.shape[-2]] if spec.causal else kernel,
        causal=spec.causal,
        keep_frequencies=spec.keep_frequencies,
        dtype=dtype,
        implementation=spec.implementation,
    ).swapaxes(-1, -2)
    if spec.use_bias:
        y = y + params["bias"].astype(y.dtype)
    return y if post_gate is None else y * post_gate.astype(y.dtype)
