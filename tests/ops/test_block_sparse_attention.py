"""Every implementation of block_sparse_attention against float64."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import sparsejax as sj
from sparsejax import attention as at
from sparsejax.ops import block_sparse_attention, block_sparse_attention_reference
from sparsejax.ops._attention_implementations import ATTENTION
from sparsejax.testing import assert_close, interpreted

NEW_PALLAS = tuple(int(v) for v in jax.__version__.split(".")[:2]) >= (0, 11)
# Mosaic GPU has an interpreter from jax 0.11 on; before, only the compile tests see it.
IMPLEMENTATIONS = [n for n in ATTENTION if n != "mosaic_gpu" or NEW_PALLAS]
# Hopper's kernels take 16 bits.
OF_FLOAT32 = [n for n in IMPLEMENTATIONS if n != "mosaic_gpu"]


class Case(NamedTuple):
    """Sizes (b, t, s, h, h_kv, d, dv), a mask, and what else is asked for."""

    sizes: tuple[int, ...]
    mask: at.BlockMask
    allowed: np.ndarray  # bool [b, h, t, s], made without sparsejax.attention
    dtype: str = "float32"
    cap: float | None = None
    biased: bool = False


def positions(t, s):
    return np.arange(t)[:, None], np.arange(s)[None]


def spread(mask, b, h):
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    shape = (b, h, *mask.shape[2:])
    return np.broadcast_to(np.repeat(mask, h // mask.shape[1], 1), shape)


def window(t, s, block, dtype="float32", b=2, h=4, h_kv=2, d=8, dv=6, width=20):
    i, j = positions(t, s)
    allowed = spread((i >= j) & (i - j < width), b, h)
    mask = at.block_mask(
        at.causal() & at.sliding_window(width), t, s, block_shape=block
    )
    return Case((b, t, s, h, h_kv, d, dv), mask, allowed, dtype)


def random(t, s, block, dtype, mask_b=2, mask_h=4, h=4, h_kv=2, d=8, dv=6, **how):
    """Blocks and elements at random; rows, query blocks and key blocks are empty."""
    rng = np.random.default_rng(t)
    allowed = rng.random((mask_b, mask_h, t, s)) < 0.3
    allowed[:, :, 5:6] = False
    allowed[:, 0, block[0] : 2 * block[0]] = False
    allowed[:, -1, :, block[1] : 2 * block[1]] = False
    allowed[0, :, : block[0], : block[1]] = True
    mask = at.BlockMask.from_mask(jnp.asarray(allowed), block)
    allowed = np.repeat(allowed, h // mask_h, 1)
    allowed = np.broadcast_to(allowed, (2, *allowed.shape[1:]))
    return Case((2, t, s, h, h_kv, d, dv), mask, allowed, dtype, **how)


def whole_blocks(t, s, block, dtype, h=4, h_kv=2, d=8, dv=6, b=2, **how):
    """Full blocks alone, no expression; every query block lists key block 0."""
    nq, nk = -(-t // block[0]), -(-s // block[1])
    rng = np.random.default_rng(nq)
    blocks = rng.random((1, h_kv, nq, nk)) < 0.25
    blocks[..., 0], blocks[:, 0, 1], blocks[:, 1, :, 2] = True, False, False
    mask = at.BlockMask.from_blocks(
        jnp.asarray(blocks), shape=(t, s), block_shape=block
    )
    ones = np.ones(block, bool)
    allowed = spread(np.kron(blocks, ones)[..., :t, :s], b, h)
    return Case((b, t, s, h, h_kv, d, dv), mask, allowed, dtype, **how)


def documents(t, s, block, dtype, b=1, h=2, h_kv=1, d=64, dv=64):
    """Causal inside packed documents, or the first 7 keys, which are everyone's."""
    i, j = positions(t, s)
    ids = np.sort(np.random.default_rng(0).integers(0, 3, max(t, s)))
    allowed = ((i >= j) & (ids[:t, None] == ids[None, :s])) | (j < 7)
    allowed[t // 3] = False
    not_this = np.arange(t) != t // 3
    segments = at.segments(jnp.asarray(ids[:t]), jnp.asarray(ids[:s]))
    expr = (at.causal() & segments) | at.keys_below(7)
    only = at.segments(jnp.asarray(not_this, jnp.int32), jnp.ones(s, jnp.int32))
    mask = at.block_mask(expr & only, t, s, block_shape=block)
    return Case((b, t, s, h, h_kv, d, dv), mask, spread(allowed, b, h), dtype)


# Made when asked for: importing this file computes nothing.
CASES = {
    "window": lambda: window(40, 40, (16, 8)),
    "random": lambda: random(40, 56, (16, 8), "float32", cap=1.5, biased=True),
    # Of which FlexAttention's code for a CPU does not compile.
    "whole_blocks": lambda: whole_blocks(50, 44, (8, 8), "bfloat16", biased=True),
    "longer_keys": lambda: window(24, 70, (8, 16), "bfloat16", h=2, dv=16),
    "longer_queries": lambda: window(70, 24, (8, 16), width=9),
    "f16": lambda: random(20, 20, (8, 8), "float16", mask_b=1, mask_h=1),
    "one_query": lambda: random(1, 33, (16, 8), "float32", mask_h=2),
    "one_block": lambda: window(5, 6, (16, 16), h=3, h_kv=1),
    "heads_share": lambda: random(30, 30, (8, 8), "float32", mask_h=2, h=8, h_kv=4),
    "for_kernels": lambda: documents(256, 384, (64, 128), "bfloat16"),
    "kernels_ragged": lambda: documents(200, 300, (64, 128), "bfloat16", h_kv=2),
    "kernels_f32": lambda: whole_blocks(
        256, 384, (64, 128), "float32", d=32, dv=64, b=1, cap=2.0, biased=True
    ),
    "kernels_biased": lambda: whole_blocks(
        256, 384, (64, 128), "bfloat16", d=64, dv=64, b=1, biased=True
    ),
}
QUICK = ["random", "whole_blocks"]


def choice(name):
    return name if name in ("xla", None) else interpreted(name)


def slowly(names, *others):
    """The interpreted kernels' tests are marked slow."""
    marks = lambda name: [] if name == "xla" else [pytest.mark.slow, *others]
    return [pytest.param(name, marks=marks(name)) for name in names]


@functools.cache
def case(name):
    return CASES[name]()


@functools.cache
def arrays(name):
    """query, key, value, bias (or None), dout and dlse."""
    made = case(name)
    b, t, s, h, h_kv, d, dv = made.sizes
    rng = np.random.default_rng(sum(map(ord, name)))
    draw = lambda dtype, *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    q, k = draw(made.dtype, b, t, h, d), draw(made.dtype, b, s, h_kv, d)
    v, dout = draw(made.dtype, b, s, h_kv, dv), draw(made.dtype, b, t, h, dv)
    slots = made.mask.grid[0], made.mask.capacity
    bias = draw("float32", b, h, *slots) if made.biased else None
    return q, k, v, bias, dout, draw("float32", b, t, h)


def f64(a):
    return None if a is None else np.asarray(a, np.float64)


def oracle(made, q, k, v, bias, dout, dlse):
    """out, lse, dq, dk, dv and dbias in float64, densely, head by head."""
    q, k, v, bias, dout, dlse = map(f64, (q, k, v, bias, dout, dlse))
    (b, t, _, h, h_kv, *_), scale = made.sizes, made.sizes[5] ** -0.5
    (bq, bk), cap = made.mask.block_shape, made.cap
    idx, count = np.asarray(made.mask.kv_idx), np.asarray(made.mask.kv_cnt)
    out, lse = np.zeros(dout.shape), np.zeros(dlse.shape)
    dq, dk, dv = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    dbias = None if bias is None else np.zeros(bias.shape)
    for n, head in np.ndindex(b, h):
        own = head // (h // h_kv)
        lists = n % idx.shape[0], head // (h // idx.shape[1])
        z = scale * q[n, :, head] @ k[n, :, own].T
        slope = np.ones(z.shape)
        if cap is not None:
            z = cap * np.tanh(z / cap)
            slope = 1 - (z / cap) ** 2
        places = [
            (np.s_[i * bq : i * bq + bq, j * bk : j * bk + bk], (n, head, i, r))
            for i in range(idx.shape[2])
            for r in range(count[*lists, i])
            for j in [idx[*lists, i, r]]
        ]
        if bias is not None:
            for block, slot in places:
                z[block] += bias[slot]
        e = np.where(made.allowed[n, head], np.exp(z), 0)
        total = e.sum(1)
        some = total > 0
        p = e / np.where(some, total, 1)[:, None]
        out[n, :, head] = p @ v[n, :, own]
        lse[n, :, head] = np.log(total, where=some, out=np.full(t, -np.inf))
        dp = dout[n, :, head] @ v[n, :, own].T
        delta = (dout[n, :, head] * out[n, :, head]).sum(1) - dlse[n, :, head]
        dz = p * (dp - delta[:, None])
        if bias is not None:
            for block, slot in places:
                dbias[slot] += dz[block].sum()
        dz = scale * dz * slope
        dq[n, :, head] = dz @ k[n, :, own]
        dk[n, :, own] += dz.T @ q[n, :, head]
        dv[n, :, own] += p.T @ dout[n, :, head]
    return out, lse, dq, dk, dv, dbias


def value_and_gradients(attention, made, q, k, v, bias, dout, dlse):
    def run(q, k, v, bias):
        how = dict(logits_soft_cap=made.cap, block_bias=bias, return_lse=True)
        return attention(q, k, v, made.mask, **how)

    (out, lse), vjp = jax.vjp(run, q, k, v, bias)
    return out, lse, *vjp((dout, dlse))


def low(made, *args):
    fn = functools.partial(value_and_gradients, block_sparse_attention_reference, made)
    return jax.jit(fn)(*args)


def check(got, want, plain):
    """All six, where lse is -inf of the same rows.

    The gradient of a bias too, in 16 bits: ``dz = p (dp - dout . out)`` has a sum over
    its row that is not 0 where out is of rounded exponentials, and a sum over a block
    adds that up, to 8 times the error of the dense formula, in whose softmax those sums
    are 0 by construction. So what is differentiated by a bias has an out of twice the
    digits.
    """
    for out, reference, rounded in zip(got, want, plain, strict=True):
        if reference is None:
            assert out is None
            continue
        empty = reference == -np.inf
        np.testing.assert_array_equal(f64(out) == -np.inf, empty)
        finite = lambda a, empty=empty: np.where(empty, 0, f64(a))
        assert_close(finite(out), finite(reference), finite(rounded))


# What named implementations refuse of the cases; anything else must be served.
SMALL = [name for name in CASES if "kernels" not in name]
REFUSED = {
    **{("mosaic_tpu", name): "needs a multiple of" for name in SMALL},
    ("mosaic_tpu", "f16"): "dtype is float16",
    **{("mosaic_gpu", name): "mosaic_gpu: .*, needs" for name in SMALL},
    ("mosaic_gpu", "kernels_f32"): "dtype is float32",
}


def how_often(implementation, name):
    """Marks: quick, slow, or repeating what others have each of."""
    if implementation == "xla" and name in QUICK:
        return []
    repeats = name == "for_kernels" or (implementation == "xla" and "kernels" in name)
    exhaustive = [pytest.mark.exhaustive] if repeats else []
    return [pytest.mark.slow, *exhaustive]


@pytest.mark.parametrize(
    ("implementation", "name"),
    [
        pytest.param(each, name, marks=how_often(each, name))
        for each in IMPLEMENTATIONS
        for name in CASES
    ],
)
def test_value_and_gradients(implementation, name):
    """Forward and backward, on a CPU too: FlexAttention has no backward there.

    Nor have tokamax's flex_attention, SpargeAttn and MInference anywhere, nor jax's
    kernels for decoding, nor its Hopper kernel under a causal mask.
    """
    made, args = case(name), arrays(name)
    fn = functools.partial(
        block_sparse_attention, implementation=choice(implementation)
    )
    refusal = REFUSED.get((implementation, name))
    if refusal:
        with pytest.raises(NotImplementedError, match=refusal):
            fn(*args[:3], made.mask)
        return
    got = jax.jit(functools.partial(value_and_gradients, fn, made))(*args)
    assert {a.dtype for a in (got[0], *got[2:5])} == {args[0].dtype}
    assert got[1].dtype == jnp.float32
    check(got, oracle(made, *args), low(made, *args))


@pytest.mark.slow
def test_in_float64_and_the_reference():
    """Both forms to the last digits, so that neither is wrong where the other is."""
    made = case("random")
    with jax.enable_x64(True):
        args = [None if a is None else jnp.asarray(f64(a)) for a in arrays("random")]
        for fn in (block_sparse_attention, block_sparse_attention_reference):
            run = jax.jit(functools.partial(value_and_gradients, fn, made))
            for out, want in zip(run(*args), oracle(made, *args), strict=True):
                assert out.dtype == jnp.float64
                np.testing.assert_allclose(out, want, rtol=0, atol=1e-11)


def second_order(attention, made, *args):
    """Gradients of a function of gradients: every derivative rule is differentiated."""

    def of_gradients(*args):
        got = value_and_gradients(attention, made, *args)
        lse = jnp.where(got[1] == -jnp.inf, 0, got[1])
        wide = lambda a: a if a.dtype.itemsize > 2 else a.astype(jnp.float32)
        return sum(jnp.sum(jnp.sin(wide(a))) for a in (got[0], lse, *got[2:]))

    return jax.grad(of_gradients, tuple(range(6)))(*args)


@pytest.mark.parametrize("implementation", slowly(OF_FLOAT32, pytest.mark.exhaustive))
def test_gradient_of_gradient(implementation):
    """With lse among the results, where splash supports no second derivative."""
    name = "random" if implementation == "xla" else "kernels_f32"
    made, args = case(name), arrays(name)
    impl = choice(implementation)
    ours = functools.partial(block_sparse_attention, implementation=impl)
    plain = functools.partial(second_order, block_sparse_attention_reference, made)
    with jax.enable_x64(True):
        want = jax.jit(plain)(*(jnp.asarray(f64(a)) for a in args))
        want = [np.asarray(a) for a in want]
    got = jax.jit(functools.partial(second_order, ours, made))(*args)
    for out, reference in zip(got, want, strict=True):
        assert_close(out, reference, reference, eps=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", slowly(OF_FLOAT32, pytest.mark.exhaustive))
def test_vmap(implementation):
    """More members of a batch, whose masks differ."""
    name = "heads_share" if implementation == "xla" else "kernels_f32"
    made, (q, k, v, bias, dout, dlse) = case(name), arrays(name)
    impl = choice(implementation)
    fn = functools.partial(block_sparse_attention, implementation=impl)
    # The second member's last query block lists nothing.
    last = (made.mask.grid[0] - 1) * made.mask.block_shape[0]
    fewer = dataclasses.replace(made.mask, kv_cnt=made.mask.kv_cnt.at[..., -1].set(0))
    allowed = made.allowed.copy()
    allowed[:, :, last:] = False
    masks = jax.tree.map(lambda *leaves: jnp.stack(leaves), made.mask, fewer)

    def run(mask, q, dout, k, v):
        own = made._replace(mask=mask)
        return value_and_gradients(fn, own, q, k, v, bias, dout, dlse)

    args = [jnp.stack([a, a[:, ::-1]]) for a in (q, dout, k, v)]
    both = jax.jit(jax.vmap(run))(masks, *args)
    for n, own in enumerate([made, made._replace(mask=fewer, allowed=allowed)]):
        q, dout, k, v = (a[n] for a in args)
        got = [None if a is None else a[n] for a in both]
        its = q, k, v, bias, dout, dlse
        check(got, oracle(own, *its), low(own, *its))


@pytest.mark.slow
def test_vmap_of_queries_alone():
    """Keys and mask are the same for all, and each member gets its gradient of them."""
    made, (q, k, v, bias, dout, dlse) = case("random"), arrays("random")

    def run(q, dout):
        args = q, k, v, bias, dout, dlse
        return value_and_gradients(block_sparse_attention, made, *args)

    qs, douts = (jnp.stack([a, a[:, ::-1]]) for a in (q, dout))
    both = jax.jit(jax.vmap(run))(qs, douts)
    for n in range(2):
        its = qs[n], k, v, bias, douts[n], dlse
        check([a[n] for a in both], oracle(made, *its), low(made, *its))


@pytest.mark.parametrize("implementation", slowly([*OF_FLOAT32, None]))
def test_mask_made_inside_jit_per_head_and_no_retrace(implementation):
    """Where splash raises TracerBoolConversionError and tokamax takes no heads.

    Blocks are chosen from data, inside a scan over layers with checkpoints.
    """
    small = implementation in ("xla", None)
    block, size = (8, 8) if small else (64, 128), 32 if small else 256
    rng, traces = np.random.default_rng(1), []
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), "float32")
    x, w = draw(2, size, 2, 32), draw(2, 32, 32) / 6

    def layer(x, w):
        q = jnp.einsum("bthd,de->bthe", x, w)
        means = q.reshape(2, size // block[0], block[0], 2, 32).mean(2)[..., 0]
        least = 0.05 * jnp.arange(-1, size // block[1] - 1, dtype="float32")
        wanted = means.swapaxes(1, 2)[..., None] > least
        mask = at.BlockMask.from_blocks(
            wanted, shape=(size, size), block_shape=block, expr=at.causal()
        )
        impl = choice(implementation)
        out = block_sparse_attention(q, x, x, mask, implementation=impl)
        return x + out, mask.to_mask()

    @jax.jit
    def loss_and_gradient(x, w):
        traces.append(1)

        def loss(w):
            y, masks = jax.lax.scan(jax.checkpoint(layer), x, w)
            return jnp.sum(jnp.square(y)), masks

        return jax.value_and_grad(loss, has_aux=True)(w)

    def dense(x, w, masks):
        for each, mask in zip(w, masks, strict=True):
            q = jnp.einsum("bthd,de->bthe", x, each)
            z = jnp.einsum("bthd,bshd->bhts", q, x) * 32**-0.5
            z = jnp.where(mask, z, -1e30)
            p = jnp.where(mask, jax.nn.softmax(z, -1), 0)
            x = x + jnp.einsum("bhts,bshd->bthd", p, x)
        return jnp.sum(jnp.square(x))

    seen = []
    for x_ in (x, -x):
        (loss, masks), dw = loss_and_gradient(x_, w)
        seen.append(np.asarray(masks))
        want, dwant = jax.jit(jax.value_and_grad(dense, 1))(x_, w, masks)
        np.testing.assert_allclose(loss, want, rtol=1e-5)
        np.testing.assert_allclose(dw, dwant, atol=1e-4 * np.abs(dwant).max())
    assert len(traces) == 1
    assert (seen[0] != seen[1]).any()


@pytest.mark.slow
def test_a_function_of_positions_is_for_xla_alone():
    fn = lambda b, h, i, j: ((i + j + h) % 3 != 0) & (i > b)
    mask = at.block_mask(
        at.from_function(fn, batch=2, heads=4), 12, 12, block_shape=(4, 4)
    )
    b, h, i, j = np.indices((2, 4, 12, 12))
    made = Case((2, 12, 12, 4, 2, 8, 8), mask, fn(b, h, i, j))
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), "float32")
    q, k = draw(2, 12, 4, 8), draw(2, 12, 2, 8)
    args = q, k, k, None, draw(2, 12, 4, 8), draw(2, 12, 4)
    run = jax.jit(functools.partial(value_and_gradients, block_sparse_attention, made))
    check(run(*args), oracle(made, *args), low(made, *args))
    with pytest.raises(NotImplementedError, match="mosaic_tpu: .* from_function"):
        block_sparse_attention(q, k, k, mask, implementation="mosaic_tpu")


