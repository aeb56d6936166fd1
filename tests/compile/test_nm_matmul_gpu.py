"""The condensed N:M kernel by ptxas, for H100 and H200."""

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


def report(capfd, chip, rows, k, p, n, m, dtype):
    problem = _spec.Problem("nm", rows, k, p, n, m, dtype, dtype)
    _spec.check_mosaic_gpu(problem, chip)
    config = _spec.config_mosaic_gpu(problem, chip)
    fn = functools.partial(mosaic_gpu.product, n=n, m=m, config=config)
    capfd.readouterr()
    lowered, _ = _gpu.compile_for(chip, fn, operands(rows, k, p, n, m, dtype))
    assert "nm_matmul" in lowered.as_text()
    return _gpu.ptxas_report("\n".join(capfd.readouterr()))


# One test for both chips: a kernel that was compiled for the same architecture before
# is not given to ptxas again, so the sizes differ too.
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 8)])
def test_canonical(n, m, capfd):
    for chip, rows in [("h100", 16), ("h200", 128)]:
        assert report(capfd, chip, rows, 4096, 4096, n, m, "bfloat16").clean


@pytest.mark.parametrize(
    ("n", "m"), [(1, 1), (1, 2), (2, 2), (1, 3), (1, 4), (2, 5), (1, 7), (2, 8)]
)
def test_groups(n, m, capfd):
    k = 24 * _spec.unit(n, m)[2]
    assert report(capfd, "h200", 77, k, 192, n, m, "float16").clean


def loss_and_gradients(x, values, indices):
    product = lambda x, v: nm_matmul(x, v, indices, n=2, m=4)
    loss = lambda x, v: jnp.sum(jnp.square(product(x, v).astype(jnp.float32)))
    return jax.value_and_grad(loss, (0, 1))(x, values)


def test_the_public_operator_chooses():
    """The forward product is the kernel's, its derivatives are XLA's."""
    args = operands(64, 512, 384, 2, 4, "bfloat16")
    lowered, compiled = _gpu.compile_for("h200", loss_and_gradients, args)
    assert "nm_matmul" in lowered.as_text() and "mosaic_gpu" in compiled.as_text()
    for chip, dtype in [("h200", "float32"), ("a100", "bfloat16")]:
        args = operands(64, 512, 384, 2, 4, dtype)
        lowered, _ = _gpu.compile_for(chip, loss_and_gradients, args)
        assert "mosaic_gpu" not in lowered.as_text()
