"""expert_choice: every expert picks its tokens."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from sparsejax.routing._choices import (
    NORMALIZE,
    check_count,
    check_option,
    check_scores,
    largest,
    only_tokens,
    score_all,
)
from sparsejax.routing._routing import Routing


def expert_choice(
    logits: Shaped[Array, "..."],
    capacity: int,
    *,
    normalize: str = "none",
    score: str = "softmax",
    mask: Shaped[Array, "..."] | None = None,
) -> Routing:
    """Every expert takes the tokens that suit it best, as many as every other expert.

    ``s = softmax(logits)`` over experts; expert j takes the ``capacity`` tokens of
    largest ``s[:, j]``, with these scores as weights. Load is balanced by construction;
    a token has from none to all of the experts. Costs a top-k of t for each expert.

    Args:
      logits: Router logits ``[t, e]``, of any floating dtype; computed in float32. An
        expert does not take a token at -inf.
      capacity: Tokens that each expert takes, c <= t. The paper's capacity factor f
        is ``c = f * t / e``.
      normalize: "none": weights are the scores, as published. "sum": divided by their
        sum over the experts that took the token, so that the weights of every token
        that was taken sum to 1; "sum_stopgrad": the same, without a gradient through
        that sum.
      score: "softmax" over experts, or "sigmoid" of each logit.
      mask: True for tokens, False for padding, bool ``[t]``. Padding is never taken: an
        expert has fewer than c valid choices where there are fewer than c tokens.

    Returns:
      A ``Routing`` by expert: indices, weights and valid ``[e, c]``, best first, ties
      to the first token; ``probs`` are the scores, sigmoids divided by their sum.

    Raises:
      ValueError: Shapes or dtypes do not fit; capacity is not an int from 1 to t; an
        option is unknown.

    Example:
      >>> logits = jnp.log(jnp.array([[0.75, 0.25], [0.5, 0.5], [0.0625, 0.9375]]))
      >>> routing = sparsejax.routing.expert_choice(logits, 2)
      >>> print(routing.indices)
      [[0 1]
       [2 1]]
      >>> print(routing.weights.round(4))
      [[0.75   0.5   ]
       [0.9375 0.5   ]]

    References:
      Zhou et al., `Mixture-of-Experts with Expert Choice Routing
      <https://arxiv.org/abs/2202.09368>`_, 2022.

    Note:
      Whether a token is taken depends on all other tokens, those after it included. A
      model trained to predict the next token sees a little of the future so, which it
      does not have when it generates: use it in encoders, or route each position over
      the batch, ``jax.vmap`` over positions.
    """
    logits = check_scores(logits, mask)
    num_tokens = logits.shape[0]
    if num_tokens:  # of none every capacity takes none
        capacity = check_count("capacity", capacity, num_tokens, "tokens")
    check_option("normalize", normalize, NORMALIZE)
    scores, log_scores, probs = score_all(logits, score)

    order = log_scores.T
    order = order if mask is None else jnp.where(mask, order, -jnp.inf)
    best, indices = largest(order, min(capacity, num_tokens))
    valid = best != -jnp.inf
    chosen = jnp.take_along_axis(log_scores.T, indices, axis=-1)
    if normalize == "none":
        weights = jnp.take_along_axis(scores.T, indices, axis=-1)
    else:
        total = _log_sums(chosen, indices, valid, num_tokens)
        if normalize == "sum_stopgrad":
            total = jax.lax.stop_gradient(total)
        weights = jnp.exp(chosen - total[indices])
    return Routing(
        indices=indices,
        weights=jnp.where(valid, weights, 0),
        valid=valid,
        probs=only_tokens(probs, mask),
        mask=mask,
        by_expert=True,
    )


def _log_sums(
    chosen: Float[Array, "e c"],
    indices: Int[Array, "e c"],
    valid: Bool[Array, "e c"],
    num_tokens: int,
) -> Float[Array, " t"]:
    """Of each token the logarithm of the sum of exp(chosen), 0 where nobody chose it.

    Relative to the largest, so that a sum of tiny scores is a number to divide by.
    """
    lowest = jnp.full(num_tokens, jnp.finfo(chosen.dtype).min, chosen.dtype)
    held = jax.lax.stop_gradient(jnp.where(valid, chosen, -jnp.inf))
    largest = lowest.at[indices].max(held)
    parts = jnp.where(valid, jnp.exp(chosen - largest[indices]), 0)
    sums = jnp.zeros_like(lowest).at[indices].add(parts)
    some = sums > 0
    return jnp.where(some, largest + jnp.log(jnp.where(some, sums, 1)), 0)