def random_expression(rng, t, s, depth):
    """(expression, the same of numpy)."""
    i, j = positions(t, s)
    if depth and rng.random() < 0.8:
        left, x = random_expression(rng, t, s, depth - 1)
        right, y = random_expression(rng, t, s, depth - 1)
        return [(left & right, x & y), (left | right, x | y), (~left, ~x)][
            rng.integers(3)
        ]
    n = int(rng.integers(1, 12))
    ids, of = np.sort(rng.integers(0, 4, t)), np.sort(rng.integers(0, 4, s))
    given = rng.random((2, 4, t, s)) < 0.5
    segments = at.segments(jnp.asarray(ids), jnp.asarray(of))
    return [
        (at.causal(), i >= j),
        (at.sliding_window(n), abs(i - j) < n),
        (at.strided(n), (i - j) % n == 0),
        (at.global_tokens(n), (i < n) | (j < n)),
        (segments, ids[:, None] == of[None]),
        (at.from_array(jnp.asarray(given)), given),
        (
            at.per_head([at.causal(), at.sliding_window(n)] * 2),
            np.stack([i >= j, abs(i - j) < n] * 2)[None],
        ),
    ][rng.integers(7)]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_random_expressions():
    rng = np.random.default_rng(7)
    for n in range(12):
        t, s = (int(x) for x in rng.integers(5, 40, 2))
        expr, allowed = random_expression(rng, t, s, depth=4)
        mask = at.block_mask(expr, t, s, block_shape=(8, 8))
        made = Case((2, t, s, 4, (1, 2, 4)[n % 3], 8, 8), mask, spread(allowed, 2, 4))
        draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), "float32")
        q, k = draw(2, t, 4, 8), draw(2, s, made.sizes[4], 8)
        args = q, k, k, None, draw(2, t, 4, 8), draw(2, t, 4)
        fn = functools.partial(value_and_gradients, block_sparse_attention, made)
        check(jax.jit(fn)(*args), oracle(made, *args), low(made, *args))


