"""Learning rates of the factors of structured weights."""

import re
from typing import Any

import jax
import optax

from sparsejax import masks as masks_lib
from sparsejax.structured import Chain, Pattern

_FACTOR = re.compile(r"factor_(\d+)")


def scale_by_factors(*, low_rank: bool = False) -> optax.GradientTransformation:
    r"""Gives each factor of a structured weight its share of a dense learning rate.

    .. math:: u_i \leftarrow \frac{d}{c_i \, p} \, u_i

    where the dense weight takes d inputs, each block of factor i of p takes
    :math:`c_i`, the rank among them. Under Adam a matrix of n inputs wants a rate
    proportional to 1 / n, and p factors that move at once each want a p-th of it: so
    the rate that was right for the dense layer is right for the chain. Put it after the
    optimizer, whose decay it then scales as well. Other leaves pass as they are.
    Costs one product per entry of a factor.

    Factors are known by name and shape: leaves ``factor_0``, ``factor_1``, ... side by
    side, each ``[a, d, c, b]``, as the modules name them, with axes of stacked layers
    before. d is what ``factor_0`` takes, padding included.

    Args:
      low_rank: Whether leaves ``down [d, r]`` and ``up [r, n]`` side by side are
        factors too, of a low-rank weight. Not by default, since a feed-forward layer
        may call its two matrices so.

    Returns:
      An `optax.GradientTransformation` without state; it keeps the updates' dtypes.

    Raises:
      ValueError: At `init`: no leaf is a factor; factors side by side have a number
        missing, fewer than four axes, or do not follow each other.

    Example:
      >>> chain = sparsejax.structured.monarch(16, 16, blocks=4, rank=2)
      >>> params = {f"factor_{i}": jnp.ones(p.factor_shape)
      ...           for i, p in enumerate(chain.patterns)}
      >>> tx = optax.chain(optax.sgd(1.0), scale_by_factors())
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> print([float(u.min()) for u in updates.values()])  # 16 / 4 / 2, 16 / 8 / 2
      [-2.0, -1.0]

    References:
      Qiu et al., `Compute Better Spent: Replacing Dense Layers with Structured Matrices
      <https://arxiv.org/abs/2406.06248>`_, 2024.
    """

    def init_fn(params):
        if jax.tree.leaves(params) and not _scales(params, low_rank):
            raise ValueError(
                "params must have leaves named factor_0, factor_1, ..., got "
                f"{list(masks_lib.named_leaves(params))}"
            )
        return optax.EmptyState()

    def update_fn(updates, state, params=None):
        del params
        scales = _scales(updates, low_rank)

        def scaled(path, update):
            scale = scales.get(masks_lib.path_name(path))
            return update if scale is None else update * scale

        return jax.tree_util.tree_map_with_path(scaled, updates), state

    return optax.GradientTransformation(init_fn, update_fn)


def _scales(tree: Any, low_rank: bool) -> dict[str, float]:
    """d / (c p) of every leaf that is a factor."""
    chains: dict[str, dict[int, Any]] = {}
    leaves = masks_lib.named_leaves(tree)
    for name, leaf in leaves.items():
        parent, _, last = name.rpartition("/")
        if found := _FACTOR.fullmatch(last):
            chains.setdefault(parent, {})[int(found[1])] = leaf
    scales: dict[str, float] = {}
    for parent, factors in chains.items():
        prefix = f"{parent}/" if parent else ""
        patterns = _patterns(prefix, factors)
        for i, pattern in enumerate(patterns):
            scale = patterns[0].in_size / pattern.c / len(patterns)
            scales[f"{prefix}factor_{i}"] = scale
    if low_rank:
        for name, down in leaves.items():
            parent, slash, last = name.rpartition("/")
            up = leaves.get(f"{parent}{slash}up")
            if last == "down" and up is not None:
                d, r = down.shape[-2:]
                scales[name] = 1 / 2
                scales[f"{parent}{slash}up"] = d / r / 2
    return scales


def _patterns(prefix, factors):
    """Patterns of the factors side by side, by their last four axes."""
    if sorted(factors) != list(range(len(factors))):
        raise ValueError(
            f"params must have factors 0 to {len(factors) - 1} at {prefix!r}, got "
            f"{sorted(factors)}"
        )
    for i, leaf in factors.items():
        if leaf.ndim < 4:
            raise ValueError(
                f"{prefix}factor_{i} must have shape [..., a, d, c, b], got "
                f"{leaf.shape}"
            )
    shapes = [factors[i].shape[-4:] for i in range(len(factors))]
    patterns = tuple(Pattern(a=a, b=b, c=c, d=d) for a, d, c, b in shapes)
    Chain(patterns, patterns[0].in_size, patterns[-1].out_size)  # they follow
    return patterns
