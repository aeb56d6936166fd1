"""condense: the form that each mask gets, the same products, the report, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparsejax as sj
from sparsejax.layers import (
    CondensedBlocks,
    CondensedFanIn,
    CondensedMasked,
    CondensedNM,
    CondensedRegion,
    apply_condensed,
    condense,
    expand_condensed,
)
from sparsejax.masks import nm_mask
from sparsejax.testing import assert_close

K, N = 48, 32
RNG = np.random.default_rng(0)


def blocks_of(side, kept):
    mask = np.zeros((K, N), bool)
    for row, col in kept:
        mask[row * side : (row + 1) * side, col * side : (col + 1) * side] = True
    return mask


def fan_in_mask(fan_in, rng=RNG):
    order = np.argsort(rng.random((K, N)), axis=0)
    return order < fan_in


def without(mask, rows=(), cols=()):
    mask = np.array(mask)
    mask[list(rows)] = False
    mask[:, list(cols)] = False
    return mask


NM = np.array(nm_mask(jnp.asarray(RNG.random((K, N)), jnp.float32), 2, 4))
UNEVEN = RNG.random((K, N)) < 0.3
UNEVEN[0, :], UNEVEN[1, 0] = True, False

# name: (mask, form in the report, type of the leaf, type of what a region holds)
CASES = {
    "all": (np.ones((K, N), bool), "dense", jax.Array, None),
    "none": (np.zeros((K, N), bool), "smaller dense", CondensedRegion, jax.Array),
    "columns": (
        without(np.ones((K, N), bool), (), (3, 7, 30)),
        "smaller dense",
        CondensedRegion,
        jax.Array,
    ),
    "rows_and_columns": (
        without(np.ones((K, N), bool), (0, 47), (3,)),
        "smaller dense",
        CondensedRegion,
        jax.Array,
    ),
    "blocks16": (
        blocks_of(16, [(0, 0), (1, 1), (2, 0)]),
        "blocks 16x16",
        CondensedBlocks,
        None,
    ),
    # Two neighbours of 8 are no block of 16 here: rows 8 to 24.
    "blocks8": (
        blocks_of(8, [(1, 0), (2, 0), (4, 3)]),
        "blocks 8x8",
        CondensedBlocks,
        None,
    ),
    "2:4": (NM, "N:M 2:4", CondensedNM, None),
    "2:4_ablated": (
        without(NM, (), (0, 9)),
        "N:M 2:4",
        CondensedRegion,
        CondensedNM,
    ),
    "fan_in": (fan_in_mask(7), "constant fan-in 7", CondensedFanIn, None),
    "fan_in_ablated": (
        without(fan_in_mask(7), (), (0, 9)),
        "constant fan-in 7",
        CondensedRegion,
        CondensedFanIn,
    ),
    "uneven": (UNEVEN, "masked dense", CondensedMasked, None),
    "uneven_ablated": (
        without(UNEVEN, (5,), (9,)),
        "masked dense",
        CondensedRegion,
        CondensedMasked,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_form_product_and_gradient(name):
    mask, form, kind, inner = CASES[name]
    draw = lambda *s: jnp.asarray(RNG.standard_normal(s), jnp.float32)
    w, x = draw(K, N), draw(5, K)
    tree, report = condense({"up": w, "bias": draw(N)}, {"up": jnp.asarray(mask)})
    leaf = tree["up"]
    assert isinstance(leaf, kind)
    assert inner is None or isinstance(leaf.inner, inner)
    assert report.leaves["up"].form == form
    assert report.leaves["up"].density == pytest.approx(mask.mean())
    assert list(report.leaves) == ["up"] and tree["bias"].shape == (N,)

    kept = np.where(mask, w, 0)
    np.testing.assert_array_equal(expand_condensed(leaf), kept)

    @jax.jit
    def value_and_gradients(x, leaf):
        y, vjp = jax.vjp(lambda leaf: apply_condensed(x, leaf), leaf)
        grads = jax.tree.leaves(vjp(jnp.ones_like(y)))
        return y, [g for g in grads if g.dtype == jnp.float32]

    y, floats = value_and_gradients(x, leaf)
    assert_close(y, np.float64(x) @ np.float64(kept), x @ kept)
    # The numbers stored have the gradients of the kept entries: x^T 1.
    total = sum(float(jnp.sum(g)) for g in floats)
    want = float((np.float64(x).sum(0)[:, None] * mask).sum())
    assert total == pytest.approx(want, rel=1e-4, abs=1e-3)
    if inner is not None:  # nothing is stored of what is left out
        assert floats[0].size <= mask.any(0).sum() * mask.any(1).sum()


def test_one_group_or_a_rest_is_a_fan_in():
    form = lambda mask: condense({"w": jnp.ones(mask.shape)}, {"w": mask})[1]
    one = np.array([[1, 0, 1], [1, 1, 0], [0, 1, 0], [0, 0, 1]], bool)  # 2 of 4
    assert form(one).leaves["w"].form == "constant fan-in 2"
    rest = np.zeros((10, 3), bool)
    rest[[[0], [4]], [0, 1, 2]] = True  # 1 of 4, twice, and two rows more
    rest[0, 0], rest[1, 0] = False, True
    assert form(rest).leaves["w"].form == "constant fan-in 2"
    assert form(rest[:8]).leaves["w"].form == "N:M 1:4"


def test_options():
    w = jnp.ones((K, N))
    # A block of 16 is four of 8; whichever side is asked for.
    mask = blocks_of(16, [(0, 0), (1, 1)])
    leaf = condense({"w": w}, {"w": mask}, block_sides=(8,))[0]["w"]
    assert leaf.layout.block_shape == (8, 8) and leaf.layout.capacity == 8
    # 2:4 is constant fan-in 24 of 48.
    tree, report = condense({"w": w}, {"w": NM}, groups=())
    assert report.leaves["w"].form == "constant fan-in 24"
    assert tree["w"].values.shape == (N, 24)
    # bfloat16 product of float32 numbers.
    y = apply_condensed(jnp.ones((2, K)), tree["w"], dtype=jnp.bfloat16)
    assert y.dtype == jnp.bfloat16 and (y == 24).all()


@pytest.mark.parametrize("name", ["blocks16", "2:4", "fan_in", "uneven"])
def test_a_stack_of_layers_under_scan(name):
    mask, form, kind, _ = CASES[name]
    # Other places in the second layer; of blocks, fewer.
    masks = np.stack([mask, mask[:, ::-1]])
    masks[1, :, 16:] &= name != "blocks16"
    w = jnp.asarray(RNG.standard_normal((2, K, N)), jnp.float32)
    params, report = condense({"a": {"w": w}}, {"a": {"w": masks}}, stacked=["a/*"])
    leaf = params["a"]["w"]
    assert isinstance(leaf, kind) and report.leaves["a/w"].form == form
    kept = np.where(masks, w, 0)
    np.testing.assert_array_equal(jax.vmap(expand_condensed)(leaf), kept)
    x = jnp.asarray(RNG.standard_normal((5, K)), jnp.float32)
    _, y = jax.lax.scan(lambda x, leaf: (x, apply_condensed(x, leaf)), x, leaf)
    assert_close(y, np.float64(x) @ np.float64(kept), x @ kept)


def test_a_stray_entry_is_no_block():
    blocks = CASES["blocks16"][0]
    stray = blocks.copy()
    stray[40, 20] = True
    form = lambda mask, **kwargs: (
        condense({"w": jnp.ones(mask.shape)}, {"w": mask}, **kwargs)[1].leaves["w"].form
    )
    assert form(stray) == "masked dense"
    # Nor is a stack of blocks in which one layer has it.
    stack = np.stack([blocks, stray])
    assert form(stack, stacked=["w"]) == "masked dense"
    assert form(stack[:1], stacked=["w"]) == "blocks 16x16"


def test_other_ranks_stay_masked_dense():
    w = jnp.asarray(RNG.standard_normal((3, 3, 8, 8)), jnp.float32)
    mask = RNG.random(w.shape) < 0.5
    tree, report = condense([w], [mask])
    assert isinstance(tree[0], CondensedMasked)
    assert report.leaves["0"].why == "4 axes, not a weight [k, n]"
    np.testing.assert_array_equal(expand_condensed(tree[0]), np.where(mask, w, 0))


def test_masks_of_an_optimizer_and_a_whole_model():
    """As from ``get_masks``: MaskedNode where there is no mask; jit over the tree."""
    import optax

    params = {
        "up": {"kernel": jnp.ones((K, N)), "bias": jnp.zeros(N)},
        "down": {"kernel": jnp.ones((N, K)), "bias": jnp.zeros(K)},
    }
    tx = sj.transforms.sparsify(
        optax.sgd(0.1), sj.transforms.static(sparsity=0.75, key=jax.random.key(0))
    )
    masks = sj.transforms.get_masks(tx.init(params))
    tree, report = condense(params, masks)
    assert set(report.leaves) == {"up/kernel", "down/kernel"}

    @jax.jit
    def model(tree, x):
        for name in ("up", "down"):
            x = apply_condensed(x, tree[name]["kernel"]) + tree[name]["bias"]
        return x

    x = jnp.ones((2, K))
    kept = sj.masks.apply_masks(params, masks)
    want = x @ kept["up"]["kernel"] @ kept["down"]["kernel"]
    np.testing.assert_allclose(model(tree, x), want, rtol=1e-5)


def test_report_is_a_table():
    params = {"a": jnp.ones((K, N)), "long/name": jnp.ones((K, N))}
    masks = {"a": fan_in_mask(5), "long/name": UNEVEN}
    _, report = condense(params, masks, rows=1)
    counts = UNEVEN.sum(0)
    assert str(report).splitlines() == [
        "leaf       shape  density  form               dense faster  why",
        "a          48x32  0.1042   constant fan-in 5  no            "
        "every column keeps 5 of 48",
        f"long/name  48x32  {UNEVEN.mean():.4f}   masked dense       yes           "
        "no blocks of side 128/64/32/16/8, N:M of m 4/8/16/32, "
        f"columns keep {counts.min()} to {counts.max()}",
        "dense faster: at 1 row of x, by static rules",
    ]


def test_whether_dense_would_be_faster():
    """Follows the operators' rules: by density and by rows of x."""
    faster = lambda mask, rows: (
        condense({"w": jnp.ones(mask.shape)}, {"w": mask}, rows=rows)[1]
        .leaves["w"]
        .dense_is_faster
    )
    assert faster(fan_in_mask(4), 1) is False
    assert faster(fan_in_mask(44), 1) is True
    assert faster(np.ones((K, N), bool), 1) is False
    assert faster(CASES["columns"][0], 1) is False
    assert faster(UNEVEN, 1) is True
    # On a CPU selected for a few rows, else expanded and multiplied.
    whole = np.tile(NM[:32], (2, 1))
    assert faster(whole, 1) is False and faster(whole, 64) is True
    few, most = [(0, 0)], [(i, j) for i in range(6) for j in range(4)][1:]
    assert faster(blocks_of(8, few), 512) is False
    assert faster(blocks_of(8, most), 512) is True
    # Measured against dense: 1.12 and 0.60 at one row, 1.16 at 256.
    square = lambda fan_in: np.argsort(RNG.random((1024, 1024)), axis=0) < fan_in
    assert faster(square(205), 1) is None
    assert faster(square(102), 1) is False
    assert faster(square(205), 256) is True