# --- Many devices ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [AxisType.Explicit, pytest.param(AxisType.Auto, marks=pytest.mark.slow)]
)
def test_batch_and_heads_over_devices(kind):
    """Where tokamax's dynamic mask gives wrong results: lists per member and head."""
    made, args = case("random"), arrays("random")
    mesh = jax.make_mesh((2, 2), ("data", "heads"), axis_types=(kind,) * 2)
    rows, lists = P("data", None, "heads"), P("data", "heads")
    specs = rows, rows, rows, lists, rows, rows
    mask_specs = jax.tree.map(
        lambda a: P("data", "heads" if a.shape[1] > 1 else None), made.mask
    )
    run = lambda mask, *args: value_and_gradients(
        block_sparse_attention, made._replace(mask=mask), *args
    )
    with jax.set_mesh(mesh):
        put = lambda a, spec: jax.device_put(a, jax.NamedSharding(mesh, spec))
        cut = [put(a, spec) for a, spec in zip(args, specs, strict=True)]
        mask = jax.tree.map(put, made.mask, mask_specs)
        got = jax.jit(run)(mask, *cut)
        if kind == AxisType.Explicit:
            assert jax.typeof(got[0]).sharding.spec == P("data", None, "heads", None)
    check(got, oracle(made, *args), low(made, *args))


