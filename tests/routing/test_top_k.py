"""top_k against a loop over tokens in float64, and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.routing import capacity, top_k


def log(*rows):
    return jnp.log(jnp.array(rows, jnp.float32))


def dense(routing):
    """The weights at their tokens and experts, [t, e]; nothing where not valid."""
    tokens, experts, weights = routing.choices()
    out = np.zeros((routing.num_tokens, routing.num_experts))
    for token, expert, weight in zip(tokens, experts, weights, strict=True):
        if expert < routing.num_experts:
            out[token, expert] += weight
        else:
            assert weight == 0
    return out


def oracle(z, k, divisors=None, **options):
    """Token by token in float64: dense weights, demand, divisors.

    `divisors` are held where given: what sum_stopgrad differentiates.
    """
    score, normalize = options.get("score", "softmax"), options.get("normalize", "none")
    bias, mask = options.get("bias"), options.get("mask")
    t, e = z.shape
    groups, kept = options.get("groups", 1), options.get("groups_kept") or 1
    chosen, scores = [], np.zeros((t, e))
    for i in range(t):
        if mask is not None and not mask[i]:
            chosen.append([])
            continue
        p = np.exp(z[i] - z[i].max())
        scores[i] = 1 / (1 + np.exp(-z[i])) if score == "sigmoid" else p / p.sum()
        rank = scores[i] + (0 if bias is None else np.asarray(bias, np.float64))
        by_group = rank.reshape(groups, -1)
        value = [sum(sorted(group)[-2:]) for group in by_group]
        best = sorted(range(groups), key=lambda g: (-value[g], g))[:kept]
        allowed = [j for j in range(e) if j // by_group.shape[1] in best]
        chosen.append(sorted(allowed, key=lambda j: (-rank[j], j))[:k])
    demand = np.bincount(sum(chosen, []), minlength=e)

    served, room = {i: set() for i in range(t)}, options.get("capacity") or t
    for j in range(e):
        queue = [(place, i) for i in range(t) for place, c in enumerate(chosen[i]) if
                 c == j]  # fmt: skip
        queue.sort()
        if options.get("capacity_policy") == "probability":
            queue.sort(key=lambda entry: -scores[entry[1], j])
        for _, i in queue[:room]:
            served[i].add(j)

    weights, sums = np.zeros((t, e)), np.ones(t)
    for i in range(t):
        counted = served[i] if options.get("renormalize", True) else chosen[i]
        if counted and (normalize != "none" or score == "softmax_chosen"):
            sums[i] = sum(scores[i, j] for j in counted)
        if normalize == "sum_stopgrad" and divisors is not None:
            sums[i] = divisors[i]
        for j in served[i]:
            weights[i, j] = scores[i, j] / sums[i]
    return weights, demand, sums


MASK = np.array([True, True, False, True, True, True, False, True])
BIAS = np.array([0.3, -0.2, 0.0, 0.1, -0.4, 0.2])
CASES = {
    "softmax": (2, 6, {}),
    "sum, by position": (2, 6, {"normalize": "sum", "capacity": 2}),
    "sum_stopgrad, by probability": (
        3,
        6,
        {
            "normalize": "sum_stopgrad",
            "capacity": 3,
            "capacity_policy": "probability",
            "mask": MASK,
        },
    ),
    "softmax_chosen": (2, 6, {"score": "softmax_chosen", "mask": MASK}),
    "softmax_chosen, dropped weight is lost": (
        2,
        6,
        {"score": "softmax_chosen", "capacity": 1, "renormalize": False},
    ),
    "sigmoid, bias": (2, 6, {"score": "sigmoid", "bias": BIAS}),
    "sigmoid, sum, bias, groups": (
        3,
        6,
        {
            "score": "sigmoid",
            "normalize": "sum",
            "bias": BIAS,
            "groups": 3,
            "groups_kept": 2,
            "mask": MASK,
        },
    ),
    "sigmoid, sum_stopgrad, dropped weight is lost": (
        2,
        6,
        {
            "score": "sigmoid",
            "normalize": "sum_stopgrad",
            "capacity": 1,
            "renormalize": False,
        },
    ),
    "groups, by probability": (
        2,
        6,
        {
            "groups": 2,
            "groups_kept": 1,
            "capacity": 2,
            "capacity_policy": "probability",
        },
    ),
    "all experts": (6, 6, {"normalize": "sum", "capacity": 5}),
    "one expert": (1, 1, {"score": "sigmoid", "capacity": 3}),
}


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_are_those_of_the_loop(name):
    k, e, options = CASES[name]
    rng = np.random.default_rng(len(name))
    z, g = rng.normal(size=(2, 8, e)).astype(np.float32).astype(np.float64)
    weights, demand, divisors = oracle(z, k, **options)

    @jax.jit
    def run(z, g):
        def loss(z):
            arrays = {
                n: jnp.asarray(v, None if v.dtype == bool else jnp.float32)
                for n, v in options.items()
                if isinstance(v, np.ndarray)
            }
            routing = top_k(z, k, **{**options, **arrays})
            at = jnp.take_along_axis(g, routing.indices, 1)
            return jnp.sum(routing.weights * at), routing

        return jax.grad(loss, has_aux=True)(z)

    grad, routing = run(jnp.asarray(z, jnp.float32), jnp.asarray(g, jnp.float32))
    np.testing.assert_allclose(dense(routing), weights, rtol=2e-6, atol=1e-7)
    np.testing.assert_array_equal(routing.demand, demand)
    np.testing.assert_array_equal(routing.counts(), (weights > 0).sum(0))

    want = np.zeros_like(z)
    for at in np.ndindex(z.shape):
        step = np.zeros_like(z)
        step[at] = 1e-5
        up, down = (oracle(z + s, k, divisors, **options)[0] for s in (step, -step))
        want[at] = np.sum(g * (up - down)) / 2e-5
    np.testing.assert_allclose(grad, want, rtol=1e-5, atol=1e-6)


def test_choices_are_ordered_and_typed():
    routing = top_k(log([1, 2, 4, 1], [4, 2, 1, 1]), 3)
    assert routing.indices.tolist() == [[2, 1, 0], [0, 1, 2]]
    # Of e = 4 in sums of 8: the softmax of logarithms.
    want = [[0.5, 0.25, 0.125], [0.5, 0.25, 0.125]]
    np.testing.assert_allclose(routing.weights, want, rtol=1e-6)
    np.testing.assert_allclose(routing.probs[0], [0.125, 0.25, 0.5, 0.125], rtol=1e-6)
    assert routing.indices.dtype == routing.demand.dtype == jnp.int32
    assert routing.weights.dtype == routing.probs.dtype == jnp.float32
    assert routing.demand.tolist() == [2, 2, 2, 0]
    assert routing.mask is None and not routing.by_expert


def test_capacity_by_position_and_by_probability():
    # All but the last want expert 0 first; tokens 1 and 2 want 1 next, the last 0.
    logits = log([6, 1, 3], [5, 4, 1], [8, 1.5, 0.5], [1, 7, 2])
    logits = logits.at[3, 0].set(np.log(2.5))
    asked = top_k(logits, 2)
    assert asked.indices.tolist() == [[0, 2], [0, 1], [0, 1], [1, 0]]
    assert asked.demand.tolist() == [4, 3, 1]
    # First choices first: 0 serves tokens 0 and 1; 1 serves 3, then 1, before 2.
    placed = top_k(logits, 2, capacity=2)
    want = [[True, True], [True, True], [False, False], [True, False]]
    assert placed.valid.tolist() == want
    # Of 0: .8 of token 2 and .6 of token 0; of 1: .61 of token 3 and .4 of token 1.
    likely = top_k(logits, 2, capacity=2, capacity_policy="probability")
    want = [[True, True], [False, True], [True, False], [True, False]]
    assert likely.valid.tolist() == want
    for routing in (placed, likely):
        assert routing.demand.tolist() == [4, 3, 1]
        assert routing.counts().tolist() == [2, 2, 1]
        np.testing.assert_array_equal(routing.weights[~routing.valid], 0)


def test_equal_probabilities_are_served_by_position():
    logits = jnp.tile(log([3, 1]), (4, 1))
    routing = top_k(logits, 1, capacity=2, capacity_policy="probability")
    assert routing.valid[:, 0].tolist() == [True, True, False, False]


def test_capacity_ranks_probabilities_not_logits():
    """Logits compare within a token only: shifted ones took all the places."""
    logits = jnp.array([[10.0, 9.9], [1.0, -3.0]])  # .525 and .982 for expert 0
    routing = top_k(logits, 1, capacity=1, capacity_policy="probability")
    assert routing.valid[:, 0].tolist() == [False, True]


@pytest.mark.slow
def test_weights_after_drops_sum_over_the_survivors():
    """Each token's remaining weights sum to 1, or by choice keep what they had."""
    # Both want expert 0 (.5), then 1 (.25); places for one.
    logits = jnp.tile(log([4, 2, 1, 1]), (2, 1))
    logits = logits.at[1].set(log([4, 1, 2, 1])[0])
    for normalize in ("sum", "sum_stopgrad"):
        routing = top_k(logits, 2, normalize=normalize, capacity=1)
        want = [[2 / 3, 1 / 3], [0, 1]]
        np.testing.assert_allclose(routing.weights, want, rtol=1e-6)
        routing = top_k(logits, 2, normalize=normalize, capacity=1, renormalize=False)
        want = [[2 / 3, 1 / 3], [0, 1 / 3]]
        np.testing.assert_allclose(routing.weights, want, rtol=1e-6)
    # Not normalized, they are left as they are.
    routing = top_k(logits, 2, capacity=1)
    np.testing.assert_allclose(routing.weights, [[0.5, 0.25], [0, 0.25]], rtol=1e-6)
    # A token that lost all has weights 0 and a gradient of 0, not NaN.
    routing = top_k(logits[:, :1], 1, normalize="sum", capacity=1)
    assert routing.weights.tolist() == [[1], [0]]
    loss = lambda z: top_k(z, 1, normalize="sum", capacity=1).weights.sum()
    assert jax.grad(loss)(logits).tolist() == [[0] * 4] * 2


