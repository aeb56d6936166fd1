"""The heat map of expert load: what it shows, what it refuses."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.routing import plot_expert_load, routing_metrics, top_k


def shown(figure):
    return np.ma.getdata(figure.axes[0].images[0].get_array())


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def test_rows_are_relative_to_their_mean(tmp_path):
    loads = {"layer 0": jnp.array([6, 2, 0, 0]), "layer 3": jnp.array([1, 1, 1, 1])}
    figure = plot_expert_load(loads, rows="layer")
    np.testing.assert_allclose(shown(figure), [[3, 1, 0, 0], [1, 1, 1, 1]])
    axis = figure.axes[0]
    assert [t.get_text() for t in axis.get_yticklabels()] == list(loads)
    assert axis.get_ylabel() == "layer" and axis.get_xlabel() == "expert"
    assert len(axis.lines) == 2  # crosses: experts 2 and 3 of the first
    assert texts(figure)[:3] == ["3.00", "1.00", "max"]
    norm = axis.images[0].norm
    assert (norm.vmin, norm.vcenter, norm.vmax) == (0, 1, 3)
    figure.savefig(tmp_path / "load.png")
    assert (tmp_path / "load.png").stat().st_size > 5000


def test_a_row_without_tokens_is_grey():
    figure = plot_expert_load(jnp.array([[0, 0], [3, 1]]))
    assert np.isnan(shown(figure)[0]).all() and len(figure.axes[0].lines) == 0


def test_many_rows_and_experts_stay_readable(tmp_path):
    loads = np.random.default_rng(0).poisson(50, (200, 128))
    figure = plot_expert_load(loads, rows="step")
    axis = figure.axes[0]
    assert len(axis.get_yticks()) <= 24 and len(axis.get_xticks()) <= 24
    assert len(axis.texts) == 0
    figure.savefig(tmp_path / "load.png")


def test_metrics_can_be_drawn():
    metrics = routing_metrics(top_k(jnp.eye(3), 1))
    np.testing.assert_allclose(shown(plot_expert_load(metrics.load)), [[1, 1, 1]])


@pytest.mark.parametrize(
    "loads, message",
    [
        (jnp.zeros((2, 2, 2)), r"\[rows, experts\] to draw, got \(2, 2, 2\)"),
        (jnp.zeros((0, 4)), r"to draw, got \(0, 4\)"),
        ({}, "to draw, got"),
        ({"a": jnp.ones(2), "b": jnp.ones(3)}, r"equal numbers .*\(2,\), \(3,\)"),
        (jnp.array([1.0, -1.0]), "finite and not negative"),
        (jnp.array([1.0, jnp.nan]), "finite and not negative"),
    ],
)
def test_bad_loads_are_refused(loads, message):
    with pytest.raises(ValueError, match=message):
        plot_expert_load(loads)


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"sparsejax\[plot\]"):
        plot_expert_load(jnp.ones(2))
