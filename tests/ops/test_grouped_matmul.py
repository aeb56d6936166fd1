"""Every implementation of grouped_matmul and its transpose against float64."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import pallas_kernels
import sparsejax as sj
from sparsejax.ops import (
    _grouped_matmul_xla,
    grouped_matmul,
    grouped_matmul_reference,
    transposed_grouped_matmul,
    transposed_grouped_matmul_reference,
)
from sparsejax.ops._grouped_matmul import GROUPED_MATMUL
from sparsejax.testing import assert_close, interpreted

NEW_PALLAS = tuple(int(v) for v in jax.__version__.split(".")[:2]) >= (0, 11)
# Mosaic GPU has an interpreter from jax 0.11 on; before, only the compile tests see it.
IMPLEMENTATIONS = [n for n in GROUPED_MATMUL if n != "mosaic_gpu" or NEW_PALLAS]

# name: (rows, k, n, group sizes, dtype)
CASES = {
    "f32": (40, 24, 10, (13, 0, 20, 3), "float32"),
    "bf16": (48, 64, 128, (0, 17, 1, 30), "bfloat16"),
    "f16": (24, 64, 64, (8, 8, 8), "float16"),
    "one_group": (9, 7, 130, (9,), "float32"),
    "all_on_one": (33, 64, 64, (0, 0, 33, 0), "bfloat16"),
    "no_rows": (16, 64, 64, (0, 0, 0), "bfloat16"),
    "more_groups_than_rows": (3, 64, 64, (0, 1, 0, 0, 1, 0), "bfloat16"),
    "several_tiles": (300, 20, 12, (5, 170, 0, 90, 30), "float32"),
}

# The whole table of what a named implementation refuses; anything else must be served.
REFUSED = {
    ("mosaic_tpu", "f16"): "dtype is float16",
    ("mosaic_gpu", "f32"): "dtype is float32",
    ("mosaic_gpu", "one_group"): "dtype is float32",
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
    m, k, n, sizes, dtype = CASES[name]
    rng = np.random.default_rng(sum(map(ord, name)))
    draw = lambda *s: jnp.asarray(rng.standard_normal(s), dtype)
    x, w, dy = draw(m, k), draw(len(sizes), k, n), draw(m, n)
    return x, w, jnp.asarray(sizes, jnp.int32), dy


def f64(a):
    return np.asarray(a, np.float64)


def groups_of(sizes):
    """Row by row, the number of its group, by a loop."""
    return [g for g, size in enumerate(np.asarray(sizes)) for _ in range(size)]


def oracle(x, w, sizes):
    """y in float64, one row at a time."""
    y = np.zeros((x.shape[0], w.shape[2]))
    for row, g in enumerate(groups_of(sizes)):
        y[row] = f64(x)[row] @ f64(w)[g]
    return y


def transposed_oracle(x, y, sizes):
    w = np.zeros((len(sizes), x.shape[1], y.shape[1]))
    for row, g in enumerate(groups_of(sizes)):
        w[g] += np.outer(f64(x)[row], f64(y)[row])
    return w


QUICK = ["f32", "bf16", "no_rows"]


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
    x, w, sizes, dy = case(name)
    impl = choice(implementation)
    refusal = REFUSED.get((implementation, name))
    if refusal:
        with pytest.raises(NotImplementedError, match=refusal):
            grouped_matmul(x, w, sizes, implementation=impl)
        with pytest.raises(NotImplementedError, match=refusal):
            transposed_grouped_matmul(x, dy, sizes, implementation=impl)
        return

    @jax.jit
    def run(x, w, sizes, dy):
        product = lambda x, w: grouped_matmul(x, w, sizes, implementation=impl)
        y, vjp = jax.vjp(product, x, w)
        dw = transposed_grouped_matmul(x, dy, sizes, implementation=impl)
        return y, *vjp(dy), dw

    low_y, low_vjp = jax.vjp(lambda x, w: grouped_matmul_reference(x, w, sizes), x, w)
    low_dx, low_dw = low_vjp(dy)
    y, dx, dw, transposed = run(x, w, sizes, dy)
    assert (y.dtype, dx.dtype, dw.dtype) == (x.dtype,) * 3
    assert_close(y, oracle(x, w, sizes), low_y)
    assert_close(dx, oracle(dy, w.swapaxes(1, 2), sizes), low_dx)
    assert_close(dw, transposed_oracle(x, dy, sizes), low_dw)
    np.testing.assert_array_equal(f64(dw), f64(transposed))
    # Exactly, as lax.ragged_dot documents: rows beyond the sum, and empty groups.
    end = int(sizes.sum())
    assert not f64(y)[end:].any() and not f64(dx)[end:].any()
    assert not f64(dw)[np.asarray(sizes) == 0].any()


@pytest.mark.parametrize("implementation", slowly(IMPLEMENTATIONS))
def test_nothing_leaks_from_tails_and_other_groups(implementation):
    """Not even NaN: megablox leaves tails unset, a Triton kernel reads empty groups."""
    x, w, _, dy = case("bf16")
    sizes = jnp.array([0, 17, 0, 20], jnp.int32)
    impl = choice(implementation)
    nan = lambda a, *rows: a.at[jnp.array(rows)].set(jnp.nan)
    x, dy = nan(x, 3, 40), nan(dy, 3, 40, 47)
    product = lambda x, w: grouped_matmul(x, w, sizes, implementation=impl)
    y, vjp = jax.vjp(product, x, w)
    dx, dw = vjp(dy)
    bad = lambda a, axes: np.flatnonzero(np.isnan(f64(a)).any(axes)).tolist()
    assert bad(y, 1) == [3] and bad(dx, 1) == [3]
    assert bad(dw, (1, 2)) == [1]
    assert not f64(y)[37:].any() and not f64(dx)[37:].any()
    assert not f64(dw)[[0, 2]].any()


def second_order(product):
    """Gradients of a function of gradients: every derivative rule is differentiated."""

    def loss(x, w):
        return jnp.sum(jnp.sin(product(x, w).astype(jnp.float32)))

    def of_gradients(x, w):
        square = lambda g: jnp.sum(jnp.square(g.astype(jnp.float32)))
        return sum(map(square, jax.grad(loss, (0, 1))(x, w)))

    return jax.grad(of_gradients, (0, 1))


@pytest.mark.parametrize("implementation", slowly(IMPLEMENTATIONS))
def test_gradient_of_gradient(implementation):
    """Through the weights too, which lax.ragged_dot does not have."""
    x, w, sizes, _ = case("bf16")
    x, w, impl = x / 4, w / 4, choice(implementation)
    ours = second_order(lambda x, w: grouped_matmul(x, w, sizes, implementation=impl))
    plain = second_order(lambda x, w: grouped_matmul_reference(x, w, sizes))
    with jax.enable_x64(True):
        wide = [jnp.asarray(f64(a)) for a in (x, w)]
        reference = [np.asarray(a) for a in plain(*wide)]
    for got, want, low in zip(jax.jit(ours)(x, w), reference, plain(x, w), strict=True):
        # sin' in float32 on bfloat16 values: both sides round y, so eps covers less.
        assert_close(got, want, low, eps=1e-5)


def test_gradient_of_the_transposed_product():
    x, _, sizes, y = case("f32")
    loss = lambda fn: lambda x, y: jnp.sum(jnp.sin(fn(x, y, sizes)))
    got = jax.jit(jax.grad(loss(transposed_grouped_matmul), (0, 1)))(x, y)
    plain = jax.grad(loss(transposed_grouped_matmul_reference), (0, 1))
    with jax.enable_x64(True):
        want = [np.asarray(a) for a in plain(jnp.asarray(f64(x)), jnp.asarray(f64(y)))]
    for a, b, low in zip(got, want, plain(x, y), strict=True):
        assert_close(a, b, low)


SIZES = np.array([[13, 0, 20, 3], [0, 40, 0, 0], [10, 10, 10, 2]], np.int32)


@pytest.mark.parametrize(
    "axes",
    [
        (0, None, 0),  # the usual case, which lax.ragged_dot does not have
        (0, 0, 0),
        *(
            pytest.param(axes, marks=pytest.mark.slow)
            for axes in ((0, None, None), (None, None, 0), (None, 0, None))
        ),
    ],
)
@pytest.mark.parametrize("implementation", slowly(IMPLEMENTATIONS))
def test_vmap(implementation, axes):
    m, k, n = 40, 64, 64
    rng = np.random.default_rng(0)
    draw = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.bfloat16)
    args = draw(3, m, k), draw(3, 4, k, n), jnp.asarray(SIZES)
    args = [a if axis == 0 else a[0] for a, axis in zip(args, axes, strict=True)]
    dy = draw(3, m, n)
    product = functools.partial(grouped_matmul, implementation=choice(implementation))

    def run(x, w, sizes, dy):
        y, vjp = jax.vjp(lambda x, w: product(x, w, sizes), x, w)
        return y, *vjp(dy)

    got = jax.jit(jax.vmap(run, (*axes, 0)))(*args, dy)
    for i in range(3):
        one = [a[i] if axis == 0 else a for a, axis in zip(args, axes, strict=True)]
        x, w, sizes = one
        want = (
            oracle(x, w, sizes),
            oracle(dy[i], w.swapaxes(1, 2), sizes),
            transposed_oracle(x, dy[i], sizes),
        )
        low, vjp = jax.vjp(
            lambda x, w, s=sizes: grouped_matmul_reference(x, w, s), x, w
        )
        for a, b, c in zip(got, want, (low, *vjp(dy[i])), strict=True):
            assert_close(a[i], b, c)


@pytest.mark.slow
def test_vmap_of_vmap_and_of_a_summed_gradient():
    rng = np.random.default_rng(1)
    draw = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.float32)
    x, w = draw(2, 3, 40, 6), draw(4, 6, 5)
    twice = jax.vmap(jax.vmap(grouped_matmul, (0, None, 0)), (0, None, None))
    y = jax.jit(twice)(x, w, jnp.asarray(SIZES))
    loss = lambda w: jnp.sum(jnp.square(twice(x, w, jnp.asarray(SIZES))) / 2)
    dw, want_dw = jax.jit(jax.grad(loss))(w), np.zeros(w.shape)
    for i in range(2):
        for j in range(3):
            want = oracle(x[i, j], w, SIZES[j])
            np.testing.assert_allclose(y[i, j], want, atol=1e-5)
            want_dw += transposed_oracle(x[i, j], want, SIZES[j])
    np.testing.assert_allclose(dw, want_dw, rtol=1e-4, atol=1e-4)


def test_shared_weights_under_vmap_are_one_product():
    """No loop over the members, no copies of the weights."""
    x, w = jnp.zeros((16, 40, 8)), jnp.zeros((4, 8, 6))
    sizes = jnp.zeros((16, 4), jnp.int32)
    text = sj.explain(jax.vmap(grouped_matmul, (0, None, 0)), x, w, sizes)
    assert "grouped: 640 rows in 4 groups" in text
    own = sj.explain(jax.vmap(grouped_matmul), x, jnp.zeros((16, 4, 8, 6)), sizes)
    assert "grouped: 640 rows in 64 groups" in own


@pytest.mark.parametrize("implementation", slowly([*IMPLEMENTATIONS, None]))
def test_scan_checkpoint_and_no_retrace(implementation):
    x, w, sizes, _ = case("bf16")
    impl, traces = choice(implementation), []
    ws, every = jnp.stack([w, -w]), jnp.stack([sizes, sizes[::-1]])

    def loss(w, sizes):
        y = grouped_matmul(x, w, sizes, implementation=impl)
        return jnp.sum(jnp.square(y.astype(jnp.float32)))

    @jax.jit
    def gradients(ws, every):
        traces.append(1)

        def scanned(ws):
            body = jax.checkpoint(lambda c, one: (c + loss(*one), None))
            return jax.lax.scan(body, jnp.zeros((), jnp.float32), (ws, every))[0]

        return jax.grad(scanned)(ws)

    want = jnp.stack([jax.grad(loss)(*one) for one in zip(ws, every, strict=True)])
    np.testing.assert_array_equal(f64(gradients(ws, every)), f64(want))
    np.testing.assert_array_equal(
        f64(gradients(ws, every[::-1]))[0], f64(jax.grad(loss)(w, sizes[::-1]))
    )
    assert len(traces) == 1


@pytest.mark.parametrize("implementation", ["xla", None])
def test_shard_map(implementation):
    """Rows over devices, weights alike on all: the weights' gradients are summed."""
    x, w, _, dy = case("bf16")
    sizes = jnp.asarray([[3, 0, 1, 2], [0, 0, 0, 6]] * 4, jnp.int32)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def loss(x, w, sizes, dy):
        y = grouped_matmul(x, w, sizes[0], implementation=implementation)
        return jax.lax.psum(jnp.sum((y * dy).astype(jnp.float32)), "data")

    specs = (P("data"), P(), P("data"), P("data"))
    mapped = jax.shard_map(loss, mesh=mesh, in_specs=specs, out_specs=P())
    dw = jax.jit(jax.grad(mapped, 1))(x, w, sizes, dy)
    cut = lambda a: f64(a).reshape(8, 6, -1)
    want = sum(
        transposed_oracle(*each) for each in zip(cut(x), cut(dy), sizes, strict=True)
    )
    assert np.abs(f64(dw) - want).max() < 0.02 * np.abs(want).max()


