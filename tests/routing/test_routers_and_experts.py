"""Every router before the experts equals a loop over tokens and experts in float64.

Routers are written out once more here, plainly, so that nothing but numpy stands on the
other side: choices, weights, experts; gradients by central differences.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import routing
from sparsejax.ops import moe_mlp, moe_mlp_reference
from sparsejax.testing import assert_close, interpreted

T, D, F = 7, 3, 4
IDS = np.array([3, 0, 1, 2, 0, 4, 1])
TABLE = np.array([[0, 4], [1, 2], [3, 3], [2, 0], [4, 1]])  # id 2 names 3 twice
BIAS = np.array([0.3, -0.2, 0.0, 0.1, -0.4])


# --- Routers by their papers: scores that count [t, e], before they are normalized ----


def softmax(z):
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def only(scores, mask, chosen):
    """The scores at the pairs (token, expert) that are chosen, and no padding."""
    out = np.zeros_like(scores)
    for t, j in chosen:
        out[t, j] += scores[t, j] * mask[t]
    return out


def first(values, count):
    return sorted(range(len(values)), key=lambda j: (-values[j], j))[:count]


def top_k(z, mask, k, score=softmax, bias=0.0, groups=1, groups_kept=1):
    s, chosen = score(z), []
    for t, row in enumerate(s + bias):
        members = row.reshape(groups, -1)
        best = first([np.sort(group)[-2:].sum() for group in members], groups_kept)
        inside = np.repeat(np.isin(np.arange(groups), best), members.shape[1])
        chosen += [(t, j) for j in first(np.where(inside, row, -np.inf), k)]
    return only(s, mask, chosen)


def top_k_of_capacity(z, mask, k, capacity, by_probability=False):
    s, chosen = softmax(z), []
    for j in range(z.shape[1]):
        asked = [(first(s[t], k), t) for t in np.flatnonzero(mask)]
        queue = [t for _, t in sorted((best.index(j), t) for best, t in asked
                                      if j in best)]  # fmt: skip
        if by_probability:
            queue.sort(key=lambda t: -s[t, j])  # noqa: B023
        chosen += [(t, j) for t in queue[:capacity]]
    return only(s, mask, chosen)


def expert_choice(z, mask, capacity):
    s = softmax(z)
    suits = np.where(mask[:, None], s, -1).T
    chosen = [(t, j) for j, row in enumerate(suits) for t in first(row, capacity)]
    return only(s, mask, chosen)


def hashed(z, mask):
    return only(softmax(z), mask, [(t, j) for t in range(T) for j in TABLE[IDS[t]]])


def hashed_alone(z, mask):
    chosen = [(t, (i + step) % 5) for t, i in enumerate(IDS) for step in (0, 1)]
    return only(np.ones_like(z), mask, chosen)


def sinkhorn(z, mask, k):
    plan = np.exp(z) * mask[:, None]
    for _ in range(8):
        plan = plan / np.maximum(plan.sum(1, keepdims=True), 1e-300)
        plan = plan / plan.sum(0)
    return only(softmax(z), mask, [(t, j) for t in range(T) for j in first(plan[t], k)])


def threshold(z, mask, least, max_k):
    s = softmax(z)
    chosen = [(t, j) for t in range(T) for j in first(s[t], max_k)]
    return only(s, mask, [(t, j) for t, j in chosen if s[t, j] >= least])


def top_p(z, mask, p, max_k):
    s, chosen = softmax(z), []
    for t in range(T):
        order = first(s[t], max_k)
        before = np.cumsum([0, *s[t, order]])
        chosen += [(t, j) for j, b in zip(order, before, strict=False) if b < p]
    return only(s, mask, chosen)


def relu(z, mask, max_k):
    a = np.maximum(z, 0)
    w = a / np.sqrt((a**2).mean(1, keepdims=True) + 1e-6)
    return only(w, mask, [(t, j) for t in range(T) for j in first(a[t], max_k)])


def step(z):
    u = np.clip(z + 0.5, 0, 1)
    return u * u * (3 - 2 * u)


def tree(z, mask, max_k):
    # Two trees of five leaves each: root 0, its children 1 and 2, and 3 the child of 1.
    shares = np.zeros_like(z)
    for n, a in ((z[:, 1:], z), (-z[:, :-1], 2 * z)):
        left, right = step(n[:, 0]), step(-n[:, 0])
        reached = np.stack(
            [
                left * step(n[:, 1]) * step(n[:, 3]),
                left * step(n[:, 1]) * step(-n[:, 3]),
                left * step(-n[:, 1]),
                right * step(n[:, 2]),
                right * step(-n[:, 2]),
            ],
            axis=1,
        )
        shares += reached * np.exp(a)
    shares /= shares.sum(1, keepdims=True)
    chosen = [(t, j) for t in range(T) for j in first(shares[t], max_k)]
    return only(shares, mask, chosen)


def tree_of(z, **options):
    nodes = jnp.stack([z[:, 1:], -z[:, :-1]], axis=1)
    return routing.tree(nodes, jnp.stack([z, 2 * z], axis=1), **options)


def annealed(z, mask, k, temperature, least, max_k):
    s = softmax(z / temperature)
    ranked = [(t, i, j) for t in range(T) for i, j in enumerate(first(s[t], max_k))]
    return only(s, mask, [(t, j) for t, i, j in ranked if i < k or s[t, j] > least])


PADDED = np.array([True, True, False, True, True, False, True])
ALL = np.ones(T, bool)
# The router, its equal here, experts, how weights are normalized, which are tokens.
CASES = {
    "top_k": (
        partial(routing.top_k, k=2),
        partial(top_k, k=2), 5, "none", PADDED,
    ),
    "top_k of sigmoids": (
        partial(routing.top_k, k=2, score="sigmoid", normalize="sum"),
        partial(top_k, k=2, score=sigmoid), 5, "sum", ALL,
    ),
    "top_k, bias": (
        partial(routing.top_k, k=2, bias=jnp.array(BIAS, jnp.float32),
                normalize="sum_stopgrad"),
        partial(top_k, k=2, bias=BIAS), 5, "sum_stopgrad", PADDED,
    ),
    "top_k, softmax of the chosen": (
        partial(routing.top_k, k=2, score="softmax_chosen"),
        partial(top_k, k=2), 5, "sum", ALL,
    ),
    "top_k of groups": (
        partial(routing.top_k, k=2, groups=3, groups_kept=2, normalize="sum"),
        partial(top_k, k=2, groups=3, groups_kept=2), 6, "sum", ALL,
    ),
    "top_k, all experts": (
        partial(routing.top_k, k=5, normalize="sum"),
        partial(top_k, k=5), 5, "sum", PADDED,
    ),
    "top_k, one expert": (
        partial(routing.top_k, k=1, score="sigmoid"),
        partial(top_k, k=1, score=sigmoid), 1, "none", PADDED,
    ),
    "top_k, capacity": (
        partial(routing.top_k, k=2, capacity=1, normalize="sum"),
        partial(top_k_of_capacity, k=2, capacity=1), 5, "sum", PADDED,
    ),
    "top_k, capacity by probability": (
        partial(routing.top_k, k=2, capacity=2, capacity_policy="probability",
                normalize="sum_stopgrad"),
        partial(top_k_of_capacity, k=2, capacity=2, by_probability=True),
        5, "sum_stopgrad", ALL,
    ),
    "expert_choice": (
        partial(routing.expert_choice, capacity=2),
        partial(expert_choice, capacity=2), 5, "none", PADDED,
    ),
    "expert_choice, normalized": (
        partial(routing.expert_choice, capacity=2, normalize="sum"),
        partial(expert_choice, capacity=2), 5, "sum", ALL,
    ),
    "hash_routing": (
        lambda z, **o: routing.hash_routing(
            jnp.array(IDS), 5, table=jnp.array(TABLE), logits=z, **o
        ),
        hashed, 5, "sum", PADDED,
    ),
    "hash_routing of ids alone": (
        lambda z, **o: routing.hash_routing(jnp.array(IDS), 5, k=2, **o),
        hashed_alone, 5, "sum", PADDED,
    ),
    "sinkhorn": (
        partial(routing.sinkhorn, k=2, normalize="sum"),
        partial(sinkhorn, k=2), 5, "sum", PADDED,
    ),
    "threshold": (
        partial(routing.threshold, threshold=0.4, max_k=2),
        partial(threshold, least=0.4, max_k=2), 5, "none", PADDED,
    ),
    "top_p": (
        partial(routing.top_p, p=0.6, max_k=2, normalize="sum"),
        partial(top_p, p=0.6, max_k=2), 5, "sum", PADDED,
    ),
    "relu": (
        partial(routing.relu, max_k=2),
        partial(relu, max_k=2), 5, "none", PADDED,
    ),
    "tree": (
        partial(tree_of, max_k=2),
        partial(tree, max_k=2), 5, "sum", PADDED,
    ),
    "dense_to_sparse": (
        partial(routing.dense_to_sparse, k=1, temperature=0.5, threshold=0.2, max_k=2),
        partial(annealed, k=1, temperature=0.5, least=0.2, max_k=2), 5, "none", PADDED,
    ),
}  # fmt: skip


# --- Experts, one token and one expert at a time --------------------------------------


def normalized(scores, normalize, divisors=None):
    total = scores.sum(1)
    if normalize == "none":
        return scores
    if normalize == "sum" or divisors is None:
        divisors = np.where(total > 0, total, 1)
    return scores / divisors[:, None]


def experts(x, weights, w_in, w_gate, w_out):
    y = np.zeros_like(x)
    for t, e in zip(*np.nonzero(weights), strict=True):
        h = x[t] @ w_in[e]
        if w_gate is None:
            h = h * sigmoid(h)
        else:
            g = x[t] @ w_gate[e]
            h = g * sigmoid(g) * h
        y[t] += weights[t, e] * (h @ w_out[e])
    return y


def slopes(loss, arrays):
    """Central differences of `loss(**arrays)` in every entry of every array."""
    out = {}
    for name, array in arrays.items():
        out[name] = np.zeros_like(array)
        for at in np.ndindex(array.shape):
            ends = []
            for way in (1e-5, -1e-5):
                moved = array.copy()
                moved[at] += way
                ends.append(loss(**{**arrays, name: moved}))
            out[name][at] = (ends[0] - ends[1]) / 2e-5
    return out


def draw(name, skew=None, seed=0):
    """Inputs of a case in float64, each a number of bfloat16."""
    rng = np.random.default_rng([seed, list(CASES).index(name)])
    e = CASES[name][2]
    shapes = {
        "logits": (T, e), "x": (T, D), "w_in": (e, D, F), "w_gate": (e, D, F),
        "w_out": (e, F, D),
    }  # fmt: skip
    arrays = {n: rng.normal(size=shape) for n, shape in shapes.items()}
    arrays["logits"][0] = -np.abs(arrays["logits"][0])  # relu activates nobody
    if skew is not None:
        arrays["logits"][:, skew] += 9.0
    arrays = {n: np.asarray(a, jnp.bfloat16).astype(np.float64) for n, a in
              arrays.items()}  # fmt: skip
    return arrays, rng.normal(size=(T, D))


def expected(name, arrays, g):
    """Output, gradients of sum(y * g), and the weights, by the loops."""
    _, oracle, _, normalize, mask = CASES[name]
    held = oracle(arrays["logits"], mask).sum(1)
    held = np.where(held > 0, held, 1)

    def apply(logits, x, w_in, w_out, w_gate=None):
        weights = normalized(oracle(logits, mask), normalize, held)
        return experts(x, weights, w_in, w_gate, w_out)

    loss = lambda **moved: np.sum(apply(**moved) * g)
    weights = normalized(oracle(arrays["logits"], mask), normalize)
    return apply(**arrays), slopes(loss, arrays), weights


GIVEN = ("x", "w_in", "w_out", "w_gate")
SKEWS = (None, 0)  # as drawn; all logits of expert 0 raised by 9


@partial(jax.jit, static_argnames="op")
def apply_experts(op, decided, arrays, g):
    """The op's output and gradients, for a decision that has been made."""

    def apply(weights, x, w_in, w_out, w_gate=None):
        of = dataclasses.replace(decided, weights=weights, mask=None, demand=None)
        return op(x, of, w_in, w_out, w_gate=w_gate)

    given = [arrays[n] for n in GIVEN if n in arrays]
    y, pull = jax.vjp(apply, decided.weights, *given)
    return y, pull(g)


