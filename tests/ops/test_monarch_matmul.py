"""Every implementation of monarch_matmul against float64."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import sparsejax as sj
from pallas_kernels.monarch_matmul._spec import Problem
from sparsejax.ops import monarch_matmul, monarch_matmul_reference
from sparsejax.ops._monarch_matmul import MONARCH
from sparsejax.structured import monarch
from sparsejax.testing import assert_close, interpreted

NEW_PALLAS = tuple(int(v) for v in jax.__version__.split(".")[:2]) >= (0, 11)
# Mosaic GPU has an interpreter from jax 0.11 on; before, only the compile tests see it.
IMPLEMENTATIONS = [n for n in MONARCH if n != "mosaic_gpu" or NEW_PALLAS]

# name: (rows, (k, p, q), (l, r, s), inputs, outputs, dtype)
CASES = {
    "f32": (20, (3, 5, 8), (4, 6, 7), 13, 26, "float32"),
    "bf16": (24, (4, 32, 32), (4, 32, 48), 120, 190, "bfloat16"),
    "f16": (8, (2, 8, 16), (4, 8, 16), 16, 64, "float16"),
    "more_of_the_right": (33, (2, 16, 64), (16, 8, 4), 32, 64, "bfloat16"),
    "rank_1": (9, (8, 4, 4), (4, 8, 6), 32, 24, "float32"),
    "one_block": (5, (1, 6, 7), (1, 7, 3), 6, 3, "float32"),
    "one_row": (1, (4, 16, 16), (4, 16, 16), 64, 64, "bfloat16"),
    "for_kernels": (24, (4, 64, 64), (4, 64, 64), 256, 256, "bfloat16"),
    "several_tiles": (1100, (4, 16, 16), (4, 16, 16), 64, 61, "float32"),
}
QUICK = ["f32", "bf16", "several_tiles"]
# Those that a kernel of both factors does not serve, but two kernels do.
BY_FACTORS = ["f32", "more_of_the_right", "rank_1", "one_block", "one_row"]
BY_FACTORS += ["several_tiles"]

# The whole table of what a named implementation refuses; anything else must be served.
REFUSED = {
    ("mosaic_tpu", "f16"): "dtype is float16",
    ("mosaic_gpu", "f32"): "dtype is float32",
    ("mosaic_gpu", "bf16"): "p is 32, needs a multiple of 64",
    ("mosaic_gpu", "f16"): "p is 8, needs a multiple of 64",
    ("mosaic_gpu", "more_of_the_right"): "p is 16, needs a multiple of 64",
    ("mosaic_gpu", "rank_1"): "dtype is float32",
    ("mosaic_gpu", "one_block"): "dtype is float32",
    ("mosaic_gpu", "one_row"): "p is 16, needs a multiple of 64",
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
    rows, (k, p, q), (l, r, s), n_in, n_out, dtype = CASES[name]
    rng = np.random.default_rng(sum(map(ord, name)))
    draw = lambda *s: jnp.asarray(rng.standard_normal(s) / s[-1] ** 0.5, dtype)
    return draw(rows, n_in), draw(k, 1, p, q), draw(1, l, r, s), draw(rows, n_out)


def f64(a):
    return np.asarray(a, np.float64)


def matrices(left, right):
    """Both in float64, entry by entry: (k p) to (k q) = (r l), to (s l)."""
    (k, _, p, q), (_, l, r, s) = left.shape, right.shape
    first, second = np.zeros((k * p, k * q)), np.zeros((r * l, s * l))
    for i in range(k):
        for j, o in np.ndindex(p, q):
            first[i * p + j, i * q + o] = left[i, 0, j, o]
    for i in range(l):
        for j, o in np.ndindex(r, s):
            second[j * l + i, o * l + i] = right[0, i, j, o]
    return first, second


def blocks_of(first, second, left, right):
    """The entries that factors of these shapes store."""
    (k, _, p, q), l = left.shape, right.shape[1]
    one = np.stack([first[i * p : (i + 1) * p, i * q : (i + 1) * q] for i in range(k)])
    two = np.stack([second[i::l, i::l] for i in range(l)])
    return one.reshape(left.shape), two.reshape(right.shape)


def oracles(x, left, right, dy):
    """y, dx, dleft and dright in float64, by dense products."""
    first, second = matrices(f64(left), f64(right))
    n_in, n_out = x.shape[1], dy.shape[1]
    x, dy = f64(x), f64(dy)
    h = x @ first[:n_in]
    dh = dy @ second[:, :n_out].T
    dfirst, dsecond = np.zeros(first.shape), np.zeros(second.shape)
    dfirst[:n_in], dsecond[:, :n_out] = x.T @ dh, h.T @ dy
    grads = blocks_of(dfirst, dsecond, left, right)
    return h @ second[:, :n_out], dh @ first[:n_in].T, *grads


def value_and_gradients(product, x, left, right, dy):
    fn = functools.partial(product, out_size=dy.shape[-1])
    y, vjp = jax.vjp(fn, x, left, right)
    return y, *vjp(dy)


low = functools.partial(value_and_gradients, monarch_matmul_reference)


@pytest.mark.parametrize(
    ("implementation", "name"),
    [
        pytest.param(
            each,
            name,
            marks=[]
            if each == "xla" and name in QUICK
            else [pytest.mark.exhaustive]
            if each == "mosaic_tpu" and name in BY_FACTORS[1:]
            else [pytest.mark.slow],
        )
        for each in IMPLEMENTATIONS
        for name in CASES
    ],
)
def test_value_and_gradients(implementation, name):
    args, impl = case(name), choice(implementation)
    product = functools.partial(monarch_matmul, implementation=impl)
    refusal = REFUSED.get((implementation, name))
    if refusal:
        with pytest.raises(NotImplementedError, match=refusal):
            product(*args[:3])
        return
    got = jax.jit(functools.partial(value_and_gradients, product))(*args)
    assert {a.dtype for a in got} == {args[0].dtype}
    for out, want, plain in zip(got, oracles(*args), low(*args), strict=True):
        assert_close(out, want, plain)


@pytest.mark.slow
def test_random_rectangular_shapes():
    """In one program: sizes that nothing divides, by MonarchLinear's rule of ranks."""
    rng, problems = np.random.default_rng(4), []
    for _ in range(5):
        n_in, n_out, rows = rng.integers(5, 40, 3)
        chain = monarch(int(n_in), int(n_out), blocks=int(rng.integers(2, 6)))
        shapes = [
            (rows, n_in),
            *(p.factor_shape for p in chain.patterns),
            (rows, n_out),
        ]
        problems.append(
            [jnp.asarray(rng.standard_normal(s), "float32") for s in shapes]
        )
    ours = functools.partial(value_and_gradients, monarch_matmul)
    got = jax.jit(lambda ps: [ours(*p) for p in ps])(problems)
    plain = jax.jit(lambda ps: [low(*p) for p in ps])(problems)
    for problem, outs, lows in zip(problems, got, plain, strict=True):
        for triple in zip(outs, oracles(*problem), lows, strict=True):
            assert_close(*triple)


