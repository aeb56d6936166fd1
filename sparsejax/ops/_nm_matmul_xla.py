"""Condensed N:M products by XLA: the matrix is written out, then one dense product.

    product   y = x @ w or x @ w.T, w the dense matrix of values and words
    sampled   values = (x.T @ dy) at the places

One fused pass makes w, which costs as much as some hundred rows of x; it is the one
array of w's shape, as ``x.T @ dy`` is in ``sampled``. Not differentiable in reverse
mode at that cost; it sits inside the operator's ``custom_vjp``.
"""

import jax.numpy as jnp

from sparsejax.layouts._nm import expand, unpack_nm
from sparsejax.ops._block_sparse_xla import _dot


def product(x, values, words, *, n, m, transpose):
    """Computes x @ w, or x @ w.T; float32 sums, dtype of x.

    Args:
      x: [rows, k], or [rows, p] with ``transpose``.
      values: [k * n / m, p], dtype of x.
      words: uint32, the packed places.
      n: Kept of every m.
      m: Group size.
      transpose: Which of the two.

    Returns:
      [rows, p], or [rows, k] with ``transpose``.
    """
    w = expand(values, words, n, m)
    return _dot(x, w, (1, 1 if transpose else 0)).astype(x.dtype)


def sampled(x, dy, words, *, n, m, dtype):
    """Computes x.T @ dy at the places.

    Args:
      x: [rows, k].
      dy: [rows, p], dtype of x.
      words: uint32, the packed places.
      n: Kept of every m.
      m: Group size.
      dtype: That of the result.

    Returns:
      [k * n / m, p].
    """
    k, p = x.shape[1], dy.shape[1]
    rows = k // m * n
    dw = _dot(x, dy, (0, 0)).reshape(k // m, m, p)
    places = unpack_nm(words, rows, m=m).reshape(k // m, n, p)
    zero = jnp.zeros((), dw.dtype)
    values = zero
    for i in range(m):
        values = jnp.where(places == i, dw[:, i, None], values)
    return values.reshape(rows, p).astype(dtype)