@pytest.mark.parametrize("name", [n for n in CASES if "," not in n or "cap" in n])
def test_routers_and_experts_are_the_loop(name):
    """Routers are compiled one by one, the operator for all of one shape at once."""
    router, _, _, _, mask = CASES[name]

    def weigh(z):
        decided = router(z, mask=jnp.asarray(mask))
        return decided.weights, dataclasses.replace(decided, mask=None, demand=None)

    @jax.jit
    def decide(z, slopes):
        _, pull, decided = jax.vjp(weigh, z, has_aux=True)
        return decided, pull(slopes)[0]

    for skew in SKEWS:
        arrays, g = draw(name, skew)
        if list(CASES).index(name) % 2:
            del arrays["w_gate"]
        want, want_grads, weights = expected(name, arrays, g)
        low = {n: jnp.asarray(a, jnp.float32) for n, a in arrays.items()}
        z, names = low.pop("logits"), [n for n in GIVEN if n in low]
        none = jnp.zeros_like(jax.eval_shape(weigh, z)[0])
        decided, _ = decide(z, none)
        for op in (moe_mlp, moe_mlp_reference):
            y, (to_weights, *grads) = apply_experts(op, decided, low, jnp.float32(g))
            grads = dict(zip(names, grads, strict=True))
            _, grads["logits"] = decide(z, to_weights)
            np.testing.assert_allclose(y, want, rtol=2e-5, atol=2e-6)
            for of, slope in want_grads.items():
                np.testing.assert_allclose(
                    grads[of], slope, rtol=1e-4, atol=5e-6, err_msg=of
                )
        assert (np.asarray(y)[weights.sum(1) == 0] == 0).all()
        for of in names[1:]:
            assert (np.asarray(grads[of])[weights.sum(0) == 0] == 0).all()


