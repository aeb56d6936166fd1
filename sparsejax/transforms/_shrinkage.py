"""Iterative soft shrinkage: unimportant weights fade, and are zero at last."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from sparsejax import masks as masks_lib
from sparsejax import schedules
from sparsejax.transforms import _leaves, _sharding
from sparsejax.transforms._proximal import (
    Schedule,
    at_step,
    replace_leaves,
    step_to,
    stepped,
    taken_leaves,
)
from sparsejax.transforms._shared import (
    Distribution,
    all_finite,
    check_fits,
    density_from,
    leaf_densities,
)


class ShrinkageState(NamedTuple):
    """State of `iterative_soft_shrinkage`: arrays only."""

    shrinkage_steps: Any  # count of finished steps; shape=(), dtype=int32
    skipped_selections: Any  # not done because of NaN or inf; shape=(), dtype=int32
    shrinkage_masks: Any  # like params: bool, True = important; MaskedNode elsewhere


def iterative_soft_shrinkage(
    *,
    sparsity: float,
    factor: Schedule = 0.95,
    begin: int = 0,
    end: int,
    distribution: Distribution = masks_lib.uniform,
    structure: Any = None,
    leaf_filter: _leaves.LeafFilter = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Shrinks the unimportant weights at every step instead of zeroing them: ISS-P.

    .. math::
      w \leftarrow m \odot (w + u) + \alpha_t \, (1 - m) \odot (w + u)

    where u is what the optimizer before it emits and m marks the largest
    :math:`|w + u|` of each leaf, chosen anew at every step from `begin` on: a weight
    that fades may come back while it is larger than others. At step `end` the
    masks are chosen for the last time and :math:`\alpha` becomes 0: from then on the
    others are exactly zero. Kept weights take the optimizer's update as it is. Must
    be last in a chain. Costs the selection, a few passes over the weights, at every
    step up to `end`.

    The paper's shrinkage is constant: 0.95 in its released commands, during 100,000
    steps from a random start. A factor that falls with the step shrinks harder and
    harder. If a weight or update is NaN or inf the old masks stay, and that is
    counted in the state. The masks are in the state, as `shrinkage_masks`.

    Args:
      sparsity: Fraction of weights that is unimportant, in [0, 1].
      factor: alpha in [0, 1], or a function of the count of finished steps.
      begin: First step at which anything shrinks, as a count of finished steps.
      end: The step at which the unimportant weights become zero for good.
      distribution: `(shapes, density) -> densities` over leaves by name.
      structure: What is important or not as a whole: single weights (None), N:M,
        blocks, and so on, as for the updaters of `sparsify`.
      leaf_filter: Which parameters, as for `sparsify`.

    Returns:
      An `optax.GradientTransformationExtraArgs`; it emits the promoted dtype of
      update and parameter.

    Raises:
      ValueError: A fraction is outside [0, 1] or `end` is before `begin`; at `init`,
        a filter that takes no leaf, or a structure that is unknown, of another
        sparsity (N:M) or does not fit a leaf; at `update`, no `params`.

    Example:
      >>> tx = iterative_soft_shrinkage(sparsity=0.5, factor=0.5, end=1)
      >>> params = {"w": jnp.array([[4.0, 2.0]])}
      >>> none, state = {"w": jnp.zeros((1, 2))}, tx.init(params)
      >>> for _ in range(2):
      ...     updates, state = tx.update(none, state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(params["w"])
      [[4. 1.]]
      [[4. 0.]]

    References:
      Wang et al., `Iterative soft shrinkage learning for efficient image
      super-resolution <https://arxiv.org/abs/2303.09650>`_, 2023.
    """
    density = density_from(sparsity)
    if not callable(factor) and not isinstance(factor, jax.Array):
        masks_lib.check_density(factor, "factor")
    schedules.update_steps(begin, end, 1)

    def choose(values):
        densities = leaf_densities(values, density, distribution)
        return {
            name: masks_lib.structured_mask(value, densities[name], structure)
            for name, value in values.items()
        }

    def init_fn(params):
        masks = params
        if jax.tree.leaves(params):  # optax.tree_utils asks with a placeholder too
            leaves = _leaves.select_leaves(params, leaf_filter)
            check_fits(choose, leaves)
            ones = {name: jnp.ones(leaf.shape, bool) for name, leaf in leaves.items()}
            ones = _sharding.place(ones, leaves)
            masks = _leaves.tree_with_holes(params, ones)
        # Two arrays and not one twice, or the state could not be donated.
        zero = lambda: jnp.zeros((), jnp.int32)
        return ShrinkageState(zero(), zero(), masks)

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        weights = taken_leaves(params, leaf_filter, "iterative_soft_shrinkage")
        gradients = masks_lib.named_leaves(updates)
        old = masks_lib.named_leaves(state.shrinkage_masks)
        step, skipped = state.shrinkage_steps, state.skipped_selections
        values = {name: stepped(weights[name], gradients[name]) for name in old}

        def select():
            ok = all_finite(values)
            new = _sharding.automatic(choose, old, values)
            masks = jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)
            return masks, skipped + (~ok).astype(jnp.int32)

        due = (step >= begin) & (step <= end)
        masks, skipped = lax.cond(due, select, lambda: (old, skipped))
        alpha = jnp.where(step < end, at_step(factor, step), 0)

        emitted = {}
        for name, value in values.items():
            weight, update = weights[name], gradients[name]
            # Not alpha * value alone: that is NaN where alpha is 0 and value inf.
            faded = jnp.where(alpha == 0, 0, alpha.astype(value.dtype) * value)
            towards = step_to(faded, weight, update)
            kept = update.astype(towards.dtype)
            emitted[name] = jnp.where(masks[name], kept, towards)
        new_state = ShrinkageState(
            shrinkage_steps=optax.safe_increment(step),
            skipped_selections=skipped,
            shrinkage_masks=_leaves.tree_with_holes(params, masks),
        )
        return replace_leaves(updates, emitted), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
