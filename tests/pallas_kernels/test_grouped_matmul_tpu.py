"""The TPU kernels in Pallas' interpreter against float64 numpy; what they refuse."""

import dataclasses

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import _chips
from pallas_kernels.grouped_matmul import _spec, mosaic_tpu

PROBLEM = _spec.Problem("grouped", 64, 256, 128, 4, "bfloat16", "bfloat16")
OPS = ["grouped", "grouped_transposed", "grouped_sampled"]


class Case:
    """Random operands. The tail's rows are NaN, which must reach no result."""

    def __init__(self, m, k, n, sizes, dtype="bfloat16"):
        rng = np.random.default_rng(m + k + n + len(sizes))
        draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
        self.dtype, self.sizes = dtype, np.array(sizes, np.int32)
        tail = np.arange(m)[:, None] >= sum(sizes)
        self.x = jnp.where(tail, jnp.nan, draw(m, k)).astype(dtype)
        self.y = jnp.where(tail, jnp.nan, draw(m, n)).astype(dtype)
        self.w = draw(len(sizes), k, n)

    def problem(self, op, out_dtype=None):
        (m, k), n = self.x.shape, self.y.shape[1]
        out_dtype = out_dtype or self.dtype
        return _spec.Problem(op, m, k, n, len(self.sizes), self.dtype, out_dtype)

    def run(self, op, out_dtype=None, interpret=True, **changes):
        problem = self.problem(op, out_dtype)
        _spec.check_mosaic_tpu(problem, None)
        config = _spec.config_mosaic_tpu(problem, None)
        config = dataclasses.replace(config, **changes)
        how = dict(config=config, interpret=interpret)
        sizes = jnp.asarray(self.sizes)
        if op == "grouped_sampled":
            out = jnp.dtype(problem.out_dtype)
            return mosaic_tpu.sampled(self.x, self.y, sizes, dtype=out, **how)
        transpose = op == "grouped_transposed"
        rows = self.y if transpose else self.x
        return mosaic_tpu.product(rows, self.w, sizes, transpose=transpose, **how)

    def want(self, op):
        (m, k), n = self.x.shape, self.y.shape[1]
        x, y, w = f64(self.x), f64(self.y), f64(self.w)
        shape = {"grouped": (m, n), "grouped_transposed": (m, k)}
        out = np.zeros(shape.get(op, w.shape))
        start = 0
        for g, size in enumerate(self.sizes):
            rows = slice(start, start + size)
            start += size
            if op == "grouped":
                out[rows] = x[rows] @ w[g]
            elif op == "grouped_transposed":
                out[rows] = y[rows] @ w[g].T
            else:
                out[g] = x[rows].T @ y[rows]
        return out

    def check(self, op, out_dtype=None, **kwargs):
        out, want = self.run(op, out_dtype, **kwargs), self.want(op)
        assert out.shape == want.shape and out.dtype == (out_dtype or self.dtype)
        # Half a unit in the last place of the result; sums are float32.
        share = 2**-8 if out.dtype == jnp.bfloat16 else 1e-5
        bound = share * np.abs(want) + 1e-5 * np.abs(want).max()
        assert (np.abs(f64(out) - want) <= bound).all()


def f64(a):
    return np.asarray(a, np.float64)


CASES = {
    # Groups that end inside a register, an empty first, inner and last one, a tail.
    "uneven": (100, 136, 130, [0, 13, 1, 0, 50, 0], "bfloat16"),
    # No row has a group; no row is without one; one group has all.
    "all tail": (40, 130, 40, [0, 0, 0], "float32"),
    "no tail": (48, 128, 128, [16, 0, 32], "float32"),
    "one row": (1, 3, 5, [1], "bfloat16"),
    "more groups than rows": (7, 20, 30, [0, 1, 0, 2, 0, 0, 1, 0, 0, 2, 0], "float32"),
}


@pytest.mark.parametrize("op", OPS)
def test_uneven_groups(op):
    Case(*CASES["uneven"]).check(op)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", list(CASES.values())[1:], ids=list(CASES)[1:])
def test_more_groups(case, op):
    Case(*case).check(op)


