"""fan_in_matmul in every form against float64; its gradients, its errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sparsejax as sj
from sparsejax.layouts import condense_fan_in
from sparsejax.ops import _fan_in_matmul as op
from sparsejax.ops import _fan_in_matmul_xla as xla
from sparsejax.ops import fan_in_matmul, fan_in_matmul_reference
from sparsejax.testing import assert_close

# name: (rows, k, n, fan-in, dtype)
CASES = {
    "one_row": (1, 37, 23, 5, "float32"),
    "one_row_bf16": (1, 64, 30, 9, "bfloat16"),
    "two_columns": (1, 16, 2, 3, "float32"),
    "three_rows": (3, 37, 23, 5, "float32"),
    "tile_f16": (20, 48, 24, 19, "float16"),
    "tiles_bf16": (70, 40, 17, 8, "bfloat16"),
    "tiles": (133, 40, 17, 16, "float32"),
    "one_place": (9, 20, 11, 1, "float32"),
    "no_place": (5, 20, 11, 0, "float32"),
    "every_place": (24, 12, 9, 12, "bfloat16"),
}
FORMS = ["loops", "dense"]


@functools.cache
def case(name):
    rows, k, n, fan_in, dtype = CASES[name]
    rng = np.random.default_rng(sum(map(ord, name)))
    draw = lambda *s: jnp.asarray(rng.standard_normal(s), dtype)
    indices = np.argsort(rng.random((n, k)), axis=1)[:, :fan_in]  # unsorted too
    return draw(rows, k), draw(n, fan_in), jnp.asarray(indices, "int32"), draw(rows, n)


@pytest.fixture
def form(request, monkeypatch):
    """Makes the static rule choose this form for every product."""
    loops, dense = (0, 1) if request.param == "loops" else (1, 0)
    monkeypatch.setattr(xla, "costs", lambda *problem: (loops, dense, dense))
    # Traced anew: the rule is no argument of what has been compiled.
    monkeypatch.setattr(op, "_call", op._call.__wrapped__)
    return request.param


def f64(a):
    return np.asarray(a, np.float64)


def dense(values, indices, k):
    """The dense matrix in float64, entry by entry."""
    w = np.zeros((k, len(values)))
    for j, (row, places) in enumerate(
        zip(f64(values), np.asarray(indices), strict=True)
    ):
        w[places, j] = row
    return w


def low_product(x, w):
    """The formula by XLA in the low precision, dense."""
    return jnp.matmul(x, w, preferred_element_type=jnp.float32).astype(x.dtype)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("form", FORMS, indirect=True)
def test_value_and_gradients(form, name):
    x, values, indices, dy = case(name)

    @jax.jit
    def run(x, values, indices, dy):
        y, vjp = jax.vjp(lambda x, v: fan_in_matmul(x, v, indices), x, values)
        return y, *vjp(dy)

    w = dense(values, indices, x.shape[1])
    low_y, low_vjp = jax.vjp(low_product, x, jnp.asarray(w, x.dtype))
    low_dx, low_dw = low_vjp(dy)
    y, dx, dv = run(x, values, indices, dy)
    assert (y.dtype, dx.dtype, dv.dtype) == (x.dtype,) * 3
    assert_close(y, f64(x) @ w, low_y)
    assert_close(dx, f64(dy) @ w.T, low_dx)
    take = lambda dw: np.take_along_axis(f64(dw).T, np.asarray(indices), axis=1)
    assert_close(dv, take(f64(x).T @ f64(dy)), take(low_dw))


def second_order(product):
    """Gradients of a function of gradients: every derivative rule is differentiated."""

    def loss(x, v):
        return jnp.sum(jnp.sin(product(x, v).astype(jnp.float32)))

    def of_gradients(x, v):
        square = lambda g: jnp.sum(jnp.square(g.astype(jnp.float32)))
        return sum(map(square, jax.grad(loss, (0, 1))(x, v)))

    return jax.jit(jax.grad(of_gradients, (0, 1)))


@pytest.mark.parametrize("name", ["three_rows", "tiles_bf16"])
def test_gradient_of_gradient(name):
    x, values, indices, _ = case(name)
    x, values = x / 4, values / 4
    plain = lambda x, v: fan_in_matmul_reference(x, v, indices)
    with jax.enable_x64(True):
        wide = lambda a: jnp.asarray(f64(a))
        reference = jax.tree.map(np.asarray, second_order(plain)(wide(x), wide(values)))
    ours = second_order(lambda x, v: fan_in_matmul(x, v, indices))
    low = second_order(plain)(x, values)
    for got, want, base in zip(ours(x, values), reference, low, strict=True):
        # sin' in float32 on bfloat16 values: both sides round y, so eps covers less.
        assert_close(got, want, base, eps=1e-5)


def test_indices_have_no_gradient():
    x, values, indices, _ = case("one_row")
    _, vjp = jax.vjp(fan_in_matmul, x, values, indices)
    assert vjp(jnp.ones((1, 23)))[2].dtype == jax.dtypes.float0


def test_sums_in_float32():
    # 4096 ones: bfloat16 sums would stop at 256.
    for rows in (1, 16):
        x = jnp.ones((rows, 4096), jnp.bfloat16)
        indices = jnp.arange(4096)[None]
        y = fan_in_matmul(x, jnp.ones((1, 4096), jnp.bfloat16), indices)
        assert (np.asarray(y, np.float32) == 4096).all()


def test_master_values_get_their_gradient_unrounded():
    """dtype=bfloat16 with float32 values: the float32 sums come back as they are."""
    x, values, indices, dy = case("tiles_bf16")
    product = lambda v: fan_in_matmul(x, v, indices, dtype=jnp.bfloat16)
    y, vjp = jax.vjp(product, values.astype(jnp.float32))
    (dv,) = vjp(dy)
    assert y.dtype == jnp.bfloat16 and dv.dtype == jnp.float32
    exact = np.take_along_axis(f64(dy).T @ f64(x), np.asarray(indices), axis=1)
    assert np.abs(f64(dv) - exact).max() < 1e-5 * np.abs(exact).max()


def test_float64():
    with jax.enable_x64(True):
        for name in ("three_rows", "tiles"):
            x, values, indices, dy = case(name)
            x, values, dy = (jnp.asarray(f64(a)) for a in (x, values, dy))
            y, vjp = jax.vjp(fan_in_matmul, x, values, indices)
            w = dense(values, indices, x.shape[1])
            assert y.dtype == jnp.float64
            np.testing.assert_allclose(y, x @ w, atol=1e-12)
            np.testing.assert_allclose(vjp(dy)[0], dy @ w.T, atol=1e-12)


def test_leading_axes_and_no_retrace():
    x, values, indices, _ = case("tile_f16")
    traces = []

    @jax.jit
    def run(x, values, indices):
        traces.append(1)
        return fan_in_matmul(x, values, indices)

    y = run(x, values, indices)
    np.testing.assert_array_equal(
        run(x.reshape(2, 5, 2, 48), values, indices), y.reshape(2, 5, 2, 24)
    )
    moved = (indices + 1) % 48
    w = dense(values, moved, 48)
    low = low_product(x, jnp.asarray(w, x.dtype))
    assert_close(run(x, values, moved), f64(x) @ w, low)
    assert len(traces) == 2  # one per shape of x
    assert fan_in_matmul(x[0], values, indices).shape == (24,)
    assert fan_in_matmul(x[:0], values, indices).shape == (0, 24)
    assert fan_in_matmul(x, values[:0], indices[:0]).shape == (20, 0)
    # Indices of any integer type.
    np.testing.assert_array_equal(run(x, values, indices.astype(jnp.uint8)), y)


def test_vmap_scan_checkpoint():
    x, values, indices, _ = case("three_rows")
    xs, vs = jnp.stack([x, 2 * x]), jnp.stack([values, -values])
    places = jnp.stack(
        [jnp.asarray(i, jnp.int32) for i in (indices, (indices + 7) % 37)]
    )
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    one = lambda i: fan_in_matmul(xs[i], vs[i], places[i])
    close(jax.vmap(fan_in_matmul)(xs, vs, places), jnp.stack([one(0), one(1)]))
    shared = jax.vmap(fan_in_matmul, (0, None, None))(xs, values, indices)
    want = jnp.stack([fan_in_matmul(each, values, indices) for each in xs])
    close(shared, want)
    # More rows, not a loop over the batch.
    jaxpr = str(
        jax.make_jaxpr(jax.vmap(fan_in_matmul, (0, None, None)))(xs, values, indices)
    )
    assert "6,37" in jaxpr

    loss = lambda x, v, i: jnp.sum(jnp.square(fan_in_matmul(x, v, i)))
    grads = jax.jit(jax.vmap(jax.grad(loss, (0, 1))))(xs, vs, places)

    def scanned(vs):
        body = jax.checkpoint(lambda c, vi: (c + loss(x, *vi), None))
        return jax.lax.scan(body, jnp.zeros(()), (vs, places))[0]

    by_scan = jax.jit(jax.grad(scanned))(vs)
    for i in range(2):
        want = jax.grad(loss, (0, 1))(xs[i], vs[i], places[i])
        close(grads[0][i], want[0])
        close(grads[1][i], want[1])
        close(by_scan[i], jax.grad(loss, 1)(x, vs[i], places[i]))


@pytest.mark.parametrize("form", FORMS, indirect=True)
def test_over_eight_devices(form):
    """shard_map, automatic and explicit axes: rows over devices, weights alike."""
    x, values, indices, dy = case("tiles")
    x, dy = x[:128], dy[:128]
    w = dense(values, indices, 40)
    want = f64(dy) @ w.T, np.take_along_axis(f64(dy).T @ f64(x), indices, axis=1)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)

    def loss(x, v, dy):
        return jnp.sum(fan_in_matmul(x, v, indices) * dy)

    def check(mesh, loss):
        put = lambda a: jax.device_put(a, NamedSharding(mesh, P("data")))
        grads = jax.jit(jax.grad(loss, (0, 1)))(put(x), values, put(dy))
        for got, expected in zip(grads, want, strict=True):
            close(got, expected)

    auto = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    check(auto, loss)
    mapped = jax.shard_map(
        lambda *args: jax.lax.psum(loss(*args), "data"),
        mesh=auto,
        in_specs=(P("data"), P(), P("data")),
        out_specs=P(),
    )
    check(auto, mapped)
    explicit = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(explicit):
        check(explicit, loss)


def test_reference():
    x, values, indices, _ = case("three_rows")
    want = f64(x) @ dense(values, indices, 37)
    np.testing.assert_allclose(
        fan_in_matmul_reference(x, values, indices), want, rtol=1e-5, atol=1e-5
    )
    tangent = jax.jvp(
        lambda x: fan_in_matmul_reference(x, values, indices), (x,), (x,)
    )[1]
    np.testing.assert_allclose(tangent, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_lowers_anywhere(platform):
    for rows in (1, 64):
        args = jnp.ones((rows, 256)), jnp.ones((64, 8)), jnp.ones((64, 8), jnp.int32)
        loss = lambda x, v, i: jnp.sum(fan_in_matmul(x, v, i) ** 2)
        step = jax.jit(jax.value_and_grad(loss, (0, 1)))
        assert step.trace(*args).lower(lowering_platforms=(platform,)).as_text()


def test_no_array_of_weight_shape():
    """At 90% and one row no pass holds the dense matrix."""
    shapes = jnp.ones((1, 1000)), jnp.ones((2000, 100)), jnp.ones((2000, 100), "i4")
    args = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in shapes]
    step = jax.grad(lambda x, v, i: jnp.sum(fan_in_matmul(x, v, i) ** 2), (0, 1))
    jaxpr = str(jax.make_jaxpr(step)(*args))
    assert "1000,2000]" not in jaxpr and "2000,1000]" not in jaxpr
    assert "2000,100]" in jaxpr  # the pattern would match


def test_static_rule_and_explain():
    """Loops where the weight is hardly read; dense at many rows and high density."""

    def text(rows, k, n, fan_in):
        arrays = (
            ((rows, k), "float32"),
            ((n, fan_in), "float32"),
            ((n, fan_in), "int32"),
        )
        args = [jax.ShapeDtypeStruct(s, jnp.dtype(t)) for s, t in arrays]
        return sj.explain(fan_in_matmul, *args)

    few = text(1, 1024, 4096, 102)
    assert "xla: gathers, 10.0% of dense's multiply-adds; faster than a dense" in few
    assert "gathers" in text(256, 1024, 4096, 102)
    half = text(1, 1024, 1024, 900)
    assert "gathers, 87.9% of dense's multiply-adds; slower than a dense" in half
    many = text(4096, 1024, 1024, 900)
    assert "writes the weight out and multiplies, 87.9%" in many
    assert "about as fast as a dense weight" in many
    fifth = text(256, 4096, 4096, 819)
    assert "gathers, 20.0% of dense's multiply-adds; slower than a dense" in fifth
    assert "about as fast as a dense weight by" in text(1, 1024, 1024, 205)
    # The gradients of a training batch: written out.
    dims = (64, 512), (512, 100), (512, 100)
    args = [jnp.ones(s, t) for s, t in zip(dims, ("f4", "f4", "i4"), strict=True)]
    args[2] = jnp.tile(jnp.arange(100, dtype=jnp.int32), (512, 1))
    step = jax.grad(lambda *args: jnp.sum(fan_in_matmul(*args)), (0, 1))
    lines = sj.explain(step, *args).splitlines()
    ops = {line.split(":")[0] for line in lines if line[0] != " "}
    assert ops == {"fan_in_product", "fan_in_transposed", "fan_in_sampled"}


# Measured time over that of the dense product, from the summary of
# benchmarks/results/fan_in_matmul.cpu.json: (k, n, rows): at 80, 90, 95 and 99%.
MEASURED = {
    (768, 3072, 1): (0.76, 0.52, 0.31, 0.09),
    (768, 3072, 8): (2.04, 1.13, 0.73, 0.32),
    (768, 3072, 64): (0.87, 0.57, 0.42, 0.24),
    (768, 3072, 256): (1.04, 0.67, 0.46, 0.23),
    (1024, 1024, 1): (1.12, 0.60, 0.26, 0.12),
    (1024, 1024, 8): (2.19, 1.30, 0.46, 0.35),
    (1024, 1024, 64): (1.08, 0.72, 0.52, 0.33),
    (1024, 1024, 256): (1.16, 0.75, 0.54, 0.32),
    (3072, 768, 1): (0.68, 0.48, 0.28, 0.09),
    (3072, 768, 8): (1.83, 0.99, 0.68, 0.19),
    (3072, 768, 64): (1.19, 0.63, 0.43, 0.28),
    (3072, 768, 256): (1.38, 0.75, 0.57, 0.30),
    (4096, 4096, 1): (0.47, 0.27, 0.17, 0.08),
    (4096, 4096, 8): (1.23, 0.63, 0.37, 0.10),
    (4096, 4096, 64): (1.27, 0.67, 0.35, 0.10),
    (4096, 4096, 256): (1.68, 0.75, 0.35, 0.14),
}


@pytest.mark.parametrize("k, n, rows", MEASURED)
def test_verdict_agrees_with_what_was_measured(k, n, rows):
    for sparsity, ratio in zip(
        (0.8, 0.9, 0.95, 0.99), MEASURED[k, n, rows], strict=True
    ):
        fan_in = round((1 - sparsity) * k)
        slower = xla.dense_is_faster("product", rows, k, n, fan_in)
        if slower is None:  # cautious: 1 row at 80% is the most of it
            assert 0.45 < ratio <= 1.3, sparsity
        else:
            assert slower == (ratio > 1), sparsity
        if not 0.8 <= ratio <= 1.3 and rows > 8:
            assert slower is not None, sparsity


def test_the_rule_by_which_a_form_runs():
    """Calibrating the verdict moves no problem to another form."""
    writes = lambda *problem: xla.costs(*problem)[1] < xla.costs(*problem)[0]
    assert not writes("product", 256, 4096, 4096, 819)
    assert writes("product", 4096, 1024, 1024, 900)
    assert writes("transposed", 64, 1024, 1024, 205)
    assert not writes("transposed", 8, 1024, 1024, 205)
    assert writes("sampled", 64, 1024, 1024, 205)
    assert not writes("sampled", 64, 1024, 1024, 51)


def test_agrees_with_masked_dense_of_a_mask():
    """From a mask, through the layout, ablated neurons included."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.standard_normal((24, 16)), jnp.float32)
    scores = jnp.asarray(rng.random((24, 16)))
    mask = np.array(sj.masks.nm_mask(scores, 3, 24))
    mask[:, [2, 9]] = False
    values, indices = condense_fan_in(w, mask, fan_in=3)
    x = jnp.asarray(rng.standard_normal((5, 24)), jnp.float32)
    y = fan_in_matmul(x, values, indices)
    want = f64(x) @ (f64(w) * mask)
    assert_close(y, want, sj.ops.masked_matmul(x, w, jnp.asarray(mask)))
    assert not np.asarray(y)[:, [2, 9]].any()


