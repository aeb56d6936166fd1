"""butterfly_matmul against float64, for chains of every kind."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from sparsejax.ops import butterfly_matmul, butterfly_matmul_reference
from sparsejax.ops._kronecker_sparse_matmul import KRONECKER
from sparsejax.ops._merged_factors import merge
from sparsejax.structured import Chain, Pattern, butterfly, monarch, tensor_train
from sparsejax.testing import assert_close, interpreted

NEW_PALLAS = tuple(int(v) for v in jax.__version__.split(".")[:2]) >= (0, 11)
# Mosaic GPU has an interpreter from jax 0.11 on; before, only the compile tests see it.
IMPLEMENTATIONS = [n for n in KRONECKER if n != "mosaic_gpu" or NEW_PALLAS]

# name: (rows, chain, dtype)
CASES = {
    "butterfly": (20, butterfly(13, 11), "float32"),
    "butterfly_bf16": (24, butterfly(32), "bfloat16"),
    "one_row": (1, butterfly(16), "float32"),
    "order_3": (9, tensor_train((2, 3, 4), (5, 2, 3), 2, out_size=29), "float32"),
    "monarch": (8, monarch(256, 512, blocks=4), "bfloat16"),
    # Strides fall and rise; one factor has a column of blocks beside its neighbour's.
    "any_order": (
        5,
        Chain((Pattern(1, 4, 3, 4), Pattern(4, 3, 2, 2), Pattern(2, 5, 12, 1)), 12, 9),
        "float32",
    ),
}
QUICK = ["butterfly", "butterfly_bf16", "any_order"]


def slowly(names):
    """The interpreted kernels' tests are marked slow."""
    marks = lambda name: [] if name in ("xla", None) else [pytest.mark.slow]
    return [pytest.param(name, marks=marks(name)) for name in names]


def choice(name):
    return name if name in ("xla", None) else interpreted(name)


@functools.cache
def case(name):
    rows, chain, dtype = CASES[name]
    rng = np.random.default_rng(sum(map(ord, name)))
    draw = lambda *s: jnp.asarray(rng.standard_normal(s), dtype)
    factors = [draw(*p.factor_shape) / p.c**0.5 for p in chain.patterns]
    factors = tuple(f.astype(dtype) for f in factors)
    return draw(rows, chain.in_size), factors, draw(rows, chain.out_size)


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


def oracles(x, factors, dy):
    """y, dx and the factors' gradients in float64, by dense products."""
    ws = [dense(f64(f)) for f in factors]
    pad = lambda a, n: np.pad(f64(a), [(0, 0), (0, n - a.shape[1])])
    hs = [pad(x, len(ws[0]))]
    for w in ws:
        hs.append(hs[-1] @ w)
    y, dh, grads = hs.pop(), pad(dy, ws[-1].shape[1]), []
    for h, w, factor in zip(hs[::-1], ws[::-1], factors[::-1], strict=True):
        grads.append(stored(h.T @ dh, factor.shape))
        dh = dh @ w.T
    return y[:, : dy.shape[1]], dh[:, : x.shape[1]], *grads[::-1]


def value_and_gradients(product, x, factors, dy):
    fn = functools.partial(product, out_size=dy.shape[-1])
    y, vjp = jax.vjp(fn, x, factors)
    dx, grads = vjp(dy)
    return y, dx, *grads


low = jax.jit(functools.partial(value_and_gradients, butterfly_matmul_reference))


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
    args, impl = case(name), choice(implementation)
    if implementation == "mosaic_gpu" and args[0].dtype == jnp.float32:
        with pytest.raises(NotImplementedError, match="dtype is float32"):
            butterfly_matmul(*args[:2], implementation=impl)
        return
    product = functools.partial(butterfly_matmul, implementation=impl)
    got = jax.jit(functools.partial(value_and_gradients, product))(*args)
    assert {a.dtype for a in got} == {args[0].dtype}
    for out, want, plain in zip(got, oracles(*args), low(*args), strict=True):
        assert_close(out, want, plain)


