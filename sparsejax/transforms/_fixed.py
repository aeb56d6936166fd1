"""Rules under which nothing grows: static and fixed masks, gradual magnitude."""

import functools
from typing import Any

import jax.numpy as jnp

from sparsejax import masks as masks_lib
from sparsejax import schedules
from sparsejax.masks import _structure as structures
from sparsejax.transforms._ramp import check_pruner, check_ramp, pruner
from sparsejax.transforms._shared import (
    Distribution,
    all_finite,
    density_from,
    random_masks,
)
from sparsejax.transforms._updater import MaskUpdate, Updater


def static(
    *,
    sparsity: float,
    begin: int = 0,
    end: int | None = None,
    every: int = 1,
    distribution: Distribution = masks_lib.uniform,
    key: Any,
    structure: Any = None,
) -> Updater:
    """Random masks that never change.

    Each leaf keeps `round(density * size)` weights, drawn once. The baseline that
    any moving topology has to beat.

    Args:
      sparsity: Fraction of masked weights that is zero, in [0, 1].
      begin: No effect; taken so that updaters can be exchanged.
      end: No effect.
      every: No effect.
      distribution: `(shapes, density) -> densities` over leaves by name, such as
        `masks.uniform` or `masks.erdos_renyi`.
      key: PRNG key.
      structure: Unit of sparsity, such as `masks.NM(2, 4)`; None: single entries.

    Returns:
      An `Updater`.

    Raises:
      ValueError: `sparsity` is outside [0, 1], or the structure is unknown or does
        not fit it.

    Example:
      >>> updater = static(sparsity=0.75, key=jax.random.key(0))
      >>> masks, _ = updater.init({"w": jnp.ones((4, 4))}, updater.key)
      >>> print(masks["w"].sum())
      4
    """
    del begin, end, every
    density = density_from(sparsity)
    structure = structures.check_structure(structure, density)
    init = functools.partial(random_masks, density, distribution, structure)
    return Updater(range(0), init, _keep, key)


def fixed(masks: Any) -> Updater:
    """Masks made elsewhere, which never change.

    For masks that a function of a loss and a batch chose before training, or that a
    pruned checkpoint has.

    Args:
      masks: Tree of boolean arrays with the paths of the parameters that `sparsify`
        takes and their shapes; other leaves are None, empty or absent. Their arrays
        are copied.

    Returns:
      An `Updater`. Its `init`, and so that of `sparsify`, raises ValueError naming
      the leaf where a mask has no parameter, another shape than it, or a parameter
      has no mask: `leaf_filter=` of `sparsify` says which have.

    Raises:
      ValueError: A mask is not boolean.

    Example:
      >>> updater = fixed({"w": jnp.array([[True, False]])})
      >>> masks, _ = updater.init({"w": jnp.ones((1, 2))}, None)
      >>> print(masks["w"])
      [[ True False]]
    """
    given = masks_lib.named_leaves(masks)
    for name, mask in given.items():
        if getattr(mask, "dtype", None) != jnp.bool_:
            got = getattr(mask, "dtype", type(mask).__name__)
            raise ValueError(f"masks must be boolean arrays, got {got} at {name!r}")

    def init(params, key):
        del key
        for name in [*params, *given]:
            if name not in params or name not in given:
                has = "no mask" if name in params else "no parameter to mask"
                raise ValueError(
                    f"masks must be those of the leaves that are made sparse, "
                    f"{list(params)}, got {has} at {name!r}"
                )
            if given[name].shape != params[name].shape:
                raise ValueError(
                    f"masks must be shaped like params, got {given[name].shape} for "
                    f"{params[name].shape} at {name!r}"
                )
        # Copies, because donating the state must not delete the caller's masks.
        return {name: jnp.array(given[name]) for name in params}, ()

    return Updater(range(0), init, _keep)


def _keep(now: MaskUpdate):
    return now.masks, now.memory, jnp.array(True)


