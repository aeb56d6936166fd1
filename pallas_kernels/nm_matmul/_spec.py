"""What the condensed N:M kernels take, and their tile sizes. Pure Python on shapes.

Every backend file has the same two functions. w ``[k, p]`` is the dense matrix that
``values [k * n / m, p]`` and ``words`` stand for: row ``g * n + j`` of values belongs
in row ``g * m + place`` of w, and row r has its place in word ``r // per`` (per = 32 /
``index_bits(m)``) from bit ``index_bits(m) * (r % per)`` on.

``product(x, values, words, *, n, m, transpose, config, interpret)`` -> y
    x       [rows, k], or with ``transpose=True`` [rows, p]; rows >= 1
    values  [k * n / m, p]              dtype of x
    words   uint32 [ceil(k * n / m / per), p]
    y       x @ w, or x @ w.T           dtype of x

``sampled(x, dy, words, *, n, m, dtype, config, interpret)`` -> values
    x       [rows, k]                   dy [rows, p], dtype of x
    values  [k * n / m, p]              x.T @ dy at the places; of ``dtype``

Both accumulate in float32.
"""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Problem:
    """The static facts by which a backend accepts a product and picks its tiles.

    ``op`` is "nm", "nm_transposed" or "nm_sampled"; [k, p] is the dense shape of the
    condensed matrix, in all three.
    """

    op: str
    rows: int
    k: int
    p: int
    n: int
    m: int
    dtype: str
    out_dtype: str

    def __str__(self):
        return (
            f"{self.op}: {self.rows} rows, {self.k}x{self.p} matrix condensed "
            f"{self.n}:{self.m} ({self.n / self.m:.1%} of the entries), {self.dtype}"
        )


def index_bits(m: int) -> int:
    """Bits that the place of a kept entry takes."""
    return 2 if m <= 4 else 4 if m <= 16 else 8


def unit(n: int, m: int) -> tuple[int, int, int]:
    """(rows of values, rows of words, rows of w) of a unit.

    The shortest piece of a column that whole words and whole groups make up.
    """
    per = 32 // index_bits(m)
    values = math.lcm(n, per)
    return values, values // per, values // n * m
