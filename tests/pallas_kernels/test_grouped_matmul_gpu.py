"""The grouped Hopper kernels against float64 numpy: simulated, or compiled on a GPU.

Needs jax, numpy and pytest only, so that it runs where a GPU is:

    python -m pytest -o addopts= --import-mode=importlib -m gpu tests/pallas_kernels
"""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from pallas_kernels.grouped_matmul import _spec, mosaic_gpu


@dataclasses.dataclass
class Case:
    """Random operands and, in float64, each of the three products of them.

    Rows of the tail are NaN.
    """

    sizes: list[int]
    tail: int
    k: int
    n: int
    dtype: str = "bfloat16"

    def __post_init__(self):
        rng = np.random.default_rng(len(self.sizes) + self.k)
        self.rows = sum(self.sizes)
        self.m, groups = self.rows + self.tail, len(self.sizes)
        normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), self.dtype)
        self.x = normal(self.m, self.k).at[self.rows :].set(jnp.nan)
        self.y = normal(self.m, self.n).at[self.rows :].set(jnp.nan)
        self.w = normal(groups, self.k, self.n)
        self.group_sizes = jnp.asarray(self.sizes, jnp.int32)
        ends = itertools.accumulate(self.sizes, initial=0)
        self.groups = [slice(a, b) for a, b in itertools.pairwise(ends)]

    def run(self, op, interpret, operands=(), sizes=None, out_dtype=None, **changes):
        """The kernel's product; of other operands and sizes where they are given."""
        out_dtype = out_dtype or self.dtype
        sizes = self.group_sizes if sizes is None else sizes
        problem = _spec.Problem(
            op, self.m, self.k, self.n, len(self.sizes), self.dtype, out_dtype
        )
        _spec.check_mosaic_gpu(problem, "h200")
        config = _spec.config_mosaic_gpu(problem, "h200")
        # As few programs as show that tiles follow each other in one.
        config = dataclasses.replace(config, **{"programs": 2} | changes)
        a, b = operands or self.operands(op)
        common = dict(config=config, interpret=interpret)
        if op == "grouped_sampled":
            return mosaic_gpu.sampled(a, b, sizes, dtype=out_dtype, **common)
        transpose = op == "grouped_transposed"
        return mosaic_gpu.product(a, b, sizes, transpose=transpose, **common)

    def operands(self, op):
        x, y, w = self.x, self.y, self.w
        return {
            "grouped": (x, w),
            "grouped_transposed": (y, w),
            "grouped_sampled": (x, y),
        }[op]

    def exact(self, op):
        a, b = (np.asarray(each, np.float64) for each in self.operands(op))
        if op == "grouped_sampled":
            return np.stack([a[rows].T @ b[rows] for rows in self.groups])
        out = np.zeros((self.m, self.k if op == "grouped_transposed" else self.n))
        for rows, w in zip(self.groups, b, strict=True):
            out[rows] = a[rows] @ (w.T if op == "grouped_transposed" else w)
        return out

    def check(self, op, interpret, out_dtype=None, **changes):
        out = self.run(op, interpret, out_dtype=out_dtype, **changes)
        out_dtype = out_dtype or self.dtype
        want = self.exact(op)
        assert out.shape == want.shape and out.dtype == out_dtype
        out = np.asarray(out, np.float64)
        # Half a unit in the last place of the result; sums are float32.
        share = {"bfloat16": 2**-8, "float16": 2**-11, "float32": 0}[out_dtype]
        bound = share * np.abs(want) + 1e-5 * np.abs(want).max()
        assert (np.abs(out - want) <= bound).all()  # not so for NaN
        if op != "grouped_sampled":
            assert not out[self.rows :].any()
        assert not out[want == 0].any()


