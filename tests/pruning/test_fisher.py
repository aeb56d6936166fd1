"""FISH masks by hand, in chunks, with drawn labels; frozen weights to the bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax import pruning

PARAMS = {"bias": jnp.array([0.0]), "w": jnp.array([1.0, 1.0])}
# Predictions 3, 0, 2; residuals r = 1, -1, 0; gradients r x = (1, 2), (-1, 1), (0, 0)
# and r for the bias.
BATCH = {
    "x": jnp.array([[1.0, 2.0], [1.0, -1.0], [2.0, 0.0]]),
    "y": jnp.array([2.0, 1.0, 2.0]),
}


def predict(params, x):
    return x @ params["w"] + params["bias"]


def loss(params, batch):
    return jnp.mean(0.5 * (predict(params, batch["x"]) - batch["y"]) ** 2)


@pytest.mark.parametrize("chunk_size", [1, 2, 32])
def test_scores_by_hand_in_any_chunks(chunk_size):
    # Means of squares: (1 + 1 + 0) / 3, (4 + 1 + 0) / 3 and (1 + 1 + 0) / 3. Squares
    # of the mean gradient would be (0, 1) and 0.
    scores = pruning.fisher_scores(loss, PARAMS, BATCH, chunk_size=chunk_size)
    np.testing.assert_allclose(scores["w"], [2 / 3, 5 / 3], rtol=1e-6)
    np.testing.assert_allclose(scores["bias"], [2 / 3], rtol=1e-6)


def test_mask_by_hand_with_the_bias_among_them():
    # Two of three may change: 5/3, and of the two 2/3 the first leaf's.
    masks = pruning.fisher_mask(loss, PARAMS, BATCH, sparsity=1 / 3)
    assert masks["bias"].tolist() == [True] and masks["w"].tolist() == [False, True]
    masks = pruning.fisher_mask(loss, PARAMS, BATCH, sparsity=0.5, leaf_filter="w")
    assert masks["bias"] == optax.MaskedNode()
    assert masks["w"].tolist() == [False, True]


def test_sampled_labels_take_the_place_of_the_given():
    # Labels one above the prediction: r = -1 everywhere and F is the mean of x^2,
    # (1 + 1 + 4) / 3 and (4 + 1 + 0) / 3, and 1 for the bias.
    def sample(key, params, batch):
        return batch | {"y": predict(params, batch["x"]) + 1}

    scores = pruning.fisher_scores(
        loss, PARAMS, BATCH, sample=sample, key=jax.random.key(0), chunk_size=2
    )
    np.testing.assert_allclose(scores["w"], [2, 5 / 3], rtol=1e-6)
    np.testing.assert_allclose(scores["bias"], [1], rtol=1e-6)


def test_sampled_labels_estimate_the_true_information():
    # One logit w = log 3, so p = 3/4, at x = 1: F = p (1 - p) = 0.1875. With every
    # label 1 the empirical one is (1 - p)^2 = 0.0625.
    def bernoulli(params, batch):
        logit = params["w"] * batch["x"]
        return jnp.mean(jax.nn.softplus(logit) - batch["y"] * logit)

    def sample(key, params, batch):
        p = jax.nn.sigmoid(params["w"] * batch["x"])
        return batch | {"y": jax.random.bernoulli(key, p).astype(jnp.float32)}

    params = {"w": jnp.log(jnp.array([3.0]))}
    batch = {"x": jnp.ones((2000, 1)), "y": jnp.ones((2000, 1))}
    scores = pruning.fisher_scores(bernoulli, params, batch, chunk_size=300)
    np.testing.assert_allclose(scores["w"], [0.0625], rtol=1e-5)
    draw = functools.partial(
        pruning.fisher_scores, bernoulli, params, batch, sample=sample
    )
    scores = draw(key=jax.random.key(0), chunk_size=300)
    # Values 1/16 and 9/16 at odds of 3 : 1: standard deviation 0.5 sqrt(3 / 16).
    error = 0.5 * (3 / 16) ** 0.5 / 2000**0.5
    np.testing.assert_allclose(scores["w"], [0.1875], atol=5 * error)
    again = draw(key=jax.random.key(0), chunk_size=1000)
    np.testing.assert_allclose(scores["w"], again["w"], rtol=1e-5)


def test_memory_is_that_of_a_chunk():
    # 64 gradients of 256 KiB are 16 MiB; two at a time must do with far less.
    x = jnp.ones((64, 256))
    squared = lambda params, x: jnp.sum(jnp.tanh(x @ params["w"]))

    def used(chunk_size):
        f = functools.partial(pruning.fisher_scores, squared, chunk_size=chunk_size)
        lowered = jax.jit(f).lower({"w": jnp.zeros((256, 256))}, x)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert used(2) < 4 * 2**20 < used(64)


def bits(x):
    return np.asarray(x).view({2: np.uint16, 4: np.uint32}[x.dtype.itemsize])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_frozen_entries_keep_every_bit_whatever_decays(dtype):
    # -0 plus 0 is 0, so an update of 0 would not do.
    w = jnp.array([-0.0, 0.0, 1.1, -3e38, 1e-30, 5.0], dtype)
    params = {"w": w, "free": jnp.ones(2, dtype), "n": jnp.array(3)}
    masks = {"w": jnp.array([0, 0, 0, 0, 0, 1], bool), "free": optax.MaskedNode()}
    tx = pruning.sparse_finetune(
        optax.partition(
            {"train": optax.adamw(0.1, weight_decay=0.5), "leave": optax.set_to_zero()},
            {"w": "train", "free": "train", "n": "leave"},
        ),
        masks,
    )
    grads = {"w": jnp.ones_like(w), "free": jnp.ones(2, dtype), "n": jnp.array(0)}
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(grads, state, params)
        with jax.numpy_dtype_promotion("standard"):
            return optax.apply_updates(params, updates), state

    new = params
    for _ in range(3):
        new, state = step(new, state)
    np.testing.assert_array_equal(bits(new["w"])[:5], bits(w)[:5])
    assert new["w"][5] < 5 and (new["free"] < 1).all() and new["n"] == 3


def test_frozen_gradients_do_not_count_in_a_clipped_norm():
    # Of the gradient (3, 4, 100) the norm is 5 without the last: clipped to 1 it is
    # (0.6, 0.8, 0).
    tx = pruning.sparse_finetune(
        optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0)),
        {"w": jnp.array([True, True, False])},
    )
    params = {"w": jnp.array([1.0, 1.0, 1.0])}
    grads = {"w": jnp.array([3.0, 4.0, 100.0])}
    updates, _ = tx.update(grads, tx.init(params), params)
    new = optax.apply_updates(params, updates)
    np.testing.assert_allclose(new["w"], [0.4, 0.2, 1.0], rtol=1e-6)


def test_fine_tuning_keeps_what_a_fish_mask_freezes():
    masks = pruning.fisher_mask(loss, PARAMS, BATCH, sparsity=1 / 3)
    tx = pruning.sparse_finetune(optax.sgd(0.1, momentum=0.9), masks)
    step = jax.jit(lambda s, p: tx.update(jax.grad(loss)(p, BATCH), s, p))
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(20):
        updates, state = step(state, params)
        params = optax.apply_updates(params, updates)
    assert params["w"][0] == 1 and params["w"][1] != 1
    assert loss(params, BATCH) < loss(PARAMS, BATCH)


def test_a_donated_state_leaves_the_masks_alone():
    masks = {"w": jnp.array([True, False])}
    tx = pruning.sparse_finetune(optax.sgd(0.1), masks)
    params = {"w": jnp.ones(2)}
    step = jax.jit(lambda s: tx.update(params, s, params)[1], donate_argnums=0)
    step(step(tx.init(params)))
    assert masks["w"].tolist() == [True, False]


@pytest.mark.parametrize(
    "masks, message",
    [
        ({"v": jnp.ones(2, bool)}, "a mask at 'v'"),
        ({"w": jnp.ones(3, bool)}, r"got \(3,\) for \(2,\) at 'w'"),
    ],
)
def test_refuses_masks_that_do_not_fit(masks, message):
    with pytest.raises(ValueError, match=f"masks must .*{message}"):
        pruning.sparse_finetune(optax.sgd(0.1), masks).init(PARAMS)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"key": jax.random.key(0)}, "sample and key must come together, got only key"),
        ({"sample": lambda key, params, batch: batch}, "got only sample"),
        ({"batch": {"x": jnp.ones((3, 2)), "y": jnp.ones(2)}}, "one size for all"),
        ({"batch": {"x": jnp.ones((0, 2)), "y": jnp.ones(0)}}, "one size for all"),
        ({"batch": jnp.float32(1)}, "batch must have a leading axis"),
    ],
)
def test_refuses(kwargs, message):
    batch = kwargs.pop("batch", BATCH)
    with pytest.raises(ValueError, match=message):
        pruning.fisher_scores(loss, PARAMS, batch, **kwargs)
