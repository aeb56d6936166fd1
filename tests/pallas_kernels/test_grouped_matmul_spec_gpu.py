"""What the grouped Hopper kernels refuse, their tiles, and what tracing alone shows."""

import dataclasses
import functools
import re

import jax
import pytest
from jax.sharding import PartitionSpec

from pallas_kernels.grouped_matmul import _spec, mosaic_gpu

GOOD = _spec.Problem(
    op="grouped",
    m=8192,
    k=4096,
    n=4096,
    groups=8,
    dtype="bfloat16",
    out_dtype="bfloat16",
)
F16 = dict(dtype="float16")
TRANSPOSED = dict(op="grouped_transposed")
SAMPLED = dict(op="grouped_sampled")

REFUSED = [
    (
        dict(dtype="float32", out_dtype="float32"),
        "h200",
        "dtype is float32, needs bfloat16 or float16",
    ),
    (
        dict(out_dtype="float32"),
        "h200",
        "out_dtype is float32 for grouped, needs bfloat16",
    ),
    (
        TRANSPOSED | F16,
        "h200",
        "out_dtype is bfloat16 for grouped_transposed, needs float16",
    ),
    (
        SAMPLED | F16,
        "h200",
        "out_dtype is bfloat16 for grouped_sampled, needs float16 or float32",
    ),
    (dict(m=0), "h200", "m is 0, needs at least 1"),
    (dict(groups=0), "h200", "groups is 0, needs at least 1"),
    (dict(k=96), "h200", "k is 96, needs a multiple of 64"),
    (dict(n=32), "h200", "n is 32, needs a multiple of 64"),
    (SAMPLED | dict(n=0), "h200", "n is 0, needs a multiple of 64"),
    ({}, "a100", "chip is a100, needs a Hopper GPU (h100, h200)"),
    ({}, "b200", "chip is b200, needs a Hopper GPU (h100, h200)"),
]


@pytest.mark.parametrize(("changes", "chip", "needs"), REFUSED, ids=lambda p: str(p))
def test_refuses(changes, chip, needs):
    problem = dataclasses.replace(GOOD, **changes)
    with pytest.raises(NotImplementedError, match=re.escape(f"mosaic_gpu: {needs}")):
        _spec.check_mosaic_gpu(problem, chip)


@pytest.mark.parametrize("op", ["grouped", "grouped_transposed", "grouped_sampled"])
def test_serves(op):
    for out_dtype in ("bfloat16", "float32")[: 2 if op == "grouped_sampled" else 1]:
        for chip in None, "h100", "h200":
            problem = dataclasses.replace(GOOD, op=op, out_dtype=out_dtype)
            _spec.check_mosaic_gpu(problem, chip)


@pytest.mark.parametrize(
    ("changes", "tiles"),
    [
        # (tile_m, tile_k, tile_n): 1024 rows a group, then 96, then fewer.
        ({}, (128, 64, 256)),
        (dict(m=776), (128, 64, 256)),
        (dict(m=768), (64, 64, 256)),
        (dict(n=128), (128, 64, 128)),
        (TRANSPOSED, (128, 256, 64)),
        (TRANSPOSED | dict(k=64), (128, 128, 64)),
        (SAMPLED, (64, 128, 256)),
        (SAMPLED | dict(n=64), (64, 128, 128)),
    ],
    ids=str,
)
def test_tiles(changes, tiles):
    problem = dataclasses.replace(GOOD, **changes)
    config = _spec.config_mosaic_gpu(problem, "h200")
    assert (config.tile_m, config.tile_k, config.tile_n) == tiles
    assert config.programs == 132
    # Stages of both operands, 32 KiB that results leave through, and barriers.
    depth, others = config.tile_k, config.tile_m + config.tile_n
    if problem.op == "grouped_transposed":
        depth, others = config.tile_n, config.tile_m + config.tile_k
    if problem.op == "grouped_sampled":
        depth, others = config.tile_m, config.tile_k + config.tile_n
    shared = config.stages * 2 * depth * others + 32 * 1024 + 1024
    assert config.stages >= 2 and shared <= 227 * 1024


def _call(op):
    """A kernel's call and the shapes of its arguments."""
    problem = dataclasses.replace(GOOD, op=op, m=256, k=128, n=192, groups=4)
    config = _spec.config_mosaic_gpu(problem, None)
    array = lambda *shape: jax.ShapeDtypeStruct(shape, "bfloat16")
    sizes = jax.ShapeDtypeStruct((4,), "int32")
    if op == "grouped_sampled":
        call = functools.partial(mosaic_gpu.sampled, dtype="bfloat16", config=config)
        return call, (array(256, 128), array(256, 192), sizes)
    transpose = op == "grouped_transposed"
    call = functools.partial(mosaic_gpu.product, transpose=transpose, config=config)
    return call, (array(256, 192 if transpose else 128), array(4, 128, 192), sizes)


NAMES = {
    "grouped": "grouped_matmul",
    "grouped_transposed": "grouped_matmul_transposed",
    "grouped_sampled": "grouped_matmul_sampled",
}


@pytest.mark.parametrize("op", NAMES)
def test_lowering_shows_the_name(op):
    call, args = _call(op)
    text = jax.jit(call).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert NAMES[op] in text


@pytest.mark.parametrize("op", NAMES)
def test_output_varies_over_the_axes_of_the_inputs(op):
    call, args = _call(op)
    mesh = jax.make_mesh(
        (4,),
        ("data",),
        axis_types=(jax.sharding.AxisType.Auto,),
        devices=jax.devices("cpu")[:4],
    )
    # Rows differ between devices, and of a sampled product nothing else.
    split, same = PartitionSpec("data"), PartitionSpec()
    specs = [split if a.shape[0] == 256 else same for a in args]

    def mapped(out):
        return jax.shard_map(call, mesh=mesh, in_specs=tuple(specs), out_specs=out)

    whole = jax.eval_shape(mapped(split), *args)
    want = {"grouped": (256, 192), "grouped_transposed": (256, 128)}
    assert whole.shape == want.get(op, (4 * 4, 128, 192))
    with pytest.raises(ValueError, match="replicat"):
        jax.eval_shape(mapped(same), *args)
