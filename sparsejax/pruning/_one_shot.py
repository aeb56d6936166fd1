"""Pruning in one go: at random, by magnitude, SNIP and GraSP."""

from typing import Any

import jax
import jax.numpy as jnp

from sparsejax import masks as masks_lib
from sparsejax.pruning._scores import (
    Loss,
    keep_largest,
    kept_counts,
    of_leaves,
    take,
    wide,
)
from sparsejax.transforms._leaves import LeafFilter, select_leaves, tree_with_holes
from sparsejax.transforms._shared import Distribution, density_from


def random(
    key: Any,
    params: Any,
    *,
    sparsity: float,
    distribution: Distribution | str = masks_lib.uniform,
    leaf_filter: LeafFilter = None,
) -> Any:
    """Random masks at initialization.

    Which weights stay is drawn evenly, how many is exact in each leaf. With
    `masks.erdos_renyi` densities (which count the windows of convolution kernels,
    so they are ERK there) random masks come close to those that look at data, more
    so the larger the model. Costs one draw per weight.

    Args:
      key: PRNG key.
      params: Tree of arrays; only shapes matter.
      sparsity: Fraction of the chosen leaves' weights that is pruned, in [0, 1].
      distribution: `(shapes, density) -> densities` over leaves by name, or
        "global": evenly over all leaves together.
      leaf_filter: Which leaves, as in `transforms.sparsify`.

    Returns:
      Masks: a tree like `params` of boolean arrays, `optax.MaskedNode` elsewhere.

    Raises:
      ValueError: `sparsity` is outside [0, 1], the filter matches nothing, or the
        densities do not average to `1 - sparsity`.

    Example:
      >>> params = {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)}
      >>> masks = random(jax.random.key(0), params, sparsity=0.75)
      >>> print(masks["kernel"].sum(), masks["bias"])
      8 MaskedNode()

    References:
      Liu et al., `The Unreasonable Effectiveness of Random Pruning
      <https://arxiv.org/abs/2202.02643>`_, 2022.
    """
    leaves = select_leaves(params, leaf_filter)
    counts = kept_counts(leaves, density_from(sparsity), distribution)
    draws = {
        name: jax.random.uniform(jax.random.fold_in(key, i), leaf.shape)
        for i, (name, leaf) in enumerate(leaves.items())
    }
    return tree_with_holes(params, take(draws, counts))


def magnitude(
    params: Any,
    *,
    sparsity: float,
    distribution: Distribution | str = "global",
    leaf_filter: LeafFilter = None,
) -> Any:
    """Keeps the largest weights: one-shot magnitude pruning.

    The score is :math:`|w|`, compared over all leaves or, with densities per leaf,
    within each. Costs a few passes over the weights.

    Args:
      params: Tree of arrays.
      sparsity: Fraction of the chosen leaves' weights that is pruned, in [0, 1].
      distribution: "global" or densities per leaf, as in `keep_largest`.
      leaf_filter: Which leaves, as in `transforms.sparsify`.

    Returns:
      Masks: a tree like `params` of boolean arrays, `optax.MaskedNode` elsewhere.

    Raises:
      ValueError: As `keep_largest`; or the filter matches nothing.

    Example:
      >>> params = {"kernel": jnp.array([[1.0, -4.0], [3.0, 2.0]])}
      >>> print(magnitude(params, sparsity=0.5)["kernel"])
      [[False  True]
       [ True False]]

    References:
      Han et al., `Learning both Weights and Connections for Efficient Neural
      Networks <https://arxiv.org/abs/1506.02626>`_, 2015.
    """
    leaves = select_leaves(params, leaf_filter)
    scores = {name: jnp.abs(weight) for name, weight in leaves.items()}
    return keep_largest(
        tree_with_holes(params, scores), sparsity=sparsity, distribution=distribution
    )


def snip_scores(
    loss: Loss, params: Any, batch: Any, *, leaf_filter: LeafFilter = None
) -> Any:
    r"""How much the loss feels each weight: SNIP's connection sensitivity.

    .. math:: s_i = \left| w_i \frac{\partial L}{\partial w_i} \right|

    the derivative of the loss by a gate on weight i, at 1. The paper divides by the
    sum over the model, which changes no order. Costs one gradient.

    Args:
      loss: `(params, batch) -> scalar`.
      params: Tree of arrays.
      batch: What `loss` takes.
      leaf_filter: Which leaves, as in `transforms.sparsify`.

    Returns:
      A tree like `params` of scores, float32 (float64 for such weights),
      `optax.MaskedNode` elsewhere.

    Raises:
      ValueError: The filter matches nothing, or the loss is no scalar.

    Example:
      >>> loss = lambda params, x: jnp.sum(x @ params["w"])
      >>> params, x = {"w": jnp.array([[2.0], [-3.0]])}, jnp.array([[5.0, 1.0]])
      >>> print(snip_scores(loss, params, x)["w"].T)
      [[10.  3.]]

    References:
      Lee et al., `SNIP: Single-shot Network Pruning based on Connection Sensitivity
      <https://arxiv.org/abs/1810.02340>`_, 2019.
    """
    w = select_leaves(params, leaf_filter)
    g = jax.grad(of_leaves(loss, params, batch))(w)
    scores = {name: jnp.abs(wide(w[name]) * wide(g[name])) for name in w}
    return tree_with_holes(params, scores)


