"""The Monarch Hopper kernel: simulated against float64 numpy, or on a GPU.

Needs jax, numpy and pytest only, so that it runs where a GPU is:

    python -m pytest -o addopts= --import-mode=importlib -m gpu tests/pallas_kernels
"""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from pallas_kernels.monarch_matmul import _spec, mosaic_gpu


def problem_of(sizes, dtype="bfloat16"):
    rows, k, p, q, l, s = sizes
    return _spec.Problem("monarch", rows, k, p, q, l, k * q // l, s, dtype)


def check(interpret, sizes, dtype="bfloat16", **changes):
    problem = problem_of(sizes, dtype)
    rows, k, p, q, l, r, s = dataclasses.astuple(problem)[1:-1]
    _spec.check_mosaic_gpu(problem, "h200")
    config = _spec.config_mosaic_gpu(problem, "h200")
    # As few programs as show that tiles follow each other in one.
    config = dataclasses.replace(config, **{"programs": 2} | changes)
    rng = np.random.default_rng(rows)
    shapes = (rows, k * p), (k, 1, p, q), (1, l, r, s)
    x, left, right = (
        jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes
    )
    y = mosaic_gpu.product(x, left, right, config=config, interpret=interpret)
    assert y.shape == (rows, s * l) and y.dtype == dtype
    x, left, right, y = (np.asarray(each, np.float64) for each in (x, left, right, y))
    h = np.einsum("mij,iju->miu", x.reshape(rows, k, p), left[:, 0])
    h = h.reshape(rows, r, l)
    want = np.einsum("mvt,tvo->mot", h, right[0]).reshape(y.shape)
    terms = np.einsum("mvt,tvo->mot", abs(h), abs(right[0])).reshape(y.shape)
    # Half a unit in the last place of each number of h, and of y; sums are float32.
    share = {"bfloat16": 2**-8, "float16": 2**-11}[dtype]
    bound = share * (terms + np.abs(want)) + 1e-5 * np.abs(want).max()
    assert (np.abs(y - want) <= bound).all()


# Four blocks of left give 4 columns to each of right: 16 together, for one wgmma.
SMALL = 70, 4, 64, 32, 8, 64


@pytest.mark.parametrize(
    ("sizes", "dtype", "changes"),
    [
        # Columns that a block of left gives each of right: 4, 16, 1, 32. More rows
        # than a tile, and no multiple of 8; fewer.
        (SMALL, "bfloat16", {}),
        ((20, 2, 128, 64, 4, 128), "float16", dict(group=2, stages=3)),
        ((9, 16, 64, 32, 32, 64), "bfloat16", {}),
        # Two groups; parts of right's columns.
        ((65, 2, 64, 128, 4, 128), "bfloat16", dict(group=2, tile_s=64, programs=3)),
    ],
)
def test_product(sizes, dtype, changes, interpret):
    check(interpret, sizes, dtype, **changes)


@pytest.mark.parametrize("name", ["stages", "stages_right"])
def test_one_stage_would_wait_for_ever(name):
    with pytest.raises(ValueError, match=f"config.{name}: got 1, needed at least 2"):
        check(None, SMALL, **{name: 1})


def test_h_is_made_visible_before_it_is_multiplied():
    """The simulation does not mind: there wgmma sees what was stored before."""
    config = _spec.config_mosaic_gpu(problem_of(SMALL), "h200")
    shapes = (70, 4 * 64), (4, 1, 64, 32), (1, 8, 16, 64)
    run = functools.partial(mosaic_gpu.product, config=config)
    args = [jax.ShapeDtypeStruct(shape, "bfloat16") for shape in shapes]
    # Once for h, once for the only piece of y.
    assert str(jax.make_jaxpr(run)(*args)).count("commit_smem") == 2


# --- What is refused, and tiles -------------------------------------------------------

# 4096 x 4096 of 32 blocks.
GOOD = problem_of((4096, 32, 128, 128, 32, 128))
REFUSED = [
    (dict(dtype="float32"), "h200", "dtype is float32, needs bfloat16 or float16"),
    (dict(rows=0), "h200", "rows is 0, needs at least 1"),
    (dict(p=96), "h200", "p is 96, needs a multiple of 64"),
    (dict(s=32), "h200", "s is 32, needs a multiple of 64"),
    (dict(q=100), "h200", "q is 100, needs a multiple of l=32"),
    (dict(q=96, r=96), "h200", "q / l is 3, needs a divisor or a multiple of 16"),
    (dict(k=2, r=8), "h200", "k is 2, needs a multiple of 4 for q / l = 4"),
    (
        dict(l=4, q=16, r=128),
        "h200",
        "l is 4, needs a multiple of 8 for q / l = 4",
    ),
    (
        dict(k=64, l=64),
        "h200",
        "k is 64, r is 128: 64 rows of h for 16 blocks of right, and buffers, take "
        "336896 bytes of SMEM, needs at most 232448",
    ),
    ({}, "b200", "chip is b200, needs a Hopper GPU (h100, h200)"),
]


@pytest.mark.parametrize(("changes", "chip", "needs"), REFUSED, ids=lambda p: str(p))
def test_refuses(changes, chip, needs):
    problem = dataclasses.replace(GOOD, **changes)
    with pytest.raises(NotImplementedError, match=re.escape(f"mosaic_gpu: {needs}")):
        _spec.check_mosaic_gpu(problem, chip)


@pytest.mark.parametrize(
    ("sizes", "tiles"),
    [
        # (group, tile_r, tile_s, stages). h takes 128 KiB of SMEM in the first two, y's
        # pieces 16, two stages of right 32, barriers 1; a stage of x and left 12 or 16.
        ((4096, 32, 128, 128, 32, 128), (8, 32, 128, 4)),
        ((4096, 16, 256, 256, 16, 256), (4, 16, 256, 3)),
        (SMALL, (8, 16, 64, 6)),
    ],
)
def test_tiles(sizes, tiles):
    config = _spec.config_mosaic_gpu(problem_of(sizes), "h200")
    assert (config.group, config.tile_r, config.tile_s, config.stages) == tiles
