"""What other libraries' masks and selectors get wrong, in a test that its name says.

Defects of their attention are in ``tests/ops/test_attention_peer_defects.py``; what
else of a peer has a test says its name: ``grep -ri splash tests``.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import attention as at

sys.path.insert(0, str(Path(__file__).parent))
import _attention_oracle as oracle  # noqa: E402

T = 12
CAUSAL = np.tri(T, dtype=bool)


def blocks_of(mask):
    return np.asarray(mask.to_blocks())[0, 0].astype(int)


def test_tokamax_holes_between_the_first_and_the_last_key_are_skipped():
    """It has one interval of keys for each query, and visits all inside."""
    streaming = at.causal() & (at.sliding_window(4) | at.keys_below(4))
    mask = at.block_mask(streaming, 24, 24, block_shape=(4, 4))
    # The first block, the own one, and the one before it.
    np.testing.assert_array_equal(
        blocks_of(mask),
        [
            [1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0],
            [1, 0, 1, 1, 0, 0],
            [1, 0, 0, 1, 1, 0],
            [1, 0, 0, 0, 1, 1],
        ],
    )
    far = at.block_mask(at.strided(8), 16, 16, block_shape=(2, 2))
    # i - j in {-8, 0, 8} for i in {2 I, 2 I + 1}: blocks I - 4, I and I + 4.
    np.testing.assert_array_equal(blocks_of(far), np.tile(np.eye(4), (2, 2)))


def test_tokamax_a_given_array_skips_its_empty_blocks():
    """Splash's dynamic masks, too, visit all blocks, in the kernel's grid at least."""
    given = np.zeros((8, 12), bool)
    given[1, 10] = given[6, 0] = True
    given[4:, 4:8] = True
    want = [[0, 0, 1], [1, 1, 0]]
    for make in (lambda m: m, jax.jit):
        mask = make(lambda m: at.BlockMask.from_mask(m, (4, 4)))(jnp.asarray(given))
        np.testing.assert_array_equal(blocks_of(mask), want)
        np.testing.assert_array_equal(mask.kv_full[0, 0], [[0] * 3, [0, 1, 0]])


def test_spargeattn_no_key_block_is_alike_inside():
    """A softmax over blocks none of which takes part is NaN, and all are kept."""
    query, key = oracle.heads(1, b=1, t=T, s=T, h=1, g=1)
    mask = oracle.lists(
        at.sparge, query, key, block_shape=(4, 4), budget=at.TopP(0.5), similarity=1.0
    )
    np.testing.assert_array_equal(blocks_of(mask), np.tri(3))


def test_seerattention_a_share_that_rounds_to_no_block():
    """int((1 - sqrt(1 - share)) * blocks) is 0 there: here a query keeps a block."""
    query, key = oracle.heads(2, b=1, t=T, s=T, h=1, g=1)
    select = lambda q, k: at.pooled_blocks(
        q, k, block_shape=(4, 4), budget=0.01, keep_own=False
    )[0]
    np.testing.assert_array_equal(jax.jit(select)(query, key).kv_cnt, 1)


def test_minference_counts_that_the_sequence_is_too_short_for():
    """Defaults are a thousand columns, the last 64 queries, 30 forced columns."""
    query, key = oracle.heads(3, b=1, t=T, s=T, h=1, g=1)
    mask = oracle.lists(at.vertical_slash, query, key, block_shape=(4, 4))
    np.testing.assert_array_equal(mask.to_mask(), CAUSAL)


def test_double_sparsity_more_tokens_than_there_are():
    """torch.topk of 256 fails on a shorter cache, or one that fills up."""
    query, key = oracle.heads(4, b=1, t=T, s=T, h=1, g=1)
    channels = jnp.arange(3, dtype=jnp.int32)[None]
    mask = oracle.lists(
        at.double_sparsity, query, key, channels, block_shape=(1, 1), budget=256
    )
    np.testing.assert_array_equal(mask.to_mask(), CAUSAL)
