"""Patterns of products of factors that follow one another, and the ranks of slices."""

import itertools
from collections.abc import Sequence

from sparsejax.structured._pattern import Chain, Pattern


def composite(patterns: Sequence[Pattern]) -> Pattern:
    """The pattern of the product of factors that follow one another."""
    first, last = patterns[0], patterns[-1]
    return Pattern(
        a=last.a,
        b=last.b * (last.d // first.d),
        c=first.c * (first.a // last.a),
        d=first.d,
    )


def ranks_of(patterns: Sequence[Pattern]) -> tuple[int, ...]:
    """The rank of the slices of the product of each factor and the next.

    Raises:
      ValueError: There is no one rank of such slices.
    """
    for one, two in itertools.pairwise(patterns):
        if one.a % two.a or two.d % one.d or two.c * two.a % one.a:
            raise ValueError(
                f"chain: got {two} after {one}, whose product has no slices of one "
                "rank; needed an a that divides the one before, a d that is divided by "
                "the one before, and c * a divided by the a before"
            )
    return tuple(two.c * two.a // one.a for one, two in itertools.pairwise(patterns))


def with_rank(chain: Chain, rank: int | Sequence[int] | None) -> Chain:
    """The chain with other ranks between its factors.

    Raises:
      ValueError: The chain has no ranks, or none such.
    """
    old = ranks_of(chain.patterns)
    if rank is None:
        return chain
    ranks = (rank,) * max(1, len(old)) if isinstance(rank, int) else tuple(rank)
    if len(ranks) != len(old):
        raise ValueError(
            f"rank: got {rank} for a chain of {len(old) + 1}, needed one for each two "
            "of its factors"
        )
    for t, r in enumerate(ranks, 1):
        rows = composite(chain.patterns[:t]).c
        columns = composite(chain.patterns[t:]).b
        if not 1 <= r <= min(rows, columns):
            raise ValueError(
                f"rank: got {r}, needed 1 to {min(rows, columns)}, the smaller side of "
                f"a block of {rows}x{columns}"
            )
    patterns = tuple(
        Pattern(a=p.a, b=p.b // a_old * a_new, c=p.c // b_old * b_new, d=p.d)
        for p, b_old, b_new, a_old, a_new in zip(
            chain.patterns, (1, *old), (1, *ranks), (*old, 1), (*ranks, 1), strict=True
        )
    )
    return Chain(patterns, chain.in_size, chain.out_size)


def digits_of(patterns):
    """Of inputs and outputs of the chain: outer copies, digits, inner copies."""
    first, last = patterns[0], patterns[-1]
    pairs = list(itertools.pairwise(patterns))
    inputs = [*(one.a // two.a for one, two in pairs[::-1]), first.c]
    outputs = [last.b, *(two.d // one.d for one, two in pairs[::-1])]
    return (last.a, inputs, first.d), (last.a, outputs, first.d)
