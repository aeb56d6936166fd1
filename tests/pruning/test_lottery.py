"""Iterative magnitude pruning by hand: what is pruned, what is rewound, resuming."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sparsejax import pruning, transforms
from sparsejax.masks import apply_masks, named_leaves

INITIAL = {
    "v": jnp.array([[2.5], [0.5]]),
    "w": jnp.array([[4.0, 1.0], [3.0, 2.0]]),
    "bias": jnp.array([1.0]),
}
SLOPE = {
    "v": jnp.array([[0.0], [-1.0]]),
    "w": jnp.array([[0.0, 1.0], [-1.0, 0.0]]),
    "bias": jnp.array([1.0]),
}


def train(params, masks, start_step, steps=10, rewind_step=2):
    """Each of ten steps adds the slope where the masks keep."""
    slope = apply_masks(SLOPE, masks)
    at = lambda step: jax.tree.map(
        lambda p, s: p + (step - start_step) * s, params, slope
    )
    return at(steps), at(rewind_step)


def flat(params):
    return {name: np.asarray(leaf).ravel().tolist() for name, leaf in params.items()}


def test_weight_rewinding_by_hand():
    out = pruning.iterative_magnitude(
        train, INITIAL, rounds=2, fraction=0.5, rewind="weights", rewind_step=2
    )
    # Round 0 is dense: w = (4, 1 + 10, 3 - 10, 2), v = (2.5, 0.5 - 10).
    assert flat(out.params[0]) == {
        "w": [4, 11, -7, 2],
        "v": [2.5, -9.5],
        "bias": [11],
    }
    # Round 1 keeps round(6 / 2) = 3: 11, 9.5 and 7, of both leaves together. From
    # step 2, w = (4, 3, 1, 2), v = (2.5, -1.5), bias 3, it trains 8 steps.
    assert out.masks[1]["w"].tolist() == [[False, True], [True, False]]
    assert out.masks[1]["v"].tolist() == [[False], [True]]
    assert out.masks[1]["bias"] == optax.MaskedNode()
    assert flat(out.params[1]) == {"w": [0, 11, -7, 0], "v": [0, -9.5], "bias": [11]}
    # Round 2 keeps round(6 / 4 = 1.5) = 2: 11 and 9.5.
    assert flat(out.params[2]) == {"w": [0, 11, 0, 0], "v": [0, -9.5], "bias": [11]}
    assert flat(out.state.rewind_params)["w"] == [4, 3, 1, 2]
    assert int(out.state.round) == 3


def test_learning_rate_rewinding_by_hand():
    out = pruning.iterative_magnitude(
        train, INITIAL, rounds=2, fraction=0.5, rewind="learning_rate", rewind_step=2
    )
    # The same masks; each round goes on from the last end by 8 more steps.
    assert flat(out.params[1]) == {"w": [0, 19, -15, 0], "v": [0, -17.5], "bias": [19]}
    assert flat(out.params[2]) == {"w": [0, 27, 0, 0], "v": [0, -25.5], "bias": [27]}


def test_rewinding_to_the_initialization_needs_no_second_tree():
    alone = lambda params, masks, start_step: train(params, masks, start_step)[0]
    out = pruning.iterative_magnitude(alone, INITIAL, rounds=1, fraction=0.5)
    # From w = (0, 1, 3, 0), v = (0, 0.5), bias 1, by 10 steps.
    assert flat(out.params[1]) == {"w": [0, 11, -7, 0], "v": [0, -9.5], "bias": [11]}


def test_counts_follow_the_power_and_masks_are_nested(key):
    params = {"up": jax.random.normal(key, (6, 10)), "down": jnp.ones((4, 10))}

    def noisy(params, masks, start_step):
        noise = jax.random.normal(jax.random.fold_in(key, start_step), (6, 10))
        return apply_masks(params | {"up": params["up"] + noise}, masks)

    out = pruning.iterative_magnitude(noisy, params, rounds=6)
    kept = [int(sum(m.sum() for m in named_leaves(x).values())) for x in out.masks]
    # 100 * 0.8^r = 100, 80, 64, 51.2, 40.96, 32.768, 26.2144. Rounding the last
    # round's count up or down each time would give 40 or 41, and drift.
    assert kept == [100, 80, 64, 51, 41, 33, 26]
    for old, new in zip(out.masks, out.masks[1:], strict=False):
        assert all(not (new[name] & ~old[name]).any() for name in new)


def test_a_pruned_weight_does_not_come_back_if_training_moves_it():
    # Training that forgets the masks: the pruned first weight grows large again.
    careless = lambda params, masks, start_step: {
        "w": params["w"] + jnp.array([[9.0, 0.0, 0.0, 0.0]]) * float(start_step > 0)
    }
    out = pruning.iterative_magnitude(
        careless,
        {"w": jnp.array([[1.0, 2.0, 3.0, 4.0]])},
        rounds=2,
        fraction=0.25,
        rewind="learning_rate",
        rewind_step=1,
    )
    assert out.masks[1]["w"].tolist() == [[False, True, True, True]]
    assert out.params[1]["w"].tolist() == [[9, 2, 3, 4]]
    assert out.masks[2]["w"].tolist() == [[False, False, True, True]]


def test_a_kept_weight_that_is_zero_outranks_a_pruned_one():
    # Training leaves 4 alone: of the kept zeros the first stays, not the pruned one.
    zeroing = lambda params, masks, start_step: {
        "w": jnp.array([[1.0, 2.0, 3.0, 4.0]])
        if start_step == 0
        else jnp.array([[0.0, 0.0, 0.0, 4.0]])
    }
    out = pruning.iterative_magnitude(
        zeroing,
        {"w": jnp.array([[1.0, 2.0, 3.0, 4.0]])},
        rounds=2,
        fraction=0.25,
        rewind="learning_rate",
        rewind_step=1,
    )
    assert out.masks[2]["w"].tolist() == [[False, True, False, True]]


@pytest.mark.parametrize("rewind", ["weights", "learning_rate"])
def test_resumed_it_takes_the_same_rounds(rewind):
    run = functools.partial(
        pruning.iterative_magnitude,
        train,
        INITIAL,
        fraction=0.25,
        rewind=rewind,
        rewind_step=2,
    )
    whole, half = run(rounds=4), run(rounds=1)
    # Arrays only, so that any checkpoint holds it.
    saved = jax.tree.map(np.asarray, half.state)
    rest = run(rounds=4, state=jax.tree.map(jnp.asarray, saved))
    assert len(whole.masks) == 5 and len(rest.masks) == 3
    chex.assert_trees_all_equal(whole.masks, half.masks + rest.masks)
    chex.assert_trees_all_equal(whole.params, half.params + rest.params)
    chex.assert_trees_all_equal(whole.state, rest.state)
    assert not run(rounds=4, state=whole.state).masks


def test_around_sparsify_with_nnx_state(key):
    graph, state = nnx.split(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
    x = jax.random.normal(key, (16, 6))
    y = jnp.tanh(x[:, :4])
    loss = lambda state: jnp.mean((nnx.merge(graph, state)(x) - y) ** 2)

    def train(params, masks, start_step):
        tx = transforms.sparsify(optax.sgd(0.1), transforms.fixed(masks))

        @jax.jit
        def step(params, opt_state):
            updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        opt_state, early = tx.init(params), params
        for i in range(start_step, 12):
            early = params if i == 3 else early
            params, opt_state = step(params, opt_state)
        return params, early

    out = pruning.iterative_magnitude(train, state, rounds=2, rewind_step=3)
    for r, count in enumerate((24, 19, 15)):  # 24 * 0.8^r = 24, 19.2, 15.36
        assert int(jnp.sum(out.params[r]["kernel"][...] != 0)) == count
    assert float(loss(out.params[2])) < float(loss(state))


def test_pairs_of_tuple_trees_are_told_from_params():
    # The params are themselves a pair of trees.
    params = (jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 4.0]]))
    alone = lambda params, masks, start_step: params
    pair = lambda params, masks, start_step: (params, (params[1], params[0]))
    for train in (alone, pair):
        out = pruning.iterative_magnitude(train, params, rounds=1, fraction=0.5)
        assert [leaf.tolist() for leaf in out.params[1]] == [[[0, 0]], [[3, 4]]]
    out = pruning.iterative_magnitude(
        pair, params, rounds=1, fraction=0.5, rewind_step=1
    )
    assert [leaf.tolist() for leaf in out.params[1]] == [[[0, 0]], [[1, 2]]]


keep = lambda params, masks, start_step: params


@pytest.mark.parametrize(
    "train, kwargs, message",
    [
        (keep, {"fraction": 1.5}, r"fraction must be in \[0, 1\], got 1.5"),
        (keep, {"rewind": "lr"}, "rewind must be one of .*'learning_rate'.*got 'lr'"),
        (keep, {"rewind_step": -1}, "rewind_step must be at least 0, got -1"),
        (keep, {"rounds": -1}, "rounds must be at least 0, got -1"),
        (keep, {"rewind_step": 5}, "train must return .*params_at_rewind.* to step 5"),
        (lambda p, m, s: (p, p["w"]), {}, "train must return params like its argument"),
        (
            lambda p, m, s: jax.tree.map(lambda leaf: leaf * jnp.nan, p),
            {},
            "scores must be finite, got 2 of 2 at 'v'",
        ),
    ],
)
def test_refuses(train, kwargs, message):
    with pytest.raises(ValueError, match=message):
        pruning.iterative_magnitude(train, INITIAL, **({"rounds": 1} | kwargs))


def test_refuses_masks_of_other_params():
    state = pruning.iterative_magnitude_init(INITIAL)
    state = state._replace(masks={"w": jnp.ones((3, 2), bool)})
    with pytest.raises(ValueError, match="masks must be shaped like params"):
        pruning.iterative_magnitude_round(state, keep)
