"""long_conv in every form against the plain sum and jnp.fft, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sparsejax as sj
from sparsejax.ops import _long_conv_xla, _monarch_dft, long_conv, long_conv_reference
from sparsejax.ops._long_conv_xla import GRADIENTS, Problem
from sparsejax.ops._products import PRODUCT, SAMPLED, TRANSPOSED
from sparsejax.testing import assert_close

# name: (batch, h, t, l, causal, keep, dtype)
CASES = {
    "causal": ((2,), 3, 40, 40, True, None, "float32"),
    "prime_partial": ((2,), 2, 31, 7, True, None, "float32"),
    "one_entry": ((), 2, 1, 1, True, None, "float32"),
    "circular": ((3,), 2, 48, 48, False, None, "float32"),
    "circular_prime": ((2, 2), 1, 37, 37, False, None, "float32"),
    "low": ((2,), 3, 32, 32, True, 6, "float32"),
    "low_circular_odd": ((2,), 2, 45, 20, False, 9, "float32"),
    "low_awkward": ((2,), 2, 37, 37, True, 8, "float32"),
    "bf16": ((2,), 3, 40, 40, True, None, "bfloat16"),
    "f16": ((2,), 3, 40, 33, True, None, "float16"),
}
FORMS = {
    "fft": _long_conv_xla.fft,
    "monarch": functools.partial(_long_conv_xla.monarch, side=1),
    "matrix_units": functools.partial(_long_conv_xla.monarch, side=128),
    "pieces": functools.partial(_long_conv_xla.monarch, side=1, piece=32),
    "fft_pieces": functools.partial(_long_conv_xla.fft, piece=160),
}


def slowly(cases, *quick):
    """All but a few are marked slow."""
    marks = lambda case: [] if case in quick else [pytest.mark.slow]
    return [pytest.param(case, marks=marks(case)) for case in cases]


def f64(a):
    return np.asarray(a, np.float64)


@functools.cache
def case(name):
    batch, h, t, l, causal, keep, dtype = CASES[name]
    rng = np.random.default_rng(sum(map(ord, name)))
    draw = lambda *s: jnp.asarray(rng.standard_normal(s), dtype)
    how = dict(causal=causal, keep_frequencies=keep)
    return how, draw(*batch, h, t), draw(h, l) / l**0.5, draw(*batch, h, t)


def taps(t, l, causal, keep_frequencies):
    """L [n, l]: kernel k stands for the n periodic taps L k."""
    n = 2 * t if causal else t
    delta = np.eye(n, l)
    if keep_frequencies is None:
        return delta
    spectrum = np.fft.rfft(delta, axis=0)
    spectrum[keep_frequencies:] = 0
    return np.fft.irfft(spectrum, n, axis=0)


def exact(u, k, dy, how):
    """Y and both gradients by y[i] = sum_j sum_m L[(i - j) mod n, m] k[m] u[j]."""
    u, k, dy = f64(u), f64(k), f64(dy)
    t, l = u.shape[-1], k.shape[-1]
    of_tap = taps(t, l, **how)
    lag = (np.arange(t)[:, None] - np.arange(t)) % of_tap.shape[0]
    w = np.einsum("ijm,hm->hij", of_tap[lag], k)
    products = np.einsum(
        "bhi,bhj->hij", *(a.reshape(-1, *a.shape[-2:]) for a in (dy, u))
    )
    return (
        np.einsum("hij,...hj->...hi", w, u),
        np.einsum("hij,...hi->...hj", w, dy),
        np.einsum("ijm,hij->hm", of_tap[lag], products),
    )


def run(u, k, dy, how, fn):
    @jax.jit
    def both(u, k, dy):
        y, vjp = jax.vjp(lambda u, k: fn(u, k, **how), u, k)
        return y, *vjp(dy)

    return both(u, k, dy)


@pytest.mark.parametrize("name", slowly(CASES, "causal", "low", "bf16"))
def test_value_and_gradients(name):
    how, u, k, dy = case(name)
    got = run(u, k, dy, how, long_conv)
    low = run(u, k, dy, how, long_conv_reference)
    for a, want, base, operand in zip(
        got, exact(u, k, dy, how), low, (u, u, k), strict=True
    ):
        assert a.dtype == operand.dtype and a.shape == operand.shape
        assert_close(a, want, base)


@pytest.mark.parametrize("name", ["circular_prime", "low_awkward"])
def test_lengths_without_factors(name, monkeypatch):
    """As a large prime is computed: low-passed beforehand, and folded."""
    monkeypatch.setattr(_long_conv_xla, "divides_well", lambda *sizes: False)
    test_value_and_gradients(name)


@pytest.mark.parametrize("form", slowly(FORMS, "monarch", "pieces"))
@pytest.mark.parametrize(
    "name",
    slowly(
        ["causal", "circular", "low", "low_circular_odd", "bf16"],
        "low_circular_odd",
    ),
)
def test_every_form_of_every_product(form, name):
    """What a CPU does not choose, too: exact grids, shifted grids, skipped columns."""
    how, u, k, dy = case(name)
    t, l, keep = u.shape[-1], k.shape[-1], how["keep_frequencies"]
    circle = not how["causal"] or keep is not None
    n = (2 * t if how["causal"] else t) if circle else t + l - 1
    sizes = dict(batch=u.shape[0], features=u.shape[1], signal=t, taps=l, out=t)
    sizes |= dict(n=n, exact=circle, keep=keep)
    want = exact(u, k, dy, how)
    low = run(u, k, dy, how, long_conv_reference)

    @jax.jit
    def everything(u, k, dy):
        def product(op, *arrays):
            problem = Problem(op=op, **sizes, dtype=u.dtype.name)
            return _long_conv_xla.run(problem, FORMS[form](problem), *arrays)

        both = product(GRADIENTS, u, k, dy)
        alone = product(TRANSPOSED, dy, k), product(SAMPLED, u, dy)
        return product(PRODUCT, u, k), *both, *alone

    y, du, dk, du_alone, dk_alone = everything(u, k, dy)
    for got, exactly, base in zip((y, du, dk), want, low, strict=True):
        assert got.dtype == jnp.float32
        assert_close(got, exactly, base)
    np.testing.assert_allclose(du, du_alone, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dk, dk_alone, rtol=1e-5, atol=1e-5)


def test_skipped_columns_save_work():
    """1024 entries and as many zeros, 1/8 of the frequencies: of the second factor's
    columns those with j2 < keep / n1 and their conjugates."""
    problem = functools.partial(
        Problem, PRODUCT, 1, 1, 1024, 1024, 1024, 2048, True, dtype="float32"
    )
    few = _long_conv_xla.choose_grid(problem(keep=128), 1)
    every = _long_conv_xla.choose_grid(problem(keep=None), 1)
    assert few.n == every.n == 2048
    assert few.flops(1024) < 0.55 * every.flops(1024)
    grid = _monarch_dft.Grid(32, 64, False, 128)
    np.testing.assert_array_equal(grid.columns, [0, 1, 2, 3, 60, 61, 62, 63])


def test_float64():
    with jax.enable_x64(True):
        how, u, k, dy = (jax.tree.map(f64, part) for part in case("causal"))
        how = case("causal")[0]
        u, k, dy = map(jnp.asarray, (u, k, dy))
        got = run(u, k, dy, how, long_conv)
        for a, want in zip(got, exact(u, k, dy, how), strict=True):
            assert a.dtype == jnp.float64
            assert np.abs(f64(a) - want).max() < 1e-12


def test_literals():
    """[1, 2, 3] by taps [1, 10]: 1, 2 + 10, 3 + 20; around the end 1 + 30."""
    u, k = jnp.array([[1.0, 2.0, 3.0]]), jnp.array([[1.0, 10.0]])
    np.testing.assert_allclose(long_conv(u, k), [[1, 12, 23]], rtol=1e-6)
    np.testing.assert_allclose(long_conv(u, k, causal=False), [[31, 12, 23]], rtol=1e-6)
    gates = dict(pre_gate=jnp.array([[1.0, 0.0, 2.0]]), post_gate=-u)
    # v = [1, 0, 6]: conv 1, 10, 6, times -1, -2, -3.
    np.testing.assert_allclose(long_conv(u, k, **gates), [[-1, -20, -18]], rtol=1e-6)
    # The mean alone is kept: sum(k) mean(u), everywhere.
    mean = long_conv(u, k, causal=False, keep_frequencies=1)
    np.testing.assert_allclose(mean, np.full((1, 3), 11 * 2.0), rtol=1e-6)


def test_gates():
    how, u, k, dy = case("causal")
    rng = np.random.default_rng(5)
    pre, post = (jnp.asarray(rng.standard_normal(u.shape), u.dtype) for _ in range(2))

    def of(fn):
        def run(u, k, pre, post):
            y, vjp = jax.vjp(
                lambda u, k, pre, post: fn(u, k, pre_gate=pre, post_gate=post),
                *(u, k, pre, post),
            )
            return y, *vjp(dy)

        return jax.jit(run)(u, k, pre, post)

    u_, pre_, post_, dy_ = map(f64, (u, pre, post, dy))
    y, dv, dk = exact(pre_ * u_, k, post_ * dy_, how)
    want = post_ * y, pre_ * dv, dk, u_ * dv, dy_ * y
    for got, exactly, low in zip(
        of(long_conv), want, of(long_conv_reference), strict=True
    ):
        assert_close(got, exactly, low)


@pytest.mark.parametrize("name", slowly(["causal", "low", "circular_prime"], "causal"))
def test_gradient_of_gradient(name):
    how, u, k, _ = case(name)
    square = lambda g: jnp.sum(jnp.square(g))

    def of_gradients(fn, u, k):
        loss = lambda u, k: jnp.sum(jnp.sin(fn(u, k, **how)))
        return sum(map(square, jax.grad(loss, (0, 1))(u, k)))

    second = lambda fn: jax.jit(jax.grad(functools.partial(of_gradients, fn), (0, 1)))
    with jax.enable_x64(True):
        wide = [jnp.asarray(f64(a)) for a in (u, k)]
        want = jax.tree.map(np.asarray, second(long_conv_reference)(*wide))
    got, low = second(long_conv)(u, k), second(long_conv_reference)(u, k)
    for a, exactly, base in zip(got, want, low, strict=True):
        assert_close(a, exactly, base)


@pytest.mark.slow
def test_third_derivative_exists():
    how, u, k, _ = case("prime_partial")
    f = lambda s: jnp.sum(jnp.sin(long_conv(s * u, s * k, **how)))
    g = lambda s: jnp.sum(jnp.sin(long_conv_reference(s * u, s * k, **how)))
    third = lambda f: jax.jit(jax.grad(jax.grad(jax.grad(f))))(1.0)
    np.testing.assert_allclose(third(f), third(g), rtol=1e-3)


@pytest.mark.slow
def test_transformations():
    """vmap of every operand; scan and checkpoint over stacked layers; no retrace."""
    how, u, k, dy = case("causal")
    us, ks = jnp.stack([u, dy]), jnp.stack([k, -2 * k])
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    each = [long_conv(u, k) for u, k in zip(us, ks, strict=True)]
    close(jax.vmap(long_conv)(us, ks), jnp.stack(each))
    close(jax.vmap(long_conv, (None, 0))(u, ks), jnp.stack([each[0], -2 * each[0]]))
    traces = []

    @jax.jit
    def stacked(u, ks):
        traces.append(1)
        body = jax.checkpoint(lambda u, k: (jnp.sin(long_conv(u, k)), None))
        return jax.grad(lambda ks: jnp.sum(jax.lax.scan(body, u, ks)[0]))(ks)

    plain = lambda ks: jnp.sum(
        functools.reduce(lambda u, k: jnp.sin(long_conv_reference(u, k)), ks, u)
    )
    close(stacked(u, ks), jnp.stack(jax.grad(plain)(list(ks))))
    stacked(2 * u, ks)
    assert len(traces) == 1


def test_leading_axes_and_empty_batches():
    _, u, k, _ = case("causal")
    y = long_conv(u, k)
    same = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    same(long_conv(u[0], k), y[0])
    same(long_conv(u[:, None], k), y[:, None])
    assert long_conv(u[:0], k).shape == (0, *u.shape[1:])
    assert not jax.grad(lambda k: long_conv(u[:0], k).sum())(k).any()
    assert long_conv(u[:, :0], k[:0]).shape == (2, 0, 40)


@pytest.mark.parametrize(
    "axis_type", slowly([AxisType.Auto, AxisType.Explicit], AxisType.Explicit)
)
def test_on_a_mesh(axis_type):
    """Batch and features cut; the shared kernel gets the summed gradient."""
    _, u, k, dy = case("causal")
    u, dy = (jnp.tile(a, (2, 2, 1)) for a in (u, dy))
    k = jnp.tile(k, (2, 1))
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    want = run(u, k, dy, {}, long_conv)
    place = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, P(*spec)))
    with jax.set_mesh(mesh):
        got = run(
            place(u, "data", "model"),
            place(k),
            place(dy, "data", "model"),
            {},
            long_conv,
        )
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_inside_shard_map():
    _, u, k, dy = case("causal")
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    loss = lambda u, k, dy: jnp.sum(long_conv(u, k) * dy)
    mapped = jax.shard_map(
        lambda u, k, dy: jax.lax.psum(loss(u, k, dy), "data"),
        mesh=mesh,
        in_specs=(P("data"), P(), P("data")),
        out_specs=P(),
    )
    for a, b in zip(
        jax.jit(jax.grad(mapped, (0, 1)))(u, k, dy),
        jax.grad(loss, (0, 1))(u, k, dy),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_master_kernels_get_their_gradient_unrounded():
    how, u, k, dy = case("bf16")
    master = k.astype(jnp.float32)
    fn = lambda k: long_conv(u, k, **how, dtype=jnp.bfloat16)
    y, vjp = jax.vjp(fn, master)
    (dk,) = vjp(dy)
    assert y.dtype == jnp.bfloat16 and dk.dtype == jnp.float32
    want = exact(u, k, dy, how)[2]
    assert np.abs(f64(dk) - want).max() < 1e-5 * np.abs(want).max()


# --- What went wrong in FlashFFTConv --------------------------------------------------


def test_circular_and_causal_are_said_and_differ():
    """flash-fft-conv 12 and 31: there the FFT's size decides which one it is."""
    u = jnp.ones((1, 1, 64))
    k = jnp.ones((1, 64))
    ramp = np.arange(1, 65.0)[None, None]
    np.testing.assert_allclose(long_conv(u, k), ramp, rtol=1e-5)
    np.testing.assert_allclose(
        long_conv(u, k, causal=False), np.full_like(ramp, 64), rtol=1e-5
    )


