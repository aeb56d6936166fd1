"""DST-EE by hand: the acquisition function and its counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import transforms
from sparsejax.transforms import MaskUpdate

KEY = jax.random.key(0)
row = lambda *values: jnp.array([values], jnp.float32)
MASKS = {"w": jnp.array([[True, True, True, False, False, False]])}
PARAMS = {"w": row(3, -1, 2, 0, 0, 0)}
# Kept entries have the largest gradients and do not compete.
SCORES = {"w": row(9, 9, 9, 0.1, -1.9, 1.0)}
COUNTS = {"w": jnp.array([[5, 6, 7, 0, 3, 1]], jnp.uint8)}


def update(now, **changes):
    options = {"sparsity": 0.5, "end": 64, "every": 8, "key": KEY} | changes
    updater = transforms.exploration_exploitation(**options)

    @jax.jit
    def step(now):
        memory = updater.observe(now, jnp.array(True))
        return updater.update(now._replace(memory=memory))

    return step(now)


@pytest.mark.parametrize(
    "exploration, step, grown",
    [
        # S = |g| + c ln t / (N + 1), with ln 8 = 2.079; N = 0, 3, 1.
        (1.0, 8, 4),  # 0.1 + 2.079 = 2.18; 1.9 + 0.520 = 2.42; 1.0 + 1.040 = 2.04
        (2.0, 8, 3),  # 0.1 + 4.159 = 4.26; 1.9 + 1.040 = 2.94; 1.0 + 2.079 = 3.08
        (1.0, 24, 3),  # ln 24 = 3.178: 3.28; 2.69; 2.59
        (0.0, 8, 4),  # rigl
        (9.0, 0, 4),  # ln of nothing is taken for 0
        (9.0, 1, 4),  # ln 1 = 0; with ln 2 the first would gain 6.2
    ],
)
def test_growth_by_hand(exploration, step, grown):
    # k = round(0.3 * 3) = 1 at first, and still 1 at 24 of 64: f = 0.207.
    now = MaskUpdate(MASKS, COUNTS, PARAMS, SCORES, KEY, jnp.int32(step))
    masks, counts, ok = update(now, exploration=exploration)
    want = [True, False, True, False, False, False]
    want[grown] = True
    assert bool(ok) and masks["w"].tolist() == [want]
    # N counts the updates that a weight came into active, and no others.
    assert counts["w"].tolist() == [[6, 7, 8, 0, 3, 1]]


def test_epsilon():
    # c ln 8 = 2.079 over N + 0.25: 8.42, 2.54, 2.66.
    now = MaskUpdate(MASKS, COUNTS, PARAMS, SCORES, KEY, jnp.int32(8))
    masks, _, _ = update(now, exploration=1.0, epsilon=0.25)
    assert masks["w"].tolist() == [[True, False, True, True, False, False]]


def test_counts_are_kept_over_updates_and_stay_at_their_last_value():
    updater = transforms.exploration_exploitation(
        sparsity=0.5, end=64, every=8, key=KEY, drop_fraction=0.0
    )
    masks, memory = updater.init(PARAMS, KEY)
    for step in (0, 3, 8, 16):
        now = MaskUpdate(masks, memory, PARAMS, SCORES, KEY, jnp.int32(step))
        memory = updater.observe(now, jnp.array(step % 8 == 0))
        if step % 8 == 0:
            masks, memory, _ = updater.update(now._replace(memory=memory))
    np.testing.assert_array_equal(memory["w"], 3 * masks["w"].astype(jnp.uint8))
    full = {"w": jnp.full((1, 6), 255, jnp.uint8)}
    _, memory, _ = update(MaskUpdate(MASKS, full, PARAMS, SCORES, KEY, jnp.int32(8)))
    np.testing.assert_array_equal(memory["w"], full["w"])


def test_a_gradient_that_is_not_finite_is_reported():
    scores = {"w": SCORES["w"].at[0, 0].set(jnp.nan)}
    now = MaskUpdate(MASKS, COUNTS, PARAMS, scores, KEY, jnp.int32(8))
    assert not bool(update(now)[2])


@pytest.mark.parametrize("bad", [{"exploration": -1.0}, {"epsilon": 0.0}])
def test_bad_constants_are_refused(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} must be"):
        transforms.exploration_exploitation(sparsity=0.5, end=9, key=KEY, **bad)
