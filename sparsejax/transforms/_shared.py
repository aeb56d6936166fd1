"""What the rules share: how many weights each leaf keeps, and the first masks."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax import masks as masks_lib

Distribution = Callable[[Any, float], Any]


def random_masks(
    density: float, distribution: Distribution, params: dict[str, Any], key: Any
) -> tuple[dict[str, Any], Any]:
    masks = {}
    for i, (name, count) in enumerate(
        leaf_counts(params, density, distribution).items()
    ):
        draw = jax.random.uniform(jax.random.fold_in(key, i), params[name].shape)
        masks[name] = masks_lib.topk_mask(draw, count)
    return masks, ()


def leaf_counts(
    params: dict[str, Any], density: float, distribution: Distribution
) -> dict[str, int]:
    """How many weights each leaf keeps: Python ints, from static shapes."""
    shapes = {name: tuple(weight.shape) for name, weight in params.items()}
    densities = distribution(shapes, density)
    return {k: masks_lib.exact_count(densities[k], w.size) for k, w in params.items()}


def density_from(sparsity: float, argument: str = "sparsity") -> float:
    """1 - sparsity in decimals: 0.1 for 0.9, where floats give 0.09999999999999998."""
    masks_lib.check_density(sparsity, argument)
    return float(1 - Fraction(repr(float(sparsity))))


def all_finite(leaves: dict[str, Any]) -> Any:
    bad = [masks_lib.count_true(~jnp.isfinite(leaf)) for leaf in leaves.values()]
    return sum(bad) == 0