def test_the_cases_hold_the_edges():
    """A token without an expert, an expert without a token, all tokens at one."""
    seen = set()
    for name, (_, oracle, e, _, mask) in CASES.items():
        for skew in SKEWS:
            weights = oracle(draw(name, skew)[0]["logits"], mask)
            some = weights[mask] > 0
            edges = {
                "token without": not some.any(1).all(),
                "expert without": not some.any(0).all(),
                "all at one": e > 1 and some[:, 0].all() and not some[:, 1:].any(),
                "one expert": e == 1,
                "all experts": e > 1 and some.all(),
                "padding": not mask.all(),
            }
            seen |= {
                (edge, name.split(",")[0]) for edge, is_so in edges.items() if is_so
            }
    assert {edge for edge, _ in seen} == set(edges)
    assert len({name for edge, name in seen if edge == "token without"}) >= 4
    assert len({name for edge, name in seen if edge == "all at one"}) >= 3


def plain(x, decided, w_in, w_out, *, w_gate):
    """Every expert on every token, all of it in the dtype of x."""
    tokens, chosen, weights = decided.choices()
    table = jnp.zeros((len(x), len(w_in)), x.dtype)
    table = table.at[tokens, chosen].add(weights.astype(x.dtype), mode="drop")
    product = lambda w: jnp.einsum("td,edf->tef", x, w)
    h = jax.nn.silu(product(w_gate)) * product(w_in)
    return jnp.einsum("te,ted->td", table, jnp.einsum("tef,efd->ted", h, w_out))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_routers_and_experts_in_one(name):
    """As above in one compilation; in bfloat16 by the rule of twice the error."""
    router, _, _, _, mask = CASES[name]

    @partial(jax.jit, static_argnames="op")
    def run(op, arrays, g):
        def loss(arrays):
            z, rest = arrays["logits"], {n: arrays[n] for n in GIVEN[1:]}
            y = op(arrays["x"], router(z, mask=jnp.asarray(mask)), **rest)
            return jnp.sum(y.astype(jnp.float32) * g), y

        return jax.grad(loss, has_aux=True)(arrays)

    outputs = []
    for skew, seed in [(None, 0), (0, 0), (None, 1), (None, 2), (None, 3)]:
        arrays, g = draw(name, skew, seed)
        want, want_grads, _ = expected(name, arrays, g)
        low = {n: jnp.asarray(a, jnp.float32) for n, a in arrays.items()}
        grads, y = run(moe_mlp, low, jnp.float32(g))
        np.testing.assert_allclose(y, want, rtol=2e-5, atol=2e-6)
        for of, slope in want_grads.items():
            np.testing.assert_allclose(
                grads[of], slope, rtol=1e-4, atol=5e-6, err_msg=of
            )
        low = {n: jnp.asarray(a, jnp.bfloat16) for n, a in arrays.items()}
        found = [run(op, low, jnp.float32(g)) for op in (moe_mlp, plain)]
        assert {a.dtype for a in jax.tree.leaves(found)} == {jnp.dtype(jnp.bfloat16)}
        (grads, y), (plain_grads, plain_y) = found
        outputs.append(
            [
                ({"y": y, **grads}),
                {"y": want, **want_grads},
                {"y": plain_y, **plain_grads},
            ]
        )
    # Of so few numbers the largest error is luck: of five draws together.
    for of in outputs[0][0]:
        assert_close(*(np.stack([o[i][of] for o in outputs]) for i in range(3)))