def test_kernel_longer_than_the_signal_is_refused():
    """flash-fft-conv 25."""
    with pytest.raises(ValueError, match="k: got length 65, needed 1 to 64"):
        long_conv(jnp.ones((2, 3, 64)), jnp.ones((3, 65)))


@pytest.mark.slow
def test_length_14113():
    """flash-fft-conv 20: a length of 11 * 1283, padded inside."""
    rng = np.random.default_rng(0)
    draw = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.float32)
    check_long(draw(2, 2, 14113), draw(2, 14113) / 100, draw(2, 2, 14113))


def test_gradient_has_the_kernels_own_shape():
    """flash-fft-conv 16: got [864, 4096], expected [1, 864, 4096]."""
    _, u, k, dy = case("causal")
    loss = lambda u, k: jnp.sum(long_conv(u, k) * dy)
    du, dk = jax.grad(loss, (0, 1))(u, k[None])
    assert du.shape == u.shape and dk.shape == (1, *k.shape)
    np.testing.assert_allclose(dk[0], jax.grad(loss, 1)(u, k), rtol=1e-6)


@pytest.mark.slow
def test_odd_lengths():
    """There lengths are even, of some sizes multiples of 4."""
    rng = np.random.default_rng(1)
    # The last: 81 entries, one more than a grid of 10 x 8 has.
    for t, l in ((5, 3), (33, 33), (70, 12)):
        u, k, dy = (
            jnp.asarray(rng.standard_normal((1, 1, s)), "float32") for s in (t, l, t)
        )
        how = dict(causal=True, keep_frequencies=None)
        want = exact(u, k[0], dy, how)[0]
        assert_close(long_conv(u, k[0]), want, long_conv_reference(u, k[0]))


