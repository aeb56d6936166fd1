"""Rules that drop and grow at constant counts: SET and RigL."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax import masks as masks_lib
from sparsejax import schedules
from sparsejax.transforms._shared import (
    Distribution,
    all_finite,
    density_from,
    leaf_counts,
    random_masks,
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
) -> Updater:
    """Drops the smallest weights and grows as many at random: SET.

    At each update every leaf drops `k = round(drop_fraction * kept)` weights of
    smallest |w| and grows k of those that were zero before, drawn evenly, so the
    count never changes. A weight just dropped does not grow back in the same update.

    Args:
      sparsity: Fraction of masked weights that is zero, in [0, 1].
      begin: First update, as a count of finished steps.
      end: No update comes after it; None: updates never end.
      every: Steps between updates.
      distribution: `(shapes, density) -> densities` over leaves by name.
      key: PRNG key for the first masks and for growth.
      drop_fraction: zeta in the paper; a number, or a function of the step, for
        which `end` must be given.

    Returns:
      An `Updater`.

    Raises:
      ValueError: A fraction is outside [0, 1], nothing would ever be updated, or
        `drop_fraction` is a function and `end` is None.

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
    fractions = _fractions(drop_fraction, steps, end)

    def grow(now, index, name):
        key = jax.random.fold_in(now.key, index)
        return jax.random.uniform(key, now.masks[name].shape)

    return _drop_and_grow(
        density_from(sparsity),
        steps,
        distribution,
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

    Returns:
      An `Updater`.

    Raises:
      ValueError: A fraction is outside [0, 1] or nothing would ever be updated.

    Example:
      >>> updater = rigl(sparsity=0.9, end=75_000, key=jax.random.key(0))
      >>> print(updater.steps)
      range(0, 75001, 100)

    References:
      Evci et al., `Rigging the Lottery: Making All Tickets Winners
      <https://arxiv.org/abs/1911.11134>`_, 2020.
    """
    steps = schedules.update_steps(begin, end, every)
    if not callable(drop_fraction):
        masks_lib.check_density(drop_fraction, "drop_fraction")
        drop_fraction = functools.partial(
            schedules.cosine_drop_fraction, fraction=drop_fraction, begin=begin, end=end
        )
    fractions = _fractions(drop_fraction, steps, end)
    grow = lambda now, index, name: jnp.abs(now.scores[name])
    return _drop_and_grow(
        density_from(sparsity),
        steps,
        distribution,
        key,
        fractions,
        grow,
        uses_scores=True,
    )


def _drop_and_grow(
    density: float,
    steps: range,
    distribution: Distribution,
    key: Any,
    fractions: list[float],
    grow: Callable[[MaskUpdate, int, str], Any],
    *,
    uses_scores: bool,
) -> Updater:
    """The update that SET and RigL share; `grow` gives the scores of growth."""

    def update(now: MaskUpdate):
        counts = leaf_counts(now.params, density, distribution)
        # One fraction holds at all steps, several are looked up by the step.
        index = jnp.minimum((now.step - steps[0]) // steps.step, len(fractions) - 1)
        masks = {}
        for i, (name, weight) in enumerate(now.params.items()):
            count = counts[name]
            moved = [
                min(masks_lib.exact_count(f, count), weight.size - count)
                for f in fractions
            ]
            drop = jnp.array(moved, jnp.int32)[index]
            mask = now.masks[name]
            kept = masks_lib.topk_mask(jnp.abs(weight), count - drop, where=mask)
            grown = masks_lib.topk_mask(grow(now, i, name), drop, where=~mask)
            masks[name] = kept | grown
        ok = all_finite(now.params)
        if uses_scores:
            ok &= all_finite(now.scores)
        return masks, now.memory, ok

    init = functools.partial(random_masks, density, distribution)
    return Updater(steps, init, update, key)


def _fractions(
    drop_fraction: float | Callable[[int], float], steps: range, end: int | None
) -> list[float]:
    """The drop fraction at each update, or the one that always holds."""
    if not callable(drop_fraction):
        fractions = [float(drop_fraction)]
    elif end is None:
        raise ValueError(
            "drop_fraction must be a number where end is None, got a function"
        )
    else:
        with jax.ensure_compile_time_eval():
            fractions = [float(drop_fraction(step)) for step in steps]
    for fraction in fractions:
        masks_lib.check_density(fraction, "drop_fraction")
    return fractions
