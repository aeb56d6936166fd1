"""Attention at the edges of what can be asked, and what cannot be asked refused."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import attention as at
from sparsejax import layers, ops

T, S = 6, 9
RNG = np.random.default_rng(0)


def draw(*shape):
    return jnp.asarray(RNG.standard_normal(shape), "float32")


Q, K, V = draw(2, T, 4, 8), draw(2, S, 2, 8), draw(2, S, 2, 3)
MASK = at.block_mask(at.causal().shift(2), T, S, block_shape=(4, 4))
SEEN = np.tri(T, S, 2, dtype=bool)


def truth(q, k, v, seen):
    """out and lse in float64; seen [.., t, s]."""
    q, k, v = (np.float64(a) for a in (q, k, v))
    k, v = (np.repeat(a, q.shape[2] // a.shape[2], 2) for a in (k, v))
    z = np.einsum("bihd,bjhd->bhij", q, k) * max(q.shape[3], 1) ** -0.5
    e = np.where(seen, np.exp(z), 0)
    total = e.sum(-1, keepdims=True)
    out = np.einsum("bhij,bjhd->bihd", e / total, v)
    return out, np.log(total)[..., 0].swapaxes(1, 2)


@pytest.mark.parametrize(
    ("d", "dv"), [(8, 0), pytest.param(0, 3, marks=pytest.mark.slow)]
)
def test_heads_of_no_size(d, dv):
    """Values of no size give lse alone; no features, the mean of what is seen."""
    q, k, v = Q[..., :d], K[..., :d], V[..., :dv]
    out, lse = jax.jit(ops.block_sparse_attention, static_argnames="return_lse")(
        q, k, v, MASK, return_lse=True
    )
    want, its = truth(q, k, v, SEEN)
    assert out.shape == want.shape
    np.testing.assert_allclose(out, want, atol=1e-6)
    np.testing.assert_allclose(lse, its, atol=1e-6)


@pytest.mark.slow
def test_no_sequence_at_all():
    """An empty batch, with gradients, and in the layer."""
    run = lambda q: ops.block_sparse_attention(q, K[:0], V[:0], MASK).sum()
    assert jax.jit(jax.grad(run))(Q[:0]).shape == (0, T, 4, 8)
    spec = layers.SparseAttentionSpec(features=8, num_heads=2, block_shape=(4, 4))
    params = layers.init_sparse_attention(jax.random.key(0), spec)
    x = jnp.zeros((0, T, 8))
    assert layers.apply_sparse_attention(spec, params, None, x).shape == x.shape


def test_masks_that_vmap_stacks_with_the_heads_of_keys():
    """Over masks alone, whose heads are the keys' and whose batch is one."""
    seen = RNG.random((2, 1, 2, T, S)) < 0.5
    seen[..., 0] = True

    @jax.jit
    @jax.vmap
    def run(seen):
        mask = at.BlockMask.from_mask(seen, (4, 4))
        return ops.block_sparse_attention(Q, K, V, mask, return_lse=True)

    for n, (out, lse) in enumerate(zip(*run(jnp.asarray(seen)), strict=True)):
        want, its = truth(Q, K, V, seen[n].repeat(2, 1))
        np.testing.assert_allclose(out, want, atol=2e-6)
        np.testing.assert_allclose(lse, its, atol=2e-6)


def test_a_page_that_a_sequence_has_twice():
    """Its gradient is that of both places."""
    table = jnp.asarray([[1, 1, 0], [2, 1, 2]], jnp.int32)
    keys, values = draw(3, 4, 2, 8), draw(3, 4, 2, 3)
    mask = at.block_mask(at.everything(), T, 12, block_shape=(4, 4))

    @jax.jit
    def run(keys, values):
        attend = lambda *pages: ops.block_sparse_attention(
            Q, *pages, mask, page_table=table
        )
        out, pull = jax.vjp(attend, keys, values)
        return out, pull(jnp.ones_like(out))[1]

    laid_out = lambda a: np.asarray(a)[np.asarray(table)].reshape(2, 12, *a.shape[2:])
    k, v = laid_out(keys), laid_out(values)
    out, gradient = run(keys, values)
    want, lse = truth(Q, k, v, True)
    np.testing.assert_allclose(out, want, atol=2e-6)
    # With cotangents of 1: of each value the sum of its probabilities.
    z = np.einsum("bihd,bjhd->bihj", np.float64(Q), np.repeat(k, 2, 2)) * 8**-0.5
    share = np.exp(z - lse[..., None]).sum(1).reshape(2, 2, 2, 12).sum(2)
    pages = np.zeros((3, 4, 2))
    np.add.at(pages, np.asarray(table), share.swapaxes(1, 2).reshape(2, 3, 4, 2))
    np.testing.assert_allclose(gradient, pages[..., None].repeat(3, 3), atol=5e-6)


