"""The nearest circulant matrix, as the chain of Fourier factors that it is."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from sparsejax.structured._transforms import circulant


def project_circulant(
    w: Shaped[Array, "..."], *, dims: Sequence[int] | None = None
) -> tuple[tuple[Array, ...], Array]:
    """Approximates a square matrix by a circulant, a product of about 2 log n factors.

    The nearest circulant has the means of w along its wrapped diagonals,
    ``c[m] = mean_j w[j, (j + m) mod n]``. No one chain of ``project`` holds it: it is
    Fourier factors with strides that fall, a diagonal, and inverse ones with strides
    that rise (``circulant``), of which the first half does not follow the rule there.

    Args:
      w: ``[n, n]``, concrete; not for use inside jit.
      dims: Of the Fourier factors, as for ``circulant``.

    Returns:
      (2 len(dims) - 1 complex factors, relative error in the Frobenius norm). Of a real
      w the product is real up to rounding.

    Raises:
      ValueError: w is not square or not of floats; dims do not multiply to n.

    Example:
      >>> from sparsejax import structured
      >>> w = jnp.array([[1.0, 2.0, 3.0], [3.0, 1.0, 2.0], [2.0, 3.0, 1.0]])
      >>> factors, error = structured.project_circulant(w)
      >>> print(structured.to_dense(factors).real.round(4), bool(error < 1e-6))
      [[1. 2. 3.]
       [3. 1. 2.]
       [2. 3. 1.]] True
    """
    if not jnp.issubdtype(w.dtype, jnp.inexact):
        raise ValueError(f"w: got {w.dtype}, needed floats or complex numbers")
    if w.ndim != 2 or w.shape[0] != w.shape[1]:
        raise ValueError(f"w: got shape {w.shape}, needed a square matrix")
    double = jnp.finfo(w.dtype).bits == 64
    dtype, real = ("complex128", "float64") if double else ("complex64", "float32")
    exact = np.asarray(w).astype(np.complex128)
    j, k = np.indices(w.shape)
    at = (k - j) % len(exact)
    c = np.zeros(len(exact), np.complex128)
    np.add.at(c, at, exact / len(exact))
    norm = np.linalg.norm(exact)
    error = np.linalg.norm(exact - c[at]) / (norm if norm else 1.0)
    return circulant(c, dims=dims, dtype=dtype), jnp.asarray(error, real)
