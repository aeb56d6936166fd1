"""Initial factors after which the output has the variance of a dense layer's."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Inexact, Shaped

from sparsejax.structured._pattern import Chain


def init_chain(
    key: Array, chain: Chain, dtype: Any = jnp.float32, *, scale: ArrayLike = 1.0
) -> tuple[Inexact[Array, "_ _ _ _"], ...]:
    """Draws factors whose product has the variance of a dense layer's weight.

    Each column of each block is uniform on the unit sphere of its true inputs, those
    that padding does not reach:

        sum_j w[i, k, j, o]^2 = 1,    E w[i, k, j, o]^2 = 1 / #{true j}

    so a factor keeps the variance of what it is given. Entries of x of variance 1 make
    entries of y of variance 1, as LeCun's normal weight, variance 1 / fan-in, does. In
    a butterfly, a block-diagonal and a tensor train of rank 1 every column of the
    matrix has norm 1 in every draw; with normal entries the log2(n) factors of a
    butterfly would be right in the mean only.

    Args:
      key: PRNG key.
      chain: The patterns and the true sizes.
      dtype: Of the factors, real or complex.
      scale: By what the last factor is multiplied; 0 makes the matrix 0, and leaves the
        last factor its gradient.

    Returns:
      The factors ``[a, d, c, b]``, the first to be applied first. Entries that only
      padding meets are zero.

    Raises:
      ValueError: dtype is neither real nor complex floating.

    Example:
      >>> chain = sparsejax.structured.butterfly(8)
      >>> factors = sparsejax.structured.init_chain(jax.random.key(0), chain)
      >>> w = sparsejax.structured.to_dense(factors)
      >>> print(jnp.sum(w**2, axis=0).round(4))
      [1. 1. 1. 1. 1. 1. 1. 1.]
    """
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise ValueError(f"dtype: got {jnp.dtype(dtype)}, needed a floating dtype")
    dtype = jnp.dtype(dtype)
    fed = np.arange(chain.patterns[0].in_size) < chain.in_size
    factors = []
    for t, p in enumerate(chain.patterns):
        fed = fed.reshape(p.a, p.c, p.d)
        true = fed.transpose(0, 2, 1).reshape(-1, p.c, 1)
        # One shape for all levels of a butterfly: compiled once.
        shape = p.a * p.d, p.c, p.b
        by = scale if t == len(chain.patterns) - 1 else 1.0
        blocks = unit_columns(jax.random.fold_in(key, t), shape, dtype, true, by)
        factors.append(blocks.reshape(p.factor_shape))
        fed = np.broadcast_to(fed.any(1, keepdims=True), (p.a, p.b, p.d))
    return tuple(factors)


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def unit_columns(
    key: Array, shape: tuple[int, ...], dtype: Any, true: Any = True, scale: Any = 1.0
) -> Shaped[Array, "..."]:
    """Columns, along axis -2, of this norm, uniform over directions of true entries."""
    wide = jnp.float32 if dtype.itemsize < 4 else dtype
    draw = jax.random.normal(key, shape, wide)
    draw = jnp.where(true, draw, 0)
    norm = jnp.linalg.norm(draw, axis=-2, keepdims=True)
    by = scale / jnp.where(norm > 0, norm, 1)
    return (draw * by.astype(wide)).astype(dtype)