OPERATORS = {
    "combiner": lambda *heads: ops.combiner_attention(*heads, size=4),
    "routing": lambda *heads: ops.routing_attention(*heads, jnp.ones((4, 2, 8))),
    "native": lambda *heads: ops.native_sparse_attention(
        *heads, jnp.ones((2, T, 4, 3))
    ),
    "scatterbrain": lambda *heads: ops.scatterbrain_attention(
        *heads, MASK, jnp.ones((3, 8))
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_heads_that_do_not_fit_are_refused_by_every_operator(name):
    three = (jnp.zeros((2, S, 3, 8)),) * 2
    for heads, match in [
        ((Q[0], K, V), r"query: got shape \(6, 4, 8\), needed \[batch, length"),
        ((Q, *three), "key: got 3 heads, needed a number that divides query's 4"),
        ((Q, K.astype("bfloat16"), V), "key: got dtype bfloat16, needed float32"),
        ((Q, K, V[:, :4]), r"value: got shape \(2, 4, 2, 3\), needed \(2, 9, 2\)"),
    ]:
        with pytest.raises(ValueError, match=match):
            OPERATORS[name](*heads)


SPEC = layers.SparseAttentionSpec(features=8, num_heads=2, block_shape=(4, 4))
IDS = jnp.zeros((3, T), jnp.int32)
plain = inspect.unwrap


def attend(**how):
    return plain(ops.block_sparse_attention)(Q, K, V, MASK, **how)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: attend(scale=jnp.ones(2)), "scale: got .*needed one finite number"),
        (lambda: attend(scale=float("nan")), "scale: got nan, needed one finite"),
        (lambda: attend(logits_soft_cap=np.inf), "logits_soft_cap: got inf, needed"),
        (
            lambda: ops.merge_attention([Q], [jnp.zeros(Q.shape[:3], jnp.int32)]),
            r"lses\[0\]: got dtype int32, needed one of float32",
        ),
        (
            lambda: at.block_mask(at.segments(IDS) & at.segments(IDS[:2]), T, T),
            r"expr: got arrays for batch of \[2, 3\], needed one size, or 1",
        ),
        (
            lambda: at.block_mask(at.segments(IDS, IDS[:2]), T, T),
            r"expr: got arrays for batch of \[2, 3\], needed one size, or 1",
        ),
        (
            lambda: plain(at.block_mask)(at.causal(), T, S, block_shape=(4.5, 4)),
            r"block_shape: got \(4.5, 4\), needed two positive ints",
        ),
        (
            lambda: plain(at.block_mask)(at.causal(), T, S, capacity=1.5),
            "capacity: got 1.5, needed at least 1, an int",
        ),
        (
            lambda: plain(layers.decode_sparse_attention)(
                SPEC, {}, "causal", Q, layers.init_kv_cache(SPEC, 2, 8)
            ),
            "mask: got str, needed an expression, a BlockMask or a selector",
        ),
        (
            lambda: layers.init_kv_cache(SPEC, 2, 0),
            "batch, capacity: got 2 and 0, needed 0 and 1 at least",
        ),
    ],
)
def test_what_cannot_be_asked(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_context_parallel_attention_wants_a_block_mask():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    run = plain(ops.context_parallel_attention)
    whole = jax.sharding.PartitionSpec()
    attend = lambda *heads: run(*heads, at.causal(), axis_name="x")
    mapped = jax.shard_map(attend, mesh=mesh, in_specs=whole, out_specs=whole)
    with pytest.raises(ValueError, match="block_mask: got .*needed a BlockMask"):
        jax.eval_shape(mapped, Q, K, V)