def snip(
    loss: Loss,
    params: Any,
    batch: Any,
    *,
    sparsity: float,
    distribution: Distribution | str = "global",
    leaf_filter: LeafFilter = None,
) -> Any:
    """Keeps the weights that the loss feels most: SNIP.

    The largest `snip_scores` of one batch, compared over the whole model. The paper
    takes one mini-batch at a variance-scaling initialization. Costs one gradient.

    Args:
      loss: `(params, batch) -> scalar`.
      params: Tree of arrays.
      batch: What `loss` takes.
      sparsity: Fraction of the chosen leaves' weights that is pruned, in [0, 1].
      distribution: "global" or densities per leaf, as in `keep_largest`.
      leaf_filter: Which leaves, as in `transforms.sparsify`.

    Returns:
      Masks: a tree like `params` of boolean arrays, `optax.MaskedNode` elsewhere.

    Raises:
      ValueError: As `keep_largest` and `snip_scores`.

    Example:
      >>> loss = lambda params, x: jnp.sum(x @ params["w"])
      >>> params, x = {"w": jnp.array([[2.0], [-3.0]])}, jnp.array([[5.0, 1.0]])
      >>> print(snip(loss, params, x, sparsity=0.5)["w"].T)
      [[ True False]]

    References:
      Lee et al., `SNIP: Single-shot Network Pruning based on Connection Sensitivity
      <https://arxiv.org/abs/1810.02340>`_, 2019.
    """
    masks_lib.check_density(sparsity, "sparsity")
    scores = snip_scores(loss, params, batch, leaf_filter=leaf_filter)
    return keep_largest(scores, sparsity=sparsity, distribution=distribution)


def grasp_scores(
    loss: Loss, params: Any, batch: Any, *, leaf_filter: LeafFilter = None
) -> Any:
    r"""How much each weight adds to the gradient's norm: GraSP, larger is better.

    .. math:: s = w \odot H g

    where g is the gradient and H the Hessian over the chosen leaves alone, as in the
    paper's code, and the product is one forward derivative of the gradient. Without
    weight i the squared norm of the gradient changes by :math:`-2 s_i` to first
    order. The paper's S is :math:`-s`, and it removes the largest; sign counts, and
    a negative score says that the gradient grows when the weight goes. Costs one
    gradient and one forward derivative of it, about three gradients.

    The paper's code divides the logits by a temperature of 200 inside the loss,
    which is then almost quadratic; do the same in `loss`.

    Args:
      loss: `(params, batch) -> scalar`, twice differentiable, in forward mode over
        reverse.
      params: Tree of arrays.
      batch: What `loss` takes; 25 examples of each class in the paper's code.
      leaf_filter: Which leaves, as in `transforms.sparsify`.

    Returns:
      A tree like `params` of signed scores, float32 (float64 for such weights),
      `optax.MaskedNode` elsewhere.

    Raises:
      ValueError: The filter matches nothing, or the loss is no scalar.

    Example:
      >>> loss = lambda params, x: 0.5 * jnp.sum((x @ params["w"] - 1) ** 2)
      >>> params, x = {"w": jnp.array([[2.0], [-3.0]])}, jnp.array([[1.0, 1.0]])
      >>> print(grasp_scores(loss, params, x)["w"].T)
      [[-8. 12.]]

    References:
      Wang et al., `Picking Winning Tickets Before Training by Preserving Gradient
      Flow <https://arxiv.org/abs/2002.07376>`_, 2020.
    """
    w = select_leaves(params, leaf_filter)
    gradient = jax.grad(of_leaves(loss, params, batch))
    _, hg = jax.jvp(gradient, (w,), (gradient(w),))
    scores = {name: wide(w[name]) * wide(hg[name]) for name in w}
    return tree_with_holes(params, scores)


def grasp(
    loss: Loss,
    params: Any,
    batch: Any,
    *,
    sparsity: float,
    distribution: Distribution | str = "global",
    leaf_filter: LeafFilter = None,
) -> Any:
    """Keeps the weights that the gradient's norm needs most: GraSP.

    The largest `grasp_scores`, by sign and not by size, compared over the whole
    model. Costs one gradient and one derivative of it.

    Args:
      loss: `(params, batch) -> scalar`; the paper's code has the logits divided by
        200 in it.
      params: Tree of arrays.
      batch: What `loss` takes.
      sparsity: Fraction of the chosen leaves' weights that is pruned, in [0, 1].
      distribution: "global" or densities per leaf, as in `keep_largest`.
      leaf_filter: Which leaves, as in `transforms.sparsify`.

    Returns:
      Masks: a tree like `params` of boolean arrays, `optax.MaskedNode` elsewhere.

    Raises:
      ValueError: As `keep_largest` and `grasp_scores`.

    Example:
      >>> def loss(params, batch):
      ...     logits = batch["x"] @ params["w"] / 200
      ...     return optax.losses.softmax_cross_entropy(logits, batch["y"]).mean()
      >>> params = {"w": jnp.eye(2)}
      >>> batch = {"x": jnp.eye(2), "y": jnp.eye(2)}
      >>> print(grasp(loss, params, batch, sparsity=0.75)["w"].sum())
      1

    References:
      Wang et al., `Picking Winning Tickets Before Training by Preserving Gradient
      Flow <https://arxiv.org/abs/2002.07376>`_, 2020.
    """
    masks_lib.check_density(sparsity, "sparsity")
    scores = grasp_scores(loss, params, batch, leaf_filter=leaf_filter)
    return keep_largest(scores, sparsity=sparsity, distribution=distribution)
