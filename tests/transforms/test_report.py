"""The report against counts made by hand, and the pictures against their data."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sparsejax import masks as masks_lib
from sparsejax import transforms

#        outputs:  0  1  2  3
KEPT = jnp.array([[1, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 1]], bool)


def state_with(params, masks, leaf_filter=None, **others):
    """State of `sparsify` that holds these masks."""
    tx = transforms.sparsify(
        optax.adam(0.1),
        transforms.gradual_magnitude(sparsity=0.5, end=0),
        leaf_filter=leaf_filter,
    )
    state = tx.init(params)
    return state._replace(
        masks=jax.tree_util.tree_map_with_path(
            lambda path, old: masks.get(masks_lib.path_name(path), old), state.masks
        ),
        **others,
    )


def test_by_hand():
    params = {
        "w": jnp.zeros((3, 4)),  # grown weights are zero, and kept
        "head": jnp.ones((4, 2)),  # dense, a product
        "bias": jnp.ones(5),  # dense, none
        "embedding": jnp.ones((7, 3)),  # a lookup
    }
    state = state_with(params, {"w": KEPT}, "w")
    found = transforms.report(state, params)
    # 3 of 12 kept: 2 * 3 forward, 2 * 3 dx + 2 * 3 dW; dense 2 * 12 and 4 * 12.
    # Input 1 has no kept weight, nor have outputs 1 and 2.
    row = transforms.ReportRow(3, 12, 6, 12, 24, 48, 1, 3, 2, 4)
    assert found.leaves == {"w": row} and found.masked == row
    assert row.density == found.masked.density == 0.25
    # And the head's 8, the bias's 5, the embedding's 21; products: 2 * 8 and 4 * 8.
    assert found.model == (37, 46, 6 + 16, 12 + 32, 24 + 16, 48 + 32, 1, 3, 2, 4)
    assert found.skipped_updates == 0

    # dW dense: 2 * 3 + 2 * 12; at a quarter of the steps: 2 * 3 + 2 * (3 + 9 / 4).
    for share, backward in ((1.0, 30), (0.25, 16.5)):
        found = transforms.report(state, params, dense_gradients=share)
        assert found.masked.backward_flops == backward
        # The head is dense already.
        assert found.model.backward_flops == backward + 32


def test_counts_are_exact_integers():
    # 2 * (2**25 + 1) is no float32.
    params = {"w": jnp.zeros((2, 2**24 + 1), jnp.bfloat16)}
    mask = jnp.ones((2, 2**24 + 1), bool).at[1, 0].set(False)
    found = transforms.report(state_with(params, {"w": mask}), params)
    assert found.masked[:4] == (33554433, 33554434, 67108866, 134217732)
    assert all(type(number) is int for number in found.masked)


def test_stacked_axes_and_windows():
    # Two layers of (2, 2): in the first everything is kept, in the second w[0, 0].
    stack = jnp.array([[[1, 1], [1, 1]], [[1, 0], [0, 0]]], bool)
    params = {"w": jnp.ones((2, 2, 2))}
    state = state_with(params, {"w": stack})
    declared = {"w": masks_lib.Axes(stacked=(0,), fan_in=(1,), fan_out=(2,))}
    dead = lambda **axes: transforms.report(state, params, **axes).masked[-4:]
    assert dead(axes=declared) == (1, 4, 1, 4)
    # Undeclared the first axis is a window: any position of it keeps a neuron alive.
    assert dead() == (0, 2, 0, 2)
    # Turned over: (out, in), by negative axes.
    turned = {"*": masks_lib.Axes(fan_in=(-1,), fan_out=(-2,), stacked=(0,))}
    state = state_with(params, {"w": stack.at[0, 1].set(False)})
    assert dead(axes=turned) == (1, 4, 2, 4)


def test_rank_one_is_counted_and_multiplies_nothing():
    params = {"scale": jnp.ones(4)}
    mask = jnp.array([True, False, False, False])
    state = state_with(params, {"scale": mask}, "scale")
    found = transforms.report(state, params)
    assert found.masked == found.model == (1, 4, 0, 0, 0, 0, 0, 0, 0, 0)
    assert "-" in str(found).splitlines()[1]


def test_an_nnx_model_inside_wrappers():
    params = nnx.state(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Param)
    sparse = transforms.sparsify(
        optax.adam(0.1), transforms.gradual_magnitude(sparsity=0.75, end=0)
    )
    tx = optax.MultiSteps(optax.chain(optax.clip(1.0), sparse), 1)
    with jax.numpy_dtype_promotion("standard"):
        state = tx.init(params)
        _, state = tx.update(params, state, params)
    found = transforms.report(state, params)
    assert list(found.leaves) == ["kernel"] and found.masked.density == 0.25
    assert found.model.size == 16


def test_table():
    params = {"up": jnp.ones((3, 4)), "bias": jnp.ones(4)}
    state = state_with(params, {"up": KEPT}, skipped_updates=jnp.int32(2))
    table = str(transforms.report(state, params, dense_gradients=0.01)).splitlines()
    assert [line.split() for line in table[1:4]] == [
        # backward: 6 + 2 * (3 + 0.09) = 12.18; 12.18 / 48
        "up 3 12 0.2500 6 0.2500 12 0.2537 1 of 3 2 of 4".split(),
        "all masked leaves 3 12 0.2500 6 0.2500 12 0.2537 1 of 3 2 of 4".split(),
        "whole model 7 16 0.4375 6 0.2500 12 0.2537".split(),
    ]
    assert table[4].endswith("dense gradients at 1.00% of the steps")
    assert table[5].startswith("2 mask updates were skipped")
    # Columns stand below each other.
    assert len({line.index("0.2500") for line in table[1:3]}) == 1


@pytest.mark.parametrize(
    ("params", "more", "message"),
    [
        ({"v": jnp.ones((3, 4))}, {}, r"shape \(3, 4\) at 'w'.*got nothing"),
        ({"w": jnp.ones((4, 3))}, {}, r"shape \(3, 4\) at 'w'.*got \(4, 3\)"),
        (None, {"dense_gradients": 1.5}, r"dense_gradients must be in \[0, 1\]"),
        (None, {"axes": {"v": masks_lib.Axes()}}, "axes: every pattern must match"),
        (
            None,
            {"axes": {"w": masks_lib.Axes(stacked=(0,))}},
            r"axes must name different axes of shape \(3, 4\)",
        ),
    ],
)
def test_refusals(params, more, message):
    right = {"w": jnp.ones((3, 4))}
    state = state_with(right, {"w": KEPT})
    with pytest.raises(ValueError, match=message):
        transforms.report(state, params or right, **more)


def test_a_state_without_masks_is_refused():
    with pytest.raises(ValueError, match="must contain a SparsifyState"):
        transforms.report(optax.adam(0.1).init({"w": jnp.ones(2)}), {"w": jnp.ones(2)})


# ---- change of masks ---------------------------------------------------------------


def row(text):
    return jnp.array([[c == "x" for c in text]])


def test_mask_change_by_hand():
    before = {"moves": row("xxxx......"), "shrinks": row("xxxxx"), "none": row("..")}
    after = {"moves": row(".xxxx....."), "shrinks": row("xx..."), "none": row("..")}
    # 3 of 4 stay; 2 of 5 stay; and 5 of 9 in all.
    want = {"moves": 1 / 4, "shrinks": 3 / 5, "none": 0.0, "all masked leaves": 4 / 9}
    assert transforms.mask_change(before, after) == pytest.approx(want)
    # Growing is as much of a change as shrinking.
    assert transforms.mask_change(after, before) == pytest.approx(want)
    assert transforms.mask_change({}, {}) == {"all masked leaves": 0.0}
    with pytest.raises(ValueError, match="equal leaves"):
        transforms.mask_change({"w": row("x.")}, {"w": row("x..")})


def lines_of(axis):
    return {line.get_label(): line for line in axis.lines}


def test_plot_of_change():
    snapshots = {  # out of order: steps are sorted
        30: {"w": row("..xx"), "optax": optax.MaskedNode()},
        0: {"w": row("xx.."), "optax": optax.MaskedNode()},
        10: {"w": row(".xx."), "optax": optax.MaskedNode()},
    }
    figure = transforms.plot_mask_change(snapshots)
    before, first = figure.axes
    for name in ("w", "all masked leaves"):
        line = lines_of(before)[name]
        assert line.get_xdata().tolist() == [10, 30]
        assert line.get_ydata().tolist() == [0.5, 0.5]
        line = lines_of(first)[name]
        assert line.get_xdata().tolist() == [0, 10, 30]
        assert line.get_ydata().tolist() == [0.0, 0.5, 1.0]
    with pytest.raises(ValueError, match="snapshots must be at least two, got 1"):
        transforms.plot_mask_change({0: snapshots[0]})


def test_plot_of_many_layers_is_ordered_by_number(tmp_path):
    masks = {f"layer_{i}": row("x" + "." * (1 + i)) for i in (10, *range(10))}
    figure = transforms.plot_mask_change({0: masks, 1: masks})
    figure.savefig(tmp_path / "change.png")
    # Nine lines or more have no names, but colours that go from dark to light.
    assert len(figure.axes[0].lines) == 12
    assert [text.get_text() for text in figure.legends[0].texts] == [
        "all masked leaves"
    ]
    params = {k: jnp.ones(m.shape) for k, m in masks.items()}
    figure = transforms.plot_density(
        transforms.report(state_with(params, masks), params)
    )
    figure.savefig(tmp_path / "density.png")
    (axis,) = figure.axes
    labels = [label.get_text() for label in axis.get_yticklabels()]
    ticks = dict(zip(axis.get_yticks().tolist(), labels, strict=True))
    assert [ticks[-i] for i in range(11)] == [f"layer_{i}" for i in range(11)]
    # Dots are at their own names: layer i keeps 1 of 2 + i.
    dots = [line for line in axis.lines if line.get_marker() == "o"]
    x, y = dots[0].get_data()
    for at, to in zip(x, y, strict=True):
        assert at == 1 / (2 - round(to))
    assert axis.get_xscale() == "log"


def test_plot_of_several_reports():
    params = {"w": jnp.ones((3, 4)), "v": jnp.ones((3, 4))}
    one = transforms.report(state_with(params, {"w": KEPT, "v": ~KEPT}), params)
    two = transforms.report(state_with(params, {"w": KEPT}, "w"), params)
    figure = transforms.plot_density({"one": one, "two": two})
    (axis,) = figure.axes
    assert [text.get_text() for text in figure.legends[0].texts] == ["one", "two"]
    np.testing.assert_array_equal(lines_of(axis)["two"].get_xdata(), [0.25])
    assert sorted(lines_of(axis)["one"].get_xdata()) == [0.25, 0.75]
    assert axis.get_xscale() == "linear" and axis.get_xlim()[0] == 0
    with pytest.raises(ValueError, match="must hold a masked leaf"):
        transforms.plot_density({})


def test_matplotlib_is_loaded_by_plots_alone_and_named_where_missing():
    program = """
import sys
from sparsejax import transforms
assert not any(name.startswith("matplotlib") for name in sys.modules)
sys.modules["matplotlib"] = None  # as where it is not installed
for plot in (transforms.plot_density, transforms.plot_mask_change):
    try:
        plot({})
    except ImportError as error:
        print(error)
"""
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert out.stdout.count("pip install 'sparsejax[plot]'") == 2
