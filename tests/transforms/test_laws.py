"""Laws of sparsify and of every updater: the lists here are the registries.

Every public function that returns an `Updater` has an entry in UPDATERS. Its laws are
read off one jitted run through its whole schedule, on a tree that holds NNX, Linen and
tuples. A few more runs put it in and around other transformations and over devices.
"""

import functools
import inspect
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from sparsejax import checkpoint, transforms
from sparsejax.masks import NM, FanIn, apply_masks, named_leaves, uniform

KEY = jax.random.key(7)
SPARSITY = 0.75
TIMES = {"begin": 3, "end": 57, "every": 6}  # updates at 3, 9, ..., 57
DUE = range(3, 58, 6)
SAVED, STEPS = 12, 62  # saved after 12 steps, then 50 more
SIZES = (96, 96, 64)  # of the masked leaves, in the order of the tree


# ---- the registry ------------------------------------------------------------------


def dense_to_sparse(done):
    """Zhu and Gupta's cubic after `done` steps: the density, from 1 at step 3."""
    last = max((t for t in DUE if t < done), default=None)
    if last is None:
        return 1.0
    return 1 - SPARSITY * (1 - (1 - (last - 3) / 54) ** 3)


def by_leaf(density):
    return lambda masks, done: [round(density(done) * size) for size in SIZES]


def in_all(density):
    """Leaves exchange weights: only the sum is given."""

    def counts(masks, done):
        counts = [int(mask.sum()) for mask in masks]
        others = sum(counts[1:])
        return [round(density(done) * sum(SIZES)) - others, *counts[1:]]

    return counts