def check_long(u, k, dy):
    """Gradients as close as jnp.fft's, where the peer's tests allow 0.1, 1 or 2."""
    wide = [f64(a) for a in (u, k, dy)]
    n = 2 * u.shape[-1]
    u_, k_, dy_ = (np.fft.rfft(a, n) for a in wide)
    back = lambda s, a: np.fft.irfft(s, n)[..., : a.shape[-1]]
    want = (
        back(u_ * k_, u),
        back(dy_ * k_.conj(), u),
        back((dy_ * u_.conj()).sum(0), k),
    )
    low = run(u, k, dy, {}, long_conv_reference)
    for a, exactly, base in zip(run(u, k, dy, {}, long_conv), want, low, strict=True):
        assert_close(a, exactly, base)
    t, l = u.shape[-1], k.shape[-1]
    sizes = (*u.shape[:2], t, l, t, t + l - 1, False, None, "float32")
    problem = Problem(GRADIENTS, *sizes)
    for side in (1, 128):
        form = _long_conv_xla.monarch(problem, side)
        got = jax.jit(functools.partial(_long_conv_xla.run, problem, form))(u, k, dy)
        for a, exactly, base in zip(got, want[1:], low[1:], strict=True):
            assert_close(a, exactly, base)


@pytest.mark.parametrize(
    "t",
    [
        256,
        *(pytest.param(t, marks=pytest.mark.slow) for t in (1024, 4096, 16384, 65536)),
    ],
)
def test_lengths(t):
    rng = np.random.default_rng(t)
    draw = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.float32)
    check_long(draw(2, 2, t), draw(2, t) / t**0.5, draw(2, 2, t))


