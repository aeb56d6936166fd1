"""A softmax over what is allowed."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def softmax_over(
    logits: Float[Array, "*axes"], allowed: Bool[Array, "..."]
) -> Float[Array, "*axes"]:
    """Over the last axis, of the allowed entries alone; zeros where there is none."""
    logits = jnp.where(allowed, logits, -jnp.inf)
    top = logits.max(axis=-1, keepdims=True)
    weights = jnp.exp(logits - jnp.where(top > -jnp.inf, top, 0.0))
    total = weights.sum(axis=-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1.0)
