"""tree: experts at the leaves of soft decision trees that end up hard."""

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

from sparsejax.routing._choices import (
    check_bound,
    check_floating,
    check_mask,
    check_scores,
    choose,
    count_demand,
    only_tokens,
)
from sparsejax.routing._routing import Routing
from sparsejax.routing._sinkhorn import (
    check_iterations,
    check_temperature,
    log_sinkhorn,
)


def tree(
    nodes: Shaped[Array, "..."],
    leaves: Shaped[Array, "..."],
    *,
    gamma: float = 1.0,
    permutation: Shaped[Array, "..."] | None = None,
    max_k: int | None = None,
    mask: Shaped[Array, "..."] | None = None,
) -> Routing:
    """A token goes to the leaves that k smooth decision trees let it reach.

    Each inner node sends the share ``S(z)`` left and ``S(-z)`` right, with the smooth
    step ``S(z) = u^2 (3 - 2 u)``, ``u = clip(z / gamma + 1/2, 0, 1)``, which is 0 or 1
    from ``gamma / 2`` on; p of a leaf is the product on the way there. Over all leaves
    of all trees ``g = p exp(a) / sum(p exp(a))`` with the leaves' scores a, and an
    expert has the sum over its leaves, one in each tree. COMET's gate: differentiable,
    and a token reaches k leaves at most once all its steps are 0 or 1, which
    ``tree_entropy`` as a penalty brings about. Costs ``O(t * k * e)``, and a top-k of e
    per token.

    Trees are as even as e allows: with e not a power of two some leaves lie one level
    higher. Nodes come level by level, leaves from left to right.

    Args:
      nodes: Logits of the inner nodes of k trees, z, ``[t, k, e - 1]``; functions of
        the tokens, such as ``x @ w + b``. Computed in float32.
      leaves: Scores of the leaves, a, ``[t, k, e]``.
      gamma: Width of the smooth step, positive.
      permutation: Which expert each leaf is, ``[k, e, e]`` or ``[1, e, e]`` for all
        trees alike: doubly stochastic, ``permutation[i, leaf, expert]``, as
        ``permutation_search`` and ``round_permutation`` make it. None: in order.
      max_k: Most experts per token, static; None: e. Of more, those of largest weight
        are kept; ``demand`` counts them all.
      mask: True for tokens, False for padding, bool ``[t]``.

    Returns:
      A ``Routing``, largest weight first, ties to the expert of lowest index; a token's
      weights sum to 1 over the valid choices. ``probs`` are the weights of all experts,
      exactly 0 where no leaf is reached.

    Raises:
      ValueError: Shapes or dtypes do not fit; gamma is not positive; max_k is not an
        int from 1 to e.

    Example:
      One tree of three experts: left of the root two leaves, right of it one.

      >>> nodes = jnp.array([[[0.0, 1.0]], [[-1.0, 0.0]]])
      >>> routing = sparsejax.routing.tree(nodes, jnp.zeros((2, 1, 3)))
      >>> print(routing.probs)
      [[0.5 0.  0.5]
       [0.  0.  1. ]]

    References:
      Ibrahim et al., `COMET: Learning Cardinality Constrained Mixture of Experts with
      Trees and Local Search <https://arxiv.org/abs/2306.02824>`_, 2023. Hazimeh et al.,
      `The Tree Ensemble Layer <https://arxiv.org/abs/2002.07772>`_, 2020: smooth step.
    """
    leaves = check_scores(leaves, mask, name="leaves", axes="[t, k, e]")
    _, trees, num_experts = leaves.shape
    bound = check_bound(max_k, num_experts)
    reached = _reached(nodes, (*leaves.shape[:2], num_experts - 1), gamma, mask)

    some = reached != 0  # NaN as well, to be seen in the output
    terms = leaves + jnp.log(jnp.where(some, reached, 1))
    shares = jax.nn.softmax(terms, axis=(1, 2), where=some)
    if permutation is None:
        probs = jnp.sum(shares, axis=1)
    else:
        square = (num_experts, num_experts)
        if permutation.shape not in ((1, *square), (trees, *square)):
            raise ValueError(
                f"permutation: got shape {permutation.shape}, needed (1, *{square}) or "
                f"({trees}, *{square})"
            )
        each = jnp.broadcast_to(permutation.astype(jnp.float32), (trees, *square))
        probs = jnp.einsum("tke,kef->tf", shares, each, precision="highest")
        # Sinkhorn's matrices are doubly stochastic only nearly.
        probs = probs / jnp.sum(probs, axis=-1, keepdims=True)
    probs = only_tokens(probs, mask)
    keep = probs != 0
    indices, valid = choose(probs, keep, bound)
    chosen = jnp.where(valid, jnp.take_along_axis(probs, indices, axis=-1), 0)
    total = jnp.sum(chosen, axis=-1, keepdims=True)
    return Routing(
        indices=indices,
        weights=chosen / jnp.where(total == 0, 1, total),
        valid=valid,
        probs=probs,
        mask=mask,
        demand=count_demand(keep),
    )