# --- Refusals and notes ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("u", "k", "how", "message"),
    [
        ((2, 3, 0), (3, 8), {}, r"u: got shape \(2, 3, 0\), needed .* at least 1"),
        ((8,), (8,), {}, r"u: got shape \(8,\), needed \[..., h, t\]"),
        ((2, 3, 8), (3, 0), {}, "k: got length 0, needed 1 to 8"),
        ((2, 3, 8), (2, 8), {}, r"k: got shape \(2, 8\), needed \[3, l\]"),
        ((2, 3, 8), (2, 3, 8), {}, r"k: got shape \(2, 3, 8\), needed \[3, l\]"),
        ((2, 3, 8), (3, 9), {"causal": False}, "k: got length 9, needed 1 to 8"),
        (
            (2, 3, 8),
            (3, 8),
            {"keep_frequencies": 0},
            "keep_frequencies: got 0, needed 1",
        ),
        ((2, 3, 8), (3, 8), {"keep_frequencies": 10}, "got 10, needed 1 to 9"),
        (
            (2, 3, 8),
            (3, 8),
            {"keep_frequencies": 6, "causal": False},
            "got 6, needed 1 to 5",
        ),
        ((2, 3, 8), (3, 8), {"implementation": "mosaic_tpu"}, "implementation: got"),
        ((2, 3, 8), (3, 8), {"dtype": jnp.int32}, "dtype: got dtype int32"),
    ],
)
def test_bad_arguments(u, k, how, message):
    with pytest.raises(ValueError, match=message):
        long_conv(jnp.ones(u), jnp.ones(k), **how)


