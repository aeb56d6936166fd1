"""Orders of the inputs of a chain of factors, in the radices of its indices."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

# A name, an order (an array), or a sequence of these.
Candidates = Any

# Whether each level separates by the last digit, reverses its first part, its others.
_ORDERS = {
    "identity": [(False, False, False)],
    "bit_reversal": [(True, False, False)],
    "default_8": list(itertools.product((False, True), repeat=3)),
}


def candidates(
    given: Candidates | None, dims: tuple[int, Sequence[int], int], argument: str
) -> np.ndarray:
    """The orders ``[candidates, size]`` that are asked for, each of them once.

    Args:
      given: As in ``project``; None is the identity.
      dims: Outer copies, digits from the first on, inner copies; only digits move.
      argument: What to name in errors.

    Raises:
      ValueError: A name is not known, or an array is not a permutation of the indices.
    """
    outer, digits, inner = dims
    size = outer * math.prod(digits) * inner
    given = "identity" if given is None else given
    if isinstance(given, str) or (hasattr(given, "ndim") and given.ndim == 1):
        given = [given]
    found = []
    for each in given:
        if isinstance(each, str):
            if each not in _ORDERS:
                raise ValueError(
                    f"{argument}: got {each!r}, needed {', '.join(_ORDERS)} or an array"
                )
            for moves in _ORDERS[each]:
                index = np.arange(size).reshape(outer, -1, inner)
                found.append(index[:, _order(digits, *moves)].ravel())
        else:
            order = np.asarray(each)
            if not np.array_equal(np.sort(order), np.arange(size)):
                raise ValueError(
                    f"{argument}: got an array of shape {order.shape}, needed each of "
                    f"0 to {size - 1} once, inputs or outputs with their padding"
                )
            found.append(order)
    return np.unique(np.array(found, np.int32), axis=0)


def _order(digits, separate, reverse_first, reverse_others):
    """Moves the parts of the first digit, then within each part those of the next."""
    if not digits:
        return np.arange(1)
    m, size = digits[0], math.prod(digits)
    parts = np.arange(size)
    parts = parts.reshape(-1, m).T if separate else parts.reshape(m, -1)
    parts = parts.copy()
    if reverse_first:
        parts[0] = parts[0, ::-1]
    if reverse_others:
        parts[1:] = parts[1:, ::-1]
    within = _order(digits[1:], separate, reverse_first, reverse_others)
    return parts[:, within].ravel()
