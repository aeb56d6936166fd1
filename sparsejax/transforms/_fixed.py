"""Rules under which nothing grows: static masks and gradual magnitude pruning."""

import functools
from typing import Any

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


def static(
    *,
    sparsity: float,
    begin: int = 0,
    end: int | None = None,
    every: int = 1,
    distribution: Distribution = masks_lib.uniform,
    key: Any,
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

    Returns:
      An `Updater`.

    Raises:
      ValueError: `sparsity` is outside [0, 1].

    Example:
      >>> updater = static(sparsity=0.75, key=jax.random.key(0))
      >>> masks, _ = updater.init({"w": jnp.ones((4, 4))}, updater.key)
      >>> print(masks["w"].sum())
      4
    """
    del begin, end, every
    density = density_from(sparsity)
    keep = lambda now: (now.masks, now.memory, jnp.array(True))
    return Updater(
        range(0), functools.partial(random_masks, density, distribution), keep, key
    )


def gradual_magnitude(
    *,
    sparsity: float,
    initial_sparsity: float = 0.0,
    begin: int = 0,
    end: int,
    every: int = 100,
    distribution: Distribution = masks_lib.uniform,
    key: Any = None,
) -> Updater:
    """Prunes the smallest weights step by step, along a cubic ramp.

    Starts dense. At each update leaf l keeps the `round(d_l * size)` largest |w| of
    those it still has, where the densities d_l share out `1 - sparsity(t)` and
    `sparsity(t)` is `schedules.cubic_sparsity`: exactly `sparsity` at the last
    update. Nothing grows back.

    Args:
      sparsity: Fraction of masked weights that is zero at the end, in [0, 1].
      initial_sparsity: The same at the first update.
      begin: First update, as a count of finished steps.
      end: No update comes after it.
      every: Steps between updates.
      distribution: `(shapes, density) -> densities` over leaves by name.
      key: No effect; taken so that updaters can be exchanged.

    Returns:
      An `Updater`.

    Raises:
      ValueError: A sparsity is outside [0, 1], the ramp would fall, or nothing would
        ever be updated.

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
    density_from(sparsity)
    density_from(initial_sparsity, "initial_sparsity")
    if initial_sparsity > sparsity:
        raise ValueError(
            f"initial_sparsity must be at most sparsity, {sparsity}, got "
            f"{initial_sparsity}"
        )
    ramp = [
        schedules.cubic_sparsity(
            t,
            initial=initial_sparsity,
            final=sparsity,
            begin=begin,
            end=end,
            every=every,
        )
        for t in steps
    ]

    def init(params, key):
        del key
        return {k: jnp.ones(w.shape, bool) for k, w in params.items()}, ()

    def update(now: MaskUpdate):
        # Counts are worked out on the host, exactly, and looked up by the step.
        index = (now.step - steps[0]) // steps.step
        tables = [
            leaf_counts(now.params, density_from(float(s)), distribution) for s in ramp
        ]
        masks = {
            name: masks_lib.topk_mask(
                jnp.abs(weight),
                jnp.array([table[name] for table in tables], jnp.int32)[index],
                where=now.masks[name],
            )
            for name, weight in now.params.items()
        }
        return masks, now.memory, all_finite(now.params)

    return Updater(steps, init, update)
