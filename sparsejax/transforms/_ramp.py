"""Pruning along a cubic ramp: what gradual_magnitude and granet share."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from sparsejax import masks as masks_lib
from sparsejax import schedules
from sparsejax.masks import _structure as structures
from sparsejax.transforms._shared import (
    Distribution,
    check_final_count,
    check_fits,
    check_one_currency,
    density_from,
    leaf_densities,
    look_up,
    warn_of_nothing,
)
from sparsejax.transforms._updater import MaskUpdate

# Of the functions of this module: masks of units to keep, by leaf name.
Prune = Callable[[MaskUpdate], dict[str, Any]]


def check_ramp(sparsity: float, initial_sparsity: float, distribution: Any) -> None:
    density_from(sparsity)
    density_from(initial_sparsity, "initial_sparsity")
    if initial_sparsity > sparsity:
        raise ValueError(
            f"initial_sparsity must be at most sparsity, {sparsity}, got "
            f"{initial_sparsity}"
        )
    if distribution != "global" and not callable(distribution):
        raise ValueError(
            'distribution must be "global" or a function of shapes and density, got '
            f"{distribution!r}"
        )


def pruner(
    sparsity: float,
    initial_sparsity: float,
    steps: range,
    distribution: Distribution | str,
    structure: structures.Structure,
) -> Prune:
    """Keeps the units of largest |w|, of those still there, that the ramp allows."""

    def ramp(initial, final):
        return schedules.cubic_sparsity(
            np.asarray(steps),
            initial=initial,
            final=final,
            begin=steps[0],
            end=steps[-1],
            every=steps.step,
        )

    def over_the_model(now: MaskUpdate):
        check_one_currency(structure, now.params, 'distribution="global"')
        units = {k: structures.units_of(structure, m) for k, m in now.masks.items()}
        size = sum(unit.size for unit in units.values())
        table = [
            masks_lib.exact_count(density_from(float(s)), size)
            for s in ramp(initial_sparsity, sparsity)
        ]
        entries = isinstance(structure, structures.Unstructured)
        scores = now.params
        if not entries:
            scores = {k: structures.pool(structure, w) for k, w in now.params.items()}
        count = look_up(table, now, steps)
        return masks_lib.global_topk_masks(
            scores, count, where=units, by_magnitude=entries
        )

    # Leaves of equal size and ends share a table: there may be an update at every step.
    @functools.cache
    def counts(size: int, first: float, last: float) -> list[int]:
        table = ramp(density_from(first), density_from(last))
        return [masks_lib.exact_count(density_from(float(s)), size) for s in table]

    def leaf_by_leaf(now: MaskUpdate):
        # Counts are worked out on the host, exactly, and looked up by the step. Every
        # leaf goes from its initial density to its final one; sized sums of cubics
        # are the cubic of the whole.
        first = _densities(now.params, initial_sparsity, distribution)
        last = _densities(now.params, sparsity, distribution)
        kept = {}
        for name, weight in now.params.items():
            shape = tuple(weight.shape)
            structures.check_shape(structure, shape, name)
            size = structures.group_size(structure, shape)
            table = counts(size, first[name], last[name])
            check_final_count(structure, table[-1], name)
            warn_of_nothing(structure, last[name], table[-1], size, name)
            units = structures.units_of(structure, now.masks[name])
            count = look_up(table, now, steps)
            kept[name] = structures.largest_units(structure, weight, count, units)
        return kept

    return over_the_model if distribution == "global" else leaf_by_leaf


def check_pruner(prune: Prune, masks: dict[str, Any], params: dict[str, Any]) -> None:
    """Refuses at `init`, not at the first step, what does not fit the parameters."""
    step = jnp.zeros((), jnp.int32)
    check_fits(prune, MaskUpdate(masks, (), params, params, None, step))


def _densities(params: dict[str, Any], sparsity: float, distribution: Any) -> Any:
    if sparsity == 0:  # nothing to share out; given densities need not allow it
        return dict.fromkeys(params, 1.0)
    return leaf_densities(params, density_from(sparsity), distribution)
