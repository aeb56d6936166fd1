"""Learning rates of factors: multipliers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax import transforms

# What the modules hold. Monarch 12 -> 20 with 4 blocks of rank 2:
# factor_0 (4, 1, 3, 8): 3 inputs per block; factor_1 (1, 4, 8, 5): 8.
MONARCH = {
    "factor_0": jnp.ones((4, 1, 3, 8)),
    "factor_1": jnp.ones((1, 4, 8, 5)),
    "bias": jnp.ones(20),
}


def multipliers(params, **options):
    """What each leaf's update of ones becomes; all entries of a leaf alike."""
    tx = transforms.scale_by_factors(**options)
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(ones, tx.init(params), params)
    for leaf in jax.tree.leaves(updates):
        np.testing.assert_array_equal(leaf, leaf.ravel()[0])
    return jax.tree.map(lambda leaf: float(leaf.ravel()[0]), updates)


def test_monarch_by_hand():
    # d / c / p: 12 / 3 / 2 and 12 / 8 / 2; the bias and a dense kernel as they are.
    params = {"up": MONARCH, "out": {"kernel": jnp.ones((20, 3))}}
    assert multipliers(params) == {
        "up": {"factor_0": 2.0, "factor_1": 0.75, "bias": 1.0},
        "out": {"kernel": 1.0},
    }


def test_more_than_ten_factors_of_a_butterfly():
    # Eleven levels of 2048 entries: 2048 / 2 / 11 each; factor_10 comes after factor_9,
    # whatever order the names sort in.
    params = {
        f"factor_{i}": jnp.ones((2048 >> (i + 1), 1 << i, 2, 2)) for i in range(11)
    }
    want = np.float32(2048 / 2 / 11)
    assert set(multipliers(params).values()) == {float(want)}


def test_a_single_block_is_a_dense_layer():
    assert multipliers({"factor_0": jnp.ones((1, 1, 6, 4))}) == {"factor_0": 1.0}


def test_layers_stacked_for_a_scan():
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), MONARCH)
    assert multipliers(stacked) == multipliers(MONARCH)


def test_low_rank_only_where_asked():
    # down: 16 / 16 / 2; up: 16 / 4 / 2.
    params = {"down": jnp.ones((16, 4)), "up": jnp.ones((4, 9))}
    assert multipliers(params, low_rank=True) == {"down": 0.5, "up": 2.0}
    assert multipliers({**params, **MONARCH})["up"] == 1.0


def test_dtypes_stay_and_adam_takes_it_under_jit():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), {"up": MONARCH})
    tx = optax.chain(optax.sgd(1.0), transforms.scale_by_factors())
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype("bfloat16")}
    assert float(updates["up"]["factor_0"].ravel()[0]) == -2.0


@pytest.mark.slow
def test_the_size_of_the_first_step_equals_a_dense_layers():
    """One step of sign descent moves y of a chain as it moves y of a dense layer.

    A dense layer's change is eta d |x| at every output. Of the chain each factor's is
    half of that to first order: together as much, whatever rank and blocks.
    """
    from sparsejax import structured

    x = jnp.ones(64)
    chain = structured.monarch(64, 64, blocks=4, rank=3)
    factors = {
        f"factor_{i}": jnp.full(p.factor_shape, 1 / p.c)
        for i, p in enumerate(chain.patterns)
    }
    output = lambda factors: x @ structured.to_dense(list(factors.values()))
    sign = optax.chain(optax.scale_by_sign(), optax.scale(-1e-6))
    tx = optax.chain(sign, transforms.scale_by_factors())
    gradient = jax.grad(lambda factors: output(factors).sum())(factors)
    updates, _ = tx.update(gradient, tx.init(factors), factors)
    _, change = jax.jvp(output, (factors,), (updates,))
    np.testing.assert_allclose(change, -1e-6 * 64, rtol=1e-5)


@pytest.mark.parametrize(
    "params, message",
    [
        ({"kernel": jnp.ones((2, 2))}, "must have leaves named factor_0"),
        ({"a": {"factor_1": MONARCH["factor_1"]}}, r"factors 0 to 0 at 'a/', got \[1"),
        ({"factor_0": jnp.ones((2, 2))}, r"factor_0 must have shape \[..., a, d, c, b"),
        (
            {"factor_0": jnp.ones((1, 1, 2, 2)), "factor_1": jnp.ones((1, 1, 3, 2))},
            "patterns: got .* which takes 3",
        ),
    ],
)
def test_what_is_no_chain_is_refused(params, message):
    with pytest.raises(ValueError, match=message):
        transforms.scale_by_factors().init(params)


def test_optax_may_ask_with_an_empty_tree():
    tx = transforms.scale_by_factors()
    assert tx.update({}, tx.init({}))[0] == {}