def constant_fan_in(masks, done):
    """min(in, budget // active neurons) each, the budget a quarter of the leaf."""
    counts = []
    for mask in masks:
        active = int(mask.any(0).sum())
        inputs = min(mask.shape[0], mask.size // 4 // active)
        assert set(mask.sum(0).tolist()) <= {0, inputs}
        counts.append(active * inputs)
        assert counts[-1] <= mask.size // 4
    return counts


def fixed(**times):
    masks = jax.tree.map(lambda p: p > 0 if p.ndim == 2 else None, make_tree())
    return transforms.fixed(masks)


def over_middle(**times):
    # 76 // 4 = 19 to 57: another start, the same counts' formula would not hold.
    return transforms.gradual_magnitude_over(76, sparsity=SPARSITY, every=6)


def middle_density(done):
    last = max((t for t in range(19, 58, 6) if t < done), default=None)
    if last is None:
        return 1.0
    return 1 - SPARSITY * (1 - (1 - (last - 19) / 36) ** 3)


def make(name, **more):
    options = {"sparsity": SPARSITY, "key": KEY} | TIMES | more
    return functools.partial(getattr(transforms, name), **options)


constant = lambda done: 1 - SPARSITY
# What runs, the counts it must have, whether NaN among gradients skips an update.
UPDATERS = {
    "static": (make("static"), by_leaf(constant), False),
    "fixed": (
        fixed,
        lambda masks, done: [int((w > 0).sum()) for w in weights(make_tree())],
        False,
    ),
    "gradual_magnitude": (make("gradual_magnitude"), by_leaf(dense_to_sparse), False),
    "gradual_magnitude, global": (
        make("gradual_magnitude", distribution="global"),
        in_all(dense_to_sparse),
        False,
    ),
    "gradual_magnitude_over": (over_middle, by_leaf(middle_density), False),
    "sparse_evolutionary_training": (
        make("sparse_evolutionary_training"),
        by_leaf(constant),
        False,
    ),
    "rigl": (make("rigl"), by_leaf(constant), True),
    # Of one kept in every four, the default of 0.3 would round to none.
    "rigl, NM": (
        make("rigl", structure=NM(1, 4), drop_fraction=0.9),
        by_leaf(constant),
        True,
    ),
    "sparse_momentum": (make("sparse_momentum"), in_all(constant), False),
    "sparse_momentum, own average": (
        make("sparse_momentum", decay=0.9),
        in_all(constant),
        False,
    ),
    "sparse_momentum, FanIn": (
        make("sparse_momentum", redistribution=False, structure=FanIn()),
        by_leaf(constant),
        False,
    ),
    "exploration_exploitation": (
        make("exploration_exploitation"),
        by_leaf(constant),
        True,
    ),
    "granet": (make("granet"), in_all(dense_to_sparse), True),
    "granet, sparse to sparse": (
        make("granet", initial_sparsity=SPARSITY, distribution=uniform),
        by_leaf(constant),
        True,
    ),
    "srigl": (make("srigl"), constant_fan_in, True),
}
NEVER_MOVE = ("static", "fixed")
# Variants of a rule that the shorter laws need not repeat.
RULES = [name for name in UPDATERS if "," not in name]


def test_every_updater_has_an_entry():
    public = {
        name
        for name in transforms.__all__
        if inspect.isfunction(getattr(transforms, name))
        and inspect.signature(getattr(transforms, name)).return_annotation
        is transforms.Updater
    }
    assert public == {name.split(",")[0] for name in UPDATERS}
    assert len(public) >= 10


# ---- the run -----------------------------------------------------------------------


@functools.cache
def make_tree():
    """Masked leaves (8, 12), (12, 8) and (8, 8), biases that are left alone."""
    draw = lambda i, shape: jax.random.normal(jax.random.fold_in(KEY, i), shape)
    net = nnx.Linear(12, 8, rngs=nnx.Rngs(0))
    net.kernel[...] = draw(1, (12, 8))
    other = linen.Dense(12).init(KEY, jnp.ones((1, 8)))["params"]
    return {
        "linen": {"dense": {**other, "kernel": draw(0, (8, 12))}},
        "nnx": nnx.state(net, nnx.Param),
        "tuple": (draw(2, (8, 8)), jnp.zeros(8)),
    }


def weights(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim == 2]


@functools.cache
def gradients(step, fill=None):
    """Dense, and unlike zero everywhere; or one value for all."""
    leaves, treedef = jax.tree.flatten(make_tree())
    rng = np.random.default_rng(step)
    draw = lambda shape: rng.normal(size=shape).astype(np.float32) + 0.1
    value = lambda shape: np.full(shape, fill, np.float32)
    return treedef.unflatten([(value if fill else draw)(p.shape) for p in leaves])


@functools.cache
def runner(name):
    """(jitted step, start, how often it was traced)."""
    traces = []
    tx = transforms.sparsify(optax.adamw(1e-2), UPDATERS[name][0]())

    @jax.jit
    def step(params, state, grads):
        traces.append(1)
        # Arguments that nobody here knows, as other optimizers need them.
        updates, state = tx.update(grads, state, params, value=1.0, nobody="knows")
        return optax.apply_updates(params, updates), state

    state = tx.init(make_tree())
    params = apply_masks(make_tree(), transforms.get_masks(state))
    return step, (params, state), traces


@functools.cache
def run_and_count(name):
    """[(params, state) after 0, 1, ... steps] of the whole schedule; traces it took.

    Counted here and not where a test asks: between two tests jax's caches may have been
    let go, after which ``step`` is traced once more.
    """
    step, now, traces = runner(name)
    before, seen = len(traces), [now]
    for i in range(STEPS):
        seen.append(step(*seen[-1], gradients(i)))
    return seen, len(traces) - before


def run(name):
    return run_and_count(name)[0]


def masks_of(state):
    return [np.asarray(m) for m in jax.tree.leaves(transforms.get_masks(state))]


def check_counts_and_zeros(name, params, state, done):
    masks = masks_of(state)
    assert [int(m.sum()) for m in masks] == UPDATERS[name][1](masks, done), done
    for weight, mask in zip(weights(params), masks, strict=True):
        np.testing.assert_array_equal(np.asarray(weight)[~mask], 0.0)


def assert_equal(one, two):
    jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.mark.parametrize("name", UPDATERS)
def test_counts_follow_the_schedule_and_pruned_weights_are_zero(name):
    moved = 0
    for done, (params, state) in enumerate(run(name)):
        check_counts_and_zeros(name, params, state, done)
        assert int(state.skipped_updates) == 0 and int(state.steps) == done
        if done:
            before = run(name)[done - 1][1]
            same = all(map(np.array_equal, masks_of(before), masks_of(state)))
            due = bool(transforms.is_update_step(before))
            assert same or due
            moved += not same
            if name not in NEVER_MOVE and "over" not in name:
                assert due == (done - 1 in DUE)
    assert (moved >= 3) == (name not in NEVER_MOVE)


@pytest.mark.parametrize("name", UPDATERS)
def test_one_trace_and_stable_state(name):
    describe = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    first, *others = map(describe, (run(name)[0], run(name)[4], run(name)[-1]))
    assert others == [first, first]
    assert run_and_count(name)[1] == 1


@pytest.mark.parametrize("name", UPDATERS)
def test_bad_gradients_never_enter_masks_or_memory(name):
    step, _, traces = runner(name)
    due = 9 if "over" not in name else 25
    params, state = run(name)[due]
    step(params, state, gradients(due))  # traced by now, whatever ran before
    traced = len(traces)
    after = [step(params, state, gradients(0, bad))[1] for bad in (np.nan, np.inf)]
    skips = UPDATERS[name][2]
    for new in after:
        assert int(new.skipped_updates) == skips
        for leaf in jax.tree.leaves(new.memory):
            assert np.isfinite(np.asarray(leaf, np.float32)).all()
        # One kind of bad is as good as the other.
        assert_equal(masks_of(new), masks_of(after[0]))
        if skips:
            assert_equal((new.masks, new.memory), (state.masks, state.memory))
        masks = masks_of(new)
        done = due if skips else due + 1
        assert [int(m.sum()) for m in masks] == UPDATERS[name][1](masks, done)
    assert len(traces) == traced


@pytest.mark.slow
def test_restored_mid_schedule_the_next_50_steps_are_the_same():
    saved = {name: run(name)[SAVED] for name in UPDATERS}
    fresh = {name: runner(name)[1] for name in UPDATERS}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(folder, SAVED, saved, config={})
        found = checkpoint.restore(folder, fresh, config={}).tree
    for name, now in found.items():
        for i in range(SAVED, STEPS):
            now = runner(name)[0](*now, gradients(i))
        assert_equal(now, run(name)[-1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("name", [*RULES, "rigl, NM", "sparse_momentum, FanIn"])
def test_the_same_over_eight_devices(name, kind):
    axis = getattr(jax.sharding.AxisType, kind)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis,))

    def put(leaf):
        # Either axis, whichever eight divides.
        axes = [("x" if size == 8 else None) for size in leaf.shape]
        spec = axes if leaf.ndim == 2 and axes != ["x", "x"] else axes[:1]
        spec = jax.sharding.PartitionSpec(*spec) if leaf.ndim == 2 else None
        sharding = jax.sharding.NamedSharding(mesh, spec or jax.P())
        return jax.device_put(leaf, sharding)

    step = runner(name)[0]
    now = jax.tree.map(put, run(name)[SAVED - 3])  # step 9 is an update
    for i in range(SAVED - 3, SAVED):
        now = step(*now, jax.tree.map(put, gradients(i)))
    assert_equal(masks_of(now[1]), masks_of(run(name)[SAVED][1]))
    for one, two in zip(*map(jax.tree.leaves, (now, run(name)[SAVED])), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6, atol=1e-7)
    assert not weights(now[0])[0].sharding.is_fully_replicated


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_inside_chain_partition_multi_steps_and_inject_hyperparams(name):
    inner = optax.inject_hyperparams(
        lambda learning_rate: transforms.sparsify(
            optax.adam(learning_rate), UPDATERS[name][0]()
        )
    )(learning_rate=optax.linear_schedule(1e-2, 0.0, 100))
    tx = optax.chain(
        optax.clip_by_global_norm(10.0),
        optax.partition(
            {
                2: optax.MultiSteps(inner, 2).gradient_transformation(),
                1: optax.sgd(0.1),
            },
            lambda params: jax.tree.map(lambda p: p.ndim, params),
        ),
    )
    traces = []

    @jax.jit
    def step(params, state, grads):
        traces.append(1)
        updates, state = tx.update(grads, state, params, value=1.0)
        return optax.apply_updates(params, updates), state

    with jax.numpy_dtype_promotion("standard"):  # these wrappers are the caller's
        state = tx.init(make_tree())
        params = apply_masks(make_tree(), transforms.get_masks(state))
        shapes = lambda: jax.tree.map(lambda x: (x.shape, x.dtype), (params, state))
        before = shapes()
        for micro in range(22):
            due = bool(transforms.is_update_step(state))
            if name not in NEVER_MOVE and "over" not in name:
                assert due == (micro // 2 in DUE)
            params, state = step(params, state, gradients(micro))
            check_counts_and_zeros(name, params, state, (micro + 1) // 2)
    assert shapes() == before and len(traces) == 1


# ---- every optimizer ---------------------------------------------------------------

matrix_or_vector = lambda params: jax.tree.map(
    lambda p: "matrix" if p.ndim > 1 else "vector", params
)
INNER = {
    "adam": lambda: optax.adam(1e-2),
    "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1),
    "sgd momentum": lambda: optax.sgd(1e-2, momentum=0.9),
    "lion": lambda: optax.lion(1e-3),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=8),
    "rmsprop": lambda: optax.rmsprop(1e-3, momentum=0.9),
    "muon": lambda: optax.contrib.muon(1e-2),
    "schedule_free_adamw": lambda: optax.contrib.schedule_free_adamw(1e-2),
    # b2 is stored in the dtype of the weights, and 0.999 would be 1 in bfloat16.
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(
        learning_rate=optax.linear_schedule(1e-2, 0.0, 10), b2=0.99
    ),
    "MultiSteps inside": lambda: optax.MultiSteps(
        optax.adam(1e-2), 2
    ).gradient_transformation(),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-2)),
    "partition": lambda: optax.partition(
        {"matrix": optax.adam(1e-2), "vector": optax.sgd(0.1, momentum=0.9)},
        matrix_or_vector,
    ),
}