@pytest.mark.parametrize(
    ("exchange", "name"),
    [
        ("ring", "over_devices"),
        pytest.param("gather", "over_devices", marks=pytest.mark.slow),
        pytest.param("ring", "causal_over_devices", marks=pytest.mark.slow),
        pytest.param("ring", "over_devices_in_16_bits", marks=pytest.mark.slow),
    ],
)
def test_sequence_over_devices(exchange, name):
    """Which splash does not support for keys."""
    made, args = case(name), arrays(name)
    mesh = jax.make_mesh((4,), ("seq",), axis_types=(AxisType.Auto,))
    op = functools.partial(
        sj.ops.context_parallel_attention, axis_name="seq", exchange=exchange
    )

    def run(q, k, v, bias, dout, dlse):
        return value_and_gradients(op, made, q, k, v, bias, dout, dlse)

    seq, whole = P(None, "seq"), P()
    mapped = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(seq, seq, seq, whole, seq, seq),
        out_specs=(seq, seq, seq, seq, seq, whole),
    )
    check(jax.jit(mapped)(*args), oracle(made, *args), low(made, *args))


@pytest.mark.slow
def test_second_derivatives_over_devices():
    made, args = case("over_devices"), arrays("over_devices")
    mesh = jax.make_mesh((4,), ("seq",), axis_types=(AxisType.Auto,))
    seq, whole = P(None, "seq"), P()

    def attention(q, k, v, mask, **how):
        run = functools.partial(sj.ops.context_parallel_attention, axis_name="seq")
        bias = how.pop("block_bias")
        mapped = jax.shard_map(
            lambda q, k, v, bias: run(q, k, v, mask, block_bias=bias, **how),
            mesh=mesh,
            in_specs=(seq, seq, seq, whole),
            out_specs=(seq, seq),
        )
        return mapped(q, k, v, bias)

    got = jax.jit(functools.partial(second_order, attention, made))(*args)
    plain = functools.partial(second_order, block_sparse_attention_reference, made)
    for out, want in zip(got, jax.jit(plain)(*args), strict=True):
        assert_close(out, want, want, eps=2e-5)


