"""masked_matmul against float64, its gradients, its errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.ops import masked_matmul
from sparsejax.ops._masked_matmul import MASKED_MATMUL
from sparsejax.testing import assert_close


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("implementation", [*MASKED_MATMUL, None])
def test_value_and_gradients(implementation, dtype):
    rng = np.random.default_rng(0)
    draw = lambda *s: jnp.asarray(rng.standard_normal(s), dtype)
    x, w, dy = draw(3, 7, 20), draw(20, 30), draw(3, 7, 30)
    mask = jnp.asarray(rng.random((20, 30)) < 0.3)
    ours = lambda x, w: masked_matmul(x, w, mask, implementation=implementation)
    plain = lambda x, w: x @ jnp.where(mask, w, jnp.zeros((), w.dtype))
    y, vjp = jax.vjp(ours, x, w)
    low_y, low_vjp = jax.vjp(plain, x, w)
    f64 = lambda a: np.asarray(a, np.float64)
    kept = f64(w) * f64(mask)
    assert y.dtype == x.dtype
    assert_close(y, f64(x) @ kept, low_y)
    (dx, dw), (low_dx, low_dw) = vjp(dy), low_vjp(dy)
    assert_close(dx, f64(dy) @ kept.T, low_dx)
    full = f64(x).reshape(21, 20).T @ f64(dy).reshape(21, 30)
    assert_close(dw, full * f64(mask), low_dw)


def test_pruned_entries_take_no_part_even_infinite():
    w = jnp.array([[jnp.inf, 1.0], [2.0, jnp.nan]])
    mask = jnp.array([[False, True], [True, False]])
    np.testing.assert_array_equal(masked_matmul(jnp.ones((1, 2)), w, mask), [[2, 1]])
    grad = jax.grad(lambda w: jnp.sum(masked_matmul(jnp.ones((1, 2)), w, mask)))(w)
    np.testing.assert_array_equal(grad, [[0, 1], [1, 0]])


def test_errors():
    x, w, mask = jnp.ones((3, 4)), jnp.ones((4, 5)), jnp.ones((4, 5), bool)
    with pytest.raises(ValueError, match=r"x: got shape \(3, 4\) with w \(5, 4\)"):
        masked_matmul(x, w.T, mask)
    with pytest.raises(
        ValueError, match=r"mask: got bool \(5, 4\), needed bool \(4, 5\)"
    ):
        masked_matmul(x, w, mask.T)
    with pytest.raises(ValueError, match="mask: got float32"):
        masked_matmul(x, w, mask.astype(jnp.float32))
    with pytest.raises(ValueError, match="x: got dtype int32"):
        masked_matmul(x.astype(jnp.int32), w, mask)
    with pytest.raises(
        ValueError, match="implementation: got 'mosaic_tpu', needed 'xla'"
    ):
        masked_matmul(x, w, mask, implementation="mosaic_tpu")