def test_errors():
    x, values, indices = (
        jnp.ones((3, 4)),
        jnp.ones((5, 2)),
        jnp.tile(jnp.arange(2), (5, 1)),
    )
    with pytest.raises(ValueError, match=r"values: got shape \(2,\), needed \[n, fan"):
        fan_in_matmul(x, values[0], indices[0])
    with pytest.raises(ValueError, match=r"indices: got int32 \(4, 2\), needed integ"):
        fan_in_matmul(x, values, indices[:4])
    with pytest.raises(ValueError, match=r"indices: got float32 \(5, 2\), needed int"):
        fan_in_matmul(x, values, values)
    with pytest.raises(ValueError, match="a fan-in of 2, needed at most 1, the rows"):
        fan_in_matmul(x[:, :1], values, indices)
    with pytest.raises(ValueError, match=r"column 3 has 4, needed indices in \[0, 4\)"):
        fan_in_matmul(x, values, indices.at[3, 1].set(4))
    with pytest.raises(ValueError, match="column 3 has one twice"):
        fan_in_matmul(x, values, indices.at[3, 1].set(0))
    with pytest.raises(ValueError, match="x: got dtype int32, needed one of float32"):
        fan_in_matmul(x.astype(jnp.int32), values, indices)
    with pytest.raises(ValueError, match="dtype: got dtype int32, needed one of"):
        fan_in_matmul(x, values, indices, dtype=jnp.int32)
    with pytest.raises(ValueError, match="implementation: got 'triton', needed 'xla'"):
        fan_in_matmul(x, values, indices, implementation="triton")
