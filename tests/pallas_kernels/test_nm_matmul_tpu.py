"""The TPU kernels in Pallas' interpreter against float64 numpy; what they refuse."""

import dataclasses

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import _chips
from pallas_kernels.nm_matmul import _spec, mosaic_tpu

PROBLEM = _spec.Problem("nm", 16, 256, 128, 2, 4, "bfloat16", "bfloat16")


class Case:
    """Random operands, packed here bit by bit, and the dense matrix in float64."""

    def __init__(self, rows, k, p, n, m, dtype="bfloat16"):
        rng = np.random.default_rng(rows + k + p + n + m)
        draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
        self.n, self.m, self.dtype = n, m, dtype
        self.x, self.dy = draw(rows, k), draw(rows, p)
        self.values = draw(k // m * n, p)
        bits = 2 if m <= 4 else 4 if m <= 16 else 8
        per, count = 32 // bits, k // m * n
        self.words = np.zeros((-(-count // per), p), np.uint32)
        self.row = np.zeros((count, p), int)
        for c in range(p):
            for r in range(0, count, n):
                places = np.sort(rng.permutation(m)[:n])
                self.row[r : r + n, c] = r // n * m + places
                for j, place in enumerate(places):
                    self.words[(r + j) // per, c] |= np.uint32(
                        int(place) << bits * ((r + j) % per)
                    )
        self.w = np.zeros((k, p))
        self.w[self.row, np.arange(p)] = f64(self.values)

    def problem(self, op, out_dtype=None):
        (rows, k), p = self.x.shape, self.dy.shape[1]
        out_dtype = out_dtype or self.dtype
        return _spec.Problem(op, rows, k, p, self.n, self.m, self.dtype, out_dtype)

    def run(self, op, out_dtype=None, interpret=True, **changes):
        problem = self.problem(op, out_dtype)
        _spec.check_mosaic_tpu(problem, None)
        config = _spec.config_mosaic_tpu(problem, None)
        config = dataclasses.replace(config, **changes)
        how = dict(n=self.n, m=self.m, config=config, interpret=interpret)
        words = jnp.asarray(self.words)
        if op == "nm_sampled":
            out = jnp.dtype(problem.out_dtype)
            return mosaic_tpu.sampled(self.x, self.dy, words, dtype=out, **how)
        transpose = op == "nm_transposed"
        x = self.dy if transpose else self.x
        return mosaic_tpu.product(x, self.values, words, transpose=transpose, **how)

    def want(self, op):
        if op == "nm":
            return f64(self.x) @ self.w
        if op == "nm_transposed":
            return f64(self.dy) @ self.w.T
        return (f64(self.x).T @ f64(self.dy))[self.row, np.arange(self.dy.shape[1])]

    def check(self, op, out_dtype=None, **kwargs):
        out, want = self.run(op, out_dtype, **kwargs), self.want(op)
        assert out.shape == want.shape and out.dtype == (out_dtype or self.dtype)
        # Half a unit in the last place of the result; sums are float32.
        share = 2**-8 if out.dtype == jnp.bfloat16 else 1e-5
        bound = share * np.abs(want) + 1e-5 * np.abs(want).max()
        assert (np.abs(f64(out) - want) <= bound).all()


def f64(a):
    return np.asarray(a, np.float64)


OPS = ["nm", "nm_transposed", "nm_sampled"]
# Units of rows that lanes do not divide, of two groups so that rows go in pairs; sizes
# that fit no tile. The public operator's tests have more.
CASES = [(20, 34, 130, 4, 17, "bfloat16")]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", CASES, ids="{0[0]}x{0[1]}x{0[2]}-{0[3]}:{0[4]}".format)
def test_against_float64(case, op):
    Case(*case).check(op)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_several_tiles_of_every_axis(op):
    # 3 row tiles, 2 tiles of k (a unit of 2:4 is 32 rows), 2 of p in two panels each.
    for permute in (True, False):
        case = Case(40, 512, 512, 2, 4)
        case.check(op, tile_m=16, units=8, tile_p=256, permute=permute)
        if op == "nm_sampled":
            return  # has no such choice


def test_master_gradient_is_float32():
    Case(20, 280, 130, 2, 4).check("nm_sampled", "float32")


def test_with_simulated_memory():
    """Uninitialised scratch is NaN in this interpreter: nothing of it is read."""
    params = pltpu.InterpretParams(uninitialized_memory="nan")
    for op in OPS:
        Case(8, 256, 128, 2, 4).check(op, interpret=params)


def test_unit_by_hand():
    # 2:4: a word has 16 places of 2 bits, those of 8 groups, 32 rows.
    assert _spec.unit(2, 4) == (16, 1, 32)
    # 1:8: 8 places of 4 bits, 8 groups, 64 rows.
    assert _spec.unit(1, 8) == (8, 1, 64)
    # 3:4: groups end with words every lcm(3, 16) = 48 places.
    assert _spec.unit(3, 4) == (48, 3, 64)
    # 4:17: one group to a word is 17 rows; twice that, since rows go in pairs.
    assert _spec.unit(4, 17) == (8, 2, 34)


@pytest.mark.parametrize(
    ("change", "chip", "needs"),
    [
        (dict(dtype="float16"), "v5e", "dtype is float16"),
        (dict(out_dtype="float32"), "v5e", "out_dtype is float32 for nm, needs bfloat"),
        (dict(p=0), "v5e", "p is 0, needs at least 1"),
        (dict(n=64, m=128), "v5e", "64:128, which takes 8192 selections"),
        (
            dict(op="nm_sampled", k=5120, n=1, m=256, dtype="float32"),
            "v4",
            "1:256, whose smallest tile needs .* bytes of VMEM, v4 has 13631488",
        ),
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
    for n, m in [(2, 4), (1, 8), (1, 128), (8, 16), (5, 7), (16, 20)]:
        for op in OPS:
            problem = _spec.Problem(op, 5000, m * 1000, 1920, n, m, *["float32"] * 2)
            _spec.check_mosaic_tpu(problem, chip)
            config = _spec.config_mosaic_tpu(problem, chip)
            assert config.vmem <= _chips.tpu_vmem(chip)
            assert config.units % 8 == 0 and 1920 % config.tile_p == 0
            assert config.units * _spec.unit(n, m)[2] % 128 == 0


def test_names():
    case = Case(8, 256, 128, 2, 4)
    names = ["nm_matmul", "nm_matmul_transposed", "nm_matmul_sampled"]
    for op, name in zip(OPS, names, strict=True):
        assert f"name={name}\n" in str(jax.make_jaxpr(lambda op=op: case.run(op))())
