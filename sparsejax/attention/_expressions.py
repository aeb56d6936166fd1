"""Mask expressions: which query may attend to which key, composed with ``& | ~``."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Shaped

from sparsejax.attention import _predicates as pred
from sparsejax.attention._lowering import (
    Gathered,
    Given,
    Lowered,
    Number,
    View,
    along,
    as_array,
    host,
    pick,
    space,
    value,
)

STATIC = {"static": True}


def _is_static(field: Any) -> bool:
    """Ints, one int per head, and nothing."""
    one_per_head = isinstance(field, tuple) and all(isinstance(x, int) for x in field)
    return field is None or isinstance(field, int) or one_per_head


def _flatten_keys(expr):
    children = expr._children
    leaves = [(jax.tree_util.GetAttrKey(n), getattr(expr, n)) for n in children]
    statics = tuple(
        (field.name, getattr(expr, field.name))
        for field in dataclasses.fields(expr)
        if field.name not in children
    )
    return leaves, (children, statics)


def _unflatten(cls):
    def build(aux, leaves):
        children, statics = aux
        expr = object.__new__(cls)
        for name, field in (*statics, *zip(children, leaves, strict=True)):
            object.__setattr__(expr, name, field)
        object.__setattr__(expr, "_children", children)
        return expr

    return build


class Expression:
    """Which pairs of a query i and a key j are allowed, for any lengths.

    Compose with ``&``, ``|`` and ``~``. A pytree: arrays in it, such as segment ids,
    are leaves and may be traced; ints, such as a window's width, are static.
    """

    def __init_subclass__(cls):
        jax.tree_util.register_pytree_with_keys(cls, _flatten_keys, _unflatten(cls))

    def __post_init__(self):
        # Which fields are children is settled once: later, while JAX rebuilds the tree,
        # anything may stand in a child's place.
        children = tuple(
            field.name
            for field in dataclasses.fields(self)  # type: ignore[arg-type]
            if not field.metadata.get("static")
            and not _is_static(getattr(self, field.name))
        )
        object.__setattr__(self, "_children", children)

    def __and__(self, other: "Expression") -> "Expression":
        return _And(self, other) if isinstance(other, Expression) else NotImplemented

    def __or__(self, other: "Expression") -> "Expression":
        return _Or(self, other) if isinstance(other, Expression) else NotImplemented

    def __invert__(self) -> "Expression":
        return _Not(self)

    @property
    def lowers(self) -> bool:
        """Whether a kernel can ask it: no ``from_function`` is in it."""
        inner = jax.tree.leaves(
            [getattr(self, name) for name in self._children],  # type: ignore[attr-defined]
            is_leaf=lambda x: isinstance(x, Expression),
        )
        return all(e.lowers for e in inner if isinstance(e, Expression))

    def shift(self, queries: Any, keys: Any = 0) -> "Expression":
        """The same mask seen from elsewhere: position i is i + queries, j is j + keys.

        For a piece of a longer sequence: one query of a decoder, one device's part.
        Arrays given per position (segments, given masks) may then be longer than the
        piece; a traced shift beyond their end reads their last entry.

        Args:
          queries: int, or int32 ``[]`` or ``[b]``, which may be traced.
          keys: The same, for the keys.

        Returns:
          The shifted expression.

        Example:
          >>> at = sparsejax.attention
          >>> at.causal().shift(2).to_mask(1, 4)
          Array([[ True,  True,  True, False]], dtype=bool)
        """
        return _Shift(
            self, checked_number("queries", queries), checked_number("keys", keys)
        )

    def lower(self, t: int, s: int) -> Lowered:
        """What a kernel needs: a predicate of elements, and its operands.

        Args:
          t: Number of queries.
          s: Number of keys.

        Returns:
          The predicate, rows, cols, scalars and dense arrays.

        Raises:
          ValueError: An array in the expression does not fit these lengths.
        """
        condition, found = gather(self, t, s)

        def arrays(operands):
            return tuple(jnp.asarray(a) for a, _ in operands)

        return Lowered(
            condition,
            arrays(found.rows),
            arrays(found.cols),
            arrays(found.scalars),
            tuple(jnp.asarray(a) for a in found.dense),
        )

    def to_mask(self, t: int, s: int) -> Bool[Array, "..."]:
        """The mask in full; for tests and pictures, it is quadratic.

        Args:
          t: Number of queries.
          s: Number of keys.

        Returns:
          Boolean ``[b|1, h|1, t, s]``, True where attention is allowed; ``[t, s]``
          where it differs neither over the batch nor over heads.

        Raises:
          ValueError: An array in the expression does not fit these lengths.

        Example:
          >>> at = sparsejax.attention
          >>> (at.causal() & at.sliding_window(2)).to_mask(3, 3).astype(int)
          Array([[1, 0, 0],
                 [1, 1, 0],
                 [0, 1, 1]], dtype=int32)
        """
        mask = elements(*gather(self, t, s))
        return jnp.asarray(mask[0, 0] if mask.shape[:2] == (1, 1) else mask)

    def _lower(self, at: View) -> pred.Condition:
        """The condition, its operands added to the view's."""
        raise NotImplementedError