def test_off_a_cpu_masked_dense_is_left_to_explain(monkeypatch):
    from sparsejax.layers import _condensed_choice

    monkeypatch.setattr(_condensed_choice, "current_platform", lambda: "tpu")
    _, report = condense({"w": jnp.ones((K, N))}, {"w": UNEVEN})
    assert report.leaves["w"].dense_is_faster is None
    assert "see explain" in str(report)
    _, report = condense({"w": jnp.ones((K, N))}, {"w": fan_in_mask(4)})
    assert report.leaves["w"].dense_is_faster is True


def test_a_reason_says_what_was_tried():
    # Blocks of 4, of which the default sides are multiples.
    mask = np.kron(RNG.random((12, 8)) < 0.4, np.ones((4, 4))).astype(bool)
    mask[:4, :], mask[4:8, :4] = True, False
    why = lambda mask, **options: (
        condense({"w": jnp.ones(mask.shape)}, {"w": mask}, **options)[1].leaves["w"].why
    )
    assert "no blocks of side 128/64/32/16/8, N:M of m 4/8/16/32, col" in why(mask)
    assert "no blocks of side 8, N:M of m (none tried), columns keep" in why(
        mask, block_sides=(8,), groups=()
    )
    assert "whole blocks are kept" in why(mask, block_sides=(4,))
    stack = {"stacked": ["w"], "block_sides": (16,)}
    assert "layers share no blocks of side 16, N:M of m 4/8/" in why(
        mask[None], **stack
    )


