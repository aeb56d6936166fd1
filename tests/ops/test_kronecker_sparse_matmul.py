"""Every implementation of kronecker_sparse_matmul against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import sparsejax as sj
from sparsejax.ops import (
    _kronecker_sparse_xla,
    kronecker_sparse_matmul,
    kronecker_sparse_matmul_reference,
)
from sparsejax.ops._kronecker_sparse_matmul import KRONECKER
from sparsejax.structured import Pattern
from sparsejax.testing import assert_close, interpreted

NEW_PALLAS = tuple(int(v) for v in jax.__version__.split(".")[:2]) >= (0, 11)
# Mosaic GPU has an interpreter from jax 0.11 on; before, only the compile tests see it.
IMPLEMENTATIONS = [n for n in KRONECKER if n != "mosaic_gpu" or NEW_PALLAS]

# name: (rows, (a, b, c, d), inputs, outputs, dtype)
CASES = {
    "f32": (20, (3, 5, 4, 2), 23, 27, "float32"),
    "bf16": (24, (2, 32, 64, 4), 510, 250, "bfloat16"),
    "f16": (8, (2, 16, 8, 3), 48, 96, "float16"),
    "block_diagonal": (9, (3, 5, 7, 1), 21, 15, "float32"),
    "shuffled": (33, (1, 64, 32, 16), 512, 1024, "bfloat16"),
    "butterfly_level": (17, (4, 2, 2, 8), 64, 64, "bfloat16"),
    "one_row": (1, (2, 3, 5, 4), 40, 24, "bfloat16"),
    "for_kernels": (40, (2, 64, 64, 2), 256, 256, "bfloat16"),
    "several_tiles": (600, (3, 12, 20, 2), 120, 70, "float32"),
}
QUICK = ["f32", "bf16", "butterfly_level"]

# The whole table of what a named implementation refuses; anything else must be served.
REFUSED = {
    ("mosaic_tpu", "f16"): "dtype is float16",
    ("mosaic_gpu", "f32"): "dtype is float32",
    ("mosaic_gpu", "bf16"): "b is 32, needs a multiple of 64",
    ("mosaic_gpu", "f16"): "c is 8, needs a multiple of 64",
    ("mosaic_gpu", "block_diagonal"): "dtype is float32",
    ("mosaic_gpu", "shuffled"): "c is 32, needs a multiple of 64",
    ("mosaic_gpu", "butterfly_level"): "c is 2, needs a multiple of 64",
    ("mosaic_gpu", "one_row"): "c is 5, needs a multiple of 64",
    ("mosaic_gpu", "several_tiles"): "dtype is float32",
}


def slowly(names):
    """The interpreted kernels' tests are marked slow."""
    marks = lambda name: [] if name in ("xla", None) else [pytest.mark.slow]
    return [pytest.param(name, marks=marks(name)) for name in names]


def choice(name):
    return name if name in ("xla", None) else interpreted(name)


@functools.cache
def case(name):
    rows, (a, b, c, d), k, n, dtype = CASES[name]
    rng = np.random.default_rng(sum(map(ord, name)))
    draw = lambda *s: jnp.asarray(rng.standard_normal(s), dtype)
    return draw(rows, k), draw(a, d, c, b), draw(rows, n)


def f64(a):
    return np.asarray(a, np.float64)


def dense(factor):
    """The matrix in float64, entry by entry: row (i j k), column (i o k)."""
    a, d, c, b = factor.shape
    w = np.zeros((a * c * d, a * b * d))
    for i, k, j, o in np.ndindex(a, d, c, b):
        w[(i * c + j) * d + k, (i * b + o) * d + k] = factor[i, k, j, o]
    return w


def stored(w, shape):
    """The entries of a matrix that a factor of this shape stores."""
    a, d, c, b = shape
    factor = np.zeros(shape)
    for i, k, j, o in np.ndindex(*shape):
        factor[i, k, j, o] = w[(i * c + j) * d + k, (i * b + o) * d + k]
    return factor


def oracles(x, factor, dy):
    """y, dx and dfactor in float64, by dense products."""
    k, n = x.shape[1], dy.shape[1]
    w = dense(f64(factor))
    dw = np.zeros(w.shape)
    dw[:k, :n] = f64(x).T @ f64(dy)
    w = w[:k, :n]
    return f64(x) @ w, f64(dy) @ w.T, stored(dw, factor.shape)


def low(x, factor, dy):
    """The same by the reference in the low precision."""
    reference = functools.partial(
        kronecker_sparse_matmul_reference, out_size=dy.shape[1]
    )
    y, vjp = jax.vjp(reference, x, factor)
    return y, *vjp(dy)


def value_and_gradients(x, factor, dy, **how):
    product = functools.partial(kronecker_sparse_matmul, out_size=dy.shape[-1], **how)
    y, vjp = jax.vjp(product, x, factor)
    return y, *vjp(dy)


