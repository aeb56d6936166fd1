"""Condensed N:M weights: the kept values, and where in its group each one stood.

Of every m consecutive entries of a column of ``w [k, p]`` (k, the contraction axis) n
are kept. With g a group and j counting its kept entries in rising order of their place,

    values[g * n + j, c] = w[g * m + i, c],  i = the j-th kept place, in [0, m)

so ``values`` is ``[k * n / m, p]``. The places take 2 bits each for m <= 4, 4 bits for
m <= 16, 8 bits for m <= 256, packed down the columns into 32-bit words: row r of
``values`` has its place in word ``r // per``, per = 32 / bits, from bit ``bits * (r %
per)`` on. ``indices`` is uint32 ``[ceil(k * n / m / per), p]``, the last word filled up
with zeros. A 2:4 weight takes 9 / 16 of the dense bytes in bfloat16, 17 / 32 in
float32.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify
from jaxtyping import Array, Float, Shaped, UInt


def condense_nm(
    w: Shaped[Array, "..."],
    mask: Shaped[Array, "..."] | Shaped[np.ndarray, "..."],
    *,
    n: int,
    m: int,
) -> tuple[Float[Array, "kept p"], UInt[Array, "words p"]]:
    """Takes the kept entries out of a weight whose mask is N:M.

    ``values[g * n + j, c] = w[g * m + i, c]``, i being the j-th kept place of group g
    in column c. A group that keeps fewer than n is filled up with explicit zeros at its
    first pruned places: they are entries of the condensed weight like the others, and
    get gradients. Costs a few passes over ``w``. Differentiable in w.

    Args:
      w: Weight ``[k, p]``, k the contraction axis.
      mask: Boolean ``[k, p]``, True = kept. Where it is traced, more than n kept in a
        group cannot be refused: the last ones are lost.
      n: How many of each group are KEPT, at least 1.
      m: Group size, at most 256; divides k.

    Returns:
      (values ``[k * n / m, p]``, dtype of w; indices, packed, uint32
      ``[ceil(k * n / m * bits / 32), p]``, bits = 2, 4 or 8 for m <= 4, 16, 256).

    Raises:
      ValueError: n > m or either is out of range; m does not divide k; the mask is not
        boolean and shaped like w; a concrete mask keeps more than n in a group.

    Example:
      >>> w = jnp.array([[1.0], [2.0], [3.0], [4.0]])
      >>> mask = jnp.array([[False], [True], [False], [True]])
      >>> values, indices = sparsejax.layouts.condense_nm(w, mask, n=2, m=4)
      >>> print(values[:, 0], indices)  # places 1 and 3: 1 + (3 << 2)
      [2. 4.] [[13]]

    References:
      Mishra et al., `Accelerating Sparse Deep Neural Networks
      <https://arxiv.org/abs/2104.08378>`_, 2021.
    """
    index_bits(n, m)
    if w.ndim != 2 or w.shape[0] % m:
        raise ValueError(
            f"w: got shape {w.shape}, needed [k, p] with k a multiple of m={m}"
        )
    if mask.shape != w.shape or mask.dtype != np.bool_:
        raise ValueError(
            f"mask: got {mask.dtype} {mask.shape}, needed bool {w.shape} as w"
        )
    k, p = w.shape
    groups = (k // m, m, p)
    if not isinstance(mask, jax.core.Tracer):
        kept = np.asarray(mask).reshape(groups).sum(1)
        if (kept > n).any():
            group, column = (int(i) for i in np.argwhere(kept > n)[0])
            raise ValueError(
                f"mask: column {column} keeps {kept[group, column]} of rows "
                f"{group * m} to {group * m + m - 1}, needed at most n={n} of every "
                f"m={m}"
            )
    mask = jnp.asarray(mask).reshape(groups)
    pruned = ~mask
    missing = n - jnp.sum(mask, axis=1, dtype=jnp.int32, keepdims=True)
    taken = mask | (pruned & (jnp.cumsum(pruned, axis=1, dtype=jnp.int32) <= missing))
    rank = jnp.cumsum(taken, axis=1, dtype=jnp.int32) - 1
    place = jax.lax.broadcasted_iota(jnp.int32, groups, 1)
    places = jnp.stack(
        [
            jnp.sum(jnp.where(taken & (rank == j), place, 0), axis=1, dtype=jnp.int32)
            for j in range(n)
        ],
        axis=1,
    )
    kept = jnp.where(mask, w.reshape(groups), jnp.zeros((), w.dtype))
    values = jnp.take_along_axis(kept, places, axis=1)
    rows = k // m * n
    return values.reshape(rows, p), pack_nm(places.reshape(rows, p), m=m)


def expand_nm(
    values: Shaped[Array, "..."], indices: Shaped[Array, "..."], *, n: int, m: int
) -> Float[Array, "k p"]:
    """Puts condensed values back into a dense weight of zeros.

    ``w[g * m + i, c] = values[g * n + j, c]`` where i is the place of entry j. One
    pass; m comparisons per value. Differentiable in values.

    Args:
      values: ``[k * n / m, p]``.
      indices: Their packed places, as ``condense_nm`` makes them.
      n: How many of each group are kept.
      m: Group size.

    Returns:
      w ``[k, p]``, dtype of values.

    Raises:
      ValueError: n > m or either is out of range; shapes or dtypes do not fit; concrete
        indices are not valid (``check_nm``).

    Example:
      >>> values = jnp.array([[2.0], [4.0]])
      >>> indices = jnp.array([[13]], jnp.uint32)
      >>> print(sparsejax.layouts.expand_nm(values, indices, n=2, m=4)[:, 0])
      [0. 2. 0. 4.]
    """
    check_condensed(values, indices, n, m)
    return expand(values, indices, n, m)


def expand(values: Array, indices: Array, n: int, m: int) -> Array:
    """``expand_nm`` of operands known to be valid."""
    rows, p = values.shape
    split = lambda a: a.reshape(rows // n, n, 1, p)
    values, places = split(values), split(unpack_nm(indices, rows, m=m))
    place = jax.lax.broadcasted_iota(places.dtype, (1, m, 1), 1)
    w = jnp.zeros((rows // n, m, p), values.dtype)
    for j in range(n):
        w = jnp.where(places[:, j] == place, values[:, j], w)
    return w.reshape(rows // n * m, p)


def pack_nm(places: Shaped[Array, "..."], *, m: int) -> UInt[Array, "words p"]:
    """Packs places inside groups of m, several to a 32-bit word, down the columns.

    Args:
      places: Integers ``[rows, p]`` in [0, m); row r goes with row r of the values.
      m: Group size: 2 bits each for m <= 4, 4 bits for m <= 16, 8 bits for m <= 256.

    Returns:
      uint32 ``[ceil(rows / per), p]``, per = 32 / bits; lowest bits first.

    Example:
      >>> print(sparsejax.layouts.pack_nm(jnp.array([[1], [3], [2]]), m=4))
      [[45]]
    """
    bits = index_bits(1, m)
    per = 32 // bits
    rows, p = places.shape
    places = jnp.pad(places.astype(jnp.uint32), [(0, -rows % per), (0, 0)])
    places = places.reshape(-1, per, p)
    words = jnp.zeros((places.shape[0], p), jnp.uint32)
    for field in range(per):
        words = words | (places[:, field] << jnp.uint32(bits * field))
    return words


def unpack_nm(
    indices: Shaped[Array, "..."], rows: int, *, m: int
) -> UInt[Array, "rows p"]:
    """The inverse of ``pack_nm``.

    Args:
      indices: uint32 ``[words, p]``.
      rows: How many places there are: rows of the values.
      m: Group size.

    Returns:
      uint32 ``[rows, p]``.

    Example:
      >>> words = jnp.array([[45]], jnp.uint32)
      >>> print(sparsejax.layouts.unpack_nm(words, 3, m=4)[:, 0])
      [1 3 2]
    """
    bits = index_bits(1, m)
    shift = jnp.arange(0, 32, bits, dtype=jnp.uint32)[:, None]
    places = (indices[:, None] >> shift) & jnp.uint32(2**bits - 1)
    return places.reshape(-1, indices.shape[1])[:rows]


def check_nm(indices: Shaped[Array, "..."], rows: int, *, n: int, m: int) -> None:
    """Raises where packed places are not below m or do not rise inside a group.

    Args:
      indices: uint32 ``[words, p]``, concrete, or traced inside a function that
        ``checkify.checkify`` wraps: the check is then part of its error value.
      rows: Rows of the values.
      n: How many of each group are kept.
      m: Group size.

    Raises:
      ValueError: Concrete places are not valid. The message names the first bad group.
    """
    if isinstance(indices, jax.core.Tracer):
        checkify.check(
            ~jnp.any(_faults(indices, rows, n, m)),
            "indices: a place is out of range, out of order or repeated in its group",
        )
        return
    if not getattr(indices, "is_fully_addressable", True):
        return  # no host has all of them
    # Also while something else is traced: these are constants there.
    with jax.ensure_compile_time_eval():
        faults = _faults(np.asarray(indices), rows, n, m)
        if not bool(jnp.any(faults)):
            return
        group, column = (int(i) for i in np.argwhere(np.asarray(faults))[0])
        places = unpack_nm(jnp.asarray(np.asarray(indices)), rows, m=m)
        found = [int(i) for i in np.asarray(places)[group * n : group * n + n, column]]
    raise ValueError(
        f"indices: group {group} of column {column} has places {found}, needed {n} "
        f"rising ones below m={m}"
    )


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _faults(indices: Any, rows: int, n: int, m: int) -> Any:
    """Which groups ``[k / m, p]`` are not valid."""
    places = unpack_nm(jnp.asarray(indices), rows, m=m)
    places = places.reshape(rows // n, n, -1)
    rising = jnp.all(places[:, 1:] > places[:, :-1], axis=1)
    return ~rising | (places[:, -1] >= m)


def check_condensed(values: Any, indices: Any, n: int, m: int) -> None:
    """Raises ValueError unless values and indices belong together."""
    bits = index_bits(n, m)
    if values.ndim != 2 or values.shape[0] % n:
        raise ValueError(
            f"values: got shape {values.shape}, needed [k * n / m, p], a multiple of "
            f"n={n} rows"
        )
    rows, p = values.shape
    wanted = (-(-rows * bits // 32), p)
    if indices.shape != wanted or indices.dtype != jnp.uint32:
        raise ValueError(
            f"indices: got {indices.dtype} {indices.shape}, needed uint32 {wanted}: "
            f"places of values {values.shape}, {bits} bits each, in words of 32"
        )
    abstract = (jax.core.Tracer, jax.ShapeDtypeStruct)
    if rows and p and not isinstance(indices, abstract):
        check_nm(indices, rows, n=n, m=m)


def index_bits(n: int, m: int) -> int:
    """Bits that the place of a kept entry takes; ValueError unless n:m exists."""
    if not 1 <= n <= m <= 256:
        raise ValueError(
            f"n, m: got {n}:{m}, needed 1 <= n <= m <= 256, n KEPT of every m"
        )
    return 2 if m <= 4 else 4 if m <= 16 else 8
