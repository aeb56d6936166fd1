"""SWAMP: particles that share a mask, averaged along training and then together."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsejax import masks as masks_lib


class RunningAverage(NamedTuple):
    """The mean of the weights seen so far: arrays only."""

    averaged_count: Any  # how many were averaged; shape=(), dtype=int32
    averaged_mean: Any  # like params, in float32 or wider


def init_average(params: Any) -> RunningAverage:
    """An average of nothing yet.

    Args:
      params: Tree of floating arrays.

    Returns:
      A `RunningAverage`, 4 bytes per weight (8 for float64).

    Raises:
      ValueError: A leaf is not floating; it is named.

    Example:
      >>> print(init_average({"w": jnp.ones(2, jnp.bfloat16)}).averaged_mean["w"].dtype)
      float32
    """
    _check_floating("params", params)
    zeros = lambda leaf: jnp.zeros(leaf.shape, _sum_dtype(leaf))
    return RunningAverage(jnp.zeros((), jnp.int32), jax.tree.map(zeros, params))


def update_average(
    average: RunningAverage, params: Any, step: Any, *, begin: int, every: int = 1
) -> RunningAverage:
    r"""Stochastic weight averaging: takes the weights of some steps into the mean.

    .. math:: \bar w \leftarrow \bar w + \frac{w - \bar w}{n + 1}

    at the steps `begin`, `begin + every`, ...; at others nothing changes. Call it at
    every step, with the weights after it; it may be in the same jit. Weights that are
    zero whenever they are averaged have a mean of exactly zero. One pass over the
    weights.

    Args:
      average: What `init_average` or the last call returned.
      params: The weights after the step.
      step: Count of finished steps, an int or a traced int32 scalar.
      begin: First step that counts: SWAMP averages over the last part of a round.
      every: Steps between two that count.

    Returns:
      A `RunningAverage`.

    Raises:
      ValueError: `every` is below 1.

    Example:
      >>> average = init_average({"w": jnp.zeros(2)})
      >>> for step, w in enumerate([9.0, 1.0, 2.0]):
      ...     params = {"w": jnp.array([w, 0.0])}
      ...     average = update_average(average, params, step, begin=1)
      >>> print(average.averaged_mean["w"])
      [1.5 0. ]

    References:
      Izmailov et al., `Averaging weights leads to wider optima and better
      generalization <https://arxiv.org/abs/1803.05407>`_, 2018.
    """
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")
    step = jnp.asarray(step, jnp.int32)
    counts = (step >= begin) & ((step - begin) % every == 0)
    count = average.averaged_count + counts.astype(jnp.int32)

    def move(mean, leaf):
        n = jnp.maximum(count, 1).astype(mean.dtype)
        # Divided before the difference, which may be twice what a float holds.
        moved = mean + (leaf.astype(mean.dtype) / n - mean / n)
        return jnp.where(counts, moved, mean)

    return RunningAverage(count, jax.tree.map(move, average.averaged_mean, params))


def averaged_params(average: RunningAverage, params: Any) -> Any:
    """The mean in the dtypes of the weights, or the weights if none was averaged.

    Statistics of batch normalization do not belong to the mean: compute them anew,
    with a pass over training data, for the weights that this returns.

    Args:
      average: What `update_average` returned.
      params: The last weights.

    Returns:
      A tree like `params`.

    Example:
      >>> params = {"w": jnp.ones(2)}
      >>> print(averaged_params(init_average(params), params)["w"])
      [1. 1.]
    """
    some = average.averaged_count > 0
    pick = lambda mean, leaf: jnp.where(some, mean.astype(leaf.dtype), leaf)
    return jax.tree.map(pick, average.averaged_mean, params)


def average_particles(particles: Any, masks: Any = None) -> Any:
    r"""The mean of particles that are stacked along the first axis.

    .. math:: \bar w = \frac1N \sum_{n=1}^N w_n

    in float32 or wider. What is zero in all particles is exactly zero in the mean,
    and equal particles have themselves as their mean.

    Args:
      particles: Tree of floating arrays [N, ...].
      masks: Tree of boolean arrays [...], applied to the mean. None: none.

    Returns:
      A tree of arrays [...], dtypes kept.

    Raises:
      ValueError: A leaf is not floating, or has no particles along a first axis; a mask
        has no leaf at its path, or another shape.

    Example:
      >>> print(average_particles({"w": jnp.array([[1.0, 0.0], [4.0, 0.0]])})["w"])
      [2.5 0. ]

    References:
      Choi et al., `Sparse weight averaging with multiple particles for iterative
      magnitude pruning <https://arxiv.org/abs/2305.14852>`_, 2024.
    """
    _check_floating("particles", particles)
    for name, leaf in masks_lib.named_leaves(particles).items():
        if not leaf.shape or not leaf.shape[0]:
            raise ValueError(
                "particles must have at least one along the first axis of every leaf, "
                f"got {leaf.dtype}{list(leaf.shape)} at {name!r}"
            )

    def mean(leaf):
        wide = leaf.astype(_sum_dtype(leaf))
        total = jnp.sum(wide / leaf.shape[0], axis=0)
        # Within the particles, so that equal ones have themselves as their mean.
        return jnp.clip(total, wide.min(axis=0), wide.max(axis=0)).astype(leaf.dtype)

    averaged = jax.tree.map(mean, particles)
    return averaged if masks is None else masks_lib.apply_masks(averaged, masks)


def swamp(
    train: Callable[[Any, Any, int, Any], Any],
    *,
    particles: int,
    key: Any,
    vectorize: bool = True,
) -> Callable[[Any, Any, int], Any]:
    """Makes a training function that trains N particles and returns their average.

    The result is what a round of iterative magnitude pruning calls: all particles
    start from the same weights and masks and differ by their key alone, which sets
    batch orders; the average is zero where the masks are False. The next mask is
    then that of the average:

        round_of = swamp(train, particles=4, key=key)
        found = pruning.iterative_magnitude(round_of, matching_ticket, rounds=10)

    where `train` keeps a running average over the last part of its steps with
    `update_average` and returns `averaged_params`, and the matching ticket is one
    model trained for the first few epochs. Costs N trainings in each round. Every
    round sees the same keys.

    Batch normalization: the average has no statistics of its own; compute them anew
    with a pass over training data before evaluating it.

    Args:
      train: `(params, masks, start_step, key) -> params`; it keeps weights zero where
        a mask is False, for instance by `transforms.sparsify`.
      particles: N, at least 1.
      key: PRNG key, from which each particle gets one.
      vectorize: Whether the particles train at once, by `jax.vmap`: `train` must
        then be traceable, and N times its memory is needed. Otherwise one by one.

    Returns:
      A function `(params, masks, start_step) -> params`.

    Raises:
      ValueError: `particles` is below 1.

    Example:
      >>> def train(params, masks, start_step, key):
      ...     noise = jax.random.normal(key, params["w"].shape)
      ...     return sparsejax.masks.apply_masks({"w": params["w"] + noise}, masks)
      >>> round_of = swamp(train, particles=8, key=jax.random.key(0))
      >>> masks = {"w": jnp.array([True, False])}
      >>> print(round_of({"w": jnp.zeros(2)}, masks, 0)["w"] != 0)
      [ True False]

    References:
      Choi et al., `Sparse weight averaging with multiple particles for iterative
      magnitude pruning <https://arxiv.org/abs/2305.14852>`_, 2024.
    """
    if particles < 1:
        raise ValueError(f"particles must be at least 1, got {particles}")

    def train_particles(params, masks, start_step):
        alone = lambda key: train(params, masks, start_step, key)
        keys = jax.random.split(key, particles)
        if vectorize:
            trained = jax.vmap(alone)(keys)
        else:
            trees = [alone(keys[i]) for i in range(particles)]
            trained = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
        return average_particles(trained, masks)

    return train_particles


def _check_floating(argument: str, tree: Any) -> None:
    for name, leaf in masks_lib.named_leaves(tree).items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"{argument} must have floating leaves, got {leaf.dtype} at {name!r}"
            )


def _sum_dtype(leaf: Any) -> Any:
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(leaf.dtype, jnp.float32)