def test_a_stack_that_keeps_nothing():
    """It has no blocks of any side, and stores nothing."""
    masks, x = np.zeros((3, 24, 5), bool), jnp.ones((2, 24))
    form = lambda masks: condense(
        {"w": jnp.ones(masks.shape)}, {"w": masks}, stacked=["w"]
    )
    tree, report = form(masks)
    assert report.leaves["w"].form == "constant fan-in 0"
    assert report.leaves["w"].dense_is_faster is False
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == 0
    _, y = jax.lax.scan(
        lambda _, leaf: (None, apply_condensed(x, leaf)), None, tree["w"]
    )
    np.testing.assert_array_equal(y, np.zeros((3, 2, 5)))
    # Nor is a layer kept whole a block larger than itself.
    masks[1] = True
    assert form(masks)[1].leaves["w"].form == "blocks 16x16"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rows": 0}, "rows: got 0, needed a positive int"),
        ({"rows": -1}, "rows: got -1, needed a positive int"),
        ({"block_sides": (0,)}, r"block_sides: got \(0,\), needed positive ints"),
        ({"groups": (0,)}, r"groups: got \(0,\), needed ints in \[1, 256\]"),
        ({"groups": (4, 512)}, r"groups: got \(4, 512\), needed ints in \[1, 256\]"),
    ],
)
def test_sizes_that_cannot_be(options, message):
    mask = np.zeros((1024, 3), bool)
    mask[::64] = True  # 8 of every 512
    mask[0, 0], mask[1, 0] = False, True
    with pytest.raises(ValueError, match=message):
        condense({"w": jnp.ones(mask.shape)}, {"w": mask}, **options)


