"""Growth by gradient and by novelty: DST-EE."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax import masks as masks_lib
from sparsejax import schedules
from sparsejax.masks import _structure as structures
from sparsejax.transforms._shared import (
    Distribution,
    all_finite,
    cosine_fractions,
    density_from,
    exchange,
    leaf_counts,
    moved_counts,
    random_masks,
)
from sparsejax.transforms._updater import MaskUpdate, Updater


def exploration_exploitation(
    *,
    sparsity: float,
    begin: int = 0,
    end: int,
    every: int = 100,
    distribution: Distribution = masks_lib.uniform,
    key: Any,
    drop_fraction: float | Callable[[int], float] = 0.3,
    exploration: float = 1e-3,
    epsilon: float = 1.0,
    structure: Any = None,
) -> Updater:
    r"""Grows where the gradient is large or where nothing has grown yet: DST-EE.

    As `rigl`, with growth by the acquisition function

    .. math:: S = |g| + c \, \frac{\ln t}{N + \epsilon}

    where g is the dense gradient, t the count of finished steps (ln 0 is taken for
    0) and N the number of mask updates in which the weight came in active. The first
    term exploits what is known, the second explores: it is largest for weights that
    were never active, as in the upper confidence bounds of bandits. With c = 0 this
    is `rigl`.

    If any weight or gradient is NaN or inf the update is skipped and counted. Memory
    is N, one byte per weight, counted in a pass of its own. It stays at 255: from there
    on a weight's second term is overstated, by less than c ln t / 256.

    Args:
      sparsity: Fraction of masked weights that is zero, in [0, 1].
      begin: First update, as a count of finished steps.
      end: No update comes after it.
      every: Steps between updates.
      distribution: `(shapes, density) -> densities` over leaves by name.
      key: PRNG key for the first masks.
      drop_fraction: Share of kept weights dropped at `begin`, falling to 0 at `end`
        along half a cosine; or a function of the step, taken as it is.
      exploration: c, at least 0. It is to be weighed against the gradients' size; the
        paper tunes it per task.
      epsilon: Above 0.
      structure: Unit of sparsity, such as `masks.Blocks((16, 16))`; None: entries.
        Whole units move; |g| is summed over a unit, t and N are the unit's.

    Returns:
      An `Updater`.

    Raises:
      ValueError: A fraction is outside [0, 1], c is negative or epsilon not positive,
        nothing would ever be updated, or the structure is unknown or does not fit the
        sparsity.

    Example:
      >>> updater = exploration_exploitation(
      ...     sparsity=0.9, end=75_000, key=jax.random.key(0))
      >>> _, counts = updater.init({"w": jnp.ones((5, 4))}, updater.key)
      >>> print(counts["w"].dtype)
      uint8

    References:
      Huang et al., `Dynamic Sparse Training via Balancing the Exploration-Exploitation
      Trade-off <https://arxiv.org/abs/2211.16667>`_, 2023.
    """
    steps = schedules.update_steps(begin, end, every)
    fractions = cosine_fractions(drop_fraction, steps, end)
    density = density_from(sparsity)
    structure = structures.check_structure(structure, density)
    if not exploration >= 0:
        raise ValueError(f"exploration must be at least 0, got {exploration}")
    if not epsilon > 0:
        raise ValueError(f"epsilon must be above 0, got {epsilon}")

    def init(params, key):
        masks, _ = random_masks(density, distribution, structure, params, key)
        shape = lambda w: structures.unit_shape(structure, tuple(w.shape))
        return masks, {k: jnp.zeros(shape(w), jnp.uint8) for k, w in params.items()}

    def usable(now):
        return all_finite(now.params) & all_finite(now.scores)

    def observe(now: MaskUpdate, due):
        # An update that will be skipped is none.
        counts = jax.lax.cond(due, lambda: usable(now), lambda: jnp.array(False))
        times_active = {}
        for name, mask in now.masks.items():
            # The type's last value stays: 255 + 1 would be a weight never seen.
            active = structures.units_of(structure, mask) & (now.memory[name] < 255)
            times_active[name] = now.memory[name] + (active & counts).astype(jnp.uint8)
        return times_active

    def update(now: MaskUpdate):
        log_t = jnp.log(jnp.maximum(now.step, 1).astype(jnp.float32))

        def acquire(index, name, count, candidates):
            gradient = structures.pool(structure, now.scores[name]).astype(jnp.float32)
            n = now.memory[name].astype(jnp.float32)
            score = gradient + exploration * log_t / (n + epsilon)
            return structures.top_units(structure, score, count, candidates)

        counts = leaf_counts(now.params, density, distribution, structure)
        moved = moved_counts(now, counts, structure, fractions, steps)
        keep = {name: counts[name] - moved[name] for name in counts}
        masks = exchange(now, structure, keep, moved, acquire)
        return masks, now.memory, usable(now)

    return Updater(steps, init, update, key, observe)
