"""The Hopper kernels against float64 numpy, simulated; and what they refuse."""

import dataclasses

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.nm_matmul import _spec, mosaic_gpu

PROBLEM = _spec.Problem("nm", 16, 256, 128, 2, 4, "bfloat16", "bfloat16")


@pytest.mark.parametrize(
    ("change", "chip", "needs"),
    [
        (dict(dtype="float32"), "h200", "dtype is float32, needs bfloat16 or float16"),
        (dict(out_dtype="float32"), "h200", "out_dtype is float32 for nm, needs bfl"),
        (
            dict(op="nm_transposed", out_dtype="float32"),
            "h200",
            "out_dtype is float32 for nm_transposed, needs bfloat16",
        ),
        (
            dict(op="nm_sampled", out_dtype="float16"),
            "h200",
            "out_dtype is float16 for nm_sampled, needs bfloat16 or float32",
        ),
        (dict(rows=257), "h200", "rows is 257, needs 1 to 256"),
        (dict(n=3), "h200", "n:m is 3:4, needs n at most 2"),
        (dict(n=1, m=16), "h200", "n:m is 1:16, needs n at most 2 and m at most 8"),
        (dict(k=384), "h200", "k is 384, needs a multiple of 256 for 2:4"),
        (dict(op="nm_sampled", k=384), "h200", "k is 384, needs a multiple of 256"),
        (dict(p=96), "h200", "p is 96, needs a multiple of 64"),
        (dict(op="nm_transposed", p=96), "h200", "p is 96, needs a multiple of 64"),
        ({}, "a100", "chip is a100, needs a Hopper GPU"),
        ({}, "b200", "chip is b200"),
    ],
)
def test_refusals(change, chip, needs):
    for op in ("nm", "nm_transposed", "nm_sampled"):
        problem = dataclasses.replace(PROBLEM, op=op)
        _spec.check_mosaic_gpu(problem, "h100")
        _spec.check_mosaic_gpu(problem, None)
    with pytest.raises(NotImplementedError, match=f"mosaic_gpu: .*{needs}"):
        _spec.check_mosaic_gpu(dataclasses.replace(PROBLEM, **change), chip)


def test_tiles():
    """By hand, of 4096 x 4096 with 16 rows, 132 multiprocessors, 2:4 and 1:8.

    2:4: a unit is 32 rows of w in 8 groups, so 2 tiles of 64 units, 16 programs, 8
    parts of p. 1:8: 64 rows in 8 groups, 1 tile, 8 programs, 16 parts. Stages that
    230,400 bytes hold, of 16-bit tiles of 8 KiB and words of 16: transposed 2:4 four
    dense tiles, and two of values, the words and 2 KiB of x each stage: 5, at most 4.
    """
    problem = _spec.Problem("nm_transposed", 16, 4096, 4096, 2, 4, *["bfloat16"] * 2)
    some = lambda **change: _spec.config_mosaic_gpu(
        dataclasses.replace(problem, **change), "h200"
    )
    assert some() == _spec.Config(16, 64, 64, stages=4, splits=8)
    assert some(n=1, m=8).splits == 16
    # 192 / m rows, in whole 16; fewer where there are no more ...
    assert [some(rows=200, m=m).tile_m for m in (2, 3, 4, 5, 8)] == [64, 64, 48, 32, 16]
    assert some(rows=17).tile_m == 32
    # ... four columns cannot be split into eight parts, and many rows need no parts.
    assert some(p=256).splits == 4 and some(rows=256).splits == 1
    assert some(op="nm").splits == some(op="nm_sampled").splits == 1
    assert some(op="nm_sampled").tile_m == 64


# --- Simulated ------------------------------------------------------------------------

simulated = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"),
    reason=f"jax {jax.__version__} cannot simulate Mosaic GPU kernels",
)


def f64(a):
    return np.asarray(a, np.float64)