# --- The chips' kernels, interpreted --------------------------------------------------

WIDE = 64  # what the Hopper kernels need
NEW_PALLAS = tuple(int(v) for v in jax.__version__.split(".")[:2]) >= (0, 11)
KERNELS = [
    pytest.param("mosaic_tpu", marks=pytest.mark.slow),
    # Its interpreter comes with jax 0.11; before, only the compile tests see it.
    *([pytest.param("mosaic_gpu", marks=pytest.mark.exhaustive)] * NEW_PALLAS),
]


def experts_and_gradients(x, weights, w_in, w_gate, w_out, g):
    """The loop of `experts`, and by hand the gradients of sum(y * g)."""
    y, dx, dweights = np.zeros_like(x), np.zeros_like(x), np.zeros_like(weights)
    dw_in, dw_gate, dw_out = (np.zeros_like(w) for w in (w_in, w_gate, w_out))
    for t, e in zip(*np.nonzero(weights), strict=True):
        a, b = x[t] @ w_gate[e], x[t] @ w_in[e]
        s = sigmoid(a)
        h, dh = a * s * b, weights[t, e] * (w_out[e] @ g[t])
        y[t] += weights[t, e] * (h @ w_out[e])
        dweights[t, e] = (h @ w_out[e]) @ g[t]
        dw_out[e] += weights[t, e] * np.outer(h, g[t])
        da, db = dh * b * s * (1 + a * (1 - s)), dh * a * s
        dw_gate[e] += np.outer(x[t], da)
        dw_in[e] += np.outer(x[t], db)
        dx[t] += w_gate[e] @ da + w_in[e] @ db
    return y, (dweights, dx, dw_in, dw_out, dw_gate)