def tree_entropy(
    nodes: Shaped[Array, "..."],
    *,
    gamma: float = 1.0,
    mask: Shaped[Array, "..."] | None = None,
) -> Float[Array, ""]:
    """How undecided the trees of ``tree`` are: a penalty that makes them hard.

    ``mean_t sum_trees sum_leaves -p log p``, with 0 for p = 0: from 0, each token at
    one leaf per tree, to ``k log e``. Costs ``O(t * k * e)``.

    Args:
      nodes: Logits of the inner nodes, ``[t, k, e - 1]``.
      gamma: Width of the smooth step, positive.
      mask: True for tokens, False for padding, bool ``[t]``.

    Returns:
      A float32 scalar; 0 without tokens.

    Raises:
      ValueError: Shapes or dtypes do not fit; gamma is not positive.

    Example:
      >>> nodes = jnp.array([[[0.0]], [[1.0]]])  # log 2 and 0
      >>> print(sparsejax.routing.tree_entropy(nodes).round(4))
      0.3466

    References:
      Ibrahim et al., `COMET <https://arxiv.org/abs/2306.02824>`_, 2023.
    """
    reached = _reached(nodes, nodes.shape, gamma, mask)
    terms = -reached * jnp.log(jnp.where(reached > 0, reached, 1))
    number = nodes.shape[0] if mask is None else jnp.sum(mask, dtype=jnp.float32)
    return jnp.sum(only_tokens(terms, mask)) / jnp.maximum(number, 1)


def permutation_search(
    scores: Shaped[Array, "..."],
    temperature: ArrayLike,
    *,
    iterations: int = 20,
    key: Array | None = None,
    noise: float = 0.01,
) -> Float[Array, "r e e"]:
    """Soft permutations of experts, learnt by gradients: COMET's local search.

    ``P = Sinkhorn((scores + noise * Gumbel) / temperature)``: rows, then columns, are
    divided by their sums ``iterations`` times, in logarithms. Which expert stands at
    which leaf matters, since neighbours share nodes, and gradients of the tree alone
    cannot exchange two. So for the first epochs the scores are trained with the rest,
    ``tree(..., permutation=permutation_search(scores, temperature))``, while the
    temperature falls (the paper's code: geometrically from 1e-3 to 1e-7); afterwards
    ``round_permutation(scores)`` is kept. Costs ``iterations`` passes over ``[r, e,
    e]``.

    Args:
      scores: Learnable, ``[r, e, e]``, r = k for a permutation for each tree or 1;
        random at first, such as uniform in [0, 1).
      temperature: Positive; may be traced.
      iterations: How many, static.
      key: PRNG key of the noise; None: none.
      noise: Its factor.

    Returns:
      float32 ``[r, e, e]``: columns sum to 1, rows nearly; a permutation where the
      temperature is low.

    Raises:
      ValueError: Shapes or dtypes do not fit; temperature is not positive; iterations
        is negative.

    Example:
      >>> scores = jnp.array([[[0.0, 1.0], [0.5, 0.25]]])
      >>> print(sparsejax.routing.permutation_search(scores, 0.01).round(3)[0])
      [[0. 1.]
       [1. 0.]]

    References:
      Ibrahim et al., `COMET <https://arxiv.org/abs/2306.02824>`_, 2023. Mena et al.,
      `Learning Latent Permutations with Gumbel-Sinkhorn Networks
      <https://arxiv.org/abs/1802.08665>`_, 2018.

    Note:
      For any other router P applies to its scores' columns, ``logits @ P``, once P is a
      permutation.
    """
    scores = _check_square(scores)
    check_iterations(iterations)
    temperature = check_temperature(temperature)
    if key is not None:
        scores = scores + noise * jax.random.gumbel(key, scores.shape, jnp.float32)
    plan = lambda each: log_sinkhorn(each / temperature, iterations)
    return jnp.exp(jax.vmap(plan)(scores))


