"""Rules that drop and grow at constant counts: SET and RigL."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from sparsejax import masks as masks_lib
from sparsejax import schedules
from sparsejax.masks import _structure as structures
from sparsejax.transforms._shared import (
    Distribution,
    all_finite,
    cosine_fractions,
    density_from,
    drop_fractions,
    exchange,
    leaf_counts,
    moved_counts,
    random_masks,
    random_scores,
)
from sparsejax.transforms._updater import MaskUpdate, Updater


def sparse_evolutionary_training(
    *,
    sparsity: float,
    begin: int = 0,
    end: int | None = None,
    every: int = 100,
    distribution: Distribution = masks_lib.uniform,
    key: Any,
    drop_fraction: float | Callable[[int], float] = 0.3,
    structure: Any = None,
) -> Updater:
    """Drops the smallest weights and grows as many at random: SET.

    At each update every leaf drops `k = round(drop_fraction * kept)` weights of
    smallest |w| and grows k of those that were zero before, drawn evenly, so the
    count never changes. A weight just dropped does not grow back in the same update.
    The paper drops that fraction of the positive and of the negative weights each;
    |w| decides here, as in the code of its successors.

    Args:
      sparsity: Fraction of masked weights that is zero, in [0, 1].
      begin: First update, as a count of finished steps.
      end: No update comes after it; None: updates never end.
      every: Steps between updates.
      distribution: `(shapes, density) -> densities` over leaves by name.
      key: PRNG key for the first masks and for growth.
      drop_fraction: zeta in the paper; a number, or a function of the step, for
        which `end` must be given.
      structure: Unit of sparsity, such as `masks.Blocks((16, 16))`; None: entries.
        Drawn, dropped and grown are then whole units, and every group of the
        structure exchanges as many.

    Returns:
      An `Updater`.

    Raises:
      ValueError: A fraction is outside [0, 1], nothing would ever be updated,
        `drop_fraction` is a function and `end` is None, or the structure is unknown
        or does not fit the sparsity.

    Example:
      >>> key = jax.random.key(0)
      >>> updater = sparse_evolutionary_training(sparsity=0.9, every=50, key=key)
      >>> print(updater.steps[:3])
      range(0, 150, 50)

    References:
      Mocanu et al., `Scalable training of artificial neural networks with adaptive
      sparse connectivity <https://arxiv.org/abs/1707.04780>`_, 2018.
    """
    steps = schedules.update_steps(begin, end, every)
    fractions = drop_fractions(drop_fraction, steps, end)

    def grow(now, structure, index, name, count, candidates):
        key = jax.random.fold_in(now.key, index)
        draw = random_scores(key, candidates.shape)
        return structures.top_units(structure, draw, count, candidates)

    return _drop_and_grow(
        sparsity,
        steps,
        distribution,
        structure,
        key,
        fractions,
        grow,
        uses_scores=False,
    )


def rigl(
    *,
    sparsity: float,
    begin: int = 0,
    end: int,
    every: int = 100,
    distribution: Distribution = masks_lib.uniform,
    key: Any,
    drop_fraction: float | Callable[[int], float] = 0.3,
    structure: Any = None,
) -> Updater:
    """Drops the smallest weights and grows where the gradient is largest: RigL.

    At each update every leaf drops `k = round(f(t) * kept)` weights of smallest |w|
    and grows the k of largest |dense gradient| among those that were zero before;
    f falls from `drop_fraction` at `begin` to 0 at `end` along half a cosine. The
    count never changes. Unlike the paper's reference code, a weight just dropped
    does not grow back in the same update: that would exchange nothing.

    The gradients are those given to the transform, before masking, or
    `grow_scores=`. If any weight or gradient is NaN or inf the update is skipped
    and counted.

    Args:
      sparsity: Fraction of masked weights that is zero, in [0, 1].
      begin: First update, as a count of finished steps.
      end: No update comes after it. The paper: three quarters of training.
      every: Steps between updates.
      distribution: `(shapes, density) -> densities` over leaves by name; the paper's
        best is `masks.erdos_renyi`.
      key: PRNG key for the first masks.
      drop_fraction: alpha in the paper; or a function of the step, taken as it is.
      structure: Unit of sparsity, such as `masks.Blocks((16, 16))`; None: entries.
        Whole units move, by sums of |w| and |gradient| over each, and every group
        of the structure exchanges as many.

    Returns:
      An `Updater`.

    Raises:
      ValueError: A fraction is outside [0, 1], nothing would ever be updated, or the
        structure is unknown or does not fit the sparsity.

    Example:
      >>> updater = rigl(sparsity=0.9, end=75_000, key=jax.random.key(0))
      >>> print(updater.steps)
      range(0, 75001, 100)

    References:
      Evci et al., `Rigging the Lottery: Making All Tickets Winners
      <https://arxiv.org/abs/1911.11134>`_, 2020.
    """
    steps = schedules.update_steps(begin, end, every)
    fractions = cosine_fractions(drop_fraction, steps, end)

    def grow(now, structure, index, name, count, candidates):
        return structures.largest_units(structure, now.scores[name], count, candidates)

    return _drop_and_grow(
        sparsity,
        steps,
        distribution,
        structure,
        key,
        fractions,
        grow,
        uses_scores=True,
    )


def _drop_and_grow(
    sparsity: float,
    steps: range,
    distribution: Distribution,
    structure: Any,
    key: Any,
    fractions: list[float],
    grow: Callable[..., Any],
    *,
    uses_scores: bool,
) -> Updater:
    """The update that SET and RigL share; `grow` marks the units that grow."""
    density = density_from(sparsity)
    structure = structures.check_structure(structure, density)

    def update(now: MaskUpdate):
        counts = leaf_counts(now.params, density, distribution, structure)
        moved = moved_counts(now, counts, structure, fractions, steps)
        keep = {name: counts[name] - moved[name] for name in counts}
        marked = functools.partial(grow, now, structure)
        masks = exchange(now, structure, keep, moved, marked)
        ok = all_finite(now.params)
        if uses_scores:
            ok &= all_finite(now.scores)
        return masks, now.memory, ok

    init = functools.partial(random_masks, density, distribution, structure)
    return Updater(steps, init, update, key)
