"""The TPU kernels in Pallas' interpreter against float64 numpy; what they refuse."""

import dataclasses

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import _chips
from pallas_kernels.moe_mlp import _spec, mosaic_tpu

PROBLEM = _spec.Problem("moe_hidden", 32, 64, 256, 512, 4, "bfloat16")
OPS = ["moe_hidden", "moe_hidden_gated", "moe_down"]


class Case:
    """Random operands. What the tail would read is NaN, and must reach no result."""

    def __init__(self, tokens, choices, d, f, sizes, dtype="bfloat16"):
        rng = np.random.default_rng(tokens + choices + d + f + len(sizes))
        draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
        e, self.total = len(sizes), sum(sizes)
        self.dtype, self.sizes = dtype, np.array(sizes, np.int32)
        tail = np.arange(choices) >= self.total
        # Token 0 is NaN; no choice of an expert is of it, all of the tail are.
        self.tokens = np.where(tail, 0, rng.integers(1, tokens, choices)).astype("i4")
        self.x = draw(tokens, d).at[0].set(jnp.nan)
        self.w_in, self.w_gate = draw(e, d, f), draw(e, d, f)
        self.w_out = draw(e, f, d)
        self.h = jnp.where(tail[:, None], jnp.nan, draw(choices, f)).astype(dtype)
        gates = rng.uniform(0.1, 1, choices)
        self.weights = np.where(tail, np.nan, gates).astype(np.float32)
        self.choices = rng.permutation(choices).astype(np.int32)

    def problem(self, op):
        (tokens, d), (choices, f) = self.x.shape, self.h.shape
        return _spec.Problem(op, tokens, choices, d, f, len(self.sizes), self.dtype)

    def run(self, op, interpret=True, activation=jax.nn.silu, **changes):
        _spec.check_mosaic_tpu(self.problem(op), None)
        config = _spec.config_mosaic_tpu(self.problem(op), None)
        config = dataclasses.replace(config, **changes)
        how = dict(config=config, interpret=interpret)
        sizes = jnp.asarray(self.sizes)
        if op == "moe_down":
            choices, weights = jnp.asarray(self.choices), jnp.asarray(self.weights)
            return mosaic_tpu.down(self.h, self.w_out, choices, weights, sizes, **how)
        gate = self.w_gate if op == "moe_hidden_gated" else None
        how["activation"] = activation
        tokens = jnp.asarray(self.tokens)
        return mosaic_tpu.hidden(self.x, self.w_in, gate, tokens, sizes, **how)

    def want(self, op):
        expert = np.repeat(np.arange(len(self.sizes)), self.sizes)
        silu = lambda a: a / (1 + np.exp(-a))
        if op == "moe_down":
            out = np.zeros((len(self.choices), self.x.shape[1]))
            for i, e in enumerate(expert):
                z = f64(self.h[i]) @ f64(self.w_out[e])
                out[self.choices[i]] = np.float64(self.weights[i]) * z
            return out
        out = np.zeros(self.h.shape)
        for i, e in enumerate(expert):
            row = f64(self.x[self.tokens[i]])
            up = row @ f64(self.w_in[e])
            out[i] = silu(up)
            if op == "moe_hidden_gated":
                out[i] = silu(row @ f64(self.w_gate[e])) * up
        return out

    def check(self, op, **kwargs):
        out, want = self.run(op, **kwargs), self.want(op)
        assert out.shape == want.shape and out.dtype == self.dtype
        # Half a unit in the last place of the result; sums are float32.
        share = 2**-8 if out.dtype == jnp.bfloat16 else 1e-5
        bound = share * np.abs(want) + 1e-5 * np.abs(want).max()
        assert (np.abs(f64(out) - want) <= bound).all()


def f64(a):
    return np.asarray(a, np.float64)


