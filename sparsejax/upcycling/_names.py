"""Leaves by name, and patterns of names whose stars carry over."""

import re
from collections.abc import Sequence
from typing import Any

import jax

from sparsejax.masks._paths import path_name


def named(tree: Any, argument: str) -> dict[str, Any]:
    """Leaves by their '/'-joined paths, in the order of the tree.

    Raises:
      ValueError: Two leaves have one path, or a leaf has no shape and dtype.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    found = {path_name(path): leaf for path, leaf in flat}
    if len(found) < len(flat):
        raise ValueError(f"{argument}: got two leaves of one path, needed paths apart")
    for name, leaf in found.items():
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise ValueError(
                f"{argument}: got {type(leaf).__name__} for {name}, needed an array"
            )
    return found


def join(*parts: str) -> str:
    """Joins what is not empty with slashes."""
    return "/".join(part for part in parts if part)


def match(pattern: str, name: str) -> tuple[str, ...] | None:
    """What the stars of a pattern stand for in a name; None where it does not fit."""
    parts = [re.escape(part) for part in pattern.split("*")]
    found = re.fullmatch("(.*?)".join(parts), name)
    return found.groups() if found else None


def fill(pattern: str, stars: Sequence[str]) -> str:
    """The name that a pattern becomes with these for its stars."""
    first, *rest = pattern.split("*")
    return first + "".join(s + part for s, part in zip(stars, rest, strict=True))


def check_stars(argument: str, source: str, target: str) -> None:
    """Each star of the target is one of the source."""
    if source.count("*") != target.count("*"):
        raise ValueError(
            f"{argument}: got {source!r} and {target!r}, needed as many * in both"
        )
