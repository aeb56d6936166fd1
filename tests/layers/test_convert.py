"""A whole tree between dense, masked and block form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparsejax as sj
from sparsejax.layers import convert


def model():
    spec = sj.layers.BlockSparseLinearSpec(
        in_features=40, out_features=48, block_shape=(8, 16), sparsity=0.5
    )
    params, topology = sj.layers.init_block_sparse_linear(jax.random.key(0), spec)
    stacked = [
        sj.layers.init_block_sparse_linear(jax.random.key(i), spec) for i in (1, 2)
    ]
    stack_params, stack_topology = jax.tree.map(lambda *a: jnp.stack(a), *stacked)
    params = {"up": params, "layers": {"down": stack_params}, "norm": jnp.ones(3)}
    topology = {"up": topology, "layers": {"down": stack_topology}}
    return spec, params, topology


def test_round_trip_through_every_form():
    spec, params, topology = model()
    masked, masks = convert(params, topology, to="masked")
    dense, nothing = convert(masked, masks, to="dense")
    assert nothing == {}
    assert dense["up"]["kernel"].shape == (40, 48)
    assert dense["layers"]["down"]["kernel"].shape == (2, 40, 48)
    assert masks["up"]["kernel_mask"].dtype == jnp.bool_
    back, layouts = convert(masked, masks, to="block", block_shape=(8, 16))
    same = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)
    same(back, params)
    same(layouts["up"]["kernel_layout"], topology["up"]["kernel_layout"])
    # Also from the dense form, with the layouts at hand; and in place.
    same(convert(dense, topology, to="block")[0], params)
    same(convert(params, topology, to="block"), (params, topology))
    same(convert(dense, topology, to="masked"), (masked, masks))


def test_a_layer_computes_the_same_in_every_form():
    spec, params, topology = model()
    x = jax.random.normal(jax.random.key(3), (5, 40))
    y = sj.layers.apply_block_sparse_linear(
        spec, params["up"], topology["up"]["kernel_layout"], x
    )
    masked, masks = convert(params["up"], topology["up"], to="masked")
    masked_spec = sj.layers.MaskedLinearSpec(in_features=40, out_features=48)
    y_masked = sj.layers.apply_masked_linear(
        masked_spec, masked, masks["kernel_mask"], x
    )
    np.testing.assert_allclose(y_masked, y, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        x @ masked["kernel"] + masked["bias"], y, rtol=1e-5, atol=1e-5
    )


def test_a_mask_that_is_not_of_blocks_keeps_its_zeros():
    """Blocks with any kept entry are stored; what was pruned inside them is zero."""
    mask = jnp.zeros((16, 16), bool).at[0, 0].set(True).at[9, 3].set(True)
    params, layouts = convert(
        {"kernel": jnp.ones((16, 16))},
        {"kernel_mask": mask},
        to="block",
        block_shape=(8, 8),
    )
    assert params["kernel"].shape == (2, 8, 8)
    dense, _ = convert(params, layouts, to="dense")
    np.testing.assert_array_equal(dense["kernel"], mask.astype(jnp.float32))


def test_errors():
    _, params, topology = model()
    with pytest.raises(ValueError, match="to: got 'csr', needed"):
        convert(params, topology, to="csr")
    with pytest.raises(
        ValueError, match=r"topology: \['down'\] belong to no parameter"
    ):
        convert(params, {"down": topology["up"]}, to="dense")
    masked, masks = convert(params, topology, to="masked")
    with pytest.raises(ValueError, match="block_shape: got None, needed"):
        convert(masked, masks, to="block")
    with pytest.raises(ValueError, match=r"kernel: got shape \(3, 3\), needed"):
        convert({"kernel": jnp.ones((3, 3))}, topology["up"], to="dense")