def second_order(product):
    """Gradients of a function of gradients: every derivative rule is differentiated."""

    def loss(*args):
        return jnp.sum(jnp.sin(product(*args).astype(jnp.float32)))

    def of_gradients(*args):
        square = lambda g: jnp.sum(jnp.square(g.astype(jnp.float32)))
        return sum(map(square, jax.grad(loss, (0, 1, 2))(*args)))

    return jax.grad(of_gradients, (0, 1, 2))


@pytest.mark.parametrize("implementation", slowly(IMPLEMENTATIONS))
def test_gradient_of_gradient(implementation):
    """fly's product has no double backward: bmm(out=...) has no derivative."""
    args = case("bf16")[:3]
    ours = functools.partial(monarch_matmul, implementation=choice(implementation))
    plain = jax.jit(second_order(monarch_matmul_reference))
    with jax.enable_x64(True):
        want = [np.asarray(a) for a in plain(*(jnp.asarray(f64(a)) for a in args))]
    got = jax.jit(second_order(ours))(*args)
    for out, reference, rounded in zip(got, want, plain(*args), strict=True):
        # sin' in float32 on bfloat16 values: both sides round y, so eps covers less.
        assert_close(out, reference, rounded, eps=1e-5)


@pytest.mark.parametrize("axes", [(0, None, None), (0, 0, 0), (None, None, 0)])
@pytest.mark.parametrize("implementation", slowly(IMPLEMENTATIONS))
def test_vmap(implementation, axes):
    *args, dy = case("bf16")
    every = lambda a: jnp.stack([a, 2 * a, -a])
    args = [every(a) if ax == 0 else a for a, ax in zip(args, axes, strict=True)]
    product = functools.partial(monarch_matmul, implementation=choice(implementation))
    run = functools.partial(value_and_gradients, product)
    got = jax.jit(jax.vmap(run, (*axes, 0)))(*args, every(dy))
    for i in range(3):
        own = [a[i] if ax == 0 else a for a, ax in zip(args, axes, strict=True)]
        own.append(every(dy)[i])
        for out, want, plain in zip(got, oracles(*own), low(*own), strict=True):
            assert_close(out[i], want, plain)


