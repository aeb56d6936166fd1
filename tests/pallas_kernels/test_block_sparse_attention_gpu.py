"""The attention kernels for Hopper against float64 numpy: simulated, or on a GPU.

Needs jax, numpy and pytest only, so that it runs where a GPU is:

    python -m pytest -o addopts= --import-mode=importlib -m gpu tests/pallas_kernels
"""

import dataclasses
import functools
import re

import numpy as np
import pytest
from jax import numpy as jnp

from pallas_kernels.block_sparse_attention import _spec, mosaic_gpu


def causal(i, j, rows, cols, scalars, dense):
    return i >= j


def everything(i, j, rows, cols, scalars, dense):
    return (i == i) & (j == j)


def documents(i, j, rows, cols, scalars, dense):
    """Causal within a document, but for the first keys; one number per head."""
    return (i >= j) & (rows[0] == cols[0]) & ~(j < scalars[0])


def given(i, j, rows, cols, scalars, dense):
    """The given elements, but for those after the query which another mask has."""
    return dense[0] & ((i >= j) | ~dense[-1])


@dataclasses.dataclass
class Case:
    """Random operands and lists; in float64 all results of them."""

    b: int = 1
    h: int = 2
    h_kv: int = 1
    t: int = 128
    s: int = 128
    d: int = 64
    dv: int = 64
    block_q: int = 64
    block_k: int = 64
    mask_b: int = 1
    mask_h: int = 1
    dtype: str = "bfloat16"
    predicate: object = None
    rows: int = 0
    cols: int = 0
    scalars: int = 0
    dense: int = 0
    soft_cap: float | None = None
    bias: bool = False
    seed: int = 0

    def __post_init__(self):
        rng = self.rng = np.random.default_rng(self.seed)
        nq, nk = -(-self.t // self.block_q), -(-self.s // self.block_k)
        t, s = nq * self.block_q, nk * self.block_k
        b, h, h_kv, d, dv = self.b, self.h, self.h_kv, self.d, self.dv
        self.scale = 1.5 * d**-0.5

        def normal(*shape, true):
            x = rng.standard_normal(shape)
            x[:, :, true:] = 0  # padding
            return jnp.asarray(x, self.dtype)

        self.q = normal(b, h, t, d, true=self.t)
        self.k = normal(b, h_kv, s, d, true=self.s)
        self.v = normal(b, h_kv, s, dv, true=self.s)
        self.dout = normal(b, h, t, dv, true=self.t)
        # Lists: any blocks, some full, one query block without any.
        masks = self.mask_b, self.mask_h
        listed = rng.random((*masks, nq, nk)) < 0.7
        listed[..., 0, :] = False
        listed[..., -1, -1] = True
        self.full = listed & (rng.random(listed.shape) < 0.3)
        self.listed = listed
        self.block_bias = None
        if self.bias:
            bias = rng.standard_normal((b, h, nq, nk))
            self.block_bias = jnp.asarray(bias, jnp.float32)
        # As if lse had a gradient as well.
        self.dlse = rng.standard_normal((b, h, t))
        ids = lambda *shape: jnp.asarray(np.sort(rng.integers(0, 3, shape)), jnp.int32)
        self.elements = _spec.Elements(
            self.predicate,
            tuple(ids(b, 1, t) for _ in range(self.rows)),
            tuple(ids(1, h, s) for _ in range(self.cols)),
            tuple(
                jnp.asarray(rng.integers(0, 9, (1, h)), jnp.int32)
                for _ in range(self.scalars)
            ),
            # One mask for all heads of a member, one for all members.
            tuple(
                jnp.asarray(rng.random((*of, t, s)) < 0.7)
                for of in [(b, 1), (1, h)][: self.dense]
            ),
        )

    # --- what the kernels take

    @property
    def lists(self):
        idx = np.argsort(~self.listed, axis=-1, kind="stable").astype(np.int32)
        cnt = self.listed.sum(-1).astype(np.int32)
        # Slots beyond the count repeat the last one.
        last = np.maximum(cnt - 1, 0)[..., None]
        slot = np.minimum(np.arange(idx.shape[-1]), last)
        idx = np.take_along_axis(idx, slot, -1)
        full = np.take_along_axis(self.full, idx, -1).astype(np.int32)
        return tuple(jnp.asarray(x) for x in (idx, cnt, full))

    def problem(self, op):
        return _spec.Problem(
            op,
            *(self.b, self.h, self.h_kv, self.t, self.s, self.d, self.dv),
            *(self.block_q, self.block_k, self.listed.shape[-1]),
            *(self.mask_b, self.mask_h, self.dtype),
            *(self.rows, self.cols, self.scalars, self.dense),
            *(self.soft_cap is not None, self.bias, False),
        )

    def config(self, op, **changes):
        problem = self.problem(op)
        _spec.check_mosaic_gpu(problem, "h200")
        config = _spec.config_mosaic_gpu(problem, "h200")
        return dataclasses.replace(config, **changes)

    def pages(self):
        """k and v as pages in some order, and where each block is."""
        nk = self.k.shape[2] // self.block_k
        order = self.rng.permutation(self.b * nk + 1)[: self.b * nk]

        def paged(x):
            b, h_kv, _, size = x.shape
            x = x.reshape(b, h_kv, nk, self.block_k, size).swapaxes(1, 2)
            pages = jnp.full((b * nk + 1, *x.shape[2:]), jnp.nan, x.dtype)
            return pages.at[order].set(x.reshape(b * nk, *x.shape[2:]))

        table = jnp.asarray(order.reshape(self.b, nk), jnp.int32)
        return paged(self.k), paged(self.v), table

    def forward(self, interpret, paged=False, **changes):
        k, v, table = self.pages() if paged else (self.k, self.v, None)
        return mosaic_gpu.forward(
            *(self.q, k, v, self.lists, self.elements),
            page_table=table,
            scale=self.scale,
            soft_cap=self.soft_cap,
            block_bias=self.block_bias,
            config=self.config("forward", **changes),
            interpret=interpret,
        )

    @property
    def transposed(self):
        """(q_idx, q_full, ptr, slot), sorted by (key block, query block)."""
        b, h, nq, nk = self.listed.shape
        capacity = nk
        q_idx, q_full, slot = np.zeros((3, b, h, nq * capacity), np.int32)
        ptr = np.zeros((b, h, nk + 1), np.int32)
        slots = np.cumsum(self.listed, -1) - 1
        for at in np.ndindex(b, h):
            j, i = np.nonzero(self.listed[at].T)
            q_idx[at][: len(i)], q_full[at][: len(i)] = i, self.full[at][i, j]
            slot[at][: len(i)] = i * capacity + slots[at][i, j]
            ptr[at][1:] = np.cumsum(self.listed[at].sum(0))
        return tuple(jnp.asarray(x) for x in (q_idx, q_full, ptr, slot))

    def backward(self, op, interpret, **changes):
        lists = self.lists if op == "backward_q" else self.transposed
        return getattr(mosaic_gpu, op)(
            *(self.q, self.k, self.v, self.dout),
            *(jnp.asarray(x, jnp.float32) for x in (self.exact[2], self.delta)),
            *(lists, self.elements),
            scale=self.scale,
            soft_cap=self.soft_cap,
            block_bias=self.block_bias,
            config=self.config(op, **changes),
            interpret=interpret,
        )

    # --- the same in float64

    def of_head(self, x, b, h):
        """What an array [b or 1, heads, ...] has for a query head."""
        x = np.asarray(x)
        return x[b if x.shape[0] > 1 else 0, h * x.shape[1] // self.h]

    def allowed(self, b, h):
        """bool [t, s], of whole blocks."""
        pick = lambda x: self.of_head(x, b, h)
        i, j = (np.arange(x.shape[2]) for x in (self.q, self.k))
        blocks = np.ones((self.block_q, self.block_k), bool)
        listed, full = (np.kron(pick(x), blocks) for x in (self.listed, self.full))
        if self.predicate is not None:
            of = self.elements
            listed &= full | self.predicate(
                i[:, None],
                j[None, :],
                [pick(x)[:, None] for x in of.rows],
                [pick(x)[None, :] for x in of.cols],
                [pick(x) for x in of.scalars],
                [pick(x) for x in of.dense],
            )
        return listed & (j < self.s)

    def heads(self):
        """Index of each head and its q, k, v, dout in float64."""
        for b, h in np.ndindex(self.b, self.h):
            arrays = self.q, self.k, self.v, self.dout
            yield (b, h), [np.asarray(self.of_head(x, b, h), "f8") for x in arrays]

    def bias_of(self, b, h):
        """The block bias over elements, [t, s]."""
        slots = np.cumsum(self.of_head(self.listed, b, h), -1) - 1
        bias = np.asarray(self.block_bias, "f8")[b, h]
        bias = np.take_along_axis(bias, np.maximum(slots, 0), -1)
        return np.kron(bias, np.ones((self.block_q, self.block_k)))

    @functools.cached_property
    def exact(self):
        """out and lse, and what the sum behind out is of in absolute numbers."""
        out, size = np.zeros((2, *self.dout.shape))
        lse = np.zeros(self.q.shape[:3])
        self.p, self.slope = {}, {}
        for at, (q, k, v, _) in self.heads():
            z, self.slope[at] = self.scale * q @ k.T, 1
            if self.soft_cap is not None:
                z = self.soft_cap * np.tanh(z / self.soft_cap)
                self.slope[at] = 1 - (z / self.soft_cap) ** 2
            z = z + self.bias_of(*at) if self.bias else z
            z = np.where(self.allowed(*at), z, -np.inf)
            with np.errstate(divide="ignore"):
                lse[at] = np.log(np.exp(z).sum(-1))
            self.p[at] = np.exp(z - np.where(np.isinf(lse[at]), 0, lse[at])[:, None])
            out[at], size[at] = self.p[at] @ v, self.p[at] @ np.abs(v)
        return out, size, lse

    @property
    def delta(self):
        return (self.exact[0] * np.asarray(self.dout, "f8")).sum(-1) - self.dlse

    @functools.cached_property
    def gradients(self):
        """dq, dk, dv and dbias; each with the absolute size of its addends."""
        dq, dk, dv = (np.zeros((2, *x.shape)) for x in (self.q, self.k, self.v))
        dbias = np.zeros((self.b, self.h, *self.listed.shape[2:]))
        delta = self.delta
        for at, (q, k, v, dout) in self.heads():
            p = self.p[at]
            dz = p * (dout @ v.T - delta[at][:, None])
            blocks = dz.reshape(
                -1, self.block_q, dz.shape[1] // self.block_k, self.block_k
            )
            listed = self.of_head(self.listed, *at)
            order = np.argsort(~listed, -1, kind="stable")
            dbias[at] = np.take_along_axis(blocks.sum((1, 3)), order, -1)
            dz = dz * self.slope[at] * self.scale
            to = at[0], at[1] * self.h_kv // self.h
            for i, f in enumerate([lambda x: x, np.abs]):
                dq[i][at] += f(dz) @ f(k)
                dk[i][to] += f(dz).T @ f(q)
                dv[i][to] += p.T @ f(dout)
        return dq, dk, dv, dbias

    def close(self, got, want, size):
        """Results and their addends are rounded once; sums are float32."""
        share = {"bfloat16": 2**-8, "float16": 2**-11}[self.dtype]
        assert got.shape == want.shape and got.dtype == self.dtype
        bound = share * (np.abs(want) + size) + 1e-5 * np.abs(want).max()
        error = np.abs(np.asarray(got, np.float64) - want)
        assert (error <= bound).all(), (error / bound).max()  # not so for NaN

    def check_forward(self, interpret, **changes):
        got, lse = self.forward(interpret, **changes)
        want, size, want_lse = self.exact
        self.close(got, want, size)
        np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=1e-5)
        empty = np.isinf(want_lse)
        assert empty.any() and not np.asarray(got, np.float32)[empty].any()

    def check_backward(self, interpret, **changes):
        dq, dk, dv, dbias = self.gradients
        got = self.backward("backward_q", interpret, **changes)
        if self.bias:
            got, got_bias = got
            np.testing.assert_allclose(got_bias, dbias, rtol=1e-4, atol=1e-4)
        self.close(got, *dq)
        got = self.backward("backward_kv", interpret, **changes)
        self.close(got[0], *dk)
        self.close(got[1], *dv)


CASES = {
    "grouped, packed": Case(
        h=4, h_kv=2, predicate=documents, rows=1, cols=1, scalars=1
    ),
    "ragged": Case(b=2, t=70, s=100, mask_b=2, predicate=everything),
    "blocks alone": Case(s=100, h_kv=2, mask_h=2),
    "documents": Case(
        *(1, 4, 2, 256, 256, 128, 64, 128, 128, 1, 2, "float16"),
        predicate=documents,
        rows=1,
        cols=1,
        scalars=1,
    ),
    "heads of 192": Case(d=192, dv=128, predicate=documents, rows=1, cols=1, scalars=1),
    "heads of 32 and 96": Case(d=32, dv=96, s=192, predicate=causal),
    "heads of 256": Case(
        *(1, 2, 1, 128, 128, 256, 256),
        predicate=documents,
        rows=1,
        cols=1,
        scalars=1,
        soft_cap=2.0,
        bias=True,
    ),
    "wide and narrow heads": Case(d=256, dv=16, predicate=causal, bias=True),
    "given": Case(
        *(2, 2, 1, 128, 256, 64, 64, 64, 128), predicate=given, dense=2, mask_b=2
    ),
    "given, heads of 256": Case(
        *(1, 2, 1, 128, 128, 256, 256, 128, 64), predicate=given, dense=1
    ),
    "capped": Case(predicate=causal, soft_cap=2.0, bias=True),
}


# Heads packed and not, sums for keys and values by one warpgroup and by two, one step
# per block and two, operands, a cap, a bias.
QUICK = "capped", "documents"
REPEATS = "heads of 192", "wide and narrow heads", "given, heads of 256"
NAMES = [
    pytest.param(
        name,
        marks=[pytest.mark.slow] * (name not in QUICK)
        + [pytest.mark.exhaustive] * (name in REPEATS),
    )
    for name in CASES
]


@pytest.mark.parametrize("name", NAMES)
def test_forward(name, interpret):
    CASES[name].check_forward(interpret)


@pytest.mark.parametrize("name", NAMES)
def test_backward(name, interpret):
    CASES[name].check_backward(interpret)


def test_pages(interpret):
    case = Case(b=2, t=70, s=150, block_k=128, predicate=everything, seed=1)
    case.check_forward(interpret, paged=True)


# --- What is refused, and tiles -------------------------------------------------------

GOOD = _spec.Problem(
    op="forward",
    b=2,
    h=8,
    h_kv=2,
    t=4096,
    s=4096,
    d=128,
    dv=128,
    block_q=128,
    block_k=128,
    capacity=8,
    mask_b=1,
    mask_h=8,
    dtype="bfloat16",
)
KV, Q = dict(op="backward_kv"), dict(op="backward_q")
REFUSED = [
    ({}, "a100", "chip is a100, needs a Hopper GPU (h100, h200)"),
    (dict(dtype="float32"), "h200", "dtype is float32, needs bfloat16 or float16"),
    (dict(t=0), "h200", "t is 0, needs at least 1"),
    (dict(capacity=0), None, "capacity is 0, needs at least 1"),
    (dict(block_q=32), "h100", "block_q is 32, needs a multiple of 64"),
    (dict(block_k=96), "h100", "block_k is 96, needs a multiple of 64"),
    (dict(d=40), "h100", "d is 40, needs a multiple of 16 from 16 to 192, or 256"),
    (
        Q | dict(dv=208),
        None,
        "dv is 208, needs a multiple of 16 from 16 to 192, or 256",
    ),
    (KV | dict(dv=0), None, "dv is 0, needs a multiple of 16 from 16 to 192, or 256"),
    (
        Q | dict(d=256, dv=256, rows=20, cols=20, dense=20),
        "h200",
        # 64 rows of q, dout and 22 numbers; twice 64 positions of k, v and 20 numbers,
        # and 20 times two words of each row; 4096 beside.
        "rows is 20, cols is 20, dense is 20, with head sizes 256 and 256 backward_q "
        "takes 237056 bytes of shared memory, needs at most 232448",
    ),
    (Q | dict(paged=True), "h200", "pages have no backward_q"),
    (KV | dict(paged=True), "h200", "pages have no backward_kv"),
]


@pytest.mark.parametrize(("changes", "chip", "needs"), REFUSED, ids=lambda p: str(p))
def test_refuses(changes, chip, needs):
    problem = dataclasses.replace(GOOD, **changes)
    with pytest.raises(NotImplementedError, match=re.escape(f"mosaic_gpu: {needs}")):
        _spec.check_mosaic_gpu(problem, chip)


@pytest.mark.parametrize(
    ("changes", "tiles"),
    [
        # (warpgroups, group, tile, split): two warpgroups where there is work for them.
        ({}, (2, 1, 128, False)),
        (dict(rows=1), (2, 1, 64, False)),
        (dict(dense=1), (2, 1, 64, False)),
        (dict(block_k=64), (2, 1, 64, False)),
        (dict(block_q=64), (1, 1, 64, False)),
        (dict(block_q=64, mask_h=2), (2, 2, 128, False)),
        (Q, (2, 1, 64, False)),
        (dict(d=256, dv=256), (2, 1, 64, False)),
        (dict(d=256, dv=256, cols=1), (2, 1, 32, False)),
        (Q | dict(d=192, dv=192), (2, 1, 64, False)),
        (Q | dict(d=192, dv=192, bias=True), (2, 1, 32, False)),
        (Q | dict(d=256, block_q=64, mask_h=2, rows=1), (2, 1, 64, True)),
        (Q | dict(d=256, rows=1, bias=True), (2, 1, 32, True)),
        (KV, (2, 1, 64, True)),
        (KV | dict(block_k=64), (2, 1, 64, True)),
        (KV | dict(d=64, dv=64), (2, 1, 64, False)),
        (KV | dict(d=256, dv=256), (2, 1, 64, True)),
        (KV | dict(d=256, dv=256, soft_cap=True), (2, 1, 32, True)),
        (KV | dict(d=64, dv=64, block_k=192), (1, 1, 64, False)),
    ],
)
def test_tiles(changes, tiles):
    config = _spec.config_mosaic_gpu(dataclasses.replace(GOOD, **changes), "h200")
    got = config.warpgroups, config.group, config.tile, config.split
    assert got == tiles and config.stages >= 2
