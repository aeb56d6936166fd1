"""Proximal operators by hand and against their definitions; the steps under optax."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sparsejax import transforms
from sparsejax.masks import NM, Blocks, Columns, Rows

ROWS, COLUMNS = Rows(), Columns()


def f32(*values):
    return jnp.array(values, jnp.float32)


# Operators by hand.


def test_group_lasso_by_rows_columns_and_blocks():
    # Norms of rows (5, 1), p = 2: the threshold is tau sqrt(2) = 2.
    w = f32([3, 4], [0.6, 0.8])
    tau = 2.0 / 2**0.5
    got = transforms.prox_group_lasso(w, tau, groups=ROWS)
    np.testing.assert_allclose(got, [[1.8, 2.4], [0, 0]], rtol=1e-6)  # 1 - 2/5
    got = transforms.prox_group_lasso(w.T, tau, groups=COLUMNS)
    np.testing.assert_allclose(got, [[1.8, 0], [2.4, 0]], rtol=1e-6)
    # One block of norm sqrt(26) and size 4: 1 - 1 * 2 / sqrt(26).
    got = transforms.prox_group_lasso(w, 1.0, groups=Blocks((2, 2)))
    np.testing.assert_allclose(got, w * (1 - 2 / 26**0.5), rtol=1e-6)


def test_group_lasso_with_blocks_cut_at_the_end():
    # Blocks of 2 along 3 columns: sizes 2 and 1. Norms 5 and 1.5; the thresholds are
    # 2 sqrt(2) and 2 sqrt(1).
    got = transforms.prox_group_lasso(f32([3, 4, 1.5]), 2.0, groups=(1, 2))
    shrunk = 1 - 2 * 2**0.5 / 5
    np.testing.assert_allclose(got, [[3 * shrunk, 4 * shrunk, 0]], rtol=1e-6)
    # 2 sqrt(2) + ... : sqrt(2) * 5 + 1 * 1.5
    value = transforms.group_lasso_penalty(f32([3, 4, 1.5]), groups=(1, 2))
    np.testing.assert_allclose(value, 5 * 2**0.5 + 1.5, rtol=1e-6)


def test_group_lasso_of_filters_and_of_leading_axes():
    # A kernel (window 1, in 2, out 2): the filters are its last axis.
    w = f32([[3, 0.5], [4, 0.5]])
    got = transforms.prox_group_lasso(w, 1.0, groups=(None, None, 1))
    kept = 1 - 2**0.5 / 5
    np.testing.assert_allclose(got[0], [[3 * kept, 0], [4 * kept, 0]], rtol=1e-6)
    # Two stacked layers: each has groups of its own.
    stacked = jnp.stack([f32([3, 4]), f32([0.3, 0.4])])
    got = transforms.prox_group_lasso(stacked, 2**-0.5, groups=ROWS)
    np.testing.assert_allclose(got, [[[2.4, 3.2]], [[0, 0]]], rtol=1e-6)


def test_group_lasso_penalty_has_gradient_zero_at_zero():
    # R = sqrt(2) (5 + 0); its gradient is sqrt(2) w / 5.
    w = f32([3, 4], [0, 0])
    value, gradient = jax.value_and_grad(transforms.group_lasso_penalty)(w, groups=ROWS)
    np.testing.assert_allclose(value, 5 * 2**0.5, rtol=1e-6)
    np.testing.assert_allclose(
        gradient, [[0.6 * 2**0.5, 0.8 * 2**0.5], [0, 0]], rtol=1e-6
    )


@pytest.mark.parametrize(
    "norms, k, want",
    [
        # lambda = 1, d = 1. eta = 1/2: u = (min(1, 4/2 - 1), 2/2 - 1) = (1, 0) sums to
        # k; the first is scaled by 1 / (1 + 1).
        ((4, 2), 1, (2, 0)),
        # 7 eta - 2 = 1, eta = 3/7: u = (5/7, 2/7), scales (5/12, 2/9).
        ((4, 3), 1, (5 / 3, 2 / 3)),
        # eta = 1/2: u = (1, 1, 0): half of the first two.
        ((6, 4, 2), 2, (3, 2, 0)),
        # All k groups that are unlike zero: u = 1.
        ((4, 0, 3), 2, (2, 0, 1.5)),
        ((4, 3), 2, (2, 1.5)),
        ((4, 3), 0, (0, 0)),
        ((0, 0), 1, (0, 0)),
    ],
)
def test_envelope_prox_by_hand(norms, k, want):
    w = -f32(*norms)
    got = transforms.prox_group_envelope(w, 1.0, count=k, groups=(1,))
    np.testing.assert_allclose(-got, want, rtol=1e-6)
    assert not jnp.signbit(got[got == 0]).any()


def test_envelope_prox_with_group_weights_by_hand():
    # d = (4, 1), lambda = 1: sqrt(d) norms = (4, 3), u = (4 eta - 4, 3 eta - 1). For
    # k = 1 eta = 2/3: u = (0, 1), so only the second stays, halved. Without weights
    # both would: norms 2 and 3, 5 eta - 2 = 1, u = (1/5, 4/5).
    w, d = f32(2, 3), f32(4, 1)
    prox = lambda d: transforms.prox_group_envelope(
        w, 1.0, count=1, groups=(1,), group_weights=d
    )
    np.testing.assert_allclose(prox(d), [0, 1.5], rtol=1e-6)
    np.testing.assert_allclose(prox(None), [1 / 3, 4 / 3], rtol=1e-6)


@pytest.mark.parametrize(
    "norms, k, want",
    [
        ((3, 4), 1, 24.5),  # k = 1: half of (3 + 4) squared
        ((3, 4), 2, 12.5),  # no more than k groups: half of 9 + 16
        ((3, 4, 5), 2, 36),  # u = norms / 6, all below 1: 6 (3 + 4 + 5) / 2
        ((1, 1, 8), 2, 34),  # u = (1/2, 1/2, 1): (2 + 2 + 64) / 2
        ((0, 0), 1, 0),
    ],
)
def test_envelope_penalty_by_hand(norms, k, want):
    value = transforms.group_envelope_penalty(f32(*norms), count=k, groups=(1,))
    np.testing.assert_allclose(value, want, rtol=1e-6)


def test_envelope_penalty_gradient_by_hand():
    # d GS / d w = w / u at u = (1/2, 1/2, 1), signs kept; 0 at 0.
    gradient = jax.grad(transforms.group_envelope_penalty)(
        f32(-1, 1, 8, 0), count=2, groups=(1,)
    )
    np.testing.assert_allclose(gradient, [-2, 2, 8, 0], rtol=1e-6)


# Against the definitions, by numeric minimization.


def conjugate_terms(y, d, k):
    """The envelope is the biconjugate of f(w) = sum(d_j |w_j|^2) / 2 on at most k
    groups, whose conjugate is the largest of these: sums over k groups."""
    squares = (y.reshape(len(d), -1) ** 2).sum(1) / (2 * d)
    return np.array(
        [sum(squares[list(s)]) for s in itertools.combinations(range(len(d)), k)]
    )


@pytest.mark.parametrize("seed", range(4))
def test_envelope_prox_and_penalty_against_their_definition(seed):
    rng = np.random.default_rng(seed)
    groups, k, lam = 4, 1 + seed % 3, [0.05, 0.3, 1.0, 3.0][seed]
    w, d = rng.normal(size=(groups, 2)), rng.uniform(0.5, 2, groups)
    # Moreau: prox of lam f** at w is w - lam y, where y minimizes
    # f*(y) + lam |y - w / lam|^2 / 2; the maximum in f* becomes a bound tau.
    terms = lambda z: z[-1] - conjugate_terms(z[:-1], d, k)
    start = np.append(w.ravel() / lam, 100.0)
    found = scipy.optimize.minimize(
        lambda z: z[-1] + lam * ((z[:-1] - w.ravel() / lam) ** 2).sum() / 2,
        start,
        method="SLSQP",
        constraints={"type": "ineq", "fun": terms},
        options={"maxiter": 500, "ftol": 1e-14},
    )
    want = w - lam * found.x[:-1].reshape(w.shape)
    got = transforms.prox_group_envelope(
        jnp.array(w, jnp.float32),
        lam,
        count=k,
        groups=ROWS,
        group_weights=jnp.array(d[:, None], jnp.float32),
    )
    np.testing.assert_allclose(got, want, atol=2e-4)
    assert (jnp.abs(got).sum(1) > 0).sum() >= k
    # f**(w) = sup_y <w, y> - f*(y).
    found = scipy.optimize.minimize(
        lambda z: z[-1] - z[:-1] @ w.ravel(),
        np.append(w.ravel(), 100.0),
        method="SLSQP",
        constraints={"type": "ineq", "fun": terms},
        options={"maxiter": 500, "ftol": 1e-14},
    )
    value = transforms.group_envelope_penalty(
        jnp.array(w, jnp.float32),
        count=k,
        groups=ROWS,
        group_weights=jnp.array(d[:, None], jnp.float32),
    )
    np.testing.assert_allclose(value, -found.fun, rtol=1e-4)


def test_group_lasso_prox_against_its_definition():
    w = np.random.default_rng(0).normal(size=(4, 3))
    tau, penalty = 0.5, lambda v: 3**0.5 * np.linalg.norm(v.reshape(4, 3), axis=1).sum()
    found = scipy.optimize.minimize(
        lambda v: tau * penalty(v) + ((v - w.ravel()) ** 2).sum() / 2,
        w.ravel(),
        method="Powell",
        options={"maxiter": 100_000, "xtol": 1e-9, "ftol": 1e-14},
    )
    got = transforms.prox_group_lasso(jnp.array(w, jnp.float32), tau, groups=ROWS)
    np.testing.assert_allclose(got, found.x.reshape(4, 3), atol=1e-4)
    assert 0 < (jnp.abs(got).sum(1) == 0).sum() < 4


def test_operators_keep_dtypes_nan_and_large_half_precision():
    for dtype in (jnp.bfloat16, jnp.float16):
        # 300^2 overflows float16: norms are taken in float32.
        w = jnp.array([[300.0, 400.0], [0.5, 0.0]], dtype)
        got = transforms.prox_group_lasso(w, 1.0, groups=ROWS)
        assert got.dtype == dtype
        np.testing.assert_allclose(
            got.astype(jnp.float32), [[299.15, 398.87], [0, 0]], rtol=4e-3
        )
        got = transforms.prox_group_envelope(w, 1.0, count=1, groups=ROWS)
        assert got.dtype == dtype
        np.testing.assert_array_equal(got.astype(jnp.float32), [[150, 200], [0, 0]])
    bad = f32([jnp.nan, 1], [1, 1])
    for got in (
        transforms.prox_group_lasso(bad, 1.0, groups=ROWS),
        transforms.prox_group_envelope(bad, 1.0, count=1, groups=ROWS),
    ):
        assert jnp.isnan(got[0]).all() and not jnp.isnan(got[1]).any()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda w: transforms.prox_group_lasso(w, 1.0, groups=()), "groups"),
        (
            lambda w: transforms.prox_group_lasso(w, 1.0, groups=(1, 1, 1)),
            r"1 to 2 axes of a weight of shape \(2, 2\), got \(1, 1, 1\)",
        ),
        (
            lambda w: transforms.group_lasso_penalty(w, groups=(0, 1)),
            r"at least 1, or None, got \(0, 1\)",
        ),
        (
            lambda w: transforms.group_envelope_penalty(w, count=0, groups=ROWS),
            "count must be at least 1, got 0",
        ),
        (
            lambda w: transforms.prox_group_envelope(w, 1.0, count=-1, groups=ROWS),
            "count must be at least 0, got -1",
        ),
        (
            lambda w: transforms.prox_group_envelope(
                w, 1.0, count=1, groups=ROWS, group_weights=jnp.ones(2)
            ),
            r"grid of groups, \(2, 1\), got \(2,\)",
        ),
    ],
)
def test_operators_refuse(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.ones((2, 2)))


# The steps, as optax transformations.


def lasso(**changes):
    return transforms.group_lasso(
        **{"strength": 2.0, "learning_rate": 0.1, "groups": ROWS} | changes
    )


def envelope(**changes):
    settings = {"strength": 2.0, "learning_rate": 0.1, "sparsity": 0.5}
    return transforms.group_envelope(**settings | {"groups": ROWS} | changes)


def shrinkage(**changes):
    return transforms.iterative_soft_shrinkage(
        **{"sparsity": 0.75, "begin": 1, "end": 4} | changes
    )


def hypersparse(**changes):
    settings = {"sparsity": 0.5, "coefficient": lambda t: 1e-3 * 1.5 ** t.astype(float)}
    return transforms.add_hypersparse(**settings | changes)


LAST = {
    "group_lasso": lambda **changes: lasso(strength=1.3, **changes),
    "group_envelope": lambda **changes: envelope(strength=50.0, **changes),
    "iterative_soft_shrinkage": shrinkage,
    "iterative_soft_shrinkage, 2:4": lambda **changes: shrinkage(
        sparsity=0.5, structure=NM(2, 4), **changes
    ),
    "add_hypersparse": hypersparse,
}


SHAPES = {
    "group_lasso": (8, 12),
    "group_envelope": (12, 8),
    "iterative_soft_shrinkage": (8, 4),
    "iterative_soft_shrinkage, 2:4": (4, 16),
}


def all_at_once():
    """Every one of them in one chain, each on the matrix of its shape."""
    of_shape = lambda shape: lambda name, leaf: leaf.shape == shape
    parts = [hypersparse(), optax.adamw(0.1, weight_decay=0.01)]
    parts += [LAST[name](leaf_filter=of_shape(s)) for name, s in SHAPES.items()]
    return optax.chain(*parts)


def draw(seed, shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def as_dict(dtype):
    return {
        f"layer_{i}": {"kernel": draw(i, shape, dtype), "bias": jnp.ones(3, dtype)}
        for i, shape in enumerate(SHAPES.values())
    }


def as_tuple(dtype):
    kernels = [draw(i, shape, dtype) for i, shape in enumerate(SHAPES.values())]
    return (tuple(kernels[:2]), [*kernels[2:], jnp.ones(3, dtype)])


def as_nnx(dtype):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.LayerNorm(8, rngs=rngs, param_dtype=dtype)
            self.layers = nnx.List(
                nnx.Linear(*shape, rngs=rngs, param_dtype=dtype)
                for shape in SHAPES.values()
            )

    return nnx.state(Net(nnx.Rngs(0)), nnx.Param)


def zeros(params):
    """How many entries of each matrix are exactly zero."""
    leaves = {leaf.shape: int((leaf == 0).sum()) for leaf in jax.tree.leaves(params)}
    return {name: leaves[shape] for name, shape in SHAPES.items()}


def train(tx, params, steps=6, repeat=1):
    """Gives each gradient `repeat` times; checks that structure and dtypes stay."""
    traces = []

    @jax.jit
    def train_step(params, state, step):
        traces.append(1)
        key = jax.random.key(step)
        draw = lambda p: jax.random.normal(key, p.shape).astype(p.dtype)
        grads = jax.tree.map(draw, params)
        updates, state = tx.update(grads, state, params, unknown=0)
        return optax.apply_updates(params, updates), state

    describe = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    state = tx.init(params)
    before = describe((params, state))
    with jax.numpy_dtype_promotion("standard"):  # optax promotes silently
        for step in range(steps * repeat):
            params, state = train_step(params, state, step // repeat)
            assert describe((params, state)) == before
    return params, state, len(traces)


@pytest.mark.parametrize(
    "build, dtype", [(as_tuple, jnp.bfloat16), (as_nnx, jnp.float32)]
)
def test_laws(build, dtype):
    tx = all_at_once()
    params, state, traces = train(tx, build(dtype))
    assert traces == 1
    for leaf in jax.tree.leaves(params):
        assert leaf.dtype == dtype and bool(jnp.isfinite(leaf).all())
        assert leaf.ndim == 2 or (leaf != 0).any()
        if leaf.shape in ((8, 12), (12, 8)):  # whole rows
            assert ((leaf != 0).all(1) == (leaf != 0).any(1)).all()
    counts = zeros(params)
    assert counts["group_lasso"] > 0
    assert 0 < counts["group_envelope"] <= 48  # k = 6 of 12 rows stay at least
    assert counts["iterative_soft_shrinkage"] == 24  # three quarters of 32
    assert counts["iterative_soft_shrinkage, 2:4"] == 32  # half of 64
    specs = optax.tree_utils.tree_map_params(tx, lambda _: "spec", state)
    assert jax.tree.structure(specs) == jax.tree.structure(state)
    assert optax.tree_utils.tree_get_all_with_path(state, "shrinkage_masks")


@pytest.mark.slow
def test_multi_steps_vmap_and_shards_change_nothing():
    # All three in one run, since each takes long to compile.
    params, tx = as_dict(jnp.float32), all_at_once()
    alone = train(tx, params)[0]

    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    columns = lambda p: PartitionSpec(
        *[None] * (p.ndim - 1), "x" if p.ndim > 2 else None
    )
    place = lambda p: jax.device_put(p, NamedSharding(mesh, columns(p)))
    seeds = jax.tree.map(lambda p: place(jnp.stack([0.5 * p, p])), params)
    multi = optax.MultiSteps(tx, 2).gradient_transformation()
    several = jax.vmap(lambda p: train(multi, p, repeat=2)[0])(seeds)

    other = jax.tree.map(lambda p: p[1], several)
    for a, b in zip(*map(jax.tree.leaves, (alone, other)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert zeros(alone) == zeros(other)
    assert all(zeros(alone).values())


def test_inside_inject_hyperparams_and_partition():
    make = lambda learning_rate: optax.chain(
        optax.sgd(learning_rate), lasso(learning_rate=learning_rate, leaf_filter="*")
    )
    tx = optax.partition(
        {
            "matrix": optax.inject_hyperparams(make)(learning_rate=0.5),
            "vector": optax.sgd(0.1),
        },
        lambda params: jax.tree.map(
            lambda p: "matrix" if p.ndim == 2 else "vector", params
        ),
    )
    # tau sqrt(p) = 2 * 0.5 * 1: rows of one entry shrink by 1.
    params = {"w": f32([3], [0.9]), "b": f32(1)}
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = tx.update(
            jax.tree.map(jnp.zeros_like, params), tx.init(params), params
        )
    params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["w"], [[2], [0]], rtol=1e-6)
    np.testing.assert_array_equal(params["b"], 1)


def one_step(tx, params, updates, state=None):
    state = tx.init(params) if state is None else state
    with jax.numpy_dtype_promotion("standard"):
        updates, state = tx.update(updates, state, params)
        return optax.apply_updates(params, updates), state


def test_the_threshold_is_the_step_size_times_the_strength_at_the_step():
    # strength 3 t, learning rate 0.5: tau = 1.5 t on rows of one entry.
    tx = lasso(strength=lambda t: 3.0 * t, learning_rate=0.5, leaf_filter="w")
    params, none = {"w": f32([5], [1])}, {"w": jnp.zeros((2, 1))}
    params, state = one_step(tx, params, none)
    np.testing.assert_allclose(params["w"], [[5], [1]])  # t = 0
    params, state = one_step(tx, params, none, state)
    np.testing.assert_allclose(params["w"], [[3.5], [0]])  # t = 1
    params, state = one_step(tx, params, none, state)
    np.testing.assert_allclose(params["w"], [[0.5], [0]])  # t = 2
    # A zeroed row comes back when a step takes it past the threshold, 4.5.
    params, state = one_step(tx, params, {"w": f32([0], [-6])}, state)
    np.testing.assert_allclose(params["w"], [[0], [-1.5]])


def test_the_step_is_taken_from_params_and_update_together():
    # |1 + 4| - 2 = 3: not |1| - 2 + 4.
    tx = lasso(strength=2.0, learning_rate=1.0, leaf_filter="w")
    params, _ = one_step(tx, {"w": f32([1])}, {"w": f32([4])})
    np.testing.assert_allclose(params["w"], [[3]])


def test_envelope_keeps_k_groups_of_each_leaf():
    # Density 1/2 of 4 rows: k = 2, lambda = 2 * 0.5 = 1; the equation is worked out in
    # test_envelope_prox_by_hand. Leaf "v" is weighted: d = (4, 1), k = 1.
    tx = envelope(
        learning_rate=0.5, leaf_filter=["w", "v"], group_weights={"v": f32([4], [1])}
    )
    params = {"w": f32([6], [0], [-4], [2]), "v": f32([2], [3])}
    params, _ = one_step(tx, params, jax.tree.map(jnp.zeros_like, params))
    np.testing.assert_allclose(params["w"], [[3], [0], [-2], [0]], rtol=1e-6)
    np.testing.assert_allclose(params["v"], [[0], [1.5]], rtol=1e-6)


def test_envelope_drives_training_to_k_groups():
    # w minimizes |w - target|^2 / 2; the pull ends with the two largest rows.
    target = f32([3, 3], [0.2, 0.1], [-2, 1], [0.1, 0.3])
    tx = optax.chain(optax.sgd(0.1), envelope(strength=0.5, leaf_filter="w"))
    params = {"w": jnp.ones((4, 2))}
    state = tx.init(params)
    for _ in range(200):
        grads = {"w": params["w"] - target}
        updates, state = jax.jit(tx.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert (params["w"] != 0).any(1).tolist() == [True, False, True, False]
    # The fixed point of a kept row: w - target + strength * w = 0.
    np.testing.assert_allclose(params["w"][0], target[0] / 1.5, rtol=1e-4)


def test_zero_is_exact_where_weights_and_updates_differ_in_dtype():
    for weights, updates in ((jnp.bfloat16, jnp.float32), (jnp.float32, jnp.bfloat16)):
        w = jnp.array([[0.1], [3.3]], weights)
        u = {"w": jnp.full((2, 1), 0.01, updates)}
        for tx in (
            lasso(strength=1.0, learning_rate=1.0, leaf_filter="w"),
            transforms.iterative_soft_shrinkage(sparsity=0.5, end=0, leaf_filter="w"),
        ):
            emitted, _ = tx.update(u, tx.init({"w": w}), {"w": w})
            assert emitted["w"].dtype == jnp.float32
            with jax.numpy_dtype_promotion("standard"):
                after = optax.apply_updates({"w": w}, emitted)["w"]
            assert after.dtype == weights
            assert after[0, 0] == 0 and after[1, 0] > 2


# Iterative soft shrinkage.


def test_shrinkage_by_hand():
    # Density 1/2 of 4; begin 1, factor 1/2, end 3.
    tx = transforms.iterative_soft_shrinkage(
        sparsity=0.5, factor=0.5, begin=1, end=3, leaf_filter="w"
    )
    params, state, seen = {"w": f32([8, -4, 2, 1])}, None, []
    for update in (
        [0, 0, 0, 0],
        [0, 0, 0, 0],
        [0, 0, 4, 0],
        [0, 0, 0, 0],
        [1, 1, 1, 1],
    ):
        params, state = one_step(tx, params, {"w": f32(update)}, state)
        seen.append(params["w"][0].tolist())
    assert seen == [
        [8, -4, 2, 1],  # t = 0: before begin
        [8, -4, 1, 0.5],  # t = 1: the two smallest are halved
        [8, -2, 5, 0.25],  # t = 2: 1 + 4 = 5 is important again, -4 no longer
        [8, 0, 5, 0],  # t = 3 = end: chosen a last time, the others are zero
        [9, 0, 6, 0],  # t = 4: and stay zero, whatever the gradient
    ]
    assert state.shrinkage_masks["w"].tolist() == [[True, False, True, False]]
    assert int(state.shrinkage_steps) == 5 and int(state.skipped_selections) == 0


def test_shrinkage_by_a_schedule_and_n_of_m():
    # 1:2 along axis -2: of rows (0, 1) and of rows (2, 3). factor 1 - t / 4.
    tx = transforms.iterative_soft_shrinkage(
        sparsity=0.5,
        structure=NM(1, 2),
        factor=lambda t: 1 - t / 4,
        end=9,
        leaf_filter="w",
    )
    params, none = {"w": f32([8], [4], [1], [2])}, {"w": jnp.zeros((4, 1))}
    params, state = one_step(tx, params, none)
    np.testing.assert_array_equal(params["w"][:, 0], [8, 4, 1, 2])  # factor 1
    params, state = one_step(tx, params, none, state)
    np.testing.assert_array_equal(params["w"][:, 0], [8, 3, 0.75, 2])  # 3/4
    params, state = one_step(tx, params, none, state)
    np.testing.assert_array_equal(params["w"][:, 0], [8, 1.5, 0.375, 2])  # 1/2


def test_shrinkage_leaves_kept_updates_bit_for_bit():
    params, update = {"w": draw(0, (16, 16))}, {"w": 1e-3 * draw(1, (16, 16))}
    tx = transforms.iterative_soft_shrinkage(sparsity=0.5, end=9)
    emitted, state = tx.update(update, tx.init(params), params)
    kept = state.shrinkage_masks["w"]
    np.testing.assert_array_equal(emitted["w"][kept], update["w"][kept])


def test_shrinkage_breaks_ties_by_lowest_index():
    tx = transforms.iterative_soft_shrinkage(sparsity=0.5, end=0, leaf_filter="w")
    params, _ = one_step(tx, {"w": f32([1, 1, 1, 1])}, {"w": f32([0, 0, 0, 0])})
    np.testing.assert_array_equal(params["w"], [[1, 1, 0, 0]])


def test_nan_never_enters_the_shrinkage_masks():
    tx = transforms.iterative_soft_shrinkage(sparsity=0.5, end=9, leaf_filter="w")
    params = {"w": f32([8, -4, 2, 1])}
    _, state = one_step(tx, params, {"w": f32([0, 0, 0, 0])})
    _, after = one_step(tx, params, {"w": f32([0, 0, jnp.nan, jnp.inf])}, state)
    np.testing.assert_array_equal(
        after.shrinkage_masks["w"], state.shrinkage_masks["w"]
    )
    assert int(after.skipped_selections) == 1


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: shrinkage(structure=NM(2, 4)).init(as_dict(jnp.float32)),
            "sparsity must be 1 - n/m = 0.5",
        ),
        (
            lambda: shrinkage(structure="rows").init(as_dict(jnp.float32)),
            "structure must be .*got 'rows'",
        ),
        (lambda: shrinkage(sparsity=1.5), r"sparsity must be in \[0, 1\], got 1.5"),
        (lambda: shrinkage(factor=-0.5), r"factor must be in \[0, 1\], got -0.5"),
        (lambda: shrinkage(begin=5), "end must be at least begin"),
        (lambda: envelope(sparsity=2.0), r"sparsity must be in \[0, 1\], got 2.0"),
        (lambda: hypersparse(sparsity=2.0), r"sparsity must be in \[0, 1\], got 2.0"),
        (
            lambda: shrinkage(structure=Blocks((3, 3))).init(as_dict(jnp.float32)),
            r"must divide the last axes of every weight, got shape \(8, 12\)",
        ),
        (
            lambda: lasso(groups=(1, 1, 1)).init(as_dict(jnp.float32)),
            "groups must name 1 to 2 axes",
        ),
        (
            lambda: envelope(group_weights={"c": jnp.ones((8, 1))}).init(
                as_dict(jnp.float32)
            ),
            r"group_weights must name leaves that are taken.*got \['c'\]",
        ),
    ],
)
def test_bad_configurations_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", LAST)
def test_filters_missing_params_and_leaves_not_taken(name):
    params = as_dict(jnp.float32)
    tx = LAST[name]()
    with pytest.raises(ValueError, match="params must be passed to update"):
        tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match="leaf_filter must take at least one leaf"):
        tx.init({"bias": jnp.ones(3)})
    # Leaves that are not taken pass through.
    updates = jax.tree.map(jnp.negative, params)
    emitted, _ = jax.jit(tx.update)(updates, tx.init(params), params)
    for layer in ("layer_0", "layer_1"):
        np.testing.assert_array_equal(emitted[layer]["bias"], updates[layer]["bias"])


def test_a_donated_state_of_shrinkage():
    """Its arrays are each their own."""
    tx = transforms.iterative_soft_shrinkage(sparsity=0.5, end=5)
    params = {"w": jnp.arange(8.0).reshape(2, 4)}
    update = jax.jit(tx.update, donate_argnums=1)
    _, state = update(params, tx.init(params), params)
    assert int(state.shrinkage_steps) == 1
