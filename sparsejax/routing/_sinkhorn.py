"""sinkhorn: experts chosen from a transport plan that loads them evenly."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Shaped

from sparsejax.routing._choices import (
    check_count,
    check_scores,
    choose,
    only_tokens,
    score_all,
    weigh,
)
from sparsejax.routing._routing import Routing


def sinkhorn(
    logits: Shaped[Array, "..."],
    k: int,
    *,
    iterations: int = 8,
    temperature: ArrayLike = 1.0,
    normalize: str = "none",
    score: str = "softmax",
    mask: Shaped[Array, "..."] | None = None,
) -> Routing:
    """A token goes to its k experts in a plan that gives all experts the same load.

    ``P = diag(u) exp(logits / temperature) diag(v)``, where u and v make every token's
    row sum to 1 and every expert's column to t / e: the plan of largest sum of ``P *
    logits``, plus its entropy times the temperature, that balances the load. Each
    iteration of Sinkhorn's sets u, then v. The k largest entries of a row choose;
    weights are of the scores, which the plan does not enter, as published. No gradient
    passes through the plan. Costs ``iterations`` passes over ``[t, e]``.

    Balance is that of the plan, not of the choices: nearly even where k is 1 and the
    temperature low, with enough iterations; a capacity makes it exact.

    Args:
      logits: Router logits ``[t, e]``, of any floating dtype; computed in float32. An
        expert at -inf is not chosen.
      k: Experts per token, k <= e.
      iterations: How many, static; 0 chooses as ``top_k`` does.
      temperature: Positive; low ones need more iterations.
      normalize: "none": weights are the scores. "sum": divided by their sum over the
        choices; "sum_stopgrad": the same, without a gradient through that sum.
      score: "sigmoid" of each logit, which BASE layers use, or "softmax" over experts.
      mask: True for tokens, False for padding, bool ``[t]``; padding has no load.

    Returns:
      A ``Routing`` with k places per token, largest share of the plan first, ties to
      the expert of lowest index; ``probs`` are the scores, sigmoids divided by
      their sum.

    Raises:
      ValueError: Shapes or dtypes do not fit; k is not an int from 1 to e; iterations
        is negative; temperature is not positive; an option is unknown.

    Example:
      Both tokens like the first expert better; the second likes it less so:

      >>> logits = jnp.array([[2.0, 0.0], [1.0, 0.0]])
      >>> print(sparsejax.routing.sinkhorn(logits, 1, iterations=0).indices.ravel())
      [0 0]
      >>> print(sparsejax.routing.sinkhorn(logits, 1).indices.ravel())
      [0 1]

    References:
      Lewis et al., `BASE Layers: Simplifying Training of Large, Sparse Models
      <https://arxiv.org/abs/2103.16716>`_, 2021. Clark et al., `Unified Scaling Laws
      for Routed Language Models <https://arxiv.org/abs/2202.01169>`_, 2022, section
      3.1. Cuturi, `Sinkhorn Distances <https://arxiv.org/abs/1306.0895>`_, 2013.

    Note:
      The plan depends on all tokens at once, those after a token included. It is for
      training; to generate, choose by the scores alone, as with ``iterations=0``.
    """
    logits = check_scores(logits, mask)
    k = check_count("k", k, logits.shape[1], "experts")
    check_iterations(iterations)
    temperature = check_temperature(temperature)
    scores, log_scores, probs = score_all(logits, score)

    costs = jax.lax.stop_gradient(logits / temperature)
    # A token of NaN must not reach the plan of the others, through sums over tokens.
    sound = ~jnp.any(jnp.isnan(costs), axis=1)
    plan = log_sinkhorn(costs, iterations, mask=sound if mask is None else sound & mask)
    keep = only_tokens(logits != -jnp.inf, mask)
    indices, valid = choose(plan, keep, k)
    return Routing(
        indices=indices,
        weights=weigh(scores, log_scores, indices, valid, normalize),
        valid=valid,
        probs=only_tokens(probs, mask),
        mask=mask,
    )


def log_sinkhorn(
    logits: Float[Array, "n m"],
    iterations: int,
    *,
    mask: Bool[Array, " n"] | None = None,
) -> Float[Array, "n m"]:
    """``logits + u + v``, u and v such that rows and columns of its exp sum to 1.

    Rows are set before columns in each iteration. For n unlike m columns sum to 1 and
    rows to m / n, once it has converged. Rows where mask is False are in no sum.
    """
    among = None if mask is None else mask[:, None]

    def scaled(terms, axis, where=None):
        log_sum = jax.nn.logsumexp(terms, axis=axis, keepdims=True, where=where)
        return jnp.where(log_sum > -jnp.inf, -log_sum, 0)  # an empty sum stays empty

    def improve(_, potentials):
        _, v = potentials
        u = scaled(logits + v, axis=1)
        return u, scaled(logits + u, axis=0, where=among)

    n, m = logits.shape
    start = jnp.zeros((n, 1), jnp.float32), jnp.zeros((1, m), jnp.float32)
    u, v = jax.lax.fori_loop(0, iterations, improve, start)
    return logits + u + v


def check_iterations(iterations: int) -> None:
    """Raises ValueError unless it is an int from 0 on."""
    try:
        enough = operator.index(iterations) >= 0
    except TypeError:
        enough = False
    if not enough:
        raise ValueError(f"iterations: got {iterations!r}, needed an int from 0 on")


def check_temperature(temperature: ArrayLike) -> Float[Array, ""]:
    """The temperature in float32; positive, where it is concrete."""
    if jnp.shape(temperature) != ():
        raise ValueError(f"temperature: got shape {jnp.shape(temperature)}, needed ()")
    if not isinstance(temperature, jax.core.Tracer):
        given = np.asarray(temperature)
        if not (np.isfinite(given) and given > 0):
            raise ValueError(f"temperature: got {given}, needed a positive number")
    return jnp.asarray(temperature, jnp.float32)
