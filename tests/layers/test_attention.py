"""Sparse attention as a layer: equation, masks of every kind, decoding, refusals."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sparsejax import attention as at
from sparsejax import layers
from sparsejax.testing import assert_close

B, T, N = 2, 21, 16


def make(seed=0, t=T, **changes):
    """A layer of four heads in two groups, no parameter of which is zero."""
    sizes = {"features": N, "num_heads": 4, "num_kv_heads": 2, "block_shape": (8, 4)}
    spec = layers.SparseAttentionSpec(**{**sizes, **changes})
    params = layers.init_sparse_attention(jax.random.key(seed), spec)
    wave = lambda a: np.sin(np.arange(a.size) * 1.7).reshape(a.shape).astype(a.dtype)
    params = {n: wave(a) / 3 if "bias" in n else a for n, a in params.items()}
    params = jax.tree.map(jnp.asarray, params)
    x = jax.random.normal(jax.random.key(seed + 1), (B, t, spec.features))
    return spec, params, x


def plain(spec, params, mask, x, x_kv=None, positions=None, wide=np.float64):
    """Head by head, with the whole of softmax(q k^T); mask [t, s] or [b, h, t, s]."""
    p = {name: np.asarray(a, wide) for name, a in params.items()}
    x = np.asarray(x, wide)
    x_kv = x if x_kv is None else np.asarray(x_kv, wide)
    mask = np.broadcast_to(mask, (len(x), spec.num_heads, x.shape[1], x_kv.shape[1]))

    def heads(name, x, positions):
        y = np.stack([x @ p[name][:, i] for i in range(p[name].shape[1])], axis=2)
        y = y + p.get(f"{name}_bias", np.zeros((), wide))
        if name == "value" or spec.rotary_base is None:
            return y
        # Features k and k + d / 2 are one complex number, turned by its angle.
        half = y.shape[-1] // 2
        angle = np.asarray(positions)[..., None] / spec.rotary_base ** (
            np.arange(half) / half
        )
        z = (y[..., :half] + 1j * y[..., half:]) * np.exp(1j * angle)[..., None, :]
        return np.concatenate([z.real, z.imag], axis=-1).astype(wide)

    places = np.arange(x.shape[1]) if positions is None else positions
    q = heads("query", x, places)
    places = places if x_kv is x else np.arange(x_kv.shape[1])
    k, v = heads("key", x_kv, places), heads("value", x_kv, None)
    y = np.zeros(x.shape, wide) + p.get("out_bias", np.zeros((), wide))
    for b in range(len(x)):
        for h in range(spec.num_heads):
            of = h * k.shape[2] // spec.num_heads  # neighbours share a head of keys
            z = q[b, :, h] @ k[b, :, of].T * wide(spec.scale or q.shape[-1] ** -0.5)
            if spec.logits_soft_cap:
                z = wide(spec.logits_soft_cap) * np.tanh(z / spec.logits_soft_cap)
            z = np.where(mask[b, h], z.astype(wide), -np.inf)
            top = z.max(axis=1, keepdims=True)
            e = np.exp(z - np.where(np.isfinite(top), top, 0))
            total = e.sum(axis=1, keepdims=True)
            weights = e / np.where(total > 0, total, 1)
            y[b] += weights @ v[b, :, of] @ p["out"][h]
    return y


def check(y, *args, **kwargs):
    want = plain(*args, **kwargs)
    assert_close(y, want, plain(*args, **kwargs, wide=np.float32))


I, J = np.arange(T)[:, None], np.arange(T)[None]
NEAR = (I - J < 6) & (I >= J)


@pytest.mark.parametrize(
    "changes",
    [
        {"rotary_base": 100.0},
        pytest.param(
            {"num_kv_heads": 1, "head_dim": 6, "logits_soft_cap": 1.5},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["rotary", "one head of keys"],
)
def test_equation(changes):
    spec, params, x = make(**changes)
    mask = at.causal() & at.sliding_window(6)
    y = jax.jit(layers.apply_sparse_attention, static_argnums=(0, 2))(
        spec, params, mask, x
    )
    check(y, spec, params, NEAR, x)


def test_gradients_are_those_of_the_dense_equation():
    spec, params, x = make(rotary_base=100.0)
    dy = jax.random.normal(jax.random.key(5), x.shape)
    mask = at.causal() & at.sliding_window(6)

    def dense(params, x):
        heads = lambda name: (
            jnp.einsum("btn,nhd->bthd", x, params[name]) + params[f"{name}_bias"]
        )
        turned = []
        for name in ("query", "key"):
            a, b = jnp.split(heads(name), 2, axis=-1)
            angle = np.arange(T)[:, None, None] * 100.0 ** (-np.arange(1) / 1)
            cos, sin = (f(angle).astype(np.float32) for f in (np.cos, np.sin))
            turned.append(jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1))
        y = jax.nn.dot_product_attention(*turned, heads("value"), mask=jnp.array(NEAR))
        return jnp.einsum("bthd,hdn->btn", y, params["out"]) + params["out_bias"]

    spec = dataclasses.replace(spec, head_dim=2)
    params = layers.init_sparse_attention(jax.random.key(3), spec)
    ours = lambda params, x: layers.apply_sparse_attention(spec, params, mask, x)
    loss = lambda f: lambda *args: jnp.sum(f(*args) * dy)
    got, want = (jax.jit(jax.grad(loss(f), (0, 1)))(params, x) for f in (ours, dense))
    for (path, a), b in zip(
        jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        # A key's bias moves all logits of a row alike, but for the rotation.
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4, err_msg=str(path))


def test_masks_of_every_kind():
    """Given in full, listed, chosen from the data; traced; keys of something else."""
    spec, params, x = make()
    x_kv = jax.random.normal(jax.random.key(7), (B, 14, N))
    seen = np.random.default_rng(0).random((B, 4, T, 14)) < 0.3
    seen[:, :, 5] = False  # a query that sees nothing
    listed = np.random.default_rng(1).random((1, 2, 3, 4)) < 0.5
    wide = lambda a: a.repeat(2, 1).repeat(8, 2).repeat(4, 3)[:, :, :T, :14]

    def selector(query, key, *, block_shape):
        assert query.shape == (B, T, 4, 4) and key.shape == (B, 14, 2, 4)
        mask = at.BlockMask.from_blocks(
            jnp.array(listed), shape=(T, 14), block_shape=block_shape
        )
        return mask, at.block_stats(query, key, mask, at.everything())

    @jax.jit
    def run(seen):
        mask = at.from_array(seen)
        apply = lambda mask: layers.apply_sparse_attention(spec, params, mask, x, x_kv)
        blocks = at.BlockMask.from_mask(seen, (8, 4))
        chosen, stats = layers.apply_sparse_attention(
            spec, params, selector, x, x_kv, return_stats=True
        )
        return apply(mask), apply(blocks), chosen, stats

    *given, chosen, stats = run(seen)
    for y in given:
        check(y, spec, params, seen, x, x_kv)
        np.testing.assert_array_equal(y[:, 5], np.stack([params["out_bias"]] * B))
    check(chosen, spec, params, wide(listed), x, x_kv)
    density = listed.mean(axis=(2, 3)).repeat(2, 1)
    np.testing.assert_allclose(stats.density, np.broadcast_to(density, (B, 4)))


@pytest.mark.slow
def test_stats_of_a_mask():
    """All logits equal: a window of 2 keeps 1, 1, 2/3 and 1/2 of the causal mass."""
    spec = layers.SparseAttentionSpec(features=4, num_heads=2, block_shape=(2, 2))
    params = layers.init_sparse_attention(jax.random.key(0), spec)
    params["query"] *= 0
    mask, x = at.causal() & at.sliding_window(2), jnp.ones((1, 4, 4))
    apply = functools.partial(layers.apply_sparse_attention, spec, params, mask, x)
    _, stats = apply(return_stats=True, dense=at.causal())
    np.testing.assert_allclose(stats.recall, np.full((1, 2), (2 + 2 / 3 + 0.5) / 4))
    np.testing.assert_allclose(stats.density, np.full((1, 2), 0.75))
    _, stats = apply(return_stats=True)  # of all four keys: 1/4, then 1/2 each
    np.testing.assert_allclose(stats.recall, np.full((1, 2), 1.75 / 4))
    assert stats.overflow.tolist() == [[0, 0]]


@pytest.mark.slow
def test_positions_inside_documents():
    spec, params, x = make(rotary_base=100.0)
    ids = jnp.array([[0] * 9 + [1] * 12, [0] * 16 + [1] * 5], jnp.int32)
    starts = jnp.array([[0] * 9 + [9] * 12, [0] * 16 + [16] * 5], jnp.int32)
    # Only differences count: those of the second sequence are twice as large.
    step = jnp.array([[1], [2]], jnp.int32)
    positions = step * (jnp.arange(T, dtype=jnp.int32) - starts)
    mask = at.causal() & at.segments(ids)
    y = layers.apply_sparse_attention(spec, params, mask, x, positions=positions)
    same = np.equal(ids[:, :, None], ids[:, None])[:, None]
    check(y, spec, params, same & (I >= J), x, positions=np.asarray(positions))
    # As if the second document were alone.
    alone = layers.apply_sparse_attention(spec, params, at.causal(), x[:1, 9:])
    np.testing.assert_allclose(y[:1, 9:], alone, atol=2e-6)


def test_variance_is_kept():
    spec = layers.SparseAttentionSpec(
        features=256, num_heads=4, num_kv_heads=2, head_dim=32
    )
    params = layers.init_sparse_attention(jax.random.key(0), spec)
    shapes = {name: a.shape for name, a in params.items()}
    assert shapes == {
        "query": (256, 4, 32),
        "key": (256, 2, 32),
        "value": (256, 2, 32),
        "out": (4, 32, 256),
        "query_bias": (4, 32),
        "key_bias": (2, 32),
        "value_bias": (2, 32),
        "out_bias": (256,),
    }
    x = np.random.default_rng(0).standard_normal((512, 256))
    for name in ("query", "key", "value"):
        assert abs(np.std(x @ np.asarray(params[name]).reshape(256, -1)) - 1) < 0.05
    y = x[:, :128] @ np.asarray(params["out"]).reshape(128, 256)
    assert abs(np.std(y) - 1) < 0.05
    assert not any(a.any() for name, a in params.items() if "bias" in name)


# ---- decoding ----------------------------------------------------------------------

decode = jax.jit(layers.decode_sparse_attention, static_argnums=(0, 2))


def test_256_steps_with_pages_equal_attention_to_all():
    changes = {"block_shape": (64, 16), "rotary_base": 1000.0}
    spec, params, x = make(t=256, **changes)
    mask = at.causal() & (at.sliding_window(37) | at.global_tokens(3))
    pages = np.random.default_rng(0).permutation(35)[:32].reshape(2, 16)
    table = jnp.asarray(pages, jnp.int32)
    cache = layers.init_kv_cache(spec, B, 256, page_table=table, pages=35)
    traces, ys = [], []

    @jax.jit
    def step(x, cache):
        traces.append(1)
        return layers.decode_sparse_attention(spec, params, mask, x, cache)

    for i in range(256):
        y, cache = step(x[:, i : i + 1], cache)
        ys.append(y)
    assert len(traces) == 1
    assert cache.length.tolist() == [256, 256]
    i, j = np.arange(256)[:, None], np.arange(256)[None]
    seen = (i >= j) & ((i - j < 37) | (j < 3) | (i < 3))
    check(jnp.concatenate(ys, axis=1), spec, params, seen, x)
    spare = np.setdiff1d(np.arange(35), pages)
    assert not cache.key[spare].any() and cache.key[pages].all()


@pytest.mark.parametrize("paged", [pytest.param(False, marks=pytest.mark.slow), True])
def test_sequences_of_different_lengths_and_several_tokens_at_once(paged):
    spec, params, x = make(rotary_base=100.0)
    mask = at.sliding_window(9)  # ahead too: keys that are not there yet are left out
    table = jnp.array([[5, 1, 3, 8, 0, 9], [2, 4, 6, 7, 10, 11]], jnp.int32)
    cache = layers.init_kv_cache(spec, B, 24, page_table=table if paged else None)
    assert cache.capacity == 24
    # Five of the second sequence; what the first had then is forgotten.
    _, cache = decode(spec, params, mask, x[:, :5], cache)
    cache = dataclasses.replace(cache, length=jnp.array([0, 5], jnp.int32))
    ys, (first, second) = [], x
    for n in (1, 3, 1):
        now = cache.length
        pieces = jnp.stack([first[now[0] :][:n], second[now[1] :][:n]])
        y, cache = decode(spec, params, mask, pieces, cache)
        ys.append((np.asarray(now), y))
    assert cache.length.tolist() == [5, 10]
    for now, y in ys:
        for b, start in enumerate(now):
            end = start + y.shape[1]
            near = np.abs(I - J)[:end, :end] < 9
            want = plain(spec, params, near, x[b : b + 1, :end])[:, start:]
            np.testing.assert_allclose(y[b : b + 1], want, atol=2e-6)


def test_a_block_mask_or_a_selector_of_the_step():
    spec, params, x = make(t=12)
    blocks = jnp.array([True, False, True])[None, None, None]
    seen = np.tile(np.array([True, False, True]).repeat(4), (12, 1))
    starts = []

    def selector(query, key, *, block_shape, offset):
        assert (query.shape, key.shape) == ((1, 1, 4, 4), (1, 12, 2, 4))
        assert block_shape == (1, 4)
        starts.append(offset)
        past = at.causal().shift(queries=offset)
        mask = at.BlockMask.from_blocks(
            blocks, shape=(1, 12), block_shape=(1, 4), expr=past
        )
        return mask, None

    table = jnp.array([[5, 1, 3], [2, 4, 0]], jnp.int32)
    cache = layers.init_kv_cache(spec, B, 12, page_table=table)
    _, cache = decode(spec, params, at.causal(), x[:, :10], cache)
    chosen, after = decode(spec, params, selector, x[:, 10:11], cache)
    check_last = lambda y, mask: np.testing.assert_allclose(
        y, plain(spec, params, mask, x[:, :11])[:, 10:], atol=2e-6
    )
    check_last(chosen, seen[:11, :11])
    assert len(starts) == 1 and after.length.tolist() == [11, 11]
    listed = at.BlockMask.from_blocks(
        blocks, shape=(1, 12), block_shape=(1, 4), expr=at.keys_below(11)
    )
    y, _ = layers.decode_sparse_attention(spec, params, listed, x[:, 10:11], cache)
    check_last(y, seen[:11, :11])


@pytest.mark.slow
def test_moba_decodes_as_it_attends():
    spec, params, x = make(t=24)
    moba = functools.partial(at.moba, budget=2)
    whole = layers.apply_sparse_attention(spec, params, moba, x)
    cache = layers.init_kv_cache(spec, B, 24)
    _, cache = decode(spec, params, moba, x[:, :17], cache)
    for i in range(17, 24):
        y, cache = decode(spec, params, moba, x[:, i : i + 1], cache)
        np.testing.assert_allclose(y, whole[:, i : i + 1], atol=2e-6)


@pytest.mark.parametrize("paged", [pytest.param(False, marks=pytest.mark.slow), True])
def test_tokens_beyond_the_capacity_are_not_stored(paged):
    spec, params, x = make(t=12)
    table = jnp.array([[0, 1], [2, 99]], jnp.int32)  # the last page is not there
    cache = layers.init_kv_cache(
        spec, B, 8, page_table=table if paged else None, pages=4 if paged else None
    )
    y, cache = decode(spec, params, at.causal(), x[:, :7], cache)
    full = cache
    y, cache = decode(spec, params, at.causal(), x[:, 7:10], cache)
    assert np.isfinite(y).all() and cache.length.tolist() == [10, 10]
    stored = np.asarray(cache.contiguous().key[0])
    assert stored.shape == (8, 2, 4) and stored.all()
    changed = np.asarray(cache.key != full.key).any(axis=(2, 3))
    if paged:  # page 1 has one more; nobody wrote to page 3, or to another's
        assert (
            changed.tolist() == [[False] * 4, [False] * 3 + [True]] + [[False] * 4] * 2
        )
    else:
        assert changed.tolist() == [[False] * 7 + [True]] * 2


def test_a_cache_is_of_the_layers_dtype():
    """Of another one all of it would be cast at each step."""
    spec, _, _ = make(dtype=jnp.bfloat16)
    assert layers.init_kv_cache(spec, B, 8).key.dtype == jnp.bfloat16
    assert layers.init_kv_cache(spec, B, 8, dtype=jnp.float32).value.dtype == np.float32
    spec, _, _ = make(param_dtype=jnp.bfloat16)
    assert layers.init_kv_cache(spec, B, 8).key.dtype == jnp.bfloat16


# ---- a mesh whose types say where arrays lie -----------------------------------------


@pytest.mark.slow
def test_selectors_statistics_and_decoding_over_explicit_axes():
    """Kernels cut over both axes, one of which the batch has too; caches cut or not."""
    spec, params, x = make(t=12, num_kv_heads=4, block_shape=(4, 4), rotary_base=100.0)
    moba = functools.partial(at.moba, budget=2)
    ids = jnp.asarray([[0] * 5 + [1] * 7, [0] * 12], jnp.int32)

    def run(params, x, ids, caches):
        seen = at.causal() & at.segments(ids)
        same = ids[:, None, :, None] == ids[:, None, None]
        apply = functools.partial(layers.apply_sparse_attention, spec, params)
        decode = functools.partial(layers.decode_sparse_attention, spec, params)
        y = apply(seen, x), apply(at.BlockMask.from_mask(same, (4, 4)), x)
        chosen = apply(moba, x, return_stats=True)
        steps = [
            decode(mask, x[:, :3], cache)
            for mask, cache in zip((at.causal(), moba), caches, strict=True)
        ]
        return y, chosen[0], chosen[1].recall, steps

    table = jnp.asarray([[5, 1, 3], [2, 4, 0]], jnp.int32)
    whole = layers.init_kv_cache(spec, B, 12)
    paged = layers.init_kv_cache(spec, B, 12, page_table=table)
    want = jax.jit(run)(params, x, ids, (paged, whole))
    mesh = jax.make_mesh((2, 4), ("data", "heads"), axis_types=(AxisType.Explicit,) * 2)
    place = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, P(*spec)))
    specs = dict.fromkeys(("query", "key", "value"), ("data", "heads"))
    specs |= {"out": ("heads", None, "data"), "out_bias": ("data",)}
    with jax.set_mesh(mesh):
        cut = {name: place(a, *specs.get(name, ())) for name, a in params.items()}
        whole = jax.tree.map(lambda a: place(a, "data"), whole)
        got = jax.jit(run)(cut, place(x, "data"), place(ids, "data"), (paged, whole))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


# ---- refusals ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads: got 3, needed a divisor of 4, num_heads"),
        (
            {"num_heads": 5, "num_kv_heads": 1},
            "num_heads: got 5, needed a divisor of 16",
        ),
        ({"num_heads": 0}, "num_heads: got 0, needed a positive int"),
        ({"capacity": 0}, "capacity: got 0, needed a positive int"),
        (
            {"block_shape": (8, 0)},
            r"block_shape: got \(8, 0\), needed two positive ints",
        ),
        ({"rotary_base": 10.0, "head_dim": 3}, "rotary_base: got 10.0 with heads of 3"),
        ({"rotary_base": 0.0, "head_dim": 4}, "rotary_base: got 0.0 with heads of 4"),
    ],
)
def test_bad_specs(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_bad_arguments():
    spec, params, x = make()
    apply = functools.partial(layers.apply_sparse_attention, spec, params)
    mask = at.causal()
    with pytest.raises(
        ValueError, match=r"x: got shape \(2, 21, 15\), needed \[b, t, 16"
    ):
        apply(mask, x[..., 1:])
    with pytest.raises(ValueError, match=r"x_kv: got shape \(2, 21, 15\), needed"):
        apply(mask, x, x[..., 1:])
    with pytest.raises(
        ValueError, match=r"positions: got shape \(20,\), needed \(21,\)"
    ):
        apply(mask, x, positions=jnp.arange(20))
    with pytest.raises(ValueError, match="20"):
        apply(at.block_mask(mask, 20, 21), x)
    with pytest.raises(ValueError, match="got 5 positions, needed 21"):
        apply(mask & at.segments(jnp.zeros(5, jnp.int32)), x)
    with pytest.raises(NotImplementedError, match="tpu"):
        other = dataclasses.replace(spec, implementation="mosaic_tpu")
        layers.apply_sparse_attention(other, params, mask, x)

    with pytest.raises(
        ValueError, match=r"page_table: got shape \(2, 3\), needed \(2, 2"
    ):
        layers.init_kv_cache(spec, B, 8, page_table=jnp.zeros((2, 3), jnp.int32))
    with pytest.raises(ValueError, match="pages: got 4, needed a page_table"):
        layers.init_kv_cache(spec, B, 8, pages=4)
    step = functools.partial(layers.decode_sparse_attention, spec, params, mask)
    with pytest.raises(ValueError, match="cache: got one of 3 sequences"):
        step(x, layers.init_kv_cache(spec, 3, 8))
    other = dataclasses.replace(spec, block_shape=(8, 8))
    table = jnp.zeros((2, 3), jnp.int32)
    with pytest.raises(ValueError, match="cache: got pages of 8 tokens, needed 4"):
        step(x, layers.init_kv_cache(other, B, 24, page_table=table))
