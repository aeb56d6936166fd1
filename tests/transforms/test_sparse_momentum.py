"""Sparse momentum by hand: the average, the drop, the sharing out, the growth."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax import transforms
from sparsejax.transforms import MaskUpdate
from sparsejax.transforms._sparse_momentum import share_out

KEY = jax.random.key(0)
row = lambda *values: jnp.array([values], jnp.float32)
kept = lambda bits: jnp.array([[bit == "1" for bit in bits]])


def updated(updater, masks, memory, params, step=0):
    scores = {name: jnp.full(w.shape, jnp.nan) for name, w in params.items()}
    now = MaskUpdate(masks, memory, params, scores, KEY, jnp.int32(step))
    masks, memory, ok = jax.jit(updater.update)(now)
    assert bool(ok)
    show = lambda mask: "".join(str(int(x)) for x in mask.ravel())
    return {name: show(mask) for name, mask in masks.items()}


def observed(updater, memory, scores):
    now = MaskUpdate({}, memory, {}, scores, KEY, jnp.int32(0))
    return updater.observe(now, jnp.array(False))


def test_the_average_of_dense_gradients():
    # M <- 0.75 M + 0.25 g from M = 0: g = 4, 8 gives 1, then 0.75 + 2 = 2.75.
    updater = transforms.sparse_momentum(sparsity=0.5, end=9, key=KEY, decay=0.75)
    _, memory = updater.init({"w": jnp.ones((1, 4))}, KEY)
    memory = observed(updater, memory, {"w": row(4, -4, 0, 4)})
    np.testing.assert_array_equal(memory["w"], row(1, -1, 0, 1))
    memory = observed(updater, memory, {"w": row(8, -8, 4, -4)})
    np.testing.assert_array_equal(memory["w"], row(2.75, -2.75, 1, -0.25))


def test_the_average_is_kept_in_its_own_dtype():
    # 0.75 * 1 + 0.25 * 1.02 = 1.005 is no bfloat16: those next to it are 1 and 1.0078.
    given = {"w": row(1.02)}
    for dtype, want in ((jnp.bfloat16, 1.0078125), (jnp.float32, 1.005)):
        updater = transforms.sparse_momentum(
            sparsity=0.5, end=9, key=KEY, decay=0.75, average_dtype=dtype
        )
        _, memory = updater.init({"w": jnp.ones((1, 1))}, KEY)
        assert memory["w"].dtype == dtype
        memory = observed(updater, {"w": row(1).astype(dtype)}, given)
        assert memory["w"].dtype == dtype
        np.testing.assert_allclose(memory["w"].astype(jnp.float32), row(want), 1e-6)


def test_an_average_of_integers_is_refused():
    with pytest.raises(ValueError, match="average_dtype: got"):
        transforms.sparse_momentum(sparsity=0.5, end=9, key=KEY, average_dtype=int)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf, 3.4e38])
def test_gradients_that_are_not_finite_never_enter_the_average(bad, dtype):
    # 3.4e38 is finite, but no bfloat16: rounded to one it is inf.
    updater = transforms.sparse_momentum(sparsity=0.5, end=9, key=KEY, decay=0.0)
    memory = {"w": row(1, 2, 3, 4).astype(dtype)}
    if dtype == jnp.float32 and bad == 3.4e38:
        bad = jnp.nan
    new = observed(updater, memory, {"w": row(bad, 6, bad, 8)})
    assert new["w"].dtype == dtype
    np.testing.assert_array_equal(new["w"].astype(jnp.float32), row(1, 6, 3, 8))


def test_drop_redistribute_and_grow_by_hand():
    # f = 0.5 of 4 kept: k = 2 in both leaves, K = 4. Mean |M| over kept: 3 and 1, so
    # r = 3/4 * 4 = 3 and 1/4 * 4 = 1. The zeros' momentum must not enter: with it the
    # means were 2.0125 and 5.1.
    updater = transforms.sparse_momentum(sparsity=0.5, end=8, every=3, key=KEY)
    masks = {"a": kept("11110000"), "b": kept("00001111")}
    params = {
        "a": row(1, -2, 3, 0.5, 0, 0, 0, 0),
        "b": row(0, 0, 0, 0, -0.1, 5, 0.2, 4),
    }
    memory = {
        "a": row(3, -3, 3, 3, 0.9, -1.1, 1.0, -1.1),
        "b": row(9, -9.2, 9.1, -9.5, 1, 1, -1, 1),
    }
    # a drops |1| and |0.5|, grows -1.1, -1.1 and 1.0; b drops |-0.1| and |0.2|, grows
    # -9.5.
    got = updated(updater, masks, memory, params)
    assert got == {"a": "01100111", "b": "00010101"}
    # Without redistribution each grows its own two: of the two ties both in a.
    updater = transforms.sparse_momentum(
        sparsity=0.5, end=8, every=3, key=KEY, redistribution=False
    )
    got = updated(updater, masks, memory, params)
    assert got == {"a": "01100101", "b": "01010101"}
    # Later on the cosine: at t = 6 of 8, f = 0.25 (1 + cos(3 pi / 4)) = 0.073: k =
    # round(0.29) = 0.
    got = updated(updater, masks, memory, params, step=6)
    assert got == {"a": "11110000", "b": "00001111"}


def test_the_cosine_counts_from_begin():
    # begin = 100: f(100) = 0.5, though t / T = 100/104 would give nearly 0.
    updater = transforms.sparse_momentum(
        sparsity=0.5, begin=100, end=104, every=1, key=KEY
    )
    masks, w = {"a": kept("1100")}, {"a": row(1, 2, 0, 0)}
    memory = {"a": row(1, 1, 1, 2)}
    assert updated(updater, masks, memory, w, step=100) == {"a": "0101"}
    assert updated(updater, masks, memory, w, step=104) == {"a": "1100"}


def test_a_just_dropped_weight_does_not_grow_back():
    updater = transforms.sparse_momentum(sparsity=0.5, end=9, key=KEY)
    masks, w = {"a": kept("1100")}, {"a": row(1, 2, 0, 0)}
    assert updated(updater, masks, {"a": row(9, 9, 0, 1)}, w) == {"a": "0101"}


def test_a_full_leaf_takes_no_more_than_it_has_room_for():
    # Leaf a has room for 1 and all the momentum; the rest of K = 1 + 2 goes to b.
    updater = transforms.sparse_momentum(sparsity=0.5, end=9, key=KEY)
    masks = {"a": kept("1110"), "b": kept("11110000")}
    params = {"a": row(1, 2, 3, 0), "b": row(1, 2, 3, 4, 0, 0, 0, 0)}
    memory = {"a": row(9, 9, 9, 9), "b": row(0, 0, 0, 0, 1, 2, 3, 4)}
    # a: k = min(round(1.5), 1) = 1.
    got = updated(updater, masks, memory, params)
    assert got == {"a": "0111", "b": "00110011"}


@pytest.mark.parametrize(
    "total, weight, room, want",
    [
        (4, [1, 1, 1], [9, 9, 9], [2, 1, 1]),  # 4/3 each: of equals the first
        (7, [5, 3, 2], [9, 9, 9], [4, 2, 1]),  # 3.5, 2.1, 1.4: the .5 gets the one
        (7, [2, 3, 5], [9, 9, 9], [1, 2, 4]),  # 1.4, 2.1, 3.5
        (7, [5, 3, 2], [2, 9, 9], [2, 3, 2]),  # 2 in a; 5 left at 3 : 2
        (7, [5, 3, 2], [2, 2, 9], [2, 2, 3]),  # a full, then b full
        (3, [0, 0, 0], [2, 0, 2], [2, 0, 1]),  # no weights at all: in turn
        (5, [1, 0, 0], [2, 2, 2], [2, 2, 1]),
        (0, [1, 2, 3], [5, 5, 5], [0, 0, 0]),
        (6, [1, 1, 1], [2, 2, 2], [2, 2, 2]),
        (3, [float("nan"), 1, 1], [9, 9, 9], [1, 1, 1]),  # never a wrong sum
        (3, [float("inf"), 1, 1], [9, 9, 9], [1, 1, 1]),
    ],
)
def test_sharing_out_by_largest_remainder(total, weight, room, want):
    got = jax.jit(share_out)(
        jnp.int32(total), jnp.array(weight, jnp.float32), jnp.array(room, jnp.int32)
    )
    assert got.tolist() == want


def test_the_total_is_exact_where_floats_are_not():
    # The authors' code keeps it about constant; float32 cannot count beyond 2**24.
    weight = jax.random.uniform(KEY, (7,))
    for total in (2**24 + 1, 2**26 + 3, 10**9 + 7):
        room = jnp.array([total // 6, total // 5, total, 3, total // 7, 0, total // 2])
        got = jax.jit(share_out)(jnp.int32(total), weight, room.astype(jnp.int32))
        assert int(got.sum()) == total
        assert bool(((got >= 0) & (got <= room)).all())


def test_the_memory_is_of_dense_gradients_from_step_0():
    # The wrapper masks gradients for the optimizer, not for the average; and the first
    # update, at step 2, uses steps 0 and 1.
    tx = transforms.sparsify(
        optax.sgd(0.0),
        transforms.sparse_momentum(sparsity=0.5, begin=2, end=2, key=KEY, decay=0.5),
    )
    state = tx.init({"w": jnp.ones((1, 4))})
    state = state._replace(masks={"w": kept("1100")})
    params = {"w": row(1, 2, 0, 0)}
    for g in (row(0, 0, 8, 2), row(0, 0, -8, 2), row(0, 0, 0.5, 2)):
        _, state = tx.update({"w": g}, state, params)
    # M of the zeros: 4, -2, -0.75; 1, 1.5, 1.75. Means of |g| would favour the first.
    np.testing.assert_array_equal(state.memory["w"], row(0, 0, -0.75, 1.75))
    assert state.masks["w"].tolist() == [[False, True, False, True]]
