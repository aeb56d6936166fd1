"""The Hopper kernels against float64 numpy: simulated, or compiled on a Hopper GPU.

Needs jax, numpy and pytest only, so that it runs where a GPU is:

    python -m pytest -o addopts= --import-mode=importlib -m gpu tests/pallas_kernels
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from pallas_kernels.block_sparse_matmul import _spec, mosaic_gpu


@dataclasses.dataclass
class Case:
    """A random problem: operands, both lists and the dense oracle in float64."""

    m: int
    grid: tuple[int, int]
    block_shape: tuple[int, int]
    dtype: str = "bfloat16"
    density: float = 0.5
    spare: int = 2
    seed: int = 0

    def __post_init__(self):
        rng = np.random.default_rng(self.seed)
        (kb, nb), (bk, bn) = self.grid, self.block_shape
        mask = rng.random(self.grid) < self.density
        if nb > 2:
            mask[:, rng.integers(nb)] = False
        cols, rows = np.nonzero(mask.T)
        by_row = np.lexsort((cols, rows))
        self.count = len(rows)
        self.slots = max(1, self.count + self.spare)

        def padded(a):
            return jnp.asarray(np.pad(a, (0, self.slots - self.count)), jnp.int32)

        def starts(a, size):
            return jnp.asarray(np.searchsorted(a, np.arange(size + 1)), jnp.int32)

        def normal(*shape):
            return jnp.asarray(rng.standard_normal(shape), self.dtype)

        self.rows, self.cols, self.order = padded(rows), padded(cols), padded(by_row)
        self.source_t = padded(cols[by_row])
        self.ptr, self.ptr_t = starts(cols, nb), starts(rows[by_row], kb)
        self.x, self.dy = normal(self.m, kb * bk), normal(self.m, nb * bn)
        # Padding takes no part, whatever is in it.
        self.blocks = normal(self.slots, bk, bn).at[self.count :].set(jnp.nan)
        self.places = [
            (slice(r * bk, (r + 1) * bk), slice(c * bn, (c + 1) * bn))
            for r, c in zip(rows, cols, strict=True)
        ]
        self.w = np.zeros((kb * bk, nb * bn))
        for place, block in zip(
            self.places, np.asarray(self.blocks, np.float64), strict=False
        ):
            self.w[place] = block

    def config(self, op, out_dtype, **changes):
        (kb, nb), (bk, bn) = self.grid, self.block_shape
        problem = _spec.Problem(
            op, self.m, kb * bk, nb * bn, (bk, bn), self.slots, self.dtype, out_dtype
        )
        _spec.check_mosaic_gpu(problem, "h200")
        return dataclasses.replace(_spec.config_mosaic_gpu(problem, "h200"), **changes)

    def forward(self, interpret, **changes):
        out = mosaic_gpu.dsd(
            self.x,
            self.blocks,
            None,
            self.rows,
            self.ptr,
            transpose=False,
            config=self.config("dsd", self.dtype, **changes),
            interpret=interpret,
        )
        self.assert_close(out, lambda x, w: x @ w, self.x, self.w)

    def transposed(self, interpret, **changes):
        out = mosaic_gpu.dsd(
            self.dy,
            self.blocks,
            self.order,
            self.source_t,
            self.ptr_t,
            transpose=True,
            config=self.config("dsd_transposed", self.dtype, **changes),
            interpret=interpret,
        )
        self.assert_close(out, lambda dy, w: dy @ w.T, self.dy, self.w)

    def sampled(self, interpret, out_dtype=None, **changes):
        out_dtype = out_dtype or self.dtype
        out = mosaic_gpu.sdd(
            self.x,
            self.dy,
            self.rows,
            self.cols,
            jnp.int32(self.count),
            block_shape=self.block_shape,
            dtype=out_dtype,
            config=self.config("sdd", out_dtype, **changes),
            interpret=interpret,
        )
        self.assert_close(out, self.stored, self.x, self.dy, out_dtype)

    def stored(self, x, dy):
        dense = x.T @ dy
        bk, bn = self.block_shape
        padding = np.zeros((self.slots - self.count, bk, bn), dense.dtype)
        return np.concatenate([*(dense[place][None] for place in self.places), padding])

    def assert_close(self, out, formula, a, b, out_dtype=None):
        """At most twice as wrong as XLA's product of the same operands."""
        out_dtype = out_dtype or self.dtype
        reference = formula(np.asarray(a, np.float64), np.asarray(b, np.float64))
        dot = functools.partial(
            jnp.matmul, precision="highest", preferred_element_type=jnp.float32
        )
        low = formula(_Low(a, dot, self.dtype), _Low(b, dot, self.dtype))
        low = np.asarray(jnp.asarray(low, out_dtype), np.float64)
        assert out.shape == reference.shape and out.dtype == out_dtype
        out = np.asarray(out, np.float64)
        assert np.isfinite(out).all()
        bound = 2 * np.abs(low - reference).max() + 1e-6 * np.abs(reference).max()
        assert np.abs(out - reference).max() <= bound
        assert np.all(out[reference == 0] == 0)


