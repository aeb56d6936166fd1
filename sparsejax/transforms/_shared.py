"""What the rules share: counts, first masks, drop fractions, the exchange of units."""

import functools
import math
import warnings
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparsejax import masks as masks_lib
from sparsejax import schedules
from sparsejax.masks import _structure as structures
from sparsejax.transforms._updater import MaskUpdate

Distribution = Callable[[Any, float], Any]


def random_masks(
    density: float,
    distribution: Distribution,
    structure: structures.Structure,
    params: dict[str, Any],
    key: Any,
    *,
    final: bool = True,
) -> tuple[dict[str, Any], Any]:
    """As many random units per leaf as `leaf_counts` says, and no memory."""
    check_key(key)
    counts = leaf_counts(params, density, distribution, structure, final=final)
    masks = {}
    for i, (name, count) in enumerate(counts.items()):
        shape = tuple(params[name].shape)
        draw = jax.random.uniform(
            jax.random.fold_in(key, i), structures.unit_shape(structure, shape)
        )
        units = structures.top_units(structure, draw, count)
        masks[name] = structures.expand(structure, units, shape)
    return masks, ()


def random_scores(key: Any, shape: tuple[int, ...]) -> Any:
    """float32, even on the integers of [0, 2**24): what to grow, at random.

    Place i gets h(h(i ^ a) ^ b), where a and b are drawn from the key and h is the
    finalizer of MurmurHash3, one to one on 32 bits. A twentieth of the cost of
    `jax.random.uniform`, which at each update was ten steps of an optimizer.
    """
    a, b = jax.random.bits(key, (2,), jnp.uint32)
    place = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        place = place * np.uint32(size) + lax.broadcasted_iota(jnp.uint32, shape, axis)

    def h(x):
        x = (x ^ x >> 16) * np.uint32(0x85EBCA6B)
        x = (x ^ x >> 13) * np.uint32(0xC2B2AE35)
        return x ^ x >> 16

    # float32 holds no more than 24 bits.
    return (h(h(place ^ a) ^ b) >> 8).astype(jnp.float32)


def leaf_counts(
    params: dict[str, Any],
    density: float,
    distribution: Distribution,
    structure: structures.Structure,
    *,
    final: bool = True,
) -> dict[str, int]:
    """Units that every group of a leaf keeps: Python ints, from static shapes."""
    densities = leaf_densities(params, density, distribution)
    counts = {}
    for name, weight in params.items():
        structures.check_shape(structure, tuple(weight.shape), name)
        size = structures.group_size(structure, tuple(weight.shape))
        counts[name] = masks_lib.exact_count(densities[name], size)
        if final:
            check_final_count(structure, counts[name], name)
            warn_of_nothing(structure, densities[name], counts[name], size, name)
    return counts


def leaf_densities(
    params: dict[str, Any], density: float, distribution: Distribution
) -> dict[str, float]:
    """What `distribution` gives each leaf, checked.

    Raises:
      ValueError: It is no function, lacks a leaf, gives one a density outside [0, 1],
        or its densities, weighted by size, do not average to `density`.
    """
    if not callable(distribution):
        raise ValueError(
            "distribution must be a function (shapes, density) -> densities, got "
            f"{distribution!r}"
        )
    shapes = {name: tuple(weight.shape) for name, weight in params.items()}
    with jax.ensure_compile_time_eval():
        given = distribution(shapes, density)
        if missing := [name for name in shapes if name not in given]:
            raise ValueError(f"distribution must give every leaf, lacks {missing}")
        densities = {name: float(given[name]) for name in shapes}
    for name, value in densities.items():
        masks_lib.check_density(value, f"distribution: the density at {name!r}")
    total = sum(math.prod(shape) for shape in shapes.values())
    counts = {
        name: masks_lib.exact_count(densities[name], math.prod(shape))
        for name, shape in shapes.items()
    }
    # Each leaf rounds by half an entry at most.
    got = sum(counts.values())
    if abs(got - density * total) > 0.5 * len(counts) + 1e-3:
        want = masks_lib.exact_count(density, total)
        raise ValueError(
            f"distribution must keep {want} of {total} entries for a density of "
            f"{density:g}, got {got}: {counts}"
        )
    return densities


def check_fits(choose: Callable[[Any], Any], example: Any) -> None:
    """Raises at once what `choose` would raise at its first call in a program."""
    plain = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    jax.eval_shape(choose, jax.tree.map(plain, example))


def check_key(key: Any) -> None:
    """Raises ValueError unless it is a PRNG key, typed or raw."""
    dtype = getattr(key, "dtype", None)
    if dtype is None or not (
        jnp.issubdtype(dtype, jax.dtypes.prng_key) or dtype == jnp.uint32
    ):
        raise ValueError(f"key must be a PRNG key, as jax.random.key(0), got {key!r}")


