"""Every implementation of nm_matmul against float64, and against masked_matmul."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sparsejax as sj
from sparsejax.layouts import condense_nm
from sparsejax.masks import nm_mask
from sparsejax.ops import _nm_matmul_xla, masked_matmul, nm_matmul, nm_matmul_reference
from sparsejax.ops._nm_matmul import NM_MATMUL
from sparsejax.testing import assert_close, interpreted

NEW_PALLAS = tuple(int(v) for v in jax.__version__.split(".")[:2]) >= (0, 11)
# Mosaic GPU has an interpreter from jax 0.11 on; before, only the compile tests see it.
IMPLEMENTATIONS = [name for name in NM_MATMUL if name != "mosaic_gpu" or NEW_PALLAS]

# name: (rows, k, p, n, m, dtype)
CASES = {
    "2:4": (20, 64, 24, 2, 4, "float32"),
    "2:4_bf16": (24, 256, 128, 2, 4, "bfloat16"),
    "2:4_f16": (8, 64, 32, 2, 4, "float16"),
    "1:8_bf16": (9, 512, 256, 1, 8, "bfloat16"),
    "3:4_ragged": (1, 44, 7, 3, 4, "bfloat16"),
    "1:20": (3, 60, 130, 1, 20, "float32"),
}

# The whole table of what a named implementation refuses; anything else must be served.
REFUSED = {
    ("mosaic_tpu", "2:4_f16"): "dtype is float16",
    ("mosaic_gpu", "2:4"): "dtype is float32",
    ("mosaic_gpu", "2:4_f16"): "k is 64, needs a multiple of 256",
    ("mosaic_gpu", "3:4_ragged"): "n:m is 3:4",
    ("mosaic_gpu", "1:20"): "dtype is float32",
}


def slowly(names, slow=("mosaic_tpu",)):
    """Tests of interpreted kernels are marked slow, the TPU's at least."""
    marks = lambda name: [pytest.mark.slow] if name in slow else []
    return [pytest.param(name, marks=marks(name)) for name in names]


KERNELS = [name for name in NM_MATMUL if name != "xla"]


def choice(name):
    return name if name in ("xla", None) else interpreted(name)


@functools.cache
def case(name):
    rows, k, p, n, m, dtype = CASES[name]
    rng = np.random.default_rng(sum(map(ord, name)))
    draw = lambda *s: jnp.asarray(rng.standard_normal(s), dtype)
    x, w, dy = draw(rows, k), draw(k, p), draw(rows, p)
    mask = np.array(nm_mask(jnp.abs(w), n, m))
    if n > 1:
        mask[:m, 0] = False  # an empty group, and one with too few
        mask[m : 2 * m, 0] &= np.arange(m) != np.flatnonzero(mask[m : 2 * m, 0])[0]
    w = jnp.where(mask, w, jnp.zeros((), w.dtype))
    values, indices = condense_nm(w, mask, n=n, m=m)
    return dict(n=n, m=m), x, w, values, indices, dy


def f64(a):
    return np.asarray(a, np.float64)