CASES["over_devices"] = lambda: random(
    32, 64, (8, 8), "float32", cap=2.0, biased=True, mask_h=2
)
CASES["over_devices_in_16_bits"] = lambda: random(
    32, 64, (8, 8), "bfloat16", biased=True, mask_h=2
)
CASES["causal_over_devices"] = lambda: window(64, 64, (8, 16), width=30)


# --- Edges, and what others get wrong -------------------------------------------------


def test_rows_without_keys_are_zero_not_nan_nor_the_mean_of_values():
    """Splash: NaN where a query block lists nothing, the mean of v in a visited one.

    tokamax's dynamic mask: NaN too; S2-Attention: NaN without the diagonal.
    """
    allowed = np.ones((12, 12), bool)
    allowed[2], allowed[4:8] = False, False  # a row of a visited block, a block
    mask = at.BlockMask.from_mask(jnp.asarray(allowed), (4, 4))
    bias = jnp.zeros((1, 1, 3, 3))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 12, 1, 4)), "float32")

    def run(q, k, v, bias):
        return block_sparse_attention(
            q, k, v, mask, block_bias=bias, logits_soft_cap=5.0, return_lse=True
        )

    (out, lse), vjp = jax.vjp(run, x, x, x, bias)
    empty = [2, 4, 5, 6, 7]
    assert (np.asarray(out)[0, empty] == 0).all()
    assert (np.asarray(lse)[0, empty] == -np.inf).all()
    # Cotangents of log 0, which a loss may well have, do no harm.
    dlse = jnp.zeros(lse.shape).at[0, 2].set(jnp.nan).at[0, 5].set(jnp.inf)
    dq, *rest = vjp((jnp.ones(out.shape), dlse))
    assert (np.asarray(dq)[0, empty] == 0).all()
    assert all(np.isfinite(a).all() for a in (dq, *rest))
    assert (np.asarray(rest[2])[0, 0, 1] == 0).all()  # bias of the empty query block


