"""The Hopper kernel against float64 numpy, simulated; and what it refuses."""

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
        (dict(op="nm_transposed"), "h200", "op is nm_transposed, needs nm"),
        (dict(op="nm_sampled"), "h200", "op is nm_sampled, needs nm"),
        (dict(dtype="float32"), "h200", "dtype is float32, needs bfloat16 or float16"),
        (dict(rows=257), "h200", "rows is 257, needs 1 to 256"),
        (dict(n=3), "h200", "n:m is 3:4, needs n at most 2"),
        (dict(n=1, m=16), "h200", "n:m is 1:16, needs n at most 2 and m at most 8"),
        (dict(k=384), "h200", "k is 384, needs a multiple of 256 for 2:4"),
        (dict(p=96), "h200", "p is 96, needs a multiple of 64"),
        ({}, "a100", "chip is a100, needs a Hopper GPU"),
        ({}, "b200", "chip is b200"),
    ],
)
def test_refusals(change, chip, needs):
    _spec.check_mosaic_gpu(PROBLEM, "h100")
    _spec.check_mosaic_gpu(PROBLEM, None)
    with pytest.raises(NotImplementedError, match=f"mosaic_gpu: .*{needs}"):
        _spec.check_mosaic_gpu(dataclasses.replace(PROBLEM, **change), chip)


# k of 2304 is 72 units of 2:4: two steps of 64, the second one mostly outside; two
# row tiles, two column tiles.
@pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"),
    reason=f"jax {jax.__version__} cannot simulate Mosaic GPU kernels",
)
@pytest.mark.parametrize(
    ("rows", "k", "p", "n", "m", "dtype"),
    [
        (3, 2304, 128, 2, 4, "bfloat16"),
        (70, 512, 64, 1, 8, "float16"),
        (8, 512, 64, 2, 8, "bfloat16"),
        (1, 384, 64, 1, 3, "bfloat16"),
    ],
)
def test_against_float64(rows, k, p, n, m, dtype):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    x, values = draw(rows, k), draw(k // m * n, p)
    f64 = lambda a: np.asarray(a, np.float64)
    bits = 2 if m <= 4 else 4
    words, w = np.zeros((k // m * n * bits // 32, p), np.uint32), np.zeros((k, p))
    places = np.argsort(rng.random((k // m, m, p)), axis=1)[:, :n]
    places = np.sort(places, axis=1).reshape(-1, p)
    for r, place in enumerate(places):
        words[r * bits // 32] |= place.astype(np.uint32) << np.uint32(r * bits % 32)
        w[r // n * m + place, np.arange(p)] = f64(values)[r]
    problem = _spec.Problem("nm", rows, k, p, n, m, dtype, dtype)
    _spec.check_mosaic_gpu(problem, None)
    out = mosaic_gpu.product(
        x,
        values,
        jnp.asarray(words),
        n=n,
        m=m,
        config=_spec.config_mosaic_gpu(problem, None),
        interpret=True,
    )
    want = f64(x) @ w
    assert out.dtype == x.dtype
    # Half a unit in the last place of the result; sums are float32.
    share = 2**-8 if dtype == "bfloat16" else 2**-11
    bound = share * np.abs(want) + 1e-5 * np.abs(want).max()
    assert (np.abs(f64(out) - want) <= bound).all()
