"""A mask expression per head: alike ones become one, with a number per head."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from sparsejax.attention import _predicates as pred
from sparsejax.attention._expressions import STATIC, Expression, expression
from sparsejax.attention._lowering import space


@expression
class _PerHead(Expression):
    """Head n is allowed what ``exprs[group[n]]`` allows."""

    exprs: tuple[Expression, ...]
    group: tuple[int, ...] = dataclasses.field(metadata=STATIC)

    def _lower(self, at):
        heads = len(self.group)
        if at.gathered.heads not in (1, heads):
            raise ValueError(
                f"per_head: got {heads} expressions, needed {at.gathered.heads} as in "
                "another per_head of this expression"
            )
        at.gathered.heads = heads
        if len(self.exprs) == 1:
            return self.exprs[0]._lower(at)
        condition = None
        for n, expr in enumerate(self.exprs):
            own = np.array([[g == n for g in self.group]], np.int32)
            mine = pred.Both(pred.Equal(at.number(own), 1), expr._lower(at))
            condition = mine if condition is None else pred.Either(condition, mine)
        return condition


def per_head(exprs: Sequence[Expression]) -> Expression:
    """Another mask for each head.

    Expressions that are alike but for their numbers, arrays or keys are stacked: the
    heads' masks then cost as much as one. Others are selected by a flag per head, and
    each element of a block that is allowed in part asks all that are unlike.

    Args:
      exprs: One expression per head: as many as the queries have heads, or as the keys
        have, each for its group of query heads.

    Returns:
      The expression.

    Raises:
      ValueError: There is none, or one differs over heads itself.

    Example:
      >>> at = sparsejax.attention
      >>> heads = at.per_head([at.sliding_window(w) for w in (1, 2)])
      >>> (heads & at.causal()).to_mask(3, 3).astype(int)
      Array([[[[1, 0, 0],
               [0, 1, 0],
               [0, 0, 1]],
              [[1, 0, 0],
               [1, 1, 0],
               [0, 1, 1]]]], dtype=int32)
    """
    exprs = list(exprs)
    if not exprs:
        raise ValueError("exprs: got none, needed one expression per head")
    shapes = [_structure(n, expr) for n, expr in enumerate(exprs)]
    kinds = list(dict.fromkeys(shapes))
    group = tuple(kinds.index(shape) for shape in shapes)
    stacked = []
    for kind in range(len(kinds)):
        # Heads of another kind take any number; their flag leaves it out.
        filler = exprs[group.index(kind)]
        mine = [e if g == kind else filler for e, g in zip(exprs, group, strict=True)]
        stacked.append(_stacked(mine))
    return _PerHead(tuple(stacked), group)


def _structure(head: int, expr: Any) -> Any:
    """What must agree for expressions to be stacked; hashable."""
    if not isinstance(expr, Expression):
        raise ValueError(
            f"exprs: got {type(expr).__name__} for head {head}, needed an expression"
        )
    kinds: list[Any] = [type(expr)]
    for field in dataclasses.fields(expr):  # type: ignore[arg-type]
        found = getattr(expr, field.name)
        if isinstance(found, Expression):
            kinds.append(_structure(head, found))
        elif field.metadata.get("static") or found is None:
            kinds.append(found)
        elif (
            isinstance(found, tuple)
            or not isinstance(found, int)
            and (found.shape[1] != 1)
        ):
            raise ValueError(
                f"exprs: the expression for head {head} differs over heads itself"
            )
        else:  # a number, or an array of so many
            kinds.append(("array", () if isinstance(found, int) else found.shape[2:]))
    return tuple(kinds)


def _stacked(exprs: list[Any]) -> Any:
    """Fields of one structure, joined along the axis of heads."""
    first = exprs[0]
    if all(e is first for e in exprs):
        return first
    if isinstance(first, Expression):
        fields = dataclasses.fields(first)  # type: ignore[arg-type]
        return type(first)(
            *(_stacked([getattr(e, field.name) for e in exprs]) for field in fields)
        )
    if all(isinstance(e, int) for e in exprs):
        return first if len(set(exprs)) == 1 else tuple(exprs)
    if first is None or isinstance(first, str | tuple) or callable(first):
        return first  # static, so all are equal
    arrays = [np.full((1, 1), e, np.int32) if isinstance(e, int) else e for e in exprs]
    xp = space(*arrays)
    batch = np.broadcast_shapes(*(a.shape[:1] for a in arrays))
    parts = [xp.broadcast_to(a, (*batch, *a.shape[1:])) for a in arrays]
    return (jnp if xp is jnp else np).concatenate(parts, axis=1)
