"""Sparse momentum by hand: the average, the drop, the sharing out, the growth."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax import transforms
from sparsejax.transforms import MaskUpdate
from sparsejax.transforms._sparse_momentum import _round_to_bfloat16, share_out

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


@pytest.mark.parametrize("decay", [None, 0.9])
def test_strict_promotion_with_wide_integers(decay):
    """jnp.sum of int32 is int64 under x64."""
    tx = transforms.sparsify(
        optax.sgd(0.1, momentum=0.9),
        transforms.sparse_momentum(
            sparsity=0.75, end=9, every=2, decay=decay, key=jax.random.key(0)
        ),
    )
    with jax.enable_x64(True):
        params = {"a": jnp.ones((8, 16), jnp.float32), "c": jnp.ones((4, 8))}
        _, state = jax.jit(tx.update)(params, tx.init(params), params)
    assert sum(int(mask.sum()) for mask in state.masks.values()) == 40


def test_the_average_is_kept_in_its_own_dtype():
    # 0.75 * 1 + 0.25 * 1.02 = 1.005 is no bfloat16: those next to it are 1 and 1.0078.
    given = {"w": row(1.02)}
    for dtype, want in ((jnp.bfloat16, 1.0078125), (jnp.float32, 1.005)):
        updater = transforms.sparse_momentum(
            sparsity=0.5, end=9, key=KEY, decay=0.75, average_dtype=dtype
        )
        _, memory = updater.init({"w": jnp.ones((1, 2))}, KEY)
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


def trained(inner, gradients, *, moments="zero", **options):
    """State and weights after each step from w = 1, 2, 0, 0, of which two are kept."""
    updater = transforms.sparse_momentum(
        sparsity=0.5, begin=2, end=2, key=KEY, **options
    )
    tx = transforms.sparsify(inner, updater, moments=moments)
    state = tx.init({"w": jnp.ones((1, 4))})
    state = state._replace(masks={"w": kept("1100")})
    params, seen = {"w": row(1, 2, 0, 0)}, []
    for g in gradients:
        updates, state = tx.update({"w": g}, state, params)
        params = optax.apply_updates(params, updates)
        seen.append((state, params["w"]))
    return seen


# trace <- 0.5 trace + g, of the zeros: 8, -4, then the update at step 2, which sees 4 +
# -8 = -4 and 1 + 2 = 3 and grows the first by |-4|; its own gradients, 0.5 and 9, would
# have grown the second. Dropped is 1, the smaller weight. The other goes 2, 3, 3.5 by
# the traces -4, -2.
GIVEN = [row(0, -4, 8, 2), row(0, 0, -8, 2), row(0, 0, 0.5, 9)]


@pytest.mark.parametrize(
    "moments, trace, weight",
    [
        ("zero", 0.5, -0.125),  # begins with this step's gradient, 0 - 0.25 * 0.5
        ("keep", -1.5, 0.375),  # 0.5 * -4 + 0.5
        ("mean", -0.5, 0.125),  # 0.5 * -2 + 0.5, of the one weight that stayed
    ],
)
def test_the_optimizers_momentum_is_what_grows(moments, trace, weight):
    seen = trained(optax.sgd(0.25, momentum=0.5), GIVEN, moments=moments)
    np.testing.assert_array_equal(seen[1][1], row(1, 3.5, 0, 0))
    state, w = seen[-1]
    assert state.memory == ()
    assert state.masks["w"].tolist() == [[False, True, True, False]]
    np.testing.assert_array_equal(w, row(0, 3.75, weight, 0))
    # Where nothing changed momentum goes on, of zeros too: 0.5 * 3 + 9.
    got = state.inner_state[0].trace["w"]
    np.testing.assert_array_equal(got, row(0, -1, trace, 10.5))


def test_before_there_is_momentum_gradients_grow():
    updater = transforms.sparse_momentum(sparsity=0.5, end=0, key=KEY)
    tx = transforms.sparsify(optax.adam(0.1), updater)
    state = tx.init({"w": jnp.ones((1, 6))})._replace(masks={"w": kept("111000")})
    params = {"w": row(1, 2, 3, 0, 0, 0)}
    # round(0.5 * 3) = 2 of three: in order of their places it were the first two.
    _, state = tx.update({"w": row(0, 0, 0, 1, -3, 2)}, state, params)
    assert state.masks["w"].tolist() == [[False, False, True, False, True, True]]


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_bad_gradients_do_not_grow_before_there_is_momentum(bad):
    updater = transforms.sparse_momentum(sparsity=0.5, end=0, key=KEY)
    tx = transforms.sparsify(optax.adam(0.1), updater)
    state = tx.init({"w": jnp.ones((1, 4))})._replace(masks={"w": kept("1100")})
    _, state = tx.update({"w": row(0, 0, bad, 1)}, state, {"w": row(1, 2, 0, 0)})
    assert state.masks["w"].tolist() == [[False, True, False, True]]
    assert int(state.skipped_updates) == 0


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_bad_gradient_of_a_zero_weight_does_not_stay_in_the_momentum(bad):
    inner = optax.sgd(0.25, momentum=0.5)
    given = [row(0, 0, bad, 2), row(0, 0, 8, 2), row(0, 0, 0.5, 9)]
    state, w = trained(inner, given)[-1]
    # trace of the zeros: 0 (not NaN), 8, cleared for growth, 0.5; 2, 3, 10.5.
    np.testing.assert_array_equal(state.inner_state[0].trace["w"], row(0, 0, 0.5, 10.5))
    np.testing.assert_array_equal(w, row(0, 2, -0.125, 0))
    # Of a kept weight it is the optimizer's business, as without masks.
    [(state, w)] = trained(inner, [row(bad, 1, 0, 0)])
    assert not jnp.isfinite(w[0, 0]) and w[0, 1:].tolist() == [1.75, 0, 0]


def test_an_average_is_kept_where_the_optimizer_has_no_one_momentum():
    twice = optax.chain(optax.trace(0.9), optax.adam(1.0))
    for inner in (optax.sgd(0.1), optax.rmsprop(0.1), twice):
        seen = trained(inner, [row(0, 0, 8, 2)])
        np.testing.assert_allclose(
            seen[0][0].memory["w"].astype(jnp.float32), row(0, 0, 0.8, 0.2), 2e-3
        )
    state, _ = trained(optax.adam(0.1), [row(0, 0, 8, 2)], decay=0.5)[0]
    np.testing.assert_array_equal(state.memory["w"], row(0, 0, 4, 1))
    # The optimizer then sees masked gradients, as under other updaters.
    np.testing.assert_array_equal(state.inner_state[0].mu["w"], row(0, 0, 0, 0))


def test_gradients_given_apart_enter_the_optimizers_momentum():
    # A loop whose gradients are sparse passes dense ones as grow_scores.
    updater = transforms.sparse_momentum(sparsity=0.5, begin=2, end=2, key=KEY)
    tx = transforms.sparsify(optax.sgd(0.25, momentum=0.5), updater)
    state = tx.init({"w": jnp.ones((1, 4))})._replace(masks={"w": kept("1100")})
    _, state = tx.update(
        {"w": row(1, 2, 0, 0)},
        state,
        {"w": row(1, 2, 0, 0)},
        grow_scores={"w": row(7, 7, 3, -4)},
    )
    np.testing.assert_array_equal(state.inner_state[0].trace["w"], row(1, 2, 3, -4))


def test_momentum_in_another_dtype_than_gradients():
    updater = transforms.sparse_momentum(sparsity=0.5, end=0, key=KEY)
    tx = transforms.sparsify(optax.adam(0.1, mu_dtype=jnp.bfloat16), updater)
    state = tx.init({"w": jnp.ones((1, 4))})._replace(masks={"w": kept("1100")})
    _, state = tx.update({"w": row(0, 0, 2, 1)}, state, {"w": row(1, 2, 0, 0)})
    assert state.inner_state[0].mu["w"].dtype == jnp.bfloat16
    assert state.masks["w"].tolist() == [[False, True, True, False]]


@pytest.mark.parametrize("decay", [None, 0.0])
def test_what_overflows_in_float16_stays_out(decay):
    # float16 ends at 65504: 1e6 is inf there, among gradients and among scores.
    half = lambda *values: row(*values).astype(jnp.float16)
    updater = transforms.sparse_momentum(sparsity=0.5, end=9, key=KEY, decay=decay)
    tx = transforms.sparsify(optax.sgd(0.25, momentum=0.5), updater)
    state = tx.init({"w": jnp.ones((1, 4), jnp.float16)})
    state = state._replace(masks={"w": kept("1100")}, next_update=jnp.int32(-1))
    for scores in (None, {"w": row(0, 0, 1e6, 1)}):
        given = {"w": half(0, 0, jnp.inf, 1)}
        _, new = tx.update(given, state, {"w": half(1, 2, 0, 0)}, grow_scores=scores)
        m = new.inner_state[0].trace["w"] if decay is None else new.memory["w"]
        # A float32 score of 1e6 is finite in the average, which is kept in bfloat16.
        want = 0 if decay is None or scores is None else 1e6
        np.testing.assert_allclose(m.astype(jnp.float32), row(0, 0, want, 1), 4e-3)


def test_a_weight_called_mu_is_no_momentum():
    updater = transforms.sparse_momentum(sparsity=0.5, end=9, key=KEY)
    tx = transforms.sparsify(optax.adam(0.1), updater)
    state = tx.init({"mu": {"mu": jnp.ones((2, 2))}, "trace": jnp.ones((2, 2))})
    assert state.memory == ()


def test_bfloat16_by_the_bits_is_bfloat16():
    bits = jax.random.bits(KEY, (100_000,), jnp.uint32)
    x = jax.lax.bitcast_convert_type(bits, jnp.float32)
    x = x[jnp.abs(x) <= float(jnp.finfo(jnp.bfloat16).max)]
    ties = jax.lax.bitcast_convert_type(bits & 0x7F7F8000 | 0x8000, jnp.float32)
    for given in (x, ties[jnp.abs(ties) < 3e38], row(0.0, -0.0)):
        got = _round_to_bfloat16(given)
        as_bits = lambda v: jax.lax.bitcast_convert_type(v, jnp.uint16)
        np.testing.assert_array_equal(as_bits(got), as_bits(given.astype(jnp.bfloat16)))
