"""Times, cubic sparsity and cosine drop fraction, worked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import schedules


def test_update_steps_end_is_included_and_every_need_not_divide():
    assert list(schedules.update_steps(0, 4, 2)) == [0, 2, 4]
    assert list(schedules.update_steps(1, 9, 3)) == [1, 4, 7]
    assert list(schedules.update_steps(5, 5, 100)) == [5]
    assert schedules.update_steps(7, None, 10)[1000] == 10_007


@pytest.mark.parametrize(
    "begin, end, every, message",
    [
        (5, 4, 1, "end must be at least begin.*begin=5, end=4"),
        (0, 4, 0, "every must be at least 1, got 0"),
        (-1, 4, 1, "begin must be in .* got -1"),
    ],
)
def test_a_configuration_that_never_updates_is_refused(begin, end, every, message):
    with pytest.raises(ValueError, match=message):
        schedules.update_steps(begin, end, every)


@pytest.mark.parametrize(
    "steps", [range(0), range(3, 30, 4), range(0, 1), range(2, 2**31 - 1, 7)]
)
def test_is_update_and_next_update_agree_with_the_range(steps):
    is_update = jax.jit(lambda t: schedules.is_update(t, steps))
    next_update = jax.jit(lambda t: schedules.next_update(t, steps))
    for t in range(40):
        assert (
            bool(is_update(jnp.int32(t)))
            == (t in steps)
            == bool(schedules.is_update(t, steps))
        )
        later = [s for s in steps[:50] if s >= t]
        assert int(next_update(jnp.int32(t))) == (later[0] if later else -1)


def test_cubic_by_hand_and_exact_at_the_last_update():
    cubic = lambda t: schedules.cubic_sparsity(
        t, initial=0.5, final=0.9, begin=10, end=35, every=10
    )
    # Updates at 10, 20, 30: shares left 1, 1/2, 0 of the way.
    want = [0.5, 0.5, 0.9 - 0.4 / 8, 0.9, 0.9]
    got = [cubic(t) for t in (0, 10, 20, 30, 99)]
    np.testing.assert_allclose(got, want, rtol=1e-15)
    assert got[3] == 0.9 and got[0] == 0.5
    traced = jax.jit(cubic)(jnp.int32(30))
    assert traced.dtype == jnp.float32 and traced == np.float32(0.9)
    assert schedules.cubic_sparsity(3, final=0.7, begin=3, end=3) == 0.7


def test_cosine_starts_at_begin_not_at_zero():
    cosine = lambda t: schedules.cosine_drop_fraction(
        t, fraction=0.3, begin=1000, end=2000
    )
    got = [cosine(t) for t in (0, 1000, 1250, 1500, 2000, 3000)]
    want = [0.3, 0.3, 0.15 * (1 + np.sqrt(0.5)), 0.15, 0, 0]
    np.testing.assert_allclose(got, want, atol=1e-15)
    np.testing.assert_allclose(jax.jit(cosine)(jnp.int32(1500)), 0.15, rtol=1e-6)


@pytest.mark.parametrize("bad", [-0.1, 1.1, float("nan")])
def test_schedules_refuse_fractions_out_of_range(bad):
    with pytest.raises(ValueError, match="final must be in"):
        schedules.cubic_sparsity(0, final=bad, end=1)
    with pytest.raises(ValueError, match="initial must be in"):
        schedules.cubic_sparsity(0, final=0.5, initial=bad, end=1)
    with pytest.raises(ValueError, match="fraction must be in"):
        schedules.cosine_drop_fraction(0, fraction=bad, end=1)
    with pytest.raises(ValueError, match="end must be at least begin"):
        schedules.cosine_drop_fraction(0, fraction=0.3, begin=2, end=1)
