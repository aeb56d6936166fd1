"""Soups and particle averages: by hand, refusals, and masks that stay."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sparsejax import averaging, pruning, transforms
from sparsejax.masks import apply_masks


def tree(kernel, bias=(0.5,), dtype=jnp.float32):
    return {
        "layer": {"kernel": jnp.array(kernel, dtype), "bias": jnp.array(bias, dtype)}
    }


def kernel(tree):
    return tree["layer"]["kernel"]


THREE = [tree([1, 0, 2]), tree([2, 0, -4]), tree([6, 0, 8])]


def test_uniform_and_weighted_soup_by_hand():
    soup = averaging.sparse_soup(THREE)
    np.testing.assert_allclose(kernel(soup), [3, 0, 2], rtol=1e-6)  # 9 / 3, 6 / 3
    assert soup["layer"]["bias"] == 0.5
    # Weights 2, 1, 1: (2 + 2 + 6) / 4, (4 - 4 + 8) / 4.
    soup = averaging.sparse_soup(THREE, weights=[2, 1, 1])
    np.testing.assert_allclose(kernel(soup), [2.5, 0, 2], rtol=1e-6)
    soup = averaging.sparse_soup(THREE, weights=[0, 0, 5])
    np.testing.assert_allclose(kernel(soup), [6, 0, 8], rtol=1e-6)


def test_equal_members_average_to_themselves_bit_for_bit():
    one = tree(jax.random.normal(jax.random.key(0), (64,)) / 3)
    for weights in (None, [0.3, 0.1, 0.2]):
        soup = averaging.sparse_soup([one, one, one], weights=weights)
        jax.tree.map(np.testing.assert_array_equal, soup, one)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), one)
    jax.tree.map(
        np.testing.assert_array_equal, averaging.average_particles(stacked), one
    )


def one_weight(x, **options):
    members = [{"w": jnp.array([each, 0.0])} for each in x]
    soup = averaging.sparse_soup(members, **options)["w"]
    assert soup[1] == 0
    return float(soup[0])


def test_the_first_member_is_like_the_others():
    # 1e-9 - 1 is -1 in float32, and 1 - 1 is no kept weight.
    assert one_weight([1.0, 1e-9], weights=[0, 1]) == np.float32(1e-9)
    np.testing.assert_allclose(
        one_weight([1e9, 3.0], weights=[1e-9, 1.0]), 4.0, rtol=1e-6
    )
    # Members of weight 0 do not matter, whatever they hold.
    for first in (np.inf, -np.inf, np.nan, 3e38):
        assert one_weight([first, 2.0], weights=[0, 1]) == 2
        assert one_weight([2.0, first, 4.0], weights=[1, 0, 1]) == 3
    assert np.isnan(one_weight([np.nan, 2.0]))
    assert one_weight([np.inf, 2.0]) == one_weight([np.inf] * 2) == np.inf


def test_finite_members_have_a_finite_average():
    largest = float(jnp.finfo(jnp.float32).max)
    assert one_weight([3e38, -3e38]) == 0
    assert one_weight([largest] * 3, weights=[0.3, 0.1, 0.2]) == largest
    soup, members = averaging.greedy_soup(
        [{"w": jnp.array([x])} for x in (3e38, -3e38)], evaluate=lambda t: 0.0
    )
    assert soup["w"] == 0 and members == (0, 1)
    # So are weights of which the sum is not.
    assert one_weight([1.0, 2.0], weights=[1e308, 1e308]) == 1.5
    particles = {"w": jnp.array([[3e38, 3e38], [-3e38, 3e38]])}
    got = averaging.average_particles(particles)["w"]
    np.testing.assert_array_equal(got, [0, particles["w"][0, 1]])
    average = averaging.init_average({"w": jnp.zeros(1)})
    for step, x in enumerate([3e38, -3e38, 3e38]):
        params = {"w": jnp.array([x])}
        average = averaging.update_average(average, params, step, begin=0)
    np.testing.assert_allclose(average.averaged_mean["w"], [1e38], rtol=1e-6)


def test_a_running_average_of_equal_weights_is_those_bit_for_bit():
    params = {"w": jax.random.normal(jax.random.key(0), (64,)) / 3}
    average = averaging.init_average(params)
    for step in range(7):
        average = averaging.update_average(average, params, step, begin=0)
    np.testing.assert_array_equal(average.averaged_mean["w"], params["w"])


def test_sums_are_wider_than_bfloat16():
    # In bfloat16 256 + 1 is 256, and the mean of 256, 257 x 0 ... would stay 256.
    members = [tree([256.0], dtype=jnp.bfloat16)] + [
        tree([260.0], dtype=jnp.bfloat16)
    ] * 3
    soup = averaging.sparse_soup(members)  # 259: rounds to 260 at 8 bits
    assert kernel(soup).dtype == jnp.bfloat16 and kernel(soup) == 260
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    assert kernel(averaging.average_particles(stacked)) == 260
    average = averaging.init_average(members[0])
    for step, member in enumerate(
        [members[0], *[tree([258.0], dtype=jnp.bfloat16)] * 9]
    ):
        average = averaging.update_average(average, member, step, begin=0)
    np.testing.assert_allclose(kernel(average.averaged_mean), [257.8], rtol=1e-6)


def test_masks_of_numbers_are_refused():
    # Equal as numbers to a boolean mask.
    one = {"layer": {"kernel": jnp.array([True, False, True])}}
    two = {"layer": {"kernel": jnp.array([1, 0, 1])}}
    with pytest.raises(ValueError, match="masks .*got int32.* at 'layer/kernel'"):
        averaging.sparse_soup(THREE[:2], [one, two])
    with pytest.raises(ValueError, match="masks .*got int32.* at 'layer/kernel'"):
        averaging.sparse_soup(THREE[:2], [two, one])


def test_trees_of_any_iterable_but_a_tree():
    soup = averaging.sparse_soup(each for each in THREE)
    np.testing.assert_allclose(kernel(soup), [3, 0, 2], rtol=1e-6)
    soup, _ = averaging.greedy_soup(iter(THREE), evaluate=lambda t: 0.0)
    np.testing.assert_allclose(kernel(soup), [3, 0, 2], rtol=1e-6)
    for trees in (THREE[0], dict(enumerate(THREE))):
        with pytest.raises(ValueError, match="must be a sequence of trees, got one di"):
            averaging.sparse_soup(trees)


def test_masks_differ_and_the_leaf_is_named():
    with pytest.raises(ValueError, match="tree 1 unlike tree 0 at 'layer/kernel'"):
        averaging.sparse_soup([tree([1, 0, 2]), tree([0, 1, 2])])
    mask = lambda *kept: {
        "layer": {"kernel": jnp.array(kept), "bias": optax.MaskedNode()}
    }
    one, two = mask(True, False, True), mask(True, True, False)
    with pytest.raises(ValueError, match="tree 2 unlike tree 0 at 'layer/kernel'"):
        averaging.sparse_soup(THREE, [one, one, two])
    other = {"layer": {"bias": jnp.array([True])}}
    with pytest.raises(ValueError, match="other leaves.*layer/bias.*layer/kernel"):
        averaging.sparse_soup(THREE, [one, other, one])
    with pytest.raises(ValueError, match="one tree of masks per tree, 3, got 2"):
        averaging.sparse_soup(THREE, [one, one])
    with pytest.raises(ValueError, match="one tree of masks per tree, 3, got dict"):
        averaging.sparse_soup(THREE, one)
    with pytest.raises(ValueError, match="got tree 0 unlike zero there at 'layer/kern"):
        averaging.sparse_soup(THREE, [mask(False, False, True)] * 3)
    with pytest.raises(ValueError, match="masks must be shaped like params"):
        averaging.sparse_soup(THREE, [mask(True)] * 3)
    with pytest.raises(ValueError, match="at 'layer/kernel'"):
        averaging.greedy_soup([tree([1, 0]), tree([0, 1])], evaluate=lambda t: 0.0)


def test_with_masks_a_kept_weight_may_be_zero():
    masks = [{"layer": {"kernel": jnp.array([True, False, True])}}] * 2
    members = [tree([1, 0, 0], [0.0]), tree([3, 0, 4], [1.0])]
    soup = averaging.sparse_soup(members, masks)
    np.testing.assert_allclose(kernel(soup), [2, 0, 2])
    assert soup["layer"]["bias"] == 0.5
    with pytest.raises(ValueError, match="tree 1 unlike tree 0 at 'layer/bias'"):
        averaging.sparse_soup(members)


@pytest.mark.parametrize(
    "trees, message",
    [
        ([], "at least one tree"),
        (
            [tree([1]), {"kernel": jnp.ones(1)}],
            r"tree 1 unlike tree 0 in \['kernel', 'lay",
        ),
        (
            [tree([1]), tree([1, 2])],
            r"float32\[2\] in tree 1 for float32\[1\].*layer/kern",
        ),
        (
            [tree([1]), tree([1], dtype=jnp.bfloat16)],
            r"bfloat16\[1\] in tree 1.*'layer/",
        ),
        (
            [{"w": jnp.ones(1)}, {"w": jnp.ones(1), "v": jnp.ones(1)}],
            r"tree 0 in \['v'\]",
        ),
        ([([jnp.ones(1)],), ((jnp.ones(1),),)], "one structure, got tree 1"),
        ([{"n": jnp.ones(1, jnp.int32)}], "floating leaves, got int32 at 'n'"),
    ],
)
def test_trees_that_do_not_fit_are_refused(trees, message):
    with pytest.raises(ValueError, match=message):
        averaging.sparse_soup(trees)


@pytest.mark.parametrize(
    "weights, message",
    [
        ([1, 1], "one per tree, 3, got 2"),
        ([1, 1, -1], "not negative"),
        ([0, 0, 0], "not all zero"),
        ([1, 1, float("nan")], "finite"),
        ([1, 1, float("inf")], "finite"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        averaging.sparse_soup(THREE, weights=weights)


def test_greedy_soup_by_hand():
    # Distances to 3 of (1, 2, 6): scores (-2, -1, -3). Order 1, 0, 2. With member 0 the
    # mean is 1.5, score -1.5: out. With member 2 it is 4, score -1: as good, so in.
    score = lambda t: -abs(float(kernel(t)[0]) - 3)
    soup, members = averaging.greedy_soup(THREE, evaluate=score)
    assert members == (1, 2)
    np.testing.assert_allclose(kernel(soup), [4, 0, 2])
    # Equal scores: in the order given, and all are taken.
    soup, members = averaging.greedy_soup(THREE, evaluate=lambda t: 0.0)
    assert members == (0, 1, 2)
    np.testing.assert_allclose(kernel(soup), [3, 0, 2], rtol=1e-6)
    with pytest.raises(ValueError, match="evaluate must return a number, got NaN"):
        averaging.greedy_soup(THREE, evaluate=lambda t: float("nan"))


def test_soups_of_nnx_and_tuple_trees():
    state = lambda seed: nnx.state(nnx.Linear(3, 2, rngs=nnx.Rngs(seed)), nnx.Param)
    zero_bias = averaging.sparse_soup([state(0), state(1)])
    assert jax.tree.structure(zero_bias) == jax.tree.structure(state(0))
    want = (state(0)["kernel"][...] + state(1)["kernel"][...]) / 2
    np.testing.assert_allclose(zero_bias["kernel"][...], want, rtol=1e-5)
    pair = averaging.sparse_soup([(jnp.ones(2), [jnp.ones(1)])] * 2)
    assert isinstance(pair, tuple) and pair[1][0] == 1


def test_running_average_takes_begin_begin_plus_every_and_no_other():
    # begin 2, every 2: steps 2, 4, 6 have weights 2, 4, 6; the mean is 4.
    average = averaging.init_average({"w": jnp.zeros(2)})
    update = jax.jit(averaging.update_average, static_argnames=("begin", "every"))
    means = []
    for step in range(8):
        params = {"w": jnp.array([float(step), 0.0])}
        average = update(average, params, jnp.int32(step), begin=2, every=2)
        means.append(float(average.averaged_mean["w"][0]))
    assert means == [0, 0, 2, 2, 3, 3, 4, 4]
    assert int(average.averaged_count) == 3
    assert average.averaged_mean["w"][1] == 0
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        averaging.update_average(average, params, 0, begin=0, every=0)


def test_an_average_of_nothing_is_the_last_weights():
    params = {"w": jnp.array([1.0, 0.0], jnp.bfloat16)}
    average = averaging.init_average(params)
    assert averaging.averaged_params(average, params)["w"].tolist() == [1, 0]
    average = averaging.update_average(average, params, 0, begin=0)
    other = {"w": jnp.array([5.0, 0.0], jnp.bfloat16)}
    got = averaging.averaged_params(average, other)["w"]
    assert got.dtype == jnp.bfloat16 and got.tolist() == [1, 0]


def test_average_particles_applies_the_masks():
    particles = {
        "w": jnp.array([[1.0, 3.0], [3.0, 5.0]]),
        "b": jnp.array([[2.0], [4.0]]),
    }
    got = averaging.average_particles(particles, {"w": jnp.array([True, False])})
    assert got["w"].tolist() == [2, 0] and got["b"].tolist() == [3]
    with pytest.raises(ValueError, match="masks must be shaped like params"):
        averaging.average_particles(particles, {"w": jnp.array([True])})


@pytest.mark.parametrize(
    "leaf, message",
    [
        (jnp.array([[0, 1], [2, 3]]), "floating leaves, got int32 at 'a/n'"),
        (jnp.ones(()), r"first axis of every leaf, got float32\[\] at 'a/n'"),
        (jnp.ones((0, 2)), r"first axis of every leaf, got float32\[0, 2\] at 'a/n'"),
    ],
)
def test_particles_that_have_no_mean(leaf, message):
    with pytest.raises(ValueError, match=f"particles must have .*{message}"):
        averaging.average_particles({"a": {"n": leaf}, "b": jnp.ones(2)})


def test_a_running_average_of_integers_is_refused():
    with pytest.raises(ValueError, match="params must have floating.*int32 at 'n'"):
        averaging.init_average({"n": jnp.ones(2, jnp.int32)})


def drift(params, masks, start_step, key):
    """Ten steps of noise under the masks; the last five are averaged."""
    average = averaging.init_average(params)

    def step(carry, t):
        params, average = carry
        noise = jax.random.normal(jax.random.fold_in(key, t), params["w"].shape)
        params = apply_masks({"w": params["w"] + 0.1 * noise}, masks)
        average = averaging.update_average(average, params, t, begin=5)
        return (params, average), params["w"]

    steps = start_step + jnp.arange(10)
    (params, average), seen = jax.lax.scan(step, (params, average), steps)
    return averaging.averaged_params(average, params), seen


def test_swamp_is_the_mean_over_particles_of_means_over_steps():
    params = {"w": jnp.arange(1.0, 7.0)}
    masks = {"w": jnp.array([True, True, False, True, False, True])}
    key = jax.random.key(0)
    train = lambda *args: drift(*args)[0]
    got = averaging.swamp(train, particles=3, key=key)(params, masks, 0)
    seen = [drift(params, masks, 0, k)[1][5:] for k in jax.random.split(key, 3)]
    np.testing.assert_allclose(got["w"], np.mean(seen, (0, 1)), rtol=1e-5)
    np.testing.assert_array_equal(got["w"][~masks["w"]], 0)
    by_one = averaging.swamp(train, particles=3, key=key, vectorize=False)
    np.testing.assert_allclose(by_one(params, masks, 0)["w"], got["w"], rtol=1e-5)
    with pytest.raises(ValueError, match="particles must be at least 1, got 0"):
        averaging.swamp(train, particles=0, key=key)


def test_swamp_in_rounds_of_iterative_magnitude_pruning():
    # Half of what is left goes in each round, by the magnitudes of the average: 6, 4
    # and 2 are far apart against the noise. Every round starts from the ticket.
    round_of = averaging.swamp(
        lambda *args: drift(*args)[0], particles=4, key=jax.random.key(1)
    )
    ticket = {"w": jnp.array([6.0, -4.0, 1.0, 2.0])}
    found = pruning.iterative_magnitude(
        round_of, ticket, rounds=2, fraction=0.5, leaf_filter="w"
    )
    assert [(params["w"] != 0).tolist() for params in found.params] == [
        [True, True, True, True],
        [True, True, False, False],
        [True, False, False, False],
    ]
    np.testing.assert_allclose(found.params[2]["w"], [6, 0, 0, 0], atol=1)


def test_soup_of_models_trained_by_sparsify():
    updater = transforms.static(sparsity=0.5, key=jax.random.key(0))
    tx = transforms.sparsify(optax.sgd(0.1), updater)

    def train(seed):
        state = tx.init(params := {"w": jnp.ones((4, 4)), "b": jnp.zeros(4)})
        params = apply_masks(params, transforms.get_masks(state))
        for step in range(3):
            draw = jax.random.key(10 * seed + step)
            grads = jax.tree.map(lambda p: jax.random.normal(draw, p.shape), params)  # noqa: B023
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params, transforms.get_masks(state)

    trees, masks = zip(*map(train, range(3)), strict=True)
    soup = averaging.sparse_soup(trees, masks)
    assert int((soup["w"] != 0).sum()) == 8
    np.testing.assert_array_equal(soup["w"][~masks[0]["w"]], 0)
    np.testing.assert_allclose(
        soup["w"], np.mean([t["w"] for t in trees], 0), rtol=1e-5
    )