def taken(w, indices, values, n, m):
    """The entries of a dense float64 matrix at the places, by loops over bits."""
    bits = 2 if m <= 4 else 4 if m <= 16 else 8
    per, out = 32 // bits, np.zeros(values.shape)
    for r in range(values.shape[0]):
        place = (np.asarray(indices)[r // per] >> (bits * (r % per))) & (2**bits - 1)
        out[r] = w[r // n * m + place, np.arange(w.shape[1])]
    return out


def low_product(x, w):
    """The formula by XLA in the low precision, dense."""
    return jnp.matmul(x, w, preferred_element_type=jnp.float32).astype(x.dtype)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("implementation", slowly(IMPLEMENTATIONS))
def test_value_and_gradients(implementation, name):
    group, x, w, values, indices, dy = case(name)
    impl = choice(implementation)
    refusal = REFUSED.get((implementation, name))
    product = functools.partial(nm_matmul, **group, implementation=impl)
    if refusal:
        with pytest.raises(NotImplementedError, match=f"{implementation}.*{refusal}"):
            product(x, values, indices)
        return

    low_y, low_vjp = jax.vjp(low_product, x, w)

    @jax.jit
    def run(x, values, indices, dy):
        y, vjp = jax.vjp(lambda x, v: product(x, v, indices), x, values)
        return y, *vjp(dy)

    low_dx, low_dw = low_vjp(dy)
    y, dx, dv = run(x, values, indices, dy)
    assert (y.dtype, dx.dtype, dv.dtype) == (x.dtype,) * 3
    assert_close(y, f64(x) @ f64(w), low_y)
    assert_close(dx, f64(dy) @ f64(w).T, low_dx)
    take = functools.partial(taken, indices=indices, values=values, **group)
    assert_close(dv, take(f64(x).T @ f64(dy)), take(f64(low_dw)))


def second_order(product):
    """Gradients of a function of gradients: every derivative rule is differentiated."""

    def loss(x, v):
        return jnp.sum(jnp.sin(product(x, v).astype(jnp.float32)))

    def of_gradients(x, v):
        square = lambda g: jnp.sum(jnp.square(g.astype(jnp.float32)))
        return sum(map(square, jax.grad(loss, (0, 1))(x, v)))

    return jax.grad(of_gradients, (0, 1))


@pytest.mark.parametrize("name", ["2:4_bf16"])
@pytest.mark.parametrize("implementation", slowly(IMPLEMENTATIONS, KERNELS))
def test_gradient_of_gradient(implementation, name):
    group, x, _, values, indices, _ = case(name)
    x, values = x / 4, values / 4
    impl = choice(implementation)
    ours = second_order(
        lambda x, v: nm_matmul(x, v, indices, **group, implementation=impl)
    )
    plain = lambda x, v: nm_matmul_reference(x, v, indices, **group)
    low = second_order(plain)
    with jax.enable_x64(True):
        wide = lambda a: jnp.asarray(f64(a))
        reference = jax.tree.map(np.asarray, second_order(plain)(wide(x), wide(values)))
    for got, want, base in zip(
        jax.jit(ours)(x, values), reference, low(x, values), strict=True
    ):
        # sin' in float32 on bfloat16 values: both sides round y, so eps covers less.
        assert_close(got, want, base, eps=1e-5)


@pytest.mark.parametrize("implementation", slowly(IMPLEMENTATIONS))
def test_transformations(implementation):
    """vmap of every operand, scan and checkpoint over stacked layers."""
    group, x, _, values, indices, _ = case("2:4_bf16")
    product = functools.partial(
        nm_matmul, **group, implementation=choice(implementation)
    )
    xs = jnp.stack([x, -x])
    vs = jnp.stack([values, values / 2])
    every = jnp.stack([indices, indices[:, ::-1]])
    same = lambda a, b: np.testing.assert_array_equal(f64(a), f64(b))
    separately = lambda *args: jnp.stack([product(*a) for a in zip(*args, strict=True)])
    same(
        jax.vmap(lambda x: product(x, values, indices))(xs),
        separately(xs, [values] * 2, [indices] * 2),
    )
    same(jax.vmap(product)(xs, vs, every), separately(xs, vs, every))
    same(
        jax.vmap(product, in_axes=(None, 0, None))(x, vs, indices),
        separately([x] * 2, vs, [indices] * 2),
    )
    if implementation == "mosaic_gpu":
        return  # its interpreter works by callbacks, which checkpoint refuses
    loss = lambda x, v, i: jnp.sum(jnp.square(product(x, v, i).astype(jnp.float32)))

    def scanned(vs):
        body = jax.checkpoint(lambda c, vi: (c + loss(x, *vi), None))
        return jax.lax.scan(body, jnp.zeros((), jnp.float32), (vs, every))[0]

    want = [jax.grad(loss, 1)(x, v, i) for v, i in zip(vs, every, strict=True)]
    same(jax.jit(jax.grad(scanned))(vs), jnp.stack(want))


@pytest.mark.parametrize("implementation", slowly([*IMPLEMENTATIONS, None]))
def test_leading_axes_and_no_retrace(implementation):
    group, x, w, values, indices, _ = case("2:4_bf16")
    traces = []

    @jax.jit
    def run(x, values, indices):
        traces.append(1)
        impl = choice(implementation)
        return nm_matmul(x, values, indices, **group, implementation=impl)

    y = run(x.reshape(2, 3, 4, -1), values, indices)
    assert y.shape == (2, 3, 4, 128)
    assert_close(y.reshape(24, -1), f64(x) @ f64(w), low_product(x, w))
    moved = run(x.reshape(2, 3, 4, -1), values[:, ::-1], indices[:, ::-1])
    np.testing.assert_array_equal(f64(moved), f64(y)[..., ::-1])
    assert len(traces) == 1
    assert run(x[0], values, indices).shape == (128,)
    assert run(x[:0], values, indices).shape == (0, 128)


def test_equals_masked_matmul():
    group, x, w, values, indices, dy = case("2:4")
    rng = np.random.default_rng(0)
    full = jnp.asarray(rng.standard_normal(w.shape), w.dtype)
    mask = nm_mask(jnp.abs(full), **group)
    with_mask = lambda x, w: masked_matmul(x, w, mask)
    condensed = lambda x, w: nm_matmul(x, *condense_nm(w, mask, **group), **group)
    want, want_vjp = jax.vjp(with_mask, x, full)
    got, got_vjp = jax.vjp(condensed, x, full)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    for a, b in zip(got_vjp(dy), want_vjp(dy), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_reference():
    group, x, w, values, indices, _ = case("1:20")
    y = nm_matmul_reference(x, values, indices, **group)
    assert_close(y, f64(x) @ f64(w), low_product(x, w))
    product = lambda x: nm_matmul_reference(x, values, indices, **group)
    np.testing.assert_array_equal(f64(jax.jvp(product, (x,), (x,))[1]), f64(y))


def test_master_values_get_their_gradient_unrounded():
    """dtype=bfloat16 with float32 values: the float32 sums come back as they are."""
    group, x, _, values, indices, dy = case("2:4_bf16")
    fn = lambda v: nm_matmul(x, v, indices, **group, dtype=jnp.bfloat16)
    y, vjp = jax.vjp(fn, values.astype(jnp.float32))
    (dv,) = vjp(dy)
    assert y.dtype == jnp.bfloat16 and dv.dtype == jnp.float32
    exact = taken(f64(x).T @ f64(dy), indices, values, **group)
    assert np.abs(f64(dv) - exact).max() < 1e-5 * np.abs(exact).max()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "k", "n", "m", "form"),
    [
        (4, 64, 2, 4, "select"),
        (3, 96, 2, 3, "select"),  # a number of entries that does not halve
        (2, 96, 6, 8, "select"),  # groups that go over the end of a word
        (5, 512, 2, 4, "planes"),
        (5, 512, 6, 8, "planes"),
        (5, 544, 2, 4, "planes"),
        (5, 256, 2, 4, "expand"),  # eight units only
        (257, 512, 2, 4, "expand"),
        (1, 68, 2, 4, "expand"),  # words that are not full
    ],
)
def test_forms_of_the_xla_product(rows, k, n, m, form):
    assert _nm_matmul_xla.form(rows, k, n, m) == form
    rng = np.random.default_rng(rows)
    draw = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.bfloat16)
    x, w = draw(rows, k), draw(k, 5)
    mask = nm_mask(jnp.abs(w), n, m)
    values, indices = condense_nm(w, mask, n=n, m=m)
    y = nm_matmul(x, values, indices, n=n, m=m, implementation="xla")
    w = jnp.where(mask, w, jnp.zeros((), w.dtype))
    assert_close(y, f64(x) @ f64(w), low_product(x, w))


# --- Over devices ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_jit_over_a_mesh(kind):
    group, x, w, values, indices, dy = case("2:4_bf16")
    mesh = jax.make_mesh((4, 2), ("data", "rest"), axis_types=(kind,) * 2)
    with jax.set_mesh(mesh):
        put = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, P(*spec)))
        # Both the rows and the contraction are cut, and the values are, as in FSDP.
        arrays = (
            put(x, "data", "rest"),
            put(values, "rest"),
            put(indices),
            put(dy, "data"),
        )

        @jax.jit
        def run(x, values, indices, dy):
            product = lambda x, v: nm_matmul(x, v, indices, **group)
            y, vjp = jax.vjp(product, x, values)
            return y, *vjp(dy)

        y, dx, dv = run(*arrays)
    low_dx = low_product(dy, w.T)
    assert_close(y, f64(x) @ f64(w), low_product(x, w))
    assert_close(dx, f64(dy) @ f64(w).T, low_dx)
    take = functools.partial(taken, indices=indices, values=values, **group)
    # Partial sums of four devices are rounded to bfloat16 each, then added.
    parts = [low_product(x[i : i + 6].T, dy[i : i + 6]) for i in range(0, 24, 6)]
    low = functools.reduce(lambda a, b: a + b, parts)
    assert_close(dv, take(f64(x).T @ f64(dy)), take(f64(low)))


