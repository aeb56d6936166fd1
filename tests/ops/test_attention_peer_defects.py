"""What other libraries' attention gets wrong, each in a test that its name says.

One program computes value and gradients of all of them: the mask is an argument, so its
contents do not compile again. Defects of mask objects and selectors are in
``tests/attention/test_peer_defects.py``; what else of a peer has a test says its name:
``grep -ri splash tests``.
"""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import attention as at
from sparsejax import ops

B, T, S, H, KV, D, DV = 1, 12, 20, 4, 2, 5, 3
BLOCK = 4, 8
I, J = np.arange(T)[:, None], np.arange(S)[None]
RNG = np.random.default_rng(0)


def draw(*shape):
    return jnp.asarray(RNG.standard_normal(shape), "float32")


Q, K, V = draw(B, T, H, D), draw(B, S, KV, D), draw(B, S, KV, DV)
DOUT, DLSE = draw(B, T, H, DV), draw(B, T, H)


def listed(allowed):
    """A mask of one structure, whatever it allows: bool [t, s] or [h, t, s]."""
    allowed = np.broadcast_to(allowed, (1, H, T, S))
    return at.BlockMask.from_mask(jnp.asarray(allowed), BLOCK)


@jax.jit
def attend(q, k, v, mask, dout, dlse):
    """out, lse, dq, dk, dv."""
    run = lambda *qkv: ops.block_sparse_attention(*qkv, mask, return_lse=True)
    (out, lse), pull = jax.vjp(run, q, k, v)
    return out, lse, *pull((dout, dlse))


