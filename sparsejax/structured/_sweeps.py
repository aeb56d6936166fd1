"""A matrix as a chain of factors, split off one after the other from either end.

Each slice of a product of two is decomposed on its own; ``_project`` says which.
"""

import jax.numpy as jnp

from sparsejax.structured._composite import composite, ranks_of


def from_first(w, patterns):
    """Factors, all but the last of orthonormal columns, and the squares cut off.

    Also w, and what of it is left for the others after each but the last.
    """
    factors, lost, stages = [], 0, []
    for t, rank in enumerate(ranks_of(patterns), 1):
        one, rest = patterns[t - 1], composite(patterns[t:])
        stages.append(w)
        factor, values, w, cut = _split(w, one, rest, rank)
        w = _times_rows(w, values)
        factors.append(factor)
        lost += cut
    return [*factors, w], lost, stages


def from_last(w, patterns):
    """The same from the other end: as if all but the first had orthonormal rows."""
    factors, lost, stages = [], 0, []
    for t, rank in reversed(list(enumerate(ranks_of(patterns), 1))):
        one = composite(patterns[:t])
        stages.insert(0, w)
        w, values, factor, cut = _split(w, one, patterns[t], rank)
        w = _times_columns(w, values)
        factors.insert(0, factor)
        lost += cut
    return _scaled_to_last([w, *factors], patterns), lost, stages


def back(stages, patterns):
    """As ``from_first`` left it, each two factors decomposed anew among the others.

    From the last on; never worse than it was. The factors, and the squares cut off.
    """
    factors = []
    for t, rank in reversed(list(enumerate(ranks_of(patterns), 1))):
        two = stages[t - 1]
        for n, factor in reversed(list(enumerate(factors, t + 1))):
            two = _before(two, composite(patterns[t - 1 : n]), patterns[n], factor)
        first, values, factor, _ = _split(two, patterns[t - 1], patterns[t], rank)
        first = _times_columns(first, values)
        factors.insert(0, factor)
    return _scaled_to_last([first, *factors], patterns), _missing(stages[0], first)


def forth(stages, patterns):
    """The same of what ``from_last`` left, from the first on."""
    factors = []
    for t, rank in enumerate(ranks_of(patterns), 1):
        two = stages[t - 1]
        for n, factor in enumerate(factors):
            two = _after(two, patterns[n], composite(patterns[n + 1 : t + 1]), factor)
        factor, values, last, _ = _split(two, patterns[t - 1], patterns[t], rank)
        last = _times_rows(last, values)
        factors.append(factor)
    return [*factors, last], _missing(stages[-1], last)


def _missing(w, kept):
    """Squares that w has more. Where these are few, rounding's: then infinite."""
    total = squares(w)
    lost = total - squares(kept)
    return jnp.where(lost > 1e-3 * total, lost, jnp.inf)


def _scaled_to_last(factors, patterns):
    """The same product; all but the last have columns of length 1."""
    for t, after in enumerate(patterns[1:]):
        norm = _rows_of_next(jnp.linalg.norm(factors[t], axis=2), after)
        factors[t] = _times_columns(factors[t], 1 / jnp.where(norm == 0, 1, norm))
        factors[t + 1] = _times_rows(factors[t + 1], norm)
    return factors


def _split(w, one, rest, rank):
    """[a, d, c, b] of both in two, and the squares cut off.

    The first is of orthonormal columns, the other of orthonormal rows; between them are
    the singular values of each row of the other, [a, d, c].
    """
    i, u, k, v = rest.a, one.a // rest.a, one.d, rest.d // one.d
    w = w.reshape(i, k, u, one.c, rest.b, v).transpose(0, 2, 1, 5, 3, 4)
    left, values, right = jnp.linalg.svd(w, full_matrices=False)  # [i, u, k, v, ...]
    more = max(0, rank - values.shape[-1])  # of a rank that no slice can have
    ends = lambda *last: [(0, 0)] * 4 + list(last)
    left = jnp.pad(left[..., :rank], ends((0, 0), (0, more)))
    right = jnp.pad(right[..., :rank, :], ends((0, more), (0, 0)))
    kept = jnp.pad(values[..., :rank], ends((0, more)))
    left = left.transpose(0, 1, 2, 4, 5, 3).reshape(one.factor_shape)
    right = right.transpose(0, 3, 2, 1, 4, 5).reshape(rest.factor_shape)
    kept = kept.transpose(0, 3, 2, 1, 4).reshape(rest.factor_shape[:3])
    return left, kept, right, squares(values[..., rank:])


def _before(w, one, rest, right):
    """What w, as ``_split`` takes it, is before a factor of orthonormal rows."""
    i, u, k, v = rest.a, one.a // rest.a, one.d, rest.d // one.d
    w = w.reshape(i, k, u, one.c, rest.b, v)
    right = right.reshape(i, v, k, u, one.b // v, rest.b)
    left = jnp.einsum("ikucov,ivkuro->iukcrv", w, right.conj())
    return left.reshape(one.factor_shape)


def _after(w, one, rest, left):
    """What it is after a factor of orthonormal columns."""
    i, u, k, v = rest.a, one.a // rest.a, one.d, rest.d // one.d
    w = w.reshape(i, k, u, one.c, rest.b, v)
    left = left.reshape(i, u, k, one.c, one.b // v, v)
    right = jnp.einsum("iukcrv,ikucov->ivkuro", left.conj(), w)
    return right.reshape(rest.factor_shape)


def _times_rows(factor, numbers):
    """Each row [a, d, c] times its number."""
    return factor * numbers.astype(factor.dtype)[..., None]


def _times_columns(factor, numbers):
    """Each column times the number of the next factor's row that it is, [a, d, c]."""
    a, d, _, b = factor.shape
    columns = numbers.transpose(0, 2, 1).reshape(a, b, d).transpose(0, 2, 1)
    return factor * columns.astype(factor.dtype)[:, :, None, :]


def _rows_of_next(columns, after):
    """Numbers of a factor's columns [a, d, b] as those of the next one's rows."""
    rows = columns.transpose(0, 2, 1).reshape(after.a, after.c, after.d)
    return rows.transpose(0, 2, 1)


def balanced(factors):
    """Moves scale of the last to those before, so that all of p have the p-th root."""
    for t in reversed(range(1, len(factors))):
        moved = jnp.linalg.norm(factors[t], axis=-1) ** (t / (t + 1))  # of each row
        factors[t] = _times_rows(factors[t], 1 / jnp.where(moved == 0, 1, moved))
        factors[t - 1] = _times_columns(factors[t - 1], moved)
    return factors


def once(number, w):
    """w, when the number is known, so that one decomposition follows another.

    XLA's CPU runs what is independent at the same time, and batches of LAPACK's that
    do wait for threads that the other one holds, for ever.
    """
    return w * jnp.where(jnp.isnan(number), number, 1).astype(w.dtype)


def squares(w):
    return jnp.sum(jnp.real(w) ** 2 + jnp.imag(w) ** 2)
