"""Every implementation of block_sparse_matmul and sampled_matmul against float64."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sparsejax as sj
from sparsejax.layouts import BlockLayout, gather_blocks, scatter_blocks
from sparsejax.ops import (
    block_sparse_matmul,
    block_sparse_matmul_reference,
    sampled_matmul,
    sampled_matmul_reference,
)
from sparsejax.ops._block_sparse_matmul import DSD, SDD
from sparsejax.testing import assert_close, interpreted

NEW_PALLAS = tuple(int(v) for v in jax.__version__.split(".")[:2]) >= (0, 11)
# Mosaic GPU has an interpreter from jax 0.11 on; before, only the compile tests see it.
if NEW_PALLAS:
    # Mosaic GPU's interpreter works by ordered callbacks, which checkpoint refuses; the
    # kernels themselves have no effect, and running one twice does no harm.
    from jax._src import callback, effects

    effects.remat_allowed_effects.add_type(callback.OrderedIOEffect)

IMPLEMENTATIONS = [name for name in DSD if name != "mosaic_gpu" or NEW_PALLAS]
KERNELS = [name for name in IMPLEMENTATIONS if name != "xla"]
slow = lambda value: pytest.param(value, marks=pytest.mark.slow)

# name: (m, (k, n), block, density, spare slots, dtype)
CASES = {
    "square16": (24, (64, 96), (16, 16), 0.4, 0, "float32"),
    "square16_bf16": (24, (64, 96), (16, 16), 0.4, 3, "bfloat16"),
    "square16_f16": (24, (64, 96), (16, 16), 0.4, 3, "float16"),
    "block8": (20, (40, 64), (8, 8), 0.3, 2, "float32"),
    "wide": (33, (64, 128), (16, 64), 0.5, 0, "bfloat16"),
    "tall": (33, (128, 64), (64, 16), 0.5, 1, "bfloat16"),
    "block128": (40, (256, 384), (128, 128), 0.3, 1, "bfloat16"),
    "block256": (40, (512, 256), (256, 128), 0.6, 0, "bfloat16"),
    "block256_f32": (24, (256, 512), (128, 256), 0.6, 0, "float32"),
    "nothing_but_padding": (9, (64, 64), (16, 16), 0.0, 4, "bfloat16"),
    "everything": (9, (64, 64), (16, 16), 1.0, 0, "bfloat16"),
    "ragged_edges": (1, (100, 70), (32, 16), 0.5, 2, "bfloat16"),
    "ragged_edges_f32": (19, (100, 70), (16, 32), 0.5, 2, "float32"),
}

# The whole table of what a named implementation refuses; anything else must be served.
REFUSED = {
    ("mosaic_tpu", "square16_f16"): "dtype",
    ("mosaic_gpu", "square16"): "dtype",
    ("mosaic_gpu", "block8"): "block_shape",
    ("mosaic_gpu", "block256_f32"): "dtype",
    ("mosaic_gpu", "ragged_edges_f32"): "dtype",
}


def choice(name):
    return name if name == "xla" else interpreted(name)


@functools.cache
def case(name):
    m, shape, block_shape, density, spare, dtype = CASES[name]
    key = jax.random.key(sum(map(ord, name)))
    layout = BlockLayout.random(key, shape, block_shape, density=density)
    mask = np.asarray(layout.to_mask()).copy()
    if 0 < density < 1:
        mask[:, 0] = False  # an empty column and an empty row
        mask[-1] = False
    layout = BlockLayout.from_mask(
        mask, block_shape, capacity=int(mask.sum()) + spare, shape=shape
    )
    rng = np.random.default_rng(0)
    draw = lambda *s: jnp.asarray(rng.standard_normal(s), dtype)
    x, dy = draw(m, shape[0]), draw(m, shape[1])
    blocks = draw(*layout.blocks_shape)
    return layout, x, blocks, dy


def f64(a):
    return np.asarray(a, np.float64)


def dense(blocks, layout):
    """The dense matrix in float64, written without the library's scatter."""
    (bk, bn), (k, n) = layout.block_shape, layout.shape
    w = np.zeros((layout.grid[0] * bk, layout.grid[1] * bn))
    count = int(layout.count)
    for b, r, c in zip(f64(blocks)[:count], layout.rows, layout.cols, strict=False):
        w[int(r) * bk : (int(r) + 1) * bk, int(c) * bn : (int(c) + 1) * bn] = b
    return w[:k, :n]


