"""One topology step of a whole model: parameters, layouts and optimizer state."""

from typing import Any

import jax
from jax.tree_util import KeyPath

from sparsejax.layouts import BlockLayout
from sparsejax.topology._rigl import rigl_blocks


def step(
    params: Any, layouts: Any, opt_state: Any, scores: Any, *, fraction: Any
) -> tuple[Any, Any, Any]:
    """Applies ``rigl_blocks`` to every block-sparse parameter of a model.

    Everything is matched by its path in the trees. A layout or a score belongs to the
    parameter of the same path; the suffixes that the modules use, ``kernel_layout`` and
    ``kernel_probe`` beside ``kernel``, are understood. An array of the optimizer state
    belongs to the parameter whose path ends its own, if its shape is the parameter's:
    true of moments in every optax optimizer, also inside chain, masked, partition,
    MultiSteps or inject_hyperparams. State of other shapes (Adafactor's factors) and
    all other parameters come back as they are.

    Args:
      params: Parameters, any pytree; stored blocks are leaves ``[capacity, bk, bn]``,
        or ``[layers, capacity, bk, bn]`` for layers under scan.
      layouts: Pytree of BlockLayouts.
      opt_state: Any optax state, or any pytree.
      scores: Pytree of ``[kb, nb]`` (``[layers, kb, nb]``) arrays, as from
        differentiating with respect to the growth probes.
      fraction: Of the stored blocks to move, in [0, 1].

    Returns:
      (params, layouts, opt_state), same trees, shapes and dtypes: jit it, and it never
      recompiles.

    Raises:
      ValueError: A layout has no parameter or no scores, or their shapes do not fit.
    """
    is_layout = lambda node: isinstance(node, BlockLayout)
    param_at, param_leaves, param_tree = _by_path(params)
    layout_at, layout_leaves, layout_tree = _by_path(layouts, is_leaf=is_layout)
    state_at, state_leaves, state_tree = _by_path(opt_state)
    score_at, score_leaves, _ = _by_path(scores)

    owners: dict[int, list[int]] = {}  # of the state's leaves, by the parameter's index
    for path, i in state_at.items():
        # The longest path that ends this one: ("kernel",) ends ("up", "kernel") too.
        ends = (path[start:] for start in range(len(path)))
        owner = next((param_at[end] for end in ends if end in param_at), None)
        if owner is not None and _shape(state_leaves[i]) == _shape(param_leaves[owner]):
            owners.setdefault(owner, []).append(i)

    for path, i in layout_at.items():
        if not isinstance(layout_leaves[i], BlockLayout):
            continue
        name = "/".join(path)
        if path not in param_at:
            known = ", ".join("/".join(p) for p in param_at)
            raise ValueError(
                f"layouts: {name} belongs to no parameter; params has {known}"
            )
        if path not in score_at:
            known = ", ".join("/".join(p) for p in score_at) or "nothing"
            raise ValueError(f"scores: none for {name}; got scores for {known}")
        p = param_at[path]
        mine = owners.get(p, [])

        def move(blocks, layout, score, moments):
            return rigl_blocks(
                blocks, layout, score, fraction=fraction, moments=moments
            )

        for _ in range(layout_leaves[i].rows.ndim - 1):
            move = jax.vmap(move)
        param_leaves[p], layout_leaves[i], moved = move(
            param_leaves[p],
            layout_leaves[i],
            score_leaves[score_at[path]],
            [state_leaves[j] for j in mine],
        )
        for j, leaf in zip(mine, moved, strict=True):
            state_leaves[j] = leaf
    return (
        jax.tree.unflatten(param_tree, param_leaves),
        jax.tree.unflatten(layout_tree, layout_leaves),
        jax.tree.unflatten(state_tree, state_leaves),
    )


def _by_path(tree, is_leaf=None):
    """({path: index of leaf}, leaves, treedef)."""
    found, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    paths = {_plain(path): i for i, (path, _) in enumerate(found)}
    return paths, [leaf for _, leaf in found], treedef


def _plain(path: KeyPath) -> tuple[str, ...]:
    """A path as words, without a Flax variable's level and the modules' suffixes."""
    words = []
    for key in path:
        for field in ("key", "name", "idx"):
            if hasattr(key, field):
                words.append(str(getattr(key, field)))
                break
    if words and words[-1] == "value":
        words.pop()
    if words:
        words[-1] = words[-1].removesuffix("_layout").removesuffix("_probe")
    return tuple(words)


def _shape(leaf):
    return getattr(leaf, "shape", None)