@pytest.mark.slow
def test_float64():
    with jax.enable_x64(True):
        x, w, sizes, dy = (jnp.asarray(np.asarray(a)) for a in case("several_tiles"))
        x, w, dy = (a.astype(jnp.float64) for a in (x, w, dy))
        y, vjp = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes), x, w)
        dx, dw = vjp(dy)
        for got, want in (
            (y, oracle(x, w, sizes)),
            (dx, oracle(dy, w.swapaxes(1, 2), sizes)),
            (dw, transposed_oracle(x, dy, sizes)),
        ):
            assert got.dtype == jnp.float64
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


def test_master_weights_get_their_gradient_unrounded():
    """dtype=bfloat16 with float32 weights: the float32 sums come back as they are."""
    x, w, sizes, dy = case("bf16")
    fn = lambda w: grouped_matmul(x, w, sizes, dtype=jnp.bfloat16)
    y, vjp = jax.vjp(fn, w.astype(jnp.float32))
    (dw,) = vjp(dy)
    assert y.dtype == jnp.bfloat16 and dw.dtype == jnp.float32
    exact = transposed_oracle(x, dy, sizes)
    assert np.abs(f64(dw) - exact).max() < 1e-5 * np.abs(exact).max()


def test_reference_has_forward_mode():
    x, w, sizes, _ = case("f32")
    y, dy = jax.jvp(lambda w: grouped_matmul_reference(x, w, sizes), (w,), (w,))
    np.testing.assert_array_equal(y, dy)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda w: grouped_matmul(x, w, sizes), (w,), (w,))