def cut(w, layout):
    """The stored blocks of a float64 matrix, zeros in padding slots."""
    (bk, bn), (kb, nb) = layout.block_shape, layout.grid
    w = np.pad(w, ((0, kb * bk - w.shape[0]), (0, nb * bn - w.shape[1])))
    out = np.zeros(layout.blocks_shape)
    for s in range(int(layout.count)):
        r, c = int(layout.rows[s]), int(layout.cols[s])
        out[s] = w[r * bk : (r + 1) * bk, c * bn : (c + 1) * bn]
    return out


def low_product(x, blocks, layout):
    """The formula by XLA in the low precision, dense."""
    w = scatter_blocks(blocks, layout)
    return jnp.matmul(x, w, preferred_element_type=jnp.float32).astype(x.dtype)


def low_sampled(x, y, layout):
    w = jnp.matmul(x.T, y, preferred_element_type=jnp.float32).astype(x.dtype)
    return gather_blocks(w, layout)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_value_and_gradients(implementation, name):
    layout, x, blocks, dy = case(name)
    impl = choice(implementation)
    refusal = REFUSED.get((implementation, name))
    if refusal:
        with pytest.raises(NotImplementedError, match=f"{implementation}.*{refusal}"):
            block_sparse_matmul(x, blocks, layout, implementation=impl)
        with pytest.raises(NotImplementedError, match=f"{implementation}.*{refusal}"):
            sampled_matmul(x, dy, layout, implementation=impl)
        return

    @jax.jit
    def run(x, blocks, dy, layout):
        y, vjp = jax.vjp(
            lambda x, b: block_sparse_matmul(x, b, layout, implementation=impl),
            x,
            blocks,
        )
        return y, *vjp(dy)

    low_y, low_vjp = jax.vjp(lambda x, b: low_product(x, b, layout), x, blocks)
    low_dx, low_db = low_vjp(dy)
    w = dense(blocks, layout)
    y, dx, db = run(x, blocks, dy, layout)
    assert (y.dtype, dx.dtype, db.dtype) == (x.dtype,) * 3
    assert_close(y, f64(x) @ w, low_y)
    assert_close(dx, f64(dy) @ w.T, low_dx)
    assert_close(db, cut(f64(x).T @ f64(dy), layout), low_db)
    # Exactly nothing where nothing is stored.
    empty = np.repeat(~np.asarray(layout.to_mask()).any(0), layout.block_shape[1])
    assert not np.asarray(y, np.float32)[:, empty[: layout.shape[1]]].any()
    assert not np.asarray(db, np.float32)[int(layout.count) :].any()


