"""Ids and masks given as lists: as arrays, or an error that names them."""

import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import attention as at

IDS, KEYS = [0, 0, 1], [0, 1, 1, 1]
MASK = [[True, False, True, False], [False, True, True, True], [True] * 4]
BLOCKS = [[True, False], [True, True]]
MADE = {
    "segments": lambda make: at.segments(make(IDS), make(KEYS)),
    "segments of a batch": lambda make: at.segments(make([IDS]), make([KEYS])),
    "from_array": lambda make: at.from_array(make(MASK)),
    "sliding_window": lambda make: at.sliding_window(make([2])),
    "keys_below": lambda make: at.keys_below(make([2])),
    "shift": lambda make: at.causal().shift(make([1]), make([2])),
    "chosen_blocks": lambda make: at.chosen_blocks(make([[[[0], [1], [-1]]]]), 2),
    "chosen_keys": lambda make: at.chosen_keys(make([[[True, False, True, True]]])),
    "in_order": lambda make: at.in_order(make([[[2, 0, 1]]]), make([[[0, 3, 1, 2]]])),
    "from_mask": lambda make: at.BlockMask.from_mask(make(MASK), (2, 2)),
    "from_blocks": lambda make: at.BlockMask.from_blocks(
        make(BLOCKS), shape=(3, 4), block_shape=(2, 2)
    ),
}


@pytest.mark.parametrize("name", MADE)
def test_lists_are_arrays(name):
    def mask(make):
        made = MADE[name](make)
        return made.to_mask(3, 4) if isinstance(made, at.Expression) else made.to_mask()

    given = mask(lambda x: x)
    np.testing.assert_array_equal(given, mask(np.array))
    assert given.any() and not given.all()
    # Tuples too, and what is in them.
    tuples = lambda x: tuple(map(tuples, x)) if isinstance(x, list) else x
    np.testing.assert_array_equal(mask(tuples), given)


@pytest.mark.slow
def test_channels_of_a_list():
    x = jnp.arange(16.0).reshape(1, 4, 1, 4)
    options = dict(block_shape=(1, 1), budget=2)
    lists, array = (
        at.double_sparsity(x, x, channels, **options)[0].to_blocks()
        for channels in ([[2, 3]], jnp.array([[2, 3]]))
    )
    np.testing.assert_array_equal(lists, array)


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: at.segments([0.0, 1.0]), "query_ids: got dtype float64"),
        (
            lambda: at.segments([0, 1], [[0], [1, 2]]),
            "key_ids: got .*, needed an array",
        ),
        (lambda: at.from_array([[0, 1]]), "mask: got dtype int"),
        (lambda: at.from_array([[True], [True, False]]), "mask: got"),
        (lambda: at.sliding_window([0]), "w: got"),
        (lambda: at.sliding_window([1.5]), "w: got"),
        (lambda: at.chosen_blocks([0, 1], 2), "choices: got"),
        (lambda: at.chosen_keys([True]), "keys: got"),
        (lambda: at.in_order([[[0]]], [0]), "key_positions: got"),
        (lambda: at.BlockMask.from_mask([True]), "mask: got"),
        (
            lambda: at.BlockMask.from_blocks([[1]], shape=(2, 2), block_shape=(2, 2)),
            "block_map: got",
        ),
    ],
)
def test_lists_that_do_not_fit_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()