def test_best_groups_are_those_of_the_two_best():
    # Groups (0, 1, 2), (3, 4, 5): the best is in the second, the two best in the first.
    logits = log([4, 4, 0.25, 5, 1, 1])
    assert top_k(logits, 2).indices.tolist() == [[3, 0]]
    routing = top_k(logits, 2, groups=2, groups_kept=1)
    assert routing.indices.tolist() == [[0, 1]]
    np.testing.assert_allclose(routing.weights, [[4 / 15.25] * 2], rtol=1e-6)
    # Bias moves groups too: sigmoids 1/2 each, the last two raised.
    bias = jnp.array([0, 0, 0, 0, 0.1, 0.1])
    routing = top_k(jnp.zeros((1, 6)), 2, bias=bias, groups=2, groups_kept=1)
    assert routing.indices.tolist() == [[4, 5]]
    # Scores of 0 all around, whose logarithms still tell which group is better.
    far = jnp.array([[0.0, 0.0, -200.0, -300.0, -150.0, -160.0]])
    routing = top_k(far, 4, groups=3, groups_kept=2)
    assert routing.indices.tolist() == [[0, 1, 4, 5]]
    # Groups of one expert.
    routing = top_k(logits, 2, groups=6, groups_kept=3)
    assert routing.indices.tolist() == [[3, 0]]