# Tiles of 32 rows: a group across three, tiles of several groups, of the tail alone,
# and one that reaches out of the array; of 128 columns: two whole and a part.
TILED = (150, 300, 290, [5, 80, 0, 3, 20], "bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_several_tiles_of_every_axis(op):
    Case(*TILED).check(op, tile_m=32, tile_k=128, tile_n=128, rows=16)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "rows", [48, *(pytest.param(r, marks=pytest.mark.exhaustive) for r in (16, 64))]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_windows_of_rows(dtype, rows, op):
    # 48 does not divide the tile: the last window begins before its rows do.
    case = Case(*TILED[:4], dtype)
    case.check(op, tile_m=64, tile_k=384, tile_n=128, rows=rows)


def test_master_gradient_is_float32():
    Case(40, 130, 60, [7, 20]).check("grouped_sampled", "float32", tile_m=16, rows=16)


@pytest.mark.slow
def test_other_rows_do_not_reach_a_group():
    """A group's NaN stays its own, also within one register and one window."""
    case = Case(40, 130, 60, [5, 6, 20])
    bad = slice(5, 11)
    case.x, case.y = case.x.at[bad].set(jnp.nan), case.y.at[bad].set(jnp.nan)
    for op in OPS[:2]:
        wrong = np.isnan(f64(case.run(op))).any(1)
        assert (np.flatnonzero(wrong) == np.arange(5, 11)).all()
    wrong = np.isnan(f64(case.run("grouped_sampled"))).any((1, 2))
    assert list(wrong) == [False, True, False]


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_with_simulated_memory(op):
    """Uninitialised scratch is NaN in this interpreter: nothing of it is read."""
    params = pltpu.InterpretParams(uninitialized_memory="nan")
    changes = dict(tile_m=32, tile_k=128, tile_n=128, rows=16)
    Case(40, 130, 140, [0, 20, 3]).check(op, interpret=params, **changes)


def test_visits_by_hand():
    # Tiles of 4 rows, 5 of them; groups of 6, 0, 1, 5 rows: rows 0-5, none, 6, 7-11.
    visits = lambda tail: mosaic_tpu.visits_of(
        jnp.array([6, 0, 1, 5]), 18, 4, tail=tail
    )
    (group, tile, bounds), count = visits(True)
    assert bounds.tolist() == [0, 6, 6, 7, 12, 12]
    # Group 0 in tiles 0, 1; group 2 in 1; group 3 in 1, 2; the tail alone has 3, 4.
    assert int(count) == 7
    assert group[:7].tolist() == [0, 0, 2, 3, 3, 4, 4]
    assert tile[:7].tolist() == [0, 1, 1, 1, 2, 3, 4]
    # For sums the empty group has a visit, the tail none.
    (group, tile, _), count = visits(False)
    assert int(count) == 6
    assert group[:6].tolist() == [0, 0, 1, 2, 3, 3]
    assert tile[:6].tolist() == [0, 1, 1, 1, 1, 2]


@pytest.mark.parametrize(
    ("change", "chip", "needs"),
    [
        (dict(dtype="float16"), "v5e", "dtype is float16"),
        (
            dict(out_dtype="float32"),
            "v5e",
            "out_dtype is float32 for grouped, needs bf",
        ),
        (dict(n=0), "v5e", "n is 0, needs at least 1"),
        (dict(groups=0), "v5e", "groups is 0, needs at least 1"),
        (dict(groups=100_000), "v5e", "groups=100000 have lists that take .* of SMEM"),
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
    shapes = [(8192, 4096, 4096, 8), (5, 14336, 77, 3), (100_000, 28672, 8192, 256)]
    for m, k, n, groups in shapes:
        for op in OPS:
            problem = _spec.Problem(op, m, k, n, groups, *["float32"] * 2)
            config = _spec.config_mosaic_tpu(problem, chip)
            assert config.vmem <= _chips.tpu_vmem(chip)
            assert config.rows % 16 == 0 and config.rows <= config.tile_m
            assert config.tile_k % 128 == 0 and config.tile_n % 128 == 0


def test_names():
    case = Case(8, 128, 128, [8])
    names = ["grouped_matmul", "grouped_matmul_transposed", "grouped_matmul_sampled"]
    for op, name in zip(OPS, names, strict=True):
        assert f"name={name}\n" in str(jax.make_jaxpr(lambda op=op: case.run(op))())
