"""Conditions on (query i, key j): asked of elements, and bounded over blocks.

A condition is a tree of frozen dataclasses without arrays: equal trees are equal and
hash alike, so that a kernel may take one as a static argument. Its leaves compare two
integers, of which each is the position of the query (``i``), of the key (``j``), their
difference (``i-j``), a constant, or stands in an operand: one number per query (rows),
per key (cols) or per head (scalars).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

LOWEST, HIGHEST = -(2**31), 2**31 - 1


class Operand(NamedTuple):
    """One number of an operand: ``kind`` is "rows", "cols" or "scalars"."""

    kind: str
    index: int


# "i", "j", "i-j", a constant or a place in an operand.
Term = str | int | Operand


class Elements(NamedTuple):
    """What a condition is asked about, all broadcastable to the elements."""

    i: Any
    j: Any
    rows: Any
    cols: Any
    scalars: Any
    dense: Any


class Blocks(NamedTuple):
    """The same for blocks: lowest and highest of each number, in pairs."""

    i: Any
    j: Any
    rows: Any
    cols: Any
    scalars: Any
    given: Any  # functions of this -> (some, every), see Given
    block_shape: tuple[int, int]


class Condition:
    """A boolean of i, j and operands."""

    def __call__(self, i, j, rows, cols, scalars, dense):
        """Elementwise: bool, of the shape that i, j and the operands broadcast to."""
        return self.elements(Elements(i, j, rows, cols, scalars, dense))

    def elements(self, at: Elements) -> Any:
        """Whether each element is allowed."""
        raise NotImplementedError

    def blocks(self, at: Blocks) -> tuple[Any, Any]:
        """(some, every): False only if no, True only if every element is allowed."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Always(Condition):
    """True."""

    def elements(self, at):
        return (at.i == at.i) & (at.j == at.j)

    def blocks(self, at):
        yes = (at.i[0] == at.i[0]) & (at.j[0] == at.j[0])
        return yes, yes


@dataclasses.dataclass(frozen=True)
class Less(Condition):
    """``left < right``."""

    left: Term
    right: Term

    def elements(self, at):
        return _value(self.left, at) < _value(self.right, at)

    def blocks(self, at):
        (low, high), (floor, roof) = _range(self.left, at), _range(self.right, at)
        return low < roof, high < floor


@dataclasses.dataclass(frozen=True)
class Equal(Condition):
    """``left == right``."""

    left: Term
    right: Term

    def elements(self, at):
        return _value(self.left, at) == _value(self.right, at)

    def blocks(self, at):
        (low, high), (floor, roof) = _range(self.left, at), _range(self.right, at)
        some = (low <= roof) & (floor <= high)
        return some, (low == high) & (floor == roof) & (low == floor)


@dataclasses.dataclass(frozen=True)
class Dense(Condition):
    """The boolean array ``dense[index]``. Bounds come from ``Given`` around it."""

    index: int

    def elements(self, at):
        return at.dense[self.index]


@dataclasses.dataclass(frozen=True)
class Call(Condition):
    """``fn(b, h, i + queries, j + keys)``. Bounds come from ``Given`` around it."""

    fn: Callable
    batch: Term
    head: Term
    queries: Term
    keys: Term

    def elements(self, at):
        i, j = at.i + _value(self.queries, at), at.j + _value(self.keys, at)
        return self.fn(_value(self.batch, at), _value(self.head, at), i, j)


@dataclasses.dataclass(frozen=True)
class Given(Condition):
    """A condition whose blocks are bounded by a function, ``given[index]``."""

    condition: Condition
    index: int

    def elements(self, at):
        return self.condition.elements(at)

    def blocks(self, at):
        return at.given[self.index](at)


@dataclasses.dataclass(frozen=True)
class Both(Condition):
    """``left & right``."""

    left: Condition
    right: Condition

    def elements(self, at):
        return self.left.elements(at) & self.right.elements(at)

    def blocks(self, at):
        (some, every), (also, wholly) = self.left.blocks(at), self.right.blocks(at)
        return some & also, every & wholly


@dataclasses.dataclass(frozen=True)
class Either(Condition):
    """``left | right``."""

    left: Condition
    right: Condition

    def elements(self, at):
        return self.left.elements(at) | self.right.elements(at)

    def blocks(self, at):
        (some, every), (also, wholly) = self.left.blocks(at), self.right.blocks(at)
        return some | also, every | wholly


@dataclasses.dataclass(frozen=True)
class Not(Condition):
    """``~condition``."""

    condition: Condition

    def elements(self, at):
        return ~self.condition.elements(at)

    def blocks(self, at):
        some, every = self.condition.blocks(at)
        return ~every, ~some


def _value(term: Term, at: Elements) -> Any:
    if isinstance(term, int):
        return term
    if isinstance(term, Operand):
        return getattr(at, term.kind)[term.index]
    return at.i - at.j if term == "i-j" else getattr(at, term)


def _range(term: Term, at: Blocks) -> tuple[Any, Any]:
    if isinstance(term, int):
        return term, term
    if isinstance(term, Operand):
        return getattr(at, term.kind)[term.index]
    if term == "i-j":
        return at.i[0] - at.j[1], at.i[1] - at.j[0]
    return getattr(at, term)
