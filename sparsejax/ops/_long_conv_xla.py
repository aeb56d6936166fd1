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
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.lax import Precision

from sparsejax.ops import _monarch_dft
from sparsejax.ops._checks import accumulator
from sparsejax.ops._monarch_dft import Grid
from sparsejax.ops._products import PRODUCT, SAMPLED, TRANSPOSED

GRADIENTS = "gradients"  # transposed and sampled, of which F(dy) is shared

# Factors of a grid whose size is free: multiples of what vector units take.
_COLUMNS = (1, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_LARGEST = 2048  # factor of a grid whose size is given, but for the first
_PASS = 128  # multiply-adds an entry that a pass over memory takes as long as


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
    """How to go to spectra and back; all at once, or so many entries of u at a time."""

    to_spectrum: Callable[[Any], Any]
    from_spectrum: Callable[[Any, int], Any]
    times: Callable[..., Any]
    over_batch: Callable[[Any], Any]
    keep: Callable[[Any], Any]
    piece: int | None


def run(problem: Problem, form: _Form, *arrays: jax.Array) -> Any:
    """Computes ``problem``; results are float32 (float64 of float64)."""
    op, h = problem.op, problem.features
    wide = accumulator(jnp.dtype(problem.dtype))
    arrays = tuple(array.astype(wide) for array in arrays)
    names = {PRODUCT: "uk", TRANSPOSED: "yk", SAMPLED: "uy", GRADIENTS: "uky"}[op]
    given = dict(zip(names, arrays, strict=True))
    k = given.pop("k", None)
    members, features = _piece(problem, form.piece)
    cut = (problem.batch // members, h // features, members, features)

    def some_features(of_dk, xs):
        """Of some signals: adds to the spectrum of dk, computes y or du."""
        of_k, signals = xs
        of = {name: form.to_spectrum(signal) for name, signal in signals.items()}
        out = None
        if op == PRODUCT:
            out = form.from_spectrum(form.times(of["u"], of_k), problem.out)
        elif op != SAMPLED:
            of_du = form.times(of["y"], of_k, conjugate=True)
            out = form.from_spectrum(of_du, problem.signal)
        if of_dk is not None:
            of_dk += form.over_batch(form.times(of["y"], of["u"], conjugate=True))
        return of_dk, out

    def some_members(of_dk, signals):
        add = lambda _, xs: (None, some_features(*xs))
        return lax.scan(add, None, (of_dk, (of_k, signals)))[1]

    each = lambda fn, a: lax.map(fn, a.reshape(-1, 1, features, a.shape[-1]))
    of_k = None if k is None else each(lambda k: form.keep(form.to_spectrum(k)), k)
    of_dk = None
    if op in (SAMPLED, GRADIENTS):
        # Zeros that vary over a mesh as the signals do.
        of_dk = each(form.to_spectrum, 0 * given["u"][0])
    signals = {name: a.reshape(*cut, a.shape[-1]) for name, a in given.items()}
    of_dk, out = lax.scan(some_members, of_dk, signals)
    results = []
    if out is not None:
        results.append(out.reshape(problem.batch, h, -1))
    if of_dk is not None:
        back = lambda s: form.from_spectrum(form.keep(s), problem.taps)
        results.append(lax.map(back, of_dk).reshape(h, problem.taps))
    return tuple(results) if op == GRADIENTS else results[0]


def _piece(problem, entries):
    """(members of the batch, features) at a time: all features, or one member."""
    if entries is None:
        return problem.batch, problem.features
    near = lambda size, wanted: min(
        (d for d in range(1, size + 1) if size % d == 0),
        key=lambda d: abs(math.log(d / wanted)),
    )
    signals = max(1, entries // problem.signal)
    if signals < problem.features:
        return 1, near(problem.features, signals)
    return near(problem.batch, signals / problem.features), problem.features


def monarch(problem: Problem, side: int, piece: int | None = None) -> _Form:
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
        piece,
    )


def fft(problem: Problem, piece: int | None = None) -> _Form:
    """By jnp.fft."""
    n = problem.n if problem.exact else smooth(problem.n)
    return _Form(
        lambda x: jnp.fft.rfft(x, n)[..., : problem.keep],
        lambda s, size: jnp.fft.irfft(s, n)[..., :size],
        lambda a, b, conjugate=False: a * (jnp.conj(b) if conjugate else b),
        lambda s: jnp.sum(s, axis=0, keepdims=True),
        lambda s: s,
        piece,
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
        few = [d for d in range(1, min(n, _LARGEST) + 1) if n % d == 0]
        cuts = [(p, q) for q in {*few, n} for p in few if n % (p * q) == 0]
        grids = [Grid(n // (p * q), q, False, keep, p) for p, q in cuts]
    else:
        cuts = [(p, q) for q in _COLUMNS for p in (1, *_COLUMNS) if p * q < 2 * n]
        grids = [Grid(2 * -(-n // (2 * p * q)), q, True, None, p) for p, q in cuts]
    return min(grids, key=lambda grid: _cost(grid, signal, out, side))


def _cost(grid, signal, out, side):
    """Multiply-adds of a transform and an inverse, each side filled up to ``side``."""
    up = lambda size: -(-size // side) * side
    rows, columns, middle = grid.rows, len(grid.columns), 0
    first = up(2 * rows) * sum(up(-(-size // grid.n2)) for size in (signal, out))
    last = 2 * rows * grid.p * up(2 * grid.q) * up(2 * columns)
    if grid.p > 1:
        middle = 2 * rows * grid.q * (up(2 * grid.p) ** 2 + _PASS * 2 * grid.p)
    passes = _PASS * 2 * rows * (grid.n2 + grid.p * columns)
    return first * grid.n2 + middle + last + passes


def divides_well(n: int, signal: int, taps: int, keep: int | None) -> bool:
    """Whether a grid of exactly n is about as good as one of free size."""
    least = signal + taps - 1
    free = _choose_grid(least, False, signal, least, None, 1)
    exact = _choose_grid(n, True, signal, signal, keep, 1)
    return _cost(exact, signal, signal, 1) <= 2 * _cost(free, signal, least, 1)


def prefers_fft(problem: Problem) -> bool:
    """Whether jnp.fft is the faster form on a CPU.

    A static rule, from lengths 256 to 65536: up to 2048 entries with their zeros the
    products are as fast or faster, forward and backward.
    """
    return problem.n > 2048
