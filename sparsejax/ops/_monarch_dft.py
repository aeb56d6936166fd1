"""Real signals to spectra and back by two products with small DFT matrices.

A length n = n1 n2 is written row-major as ``x[i1, i2]`` (i1 < n1, i2 < n2) and a
frequency as j = j1 + n1 j2. With w_n = exp(-2 pi i / n) the transform is two products
and one multiplication by entry (a Monarch matrix: block-diagonal, shuffle,
block-diagonal):

    A[j1, i2]  = sum over i1 of w_n1^(i1 j1) x[i1, i2]         real times complex
    A'[j1, i2] = w_n^(i2 j1) A[j1, i2]                         twiddle
    X[j1, j2]  = sum over i2 of A'[j1, i2] w_n2^(i2 j2)        complex

Of a long signal the last line is again two: n2 = p q, i2 = (ip, iq), j2 = jp + p jq,

    B[j1, jp, iq] = w_n2^(iq jp) sum over ip of w_p^(ip jp) A'[j1, ip, iq]
    X[j1, jp, jq] = sum over iq of B[j1, jp, iq] w_q^(iq jq)

A matrix unit has no complex numbers: they are pairs of real ones, a complex matrix C is
the real [[re C, im C], [-im C, re C]] and each sum one real product. What is saved:

* x is real, so rows j1 and n1 - j1 are conjugates and half of the rows are computed.
  Where nothing wraps around (zero-padded signals) the frequencies are shifted by 1/2
  (j1 + 1/2 for j1): the grid then has no row that is its own conjugate, exactly n1 / 2
  are left. The circular convolution that belongs to it changes the sign of what wraps.
* x is zero from some row i1 on, and only the first rows are wanted back: the others are
  left out of the first and the last product.
* Only frequencies below ``keep`` are wanted: these are the first and the last columns
  j2 (or jq), and the others are left out of the last product and of its inverse.
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
      q: Columns, or the last factor of their number n2 = p q.
      shifted: Whether frequencies are shifted by 1/2; needs an even n1.
      keep: Frequencies j with min(j, n - j) < keep are wanted; None: all.
      p: The other factor.
    """

    n1: int
    q: int
    shifted: bool = False
    keep: int | None = None
    p: int = 1

    @property
    def n2(self) -> int:
        """Columns that a signal is written in."""
        return self.p * self.q

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
        """Columns jq that are computed."""
        jq = np.arange(self.q)
        if self.keep is None:
            return jq
        used = -(-self.keep // (self.n1 * self.p))
        return jq[(jq < used) | (jq >= self.q - used)]

    def flops(self, size: int) -> int:
        """Multiply-adds, times two, of a transform of ``size`` entries."""
        first = 2 * self.rows * -(-size // self.n2) * self.n2
        middle = 0 if self.p == 1 else (2 * self.p) ** 2 * self.rows * self.q
        last = self.rows * self.p * (2 * self.q) * (2 * len(self.columns))
        return 2 * (first + middle + last)


def to_spectrum(grid: Grid, x: jax.Array, precision: Precision) -> jax.Array:
    """Transforms the last axis, filled up with zeros to ``grid.n``.

    Args:
      grid: Its ``n`` is at least the size of the axis.
      x: ``[b, h, size]``, float32 or float64.
      precision: Of the products.

    Returns:
      ``[p rows, b, h, 2, columns]``, real and imaginary parts.
    """
    b, h, size = x.shape
    used = -(-size // grid.n2)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, used * grid.n2 - size)))
    x = x.reshape(b * h, used, grid.n2).transpose(1, 0, 2)
    first, twiddle, middle, twiddle2, last = _matrices(grid, x.dtype.name)
    a = _dot(first[:, :used], x.reshape(used, b * h * grid.n2), precision)
    re, im = _turn(a.reshape(2, grid.rows, b * h, grid.p, grid.q), twiddle)
    if grid.p > 1:
        a = jnp.stack([re, im]).transpose(0, 3, 1, 2, 4)
        a = _dot(middle, a.reshape(2 * grid.p, -1), precision)
        re, im = _turn(a.reshape(2, grid.p, grid.rows, b * h, grid.q), twiddle2)
    a = jnp.stack([re, im], axis=-2)
    out = _dot(a.reshape(-1, 2 * grid.q), last, precision)
    return out.reshape(grid.p * grid.rows, b, h, 2, -1)


def from_spectrum(
    grid: Grid, spectrum: jax.Array, size: int, precision: Precision
) -> jax.Array:
    """The inverse of ``to_spectrum``, of which the first ``size`` entries are wanted.

    Args:
      grid: As in ``to_spectrum``.
      spectrum: ``[p rows, b, h, 2, columns]``.
      size: At most ``grid.n``.
      precision: Of the products.

    Returns:
      ``[b, h, size]``.
    """
    (_, b, h, _, columns), rows = spectrum.shape, grid.rows
    used = -(-size // grid.n2)
    first, twiddle, middle, twiddle2, last = _matrices(grid, spectrum.dtype.name)
    # What a frequency and its conjugate, which is not stored, add to a real signal.
    own = np.arange(rows) == 0
    own |= 2 * np.arange(rows) == grid.n1
    weight = np.where(own & (not grid.shifted), 1.0, 2.0) / grid.n
    to_rows = first[:, :used].T * np.tile(weight, 2).astype(first.dtype)
    a = _dot(spectrum.reshape(-1, 2 * columns), last.T, precision)
    a = a.reshape(grid.p, rows, b * h, 2, grid.q)
    a = (a[:, :, :, 0], a[:, :, :, 1])
    if grid.p > 1:
        a = jnp.stack(_turn(a, twiddle2, back=True))
        a = _dot(middle.T, a.reshape(2 * grid.p, -1), precision)
        a = a.reshape(2, grid.p, rows, b * h, grid.q)
    a = _turn([part.transpose(1, 2, 0, 3) for part in a], twiddle, back=True)
    y = _dot(to_rows, jnp.stack(a).reshape(2 * rows, -1), precision)
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
    j1, jp = np.arange(grid.rows)[:, None], np.arange(grid.p)[:, None, None]
    j = j1 + grid.n1 * (jp + grid.p * grid.columns)
    mask = np.minimum(j, grid.n - j) < grid.keep
    mask = mask.reshape(grid.p * grid.rows, 1, 1, 1, -1)
    return spectrum * mask.astype(spectrum.dtype)


def _turn(a, twiddle, back=False):
    """The pair times the twiddle, or times its conjugate."""
    (re, im), (c, s) = a, twiddle
    s = -s if back else s
    return re * c - im * s, re * s + im * c


def _dot(a, b, precision):
    return jax.lax.dot(a, b, precision=precision)


@functools.lru_cache(maxsize=64)
def _matrices(grid, dtype):
    """Three matrices, and the twiddles after the first two of them.

    first [2 rows, n1], twiddle [2, rows, 1, p, q], middle [2 p, 2 p],
    twiddle [2, p, 1, 1, q], last [2 q, 2 columns]. Angles are reduced as integers, in
    halves of a step, before anything is rounded.
    """
    j1 = 2 * np.arange(grid.rows, dtype=np.int64) + grid.shifted
    counts = (grid.n1, grid.n2, grid.p, grid.q)
    i1, i2, ip, iq = (np.arange(count, dtype=np.int64) for count in counts)

    def turns(a, b, size):
        angle = -2 * np.pi * (np.outer(a, b) % (2 * size)) / (2 * size)
        return np.stack([np.cos(angle), np.sin(angle)])

    first = turns(j1, i1, grid.n1).reshape(2 * grid.rows, grid.n1)
    twiddle = turns(j1, i2, grid.n).reshape(2, grid.rows, 1, grid.p, grid.q)
    c, s = turns(2 * ip, ip, grid.p)
    middle = np.block([[c, -s], [s, c]])
    twiddle2 = turns(2 * ip, iq, grid.n2).reshape(2, grid.p, 1, 1, grid.q)
    c, s = turns(2 * iq, grid.columns.astype(np.int64), grid.q)
    last = np.block([[c, s], [-s, c]])
    return tuple(m.astype(dtype) for m in (first, twiddle, middle, twiddle2, last))
