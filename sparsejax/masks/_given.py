"""Densities that the user gives, leaf by leaf."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from sparsejax.masks._distribution import _is_shape, _shape_of, check_density
from sparsejax.masks._paths import match_names, path_name


def given(densities: Mapping[str, float]) -> Callable[[Any, float], Any]:
    r"""A distribution with some densities fixed; the other leaves share the rest.

    .. math:: d_l = \frac{d \sum_i n_i - \sum_{i \in G} d_i n_i}{\sum_{i \notin G} n_i}
      \quad \text{for } l \notin G

    where G are the leaves with a given density and n are sizes, so that all
    densities, weighted by size, average to the asked d.

    Args:
      densities: Density by leaf name; names are slash-separated paths and may be
        glob patterns such as `"layers/*/kernel"`; the first that fits holds.

    Returns:
      A function `(shapes, density) -> densities`, for `distribution=`. It raises
      ValueError where a pattern matches no leaf, or where the asked density cannot
      be met: the other leaves would need a density outside [0, 1], or there are none
      and the given densities average to another one (by more than half an entry of
      each leaf, which is what rounding to whole entries may take).

    Raises:
      ValueError: A density is outside [0, 1].

    Example:
      >>> distribution = given({"head": 1.0})
      >>> distribution({"body": (30, 10), "head": (10, 10)}, 0.4)
      {'body': 0.2, 'head': 1.0}
    """
    densities = dict(densities)
    for name, density in densities.items():
        check_density(density, f"densities[{name!r}]")

    def distribution(shapes: Any, density: float) -> Any:
        check_density(density)
        flat, treedef = jax.tree_util.tree_flatten_with_path(shapes, is_leaf=_is_shape)
        sizes = {path_name(path): math.prod(_shape_of(leaf)) for path, leaf in flat}
        pattern_of = match_names(densities, sizes, "densities")
        fixed = {name: float(densities[p]) for name, p in pattern_of.items()}
        target = density * sum(sizes.values())
        left = target - math.fsum(d * sizes[name] for name, d in fixed.items())
        others = [name for name in sizes if name not in fixed]
        room = sum(sizes[name] for name in others)
        slack = len(sizes) / 2
        if not -slack <= left <= room + slack:
            low = (target - left) / max(sum(sizes.values()), 1)
            high = (target - left + room) / max(sum(sizes.values()), 1)
            raise ValueError(
                f"densities allow a density of {low:g} to {high:g} over all leaves, "
                f"got density={density:g}"
            )
        # In decimals, since 0.30000000000000004 would round otherwise than 0.3.
        rest = round(min(max(left / room, 0.0), 1.0), 12) if room else 0.0
        return treedef.unflatten([fixed.get(name, rest) for name in sizes])

    return distribution
