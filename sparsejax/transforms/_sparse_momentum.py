"""Growth by the momentum of dense gradients, with density that moves: SNFS."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sparsejax import masks as masks_lib
from sparsejax import schedules
from sparsejax.masks import _structure as structures
from sparsejax.transforms._shared import (
    Distribution,
    all_finite,
    check_one_currency,
    cosine_fractions,
    density_from,
    exchange,
    leaf_counts,
    look_up,
    moved_counts,
    random_masks,
)
from sparsejax.transforms._updater import MaskUpdate, Updater


def sparse_momentum(
    *,
    sparsity: float,
    begin: int = 0,
    end: int,
    every: int = 100,
    distribution: Distribution = masks_lib.uniform,
    key: Any,
    drop_fraction: float | Callable[[int], float] = 0.5,
    decay: float | None = None,
    redistribution: bool = True,
    average_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    structure: Any = None,
) -> Updater:
    r"""Grows where the momentum is large, in the layers where it is: sparse momentum.

    M is the inner optimizer's own momentum, as in the authors' code: the `trace` of
    `optax.sgd` or the `mu` of `optax.adam` and its kin, wherever in its state, as the
    step before left it (before there is one, the gradients). So the inner optimizer
    sees dense gradients, where other updaters show it masked ones; a norm over all of
    them, as for clipping, is then the dense one. What it has kept of a weight that
    grows is cleared, as ever, unless `sparsify` is told otherwise by `moments`: taking
    it along cost 0.05 to 0.06 bits per byte of validation text in
    `examples/compare_methods.py`.

    Where the inner optimizer has no momentum, or more than one, or `decay` is given,
    it sees masked gradients, and at every step the dense ones, g, enter an average
    kept here:

    .. math:: M \leftarrow \alpha M + (1 - \alpha) g

    At each update, with f falling from `drop_fraction` at `begin` to 0 at `end` along
    half a cosine, leaf l of n_l kept weights drops the
    :math:`k_l = \mathrm{round}(f n_l)` of smallest |w|. What all leaves dropped,
    :math:`K = \sum_l k_l`, is shared out anew by the mean |M| over the weights that
    were kept,

    .. math:: r_l = \frac{\bar m_l}{\sum_i \bar m_i} K, \quad
      \bar m_l = \operatorname{mean}_{i \in \text{kept}} |M_{l,i}|

    and each leaf grows r_l of largest |M| among those that were zero before. The r_l
    are made integers by largest remainder (ties: the earlier leaf); a leaf takes no
    more than it has room for, the rest goes to the others in the same proportions.
    So the count over all leaves never changes, by not a single weight, where the
    authors' code holds it about constant. A weight just dropped does not grow back.

    A gradient that is not finite counts for nothing in M where the weight is zero, and
    nowhere in an average kept here. Going by the optimizer's momentum costs a step
    hardly more than `static` does. An average costs a pass per step and memory, by
    default half of one of Adam's moments; rounded to bfloat16 it no longer follows a
    gradient within 4% of it (at alpha 0.9), which is less than gradients differ from
    step to step; with alpha above 0.99 take float32.

    Args:
      sparsity: Fraction of masked weights that is zero, in [0, 1].
      begin: First update, as a count of finished steps. M is kept from step 0.
      end: No update comes after it.
      every: Steps between updates. The paper: an epoch.
      distribution: `(shapes, density) -> densities` over leaves by name, at first.
      key: PRNG key for the first masks.
      drop_fraction: The paper's prune rate; or a function of the step, taken as it is.
      decay: alpha of an average kept here. None: the inner optimizer's momentum, or,
        where it has not just one, an average with 0.9.
      redistribution: Whether density moves between leaves. False: each grows what it
        dropped.
      average_dtype: In which the average is kept; it is computed in float32.
      structure: Unit of sparsity, such as `masks.Blocks((16, 16))`; None: entries.
        Whole units move, by sums of |w| and |M|. With redistribution they must be
        alike in all leaves, and a leaf be one group.

    Returns:
      An `Updater`.

    Raises:
      ValueError: A fraction is outside [0, 1], nothing would ever be updated, the
        average's dtype is not floating, or the structure is unknown or does not fit
        the sparsity; at `init`, units that cannot move between leaves.

    Example:
      >>> updater = sparse_momentum(sparsity=0.9, end=75_000, key=jax.random.key(0))
      >>> print(updater.steps)
      range(0, 75001, 100)

    References:
      Dettmers and Zettlemoyer, `Sparse Networks from Scratch: Faster Training without
      Losing Performance <https://arxiv.org/abs/1907.04840>`_, 2019.
    """
    steps = schedules.update_steps(begin, end, every)
    fractions = cosine_fractions(drop_fraction, steps, end)
    alpha = 0.9 if decay is None else decay
    masks_lib.check_density(alpha, "decay")
    if not jnp.issubdtype(average_dtype, jnp.floating):
        raise ValueError(
            f"average_dtype: got {average_dtype}, needed a floating-point dtype"
        )
    density = density_from(sparsity)
    structure = structures.check_structure(structure, density)

    def init(params, key):
        if redistribution:
            check_one_currency(structure, params, "redistribution=True")
        masks, _ = random_masks(density, distribution, structure, params, key)
        zeros = lambda w: jnp.zeros_like(w, dtype=average_dtype)
        return masks, {name: zeros(w) for name, w in params.items()}

    def observe(now: MaskUpdate, due):
        del due
        return {k: _average(m, now.scores[k], alpha) for k, m in now.memory.items()}

    def update(now: MaskUpdate):
        counts = leaf_counts(now.params, density, distribution, structure)
        if redistribution:
            drop, grow = _redistribute(now, structure, fractions, steps)
            keep = {
                name: masks_lib.count_true(structures.units_of(structure, mask))
                - drop[name]
                for name, mask in now.masks.items()
            }
        else:
            grow = moved_counts(now, counts, structure, fractions, steps)
            keep = {name: counts[name] - grow[name] for name in counts}

        def largest_momentum(index, name, count, candidates):
            momentum = now.memory[name]
            return structures.largest_units(structure, momentum, count, candidates)

        masks = exchange(now, structure, keep, grow, largest_momentum)
        return masks, now.memory, all_finite(now.params)

    return Updater(steps, init, update, key, observe, momentum=decay is None)


def _average(m: Any, g: Any, alpha: float) -> Any:
    wide = structures.at_least_float32(m.dtype)
    g = g.astype(wide)
    new = m.astype(wide) * alpha + g * (1 - alpha)
    if m.dtype != jnp.bfloat16:
        new = new.astype(m.dtype)
        return jnp.where(jnp.isfinite(new), new, m)
    # Between two values of bfloat16, so only what is not finite can become so.
    new = jnp.where(jnp.abs(g) <= float(jnp.finfo(m.dtype).max), new, m.astype(wide))
    return _round_to_bfloat16(new)


def _round_to_bfloat16(x: Any) -> Any:
    """`x.astype(bfloat16)` of finite float32, to nearest, ties to even.

    By the bits, since XLA's own on CPU does not vectorize in a loop with a select.
    """
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.bfloat16)


def _redistribute(
    now: MaskUpdate,
    structure: structures.Structure,
    fractions: list[float],
    steps: range,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Units to drop and to grow per leaf, equal in sum."""
    fraction = look_up(fractions, now, steps)
    drop, room, weight = [], [], []
    for name, mask in now.masks.items():
        units = structures.units_of(structure, mask)
        count = masks_lib.count_true(units)
        room.append(units.size - count)
        moved = jnp.round(fraction * count.astype(jnp.float32)).astype(jnp.int32)
        drop.append(jnp.minimum(moved, room[-1]))
        size = jnp.abs(now.memory[name]).astype(jnp.float32)
        kept = jnp.maximum(masks_lib.count_true(mask), 1).astype(jnp.float32)
        weight.append(jnp.sum(jnp.where(mask, size, 0.0)) / kept)
    drop, room, weight = (jnp.stack(column) for column in (drop, room, weight))
    # Where no momentum says otherwise every leaf gets back what it dropped.
    weight = jnp.where(jnp.sum(weight) > 0, weight, drop.astype(jnp.float32))
    grow = share_out(jnp.sum(drop, dtype=jnp.int32), weight, room)
    names = list(now.masks)
    split = lambda column: {name: column[i] for i, name in enumerate(names)}
    return split(drop), split(grow)


