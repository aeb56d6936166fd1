"""Annealed values and stages, worked by hand."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import schedules

CURVES = {
    "linear": schedules.linear,
    "cosine": schedules.cosine,
    "exponential": functools.partial(schedules.exponential, rate=0.05),
    "cosine_sigmoid": schedules.cosine_sigmoid,
}


def values(schedule, steps):
    """At Python ints, and the same under jit in one trace."""
    plain = [schedule(t) for t in steps]
    traced = jax.jit(chex.assert_max_traces(schedule, 1))
    for t, value in zip(steps, plain, strict=True):
        got = traced(jnp.int32(t))
        assert got.dtype == jnp.float32 and got.shape == ()
        np.testing.assert_allclose(got, value, rtol=2e-5, atol=1e-7)
    return plain


def test_linear_by_hand():
    # From 1 at step 10 to 0.2 at step 50: 0.02 a step.
    schedule = lambda t: schedules.linear(t, initial=1.0, final=0.2, begin=10, end=50)
    got = values(schedule, [0, 10, 20, 45, 50, 60])
    np.testing.assert_allclose(got, [1.0, 1.0, 0.8, 0.3, 0.2, 0.2], rtol=1e-12)


def test_cosine_is_offset_by_begin():
    # Half way, at step 200 of [100, 300], it is the mean of the ends.
    schedule = lambda t: schedules.cosine(t, initial=0.6, final=0.2, begin=100, end=300)
    got = values(schedule, [0, 100, 150, 200, 300, 400])
    quarter = 0.2 + 0.4 * (1 + np.sqrt(0.5)) / 2
    np.testing.assert_allclose(got, [0.6, 0.6, quarter, 0.4, 0.2, 0.2], rtol=1e-12)


def test_exponential_by_hand():
    # c = ln(2) / 10: half as far from the end every ten steps, until the end cuts.
    schedule = lambda t: schedules.exponential(
        t, rate=np.log(2) / 10, initial=2.0, final=1.0, begin=5, end=40
    )
    got = values(schedule, [0, 5, 15, 25, 39, 40, 99])
    want = [2.0, 2.0, 1.5, 1.25, 1 + 2**-3.4, 1.0, 1.0]
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_mask_decay_c_default_is_two_in_ten_thousand():
    # exp(-c t) = exp(-1) at t = 1 / c = 5000; max(0, 1 - c t) is linear over the same.
    assert schedules.exponential(5000, end=9000) == np.exp(-1)
    got = [schedules.linear(t, end=5000) for t in (0, 1000, 4000, 5000, 6000)]
    np.testing.assert_allclose(got, [1, 0.8, 0.2, 0, 0], rtol=1e-12)


def test_cosine_sigmoid_is_the_larger_curve():
    # p = .3: cos .7939, sigmoid 1 - s(-2.4) = .9168; p = .4: .6545 and 1 - s(-1.2) =
    # .7685; p = .6: .3455 and .2315; p = .8: .0955 and .0266. Times .75.
    schedule = lambda t: schedules.cosine_sigmoid(t, end=100)
    got = values(schedule, [0, 30, 40, 50, 60, 80, 100])
    want = [0.75, 0.687621, 0.576393, 0.375, 0.259119, 0.0716186, 0]
    np.testing.assert_allclose(got, want, rtol=2e-6)


def test_cosine_sigmoid_reset_before_the_end():
    schedule = lambda t: schedules.cosine_sigmoid(t, initial=1.0, end=100, reset=90)
    # p = .89: (1 + cos(.89 pi)) / 2 = .0295596.
    np.testing.assert_allclose(values(schedule, [89, 90, 95]), [0.0295596, 0, 0], 1e-5)


def test_annealing_does_not_compound():
    """Asked every step or only once, the value at a step is the same."""
    schedule = jax.jit(functools.partial(schedules.cosine_sigmoid, end=100))
    every_step = [float(schedule(jnp.int32(t))) for t in range(51)]
    # One that multiplies the value before by the curve has 5.7e-4 here.
    assert every_step[50] == float(schedule(jnp.int32(50)))
    np.testing.assert_allclose(every_step[50], 0.375, rtol=1e-6)


@pytest.mark.parametrize("name", CURVES)
def test_every_curve_keeps_its_ends_exactly(name):
    schedule = functools.partial(
        CURVES[name], initial=0.7, final=0.1, begin=1000, end=2000
    )
    got = [schedule(t) for t in (0, 999, 1000, 1001, 1999, 2000, 2001)]
    assert got[0] == got[1] == 0.7 and got[5] == got[6] == 0.1
    np.testing.assert_allclose(got[2], 0.7, rtol=1e-15)
    assert 0.1 <= got[4] < got[3] < 0.7
    traced = jax.jit(jax.vmap(schedule))(jnp.array([0, 999, 2000, 2001], jnp.int32))
    assert traced.tolist() == [np.float32(v) for v in (0.7, 0.7, 0.1, 0.1)]
    # It may rise as well, and an empty interval is a jump.
    rising = functools.partial(CURVES[name], initial=0.0, final=2.0, end=10)
    assert rising(0) < rising(3) < rising(7) < rising(10) == 2.0
    jump = functools.partial(CURVES[name], initial=0.7, begin=3, end=3)
    assert jump(2) == 0.7 and jump(3) == 0.0


def test_late_steps_are_told_apart():
    """float32 has no 2**24 + 1: progress is taken before the conversion."""
    begin = 2**24
    schedule = lambda t: schedules.linear(t, begin=begin, end=begin + 4)
    assert values(schedule, [begin + i for i in range(5)]) == [1, 0.75, 0.5, 0.25, 0]
    last = lambda t: schedules.linear(t, end=2**31 - 1)
    assert values(last, [2**31 - 2, 2**31 - 1])[1] == 0


def test_stages_by_hand():
    # [10, 21) in four: floors of 10, 12.75, 15.5, 18.25.
    schedule = lambda t: schedules.stage(t, stages=4, begin=10, end=21)
    steps = list(range(24))
    want = [0] * 10 + [1] * 2 + [2] * 3 + [3] * 3 + [4] * 6
    assert [schedule(t) for t in steps] == want
    traced = jax.jit(schedule)(jnp.array(steps, jnp.int32))
    assert traced.dtype == jnp.int32 and traced.tolist() == want
    # Far out: steps times stages would not fit int32.
    late = lambda t: schedules.stage(t, stages=8, begin=0, end=2**31 - 1)
    assert [int(jax.jit(late)(jnp.int32(t))) for t in (2**30, 2**31 - 2)] == [5, 8]


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize(
    "bad, message",
    [
        ({"begin": 5, "end": 4}, "end must be at least begin, got begin=5, end=4"),
        ({"begin": -1, "end": 4}, "begin must be at least 0, got -1"),
        ({"initial": float("nan"), "end": 4}, "initial must be finite, got nan"),
        ({"final": float("inf"), "end": 4}, "final must be finite, got inf"),
    ],
)
def test_bad_intervals_and_values_are_refused(name, bad, message):
    with pytest.raises(ValueError, match=message):
        CURVES[name](0, **bad)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_rates_are_refused(rate):
    with pytest.raises(ValueError, match="rate must be positive and finite"):
        schedules.exponential(0, rate=rate, end=10)


def test_bad_resets_and_stages_are_refused():
    with pytest.raises(ValueError, match=r"reset must be in \[begin, end\].* got 11"):
        schedules.cosine_sigmoid(0, end=10, reset=11)
    with pytest.raises(ValueError, match="stages must be at least 1, got 0"):
        schedules.stage(0, stages=0, end=10)
    with pytest.raises(ValueError, match="each of the 5 stages a step.* end=4"):
        schedules.stage(0, stages=5, end=4)
    with pytest.raises(ValueError, match="end must be at least begin"):
        schedules.stage(0, stages=1, begin=5, end=4)
