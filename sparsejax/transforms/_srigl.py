"""RigL with a constant fan-in, where neurons that lost their weights go: SRigL."""

import functools
import math
import re
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax import masks as masks_lib
from sparsejax import schedules
from sparsejax.masks import _structure as structures
from sparsejax.transforms._shared import (
    Distribution,
    all_finite,
    check_key,
    cosine_fractions,
    density_from,
    leaf_densities,
    look_up,
)
from sparsejax.transforms._updater import MaskUpdate, Updater

_LAST = re.compile(r"(^|_)(head|logits|classifier|readout)(_?\d+)?$", re.IGNORECASE)


def srigl(
    *,
    sparsity: float,
    begin: int = 0,
    end: int,
    every: int = 100,
    distribution: Distribution = masks_lib.uniform,
    key: Any,
    drop_fraction: float | Callable[[int], float] = 0.3,
    gamma_sal: float = 0.3,
    spared: str | Iterable[str] | None = None,
    structure: Any = None,
) -> Updater:
    r"""Moves weights as RigL does, every neuron with as many inputs as the next: SRigL.

    A neuron is a column of a weight [..., in, out]; matrices of a stack are treated
    one by one, and so are the taps of a convolution's kernel, where the paper counts a
    whole window as inputs. With b = round(density * in * out) weights to a matrix and
    a active neurons, each of these has

    .. math:: f = \min(in, \lfloor b / a \rfloor)

    inputs: never more weights than the density allows, and fewer than one per
    neuron less. At each update, of n weights, with K = round(f_t n) and f_t falling
    from `drop_fraction` at `begin` to 0 at `end` along half a cosine:

    1. Salient are the n - K of largest |w| in the matrix, and the K of largest
       |dense gradient| among the zeros of active neurons.
    2. A neuron with fewer than `gamma_sal * f` salient weights is ablated: it loses
       all its weights for good. At least the `ceil(b / in)` neurons of most salient
       weights stay, as many as can hold b weights; of equals the first.
    3. f is worked out anew from the neurons left.
    4. Every neuron keeps its weights of step 1 by |w|, at most f of largest |w|, and
       grows to f by |gradient| among those that were zero before. Only where a
       neuron has too few of these does it take back the largest |w| it dropped.

    Masks fit `masks.FanIn`, with ablated columns empty. If any weight or gradient is
    NaN or inf the update is skipped and counted.

    Args:
      sparsity: Fraction of masked weights that is zero, in [0, 1); never below it.
      begin: First update, as a count of finished steps.
      end: No update comes after it. The paper: three quarters of training.
      every: Steps between updates.
      distribution: `(shapes, density) -> densities` over leaves by name.
      key: PRNG key for the first masks.
      drop_fraction: alpha in the paper; or a function of the step, taken as it is.
      gamma_sal: Salient share of the fan-in below which a neuron goes; 0: none goes.
        The paper: 0.3, for transformers 0.95.
      spared: Names of leaves that keep all neurons, glob patterns. None: the last
        leaf of the tree, and any under a "head", "logits", "classifier" or
        "readout", since a class that lost its neuron cannot be predicted. A dict is
        ordered by its keys, so name the last layer if it is called otherwise.
      structure: `masks.FanIn()` or None, which is the same here.

    Returns:
      An `Updater`.

    Raises:
      ValueError: A fraction is outside [0, 1], nothing would ever be updated, or
        another structure; at `init`, a leaf of rank below 2, a density that leaves a
        neuron without inputs, or a pattern that matches no leaf.

    Example:
      >>> updater = srigl(sparsity=0.5, end=1000, key=jax.random.key(0))
      >>> masks, _ = updater.init({"w": jnp.ones((4, 3))}, updater.key)
      >>> print(masks["w"].sum(0))
      [2 2 2]

    References:
      Lasby et al., `Dynamic Sparse Training with Structured Sparsity
      <https://arxiv.org/abs/2305.02299>`_, 2023.
    """
    steps = schedules.update_steps(begin, end, every)
    fractions = cosine_fractions(drop_fraction, steps, end)
    masks_lib.check_density(gamma_sal, "gamma_sal")
    density = density_from(sparsity)
    if not isinstance(structure, structures.FanIn | None):
        raise ValueError(f"structure must be FanIn() for srigl, got {structure!r}")
    fan_in = structures.FanIn()

    def budgets(params):
        densities = leaf_densities(params, density, distribution)
        found = {}
        for name, weight in params.items():
            structures.check_shape(fan_in, tuple(weight.shape), name)
            k, n = weight.shape[-2:]
            found[name] = masks_lib.exact_count(densities[name], k * n)
            if found[name] < n and weight.size:
                raise ValueError(
                    f"sparsity must leave every neuron an input, got {found[name]} "
                    f"weights for {n} neurons at {name!r}"
                )
        return found

    def init(params, key):
        check_key(key)
        keeps_all(spared, params)
        masks = {}
        for i, (name, budget) in enumerate(budgets(params).items()):
            shape = tuple(params[name].shape)
            draw = jax.random.uniform(jax.random.fold_in(key, i), shape)
            masks[name] = structures.top_units(fan_in, draw, budget // shape[-1])
        return masks, ()

    def update(now: MaskUpdate):
        fraction = look_up(fractions, now, steps)
        keep_all = keeps_all(spared, now.params)
        masks = {}
        for name, budget in budgets(now.params).items():
            if not now.params[name].size:
                masks[name] = now.masks[name]
                continue
            gamma = 0.0 if name in keep_all else gamma_sal
            move = functools.partial(_move, budget, gamma, fraction)
            for _ in now.params[name].shape[:-2]:
                move = jax.vmap(move)
            masks[name] = move(now.params[name], now.scores[name], now.masks[name])
        return masks, now.memory, all_finite(now.params) & all_finite(now.scores)

    return Updater(steps, init, update, key)


def keeps_all(spared: Any, params: dict[str, Any]) -> set[str]:
    """Names of leaves whose neurons are never ablated."""
    if spared is None:
        heads = {k for k in params if any(_LAST.search(p) for p in k.split("/"))}
        return heads | set(list(params)[-1:])
    patterns = [spared] if isinstance(spared, str) else spared
    return set(masks_lib.match_names(patterns, params, "spared"))


def _move(budget: int, gamma: float, fraction: Any, w: Any, g: Any, mask: Any) -> Any:
    """The new mask of one matrix."""
    k, n = mask.shape
    per_neuron = lambda x: jnp.sum(x, axis=0, dtype=jnp.int32)
    active = jnp.any(mask, axis=0)
    inputs_of = lambda active: jnp.minimum(
        k, budget // jnp.maximum(masks_lib.count_true(active), 1)
    )
    count = masks_lib.count_true(mask)
    moved = jnp.round(fraction * count.astype(jnp.float32)).astype(jnp.int32)
    kept = masks_lib.topk_mask(w, count - moved, where=mask, by_magnitude=True)

    if gamma > 0:
        zeros = ~mask & active
        wanted = masks_lib.topk_mask(g, moved, where=zeros, by_magnitude=True)
        salient = per_neuron(kept | wanted)
        # gamma * f worked out on the host: 0.3 * 10 in floats may exceed 3.
        needed = [math.ceil(Fraction(repr(float(gamma))) * f) for f in range(k + 1)]
        enough = salient >= jnp.array(needed, jnp.int32)[inputs_of(active)]
        best = masks_lib.topk_mask(
            salient.astype(jnp.float32), -(-budget // k), where=active
        )
        active = active & (enough | best)

    inputs = jnp.where(active, inputs_of(active), 0)
    held = _top_per_neuron(w, inputs, kept)
    grown = _top_per_neuron(g, inputs - per_neuron(held), ~mask)
    missing = inputs - per_neuron(held | grown)
    back = lambda: _top_per_neuron(w, missing, mask & ~held)
    none = lambda: jnp.zeros_like(mask)
    # Seldom: a neuron has more zeros than it grows unless it is nearly dense.
    return held | grown | jax.lax.cond(jnp.any(missing > 0), back, none)


def _top_per_neuron(x: Any, counts: Any, where: Any) -> Any:
    """Marks the `counts[j]` largest |x| of column j among candidates."""
    return structures.top_of_columns(x, counts[None], where)
