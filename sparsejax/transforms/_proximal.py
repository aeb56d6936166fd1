"""Proximal steps after an optimizer's step: groups of weights become exactly zero.

tx = optax.chain(optax.sgd(rate), group_lasso(1e-4, rate, groups=(1, None)))
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from sparsejax import masks as masks_lib
from sparsejax.transforms import _leaves
from sparsejax.transforms._groups import Groups, count_groups, full_blocks, widest
from sparsejax.transforms._proximal_operators import (
    prox_group_envelope,
    prox_group_lasso,
)
from sparsejax.transforms._shared import Distribution, density_from, leaf_densities

Schedule = float | Float[Array, ""] | Callable[[Any], Any]


class ProximalState(NamedTuple):
    """State of `group_lasso` and `group_envelope`: arrays only."""

    proximal_steps: Any  # count of finished steps; shape=(), dtype=int32


def group_lasso(
    strength: Schedule,
    learning_rate: Schedule,
    *,
    groups: Groups,
    leaf_filter: _leaves.LeafFilter = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Group lasso by proximal gradient steps: groups of weights become exactly zero.

    .. math::
      u' = \mathrm{prox}_{\tau R}(w + u) - w, \quad \tau = \text{learning rate}
        \cdot \text{strength}

    with `prox_group_lasso` for the proximal operator; u is what the transformations
    before this one emit. After `optax.apply_updates` a group whose norm would not
    exceed :math:`\tau \sqrt{p}` is exactly zero, in any dtype; it grows again when a
    gradient step takes it beyond. Must be last in a chain. With an optimizer that
    scales each entry, such as Adam, this is the proximal step in the plain metric,
    not in the optimizer's.

    Args:
      strength: Of the penalty: a number, or a function of the count of finished
        steps.
      learning_rate: That of the optimizer before it, a number or a function.
      groups: `Rows()`, `Columns()`, `Blocks((bk, bn))`, or sizes along the trailing
        axes, as for `group_lasso_penalty`.
      leaf_filter: Which parameters, as for `sparsify`.

    Returns:
      An `optax.GradientTransformationExtraArgs`; it emits the promoted dtype of
      update and parameter.

    Raises:
      ValueError: At `init`, a filter that takes no leaf or `groups` that do not
        fit one; at `update`, no `params`.

    Example:
      >>> step = group_lasso(1.0, 0.5, groups=(1, None), leaf_filter="w")
      >>> tx = optax.chain(optax.sgd(0.5), step)
      >>> params = {"w": jnp.array([[6.0], [0.2]])}
      >>> grads = {"w": jnp.array([[2.0], [0.2]])}
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> print(optax.apply_updates(params, updates)["w"].T)
      [[4.5 0. ]]

    References:
      Yuan and Lin, `Model selection and estimation in regression with grouped
      variables <https://doi.org/10.1111/j.1467-9868.2005.00532.x>`_, 2006.
    """

    def plan(leaves):
        for leaf in leaves.values():
            full_blocks(leaf.shape, groups)
        prox = lambda w, tau: prox_group_lasso(w, tau, groups=groups)
        return {name: prox for name in leaves}

    return _proximal_steps(plan, strength, learning_rate, leaf_filter, "group_lasso")