def condensed(k, p, n, m, dtype):
    """Values, words, and in float64 their dense matrix and where it is kept."""
    rng = np.random.default_rng(0)
    values = jnp.asarray(rng.standard_normal((k // m * n, p)), dtype)
    bits = 2 if m <= 4 else 4
    words, w = np.zeros((k // m * n * bits // 32, p), np.uint32), np.zeros((k, p))
    places = np.argsort(rng.random((k // m, m, p)), axis=1)[:, :n]
    places = np.sort(places, axis=1).reshape(-1, p)
    rows = np.arange(len(places))[:, None] // n * m + places
    for r, place in enumerate(places):
        words[r * bits // 32] |= place.astype(np.uint32) << np.uint32(r * bits % 32)
        w[rows[r], np.arange(p)] = f64(values)[r]
    return values, jnp.asarray(words), w, rows


def dense(rows, columns, dtype):
    rng = np.random.default_rng(columns)
    return jnp.asarray(rng.standard_normal((rows, columns)), dtype)


def config_of(op, rows, k, p, n, m, dtype, out_dtype=None):
    problem = _spec.Problem(op, rows, k, p, n, m, dtype, out_dtype or dtype)
    _spec.check_mosaic_gpu(problem, None)
    return _spec.config_mosaic_gpu(problem, None)


def check(out, want, dtype):
    assert out.dtype == dtype and out.shape == want.shape
    # Half a unit in the last place of the result; sums are float32.
    share = {"bfloat16": 2**-8, "float16": 2**-11, "float32": 0}[dtype]
    bound = share * np.abs(want) + 1e-5 * np.abs(want).max()
    assert (np.abs(f64(out) - want) <= bound).all()


# k of 2304 is 72 units of 2:4: two tiles of 64, the second one mostly outside; 70 rows
# are two tiles, 128 columns two.
CASES = [
    (3, 2304, 128, 2, 4, "bfloat16"),
    (70, 512, 64, 1, 8, "float16"),
    (8, 512, 64, 2, 8, "bfloat16"),
    (1, 384, 64, 1, 3, "bfloat16"),
]


@simulated
@pytest.mark.parametrize(("rows", "k", "p", "n", "m", "dtype"), CASES)
def test_against_float64(rows, k, p, n, m, dtype):
    values, words, w, _ = condensed(k, p, n, m, dtype)
    x = dense(rows, k, dtype)
    config = config_of("nm", rows, k, p, n, m, dtype)
    out = mosaic_gpu.product(
        x,
        values,
        words,
        n=n,
        m=m,
        transpose=False,
        config=config,
        interpret=True,
    )
    check(out, f64(x) @ w, dtype)


# Three column tiles in two parts: the last part goes beyond the columns.
@simulated
@pytest.mark.parametrize(
    ("rows", "k", "p", "n", "m", "dtype", "splits"),
    [
        (3, 2304, 192, 2, 4, "bfloat16", 2),
        pytest.param(70, 512, 64, 1, 8, "float16", 1, marks=pytest.mark.slow),
        (8, 512, 128, 2, 8, "bfloat16", 2),
        pytest.param(1, 384, 64, 1, 3, "bfloat16", 1, marks=pytest.mark.slow),
    ],
)
def test_transposed_against_float64(rows, k, p, n, m, dtype, splits):
    values, words, w, _ = condensed(k, p, n, m, dtype)
    dy = dense(rows, p, dtype)
    config = config_of("nm_transposed", rows, k, p, n, m, dtype)
    out = mosaic_gpu.product(
        dy,
        values,
        words,
        n=n,
        m=m,
        transpose=True,
        config=dataclasses.replace(config, splits=splits),
        interpret=True,
    )
    check(out, f64(dy) @ w.T, dtype)


@simulated
@pytest.mark.parametrize(
    ("case", "out_dtype"),
    [
        (CASES[0], "bfloat16"),
        pytest.param(CASES[1], "float16", marks=pytest.mark.slow),
        (CASES[2], "float32"),
        (CASES[3], "float32"),
    ],
)
def test_sampled_against_float64(case, out_dtype):
    rows, k, p, n, m, dtype = case
    _, words, _, at = condensed(k, p, n, m, dtype)
    x, dy = dense(rows, k, dtype), dense(rows, p, dtype)
    out = mosaic_gpu.sampled(
        x,
        dy,
        words,
        n=n,
        m=m,
        dtype=jnp.dtype(out_dtype),
        config=config_of("nm_sampled", *case, out_dtype),
        interpret=True,
    )
    check(out, np.take_along_axis(f64(x).T @ f64(dy), at, axis=0), out_dtype)
