"""Checkpoints of a sparse training run, over orbax.

One checkpoint is one directory, ``<directory>/<step>``, that appears whole or not at
all: orbax writes beside it and renames. It holds any pytree of arrays (parameters,
layouts, optimizer state with masks, PRNG keys), the position in the data, the step and
the run's configuration, as tensorstore arrays and JSON; nothing is pickled.

Topology is data here: layouts and masks are leaves like any other, of equal shape
through the run, so a topology that moved restores into the example of a fresh run.

orbax is imported inside the functions: ``import sparsejax.checkpoint`` is cheap.
"""

import base64
import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

PyTree = Any
# What a data pipeline calls its position: grain gives dictionaries or bytes.
Position = Any

__all__ = ["Checkpoint", "latest_step", "restore", "save", "stored_config"]


class Checkpoint(NamedTuple):
    """What ``restore`` returns.

    Attributes:
      tree: The example's pytree with the stored values in it.
      data_position: As it was handed to ``save``.
      step: The step that the checkpoint was saved at.
    """

    tree: PyTree
    data_position: Position
    step: int


def save(
    directory: str | os.PathLike,
    step: int,
    tree: PyTree,
    *,
    config: Any,
    data_position: Position = None,
    keep: int = 2,
) -> None:
    """Writes one checkpoint and removes all but the newest ``keep``.

    The older ones go only after the new one is whole, so a process killed at any time
    leaves the newest finished checkpoint behind.

    Args:
      directory: Folder of the run's checkpoints; created if it is not there.
      step: Steps taken so far; must exceed the newest step in ``directory``.
      tree: Pytree of arrays and numbers; typed PRNG keys are fine. Leaves are stored
        under their paths.
      config: The run's configuration, a dataclass or a mapping of JSON values.
        Directories whose checkpoints have another one are left alone.
      data_position: What the data pipeline needs to go on; JSON values or bytes.
      keep: How many checkpoints stay.

    Raises:
      ValueError: ``step`` is not newer than what is there, ``keep`` is below 1,
        ``config`` or ``data_position`` is not JSON, or ``directory`` holds another
        configuration. Nothing was written then.

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> folder = tempfile.mkdtemp()
      >>> state = {"w": jnp.arange(3.0), "key": jax.random.key(0)}
      >>> save(folder, 10, state, config={"sparsity": 0.9}, data_position={"next": 4})
      >>> found = restore(folder, state, config={"sparsity": 0.9})
      >>> found.step, found.data_position, found.tree["w"].tolist()
      (10, {'next': 4}, [0.0, 1.0, 2.0])
    """
    import orbax.checkpoint as ocp

    if keep < 1:
        raise ValueError(f"keep: got {keep}, needed at least 1")
    meta = {
        "config": _to_json("config", _as_dict(config)),
        "data_position": _to_json("data_position", data_position),
        "leaves": {name: _spec(leaf) for name, leaf in _named_leaves(tree).items()},
    }
    newest = latest_step(directory)
    if newest is not None:
        if step <= newest:
            raise ValueError(
                f"step: got {step}, needed more than {newest}, the newest checkpoint "
                f"in {os.fspath(directory)}"
            )
        _check_config(directory, newest, _read_meta(directory, newest), meta["config"])

    arrays = {
        name: _storable(leaf)
        for name, leaf in _named_leaves(tree).items()
        if np.size(_storable_spec(leaf)) > 0  # orbax refuses empty arrays
    }
    with _manager(directory, keep=keep, create=True) as manager:
        manager.save(
            step,
            args=ocp.args.Composite(
                tree=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(meta)
            ),
        )


def restore(
    directory: str | os.PathLike,
    example: PyTree,
    *,
    config: Any,
    step: int | None = None,
) -> Checkpoint | None:
    """Reads the newest finished checkpoint into the shape of an example.

    Args:
      directory: Folder that ``save`` wrote to.
      example: Pytree of arrays, or of ``jax.ShapeDtypeStruct``, such as the fresh
        state of the run. It gives structure, shapes, dtypes and shardings; arrays come
        back sharded as the example's are.
      config: The configuration that the checkpoint must have been saved with.
      step: Which checkpoint; the newest if None.

    Returns:
      The checkpoint, or None where ``directory`` has none.

    Raises:
      ValueError: The checkpoint is of another configuration, or its leaves differ from
        the example's in name, shape or dtype. The message names each.
    """
    import orbax.checkpoint as ocp

    if step is None:
        step = latest_step(directory)
    if step is None:
        return None
    meta = _read_meta(directory, step)
    _check_config(directory, step, meta, _to_json("config", _as_dict(config)))
    _check_leaves(directory, step, meta, example)

    leaves = _named_leaves(example)
    stored = {name: _storable_spec(leaf) for name, leaf in leaves.items()}
    wanted = {name: spec for name, spec in stored.items() if np.size(spec) > 0}
    with _manager(directory) as manager:
        arrays = manager.restore(
            step, args=ocp.args.Composite(tree=ocp.args.StandardRestore(wanted))
        )["tree"]
    values = [
        _from_stored(arrays.get(name, np.zeros(stored[name].shape)), leaf)
        for name, leaf in leaves.items()
    ]
    tree = jax.tree.unflatten(jax.tree.structure(example), values)
    return Checkpoint(tree, _from_json(meta["data_position"]), step)


def latest_step(directory: str | os.PathLike) -> int | None:
    """Returns the newest finished checkpoint's step, or None where there is none."""
    from etils import epath

    if not epath.Path(_absolute(directory)).exists():
        return None
    with _manager(directory) as manager:
        return manager.latest_step()