# Mosaic GPU's interpreter stops with an assertion of its own under shard_map.
@pytest.mark.parametrize(
    "implementation", [*(n for n in IMPLEMENTATIONS if n != "mosaic_gpu"), None]
)
def test_shard_map(implementation):
    """Rows over devices, weights alike on all: the weights' gradients are summed."""
    group, x, w, values, indices, dy = case("2:4_bf16")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    impl = choice(implementation)

    def loss(x, v, i, dy):
        y = nm_matmul(x, v, i, **group, implementation=impl)
        return jax.lax.psum(jnp.sum((y * dy).astype(jnp.float32)), "data")

    # Pallas' own interpreters do not annotate what varies; the kernels and XLA do.
    annotated = implementation in (None, "xla")
    mapped = jax.shard_map(
        loss,
        mesh=mesh,
        in_specs=(P("data"), P(), P(), P("data")),
        out_specs=P(),
        check_vma=annotated,
    )
    value = jax.jit(mapped)(x, values, indices, dy)
    want = np.sum((f64(x) @ f64(w)) * f64(dy))
    assert abs(float(value) - want) < 0.02 * np.linalg.norm(f64(x) @ f64(w)) * 2
    if annotated:
        dv = jax.jit(jax.grad(mapped, 1))(x, values, indices, dy)
        exact = taken(f64(x).T @ f64(dy), indices, values, **group)
        assert np.abs(f64(dv) - exact).max() < 0.02 * np.abs(exact).max()