def policy_zero(inner, state, changed):
    """The moments policy by optax's own means, as the oracle."""
    is_hole = lambda v: isinstance(v, optax.MaskedNode)

    def clear(value, where):
        if is_hole(value) or value.shape != where.shape:
            return value
        return jnp.where(where, jnp.zeros_like(value), value)

    return optax.tree_utils.tree_map_params(
        inner, clear, state, changed, is_leaf=is_hole
    )


def train(tx, params, steps=7):
    """Yields what each step saw and made; checks structure and one trace."""
    traces = []

    @jax.jit
    def step(params, state, grads):
        traces.append(1)
        updates, state = tx.update(grads, state, params)
        return updates, optax.apply_updates(params, updates), state

    state = tx.init(params)
    params = apply_masks(params, transforms.get_masks(state))
    describe = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    before = describe((params, state))
    for i in range(steps):
        cast = lambda g, p: jnp.asarray(g, p.dtype)
        grads = jax.tree.map(cast, gradients(i), params)
        # optax promotes silently, so mixed dtypes need the ordinary rules.
        with jax.numpy_dtype_promotion("standard"):
            updates, new_params, new_state = step(params, state, grads)
        yield i, (params, state, grads), (updates, new_params, new_state)
        params, state = new_params, new_state
    assert describe((params, state)) == before
    assert len(traces) == 1


