"""Densities per leaf: totals, caps, and the meaning of axes."""

import math

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax.masks import Axes, erdos_renyi, exact_count, uniform

MODEL = {"a": (768, 3072), "b": (3072, 768), "head": (768, 1000), "conv": (3, 3, 8, 16)}


def total(shapes, densities):
    sizes = {k: math.prod(s) for k, s in shapes.items()}
    return sum(densities[k] * n for k, n in sizes.items()) / sum(sizes.values())


def test_uniform_is_the_same_everywhere():
    assert uniform(MODEL, 0.1) == dict.fromkeys(MODEL, 0.1)


def test_erdos_renyi_by_hand():
    # eps (10 + 20) + eps (20 + 5) = 0.2 * (200 + 100): eps = 60 / 55.
    got = erdos_renyi({"x": (10, 20), "y": (20, 5)}, 0.2)
    assert got["x"] == pytest.approx(60 / 55 * 30 / 200)
    assert got["y"] == pytest.approx(60 / 55 * 25 / 100)


def test_erdos_renyi_caps_at_dense_and_gives_the_rest_away():
    # Uncapped, y would need 10.4 * 6 / 8 > 1; x then carries 0.5 * 408 - 8 alone.
    got = erdos_renyi({"x": (20, 20), "y": (2, 4)}, 0.5)
    assert got["y"] == 1.0
    assert got["x"] == pytest.approx((0.5 * 408 - 8) / 400)


@settings(max_examples=100, deadline=None)
@given(
    shapes=st.lists(
        st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=8
    ),
    density=st.floats(0, 1),
)
def test_erdos_renyi_total_is_the_density_asked_for(shapes, density):
    shapes = dict(enumerate(shapes))
    got = erdos_renyi(shapes, density)
    assert all(0 <= d <= 1 + 1e-9 for d in got.values())
    assert total(shapes, got) == pytest.approx(density, abs=1e-9)


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_erdos_renyi_at_the_ends(density):
    assert set(erdos_renyi(MODEL, density).values()) == {density}


def test_stacked_layers_count_as_separate_layers():
    # By raw shapes the head would come out dense beside a stack of twelve.
    apart = {f"layer{i}": (768, 3072) for i in range(12)} | {"head": (768, 1000)}
    stacked = {"layers": (12, 768, 3072), "head": (768, 1000)}
    axes = {"layers": Axes(stacked=(0,), fan_in=(1,), fan_out=(2,))}
    one, other = erdos_renyi(apart, 0.1), erdos_renyi(stacked, 0.1, axes=axes)
    assert other["layers"] == pytest.approx(one["layer3"])
    assert other["head"] == pytest.approx(one["head"])


def test_head_axes_count_as_one_fan():
    flat = {"q": (768, 768), "up": (768, 3072)}
    heads = {"q": jax.ShapeDtypeStruct((768, 12, 64), jnp.float32), "up": (768, 3072)}
    axes = {"*q": Axes(fan_in=(0,), fan_out=(1, 2))}
    assert erdos_renyi(heads, 0.1, axes=axes) == erdos_renyi(flat, 0.1)


def test_exact_count_is_exact_and_rounds_half_to_even():
    assert exact_count(0.1, 2**26 + 1024) == 6_710_989
    assert [exact_count(0.1, n) for n in (5, 15, 25)] == [0, 2, 2]
    assert exact_count(1.0, 7) == 7 and exact_count(0.0, 7) == 0


@pytest.mark.parametrize("density", [-0.1, 1.5, float("nan")])
@pytest.mark.parametrize("fn", [uniform, erdos_renyi, lambda _, d: exact_count(d, 3)])
def test_density_out_of_range(fn, density):
    with pytest.raises(ValueError, match=r"density must be in \[0, 1\], got"):
        fn(MODEL, density)


@pytest.mark.parametrize(
    "shapes, axes, message",
    [
        ({"a": (4, 4)}, {"b": Axes()}, "axes: every pattern must match.*'b'"),
        ({"a": (4,)}, None, r"rank 2 or more, got \(4,\) for leaf 'a'"),
        ({"a": (4, 4)}, {"a": Axes(stacked=(2,))}, "axes must name different axes"),
        ({"a": (4, 4)}, {"a": Axes(stacked=(0,))}, "axes must name different axes"),
    ],
)
def test_erdos_renyi_refuses(shapes, axes, message):
    with pytest.raises(ValueError, match=message):
        erdos_renyi(shapes, 0.5, axes=axes)
