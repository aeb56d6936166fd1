"""Real signals to spectra and back by two products with small DFT matrices.

A length n = n1 n2 is written row-major as ``x[i1, i2]`` (i1 < n1, i2 < n2) and a
frequency as j = j1 + n1 j2. With w_n = exp(-2 pi i / n) the transform is two products
and one multiplication by entry (a Monarch matrix: block-diagonal, shuffle,
block-diagonal):

    A[j1, i2]  = sum over i1 of w_n1^(i1 j1) x[i1, i2]         real times complex
    A'[j1, i2] = w_n^(i2 j1) A[j1, i2]                         twiddle
    X[j1, j2]  = sum over i2 of A'[j1, i2] w_n2^(i2 j2)        complex

A matrix unit has no complex numbers: they are pairs of real ones, a complex matrix C is
the real [[re C, im C], [-im C, re C]] and each line one real product. What is saved:

* x is real, so rows j1 and n1 - j1 are conjugates and half of the rows are computed.
  Where nothing wraps around (zero-padded signals) the frequencies are shifted by 1/2
  (j1 + 1/2 for j1): the grid then has no row that is its own conjugate, exactly n1 / 2
  are left. The circular convolution that belongs to it changes the sign of what wraps.
* x is zero from some row i1 on, and only the first rows are wanted back: the others are
  left out of the first and the last product.
* Only frequencies below ``keep`` are wanted: these are the first and the last columns
  j2, and the others are left out of the second product and its inverse.
* The order of frequencies is that of the products, forward and inverse: no permutation.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import Precision


class Grid(NamedTuple):
    """Where the transform is taken, static.

    Attributes:
      n1: Rows that a signal is written in.
      n2: Columns.
      shifted: Whether frequencies are shifted by 1/2; needs an even n1.
      keep: Frequencies j with min(j, n - j) < keep are wanted; None: all.
    """

    n1: int
    n2: int
    shifted: bool = False
    keep: int | None = None

    @property
    def n(self) -> int:
        """Length of the transform."""
        return self.n1 * self.n2

    @property
    def rows(self) -> int:
        """Rows j1 that are computed."""
        return self.n1 // 2 if self.shifted else self.n1 // 2 + 1

    @property
    def columns(self) -> np.ndarray:
        """Columns j2 that are computed."""
        j2 = np.arange(self.n2)
        if self.keep is None:
            return j2
        used = -(-self.keep // self.n1)
        return j2[(j2 < used) | (j2 >= self.n2 - used)]

    def flops(self, size: int) -> int:
        """Multiply-adds, times two, of a transform of ``size`` entries."""
        first = 2 * 2 * self.rows * -(-size // self.n2) * self.n2
        return first + 2 * self.rows * (2 * self.n2) * (2 * len(self.columns))


def to_spectrum(grid: Grid, x: jax.Array, precision: Precision) -> jax.Array:
    """Transforms the last axis, filled up with zeros to ``grid.n``.

    Args:
      grid: Its ``n`` is at least the size of the axis.
      x: ``[b, h, size]``, float32 or float64.
      precision: Of the products.

    Returns:
      ``[rows, b, h, 2, columns]``, real and imaginary parts.
    """
    b, h, size = x.shape
    used = -(-size // grid.n2)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, used * grid.n2 - size)))
    x = x.reshape(b * h, used, grid.n2).transpose(1, 0, 2)
    first, twiddle, second = _matrices(grid, x.dtype.name)
    a = _dot(first[:, :used], x.reshape(used, b * h * grid.n2), precision)
    re, im = a.reshape(2, grid.rows, b * h, grid.n2)
    c, s = twiddle[0][:, None], twiddle[1][:, None]
    a = jnp.stack([re * c - im * s, re * s + im * c], axis=2)
    out = _dot(a.reshape(-1, 2 * grid.n2), second, precision)
    return out.reshape(grid.rows, b, h, 2, -1)


def from_spectrum(
    grid: Grid, spectrum: jax.Array, size: int, precision: Precision
) -> jax.Array:
    """The inverse of ``to_spectrum``, of which the first ``size`` entries are wanted.

    Args:
      grid: As in ``to_spectrum``.
      spectrum: ``[rows, b, h, 2, columns]``.
      size: At most ``grid.n``.
      precision: Of the products.

    Returns:
      ``[b, h, size]``.
    """
    rows, b, h, _, columns = spectrum.shape
    used = -(-size // grid.n2)
    first, twiddle, second = _matrices(grid, spectrum.dtype.name)
    # What a frequency and its conjugate, which is not stored, add to a real signal.
    own = np.arange(rows) == 0
    own |= 2 * np.arange(rows) == grid.n1
    weight = np.where(own & (not grid.shifted), 1.0, 2.0) / grid.n
    last = first[:, :used].T * np.tile(weight, 2).astype(first.dtype)
    a = _dot(spectrum.reshape(-1, 2 * columns), second.T, precision)
    a = a.reshape(rows, b * h, 2, grid.n2)
    re, im = a[:, :, 0], a[:, :, 1]
    c, s = twiddle[0][:, None], twiddle[1][:, None]
    a = jnp.stack([re * c + im * s, im * c - re * s])
    y = _dot(last, a.reshape(2 * rows, -1), precision)
    y = y.reshape(used, b * h, grid.n2).transpose(1, 0, 2)
    return y.reshape(b, h, used * grid.n2)[..., :size]


def times(a: jax.Array, b: jax.Array, *, conjugate: bool = False) -> jax.Array:
    """a b, or a times the conjugate of b, of spectra."""
    (ar, ai), (br, bi) = (jnp.moveaxis(s, -2, 0) for s in (a, b))
    bi = -bi if conjugate else bi
    return jnp.stack([ar * br - ai * bi, ar * bi + ai * br], axis=-2)


def keep(grid: Grid, spectrum: jax.Array) -> jax.Array:
    """The spectrum with zeros at the frequencies that are not wanted."""
    if grid.keep is None:
        return spectrum
    j = np.arange(grid.rows)[:, None] + grid.n1 * grid.columns
    mask = np.minimum(j, grid.n - j) < grid.keep
    return spectrum * mask[:, None, None, None].astype(spectrum.dtype)


def _dot(a, b, precision):
    return jax.lax.dot(a, b, precision=precision)


@functools.lru_cache(maxsize=64)
def _matrices(grid, dtype):
    """First matrix [2 rows, n1], twiddle [2, rows, n2], second [2 n2, 2 columns].

    Angles are reduced as integers, in halves of a step, before anything is rounded.
    """
    j1 = 2 * np.arange(grid.rows, dtype=np.int64) + grid.shifted
    i1, i2 = (np.arange(size, dtype=np.int64) for size in (grid.n1, grid.n2))

    def turn(steps, size):
        angle = -2 * np.pi * (steps % (2 * size)) / (2 * size)
        return np.cos(angle), np.sin(angle)

    first = np.concatenate(turn(np.outer(j1, i1), grid.n1))
    twiddle = np.stack(turn(np.outer(j1, i2), grid.n))
    c, s = turn(2 * np.outer(i2, grid.columns.astype(np.int64)), grid.n2)
    second = np.block([[c, s], [-s, c]])
    return tuple(m.astype(dtype) for m in (first, twiddle, second))
