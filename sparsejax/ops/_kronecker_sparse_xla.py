"""Products with Kronecker-sparse factors by XLA: the CPU product, right everywhere.

Not differentiable in reverse mode where it loops; it sits inside the operators'
``custom_vjp``.
"""

import jax.numpy as jnp
from jax import lax

from sparsejax.ops._checks import accumulator


def product(x, factor):
    """y[i, o, k] = sum_j x[i, j, k] factor[i, k, j, o], of every row.

    Args:
      x: [m, a * c * d].
      factor: [a, d, c, b].

    Returns:
      y [m, a * b * d], dtype of x.
    """
    a, d, c, b = factor.shape
    y = _einsum("mijk,ikjo->miok", x.reshape(-1, a, c, d), factor)
    return y.reshape(-1, a * b * d)


def sampled(x, y, *, pattern, dtype):
    """factor[i, k, j, o] = sum of x[i, j, k] y[i, o, k] over the rows.

    Args:
      x: [m, a * c * d].
      y: [m, a * b * d], dtype of x.
      pattern: (a, b, c, d).
      dtype: That of the result.

    Returns:
      [a, d, c, b].
    """
    a, b, c, d = pattern
    x, y = x.reshape(-1, a, c, d), y.reshape(-1, a, b, d)
    return _einsum("mijk,miok->ikjo", x, y, dtype)


def _einsum(equation, a, b, dtype=None):
    """Float32 sums (float64 of float64)."""
    product = jnp.einsum(equation, a, b, preferred_element_type=accumulator(a.dtype))
    # As in ``_block_sparse_xla._dot``: a transpose of the result must stay out of a
    # bfloat16 product.
    if a.dtype == jnp.bfloat16:
        product = lax.optimization_barrier(product)
    return product.astype(a.dtype if dtype is None else dtype)