@pytest.mark.slow
def test_gradient_of_gradient():
    x, factors, _ = case("any_order")

    def second_order(product):
        loss = lambda x, factors: jnp.sum(jnp.sin(product(x, factors)))

        def of_gradients(x, factors):
            grads = jax.grad(loss, (0, 1))(x, factors)
            return sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads))

        return jax.jit(jax.grad(of_gradients, (0, 1)))

    plain = second_order(butterfly_matmul_reference)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(f64(a)), (x, factors))
        want = jax.tree.map(np.asarray, plain(*wide))
    got = second_order(butterfly_matmul)(x, factors)
    jax.tree.map(assert_close, got, want, plain(x, factors))


@pytest.mark.parametrize("axes", [(0, None), (0, 0)])
def test_vmap(axes):
    x, factors, dy = case("any_order")
    every = lambda a: jnp.stack([a, 2 * a, -a])
    args = [
        jax.tree.map(every, a) if axis == 0 else a
        for a, axis in zip((x, factors), axes, strict=True)
    ]
    run = functools.partial(value_and_gradients, butterfly_matmul)
    got = jax.jit(jax.vmap(run, (*axes, 0)))(*args, every(dy))
    for i in range(3):
        own = [
            jax.tree.map(lambda a, i=i: a[i], a) if axis == 0 else a
            for a, axis in zip(args, axes, strict=True)
        ]
        for out, want in zip(got, oracles(*own, every(dy)[i]), strict=True):
            np.testing.assert_allclose(out[i], want, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_scan_checkpoint_and_no_retrace():
    """Layers of a power of two that are scanned over, with one row."""
    x, factors, _ = case("one_row")
    traces, layers = [], jax.tree.map(lambda a: jnp.stack([a, -a]), factors)

    @jax.jit
    def gradients(x, layers):
        traces.append(1)

        def loss(layers):
            layer = jax.checkpoint(lambda h, fs: (butterfly_matmul(h, fs), None))
            return jnp.sum(jnp.square(jax.lax.scan(layer, x, layers)[0]))

        return jax.grad(loss)(layers)

    got = gradients(x, layers)
    gradients(2 * x, layers)
    assert len(traces) == 1
    # The second layer is the first with the sign of each of 4 factors turned: equal.
    y = oracles(x, factors, x)[0]
    z, dh, *want = oracles(y.astype(np.float32), factors, 2 * x)
    _, dh, *_ = oracles(y.astype(np.float32), factors, 2 * z)
    _, _, *want = oracles(x, factors, dh)
    for out, each in zip(got, want, strict=True):
        np.testing.assert_allclose(out[0], each, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_rows_over_devices(kind):
    """Factors alike on all: their gradients are summed."""
    args = case("butterfly_bf16")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    cut, every = P("data"), P()
    run = functools.partial(value_and_gradients, butterfly_matmul)
    if kind == AxisType.Auto:
        outs = cut, cut, *[every] * len(args[1])
        run = jax.shard_map(run, mesh=mesh, in_specs=(cut, every, cut), out_specs=outs)
    with jax.set_mesh(mesh):
        put = lambda a, spec: jax.device_put(a, jax.NamedSharding(mesh, spec))
        got = jax.jit(run)(*map(put, args, (cut, every, cut)))
    for out, want in zip(got, oracles(*args), strict=True):
        # Rounded on each device before it is summed.
        assert np.abs(f64(out) - want).max() < 0.03 * np.abs(want).max()


def test_hadamard_is_exact():
    """All ones and one sign: H[i, j] = (-1)^popcount(i & j), in any implementation."""
    level = jnp.array([[1.0, 1.0], [1.0, -1.0]])
    chain = butterfly(64)
    factors = [jnp.broadcast_to(level, p.factor_shape) for p in chain.patterns]
    signs = [[(-1) ** (i & j).bit_count() for j in range(64)] for i in range(64)]
    np.testing.assert_array_equal(butterfly_matmul(jnp.eye(64), factors), signs)


def test_merged_factors_keep_what_is_apart():
    """Copies side by side and interleaved blocks: a = gcd(4, 2), d = gcd(2, 4)."""
    rng = np.random.default_rng(5)
    patterns = Pattern(4, 3, 2, 2), Pattern(2, 2, 3, 4)
    pair = [
        jnp.asarray(rng.standard_normal(p.factor_shape), "float32") for p in patterns
    ]
    one = merge(pair)
    assert one.shape == (2, 2, 4, 4)
    np.testing.assert_allclose(dense(one), dense(pair[0]) @ dense(pair[1]), atol=1e-5)


@pytest.mark.slow
def test_float64_and_complex():
    with jax.enable_x64(True):
        args = jax.tree.map(lambda a: jnp.asarray(f64(a)), case("any_order"))
        got = value_and_gradients(butterfly_matmul, *args)
        want = oracles(*args)
        for out, each in zip(got, want, strict=True):
            assert out.dtype == jnp.float64
            np.testing.assert_allclose(out, each, rtol=0, atol=1e-11)
        x, factors, dy = args
        x, *turned = (jax.lax.complex(a, 2 * a) for a in (x, *factors))
        y = butterfly_matmul_reference(x, turned, out_size=dy.shape[1])
    np.testing.assert_allclose(y, (1 + 2j) ** 4 * want[0], atol=1e-9)


def test_master_factors_get_their_gradient_unrounded():
    x, factors, dy = case("butterfly_bf16")
    masters = [f.astype(jnp.float32) for f in factors]
    product = functools.partial(butterfly_matmul, dtype=jnp.bfloat16)
    run = jax.jit(functools.partial(value_and_gradients, product))
    y, dx, *grads = run(x, masters, dy)
    assert (y.dtype, dx.dtype) == (jnp.bfloat16, jnp.bfloat16)
    for out, want in zip(grads, oracles(x, factors, dy)[2:], strict=True):
        assert out.dtype == jnp.float32
        assert (f64(out) != f64(out.astype(jnp.bfloat16))).any()
        assert np.abs(f64(out) - want).max() < 0.02 * np.abs(want).max()


@pytest.mark.slow
def test_any_leading_axes():
    x, factors, dy = case("any_order")
    want = oracles(x, factors, dy)[0]
    vector = butterfly_matmul(x[0], factors, out_size=9)
    np.testing.assert_allclose(vector, want[0], atol=1e-4)
    y = butterfly_matmul(x.reshape(1, 5, 1, 12), list(factors), out_size=9)
    np.testing.assert_allclose(y, want.reshape(1, 5, 1, 9), atol=1e-4)
    run = jax.jit(functools.partial(value_and_gradients, butterfly_matmul))
    none, dx, *grads = run(x[:0], factors, dy[:0])
    assert none.shape == (0, 9) and dx.shape == (0, 12)
    assert not any(g.any() for g in grads)


def test_bad_input_names_argument_got_and_needed():
    x, factors, _ = case("any_order")
    for op in (butterfly_matmul, butterfly_matmul_reference):
        with pytest.raises(ValueError, match="factors: got none, needed at least one"):
            op(x, [])
        with pytest.raises(
            ValueError, match=r"factors\[1\]: got shape .* takes 24, needed .* the 16"
        ):
            op(x, (factors[0], factors[2]))
        with pytest.raises(ValueError, match=r"factors\[2\]: got shape \(2, 12, 5\)"):
            op(x, (*factors[:2], factors[2][:, 0]))
        with pytest.raises(ValueError, match=r"x: got shape \(5, 13\), needed"):
            op(jnp.zeros((5, 13)), factors)
        with pytest.raises(ValueError, match="out_size: got 11, needed 1 to 10"):
            op(x, factors, out_size=11)
    turned = (factors[0].astype(jnp.complex64), *factors[1:])
    with pytest.raises(ValueError, match=r"factors\[0\]: got dtype complex64, needed"):
        butterfly_matmul(x, turned)
    with pytest.raises(ValueError, match="implementation: got 'cuda', needed 'xla'"):
        butterfly_matmul(x, factors, implementation="cuda")
