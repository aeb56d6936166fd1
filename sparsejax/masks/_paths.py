"""Names of leaves: `decoder/layers/up/kernel`, whatever the containers are."""

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax


def path_name(path: Sequence[Any]) -> str:
    """Joins the keys of a tree path with slashes.

    A trailing attribute `value` is left out: it is how NNX variables hold their
    array, and the same weight keeps its name in a plain dict.

    Args:
      path: A key path as `jax.tree_util.tree_flatten_with_path` gives it.

    Returns:
      The name, empty for a tree that is a single leaf.

    Example:
      >>> tree = {"up": [{"kernel": 1.0}]}
      >>> [(path, _)] = jax.tree_util.tree_flatten_with_path(tree)[0]
      >>> path_name(path)
      'up/0/kernel'
    """
    keys = [_key_name(key) for key in path]
    if keys and isinstance(path[-1], jax.tree_util.GetAttrKey) and keys[-1] == "value":
        keys.pop()
    return "/".join(keys)


def named_leaves(
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> dict[str, Any]:
    """Leaves by name, in the order of the tree.

    Raises:
      ValueError: Two have one name, as `{"a/x": ..., "a": {"x": ...}}` would.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    named: dict[str, Any] = {}
    for path, leaf in flat:
        name = path_name(path)
        if name in named:
            raise ValueError(
                f"every leaf must have a name of its own, got two {name!r}"
            )
        named[name] = leaf
    return named


def match_names(
    patterns: Iterable[str], names: Iterable[str], argument: str
) -> dict[str, str]:
    """Maps each name to the first glob pattern that fits it.

    Raises:
      ValueError: A pattern fits no name: a misspelt key must not pass in silence.
    """
    names = list(names)
    found: dict[str, str] = {}
    for pattern in patterns:
        fits = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not fits:
            raise ValueError(
                f"{argument}: every pattern must match a leaf, got {pattern!r}, "
                f"which matches none of {names}"
            )
        for name in fits:
            found.setdefault(name, pattern)
    return found


def _key_name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
