"""FISH masks: which few weights are worth training, and training only those."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from sparsejax import masks as masks_lib
from sparsejax.pruning._scores import Loss, keep_largest, of_leaves, wide
from sparsejax.transforms._leaves import LeafFilter, select_leaves, tree_with_holes
from sparsejax.transforms._shared import Distribution


def fisher_scores(
    loss: Loss,
    params: Any,
    batch: Any,
    *,
    sample: Callable[[Any, Any, Any], Any] | None = None,
    key: Any = None,
    chunk_size: int = 32,
    leaf_filter: LeafFilter = "*",
) -> Any:
    r"""Diagonal of the Fisher information: the mean square of each gradient.

    .. math:: F_i = \frac{1}{N} \sum_{n=1}^N
      \left( \frac{\partial L(x_n, y_n)}{\partial w_i} \right)^2

    over single examples, which is not the square of the mean gradient. With the
    labels of the batch this is the empirical Fisher information; with labels drawn
    from the model's own prediction, by `sample`, an unbiased estimate of the true
    one. Costs N gradients of one example each and the memory of `chunk_size`.

    Args:
      loss: `(params, batch) -> scalar`, a negative log-likelihood; it is given
        batches of one example, with the leading axis of size 1.
      params: Tree of arrays.
      batch: Tree of arrays with a leading axis of N examples.
      sample: `(key, params, batch) -> batch` that puts drawn labels in the place of
        the given ones, for a batch of one. None: the given labels.
      key: PRNG key for `sample`; each example has its own, whatever the chunks.
      chunk_size: How many gradients are in memory at once.
      leaf_filter: Which leaves, as in `transforms.sparsify`; "*" is all.

    Returns:
      A tree like `params` of scores, float32 (float64 for such weights),
      `optax.MaskedNode` elsewhere.

    Raises:
      ValueError: The filter matches nothing, the loss is no scalar, the batch has
        no leading axis of one size N >= 1, `chunk_size` is below 1, or only one of
        `sample` and `key` is given.

    Example:
      >>> loss = lambda params, batch: jnp.sum(batch @ params["w"])
      >>> batch = jnp.array([[1.0, 2.0], [-1.0, 0.0]])
      >>> print(fisher_scores(loss, {"w": jnp.ones(2)}, batch)["w"])
      [1. 2.]

    References:
      Sung et al., `Training Neural Networks with Fixed Sparse Masks
      <https://arxiv.org/abs/2111.09839>`_, 2021.
    """
    weights = select_leaves(params, leaf_filter)
    size = _examples(batch)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    if (sample is None) != (key is None):
        got = "key" if sample is None else "sample"
        raise ValueError(f"sample and key must come together, got only {got}")
    # Without sampling the keys are never looked at.
    keys = jax.random.split(jax.random.key(0) if key is None else key, size)

    def squares(total, chunk):
        """Adds the squares of one chunk."""

        def gradient(example):
            key, data = example
            data = jax.tree.map(lambda leaf: leaf[None], data)
            if sample is not None:
                data = sample(key, params, data)
            return jax.grad(of_leaves(loss, params, data))(weights)

        gradients = jax.vmap(gradient)(chunk)
        add = lambda old, g: old + jnp.sum(jnp.square(wide(g)), axis=0)
        return jax.tree.map(add, total, gradients), None

    chunk_size = min(chunk_size, size)
    whole = size - size % chunk_size
    total = {name: jnp.zeros_like(wide(leaf)) for name, leaf in weights.items()}
    split = lambda leaf: leaf[:whole].reshape(-1, chunk_size, *leaf.shape[1:])
    total, _ = lax.scan(squares, total, jax.tree.map(split, (keys, batch)))
    if whole < size:
        total, _ = squares(total, jax.tree.map(lambda l: l[whole:], (keys, batch)))
    return tree_with_holes(params, {name: f / size for name, f in total.items()})


def fisher_mask(
    loss: Loss,
    params: Any,
    batch: Any,
    *,
    sparsity: float,
    sample: Callable[[Any, Any, Any], Any] | None = None,
    key: Any = None,
    chunk_size: int = 32,
    distribution: Distribution | str = "global",
    leaf_filter: LeafFilter = "*",
) -> Any:
    """Marks the weights worth training: a FISH mask, for `sparse_finetune`.

    The largest `fisher_scores`, over the whole model. Here True means that a weight
    may change; the others stay what they are, and are not zero. Costs N gradients
    of one example each and the memory of `chunk_size`.

    Args:
      loss: `(params, batch) -> scalar`, a negative log-likelihood; it is given
        batches of one example.
      params: Tree of arrays, as pretrained.
      batch: Tree of arrays with a leading axis of N examples; the paper's N is 1024.
      sparsity: Fraction of the chosen leaves' weights that is frozen, in [0, 1]; the
        paper's on GLUE is 0.995.
      sample: `(key, params, batch) -> batch` with labels drawn from the model, as in
        `fisher_scores`. None: the given labels, as the paper found sufficient.
      key: PRNG key for `sample`.
      chunk_size: How many gradients are in memory at once.
      distribution: "global" or densities per leaf, as in `keep_largest`.
      leaf_filter: Which leaves compete, biases too unless it says otherwise. Those
        left out have no mask and stay trainable, as a new head must.

    Returns:
      Masks: a tree like `params` of boolean arrays, `optax.MaskedNode` elsewhere.

    Raises:
      ValueError: As `keep_largest` and `fisher_scores`.

    Example:
      >>> loss = lambda params, batch: jnp.sum(batch @ params["w"])
      >>> batch = jnp.array([[1.0, 2.0], [-1.0, 0.0]])
      >>> print(fisher_mask(loss, {"w": jnp.ones(2)}, batch, sparsity=0.5)["w"])
      [False  True]

    References:
      Sung et al., `Training Neural Networks with Fixed Sparse Masks
      <https://arxiv.org/abs/2111.09839>`_, 2021.
    """
    masks_lib.check_density(sparsity, "sparsity")
    scores = fisher_scores(
        loss,
        params,
        batch,
        sample=sample,
        key=key,
        chunk_size=chunk_size,
        leaf_filter=leaf_filter,
    )
    return keep_largest(scores, sparsity=sparsity, distribution=distribution)


class SparseFinetuneState(NamedTuple):
    """State of `sparse_finetune`: arrays only."""

    masks: Any  # like params: True where a weight may change
    inner_state: Any  # state of the wrapped optimizer


def sparse_finetune(
    inner: optax.GradientTransformation, masks: Any
) -> optax.GradientTransformationExtraArgs:
    r"""Trains only the weights that masks mark and leaves the others as they are.

    .. math::
      u = \begin{cases}
        \mathrm{inner}(m \odot g) & \text{where } m \\
        0 & \text{elsewhere}
      \end{cases}

    Frozen weights keep every bit under `optax.apply_updates`, whatever the inner
    optimizer decays, and do not count in norms that it clips by. Unlike
    `transforms.sparsify` nothing becomes zero. It must be outermost. Costs two
    elementwise passes and 1 byte per masked weight.

    Args:
      inner: Any optax transformation.
      masks: Tree of boolean arrays with the paths and shapes of parameters, such as
        `fisher_mask` returns; parameters without a mask train as usual.

    Returns:
      An `optax.GradientTransformationExtraArgs`; the masks are in its state.

    Raises:
      ValueError: At `init` or `update`, masks that do not fit the parameters.

    Example:
      >>> params = {"w": jnp.array([1.0, 2.0]), "b": jnp.array([3.0])}
      >>> tx = sparse_finetune(optax.sgd(0.5), {"w": jnp.array([True, False])})
      >>> grads = jax.tree.map(jnp.ones_like, params)
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> new = optax.apply_updates(params, updates)
      >>> print(new["w"], new["b"])
      [0.5 2. ] [2.5]

    References:
      Sung et al., `Training Neural Networks with Fixed Sparse Masks
      <https://arxiv.org/abs/2111.09839>`_, 2021.
    """
    inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        if jax.tree.leaves(params):  # optax asks with a placeholder too
            masks_lib.apply_masks(params, masks)  # raises where they do not fit
        with jax.numpy_dtype_promotion("standard"):
            # A copy, because donating the state must not delete the caller's masks.
            return SparseFinetuneState(
                jax.tree.map(jnp.copy, masks), inner.init(params)
            )

    def update_fn(updates, state, params=None, **extra_args):
        marked = masks_lib.named_leaves(state.masks)

        def freeze(path, update):
            mask = marked.get(masks_lib.path_name(path))
            # -0 and not 0: a weight of -0 plus 0 would be 0.
            negative_zero = jnp.array(-0.0, update.dtype)
            return update if mask is None else jnp.where(mask, update, negative_zero)

        updates = masks_lib.apply_masks(updates, state.masks)
        with jax.numpy_dtype_promotion("standard"):
            updates, inner_state = inner.update(
                updates, state.inner_state, params, **extra_args
            )
        updates = jax.tree_util.tree_map_with_path(freeze, updates)
        return updates, SparseFinetuneState(state.masks, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _examples(batch: Any) -> int:
    shapes = {
        name: jnp.shape(leaf) for name, leaf in masks_lib.named_leaves(batch).items()
    }
    sizes = {shape[0] if shape else 0 for shape in shapes.values()}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            f"batch must have a leading axis of one size for all leaves, got {shapes}"
        )
    return sizes.pop()