CASES = {
    # Experts that end inside a register, without choices, and a tail.
    "uneven": (30, 70, 136, 130, [0, 13, 1, 0, 50, 0], "bfloat16"),
    "all tail": (9, 20, 130, 40, [0, 0, 0], "float32"),
    "one choice": (2, 1, 3, 5, [1], "bfloat16"),
    "more experts than choices": (
        5,
        7,
        20,
        300,
        [0, 1, 0, 2, 0, 0, 1, 0, 2],
        "float32",
    ),
}
# Tiles of 32 choices: an expert across three, tiles of several experts, of the tail
# alone, one that reaches out of the array; of 256 columns: two, the last one in part.
TILED = (40, 150, 300, 490, [5, 80, 0, 3, 20], "bfloat16")
TILES = dict(tile_m=32, tile_k=256, tile_n=256, rows=16)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_against_float64(case, op):
    Case(*case).check(op)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_several_tiles_of_every_axis(op):
    Case(*TILED).check(op, **TILES)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "rows", [48, *(pytest.param(r, marks=pytest.mark.exhaustive) for r in (16, 64))]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_windows_of_rows(dtype, rows, op):
    # 48 does not divide the tile: the last window begins before its rows do.
    case = Case(*TILED[:5], dtype)
    case.check(op, tile_m=64, tile_k=512, tile_n=256, rows=rows)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_with_simulated_memory(dtype, op):
    """Copies are made when awaited, uninitialised memory is NaN: the order is right."""
    params = pltpu.InterpretParams(
        uninitialized_memory="nan", dma_execution_mode="on_wait"
    )
    Case(9, 70, 300, 300, [0, 35, 3], dtype).check(op, interpret=params, **TILES)


@pytest.mark.slow
def test_a_token_of_nan_stays_its_own():
    case = Case(30, 40, 130, 60, [5, 6, 20])
    case.tokens[7] = 0
    out = np.isnan(f64(case.run("moe_hidden"))).any(1)
    assert np.flatnonzero(out).tolist() == [7]


@pytest.mark.slow
@pytest.mark.parametrize(
    "activation", [jax.nn.relu, jax.nn.gelu, lambda a: jax.nn.gelu(a, False), jnp.tanh]
)
def test_activations(activation):
    case = Case(4, 8, 16, 16, [3, 5], "float32")
    out = case.run("moe_hidden", activation=activation)
    expert = np.repeat([0, 1], [3, 5])
    rows = f64(case.x)[case.tokens]
    pre = np.stack(
        [row @ f64(case.w_in[e]) for row, e in zip(rows, expert, strict=True)]
    )
    want = activation(jnp.asarray(pre, jnp.float32))
    np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "chip", "needs"),
    [
        (dict(dtype="float16"), "v5e", "dtype is float16"),
        (dict(f=0), "v5e", "f is 0, needs at least 1"),
        (dict(tokens=0), "v5e", "tokens is 0, needs at least 1"),
        (
            dict(choices=10**6),
            "v5e",
            "1000000 choices, 4 experts have lists .* of SMEM",
        ),
        (dict(d=10**6), "v4", "d=1000000, f=512 need .* of VMEM at the smallest tiles"),
        ({}, "v3", "chip is v3, needs one of v4"),
        ({}, "h200", "chip is h200"),
    ],
)
def test_refusals(change, chip, needs):
    _spec.check_mosaic_tpu(PROBLEM, "v5e")
    with pytest.raises(NotImplementedError, match=f"mosaic_tpu: .*{needs}"):
        _spec.check_mosaic_tpu(dataclasses.replace(PROBLEM, **change), chip)


@pytest.mark.parametrize("chip", ["v4", "v5e", "v6e", None])
def test_tiles_fit_and_cover(chip):
    for d, f, experts in [(4096, 14336, 8), (77, 3, 3), (2048, 1408, 64)]:
        for op in OPS:
            problem = _spec.Problem(op, 8192, 16384, d, f, experts, "float32")
            _spec.check_mosaic_tpu(problem, chip)
            config = _spec.config_mosaic_tpu(problem, chip)
            assert config.vmem <= _chips.tpu_vmem(chip)
            assert config.rows % 16 == 0 and config.rows <= config.tile_m
            assert config.tile_k % 128 == 0 and config.tile_n % 128 == 0


def test_names():
    case = Case(8, 16, 128, 128, [8, 8])
    for op in OPS:
        assert f"name={op}\n" in str(jax.make_jaxpr(lambda op=op: case.run(op))())
