"""The condensed N:M kernels by ptxas, for H100 and H200."""

import functools
import os
import pathlib
import sys

import jax
import pytest
from jax import numpy as jnp

if os.environ["SPARSEJAX_COMPILE"] != "gpu":
    pytest.skip("asked for another compiler", allow_module_level=True)

sys.path.append(str(pathlib.Path(__file__).parent))
import _gpu  # noqa: E402

from pallas_kernels.nm_matmul import _spec, mosaic_gpu  # noqa: E402
from sparsejax.ops import nm_matmul  # noqa: E402

S = jax.ShapeDtypeStruct


def operands(rows, k, p, n, m, dtype):
    kept = k // m * n
    words = S((-(-kept * _spec.index_bits(m) // 32), p), jnp.uint32)
    return S((rows, k), dtype), S((kept, p), dtype), words


def report(capfd, chip, op, rows, k, p, n, m, dtype, out_dtype=None):
    out_dtype = out_dtype or dtype
    problem = _spec.Problem(op, rows, k, p, n, m, dtype, out_dtype)
    _spec.check_mosaic_gpu(problem, chip)
    how = dict(n=n, m=m, config=_spec.config_mosaic_gpu(problem, chip))
    x, values, words = operands(rows, k, p, n, m, dtype)
    dy = S((rows, p), dtype)
    if op == "nm_sampled":
        fn = functools.partial(mosaic_gpu.sampled, dtype=jnp.dtype(out_dtype), **how)
        args = (x, dy, words)
    else:
        transpose = op == "nm_transposed"
        fn = functools.partial(mosaic_gpu.product, transpose=transpose, **how)
        args = (dy if transpose else x, values, words)
    capfd.readouterr()
    lowered, _ = _gpu.compile_for(chip, fn, args)
    assert NAMES[op] in lowered.as_text()
    return _gpu.ptxas_report("\n".join(capfd.readouterr()))


NAMES = {
    "nm": "nm_matmul",
    "nm_transposed": "nm_matmul_transposed",
    "nm_sampled": "nm_matmul_sampled",
}


# One test for both chips: a kernel that was compiled for the same architecture before
# is not given to ptxas again, so the sizes differ too.
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 8)])
@pytest.mark.parametrize("op", NAMES)
def test_canonical(op, n, m, capfd):
    for chip, rows in [("h100", 16), ("h200", 128)]:
        assert report(capfd, chip, op, rows, 4096, 4096, n, m, "bfloat16").clean


@pytest.mark.parametrize(
    ("op", "n", "m"),
    [
        *(("nm", n, m) for n, m in [(1, 1), (1, 2), (2, 2), (1, 3), (2, 5), (2, 8)]),
        *(("nm_transposed", n, m) for n, m in [(1, 1), (2, 5), (2, 8)]),
        *(("nm_sampled", n, m) for n, m in [(1, 1), (2, 5), (2, 8)]),
    ],
)
def test_groups(op, n, m, capfd):
    k = 24 * _spec.unit(n, m)[2]
    out = "float32" if op == "nm_sampled" else "float16"
    assert report(capfd, "h200", op, 77, k, 1024, n, m, "float16", out).clean


@pytest.mark.exhaustive
@pytest.mark.parametrize(("n", "m"), [(n, m) for n in (1, 2) for m in range(n, 9)])
@pytest.mark.parametrize("op", NAMES)
def test_every_group(op, n, m, capfd):
    k = 128 * _spec.unit(n, m)[2]
    for rows in (16, 250):
        assert report(capfd, "h100", op, rows, k, 4096, n, m, "bfloat16").clean


def loss_and_gradients(x, values, indices):
    product = lambda x, v: nm_matmul(x, v, indices, n=2, m=4)
    loss = lambda x, v: jnp.sum(jnp.square(product(x, v).astype(jnp.float32)))
    return jax.value_and_grad(loss, (0, 1))(x, values)


def test_the_public_operator_chooses():
    """Kernels on Hopper, for the product and both derivatives; elsewhere none."""
    args = operands(64, 512, 384, 2, 4, "bfloat16")
    lowered, compiled = _gpu.compile_for("h200", loss_and_gradients, args)
    assert all(name in lowered.as_text() for name in NAMES.values())
    assert "mosaic_gpu" in compiled.as_text()
    for chip, dtype in [("h200", "float32"), ("a100", "bfloat16")]:
        args = operands(64, 512, 384, 2, 4, dtype)
        lowered, _ = _gpu.compile_for(chip, loss_and_gradients, args)
        assert "mosaic_gpu" not in lowered.as_text()
