"""Soups: averages of finished models that share one mask."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax import masks as masks_lib


def sparse_soup(
    trees: Iterable[Any],
    masks: Any = None,
    *,
    weights: Sequence[float | int] | None = None,
) -> Any:
    r"""Averages models that share a mask; the average has it too.

    .. math:: \bar w = \sum_i \frac{a_i}{\sum_j a_j} w_i

    Averaging models of different masks would fill them up, so those are refused: the
    way to models that can be averaged is to retrain one pruned model several times,
    with other batch orders or hyperparameters. What is zero in all members is exactly
    zero in the average, equal members average to themselves, and members of weight 0
    do not matter. Sums are taken in float32 or wider. Reads the trees on the host; not
    for use inside jit.

    The running statistics of batch normalization are not those of the average: leave
    them out of the trees and compute them anew, with a pass over training data.

    Args:
      trees: Trees of floating arrays, of one structure, shapes and dtypes.
      masks: A tree of boolean arrays for each tree, with paths and shapes of its
        leaves (None, empty or absent for a dense leaf), such as
        `transforms.get_masks(opt_state)`. None: a member's mask is what is not zero
        in it, in every leaf; a kept weight that happens to be 0 in one member is then
        refused, and giving the masks is the remedy.
      weights: a, not negative, one per tree. None: all equal.

    Returns:
      A tree like the members, dtypes kept.

    Raises:
      ValueError: No trees, or one in place of several; trees that differ in structure,
        shape or dtype; masks that differ, are not boolean, are not one per tree or do
        not fit; a member that is not zero where its mask is False; a leaf that is not
        floating; weights that are negative, all zero, or not one per tree. Where a
        leaf is at fault it is named.

    Example:
      >>> one = {"kernel": jnp.array([1.0, 0.0]), "bias": jnp.array([2.0])}
      >>> two = {"kernel": jnp.array([4.0, 0.0]), "bias": jnp.array([2.0])}
      >>> print(sparse_soup([one, two])["kernel"])
      [2.5 0. ]
      >>> print(sparse_soup([one, two], weights=[3, 1])["kernel"])
      [1.75 0.  ]

    References:
      Zimmer, Spiegel and Pokutta, `Sparse model soups
      <https://arxiv.org/abs/2306.16788>`_, 2024.
    """
    trees = _listed(trees)
    common = _check_members(trees, masks)
    shares = _check_weights(weights, len(trees))
    return _mix(trees, shares, common)


def greedy_soup(
    trees: Iterable[Any],
    masks: Any = None,
    *,
    evaluate: Callable[[Any], float],
) -> tuple[Any, tuple[int, ...]]:
    """Averages those members that make the average no worse.

    Members are tried from the best to the worst by `evaluate`, equal ones in the order
    given; one stays if the average with it scores at least what the average without it
    did. Costs twice as many evaluations as there are members, less one.

    Args:
      trees: As for `sparse_soup`.
      masks: As for `sparse_soup`.
      evaluate: Score of a tree, larger is better, on data held out from training and
        not those that the result is reported on. Statistics of batch normalization,
        if there are any, are its own matter.

    Returns:
      The average, and the indices of its members in the order they were taken.

    Raises:
      ValueError: As for `sparse_soup`, or a score is NaN.

    Example:
      >>> trees = [{"w": jnp.array([x, 0.0])} for x in (1.0, 4.0, 2.0)]
      >>> score = lambda tree: -abs(float(tree["w"][0]) - 1.6)
      >>> soup, members = greedy_soup(trees, evaluate=score)
      >>> print(soup["w"], members)
      [1.5 0. ] (2, 0)

    References:
      Wortsman et al., `Model soups <https://arxiv.org/abs/2203.05482>`_, 2022.

      Zimmer, Spiegel and Pokutta, `Sparse model soups
      <https://arxiv.org/abs/2306.16788>`_, 2024.
    """
    trees = _listed(trees)
    common = _check_members(trees, masks)
    scores = [_score(evaluate, tree) for tree in trees]
    order = sorted(range(len(trees)), key=lambda i: -scores[i])
    members, soup, best = [order[0]], trees[order[0]], scores[order[0]]
    for i in order[1:]:
        among = [*members, i]
        candidate = _mix(
            [trees[j] for j in among], _check_weights(None, len(among)), common
        )
        score = _score(evaluate, candidate)
        if score >= best:
            members, soup, best = among, candidate, score
    return soup, tuple(members)


def _score(evaluate: Callable[[Any], float], tree: Any) -> float:
    score = float(evaluate(tree))
    if math.isnan(score):
        raise ValueError("evaluate must return a number, got NaN")
    return score


def _mix(trees: Sequence[Any], shares: list[float], masks: Any) -> Any:
    # Left out where the share is 0: that times inf or NaN is NaN.
    counted = [(a, tree) for a, tree in zip(shares, trees, strict=True) if a > 0]

    def mean(*members):
        with jax.numpy_dtype_promotion("standard"):
            dtype = jnp.promote_types(members[0].dtype, jnp.float32)
        wide = [member.astype(dtype) for member in members]
        total = sum(a * member for (a, _), member in zip(counted, wide, strict=True))
        # Within the members, so that equal ones average to themselves.
        lowest = functools.reduce(jnp.minimum, wide)
        highest = functools.reduce(jnp.maximum, wide)
        return jnp.clip(total, lowest, highest).astype(members[0].dtype)

    averaged = jax.tree.map(mean, *(tree for _, tree in counted))
    return masks_lib.apply_masks(averaged, masks)


def _listed(trees: Any) -> tuple[Any, ...]:
    if isinstance(trees, Mapping) or not isinstance(trees, Iterable):
        raise ValueError(
            f"trees must be a sequence of trees, got one {type(trees).__name__}"
        )
    return tuple(trees)


def _check_weights(weights: Sequence[float | int] | None, count: int) -> list[float]:
    weights = [1.0] * count if weights is None else [float(a) for a in weights]
    if len(weights) != count:
        raise ValueError(f"weights must be one per tree, {count}, got {len(weights)}")
    largest = max(weights)
    if not all(0 <= a < math.inf for a in weights) or not largest:
        raise ValueError(
            f"weights must be finite, not negative and not all zero, got {weights}"
        )
    # Of the largest, since the sum of finite weights may not be finite.
    parts = [a / largest for a in weights]
    total = math.fsum(parts)
    return [part / total for part in parts]


def _check_members(trees: Sequence[Any], masks: Any) -> Any:
    """The mask that all members share, after checking that they do."""
    if not trees:
        raise ValueError("trees must hold at least one tree, got none")
    for i, tree in enumerate(trees):
        _check_alike(trees[0], tree, i)
    if masks is None:
        masks = [jax.tree.map(lambda leaf: leaf != 0, tree) for tree in trees]
    elif not isinstance(masks, list | tuple) or len(masks) != len(trees):
        got = len(masks) if isinstance(masks, list | tuple) else type(masks).__name__
        raise ValueError(
            "masks must be a list of one tree of masks per tree, "
            f"{len(trees)}, got {got}"
        )
    first = masks_lib.named_leaves(masks[0])
    for i, (tree, mask) in enumerate(zip(trees, masks, strict=True)):
        _check_same_mask(first, masks_lib.named_leaves(mask), i)
        masked = masks_lib.named_leaves(masks_lib.apply_masks(tree, mask))
        leaves = masks_lib.named_leaves(tree)
        for name in first:
            if not bool(jnp.array_equal(masked[name], leaves[name], equal_nan=True)):
                raise ValueError(
                    f"trees must be zero where their mask is False, got tree {i} "
                    f"unlike zero there at {name!r}"
                )
    return masks[0]


def _check_alike(first: Any, tree: Any, index: int) -> None:
    structures = [jax.tree.structure(t) for t in (first, tree)]
    names = [list(masks_lib.named_leaves(t)) for t in (first, tree)]
    if structures[0] != structures[1]:
        odd = sorted(set(names[0]) ^ set(names[1])) or structures[1]
        raise ValueError(
            f"trees must have one structure, got tree {index} unlike tree 0 in {odd}"
        )
    leaves = zip(names[0], jax.tree.leaves(first), jax.tree.leaves(tree), strict=True)
    for name, one, two in leaves:
        if one.shape != two.shape or one.dtype != two.dtype:
            raise ValueError(
                f"trees must have the same shapes and dtypes, got {two.dtype}"
                f"{list(two.shape)} in tree {index} for {one.dtype}{list(one.shape)} "
                f"in tree 0 at {name!r}"
            )
        if not jnp.issubdtype(two.dtype, jnp.floating):
            raise ValueError(
                f"trees must have floating leaves, got {two.dtype} at {name!r}"
            )


def _check_same_mask(first: dict[str, Any], other: dict[str, Any], index: int) -> None:
    odd = sorted(set(first) ^ set(other))
    if odd:
        raise ValueError(
            f"masks must be the same in all trees, got those of tree {index} and of "
            f"tree 0 for other leaves: {odd}"
        )
    for name, mask in other.items():
        if getattr(mask, "dtype", None) != jnp.bool_:
            got = getattr(mask, "dtype", type(mask).__name__)
            raise ValueError(
                f"masks must be boolean, got {got} in tree {index} at {name!r}"
            )
        if not bool(jnp.array_equal(mask, first[name])):
            raise ValueError(
                f"masks must be the same in all trees, got tree {index} unlike tree 0 "
                f"at {name!r}"
            )