@pytest.mark.slow
def test_no_key_at_all():
    mask = at.BlockMask.from_mask(jnp.zeros((8, 8), bool), (4, 4))
    x = jnp.ones((2, 8, 2, 4))
    out, vjp = jax.vjp(lambda *a: block_sparse_attention(*a, mask), x, x, x)
    assert not out.any() and not any(d.any() for d in vjp(out + 1))


def test_pages_are_keys_in_any_order_and_decoding_compiles_once():
    """A cache that grows: same program at every length, and equal to all keys.

    FlexAttention compiles again as the length changes; splash has no pages.
    """
    rng, size, block = np.random.default_rng(2), 24, 4
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), "float32")
    keys, values, queries = (
        draw(2, size, 1, 8),
        draw(2, size, 1, 6),
        draw(2, size, 2, 8),
    )
    table = jnp.asarray(rng.permutation(12).reshape(2, 6), "int32")
    pages = lambda a: (
        jnp.zeros((12, block, *a.shape[2:]))
        .at[table.ravel()]
        .set(a.reshape(12, block, *a.shape[2:]))
    )
    key_pages, value_pages = pages(keys), pages(values)
    expr = at.causal() & (at.sliding_window(9) | at.keys_below(4))
    traces = []

    @jax.jit
    def step(position, query):
        traces.append(1)
        mask = at.block_mask(
            expr.shift(position), 1, size, block_shape=(1, block), capacity=6
        )
        return block_sparse_attention(
            query, key_pages, value_pages, mask, page_table=table, return_lse=True
        )

    i, j = positions(size, size)
    allowed = (j <= i) & ((i - j < 9) | (j < 4))
    for position in (0, 3, 17, 23):
        query = queries[:, position][:, None]
        out, lse = step(jnp.int32(position), query)
        z = np.einsum("bhd,bsd->bhs", f64(query[:, 0]), f64(keys[:, :, 0])) / 8**0.5
        e = np.where(allowed[position], np.exp(z), 0)
        want = np.einsum("bhs,bsd->bhd", e, f64(values[:, :, 0])) / e.sum(-1)[..., None]
        np.testing.assert_allclose(out[:, 0], want, atol=1e-5)
        np.testing.assert_allclose(lse[:, 0], np.log(e.sum(-1)), atol=1e-5)
    assert len(traces) == 1


