"""Convolutions by products of spectra: Monarch DFTs on matrix units, or jnp.fft.

With F the transform on a grid of n frequencies, G its inverse and M the frequencies
that are kept (all, unless the convolution is frequency-sparse):

    product      y  = G(F(u) M F(k))                    first ``out`` entries
    transposed   du = G(F(dy) conj(M F(k)))             first ``signal`` entries
    sampled      dk = G(M sum over b of F(dy) conj(F(u)))  first ``taps`` entries

All three are linear in each operand and each other's derivatives. Nothing that wraps
around lands in the entries wanted if n >= signal + taps - 1; else n is the length of a
circular convolution and exact.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import Precision

from sparsejax.ops import _monarch_dft
from sparsejax.ops._checks import accumulator
from sparsejax.ops._monarch_dft import Grid
from sparsejax.ops._products import PRODUCT, SAMPLED, TRANSPOSED

GRADIENTS = "gradients"  # transposed and sampled, of which F(dy) is shared

# Columns of a grid whose size is free: multiples of what vector units take.
_COLUMNS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048)


@dataclasses.dataclass(frozen=True)
class Problem:
    """One product of spectra; all sizes are static.

    Attributes:
      op: Which.
      batch: b.
      features: h.
      signal: Entries of u.
      taps: Entries of k.
      out: Entries of y.
      n: Frequencies: exactly as many if ``exact``, else at least.
      exact: Whether y wraps around n.
      keep: Frequencies that are kept, of n // 2 + 1; None: all.
      dtype: Of the operands.
    """

    op: str
    batch: int
    features: int
    signal: int
    taps: int
    out: int
    n: int
    exact: bool
    keep: int | None
    dtype: str

    def __str__(self):
        kept = "" if self.keep is None else f", {self.keep} frequencies kept"
        return (
            f"long_conv {self.op}: {self.batch} x {self.features} signals of "
            f"{self.signal}, {self.taps} taps{kept}, {self.dtype}"
        )


class _Form(NamedTuple):
    """How to go to spectra and back."""

    to_spectrum: Callable[[Any], Any]
    from_spectrum: Callable[[Any, int], Any]
    times: Callable[..., Any]
    over_batch: Callable[[Any], Any]
    keep: Callable[[Any], Any]


def run(problem: Problem, form: _Form, *arrays: jax.Array) -> Any:
    """Computes ``problem``; results are float32 (float64 of float64)."""
    wide = accumulator(jnp.dtype(problem.dtype))
    arrays = tuple(array.astype(wide) for array in arrays)
    spectrum, back = form.to_spectrum, form.from_spectrum

    def with_kernel(of_a, k, size, **conjugate):
        return back(form.times(of_a, form.keep(spectrum(k[None])), **conjugate), size)

    def of_kernel(u, of_dy):
        of_dk = form.over_batch(form.times(of_dy, spectrum(u), conjugate=True))
        return back(form.keep(of_dk), problem.taps)[0]

    if problem.op == PRODUCT:
        u, k = arrays
        return with_kernel(spectrum(u), k, problem.out)
    if problem.op == TRANSPOSED:
        dy, k = arrays
        return with_kernel(spectrum(dy), k, problem.signal, conjugate=True)
    if problem.op == SAMPLED:
        u, dy = arrays
        return of_kernel(u, spectrum(dy))
    u, k, dy = arrays
    of_dy = spectrum(dy)
    du = with_kernel(of_dy, k, problem.signal, conjugate=True)
    return du, of_kernel(u, of_dy)


def monarch(problem: Problem, side: int) -> _Form:
    """By products with DFT matrices."""
    grid = choose_grid(problem, side)
    # By matrix units, three products of bfloat16 parts where operands have 8 bits, six
    # where they have 24. The passes over memory take longer than either.
    how = Precision.HIGH if problem.dtype == "bfloat16" else Precision.HIGHEST
    return _Form(
        lambda x: _monarch_dft.to_spectrum(grid, x, how),
        lambda s, size: _monarch_dft.from_spectrum(grid, s, size, how),
        _monarch_dft.times,
        lambda s: jnp.sum(s, axis=1, keepdims=True),
        lambda s: _monarch_dft.keep(grid, s),
    )


def fft(problem: Problem) -> _Form:
    """By jnp.fft."""
    n = problem.n if problem.exact else smooth(problem.n)
    return _Form(
        lambda x: jnp.fft.rfft(x, n)[..., : problem.keep],
        lambda s, size: jnp.fft.irfft(s, n)[..., :size],
        lambda a, b, conjugate=False: a * (jnp.conj(b) if conjugate else b),
        lambda s: jnp.sum(s, axis=0, keepdims=True),
        lambda s: s,
    )


def smooth(n: int) -> int:
    """The least even 2^a 3^b 5^c that is at least n."""
    found, power5 = 1 << (max(n, 2) - 1).bit_length(), 1
    while power5 < found:
        power3 = power5
        while power3 < found:
            twos = max(1, (-(-n // power3) - 1).bit_length())
            found = min(found, power3 << twos)
            power3 *= 3
        power5 *= 5
    return found


def choose_grid(problem: Problem, side: int) -> Grid:
    """The grid of fewest multiply-adds, by ``side`` wide pieces of a matrix unit."""
    n, keep = problem.n, problem.keep
    return _choose_grid(n, problem.exact, problem.signal, problem.out, keep, side)


@functools.lru_cache(maxsize=256)
def _choose_grid(n, exact, signal, out, keep, side):
    if exact:
        small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
        grids = [Grid(n // c, c, False, keep) for d in small for c in (d, n // d)]
    else:
        grids = [Grid(2 * -(-n // (2 * c)), c, True) for c in _COLUMNS]
    return min(grids, key=lambda grid: _cost(grid, signal, out, side))


def _cost(grid, signal, out, side):
    """Multiply-adds of a transform and an inverse, each side filled up to ``side``."""
    up = lambda size: -(-size // side) * side
    rows, columns = grid.rows, len(grid.columns)
    first = up(2 * rows) * sum(up(-(-size // grid.n2)) for size in (signal, out))
    second = 2 * rows * up(2 * grid.n2) * up(2 * columns)
    # A pass over the pairs costs about as much as 16 multiply-adds an entry.
    return first * grid.n2 + second + 16 * 2 * rows * (grid.n2 + columns)


def divides_well(n: int, signal: int, taps: int, keep: int | None) -> bool:
    """Whether a grid of exactly n is about as good as one of free size."""
    least = signal + taps - 1
    free = _choose_grid(least, False, signal, least, None, 1)
    exact = _choose_grid(n, True, signal, signal, keep, 1)
    return _cost(exact, signal, signal, 1) <= 2 * _cost(free, signal, least, 1)


def prefers_fft(problem: Problem) -> bool:
    """Whether jnp.fft is the faster form on a CPU."""
    return problem.n > 1024