def check_after(inner_name, name, after, new, step):
    check_counts_and_zeros(name, after, new, step + 1)
    if inner_name == "schedule_free_adamw":
        evaluated = optax.contrib.schedule_free_eval_params(new.inner_state, after)
        check_counts_and_zeros(name, evaluated, new, step + 1)


# Trees and rules are the same for all; optimizers and rules are paired off, so that
# every one of each is met.
PAIRS = [(inner, RULES[i * 3 % len(RULES)]) for i, inner in enumerate(INNER)]
PAIRS += [(inner, "sparse_momentum") for inner in INNER if inner != "sgd momentum"]
# Adafactor keeps none; schedule-free's Adam averages in its iterates instead.
WITHOUT_MOMENTUM = ("adafactor", "schedule_free_adamw")


def test_the_pairs_meet_every_rule():
    assert {name for _, name in PAIRS} == set(RULES)


# Rounding beyond that of the update itself: Muon's five Newton-Schulz steps magnify
# that of the matrix, schedule-free's update is the difference of two parameters.
ROUNDING = {"muon": 3e-7, "schedule_free_adamw": 5e-7}


@pytest.mark.parametrize("inner_name, name", PAIRS)
def test_kept_updates_are_the_inner_optimizers(inner_name, name):
    inner = INNER[inner_name]()
    tx = transforms.sparsify(inner, UPDATERS[name][0]())
    close = dict(rtol=3e-6, atol=ROUNDING.get(inner_name, 1e-8))

    @jax.jit
    def oracle(grads, state, params, old, new):
        is_hole = lambda v: isinstance(v, optax.MaskedNode)
        fill = lambda p, m: jnp.ones(p.shape, bool) if is_hole(m) else m
        full = lambda masks: jax.tree.map(fill, params, masks, is_leaf=is_hole)
        old, new = full(old), full(new)
        changed = jax.tree.map(jnp.not_equal, old, new)
        if not by_momentum:
            grads = jax.tree.map(lambda g, m: jnp.where(m, g, 0), grads, new)
        with jax.numpy_dtype_promotion("standard"):
            state = policy_zero(inner, state, changed)
            return inner.update(grads, state, params)[0], new

    for step, (before, state, grads), (updates, after, new) in train(tx, make_tree()):
        # What goes by the optimizer's momentum keeps no memory and masks no gradient.
        by_momentum = name == "sparse_momentum" and inner_name not in WITHOUT_MOMENTUM
        if name == "sparse_momentum":
            assert (new.memory == ()) == by_momentum
        check_after(inner_name, name, after, new, step)
        want, full = oracle(grads, state.inner_state, before, state.masks, new.masks)
        for got, expected, mask in zip(
            *map(jax.tree.leaves, (updates, want, full)), strict=True
        ):
            np.testing.assert_allclose(
                got[mask], expected[mask], err_msg=str(step), **close
            )


