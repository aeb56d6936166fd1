"""relu: experts whose logit is positive; and the losses that make that few."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from sparsejax.routing._choices import (
    check_bound,
    check_count,
    check_scores,
    choose,
    count_demand,
)
from sparsejax.routing._routing import Routing


def relu(
    logits: Shaped[Array, "..."],
    *,
    scale: Shaped[Array, "..."] | None = None,
    max_k: int | None = None,
    epsilon: float = 1e-6,
    mask: Shaped[Array, "..."] | None = None,
) -> Routing:
    """A token goes to every expert whose logit is positive, differentiably.

    ``a = relu(logits)``, ``w = scale * a / sqrt(mean(a^2) + epsilon)``, the mean over
    all experts: BlockFFN's router. How many experts a token takes is up to the router,
    and its losses; weights grow from 0 as an expert comes in, so that the output is
    continuous, and the norm keeps their size. Costs a top-k of e per token.

    Args:
      logits: Router logits ``[t, e]``, of any floating dtype; computed in float32.
      scale: Learnable, ``[e]``, 1 at first; None: 1.
      max_k: Most experts per token, k <= e, static; None: e. Of more, those of largest
        logit are kept, with unchanged weights; ``demand`` counts them all.
      epsilon: That of the norm, positive.
      mask: True for tokens, False for padding, bool ``[t]``.

    Returns:
      A ``Routing`` with k places per token, largest logit first, ties to the expert of
      lowest index; a token without a positive logit has no valid choice. ``probs`` is
      ``a / sum(a)``, which sums to 1, or to 0 for a token without one.

    Raises:
      ValueError: Shapes or dtypes do not fit; max_k is not an int from 1 to e; epsilon
        is not positive.

    Example:
      >>> logits = jnp.array([[3.0, -1.0, 4.0, -2.0], [-1.0, -1.0, -1.0, -1.0]])
      >>> routing = sparsejax.routing.relu(logits, max_k=2)
      >>> print(routing.indices[0], routing.weights.round(3))  # mean(a^2) is 2.5^2
      [2 0] [[1.6 1.2]
       [0.  0. ]]

    References:
      Song et al., `BlockFFN: Towards End-Side Acceleration-Friendly Mixture-of-Experts
      with Chunk-Level Activation Sparsity <https://arxiv.org/abs/2507.08771>`_, 2025.
    """
    logits = check_scores(logits, mask)
    num_experts = logits.shape[1]
    bound = check_bound(max_k, num_experts)
    if scale is not None and scale.shape != (num_experts,):
        raise ValueError(f"scale: got shape {scale.shape}, needed ({num_experts},)")
    if not epsilon > 0:
        raise ValueError(f"epsilon: got {epsilon}, needed a positive number")

    active = jax.nn.relu(logits)
    keep = ~(logits <= 0)  # NaN is kept, to be seen in the output
    mean_square = jnp.mean(active * active, axis=-1, keepdims=True)
    weights = active * jax.lax.rsqrt(mean_square + epsilon)
    if scale is not None:
        weights = weights * scale.astype(jnp.float32)
    total = jnp.sum(active, axis=-1, keepdims=True)
    indices, valid = choose(logits, keep, bound)
    return Routing(
        indices=indices,
        weights=jnp.where(valid, jnp.take_along_axis(weights, indices, axis=-1), 0),
        valid=valid,
        probs=active / jnp.where(total > 0, total, 1),
        mask=mask,
        demand=count_demand(keep),
    )


# --- Losses and their metric ----------------------------------------------------------


def token_sparsity_loss(routing: Routing) -> Float[Array, ""]:
    """How many experts a token uses, smoothly, for routers whose scores can be 0.

    ``mean_t |p_t|_1 / (sqrt(e) |p_t|_2)`` with p the ``probs``: ``sqrt(n / e)`` for n
    equally strong experts. It is the L1 norm of the RMS-normalised scores that BlockFFN
    trains with, per expert, without the learned scale: shrinking that, or all logits,
    makes it no smaller, only fewer experts do. Costs ``O(t * e)``.

    Args:
      routing: Of ``relu``. Choices beyond its bound count.

    Returns:
      A float32 scalar in [0, 1]; 0 without tokens.

    Example:
      >>> routing = sparsejax.routing.relu(jnp.array([[2.0, -1.0, -1.0, -1.0]]))
      >>> print(sparsejax.routing.token_sparsity_loss(routing))
      0.5
    """
    squares = jnp.sum(routing.probs * routing.probs, axis=-1)
    some = squares > 0
    total = jnp.sum(routing.probs, axis=-1)
    ratios = total * jax.lax.rsqrt(jnp.where(some, squares, 1) * routing.num_experts)
    return _mean(jnp.where(some, ratios, 0), _is_token(routing))


def chunk_sparsity_loss(routing: Routing, *, chunk: int) -> Float[Array, ""]:
    """How likely some token of a chunk uses an expert, for routers like ``relu``.

    ``mean over chunks and experts of 1 - prod_(t in chunk) (1 - p[t, j])`` with p the
    ``probs``, read as independent probabilities: BlockFFN's chunk sparsification. What
    is computed for many tokens at once reads the weights of all their experts, so that
    few in all pay, not few per token. Costs ``O(t * e)``.

    Args:
      routing: Its tokens in their order; several sequences by ``jax.vmap``.
      chunk: Tokens per chunk, static; the last chunk may have fewer. The paper's are 64
        in training.

    Returns:
      A float32 scalar in [0, 1]; chunks without tokens do not count.

    Raises:
      ValueError: chunk is not a positive int; the routing is by expert.

    Example:
      >>> routing = sparsejax.routing.relu(jnp.array([[1.0, 1.0], [1.0, -1.0]]))
      >>> print(sparsejax.routing.chunk_sparsity_loss(routing, chunk=2))
      0.75

    References:
      Song et al., `BlockFFN <https://arxiv.org/abs/2507.08771>`_, 2025.
    """
    _check_by_token(routing)
    # No logarithm: where p is 1 the product is 0, and its gradient that of the rest.
    unused = jnp.prod(1 - _chunks(routing.probs, chunk), axis=1)
    counts = jnp.any(_chunks(_is_token(routing), chunk), axis=1)
    return _mean(jnp.mean(1 - unused, axis=-1), counts)


def activation_locality_loss(
    logits: Shaped[Array, "..."],
    *,
    steepness: float = 100.0,
    segments: Int[Array, "..."] | None = None,
    mask: Shaped[Array, "..."] | None = None,
) -> Float[Array, ""]:
    """How much the experts of neighbouring tokens differ, for routers like ``relu``.

    ``mean over t and experts of BCE(sigmoid(c l[t-1]), sigmoid(c l[t]))`` with ``BCE(q,
    p) = -p log q - (1 - p) log(1 - q)``; the steep sigmoid stands for l > 0. Both sides
    have a gradient, as published. Costs ``O(t * e)``.

    Args:
      logits: Router logits ``[t, e]``, tokens in their order; computed in float32.
      steepness: c; the paper's is 100.
      segments: Integers ``[t]``; tokens of unlike segments are no neighbours. None: all
        tokens are one sequence.
      mask: True for tokens, False for padding, bool ``[t]``; padding is nobody's
        neighbour.

    Returns:
      A float32 scalar; 0 where there are no neighbours.

    Raises:
      ValueError: Shapes or dtypes do not fit.

    Example:
      >>> alike = jnp.array([[1.0, -1.0], [1.0, -1.0]])
      >>> print(sparsejax.routing.activation_locality_loss(alike).round(3))
      0.0
      >>> unlike = jnp.array([[1.0, -1.0], [-1.0, -1.0]])
      >>> print(sparsejax.routing.activation_locality_loss(unlike).round())
      50.0

    References:
      Song et al., `BlockFFN <https://arxiv.org/abs/2507.08771>`_, 2025.
    """
    logits = steepness * check_scores(logits, mask)
    num_tokens = logits.shape[0]
    near = jnp.ones(max(num_tokens - 1, 0), bool)
    if mask is not None:
        near = mask[1:] & mask[:-1]
    if segments is not None:
        if segments.shape != (num_tokens,):
            raise ValueError(
                f"segments: got shape {segments.shape}, needed ({num_tokens},)"
            )
        near = near & (segments[1:] == segments[:-1])
    before, here = logits[:-1], logits[1:]
    # -p log q - (1 - p) log(1 - q) with q = sigmoid(before): softplus(z) - p z.
    unlike = jax.nn.softplus(before) - jax.nn.sigmoid(here) * before
    return _mean(jnp.mean(unlike, axis=-1), near)


def chunk_sparsity(routing: Routing, *, chunk: int = 1) -> Float[Array, ""]:
    """The share of experts that no token of a chunk uses; a metric, without a gradient.

    ``mean over chunks of 1 - |union of their experts| / e``: with chunk 1 token-level
    sparsity (TLS), else chunk-level sparsity (CLS), which BlockFFN reports for 8.

    Args:
      routing: Of any router that chooses by token, its tokens in their order.
      chunk: Tokens per chunk, static; the last chunk may have fewer.

    Returns:
      A float32 scalar in [0, 1]; chunks without tokens do not count.

    Raises:
      ValueError: chunk is not a positive int; the routing is by expert.

    Example:
      >>> routing = sparsejax.routing.relu(jnp.array([[1.0, -1.0], [-1.0, 1.0]]))
      >>> print(sparsejax.routing.chunk_sparsity(routing))
      0.5
      >>> print(sparsejax.routing.chunk_sparsity(routing, chunk=2))
      0.0
    """
    _check_by_token(routing)
    tokens, experts, _ = routing.choices()
    used = (
        jnp.zeros(routing.probs.shape, bool).at[tokens, experts].set(True, mode="drop")
    )
    used = jnp.any(_chunks(used, chunk), axis=1)
    counts = jnp.any(_chunks(_is_token(routing), chunk), axis=1)
    return _mean(1 - jnp.mean(used, axis=-1, dtype=jnp.float32), counts)


def _check_by_token(routing: Routing) -> None:
    if routing.by_expert:
        raise ValueError("routing: got one by expert, needed one by token")


def _is_token(routing: Routing) -> Bool[Array, " t"]:
    """Which rows are tokens."""
    if routing.mask is not None:
        return routing.mask
    return jnp.ones(routing.num_tokens, bool)


def _chunks(rows: Array, chunk: int) -> Array:
    """``[t, ...] -> [chunks, chunk, ...]``, zeros where the last one has fewer."""
    chunk = check_count("chunk", chunk)
    rows = jnp.pad(rows, ((0, -len(rows) % chunk), *[(0, 0)] * (rows.ndim - 1)))
    return rows.reshape(-1, chunk, *rows.shape[1:])


def _mean(values: Float[Array, " n"], counts: Bool[Array, " n"]) -> Float[Array, ""]:
    """The mean of those that count; 0 of none."""
    number = jnp.maximum(jnp.sum(counts, dtype=jnp.float32), 1)
    return jnp.sum(jnp.where(counts, values, 0)) / number
