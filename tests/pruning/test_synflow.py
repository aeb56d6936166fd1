"""SynFlow by hand: flow, rounds, layers that survive, and numbers beyond float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import pruning
from sparsejax.masks import erdos_renyi, exact_count

UP = jnp.array([[1.0, -2.0], [3.0, 4.0]])
DOWN = jnp.array([[5.0], [-1.0]])


def network(params, x):
    return jax.nn.relu(x @ params["up"]) @ params["down"]


def test_scores_by_hand():
    # h = 1^T |up| = (4, 6), R = h |down| = 4 * 5 + 6 * 1 = 26.
    # up_ij: |up_ij| |down_j| = ((5, 2), (15, 4)); down_j: h_j |down_j| = (20, 6).
    scores = pruning.synflow_scores(network, {"up": UP, "down": DOWN}, (1, 2))
    assert scores["up"].tolist() == [[5.0, 2.0], [15.0, 4.0]]
    assert scores["down"].tolist() == [[20.0], [6.0]]
    # The flow is conserved: each layer's scores sum to R.
    assert scores["up"].sum() == scores["down"].sum() == 26


def test_biases_enter_by_absolute_value():
    # h = (4 + 1, 6 + 2) = (5, 8), so down's scores are (25, 8).
    params = {"up": UP, "down": DOWN, "bias": jnp.array([-1.0, 2.0])}

    def apply(params, x):
        return jax.nn.relu(x @ params["up"] + params["bias"]) @ params["down"]

    scores = pruning.synflow_scores(apply, params, (1, 2))
    assert scores["down"].tolist() == [[25.0], [8.0]]
    assert scores["up"].tolist() == [[5.0, 2.0], [15.0, 4.0]]


def test_rounds_by_hand():
    # One round keeps the top 3 of 6: 20, 15 and 6.
    params = {"up": UP, "down": DOWN}
    masks = pruning.synflow(network, params, (1, 2), sparsity=0.5, rounds=1)
    assert masks["up"].tolist() == [[False, False], [True, False]]
    assert masks["down"].tolist() == [[True], [True]]
    # Two rounds: first round(6 / sqrt 2 = 4.24) = 4 of them, 20, 15, 6 and 5. Then
    # nothing flows to h_1, down_1 scores 0 and up_00's 5 outlives its 6.
    masks = pruning.synflow(network, params, (1, 2), sparsity=0.5, rounds=2)
    assert masks["up"].tolist() == [[True, False], [True, False]]
    assert masks["down"].tolist() == [[True], [False]]


def test_densities_fall_exponentially_and_end_at_the_target():
    # 256 weights at density (1/16)^(k/4): 128, 64, 32, 16.
    seen = set()

    def apply(params, x):
        jax.debug.callback(lambda n: seen.add(int(n)), jnp.sum(params["w"] > 0))
        return x @ params["w"]

    params = {"w": jnp.arange(1.0, 257.0).reshape(16, 16)}
    masks = pruning.synflow(apply, params, (1, 16), sparsity=0.9375, rounds=4)
    jax.effects_barrier()
    assert seen == {256, 128, 64, 32} and masks["w"].sum() == 16
    assert masks["w"][-1].all()


def chain(key, sizes):
    return {
        f"layer_{i}": jax.random.normal(jax.random.fold_in(key, i), shape)
        / shape[0] ** 0.5
        for i, shape in enumerate(zip(sizes[:-1], sizes[1:], strict=True))
    }


def through(params, x):
    for name in sorted(params):
        x = jax.nn.relu(x @ params[name])
    return x


def test_no_layer_is_cut_where_magnitude_cuts_one(key):
    params = chain(key, (12, 40, 3, 40, 4))
    params["layer_1"] *= 1e-3
    kept = lambda masks: {name: int(mask.sum()) for name, mask in masks.items()}
    assert kept(pruning.magnitude(params, sparsity=0.98))["layer_1"] == 0
    counts = kept(pruning.synflow(through, params, (1, 12), sparsity=0.98))
    assert min(counts.values()) >= 1
    assert sum(counts.values()) == exact_count(0.02, 880)


def test_densities_per_leaf(key):
    params = chain(key, (12, 40, 4))
    masks = pruning.synflow(
        through, params, (1, 12), sparsity=0.75, rounds=3, distribution=erdos_renyi
    )
    # eps (52 + 44) = 160 kept of 640: 52 * 160 / 96 = 86.67 and 73.33.
    assert [int(mask.sum()) for mask in masks.values()] == [87, 73]


score = jax.jit(lambda params: pruning.synflow_scores(through, params, (1, 4)))
prune = jax.jit(
    lambda params: pruning.synflow(through, params, (1, 4), sparsity=0.8, rounds=9)
)


@pytest.mark.parametrize("scale", [1e20, 1e-20])
def test_a_flow_outside_float32_ranks_as_inside(key, scale):
    # R is 10^60 or 10^-60 times what it was; float32 ends at 10^38 and 10^-45.
    params = chain(key, (4, 8, 8, 2))
    scaled = {name: scale * weight for name, weight in params.items()}
    want, got = score(params), score(scaled)
    for name in params:
        np.testing.assert_allclose(
            got[name] / got[name].sum(), want[name] / want[name].sum(), rtol=1e-4
        )
    one, two = prune(params), prune(scaled)
    assert all((one[name] == two[name]).all() for name in params)


def test_scores_of_a_flow_inside_float32_are_not_rescaled(key):
    params = chain(key, (4, 8, 2))
    x, up, down = np.ones(4), *(np.abs(np.float64(w)) for w in params.values())
    scores = pruning.synflow_scores(through, params, (1, 4))
    np.testing.assert_allclose(scores["layer_0"], up * down.sum(1), rtol=1e-6)
    np.testing.assert_allclose(scores["layer_1"], (x @ up)[:, None] * down, rtol=1e-6)


def test_bfloat16_weights_are_scored_in_float32():
    params = {"up": UP.astype(jnp.bfloat16), "down": DOWN}
    scores = pruning.synflow_scores(network, params, (1, 2))
    assert scores["up"].dtype == jnp.float32 and scores["up"].sum() == 26


def test_float64_reaches_further():
    with jax.enable_x64(True):
        params = {"up": 1e45 * UP.astype(jnp.float64), "down": 1e45 * DOWN.astype("f8")}
        scores = pruning.synflow_scores(network, params, (1, 2))
        np.testing.assert_allclose(scores["down"], [[20e90], [6e90]])


def test_refuses_what_no_scale_can_hold():
    params = {"up": 1e38 * jnp.sign(UP), "down": 1e38 * DOWN}
    with pytest.raises(ValueError, match="scores must be finite.*give float64 params"):
        pruning.synflow(network, params, (1, 2), sparsity=0.5, rounds=2)


def test_refuses_no_rounds():
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        pruning.synflow(
            network, {"up": UP, "down": DOWN}, (1, 2), sparsity=0.5, rounds=0
        )