@partial(jax.jit, static_argnums=0)
def op_and_gradients(op, decided, arrays, g):
    def apply(weights, x, w_in, w_out, w_gate):
        of = dataclasses.replace(decided, weights=weights, mask=None, demand=None)
        return op(x, of, w_in, w_out, w_gate=w_gate)

    y, pull = jax.vjp(apply, decided.weights, *(arrays[n] for n in GIVEN))
    return y, pull(g)


BY_KERNEL = {
    name: partial(moe_mlp, implementation=interpreted(name))
    for name in ("mosaic_tpu", "mosaic_gpu")
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_routers_and_kernels(kernel, name):
    router, _, e, _, mask = CASES[name]
    rng = np.random.default_rng(list(CASES).index(name))
    shapes = dict(
        x=(T, WIDE), w_in=(e, WIDE, WIDE), w_gate=(e, WIDE, WIDE), w_out=(e, WIDE, WIDE)
    )
    low = {
        n: jnp.asarray(rng.normal(size=shape) / 8**0.5, jnp.bfloat16)
        for n, shape in shapes.items()
    }
    g = jnp.asarray(rng.normal(size=(T, WIDE)), jnp.bfloat16)
    f64 = lambda a: np.asarray(a, np.float64)
    for skew in SKEWS:
        logits = draw(name, skew)[0]["logits"]
        decided = router(jnp.asarray(logits, jnp.float32), mask=jnp.asarray(mask))
        tokens, chosen, each = (np.asarray(a) for a in decided.choices())
        table, inside = np.zeros((T, e)), chosen < e
        table[tokens[inside], chosen[inside]] = each[inside]
        arrays = [f64(low[n]) for n in ("w_in", "w_gate", "w_out")]
        want, exact = experts_and_gradients(f64(low["x"]), table, *arrays, f64(g))
        y, grads = op_and_gradients(BY_KERNEL[kernel], decided, low, g)
        plain_y, plain_grads = op_and_gradients(plain, decided, low, g)
        assert y.dtype == grads[1].dtype == jnp.bfloat16
        assert_close(y, want, plain_y)
        for each in zip(grads[1:], exact[1:], plain_grads[1:], strict=True):
            assert np.abs(each[1]).max() > 0
            assert_close(*each)

        by_choice = [
            np.asarray(dataclasses.replace(decided, weights=slopes).choices()[2])
            for slopes in (grads[0], plain_grads[0])
        ]
        dweights = exact[0][tokens[inside], chosen[inside]]
        assert_close(by_choice[0][inside], dweights, by_choice[1][inside])