def group_envelope(
    strength: Schedule,
    learning_rate: Schedule,
    *,
    sparsity: float,
    groups: Groups,
    distribution: Distribution = masks_lib.uniform,
    group_weights: Mapping[str, Any] | None = None,
    leaf_filter: _leaves.LeafFilter = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Proximal steps on the weighted group sparse envelope: towards k groups kept.

    .. math::
      u' = \mathrm{prox}_{\lambda GS_k}(w + u) - w, \quad
        \lambda = \text{learning rate} \cdot \text{strength}

    with `prox_group_envelope` for the proximal operator, and in each leaf
    `k = round(density * groups)`. Zeroed groups are exactly zero. The k groups of
    largest norm are decayed by up to `1 / (1 + lambda)`, the others faster, until
    they are zero; how many are zero at a given step follows from `strength`, never
    more than all but k. Must be last in a chain.

    Args:
      strength: Of the penalty: a number, or a function of the count of finished
        steps.
      learning_rate: That of the optimizer before it, a number or a function.
      sparsity: Fraction of the groups that is not among the k, in [0, 1].
      groups: `Rows()`, `Columns()`, `Blocks((bk, bn))`, or sizes along the trailing
        axes, as for `group_lasso_penalty`.
      distribution: `(shapes, density) -> densities` over leaves by name.
      group_weights: The weights d by leaf name, each shaped like the grid of groups;
        1 for leaves that are not named.
      leaf_filter: Which parameters, as for `sparsify`.

    Returns:
      An `optax.GradientTransformationExtraArgs`; it emits the promoted dtype of
      update and parameter.

    Raises:
      ValueError: `sparsity` is outside [0, 1]; at `init`, a filter that takes no
        leaf, `groups` that do not fit one, or `group_weights` for a leaf
        that is not taken; at `update`, no `params`.

    Example:
      >>> step = group_envelope(
      ...     2.0, 0.5, sparsity=0.5, groups=(1, None), leaf_filter="w"
      ... )
      >>> params = {"w": jnp.array([[4.0], [2.0]])}
      >>> updates, _ = step.update({"w": jnp.zeros((2, 1))}, step.init(params), params)
      >>> print(optax.apply_updates(params, updates)["w"].T)
      [[2. 0.]]

    References:
      Refael, Arbel and Huleihel, `Learning k-level structured sparse neural networks
      using group envelope regularization <https://arxiv.org/abs/2212.12921>`_, 2022.
    """
    density = density_from(sparsity)
    named = dict(group_weights or {})

    def plan(leaves):
        unknown = sorted(set(named) - set(leaves))
        if unknown:
            raise ValueError(
                f"group_weights must name leaves that are taken, {sorted(leaves)}, got "
                f"{unknown}"
            )
        shapes = {name: tuple(leaf.shape) for name, leaf in leaves.items()}
        densities = leaf_densities(leaves, density, distribution)
        proxes = {}
        for name, shape in shapes.items():
            size = count_groups(shape, full_blocks(shape, groups))
            count = masks_lib.exact_count(densities[name], size)
            proxes[name] = lambda w, lam, name=name, count=count: prox_group_envelope(
                w,
                lam,
                count=count,
                groups=groups,
                group_weights=named.get(name),
            )
        return proxes

    return _proximal_steps(plan, strength, learning_rate, leaf_filter, "group_envelope")


def _proximal_steps(
    plan: Callable[[dict[str, Any]], dict[str, Any]],
    strength: Schedule,
    learning_rate: Schedule,
    leaf_filter: _leaves.LeafFilter,
    transform: str,
) -> optax.GradientTransformationExtraArgs:
    """The step that both share; `plan` gives the operator `(w, tau) -> w` by leaf."""

    def init_fn(params):
        if jax.tree.leaves(params):  # optax.tree_utils asks with a placeholder too
            plan(_leaves.select_leaves(params, leaf_filter))
        return ProximalState(proximal_steps=jnp.zeros((), jnp.int32))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        weights = taken_leaves(params, leaf_filter, transform)
        gradients = masks_lib.named_leaves(updates)
        tau = at_step(strength, state.proximal_steps)
        tau = tau * at_step(learning_rate, state.proximal_steps)
        emitted = {}
        for name, prox in plan(weights).items():
            moved = stepped(weights[name], gradients[name])
            tau_here = jnp.maximum(tau, 0).astype(moved.dtype)
            emitted[name] = step_to(
                prox(moved, tau_here), weights[name], gradients[name]
            )
        count = optax.safe_increment(state.proximal_steps)
        return replace_leaves(updates, emitted), ProximalState(count)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def taken_leaves(params: Any, leaf_filter: _leaves.LeafFilter, transform: str) -> Any:
    """The leaves that a filter takes, by name; an error where there are no params."""
    if params is None:
        raise ValueError(
            f"params must be passed to update: {transform} looks at the weights, got "
            "params=None"
        )
    return _leaves.select_leaves(params, leaf_filter)


def at_step(schedule: Schedule, step: Any) -> Any:
    """A number, or what a function gives at the step, as a float32 scalar."""
    value = schedule(step) if callable(schedule) else schedule
    return jnp.asarray(value).astype(jnp.float32)


def stepped(weight: Any, update: Any) -> Any:
    """The weight after the update, unrounded: at least in float32."""
    dtype = widest(weight.dtype, update.dtype, jnp.float32)
    return weight.astype(dtype) + update.astype(dtype)


def step_to(target: Any, weight: Any, update: Any) -> Any:
    """What to emit for a weight to become `target`: exactly -weight where that is 0."""
    # The wider dtype, because -weight rounded to a narrower one is not -weight.
    dtype = widest(weight.dtype, update.dtype)
    return (target - weight.astype(target.dtype)).astype(dtype)


def replace_leaves(tree: Any, leaves: dict[str, Any]) -> Any:
    """The tree with `leaves` at their names."""

    def leaf(path, value):
        return leaves.get(masks_lib.path_name(path), value)

    return jax.tree_util.tree_map_with_path(leaf, tree)
