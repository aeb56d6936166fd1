"""libtpu as a compiler for chips that are not there."""

import functools
import os

# Before jax starts a backend: it must neither look for a TPU nor ask about a host.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")

import jax
import pytest
from jax import numpy as jnp
from jax.experimental import topologies

from pallas_kernels.block_sparse_matmul import _spec, mosaic_tpu

TOPOLOGIES = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}


@functools.cache
def device(chip):
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=TOPOLOGIES[chip]
    )
    return topology.devices[0]


def compile_for(chip, fn, *shapes):
    """(text lowered to, compiled) of ``fn`` for one device of the chip."""
    sharding = jax.sharding.SingleDeviceSharding(device(chip))
    shapes = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes
    )
    lowered = jax.jit(fn).trace(*shapes).lower(lowering_platforms=("tpu",))
    return lowered.as_text(), lowered.compile()


def block_sparse(op, m, k, n, block_shape, slots, dtype, out_dtype=None, chip="v5e"):
    """(function, shapes) of one kernel of block_sparse_matmul, tiles for the chip."""
    bk, bn = block_shape
    problem = _spec.Problem(op, m, k, n, block_shape, slots, dtype, out_dtype or dtype)
    _spec.check_mosaic_tpu(problem, chip)
    config = _spec.config_mosaic_tpu(problem, chip)
    s = jax.ShapeDtypeStruct
    x, dy = s((m, k), dtype), s((m, n), dtype)
    blocks, index = s((slots, bk, bn), dtype), s((slots,), jnp.int32)
    if op == "sdd":
        fn = functools.partial(
            mosaic_tpu.sdd,
            block_shape=block_shape,
            dtype=jnp.dtype(problem.out_dtype),
            config=config,
        )
        return fn, (x, dy, index, index, s((), jnp.int32))
    fn = functools.partial(
        mosaic_tpu.dsd, transpose=op == "dsd_transposed", config=config
    )
    if op == "dsd":
        ptr = s((n // bn + 1,), jnp.int32)
        return lambda x, blocks, source, ptr: fn(x, blocks, None, source, ptr), (
            x,
            blocks,
            index,
            ptr,
        )
    return fn, (dy, blocks, index, index, s((k // bk + 1,), jnp.int32))


def by_hand(*values):
    """Parameters that .ci/compile leaves out."""
    return [pytest.param(value, marks=pytest.mark.exhaustive) for value in values]