@pytest.mark.parametrize("name", ["ragged_edges_f32", "wide"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_sampled_value_and_gradients(implementation, name):
    layout, x, db, y = case(name)
    if (implementation, name) in REFUSED:
        return  # test_value_and_gradients asserts the refusal
    impl = choice(implementation)
    sampled = lambda x, y: sampled_matmul(x, y, layout, implementation=impl)
    out, vjp = jax.vjp(sampled, x, y)
    dx, dy = vjp(db)
    low, low_vjp = jax.vjp(lambda x, y: low_sampled(x, y, layout), x, y)
    low_dx, low_dy = low_vjp(db)
    w = dense(db, layout)
    assert_close(out, cut(f64(x).T @ f64(y), layout), low)
    assert_close(dx, f64(y) @ w.T, low_dx)
    assert_close(dy, f64(x) @ w, low_dy)


def second_order(product):
    """Gradients of a function of gradients: every derivative rule is differentiated."""

    def loss(x, b):
        y = product(x, b)
        return jnp.sum(jnp.sin(y.astype(jnp.float32)))

    def of_gradients(x, b):
        gx, gb = jax.grad(loss, (0, 1))(x, b)
        square = lambda g: jnp.sum(jnp.square(g.astype(jnp.float32)))
        return square(gx) + square(gb)

    return jax.grad(of_gradients, (0, 1))


@pytest.mark.parametrize("name", [slow("square16"), "ragged_edges"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradient_of_gradient(implementation, name):
    if (implementation, name) in REFUSED:
        return  # test_value_and_gradients asserts the refusal
    layout, x, blocks, _ = case(name)
    x, blocks = x / 4, blocks / 4
    impl = choice(implementation)
    ours = second_order(
        lambda x, b: block_sparse_matmul(x, b, layout, implementation=impl)
    )
    low = second_order(lambda x, b: low_product(x, b, layout))
    with jax.enable_x64(True):
        wide = lambda a: jnp.asarray(f64(a))
        exact = second_order(lambda x, b: x @ scatter_blocks(b, layout))
        reference = jax.tree.map(np.asarray, exact(wide(x), wide(blocks)))
    for got, want, base in zip(
        jax.jit(ours)(x, blocks), reference, low(x, blocks), strict=True
    ):
        # The slots of padding: the dense formula does not know them.
        if got.ndim == 3:
            assert not np.asarray(got, np.float32)[int(layout.count) :].any()
        # sin' in float32 on bfloat16 values: both sides round y, so eps covers less.
        assert_close(got, want, base, eps=1e-5)


@pytest.mark.parametrize("implementation", ["xla", *map(slow, KERNELS)])
def test_transformations(implementation):
    """vmap of every operand, scan, checkpoint, a layout built inside jit."""
    layout, x, blocks, _ = case("square16_bf16")
    product = functools.partial(
        block_sparse_matmul, implementation=choice(implementation)
    )
    xs, bs = jnp.stack([x, 2 * x, -x]), jnp.stack([blocks, blocks / 2, blocks[::-1]])
    other = BlockLayout.from_mask(
        np.asarray(layout.to_mask())[::-1], layout.block_shape, capacity=layout.capacity
    )
    layouts = jax.tree.map(lambda *a: jnp.stack(a), layout, other, layout)
    separately = lambda fn, *args: jnp.stack([fn(*a) for a in zip(*args, strict=True)])
    same = lambda a, b: np.testing.assert_array_equal(
        np.asarray(a, np.float32), np.asarray(b, np.float32)
    )

    same(
        jax.vmap(lambda x: product(x, blocks, layout))(xs),
        separately(lambda x: product(x, blocks, layout), xs),
    )
    every = [jax.tree.map(lambda a, i=i: a[i], layouts) for i in range(3)]
    same(jax.vmap(product)(xs, bs, layouts), separately(product, xs, bs, every))
    same(
        jax.vmap(product, in_axes=(None, 0, None))(x, bs, layout),
        separately(lambda b: product(x, b, layout), bs),
    )
    loss = lambda x, b, l: jnp.sum(jnp.square(product(x, b, l)))
    grads = jax.jit(jax.vmap(jax.grad(loss, (0, 1))))(xs, bs, layouts)
    for i, each in enumerate(every):
        want = jax.grad(loss, (0, 1))(xs[i], bs[i], each)
        same(grads[0][i], want[0])
        same(grads[1][i], want[1])

    def scanned(bs, layouts):
        body = jax.checkpoint(lambda c, bl: (c + loss(x, *bl).astype(c.dtype), None))
        return jax.lax.scan(body, jnp.zeros((), jnp.float32), (bs, layouts))[0]

    want = [jax.grad(loss, 1)(x, b, each) for b, each in zip(bs, every, strict=True)]
    same(jax.jit(jax.grad(scanned))(bs, layouts), jnp.stack(want))

    @jax.jit
    def built_inside(mask, x, b):
        inner = BlockLayout.from_mask(
            mask, layout.block_shape, capacity=layout.capacity
        )
        return product(x, b, inner)

    same(
        built_inside(np.asarray(layout.to_mask()), x, blocks),
        product(x, blocks, layout),
    )


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, None])
def test_leading_axes_and_no_retrace(implementation):
    impl = None if implementation is None else choice(implementation)
    layout, x, blocks, _ = case("square16_bf16")
    traces = []

    @jax.jit
    def run(x, blocks, layout):
        traces.append(1)
        return block_sparse_matmul(x, blocks, layout, implementation=impl)

    y = run(x.reshape(2, 3, 4, -1), blocks, layout)
    np.testing.assert_array_equal(
        np.asarray(y.reshape(24, -1), np.float32),
        np.asarray(run(x, blocks, layout), np.float32),
    )
    fewer = np.asarray(layout.to_mask()) & (np.arange(6) % 2 == 0)
    moved = BlockLayout.from_mask(fewer, (16, 16), capacity=layout.capacity)
    y = run(x, blocks, moved)
    assert_close(y, f64(x) @ dense(blocks, moved), low_product(x, blocks, moved))
    assert len(traces) == 2  # one per shape of x
    one = block_sparse_matmul(x[0], blocks, layout, implementation=impl)
    assert one.shape == (96,)
    none = block_sparse_matmul(x[:0], blocks, layout, implementation=impl)
    assert none.shape == (0, 96)


# Mosaic GPU's interpreter may wait for ever where a program has collectives beside it.
@pytest.mark.parametrize(
    "implementation", [*(n for n in IMPLEMENTATIONS if n != "mosaic_gpu"), None]
)
def test_shard_map_over_eight_devices(implementation):
    """Rows over devices, weights alike on all: the weights' gradients are summed."""
    impl = None if implementation is None else choice(implementation)
    layout, x, blocks, dy = case("square16_bf16")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def loss(x, b, dy):
        y = block_sparse_matmul(x, b, layout, implementation=impl)
        return jax.lax.psum(jnp.sum((y * dy).astype(jnp.float32)), "data")

    # Pallas' own interpreters do not annotate what varies; the kernels and XLA do.
    mapped = jax.shard_map(
        loss,
        mesh=mesh,
        in_specs=(P("data"), P(), P("data")),
        out_specs=P(),
        check_vma=implementation in (None, "xla"),
    )
    dx, db = jax.jit(jax.grad(mapped, (0, 1)))(x, blocks, dy)
    assert_close(dx, f64(dy) @ dense(blocks, layout).T, _low(x, blocks, layout, dy)[0])
    want = cut(f64(x).T @ f64(dy), layout)
    # Eight partial sums are rounded to bfloat16 each, then added.
    assert_close(db, want, _low_in_eighths(x, blocks, layout, dy))
    value = jax.jit(mapped)(x, blocks, dy)
    want = np.sum((f64(x) @ dense(blocks, layout)) * f64(dy))
    assert abs(float(value) - want) < 0.05 * np.sqrt(x.size) * 4


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_shard_map_of_gradients_over_eight_devices(implementation, monkeypatch):
    """Each device its rows and their gradients; the weights' are summed outside."""
    if implementation == "mosaic_gpu":
        from jax._src.pallas.mosaic_gpu.interpret import shared_memory

        # The interpreter simulates all devices at once, but at the end of a kernel
        # asserts that none has a barrier left, though others are still in the kernel.
        monkeypatch.setattr(
            shared_memory.GPUSharedMemory,
            "assert_no_barriers_allocated",
            lambda self: None,
        )
    layout, x, blocks, dy = case("square16_bf16")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def product(x, b):
        return block_sparse_matmul(x, b, layout, implementation=choice(implementation))

    def grads(x, b, dy):
        y, back = jax.vjp(product, x, b)
        dx, db = back(dy)
        return y, dx, db[None]

    rows = P("data")
    mapped = jax.shard_map(
        grads, mesh=mesh, in_specs=(rows, P(), rows), out_specs=rows, check_vma=False
    )
    y, dx, db = jax.jit(mapped)(x, blocks, dy)
    assert_close(y, f64(x) @ dense(blocks, layout), low_product(x, blocks, layout))
    assert_close(dx, f64(dy) @ dense(blocks, layout).T, _low(x, blocks, layout, dy)[0])
    want = cut(f64(x).T @ f64(dy), layout)
    db = functools.reduce(lambda a, b: a + b, np.asarray(db))
    assert_close(db, want, _low_in_eighths(x, blocks, layout, dy))


def _low(x, blocks, layout, dy):
    return jax.vjp(lambda x, b: low_product(x, b, layout), x, blocks)[1](dy)


def _low_in_eighths(x, blocks, layout, dy):
    parts = [
        _low(x[i : i + 3], blocks, layout, dy[i : i + 3])[1] for i in range(0, 24, 3)
    ]
    return functools.reduce(lambda a, b: a + b, parts)


def test_jit_over_a_mesh_with_automatic_axes():
    layout, x, blocks, dy = case("square16_bf16")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, P("data"))
    run = jax.jit(lambda x, b: block_sparse_matmul(x, b, layout))
    y = run(jax.device_put(x, rows), blocks)
    assert_close(y, f64(x) @ dense(blocks, layout), low_product(x, blocks, layout))


def test_jit_over_a_mesh_with_explicit_axes():
    layout, x, blocks, dy = case("square16_bf16")
    mesh = jax.make_mesh((4, 2), ("data", "rest"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        put = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, P(*spec)))
        layout_ = jax.tree.map(put, layout)
        # Both the rows and the contraction are cut, and the blocks are, as in FSDP.
        x_, dy_ = put(x, "data", "rest"), put(dy, "data")
        blocks_ = put(blocks, None, "data")

        @jax.jit
        def run(x, b, dy):
            y, vjp = jax.vjp(lambda x, b: block_sparse_matmul(x, b, layout_), x, b)
            return y, *vjp(dy), sampled_matmul(x, dy, layout_)

        y, dx, db, sampled = run(x_, blocks_, dy_)
        assert jax.typeof(y).sharding.spec == P("data", None)
    w = dense(blocks, layout)
    low_dx, low_db = _low(x, blocks, layout, dy)
    assert_close(y, f64(x) @ w, low_product(x, blocks, layout))
    assert_close(dx, f64(dy) @ w.T, low_dx)
    want = cut(f64(x).T @ f64(dy), layout)
    parts = [
        _low(x[i : i + 6], blocks, layout, dy[i : i + 6])[1] for i in (0, 6, 12, 18)
    ]
    low = functools.reduce(lambda a, b: a + b, parts)
    assert_close(db, want, low)
    assert_close(sampled, want, low)


def test_master_blocks_get_their_gradient_unrounded():
    """dtype=bfloat16 with float32 blocks: the float32 sums come back as they are."""
    layout, x, blocks, dy = case("square16_bf16")
    master = blocks.astype(jnp.float32)
    fn = lambda b: block_sparse_matmul(x, b, layout, dtype=jnp.bfloat16)
    y, vjp = jax.vjp(fn, master)
    (db,) = vjp(dy)
    assert y.dtype == jnp.bfloat16 and db.dtype == jnp.float32
    exact = cut(f64(x).T @ f64(dy), layout)
    assert np.abs(f64(db) - exact).max() < 1e-5 * np.abs(exact).max()


@pytest.mark.parametrize(
    "name", ["square16", "ragged_edges_f32", "nothing_but_padding"]
)
def test_references(name):
    layout, x, blocks, dy = case(name)
    y = block_sparse_matmul_reference(x, blocks, layout)
    assert_close(y, f64(x) @ dense(blocks, layout), low_product(x, blocks, layout))
    out = sampled_matmul_reference(x, dy, layout)
    assert_close(out, cut(f64(x).T @ f64(dy), layout), low_sampled(x, dy, layout))
    tangent = jax.jvp(
        lambda x: block_sparse_matmul_reference(x, blocks, layout), (x,), (x,)
    )[1]
    np.testing.assert_allclose(f64(tangent), f64(y), rtol=1e-5, atol=1e-5)


def test_no_array_of_weight_shape():
    """At 90% neither the forward nor the backward pass holds the dense matrix."""
    layout = BlockLayout.random(
        jax.random.key(0), (1024, 2048), (128, 128), density=0.1
    )
    x = jax.ShapeDtypeStruct((512, 1024), jnp.float32)
    blocks = jax.ShapeDtypeStruct(layout.blocks_shape, jnp.float32)
    loss = lambda x, b, l: jnp.sum(block_sparse_matmul(x, b, l) ** 2)
    jaxpr = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(x, blocks, layout))
    assert not re.search(r"\[(1024,2048|2048,1024)\]", jaxpr)
    assert "[512,2048]" in jaxpr  # the pattern would match