def gather(expr: Expression, t: int, s: int) -> tuple[pred.Condition, Gathered]:
    """The condition of an expression, and its operands, for lengths t and s."""
    if t < 1 or s < 1:
        raise ValueError(f"t, s: got {t} and {s}, needed positive ints")
    found = Gathered(t, s)
    condition = expr._lower(View(found))
    arrays = [a for a, _ in (*found.rows, *found.cols, *found.scalars)] + found.dense
    for axis, of in enumerate(("batch", "heads")):
        sizes = {a.shape[axis] for a in arrays} - {1}
        if len(sizes) > 1:
            raise ValueError(
                f"expr: got arrays for {of} of {sorted(sizes)}, needed one size, or 1"
            )
    return condition, found


def elements(condition: pred.Condition, found: Gathered) -> Any:
    """Whether each element is allowed, bool ``[b|1, h|1, t, s]``."""
    mask = condition(
        np.arange(found.t, dtype=np.int32)[:, None],
        np.arange(found.s, dtype=np.int32)[None],
        [a[..., None] for a, _ in found.rows],
        [a[:, :, None] for a, _ in found.cols],
        [a[..., None, None] for a, _ in found.scalars],
        found.dense,
    )
    shape = np.broadcast_shapes((1, found.heads, found.t, found.s), mask.shape)
    return space(mask).broadcast_to(mask, shape)


expression = dataclasses.dataclass(frozen=True, eq=False)


@expression
class _And(Expression):
    left: Expression
    right: Expression

    def _lower(self, at):
        left, right = self.left._lower(at), self.right._lower(at)
        if isinstance(left, pred.Always):
            return right
        return left if isinstance(right, pred.Always) else pred.Both(left, right)


@expression
class _Or(Expression):
    left: Expression
    right: Expression

    def _lower(self, at):
        left, right = self.left._lower(at), self.right._lower(at)
        if isinstance(left, pred.Always):
            return left
        return right if isinstance(right, pred.Always) else pred.Either(left, right)


@expression
class _Not(Expression):
    inner: Expression

    def _lower(self, at):
        return pred.Not(self.inner._lower(at))


@expression
class _Shift(Expression):
    inner: Expression
    queries: Number
    keys: Number

    def _lower(self, at):
        queries, keys = value(self.queries), value(self.keys)
        seen = dataclasses.replace(
            at, queries=at.queries + queries, keys=at.keys + keys, shifted=True
        )
        return self.inner._lower(seen)


@expression
class _Everything(Expression):
    def _lower(self, at):
        return pred.Always()


@expression
class Window(Expression):
    """-ahead < i - j < behind; None is without end."""

    behind: Number | None
    ahead: Number | None

    def _lower(self, at):
        offset = at.keys - at.queries  # i + queries - (j + keys) = i - j - offset
        sides = []
        if self.ahead is not None:
            low = self._bound(at, offset - value(self.ahead), self.ahead)
            sides.append(pred.Less(low, "i-j"))
        if self.behind is not None:
            high = self._bound(at, offset + value(self.behind), self.behind)
            sides.append(pred.Less("i-j", high))
        return sides[0] if len(sides) == 1 else pred.Both(*sides)

    def _bound(self, at, bound, width):
        return at.number(bound, at.queries, at.keys, width)


@expression
class _Segments(Expression):
    query_ids: Any
    key_ids: Any  # None: the queries' own

    def _lower(self, at):
        query_ids = _taken("query_ids", self.query_ids, at, "i", 2)
        if self.key_ids is None:
            key_ids = _taken("query_ids (key_ids is None)", self.query_ids, at, "j", 2)
        else:
            key_ids = _taken("key_ids", self.key_ids, at, "j", 2)
        return pred.Equal(at.row(query_ids, None), at.col(key_ids, None))


@expression
class _Array(Expression):
    mask: Any

    def _lower(self, at):
        mask = _taken("mask", _taken("mask", self.mask, at, "i", 2), at, "j", 3)
        at.gathered.dense.append(mask)
        dense = pred.Dense(len(at.gathered.dense) - 1)
        return at.given(dense, lambda blocks: _reduced(mask, blocks.block_shape), None)


def everything() -> Expression:
    """Every query attends to every key."""
    return _Everything()


def causal() -> Expression:
    """Keys up to the query's own position: i >= j.

    Positions count from the start: with fewer queries than keys, ``shift`` by how far
    the first query is into the keys.

    Returns:
      The expression.

    Example:
      >>> sparsejax.attention.causal().to_mask(2, 3).astype(int)
      Array([[1, 0, 0],
             [1, 1, 0]], dtype=int32)
    """
    return Window(None, 1)