def test_bias_chooses_and_does_not_weight():
    logits = log([1, 2, 5])
    bias = jnp.array([0.6, 0.0, -1.0])
    routing = top_k(logits, 2, bias=bias)
    assert routing.indices.tolist() == [[0, 1]]
    np.testing.assert_allclose(routing.weights, [[1 / 8, 2 / 8]], rtol=1e-6)
    np.testing.assert_allclose(routing.probs, [[1 / 8, 2 / 8, 5 / 8]], rtol=1e-6)
    grad = jax.grad(lambda b: top_k(logits, 2, bias=b, normalize="sum").weights[0, 0])
    assert grad(bias).tolist() == [0, 0, 0]


def test_ties_go_to_the_lowest_expert():
    """In every sort: of choices, of groups, with signed zeros, in low precision."""
    assert top_k(jnp.zeros((2, 5)), 3).indices.tolist() == [[0, 1, 2]] * 2
    signed = jnp.array([[-1.0, -0.0, 0.0, -0.0, 0.0]])
    assert top_k(signed, 3).indices.tolist() == [[1, 2, 3]]
    assert top_k(signed, 3, score="sigmoid").indices.tolist() == [[1, 2, 3]]
    groups = top_k(jnp.zeros((1, 6)), 2, groups=3, groups_kept=1)
    assert groups.indices.tolist() == [[0, 1]]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_logits_are_routed_in_float32(dtype, key):
    """A softmax in bfloat16 ties 9% of tokens at the last place."""
    logits = (0.05 * jax.random.normal(key, (256, 64))).astype(dtype)
    options = {"normalize": "sum", "capacity": 40, "capacity_policy": "probability"}
    got = jax.jit(lambda z: top_k(z, 8, **options))(logits)
    want = jax.jit(lambda z: top_k(z, 8, **options))(logits.astype(jnp.float32))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert got.weights.dtype == got.probs.dtype == jnp.float32
    # Distinct in bfloat16, equal after a softmax in it.
    close = jnp.array([[0.0, 0.001, 0.002, -1.0]], dtype)
    assert top_k(close, 2).indices.tolist() == [[2, 1]]
    grad = jax.grad(lambda z: top_k(z, 8).weights[:, 0].sum())(logits)
    assert grad.dtype == dtype