# --- Bad input, and what is said ------------------------------------------------------


def test_bad_input_names_argument_got_and_needed():
    group, x, _, values, indices, _ = case("2:4")
    with pytest.raises(ValueError, match=r"x: got shape \(20, 63\), needed.*64"):
        nm_matmul(x[:, 1:], values, indices, **group)
    with pytest.raises(ValueError, match="got 4:2, needed 1 <= n <= m"):
        nm_matmul(x, values, indices, n=4, m=2)
    with pytest.raises(ValueError, match=r"values: got shape \(31, 24\)"):
        nm_matmul(x, values[1:], indices, **group)
    with pytest.raises(ValueError, match=r"indices: got int32 .*needed uint32 \(2, 24"):
        nm_matmul(x, values, indices.astype(jnp.int32), **group)
    with pytest.raises(ValueError, match=r"indices: group 0 of column 0 has places"):
        nm_matmul(x, values, jnp.zeros_like(indices), **group)
    with pytest.raises(ValueError, match="x: got dtype int32, needed one of float32"):
        nm_matmul(jnp.ones((2, 64), jnp.int32), values, indices, **group)
    with pytest.raises(ValueError, match="dtype: got dtype int32, needed one of"):
        nm_matmul(x, values, indices, **group, dtype=jnp.int32)
    with pytest.raises(ValueError, match="implementation: got 'cuda', needed 'xla'"):
        nm_matmul(x, values, indices, **group, implementation="cuda")


@pytest.mark.parametrize("implementation", [n for n in NM_MATMUL if n != "xla"])
def test_named_implementation_never_falls_back(implementation):
    group, x, _, values, indices, _ = case("2:4_bf16")
    needs = {"mosaic_tpu": "tpu", "mosaic_gpu": "cuda"}[implementation]
    with pytest.raises(NotImplementedError, match=f"needs platform {needs}, got cpu"):
        nm_matmul(x, values, indices, **group, implementation=implementation)


def test_weight_gradient_holds_one_dense_product():
    """No second array of the weight's size, whatever its dtype."""
    k, p = 1024, 512
    abstract = jax.ShapeDtypeStruct
    args = (
        abstract((256, k), jnp.float32),
        abstract((k // 2, p), jnp.float32),
        abstract((k // 32, p), jnp.uint32),
    )
    loss = lambda x, v, i: jnp.sum(jnp.sin(nm_matmul(x, v, i, n=2, m=4)))
    compiled = jax.jit(jax.grad(loss, 1)).trace(*args).lower().compile()
    # One dense product, and y or dy of 256 rows twice at most.
    limit = 4 * (k * p + 2 * 256 * p + 256 * k)
    assert compiled.memory_analysis().temp_size_in_bytes <= limit


def test_explain():
    group, x, _, values, indices, _ = case("2:4")
    loss = lambda x, v: jnp.sum(nm_matmul(x, v, indices, **group))
    text = sj.explain(jax.grad(loss, (0, 1)), x, values)
    assert "nm: 20 rows, 64x24 matrix condensed 2:4 (50.0% of the entries)" in text
    assert "xla: expand and multiply; dense would be faster" in text
    one = sj.explain(nm_matmul, x[:1], values, indices, **group)
    assert "xla: on a CPU the entries of x are selected" in one
    ops = {line.split(":")[0] for line in text.splitlines() if line[0] != " "}
    assert ops == {"nm", "nm_transposed", "nm_sampled"}


def test_registry_names_its_files():
    from pathlib import Path

    import pallas_kernels

    folder = Path(pallas_kernels.__file__).parent / "nm_matmul"
    files = {path.stem for path in folder.glob("[a-z]*.py")}
    assert set(NM_MATMUL) == {"xla", *files}
    assert all(name == each.name for name, each in NM_MATMUL.items())


def test_storage_is_defined_once():
    """The kernels' widths and the layout's are the same."""
    from pallas_kernels.nm_matmul._spec import index_bits
    from sparsejax.layouts import _nm

    assert [index_bits(m) for m in range(1, 257)] == [
        _nm.index_bits(1, m) for m in range(1, 257)
    ]
