"""Condensed constant fan-in weights: literals, padding, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from sparsejax.layouts import check_fan_in, condense_fan_in, expand_fan_in

W = jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0], [10.0, 11.0, 12.0]])
MASK = np.array([[1, 0, 0], [0, 1, 0], [1, 0, 1], [0, 1, 1]], bool)


def test_kept_entries_column_by_column():
    values, indices = condense_fan_in(W, MASK)
    # Columns keep rows (0, 2), (1, 3), (2, 3) of [1 4 7 10], [2 5 8 11], [3 6 9 12].
    np.testing.assert_array_equal(values, [[1, 7], [5, 11], [9, 12]])
    np.testing.assert_array_equal(indices, [[0, 2], [1, 3], [2, 3]])
    assert indices.dtype == jnp.int32
    dense = expand_fan_in(values, indices, 4)
    np.testing.assert_array_equal(dense, [[1, 0, 0], [0, 5, 0], [7, 0, 9], [0, 11, 12]])


def test_ablated_neuron_is_filled_up_with_zeros_at_distinct_rows():
    """Padding that repeated an index would count an entry twice."""
    mask = MASK.copy()
    mask[:, 1] = False  # ablated
    mask[2, 0] = False  # one fewer
    values, indices = condense_fan_in(W, mask, fan_in=3)
    # Kept rows first, then pruned ones from the top: (0 | 1 2), ( | 0 1 2), (2 3 | 0).
    np.testing.assert_array_equal(indices, [[0, 1, 2], [0, 1, 2], [2, 3, 0]])
    np.testing.assert_array_equal(values, [[1, 0, 0], [0, 0, 0], [9, 12, 0]])
    dense = expand_fan_in(values, indices, 4)
    np.testing.assert_array_equal(dense, [[1, 0, 0], [0, 0, 0], [0, 0, 9], [0, 0, 12]])


def test_under_jit_and_differentiable():
    traces = []

    @jax.jit
    def condense(w, mask):
        traces.append(1)
        return condense_fan_in(w, mask, fan_in=2)

    for mask in (MASK, MASK[::-1]):
        for got, want in zip(condense(W, mask), condense_fan_in(W, mask), strict=True):
            np.testing.assert_array_equal(got, want)
    assert len(traces) == 1
    grad = jax.grad(lambda w: jnp.sum(condense(w, MASK)[0] ** 2))(W)
    np.testing.assert_array_equal(grad, 2 * np.where(MASK, W, 0))
    values, indices = condense_fan_in(W, MASK)
    grad = jax.grad(lambda v: jnp.sum(W * expand_fan_in(v, indices, 4)))(values)
    np.testing.assert_array_equal(grad, values)


def test_nothing_and_everything():
    values, indices = condense_fan_in(W, np.zeros((4, 3), bool))
    assert values.shape == indices.shape == (3, 0)
    np.testing.assert_array_equal(expand_fan_in(values, indices, 4), np.zeros((4, 3)))
    values, indices = condense_fan_in(W, np.ones((4, 3), bool))
    np.testing.assert_array_equal(values, W.T)


def test_errors():
    with pytest.raises(ValueError, match=r"w: got shape \(3,\), needed \[k, n\]"):
        condense_fan_in(W[0], MASK[0])
    with pytest.raises(ValueError, match=r"mask: got bool \(3, 4\), needed bool \(4"):
        condense_fan_in(W, MASK.T)
    with pytest.raises(ValueError, match="mask: got int64"):
        condense_fan_in(W, MASK.astype(np.int64))
    with pytest.raises(ValueError, match=r"fan_in: got 5, needed an int in \[0, 4\]"):
        condense_fan_in(W, MASK, fan_in=5)
    with pytest.raises(ValueError, match="fan_in: got 1, needed at least 2, which col"):
        condense_fan_in(W, MASK, fan_in=1)
    uneven = MASK.copy()
    uneven[0, 1] = True
    with pytest.raises(ValueError, match="mask: column 0 keeps 2 and another 3"):
        condense_fan_in(W, uneven)
    with pytest.raises(ValueError, match="fan_in: got None with a traced mask"):
        jax.jit(condense_fan_in)(W, MASK)
    values, indices = condense_fan_in(W, MASK)
    with pytest.raises(ValueError, match=r"indices: column 0 has 3, needed.*\[0, 3\)"):
        expand_fan_in(values[2:], jnp.array([[0, 3]]), 3)
    with pytest.raises(ValueError, match="values: got .* a fan-in of 2, needed at mos"):
        expand_fan_in(values, indices, 1)


def test_check_fan_in():
    check_fan_in(jnp.array([[0, 2], [1, 0]]), 3)
    with pytest.raises(ValueError, match=r"column 1 has 3, needed indices in \[0, 3\)"):
        check_fan_in(jnp.array([[0, 2], [1, 3]]), 3)
    with pytest.raises(ValueError, match="column 0 has -1"):
        check_fan_in(jnp.array([[-1, 2]]), 3)
    with pytest.raises(ValueError, match=r"column 1 has one twice in \[2, 0, 2\]"):
        check_fan_in(jnp.array([[0, 1, 2], [2, 0, 2]]), 3)
    traced = jax.jit(checkify.checkify(lambda i: check_fan_in(i, 3)))
    traced(jnp.array([[0, 2]]))[0].throw()
    for bad in ([[0, 3]], [[-1, 0]], [[2, 2]]):
        with pytest.raises(checkify.JaxRuntimeError, match="out of range, or repeated"):
            traced(jnp.array(bad))[0].throw()
