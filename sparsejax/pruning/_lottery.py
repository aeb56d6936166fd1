"""Iterative magnitude pruning with rewinding: lottery tickets."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsejax import masks as masks_lib
from sparsejax.pruning._scores import check_finite
from sparsejax.transforms._leaves import LeafFilter, select_leaves, tree_with_holes
from sparsejax.transforms._shared import density_from

Train = Callable[[Any, Any, int], Any]
_REWINDS = ("weights", "learning_rate")


class IterativeMagnitudeState(NamedTuple):
    """Where iterative magnitude pruning stands between two rounds: arrays only."""

    round: Any  # rounds finished; shape=(), dtype=int32
    masks: Any  # under which the last round trained; all True before the first
    params: Any  # at the end of the last round; the initial ones before the first
    rewind_params: Any  # at the rewind step of the dense round


class IterativeMagnitude(NamedTuple):
    """What `iterative_magnitude` found: one entry for each round it ran."""

    masks: tuple[Any, ...]  # of each round; the first round is dense
    params: tuple[Any, ...]  # trained under those masks
    state: IterativeMagnitudeState  # to go on from


def iterative_magnitude_init(
    params: Any, *, leaf_filter: LeafFilter = None
) -> IterativeMagnitudeState:
    """State before the first round.

    Args:
      params: Initial parameters, a tree of arrays.
      leaf_filter: Which leaves are pruned, as in `transforms.sparsify`.

    Returns:
      An `IterativeMagnitudeState` with masks that keep everything.

    Raises:
      ValueError: The filter matches nothing.

    Example:
      >>> state = iterative_magnitude_init({"w": jnp.ones((2, 3)), "b": jnp.ones(3)})
      >>> print(state.round, state.masks["w"].sum(), state.masks["b"])
      0 6 MaskedNode()
    """
    leaves = select_leaves(params, leaf_filter)
    masks = {name: jnp.ones(leaf.shape, bool) for name, leaf in leaves.items()}
    return IterativeMagnitudeState(
        round=jnp.zeros((), jnp.int32),
        masks=tree_with_holes(params, masks),
        params=params,
        rewind_params=params,
    )


def iterative_magnitude_round(
    state: IterativeMagnitudeState,
    train: Train,
    *,
    fraction: float = 0.2,
    rewind: str = "weights",
    rewind_step: int = 0,
) -> IterativeMagnitudeState:
    r"""One round: prune, rewind, train.

    .. math:: m_r = \mathrm{top}_{k_r}(|w_{r-1}|, m_{r-1}), \quad
      k_r = \mathrm{round}((1 - p)^r \, n)

    over all chosen leaves together, where :math:`w_{r-1}` are the weights at the end
    of the round before. Round 0 prunes nothing and trains from the start. Every
    later round trains from the rewind step, from the weights that round 0 had there
    (`rewind="weights"`) or from those that the round before ended with
    (`rewind="learning_rate"`), in both cases zero where pruned. Leaves without a
    mask, such as biases, are rewound with the others. Runs on the host; `train` may
    be jitted. Costs one training and a few passes over the weights.

    Args:
      state: What `iterative_magnitude_init` or the round before returned.
      train: `(params, masks, start_step) -> params` at the end of training. It trains
        from `start_step` (which sets the learning rate and the data) and keeps
        weights zero where a mask is False, for instance by `transforms.sparsify`.
        It may return `(params, params_at_rewind)`, and must in round 0 to rewind
        weights to a step after the first; what it returns for the second later is
        not looked at.
      fraction: p, the share of the kept weights that a round prunes, in [0, 1].
      rewind: "weights" or "learning_rate".
      rewind_step: Where later rounds start; 0 is the initialization.

    Returns:
      The next state: its masks are those the round trained under, its params what
      the training returned.

    Raises:
      ValueError: `fraction` is outside [0, 1], `rewind` is unknown, `rewind_step` is
        negative, `train` returns another tree or lacks the params at the rewind
        step, or a weight to be compared is NaN or infinite.

    Example:
      >>> state = iterative_magnitude_init({"w": jnp.array([[4.0, 1.0, 3.0, 2.0]])})
      >>> train = lambda params, masks, start_step: params
      >>> for _ in range(3):
      ...     state = iterative_magnitude_round(state, train, fraction=0.5)
      ...     print(state.params["w"])
      [[4. 1. 3. 2.]]
      [[4. 0. 3. 0.]]
      [[4. 0. 0. 0.]]

    References:
      Frankle and Carbin, `The Lottery Ticket Hypothesis
      <https://arxiv.org/abs/1803.03635>`_, 2019.

      Frankle et al., `Linear Mode Connectivity and the Lottery Ticket Hypothesis
      <https://arxiv.org/abs/1912.05671>`_, 2020.

      Renda et al., `Comparing Rewinding and Fine-tuning in Neural Network Pruning
      <https://arxiv.org/abs/2003.02389>`_, 2020.
    """
    density = density_from(fraction, "fraction")
    if rewind not in _REWINDS:
        raise ValueError(f"rewind must be one of {_REWINDS}, got {rewind!r}")
    if rewind_step < 0:
        raise ValueError(f"rewind_step must be at least 0, got {rewind_step}")
    round = int(state.round)
    masks = _prune(state, Fraction(repr(density)) ** round)
    from_the_end = round == 0 or rewind == "learning_rate"
    start = state.params if from_the_end else state.rewind_params
    start = masks_lib.apply_masks(start, masks)
    out = train(start, masks, rewind_step if round else 0)
    params, at_rewind = _split(out, state.params)

    rewind_params = state.rewind_params
    if round == 0 and rewind_step > 0:
        if at_rewind is not None:
            rewind_params = at_rewind
        elif rewind == "weights":
            raise ValueError(
                "train must return (params, params_at_rewind) in the first round to "
                f"rewind weights to step {rewind_step}, got params alone"
            )
    return IterativeMagnitudeState(state.round + 1, masks, params, rewind_params)


def iterative_magnitude(
    train: Train,
    params: Any,
    *,
    rounds: int,
    fraction: float = 0.2,
    rewind: str = "weights",
    rewind_step: int = 0,
    leaf_filter: LeafFilter = None,
    state: IterativeMagnitudeState | None = None,
) -> IterativeMagnitude:
    r"""Finds lottery tickets: trains, prunes the smallest, rewinds, and again.

    Runs `iterative_magnitude_round` until the masks keep :math:`(1 - p)^R` of the
    weights: one dense round and R with ever fewer. To survive an interruption save
    the state after each round and go on with `state=`, or write this loop, which
    is two lines, around the round. Costs R + 1 trainings, less what rewinding to a
    late step saves.

    Args:
      train: `(params, masks, start_step) -> params` or `(params,
        params_at_rewind)`, as in `iterative_magnitude_round`.
      params: Initial parameters, a tree of arrays.
      rounds: R, how many times to prune.
      fraction: p, the share of the kept weights that a round prunes; the papers'
        0.2.
      rewind: "weights": to those of the rewind step, the lottery ticket.
        "learning_rate": keeps the trained weights and rewinds the schedule alone,
        which is as accurate and finds no ticket.
      rewind_step: Where later rounds start. 0 finds tickets in small networks only;
        larger ones need an early step, 0.1% to 7% of training.
      leaf_filter: Which leaves are pruned, as in `transforms.sparsify`.
      state: State of an interrupted run, which is continued; `params` and
        `leaf_filter` then have no effect.

    Returns:
      An `IterativeMagnitude`: masks and trained params of every round this call ran,
      R + 1 if it was not resumed, and the last state.

    Raises:
      ValueError: `rounds` is negative; and as `iterative_magnitude_round`.

    Example:
      >>> train = lambda params, masks, start_step: params
      >>> params = {"w": jnp.arange(1.0, 11.0).reshape(2, 5)}
      >>> result = iterative_magnitude(train, params, rounds=3)
      >>> [int(masks["w"].sum()) for masks in result.masks]
      [10, 8, 6, 5]

    References:
      Frankle and Carbin, `The Lottery Ticket Hypothesis
      <https://arxiv.org/abs/1803.03635>`_, 2019.

      Renda et al., `Comparing Rewinding and Fine-tuning in Neural Network Pruning
      <https://arxiv.org/abs/2003.02389>`_, 2020.
    """
    if rounds < 0:
        raise ValueError(f"rounds must be at least 0, got {rounds}")
    if state is None:
        state = iterative_magnitude_init(params, leaf_filter=leaf_filter)
    masks, trained = [], []
    while int(state.round) <= rounds:
        state = iterative_magnitude_round(
            state, train, fraction=fraction, rewind=rewind, rewind_step=rewind_step
        )
        masks.append(state.masks)
        trained.append(state.params)
    return IterativeMagnitude(tuple(masks), tuple(trained), state)


def _prune(state: IterativeMagnitudeState, density: Fraction) -> Any:
    """Masks of the largest weights among those still kept."""
    masks = masks_lib.named_leaves(state.masks)
    weights = masks_lib.named_leaves(masks_lib.apply_masks(state.params, state.masks))
    scores = {name: jnp.abs(weights[name]) for name in masks}
    check_finite(scores)
    count = round(density * sum(mask.size for mask in masks.values()))
    kept = masks_lib.global_topk_masks(scores, count, where=masks)
    return tree_with_holes(state.params, kept)


def _split(out: Any, like: Any) -> tuple[Any, Any]:
    """What training returned, as (params, params at the rewind step or None)."""
    structure = jax.tree.structure(like)
    if jax.tree.structure(out) == structure:
        return out, None
    if isinstance(out, tuple) and len(out) == 2:
        if all(jax.tree.structure(tree) == structure for tree in out):
            return out
    raise ValueError(
        f"train must return params like its argument, {structure}, or a pair of such, "
        f"got {jax.tree.structure(out)}"
    )