def check_final_count(structure: structures.Structure, count: int, name: str) -> None:
    if isinstance(structure, structures.NM) and count != structure.n:
        raise ValueError(
            f"distribution must keep {structure.n} of {structure.m} in every leaf for "
            f"structure {structure}, got {count} at {name!r}"
        )


def warn_of_nothing(
    structure: structures.Structure, density: float, count: int, size: int, name: str
) -> None:
    if size and not count and density > 0:
        warnings.warn(
            f"{name!r} will be zero throughout: a density of {density:g} of {size} "
            f"units, of structure {structure}, rounds to none",
            stacklevel=2,
        )


def check_one_currency(
    structure: structures.Structure, params: dict[str, Any], argument: str
) -> None:
    """Raises ValueError unless a unit anywhere may stand for a unit elsewhere."""
    sizes = {}
    for name, weight in params.items():
        shape = tuple(weight.shape)
        structures.check_shape(structure, shape, name)
        units = math.prod(structures.unit_shape(structure, shape))
        if not units:  # nothing there that could move
            continue
        groups = units // structures.group_size(structure, shape)
        sizes[name] = (groups, weight.size // units)
    if any(groups > 1 for groups, _ in sizes.values()) or len(set(sizes.values())) > 1:
        raise ValueError(
            f"{argument} needs units that may move between leaves: one group per leaf "
            f"and units of one size, got structure {structure} with (groups, weights "
            f"per unit) {sizes}"
        )


def density_from(sparsity: float, argument: str = "sparsity") -> float:
    """1 - sparsity in decimals: 0.1 for 0.9, where floats give 0.09999999999999998."""
    masks_lib.check_density(sparsity, argument)
    return float(1 - Fraction(repr(float(sparsity))))


def all_finite(leaves: dict[str, Any]) -> Any:
    bad = [masks_lib.count_true(~jnp.isfinite(leaf)) for leaf in leaves.values()]
    return sum(bad) == 0


def cosine_fractions(
    drop_fraction: float | Callable[[int], float], steps: range, end: int
) -> list[float]:
    """Half a cosine from the number at the first step to 0 at `end`."""
    if not callable(drop_fraction):
        masks_lib.check_density(drop_fraction, "drop_fraction")
        drop_fraction = functools.partial(
            schedules.cosine_drop_fraction,
            fraction=drop_fraction,
            begin=steps[0],
            end=end,
        )
    return drop_fractions(drop_fraction, steps, end)


def drop_fractions(
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


def look_up(table: list[float] | list[int], now: MaskUpdate, steps: range) -> Any:
    """The entry of this update; a table of one entry holds at all updates."""
    index = jnp.minimum((now.step - steps[0]) // steps.step, len(table) - 1)
    dtype = jnp.int32 if isinstance(table[0], int) else jnp.float32
    return jnp.array(table, dtype)[index]


def moved_counts(
    now: MaskUpdate,
    counts: dict[str, int],
    structure: structures.Structure,
    fractions: list[float],
    steps: range,
) -> dict[str, Any]:
    """`round(fraction * count)` per leaf, no more than has room; worked out exactly.

    Raises:
      ValueError: Of an N:M that moves nothing ever, since fractions of n round to 0.
    """
    moved = {}
    # Leaves of equal counts share a table: there may be an update at every step.
    exact = functools.cache(
        lambda count: [masks_lib.exact_count(f, count) for f in fractions]
    )
    for name, weight in now.params.items():
        count = counts[name]
        room = structures.group_size(structure, tuple(weight.shape)) - count
        table = [min(moving, room) for moving in exact(count)]
        if isinstance(structure, structures.NM) and max(fractions) > 0 < room:
            if not any(table):
                raise ValueError(
                    f"drop_fraction must move at least one of the {count} kept per "
                    f"group of structure {structure}, got at most {max(fractions):g}"
                )
        if not any(table) and min(count, room, max(fractions)) > 0:
            warnings.warn(
                f"the mask of {name!r} will never move: a drop_fraction of at most "
                f"{max(fractions):g} of {count} units, of structure {structure}, "
                "rounds to none",
                stacklevel=2,
            )
        moved[name] = look_up(table, now, steps)
    return moved


def exchange(
    now: MaskUpdate,
    structure: structures.Structure,
    keep: dict[str, Any],
    gain: dict[str, Any],
    grow: Callable[[int, str, Any, Any], Any],
) -> dict[str, Any]:
    """Keeps the `keep` largest |w| of every group and grows `gain` new units.

    `grow(index, name, count, candidates)` marks the units to grow, among those that
    were not kept before: what is dropped does not grow back in the same update.
    """
    masks = {}
    for i, (name, weight) in enumerate(now.params.items()):
        units = structures.units_of(structure, now.masks[name])
        kept = structures.largest_units(structure, weight, keep[name], units)
        grown = grow(i, name, gain[name], ~units)
        masks[name] = structures.expand(structure, kept | grown, tuple(weight.shape))
    return masks
