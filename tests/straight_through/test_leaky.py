"""The rule of leaks by hand, and what every form built on it promises."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from sparsejax import masks
from sparsejax import straight_through as st

W = jnp.array([[4.0, -1.0], [2.0, 3.0], [-3.0, 0.5], [1.0, -2.0]])
# 2 of 4 down the columns: 4 and -3; 3 and -2.
KEPT = jnp.array([[1, 0], [0, 1], [1, 0], [0, 1]], bool)
G = jnp.array([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0], [4.0, 40.0]])

# Every form as f(w, annealed scalar), of one signature.
FORMS = {
    "leaky_mask": lambda w, a: st.leaky_mask(w, KEPT, forward=a, backward=a, decay=a),
    "autosparse": lambda w, a: st.autosparse(w, jnp.array(0.0, w.dtype), a),
    "autosparse_topk": lambda w, a: st.autosparse_topk(w, 4, a),
    "sr_ste": lambda w, a: st.sr_ste(w, n=2, m=4, decay=a),
    "mask_decay": lambda w, a: st.mask_decay(w, a, n=2, m=4),
    "mask_decay scaled": lambda w, a: st.mask_decay(w, a, n=2, m=4, backward="scaled"),
    "structure_decay": lambda w, a: st.structure_decay(
        w, (4 * a).astype(jnp.int32), sequence=((3, 4), (2, 4))
    ),
    "soft_topk": lambda w, a: w * st.soft_topk(jnp.abs(w), 4, a),
    "bdwp_matmul": lambda w, a: st.bdwp_matmul(jnp.eye(4, dtype=w.dtype), w, n=1, m=2),
}


def gradient(f, w=W, g=G):
    return jax.jit(lambda w, g: jax.vjp(f, w)[1](g)[0])(w, g)


def test_every_form_is_here():
    others = {"autosparse_mask", "pruned_part"}
    others |= {"geometric_sequence", "stepwise_sequence"}
    assert {name.split()[0] for name in FORMS} == set(st.__all__) - others


def test_leaks_by_hand():
    f = lambda w: st.leaky_mask(w, KEPT, forward=0.5, backward=0.25, decay=0.125)
    want = [[4.0, -0.5], [1.0, 3.0], [-3.0, 0.25], [0.5, -2.0]]
    np.testing.assert_array_equal(f(W), want)
    # Kept: g. Pruned: g / 4 + w / 8.
    want = [[1, 2.5 - 0.125], [0.5 + 0.25, 20], [3, 7.5 + 0.0625], [1 + 0.125, 40]]
    np.testing.assert_array_equal(gradient(f), want)


def test_without_leaks_it_is_a_mask():
    f = lambda w: st.leaky_mask(w, KEPT)
    np.testing.assert_array_equal(f(W), [[4, 0], [0, 3], [-3, 0], [0, -2]])
    np.testing.assert_array_equal(gradient(f), [[1, 0], [0, 20], [3, 0], [0, 40]])


@pytest.mark.parametrize(
    "form",
    [
        lambda w: st.leaky_mask(w, KEPT, forward=1.0, backward=1.0),
        lambda w: st.mask_decay(w, 1.0, n=2, m=4),
        lambda w: st.mask_decay(w, 1.0, n=1, m=4, backward="scaled"),
        lambda w: st.sr_ste(w, n=4, m=4),
        lambda w: st.autosparse_topk(w, 8, 0.0),
        lambda w: st.structure_decay(w, 0, sequence=((1, 4),)),
        lambda w: w * st.soft_topk(jnp.abs(w), 8, 1.0),
        # Far below any weight: sigmoid(-100) is 4e-44, lost beside these.
        lambda w: st.autosparse(w, jnp.array(-100.0), 0.0),
        lambda w: st.bdwp_matmul(jnp.eye(4), w, n=2, m=2),
    ],
)
def test_dense_limits(form):
    np.testing.assert_array_equal(form(W), W)
    np.testing.assert_array_equal(gradient(form), G)


@pytest.mark.parametrize(
    "form",
    [
        lambda w: st.sr_ste(w, n=2, m=4, decay=None),
        lambda w: st.autosparse_topk(w, 4, 1.0),
        lambda w: st.structure_decay(w, 1, sequence=((2, 4),)),
        lambda w: st.autosparse(w, jnp.array(0.0), 1.0),
        lambda w: st.bdwp_matmul(jnp.eye(4), w, n=1, m=2),
    ],
)
def test_straight_through_limits(form):
    """Entries are masked, and the gradient does not know it."""
    assert jnp.sum(form(W) == 0) >= 1
    np.testing.assert_array_equal(gradient(form), G)


@pytest.mark.parametrize("name", FORMS)
def test_the_annealed_scalar_never_recompiles(name):
    traces = []

    @jax.jit
    def step(w, a):
        traces.append(a)
        return FORMS[name](w, a), jax.grad(lambda w: FORMS[name](w, a).sum())(w)

    values = [step(W, jnp.float32(a)) for a in (1.0, 0.5, 0.25)]
    assert len(traces) == 1
    if name != "bdwp_matmul":  # which is not annealed
        flat = [np.concatenate([np.ravel(x) for x in v]) for v in values]
        assert len({v.tobytes() for v in flat}) > 1, "the scalar has no effect"
    eager = FORMS[name](W, jnp.float32(0.25))
    np.testing.assert_allclose(values[-1][0], eager, rtol=1e-6)


@pytest.mark.parametrize("name", FORMS)
def test_vmap_is_a_loop(name):
    ws = jnp.stack([W, -W[::-1], 2 * W])
    scalars = jnp.array([0.25, 0.5, 0.75])
    grad = jax.grad(lambda w, a: (FORMS[name](w, a) ** 2).sum())
    both = jax.jit(lambda w, a: (FORMS[name](w, a), grad(w, a)))
    want = [both(w, a) for w, a in zip(ws, scalars, strict=True)]
    got = jax.jit(jax.vmap(both))(ws, scalars)
    chex.assert_trees_all_close(
        got, jax.tree.map(lambda *a: jnp.stack(a), *want), rtol=1e-5
    )


@pytest.mark.parametrize("name", FORMS)
def test_bfloat16_keeps_its_dtype(name):
    w = W.astype(jnp.bfloat16)  # exact

    @jax.jit
    def both(w, a):
        out, back = jax.vjp(lambda w: FORMS[name](w, a), w)
        return out, *back(jnp.ones_like(out))

    # A scalar in float32, as the optimizer's state has it, does not promote.
    out, grad = both(w, jnp.float32(0.25))
    assert out.dtype == grad.dtype == jnp.bfloat16
    want, want_grad = both(W, jnp.float32(0.25))
    np.testing.assert_allclose(out.astype(jnp.float32), want, rtol=2**-7)
    # The gradients of the soft mask differ by what cancels in them.
    grad = grad.astype(jnp.float32)
    np.testing.assert_allclose(grad, want_grad, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", FORMS)
def test_the_annealed_scalar_has_no_gradient(name):
    total = jax.jit(jax.grad(lambda a: FORMS[name](W, a).sum()))
    assert total(jnp.float32(0.25)) == 0


def test_gradient_of_the_gradient():
    # L = sum(u^2) / 2 with u the weight used, so g = u, and along the ones:
    # kept: w; pruned: a b w, in whose gradient the leak back is met once more: a a.
    f = lambda w: st.leaky_mask(w, KEPT, forward=0.5, backward=0.25)
    half_square = lambda w: (f(w) ** 2).sum() / 2
    slope = lambda w: jax.grad(half_square)(w)
    np.testing.assert_array_equal(slope(W)[0], [4.0, -0.125])
    curvature = jax.vjp(slope, W)[1](jnp.ones_like(W))[0]
    np.testing.assert_array_equal(curvature[0], [1, 0.0625])


def test_scaled_is_the_gradient_of_what_it_does():
    form = lambda w: st.mask_decay(jnp.asarray(w), 0.5, n=2, m=4, backward="scaled")
    check_grads(form, (W,), order=2, modes=["rev"], rtol=1e-2)


def test_a_mask_of_any_structure():
    """SR-STE on whole rows."""
    rows = masks.topk_mask(jnp.abs(W).sum(1), 2)
    mask = jnp.broadcast_to(rows[:, None], W.shape)
    f = lambda w: st.leaky_mask(w, mask, backward=1.0, decay=0.5)
    # Sums of magnitudes 5, 5, 3.5, 3.
    np.testing.assert_array_equal(f(W), [[4, -1], [2, 3], [0, 0], [0, 0]])
    want = [[1, 10], [2, 20], [3 - 1.5, 30 + 0.25], [4 + 0.5, 40 - 1]]
    np.testing.assert_array_equal(gradient(f), want)


def test_a_pruned_weight_that_is_not_finite_takes_no_part():
    w = jnp.array([[jnp.nan], [jnp.inf], [2.0], [1.0]])
    mask = jnp.array([[False], [False], [True], [False]])
    np.testing.assert_array_equal(st.leaky_mask(w, mask)[:, 0], [0, 0, 2, 0])
    # NaN ranks lowest, so the masks of the forms leave it out.
    want = [0, np.inf, 2, 0]
    np.testing.assert_array_equal(st.sr_ste(w, n=2, m=4)[:, 0], want)
    np.testing.assert_array_equal(st.autosparse_topk(w, 2, 0.5)[:, 0], want)
    np.testing.assert_array_equal(st.mask_decay(w, 0.0, n=2, m=4)[:, 0], want)
    # A gradient that is NaN stays NaN: nothing hides a run that went wrong.
    back = jax.vjp(lambda w: st.sr_ste(w, n=2, m=4, decay=None), w)[1]
    assert jnp.isnan(back(jnp.full_like(w, jnp.nan))[0]).all()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: st.leaky_mask(W, KEPT[:2]), r"mask must be .* \(4, 2\), got bool"),
        (lambda: st.leaky_mask(W, KEPT, backward=jnp.ones(2)), "backward must be a sc"),
        (lambda: st.leaky_mask(W.astype(int), KEPT), "w must be floating, got int32"),
        (lambda: st.mask_decay(W, jnp.ones(1), n=2, m=4), "forward must be a scalar"),
        (lambda: st.mask_decay(W, 1.0, n=2, m=4, backward="ste"), "backward must be o"),
        (lambda: st.sr_ste(W, n=5, m=4), "0 <= n <= m"),
        (lambda: st.sr_ste(W, n=2, m=3), "m must divide the size of axis 0"),
        (lambda: st.sr_ste(W, n=2, m=4, axis=2), "axis must exist"),
        (lambda: st.sr_ste(W.astype(int), n=2, m=4), "w must be floating"),
        (lambda: st.structure_decay(W, 0, sequence=()), "sequence must hold at least"),
        (lambda: st.autosparse_topk(W, 9, 0.5), r"count must be in \[0, 8\], got 9"),
        (lambda: st.stepwise_sequence(3, 8), "n times a power of two.* n=3, m=8"),
        (lambda: st.stepwise_sequence(4, 4), "n times a power of two"),
        (lambda: st.stepwise_sequence(0, 4), "n times a power of two"),
        (lambda: st.stepwise_sequence(1, 6), "n times a power of two"),
        (lambda: st.geometric_sequence(5, 4), r"n must be in \[1, m\], got n=5, m=4"),
        (
            lambda: st.geometric_sequence(1, 4, factors=(2, 2, 1)),
            r"factors must fall to 1, got \(2, 2, 1\)",
        ),
        (lambda: st.geometric_sequence(1, 4, factors=(4, 2)), "factors must fall to"),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