@pytest.mark.parametrize("implementation", slowly([*IMPLEMENTATIONS, None]))
def test_scan_checkpoint_and_no_retrace(implementation):
    name = "one_row" if implementation in ("xla", None) else "for_kernels"
    x, left, right, _ = case(name)
    impl, traces = choice(implementation), []
    layers = jnp.stack([left, -left]), jnp.stack([right, right])

    def layer(h, factors):
        return monarch_matmul(h, *factors, implementation=impl), None

    @jax.jit
    def gradients(x, layers):
        traces.append(1)

        def loss(layers):
            y, _ = jax.lax.scan(jax.checkpoint(layer), x, layers)
            return jnp.sum(jnp.square(y.astype(jnp.float32)))

        return jax.grad(loss)(layers)

    got = gradients(x, layers)
    gradients(2 * x, layers)
    assert len(traces) == 1
    first, second = matrices(f64(left), f64(right))
    w = first @ second
    dh = 2 * (f64(x) @ w @ -w) @ -w.T  # of the first layer's output
    want = blocks_of(f64(x).T @ (dh @ second.T), (f64(x) @ first).T @ dh, left, right)
    for out, each in zip(got, want, strict=True):
        assert np.abs(f64(out[0]) - each).max() < 0.03 * np.abs(each).max()


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_rows_over_devices(kind):
    """Factors alike on all: their gradients are summed."""
    args = case("bf16")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    cut, every = P("data"), P()
    specs = cut, every, every, cut
    run = functools.partial(value_and_gradients, monarch_matmul)
    if kind == AxisType.Auto:
        outs = cut, cut, every, every
        run = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=outs)
    with jax.set_mesh(mesh):
        put = lambda a, spec: jax.device_put(a, jax.NamedSharding(mesh, spec))
        got = jax.jit(run)(*map(put, args, specs))
    for out, want in zip(got, oracles(*args), strict=True):
        # Rounded on each device before it is summed.
        assert np.abs(f64(out) - want).max() < 0.02 * np.abs(want).max()


@pytest.mark.slow
def test_float64_and_complex():
    with jax.enable_x64(True):
        args = [jnp.asarray(f64(a)) for a in case("f32")]
        got = value_and_gradients(monarch_matmul, *args)
        want = oracles(*args)
        for out, each in zip(got, want, strict=True):
            assert out.dtype == jnp.float64
            np.testing.assert_allclose(out, each, rtol=0, atol=1e-12)
        x, left, right, dy = args
        turned = [jax.lax.complex(a, 2 * a) for a in (x, left, right)]
        y = monarch_matmul_reference(*turned, out_size=dy.shape[1])
    np.testing.assert_allclose(y, (1 + 2j) ** 3 * want[0], atol=1e-12)


def test_master_factors_get_their_gradient_unrounded():
    """dtype=bfloat16, which fly casts to float16: sums come back as float32."""
    x, left, right, dy = case("bf16")
    masters = left.astype(jnp.float32), right.astype(jnp.float32)
    product = functools.partial(monarch_matmul, dtype=jnp.bfloat16)
    run = jax.jit(functools.partial(value_and_gradients, product))
    y, dx, dl, dr = run(x, *masters, dy)
    assert (y.dtype, dx.dtype) == (jnp.bfloat16, jnp.bfloat16)
    assert (dl.dtype, dr.dtype) == (jnp.float32, jnp.float32)
    # h and its gradient are bfloat16: 2^-9 of each, in sums of 24 random terms.
    for out, want in zip((dl, dr), oracles(x, left, right, dy)[2:], strict=True):
        assert np.abs(f64(out) - want).max() < 4e-3 * np.abs(want).max()
        assert (f64(out) != f64(out.astype(jnp.bfloat16))).any()


def test_large_numbers_do_not_become_float16():
    """fly's product under autocast gives inf beyond 65504."""
    x, left, right, _ = case("bf16")
    y = monarch_matmul(x * 2**20, left, right)
    np.testing.assert_array_equal(f64(y), 2**20 * f64(monarch_matmul(x, left, right)))


def test_any_leading_axes():
    """A single vector too, which fly's product does not take; no rows at all."""
    x, left, right, dy = case("f32")
    first, second = matrices(f64(left), f64(right))
    w = first[:13] @ second
    vector = monarch_matmul(x[0], left, right)
    np.testing.assert_allclose(vector, f64(x[0]) @ w, atol=1e-5)
    y = monarch_matmul(x.reshape(2, 5, 2, 13), left, right, out_size=5)
    want = (f64(x) @ w[:, :5]).reshape(2, 5, 2, 5)
    np.testing.assert_allclose(y, want, atol=1e-5)
    args = x[:0], left, right, dy[:0]
    run = jax.jit(functools.partial(value_and_gradients, monarch_matmul))
    none, dx, dl, dr = run(*args)
    assert none.shape == (0, 26) and dx.shape == (0, 13)
    assert not dl.any() and not dr.any()


