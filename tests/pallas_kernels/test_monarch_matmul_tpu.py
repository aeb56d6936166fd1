"""The TPU kernel in Pallas' interpreter against float64 numpy; what it refuses."""

import dataclasses

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import _chips
from pallas_kernels.monarch_matmul import _spec, mosaic_tpu
from sparsejax.testing import assert_close

PROBLEM = _spec.Problem("monarch", 64, 32, 128, 128, 32, 128, 128, "bfloat16")


def monarch(dtype, x, left, right):
    """Two einsums, and h's columns (i u) read again as (v t).

    In float64, or in float32 with h and y rounded to ``dtype``.
    """
    wide = np.promote_types(dtype, np.float32)
    x, left, right = (np.asarray(array).astype(wide) for array in (x, left, right))
    (k, _, p, _), (_, l, r, _) = left.shape, right.shape  # noqa: E741
    h = np.einsum("mij,iju->miu", x.reshape(-1, k, p), left[:, 0])
    h = h.astype(dtype).astype(wide).reshape(-1, r, l)
    y = np.einsum("mvt,tvo->mot", h, right[0])
    return y.reshape(len(x), -1).astype(dtype)


def check(m, k, p, q, l, s, dtype, *, interpret=True, **changes):  # noqa: E741
    """Runs the kernel on random operands."""
    r = k * q // l
    rng = np.random.default_rng(k + q + s)
    x, left, right = (
        jnp.asarray(rng.standard_normal(shape), dtype)
        for shape in ((m, k * p), (k, 1, p, q), (1, l, r, s))
    )
    problem = _spec.Problem("monarch", m, k, p, q, l, r, s, dtype)
    _spec.check_mosaic_tpu(problem, "v5e")
    config = dataclasses.replace(_spec.config_mosaic_tpu(problem, "v5e"), **changes)
    out = mosaic_tpu.product(x, left, right, config=config, interpret=interpret)
    assert out.dtype == x.dtype
    operands = (x, left, right)
    assert_close(out, monarch(np.float64, *operands), monarch(x.dtype, *operands))


CASES = {
    # What the layout does: rows, k, p, q, l, s.
    "two blocks in a panel of x": (20, 4, 64, 64, 4, 128),
    "two panels for a block of right, two of its in one of y": (8, 8, 128, 60, 4, 64),
    "no shuffle of h, ranks in two pieces": (8, 2, 128, 512, 2, 128),
    "padded x, y transposed outside": (24, 3, 96, 384, 3, 40),
    "several panels of every kind": (24, 8, 256, 256, 8, 256),
    "as many blocks as lanes": (8, 2, 128, 8192, 128, 128),
}
QUICK = [(0, "bfloat16"), (1, "float32")]
BY_HAND = [(5, "bfloat16"), (5, "float32")]


def params():
    for index, name in enumerate(CASES):
        for dtype in ("bfloat16", "float32"):
            marks = [] if (index, dtype) in QUICK else [pytest.mark.slow]
            marks += [pytest.mark.exhaustive] * ((index, dtype) in BY_HAND)
            yield pytest.param(name, dtype, marks=marks)


@pytest.mark.parametrize(("case", "dtype"), list(params()))
def test_against_float64(case, dtype):
    check(*CASES[case], dtype)


def test_several_tiles_and_chunks():
    # 3 tiles of 32 rows, the last one short, in two chunks each; one exchange of two.
    check(70, 2, 128, 128, 2, 128, "bfloat16", tile_m=32, rows=16)


def test_64_bit_types_on():
    with jax.enable_x64(True):
        check(8, 2, 128, 128, 2, 128, "bfloat16")


def test_with_simulated_memory():
    """Uninitialised scratch is NaN in this interpreter: nothing of it is read."""
    params = pltpu.InterpretParams(uninitialized_memory="nan")
    check(8, 2, 128, 128, 2, 128, "bfloat16", interpret=params)


def test_panels_by_hand():
    # 128 columns of a block are 4 ranks of 32 others: 32 panels change places with 32
    # groups of 4 lanes. A panel of y has 128 / 32 outputs of every one of 32.
    panels = _spec.panels_mosaic_tpu(PROBLEM)
    assert panels == _spec.Panels(4, 32, 128, False, 128, 32)
    # 120 / 8 = 15 ranks are padded to 16, groups of 8; 64 outputs: 2 to a panel of y,
    # so 8 blocks make 4 panels.
    problem = _spec.Problem("monarch", 8, 8, 64, 120, 8, 120, 64, "float32")
    panels = _spec.panels_mosaic_tpu(problem)
    assert panels == _spec.Panels(16, 8, 128, False, 128, 4)
    # Three blocks have no power of two: 128 / 3 ranks are padded to a whole panel.
    problem = _spec.Problem("monarch", 8, 3, 96, 384, 3, 384, 40, "float32")
    panels = _spec.panels_mosaic_tpu(problem)
    assert panels == _spec.Panels(128, 1, 128, True, 128, 0)


@pytest.mark.parametrize(
    ("change", "chip", "needs"),
    [
        (dict(dtype="float16"), "v5e", "dtype is float16, needs bfloat16 or float32"),
        (dict(s=0), "v5e", "s is 0, needs at least 1"),
        (dict(l=24, q=100), "v5e", "q is 100, needs a multiple of l=24"),
        (dict(k=6, p=24, q=24, l=6, r=24, s=24), "v5e", "pads to 384 and blocks"),
        (dict(k=4, p=8192, q=8192, l=4, r=8192), "v5e", "panels of 128 x 128, needs"),
        (dict(k=4, p=1024, q=1024, l=4, r=1024, s=1024), None, "bytes of VMEM"),
        ({}, "v3", "chip is v3, needs one of v4"),
        ({}, "h200", "chip is h200"),
    ],
)
def test_refusals(change, chip, needs):
    _spec.check_mosaic_tpu(PROBLEM, chip if chip is None else "v5e")
    with pytest.raises(NotImplementedError, match=f"mosaic_tpu: .*{needs}"):
        _spec.check_mosaic_tpu(dataclasses.replace(PROBLEM, **change), chip)


@pytest.mark.parametrize("chip", ["v4", "v5e", "v6e", None])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_tiles_fit(chip, dtype):
    for rows in (1, 100, 4096):
        problem = dataclasses.replace(PROBLEM, rows=rows, dtype=dtype)
        _spec.check_mosaic_tpu(problem, chip)
        config = _spec.config_mosaic_tpu(problem, chip)
        assert config.vmem <= _chips.tpu_vmem(chip)
        assert config.tile_m % config.rows == 0 and config.rows % 16 == 0


def test_name():
    operands = (
        jnp.ones((8, 256)),
        jnp.ones((2, 1, 128, 128)),
        jnp.ones((1, 2, 128, 128)),
    )
    config = _spec.Config(16, rows=16, vmem=2**22)
    fn = lambda *args: mosaic_tpu.product(*args, config=config, interpret=True)
    assert "name=monarch_matmul\n" in str(jax.make_jaxpr(fn)(*operands))
