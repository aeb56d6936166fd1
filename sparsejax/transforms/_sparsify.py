"""The transform that keeps weights exactly sparse under any optax optimizer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool

from sparsejax import masks as masks_lib
from sparsejax import schedules
from sparsejax.transforms import _leaves, _moments, _sharding
from sparsejax.transforms._updater import MaskUpdate, Updater

_NO_PARAMS = (
    "params must be passed to update: sparsify emits -param where a weight is pruned, "
    "got params=None"
)


class SparsifyState(NamedTuple):
    """State of `sparsify`: arrays only."""

    steps: Any  # count of finished steps; shape=(), dtype=int32
    next_update: Any  # step of the next mask update, -1: none; shape=(), dtype=int32
    skipped_updates: Any  # updates not done because of NaN or inf; shape=(), int32
    mask_key: Any  # raw PRNG key data, dtype=uint32; None without chance
    masks: Any  # like params: bool of the same shape, MaskedNode where untouched
    memory: Any  # what the updater keeps
    inner_state: Any  # state of the wrapped optimizer


def sparsify(
    inner: optax.GradientTransformation,
    updater: Updater,
    *,
    leaf_filter: _leaves.LeafFilter = None,
    moments: str = "zero",
) -> optax.GradientTransformationExtraArgs:
    r"""Trains sparse: keeps pruned weights exactly zero and moves the masks.

    .. math::
      u = \begin{cases}
        \mathrm{inner}(m \odot g) & \text{where } m \\
        -w & \text{elsewhere}
      \end{cases}

    so that `optax.apply_updates` gives exact zeros where the mask m is False, in any
    dtype, and what the inner optimizer gives elsewhere. No other hook is needed. On
    a step at which masks are due the updater runs first, and the step is then taken
    under the new masks: dropped weights become zero, grown weights start from zero
    with that step's gradient. Costs two elementwise passes, fused with the
    optimizer's own, and 1 byte per weight. One updater, `sparse_momentum`, goes by
    the optimizer's momentum if it can, and has `inner` see g as it is.

    It must be outermost (last in a chain), since what follows it could move pruned
    weights. `optax.MultiSteps` may be inside, where `every` counts micro-steps, or
    outside, where it counts real steps and growth sees averaged gradients.
    `optax.apply_if_finite` may be outside.

    Growth needs gradients of pruned weights. The transform takes the gradients it
    is given, before masking; a loop that has cheaper ones only may ask
    `is_update_step(opt_state)` and pass others as `grow_scores=`, an extra argument
    of `update` shaped like the masked leaves. Both are signed and must be reduced
    over devices beforehand. Weights may be sharded, over automatic or explicit axes
    of a mesh: masks lie as their weights do, and are those of one device but for
    the order in which sums are rounded.

    Args:
      inner: Any optax transformation.
      updater: What chooses the masks, such as `rigl(...)`.
      leaf_filter: Which parameters: a function `(name, leaf) -> bool`, or glob
        patterns over slash-separated names, each of which must match. None: weights
        of rank 2 or more that are no norm, bias or embedding.
      moments: State of the inner optimizer at entries dropped and grown: "zero"
        clears it, "keep" leaves it, "mean" gives grown entries the mean over kept
        ones. State that no parameter owns, such as adafactor's factors, stays.

    Returns:
      An `optax.GradientTransformationExtraArgs`. Its `init` returns the masks in the
      state: zero the initial parameters with
      `masks.apply_masks(params, get_masks(opt_state))`.

    Raises:
      ValueError: `moments` is unknown; at `init`, a filter that takes no leaf or a
        pattern that matches none; at `update`, no `params`, or `grow_scores` that
        lacks a leaf.

    Example:
      >>> from sparsejax.transforms import gradual_magnitude
      >>> params = {"kernel": jnp.arange(1.0, 7.0).reshape(2, 3), "bias": jnp.ones(3)}
      >>> tx = sparsify(optax.sgd(0.1), gradual_magnitude(sparsity=0.5, end=0))
      >>> grads = jax.tree.map(jnp.ones_like, params)
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> print(optax.apply_updates(params, updates)["kernel"])
      [[0.  0.  0. ]
       [3.9 4.9 5.9]]

    References:
      Evci et al., `Rigging the Lottery <https://arxiv.org/abs/1911.11134>`_, 2020.
    """
    if moments not in _moments.POLICIES:
        raise ValueError(f"moments must be one of {_moments.POLICIES}, got {moments!r}")
    inner = optax.with_extra_args_support(inner)
    steps = updater.steps

    def find_momentum(inner_state, params, masks):
        if not updater.momentum:
            return None
        return _moments.find_momentum(inner_state, params, masks)

    def init_fn(params):
        # optax.tree_utils.tree_map_params asks with a placeholder for the tree.
        masks, leaves, chosen, memory = params, {}, {}, ()
        if jax.tree.leaves(params):
            leaves = _leaves.select_leaves(params, leaf_filter)
            chosen, memory = updater.init(leaves, updater.key)
            chosen = _sharding.place(chosen, leaves)
            masks = _leaves.tree_with_holes(params, chosen)
            params = masks_lib.apply_masks(params, masks)
        with jax.numpy_dtype_promotion("standard"):
            inner_state = inner.init(params)
        if memory and find_momentum(inner_state, params, chosen) is not None:
            memory = ()
        state = SparsifyState(
            steps=jnp.zeros((), jnp.int32),
            next_update=schedules.next_update(0, steps),
            skipped_updates=jnp.zeros((), jnp.int32),
            mask_key=_key_data(updater.key),
            masks=masks,
            memory=_sharding.place(memory, leaves),
            inner_state=inner_state,
        )
        return _sharding.place(state, leaves)

    def update_fn(updates, state, params=None, *, grow_scores=None, **extra_args):
        if params is None:
            raise ValueError(_NO_PARAMS)
        old = masks_lib.named_leaves(state.masks)
        weights = masks_lib.named_leaves(params)
        gradients = masks_lib.named_leaves(updates)

        masks, memory, skipped = old, state.memory, state.skipped_updates
        momentum = find_momentum(state.inner_state, params, old)
        due = state.steps == state.next_update
        scores: dict[str, Any] = {}
        if steps:
            scores = _scores(old, gradients, grow_scores)
            request = MaskUpdate(
                masks=old,
                memory=memory,
                params={name: weights[name] for name in old},
                scores=scores,
                key=_key_at(updater.key, state.mask_key, state.steps),
                step=state.steps,
            )
            if updater.observe is not None and momentum is None:
                observed = _sharding.automatic(
                    updater.observe, request.memory, request, due
                )
                request = request._replace(memory=observed)

            def change():
                seen = request
                if momentum is not None:
                    seen = request._replace(memory=_moments.begun(momentum, scores))
                like = (seen.masks, seen.memory, due)
                masks, memory, ok = _sharding.automatic(updater.update, like, seen)
                if momentum is not None:
                    memory = request.memory
                # What did not change is not looked at: it would be copied.
                pick = lambda new, old: old if new is old else jnp.where(ok, new, old)
                return (
                    jax.tree.map(pick, (masks, memory), (old, request.memory)),
                    skipped + (~ok).astype(jnp.int32),
                )

            (masks, memory), skipped = jax.lax.cond(
                due, change, lambda: ((old, request.memory), skipped)
            )

        with jax.numpy_dtype_promotion("standard"):
            iterates = _moments.find_iterates(inner.init, params)
            inner_state = state.inner_state
            if steps:
                inner_state = _moments.settle(
                    inner_state,
                    params,
                    masks,
                    old,
                    policy=moments,
                    iterates=iterates,
                    dense=momentum is not None,
                )
            if momentum is None:
                shown = _map_named(lambda m, g: jnp.where(m, g, 0), masks, updates)
            else:
                shown = _map_named(_finite_where_pruned, masks, updates, scores)
            emitted, inner_state = inner.update(
                shown, inner_state, params, **extra_args
            )
            inner_state = _moments.sweep(inner_state, params, masks, iterates)

        def project(mask, update, param):
            # The wider dtype, because -param rounded to a narrower one is not -param.
            dtype = jnp.promote_types(update.dtype, param.dtype)
            return jnp.where(mask, update.astype(dtype), -param.astype(dtype))

        emitted = _map_named(project, masks, emitted, weights)
        count = optax.safe_increment(state.steps)
        new_state = SparsifyState(
            steps=count,
            next_update=schedules.next_update(count, steps),
            skipped_updates=skipped,
            mask_key=state.mask_key,
            masks=_leaves.tree_with_holes(params, masks),
            memory=memory,
            inner_state=inner_state,
        )
        return emitted, new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def get_masks(opt_state: Any) -> Any:
    """The masks in an optimizer state, under any nesting of wrappers.

    Args:
      opt_state: State of `sparsify`, or of transformations around it.

    Returns:
      A tree like the parameters: boolean arrays, `optax.MaskedNode` where a leaf is
      left alone. Where `optax.partition` holds several, they are merged.

    Raises:
      ValueError: No `SparsifyState` is inside.

    Example:
      >>> from sparsejax.transforms import gradual_magnitude
      >>> tx = sparsify(optax.sgd(0.1), gradual_magnitude(sparsity=0.5, end=0))
      >>> print(get_masks(tx.init({"kernel": jnp.ones((1, 2))})))
      {'kernel': Array([[ True,  True]], dtype=bool)}
    """
    is_hole = lambda node: isinstance(node, optax.MaskedNode)
    first, *others = [state.masks for state in _find_states(opt_state)]
    for other in others:
        merge = lambda one, two: two if is_hole(one) else one
        first = jax.tree.map(merge, first, other, is_leaf=is_hole)
    return first


def is_update_step(opt_state: Any) -> Bool[Array, "..."]:
    """Whether the coming `update` changes masks.

    Inside `optax.MultiSteps` this speaks of the coming real step, and is True on
    each of its micro-steps.

    Args:
      opt_state: State of `sparsify`, or of transformations around it.

    Returns:
      A boolean scalar, usable inside jit.

    Raises:
      ValueError: No `SparsifyState` is inside.

    Example:
      >>> from sparsejax.transforms import gradual_magnitude
      >>> tx = sparsify(optax.sgd(0.1), gradual_magnitude(sparsity=0.5, end=0))
      >>> print(is_update_step(tx.init({"kernel": jnp.ones((1, 2))})))
      True
    """
    due = [state.steps == state.next_update for state in _find_states(opt_state)]
    return jnp.any(jnp.stack(due), axis=0)


def _find_states(opt_state: Any) -> list[SparsifyState]:
    is_mine = lambda node: isinstance(node, SparsifyState)
    nodes = jax.tree.leaves(opt_state, is_leaf=is_mine)
    states = [node for node in nodes if is_mine(node)]
    if not states:
        raise ValueError(
            f"opt_state must contain a SparsifyState, got {type(opt_state).__name__}"
        )
    return states


def _map_named(fn: Any, masks: dict[str, Any], tree: Any, *rest: dict[str, Any]) -> Any:
    """Maps `fn(mask, leaf, ...)` over the leaves of `tree` that have a mask."""

    def leaf(path, value):
        name = masks_lib.path_name(path)
        if name not in masks:
            return value
        return fn(masks[name], value, *(leaves[name] for leaves in rest))

    return jax.tree_util.tree_map_with_path(leaf, tree)


def _finite_where_pruned(mask: Any, gradient: Any, score: Any) -> Any:
    # A pruned entry that once saw NaN would hold it in its momentum for good.
    score = score.astype(gradient.dtype)
    return jnp.where(mask, gradient, jnp.where(jnp.isfinite(score), score, 0))


def _scores(masks: dict[str, Any], gradients: dict[str, Any], given: Any) -> Any:
    scores = gradients if given is None else masks_lib.named_leaves(given)
    for name, mask in masks.items():
        if name not in scores or scores[name].shape != mask.shape:
            got = scores[name].shape if name in scores else "nothing"
            raise ValueError(
                f"grow_scores must hold an array of shape {mask.shape} at {name!r}, "
                f"got {got}"
            )
    return {name: scores[name] for name in masks}


def _key_data(key: Any) -> Any:
    # Raw data, which optax wrappers can select and orbax can store; a copy, because
    # donating the state must not delete the caller's key.
    return None if key is None else jnp.copy(jax.random.key_data(key))


def _key_at(like: Any, data: Any, step: Any) -> Any:
    if data is None:
        return None
    key = jax.random.wrap_key_data(data, impl=jax.random.key_impl(like))
    return jax.random.fold_in(key, step)
