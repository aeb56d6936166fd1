"""SynFlow: pruning that needs no data and starves no layer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sparsejax import masks as masks_lib
from sparsejax.pruning._scores import kept_counts, replace, take, wide
from sparsejax.transforms._leaves import LeafFilter, select_leaves, tree_with_holes
from sparsejax.transforms._shared import Distribution, density_from

Apply = Callable[[Any, Any], Any]

# Inputs of 2^-120 ... 2^120 stand in for ones where the flow leaves float32.
_STEP = 40
_LIMIT = 120


def synflow_scores(
    apply: Apply,
    params: Any,
    input_shape: tuple[int, ...],
    *,
    leaf_filter: LeafFilter = None,
) -> Any:
    r"""How much of the flow through the network passes each weight.

    .. math:: s = |w| \odot \frac{\partial R}{\partial |w|}, \quad
      R = \sum f(|w|, \mathbb{1})

    the synaptic saliency of one round. All floating parameters enter by absolute
    value, biases too. In a network without biases the scores of every layer that
    all paths cross sum to R. Costs one gradient on one input, and one evaluation.

    R is the sum of products along all paths and leaves float32 in deep networks.
    Where it does, the input and the incoming derivative are filled with one power
    of two instead of ones, found in steps of :math:`2^{40}`: the scores of a network
    whose output is proportional to its input are multiplied by the square of it,
    the same for all, so no order changes, and R may be anything from about
    :math:`10^{-70}` to :math:`10^{70}`. With biases other than zero such a network
    would be approximated; beyond, scores are not finite. Give float64 parameters
    for either.

    Args:
      apply: `(params, x) -> outputs`, with normalization off or on fixed statistics:
        a norm over the batch or the features undoes what is measured.
      params: Tree of arrays. float32 is computed with, float64 where it is given.
      input_shape: Shape of the input, the batch's axis included: (1, 28, 28, 1).
      leaf_filter: Which leaves are scored, as in `transforms.sparsify`.

    Returns:
      A tree like `params` of scores >= 0, all times one power of two,
      `optax.MaskedNode` elsewhere.

    Raises:
      ValueError: The filter matches nothing.

    Example:
      >>> up, down = jnp.array([[1.0, -2.0]]), jnp.array([[3.0], [-4.0]])
      >>> apply = lambda params, x: x @ params["up"] @ params["down"]
      >>> scores = synflow_scores(apply, {"up": up, "down": down}, (1, 1))
      >>> print(scores["up"], scores["down"].T)
      [[3. 8.]] [[3. 8.]]

    References:
      Tanaka et al., `Pruning neural networks without any data by iteratively
      conserving synaptic flow <https://arxiv.org/abs/2006.05467>`_, 2020.
    """
    leaves = select_leaves(params, leaf_filter)
    flow, weights = _flow(apply, params, input_shape, list(leaves))
    return tree_with_holes(params, _saliency(flow, weights))


def synflow(
    apply: Apply,
    params: Any,
    input_shape: tuple[int, ...],
    *,
    sparsity: float,
    rounds: int = 100,
    distribution: Distribution | str = "global",
    leaf_filter: LeafFilter = None,
) -> Any:
    r"""Prunes in rounds by flow, so that no layer is cut before its time: SynFlow.

    .. math:: d_k = d^{k / n}, \quad k = 1, \ldots, n

    In round k the :math:`d_k` largest `synflow_scores` of the network as it is by
    then are kept. What is pruned never comes back. Costs `rounds` gradients on one
    input, in one loop that is compiled once.

    Args:
      apply: `(params, x) -> outputs`, as in `synflow_scores`.
      params: Tree of arrays.
      input_shape: Shape of the input, the batch's axis included.
      sparsity: Fraction of the chosen leaves' weights that is pruned, in [0, 1].
      rounds: n; the paper's 100. One-shot pruning by flow, 1, is much worse.
      distribution: "global" or densities per leaf, as in `keep_largest`.
      leaf_filter: Which leaves, as in `transforms.sparsify`.

    Returns:
      Masks: a tree like `params` of boolean arrays, `optax.MaskedNode` elsewhere.

    Raises:
      ValueError: `sparsity` is outside [0, 1], `rounds` is below 1, the filter
        matches nothing, the densities of some round do not average to
        :math:`d_k`, or a score is not finite (inside jit: infinity ranks first,
        NaN last).

    Example:
      >>> up, down = jnp.array([[1.0, -2.0]]), jnp.array([[3.0], [-4.0]])
      >>> apply = lambda params, x: x @ params["up"] @ params["down"]
      >>> masks = synflow(apply, {"up": up, "down": down}, (1, 1), sparsity=0.5)
      >>> print(masks["up"], masks["down"].T)
      [[False  True]] [[False  True]]

    References:
      Tanaka et al., `Pruning neural networks without any data by iteratively
      conserving synaptic flow <https://arxiv.org/abs/2006.05467>`_, 2020.
    """
    density = density_from(sparsity)
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    leaves = select_leaves(params, leaf_filter)
    flow, weights = _flow(apply, params, input_shape, list(leaves))
    densities = [density ** (k / rounds) for k in range(1, rounds)] + [density]
    plan = [kept_counts(leaves, d, distribution) for d in densities]
    table = jax.tree.map(lambda *counts: jnp.array(counts, jnp.int32), *plan)

    def prune(k, state):
        masks, finite = state
        scores = _saliency(flow, masks_lib.apply_masks(weights, masks))
        for score in scores.values():
            finite &= jnp.all(jnp.isfinite(score))
        return take(scores, jax.tree.map(lambda c: c[k], table), masks), finite

    masks = {name: jnp.ones(leaf.shape, bool) for name, leaf in leaves.items()}
    masks, finite = lax.fori_loop(0, rounds, prune, (masks, jnp.array(True)))
    if not isinstance(finite, jax.core.Tracer) and not finite:
        raise ValueError(
            "scores must be finite in every round, got some that are not: the flow "
            "leaves the range of the dtype; give float64 params"
        )
    return tree_with_holes(params, masks)


def _flow(
    apply: Apply, params: Any, input_shape: tuple[int, ...], names: list[str]
) -> tuple[Callable[[Any, Any], Any], dict[str, Any]]:
    """`R(weights, fill)`, and the absolute weights at which it is taken."""
    positive = {
        name: jnp.abs(wide(leaf))
        for name, leaf in masks_lib.named_leaves(params).items()
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    }

    def flow(weights, fill):
        x = jnp.full(input_shape, fill)
        return jnp.sum(apply(replace(params, positive | weights), x))

    return flow, {name: positive[name] for name in names}


def _saliency(flow: Callable[[Any, Any], Any], weights: dict[str, Any]) -> Any:
    double = any(weight.dtype == jnp.float64 for weight in weights.values())
    dtype = jnp.float64 if double else jnp.float32
    fill = lambda exponent: jnp.ldexp(jnp.ones((), dtype), exponent)
    lost = lambda total: ~jnp.isfinite(total) | (total == 0)

    def unfit(state):
        exponent, total = state
        return lost(total) & (jnp.abs(exponent) < _LIMIT)

    def shift(state):
        exponent, total = state
        exponent += jnp.where(total == 0, _STEP, -_STEP)
        return exponent, flow(weights, fill(exponent))

    start = jnp.zeros((), jnp.int32)
    start = (start, flow(weights, fill(start)))
    exponent, _ = lax.while_loop(unfit, shift, start)
    # The derivative that comes in is scaled as the input is: either end of the
    # network would overflow otherwise.
    _, pullback = jax.vjp(lambda w: flow(w, fill(exponent)), weights)
    (gradient,) = pullback(fill(exponent))
    return {name: weights[name] * gradient[name] for name in weights}