@pytest.mark.parametrize(
    ("implementation", "name"),
    [
        pytest.param(
            each,
            name,
            marks=[] if each == "xla" and name in QUICK else [pytest.mark.slow],
        )
        for each in IMPLEMENTATIONS
        for name in CASES
    ],
)
def test_value_and_gradients(implementation, name):
    x, factor, dy = case(name)
    impl = choice(implementation)
    refusal = REFUSED.get((implementation, name))
    if refusal:
        with pytest.raises(NotImplementedError, match=refusal):
            kronecker_sparse_matmul(x, factor, implementation=impl)
        return
    run = jax.jit(functools.partial(value_and_gradients, implementation=impl))
    got = run(x, factor, dy)
    assert {a.dtype for a in got} == {x.dtype}
    args = x, factor, dy
    for out, want, plain in zip(got, oracles(*args), low(*args), strict=True):
        assert_close(out, want, plain)


def test_random_rectangular_shapes():
    """In one program: sizes from 1 to 9 that nothing divides, padded and cut off."""
    rng, problems = np.random.default_rng(3), []
    for _ in range(5):
        a, b, c, d = rng.integers(1, 10, 4)
        rows, k = rng.integers(1, 6), rng.integers(1, a * c * d + 1)
        n = rng.integers(1, a * b * d + 1)
        shapes = (rows, k), (a, d, c, b), (rows, n)
        problems.append(
            [jnp.asarray(rng.standard_normal(s), "float32") for s in shapes]
        )
    got = jax.jit(lambda ps: [value_and_gradients(*p) for p in ps])(problems)
    plain = jax.jit(lambda ps: [low(*p) for p in ps])(problems)
    for problem, outs, lows in zip(problems, got, plain, strict=True):
        for triple in zip(outs, oracles(*problem), lows, strict=True):
            assert_close(*triple)


# Chains whose factors' columns go to the next in runs (of 2, then of 3), and do not;
# the last as in a Monarch matrix transposed.
CHAINS = {
    "in_runs": [(4, 1, 3, 4), (2, 2, 4, 6), (1, 4, 6, 2)],
    "in_no_order": [(3, 2, 2, 2), (1, 3, 4, 5)],
    "transposed": [(1, 3, 4, 4), (2, 1, 6, 5)],
    "many_blocks": [(12, 1, 1, 4), (1, 4, 12, 3)],
}


@pytest.mark.parametrize("form", ["_over_tiles", "_over_slabs", "_apart"])
@pytest.mark.parametrize("chain", CHAINS)
def test_forms_for_many_rows(monkeypatch, chain, form):
    """On a CPU: all at once or so many at a time, of which 300 are no multiple."""
    monkeypatch.setattr(_kronecker_sparse_xla, "_TILE", 48 * 24)
    assert _kronecker_sparse_xla.tile_rows(300, 24, 12, 15) == 39
    monkeypatch.setattr(_kronecker_sparse_xla, "_WHOLE", 0)
    monkeypatch.setattr(_kronecker_sparse_xla, "_SLAB", 500)
    rng = np.random.default_rng(6)
    draw = lambda *s: jnp.asarray(rng.standard_normal(s), "float32")
    x, factors = draw(300, 12), [draw(*shape) for shape in CHAINS[chain]]
    y = jax.jit(getattr(_kronecker_sparse_xla, form))(x, *factors)
    want = f64(x)
    for factor in factors:
        want = want @ dense(f64(factor))
    np.testing.assert_allclose(y, want, atol=1e-4)


def test_few_blocks_and_many_rows_have_a_product_each():
    x = jnp.ones((1024, 512), jnp.bfloat16)
    factors = jnp.ones((8, 1, 64, 64)), jnp.ones((1, 8, 64, 64))
    factors = [factor.astype(x.dtype) for factor in factors]
    made = jax.make_jaxpr(_kronecker_sparse_xla._on_cpu)(x, *factors)
    assert str(made).count("dot_general") == 16
    fewer = jax.make_jaxpr(_kronecker_sparse_xla._on_cpu)(x[1:], *factors)
    assert str(fewer).count("dot_general") == 2


def second_order(product):
    """Gradients of a function of gradients: every derivative rule is differentiated."""

    def loss(x, factor):
        return jnp.sum(jnp.sin(product(x, factor).astype(jnp.float32)))

    def of_gradients(x, factor):
        square = lambda g: jnp.sum(jnp.square(g.astype(jnp.float32)))
        return sum(map(square, jax.grad(loss, (0, 1))(x, factor)))

    return jax.grad(of_gradients, (0, 1))