def gradual_magnitude(
    *,
    sparsity: float,
    initial_sparsity: float = 0.0,
    begin: int = 0,
    end: int,
    every: int = 100,
    distribution: Distribution | str = masks_lib.uniform,
    key: Any = None,
    structure: Any = None,
) -> Updater:
    """Prunes the smallest weights step by step, along a cubic ramp.

    Starts dense. At each update leaf l keeps the `round(d_l(t) * size)` largest |w|
    of those it still has, where d_l falls as `1 - schedules.cubic_sparsity` does from
    the leaf's share of `1 - initial_sparsity` to its share of `1 - sparsity`, which
    it has exactly at the last update. Nothing grows back.

    With `distribution="global"` the leaves compete: the `round(d(t) * size)` largest
    |w| of all leaves together are kept, as they are, not divided by any norm; of
    equals those of the earlier leaf, then of the lower index.

    Args:
      sparsity: Fraction of masked weights that is zero at the end, in [0, 1].
      initial_sparsity: The same at the first update.
      begin: First update, as a count of finished steps.
      end: No update comes after it.
      every: Steps between updates.
      distribution: `(shapes, density) -> densities` over leaves by name, or
        "global".
      key: No effect; taken so that updaters can be exchanged.
      structure: Unit of sparsity, such as `masks.Rows()`; None: single entries.
        Whole units go, by their sums of |w|; under `masks.NM(n, m)` the number kept
        of every m falls step by step to n.

    Returns:
      An `Updater`.

    Raises:
      ValueError: A sparsity is outside [0, 1], the ramp would fall, nothing would
        ever be updated, or the structure is unknown or does not fit the sparsity; at
        `init`, a structure whose units are not alike in all leaves under "global".

    Example:
      >>> updater = gradual_magnitude(sparsity=0.9, begin=100, end=1000)
      >>> print(updater.steps)
      range(100, 1001, 100)

    References:
      Zhu and Gupta, `To prune, or not to prune <https://arxiv.org/abs/1710.01878>`_,
      2017.
    """
    del key
    steps = schedules.update_steps(begin, end, every)
    check_ramp(sparsity, initial_sparsity, distribution)
    structure = structures.check_structure(structure, density_from(sparsity))
    prune = pruner(sparsity, initial_sparsity, steps, distribution, structure)

    def init(params, key):
        del key
        masks = {k: jnp.ones(w.shape, bool) for k, w in params.items()}
        check_pruner(prune, masks, params)
        return masks, ()

    def update(now: MaskUpdate):
        masks = {
            name: structures.expand(structure, units, tuple(now.params[name].shape))
            for name, units in prune(now).items()
        }
        return masks, now.memory, all_finite(now.params)

    return Updater(steps, init, update)


def gradual_magnitude_over(
    total_steps: int,
    *,
    sparsity: float,
    every: int = 100,
    distribution: Distribution | str = masks_lib.uniform,
    structure: Any = None,
) -> Updater:
    """`gradual_magnitude` over the middle half of training.

    Prunes from 25% to 75% of the steps, so that a dense model is trained first and
    the final one last. The paper found this best, or close to it, for pretraining of
    language models at the sparsities and budgets it tried; it counts compute, which
    equals steps where each costs the same.

    Args:
      total_steps: Steps of the whole training, at least 4.
      sparsity: Fraction of masked weights that is zero at the end, in [0, 1].
      every: Steps between updates.
      distribution: As in `gradual_magnitude`.
      structure: As in `gradual_magnitude`.

    Returns:
      An `Updater`.

    Raises:
      ValueError: `total_steps` is below 4, or as `gradual_magnitude`.

    Example:
      >>> print(gradual_magnitude_over(10_000, sparsity=0.8).steps)
      range(2500, 7501, 100)

    References:
      Jin et al., `The Journey Matters: Average Parameter Count over Pre-training
      Unifies Sparse and Dense Scaling Laws <https://arxiv.org/abs/2501.12486>`_,
      2025.
    """
    if total_steps < 4:
        raise ValueError(f"total_steps must be at least 4, got {total_steps}")
    return gradual_magnitude(
        sparsity=sparsity,
        begin=total_steps // 4,
        end=total_steps * 3 // 4,
        every=every,
        distribution=distribution,
        structure=structure,
    )
