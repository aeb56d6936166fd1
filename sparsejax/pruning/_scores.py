"""What the methods share: gradients of chosen leaves, and masks of the best scores."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax import masks as masks_lib
from sparsejax.transforms._leaves import tree_with_holes
from sparsejax.transforms._shared import Distribution, density_from, leaf_densities

Loss = Callable[[Any, Any], Any]


def keep_largest(
    scores: Any, *, sparsity: float, distribution: Distribution | str = "global"
) -> Any:
    """Masks that keep the largest scores of a model.

    Ties go to the first leaf, then to the lowest index. Costs a few passes over the
    scores.

    Args:
      scores: Tree of floating arrays; empty nodes such as `optax.MaskedNode` stay.
      sparsity: Fraction of the scored entries that is pruned, in [0, 1].
      distribution: "global": the largest of all leaves together, so that a leaf may
        keep anything between all and nothing. Or `(shapes, density) -> densities`
        over leaves by name, such as `masks.uniform`, `masks.erdos_renyi` or
        `masks.given(...)`: the largest of each leaf.

    Returns:
      A tree like `scores` of boolean arrays. Exactly `round((1 - sparsity) *
      entries)` are True, over all or in each leaf with its own density.

    Raises:
      ValueError: `sparsity` is outside [0, 1]; `distribution` is unknown or its
        densities do not average to `1 - sparsity`; a score is NaN or infinite.
        Inside jit scores have no value to look at: there NaN ranks last.

    Example:
      >>> scores = {"up": jnp.array([5.0, 4.0]), "down": jnp.array([3.0, 1.0])}
      >>> print(keep_largest(scores, sparsity=0.5)["up"])
      [ True  True]
      >>> from sparsejax.masks import uniform
      >>> print(keep_largest(scores, sparsity=0.5, distribution=uniform)["up"])
      [ True False]
    """
    leaves = masks_lib.named_leaves(scores)
    check_finite(leaves)
    kept = take(leaves, kept_counts(leaves, density_from(sparsity), distribution))
    return tree_with_holes(scores, kept)


def kept_counts(
    leaves: dict[str, Any], density: float, distribution: Distribution | str
) -> int | dict[str, int]:
    """How many entries stay: of all leaves together, or of each."""
    if distribution == "global":
        total = sum(leaf.size for leaf in leaves.values())
        return masks_lib.exact_count(density, total)
    if not callable(distribution):
        raise ValueError(
            "distribution must be 'global' or a function (shapes, density) -> "
            f"densities, got {distribution!r}"
        )
    densities = leaf_densities(leaves, density, distribution)
    return {
        name: masks_lib.exact_count(densities[name], leaf.size)
        for name, leaf in leaves.items()
    }


def take(leaves: dict[str, Any], counts: Any, where: Any = None) -> dict[str, Any]:
    """Masks of the largest entries; counts are one for all leaves or one for each."""
    if not isinstance(counts, dict):
        return masks_lib.global_topk_masks(leaves, counts, where=where)
    return {
        name: masks_lib.topk_mask(
            leaf, counts[name], where=None if where is None else where[name]
        )
        for name, leaf in leaves.items()
    }


def of_leaves(loss: Loss, params: Any, batch: Any) -> Callable[[dict[str, Any]], Any]:
    """The loss as a function of some leaves, by name; all others are constants."""

    def value(leaves):
        out = loss(replace(params, leaves), batch)
        shape = getattr(out, "shape", None)
        if shape != () or not jnp.issubdtype(out.dtype, jnp.floating):
            got = type(out).__name__ if shape is None else f"{out.dtype}{list(shape)}"
            raise ValueError(f"loss must return a floating scalar, got {got}")
        return out

    return value


def replace(params: Any, leaves: dict[str, Any]) -> Any:
    """`params` with other arrays at the names in `leaves`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaves.get(masks_lib.path_name(path), leaf), params
    )


def wide(x: Any) -> Any:
    """At least float32: products of short floats would tie."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def check_finite(leaves: dict[str, Any]) -> None:
    for name, leaf in leaves.items():
        if isinstance(leaf, jax.core.Tracer):
            continue
        bad = int(masks_lib.count_true(~jnp.isfinite(leaf)))
        if bad:
            raise ValueError(
                f"scores must be finite, got {bad} of {leaf.size} at {name!r} that are "
                "not"
            )
