"""Each rule by hand on a few weights, and the bugs of earlier libraries."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax import transforms
from sparsejax.masks import (
    NM,
    Axes,
    Blocks,
    Columns,
    FanIn,
    Rows,
    apply_masks,
    erdos_renyi,
    exact_count,
    given,
    topk_mask,
)
from sparsejax.transforms import MaskUpdate, Updater
from sparsejax.transforms._shared import random_scores


def start(tx, params):
    state = tx.init(params)
    return apply_masks(params, transforms.get_masks(state)), state


def with_masks(state, masks):
    return state._replace(masks=masks)


def step(tx, grads, state, params):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def test_rigl_by_hand():
    # Ten weights, five kept; alpha = 0.4 at begin: k = 2 of 5.
    tx = transforms.sparsify(
        optax.sgd(1.0),
        transforms.rigl(
            sparsity=0.5,
            begin=0,
            end=10,
            every=5,
            drop_fraction=0.4,
            key=jax.random.key(0),
        ),
    )
    kept = jnp.array([[1, 1, 1, 1, 1, 0, 0, 0, 0, 0]], bool)
    w = jnp.array([[0.5, -0.1, 3.0, 0.2, -2.0, 0, 0, 0, 0, 0]])
    # Signed gradients: growth goes by size, and kept entries do not compete.
    g = jnp.array([[9.0, 9.0, 0.25, 9.0, 0.0, 0.1, -0.4, 0.2, 0.3, 0.0]])
    state = with_masks(tx.init({"w": w}), {"w": kept})
    new, state = step(tx, {"w": g}, state, {"w": w})
    # Dropped: 0.1 and 0.2. Grown: 0.4 and 0.3, which step from zero.
    want = [[0.5 - 9.0, 0, 3.0 - 0.25, 0, -2.0, 0, 0.4, 0, -0.3, 0]]
    np.testing.assert_allclose(new["w"], want, rtol=1e-6)
    assert state.masks["w"].tolist() == [
        [True, False, True, False, True] + [False, True, False, True, False]
    ]
    assert int(state.next_update) == 5


def test_rigl_follows_the_cosine_from_begin():
    # 40 kept of 80: k = round(40 * 0.15 (1 + cos(pi t / 4))), t = 0, 1, 2, 3, 4.
    key = jax.random.key(1)
    tx = transforms.sparsify(
        optax.sgd(0.1),
        transforms.rigl(sparsity=0.5, begin=3, end=7, every=1, key=key),
    )
    params, state = start(tx, {"w": jax.random.normal(key, (8, 10))})
    moved = []
    for i in range(9):
        grads = {"w": jax.random.normal(jax.random.fold_in(key, i), (8, 10))}
        old = state.masks["w"]
        params, state = step(tx, grads, state, params)
        moved.append(int((state.masks["w"] & ~old).sum()))
        assert int(state.masks["w"].sum()) == 40
    cosine = [round(6 * (1 + math.cos(math.pi * t / 4))) for t in range(5)]
    assert moved == [0, 0, 0, *cosine, 0]


def test_set_drops_the_smallest_and_grows_elsewhere_at_random():
    make = lambda seed: transforms.sparsify(
        optax.sgd(0.0),
        transforms.sparse_evolutionary_training(
            sparsity=0.6, every=1, drop_fraction=0.25, key=jax.random.key(seed)
        ),
    )
    w = jax.random.normal(jax.random.key(5), (10, 10))
    seen = []
    for seed in (0, 0, 1):
        tx = make(seed)
        params, state = start(tx, {"w": w})
        old = state.masks["w"]
        _, state = step(tx, {"w": jnp.zeros_like(w)}, state, params)
        new = state.masks["w"]
        dropped, grown = old & ~new, new & ~old
        assert int(dropped.sum()) == int(grown.sum()) == 10
        assert jnp.abs(w)[dropped].max() < jnp.abs(w)[old & new].min()
        seen.append(new)
    assert (seen[0] == seen[1]).all() and (seen[0] != seen[2]).any()


def test_gradual_magnitude_by_hand():
    # Updates at 0, 2, 4 of end=5: shares 1, 1/2, 0 are left of the way to 3/4.
    tx = transforms.sparsify(
        optax.sgd(0.0), transforms.gradual_magnitude(sparsity=0.75, end=5, every=2)
    )
    w = jnp.arange(1.0, 65.0).reshape(8, 8) * jnp.tile(jnp.array([1.0, -1.0]), 4)
    params, state = start(tx, {"w": w})
    kept = []
    for _ in range(6):
        params, state = step(tx, {"w": w}, state, params)
        kept.append(int(state.masks["w"].sum()))
    middle = round((1 - 0.75 * (1 - 1 / 8)) * 64)
    assert kept == [64, 64, middle, middle, 16, 16]
    np.testing.assert_array_equal(params["w"][:6], 0.0)
    np.testing.assert_array_equal(params["w"][6:], w[6:])


def test_static_masks_are_drawn_evenly():
    updater = transforms.static(sparsity=0.9, key=jax.random.key(0))
    masks, _ = updater.init(
        {"a": jnp.zeros((200, 100)), "b": jnp.zeros((200, 100))}, updater.key
    )
    assert int(masks["a"].sum()) == 2000 and (masks["a"] != masks["b"]).any()
    by_quarter = masks["a"].reshape(4, -1).sum(1)
    np.testing.assert_allclose(by_quarter, 500, atol=5 * math.sqrt(500 * 0.9 * 0.75))


def test_sparsity_of_one_keeps_nothing_and_of_zero_everything():
    # JaxPruner keeps one weight of each leaf at sparsity 1.
    for sparsity, kept in ((1.0, 0), (0.0, 15)):
        tx = transforms.sparsify(
            optax.sgd(0.1),
            transforms.rigl(sparsity=sparsity, end=2, every=1, key=jax.random.key(0)),
        )
        params, state = start(tx, {"w": jnp.ones((3, 5))})
        for _ in range(3):
            params, state = step(tx, {"w": jnp.ones((3, 5))}, state, params)
            assert int(state.masks["w"].sum()) == kept


def test_high_density_moves_no_more_than_there_is_room():
    tx = transforms.sparsify(
        optax.sgd(0.1),
        transforms.rigl(
            sparsity=0.1, end=2, every=1, drop_fraction=0.9, key=jax.random.key(0)
        ),
    )
    params, state = start(tx, {"w": jax.random.normal(jax.random.key(1), (5, 8))})
    old = state.masks["w"]
    params, state = step(tx, {"w": jnp.ones((5, 8))}, state, params)
    assert int((state.masks["w"] & ~old).sum()) == 4
    assert int(state.masks["w"].sum()) == 36


def test_the_inner_state_advances_on_update_steps():
    # JaxPruner and the reference RigL skip the gradient step and the step count.
    lr = optax.linear_schedule(1.0, 0.0, 4)
    tx = transforms.sparsify(
        optax.inject_hyperparams(optax.sgd)(learning_rate=lr),
        transforms.rigl(sparsity=0.5, end=3, every=1, key=jax.random.key(0)),
    )
    params, state = start(tx, {"w": jnp.ones((4, 4))})
    for i in range(4):
        params, state = step(tx, {"w": jnp.ones((4, 4))}, state, params)
        assert float(state.inner_state.hyperparams["learning_rate"]) == 1 - i / 4


def test_a_grown_weight_starts_from_zero_with_clear_moments():
    tx = transforms.sparsify(
        optax.adam(1e-3, b1=0.5, b2=0.75),
        transforms.rigl(
            sparsity=0.5, begin=2, end=2, drop_fraction=0.5, key=jax.random.key(0)
        ),
    )
    kept = jnp.array([[True, True, False, False]])
    state = with_masks(tx.init({"w": jnp.ones((1, 4))}), {"w": kept})
    params = {"w": jnp.array([[1.0, 0.5, 0.0, 0.0]])}
    for g in ([1.0, 1.0, 9.0, 9.0], [1.0, 1.0, 9.0, 9.0], [1.0, 1.0, 2.0, 3.0]):
        params, state = step(tx, {"w": jnp.array([g])}, state, params)
    assert state.masks["w"].tolist() == [[True, False, False, True]]
    mu = optax.tree_utils.tree_get(state, "mu")["w"]
    nu = optax.tree_utils.tree_get(state, "nu")["w"]
    np.testing.assert_allclose(mu, [[0.875, 0, 0, 1.5]], rtol=1e-6)
    np.testing.assert_allclose(nu, [[1 - 0.75**3, 0, 0, 0.25 * 9]], rtol=1e-6)
    # u = -lr * (mu / (1 - b1^3)) / sqrt(nu / (1 - b2^3)).
    want = -1e-3 * (1.5 / 0.875) / math.sqrt(0.25 * 9 / (1 - 0.75**3))
    np.testing.assert_allclose(params["w"][0, 3], want, rtol=1e-5)


@pytest.mark.parametrize("policy", ["keep", "mean"])
def test_moment_policies_by_hand(policy):
    tx = transforms.sparsify(
        optax.sgd(1.0, momentum=0.5),
        transforms.rigl(
            sparsity=0.25, begin=1, end=1, drop_fraction=0.34, key=jax.random.key(0)
        ),
        moments=policy,
    )
    kept = jnp.array([[True, True, True, False]])
    state = with_masks(tx.init({"w": jnp.ones((1, 4))}), {"w": kept})
    params = {"w": jnp.array([[9.0, 8.0, 1.5, 0.0]])}
    params, state = step(tx, {"w": jnp.array([[2.0, 4.0, 1.0, 7.0]])}, state, params)
    params, state = step(tx, {"w": jnp.array([[0.0, 0.0, 0.0, 6.0]])}, state, params)
    assert state.masks["w"].tolist() == [[True, True, False, True]]
    trace = optax.tree_utils.tree_get(state, "trace")["w"]
    # Before the step: traces 2, 4, 1, 0; the mean of those kept throughout is 3.
    third, fourth = {"keep": (0.5, 6.0), "mean": (0.0, 7.5)}[policy]
    np.testing.assert_allclose(trace, [[1.0, 2.0, third, fourth]])


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_bad_gradient_keeps_the_masks_and_is_counted(bad):
    key = jax.random.key(0)
    tx = transforms.sparsify(
        optax.sgd(0.0), transforms.rigl(sparsity=0.5, end=4, every=1, key=key)
    )
    params, state = start(tx, {"w": jax.random.normal(key, (4, 4))})
    old = state.masks["w"]
    grads = {"w": jax.random.normal(key, (4, 4)).at[2, 1].set(bad)}
    _, after = tx.update(grads, state, params)
    assert int(after.skipped_updates) == 1 and (after.masks["w"] == old).all()
    # Growth that does not look at gradients goes on.
    tx = transforms.sparsify(
        optax.sgd(0.0), transforms.gradual_magnitude(sparsity=0.5, end=0)
    )
    params, state = start(tx, {"w": params["w"] + 1})
    _, after = tx.update(grads, state, params)
    assert int(after.skipped_updates) == 0 and int(after.masks["w"].sum()) == 8
    _, after = tx.update(grads, state, {"w": params["w"].at[0, 0].set(bad)})
    assert int(after.skipped_updates) == 1 and int(after.masks["w"].sum()) == 16


def test_grow_scores_replace_the_gradient():
    key = jax.random.key(0)
    tx = transforms.sparsify(
        optax.sgd(0.1),
        transforms.rigl(sparsity=0.5, end=4, every=1, drop_fraction=0.25, key=key),
    )
    params, state = start(
        tx, {"w": jax.random.normal(key, (4, 4)), "bias": jnp.ones(4)}
    )
    scores = -jnp.arange(16.0).reshape(4, 4)
    # What the loop computed is masked already: growth from it would be by index.
    grads = jax.tree.map(jnp.ones_like, params)
    grads["w"] = jnp.where(state.masks["w"], grads["w"], 0.0)
    old = state.masks["w"]
    _, new = tx.update(grads, state, params, grow_scores={"w": scores})
    want = topk_mask(jnp.abs(scores), 2, where=~old)
    np.testing.assert_array_equal(new.masks["w"] & ~old, want)
    with pytest.raises(
        ValueError, match=r"grow_scores must hold .*\(4, 4\) at 'w', got nothing"
    ):
        tx.update(grads, state, params, grow_scores={})


def test_extra_arguments_reach_the_inner_optimizer():
    seen = {}

    def update(updates, state, params=None, **extra):
        seen.update(extra)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda p: (), update)
    tx = transforms.sparsify(
        inner, transforms.static(sparsity=0.5, key=jax.random.key(0))
    )
    params, state = start(tx, {"w": jnp.ones((2, 2))})
    tx.update(params, state, params, value=3.0, grow_scores=params)
    assert seen == {"value": 3.0}


def test_sharded_gradients_give_the_same_masks():
    # Means of signed gradients come in; no device-local abs may enter.
    key = jax.random.key(0)
    tx = transforms.sparsify(
        optax.adam(1e-2), transforms.rigl(sparsity=0.9, end=4, every=1, key=key)
    )
    params, state = start(tx, {"w": jax.random.normal(key, (64, 128))})
    grads = {"w": jax.random.normal(jax.random.key(1), (64, 128))}
    _, alone = jax.jit(tx.update)(grads, state, params)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    put = lambda tree: jax.tree.map(
        lambda x: jax.device_put(
            x,
            jax.sharding.NamedSharding(
                mesh, jax.sharding.PartitionSpec(*["x"][: x.ndim == 2])
            ),
        ),
        tree,
    )
    _, spread = jax.jit(tx.update)(put(grads), put(state), put(params))
    np.testing.assert_array_equal(spread.masks["w"], alone.masks["w"])


def test_erdos_renyi_with_declared_axes_as_distribution():
    axes = {"layers/kernel": Axes(stacked=(0,), fan_in=(1,), fan_out=(2,))}
    distribution = functools.partial(erdos_renyi, axes=axes)
    params = {
        "layers": {"kernel": jnp.ones((6, 24, 48)), "norm_scale": jnp.ones((6, 24))},
        "head": jnp.ones((24, 30)),
    }
    updater = transforms.rigl(
        sparsity=0.9, end=10, distribution=distribution, key=jax.random.key(0)
    )
    state = transforms.sparsify(optax.sgd(0.1), updater).init(params)
    densities = distribution({"layers/kernel": (6, 24, 48), "head": (24, 30)}, 0.1)
    for name, mask in (
        ("layers/kernel", state.masks["layers"]["kernel"]),
        ("head", state.masks["head"]),
    ):
        assert int(mask.sum()) == exact_count(densities[name], mask.size)
    # A stack of norms has rank 2 and is no matrix all the same.
    assert state.masks["layers"]["norm_scale"] == optax.MaskedNode()


def test_an_updater_of_ones_own_with_memory():
    # A moving average of |gradient|, as later rules keep, in the memory.
    def init(params, key):
        masks = {k: jnp.ones(p.shape, bool) for k, p in params.items()}
        return masks, {k: jnp.zeros(p.shape) for k, p in params.items()}

    def update(now: MaskUpdate):
        memory = {k: now.memory[k] + jnp.abs(s) for k, s in now.scores.items()}
        masks = {k: topk_mask(m, 3) for k, m in memory.items()}
        return masks, memory, jnp.array(True)

    tx = transforms.sparsify(optax.sgd(0.0), Updater(range(0, 9, 2), init, update))
    params, state = start(tx, {"w": jnp.ones((2, 3))})
    grads = {"w": jnp.array([[3.0, -5.0, 1.0], [4.0, 0.0, -2.0]])}
    for _ in range(3):
        params, state = step(tx, grads, state, params)
    np.testing.assert_array_equal(state.memory["w"], 2 * jnp.abs(grads["w"]))
    assert state.masks["w"].tolist() == [[True, True, False], [True, False, False]]


def test_an_updater_that_observes_every_step():
    # Gradients are summed at every step, masks follow the sum at steps 0 and 2 only.
    def init(params, key):
        masks = {k: jnp.ones(p.shape, bool) for k, p in params.items()}
        return masks, {k: jnp.zeros(p.shape) for k, p in params.items()}

    def update(now: MaskUpdate):
        masks = {k: topk_mask(m, 1) for k, m in now.memory.items()}
        return masks, now.memory, jnp.array(True)

    observe = lambda now, due: {k: m + now.scores[k] for k, m in now.memory.items()}
    updater = Updater(range(0, 3, 2), init, update, observe=observe)
    tx = transforms.sparsify(optax.sgd(0.0), updater)
    params, state = start(tx, {"w": jnp.ones((2, 2))})
    seen = []
    for one in ([3.0, 1.0], [0.0, 1.0], [0.0, 2.0], [9.0, 0.0]):
        grads = {"w": jnp.array([one, [0.0, 0.0]])}
        params, state = step(tx, grads, state, params)
        seen.append((state.memory["w"][0].tolist(), state.masks["w"][0].tolist()))
    assert seen == [
        ([3.0, 1.0], [True, False]),
        ([3.0, 2.0], [True, False]),
        ([3.0, 4.0], [False, True]),
        ([12.0, 4.0], [False, True]),
    ]


def test_one_compilation_through_updates():
    chex.clear_trace_counter()
    tx = transforms.sparsify(
        optax.adamw(1e-2),
        transforms.rigl(sparsity=0.5, end=6, every=2, key=jax.random.key(0)),
    )
    update = jax.jit(chex.assert_max_traces(lambda g, s, p: tx.update(g, s, p), n=1))
    params, state = start(tx, {"w": jnp.ones((4, 4))})
    for _ in range(8):
        updates, state = update({"w": params["w"] + 1}, state, params)
        params = optax.apply_updates(params, updates)


def bits(mask):
    return ["".join(str(int(x)) for x in row) for row in np.asarray(mask)]


def on(rows):
    return jnp.array([[bit == "1" for bit in row] for row in rows])


# Half of the kept units move: structure, weights, gradients, masks before and after.
MOVES = {
    # Of two in four down each column. Column 0 drops 1 and grows |-0.5|; column 1
    # drops |-2| and grows 0.3. Kept entries have gradient 9.
    "NM": (
        NM(2, 4),
        [[3, 0], [1, 0], [0, -2], [0, 5]],
        [[9, 0.3], [9, 0.2], [0.1, 9], [-0.5, 9]],
        ["10", "10", "01", "01"],
        ["11", "00", "00", "11"],
    ),
    "FanIn": (
        FanIn(),
        [[3, 0], [1, 0], [0, -2], [0, 5]],
        [[9, 0.3], [9, 0.2], [0.1, 9], [-0.5, 9]],
        ["10", "10", "01", "01"],
        ["11", "00", "00", "11"],
    ),
    # Sums of |w|: 6 and 3 (signed: 0 and 3); of |g|: 0.8 and 0.6 (signed: 0 and 0.6).
    "Blocks": (
        Blocks((1, 2)),
        [[3, -3, 1, 2, 0, 0, 0, 0]],
        [[9, 9, 9, 9, 0.4, -0.4, 0.5, 0.1]],
        ["11110000"],
        ["11001100"],
    ),
    # |w|: 4 and 2; |g|: 0.2 and 0.9.
    "Rows": (
        Rows(),
        [[3, -1], [1, 1], [0, 0], [0, 0]],
        [[9, 9], [9, 9], [0.1, 0.1], [-0.5, 0.4]],
        ["11", "11", "00", "00"],
        ["11", "00", "00", "11"],
    ),
    "Columns": (
        Columns(),
        [[3, 1, 0, 0], [-1, 1, 0, 0]],
        [[9, 9, 0.1, -0.5], [9, 9, 0.1, 0.4]],
        ["1100", "1100"],
        ["1001", "1001"],
    ),
}


@pytest.mark.parametrize("name", MOVES)
def test_whole_units_move_by_hand(name):
    structure, w, g, before, after = MOVES[name]
    options = {
        "sparsity": 0.5,
        "end": 9,
        "drop_fraction": lambda t: 0.5,
        "key": jax.random.key(0),
        "structure": structure,
    }
    params, grads = ({"w": jnp.array(x, jnp.float32)} for x in (w, g))
    zero = jnp.int32(0)
    for make, memory in (
        (transforms.rigl, ()),
        (
            functools.partial(transforms.sparse_momentum, redistribution=False),
            {"w": -grads["w"]},
        ),
        (
            # t = 0: growth by the gradient alone. Of one unit's shape each.
            transforms.exploration_exploitation,
            {"w": jnp.zeros(on(before).shape, jnp.uint8)},
        ),
    ):
        updater = make(**options)
        if make is transforms.exploration_exploitation:
            memory = updater.init(params, updater.key)[1]
        key = jax.random.key(1)
        now = MaskUpdate({"w": on(before)}, memory, params, grads, key, zero)
        masks, _, ok = jax.jit(updater.update)(now)
        assert bool(ok) and bits(masks["w"]) == after
    # SET drops the same units; what it grows, whole too, is left to chance.
    updater = transforms.sparse_evolutionary_training(**options)
    masks = jax.jit(updater.update)(now._replace(memory=()))[0]["w"]
    assert (masks & on(before) == on(before) & on(after)).all()
    assert int(masks.sum()) == int(on(before).sum())


def test_a_drop_fraction_that_never_moves_anything_is_refused():
    # round(0.3 * 1) is 0 at every update.
    updater = transforms.rigl(
        sparsity=0.75, end=9, key=jax.random.key(0), structure=NM(1, 4)
    )
    w = {"w": jnp.ones((4, 2))}
    masks, _ = updater.init(w, updater.key)
    now = MaskUpdate(masks, (), w, w, None, jnp.int32(0))
    with pytest.raises(ValueError, match="at least one of the 1 kept .*at most 0.3"):
        updater.update(now)


def test_the_number_kept_of_every_m_falls_step_by_step():
    # Updates at 0, 1, 2, 3: 1, 8/27, 1/27, 0 of the way to 7/8 are left. Kept of 8:
    # 8, round(3.07), round(1.26), 1. A library that jumps would keep 1 at once.
    updater = transforms.gradual_magnitude(
        sparsity=0.875, end=3, every=1, structure=NM(1, 8)
    )
    w = jax.random.normal(jax.random.key(0), (16, 3))
    masks, seen = {"w": jnp.ones((16, 3), bool)}, []
    for step in range(4):
        now = MaskUpdate(masks, (), {"w": w}, {}, None, jnp.int32(step))
        masks, _, _ = updater.update(now)
        groups = masks["w"].reshape(2, 8, 3).sum(1)
        assert (groups == groups[0, 0]).all()
        seen.append(int(groups[0, 0]))
    assert seen == [8, 3, 1, 1]
    largest = jnp.abs(w).reshape(2, 8, 3).argmax(1)
    np.testing.assert_array_equal(masks["w"].reshape(2, 8, 3).argmax(1), largest)


@pytest.mark.parametrize(
    "a, b, kept",
    [
        # 5, 3 and one of the twos: the earlier leaf's.
        ([3, 1, -2], [2, 5, 1], ["101", "010"]),
        # As they are: divided by the leaf's norm, 3 would go before all of b.
        ([3, 0.1, 0.1], [4, -5, 4.5], ["000", "111"]),
        # Two equals in one leaf: the first.
        ([1, -1, 1], [9, 0, 0], ["110", "100"]),
    ],
)
def test_global_magnitude_by_hand(a, b, kept):
    updater = transforms.gradual_magnitude(sparsity=0.5, end=0, distribution="global")
    params = {"a": jnp.array([a], jnp.float32), "b": jnp.array([b], jnp.float32)}
    masks, _ = updater.init(params, None)
    now = MaskUpdate(masks, (), params, {}, None, jnp.int32(0))
    masks, _, ok = updater.update(now)
    assert bool(ok) and bits(masks["a"]) + bits(masks["b"]) == kept


def test_global_magnitude_over_blocks():
    # Sums over pairs: 4, 3 | 5, 1. Two of four stay.
    updater = transforms.gradual_magnitude(
        sparsity=0.5, end=0, distribution="global", structure=Blocks((1, 2))
    )
    params = {"a": jnp.array([[2.0, -2, 3, 0]]), "b": jnp.array([[5.0, 0, -1, 0]])}
    masks, _ = updater.init(params, None)
    now = MaskUpdate(masks, (), params, {}, None, jnp.int32(0))
    masks, _, _ = updater.update(now)
    assert bits(masks["a"]) + bits(masks["b"]) == ["1100", "1100"]


def test_the_middle_half_of_training():
    updater = transforms.gradual_magnitude_over(1001, sparsity=0.75, every=100)
    assert updater.steps == range(250, 751, 100)
    now = MaskUpdate(
        {"w": jnp.ones((4, 4), bool)},
        (),
        {"w": jnp.ones((4, 4))},
        {},
        None,
        jnp.int32(750),
    )
    assert int(updater.update(now)[0]["w"].sum()) == 4
    with pytest.raises(ValueError, match="total_steps must be at least 4, got 3"):
        transforms.gradual_magnitude_over(3, sparsity=0.75)


def test_given_final_densities_are_reached_along_the_ramp():
    # At the middle of three updates 1/8 of the way is left: b has 1 - 0.75 (1 - 1/8) of
    # 16, which is round(5.5) to even.
    updater = transforms.gradual_magnitude(
        sparsity=0.375, end=2, every=1, distribution=given({"a": 1.0})
    )
    w = jnp.arange(1.0, 17.0).reshape(4, 4)
    masks, seen = {"a": jnp.ones((4, 4), bool), "b": jnp.ones((4, 4), bool)}, []
    for step in range(3):
        now = MaskUpdate(masks, (), {"a": w, "b": w}, {}, None, jnp.int32(step))
        masks, _, _ = updater.update(now)
        seen.append([int(mask.sum()) for mask in masks.values()])
    assert seen == [[16, 16], [16, 6], [16, 4]]


def test_fixed_masks_are_those_given():
    mine = {"w": on(["10", "01"]), "bias": None}
    tx = transforms.sparsify(optax.sgd(0.5), transforms.fixed(mine))
    params, state = start(tx, {"w": jnp.full((2, 2), 2.0), "bias": jnp.ones(2)})
    step_ = jax.jit(lambda g, s, p: step(tx, g, s, p), donate_argnums=(1, 2))
    for _ in range(3):
        params, state = step_(jax.tree.map(jnp.ones_like, params), state, params)
    np.testing.assert_array_equal(params["w"], [[0.5, 0], [0, 0.5]])
    # Donating the state has not deleted the caller's masks.
    assert bits(mine["w"]) == bits(state.masks["w"]) == ["10", "01"]


@pytest.mark.parametrize(
    "masks, message",
    [
        ({"w": jnp.ones((2, 3), bool)}, r"got \(2, 3\) for \(2, 2\) at 'w'"),
        ({}, "got no mask at 'w'"),
        (
            {"w": jnp.ones((2, 2), bool), "v": jnp.ones((2, 2), bool)},
            "got no parameter to mask at 'v'",
        ),
        ({"w": jnp.ones((2, 2))}, "masks must be boolean arrays, got float32 at 'w'"),
    ],
)
def test_fixed_masks_that_do_not_fit_are_refused(masks, message):
    with pytest.raises(ValueError, match=message):
        updater = transforms.fixed(masks)
        transforms.sparsify(optax.sgd(0.5), updater).init({"w": jnp.ones((2, 2))})


def test_first_masks_do_not_depend_on_names():
    # The reference RigL seeds by Python's hash of a name, which differs from one
    # process to the next; here leaves are numbered.
    updater = transforms.static(sparsity=0.5, key=jax.random.key(3))
    shapes = jnp.ones((4, 4)), jnp.ones((4, 4))
    first, _ = updater.init(dict(zip("ab", shapes, strict=True)), updater.key)
    other, _ = updater.init(dict(zip("xy", shapes, strict=True)), updater.key)
    assert bits(first["a"]) == bits(other["x"]) != bits(first["b"]) == bits(other["y"])
    draw = jax.random.uniform(jax.random.fold_in(updater.key, 1), (4, 4))
    np.testing.assert_array_equal(first["b"], draw >= jnp.sort(draw.ravel())[8])


def test_set_draws_for_each_leaf_and_each_update_anew():
    options = dict(sparsity=0.5, every=1, key=jax.random.key(0))
    updater = transforms.sparse_evolutionary_training(**options)
    tx = transforms.sparsify(optax.sgd(0.0), updater)
    zeros = {name: jnp.zeros((8, 16)) for name in "ab"}
    half = {name: jnp.arange(128).reshape(8, 16) % 2 == 0 for name in "ab"}
    state = with_masks(tx.init(zeros), half)
    grown = []
    for _ in range(2):
        new = tx.update(zeros, with_masks(state, half), zeros)[1]
        grown += [(new.masks[name] & ~half[name]).ravel().tolist() for name in "ab"]
        state = new
    # round(0.3 * 64) = 19 of 64 places, four times, none as another.
    assert [sum(places) for places in grown] == [19] * 4
    assert len(set(map(tuple, grown))) == 4


def test_random_scores_are_the_hash_that_they_claim():
    def h(x):
        x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
        x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
        return x ^ x >> 16

    key = jax.random.key(7)
    assert [h(0), h(1)] == [0, 0x514E28B7]  # MurmurHash3's, published
    a, b = (int(word) for word in jax.random.bits(key, (2,), jnp.uint32))
    want = [h(h(i ^ a) ^ b) >> 8 for i in range(3 * 5 * 7)]
    got = random_scores(key, (3, 5, 7))
    assert got.ravel().tolist() == want


def test_random_scores_favour_no_place_and_no_neighbours():
    draws, size, kept = 2000, 512, 64
    keys = jax.random.split(jax.random.key(0), draws)
    scores = jax.vmap(lambda key: random_scores(key, (16, 32)).ravel())(keys)
    chosen = np.asarray(jax.vmap(lambda s: topk_mask(s, kept))(scores), np.float64)
    share = kept / size
    # Sums of many draws: their mean square in units of what chance gives is 1.
    square = lambda x: np.mean(x**2)
    places = (chosen.sum(0) - draws * share) / (draws * share * (1 - share)) ** 0.5
    assert abs(square(places) - 1) < 5 * (2 / size) ** 0.5
    pair = share * (kept - 1) / (size - 1)
    for apart in (1, 2, 7, 32, 256):
        both = (chosen[:, apart:] * chosen[:, :-apart]).sum(0)
        z = (both - draws * pair) / (draws * pair * (1 - pair)) ** 0.5
        assert abs(square(z) - 1) < 5 * (2 / size) ** 0.5 and abs(z.mean()) < 1
    # Nor does one key say anything of the next.
    again = (chosen[1:] * chosen[:-1]).sum(0)
    z = (again - draws * share**2) / (draws * share**2 * (1 - share**2)) ** 0.5
    assert abs(square(z) - 1) < 5 * (2 / size) ** 0.5