def test_scores_that_saturate_do_not_tie():
    # exp(-400) and exp(-300) are both 0 in float32; sigmoids of 40 and 50 both 1.
    logits = jnp.array([[200.0, -200.0, -100.0]])
    assert top_k(logits, 2).indices.tolist() == [[0, 2]]
    logits = jnp.array([[40.0, 50.0, 45.0]])
    assert top_k(logits, 2, score="sigmoid").indices.tolist() == [[1, 2]]


def test_tiny_scores_still_sum_to_one():
    """A sum with an epsilon of 1e-20 gives weights near 0 here."""
    logits = jnp.array([[-60.0, -61.0, -70.0], [-300.0, -301.0, -310.0]])
    routing = top_k(logits, 2, score="sigmoid", normalize="sum")
    # exp(-1): 1 / (1 + e^-1) and its complement.
    np.testing.assert_allclose(routing.weights, [[0.731059, 0.268941]] * 2, rtol=1e-5)
    np.testing.assert_allclose(routing.weights.sum(1), 1, rtol=1e-6)
    # Chosen by bias where the softmax has nothing left.
    logits = jnp.array([[0.0, -200.0, -201.0]])
    bias = jnp.array([-5.0, 0.0, 0.0])
    routing = top_k(logits, 2, normalize="sum", bias=bias)
    np.testing.assert_allclose(routing.weights, [[0.731059, 0.268941]], rtol=1e-5)


def test_padding_is_given_not_guessed():
    """A token of zeros is a token; padding may be NaN and has no place, no weight."""
    logits = jnp.array([[jnp.nan] * 3, [0.0] * 3, [9.0, jnp.inf, 0.0], [3.0, 2.0, 1.0]])
    mask = jnp.array([False, True, False, True])

    def loss(logits):
        routing = top_k(logits, 2, normalize="sum", mask=mask, capacity=2)
        return (routing.weights**2).sum(), routing

    grad, routing = jax.grad(loss, has_aux=True)(logits)
    assert routing.valid.tolist() == [[False] * 2, [True] * 2] * 2
    assert routing.demand.tolist() == routing.counts().tolist() == [2, 2, 0]
    assert routing.weights[jnp.array([0, 2])].tolist() == [[0, 0]] * 2
    assert routing.probs[jnp.array([0, 2])].tolist() == [[0] * 3] * 2
    assert int(routing.indices.min()) >= 0 and int(routing.indices.max()) < 3
    assert grad[jnp.array([0, 2])].tolist() == [[0] * 3] * 2
    assert jnp.isfinite(grad).all() and grad[3, 0] > 0
    for policy in ("position", "probability"):
        alone = top_k(
            logits, 1, mask=jnp.zeros(4, bool), capacity=1, capacity_policy=policy
        )
        assert not alone.valid.any() and alone.demand.tolist() == [0, 0, 0]


@pytest.mark.slow
def test_experts_at_minus_infinity_are_not_chosen():
    logits = jnp.array([[-jnp.inf, 1.0, -jnp.inf], [0.0, 1.0, 2.0]])
    for score in ("softmax", "sigmoid"):
        loss = lambda z, s=score: (
            top_k(z, 2, score=s, normalize="sum", bias=jnp.ones(3)).weights[:, 0].sum()
        )
        routing = top_k(logits, 2, score=score, normalize="sum", bias=jnp.ones(3))
        assert routing.valid.tolist() == [[True, False], [True, True]]
        assert routing.indices[0, 0] == 1 and routing.weights[0].tolist() == [1, 0]
        assert routing.demand.tolist() == [0, 2, 1]
        assert jnp.isfinite(jax.grad(loss)(logits)).all()