def round_permutation(scores: Shaped[Array, "..."]) -> Float[Array, "r e e"]:
    """The permutations of largest total score: where ``permutation_search`` ends.

    ``argmax_P sum(P * scores)``, the assignment problem, exactly. Costs ``O(r * e^3)``.

    Args:
      scores: ``[r, e, e]``: what was learnt, or a soft permutation. Not differentiated.

    Returns:
      Zeros and ones, float32 ``[r, e, e]``.

    Raises:
      ValueError: Shapes or dtypes do not fit.

    Example:
      Greedily, row 0 would take the 3, and leave row 1 the 0:

      >>> scores = jnp.array([[[2.0, 3.0], [0.0, 2.0]]])
      >>> print(sparsejax.routing.round_permutation(scores)[0])
      [[1. 0.]
       [0. 1.]]
    """
    scores = jax.lax.stop_gradient(_check_square(scores))

    def assign(scores):
        with jax.numpy_dtype_promotion("standard"):
            rows, columns = optax.assignment.hungarian_algorithm(-scores)
        return jnp.zeros_like(scores).at[rows, columns].set(1)

    return jax.vmap(assign)(scores)


def _reached(
    nodes: Array, shape: tuple[int, ...], gamma: float, mask: Array | None
) -> Float[Array, "t k e"]:
    """The probability that a token reaches each leaf; exactly 0 where it cannot."""
    if nodes.ndim != 3 or nodes.shape != shape:
        needed = shape if len(shape) == 3 else "[t, k, e - 1]"
        raise ValueError(f"nodes: got shape {nodes.shape}, needed {needed}")
    if not gamma > 0:
        raise ValueError(f"gamma: got {gamma}, needed a positive number")
    check_floating("nodes", nodes)
    check_mask(mask, nodes.shape[0])
    nodes = only_tokens(nodes.astype(jnp.float32), mask)
    inner = nodes.shape[-1]
    reached = jnp.ones((*nodes.shape[:-1], 1), jnp.float32)
    for level in range(inner.bit_length()):
        first = 2**level - 1
        z = nodes[..., first : min(2 * first + 1, inner)]
        # Of an incomplete last level the nodes further right are leaves already.
        split, ended = jnp.split(reached, [z.shape[-1]], axis=-1)
        ways = jnp.stack([_smooth_step(z / gamma), _smooth_step(-z / gamma)], axis=-1)
        ways = (split[..., None] * ways).reshape(*z.shape[:-1], 2 * z.shape[-1])
        reached = jnp.concatenate([ways, ended], axis=-1)
    return reached


def _smooth_step(z: Float[Array, "..."]) -> Float[Array, "..."]:
    """0 below -1/2, 1 above 1/2, a cubic without kinks in between."""
    u = jnp.clip(z + 0.5, 0, 1)
    return u * u * (3 - 2 * u)


def _check_square(scores: Array) -> Float[Array, "r e e"]:
    """Scores of permutations in float32."""
    if scores.ndim != 3 or scores.shape[1] != scores.shape[2] or not scores.shape[1]:
        raise ValueError(f"scores: got shape {scores.shape}, needed [r, e, e]")
    check_floating("scores", scores)
    return scores.astype(jnp.float32)