def stored_config(directory: str | os.PathLike) -> dict[str, Any] | None:
    """Returns the configuration that checkpoints were saved with, as JSON has it.

    For a program that takes a run's checkpoint without having made the run; what
    ``restore`` needs is made from it.

    Args:
      directory: Folder that ``save`` wrote to.

    Returns:
      The dataclass's fields or the mapping, tuples as lists; None where ``directory``
      has no checkpoint.

    Example:
      >>> import tempfile
      >>> folder = tempfile.mkdtemp()
      >>> save(folder, 1, {"w": np.ones(2)}, config={"sizes": (4, 2)})
      >>> stored_config(folder)
      {'sizes': [4, 2]}
    """
    step = latest_step(directory)
    return None if step is None else _read_meta(directory, step)["config"]


# ---- leaves ------------------------------------------------------------------------


def _named_leaves(tree: PyTree) -> dict[str, Any]:
    """Flattens to ``{"params.layer.kernel": leaf}``, in the tree's own order."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in pairs
    }


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(
        leaf.dtype, jax.dtypes.prng_key
    )


def _spec(leaf: Any) -> list:
    """Shape and dtype of a leaf as JSON; a typed key reads ``key<fry>``."""
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    return [list(np.shape(leaf)), str(dtype)]


def _storable(leaf: Any) -> jax.Array | np.ndarray:
    if _is_key(leaf):
        return jax.random.key_data(leaf)
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def _storable_spec(leaf: Any) -> Any:
    """What orbax reads for this leaf of the example: shape, dtype and sharding."""
    if _is_key(leaf):
        return jax.eval_shape(jax.random.key_data, leaf)
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    return np.asarray(leaf)


def _from_stored(value: Any, leaf: Any) -> Any:
    """Turns what orbax read into the kind of leaf that the example has."""
    if _is_key(leaf):
        # The implementation is part of the dtype, also of a ShapeDtypeStruct's.
        key = jax.random.wrap_key_data(value, impl=leaf.dtype._impl.name)
        return key if leaf.sharding is None else jax.device_put(key, leaf.sharding)
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        if isinstance(value, jax.Array):
            return value
        return jax.device_put(np.asarray(value, leaf.dtype), leaf.sharding)
    value = np.asarray(value, np.asarray(leaf).dtype)
    return value if isinstance(leaf, np.ndarray) else type(leaf)(value)


# ---- checks ------------------------------------------------------------------------


def _check_config(directory: Any, step: int, meta: dict, needed: Any) -> None:
    got, needed = _flat(meta["config"]), _flat(needed)
    missing = "(no such field)"
    lines = [
        f"{name}: got {got.get(name, missing)!r}, needed {needed.get(name, missing)!r}"
        for name in sorted(got.keys() | needed.keys())
        if name not in got or name not in needed or got[name] != needed[name]
    ]
    if lines:
        raise ValueError(
            f"config: checkpoint {step} in {os.fspath(directory)} is of another "
            "configuration: " + "; ".join(lines)
        )


def _check_leaves(directory: Any, step: int, meta: dict, example: PyTree) -> None:
    got = meta["leaves"]
    needed = {name: _spec(leaf) for name, leaf in _named_leaves(example).items()}

    def show(specs: dict, name: str) -> str:
        if name not in specs:
            return "(no such leaf)"
        shape, dtype = specs[name]
        return f"{dtype}{shape}"

    lines = [
        f"{name}: got {show(got, name)}, needed {show(needed, name)}"
        for name in sorted(got.keys() | needed.keys())
        if got.get(name) != needed.get(name)
    ]
    if lines:
        shown = "; ".join(lines[:5])
        if len(lines) > 5:
            shown += f"; and {len(lines) - 5} more"
        raise ValueError(
            f"example: checkpoint {step} in {os.fspath(directory)} has other leaves: "
            + shown
        )


# ---- JSON --------------------------------------------------------------------------


def _as_dict(config: Any) -> dict:
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return dataclasses.asdict(config)
    if isinstance(config, Mapping):
        return dict(config)
    raise ValueError(
        f"config: got {type(config).__name__}, needed a dataclass or a mapping"
    )


def _to_json(name: str, value: Any) -> Any:
    """Normalizes to what JSON gives back, so that tuples equal the lists they become.

    Bytes, which some pipelines call their position, go in as base64.
    """
    if isinstance(value, bytes):
        return {"__bytes__": base64.b64encode(value).decode("ascii")}
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name}: got a value that JSON cannot hold ({error}), needed numbers, "
            "strings, lists and mappings"
        ) from error


def _from_json(value: Any) -> Any:
    if isinstance(value, dict) and value.keys() == {"__bytes__"}:
        return base64.b64decode(value["__bytes__"])
    return value


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Flattens nested mappings to ``{"model.width": 256}``."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


# ---- orbax -------------------------------------------------------------------------


def _absolute(directory: str | os.PathLike) -> str:
    path = os.fspath(directory)
    return path if "://" in path else os.path.abspath(path)


def _manager(
    directory: str | os.PathLike, *, keep: int | None = None, create: bool = False
) -> Any:
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        create=create,
        # What a killed save left behind is swept by the next save, not by readers.
        cleanup_tmp_directories=create,
        # The next step may donate the buffers: they must be on disk when save returns.
        enable_async_checkpointing=False,
    )
    return ocp.CheckpointManager(_absolute(directory), options=options)


def _read_meta(directory: str | os.PathLike, step: int) -> dict:
    import orbax.checkpoint as ocp

    with _manager(directory) as manager:
        return manager.restore(
            step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
        )["meta"]
