"""The automatic choice, lowered and compiled for chips that are not here."""

import os
import pathlib
import sys

import jax
import pytest
from jax import numpy as jnp

from sparsejax.layouts import BlockLayout
from sparsejax.ops import block_sparse_matmul

sys.path.append(str(pathlib.Path(__file__).parent))

KERNELS = [
    "block_sparse_matmul_dsd",
    "block_sparse_matmul_dsd_transposed",
    "block_sparse_matmul_sdd",
]
KIND = os.environ["SPARSEJAX_COMPILE"]


def case(dtype="bfloat16", block=(128, 128)):
    """Value and both gradients of the public operator; nothing named, nothing told."""
    layout = BlockLayout.random(jax.random.key(0), (1024, 2048), block, density=0.1)
    x = jax.ShapeDtypeStruct((512, 1024), dtype)
    blocks = jax.ShapeDtypeStruct(layout.blocks_shape, dtype)
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), layout)

    def run(x, blocks, layout):
        loss = lambda x, b: jnp.sum(
            jnp.square(block_sparse_matmul(x, b, layout).astype(jnp.float32))
        )
        return jax.value_and_grad(loss, (0, 1))(x, blocks)

    return run, (x, blocks, abstract)


if KIND == "tpu":
    import _tpu

    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    def test_v5e_takes_our_kernels_forward_and_backward(dtype):
        run, args = case(dtype)
        text, compiled = _tpu.compile_for("v5e", run, *args)
        for kernel in KERNELS:
            assert f'kernel_name = "{kernel}"' in text, kernel
        assert "tpu_custom_call" in compiled.as_text()

    def test_v5e_takes_xla_where_no_kernel_serves():
        run, args = case("float16")  # Mosaic has no float16 for TPU
        text, _ = _tpu.compile_for("v5e", run, *args)
        assert "tpu_custom_call" not in text

    def test_over_a_mesh_that_xla_partitions():
        """A Mosaic kernel cannot be cut by XLA: it takes its own product there."""
        from jax.experimental import topologies
        from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=_tpu.TOPOLOGIES["v5e"]
        )
        import numpy as np

        mesh = Mesh(np.array(topology.devices), ("data",), axis_types=(AxisType.Auto,))
        run, (x, *rest) = case()
        put = lambda a, *spec: jax.ShapeDtypeStruct(
            a.shape, a.dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec))
        )
        args = (put(x, "data"), *jax.tree.map(put, tuple(rest)))
        lowered = jax.jit(run).trace(*args).lower(lowering_platforms=("tpu",))
        assert "tpu_custom_call" not in lowered.as_text()
        lowered.compile()

        # Inside shard_map with default arguments the kernels are back.
        mapped = jax.shard_map(
            lambda x, b, l: jax.lax.psum(run(x, b, l)[0], "data"),
            mesh=mesh,
            in_specs=(PartitionSpec("data"), PartitionSpec(), PartitionSpec()),
            out_specs=PartitionSpec(),
        )
        lowered = jax.jit(mapped).trace(*args).lower(lowering_platforms=("tpu",))
        assert f'kernel_name = "{KERNELS[0]}"' in lowered.as_text()
        lowered.compile()

else:
    import _gpu

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_h200_takes_our_kernels_forward_and_backward(dtype):
        run, args = case(dtype)
        lowered, compiled = _gpu.compile_for("h200", run, args)
        text = lowered.as_text()
        for kernel in KERNELS:
            assert kernel in text, kernel
        assert "mosaic_gpu" in compiled.as_text()

    def test_h200_inside_shard_map():
        """With default arguments, so the kernels' outputs say over what they vary."""
        from jax.sharding import AbstractMesh, AxisType, PartitionSpec

        run, args = case()
        mesh = AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,))

        def mapped(x, b, l):
            device = jax.sharding.get_abstract_mesh().abstract_device
            return jax.shard_map(
                lambda x, b, l: jax.lax.psum(run(x, b, l)[0], "data"),
                mesh=mesh.update(abstract_device=device),
                in_specs=(PartitionSpec("data"), PartitionSpec(), PartitionSpec()),
                out_specs=PartitionSpec(),
            )(x, b, l)

        lowered, _ = _gpu.compile_for("h200", mapped, args)
        assert KERNELS[0] in lowered.as_text()

    @pytest.mark.parametrize("chip", ["a100", "b200"])
    def test_other_generations_take_xla_and_compile(chip):
        run, args = case()
        lowered, _ = _gpu.compile_for(chip, run, args)
        assert "mosaic_gpu" not in lowered.as_text()

    def test_h200_takes_xla_where_no_kernel_serves():
        run, args = case("float32")
        lowered, _ = _gpu.compile_for("h200", run, args)
        assert "mosaic_gpu" not in lowered.as_text()
