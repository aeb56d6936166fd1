"""What routers share: checked arguments, choices under a bound, their weights."""

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

NORMALIZE = ("none", "sum", "sum_stopgrad")
SCORE = ("softmax", "sigmoid")


def check_scores(
    logits: Array, mask: Array | None, *, name: str = "logits", axes: str = "[t, e]"
) -> Float[Array, "..."]:
    """Float32 logits, those of padding tokens 0, whatever they were."""
    if logits.ndim != axes.count(",") + 1 or 0 in logits.shape[1:]:
        raise ValueError(f"{name}: got shape {logits.shape}, needed {axes}")
    check_floating(name, logits)
    check_mask(mask, logits.shape[0])
    # By a select, so that NaN in padding goes nowhere, nor comes back as a gradient.
    return only_tokens(logits.astype(jnp.float32), mask)


def check_floating(name: str, array: Array) -> None:
    """Raises ValueError unless the dtype is a floating one."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{name}: got dtype {array.dtype}, needed a floating one")


def check_mask(mask: Array | None, num_tokens: int) -> None:
    """Raises ValueError unless mask is bool [t] or None."""
    if mask is not None and (mask.shape != (num_tokens,) or mask.dtype != jnp.bool_):
        raise ValueError(
            f"mask: got {mask.dtype} {mask.shape}, needed bool ({num_tokens},)"
        )


def check_count(name: str, value: Any, most: int | None = None, of: str = "") -> int:
    """The value as an int from 1 on, at most as many as there are."""
    needed = f"an int from 1 to the {most} {of}" if of else "a positive int"
    try:
        count = operator.index(value)
    except TypeError:
        count = 0
    if isinstance(value, bool) or count < 1 or (most is not None and count > most):
        raise ValueError(f"{name}: got {value!r}, needed {needed}")
    return count


def check_share(
    name: str, value: Any, shapes: Any, *, zero: bool
) -> Float[Array, "..."]:
    """The value in float32, without a gradient; in [0, 1] or (0, 1] where concrete."""
    shape = jnp.shape(value)
    if shape not in shapes:
        needed = " or ".join(map(str, shapes))
        raise ValueError(f"{name}: got shape {shape}, needed {needed}")
    if not isinstance(value, jax.core.Tracer):
        given = np.asarray(value, np.float32)
        if not ((given >= 0 if zero else given > 0) & (given <= 1)).all():
            interval = "[0, 1]" if zero else "(0, 1]"
            raise ValueError(f"{name}: got {given}, needed a number in {interval}")
    return jax.lax.stop_gradient(jnp.asarray(value, jnp.float32))


def check_bound(max_k: Any, num_experts: int) -> int:
    """The static bound of choices per token; None: all experts."""
    if max_k is None:
        return num_experts
    return check_count("max_k", max_k, num_experts, "experts")


def check_option(name: str, value: Any, options: tuple[str, ...]) -> None:
    """Raises ValueError unless the value is one of the options."""
    if value not in options:
        raise ValueError(f"{name}: got {value!r}, needed one of {options}")


def only_tokens(array: Array, mask: Array | None) -> Array:
    """The array with 0 in the rows of padding tokens."""
    if mask is None:
        return array
    rows = mask.reshape(-1, *[1] * (array.ndim - 1))
    return jnp.where(rows, array, jnp.zeros_like(array))


def jittered(
    logits: Float[Array, "t e"],
    jitter: float | Float[Array, ""],
    key: PRNGKeyArray | None,
) -> Float[Array, "t e"]:
    """Adds normal noise of standard deviation `jitter`."""
    if isinstance(jitter, float | int):
        if jitter < 0:
            raise ValueError(f"jitter: got {jitter}, needed a number from 0 on")
        if jitter == 0:
            return logits
    if key is None:
        raise ValueError("key: got None, needed one for jitter")
    noise = jax.random.normal(key, logits.shape, jnp.float32)
    return logits + jnp.asarray(jitter, jnp.float32) * noise


def largest(
    values: Float[Array, "t n"], k: int
) -> tuple[Float[Array, "t k"], Int[Array, "t k"]]:
    """The k largest of each row and their indices, ties to the lowest index."""
    values = jax.lax.stop_gradient(values)
    # top_k may put 0 before -0, which are equal.
    best, indices = jax.lax.top_k(jnp.where(values == 0, 0, values), k)
    return best, indices


def score_all(
    logits: Float[Array, "t e"], score: str
) -> tuple[Float[Array, "t e"], Float[Array, "t e"], Float[Array, "t e"]]:
    """Scores ``[t, e]``, their logarithms, and the scores as a distribution."""
    check_option("score", score, SCORE)
    # A token whose experts are all at -inf goes nowhere: its scores are 0, not NaN.
    nowhere = jnp.isneginf(logits).all(1, keepdims=True)
    logits = jnp.where(nowhere, 0, logits)
    if score == "sigmoid":
        scores, log_scores = jax.nn.sigmoid(logits), jax.nn.log_sigmoid(logits)
        # A softmax of logarithms: no epsilon under which scores could hide.
        probs = jax.nn.softmax(log_scores)
    else:
        scores, log_scores = jax.nn.softmax(logits), jax.nn.log_softmax(logits)
        probs = scores
    zeros = lambda x: jnp.where(nowhere, 0, x)
    return zeros(scores), jnp.where(nowhere, -jnp.inf, log_scores), zeros(probs)


def choose(
    order: Float[Array, "t e"], keep: Bool[Array, "t e"], bound: int
) -> tuple[Int[Array, "t k"], Bool[Array, "t k"]]:
    """Of the experts to keep, the first by falling ``order``, then by rising index.

    Returns:
      indices int32, in range also where there are fewer to keep than places; valid.
    """
    _, indices = largest(jnp.where(keep, order, -jnp.inf), bound)
    return indices, jnp.take_along_axis(keep, indices, axis=-1)


def count_demand(keep: Bool[Array, "t e"]) -> Int[Array, " e"]:
    """Tokens that asked for each expert."""
    return jnp.sum(keep, axis=0, dtype=jnp.int32)


def weigh(
    scores: Float[Array, "t e"],
    log_scores: Float[Array, "t e"],
    indices: Int[Array, "t k"],
    valid: Bool[Array, "t k"],
    normalize: str,
) -> Float[Array, "t k"]:
    """Scores of the choices, divided by their sum over a token's valid choices."""
    check_option("normalize", normalize, NORMALIZE)
    chosen = jnp.take_along_axis(scores, indices, axis=-1)
    log_chosen = jnp.take_along_axis(log_scores, indices, axis=-1)
    return jnp.where(valid, _quotients(chosen, log_chosen, valid, normalize), 0)


def _quotients(scores, log_scores, counted, normalize):
    """Weights of the places, given the scores there; only `counted` are summed."""
    if normalize == "none":
        return scores
    log_scores = jnp.where(counted, log_scores, -jnp.inf)
    top = jax.lax.stop_gradient(log_scores.max(1, keepdims=True))
    relative = jnp.exp(log_scores - jnp.where(jnp.isneginf(top), 0, top))
    total = relative.sum(1, keepdims=True)
    if normalize == "sum_stopgrad":
        total = jax.lax.stop_gradient(total)
    return relative / jnp.where(total == 0, 1, total)
