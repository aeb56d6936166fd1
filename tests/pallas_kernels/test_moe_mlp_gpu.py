"""The Hopper kernels of the mixture of experts against float64 numpy; see there.

Simulated, or compiled on a GPU as test_grouped_matmul_gpu.py says.
"""

import dataclasses
import itertools
import math

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from pallas_kernels.moe_mlp import _spec, mosaic_gpu


@dataclasses.dataclass
class Case:
    """Tokens, experts and choices, with what is not to be used NaN."""

    sizes: list[int]
    tail: int
    d: int
    f: int
    dtype: str = "bfloat16"
    tokens: int = 40

    def __post_init__(self):
        rng = np.random.default_rng(self.d + self.f)
        normal = lambda *shape: jnp.asarray(rng.standard_normal(shape) / 8, self.dtype)
        self.rows, experts = sum(self.sizes), len(self.sizes)
        self.c = self.rows + self.tail
        # The last token is chosen by the tail alone.
        self.x = normal(self.tokens, self.d).at[-1].set(jnp.nan)
        self.w_in, self.w_gate = (normal(experts, self.d, self.f) for _ in range(2))
        self.w_out = normal(experts, self.f, self.d)
        self.h = normal(self.c, self.f).at[self.rows :].set(jnp.nan)
        chosen = rng.integers(self.tokens - 1, size=self.c)
        self.chosen = jnp.asarray(chosen, jnp.int32).at[self.rows :].set(-1)
        self.chosen = self.chosen % self.tokens
        self.order = jnp.asarray(rng.permutation(self.c), jnp.int32)
        gates = jnp.asarray(rng.random(self.c) + 0.5, jnp.float32)
        self.gates = gates.at[self.rows :].set(jnp.nan)
        self.group_sizes = jnp.asarray(self.sizes, jnp.int32)
        ends = itertools.accumulate(self.sizes, initial=0)
        self.experts = [slice(a, b) for a, b in itertools.pairwise(ends)]

    def config(self, op):
        problem = _spec.Problem(
            op, self.tokens, self.c, self.d, self.f, len(self.sizes), self.dtype
        )
        _spec.check_mosaic_gpu(problem, "h200")
        config = _spec.config_mosaic_gpu(problem, "h200")
        return dataclasses.replace(config, programs=2)

    def hidden(self, interpret, activation, gated=True):
        return mosaic_gpu.hidden(
            self.x,
            self.w_in,
            self.w_gate if gated else None,
            self.chosen,
            self.group_sizes,
            activation=activation,
            config=self.config("moe_hidden_gated" if gated else "moe_hidden"),
            interpret=interpret,
        )

    def exact_hidden(self, activation, gated=True):
        rows = np.asarray(self.x, np.float64)[np.asarray(self.chosen)]
        w_in, w_gate = (np.asarray(w, np.float64) for w in (self.w_in, self.w_gate))
        h = np.zeros((self.c, self.f))
        for e, here in enumerate(self.experts):
            up = rows[here] @ w_in[e]
            h[here] = (
                activation(rows[here] @ w_gate[e]) * up if gated else activation(up)
            )
        return h

    def down(self, interpret):
        return mosaic_gpu.down(
            self.h,
            self.w_out,
            self.order,
            self.gates,
            self.group_sizes,
            config=self.config("moe_down"),
            interpret=interpret,
        )

    def exact_down(self):
        h, w, gates = (
            np.asarray(a, np.float64) for a in (self.h, self.w_out, self.gates)
        )
        z = np.zeros((self.c, self.d))
        for e, here in enumerate(self.experts):
            z[np.asarray(self.order)[here]] = gates[here, None] * (h[here] @ w[e])
        return z

    def check(self, out, want):
        assert out.shape == want.shape and out.dtype == self.dtype
        out = np.asarray(out, np.float64)
        # Half a unit in the last place of the result; all before it is float32.
        share = 2**-8 if self.dtype == "bfloat16" else 2**-11
        bound = share * np.abs(want) + 1e-5 * np.abs(want).max(initial=0)
        assert (np.abs(out - want) <= bound).all()  # not so for NaN