def test_errors_name_the_leaf():
    params = {"up": {"kernel": jnp.ones((4, 3))}}
    wrong = lambda mask: {"up": {"kernel": mask}}
    with pytest.raises(ValueError, match=r"got shape \(3, 4\) at 'up/kernel', needed"):
        condense(params, wrong(np.ones((3, 4), bool)))
    with pytest.raises(ValueError, match="got a mask at 'down', needed the paths of"):
        condense(params, {"down": np.ones((4, 3), bool)})
    with pytest.raises(ValueError, match="got float32 at 'up/kernel', needed bool"):
        condense(params, wrong(jnp.ones((4, 3))))
    with pytest.raises(ValueError, match="got a traced mask at 'up/kernel'"):
        jax.jit(lambda mask: condense(params, wrong(mask)))(np.ones((4, 3), bool))
    with pytest.raises(ValueError, match="stacked: every pattern must match a leaf"):
        condense(params, wrong(np.ones((4, 3), bool)), stacked=["layers/*"])
    tree, _ = condense(
        {"w": jnp.ones((K, N))}, {"w": without(np.ones((K, N), bool), (1,))}
    )
    with pytest.raises(ValueError, match=r"x: got shape \(2, 9\), needed \[\.\.\., 48"):
        apply_condensed(jnp.ones((2, 9)), tree["w"])
    with pytest.raises(ValueError, match="leaf: got dict, needed a weight"):
        apply_condensed(jnp.ones((2, 9)), {})
