"""What attention over listed blocks takes besides queries, keys and values."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from sparsejax._dispatch import Choice


class Where(NamedTuple):
    """Which blocks are listed, and what tells their elements apart: arrays only.

    Leading axes [b or 1, heads], where heads divides the query heads: neighbouring
    heads share an entry.

    Attributes:
      kv_idx: int32 [.., nq, capacity], key blocks of each query block.
      kv_cnt: int32 [.., nq], how many of them count.
      kv_full: bool [.., nq, capacity]: every element is allowed.
      rows: int32 [.., t] each; what the predicate asks of a query.
      cols: int32 [.., s] each; of a key.
      scalars: int32 [..] each.
      dense: bool [.., t, s] each.
    """

    kv_idx: Any
    kv_cnt: Any
    kv_full: Any
    rows: tuple[Any, ...] = ()
    cols: tuple[Any, ...] = ()
    scalars: tuple[Any, ...] = ()
    dense: tuple[Any, ...] = ()


class Operands(NamedTuple):
    """The arrays of one attention.

    Attributes:
      query: [b, t, h, d].
      key: [b, s, h_kv, d], or pages [pages, block_k, h_kv, d].
      value: [b, s, h_kv, dv], or pages.
      bias: float [b, h, nq, capacity] or None.
      where: ``Where``.
      page_table: int32 [b, nk] or None.
    """

    query: Any
    key: Any
    value: Any
    bias: Any
    where: Where
    page_table: Any


@dataclasses.dataclass(frozen=True)
class How:
    """What is fixed while tracing.

    Attributes:
      choice: Who computes.
      scale: Of the products.
      soft_cap: Or None.
      predicate: ``(i, j, rows, cols, scalars, dense) -> bool`` of elements in blocks
        that are not full, elementwise; None: all are allowed. Hashes by its meaning.
      lowers: Whether a kernel can ask the predicate.
      lengths: (t, s).
      block_shape: (block_q, block_k).
      exact: Whether out is not rounded to the query's dtype, nor is what it is the sum
        of. The gradients take ``dout . out`` from every logit of a row, so rounding
        shifts them all alike, and a block's sum for the bias adds that up. A kernel
        does so where there is a bias, and otherwise gives what its dtype holds.
    """

    choice: Choice
    scale: float
    soft_cap: float | None
    predicate: Callable[..., jax.Array] | None
    lowers: bool
    lengths: tuple[int, int]
    block_shape: tuple[int, int]
    exact: bool = False

    @property
    def blocks(self) -> tuple[int, int]:
        """How many query blocks and key blocks there are."""
        (t, s), (block_q, block_k) = self.lengths, self.block_shape
        return -(-t // block_q), -(-s // block_k)


def heads_alike(operands: Operands) -> int:
    """How many neighbouring query heads share keys, lists and what is asked of them."""
    h, h_kv = operands.query.shape[2], operands.key.shape[2]
    return h // math.lcm(h_kv, *(a.shape[1] for a in jax.tree.leaves(operands.where)))