sigmoid = lambda x: 1 / (1 + np.exp(-x))
silu = lambda x: x * sigmoid(x)
erf = np.vectorize(math.erf, otypes=[np.float64])

CASES = {
    # A group that begins and ends within a unit of 8 rows; empty ones; one that begins
    # in the middle of a tile and crosses into another; sides beyond one tile.
    "uneven": Case([3, 0, 70, 9, 1, 0], 12, 192, 320),
    "one expert": Case([45], 0, 64, 64, "float16"),
    "all on the last": Case([0, 0, 130], 0, 64, 128),
    "one choice": Case([0, 1], 0, 64, 64),
    "no choice at all": Case([0, 0], 13, 64, 64),
    # More than 96 choices an expert: tiles of 128.
    "tall tiles": Case([100, 201], 5, 64, 192, "float16"),
}


@pytest.mark.parametrize("name", CASES)
def test_hidden_gated(name, interpret):
    case = CASES[name]
    case.check(case.hidden(interpret, jax.nn.silu), case.exact_hidden(silu))


@pytest.mark.parametrize("name", CASES)
def test_hidden(name, interpret):
    case = CASES[name]
    # Not 0 at 0: the tail's zeros are not made by it.
    out = case.hidden(interpret, jax.nn.sigmoid, gated=False)
    want = case.exact_hidden(sigmoid, gated=False)
    want[case.rows :] = 0
    case.check(out, want)


@pytest.mark.parametrize("name", CASES)
def test_down(name, interpret):
    case = CASES[name]
    out = case.down(interpret)
    case.check(out, case.exact_down())
    assert not np.asarray(out)[np.asarray(case.order)[case.rows :]].any()


@pytest.mark.slow
def test_nan_of_one_token_and_one_gate_stay_there(interpret):
    case = dataclasses.replace(CASES["uneven"])
    clean_h = np.asarray(case.hidden(interpret, jax.nn.silu), np.float32)
    clean_z = np.asarray(case.down(interpret), np.float32)
    case.x = case.x.at[case.chosen[5]].set(jnp.nan)
    case.gates = case.gates.at[5].set(jnp.nan)
    theirs = np.asarray(case.chosen == case.chosen[5])
    h = np.asarray(case.hidden(interpret, jax.nn.silu), np.float32)
    assert np.isnan(h[theirs]).all()
    np.testing.assert_array_equal(h[~theirs], clean_h[~theirs])
    z, at = np.asarray(case.down(interpret), np.float32), int(case.order[5])
    assert np.isnan(z[at]).all()
    np.testing.assert_array_equal(np.delete(z, at, 0), np.delete(clean_z, at, 0))


ALPHA, SLOPES = jnp.float32(1.5), np.ones(64, np.float32)


@jax.custom_jvp
def with_a_rule(x):
    return jnp.tanh(x) * ALPHA


with_a_rule.defjvp(lambda x, t: (with_a_rule(*x), t[0]))

ACTIVATIONS = {
    "none": (lambda x: x, lambda x: x),
    "relu": (jax.nn.relu, lambda x: np.maximum(x, 0)),
    "gelu": (
        lambda x: jax.nn.gelu(x, approximate=False),
        lambda x: x * (1 + erf(x / np.sqrt(2))) / 2,
    ),
    "elu": (jax.nn.elu, lambda x: np.where(x > 0, x, np.expm1(x))),
    "softplus": (jax.nn.softplus, lambda x: np.logaddexp(x, 0)),
    "erf": (jax.scipy.special.erf, erf),
    "checkpoint": (jax.checkpoint(jax.nn.silu), silu),
    "rule": (with_a_rule, lambda x: 1.5 * np.tanh(x)),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name, interpret):
    ours, exact = ACTIVATIONS[name]
    case = Case([9, 14], 0, 64, 64)
    case.w_gate = 64 * case.w_gate  # products from -40 to 40
    case.check(case.hidden(interpret, ours), case.exact_hidden(exact))


