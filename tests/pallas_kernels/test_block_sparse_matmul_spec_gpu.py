"""What the Hopper kernels refuse, their tiles, and what tracing alone can show."""

import dataclasses
import itertools
import math
import re

import jax
import pytest
from jax import numpy as jnp
from jax.sharding import PartitionSpec

from pallas_kernels.block_sparse_matmul import _spec, mosaic_gpu

GOOD = _spec.Problem(
    op="dsd",
    m=4096,
    k=4096,
    n=4096,
    block_shape=(128, 128),
    slots=102,
    dtype="bfloat16",
    out_dtype="bfloat16",
)

REFUSED = [
    (
        dict(block_shape=(8, 16), k=4096),
        "h200",
        "block_shape has bk=8, needs a multiple of 16 from 16 to 256",
    ),
    (
        dict(block_shape=(16, 24), n=24 * 4),
        "h200",
        "block_shape has bn=24, needs a multiple of 16 from 16 to 256",
    ),
    (
        dict(block_shape=(512, 128)),
        "h200",
        "block_shape has bk=512, needs a multiple of 16 from 16 to 256",
    ),
    (
        dict(dtype="float32", out_dtype="float32"),
        "h200",
        "dtype is float32, needs bfloat16 or float16",
    ),
    (
        dict(out_dtype="float32"),
        "h200",
        "out_dtype is float32 for dsd, needs bfloat16",
    ),
    (
        dict(op="dsd_transposed", dtype="float16"),
        "h200",
        "out_dtype is bfloat16 for dsd_transposed, needs float16",
    ),
    (
        dict(op="sdd", dtype="float16"),
        "h200",
        "out_dtype is bfloat16 for sdd, needs float16 or float32",
    ),
    (dict(m=0), "h200", "m is 0, needs at least 1"),
    ({}, "a100", "chip is a100, needs a Hopper GPU (h100, h200)"),
    ({}, "b200", "chip is b200, needs a Hopper GPU (h100, h200)"),
]


@pytest.mark.parametrize(("changes", "chip", "needs"), REFUSED, ids=lambda p: str(p))
def test_refuses(changes, chip, needs):
    problem = dataclasses.replace(GOOD, **changes)
    with pytest.raises(NotImplementedError, match=re.escape(f"mosaic_gpu: {needs}")):
        _spec.check_mosaic_gpu(problem, chip)


SIDES = range(16, 257, 16)


@pytest.mark.parametrize("op", ["dsd", "dsd_transposed", "sdd"])
@pytest.mark.parametrize("m", [1, 100, 8192])
def test_every_block_gets_tiles_that_fit(op, m):
    for bk, bn, slots in itertools.product(SIDES, SIDES, [1, 64, 512]):
        out_dtype = "float32" if op == "sdd" else "bfloat16"
        problem = _spec.Problem(
            op, m, 8 * bk, 8 * bn, (bk, bn), slots, "bfloat16", out_dtype
        )
        for chip in None, "h100", "h200":
            _spec.check_mosaic_gpu(problem, chip)
        config = _spec.config_mosaic_gpu(problem, None)
        side_in, side_out = (bk, bn) if op == "dsd" else (bn, bk)
        if op == "sdd":
            side_out = bn
        else:
            assert side_in % config.tile_k == 0
        assert config.tile_k % 16 == 0
        # wgmma's rows, and what a warpgroup can hold in registers.
        rows = config.tile_m // config.warpgroups
        assert rows % 64 == 0 and rows * side_out <= 192 * 128
        stage = 2 * config.unroll * config.tile_k * (config.tile_m + side_out)
        out = 0
        if config.warpgroups == 2:  # its buffer lies beside the stages
            itemsize = 4 if op == "sdd" else 2
            out = config.tile_m * math.gcd(side_out * itemsize, 128)
        assert config.stages >= 2
        assert config.stages * stage + out + 1024 <= 227 * 1024


def _calls():
    """Name of a kernel -> the call and the shapes of its arguments."""

    def config(op):
        return _spec.config_mosaic_gpu(dataclasses.replace(GOOD, op=op), None)

    def array(*shape, dtype="bfloat16"):
        return jax.ShapeDtypeStruct(shape, dtype)

    entries, ptr = array(7, dtype="int32"), array(5, dtype="int32")
    x, blocks = array(256, 512), array(7, 128, 128)

    def forward(x, blocks, source, ptr):
        return mosaic_gpu.dsd(
            x, blocks, None, source, ptr, transpose=False, config=config("dsd")
        )

    def transposed(x, blocks, order, source, ptr):
        chosen = config("dsd_transposed")
        return mosaic_gpu.dsd(
            x, blocks, order, source, ptr, transpose=True, config=chosen
        )

    def sampled(x, dy, rows, cols, count):
        return mosaic_gpu.sdd(
            x,
            dy,
            rows,
            cols,
            count,
            block_shape=(128, 128),
            dtype=jnp.float32,
            config=config("sdd"),
        )

    count = array(dtype="int32")
    return {
        "block_sparse_matmul_dsd": (forward, (x, blocks, entries, ptr)),
        "block_sparse_matmul_dsd_transposed": (
            transposed,
            (x, blocks, entries, entries, ptr),
        ),
        "block_sparse_matmul_sdd": (sampled, (x, x, entries, entries, count)),
    }


@pytest.mark.parametrize("name", _calls())
def test_lowering_shows_the_name(name):
    call, args = _calls()[name]
    text = jax.jit(call).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert name in text


@pytest.mark.parametrize("name", _calls())
def test_output_varies_over_the_axes_of_the_inputs(name):
    call, args = _calls()[name]
    mesh = jax.make_mesh(
        (4,),
        ("data",),
        axis_types=(jax.sharding.AxisType.Auto,),
        devices=jax.devices("cpu")[:4],
    )
    split, same = PartitionSpec("data"), PartitionSpec()
    # x differs between devices; for dW so does dy.
    specs = [split if a.shape == (256, 512) else same for a in args]

    def mapped(out):
        return jax.shard_map(call, mesh=mesh, in_specs=tuple(specs), out_specs=out)

    whole = jax.eval_shape(mapped(split), *args)
    assert whole.shape == ((256, 512) if "dsd" in name else (4 * 7, 128, 128))
    with pytest.raises(ValueError, match="replicat"):
        jax.eval_shape(mapped(same), *args)