def test_bad_dtypes_and_gates():
    u, k = jnp.ones((2, 3, 8)), jnp.ones((3, 8))
    with pytest.raises(ValueError, match="u: got dtype complex64, needed one of"):
        long_conv(u.astype(jnp.complex64), k)
    with pytest.raises(ValueError, match="k: got dtype complex64, needed one of"):
        long_conv(u, k.astype(jnp.complex64))
    with pytest.raises(ValueError, match="k: got dtype int32"):
        long_conv(u, k.astype(jnp.int32))
    with pytest.raises(ValueError, match="post_gate: got dtype complex64"):
        long_conv(u, k, post_gate=u.astype(jnp.complex64))
    with pytest.raises(ValueError, match=r"pre_gate: got shape \(3, 8\), needed u's"):
        long_conv(u, k, pre_gate=u[0])


def test_explain():
    shape = lambda *s: jax.ShapeDtypeStruct(s, "float32")
    text = sj.explain(long_conv, shape(2, 4, 65536), shape(4, 65536))
    assert "long_conv product: 2 x 4 signals of 65536, 65536 taps" in text
    assert "xla: jnp.fft, faster on a CPU" in text
    short = sj.explain(
        functools.partial(long_conv, keep_frequencies=8), shape(2, 4, 64), shape(4, 64)
    )
    assert "8 frequencies kept" in short and "xla: DFT of 128 = " in short