@pytest.mark.slow
def test_stopped_sum_leaves_the_router_a_gradient():
    # Weights s / S of identical experts: d sum(w) / dz = sum of ds / S, S held.
    logits = log([5, 3, 2])
    total = lambda n: jax.grad(lambda z: top_k(z, 2, normalize=n).weights.sum())(logits)
    np.testing.assert_allclose(total("sum"), 0, atol=1e-7)
    # s = (.5, .3, .2), S = .8: dz of s_0 + s_1 is s_i (1 - .8) chosen, -.2 * .8 not.
    want = np.array([[0.5 * 0.2, 0.3 * 0.2, -0.2 * 0.8]]) / 0.8
    np.testing.assert_allclose(total("sum_stopgrad"), want, rtol=1e-5)


@pytest.mark.slow
def test_jitter_is_normal_noise_from_the_key(key):
    logits = jnp.zeros((4096, 4))
    draw = jax.jit(lambda key, jitter: top_k(logits, 1, jitter=jitter, key=key))
    routing = draw(key, jnp.float32(0.5))
    same, other = draw(key, jnp.float32(0.5)), draw(jax.random.key(1), jnp.float32(0.5))
    np.testing.assert_array_equal(routing.indices, same.indices)
    assert (routing.indices != other.indices).any()
    # Equal logits: a quarter each, +-4 standard deviations of 0.0068.
    np.testing.assert_allclose(routing.counts() / 4096, 0.25, atol=0.03)
    # The noise itself, from the scores: log p is z less a constant.
    z = jnp.log(routing.probs)
    spread = jnp.sqrt(jnp.var(z - z.mean(1, keepdims=True)) * 4 / 3)
    np.testing.assert_allclose(spread, 0.5, rtol=0.03)
    none = top_k(logits, 1, jitter=0.0, key=key)
    assert none.counts().tolist() == [4096, 0, 0, 0]


@pytest.mark.slow
def test_vmap_is_a_loop(key):
    logits = jax.random.normal(key, (3, 8, 4))
    mask = jax.random.bernoulli(key, 0.8, (3, 8))
    route = lambda z, m: top_k(
        z, 2, normalize="sum", capacity=2, capacity_policy="probability", mask=m
    )
    got = jax.jit(jax.vmap(route))(logits, mask)
    for i in range(3):
        want = route(logits[i], mask[i])
        pairs = jax.tree.leaves(jax.tree.map(lambda x, i=i: x[i], got))
        for a, b in zip(pairs, jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)


def test_no_tokens():
    routing = top_k(jnp.zeros((0, 4)), 2, normalize="sum", capacity=1)
    assert routing.indices.shape == (0, 2) and routing.demand.tolist() == [0] * 4


def test_capacity_by_hand():
    assert capacity(4096, 8, 2, 1.25) == 1280
    assert capacity(10, 4, 1) == 3  # 2.5, rounded up
    assert capacity(80, 8, 1, 1.1) == 11  # not 12 for 11.000000000000002
    assert capacity(1, 64, 1) == 1 and capacity(16, 8, 2, 99.0) == 16


ZEROS = jnp.zeros((4, 6))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: top_k(ZEROS, 7), "k.* 7"),
        (lambda: top_k(ZEROS, 0), "k.* 0"),
        (lambda: top_k(ZEROS[0], 1), "logits"),
        (lambda: top_k(ZEROS.astype(int), 1), "logits.* int32"),
        (lambda: top_k(ZEROS, 2, capacity=0), "capacity.* 0"),
        (lambda: top_k(ZEROS, 2, capacity=-3), "capacity.* -3"),
        (lambda: top_k(ZEROS, 2, groups=4), "groups.* 4"),
        (lambda: top_k(ZEROS, 2, groups=3, groups_kept=4), "groups_kept.* 4"),
        (lambda: top_k(ZEROS, 3, groups=3, groups_kept=1), "groups_kept"),
        (lambda: top_k(ZEROS, 2, bias=jnp.zeros(5)), r"bias.* \(5,\)"),
        (lambda: top_k(ZEROS, 2, mask=jnp.ones(6, bool)), r"mask.* \(6,\)"),
        (lambda: top_k(ZEROS, 2, jitter=0.1), "key"),
        (lambda: top_k(ZEROS, 2, jitter=-0.1, key=jax.random.key(0)), "jitter.* -0.1"),
        (
            lambda: top_k(ZEROS, 2, score="softmax_chosen", normalize="sum_stopgrad"),
            "sum_stopgrad",
        ),
        (lambda: capacity(16, 4, 5), "k.* 5"),
        (lambda: capacity(16, 4, 2, 0.0), "factor.* 0.0"),
        (lambda: capacity(16, 4, 2, float("nan")), "factor.* nan"),
        (lambda: capacity(0, 4, 2), "tokens.* 0"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
