"""How a density is shared out among the leaves of a model."""

import dataclasses
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import jax

from sparsejax.masks._paths import match_names, path_name


@dataclasses.dataclass(frozen=True)
class Axes:
    """What the axes of a weight mean; each axis is named once, or is spatial.

    Shapes do not say which of their axes a scan stacked or which belong to the
    input, so nothing is guessed: an attention projection of shape (768, 12, 64) is
    declared `Axes(fan_in=(0,), fan_out=(1, 2))` and counts as (768, 768), twelve
    scanned layers (12, 768, 3072) are `Axes(stacked=(0,), fan_in=(1,),
    fan_out=(2,))` and count as twelve weights (768, 3072).

    Attributes:
      fan_in: Axes whose sizes multiply to the fan-in.
      fan_out: Axes whose sizes multiply to the fan-out.
      stacked: Axes that enumerate equal layers. What is left is a spatial window.
    """

    fan_in: tuple[int, ...] = (-2,)
    fan_out: tuple[int, ...] = (-1,)
    stacked: tuple[int, ...] = ()

    def logical_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of one layer: (*window, fan-in, fan-out)."""
        rank = len(shape)
        named = (*self.fan_in, *self.fan_out, *self.stacked)
        known = {axis % rank for axis in named if -rank <= axis < rank}
        if len(known) != len(named):
            raise ValueError(
                f"axes must name different axes of shape {shape}, got {self}"
            )
        window = tuple(shape[i] for i in range(rank) if i not in known)
        fans = [math.prod(shape[i] for i in fan) for fan in (self.fan_in, self.fan_out)]
        return (*window, *fans)


def uniform(shapes: Any, density: float) -> Any:
    """Gives every leaf the same density.

    Args:
      shapes: Tree of arrays, `jax.ShapeDtypeStruct`s or shape tuples.
      density: Fraction of all entries to keep, in [0, 1].

    Returns:
      A tree of floats like `shapes`.

    Raises:
      ValueError: `density` is outside [0, 1].

    Example:
      >>> uniform({"up": (4, 8), "down": (8, 4)}, 0.25)
      {'down': 0.25, 'up': 0.25}
    """
    check_density(density)
    return jax.tree.map(lambda _: float(density), shapes, is_leaf=_is_shape)


def erdos_renyi(
    shapes: Any, density: float, *, axes: Mapping[str, Axes] | None = None
) -> Any:
    r"""Gives large leaves a lower density: Erdos-Renyi with kernel sizes (ERK).

    .. math:: d_l = \min\left(1, \epsilon \frac{\sum_i s_{l,i}}{\prod_i s_{l,i}}\right)

    where :math:`s_l` is the logical shape of leaf l, (*window, fan-in, fan-out),
    and :math:`\epsilon` is such that the densities, weighted by size, average to
    `density`; what leaves capped at 1 cannot take goes to the others.

    Without a declaration the last axis is the fan-out, the one before it the
    fan-in, and all others are a spatial window, as in Flax dense and convolution
    kernels. Scanned layers and kernels with several head axes must be declared, or
    they are taken for windows.

    Args:
      shapes: Tree of arrays, `jax.ShapeDtypeStruct`s or shape tuples, each of rank
        2 or more.
      density: Fraction of all entries to keep, in [0, 1].
      axes: Meaning of axes by leaf name; names are slash-separated paths and may be
        glob patterns such as `"layers/*/kernel"`; the first that fits holds.

    Returns:
      A tree of floats like `shapes`.

    Raises:
      ValueError: `density` is outside [0, 1], a pattern in `axes` matches no leaf,
        a declaration does not fit its shape, or a leaf has rank below 2.

    Example:
      >>> densities = erdos_renyi({"in": (100, 100), "out": (100, 10)}, 0.1)
      >>> print({name: round(d, 4) for name, d in densities.items()})
      {'in': 0.071, 'out': 0.3903}

    References:
      Mocanu et al., `Scalable training of artificial neural networks with adaptive
      sparse connectivity <https://arxiv.org/abs/1707.04780>`_, 2018.

      Evci et al., `Rigging the Lottery <https://arxiv.org/abs/1911.11134>`_, 2020.
    """
    check_density(density)
    flat, treedef = jax.tree_util.tree_flatten_with_path(shapes, is_leaf=_is_shape)
    names = [path_name(path) for path, _ in flat]
    sizes = [_shape_of(leaf) for _, leaf in flat]
    declared = dict(axes or {})
    pattern_of = match_names(declared, names, "axes")
    weights = []
    for name, shape in zip(names, sizes, strict=True):
        if len(shape) < 2:
            raise ValueError(
                f"shapes must have rank 2 or more, got {shape} for leaf {name!r}"
            )
        meaning = declared[pattern_of[name]] if name in pattern_of else Axes()
        logical = meaning.logical_shape(shape)
        weights.append(sum(logical) / max(math.prod(logical), 1))
    densities = _water_fill(weights, [math.prod(shape) for shape in sizes], density)
    return jax.tree_util.tree_unflatten(treedef, densities)


def exact_count(density: float, size: int) -> int:
    """Rounds density * size to an integer, halves to even, without float error.

    The float is read as the shortest decimal that denotes it: 0.1 means one tenth.

    Args:
      density: Fraction in [0, 1].
      size: Number of units.

    Returns:
      How many units to keep.

    Raises:
      ValueError: `density` is outside [0, 1].

    Example:
      >>> exact_count(0.1, 67_109_888)
      6710989
    """
    check_density(density)
    return round(Fraction(repr(float(density))) * size)


def check_density(density: float, argument: str = "density") -> None:
    """Raises ValueError unless the number is in [0, 1]."""
    if not 0.0 <= density <= 1.0:  # NaN fails too
        raise ValueError(f"{argument} must be in [0, 1], got {density}")


def _water_fill(weights: list[float], sizes: list[int], density: float) -> list[float]:
    """Densities min(1, eps * weight) whose mean, weighted by size, is `density`."""
    capped: set[int] = set()
    target = density * sum(sizes)
    while True:
        free = [i for i in range(len(sizes)) if i not in capped]
        budget = target - sum(sizes[i] for i in capped)
        mass = math.fsum(weights[i] * sizes[i] for i in free)
        eps = budget / mass if mass > 0 else 0.0
        # Capping frees budget for the rest, so a capped leaf never falls below 1.
        over = {i for i in free if eps * weights[i] > 1.0}
        if not over:
            break
        capped |= over
    return [1.0 if i in capped else eps * weights[i] for i in range(len(sizes))]


def _is_shape(leaf: Any) -> bool:
    return type(leaf) is tuple and all(isinstance(size, int) for size in leaf)


def _shape_of(leaf: Any) -> tuple[int, ...]:
    return leaf if _is_shape(leaf) else tuple(leaf.shape)
