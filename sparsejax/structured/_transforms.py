"""Hadamard, Fourier, cosine, circulant, Toeplitz and convolution matrices as factors.

All are exact: computed in float64 by numpy, then rounded to the dtype.
``ops.butterfly_matmul_reference`` multiplies by them, complex or not. A Fourier factor
that joins d transforms of s entries to one of d * s has, as [a, s, d, d],

    factor[., k, j, o] = exp(-2 pi i j (o s + k) / (d s))

the twiddles of the mixed-radix step absorbed. Entries enter in digit-reversed order.
The transposed chain takes them in order and gives the spectrum in digit-reversed order,
so a circulant, transform, diagonal, inverse transform, needs no permutation at all.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Inexact

Factors = tuple[Inexact[Array, "_ _ _ _"], ...]


def hadamard(n: int, *, dtype: Any = jnp.float32) -> Factors:
    """Sylvester's Hadamard matrix, entries 1 and -1, as a butterfly.

    ``w[j, k] = (-1)^popcount(j & k)``, by log2(n) factors of 2 x 2 blocks.

    Args:
      n: Entries, a power of two.
      dtype: Of the factors, real or complex.

    Returns:
      The factors of ``butterfly(n)`` (of 1 entry, a factor of one).

    Raises:
      ValueError: n is below 1 or no power of two; dtype is not floating.

    Example:
      >>> factors = sparsejax.structured.hadamard(4)
      >>> print(sparsejax.structured.to_dense(factors))
      [[ 1.  1.  1.  1.]
       [ 1. -1.  1. -1.]
       [ 1.  1. -1. -1.]
       [ 1. -1. -1.  1.]]
    """
    _check_length("n", n)
    if n & (n - 1):
        raise ValueError(f"n: got {n}, needed a power of two")
    if n == 1:
        return _cast([np.ones((1, 1, 1, 1))], dtype)
    block = np.array([[1.0, 1.0], [1.0, -1.0]])
    halves = [2**t for t in range(n.bit_length() - 1)]
    return _cast(
        [np.broadcast_to(block, (n // (2 * d), d, 2, 2)) for d in halves], dtype
    )


def dft(
    n: int,
    *,
    dims: Sequence[int] | None = None,
    inverse: bool = False,
    dtype: Any = jnp.complex64,
) -> tuple[Factors, np.ndarray]:
    """The discrete Fourier transform, by as many factors as n has prime factors.

    ``x[..., permutation] @ w = jnp.fft.fft(x)``, w the product of the factors: a
    tensor train of rank 1 with dimensions ``dims`` on both sides, as ``butterfly(n)``
    for a power of two. n sum(dims) entries.

    Args:
      n: Entries.
      dims: Whole numbers whose product is n, one for each factor, the last to be
        applied first: (32, 32) makes a Monarch matrix of 1024. Default, the prime
        factors of n in rising order.
      inverse: Whether to make ``jnp.fft.ifft`` instead, 1 / n included.
      dtype: complex64 or complex128.

    Returns:
      (factors, permutation int ``[n]``): the digit reversal, for two dims the
      transposition of ``x.reshape(dims[::-1])``.

    Raises:
      ValueError: n is below 1; dims do not multiply to it; dtype is real.

    Example:
      >>> factors, permutation = sparsejax.structured.dft(6)
      >>> permutation
      array([0, 2, 4, 1, 3, 5])
      >>> x = jnp.arange(6, dtype=jnp.complex64)
      >>> y = x[permutation] @ sparsejax.structured.to_dense(factors)
      >>> bool(jnp.allclose(y, jnp.fft.fft(x), atol=1e-5))
      True

    References:
      Cooley and Tukey, `An Algorithm for the Machine Calculation of Complex Fourier
      Series <https://doi.org/10.1090/S0025-5718-1965-0178586-1>`_, 1965.
    """
    factors, permutation = _fourier(n, dims)
    if inverse:
        factors = [np.conj(factor) for factor in factors]
        factors[-1] = factors[-1] / n
    return _cast(factors, dtype), permutation


def dct(
    n: int, *, dims: Sequence[int] | None = None, dtype: Any = jnp.complex64
) -> tuple[Factors, np.ndarray]:
    """The cosine transform (DCT-II), the real part of a chain of complex factors.

    ``(x[..., permutation] @ w).real = scipy.fft.dct(x)``:
    ``y[k] = 2 sum_j x[j] cos(pi k (2 j + 1) / (2 n))``, by the Fourier transform of x's
    even entries followed by its odd ones backwards.

    Args:
      n: Entries.
      dims: As for ``dft``.
      dtype: complex64 or complex128.

    Returns:
      (factors, permutation int ``[n]``).

    Raises:
      ValueError: As ``dft``.

    Example:
      >>> factors, permutation = sparsejax.structured.dct(4)
      >>> w = sparsejax.structured.to_dense(factors)
      >>> print(w.real[:, 0])
      [2. 2. 2. 2.]

    References:
      Makhoul, `A Fast Cosine Transform in One and Two Dimensions
      <https://doi.org/10.1109/TASSP.1980.1163351>`_, 1980.
    """
    factors, permutation = _fourier(n, dims)
    factors[-1] = _times(factors[-1], 2 * np.exp(-0.5j * np.pi * np.arange(n) / n))
    order = np.concatenate([np.arange(0, n, 2), np.arange(1, n, 2)[::-1]])
    return _cast(factors, dtype), order[permutation]


def circulant(
    c: Any, *, dims: Sequence[int] | None = None, dtype: Any = jnp.complex64
) -> Factors:
    """Circular convolution with c, as a chain without permutations.

    ``w[j, k] = c[(k - j) mod n]``, so that ``x @ w = ifft(fft(x) fft(c))``: transposed
    Fourier factors, the spectrum of c, and inverse ones; the two in the middle have the
    same pattern and are one. The product is real where c is, up to rounding.

    Args:
      c: First row, concrete, ``[n]``.
      dims: As for ``dft``.
      dtype: complex64 or complex128.

    Returns:
      2 len(dims) - 1 factors.

    Raises:
      ValueError: c is empty or not of one axis; dims do not multiply to its length;
        dtype is real.

    Example:
      >>> factors = sparsejax.structured.circulant(jnp.array([1.0, 2.0, 3.0]))
      >>> print(sparsejax.structured.to_dense(factors).real.round(4))
      [[1. 2. 3.]
       [3. 1. 2.]
       [2. 3. 1.]]
      >>> x = jnp.array([1, 0, 1], jnp.complex64)
      >>> print(sparsejax.ops.butterfly_matmul_reference(x, factors).real.round(4))
      [3. 5. 4.]
    """
    c = _vector("c", c)
    n = len(c)
    forward, permutation = _fourier(n, dims)
    inverse = [np.conj(factor) for factor in forward]
    transposed = [factor.swapaxes(2, 3) for factor in forward[::-1]]
    middle = _times(transposed[-1], np.fft.fft(c)[permutation] / n) @ inverse[0]
    return _cast([*transposed[:-1], middle, *inverse[1:]], dtype)


def toeplitz(column: Any, row: Any, *, dtype: Any = jnp.complex64) -> Factors:
    """Constant along its diagonals: a corner of a circulant.

    ``w = scipy.linalg.toeplitz(column, row)``: ``w[j, k] = row[k - j]`` above the
    diagonal, ``column[j - k]`` on it and below. Its circulant has the first length from
    ``len(column) + len(row) - 1`` on that has no prime factor above 5; give the true
    sizes to what takes the factors, as ``to_dense(factors, len(column), len(row))``.

    Args:
      column: First column, concrete, ``[k]``.
      row: First row, concrete, ``[n]``; its first entry takes no part.
      dtype: complex64 or complex128.

    Returns:
      The factors of the circulant.

    Raises:
      ValueError: column or row is empty or not of one axis; dtype is real.

    Example:
      >>> factors = sparsejax.structured.toeplitz([1.0, 2.0], [1.0, 3.0, 4.0])
      >>> print(sparsejax.structured.to_dense(factors, 2, 3).real.round(4))
      [[1. 3. 4.]
       [2. 1. 3.]]
    """
    column, row = _vector("column", column), _vector("row", row)
    size = len(column) + len(row) - 1
    while max(_primes(size)) > 5:
        size += 1
    gap = np.zeros(size - len(column) - len(row) + 1)
    c = np.concatenate([column[:1], row[1:], gap, column[:0:-1]])
    return circulant(c, dtype=dtype)


def convolution(
    kernel: Any, size: int, *, circular: bool = False, dtype: Any = jnp.complex64
) -> Factors:
    """Convolution of a signal of ``size`` entries with a kernel.

    ``y[k] = sum_j kernel[j] x[k - j]``. Not circular, x is zero outside: all ``size +
    len(kernel) - 1`` outputs are ``jnp.convolve(x, kernel)``, the first ``size`` of
    them the causal convolution. Circular, k - j is taken modulo ``size``, and a longer
    kernel goes round more than once.

    Args:
      kernel: Concrete, ``[taps]``.
      size: Entries of the signal.
      circular: Whether it wraps around.
      dtype: complex64 or complex128.

    Returns:
      The factors; of a circulant of ``size`` if circular, else of a Toeplitz matrix
      ``[size, size + len(kernel) - 1]``.

    Raises:
      ValueError: size is below 1; kernel is empty or not of one axis; dtype is real.

    Example:
      >>> factors = sparsejax.structured.convolution([1.0, 2.0], 3)
      >>> print(abs(sparsejax.structured.to_dense(factors, 3, 3)).round(4))
      [[1. 2. 0.]
       [0. 1. 2.]
       [0. 0. 1.]]
    """
    kernel = _vector("kernel", kernel)
    _check_length("size", size)
    if circular:
        turns = np.pad(kernel, (0, -len(kernel) % size)).reshape(-1, size)
        return circulant(turns.sum(0), dtype=dtype)
    rest = np.zeros(size - 1)
    column = np.concatenate([kernel[:1], rest])
    return toeplitz(column, np.concatenate([kernel, rest]), dtype=dtype)


def _fourier(n, dims=None):
    """Factors of the transform of n entries, and the order in which it takes them."""
    _check_length("n", n)
    dims = tuple(_primes(n) if dims is None else dims)
    if math.prod(dims) != n or min(dims, default=0) < 1:
        raise ValueError(f"dims: got {dims}, needed whole numbers of product {n}")
    factors, s = [], 1
    for d in dims[::-1]:
        k, j, o = np.ogrid[:s, :d, :d]
        turns = j * (o * s + k) % (d * s)  # exactly, before rounding
        block = np.exp(-2j * np.pi * turns / (d * s))
        factors.append(np.broadcast_to(block, (n // (d * s), s, d, d)))
        s *= d
    permutation = np.arange(n).reshape(dims[::-1]).T.ravel()
    return factors, permutation


def _times(factor, diagonal):
    """The factor with its outputs, (i, o, k), multiplied."""
    a, d, _, b = factor.shape
    return factor * diagonal.reshape(a, b, d).transpose(0, 2, 1)[:, :, None, :]


def _primes(n):
    """Prime factors in rising order; (1,) of 1."""
    primes, p = [], 2
    while p * p <= n:
        while n % p == 0:
            primes.append(p)
            n //= p
        p += 1
    return (*primes, n) if n > 1 or not primes else tuple(primes)


def _check_length(name, n):
    if n < 1:
        raise ValueError(f"{name}: got {n}, needed a length of at least 1")


def _vector(name, values):
    values = np.asarray(values)
    if values.ndim != 1 or not values.size:
        raise ValueError(
            f"{name}: got shape {values.shape}, needed one axis of at least 1 entry"
        )
    return values.astype(np.complex128 if np.iscomplexobj(values) else np.float64)


def _cast(factors, dtype):
    """The factors in dtype, which must hold what they are."""
    kind = jnp.complexfloating if np.iscomplexobj(factors[0]) else jnp.inexact
    if not jnp.issubdtype(dtype, kind):
        needed = (
            "a floating dtype" if kind is jnp.inexact else "complex64 or complex128"
        )
        why = "" if kind is jnp.inexact else ": the factors are complex"
        raise ValueError(f"dtype: got {jnp.dtype(dtype)}, needed {needed}{why}")
    return tuple(jnp.asarray(factor, dtype) for factor in factors)