def share_out(total: Any, weight: Any, room: Any) -> Any:
    """Integers near `total * weight / sum(weight)`, none above `room`, summing exactly.

    Args:
      total: int32 scalar, at most the sum of `room`.
      weight: float32 [leaves], at least 0.
      room: int32 [leaves].

    Returns:
      int32 [leaves]. The sum is `total` whatever is rounded on the way.
    """
    ceiling = room.astype(jnp.float32)

    def fill(_, quota):
        # Leaves at their ceiling stay there; the others share what is left.
        full = quota >= ceiling
        left = total.astype(jnp.float32) - jnp.sum(jnp.where(full, ceiling, 0.0))
        others = jnp.where(full, 0.0, weight)
        share = jnp.maximum(left, 0.0) * (others / jnp.sum(others))
        return jnp.where(full, ceiling, share)

    quota = jax.lax.fori_loop(0, len(room) + 1, fill, jnp.where(room > 0, -1.0, 0.0))
    # NaN too, as from 0 / 0, is no share.
    quota = jnp.where(quota > 0, jnp.minimum(quota, ceiling), 0.0)
    whole = jnp.minimum(jnp.floor(quota).astype(jnp.int32), room)
    # Floats of large counts are not exact: should the whole parts exceed the total,
    # the last leaves give back.
    whole = _take_in_turn(total, whole)
    left = total - jnp.sum(whole, dtype=jnp.int32)
    # One more each by largest remainder, ties by order.
    remainder = jnp.where(whole < room, quota - jnp.floor(quota), -1.0)
    order = jnp.argsort(-remainder, stable=True)
    rank = jnp.argsort(order, stable=True).astype(jnp.int32)
    whole = whole + ((rank < left) & (whole < room)).astype(jnp.int32)
    return whole + _take_in_turn(total - jnp.sum(whole, dtype=jnp.int32), room - whole)


def _take_in_turn(total: Any, wants: Any) -> Any:
    """What each gets of `total` if the first takes all it wants, then the second..."""

    def take(left, want):
        got = jnp.minimum(left, want)
        return left - got, got

    return jax.lax.scan(take, total, wants)[1]
