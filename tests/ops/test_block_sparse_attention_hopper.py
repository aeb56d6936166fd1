"""block_sparse_attention by the Hopper kernels, simulated: what the op adds to them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import attention as at
from sparsejax.ops import block_sparse_attention, block_sparse_attention_reference
from sparsejax.testing import assert_close, interpreted

OLD = tuple(int(v) for v in jax.__version__.split(".")[:2]) < (0, 11)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(OLD, reason="jax simulates Mosaic GPU kernels from 0.11 on"),
]
HOPPER = functools.partial(
    block_sparse_attention, implementation=interpreted("mosaic_gpu"), return_lse=True
)
PLAIN = functools.partial(block_sparse_attention_reference, return_lse=True)
B, T, S, H, D, BLOCK = 1, 100, 150, 2, 32, (64, 64)


def operands(seed, dtype="bfloat16", b=B):
    """q, k, v, dout and dlse; one head of keys."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), "bfloat16")
    heads, keys = (b, T, H, D), (b, S, 1, D)
    shapes = heads, keys, keys, heads
    return [draw(*shape).astype(dtype) for shape in (*shapes, heads[:3])]


def given(seed, b=B):
    """Elements at random; rows, a query block of a head and key blocks are empty."""
    allowed = np.random.default_rng(seed).random((b, H, T, S)) < 0.4
    allowed[:, :, 3] = False
    allowed[:, 0, 64:] = False
    allowed[:, 1, :, 64:128] = False
    return allowed


def gradients(attention, mask, q, k, v, dout, dlse):
    """out, lse, dq, dk, dv."""
    (out, lse), vjp = jax.vjp(lambda *a: attention(*a, mask), q, k, v)
    return out, lse, *vjp((dout, dlse.astype(lse.dtype)))


def oracle(allowed, *arrays):
    """The same in float64, head by head."""
    q, k, v, dout, dlse = (np.asarray(a, np.float64) for a in arrays)
    out, lse, dq = np.zeros(q.shape), np.zeros(q.shape[:3]), np.zeros(q.shape)
    dk, dv = np.zeros(k.shape), np.zeros(v.shape)
    for n, h in np.ndindex(q.shape[0], H):
        of, ours = (n, slice(None), 0), (n, slice(None), h)
        z = q[ours] @ k[of].T / D**0.5
        e = np.where(allowed[n, h], np.exp(z), 0)
        total = e.sum(1)
        some = total > 0
        p = e / np.where(some, total, 1)[:, None]
        out[ours] = p @ v[of]
        lse[ours] = np.log(total, where=some, out=np.full(T, -np.inf))
        delta = (out[ours] * dout[ours]).sum(1) - dlse[ours]
        dz = p * (dout[ours] @ v[of].T - delta[:, None]) / D**0.5
        dq[ours] = dz @ k[of]
        dk[of] += dz.T @ q[ours]
        dv[of] += p.T @ dout[ours]
    return out, lse, dq, dk, dv


def check(got, want, low):
    for n, (out, reference, rounded) in enumerate(zip(got, want, low, strict=True)):
        # Kernels round dz before it is multiplied; the plain form does not.
        eps = 2**-9 if n > 1 else 1e-6
        empty = reference == -np.inf
        np.testing.assert_array_equal(np.asarray(out) == -np.inf, empty)
        finite = lambda a, empty=empty: np.where(empty, 0, np.asarray(a, np.float64))
        assert_close(finite(out), finite(reference), finite(rounded), eps=eps)


def test_vmap():
    """Over members whose given masks differ: one batch, padded to whole blocks."""
    alloweds, arrays = (given(0), given(1)), [operands(1), operands(2)]
    masks = [
        at.BlockMask.from_mask(jnp.asarray(a), BLOCK, capacity=3) for a in alloweds
    ]
    stack = lambda *leaves: jnp.stack(leaves)
    both = jax.jit(jax.vmap(functools.partial(gradients, HOPPER)))
    got = both(jax.tree.map(stack, *masks), *jax.tree.map(stack, *arrays))
    plain = jax.jit(functools.partial(gradients, PLAIN))
    for n, (allowed, args, mask) in enumerate(
        zip(alloweds, arrays, masks, strict=True)
    ):
        check([a[n] for a in got], oracle(allowed, *args), plain(mask, *args))
    assert not np.asarray(got[0], np.float32)[:, :, 3].any()


def test_mask_made_inside_jit_of_traced_data():
    """Documents and blocks chosen from data: other contents, the same program."""
    i, j = np.arange(T)[:, None], np.arange(S)[None]
    traces, plain = [], jax.jit(functools.partial(gradients, PLAIN))

    @jax.jit
    def run(ids, least, *arrays):
        traces.append(1)
        expr = at.causal() & at.segments(ids, ids[:1].repeat(S))
        means = arrays[0][:, ::64].astype("float32").mean(-1).swapaxes(1, 2)
        wanted = jnp.broadcast_to(means[..., None] > least, (B, H, 2, 3))
        mask = at.BlockMask.from_blocks(
            wanted, shape=(T, S), block_shape=BLOCK, expr=expr
        )
        return wanted, mask, gradients(HOPPER, mask, *arrays)

    seen = []
    for seed in (3, 4):
        rng, arrays = np.random.default_rng(seed), operands(seed)
        ids = np.sort(rng.integers(0, 2, T)).astype("int32")
        wanted, mask, got = run(jnp.asarray(ids), jnp.float32(0), *arrays)
        seen.append(np.asarray(wanted))
        blocks = np.kron(seen[-1], np.ones(BLOCK, bool))[..., :T, :S]
        of = (i >= j) & (ids == ids[0])[:, None]
        check(got, oracle(blocks & of, *arrays), plain(mask, *arrays))
    assert len(traces) == 1 and (seen[0] != seen[1]).any()


@pytest.mark.exhaustive
def test_gradient_of_gradient():
    """Through the kernels' gradients, by the rule that all implementations share."""
    mask = at.BlockMask.from_mask(jnp.asarray(given(0)), BLOCK)

    def second(attention, *arrays):
        def of_gradients(*arrays):
            out, lse, *rest = gradients(attention, mask, *arrays)
            wide = lambda a: a if a.dtype.itemsize > 2 else a.astype(jnp.float32)
            lse = jnp.where(lse == -jnp.inf, 0, lse)
            return sum(jnp.sum(jnp.sin(wide(a))) for a in (out, lse, *rest))

        return jax.grad(of_gradients, tuple(range(5)))(*arrays)

    of = lambda fn: jax.jit(functools.partial(second, fn))
    with jax.enable_x64(True):
        want = [np.asarray(a) for a in of(PLAIN)(*operands(1, "float64"))]
    got, low = of(HOPPER)(*operands(1)), of(PLAIN)(*operands(1))
    for out, reference, rounded in zip(got, want, low, strict=True):
        assert_close(out, reference, rounded)
