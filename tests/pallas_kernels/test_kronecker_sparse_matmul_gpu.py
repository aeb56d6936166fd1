"""The Kronecker-sparse Hopper kernels: simulated against float64 numpy, or on a GPU.

Needs jax, numpy and pytest only, so that it runs where a GPU is:

    python -m pytest -o addopts= --import-mode=importlib -m gpu tests/pallas_kernels
"""

import dataclasses
import re

import numpy as np
import pytest
from jax import numpy as jnp

from pallas_kernels.kronecker_sparse_matmul import _spec, mosaic_gpu


@dataclasses.dataclass
class Case:
    """Random operands and, in float64, both products of them."""

    rows: int
    a: int
    b: int
    c: int
    d: int
    dtype: str = "bfloat16"

    def __post_init__(self):
        rng = np.random.default_rng(self.rows)
        normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), self.dtype)
        self.x = normal(self.rows, self.a * self.c * self.d)
        self.y = normal(self.rows, self.a * self.b * self.d)
        self.factor = normal(self.a, self.d, self.c, self.b)

    def run(self, op, interpret, operands=(), out_dtype=None, **changes):
        """The kernel's product; of other operands where they are given."""
        out_dtype = out_dtype or self.dtype
        pattern = self.a, self.b, self.c, self.d
        problem = _spec.Problem(op, self.rows, *pattern, self.dtype, out_dtype)
        _spec.check_mosaic_gpu(problem, "h200")
        config = _spec.config_mosaic_gpu(problem, "h200")
        # As few programs as show that tiles follow each other in one.
        config = dataclasses.replace(config, programs=2)
        config = dataclasses.replace(config, **changes)
        common = dict(config=config, interpret=interpret)
        if op == "kronecker_sampled":
            x, y = operands or (self.x, self.y)
            return mosaic_gpu.sampled(x, y, pattern=pattern, dtype=out_dtype, **common)
        return mosaic_gpu.product(*(operands or (self.x, self.factor)), **common)

    def exact(self, op):
        x, y, factor = (
            np.asarray(each, np.float64) for each in (self.x, self.y, self.factor)
        )
        x = x.reshape(self.rows, self.a, self.c, self.d)
        y = y.reshape(self.rows, self.a, self.b, self.d)
        if op == "kronecker_sampled":
            return np.einsum("mijk,miok->ikjo", x, y)
        return np.einsum("mijk,ikjo->miok", x, factor).reshape(self.rows, -1)

    def check(self, op, interpret, out_dtype=None, **changes):
        out = self.run(op, interpret, out_dtype=out_dtype, **changes)
        want, out_dtype = self.exact(op), out_dtype or self.dtype
        assert out.shape == want.shape and out.dtype == out_dtype
        # Half a unit in the last place of the result; sums are float32.
        share = {"bfloat16": 2**-8, "float16": 2**-11, "float32": 0}[out_dtype]
        bound = share * np.abs(want) + 1e-5 * np.abs(want).max()
        error = np.abs(np.asarray(out, np.float64) - want)
        assert (error <= bound).all()  # not so for NaN