def test_tiles_by_hand():
    """Mean 256 rows, in eighths: 2, 4, 6, 7, 8, 9, 10, 12, 14 and 16 times 32."""
    heights = _grouped_matmul_xla.tile_heights
    near = (64, 128, 192, 224, 256, 288, 320, 384, 448, 512)
    assert heights(8192, 32, 2048) == near
    assert heights(40, 4, 8) == (40,)  # few rows: one program
    assert heights(200, 1, 8) == (64, 128, 192, 200)  # 200 / 8 in whole sixteens: 32
    assert max(heights(2**20, 2, 2**14)) == 256  # a wide result: low tiles


@pytest.mark.slow
def test_memory_does_not_grow_with_the_groups():
    """Neither forward nor backward holds anything of x's size per group."""
    m, k, n = 1024, 64, 128
    abstract = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)

    def held(groups):
        sizes = jax.ShapeDtypeStruct((groups,), jnp.int32)
        loss = lambda x, w, s: jnp.sum(jnp.sin(grouped_matmul(x, w, s)))
        grad = jax.jit(jax.grad(loss, (0, 1)))
        args = abstract(m, k), abstract(groups, k, n), sizes
        compiled = grad.trace(*args).lower().compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # y, dy and dx, one tile and one weight of each loop; lax.ragged_dot: 20 MB more.
    assert held(64) <= 4 * (2 * m * n + m * k) * 2
    assert held(64) <= held(8) + 2**16