def truth(q, k, v, allowed, dout, dlse):
    """The same in float64, in full."""
    q, k, v, dout, dlse = (np.float64(a)[0] for a in (q, k, v, dout, dlse))
    k, v = (a.repeat(H // KV, 1) for a in (k, v))
    z = np.einsum("ihd,jhd->hij", q, k) * D**-0.5
    z = np.where(allowed, z, -np.inf)
    top = np.where(allowed, z, -1e9).max(-1, keepdims=True)
    e = np.exp(z - top)
    total = e.sum(-1, keepdims=True)
    some = total > 0
    p = e / np.where(some, total, 1)
    lse = np.where(some, np.log(np.where(some, total, 1)) + top, -np.inf)[..., 0].T
    out = np.einsum("hij,jhd->ihd", p, v)
    delta = (dout * out).sum(-1) - dlse
    dz = p * (np.einsum("ihd,jhd->hij", dout, v) - delta.T[..., None]) * D**-0.5
    group = lambda a: a.reshape(S, KV, H // KV, -1).sum(2)
    dq = np.einsum("hij,jhd->ihd", dz, k)
    dk, dv = np.einsum("hij,ihd->jhd", dz, q), np.einsum("hij,ihd->jhd", p, dout)
    return [a[None] for a in (out, lse, dq, group(dk), group(dv))]


def check(got, want, scale=1.0):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6 * scale)


def test_flaxattention_a_running_maximum_that_is_lost_overflows():
    """Logits of some hundreds, rising from block to block in one head, falling in one.

    There a boolean takes the place of the maximum, so that exp has nothing subtracted.
    """
    far = 40.0 * jnp.asarray([1, -1, 1, -1], "float32")
    q = Q.at[..., 0].set(far)
    k = K.at[..., 0].set(jnp.arange(S, dtype="float32")[None, :, None])
    allowed = np.broadcast_to(I >= J - 8, (H, T, S))
    got = attend(q, k, V, listed(allowed), DOUT, DLSE)
    assert np.abs(got[1]).max() > 100
    check(got, truth(q, k, V, allowed, DOUT, DLSE), scale=100)


def test_flaxattention_and_tokamax_flex_visit_every_block():
    """Keys and values of blocks that are not listed are NaN, and nobody sees it.

    Nor do the gradients: in fla's Native Sparse Attention those of a key block go
    through all later queries.
    """
    allowed = np.broadcast_to((J // 8 != 1) & (I // 4 != 2), (H, T, S))
    bad = np.s_[:, 8:16]
    k, v = K.at[bad].set(jnp.nan), V.at[bad].set(jnp.nan)
    # The last query block lists nothing: whatever stands there has no part either.
    q, dout = Q.at[:, 8:].set(jnp.nan), DOUT.at[:, 8:].set(jnp.nan)
    got = attend(q, k, v, listed(allowed), dout, DLSE)
    check(got, truth(Q, K, V, allowed, DOUT, DLSE))
    assert not np.asarray(got[3])[bad].any() and not np.asarray(got[4])[bad].any()


def test_flexattention_slots_beyond_the_count_are_undefined():
    """Whatever they name, they are not visited, forward or backward."""
    allowed = np.broadcast_to(J < 8 * (1 + I // 4), (H, T, S))
    mask = listed(allowed)
    beyond = np.arange(mask.capacity) >= np.asarray(mask.kv_cnt)[..., None]
    assert beyond.any()
    leaves, tree = jax.tree.flatten(mask)
    leaves[0] = jnp.where(beyond, 2, mask.kv_idx)
    leaves[2] = mask.kv_full | beyond
    undefined = jax.tree.unflatten(tree, leaves)
    got = attend(Q, K, V, undefined, DOUT, DLSE)
    check(got, truth(Q, K, V, allowed, DOUT, DLSE))


def test_tokamax_splash_a_key_block_without_visits_has_gradient_zero():
    """And is neither unwritten memory nor written by a dummy visit."""
    allowed = np.broadcast_to(J // 8 != 1, (H, T, S))
    got = attend(Q, K, V, listed(allowed), DOUT, DLSE)
    assert not np.asarray(got[3])[:, 8:16].any()
    assert not np.asarray(got[4])[:, 8:16].any()
    check(got, truth(Q, K, V, allowed, DOUT, DLSE))


def test_jax_nn_a_window_is_ignored_where_there_is_no_mask():
    """A window and nothing else, of another length of keys than of queries.

    jax's local_window_size was ignored without a mask; cuDNN's looks back alone;
    tokamax's fails to broadcast.
    """
    allowed = np.abs(I - J) < 3
    expr = at.sliding_window(3)
    run = lambda q, k, v: ops.block_sparse_attention(
        q, k, v, at.block_mask(expr, T, S, block_shape=BLOCK)
    )
    want = truth(Q, K, V, np.broadcast_to(allowed, (H, T, S)), DOUT, DLSE)
    np.testing.assert_allclose(jax.jit(run)(Q, K, V), want[0], rtol=1e-5, atol=2e-6)


def test_hybrid_heads_dense_streaming_and_listed_have_gradients():
    """One list per head; streaming heads have no backward in Block-Sparse-Attention.

    Heads are groups of two of heads of 5 and 3 numbers, on 12 tokens: fla wants groups
    of 16, SpargeAttn 128 tokens and heads of 64 or 128, jax's Hopper kernel multiples
    of 64, and neither it nor FlexAttention on a CPU has a causal backward.
    """
    dense = np.ones((T, S), bool)
    streaming = (I >= J) & ((I - J < 3) | (J < 2))
    causal = I >= J
    some = (I // 4 + J // 8) % 2 == 0
    allowed = np.stack([dense, streaming, causal, some])
    check(
        attend(Q, K, V, listed(allowed), DOUT, DLSE),
        truth(Q, K, V, allowed, DOUT, DLSE),
    )


def test_moba_gradients_of_two_parts_go_through_the_merged_sum():
    """Its backward has one lse and one output for both, that of the merged softmax."""
    allowed = np.broadcast_to((I >= J) | (J > 15), (H, T, S))
    parts = [allowed & (J < 7), allowed & (J >= 7)]
    runs = [attend(Q, K, V, listed(part), DOUT, DLSE) for part in parts]
    outs, lses = [run[0] for run in runs], [run[1] for run in runs]
    merge = jax.jit(lambda *args: jax.vjp(ops.merge_attention, *args))
    (out, lse), pull = merge(outs, lses)
    douts, dlses = pull((DOUT, DLSE))
    pulled = [
        attend(Q, K, V, listed(part), dout, dlse)[2:]
        for part, dout, dlse in zip(parts, douts, dlses, strict=True)
    ]
    sums = [a + b for a, b in zip(*pulled, strict=True)]
    check([out, lse, *sums], truth(Q, K, V, allowed, DOUT, DLSE))


def test_splash_a_derivative_of_gradients_where_lse_is_returned():
    """Splash: "Higher-order AD not supported". Against differences of the gradients."""
    expr = at.causal() & ~at.block_diagonal(2)  # queries 0 and 1 see nothing
    mask = at.block_mask(expr, 4, 4, block_shape=(2, 2))

    def loss(q):
        x = draw_once[:, :, :1]
        out, lse = ops.block_sparse_attention(q, x, x, mask, return_lse=True)
        return jnp.sum(out**2) + jnp.sum(jnp.where(lse > -jnp.inf, lse, 0) ** 2)

    draw_once, step = Q[:, :4], draw(1, 4, 1, D)
    grad = jax.grad(loss)

    @jax.jit
    def second(q):
        return jax.grad(lambda q: jnp.vdot(grad(q), step))(q), grad(q)

    q = Q[:, :4, 1:2]
    got = np.vdot(second(q)[0], step)
    slope = [np.vdot(second(q + h * step)[1], step) for h in (1e-2, -1e-2)]
    np.testing.assert_allclose(got, (slope[0] - slope[1]) / 2e-2, rtol=2e-3)
    assert not np.asarray(second(q)[0])[:, :2].any()


@pytest.mark.parametrize("name", ["mosaic_tpu", "mosaic_gpu"])
def test_tokamax_flex_names_kernels_that_are_not_there(name):
    """Its module fails to load, by the name of another operator's kernel."""
    module = importlib.import_module(f"pallas_kernels.block_sparse_attention.{name}")
    for kernel in ("forward", "backward_q", "backward_kv"):
        assert callable(getattr(module, kernel))


def test_scatterbrain_nothing_left_for_the_features():
    """It subtracts the listed from the sum of all, and takes a logarithm: of 0 here.

    With every block listed the result is that of attention, and gradients are finite,
    also where the features are large.
    """
    t = 8
    mask = at.block_mask(at.causal(), t, t, block_shape=(4, 4))
    x, y, w = 3 * Q[:, :t], K[:, :t], 4 * jnp.asarray(RNG.standard_normal((6, D)))
    run = functools.partial(
        ops.scatterbrain_attention, block_mask=mask, features=w.astype("float32")
    )

    @jax.jit
    def both(q, k, v):
        out, pull = jax.vjp(run, q, k, v)
        return out, pull(jnp.ones_like(out))

    out, gradients = both(x, y, V[:, :t])
    z = np.einsum("ihd,jhd->hij", x[0], np.repeat(y[0], 2, 1)) * D**-0.5
    p = np.where(np.tri(t, dtype=bool), np.exp(np.float64(z)), 0)
    p /= p.sum(-1, keepdims=True)
    want = np.einsum("hij,jhd->ihd", p, np.repeat(V[0, :t], 2, 1))
    np.testing.assert_allclose(out[0], want, rtol=1e-4, atol=1e-5)
    assert all(np.isfinite(g).all() for g in gradients)