# --- Bad input ------------------------------------------------------------------------


def test_bad_input_names_argument_got_and_needed():
    layout, x, blocks, dy = case("square16")
    with pytest.raises(ValueError, match=r"x: got shape \(24, 65\), needed.*64"):
        block_sparse_matmul(jnp.ones((24, 65)), blocks, layout)
    with pytest.raises(ValueError, match=r"blocks: got shape \(1, 16, 16\), needed"):
        block_sparse_matmul(x, blocks[:1], layout)
    with pytest.raises(ValueError, match="x: got dtype int32, needed one of float32"):
        block_sparse_matmul(jnp.ones((24, 64), jnp.int32), blocks, layout)
    with pytest.raises(ValueError, match="dtype: got dtype int32, needed one of"):
        block_sparse_matmul(x, blocks, layout, dtype=jnp.int32)
    with pytest.raises(ValueError, match=r"y: got shape \(3, 96\), needed \(24, 96\)"):
        sampled_matmul(x, dy[:3], layout)
    with pytest.raises(
        ValueError, match="implementation: got 'cuda', needed 'xla', 'mosaic_tpu'"
    ):
        block_sparse_matmul(x, blocks, layout, implementation="cuda")
    repeated = BlockLayout(
        jnp.zeros(2, jnp.int32), jnp.zeros(2, jnp.int32), (64, 96), (16, 16)
    )
    with pytest.raises(ValueError, match="slot 1 has block row 0.*none repeated"):
        block_sparse_matmul(x, blocks[:2], repeated)
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), layout)
    with pytest.raises(ValueError, match="layout: got a stack"):
        block_sparse_matmul(x, jnp.stack([blocks, blocks]), stacked)


