"""Gradual pruning that lets a part of the weights grow back elsewhere: GraNet."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from sparsejax import masks as masks_lib
from sparsejax import schedules
from sparsejax.masks import _structure as structures
from sparsejax.transforms._ramp import check_pruner, check_ramp, pruner
from sparsejax.transforms._shared import (
    Distribution,
    all_finite,
    check_one_currency,
    cosine_fractions,
    density_from,
    exchange,
    look_up,
    random_masks,
)
from sparsejax.transforms._updater import MaskUpdate, Updater


def granet(
    *,
    sparsity: float,
    initial_sparsity: float = 0.0,
    begin: int = 0,
    end: int,
    every: int = 100,
    distribution: Distribution | str = "global",
    key: Any = None,
    drop_fraction: float | Callable[[int], float] = 0.5,
    initial_distribution: Distribution = masks_lib.erdos_renyi,
    structure: Any = None,
) -> Updater:
    r"""Prunes along a cubic ramp and regenerates at no cost: GraNet.

    At each update, first the smallest |w| of all leaves together are pruned to the
    density :math:`1 - s_t`,

    .. math:: s_t = s_f + (s_i - s_f) \left(1 - \frac{t - t_0}{t_n - t_0}\right)^3

    with t_n the last update, so that the target is reached exactly. Then each leaf
    regenerates: of the n_l weights left to it it drops the
    :math:`k_l = \mathrm{round}(r_t n_l)` of smallest |w| and grows as many of largest
    |dense gradient| among those that were zero before the update (no more than there
    are); :math:`r_t` falls from `drop_fraction` at `begin` to 0 at `end` along half a
    cosine. What the same update pruned or dropped does not grow back.

    Dense to sparse starts from all weights, `initial_sparsity=0`; sparse to sparse
    from random masks, 0.5 in the paper. If any weight or gradient is NaN or inf the
    update is skipped and counted.

    Args:
      sparsity: Fraction of masked weights that is zero at the end, in [0, 1].
      initial_sparsity: The same at the start.
      begin: First update, as a count of finished steps.
      end: No update comes after it.
      every: Steps between updates.
      distribution: "global", or `(shapes, density) -> densities` over leaves by
        name, which then prunes each leaf by itself.
      key: PRNG key for the first masks, needed where `initial_sparsity` is above 0.
      drop_fraction: r at `begin`; or a function of the step, taken as it is.
      initial_distribution: Shares out the first masks under "global"; a function
        given as `distribution` does so itself.
      structure: Unit of sparsity, such as `masks.Blocks((16, 16))`; None: entries.
        Whole units go and grow, by sums of |w| and |gradient|; under "global" they
        must be alike in all leaves, and a leaf be one group.

    Returns:
      An `Updater`.

    Raises:
      ValueError: A fraction is outside [0, 1], the ramp would fall, nothing would
        ever be updated, there is no key for random masks, or the structure is unknown
        or does not fit the sparsity.

    Example:
      >>> updater = granet(sparsity=0.95, begin=100, end=1000)
      >>> print(updater.steps)
      range(100, 1001, 100)

    References:
      Liu et al., `Sparse Training via Boosting Pruning Plasticity with
      Neuroregeneration <https://arxiv.org/abs/2106.10404>`_, 2021.
    """
    steps = schedules.update_steps(begin, end, every)
    fractions = cosine_fractions(drop_fraction, steps, end)
    check_ramp(sparsity, initial_sparsity, distribution)
    structure = structures.check_structure(structure, density_from(sparsity))
    if initial_sparsity > 0 and key is None:
        raise ValueError(
            f"key must be given where initial_sparsity is above 0, got "
            f"initial_sparsity={initial_sparsity}, key=None"
        )
    prune = pruner(sparsity, initial_sparsity, steps, distribution, structure)
    share = distribution if callable(distribution) else initial_distribution

    def init(params, key):
        if distribution == "global":
            check_one_currency(structure, params, 'distribution="global"')
        if initial_sparsity == 0:
            masks = {k: jnp.ones(w.shape, bool) for k, w in params.items()}
        else:
            density = density_from(initial_sparsity)
            masks, _ = random_masks(density, share, structure, params, key, final=False)
        check_pruner(prune, masks, params)
        return masks, ()

    def update(now: MaskUpdate):
        rate = look_up(fractions, now, steps)
        keep, grow = {}, {}
        for name, left in prune(now).items():
            size = structures.group_size(structure, tuple(now.params[name].shape))
            groups = left.size // max(size, 1)
            before = structures.units_of(structure, now.masks[name])
            count = masks_lib.count_true(left) // max(groups, 1)
            room = size - masks_lib.count_true(before) // max(groups, 1)
            moved = jnp.round(rate * count.astype(jnp.float32)).astype(jnp.int32)
            grow[name] = jnp.minimum(moved, room)
            keep[name] = count - grow[name]

        def largest_gradient(index, name, count, candidates):
            gradient = now.scores[name]
            return structures.largest_units(structure, gradient, count, candidates)

        masks = exchange(now, structure, keep, grow, largest_gradient)
        return masks, now.memory, all_finite(now.params) & all_finite(now.scores)

    return Updater(steps, init, update, key)
