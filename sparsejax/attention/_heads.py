"""Queries and keys by their heads: checked, paired, and pooled over blocks."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from sparsejax.attention._budget import check_count


def check_pair(
    query: Shaped[Array, "..."],
    key: Shaped[Array, "..."],
    block_shape: tuple[int, int],
) -> None:
    """Raises ValueError unless query and key are heads that fit each other."""
    for name, array in (("query", query), ("key", key)):
        if array.ndim != 4 or 0 in array.shape:
            raise ValueError(
                f"{name}: got shape {array.shape}, needed [batch, length, heads, "
                "head_dim], none of them 0"
            )
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name}: got {array.dtype}, needed floating")
    b, _, h, d = query.shape
    if key.shape[0] != b or key.shape[3] != d:
        raise ValueError(
            f"key: got shape {key.shape} beside query {query.shape}, needed the same "
            "batch and head_dim"
        )
    if h % key.shape[2]:
        raise ValueError(
            f"key: got {key.shape[2]} heads, needed a divisor of query's {h}"
        )
    if len(block_shape) != 2:
        raise ValueError(f"block_shape: got {block_shape}, needed (block_q, block_k)")
    for size in block_shape:
        check_count("block_shape", size)


def pool_blocks(
    x: Float[Array, "b t h d"], size: int, how: str = "mean"
) -> Float[Array, "b h n d"]:
    """Means (or others) of ``size`` rows each, in float32; the last may be short.

    Args:
      x: Queries or keys.
      size: Rows per block.
      how: "mean", "max", "min" or "sum".
    """
    t = x.shape[1]
    n = -(-t // size)
    fill = {"mean": 0.0, "sum": 0.0, "max": -jnp.inf, "min": jnp.inf}[how]
    x = jnp.pad(
        x.astype(jnp.float32),
        ((0, 0), (0, n * size - t), (0, 0), (0, 0)),
        constant_values=fill,
    )
    blocks = x.reshape(x.shape[0], n, size, *x.shape[2:])
    if how == "max":
        pooled = blocks.max(axis=2)
    elif how == "min":
        pooled = blocks.min(axis=2)
    elif how == "sum":
        pooled = blocks.sum(axis=2)
    else:
        counts = jnp.minimum(t - jnp.arange(n) * size, size).astype(jnp.float32)
        pooled = blocks.sum(axis=2) / counts[:, None, None]
    return jnp.moveaxis(pooled, 1, 2)


def panels(x: Float[Array, "b t h d"], size: int) -> Float[Array, "n b size h d"]:
    """Rows in blocks, in float32, with zeros beyond the last."""
    b, t, h, d = x.shape
    x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, -t % size), (0, 0), (0, 0)))
    return jnp.moveaxis(x.reshape(b, -1, size, h, d), 1, 0)


def largest_by_block(
    x: Float[Array, "b h q s"], rows: Bool[Array, " q"], size: int
) -> Float[Array, "b h nk"]:
    """The largest entry of the rows that are True, in each block of columns."""
    top = jnp.where(rows[:, None], x, -jnp.inf).max(axis=2)
    pad = ((0, 0), (0, 0), (0, -x.shape[-1] % size))
    top = jnp.pad(top, pad, constant_values=-jnp.inf)
    return top.reshape(*top.shape[:2], -1, size).max(axis=-1)


def pair_heads(
    q: Float[Array, "b h n d"], k: Float[Array, "b g m d"]
) -> Float[Array, "b h n m"]:
    """Products of all rows, each query head with the key head of its group."""
    b, h, n, d = q.shape
    grouped = q.reshape(b, k.shape[1], -1, n, d)
    scores = jnp.einsum(
        "bgrnd,bgmd->bgrnm", grouped, k, precision=jax.lax.Precision.HIGHEST
    )
    return scores.reshape(b, h, n, -1)


def to_heads(x: Array, heads: int) -> Array:
    """Repeats what a group of heads shares; an axis of 1 stays."""
    return x if x.shape[1] == 1 else jnp.repeat(x, heads // x.shape[1], axis=1)