@pytest.mark.parametrize("implementation", ["mosaic_tpu", "mosaic_gpu"])
def test_named_implementation_never_falls_back(implementation):
    layout, x, blocks, _ = case("square16_bf16")
    needs = {"mosaic_tpu": "tpu", "mosaic_gpu": "cuda"}[implementation]
    with pytest.raises(NotImplementedError, match=f"needs platform {needs}, got cpu"):
        block_sparse_matmul(x, blocks, layout, implementation=implementation)


def test_explain():
    layout = BlockLayout.random(
        jax.random.key(0), (1024, 1024), (128, 128), density=0.1
    )
    x, blocks = jnp.ones((2048, 1024)), jnp.ones(layout.blocks_shape)
    text = sj.explain(block_sparse_matmul, x, blocks, layout)
    assert "xla: loop over the blocks, 9.4% of dense's multiply-adds" in text
    assert "not mosaic_tpu: platform is cpu" in text
    assert "not mosaic_gpu: mosaic_gpu: dtype is float32" in text
    full = BlockLayout.from_mask(np.ones((8, 8), bool), (128, 128))
    text = sj.explain(block_sparse_matmul, x, jnp.ones(full.blocks_shape), full)
    assert "densify and multiply, faster" in text
    # Seen through grad: one line of each product.
    loss = lambda x, b: jnp.sum(block_sparse_matmul(x, b, layout))
    text = sj.explain(jax.grad(loss, (0, 1)), x, blocks)
    assert {line.split(":")[0] for line in text.splitlines() if line[0] != " "} == {
        "dsd",
        "dsd_transposed",
        "sdd",
    }
    named = sj.explain(block_sparse_matmul, x, blocks, layout, implementation="xla")
    assert "not mosaic_tpu: implementation='xla' was asked for" in named


def test_registries_name_their_files():
    from pathlib import Path

    import pallas_kernels

    folder = Path(pallas_kernels.__file__).parent / "block_sparse_matmul"
    for registry in (DSD, SDD):
        assert list(registry) == ["xla", "mosaic_tpu", "mosaic_gpu"]
        for name, implementation in registry.items():
            assert implementation.name == name
            assert name == "xla" or (folder / f"{name}.py").exists()
