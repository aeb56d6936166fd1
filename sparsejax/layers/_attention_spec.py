"""What a layer of sparse attention is made of, and its first parameters."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sparsejax._dispatch import Choice


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseAttentionSpec:
    """What a layer of sparse attention is made of, its mask apart.

    Attributes:
      features: d_model, size of x's and y's last axis.
      num_heads: h, heads of the queries.
      num_kv_heads: h_kv, heads of keys and values, each for h / h_kv heads of queries;
        None: h.
      head_dim: d, size of a head; None: d_model / h.
      block_shape: (bq, bk), queries and keys of a block, for masks that are given as
        expressions or selectors; bk is also the size of a page of the cache.
      capacity: Blocks listed for each block of queries, at most, where an expression is
        given: the lists are then as much shorter, and blocks beyond are left out. None:
        as many as there are.
      rotary_base: Longest wavelength of rotary positions, over 2 pi; usually 10_000.
        None: positions are not seen.
      scale: Of the logits; None: d^-1/2.
      logits_soft_cap: c of c tanh(logits / c); None: as they are.
      use_bias: Whether queries, keys, values and y have a bias.
      dtype: In which products are computed; None: promoted from x and the parameters.
      param_dtype: In which parameters are kept.
      implementation: As for ``ops.block_sparse_attention``.
    """

    features: int
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    block_shape: tuple[int, int] = (128, 128)
    capacity: int | None = None
    rotary_base: float | int | None = None
    scale: float | None = None
    logits_soft_cap: float | None = None
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    implementation: Choice = None

    def __post_init__(self):
        for name in ("features", "num_heads", "num_kv_heads", "head_dim", "capacity"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"{name}: got {size}, needed a positive int")
        if len(self.block_shape) != 2 or min(self.block_shape) < 1:
            raise ValueError(
                f"block_shape: got {self.block_shape}, needed two positive ints"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_kv_heads: got {self.kv_heads}, needed a divisor of "
                f"{self.num_heads}, num_heads"
            )
        if self.head_dim is None and self.features % self.num_heads:
            raise ValueError(
                f"num_heads: got {self.num_heads}, needed a divisor of "
                f"{self.features}, features, or a head_dim"
            )
        if self.rotary_base is not None and (self.size % 2 or self.rotary_base <= 0):
            raise ValueError(
                f"rotary_base: got {self.rotary_base} with heads of {self.size}, "
                "needed a positive base and an even size: features turn in pairs"
            )

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_kv_heads or self.num_heads

    @property
    def size(self) -> int:
        """Of a head."""
        return self.head_dim or self.features // self.num_heads


def init_sparse_attention(key: Array, spec: SparseAttentionSpec) -> dict[str, Array]:
    """Draws the projections, normal with variance 1 / fan-in; biases are zero.

    So queries, keys and values have the variance of x, and y that of what attention
    gives.

    Args:
      key: PRNG key.
      spec: The layer.

    Returns:
      {"query" [d_model, h, d], "key" and "value" [d_model, h_kv, d], "out" [h, d,
      d_model], and with biases "query_bias" [h, d], "key_bias" and "value_bias" [h_kv,
      d], "out_bias" [d_model]}.
    """
    n, h, h_kv, d = spec.features, spec.num_heads, spec.kv_heads, spec.size
    shapes = {
        "query": (n, h, d),
        "key": (n, h_kv, d),
        "value": (n, h_kv, d),
        "out": (h, d, n),
    }
    params = {}
    keys = jax.random.split(key, len(shapes))
    for draw, (name, shape) in zip(keys, shapes.items(), strict=True):
        fan_in = h * d if name == "out" else n
        kernel = jax.random.normal(draw, shape, jnp.float32) * fan_in**-0.5
        params[name] = kernel.astype(spec.param_dtype)
    if spec.use_bias:
        for name, shape in shapes.items():
            bias = shape[-1:] if name == "out" else shape[1:]
            params[f"{name}_bias"] = jnp.zeros(bias, spec.param_dtype)
    return params