class _Low:
    """An operand whose ``@`` is XLA's, in its own precision."""

    def __init__(self, array, dot, dtype):
        self.array, self.dot, self.dtype = jnp.asarray(array, dtype), dot, dtype

    @property
    def T(self):
        return _Low(self.array.T, self.dot, self.dtype)

    def __matmul__(self, other):
        return np.asarray(self.dot(self.array, other.array))


CASES = [
    Case(77, (4, 3), (16, 16), seed=1),
    Case(130, (3, 4), (16, 16), "float16", seed=2, spare=0),
    Case(64, (3, 3), (32, 64), seed=3),
    Case(9, (3, 2), (64, 32), "float16", seed=4),
    Case(96, (2, 3), (48, 80), seed=5),
    Case(40, (2, 2), (96, 112), seed=6),
    Case(1, (3, 3), (64, 64), seed=7),
    Case(33, (2, 2), (16, 256), seed=9),
    Case(150, (3, 3), (128, 128), seed=11),
    Case(64, (2, 2), (128, 128), "float16", seed=12, density=1.0, spare=0),
    Case(20, (2, 2), (208, 176), seed=13, density=1.0),
    Case(72, (2, 2), (256, 256), seed=14, density=0.7),
]


def _name(case):
    bk, bn = case.block_shape
    return f"{bk}x{bn}-m{case.m}-{case.dtype}-{case.count}of{case.slots}"


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_forward(case, interpret):
    case.forward(interpret)


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_transposed(case, interpret):
    case.transposed(interpret)


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_sampled(case, interpret):
    case.sampled(interpret)


@pytest.mark.parametrize("case", CASES[3::5], ids=_name)
def test_sampled_float32(case, interpret):
    case.sampled(interpret, "float32")


@pytest.mark.parametrize("spare", [0, 3])
def test_no_block_at_all(spare, interpret):
    case = Case(24, (2, 3), (32, 16), density=0.0, spare=spare)
    case.forward(interpret)
    case.transposed(interpret)
    case.sampled(interpret)


# Two computing warpgroups and a copying one, which config picks for longer problems.
LONG = Case(136, (2, 2), (128, 64), seed=20, density=0.9)


@pytest.mark.parametrize(
    "changes",
    [
        dict(tile_m=128, warpgroups=2, stages=3),
        dict(tile_m=256, warpgroups=2, stages=2),
        dict(tile_m=64, unroll=3, tile_k=16, stages=2),
        dict(tile_m=128, warpgroups=2, unroll=2, stages=2, group=1),
        dict(tile_m=128, warpgroups=2, stages=2, cluster=2),
    ],
    ids=lambda c: "-".join(f"{k}{v}" for k, v in c.items()),
)
def test_tiles_dsd(changes, interpret):
    LONG.forward(interpret, **changes)
    LONG.transposed(interpret, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        dict(tile_m=128, warpgroups=2, stages=4),
        dict(tile_m=64, stages=2),
        dict(tile_m=128, tile_k=128, stages=2),
    ],
    ids=lambda c: "-".join(f"{k}{v}" for k, v in c.items()),
)
def test_tiles_sdd(changes, interpret):
    LONG.sampled(interpret, **changes)
    LONG.sampled(interpret, "float32", **changes)


def test_new_contents_do_not_retrace(interpret):
    traces = []
    first = Case(40, (3, 3), (32, 32), seed=30, density=0.6)
    config = first.config("dsd", first.dtype)

    @jax.jit
    def forward(x, blocks, source, ptr):
        traces.append(None)
        return mosaic_gpu.dsd(
            x,
            blocks,
            None,
            source,
            ptr,
            transpose=False,
            config=config,
            interpret=interpret,
        )

    for density in 0.6, 0.1, 0.0:
        case = Case(40, (3, 3), (32, 32), seed=31, density=density)
        size = first.slots
        blocks = jnp.resize(case.blocks, (size, 32, 32))
        source = jnp.resize(case.rows, (size,))
        assert case.count <= size
        out = forward(case.x, blocks, source, case.ptr)
        case.assert_close(out, lambda x, w: x @ w, case.x, case.w)
    assert len(traces) == 1


def test_count_is_traced(interpret):
    case = Case(40, (3, 3), (64, 64), seed=32, density=1.0, spare=0)
    config = case.config("sdd", case.dtype)

    @jax.jit
    def sampled(count):
        return mosaic_gpu.sdd(
            case.x,
            case.dy,
            case.rows,
            case.cols,
            count,
            block_shape=case.block_shape,
            dtype=case.dtype,
            config=config,
            interpret=interpret,
        )

    whole = np.asarray(sampled(jnp.int32(case.count)), np.float32)
    for count in 0, 1, 4:
        part = np.asarray(sampled(jnp.int32(count)), np.float32)
        np.testing.assert_array_equal(part[:count], whole[:count])
        assert not part[count:].any()