@pytest.mark.parametrize("implementation", slowly(IMPLEMENTATIONS))
def test_gradient_of_gradient(implementation):
    """fly's product has no double backward: bmm(out=...) has no derivative."""
    x, factor, _ = case("bf16")
    x, factor = x / 4, factor / 4
    ours = functools.partial(
        kronecker_sparse_matmul, implementation=choice(implementation)
    )
    plain = jax.jit(second_order(kronecker_sparse_matmul_reference))
    with jax.enable_x64(True):
        wide = [jnp.asarray(f64(a)) for a in (x, factor)]
        want = [np.asarray(a) for a in plain(*wide)]
    got = jax.jit(second_order(ours))(x, factor)
    for out, reference, rounded in zip(got, want, plain(x, factor), strict=True):
        # sin' in float32 on bfloat16 values: both sides round y, so eps covers less.
        assert_close(out, reference, rounded, eps=1e-5)


@pytest.mark.parametrize(
    "axes",
    [
        (0, None),
        (0, 0),
        pytest.param((None, 0), marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("implementation", slowly(IMPLEMENTATIONS))
def test_vmap(implementation, axes):
    x, factor, dy = case("bf16")
    every = lambda a: jnp.stack([a, 2 * a, -a])
    args = [
        every(a) if axis == 0 else a for a, axis in zip((x, factor), axes, strict=True)
    ]
    run = functools.partial(value_and_gradients, implementation=choice(implementation))
    got = jax.jit(jax.vmap(run, (*axes, 0)))(*args, every(dy))
    for i in range(3):
        own = [a[i] if axis == 0 else a for a, axis in zip(args, axes, strict=True)]
        own.append(every(dy)[i])
        for out, want, plain in zip(got, oracles(*own), low(*own), strict=True):
            assert_close(out[i], want, plain)


def test_shared_factor_under_vmap_is_one_product():
    """A batch of x is more rows of x: no loop over the members."""
    x, factor = jnp.zeros((7, 4, 12)), jnp.zeros((2, 3, 2, 5))
    text = sj.explain(jax.vmap(kronecker_sparse_matmul, (0, None)), x, factor)
    assert "28 rows" in text


@pytest.mark.parametrize("implementation", slowly([*IMPLEMENTATIONS, None]))
def test_scan_checkpoint_and_no_retrace(implementation):
    rng, traces = np.random.default_rng(0), []
    draw = lambda *s: jnp.asarray(rng.standard_normal(s) / 8, jnp.bfloat16)
    x, factors = draw(8, 128), draw(3, 4, 1, 32, 32)
    impl = choice(implementation)

    def layer(h, factor):
        return kronecker_sparse_matmul(h, factor, implementation=impl), None

    @jax.jit
    def gradients(x, factors):
        traces.append(1)

        def loss(x, factors):
            y, _ = jax.lax.scan(jax.checkpoint(layer), x, factors)
            return jnp.sum(jnp.square(y.astype(jnp.float32)))

        return jax.grad(loss, (0, 1))(x, factors)

    got = gradients(x, factors)
    gradients(-x, factors)
    assert len(traces) == 1
    h, ws = [f64(x)], [dense(f64(f)) for f in factors]
    for w in ws:
        h.append(h[-1] @ w)
    dh = 2 * h.pop()
    for i in (2, 1, 0):
        dw = stored(h[i].T @ dh, factors.shape[1:])
        assert np.abs(f64(got[1][i]) - dw).max() < 0.03 * np.abs(dw).max()
        dh = dh @ ws[i].T
    assert np.abs(f64(got[0]) - dh).max() < 0.03 * np.abs(dh).max()


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_rows_over_devices(kind):
    """Factors alike on all: their gradients are summed."""
    x, factor, dy = case("bf16")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    run = value_and_gradients
    if kind == AxisType.Auto:
        cut, every = P("data"), P()
        specs = dict(in_specs=(cut, every, cut), out_specs=(cut, cut, every))
        run = jax.shard_map(run, mesh=mesh, **specs)
    with jax.set_mesh(mesh):
        put = lambda a, spec: jax.device_put(a, jax.NamedSharding(mesh, spec))
        got = jax.jit(run)(put(x, P("data")), put(factor, P()), put(dy, P("data")))
    wants, slack = oracles(x, factor, dy), (8e-3, 8e-3, 2e-2)
    for out, want, eps in zip(got, wants, slack, strict=True):
        # Gradients of the factor are rounded on each device before they are summed.
        assert np.abs(f64(out) - want).max() < eps * np.abs(want).max()


def test_float64_and_complex():
    with jax.enable_x64(True):
        x, factor, dy = (jnp.asarray(f64(a)) for a in case("f32"))
        got = value_and_gradients(x, factor, dy)
        for out, want in zip(got, oracles(x, factor, dy), strict=True):
            assert out.dtype == jnp.float64
            np.testing.assert_allclose(out, want, rtol=0, atol=1e-12)
        z = jax.lax.complex(x, 2 * x[::-1])
        turned = jax.lax.complex(factor, factor)
        got = kronecker_sparse_matmul_reference(z, turned)[:, : dy.shape[1]]
    y, _, _ = oracles(x, factor, dy)
    # (x + 2 i x') ((1 + i) w) = (1 + i) (y + 2 i y')
    np.testing.assert_allclose(got, (1 + 1j) * (y + 2j * y[::-1]), atol=1e-12)


def test_master_factors_get_their_gradient_unrounded():
    """dtype=bfloat16 with float32 factors: the float32 sums come back as they are."""
    x, factor, dy = case("bf16")
    master = factor.astype(jnp.float32)
    run = jax.jit(functools.partial(value_and_gradients, dtype=jnp.bfloat16))
    y, dx, df = run(x, master, dy)
    assert (y.dtype, dx.dtype, df.dtype) == (*(jnp.bfloat16,) * 2, jnp.float32)
    want = oracles(x, factor, dy)[2]
    assert np.abs(f64(df) - want).max() < 1e-5 * np.abs(want).max()


def test_reference_has_forward_mode():
    x, factor, _ = case("f32")
    reference = lambda f: kronecker_sparse_matmul_reference(x, f)
    y, dy = jax.jvp(reference, (factor,), (factor,))
    np.testing.assert_array_equal(y, dy)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda f: kronecker_sparse_matmul(x, f), (factor,), (factor,))


def test_any_leading_axes():
    """A single vector too, which fly's product does not take; no rows at all."""
    x, factor, _ = case("f32")
    w = dense(f64(factor))[:23]
    vector = kronecker_sparse_matmul(x[0], factor)
    np.testing.assert_allclose(vector, f64(x[0]) @ w, atol=1e-5)
    y = kronecker_sparse_matmul(x.reshape(2, 5, 2, 23), factor)
    np.testing.assert_allclose(y, f64(x).reshape(2, 5, 2, 23) @ w, atol=1e-5)
    none, dx, df = jax.jit(value_and_gradients)(x[:0], factor, jnp.zeros((0, 30)))
    assert none.shape == (0, 30) and dx.shape == (0, 23) and not df.any()


# --- Bad input, and what is said ------------------------------------------------------


def test_bad_input_names_argument_got_and_needed():
    x, factor, _ = case("f32")
    ops = kronecker_sparse_matmul, kronecker_sparse_matmul_reference
    for op in ops:
        with pytest.raises(
            ValueError, match=r"x: got shape \(20, 25\), needed \[..., n"
        ):
            op(jnp.zeros((20, 25)), factor)
        with pytest.raises(ValueError, match=r"x: got shape \(\), needed"):
            op(x[0, 0], factor)
        with pytest.raises(ValueError, match=r"x: got shape \(20, 0\), needed"):
            op(x[:, :0], factor)
        with pytest.raises(ValueError, match=r"factor: got shape \(2, 4, 5\), needed"):
            op(x, factor[0])
        with pytest.raises(ValueError, match=r"factor: got shape \(3, 2, 4, 0\)"):
            op(x, factor[..., :0])
        with pytest.raises(ValueError, match=r"pattern: got Pattern\(a=3, b=4, c=5"):
            op(x, factor, Pattern(3, 4, 5, 2))
        with pytest.raises(ValueError, match="out_size: got 31, needed 1 to 30"):
            op(x, factor, out_size=31)
        with pytest.raises(ValueError, match="out_size: got 0, needed 1 to 30"):
            op(x, factor, out_size=0)
    assert kronecker_sparse_matmul(x, factor, Pattern(3, 5, 4, 2)).shape == (20, 30)
    with pytest.raises(ValueError, match="factor: got dtype complex64, needed one of"):
        kronecker_sparse_matmul(x, factor.astype(jnp.complex64))
    with pytest.raises(ValueError, match="x: got dtype int32, needed one of float32"):
        kronecker_sparse_matmul(x.astype(jnp.int32), factor)
    with pytest.raises(ValueError, match="dtype: got dtype int32, needed one of"):
        kronecker_sparse_matmul(x, factor, dtype=jnp.int32)
    with pytest.raises(ValueError, match="implementation: got 'cuda', needed 'xla'"):
        kronecker_sparse_matmul(x, factor, implementation="cuda")


@pytest.mark.parametrize("implementation", [n for n in KRONECKER if n != "xla"])
def test_named_implementation_never_falls_back(implementation):
    x, factor, _ = case("for_kernels")
    needs = {"mosaic_tpu": "tpu", "mosaic_gpu": "cuda"}[implementation]
    with pytest.raises(NotImplementedError, match=f"needs platform {needs}, got cpu"):
        kronecker_sparse_matmul(x, factor, implementation=implementation)
