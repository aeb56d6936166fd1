"""The TPU kernels in Pallas' interpreter against float64 numpy; what they refuse."""

import dataclasses

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import _chips
from pallas_kernels.kronecker_sparse_matmul import _spec, mosaic_tpu
from sparsejax.testing import assert_close

PROBLEM = _spec.Problem("kronecker", 64, 8, 128, 128, 2, "bfloat16", "bfloat16")


class Case:
    """Random operands of a pattern (a, b, c, d)."""

    def __init__(self, rows, a, b, c, d, dtype="bfloat16"):
        rng = np.random.default_rng(rows + a + b + c + d)
        draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
        self.pattern, self.dtype = (a, b, c, d), dtype
        self.x, self.y = draw(rows, a * c * d), draw(rows, a * b * d)
        self.factor = draw(a, d, c, b)

    def run(self, op, out_dtype=None, interpret=True, **changes):
        out_dtype = out_dtype or self.dtype
        problem = _spec.Problem(op, len(self.x), *self.pattern, self.dtype, out_dtype)
        _spec.check_mosaic_tpu(problem, None)
        config = _spec.config_mosaic_tpu(problem, None)
        config = dataclasses.replace(config, **changes)
        how = dict(config=config, interpret=interpret)
        if op == "kronecker":
            return mosaic_tpu.product(self.x, self.factor, **how)
        out_dtype = jnp.dtype(out_dtype)
        return mosaic_tpu.sampled(
            self.x, self.y, pattern=self.pattern, dtype=out_dtype, **how
        )

    def want(self, op, dtype):
        """In float64, or in float32 and rounded to ``dtype``."""
        wide = np.promote_types(dtype, np.float32)
        a, b, c, d = self.pattern
        x, y, factor = (
            np.asarray(array).astype(wide) for array in (self.x, self.y, self.factor)
        )
        x, y = x.reshape(-1, a, c, d), y.reshape(-1, a, b, d)
        if op == "kronecker":
            out = np.einsum("mijk,ikjo->miok", x, factor).reshape(len(x), -1)
        else:
            out = np.einsum("mijk,miok->ikjo", x, y)
        return out.astype(dtype)

    def check(self, op, out_dtype=None, **kwargs):
        out = self.run(op, out_dtype, **kwargs)
        assert out.dtype == (out_dtype or self.dtype)
        assert_close(out, self.want(op, np.float64), self.want(op, out.dtype))


OPS = ["kronecker", "kronecker_sampled"]
# (rows, a, b, c, d): small blocks that share units, the last one not full and padded;
# interleaved blocks as one matrix; columns brought together.
CASES = [(20, 5, 6, 40, 1), (8, 3, 2, 2, 32), (16, 1, 128, 128, 4)]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", CASES)
def test_against_float64(case, op):
    Case(*case).check(op)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "case",
    [(1, 1, 1, 1, 1), (50, 2, 384, 256, 1), (33, 7, 5, 3, 11), (24, 64, 2, 2, 64)],
)
def test_more_patterns(case, dtype, op):
    Case(*case, dtype).check(op)


@pytest.mark.parametrize("op", OPS)
def test_several_tiles_of_every_axis(op):
    # 3 row tiles, the last one short; units of 256 x 384 in 2 x 3 tiles.
    tiles = dict(tile_m=16, tile_k=128, tile_n=128, blocks=1, units=1)
    Case(40, 2, 384, 256, 1).check(op, **tiles)


def test_master_gradient_is_float32():
    Case(20, 4, 32, 32, 1).check("kronecker_sampled", "float32")


@pytest.mark.slow
def test_with_simulated_memory():
    """Uninitialised scratch is NaN in this interpreter: nothing of it is read."""
    params = pltpu.InterpretParams(uninitialized_memory="nan")
    for op in OPS:
        Case(24, 4, 32, 32, 1).check(op, interpret=params, tile_m=16)


def unit(*pattern):
    problem = _spec.Problem(OPS[0], 4096, *pattern, "bfloat16", "bfloat16")
    config = _spec.config_mosaic_tpu(problem, "v5e")
    return config.spread, config.blocks, _spec.units_mosaic_tpu(problem, config)


def test_units_by_hand():
    # Whole panels stay as they are.
    assert unit(32, 128, 128, 1) == (True, 1, (32, 128, 128))
    # 128 / 32 blocks on the diagonal of one unit.
    assert unit(32, 32, 32, 1) == (True, 4, (8, 128, 128))
    # A butterfly's level of stride 16: matrices of 32 x 32, four to a unit.
    assert unit(128, 2, 2, 16) == (True, 4, (32, 128, 128))
    # Right of a Monarch matrix: 4096 x 4096 would be zeros for the most part.
    assert unit(1, 128, 128, 32) == (False, 1, (32, 128, 128))


@pytest.mark.parametrize(
    ("change", "chip", "needs"),
    [
        (dict(dtype="float16"), "v5e", "dtype is float16"),
        (dict(out_dtype="float32"), "v5e", "out_dtype is float32 for kronecker, needs"),
        (dict(c=0), "v5e", "c is 0, needs at least 1"),
        ({}, "v3", "chip is v3, needs one of v4"),
        ({}, "h200", "chip is h200"),
    ],
)
def test_refusals(change, chip, needs):
    _spec.check_mosaic_tpu(PROBLEM, "v5e")
    change = {"out_dtype": change.get("dtype", "bfloat16"), **change}
    with pytest.raises(NotImplementedError, match=f"mosaic_tpu: .*{needs}"):
        _spec.check_mosaic_tpu(dataclasses.replace(PROBLEM, **change), chip)


@pytest.mark.parametrize("chip", ["v4", "v5e", "v6e", None])
def test_tiles_fit_and_cover(chip):
    for pattern in [(32, 128, 128, 1), (1, 4096, 4096, 1), (3, 100, 1000, 7)]:
        for op in OPS:
            problem = _spec.Problem(op, 5000, *pattern, *["float32"] * 2)
            _spec.check_mosaic_tpu(problem, chip)
            config = _spec.config_mosaic_tpu(problem, chip)
            assert config.vmem <= _chips.tpu_vmem(chip)
            count, wide_k, wide_n = _spec.units_mosaic_tpu(problem, config)
            assert wide_k % config.tile_k == 0 and wide_n % config.tile_n == 0
            assert count % config.units == 0 and config.tile_m % 16 == 0


def test_names():
    case = Case(8, 2, 32, 32, 1)
    names = ["kronecker_sparse_matmul", "kronecker_sparse_matmul_sampled"]
    for op, name in zip(OPS, names, strict=True):
        assert f"name={name}\n" in str(jax.make_jaxpr(lambda op=op: case.run(op))())
