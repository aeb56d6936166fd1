"""top_p: the fewest experts that hold a given share of the probability."""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Shaped

from sparsejax.routing._choices import (
    check_bound,
    check_scores,
    check_share,
    choose,
    count_demand,
    largest,
    only_tokens,
    score_all,
    weigh,
)
from sparsejax.routing._routing import Routing


def top_p(
    logits: Shaped[Array, "..."],
    p: ArrayLike,
    *,
    max_k: int | None = None,
    normalize: str = "none",
    mask: Shaped[Array, "..."] | None = None,
) -> Routing:
    """A token goes to the fewest experts that together have the probability p.

    With ``s = softmax(logits)`` sorted falling, the i-th expert is kept while ``s_1 +
    ... + s_(i-1) < p``: the one that reaches p is the last, so each token has one
    expert at least, and all of them where p is 1. A flat distribution, of a token that
    the router is unsure of, takes many. Costs a sort of e per token.

    Args:
      logits: Router logits ``[t, e]``, of any floating dtype; computed in float32. An
        expert at -inf is not chosen.
      p: Share of the probability, in (0, 1]. Traced, it changes without recompiling. It
        has no gradient.
      max_k: Most experts per token, k <= e, static; None: e. Of more, those of largest
        score are kept; ``demand`` counts them all.
      normalize: "none": weights are the probabilities. "sum": divided by their sum over
        the valid choices; "sum_stopgrad": the same, without a gradient through that
        sum.
      mask: True for tokens, False for padding, bool ``[t]``.

    Returns:
      A ``Routing`` with k places per token, most probable first, ties to the expert of
      lowest index; ``probs`` is s.

    Raises:
      ValueError: Shapes or dtypes do not fit; a concrete p is not in (0, 1]; max_k is
        not an int from 1 to e; an option is unknown.

    Example:
      >>> logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.2, 0.6, 0.2]]))
      >>> routing = sparsejax.routing.top_p(logits, 0.55)
      >>> print(routing.valid)
      [[ True  True False]
       [ True False False]]
      >>> print(routing.weights[0])
      [0.5  0.25 0.  ]

    References:
      Yang et al., `XMoE: Sparse Models with Fine-grained and Adaptive Expert Selection
      <https://arxiv.org/abs/2403.18926>`_, 2024. Huang et al., `Harder Tasks Need More
      Experts: Dynamic Routing in MoE Models <https://arxiv.org/abs/2403.07652>`_, 2024.
    """
    logits = check_scores(logits, mask)
    bound = check_bound(max_k, logits.shape[1])
    share = check_share("p", p, ((),), zero=False)
    scores, log_scores, probs = score_all(logits, "softmax")

    _, order = largest(log_scores, logits.shape[1])
    falling = jnp.take_along_axis(scores, order, axis=-1)
    before = jnp.pad(jnp.cumsum(falling, axis=-1)[:, :-1], ((0, 0), (1, 0)))
    # A sum that rounds to 1 must not cut the tail that belongs to it.
    kept = (before < share) | (share >= 1)
    keep = jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), axis=-1)
    keep = only_tokens(keep & (logits != -jnp.inf), mask)
    indices, valid = choose(log_scores, keep, bound)
    return Routing(
        indices=indices,
        weights=weigh(scores, log_scores, indices, valid, normalize),
        valid=valid,
        probs=only_tokens(probs, mask),
        mask=mask,
        demand=count_demand(keep),
    )
