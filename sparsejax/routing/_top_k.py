"""Each token goes to the k experts of highest score."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped

from sparsejax.routing import _capacity
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
    check_logits(logits, mask)
    experts = logits.shape[1]
    _check_options(logits, k, score, normalize, bias, groups, groups_kept)
    _check_capacity(capacity, capacity_policy)
    logits = jittered(clean(logits, mask), jitter, key)

    scores, log_scores, probs = _scores(logits, score)
    # Logits order experts as their scores do, and do not saturate into ties.
    ranking = logits if bias is None else scores + bias.astype(jnp.float32)
    if groups_kept is not None and groups_kept < groups:
        two_best = scores if bias is None else ranking
        in_group = _in_best_groups(two_best, groups, groups_kept)
        ranking = jnp.where(in_group, ranking, -jnp.inf)
    ranking = jnp.where(jnp.isneginf(logits), -jnp.inf, ranking)
    best, indices = largest(ranking, k)
    chosen = ~jnp.isneginf(best)
    if mask is not None:
        chosen &= mask[:, None]
        probs = jnp.where(mask[:, None], probs, 0)

    where_chosen = jnp.where(chosen, indices, experts)
    demand = jnp.zeros(experts, jnp.int32).at[where_chosen].add(1, mode="drop")
    valid = chosen
    if capacity is not None:
        valid = _within_capacity(where_chosen, capacity, capacity_policy, log_scores)

    weights = _weights(
        jnp.take_along_axis(scores, indices, 1),
        jnp.take_along_axis(log_scores, indices, 1),
        valid if renormalize else chosen,
        "sum" if score == "softmax_chosen" else normalize,
    )
    return Routing(
        indices=indices,
        weights=jnp.where(valid, weights, 0),
        valid=valid,
        probs=probs,
        mask=mask,
        demand=demand,
    )


def check_logits(logits: Array, mask: Array | None) -> None:
    """Raises ValueError unless logits are floating [t, e] and the mask is [t]."""
    if logits.ndim != 2 or 0 in logits.shape[1:]:
        raise ValueError(f"logits must be [tokens, experts], got {logits.shape}")
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(f"logits must be floating, got {logits.dtype}")
    if mask is not None and (mask.shape != logits.shape[:1] or mask.dtype != bool):
        raise ValueError(
            f"mask must be bool [{logits.shape[0]}], got {mask.dtype} {mask.shape}"
        )


def clean(
    logits: Float[Array, "t e"], mask: Bool[Array, "t"] | None
) -> Float[Array, "t e"]:
    """Logits in float32; 0, without gradient, for padding tokens, NaN or not."""
    logits = logits.astype(jnp.float32)
    return logits if mask is None else jnp.where(mask[:, None], logits, 0)


def jittered(
    logits: Float[Array, "t e"],
    jitter: float | Float[Array, ""],
    key: PRNGKeyArray | None,
) -> Float[Array, "t e"]:
    """Adds normal noise of standard deviation `jitter`."""
    if isinstance(jitter, float | int):
        if jitter < 0:
            raise ValueError(f"jitter must not be negative, got {jitter}")
        if jitter == 0:
            return logits
    if key is None:
        raise ValueError("jitter needs a key, got None")
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


def _scores(logits, score):
    """The scores, their logarithms, and the scores as a distribution over experts."""
    if score == "sigmoid":
        log_scores = jax.nn.log_sigmoid(logits)
        # A softmax of logarithms: no epsilon under which scores could hide.
        return jax.nn.sigmoid(logits), log_scores, jax.nn.softmax(log_scores)
    probs = jax.nn.softmax(logits)
    return probs, jax.nn.log_softmax(logits), probs


def _in_best_groups(scores, groups, kept):
    t, e = scores.shape
    members = scores.reshape(t * groups, e // groups)
    two_best, _ = largest(members, min(2, e // groups))
    _, best = largest(two_best.sum(1).reshape(t, groups), kept)
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


def _weights(scores, log_scores, counted, normalize):
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


def _check_options(logits, k, score, normalize, bias, groups, groups_kept):
    experts = logits.shape[1]
    if not 1 <= k <= experts:
        raise ValueError(f"k must be in [1, {experts}], the experts, got {k}")
    if score not in ("softmax", "softmax_chosen", "sigmoid"):
        raise ValueError(
            f"score must be 'softmax', 'softmax_chosen' or 'sigmoid', got {score!r}"
        )
    if normalize not in ("none", "sum", "sum_stopgrad"):
        raise ValueError(
            f"normalize must be 'none', 'sum' or 'sum_stopgrad', got {normalize!r}"
        )
    if score == "softmax_chosen" and normalize == "sum_stopgrad":
        raise ValueError(
            "normalize must not be 'sum_stopgrad' for score 'softmax_chosen', whose "
            "sum is 1 already: take score 'softmax'"
        )
    if bias is not None and bias.shape != (experts,):
        raise ValueError(f"bias must be [{experts}], got {bias.shape}")
    if groups < 1 or experts % groups:
        raise ValueError(f"groups must divide the {experts} experts, got {groups}")
    if groups_kept is None:
        return
    if not 1 <= groups_kept <= groups:
        raise ValueError(f"groups_kept must be in [1, {groups}], got {groups_kept}")
    if groups_kept * (experts // groups) < k:
        raise ValueError(
            f"groups_kept must leave at least k={k} experts, got {groups_kept} groups "
            f"of {experts // groups}"
        )


def _check_capacity(capacity, policy):
    if policy not in ("position", "probability"):
        raise ValueError(
            f"capacity_policy must be 'position' or 'probability', got {policy!r}"
        )
    if capacity is None:
        return
    if not isinstance(capacity, int) or capacity < 1:
        raise ValueError(
            f"capacity must be a whole number of tokens, at least 1, got {capacity}"
        )