def test_reference_has_forward_mode():
    x, left, right, _ = case("f32")
    y, dy = jax.jvp(lambda w: monarch_matmul_reference(x, left, w), (right,), (right,))
    np.testing.assert_array_equal(y, dy)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda w: monarch_matmul(x, left, w), (right,), (right,))


# --- Bad input, and what is said ------------------------------------------------------


def test_bad_input_names_argument_got_and_needed():
    x, left, right, _ = case("f32")
    for op in (monarch_matmul, monarch_matmul_reference):
        with pytest.raises(ValueError, match=r"x: got shape \(20, 16\), needed"):
            op(jnp.zeros((20, 16)), left, right)
        with pytest.raises(ValueError, match=r"left: got shape \(3, 5, 8\), needed"):
            op(x, left[:, 0], right)
        with pytest.raises(
            ValueError, match=r"left: got shape .*needed \[k, 1, p, q\]"
        ):
            op(x, left.swapaxes(0, 1), right)
        with pytest.raises(ValueError, match=r"right: got shape .*r \* l == 24, which"):
            op(x, left, right[:, 1:])
        with pytest.raises(
            ValueError, match=r"right: got shape .*needed \[1, l, r, s\]"
        ):
            op(x, left, right.swapaxes(0, 1))
        with pytest.raises(ValueError, match="out_size: got 29, needed 1 to 28"):
            op(x, left, right, out_size=29)
    with pytest.raises(ValueError, match="left: got dtype complex64, needed one of"):
        monarch_matmul(x, left.astype(jnp.complex64), right)
    with pytest.raises(ValueError, match="implementation: got 'cuda', needed 'xla'"):
        monarch_matmul(x, left, right, implementation="cuda")


@pytest.mark.parametrize("implementation", [n for n in MONARCH if n != "xla"])
def test_named_implementation_never_falls_back(implementation):
    args = case("for_kernels")[:3]
    needs = {"mosaic_tpu": "tpu", "mosaic_gpu": "cuda"}[implementation]
    with pytest.raises(NotImplementedError, match=f"needs platform {needs}, got cpu"):
        monarch_matmul(*args, implementation=implementation)


def test_kernels_of_one_factor_where_that_of_both_does_not_serve():
    def say(name, chip, *sizes):
        problem = Problem("monarch", 64, *sizes, "bfloat16")
        MONARCH[name].check(problem, chip)
        return MONARCH[name].note(problem)

    both = "both factors in one kernel"
    assert say("mosaic_tpu", "v5e", 4, 64, 64, 4, 64, 64) == both
    assert say("mosaic_gpu", "h200", 4, 64, 64, 4, 64, 64) == both
    # Blocks give 128 to 3: no whole rank. Three of 64 are no whole part of a wgmma.
    text = say("mosaic_tpu", "v5e", 6, 64, 128, 3, 256, 64)
    assert re.match(
        "a kernel for each factor, .*q is 128, needs a multiple of l=3", text
    )
    text = say("mosaic_gpu", "h200", 64, 64, 192, 64, 192, 64)
    assert re.match("a kernel for each factor, .*q / l is 3, needs a divisor", text)
    needs = "p is 32, needs a multiple of 64; nor a factor at a time: .*c is 32, needs"
    with pytest.raises(NotImplementedError, match=needs):
        say("mosaic_gpu", "h200", 4, 32, 64, 4, 64, 64)


def test_gradients_are_of_the_named_implementation_too():
    """Served forward, by rank 1 and blocks of 64; backward q of 32 is refused."""
    args = jnp.ones((8, 1024)), jnp.ones((16, 1, 64, 32)), jnp.ones((1, 32, 16, 64))
    args = [a.astype(jnp.bfloat16) for a in args]
    product = functools.partial(monarch_matmul, implementation="mosaic_gpu")
    y, vjp = jax.eval_shape(lambda *a: jax.vjp(product, *a), *args)
    with pytest.raises(NotImplementedError, match="mosaic_gpu: . is (16|32), needs"):
        jax.eval_shape(lambda y: vjp(y), y)


@pytest.mark.slow
def test_explain_says_where_dense_is_faster():
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    say = lambda rows, blocks, side: sj.explain(
        monarch_matmul,
        shape(rows, blocks * side),
        shape(blocks, 1, side, side),
        shape(1, blocks, side, side),
    )
    assert "12.5% of dense's multiply-adds, about 0." in say(4096, 16, 64)
    assert "slower than dense" in say(1, 4, 16)  # one row
    assert "densify and multiply" in say(4096, 2, 32)  # few blocks, of 32
    assert "slower than dense" in say(4096, 4, 32)
