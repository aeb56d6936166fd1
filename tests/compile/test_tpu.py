"""The TPU kernels by the TPU compiler, for every chip."""

import importlib.util
import pathlib

import jax
import pytest

# The tests' folders are no packages; this one has a helper of its own.
_SPEC = importlib.util.spec_from_file_location(
    "sparsejax_compile_tpu", pathlib.Path(__file__).with_name("_tpu.py")
)
_tpu = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_tpu)

NAMES = {
    "dsd": "block_sparse_matmul_dsd",
    "dsd_transposed": "block_sparse_matmul_dsd_transposed",
    "sdd": "block_sparse_matmul_sdd",
}


def check(chip, op, m, k, n, block_shape, slots, dtype, out_dtype=None):
    fn, shapes = _tpu.block_sparse(
        op, m, k, n, block_shape, slots, dtype, out_dtype, chip
    )
    text, compiled = _tpu.compile_for(chip, fn, *shapes)
    assert f'kernel_name = "{NAMES[op]}"' in text
    assert "tpu_custom_call" in compiled.as_text()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("op", NAMES)
@pytest.mark.parametrize("chip", _tpu.TOPOLOGIES)
def test_canonical(chip, op, dtype):
    """4096 x 4096, a tenth of the 128 x 128 blocks."""
    check(chip, op, 4096, 4096, 4096, (128, 128), 102, dtype)


@pytest.mark.parametrize("op", NAMES)
@pytest.mark.parametrize("chip", _tpu.TOPOLOGIES)
def test_small_blocks(chip, op):
    check(chip, op, 1024, 2048, 2048, (32, 64), 205, "bfloat16", None)


@pytest.mark.parametrize("op", NAMES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "block_shape",
    [(16, 16), (16, 256), (48, 32), (64, 64), (96, 96), (256, 16)]
    + [(128, 256), (256, 128), (256, 256), (240, 16)],
    ids="{0[0]}x{0[1]}".format,
)
def test_blocks(block_shape, dtype, op):
    bk, bn = block_shape
    rows, cols = 2048 // bk, 1024 // bn
    slots = max(1, rows * cols // 10)
    check("v5e", op, 1000, rows * bk, cols * bn, block_shape, slots, dtype)


@pytest.mark.parametrize("op", NAMES)
@pytest.mark.parametrize(
    ("m", "k", "n", "slots"),
    [
        (1, 512, 512, 1),
        (77, 384, 640, 20),
        (8192, 16384, 4096, 410),
        (2048, 4096, 16384, 2048),
        (512, 8192, 8192, 4096),
    ],
)
def test_shapes(m, k, n, slots, op):
    check("v5e", op, m, k, n, (128, 128), slots, "bfloat16")


@pytest.mark.parametrize("op", NAMES)
def test_64_bit_types_on(op):
    with jax.enable_x64(True):
        for block_shape in ((128, 128), (32, 64)):
            check("v5e", op, 512, 512, 512, block_shape, 6, "bfloat16")


def test_float32_master_gradient():
    check("v5e", "sdd", 4096, 4096, 4096, (128, 128), 102, "bfloat16", "float32")
    check("v5e", "sdd", 1024, 1024, 1024, (64, 64), 25, "bfloat16", "float32")


@pytest.mark.parametrize("op", NAMES)
def test_tiles_for_an_unknown_chip_fit_all(op):
    fn, shapes = _tpu.block_sparse(
        op, 4096, 4096, 4096, (128, 128), 102, "bfloat16", None, None
    )
    for chip in _tpu.TOPOLOGIES:
        _tpu.compile_for(chip, fn, *shapes)