@pytest.mark.parametrize(
    "inner_name",
    ["adamw", "adafactor", "muon", "schedule_free_adamw", "inject_hyperparams"],
)
def test_zeros_in_bfloat16(inner_name):
    tx = transforms.sparsify(INNER[inner_name](), UPDATERS["rigl"][0]())
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), make_tree())
    for step, _, (_, after, new) in train(tx, params, steps=5):
        check_after(inner_name, "rigl", after, new, step)
        for leaf in jax.tree.leaves(after):
            assert bool(jnp.isfinite(leaf).all())


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["keep", "mean"])
@pytest.mark.parametrize(
    "inner_name", ["adamw", "adafactor", "muon", "schedule_free_adamw", "partition"]
)
def test_other_moment_policies_keep_the_zeros(inner_name, policy):
    tx = transforms.sparsify(INNER[inner_name](), UPDATERS["rigl"][0](), moments=policy)
    for step, _, (_, after, new) in train(tx, make_tree(), steps=5):
        check_after(inner_name, "rigl", after, new, step)


def test_bfloat16_weights_under_float32_updates_and_the_reverse():
    for weight, update in ((jnp.bfloat16, jnp.float32), (jnp.float32, jnp.bfloat16)):
        cast = optax.stateless(
            lambda u, p, to=update: jax.tree.map(lambda x: x.astype(to), u)
        )
        tx = transforms.sparsify(
            optax.chain(optax.sgd(0.1), cast), UPDATERS["rigl"][0]()
        )
        params = jax.tree.map(lambda p, to=weight: p.astype(to), make_tree())
        for step, _, (emitted, after, new) in train(tx, params, steps=5):
            assert emitted["tuple"][0].dtype == jnp.float32
            check_after("", "rigl", after, new, step)


def test_vmap_over_seeds():
    def train(key):
        updater = make("rigl", key=key, begin=1, end=3, every=1)()
        tx = transforms.sparsify(optax.adamw(1e-2), updater)
        params = {"w": make_tree()["tuple"][0]}
        state = tx.init(params)
        params = apply_masks(params, transforms.get_masks(state))
        for i in range(3):
            grads = {"w": jnp.asarray(gradients(i)["tuple"][0])}
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params, transforms.get_masks(state)

    keys = jax.random.split(jax.random.key(3), 2)
    params, masks = jax.jit(jax.vmap(train))(keys)
    mask = named_leaves(masks)["w"]
    assert mask.sum((1, 2)).tolist() == [16, 16] and (mask[0] != mask[1]).any()
    np.testing.assert_array_equal(params["w"][~mask], 0.0)
    alone = jax.jit(train)(keys[1])[1]
    np.testing.assert_array_equal(alone["w"], mask[1])