OPS = ["kronecker", "kronecker_sampled"]
CASES = {
    # Rows that are no multiple of 8; sides beyond a tile, and no multiple of one.
    "two tiles wide": Case(77, a=1, b=320, c=192, d=1),
    "interleaved": Case(15, a=1, b=64, c=128, d=3, dtype="float16"),
    "both": Case(130, a=2, b=128, c=64, d=2),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("op", OPS)
def test_both_products(op, name, interpret):
    CASES[name].check(op, interpret)


# Parts of two steps and one, and of one and none; sums leave in float32.
@pytest.mark.parametrize(("splits", "out_dtype"), [(2, "bfloat16"), (4, "float32")])
def test_sampled_in_parts(splits, out_dtype, interpret):
    case = Case(150, a=1, b=64, c=64, d=1)
    case.check("kronecker_sampled", interpret, out_dtype, splits=splits, stages=3)


def test_tiles_for_tuning(interpret):
    changes = dict(stages=2, group=1, programs=3)
    Case(200, a=1, b=64, c=64, d=1).check("kronecker", interpret, **changes)


@pytest.mark.parametrize("op", OPS)
def test_nothing_leaks_between_blocks(op, interpret):
    """What one block has, NaN included, does not reach the others' results."""
    # Blocks smaller than a tile, so that tiles reach over the next block's columns.
    case = Case(9, a=2, b=64, c=64, d=1)
    other = case.y if op == "kronecker_sampled" else case.factor
    at = (1,) if other.ndim == 4 else (slice(None), slice(64, 128))
    operands = case.x.at[:, 64:].set(jnp.nan), other.at[at].set(jnp.nan)
    out, want = case.run(op, interpret, operands=operands), case.exact(op)
    # The block's axis first: [2, 9, 64], or [2, 1, 64, 64].
    if op == "kronecker":
        out, want = (each.reshape(9, 2, 64).swapaxes(0, 1) for each in (out, want))
    out = np.asarray(out, np.float64)
    assert np.isnan(out[1]).all()
    assert (np.abs(out - want)[0] <= 2**-7 * np.abs(want[0]).max()).all()


@pytest.mark.parametrize("op", OPS)
def test_one_stage_would_wait_for_ever(op):
    with pytest.raises(ValueError, match="config.stages: got 1, needed at least 2"):
        CASES["both"].run(op, None, stages=1)


# --- What is refused, and tiles -------------------------------------------------------

GOOD = _spec.Problem(
    op="kronecker",
    rows=4096,
    a=32,
    b=128,
    c=128,
    d=1,
    dtype="bfloat16",
    out_dtype="bfloat16",
)
SAMPLED = dict(op="kronecker_sampled")
REFUSED = [
    (
        dict(dtype="float32", out_dtype="float32"),
        "h200",
        "dtype is float32, needs bfloat16 or float16",
    ),
    (
        dict(out_dtype="float32"),
        "h200",
        "out_dtype is float32 for kronecker, needs bfloat16",
    ),
    (
        SAMPLED | dict(dtype="float16"),
        "h200",
        "out_dtype is bfloat16 for kronecker_sampled, needs float16 or float32",
    ),
    (dict(rows=0), "h200", "rows is 0, needs at least 1"),
    (dict(a=0), "h200", "a is 0, needs at least 1"),
    (dict(d=0), "h200", "d is 0, needs at least 1"),
    (dict(c=32), "h200", "c is 32, needs a multiple of 64"),
    (dict(b=96), "h200", "b is 96, needs a multiple of 64"),
    (SAMPLED | dict(b=0), "h200", "b is 0, needs a multiple of 64"),
    ({}, "a100", "chip is a100, needs a Hopper GPU (h100, h200)"),
]


@pytest.mark.parametrize(("changes", "chip", "needs"), REFUSED, ids=lambda p: str(p))
def test_refuses(changes, chip, needs):
    problem = dataclasses.replace(GOOD, **changes)
    with pytest.raises(NotImplementedError, match=re.escape(f"mosaic_gpu: {needs}")):
        _spec.check_mosaic_gpu(problem, chip)


@pytest.mark.parametrize(
    ("changes", "tiles"),
    [
        # (tile_m, tile_k, tile_n, splits): few rows share a tile by its columns.
        ({}, (128, 64, 128, 1)),
        (dict(rows=64), (64, 64, 128, 1)),
        (dict(b=192), (128, 64, 192, 1)),
        (dict(b=320), (128, 64, 192, 1)),
        (dict(b=64), (128, 64, 64, 1)),
        (dict(b=64, rows=64), (64, 64, 128, 1)),
        # 32 tiles for 132 multiprocessors; parts of 512 rows at least.
        (SAMPLED, (64, 128, 128, 4)),
        (SAMPLED | dict(rows=1024), (64, 128, 128, 2)),
        (SAMPLED | dict(a=200), (64, 128, 128, 1)),
        (SAMPLED | dict(c=64), (64, 64, 128, 4)),
    ],
)
def test_tiles(changes, tiles):
    config = _spec.config_mosaic_gpu(dataclasses.replace(GOOD, **changes), "h200")
    got = config.tile_m, config.tile_k, config.tile_n, config.splits
    assert got == tiles and config.stages >= 2 and config.programs == 132
