"""threshold: every expert whose score is high enough."""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Shaped

from sparsejax.routing._choices import (
    check_bound,
    check_scores,
    check_share,
    choose,
    count_demand,
    only_tokens,
    score_all,
    weigh,
)
from sparsejax.routing._routing import Routing


def threshold(
    logits: Shaped[Array, "..."],
    threshold: ArrayLike,
    *,
    max_k: int | None = None,
    at_least_one: bool = False,
    normalize: str = "none",
    score: str = "softmax",
    mask: Shaped[Array, "..."] | None = None,
) -> Routing:
    """A token goes to all experts whose score reaches a threshold.

    ``S = {j : s[j] >= threshold[j]}`` with ``s = softmax(logits)`` or their sigmoids:
    easy tokens use few experts and hard ones many. Costs a top-k of e per token.

    Args:
      logits: Router logits ``[t, e]``, of any floating dtype; computed in float32. An
        expert at -inf is not chosen.
      threshold: In [0, 1], one for all experts or one for each, ``[e]``. Traced, it
        changes without recompiling. It has no gradient.
      max_k: Most experts per token, k <= e, static; None: e. Of more, those of largest
        score are kept; ``demand`` counts them all.
      at_least_one: Whether a token that reaches no threshold goes to its first expert;
        otherwise it has no valid choice, and its output is 0.
      normalize: "none": weights are the scores. "sum": divided by their sum over the
        valid choices; "sum_stopgrad": the same, without a gradient through that sum.
      score: "softmax" over experts, or "sigmoid" of each logit.
      mask: True for tokens, False for padding, bool ``[t]``.

    Returns:
      A ``Routing`` with k places per token, highest scores first, ties to the expert of
      lowest index; ``probs`` are the scores, sigmoids divided by their sum.

    Raises:
      ValueError: Shapes or dtypes do not fit; a concrete threshold is not in [0, 1];
        max_k is not an int from 1 to e; an option is unknown.

    Example:
      >>> logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]))
      >>> routing = sparsejax.routing.threshold(logits, 0.2, max_k=2)
      >>> print(routing.indices[routing.valid], routing.demand - routing.counts())
      [0 1 1] [0 0 1]

    References:
      Guo et al., `Dynamic Mixture of Experts: An Auto-Tuning Approach for Efficient
      Transformer Models <https://arxiv.org/abs/2405.14297>`_, 2024: sigmoids, a
      threshold for each expert, at least one expert. Yang et al., `XMoE: Sparse Models
      with Fine-grained and Adaptive Expert Selection
      <https://arxiv.org/abs/2403.18926>`_, 2024: a threshold on the cumulative
      probability, which is ``top_p``.
    """
    logits = check_scores(logits, mask)
    num_experts = logits.shape[1]
    bound = check_bound(max_k, num_experts)
    shapes = ((), (num_experts,))
    least = check_share("threshold", threshold, shapes, zero=True)
    scores, log_scores, probs = score_all(logits, score)

    there = logits != -jnp.inf
    keep = ~(scores < least) & there  # NaN is kept, to be seen in the output
    if at_least_one:
        first = jnp.argmax(log_scores, axis=-1, keepdims=True)
        none = ~jnp.any(keep, axis=-1, keepdims=True)
        keep = keep | (none & there & (jnp.arange(num_experts) == first))
    keep = only_tokens(keep, mask)
    indices, valid = choose(log_scores, keep, bound)
    return Routing(
        indices=indices,
        weights=weigh(scores, log_scores, indices, valid, normalize),
        valid=valid,
        probs=only_tokens(probs, mask),
        mask=mask,
        demand=count_demand(keep),
    )