@pytest.mark.slow
def test_gradients_of_pages_that_members_share():
    """A common beginning of two sequences in one page: its gradients are summed.

    jax's paged_attention has a forward alone.
    """
    made, (q, k, v, bias, dout, dlse) = case("paged"), arrays("paged")
    table = jnp.asarray([[3, 0, 1], [3, 2, 4]], "int32")
    pages = lambda a: (
        jnp.zeros((5, 8, *a.shape[2:])).at[table].set(a.reshape(2, 3, 8, *a.shape[2:]))
    )
    k, v = k.at[1, :8].set(k[0, :8]), v.at[1, :8].set(v[0, :8])
    paged = lambda *args, **how: block_sparse_attention(*args, page_table=table, **how)
    run = functools.partial(value_and_gradients, paged, made)
    got = jax.jit(run)(q, pages(k), pages(v), bias, dout, dlse)
    want = list(oracle(made, q, k, v, bias, dout, dlse))
    for n in (3, 4):
        whole = np.zeros(got[n].shape)
        np.add.at(whole, np.asarray(table), want[n].reshape(2, 3, 8, *whole.shape[2:]))
        want[n] = whole
    for out, reference in zip(got[:5], want[:5], strict=True):
        finite = np.isfinite(reference)
        np.testing.assert_allclose(f64(out)[finite], reference[finite], atol=2e-5)


CASES["paged"] = lambda: random(12, 24, (4, 8), "float32", mask_h=2)


def test_merge_is_attention_over_the_union():
    """Parts of the keys, one of them empty for some rows, all of them for one."""
    rng = np.random.default_rng(3)
    z, v = rng.standard_normal((3, 4, 5)), rng.standard_normal((3, 5, 2))
    allowed = rng.random((3, 4, 5)) < 0.6
    allowed[:, 1], allowed[0, 2] = False, False
    e = np.where(allowed, np.exp(z), 0)
    total = e.sum(-1)
    lses = np.log(total, where=total > 0, out=np.full(total.shape, -np.inf))
    outs = np.einsum("pts,psd->ptd", e, v) / np.where(total > 0, total, 1)[..., None]
    outs, lses = jnp.asarray(outs, "float32"), jnp.asarray(lses, "float32")

    @jax.jit
    def value_and_gradients(outs, lses):
        (out, lse), vjp = jax.vjp(sj.ops.merge_attention, list(outs), list(lses))
        return out, lse, *vjp((jnp.ones(out.shape), jnp.ones(lse.shape)))

    out, lse, douts, dlses = value_and_gradients(outs, lses)
    rows = [0, 2, 3]
    want = np.einsum("pts,psd->td", e, v)[rows] / total.sum(0)[rows, None]
    np.testing.assert_allclose(np.asarray(out)[rows], want, atol=1e-6)
    np.testing.assert_allclose(
        lse[jnp.asarray(rows)], np.log(total.sum(0)[rows]), atol=1e-6
    )
    assert (np.asarray(out)[1] == 0).all() and lse[1] == -np.inf
    # d lse / d lses[p] = share of p; d out / d lses[p] = share (outs[p] - out).
    share = total[:, rows] / total.sum(0)[rows]
    per_part = (f64(outs)[:, rows] - want).sum(-1)
    np.testing.assert_allclose(
        f64(jnp.stack(dlses))[:, rows], share * (1 + per_part), atol=1e-6
    )
    np.testing.assert_allclose(
        f64(jnp.stack(douts))[:, rows], np.repeat(share[..., None], 2, 2), atol=1e-6
    )
    assert not f64(jnp.stack(dlses))[:, 1].any()


def test_memory_does_not_grow_with_the_square_of_the_length():
    """Under 100 MiB at 4096 positions and 8 heads, both ways; dense takes 2056.

    jax.nn.dot_product_attention takes that for a window too, MaxText for MoBA's blocks.
    """
    shape = jax.ShapeDtypeStruct((1, 4096, 8, 64), jnp.float32)
    mask = at.block_mask(at.causal() & at.sliding_window(512), 4096, 4096)
    loss = lambda *a: jnp.sum(block_sparse_attention(*a, mask, implementation="xla"))
    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*(shape,) * 3).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 100 * 2**20


# --- Bad input, and what is said ------------------------------------------------------


