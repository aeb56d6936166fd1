"""Attention of ``pretrain_lm.py`` that computes some blocks and leaves the others out.

Shapes: B sequences, T bytes, H heads, d features of all heads.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax

import sparsejax as sj

KINDS = ("dense", "window", "blocks")
# Of those in sparsejax.attention what asks for queries, keys and a number of blocks.
SELECTORS = ("moba", "pooled_blocks", "quest", "sparge")

# q, k -> a BlockMask and its BlockStats.
Select = Callable[[jax.Array, jax.Array], tuple[Any, Any]]
# q, k, v, each (B, T, H, d / H) -> y, the same, and what there is to tell of the mask.
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


def make_attend(config: Any, implementation: str | None) -> Attend | None:
    """What a configuration asks for; it tells its work. None: dense attention."""
    if config.attention == "dense":
        return None
    sides = config.attention_block, config.attention_block
    if config.attention == "window":
        select = functools.partial(window, config.window, sides)
    else:
        select = functools.partial(
            getattr(sj.attention, config.selector),
            block_shape=sides,
            budget=config.budget,
        )
    # Recall would cost as much as dense attention: what is not told is not computed.
    return attend_by(select, lambda stats: stats.work.mean(), implementation)


def attend_by(
    select: Select, tell: Callable[[Any], Any], implementation: str | None = None
) -> Attend:
    """Attention to what ``select`` selects."""

    def attend(q, k, v):
        mask, stats = select(q, k)
        y = sj.ops.block_sparse_attention(q, k, v, mask, implementation=implementation)
        return y, tell(stats)

    return attend


def window(width: int, sides: tuple[int, int], q: jax.Array, k: jax.Array):
    """Selects by place alone: each byte sees itself and the ``width - 1`` before it."""
    at, t = sj.attention, q.shape[1]
    near = at.causal() & at.sliding_window(width)
    mask = at.block_mask(near, t, t, block_shape=sides)
    return mask, at.block_stats(q, k, mask, at.causal())
