"""The main job's 124m preset for four v5e chips, by the TPU's own compiler.

Run where libtpu is installed, with SPARSEJAX_COMPILE=tpu. No TPU is needed.
"""

import dataclasses
import importlib
import os
import pathlib
import re
import sys

import jax
import numpy as np
import pytest

if os.environ.get("SPARSEJAX_COMPILE") != "tpu":
    pytest.skip("needs SPARSEJAX_COMPILE=tpu and libtpu", allow_module_level=True)

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples"))
pretrain_lm = importlib.import_module("pretrain_lm")

MEMORY = 16e9  # bytes of one v5e chip
KERNELS = {
    "train_step": {
        "block_sparse_matmul_dsd",
        "block_sparse_matmul_dsd_transposed",
        "block_sparse_matmul_sdd",
    },
    "topology_step": {"block_sparse_matmul_dsd", "block_sparse_matmul_dsd_transposed"},
}


@pytest.fixture(scope="module")
def devices():
    """The four chips of a v5e:2x2, described and not there."""
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    return np.array(topology.devices)


@pytest.mark.parametrize(
    ("axis", "program"),
    [("fsdp", "train_step"), ("fsdp", "topology_step"), ("data", "train_step")],
)
def test_compiles_for_four_v5e_and_fits(devices, axis, program):
    config = dataclasses.replace(pretrain_lm.PRESETS["124m"], ffn="block_sparse")
    programs = pretrain_lm.build(config, jax.sharding.Mesh(devices, (axis,)))
    traced = getattr(programs, program).trace(programs.state, programs.batch)
    compiled = traced.lower(lowering_platforms=("tpu",)).compile()

    calls = [line for line in compiled.as_text().splitlines() if "custom_call" in line]
    names = re.findall(r"/(block_sparse_matmul_\w+)", "\n".join(calls))
    assert set(names) == KERNELS[program]
    memory = compiled.memory_analysis()
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    used += memory.output_size_in_bytes - memory.alias_size_in_bytes
    print(f"{axis} {program}: {used / 1e9:.2f} GB of {MEMORY / 1e9:.0f} GB per chip")
    assert used < MEMORY
