"""Pictures of masks and heads: what they show, what they refuse."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import attention as at


def shown(figure):
    """What is in the panels that have pictures, but for colour bars."""
    return [np.ma.getdata(a.images[0].get_array()) for a in figure.axes if a.images]


def test_blocks_are_empty_partial_or_full(tmp_path):
    """Causal, four blocks of two: the diagonal in part, what is below it in full."""
    heads = at.per_head([at.everything(), at.sliding_window(3)])
    mask = at.block_mask(heads & at.causal(), 8, 8, block_shape=(2, 2))
    figure = at.plot_block_mask(mask)
    first, second = shown(figure)
    np.testing.assert_array_equal(
        first, [[1, 0, 0, 0], [2, 1, 0, 0], [2, 2, 1, 0], [2, 2, 2, 1]]
    )
    np.testing.assert_array_equal(
        second, [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    )
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["head 0: 62.5%", "head 1: 43.8%"]
    figure.savefig(tmp_path / "mask.png")
    assert (tmp_path / "mask.png").stat().st_size > 5000


def test_one_panel_where_heads_are_alike():
    blocks = jnp.array([[[[True, False]]], [[[True, True]]]])
    mask = at.BlockMask.from_blocks(blocks, shape=(4, 8), block_shape=(4, 4))
    figure = at.plot_block_mask(mask, batch=1)
    np.testing.assert_array_equal(shown(figure), [[[2, 2]]])
    assert figure.axes[0].get_title() == "all heads: 100.0%"
    assert figure.get_supxlabel() == "block of 4 keys"
    with pytest.raises(ValueError, match="batch: got 2, needed one of the 2 entries"):
        at.plot_block_mask(mask, batch=2)
    many = at.per_head([at.sliding_window(w) for w in range(1, 21)])
    figure = at.plot_block_mask(at.block_mask(many, 4, 4, block_shape=(2, 2)))
    assert len(shown(figure)) == 16


def stats(density, recall):
    density = jnp.asarray(density)
    return at.BlockStats(density, jnp.asarray(recall), jnp.zeros((1, 1)), density)


def test_heads_of_layers(tmp_path):
    layers = {
        "layer 0": stats([[0.25, 0.5], [0.75, 0.5]], [[1.0, 0.75], [0.5, 0.25]]),
        "layer 7": stats([[0.0, 1.0]], [[0.5, jnp.nan]]),
    }
    figure = at.plot_heads(layers)
    density, recall = shown(figure)[:2]
    np.testing.assert_allclose(density, [[0.5, 0.5], [0, 1]])
    np.testing.assert_allclose(recall, [[0.75, 0.5], [0.5, np.nan]])
    left, right = figure.axes[:2]
    assert [t.get_text() for t in left.get_yticklabels()] == list(layers)
    assert left.get_title() == "density, mean 50.0%"
    assert right.get_title() == "recall, mean 58.3%"  # (0.75 + 0.5 + 0.5) / 3
    assert [t.get_text() for t in left.texts] == ["50", "50", "0", "100"]
    figure.savefig(tmp_path / "heads.png")
    one = at.plot_heads(layers["layer 7"], rows="step")
    assert shown(one)[0].shape == (1, 2) and one.axes[0].get_ylabel() == "step"


def test_many_layers_and_heads_stay_readable(tmp_path):
    table = np.random.default_rng(0).random((1, 64)).astype(np.float32)
    figure = at.plot_heads([stats(table, table)] * 80)
    left = figure.axes[0]
    assert len(left.get_xticks()) <= 24 and len(left.get_yticks()) <= 24
    assert not left.texts
    figure.savefig(tmp_path / "heads.png")


@pytest.mark.parametrize(
    "layers",
    [
        [],
        [
            stats(np.ones((1, 2)), np.ones((1, 2))),
            stats(np.ones((1, 3)), np.ones((1, 3))),
        ],
        [stats(np.ones((1, 0)), np.ones((1, 0)))],
    ],
)
def test_bad_stats_are_refused(layers):
    with pytest.raises(ValueError, match="equal heads for at least one layer"):
        at.plot_heads(layers)


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"sparsejax\[plot\]"):
        at.plot_heads([stats(np.ones((1, 2)), np.ones((1, 2)))])
