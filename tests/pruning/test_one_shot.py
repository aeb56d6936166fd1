"""Random, magnitude, SNIP and GraSP, worked out by hand; trees, errors, jit."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sparsejax import masks as masks_lib
from sparsejax import pruning, transforms
from sparsejax.masks import apply_masks, erdos_renyi, exact_count, given, uniform

# A linear model with a bias. Prediction x.w + b = 1 + 2 - 2 + 0.5 = 1.5, residual
# r = 1.5 - 3.5 = -2, gradient r x = (-2, -4, 2).
LINEAR = {"w": jnp.array([[1.0], [1.0], [2.0]]), "bias": jnp.array([0.5])}
BATCH = (jnp.array([[1.0, 2.0, -1.0]]), jnp.array([[3.5]]))


def squared_error(params, batch):
    x, y = batch
    return 0.5 * jnp.sum((x @ params["w"] + params["bias"] - y) ** 2)


def column(tree):
    return np.asarray(tree["w"])[:, 0].tolist()


def test_snip_by_hand():
    # |g w| = (|-2|, |-4|, |2 * 2|) = (2, 4, 4): a tie, and the first one wins.
    scores = pruning.snip_scores(squared_error, LINEAR, BATCH)
    assert column(scores) == [2.0, 4.0, 4.0]
    assert scores["bias"] == optax.MaskedNode()
    for sparsity, want in ((1 / 3, [0, 1, 1]), (2 / 3, [0, 1, 0]), (0.0, [1, 1, 1])):
        masks = pruning.snip(squared_error, LINEAR, BATCH, sparsity=sparsity)
        assert column(masks) == want
        assert masks["bias"] == optax.MaskedNode()


def test_snip_scores_a_bias_where_the_filter_takes_it():
    # |g b| = |-2 * 0.5| = 1: the least of the four.
    masks = pruning.snip(
        squared_error, LINEAR, BATCH, sparsity=0.25, leaf_filter=["w", "bias"]
    )
    assert column(masks) == [1, 1, 1] and masks["bias"].tolist() == [False]


def test_grasp_by_hand_over_the_weights_alone():
    # H = x x^T over the weights, |x|^2 = 6: H g = r |x|^2 x = -12 x = (-12, -24, 12)
    # and s = w * Hg = (-12, -24, 24). With the bias in H and g it would be 7 for 6.
    scores = pruning.grasp_scores(squared_error, LINEAR, BATCH)
    assert column(scores) == [-12.0, -24.0, 24.0]
    assert scores["bias"] == optax.MaskedNode()


def test_grasp_keeps_by_sign_what_the_gradient_needs():
    # Sign trap: the paper's S is -w * Hg and it REMOVES the largest. Of the two
    # scores of size 24 the positive one stays.
    # |g|^2 = r^2 |x|^2 = 24. Without w_2: r = 3.5 - 3.5 = 0, so the gradient is gone.
    # Without w_1: r = -0.5 - 3.5 = -4, |g|^2 = 96, so the gradient grows.
    masks = pruning.grasp(squared_error, LINEAR, BATCH, sparsity=2 / 3)
    assert column(masks) == [0, 0, 1]
    masks = pruning.grasp(squared_error, LINEAR, BATCH, sparsity=1 / 3)
    assert column(masks) == [1, 0, 1]
    norms = []
    for i in (1, 2):
        without = LINEAR | {"w": LINEAR["w"].at[i].set(0.0)}
        norms.append(float((jax.grad(squared_error)(without, BATCH)["w"] ** 2).sum()))
    assert norms == [96.0, 0.0]


def test_grasp_equals_the_hessian_written_out(key):
    shapes = {"up": (3, 4), "down": (4, 2), "bias": (4,)}
    params = {
        name: jax.random.normal(jax.random.fold_in(key, i), shape)
        for i, (name, shape) in enumerate(shapes.items())
    }
    x = jax.random.normal(key, (5, 3))

    def loss(params, x):
        return jnp.sum(jnp.tanh(x @ params["up"] + params["bias"]) @ params["down"])

    split = lambda flat: {
        "up": flat[:12].reshape(3, 4),
        "down": flat[12:].reshape(4, 2),
    }
    flat = jnp.concatenate([params["up"].ravel(), params["down"].ravel()])
    of_weights = lambda flat: loss(params | split(flat), x) ** 2
    hessian, gradient = jax.jit(jax.hessian(of_weights)), jax.jit(jax.grad(of_weights))
    want = split(flat * (hessian(flat) @ gradient(flat)))
    squared = lambda params, x: loss(params, x) ** 2
    got = jax.jit(functools.partial(pruning.grasp_scores, squared))(params, x)
    for name in ("up", "down"):
        np.testing.assert_allclose(got[name], want[name], rtol=2e-4, atol=1e-2)


def test_magnitude_by_hand_over_all_leaves_and_within_each():
    params = {
        "down": jnp.array([[5.0, -4.0], [3.0, -3.0]]),
        "up": jnp.array([[1.0, -3.0], [2.0, 0.5]]),
    }
    # Falling: 5, 4, 3 (down), 3 (down), 3 (up), 2, 1, 0.5; four of eight stay.
    masks = pruning.magnitude(params, sparsity=0.5)
    assert masks["down"].all() and not masks["up"].any()
    masks = pruning.magnitude(params, sparsity=0.5, distribution=uniform)
    assert masks["down"].tolist() == [[True, True], [False, False]]
    assert masks["up"].tolist() == [[False, True], [True, False]]
    # Densities that a user gives: 3 of down's 4 weights and 1 of up's.
    masks = pruning.magnitude(
        params, sparsity=0.5, distribution=given({"down": 0.75, "up": 0.25})
    )
    assert masks["down"].tolist() == [[True, True], [True, False]]
    assert masks["up"].tolist() == [[False, True], [False, False]]


def test_random_counts_are_exact_and_kernels_have_their_window_counted(key):
    params = {
        "conv/kernel": jnp.ones((3, 3, 16, 32)),
        "dense/kernel": jnp.ones((64, 40)),
        "dense/bias": jnp.ones(40),
    }
    draw = functools.partial(pruning.random, key, params, sparsity=0.9)
    count = lambda masks: {
        name: int(mask.sum()) for name, mask in masks.items() if "kernel" in name
    }
    assert count(draw()) == {
        "conv/kernel": 461,
        "dense/kernel": 256,
    }  # 4608 and 2560 / 10
    # ERK: (3 + 3 + 16 + 32) / 4608 and (64 + 40) / 2560 entries' shares, so that the
    # kept are eps * 54 and eps * 104, together 716.8: 244.98 and 471.82. Without the
    # window the shares would be 48 / 512 per tap, and the first 80.2%.
    masks = draw(distribution=erdos_renyi)
    assert count(masks) == {"conv/kernel": 245, "dense/kernel": 472}
    assert masks["dense/bias"] == optax.MaskedNode()


def test_random_is_even_and_follows_the_key(key):
    params = {"up": jnp.zeros((200, 100)), "down": jnp.zeros((200, 100))}
    masks = pruning.random(key, params, sparsity=0.9)
    quarters = masks["up"].reshape(4, -1).sum(1)
    # 500 of 5000 each, hypergeometric: standard deviation sqrt(500 * .9 * .75).
    np.testing.assert_allclose(quarters, 500, atol=5 * (500 * 0.9 * 0.75) ** 0.5)
    assert (masks["up"] != masks["down"]).any()
    chex.assert_trees_all_equal(masks, pruning.random(key, params, sparsity=0.9))
    other = pruning.random(jax.random.key(7), params, sparsity=0.9)
    assert (masks["up"] != other["up"]).any()
    together = pruning.random(key, params, sparsity=0.9, distribution="global")
    assert int(together["up"].sum() + together["down"].sum()) == 4000


def test_bfloat16_products_are_compared_in_float32():
    # 1.0078125 * 1.0078125 = 1.01568603515625 lies between the bfloat16 numbers
    # 1.015625 and 1.0234375: rounded it would tie with 1.015625 * 1, and lose.
    w = jnp.array([[1.015625, 1.0078125]], jnp.bfloat16)
    x = jnp.array([[1.0, 1.0078125]], jnp.bfloat16)
    loss = lambda params, x: jnp.sum(params["w"] * x)
    scores = pruning.snip_scores(loss, {"w": w}, x)
    assert scores["w"].dtype == jnp.float32
    masks = pruning.snip(loss, {"w": w}, x, sparsity=0.5)
    assert masks["w"].tolist() == [[False, True]]


class Mlp(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(3, 8, rngs=rngs)
        self.down = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        return self.down(jnp.tanh(self.up(x)))


class LinenMlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="down")(jnp.tanh(nn.Dense(8, name="up")(x)))


def trees():
    """One network three times: `(params, apply)` with equal weights."""
    graph, state = nnx.split(Mlp(nnx.Rngs(0)))
    pure = nnx.to_pure_dict(state)
    pair = tuple((pure[name]["kernel"], pure[name]["bias"]) for name in ("down", "up"))

    def of_pair(params, x):
        (down, down_bias), (up, up_bias) = params
        return jnp.tanh(x @ up + up_bias) @ down + down_bias

    return {
        "nnx": (state, lambda params, x: nnx.merge(graph, params)(x)),
        "linen": (pure, lambda params, x: LinenMlp().apply({"params": params}, x)),
        "tuple": (pair, of_pair),
    }


METHODS = {
    "magnitude": lambda loss, apply, params, x: pruning.magnitude(params, sparsity=0.7),
    "snip": lambda loss, apply, params, x: pruning.snip(loss, params, x, sparsity=0.7),
    "grasp": lambda loss, apply, params, x: pruning.grasp(
        loss, params, x, sparsity=0.7
    ),
    "synflow": lambda loss, apply, params, x: pruning.synflow(
        apply, params, (1, 3), sparsity=0.7, rounds=5
    ),
    "fisher": lambda loss, apply, params, x: pruning.fisher_mask(
        loss, params, x, sparsity=0.7, chunk_size=2, leaf_filter=None
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_nnx_linen_and_tuple_trees_agree_under_jit(method, key):
    x = jax.random.normal(key, (5, 3))
    seen = []
    for params, apply in trees().values():
        loss = lambda params, x, apply=apply: jnp.mean(apply(params, x) ** 2)
        prune = functools.partial(METHODS[method], loss, apply)
        masks = jax.jit(prune)(params, x)
        pruned = apply_masks(params, masks)
        assert jax.tree.structure(pruned) == jax.tree.structure(params)
        leaves = masks_lib.named_leaves(masks)
        assert len(leaves) == 2  # no bias
        ranks = sorted((mask.shape, mask.tolist()) for mask in leaves.values())
        seen.append(ranks)
    kept = sum(np.sum(mask) for _, mask in seen[0])
    assert kept == exact_count(0.3, 40)
    assert seen[0] == seen[1]
    # A tuple has no names, and its kernels come in the same order.
    assert seen[0] == seen[2]


def test_masks_are_those_that_transforms_train_under():
    params = LINEAR
    masks = pruning.snip(squared_error, params, BATCH, sparsity=1 / 3)
    tx = transforms.sparsify(optax.sgd(0.125), transforms.fixed(masks))
    state = tx.init(params)
    chex.assert_trees_all_equal(transforms.get_masks(state), masks)
    params = apply_masks(params, masks)
    grads = jax.grad(squared_error)(params, BATCH)
    updates, state = tx.update(grads, state, params)
    assert optax.apply_updates(params, updates)["w"][0] == 0


def test_global_pruning_may_empty_a_leaf_and_sparsity_1_empties_all():
    params = {"a": jnp.ones((2, 2)), "z": 2 * jnp.ones((2, 2))}
    assert not pruning.magnitude(params, sparsity=0.5)["a"].any()
    none = pruning.magnitude(params, sparsity=1.0)
    assert not none["a"].any() and not none["z"].any()


@pytest.mark.parametrize("sparsity", [-0.1, 1.5, float("nan")])
@pytest.mark.parametrize("method", [*METHODS, "random"])
def test_refuses_a_sparsity_outside_the_unit_interval(method, sparsity):
    call = {
        "random": lambda: pruning.random(jax.random.key(0), LINEAR, sparsity=sparsity),
        "magnitude": lambda: pruning.magnitude(LINEAR, sparsity=sparsity),
        "synflow": lambda: pruning.synflow(
            lambda p, x: x @ p["w"], LINEAR, (1, 3), sparsity=sparsity
        ),
        "fisher": lambda: pruning.fisher_mask(
            squared_error, LINEAR, BATCH, sparsity=sparsity
        ),
    }.get(
        method,
        lambda: getattr(pruning, method)(
            squared_error, LINEAR, BATCH, sparsity=sparsity
        ),
    )
    with pytest.raises(
        ValueError, match=rf"sparsity must be in \[0, 1\], .*{sparsity}"
    ):
        call()


@pytest.mark.parametrize(
    "leaf_filter, message",
    [
        ("nonsense*", "leaf_filter: every pattern must match.*'nonsense"),
        (lambda name, leaf: False, "leaf_filter must take at least one leaf"),
    ],
)
def test_refuses_a_filter_that_matches_nothing(leaf_filter, message):
    for call in (
        lambda: pruning.magnitude(LINEAR, sparsity=0.5, leaf_filter=leaf_filter),
        lambda: pruning.snip_scores(
            squared_error, LINEAR, BATCH, leaf_filter=leaf_filter
        ),
        lambda: pruning.iterative_magnitude_init(LINEAR, leaf_filter=leaf_filter),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_refuses_densities_that_miss_the_global_one():
    half = lambda shapes, density: {name: 0.5 for name in shapes}
    with pytest.raises(
        ValueError, match="distribution must keep 1 of 3 .*density of 0.33.*got 2"
    ):
        pruning.magnitude(LINEAR, sparsity=2 / 3, distribution=half)
    with pytest.raises(ValueError, match=r"must give every leaf, lacks \['w'\]"):
        pruning.magnitude(LINEAR, sparsity=0.5, distribution=lambda s, d: {"v": d})
    with pytest.raises(ValueError, match="densities allow a density of"):
        pruning.magnitude(LINEAR, sparsity=0.9, distribution=given({"w": 1.0}))
    with pytest.raises(ValueError, match="'global' or a function.*got 'uniform'"):
        pruning.magnitude(LINEAR, sparsity=0.5, distribution="uniform")


@pytest.mark.parametrize(
    "loss, got",
    [
        (lambda params, batch: params["w"], r"float32\[3, 1\]"),
        (lambda params, batch: (params["w"].sum(), 1.0), "tuple"),
        (lambda params, batch: jnp.int32(3), r"int32\[\]"),
    ],
)
def test_refuses_a_loss_that_is_no_scalar(loss, got):
    for method in (pruning.snip, pruning.grasp, pruning.fisher_mask):
        with pytest.raises(ValueError, match=f"loss must return a floating.*{got}"):
            method(loss, LINEAR, BATCH, sparsity=0.5)


def test_refuses_scores_that_are_not_finite_and_ranks_nan_last_under_jit():
    scores = {"a": jnp.array([1.0, jnp.nan]), "b": jnp.array([jnp.inf, 2.0])}
    with pytest.raises(ValueError, match="scores must be finite, got 1 of 2 at 'a'"):
        pruning.keep_largest(scores, sparsity=0.5)
    keep = functools.partial(pruning.keep_largest, sparsity=0.25)
    masks = jax.jit(keep)(scores)
    assert masks["a"].tolist() == [True, False] and masks["b"].all()