def sliding_window(w: Any, ahead: Any = None) -> Expression:
    """Keys less than w positions away: |i - j| < w.

    Args:
      w: Width, at least 1, which is the query's own position alone. An int, or int32
        ``[b]`` or ``[b|1, h|1]``, which may be traced.
      ahead: Width to the right, j - i < ahead, where it differs from that to the left,
        i - j < w.

    Returns:
      The expression.

    Raises:
      ValueError: A width is below 1.
    """
    behind = checked_number("w", w, least=1)
    return Window(
        behind, behind if ahead is None else checked_number("ahead", ahead, 1)
    )


def segments(query_ids: Given, key_ids: Given | None = None) -> Expression:
    """Pairs of equal segment, as of documents packed into one row.

    Blocks of documents that do not meet are not computed, where ids are sorted.

    Args:
      query_ids: Integers ``[t]`` or ``[b, t]``; may be traced.
      key_ids: Integers ``[s]`` or ``[b, s]``; default, those of the queries.

    Returns:
      The expression.

    Raises:
      ValueError: The ids are not integers of one or two axes. On use: they are not as
        many as there are queries and keys (or, shifted, too few).
    """
    keys = None if key_ids is None else _ids("key_ids", key_ids)
    return _Segments(_ids("query_ids", query_ids), keys)


def from_array(mask: Given) -> Expression:
    """A mask given in full.

    Args:
      mask: Boolean ``[t, s]`` or ``[b|1, h|1, t, s]``; may be traced.

    Returns:
      The expression.

    Raises:
      ValueError: The mask is no boolean of two or four axes. On use: it is not
        ``[t, s]`` (or, shifted, too small).
    """
    array = as_array("mask", mask)
    if array.ndim not in (2, 4) or array.dtype != np.bool_:
        raise ValueError(
            f"mask: got dtype {array.dtype} and shape {array.shape}, needed bool "
            "[t, s] or [b|1, h|1, t, s]"
        )
    return _Array(array if array.ndim == 4 else array[None, None])


def _taken(name: str, array: Any, at: View, axis: str, where: int) -> Any:
    """``array [b|1, h|1, ...]`` at the positions of the queries or keys."""
    size, shift = (at.t, at.queries) if axis == "i" else (at.s, at.keys)
    long, array = array.shape[where], host(array)
    if not at.shifted:
        if long != size:
            what = "queries" if axis == "i" else "keys"
            raise ValueError(f"{name}: got {long} positions, needed {size}, the {what}")
        return array
    if isinstance(shift, int):
        if shift < 0 or shift + size > long:
            raise ValueError(
                f"{name}: got {long} positions, needed {shift} to {shift + size}: "
                f"{size} after a shift by {shift}"
            )
        return array[(slice(None),) * where + (slice(shift, shift + size),)]
    positions = along(shift) + np.arange(size, dtype=np.int32)[None, None]
    return pick(array, positions.clip(0, long - 1), where)


def _reduced(mask: Any, block_shape: tuple[int, int]) -> tuple[Any, Any]:
    """(any, all) over every block of ``mask [b|1, h|1, t, s]``."""
    t, s = mask.shape[2:]
    (bq, bk), found = block_shape, []
    for edge, reduce in ((False, "any"), (True, "all")):
        pad = [(0, 0), (0, 0), (0, -t % bq), (0, -s % bk)]
        xp = space(mask)
        whole = xp.pad(mask, pad, constant_values=edge) if t % bq or s % bk else mask
        # One axis at a time: a sharded array's reshape can split no more.
        rows = whole.reshape(*whole.shape[:3], -(-s // bk), bk)
        rows = getattr(rows, reduce)(axis=4)
        tiles = rows.reshape(*mask.shape[:2], -(-t // bq), bq, rows.shape[3])
        found.append(getattr(tiles, reduce)(axis=3))
    return found[0], found[1]


def checked_number(name: str, given: Any, least: int | None = None) -> Number:
    """Checks a number: an int, or int32 ``[]``, ``[b]`` or ``[b|1, h|1]``."""
    if isinstance(given, int | np.integer) and not isinstance(given, bool):
        given = int(given)
        if least is not None and given < least:
            raise ValueError(f"{name}: got {given}, needed at least {least}")
        return given
    array = as_array(name, given)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name}: got {given!r}, needed an int or an array of ints")
    if array.ndim > 2:
        raise ValueError(f"{name}: got shape {array.shape}, needed [], [b] or [b, h]")
    if least is not None and not isinstance(array, jax.core.Tracer):
        if array.size and np.asarray(array).min() < least:
            raise ValueError(f"{name}: got {array}, needed at least {least}")
    array = array.astype(np.int32)
    return array.reshape(-1, 1) if array.ndim < 2 else array


def _ids(name: str, ids: Any) -> Shaped[Any, "..."]:
    """Segment ids as int32 ``[b|1, 1, t]``."""
    ids = as_array(name, ids)
    if ids.ndim not in (1, 2) or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(
            f"{name}: got dtype {ids.dtype} and shape {ids.shape}, needed integers "
            "[length] or [b, length]"
        )
    ids = ids.astype(np.int32)
    return ids[None, None] if ids.ndim == 1 else ids[:, None]
