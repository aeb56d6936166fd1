"""Each token goes to the k experts of highest score."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from sparsejax.routing import _capacity
from sparsejax.routing._choices import (
    NORMALIZE,
    SCORE,
    check_count,
    check_option,
    check_scores,
    jittered,
    largest,
    only_tokens,
    score_all,
    weigh,
)
from sparsejax.routing._routing import Routing


def top_k(
    logits: Shaped[Array, "..."],
    k: int,
    *,
    score: str = "softmax",
    normalize: str = "none",
    bias: Shaped[Array, "..."] | None = None,
    groups: int = 1,
    groups_kept: int | None = None,
    jitter: float | Float[Array, ""] = 0.0,
    capacity: int | None = None,
    capacity_policy: str = "position",
    renormalize: bool = True,
    mask: Shaped[Array, "..."] | None = None,
    key: PRNGKeyArray | None = None,
) -> Routing:
    r"""Sends each token to the k experts of highest score.

    With scores :math:`s_{te}` and the chosen set :math:`S_t` of the k largest
    :math:`s_{te} + b_e`, the weights are

    .. math::
      w_{te} = \begin{cases}
        s_{te} & \text{none} \\
        s_{te} / \sum_{e' \in S_t} s_{te'} & \text{sum, or with the divisor held
        constant in the gradient: sum\_stopgrad}
      \end{cases}

    The quotient is taken between logarithms' differences, without an epsilon: it sums
    to 1 however small the scores are. Costs O(t e) and, with a capacity, a sort of t k
    numbers.

    Args:
      logits: Router outputs ``[t, e]``, of any floating dtype; converted to float32
        first. An expert at -inf is not chosen: its place stays unused. Multiplicative
        jitter of the router's inputs is the caller's.
      k: Choices per token.
      score: "softmax" over all experts; "softmax_chosen": over those chosen, which is
        "softmax" with ``normalize="sum"``; "sigmoid" of each logit.
      normalize: How weights are normalized, above. "sum_stopgrad" has the values of
        "sum" and leaves the router a gradient where experts are identical, as they
        are when upcycling starts.
      bias: Added to the scores to choose, not to weight, ``[e]``; has no gradient. See
        `update_bias`.
      groups: Equal groups of consecutive experts, such as those of one node.
      groups_kept: How many groups a token may use: those of the largest sum of their
        two best scores, bias included. None: all.
      jitter: Standard deviation of normal noise added to the logits.
      capacity: How many choices an expert serves; see `capacity`. None: all.
      capacity_policy: Who is served first. "position": first choices before second
        choices, then in order of tokens. "probability": where the router's probability
        of the expert is highest, ties as before.
      renormalize: Whether `normalize` sums over the choices that are served, so that
        those sum to 1; False: over all k chosen.
      mask: True for tokens, False for padding, bool ``[t]``. Padding is not routed,
        takes no place and is not counted; its logits may be anything. None: all are
        tokens.
      key: For `jitter`.

    Returns:
      A ``Routing`` whose choices are in falling order of what they were chosen by, ties
      to the expert of lowest index. ``probs`` is the softmax, or for "sigmoid" the
      scores divided by their sum over experts. ``demand`` counts what was chosen before
      capacity.

    Raises:
      ValueError: `k` is not in [1, e], `capacity` is below 1, groups do not divide the
        experts or those kept have fewer than k, `jitter` has no `key`, an unknown name,
        shapes that do not fit.

    Example:
      >>> logits = jnp.log(jnp.array([[1.0, 2.0, 5.0], [6.0, 2.0, 2.0]]))
      >>> routing = top_k(logits, 2, normalize="sum")
      >>> routing.indices.tolist()
      [[2, 1], [0, 1]]
      >>> [[round(w, 3) for w in row] for row in routing.weights.tolist()]
      [[0.714, 0.286], [0.75, 0.25]]

    References:
      Shazeer et al., `Outrageously Large Neural Networks
      <https://arxiv.org/abs/1701.06538>`_, 2017. Groups, and bias: DeepSeek-AI,
      `DeepSeek-V3 <https://arxiv.org/abs/2412.19437>`_, 2024.
    """
    logits = check_scores(logits, mask)
    experts = logits.shape[1]
    k = check_count("k", k, experts, "experts")
    _check_options(experts, k, score, normalize, bias, groups, groups_kept)
    if capacity is not None:
        capacity = check_count("capacity", capacity)
    check_option("capacity_policy", capacity_policy, ("position", "probability"))
    logits = jittered(logits, jitter, key)

    one_score = "softmax" if score == "softmax_chosen" else score
    scores, log_scores, probs = score_all(logits, one_score)
    # Logits order experts as their scores do, and do not saturate into ties.
    ranking = logits if bias is None else scores + bias.astype(jnp.float32)
    if groups_kept is not None and groups_kept < groups:
        summed = log_scores if bias is None else ranking
        in_group = _in_best_groups(summed, groups, groups_kept, bias is None)
        ranking = jnp.where(in_group, ranking, -jnp.inf)
    ranking = jnp.where(jnp.isneginf(logits), -jnp.inf, ranking)
    best, indices = largest(ranking, k)
    chosen = only_tokens(~jnp.isneginf(best), mask)

    where_chosen = jnp.where(chosen, indices, experts)
    demand = jnp.zeros(experts, jnp.int32).at[where_chosen].add(1, mode="drop")
    valid = chosen
    if capacity is not None:
        valid = _within_capacity(where_chosen, capacity, capacity_policy, log_scores)

    summed = valid if renormalize else chosen
    normalize = "sum" if score == "softmax_chosen" else normalize
    weights = weigh(scores, log_scores, indices, summed, normalize)
    return Routing(
        indices=indices,
        weights=jnp.where(valid, weights, 0),
        valid=valid,
        probs=only_tokens(probs, mask),
        mask=mask,
        demand=demand,
    )


def _in_best_groups(scores, groups, kept, are_logs):
    """Whether each expert is in one of a token's groups of largest sums of two."""
    t, e = scores.shape
    members = scores.reshape(t * groups, e // groups)
    two_best, _ = largest(members, min(2, e // groups))
    # Of logarithms the logarithm of the sum, which does not round to 0 everywhere.
    sums = jax.nn.logsumexp(two_best, 1) if are_logs else two_best.sum(1)
    _, best = largest(sums.reshape(t, groups), kept)
    group_of = jnp.arange(e, dtype=jnp.int32) // (e // groups)
    return (best[:, :, None] == group_of).any(1)


def _within_capacity(experts, capacity, policy, log_scores):
    """Whether each choice is served; `experts` [t, k], those not chosen being e."""
    t, k = experts.shape
    # First choices of all tokens, then second choices.
    queue = experts.T.ravel()
    priority = None
    if policy == "probability":
        priority = jnp.take_along_axis(log_scores, experts, 1, mode="clip").T.ravel()
        priority = jax.lax.stop_gradient(priority)
    fits = _capacity.served(queue, log_scores.shape[1], capacity, priority)
    return fits.reshape(k, t).T


def _check_options(experts, k, score, normalize, bias, groups, groups_kept):
    check_option("score", score, (*SCORE, "softmax_chosen"))
    check_option("normalize", normalize, NORMALIZE)
    if score == "softmax_chosen" and normalize == "sum_stopgrad":
        raise ValueError(
            "normalize: got 'sum_stopgrad' for score 'softmax_chosen', whose sum is 1 "
            "already, needed 'none' or 'sum'; or take score 'softmax'"
        )
    if bias is not None and bias.shape != (experts,):
        raise ValueError(f"bias: got shape {bias.shape}, needed ({experts},)")
    if check_count("groups", groups) > experts or experts % groups:
        raise ValueError(f"groups: got {groups}, needed a divisor of {experts} experts")
    if groups_kept is None:
        return
    check_count("groups_kept", groups_kept, groups, "groups")
    if groups_kept * (experts // groups) < k:
        raise ValueError(
            f"groups_kept: got {groups_kept} groups of {experts // groups} experts, "
            f"needed at least k={k} experts"
        )