@pytest.mark.parametrize(
    ("activation", "needs"),
    [
        (jax.nn.softmax, "activation has .*reduce_max.*, needs to be made of abs"),
        (jnp.cumsum, "activation makes .*|activation has .*cumsum"),
        (jnp.sin, "activation has sin, needs"),
        (lambda x: jax.lax.fori_loop(0, 2, lambda i, y: jnp.tanh(y), x), "has scan"),
        (lambda x: x * jnp.arange(64.0), "has iota|has a captured array"),
        (lambda x: x * SLOPES, "activation has a captured array"),
        (lambda x: x[:, :4], r"activation makes .*\(8, 4\), 'float32'.*needs one"),
        (lambda x: x.astype("bfloat16"), "activation makes .*'bfloat16'"),
        (lambda x: (x, x), "activation makes"),
    ],
)
def test_activations_refused(activation, needs):
    case = Case([9, 14], 0, 64, 64)
    with pytest.raises(NotImplementedError, match=f"mosaic_gpu: .*({needs})"):
        case.hidden(None, activation)


def test_a_traced_number_is_refused():
    case = Case([9, 14], 0, 64, 64)
    with pytest.raises(NotImplementedError, match="has a captured traced value"):
        jax.jit(lambda beta: case.hidden(None, lambda x: beta * x))(jnp.float32(2))


GOOD = _spec.Problem("moe_hidden", 4096, 8192, 4096, 14336, 8, "bfloat16")


@pytest.mark.parametrize(
    ("changes", "chip", "needs"),
    [
        (dict(dtype="float32"), "h200", "dtype is float32, needs bfloat16 or float16"),
        (dict(tokens=0), "h200", "tokens is 0, needs at least 1"),
        (dict(choices=0), "h200", "choices is 0, needs at least 1"),
        (dict(experts=0), "h200", "experts is 0, needs at least 1"),
        (dict(d=96), "h200", "d is 96, needs a multiple of 64"),
        (dict(f=32), "h200", "f is 32, needs a multiple of 64"),
        (dict(op="moe_down", f=100), "h200", "f is 100, needs a multiple of 64"),
        (dict(op="moe_hidden_gated", f=96), "h200", "f is 96, needs a multiple of 64"),
        ({}, "a100", r"chip is a100, needs a Hopper GPU \(h100, h200\)"),
        ({}, "b200", "chip is b200, needs a Hopper GPU"),
    ],
)
def test_refusals(changes, chip, needs):
    for op in "moe_hidden", "moe_hidden_gated", "moe_down":
        for served in None, "h100", "h200":
            _spec.check_mosaic_gpu(dataclasses.replace(GOOD, op=op), served)
    with pytest.raises(NotImplementedError, match=f"mosaic_gpu: {needs}"):
        _spec.check_mosaic_gpu(dataclasses.replace(GOOD, **changes), chip)


@pytest.mark.parametrize(
    ("changes", "tiles"),
    [
        # (tile_m, tile_k, tile_n, stages): each stage is 2 bytes of tile_k by tile_m
        # and by tile_n, of which the gated kernel has two.
        ({}, (128, 64, 256, 4)),
        (dict(op="moe_hidden_gated"), (128, 64, 128, 4)),
        (dict(op="moe_hidden_gated", f=64), (128, 64, 128, 4)),
        (dict(op="moe_down"), (128, 64, 256, 4)),
        (dict(op="moe_down", d=64), (128, 64, 128, 6)),
        (dict(experts=128), (64, 64, 256, 4)),
    ],
    ids=str,
)
def test_tiles(changes, tiles):
    config = _spec.config_mosaic_gpu(dataclasses.replace(GOOD, **changes), "h200")
    assert (config.tile_m, config.tile_k, config.tile_n, config.stages) == tiles
    assert config.programs == 132
