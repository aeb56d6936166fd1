"""Every router against a loop in float64; what holds for all of them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import routing
from sparsejax.routing import (
    dense_to_sparse,
    entropy,
    expert_choice,
    hash_routing,
    load_balance_loss,
    relu,
    sinkhorn,
    threshold,
    top_k,
    top_p,
    tree,
    z_loss,
)

T, E = 7, 5
IDS = np.array([3, 0, 1, 2, 0, 4, 1])
TABLE = np.array([[0, 4], [1, 2], [3, 3], [2, 0], [4, 1]])  # id 2 names 3 twice
SCALE = np.array([1.0, -0.5, 2.0, 0.75, 1.5])
LEAST = np.array([0.1, 0.3, 0.2, 0.15, 0.4])


# --- Oracles: [t, e] unnormalized weights of those kept, scores, demand ---------------


def score_all(z, score):
    s = 1 / (1 + np.exp(-z))
    if score == "softmax":
        s = np.exp(z - z.max(1, keepdims=True))
        s = s / s.sum(1, keepdims=True)
    return s


def best(values, allowed, count):
    """The `count` largest allowed, ties to the lowest index."""
    return sorted(allowed, key=lambda j: (-values[j], j))[:count]


def by_token(z, mask, select, max_k, score="softmax"):
    """`select(scores)` lists whom a token asks for; the first max_k are served."""
    s = score_all(z, score)
    kept, demand = np.zeros(z.shape), np.zeros(E, int)
    for t in np.flatnonzero(mask):
        asked = select(s[t])
        demand[asked] += 1
        for j in best(s[t], asked, max_k):
            kept[t, j] = s[t, j]
    return kept, s * mask[:, None], demand


def oracle_threshold(z, mask, threshold, max_k=E, at_least_one=False, score="softmax"):
    def select(s):
        asked = [j for j in range(E) if s[j] >= np.broadcast_to(threshold, E)[j]]
        return asked or (best(s, range(E), 1) if at_least_one else [])

    return by_token(z, mask, select, max_k, score)


def oracle_top_p(z, mask, p, max_k=E):
    def select(s):
        asked, total = [], 0.0
        for j in best(s, range(E), E):
            if total < p:
                asked.append(j)
            total += s[j]
        return asked

    return by_token(z, mask, select, max_k)


def oracle_expert_choice(z, mask, capacity, score="softmax"):
    s, kept = score_all(z, score), np.zeros(z.shape)
    for j in range(E):
        for t in best(s[:, j], np.flatnonzero(mask), capacity):
            kept[t, j] = s[t, j]
    return kept, s * mask[:, None], None


def oracle_sinkhorn(z, mask, k, iterations, temperature=1.0, score="softmax"):
    # Plainly: divide rows, then columns, of a matrix by their sums.
    plan = np.exp(z / temperature) * mask[:, None]
    for _ in range(iterations):
        plan = plan / np.maximum(plan.sum(1, keepdims=True), 1e-300)
        plan = plan / plan.sum(0)
    s, kept = score_all(z, score), np.zeros(z.shape)
    for t in np.flatnonzero(mask):
        for j in best(plan[t], range(E), k):
            kept[t, j] = s[t, j]
    return kept, s * mask[:, None], None


def oracle_hash(z, mask):
    s, kept = score_all(z, "softmax"), np.zeros(z.shape)
    for t in np.flatnonzero(mask):
        for j in TABLE[IDS[t]]:
            kept[t, j] += s[t, j]
    return kept, s * mask[:, None], None


def oracle_dense_to_sparse(z, mask, k, temperature, threshold=1e-3, max_k=E):
    def select(s):
        above = [j for j in range(E) if s[j] > threshold]
        return sorted({*above, *best(s, range(E), k)})

    return by_token(z / temperature, mask, select, max_k)


def oracle_relu(z, mask, max_k=E, epsilon=1e-6):
    kept, probs, demand = np.zeros(z.shape), np.zeros(z.shape), np.zeros(E, int)
    for t in np.flatnonzero(mask):
        a = np.maximum(z[t], 0)
        asked = np.flatnonzero(a)
        demand[asked] += 1
        w = SCALE * a / np.sqrt((a**2).mean() + epsilon)
        for j in best(a, asked, max_k):
            kept[t, j] = w[j]
        probs[t] = a / a.sum() if a.any() else 0
    return kept, probs, demand


# --- Their equals ---------------------------------------------------------------------

hashed = partial(hash_routing, jnp.array(IDS), E, table=jnp.array(TABLE))
scaled = lambda logits, **options: relu(
    logits, scale=jnp.array(SCALE, jnp.float32), **options
)


def of_tree(logits, mask=None, **options):
    """Two trees out of one array of logits."""
    nodes = jnp.stack([logits[:, 1:], -logits[:, :-1]], axis=1)
    leaves = jnp.stack([logits, 2 * logits], axis=1)
    return tree(nodes, leaves, mask=mask, **options)


CASES = {
    "expert_choice": (expert_choice, oracle_expert_choice, {"capacity": 3}),
    "expert_choice of all": (
        expert_choice,
        oracle_expert_choice,
        {"capacity": T, "score": "sigmoid"},
    ),
    "sinkhorn": (sinkhorn, oracle_sinkhorn, {"k": 2, "iterations": 3}),
    "sinkhorn as BASE": (
        sinkhorn,
        oracle_sinkhorn,
        {"k": 1, "iterations": 20, "temperature": 0.5, "score": "sigmoid"},
    ),
    "sinkhorn without": (sinkhorn, oracle_sinkhorn, {"k": E, "iterations": 0}),
    "threshold": (threshold, oracle_threshold, {"threshold": 0.2}),
    "threshold bounded": (
        threshold,
        oracle_threshold,
        {"threshold": 0.15, "max_k": 1},
    ),
    "threshold each": (
        threshold,
        oracle_threshold,
        {"threshold": LEAST, "at_least_one": True, "max_k": 2},
    ),
    "threshold of sigmoids": (
        threshold,
        oracle_threshold,
        {"threshold": 0.6, "score": "sigmoid"},
    ),
    "threshold none": (threshold, oracle_threshold, {"threshold": 1.0}),
    "top_p": (top_p, oracle_top_p, {"p": 0.7}),
    "top_p bounded": (top_p, oracle_top_p, {"p": 0.95, "max_k": 2}),
    "top_p of all": (top_p, oracle_top_p, {"p": 1.0}),
    "hash": (
        lambda z, **options: hashed(logits=z, **options),
        oracle_hash,
        {},
    ),
    "dense_to_sparse": (
        dense_to_sparse,
        oracle_dense_to_sparse,
        {"k": 2, "temperature": 0.5, "threshold": 0.15},
    ),
    "dense_to_sparse bounded": (
        dense_to_sparse,
        oracle_dense_to_sparse,
        {"k": 1, "temperature": 2.0, "max_k": 3},
    ),
    "relu": (scaled, oracle_relu, {}),
    "relu bounded": (scaled, oracle_relu, {"max_k": 1, "epsilon": 0.1}),
}
NORMALIZE = {
    "expert_choice": "sum",
    "sinkhorn": "sum_stopgrad",
    "threshold bounded": "sum",
    "threshold each": "sum_stopgrad",
    "top_p": "sum",
    "top_p bounded": "sum_stopgrad",
    "hash": "sum",
    "dense_to_sparse": "sum",
    "dense_to_sparse bounded": "sum_stopgrad",
}
VARIANTS = [
    (name, normalize)
    for name in CASES
    for normalize in ("none", NORMALIZE.get(name))
    if normalize
]


def dense(result):
    """The weights at their tokens and experts, [t, e]; those that count."""
    tokens, experts, weights = result.choices()
    out = jnp.zeros((result.num_tokens, result.num_experts), jnp.float32)
    return out.at[tokens, experts].add(weights, mode="drop")


def as_distribution(s):
    total = s.sum(1, keepdims=True)
    return s / np.where(total > 0, total, 1)


@pytest.mark.exhaustive  # test_routers_and_experts.py has one of each
@pytest.mark.slow
@pytest.mark.parametrize("name, normalize", VARIANTS)
def test_value_and_gradient_are_those_of_the_loop(name, normalize):
    router, oracle, options = CASES[name]
    rng = np.random.default_rng(VARIANTS.index((name, normalize)))
    z = rng.normal(size=(T, E)).astype(np.float32).astype(np.float64)
    z[2] = -np.abs(z[2])  # relu activates nobody
    mask = rng.random(T) < 0.8
    mask[2], mask[4] = True, False
    r, q = rng.normal(size=(2, T, E))

    def reference(z, divisors=None):
        kept, scores, _ = oracle(z, mask, **options)
        total = kept.sum(1, keepdims=True)
        if divisors is None or normalize != "sum_stopgrad":
            divisors = np.where(total > 0, total, 1)
        weights = kept if normalize == "none" else kept / divisors
        return (weights * r).sum() + (as_distribution(scores) * q).sum()

    kept, scores, demand = oracle(z, mask, **options)
    total = kept.sum(1, keepdims=True)
    divisors = np.where(total > 0, total, 1)
    weights = kept if normalize == "none" else kept / divisors
    slopes, step = np.zeros_like(z), 1e-6
    for at in np.ndindex(*z.shape):
        up, down = z.copy(), z.copy()
        up[at] += step
        down[at] -= step
        slopes[at] = (reference(up, divisors) - reference(down, divisors)) / (2 * step)

    extra = options if "relu" in name else {**options, "normalize": normalize}

    def loss(z, mask):
        result = router(z, mask=mask, **extra)
        value = jnp.sum(dense(result) * r) + jnp.sum(result.probs * q)
        return value, result

    with jax.numpy_dtype_promotion("standard"):
        grad, result = jax.jit(jax.grad(loss, has_aux=True))(
            jnp.array(z, jnp.float32), jnp.array(mask)
        )
    np.testing.assert_allclose(dense(result), weights, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(
        result.probs, as_distribution(scores), rtol=2e-5, atol=1e-6
    )
    np.testing.assert_allclose(grad, slopes, rtol=1e-4, atol=2e-6)
    if demand is None:
        assert result.demand is None
    else:
        np.testing.assert_array_equal(result.demand, demand)


# --- What holds for all ---------------------------------------------------------------

ROUTERS = {
    "expert_choice": partial(expert_choice, capacity=3, normalize="sum"),
    "sinkhorn": partial(sinkhorn, k=2),
    "threshold": partial(threshold, threshold=0.2, max_k=2, normalize="sum"),
    "top_p": partial(top_p, p=0.8, max_k=3, normalize="sum_stopgrad"),
    "hash": lambda z, **options: hashed(logits=z, **options),
    "dense_to_sparse": partial(
        dense_to_sparse, k=1, temperature=0.7, threshold=0.2, max_k=3
    ),
    "relu": partial(relu, max_k=2),
    "tree": partial(of_tree, max_k=3),
}
QUICK = ("top_k", "expert_choice", "threshold")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
        for name in ROUTERS
    ],
)
def test_laws(name, key):
    """Padding, dtypes, ranges, vmap, retracing: one compilation of each router."""
    router, traces = ROUTERS[name], []

    @jax.jit
    @jax.vmap
    def run(z, mask):
        traces.append(1)
        loss = lambda z: jnp.sum(dense(router(z, mask=mask)) ** 2)
        return router(z, mask=mask), jax.grad(loss)(z)

    z = jax.random.normal(key, (3, T, E)).astype(jnp.bfloat16)
    masks = jnp.array([[True] * T, [True, False, True, True, False, True, True]])
    masks = jnp.concatenate([masks, jnp.zeros((1, T), bool)])
    spoilt = jnp.where(masks[:, :, None], z, jnp.nan)
    result, grads = run(spoilt, masks)
    each = [jax.tree.map(lambda leaf: leaf[i], result) for i in range(3)]  # noqa: B023

    assert result.indices.dtype == jnp.int32 and result.valid.dtype == bool
    assert result.weights.dtype == result.probs.dtype == jnp.float32
    limit = T if each[0].by_expert else E
    assert (result.indices >= 0).all() and (result.indices < limit).all()
    assert (np.asarray(result.weights)[~np.asarray(result.valid)] == 0).all()
    assert each[0].valid.any()
    for one, mask, grad in zip(each, masks, grads, strict=True):
        # Padding: in no choice, no score, no gradient, though its logits are NaN.
        tokens, experts, weights = one.choices()
        assert mask[tokens[experts < E]].all()
        assert np.isfinite(weights).all() and (np.asarray(one.probs)[~mask] == 0).all()
        assert np.isfinite(grad).all() and (np.asarray(grad)[~mask] == 0).all()
        if one.demand is not None:
            assert (one.demand >= one.counts()).all()
        if name != "hash":  # whose table may name an expert twice
            pairs = [(t, e) for t, e in zip(tokens, experts, strict=True) if e < E]
            assert len(set(map(tuple, np.array(pairs).tolist()))) == len(pairs)

    # In float32 whatever the dtype; another batch does not retrace; vmap is a loop.
    wide, _ = jax.jit(jax.vmap(lambda z, m: (router(z, mask=m), 0)))(
        spoilt.astype(jnp.float32), masks
    )
    jax.tree.map(np.testing.assert_array_equal, result, wide)
    run(spoilt[::-1], masks[::-1])
    assert len(traces) == 1
    alone = jax.jit(lambda z, m: router(z, mask=m))(spoilt[1], masks[1])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), alone, each[1])


@pytest.mark.parametrize("name", [n for n in ROUTERS if n not in ("hash", "tree")])
def test_ties_go_to_the_lowest_index(name):
    result = jax.jit(ROUTERS[name])(jnp.ones((T, E)))
    k = result.indices.shape[1]
    np.testing.assert_array_equal(
        result.indices, np.tile(np.arange(k), (len(result.indices), 1))
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["expert_choice", "sinkhorn", "threshold", "top_p"])
def test_an_expert_at_minus_infinity_is_not_chosen(name):
    z = jnp.zeros((T, E)).at[:, 1].set(-jnp.inf)
    run = jax.grad(lambda z: jnp.sum(dense(ROUTERS[name](z)) ** 2))
    result, grad = jax.jit(lambda z: (ROUTERS[name](z), run(z)))(z)
    assert result.counts()[1] == 0 and result.counts().sum() > 0
    assert np.isfinite(grad).all() and np.isfinite(result.weights).all()


EVERY = {**ROUTERS, "top_k": partial(top_k, k=2, normalize="sum")}


@pytest.mark.parametrize("name", EVERY)
def test_nan_shows_and_stays_with_its_token(name, key):
    """A token of NaN that is routed nowhere would have an output of 0, unnoticed."""
    router = jax.jit(EVERY[name])
    z = jax.random.normal(key, (T, E))
    spoilt = dense(router(z.at[1].set(jnp.nan)))
    assert jnp.isnan(spoilt[1]).any()
    others = jnp.arange(T) != 1
    if name in ("expert_choice", "sinkhorn"):  # whose tokens are rivals
        assert jnp.isfinite(spoilt[others]).all() and (spoilt[others] > 0).any()
    else:
        np.testing.assert_array_equal(spoilt[others], dense(router(z))[others])
    if name == "sinkhorn":  # as if it were padding
        without = dense(jax.jit(EVERY[name])(z, mask=others))
        np.testing.assert_array_equal(spoilt[others], without[others])


def test_dense_to_sparse_uses_what_is_above_the_threshold():
    """Not what equals it: a threshold of 1 leaves the k best alone."""
    even = dense_to_sparse(jnp.zeros((1, 4)), 2, temperature=1.0, threshold=0.25)
    assert even.valid.tolist() == [[True, True, False, False]]


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in EVERY if n not in ("hash", "tree")])
def test_a_token_with_nowhere_to_go(name, key):
    """All its experts at -inf, such as those of another modality: zeros, not NaN."""
    z = jax.random.normal(key, (T, E)).at[1].set(-jnp.inf)

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def run(z):
        result = EVERY[name](z)
        losses = load_balance_loss(result) + entropy(result) + z_loss(z)
        return losses + jnp.sum(dense(result) ** 2), result

    (value, result), grad = run(z)
    assert jnp.isfinite(value) and jnp.isfinite(grad).all() and (grad[1] == 0).all()
    assert (dense(result)[1] == 0).all() and (result.probs[1] == 0).all()
    tokens, experts, _ = result.choices()
    assert not ((tokens == 1) & (experts < E)).any()


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in EVERY if n != "hash"])
def test_no_tokens(name):
    result = EVERY[name](jnp.zeros((0, E)))
    assert result.probs.shape == (0, E) and result.counts().tolist() == [0] * E
    assert load_balance_loss(result) == entropy(result) == 0


@pytest.mark.slow
def test_one_expert():
    one = jnp.array([[2.0], [-1.0], [0.5]])
    routers = {
        "top_k": partial(top_k, k=1),
        "expert_choice": partial(expert_choice, capacity=3),
        "sinkhorn": partial(sinkhorn, k=1),
        "threshold": partial(threshold, threshold=1.0),
        "top_p": partial(top_p, p=0.1),
        "dense_to_sparse": partial(dense_to_sparse, k=1, temperature=0.1),
        "hash": lambda z: hash_routing(jnp.array([5, 6, 7]), 1, logits=z),
        "tree": lambda z: tree(jnp.zeros((3, 2, 0)), z[:, None].repeat(2, 1)),
    }
    for name, router in routers.items():
        assert dense(router(one)).tolist() == [[1.0]] * 3, name
    assert (dense(relu(one))[:, 0] > 0).tolist() == [True, False, True]


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda z: expert_choice(z[0], 1),
            r"logits: got shape \(5,\), needed \[t, e\]",
        ),
        (lambda z: top_p(z.astype(jnp.int32), 0.5), "logits: got dtype int32"),
        (lambda z: relu(z, mask=jnp.ones(3, bool)), r"mask: got bool \(3,\), needed"),
        (lambda z: sinkhorn(z, 2, mask=jnp.ones(T)), "mask: got float32"),
        (
            lambda z: expert_choice(z, 0),
            "capacity: got 0, needed an int from 1 to the 7",
        ),
        (lambda z: expert_choice(z, 8), "capacity: got 8"),
        (lambda z: expert_choice(z, 2, normalize="max"), "normalize: got 'max'"),
        (lambda z: expert_choice(z, 2, score="tanh"), "score: got 'tanh'"),
        (lambda z: sinkhorn(z, 6), "k: got 6, needed an int from 1 to the 5 experts"),
        (lambda z: sinkhorn(z, 1, iterations=-1), "iterations: got -1"),
        (lambda z: sinkhorn(z, 1, temperature=0.0), "temperature: got 0.0"),
        (lambda z: sinkhorn(z, 1, normalize="max"), "normalize: got 'max'"),
        (lambda z: threshold(z, 0.5, max_k=0), "max_k: got 0"),
        (
            lambda z: threshold(z, 1.5),
            r"threshold: got 1.5, needed a number in \[0, 1\]",
        ),
        (lambda z: threshold(z, jnp.ones(3)), r"threshold: got shape \(3,\)"),
        (lambda z: top_p(z, 0.0), r"p: got 0.0, needed a number in \(0, 1\]"),
        (lambda z: top_p(z, 0.5, max_k=6), "max_k: got 6"),
        (lambda z: top_p(z, 0.5, max_k=True), "max_k: got True"),
        (lambda z: relu(z, scale=jnp.ones(3)), r"scale: got shape \(3,\)"),
        (lambda z: relu(z, epsilon=0.0), "epsilon: got 0.0"),
        (lambda z: relu(z, max_k=6), "max_k: got 6"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.zeros((T, E)))


def test_what_is_concrete_is_checked_inside_jit_too():
    with pytest.raises(ValueError, match="threshold: got 1.5"):
        jax.jit(lambda z: threshold(z, 1.5))(jnp.zeros((T, E)))


def test_thresholds_are_data():
    """A traced threshold or p does not recompile, and has no gradient."""
    z = jnp.log(jnp.array([[0.5, 0.3, 0.2]]))
    for router in (threshold, top_p):
        traces = []

        @jax.jit
        def run(z, share, router=router, traces=traces):
            traces.append(1)
            return router(z, share).valid.sum()

        counts = [int(run(z, jnp.float32(share))) for share in (0.25, 0.75, 0.999)]
        assert counts == ([2, 0, 0] if router is threshold else [1, 2, 3])
        assert len(traces) == 1
    assert jax.grad(lambda s: top_p(z, s).weights.sum())(0.75) == 0


def test_every_router_is_tested():
    tested = {"top_k", "soft", "hash_routing", *ROUTERS} - {"hash"}
    returns = {
        name
        for name in routing.__all__
        if getattr(getattr(routing, name), "__annotations__", {}).get("return")
        in (routing.Routing, routing.SoftRouting)
    }
    assert returns == tested