def test_bad_input_names_argument_got_and_needed():
    mask = at.block_mask(at.causal(), 8, 12, block_shape=(4, 4))
    q, k = jnp.zeros((2, 8, 4, 8)), jnp.zeros((2, 12, 2, 8))

    def bad(match, *args, **how):
        for op in (block_sparse_attention, block_sparse_attention_reference):
            with pytest.raises(ValueError, match=match):
                op(*args, **how)

    bad(r"query: got shape \(8, 4, 8\), needed", q[0], k, k, mask)
    bad(
        r"key: got 3 heads, needed a number that divides query's 4",
        q,
        k_of(3),
        k_of(3),
        mask,
    )
    bad(r"key: got shape .*needed \(2, 12, 2, 8\)", q, k[:, :8], k[:, :8], mask)
    bad(r"key: got shape .*needed \(2, 12, 2, 8\)", q, k[..., :4], k, mask)
    bad(r"value: got shape .*needed \(2, 12, 2\)", q, k, k[:, :8], mask)
    bad("key: got dtype bfloat16, needed float32", q, k.astype("bfloat16"), k, mask)
    bad("query: got dtype int32, needed one of", q.astype("int32"), k, k, mask)
    bad(r"block_mask: got shape \(8, 12\), needed \(6, s\)", q[:, :6], k, k, mask)
    three = at.BlockMask.from_mask(jnp.ones((1, 3, 8, 12), bool), (4, 4))
    bad("block_mask: got 3 heads, needed a number that divides", q, k, k, three)
    three = at.BlockMask.from_mask(jnp.ones((3, 1, 8, 12), bool), (4, 4))
    bad("block_mask: got batch 3, needed 2, query's, or 1", q, k, k, three)
    table = jnp.zeros((2, 3), jnp.int32)
    bad("key: got shape .*pages of a key block each", q, k, k, mask, page_table=table)
    pages = jnp.zeros((5, 4, 2, 8))
    bad("key: got shape .*needed", q, pages, pages, mask)
    bad("page_table: got", q, pages, pages, mask, page_table=table[:, :2])
    bad("page_table: got", q, pages, pages, mask, page_table=table.astype("float32"))
    bad("block_bias: got shape", q, k, k, mask, block_bias=jnp.zeros((1, 4, 2, 3)))
    bad("logits_soft_cap: got -1.0, needed", q, k, k, mask, logits_soft_cap=-1.0)
    with pytest.raises(ValueError, match="implementation: got 'cuda', needed 'xla'"):
        block_sparse_attention(q, k, k, mask, implementation="cuda")
    out, lse = jnp.zeros((3, 2)), jnp.zeros(3)
    for match, outs, lses in [
        ("outs, lses: got 1 and 2", [out], [lse, lse]),
        ("outs, lses: got 0 and 0", [], []),
        (r"outs\[1\]: got float32 \(2, 2\), needed", [out, out[:2]], [lse, lse]),
        (r"lses\[0\]: got shape \(2,\), needed \(3,\)", [out], [lse[:2]]),
    ]:
        with pytest.raises(ValueError, match=match):
            sj.ops.merge_attention(outs, lses)
    with pytest.raises(ValueError, match="exchange: got 'bus', needed"):
        sj.ops.context_parallel_attention(q, k, k, mask, axis_name="x", exchange="bus")
    with pytest.raises(ValueError, match="axis_name: got 'x', needed an axis"):
        sj.ops.context_parallel_attention(q, k, k, mask, axis_name="x")


def k_of(heads):
    return jnp.zeros((2, 12, heads, 8))


@pytest.mark.slow
@pytest.mark.parametrize("implementation", [n for n in ATTENTION if n != "xla"])
def test_named_implementation_never_falls_back(implementation):
    made, args = case("for_kernels"), arrays("for_kernels")
    needs = {"mosaic_tpu": "tpu", "mosaic_gpu": "cuda"}[implementation]
    with pytest.raises(NotImplementedError, match=f"needs platform {needs}, got cpu"):
        block_sparse_attention(*args[:3], made.mask, implementation=implementation)


@pytest.mark.slow
def test_reference_has_forward_mode():
    made, (q, k, v, *_) = case("one_block"), arrays("one_block")
    run = lambda fn: lambda v: fn(q, k, v, made.mask)
    y, dy = jax.jvp(run(block_sparse_attention_reference), (v,), (v,))
    np.testing.assert_allclose(y, dy, atol=1e-6)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(run(block_sparse_attention), (v,), (v,))


def test_explain_says_how_much_is_listed():
    made, args = case("window"), arrays("window")
    run = functools.partial(value_and_gradients, block_sparse_attention, made)
    said = sj.explain(run, *args)
    assert "forward: batch 2, 4 heads (2 of keys), 40x40 positions" in said
    assert "backward_q: batch 2" in said
    # Queries 16 to 31 reach back to key 0: 4 blocks of 8.
    assert "xla: loops over the listed blocks, at most 4 of 5" in said
    assert "not mosaic_tpu: mosaic_tpu: dv is 6, needs a multiple" in said
