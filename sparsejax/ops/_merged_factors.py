"""Factors that follow each other, multiplied together first where that is quicker.

A product with blocks of 2 x 2 reads and writes as much as one with a hundred times the
multiply-adds, so ten levels of a butterfly of 1024 entries are two factors with blocks
of 32 x 32 to every backend; of a few rows, one dense matrix or the levels as they are.
"""

import math
from collections.abc import Sequence

import jax

from sparsejax.ops._checks import accumulator
from sparsejax.structured import Pattern, to_dense

# In multiply-adds of a large dense product, measured on a CPU of two cores. That x and
# y of a small product are copied and turned is what makes blocks of 32 no quicker than
# blocks of 64, of which there are half as many.
_COPY = 60  # reading or writing an entry of a row between products
_READ = 6  # reading an entry of a matrix
_STEP = 2**20  # starting a product
_MERGE = 30  # a multiply-add while factors are merged


def merge(factors: Sequence[jax.Array]) -> jax.Array:
    """The one factor that a chain of factors is, of float32 or float64.

    Copies that all of them have side by side, and blocks that all of them interleave,
    stay apart: of factors (a_t, b_t, c_t, d_t) it has a = gcd(a_t) and d = gcd(d_t).
    """
    if len(factors) == 1:
        return factors[0]
    whole = merged_pattern([Pattern.of(factor) for factor in factors])

    def parts(factor):  # [a, d, ...] of [a, d, c, b]: the chain of each block
        a, d, c, b = factor.shape
        cut = factor.reshape(whole.a, a // whole.a, d // whole.d, whole.d, c, b)
        return cut.transpose(0, 3, 1, 2, 4, 5).astype(accumulator(factor.dtype))

    return jax.vmap(jax.vmap(lambda *chain: to_dense(chain)))(*map(parts, factors))


def merged_pattern(patterns: Sequence[Pattern]) -> Pattern:
    """That of the one factor."""
    a, d = (math.gcd(*(getattr(p, name) for p in patterns)) for name in "ad")
    sizes = patterns[-1].out_size, patterns[0].in_size
    b, c = (size // (a * d) for size in sizes)
    return Pattern(a, b, c, d)


def plan(patterns: Sequence[Pattern], rows: int) -> tuple[int, ...]:
    """Lengths of the runs of factors to merge, by the least cost of product and merge.

    Args:
      patterns: Of the chain's factors.
      rows: Of x.
    """
    # Cost and runs of the first so many factors.
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    for end in range(1, len(patterns) + 1):
        ways = [
            (best[start][0] + cost(patterns[start:end], rows), start)
            for start in range(end)
        ]
        least, start = min(ways)
        best.append((least, (*best[start][1], end - start)))
    return best[-1][1]


def cost(patterns: Sequence[Pattern], rows: int) -> float:
    """Of a product with factors merged before, in multiply-adds of a dense product.

    Blocks of a side cost what those of ``block_sparse_matmul`` do.
    """
    p = merged_pattern(patterns)
    side = 2 * p.b * p.c / (p.b + p.c)
    loops = 1.1 + 55 / side + 250 / side**2
    total = math.prod(p.factor_shape) * (rows * loops + _READ) + _STEP
    total += _COPY * rows * (p.in_size + p.out_size)
    if len(patterns) > 1:
        stored = sum(math.prod(p.factor_shape) for p in patterns)
        total += _MERGE * p.c * stored + _STEP * len(patterns)
    return total


def ratio_to_dense(patterns: Sequence[Pattern], rows: int) -> float:
    """Of the time of a product factor by factor, to that with a dense matrix."""
    whole = Pattern(1, patterns[-1].out_size, patterns[0].in_size, 1)
    return sum(cost([p], rows) for p in patterns) / cost([whole], rows)


def prefers_dense(patterns: Sequence[Pattern], rows: int) -> bool:
    """Whether it is quicker to write the whole matrix down, and multiply by that.

    Writing it is a product with the identity, here twice as slow as with rows of x.
    """
    whole = Pattern(1, patterns[-1].out_size, patterns[0].in_size, 1)
    by_factors = lambda rows: sum(cost([p], rows) for p in patterns)
    written = 2 * by_factors(whole.c) + cost([whole], rows)
    return written < by_factors(rows)


def note(patterns: Sequence[Pattern], rows: int) -> str:
    """A line for ``explain`` on what structure saves on a CPU."""
    size = patterns[0].in_size * patterns[-1].out_size
    share = sum(math.prod(p.factor_shape) for p in patterns) / size
    ratio = ratio_to_dense(patterns, rows)
    text = f"{share:.1%} of dense's multiply-adds"
    if ratio < 1:
        return f"{text}, about {ratio:.2f} of its time by the CPU's static rule"
    why = "few rows" if rows < 16 else "small blocks or few of them"
    text = f"{text}, but slower than dense by the CPU's static rule ({ratio:.1f} times)"
    if prefers_dense(patterns, rows):
        text = f"densify and multiply: {text}"
    return f"{text}: {why}"