# --- Bad input, and what is said ------------------------------------------------------


def test_bad_input_names_argument_got_and_needed():
    x, w, sizes, dy = case("f32")
    with pytest.raises(ValueError, match=r"x, w: got shapes \(40, 23\) and \(4, 24"):
        grouped_matmul(x[:, 1:], w, sizes)
    with pytest.raises(ValueError, match=r"x, y: got shapes \(40, 24\) and \(39, 10"):
        transposed_grouped_matmul(x, dy[1:], sizes)
    with pytest.raises(
        ValueError, match=r"group_sizes: got shape \(3,\), needed \[4\]"
    ):
        grouped_matmul(x, w, sizes[1:])
    with pytest.raises(ValueError, match="group_sizes: got dtype float32, needed int"):
        grouped_matmul(x, w, sizes.astype(jnp.float32))
    with pytest.raises(ValueError, match="group_sizes: got -1, needed at least 0"):
        grouped_matmul(x, w, sizes.at[1].set(-1))
    with pytest.raises(
        ValueError, match="group_sizes: got a sum of 41, needed at most"
    ):
        grouped_matmul(x, w, sizes.at[1].set(5))
    with pytest.raises(
        ValueError, match="group_sizes: got a sum of 41, needed at most"
    ):
        transposed_grouped_matmul(x, dy, sizes.at[1].set(5))
    with pytest.raises(ValueError, match="w: got dtype int32, needed one of float32"):
        grouped_matmul(x, w.astype(jnp.int32), sizes)
    with pytest.raises(ValueError, match="dtype: got dtype int32, needed one of"):
        grouped_matmul(x, w, sizes, dtype=jnp.int32)
    with pytest.raises(ValueError, match="implementation: got 'cuda', needed 'xla'"):
        grouped_matmul(x, w, sizes, implementation="cuda")


