"""GraNet by hand: prune over the model, then regenerate in each leaf."""

import jax
import jax.numpy as jnp
import pytest

from sparsejax import transforms
from sparsejax.masks import uniform
from sparsejax.transforms import MaskUpdate

KEY = jax.random.key(0)
row = lambda *values: jnp.array([values], jnp.float32)
kept = lambda bits: jnp.array([[bit == "1" for bit in bits]])
MASKS = {"a": kept("111100"), "b": kept("111110")}
PARAMS = {"a": row(4, -3, 0.5, 2, 0, 0), "b": row(0.1, -5, 0.2, 1, -1.5, 0)}
SCORES = {"a": row(9, 9, 9, 9, -0.3, 0.2), "b": row(9, 9, 9, 9, 9, -0.1)}


def show(masks):
    return {k: "".join(str(int(x)) for x in m.ravel()) for k, m in masks.items()}


def update(step, masks=MASKS, params=PARAMS, scores=SCORES, **options):
    options = {"sparsity": 0.5, "end": 10, "every": 3} | options
    updater = transforms.granet(**options)
    now = MaskUpdate(masks, (), params, scores, None, jnp.int32(step))
    masks, _, ok = jax.jit(updater.update)(now)
    return show(masks), bool(ok)


def test_global_pruning_and_regeneration_by_hand():
    # Last update: 6 of 12 stay, the largest |w| of both: 5, 4, 3, 2, 1.5, 1. Then
    # round(0.34 * 3) = 1 in each leaf: a drops 2 and grows |-0.3|; b drops 1 and grows
    # its only zero. What was pruned just now has gradient 9 and stays away.
    rate = lambda step: 0.34
    assert update(9, drop_fraction=rate) == ({"a": "110010", "b": "010011"}, True)
    # No regeneration: pruning alone.
    got, _ = update(9, drop_fraction=0.0)
    assert got == {"a": "110100", "b": "010110"}
    # Leaf by leaf: 3 of 6 each, which here are the same.
    got, _ = update(9, drop_fraction=0.0, distribution=uniform)
    assert got == {"a": "110100", "b": "010110"}


def test_leaves_compete_only_where_pruning_is_global():
    # 2 of 8: 5 and 4 are both in a. Leaf by leaf one each.
    masks = {"a": kept("1111"), "b": kept("1111")}
    params = {"a": row(5, 4, 1, 1), "b": row(1, 2, 3, 1)}
    options = {"masks": masks, "params": params, "scores": params, "sparsity": 0.75}
    assert update(9, **options)[0] == {"a": "1100", "b": "0000"}
    options["distribution"] = uniform
    assert update(9, **options)[0] == {"a": "1000", "b": "0010"}


def test_regeneration_takes_no_more_than_there_are_zeros():
    # From dense nothing was zero before: the first pruning regenerates nothing.
    masks = {"a": kept("1111")}
    params = {"a": row(5, 4, 1, 2)}
    got, _ = update(
        9, masks=masks, params=params, scores=params, drop_fraction=lambda t: 1.0
    )
    assert got == {"a": "1100"}


def test_the_rate_is_a_cosine_from_begin():
    # Both ends of the ramp are 0.5, so that the rate alone moves: of 6 kept, at 100
    # round(6 * 0.5) = 3; at 102 round(6 * 0.25 (1 + cos(pi / 3))) = round(2.25) = 2;
    # at 104 round(0.75) = 1; at 106 none. By t / T without begin it were 0 at 100.
    masks = {"a": kept("111111000000")}
    params = {"a": row(1, 2, 3, 4, 5, 6, 0, 0, 0, 0, 0, 0)}
    scores = {"a": row(9, 9, 9, 9, 9, 9, 1, 2, 3, 4, 5, 6)}
    for step, want in (
        (100, "000111000111"),
        (102, "001111000011"),
        (104, "011111000001"),
        (106, "111111000000"),
    ):
        got, _ = update(
            step,
            masks=masks,
            params=params,
            scores=scores,
            initial_sparsity=0.5,
            begin=100,
            end=106,
            every=2,
            key=KEY,
        )
        assert got == {"a": want}, step


def test_the_schedule_reaches_its_target_where_every_does_not_divide():
    # The authors' stops one short: 1/K^3 of the way is left. Updates at 0, 3, 6, 9 of
    # end = 10; at 3 of 9, (2/3)^3 of 0.5 is left: 1 - 0.5 (1 - 8/27) = 0.648 of 12.
    masks = {"a": kept("111111"), "b": kept("111111")}
    total = lambda got: sum(bits.count("1") for bits in got.values())
    for step, count in ((0, 12), (3, 8), (9, 6)):
        got, _ = update(step, masks=masks)
        assert total(got) == count


def test_sparse_to_sparse_starts_from_exact_counts():
    # The authors draw each entry by itself: counts hold on average only.
    params = {"a": jnp.ones((20, 20)), "b": jnp.ones((20, 20))}
    updater = transforms.granet(sparsity=0.9, initial_sparsity=0.5, end=9, key=KEY)
    masks, _ = updater.init(params, updater.key)
    assert [int(mask.sum()) for mask in masks.values()] == [200, 200]
    with pytest.raises(ValueError, match="key must be given"):
        transforms.granet(sparsity=0.9, initial_sparsity=0.5, end=9)


def test_gradients_that_are_not_finite_skip_the_update():
    scores = SCORES | {"a": SCORES["a"].at[0, 5].set(jnp.inf)}
    assert not update(9, scores=scores)[1]
