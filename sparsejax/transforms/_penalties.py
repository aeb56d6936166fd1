"""Penalties of whole models: HyperSparse, and MaskSparsity."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float

from sparsejax import masks as masks_lib
from sparsejax.transforms import _leaves
from sparsejax.transforms._groups import widest
from sparsejax.transforms._proximal import (
    Schedule,
    at_step,
    replace_leaves,
    taken_leaves,
)
from sparsejax.transforms._shared import density_from

# Where the third derivative of tanh is zero: tanh(x)**2 = 1/3.
_INFLECTION = math.atanh(3**-0.5)


def hypersparse_penalty(
    params: Any, *, sparsity: float, leaf_filter: _leaves.LeafFilter = None
) -> Float[Array, ""]:
    r"""HyperSparse: its gradient presses on small weights and spares large ones.

    .. math::
      L(w) = \frac1A \sum_i |w_i| \sum_j \tanh(s |w_j|) - \sum_i |w_i|, \quad
      A = \sum_j \tanh(s |w_j|)

    with A and s held fixed, so that its value is always 0 and its gradient is

    .. math::
      \frac{\partial L}{\partial w_i} = \mathrm{sign}(w_i) \,
        \frac{s \, (1 - \tanh^2(s |w_i|)) \sum_j |w_j|}{\sum_j \tanh(s |w_j|)}

    The sums run over all leaves. The scale s puts the smallest weight that a global
    magnitude pruning to `sparsity` would keep at the point where the third derivative
    of tanh vanishes, `tanh(s |w|)**2 = 1/3`: weights well below it feel nearly the
    same pull, weights above it less and less. Where that weight is 0 the target is
    reached, and the gradient is 0. Costs the global selection, a few passes over the
    weights.

    Adaptive regularized training (ART) adds `hypersparse_coefficient(t) * L` to the
    loss, or `add_hypersparse` to the optimizer, until the pruned model is as good on
    training data as the dense one; then it prunes and fine-tunes with fixed masks.

    Args:
      params: Tree of arrays.
      sparsity: Fraction of weights to be pruned, over all leaves taken; at least one
        weight must be left.
      leaf_filter: Which parameters, as for `sparsify`.

    Returns:
      A float32 scalar (float64 where a leaf is): 0, with the gradient above.

    Raises:
      ValueError: `sparsity` is outside [0, 1] or keeps no weight, or a filter takes no
        leaf.

    Example:
      >>> params = {"w": jnp.array([[1.0, -2.0, 4.0]])}
      >>> loss = lambda params: hypersparse_penalty(params, sparsity=0.4)
      >>> print([round(float(g), 3) for g in jax.grad(loss)(params)["w"][0]])
      [1.176, -0.872, 0.327]

    References:
      Glandorf et al., `HyperSparse neural networks: shifting exploration to
      exploitation through adaptive regularization
      <https://arxiv.org/abs/2308.07163>`_, 2023.
    """
    leaves = _leaves.select_leaves(params, leaf_filter)
    size = sum(math.prod(leaf.shape) for leaf in leaves.values())
    kept = masks_lib.exact_count(density_from(sparsity), size)
    if kept == 0:
        raise ValueError(
            f"sparsity must leave at least one of {size} weights, got {sparsity}"
        )
    dtype = widest(jnp.float32, *(leaf.dtype for leaf in leaves.values()))
    w = {name: _magnitude(leaf.astype(dtype)) for name, leaf in leaves.items()}
    total = lambda fn: sum(jnp.sum(fn(leaf)) for leaf in w.values())

    scores = jax.tree.map(lax.stop_gradient, w)
    masks = masks_lib.global_topk_masks(scores, kept)
    smallest = [
        jnp.min(jnp.where(masks[k], v, jnp.inf), initial=jnp.inf)
        for k, v in scores.items()
    ]
    s = _INFLECTION / jnp.min(jnp.stack(smallest))
    alive = jnp.isfinite(s)  # else the smallest is 0, or nearly
    s = jnp.where(alive, s, 1)

    squashed = total(lambda leaf: jnp.tanh(s * leaf))
    fixed = lax.stop_gradient(squashed)
    magnitude = total(lambda leaf: leaf)
    value = magnitude * (squashed / jnp.where(alive, fixed, 1)) - magnitude
    return jnp.where(alive, value, 0)


def hypersparse_coefficient(
    step: Any, *, initial: float = 5e-4, growth: float = 1.05, begin: int, every: int
) -> Float[Array, ""]:
    r"""The growing coefficient of adaptive regularized training.

    .. math:: \lambda_t = \lambda_0 \, \eta^{\lfloor (t - t_0) / e \rfloor}

    from :math:`t_0` = `begin` on, and 0 before: the warm-up. Defaults are those of the
    paper's code, which counts in epochs: `every` is the number of steps in one.

    Args:
      step: Count of finished steps.
      initial: lambda at `begin`.
      growth: eta, above 1 for more pressure in every epoch.
      begin: First step with a penalty.
      every: Steps between two increases.

    Returns:
      A float32 scalar.

    Raises:
      ValueError: `every` is below 1.

    Example:
      >>> at = lambda t: hypersparse_coefficient(
      ...     t, initial=0.5, growth=2.0, begin=10, every=5
      ... )
      >>> print([float(at(t)) for t in (9, 10, 14, 15, 20)])
      [0.0, 0.5, 0.5, 1.0, 2.0]

    References:
      Glandorf et al., `HyperSparse neural networks
      <https://arxiv.org/abs/2308.07163>`_, 2023.
    """
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")
    since = jnp.asarray(step, jnp.int32) - begin
    turns = jnp.maximum(since, 0) // every
    grown = initial * jnp.float32(growth) ** turns.astype(jnp.float32)
    return jnp.where(since < 0, 0, grown)


class HypersparseState(NamedTuple):
    """State of `add_hypersparse`: arrays only."""

    hypersparse_steps: Any  # count of finished steps; shape=(), dtype=int32


def add_hypersparse(
    *,
    sparsity: float,
    coefficient: Schedule,
    leaf_filter: _leaves.LeafFilter = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds the gradient of the HyperSparse penalty: adaptive regularized training.

    .. math:: g' = g + \lambda_t \nabla L(w)

    with L of `hypersparse_penalty`. First in a chain, before the optimizer, it does
    what the same term in the loss would.

    Args:
      sparsity: As for `hypersparse_penalty`.
      coefficient: lambda, a number or a function of the count of finished steps, such
        as `functools.partial(hypersparse_coefficient, begin=..., every=...)`.
      leaf_filter: Which parameters, as for `sparsify`.

    Returns:
      An `optax.GradientTransformationExtraArgs`; it keeps the gradients' dtypes.

    Raises:
      ValueError: `sparsity` is outside [0, 1]; at `init`, a filter that takes no leaf;
        at `update`, no `params`, or a sparsity that keeps no weight.

    Example:
      >>> art = add_hypersparse(sparsity=0.4, coefficient=0.5, leaf_filter="w")
      >>> params = {"w": jnp.array([1.0, -2.0, 4.0])}
      >>> grads, _ = art.update({"w": jnp.zeros(3)}, art.init(params), params)
      >>> print([round(float(g), 3) for g in grads["w"]])
      [0.588, -0.436, 0.164]

    References:
      Glandorf et al., `HyperSparse neural networks
      <https://arxiv.org/abs/2308.07163>`_, 2023.
    """
    density_from(sparsity)

    def init_fn(params):
        if jax.tree.leaves(params):  # optax.tree_utils asks with a placeholder too
            _leaves.select_leaves(params, leaf_filter)
        return HypersparseState(hypersparse_steps=jnp.zeros((), jnp.int32))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        weights = taken_leaves(params, leaf_filter, "add_hypersparse")
        gradients = masks_lib.named_leaves(updates)
        scale = at_step(coefficient, state.hypersparse_steps)
        every_leaf = lambda name, leaf: True
        pull = jax.grad(hypersparse_penalty)(
            weights, sparsity=sparsity, leaf_filter=every_leaf
        )

        def add(gradient, pull):
            dtype = widest(gradient.dtype, jnp.float32)
            scaled = scale.astype(dtype) * pull.astype(dtype)
            return (gradient.astype(dtype) + scaled).astype(gradient.dtype)

        added = {name: add(gradients[name], pull[name]) for name in weights}
        count = optax.safe_increment(state.hypersparse_steps)
        return replace_leaves(updates, added), HypersparseState(count)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def mask_sparsity_penalty(params: Any, masks: Any) -> Float[Array, ""]:
    r"""MaskSparsity: the magnitude of the weights that a mask is about to remove.

    .. math:: R(w) = \sum_{i : \, \neg m_i} |w_i|

    Weights that stay (mask True) and leaves without a mask are not pressed: penalizing
    them, as a plain L1 norm does, costs capacity and prunes nothing. The paper applies
    it to the scales of normalization layers, with masks over channels and strength
    5e-4; masks may be of any leaves here. One pass over the weights.

    Args:
      params: Tree of arrays.
      masks: Tree of boolean arrays with the paths and shapes of leaves of `params`,
        True where a weight is kept; None, empty or absent for other leaves.

    Returns:
      A float32 scalar (float64 where a leaf is), not yet times a strength.

    Raises:
      ValueError: A mask has no leaf of `params` at its path, or another shape.

    Example:
      >>> params = {"scale": jnp.array([2.0, -0.5, 0.25]), "bias": jnp.ones(3)}
      >>> masks = {"scale": jnp.array([True, False, False])}
      >>> print(mask_sparsity_penalty(params, masks))
      0.75

    References:
      Jiang et al., `Pruning-aware sparse regularization for network pruning
      <https://arxiv.org/abs/2201.06776>`_, 2022.
    """
    masks_lib.apply_masks(params, masks)  # raises where they do not fit
    removed = jax.tree.map(jnp.logical_not, masks)
    pressed = masks_lib.named_leaves(masks_lib.apply_masks(params, removed))
    leaves = [pressed[name] for name in masks_lib.named_leaves(masks)]
    dtype = widest(jnp.float32, *(leaf.dtype for leaf in leaves))
    return sum(
        (jnp.sum(_magnitude(leaf.astype(dtype))) for leaf in leaves),
        jnp.zeros((), dtype),
    )


def _magnitude(leaf: Any) -> Any:
    """The absolute value, with gradient 0 at 0, where that of `jnp.abs` is 1."""
    return leaf * lax.stop_gradient(jnp.sign(leaf))