def test_traced_sizes_are_clipped():
    """A negative size is 0, and groups take rows while there are any."""
    x, w, _, _ = case("f32")
    got = jax.jit(grouped_matmul)(x, w, jnp.array([30, -5, 7, 99]))
    # By the rule: 30, 0, 7, and the 3 rows that are left.
    np.testing.assert_allclose(got, oracle(x, w, [30, 0, 7, 3]), atol=1e-5)
    with jax.enable_x64(True):
        huge = jnp.array([2**40, 0, 0, 0])
        got = jax.jit(grouped_matmul)(x, w, huge)
    np.testing.assert_allclose(got, oracle(x, w, [40, 0, 0, 0]), atol=1e-5)


def test_no_rows_groups_or_columns():
    x, w, sizes, _ = case("f32")
    assert grouped_matmul(x[:0], w, 0 * sizes).shape == (0, 10)
    assert grouped_matmul(x, w[:0], sizes[:0]).shape == (40, 10)
    assert not grouped_matmul(x[:, :0], w[:, :0], sizes).any()
    assert transposed_grouped_matmul(x[:0], x[:0], 0 * sizes).shape == (4, 24, 24)


@pytest.mark.parametrize("implementation", [n for n in GROUPED_MATMUL if n != "xla"])
def test_named_implementation_never_falls_back(implementation):
    x, w, sizes, _ = case("bf16")
    needs = {"mosaic_tpu": "tpu", "mosaic_gpu": "cuda"}[implementation]
    with pytest.raises(NotImplementedError, match=f"needs platform {needs}, got cpu"):
        grouped_matmul(x, w, sizes, implementation=implementation)


def test_explain():
    x, w, sizes, _ = case("f32")
    loss = lambda x, w: jnp.sum(grouped_matmul(x, w, sizes))
    text = sj.explain(jax.grad(loss, (0, 1)), x, w)
    assert "grouped: 40 rows in 4 groups, matrices 24x10, float32" in text
    assert "not mosaic_tpu: platform is cpu, it needs tpu" in text
    assert "not mosaic_gpu: mosaic_gpu: dtype is float32, needs bfloat16" in text
    ops = {line.split(":")[0] for line in text.splitlines() if line[0] != " "}
    assert ops == {"grouped", "grouped_transposed", "grouped_sampled"}


def test_registry_names_its_files():
    folder = Path(pallas_kernels.__file__).parent / "grouped_matmul"
    files = {path.stem for path in folder.glob("[a-z]*.py")}
    assert set(GROUPED_MATMUL) == {"xla", *files}
    assert all(name == each.name for name, each in GROUPED_MATMUL.items())
