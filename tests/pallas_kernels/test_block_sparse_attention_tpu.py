"""The TPU kernels in Pallas' interpreter against float64 numpy; what they refuse."""

import dataclasses

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import _chips
from pallas_kernels.block_sparse_attention import _spec, mosaic_tpu
from sparsejax.testing import assert_close


def attention(dtype, q, k, v, dout, allowed, scale, soft_cap=None, bias=None):
    """Every array's gradient too, of sum(out * dout); in float64 or as the kernels.

    allowed [b, h, t, s]; bias [b, h, t, s] or None. In another dtype than float64 the
    sums are float32, probabilities and their gradients are rounded to ``dtype``.
    """
    wide = np.promote_types(dtype, np.float32)
    q, k, v, dout = (np.asarray(a).astype(wide) for a in (q, k, v, dout))
    share = q.shape[1] // k.shape[1]
    k, v = (np.repeat(a, share, axis=1) for a in (k, v))
    short = lambda a: a.astype(dtype).astype(wide)
    z = wide.type(scale) * np.einsum("bhid,bhjd->bhij", q, k)
    slope = np.ones_like(z)
    if soft_cap is not None:
        slope = 1 - np.tanh(z / wide.type(soft_cap)) ** 2
        z = wide.type(soft_cap) * np.tanh(z / wide.type(soft_cap))
    z = np.where(allowed, z if bias is None else z + bias.astype(wide), -np.inf)
    with np.errstate(divide="ignore"):
        most = np.max(z, axis=-1, keepdims=True, initial=-1e30)
        p = np.exp(z - most)
        sums = p.sum(-1, keepdims=True)
        lse = (most + np.log(sums))[..., 0]
    inverse = np.where(sums > 0, 1 / np.where(sums > 0, sums, 1), 0)
    out = np.einsum("bhij,bhjd->bhid", short(p), v) * inverse
    # The gradients' probabilities are those that the log-sum, as stored, says.
    p = np.exp(z - np.where(sums > 0, lse[..., None], 1e30).astype(wide))
    delta = np.sum(out * dout, axis=-1)
    dz = p * (np.einsum("bhid,bhjd->bhij", dout, v) - delta[..., None])
    raw = short(dz * slope)
    dq = wide.type(scale) * np.einsum("bhij,bhjd->bhid", raw, k)
    dk = wide.type(scale) * np.einsum("bhij,bhid->bhjd", raw, q)
    dv = np.einsum("bhij,bhid->bhjd", short(p), dout)
    b, h, s, d = dk.shape
    dk, dv = (a.reshape(b, h // share, share, s, a.shape[3]).sum(2) for a in (dk, dv))
    cast = lambda *arrays: tuple(a.astype(dtype) for a in arrays)
    return dict(
        zip(("out", "dq", "dk", "dv"), cast(out, dq, dk, dv), strict=True),
        lse=lse,
        delta=delta,
        dz=dz,
    )


# What a predicate may read: name -> (predicate, counts of rows, cols, scalars, dense).
PREDICATES = {
    "all": (None, 0, 0, 0, 0),
    "causal": (lambda i, j, *_: i >= j, 0, 0, 0, 0),
    "window": (lambda i, j, *_: (i - j < 70) & (j - i < 30), 0, 0, 0, 0),
    "segments": (lambda i, j, rows, cols, *_: rows[0] == cols[0], 1, 1, 0, 0),
    "keys alone": (lambda i, j, *_: j < 150, 0, 0, 0, 0),
    "scalar": (
        lambda i, j, rows, cols, scalars, dense: (j < scalars[0]) | (i >= j),
        0,
        0,
        1,
        0,
    ),
    "dense": (lambda i, j, rows, cols, scalars, dense: dense[0], 0, 0, 0, 1),
    "many": (
        lambda i, j, rows, cols, scalars, dense: (
            (rows[0] == cols[0]) & (~dense[0] | (rows[1] < cols[1]))
            | (i - j == scalars[0])
        ),
        2,
        2,
        1,
        1,
    ),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """Heads and sizes of an attention, and what is special about its mask."""

    b: int = 1
    h: int = 1
    h_kv: int = 1
    t: int = 256
    s: int = 256
    d: int = 32
    dv: int = 32
    block: tuple[int, int] = (64, 128)
    mask: tuple[int, int] = (1, 1)
    told: tuple[int, int] = (1, 1)  # batch and heads of the predicate's operands
    predicate: str = "causal"
    soft_cap: float | None = None
    bias: tuple[int, int] | None = None
    capacity: int | None = None
    map: str = "random"
    scale: float = 0.25
    paged: bool = False

    def problem(self, op, dtype, capacity=2):
        return _spec.Problem(
            op,
            *(self.b, self.h, self.h_kv, self.t, self.s, self.d, self.dv),
            *self.block,
            capacity,
            *self.mask,
            dtype,
            *PREDICATES[self.predicate][1:],
            soft_cap=self.soft_cap is not None,
            bias=self.bias is not None,
            paged=self.paged,
        )


def block_lists(case, rng):
    """(lists, transposed lists, allowed blocks, full blocks), by loops."""
    bq, bk = case.block
    nq, nk = -(-case.t // bq), -(-case.s // bk)
    listed = rng.random((*case.mask, nq, nk)) < (1 if case.map == "all" else 0.5)
    if case.map == "none":
        listed[:] = False
    if case.map == "random":
        listed[..., 0] = True
    if case.map == "random" and nq > 2:
        listed[..., rng.integers(nq), :] = False
    full = rng.random(listed.shape) < 0.3
    if case.map == "last, partial":
        listed, full = np.zeros_like(listed), np.zeros_like(full)
        listed[..., -1] = True
    capacity = case.capacity or max(1, int(listed.sum(-1).max()))
    idx, is_full = np.zeros((2, *case.mask, nq, capacity), np.int32)
    cnt = listed.sum(-1).astype(np.int32)
    q_idx, q_full, slot = np.zeros((3, *case.mask, nq * capacity), np.int32)
    ptr = np.zeros((*case.mask, nk + 1), np.int32)
    for place in np.ndindex(*case.mask):
        for i in range(nq):
            keys = np.flatnonzero(listed[place][i])
            idx[place][i, : len(keys)] = keys
            # Slots beyond the count take no part, whatever they say.
            idx[place][i, len(keys) :] = keys[-1] if len(keys) else 0
            is_full[place][i, : len(keys)] = full[place][i, keys]
            is_full[place][i, len(keys) :] = 1
        entry = 0
        for j in range(nk):
            for i in np.flatnonzero(listed[place][:, j]):
                q_idx[place][entry], q_full[place][entry] = i, full[place][i, j]
                slot[place][entry] = i * capacity + list(idx[place][i]).index(j)
                entry += 1
            ptr[place][j + 1] = entry
    return (idx, cnt, is_full), (q_idx, q_full, ptr, slot), listed, full


def heads_of(array, b, h):
    """Each batch's and query head's own."""
    array = np.repeat(array, h // array.shape[1], axis=1)
    return np.broadcast_to(array, (b, *array.shape[1:]))


def operands(case, dtype):
    """(arrays, lists, transposed, elements, bias, allowed, the bias by element)."""
    rng = np.random.default_rng(case.h + case.t + case.d)
    b, h, t, s = case.b, case.h, case.t, case.s
    bq, bk = case.block
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    q, dout = normal(b, h, t, case.d), normal(b, h, t, case.dv)
    k, v = normal(b, case.h_kv, s, case.d), normal(b, case.h_kv, s, case.dv)
    lists, transposed, listed, full = block_lists(case, rng)
    predicate, *counts = PREDICATES[case.predicate]
    number = lambda *shape: rng.integers(0, 4, (*case.told, *shape)).astype(np.int32)
    rows, cols, scalars = (
        tuple(number(*shape) for _ in range(count))
        for count, shape in zip(counts, ((t,), (s,), ()), strict=False)
    )
    dense = tuple(rng.random((*case.told, t, s)) < 0.5 for _ in range(counts[3]))
    elements = _spec.Elements(predicate, rows, cols, scalars, dense)

    spread = lambda blocks: heads_of(
        np.kron(blocks, np.ones((bq, bk), blocks.dtype))[..., :t, :s], b, h
    )
    allowed = np.ones((b, h, t, s), bool)
    if predicate is not None:
        each = lambda arrays, *shape: tuple(
            heads_of(a.reshape(*case.told, *shape), b, h) for a in arrays
        )
        i, j = np.arange(t)[:, None], np.arange(s)[None]
        allowed = predicate(
            i,
            j,
            each(rows, t, 1),
            each(cols, 1, s),
            each(scalars, 1, 1),
            each(dense, t, s),
        )
    allowed = spread(listed) & (allowed | spread(full))
    # What allows nothing shows nothing.
    assert allowed.any() == (case.map != "none")
    bias = bias_map = None
    if case.bias is not None:
        idx, cnt, _ = (np.repeat(a, 1, axis=0) for a in lists)
        nq, capacity = idx.shape[2:]
        bias = rng.standard_normal((*case.bias, nq, capacity)).astype(np.float32)
        shape = (*np.maximum(case.bias, case.mask), nq, -(-s // bk))
        blocks = np.zeros(shape, np.float32)
        wide = (heads_of(a, *shape[:2]) for a in (bias, idx, cnt))
        wide_bias, idx, cnt = wide
        for place in np.ndindex(*shape[:3]):
            for entry in range(cnt[place]):
                blocks[place][idx[place][entry]] = wide_bias[place][entry]
        bias_map = spread(blocks)
    return (q, k, v, dout), lists, transposed, elements, bias, allowed, bias_map


def dbias_of(case, dz, lists):
    """Sums of dz over each listed block: [bias_b, h, nq, capacity]."""
    (bq, bk), (idx, cnt, _) = case.block, lists
    idx, cnt = (heads_of(a, case.b, case.h) for a in (idx, cnt))
    out = np.zeros(idx.shape, dz.dtype)
    for place in np.ndindex(*cnt.shape):
        for entry in range(cnt[place]):
            i, j = place[2], idx[place][entry]
            part = dz[place[:2]][i * bq : (i + 1) * bq, j * bk : (j + 1) * bk]
            out[place][entry] = part.sum()
    return out.sum(0, keepdims=True) if case.bias[0] == 1 else out


def padded(case, axis, *arrays):
    size = -(-(case.t, case.s)[axis] // case.block[axis]) * case.block[axis]
    more = lambda a: [(0, size - a.shape[2] if n == 2 else 0) for n in range(a.ndim)]
    return [jnp.pad(jnp.asarray(a), more(a)) for a in arrays]


def paged(case, rng, *arrays):
    """Pages of k and v in any order, one unused, and the table."""
    nk = arrays[0].shape[2] // case.block[1]
    table = rng.permutation(case.b * nk + 1)[: case.b * nk].reshape(case.b, nk)
    pages = []
    for a in arrays:
        b, heads, _, d = a.shape
        blocks = a.reshape(b, heads, nk, -1, d).transpose(0, 2, 1, 3, 4)
        page = jnp.full((b * nk + 1, *blocks.shape[2:]), jnp.nan, a.dtype)
        pages.append(page.at[table].set(blocks))
    return *pages, jnp.asarray(table, jnp.int32)


def check(
    case, dtype, ops=("forward", "backward_q", "backward_kv"), interpret=True, **changes
):
    """Runs the kernels on random operands."""
    arrays, lists, transposed, elements, bias, allowed, bias_map = operands(case, dtype)
    how = dict(scale=case.scale, soft_cap=case.soft_cap, bias=bias_map)
    want = attention(np.float64, *arrays, allowed, **how)
    low = attention(arrays[0].dtype, *arrays, allowed, **how)
    (q, k, v, dout), (t, s) = arrays, (case.t, case.s)
    q, dout, lse, delta = padded(case, 0, q, dout, want["lse"], want["delta"])
    lse, delta = lse.astype(jnp.float32), delta.astype(jnp.float32)
    k, v = padded(case, 1, k, v)
    lists, transposed, elements = jax.tree.map(
        jnp.asarray, (lists, transposed, elements[1:])
    )
    elements = _spec.Elements(PREDICATES[case.predicate][0], *elements)
    how = dict(scale=case.scale, soft_cap=case.soft_cap, interpret=interpret)
    how["block_bias"] = None if bias is None else jnp.asarray(bias)

    def config(op):
        problem = case.problem(op, dtype, lists[0].shape[3])
        _spec.check_mosaic_tpu(problem, "v5e")
        return dataclasses.replace(_spec.config_mosaic_tpu(problem, "v5e"), **changes)

    def close(out, name, size):
        out = np.asarray(out)[:, :, :size]
        assert_close(out, want[name], low[name])

    if "forward" in ops:
        table = {}
        if case.paged:
            *pages, table["page_table"] = paged(case, np.random.default_rng(0), k, v)
        out, log_sum = mosaic_tpu.forward(
            q,
            *(pages if case.paged else (k, v)),
            lists,
            elements,
            **how,
            **table,
            config=config("forward"),
        )
        assert out.dtype == q.dtype and log_sum.dtype == jnp.float32
        close(out, "out", t)
        log_sum, some = np.asarray(log_sum)[:, :, :t], allowed.any(-1)
        assert (log_sum[~some] == -np.inf).all()
        assert (np.asarray(out)[:, :, :t][~some] == 0).all()
        assert_close(log_sum[some], want["lse"][some], low["lse"][some], eps=1e-5)
    if "backward_q" in ops:
        dq = mosaic_tpu.backward_q(
            q,
            k,
            v,
            dout,
            lse,
            delta,
            lists,
            elements,
            **how,
            config=config("backward_q"),
        )
        if bias is not None:
            dq, dbias = dq
            sums = [dbias_of(case, a["dz"], lists) for a in (want, low)]
            assert_close(dbias, *sums, eps=1e-5)
        assert dq.dtype == q.dtype
        close(dq, "dq", t)
    if "backward_kv" in ops:
        dk, dv = mosaic_tpu.backward_kv(
            q,
            k,
            v,
            dout,
            lse,
            delta,
            transposed,
            elements,
            **how,
            config=config("backward_kv"),
        )
        assert dk.dtype == k.dtype and dv.dtype == v.dtype
        close(dk, "dk", s)
        close(dv, "dv", s)


CASES = {
    "causal": Case(),
    "wholly allowed, all blocks": Case(predicate="all", map="all", t=128),
    "no block at all": Case(map="none"),
    # Keys 128 .. 255, and j - i < 30: rows before 99 allow nothing, others little.
    "empty rows in a listed block": Case(
        t=128, map="last, partial", predicate="window"
    ),
    "heads share lists": Case(h=4, h_kv=2, block=(128, 128), told=(1, 2)),
    "few rows, folded": Case(b=2, h=6, h_kv=2, t=6, block=(2, 384), s=500),
    "a list for each head": Case(b=2, h=4, h_kv=2, mask=(2, 4), predicate="segments"),
    "ragged": Case(t=100, s=200, predicate="window"),
    "ragged, wholly allowed": Case(t=33, s=129, predicate="all", map="all"),
    "keys alone": Case(predicate="keys alone"),
    "scalars by batch": Case(b=2, told=(2, 1), predicate="scalar"),
    "dense, by head": Case(h=2, told=(1, 2), predicate="dense"),
    "every operand": Case(
        b=2, h=4, h_kv=2, predicate="many", told=(2, 2), block=(32, 256), s=400
    ),
    "bias and cap": Case(h=2, bias=(1, 2), soft_cap=1.5, s=384),
    "bias by list": Case(b=2, h=4, h_kv=2, mask=(2, 2), bias=(2, 2)),
    "cap": Case(soft_cap=0.8, d=64, dv=16),
    "capacity above the counts": Case(s=512, capacity=7),
    "one key head": Case(h=8, h_kv=1, block=(128, 128), d=16, predicate="window"),
    "negative scale": Case(scale=-0.3),
    "wide heads": Case(d=256, dv=160, scale=0.0625),
}
QUICK = [("heads share lists", "float32")]
QUICK += [("empty rows in a listed block", "float32")]
SLOW = [
    ("few rows, folded", "bfloat16"),
    ("a list for each head", "float32"),
    ("ragged", "bfloat16"),
    ("every operand", "float32"),
    ("bias by list", "float32"),
    ("bias and cap", "bfloat16"),
]


def params():
    for case in CASES:
        for dtype in ("float32", "bfloat16"):
            marks = [] if (case, dtype) in QUICK else [pytest.mark.slow]
            marks += [pytest.mark.exhaustive] * ((case, dtype) not in QUICK + SLOW)
            yield pytest.param(case, dtype, marks=marks)


@pytest.mark.parametrize(("case", "dtype"), list(params()))
def test_against_float64(case, dtype):
    check(CASES[case], dtype)


def test_decoding_by_pages():
    """One query; pages in any order, of which one is NaN and no sequence's."""
    case = Case(b=2, h=4, h_kv=2, t=1, block=(1, 128), s=384, paged=True, map="all")
    check(dataclasses.replace(case, predicate="all"), "float32", ["forward"])


def test_unroll_and_parts():
    """Blocks one by one, three to a list; steps and programs take turns at buffers."""
    check(Case(s=384, map="all"), "float32", unroll=1, rows=32)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_64_bit_types_on():
    with jax.enable_x64(True):
        check(CASES["bias and cap"], "bfloat16")


@pytest.mark.slow
def test_with_simulated_memory():
    """Uninitialised scratch is NaN in this interpreter: nothing of it is read."""
    nan = pltpu.InterpretParams(uninitialized_memory="nan")
    check(CASES["no block at all"], "float32", interpret=nan)
    check(CASES["bias and cap"], "float32", ["backward_kv"], interpret=nan)


PROBLEM = _spec.Problem(
    "forward", 1, 8, 2, 4096, 4096, 128, 128, 128, 128, 32, 1, 1, "bfloat16"
)


@pytest.mark.parametrize(
    ("change", "chip", "needs"),
    [
        (dict(dtype="float16"), "v5e", "dtype is float16, needs bfloat16 or float32"),
        (dict(block_k=64), "v5e", "block_k is 64, needs a multiple of 128"),
        (dict(block_k=16), "v5e", "block_k is 16, needs a multiple of 128"),
        (dict(block_q=0), "v5e", "block_q is 0, needs at least 1"),
        (dict(d=320), "v5e", "d is 320, needs a multiple of 8 from 8 to 256"),
        (dict(dv=20), "v5e", "dv is 20, needs a multiple of 8 from 8 to 256"),
        (dict(capacity=0), "v5e", "capacity is 0, needs at least 1"),
        (dict(capacity=2**17), "v5e", "capacity is 131072, whose lists take 524288 by"),
        (dict(op="backward_kv", t=2**24), "v5e", "t is 16777216, whose lists take 524"),
        (dict(op="backward_q", paged=True), "v5e", "pages have no backward_q"),
        (dict(op="backward_kv", paged=True), "v5e", "pages have no backward_kv"),
        (
            dict(block_q=4096, block_k=4096),
            None,
            "bytes of VMEM, the smallest chip has",
        ),
        (dict(block_q=4096, block_k=4096), "v4", "bytes of VMEM, v4 has 13631488: sma"),
        ({}, "v3", "chip is v3, needs one of v4"),
        ({}, "h200", "chip is h200"),
    ],
)
def test_refusals(change, chip, needs):
    _spec.check_mosaic_tpu(PROBLEM, "v5e" if chip in ("v3", "h200") else chip)
    with pytest.raises(NotImplementedError, match=f"mosaic_tpu: .*{needs}"):
        _spec.check_mosaic_tpu(dataclasses.replace(PROBLEM, **change), chip)


@pytest.mark.parametrize("chip", ["v4", "v5e", "v5p", None])
@pytest.mark.parametrize("op", ["forward", "backward_q", "backward_kv"])
@pytest.mark.parametrize("block", [128, 512])
@pytest.mark.parametrize("d", [32, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_chip_has_room(chip, op, block, d, dtype):
    problem = dataclasses.replace(
        PROBLEM, op=op, block_q=block, block_k=block, d=d, dv=d, dtype=dtype
    )
    _spec.check_mosaic_tpu(problem, chip)
    config = _spec.config_mosaic_tpu(problem, chip)
    assert config.vmem <= _chips.tpu_vmem(chip)


def test_tiles_by_hand():
    # 8 / 2 = 4 heads share keys and a list: 4 * 128 rows; 512 / 128 blocks to a step.
    config = _spec.config_mosaic_tpu(PROBLEM, "v5e")
    assert (config.group, config.unroll, config.rows) == (4, 4, 512)
    # Of lists for 4 heads two query heads each share one.
    problem = dataclasses.replace(PROBLEM, mask_h=4)
    assert _spec.config_mosaic_tpu(problem, "v5e").group == 2
    # No more blocks to a step than a list has.
    problem = dataclasses.replace(PROBLEM, capacity=3)
    assert _spec.config_mosaic_tpu(problem, "v5e").unroll == 3
    # A program holds at most 1024 rows: 2 heads of 512.
    problem = dataclasses.replace(PROBLEM, block_q=512)
    assert _spec.config_mosaic_tpu(problem, "v5e").group == 2
    # backward_kv brings 4 * 128 rows by one entry.
    problem = dataclasses.replace(PROBLEM, op="backward_kv")
    config = _spec.config_mosaic_tpu(problem, "v5e")
    assert (config.group, config.unroll, config.rows) == (4, 1, 256)


@pytest.mark.parametrize("op", ["forward", "backward_q", "backward_kv"])
def test_names(op):
    q, line = jnp.ones((1, 1, 128, 32)), jnp.zeros((1, 1, 128))
    entry, ptr = jnp.zeros((1, 1, 1), jnp.int32), jnp.zeros((1, 1, 2), jnp.int32)
    lists = (entry[..., None], entry, entry[..., None])
    how = dict(scale=1.0, config=_spec.Config(128, 128, 128), interpret=True)
    args = {
        "forward": (q, q, q, lists),
        "backward_q": (q, q, q, q, line, line, lists),
        "backward_kv": (q, q, q, q, line, line, (entry, entry, ptr, entry)),
    }[op]
    fn = lambda *args: getattr(mosaic_tpu, op)(*args, _spec.Elements(), **how)
    jaxpr = str(jax.make_jaxpr(fn)(*args))
    assert f"name=block_sparse_attention_{op}\n" in jaxpr
