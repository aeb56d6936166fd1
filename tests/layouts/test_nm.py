"""Condensed N:M weights: hand-worked packing, and every refusal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from sparsejax.layouts import check_nm, condense_nm, expand_nm, pack_nm, unpack_nm
from sparsejax.masks import nm_mask

# Two groups of four, two columns; kept entries marked *.
#   column 0: *1  2 *3  4 |  5 *6  7 *8      places 0 2 | 1 3
#   column 1:  9 *8  7 *6 | *5 *4  3  2      places 1 3 | 0 1
W = np.array([[1, 9], [2, 8], [3, 7], [4, 6], [5, 5], [6, 4], [7, 3], [8, 2]], float)
MASK = np.array([[1, 0], [0, 1], [1, 0], [0, 1], [0, 1], [1, 1], [0, 0], [1, 0]], bool)


def weight(dtype=jnp.float32):
    return jnp.asarray(W, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_two_of_four_by_hand(dtype):
    values, indices = condense_nm(weight(dtype), MASK, n=2, m=4)
    assert values.dtype == dtype and indices.dtype == jnp.uint32
    np.testing.assert_array_equal(
        values.astype(jnp.float32), [[1, 8], [3, 6], [6, 5], [8, 4]]
    )
    # 2 bits each, first row lowest: 0 + 2*4 + 1*16 + 3*64 and 1 + 3*4 + 0*16 + 1*64.
    np.testing.assert_array_equal(indices, [[216, 77]])
    np.testing.assert_array_equal(
        expand_nm(values, indices, n=2, m=4), np.where(MASK, W, 0)
    )


def test_a_group_with_fewer_is_filled_up_with_zeros_at_pruned_places():
    mask = np.zeros((8, 1), bool)
    mask[2] = True  # the first group keeps place 2 alone, the second nothing
    w = jnp.arange(1.0, 9.0)[:, None]
    values, indices = condense_nm(w, mask, n=2, m=4)
    np.testing.assert_array_equal(values[:, 0], [0, 3, 0, 0])
    # Places 0 (filled up), 2 | 0, 1 (both filled up): no place is named twice.
    np.testing.assert_array_equal(unpack_nm(indices, 4, m=4)[:, 0], [0, 2, 0, 1])
    np.testing.assert_array_equal(
        expand_nm(values, indices, n=2, m=4)[:, 0], [0, 0, 3, 0, 0, 0, 0, 0]
    )


def test_pack_widths_by_hand():
    places = jnp.array([[3], [1], [2]])
    # 3 + 1*4 + 2*16; 3 + 1*16 + 2*256; 3 + 1*256 + 2*65536
    for m, word in [(4, 39), (5, 531), (16, 531), (17, 131331), (256, 131331)]:
        np.testing.assert_array_equal(pack_nm(places, m=m), [[word]])
        np.testing.assert_array_equal(
            unpack_nm(jnp.array([[word]], jnp.uint32), 3, m=m), places
        )
    # The seventeenth 2-bit place opens a second word; the highest bit is no sign.
    full = jnp.full((17, 1), 3)
    np.testing.assert_array_equal(pack_nm(full, m=4), [[2**32 - 1], [3]])


@pytest.mark.parametrize("n, m", [(1, 1), (1, 2), (3, 3), (1, 8), (4, 8), (3, 16)])
def test_round_trip(n, m):
    rng = np.random.default_rng(n * m)
    w = rng.standard_normal((2 * 3 * m, 5)).astype(np.float32)
    w[0, 0] = -0.0
    mask = np.array(nm_mask(jnp.abs(jnp.asarray(w)), n, m))
    values, indices = jax.jit(lambda w, mask: condense_nm(w, mask, n=n, m=m))(w, mask)
    assert values.shape == (6 * n, 5)
    out = expand_nm(values, indices, n=n, m=m)
    np.testing.assert_array_equal(out, np.where(mask, w, 0))
    # Rows of a group stay in order of their places.
    taken = mask.reshape(6, m, 5).swapaxes(1, 2)
    want = w.reshape(6, m, 5).swapaxes(1, 2)[taken].reshape(6, 5, n)
    np.testing.assert_array_equal(values.reshape(6, n, 5).swapaxes(1, 2), want)


def test_gradient_reaches_kept_entries_alone():
    grad = jax.grad(
        lambda w: jnp.sum(condense_nm(w, MASK, n=2, m=4)[0] * jnp.float32(3))
    )
    np.testing.assert_array_equal(grad(weight()), 3.0 * MASK)


def test_bad_input_names_argument_got_and_needed():
    w = weight()
    full = np.ones((8, 2), bool)
    with pytest.raises(ValueError, match="got 5:4, needed 1 <= n <= m"):
        condense_nm(w, MASK, n=5, m=4)
    with pytest.raises(ValueError, match="got 0:4, needed 1 <= n"):
        condense_nm(w, MASK, n=0, m=4)
    with pytest.raises(ValueError, match="got 1:512, needed .* m <= 256"):
        condense_nm(w, MASK, n=1, m=512)
    with pytest.raises(ValueError, match=r"w: got shape \(7, 2\).*multiple of m=4"):
        condense_nm(w[:7], MASK[:7], n=2, m=4)
    with pytest.raises(ValueError, match=r"mask: got bool \(8,\), needed bool \(8, 2"):
        condense_nm(w, MASK[:, 0], n=2, m=4)
    with pytest.raises(ValueError, match="mask: got int32"):
        condense_nm(w, MASK.astype(np.int32), n=2, m=4)
    full[:4, 0] = MASK[:4, 0]  # column 0 first fails in its second group
    full[:4, 1] = MASK[:4, 1]
    with pytest.raises(ValueError, match="column 0 keeps 4 of rows 4 to 7.* n=2"):
        condense_nm(w, full, n=2, m=4)


def test_bad_indices():
    values, indices = condense_nm(weight(), MASK, n=2, m=4)
    with pytest.raises(ValueError, match=r"values: got shape \(3, 2\).* n=2"):
        expand_nm(values[:3], indices, n=2, m=4)
    with pytest.raises(ValueError, match=r"indices: got int32 \(1, 2\), needed uint32"):
        expand_nm(values, indices.astype(jnp.int32), n=2, m=4)
    with pytest.raises(ValueError, match=r"needed uint32 \(1, 2\)"):
        expand_nm(values, jnp.concatenate([indices] * 2), n=2, m=4)
    twice = pack_nm(jnp.array([[0, 1], [2, 3], [1, 0], [3, 0]]), m=4)
    with pytest.raises(ValueError, match=r"group 1 of column 1 has places \[0, 0\]"):
        expand_nm(values, twice, n=2, m=4)
    # 3 is no place in a group of three, though two bits hold it.
    beyond = pack_nm(jnp.array([[0, 0], [3, 1], [0, 0], [1, 1]]), m=4)
    with pytest.raises(ValueError, match=r"group 0 of column 0 has places \[0, 3\]"):
        expand_nm(values, beyond, n=2, m=3)
    # Traced: not refused, but checkify sees it.
    jax.jit(lambda v, i: expand_nm(v, i, n=2, m=4))(values, twice)
    checked = checkify.checkify(jax.jit(lambda i: check_nm(i, 4, n=2, m=4)))
    assert "out of order" in (checked(twice)[0].get() or "")
    assert checked(indices)[0].get() is None
