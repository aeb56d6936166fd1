"""Which leaves a transform touches, and trees with holes for the others."""

import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sparsejax import masks as masks_lib

LeafFilter = Callable[[str, Any], bool] | str | Iterable[str] | None

# Names of weights that are not the matrix of a product: pruning them saves nothing
# and hurts, and a scan can stack them to rank 2.
_DENSE_ANYWHERE = re.compile(r"norm|embed|(^|_)(ln|bn)(_|\d|$)", re.IGNORECASE)
_DENSE_LAST = frozenset(
    "b beta bias cls_token gamma pos_emb position_table scale wpe wte".split()
)


def default_leaf_filter(name: str, leaf: Any) -> bool:
    """Takes floating weights of rank 2 or more that are no norm, bias or embedding.

    Norms and embeddings are known by their names: any part of the path that
    contains "norm" or "embed", or is "ln", "bn" or the like; biases and scales by
    the last part.

    Args:
      name: Slash-separated path of the leaf.
      leaf: Array.

    Returns:
      Whether the leaf is to be made sparse.

    Example:
      >>> default_leaf_filter("mlp/up/kernel", jnp.zeros((4, 8)))
      True
      >>> default_leaf_filter("layers/norm/scale", jnp.zeros((12, 8)))
      False
    """
    parts = name.split("/")
    return (
        leaf.ndim >= 2
        and jnp.issubdtype(leaf.dtype, jnp.floating)
        and parts[-1] not in _DENSE_LAST
        and not any(_DENSE_ANYWHERE.search(part) for part in parts)
    )


def select_leaves(params: Any, leaf_filter: LeafFilter) -> dict[str, Any]:
    """The leaves that a filter takes, by name.

    Raises:
      ValueError: A pattern matches no leaf, the filter takes none, or it takes one
        that is not floating.
    """
    leaves = masks_lib.named_leaves(params)
    if leaf_filter is None:
        taken = {k: v for k, v in leaves.items() if default_leaf_filter(k, v)}
    elif callable(leaf_filter):
        taken = {k: v for k, v in leaves.items() if leaf_filter(k, v)}
    else:
        patterns = [leaf_filter] if isinstance(leaf_filter, str) else leaf_filter
        found = masks_lib.match_names(patterns, leaves, "leaf_filter")
        taken = {k: v for k, v in leaves.items() if k in found}
    if leaves and not taken:
        raise ValueError(
            f"leaf_filter must take at least one leaf, got none of {list(leaves)}"
        )
    for name, leaf in taken.items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"leaf_filter must take floating leaves, got {leaf.dtype} at {name!r}"
            )
    return taken


def tree_with_holes(params: Any, leaves: dict[str, Any]) -> Any:
    """A tree like `params` with `leaves` at their names and `MaskedNode` elsewhere."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(params)
    values = [
        leaves.get(masks_lib.path_name(path), optax.MaskedNode()) for path, _ in flat
    ]
    return jax.tree_util.tree_unflatten(treedef, values)
