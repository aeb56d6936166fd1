"""apply_masks and the density report."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sparsejax.masks import apply_masks, density, named_leaves


def test_apply_zeroes_nan_and_keeps_dtype():
    params = {"w": jnp.array([jnp.nan, 2.0, jnp.inf], jnp.bfloat16), "b": jnp.ones(2)}
    masks = {"w": jnp.array([False, True, False]), "b": optax.MaskedNode()}
    out = apply_masks(params, masks)
    assert out["w"].dtype == jnp.bfloat16
    assert out["w"].tolist() == [0.0, 2.0, 0.0]
    assert out["b"] is params["b"]


def test_apply_on_an_nnx_state_with_masks_in_a_plain_dict():
    state = nnx.state(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Param)
    assert set(named_leaves(state)) == {"kernel", "bias"}
    out = apply_masks(state, {"kernel": jnp.zeros((3, 2), bool)})
    np.testing.assert_array_equal(out["kernel"][...], np.zeros((3, 2)))


@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.uint8])
def test_masks_of_numbers_are_refused(dtype):
    with pytest.raises(ValueError, match="masks must be boolean, got .* at 'w'"):
        apply_masks({"w": jnp.ones((2, 2))}, {"w": np.ones((2, 2), dtype)})


def test_leaves_of_one_name_are_refused():
    """Keys with slashes, as Haiku's: one of the two would go unnoticed."""
    tree = {"a/x": jnp.ones(2), "a": {"x": jnp.ones(3)}}
    with pytest.raises(ValueError, match="a name of its own, got two 'a/x'"):
        named_leaves(tree)


@pytest.mark.parametrize(
    "masks, message",
    [
        ({"v": jnp.ones(3, bool)}, "a mask at 'v'"),
        ({"w": jnp.ones(4, bool)}, r"got \(4,\) for \(3,\) at 'w'"),
    ],
)
def test_apply_refuses(masks, message):
    with pytest.raises(ValueError, match=message):
        apply_masks({"w": jnp.ones(3)}, masks)


def test_density_counts_masks_not_zeros():
    masks = {"a": jnp.eye(4, dtype=bool), "b": None, "s": jnp.array(True)}
    report = density(
        masks, {"a": jnp.zeros((4, 4)), "b": jnp.ones(17), "s": jnp.ones(())}
    )
    assert report.leaves == {"a": (4, 16), "s": (1, 1)}
    assert float(report) == report.prunable == 5 / 17
    assert report.model == (34 - 17 + 5) / 34
    assert "all masked leaves" in str(report) and "whole model" in str(report)


def test_density_of_no_masks():
    assert density({}).prunable == 1.0 and density({}, {}).model == 1.0