OPS = ["grouped", "grouped_transposed", "grouped_sampled"]
CASES = {
    # A group that begins and ends within a unit of 8 rows; empty ones; one that begins
    # in the middle of a tile and crosses into another; sides beyond one tile.
    "uneven": Case([3, 0, 70, 9, 1, 0], 12, 192, 320),
    "one group": Case([45], 0, 64, 64, "float16"),
    "all on the last": Case([0, 0, 130], 0, 128, 64),
    "all on the first": Case([67, 0, 0], 6, 64, 128),
    "one row": Case([0, 1], 0, 64, 64),
    "whole tiles": Case([64, 128], 64, 64, 64, "float16"),
    "no row at all": Case([0, 0], 13, 64, 64),
    # More than 96 rows a group: tiles of 128.
    "tall tiles": Case([100, 201], 5, 64, 192),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("op", OPS)
def test_every_product(op, name, interpret):
    CASES[name].check(op, interpret)


@pytest.mark.parametrize("name", ["uneven", "all on the last"])
def test_sampled_in_float32(name, interpret):
    CASES[name].check("grouped_sampled", interpret, "float32")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "changes", [dict(stages=2, group=1), dict(stages=3, group=2, programs=3)]
)
def test_tiles_for_tuning(op, changes, interpret):
    Case([20, 75, 2], 3, 128, 64).check(op, interpret, **changes)


@pytest.mark.parametrize("op", OPS)
def test_nothing_leaks_between_groups(op, interpret):
    """NaN in one group's rows and matrix changes no bit of the others' results."""
    case = Case([13, 30, 22], 0, 64, 64)
    clean = np.asarray(case.run(op, interpret), np.float32)
    middle = case.groups[1]
    poison = lambda a: a.at[1 if a.ndim == 3 else middle].set(jnp.nan)
    operands = [poison(a) for a in case.operands(op)]
    out = np.asarray(case.run(op, interpret, operands=operands), np.float32)
    where = slice(1, 2) if op == "grouped_sampled" else middle
    assert np.isnan(out[where]).all() and not np.isnan(clean).any()
    np.testing.assert_array_equal(
        np.delete(out, np.r_[where], axis=0), np.delete(clean, np.r_[where], axis=0)
    )


@pytest.mark.parametrize("op", OPS)
def test_runs_are_bit_identical_and_new_sizes_do_not_retrace(op, interpret):
    traces, case = [], Case([40, 31], 9, 64, 64)

    @jax.jit
    def run(sizes):
        traces.append(None)
        return case.run(op, interpret, sizes=sizes)

    first, other, again = (
        np.asarray(run(jnp.asarray(sizes, jnp.int32)), np.float32)
        for sizes in [(40, 31), (11, 60), (40, 31)]
    )
    assert len(traces) == 1
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("op", OPS)
def test_one_stage_would_wait_for_ever(op):
    with pytest.raises(ValueError, match="config.stages: got 1, needed at least 2"):
        Case([40, 31], 9, 64, 64).run(op, None, stages=1)


# Sizes that do not fit do what the operator says of traced ones: never NaN, never a
# row of another place.
def test_sizes_are_clipped():
    first, last = mosaic_gpu.row_ranges(jnp.array([3, -2, 9, 4], jnp.int32), 10)
    np.testing.assert_array_equal(first, [0, 3, 3, 10])
    np.testing.assert_array_equal(last, [3, 3, 10, 10])


def test_row_tiles():
    # Rows 3 to 9 of the second group begin at 0, a multiple of 8; the tail is group 3.
    tiles, count = mosaic_gpu.row_tiles(jnp.array([3, 7, 0], jnp.int32), 20, 8)
    np.testing.assert_array_equal(count, [5])
    np.testing.assert_array_equal(
        tiles[:5],
        [[0, 0, 0, 3], [1, 0, 3, 8], [1, 1, 8, 10], [3, 1, 10, 16], [3, 2, 16, 20]],
    )


def test_row_tiles_are_never_more_than_listed():
    rng = np.random.default_rng(0)
    for m, groups, tile_m in [(1, 3, 64), (50, 7, 8), (300, 40, 64), (300, 3, 128)]:
        for _ in range(20):
            sizes = rng.multinomial(rng.integers(m + 1), np.full(groups, 1 / groups))
            tiles, count = mosaic_gpu.row_tiles(jnp.asarray(sizes, "int32"), m, tile_m)
            listed = np.asarray(tiles)[: int(count[0])]
            assert len(listed) == count[0]
            # Each row in one tile, of its group.
            rows = np.concatenate([np.arange(a, b) for _, _, a, b in listed])
            np.testing.assert_array_equal(rows, np.arange(m))
            group = np.repeat(listed[:, 0], listed[:, 3] - listed[:, 2])
            want = np.append(np.repeat(np.arange(groups), sizes), [groups] * m)[:m]
            np.testing.assert_array_equal(group, want)
            assert (listed[:, 3] - 8 * listed[:, 1] <= tile_m).all()
