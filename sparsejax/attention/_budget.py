"""How much a selector may keep, and the choice of the best blocks within it."""

import dataclasses
import functools
import numbers
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from sparsejax.attention._softmax import softmax_over


@functools.partial(jax.tree_util.register_dataclass, data_fields=["p"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class TopP:
    """The fewest blocks that together have the share ``p`` of the scores' softmax.

    Falling in score, a block is kept while those before it hold less than p, so that
    the one that reaches p is the last. Blocks that a method always keeps come first,
    and what they hold counts.

    Attributes:
      p: In (0, 1]. Traced, it changes without recompiling.

    Example:
      >>> sparsejax.attention.TopP(0.9)
      TopP(p=0.9)
    """

    p: Any  # a leaf: anything while JAX rebuilds the tree


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["value"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Threshold:
    """The blocks whose share of the scores' softmax is above ``value``.

    Attributes:
      value: In [0, 1). Traced, it changes without recompiling.

    Example:
      >>> sparsejax.attention.Threshold(5e-3)
      Threshold(value=0.005)
    """

    value: Any


@dataclasses.dataclass(frozen=True)
class Tokens:
    """As many whole blocks as fit into ``count`` keys, one at least.

    Attributes:
      count: Keys per query, static: ``count // block_k`` blocks.

    Example:
      >>> sparsejax.attention.Tokens(4096)
      Tokens(count=4096)
    """

    count: int


@dataclasses.dataclass(frozen=True)
class GaussianTopK:
    r"""About ``count`` blocks, by a threshold instead of a sort.

    .. math::
      \mathrm{kept} = \{J : S_J > \mu + \sigma\, \Phi^{-1}(1 - \mathrm{count} / n)\}

    with the mean and the deviation (of n - 1) of the n blocks' scores: exact in the
    mean where scores are Gaussian, linear in n. All blocks, where n is at most count.

    Attributes:
      count: Blocks per query block, about; static.

    Example:
      >>> sparsejax.attention.GaussianTopK(8)
      GaussianTopK(count=8)

    References:
      You et al., `Spark Transformer: Reactivating Sparsity in FFN and Attention
      <https://arxiv.org/abs/2506.06644>`_, 2025 (its statistical top-k).
    """

    count: int


jax.tree_util.register_static(Tokens)
jax.tree_util.register_static(GaussianTopK)

Budget: TypeAlias = int | float | TopP | Threshold | Tokens | GaussianTopK


class Choice(NamedTuple):
    """Which blocks are kept, and how many more were wanted, per head."""

    blocks: Bool[Array, "b h nq nk"]
    overflow: Int[Array, "b h"]


def check_budget(budget: Budget, name: str = "budget") -> None:
    """Raises ValueError unless the budget is one that can be met."""
    if isinstance(budget, TopP):
        check_range(f"{name}.p", budget.p, "(0, 1]", lambda p: 0 < p <= 1)
    elif isinstance(budget, Threshold):
        check_range(f"{name}.value", budget.value, "[0, 1)", lambda v: 0 <= v < 1)
    elif isinstance(budget, Tokens | GaussianTopK):
        check_count(f"{name}.count", budget.count)
    elif isinstance(budget, bool) or not isinstance(budget, numbers.Real):
        raise ValueError(
            f"{name}: got {budget!r}, needed a number of blocks (int), a share of them "
            "(float in (0, 1]), TopP, Threshold, Tokens or GaussianTopK"
        )
    elif isinstance(budget, numbers.Integral):
        check_count(name, budget)
    else:
        check_range(
            name, budget, "(0, 1] for a share of the blocks", lambda p: 0 < p <= 1
        )


def check_count(name: str, count: object, least: int = 1) -> None:
    """Raises ValueError unless ``count`` is an int and at least ``least``."""
    whole = isinstance(count, numbers.Integral) and not isinstance(count, bool)
    if not whole or int(count) < least:
        raise ValueError(f"{name}: got {count!r}, needed an int, {least} at least")


def check_counts(**counts: object) -> None:
    """Raises ValueError unless each is an int and at least 1."""
    for name, count in counts.items():
        check_count(name, count)


def check_range(name, value, needed, fits) -> None:
    """Raises ValueError for a concrete number that does not fit; tracers pass."""
    if isinstance(value, jax.core.Tracer):
        return
    array = np.asarray(value)
    if array.ndim or not np.issubdtype(array.dtype, np.number) or not fits(array):
        raise ValueError(f"{name}: got {value}, needed a number in {needed}")


def block_count(budget: Budget, nk: int, block_k: int) -> int:
    """Blocks per query block of a budget that is a count: 1 to nk."""
    if not is_counted(budget):
        raise ValueError(
            f"budget: got {budget}, needed a count: an int, a share of the blocks or "
            "Tokens"
        )
    if isinstance(budget, Tokens):
        count = budget.count // block_k
    elif isinstance(budget, numbers.Integral):
        count = int(budget)
    else:
        count = round(float(budget) * nk)  # type: ignore[arg-type]
    return min(max(count, 1), nk)


def is_counted(budget: Budget) -> bool:
    """Whether the number of blocks is known before the scores are."""
    return not isinstance(budget, TopP | Threshold | GaussianTopK)


def choose(
    scores: Float[Array, "b h nq nk"],
    allowed: Bool[Array, "#b #h nq nk"],
    budget: Budget,
    *,
    block_k: int,
    forced: Bool[Array, "#b #h nq nk"] | bool = False,
    most_forced: int = 0,
    added: Bool[Array, "#b #h nq nk"] | bool = False,
    capacity: int | None = None,
) -> Choice:
    """The best blocks of each query block, ties to the lowest index.

    Args:
      scores: What is ranked; float32. The softmax over the allowed blocks is what
        ``TopP`` and ``Threshold`` measure. -inf: not chosen unless forced or added.
      allowed: Blocks in which something may be attended.
      budget: What `check_budget` lets through.
      block_k: Keys per block.
      forced: Blocks that are kept whatever their score, if they are allowed. They take
        their places out of the budget, and are kept where it is smaller.
      most_forced: Bound on the forced blocks of a query block.
      added: Allowed blocks that are kept on top of the budget.
      capacity: Most blocks of a query block; of more the forced, the added and then
        the best are kept.
    """
    nk = scores.shape[-1]
    allowed = jnp.broadcast_to(allowed, scores.shape)
    forced = jnp.asarray(forced) & allowed
    keep = _wanted(scores, allowed, forced, budget, block_k, most_forced)
    keep = keep | (jnp.asarray(added) & allowed)
    if capacity is None or capacity >= nk:
        return Choice(keep, jnp.zeros(scores.shape[:2], jnp.int32))
    worth = jnp.where(added, jnp.finfo(jnp.float32).max, scores)
    worth = jnp.where(keep, jnp.where(forced, jnp.inf, worth), -jnp.inf)
    _, order = jax.lax.top_k(worth, capacity)
    kept = _at(jnp.take_along_axis(keep, order, axis=-1), order, nk)
    return Choice(kept, (keep & ~kept).sum(axis=(-2, -1), dtype=jnp.int32))


def _wanted(scores, allowed, forced, budget, block_k, most_forced):
    """Which blocks the budget asks for."""
    nk = scores.shape[-1]
    probs = softmax_over(scores, allowed)
    if isinstance(budget, Threshold):
        return forced | (probs > jnp.asarray(budget.value, jnp.float32))
    if isinstance(budget, GaussianTopK):
        real = allowed & (scores > -jnp.inf)
        return forced | (real & (scores > gaussian_bound(scores, real, budget.count)))
    rank_by = jnp.where(allowed, jnp.where(forced, jnp.inf, scores), -jnp.inf)
    if isinstance(budget, TopP):
        return forced | fewest(probs, budget.p, rank_by)
    ranked = min(nk, max(block_count(budget, nk, block_k), most_forced))
    value, order = jax.lax.top_k(rank_by, ranked)
    keep = jnp.arange(ranked) < block_count(budget, nk, block_k)
    return _at((keep & (value > -jnp.inf)) | (value == jnp.inf), order, nk)


def fewest(
    share: Float[Array, "*axes"],
    p: ArrayLike,
    rank_by: Float[Array, "*axes"] | None = None,
    least: int = 0,
) -> Bool[Array, "*axes"]:
    """The fewest entries of the last axis that hold ``p`` together, the largest first.

    Args:
      share: What each entry holds of 1.
      p: In (0, 1]; at 1 all are kept.
      rank_by: By what they are taken, ties to the lowest index; None: by their share.
        Entries of -inf are not.
      least: So many are taken in any case.
    """
    value, order = jax.lax.top_k(share if rank_by is None else rank_by, share.shape[-1])
    held = jnp.take_along_axis(share, order, axis=-1)
    p = jnp.asarray(p, jnp.float32)
    # A sum that rounds to 1 must not cut the tail that belongs to it.
    keep = (jnp.cumsum(held, axis=-1) - held < p) | (p >= 1)
    keep = keep | (jnp.arange(share.shape[-1]) < least)
    return _at(keep & (value > -jnp.inf), order, share.shape[-1])


def gaussian_bound(
    x: Float[Array, "*axes"], real: Bool[Array, "..."], count: int
) -> Float[Array, "..."]:
    """The quantile of a Gaussian that leaves ``count`` of the real entries above it.

    Over the last axis, which stays with size 1; -inf where there are not more of them.
    """
    n = real.sum(axis=-1, keepdims=True).astype(jnp.float32)
    total = lambda x: jnp.where(real, x, 0.0).sum(axis=-1, keepdims=True)
    mean = total(x) / jnp.maximum(n, 1.0)
    # Squares of what is real alone: an infinity elsewhere must not reach a gradient.
    variance = total((jnp.where(real, x, mean) - mean) ** 2) / jnp.maximum(n - 1, 1.0)
    spread = variance > 0
    deviation = jnp.where(spread, jnp.sqrt(jnp.where(spread, variance, 1.0)), 0.0)
    share = jnp.clip(1 - count / jnp.maximum(n, 1.0), 1e-6, 1.0)
    bound = mean + deviation * jax.scipy.special.ndtri(share)
    return jnp.where(n > count, bound, -jnp.inf)


def _at(value, order, nk):
    """A map of nk, True where ``order`` points at with a True value."""
    out = jnp.zeros((*order.shape[:-1], nk), bool)
    return jnp.put_along_axis(out, order, value, axis=-1, inplace=False)
