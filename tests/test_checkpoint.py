"""Checkpoints: exact round trips, cut-short saves, clear refusals."""

import dataclasses
import functools
import os
import pathlib
import shutil
import signal
import subprocess
import sys
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sparsejax import checkpoint

CONFIG = {"sparsity": 0.9, "model": {"width": 8, "shape": (2, 3)}}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["rows", "count"],
    meta_fields=["shape"],
)
@dataclasses.dataclass(frozen=True)
class Layout:
    """Stands for any registered dataclass whose leaves are index arrays."""

    rows: jax.Array
    count: jax.Array
    shape: tuple[int, int]


class State(NamedTuple):
    mask: jax.Array
    inner: tuple


def make_tree(seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    params = {
        "up": {"kernel": jax.random.normal(keys[0], (3, 4, 4)), "bias": jnp.zeros(4)},
        "list": [jnp.full((2,), seed, jnp.bfloat16), jnp.ones((0, 3), jnp.float16)],
    }
    return {
        "params": params,
        "layouts": Layout(
            jax.random.randint(keys[1], (3,), 0, 9), jnp.int32(seed), (12, 4)
        ),
        "opt_state": State(
            jax.random.bernoulli(keys[2], shape=(4, 4)), optax.adam(1e-3).init(params)
        ),
        "key": keys[3],
        "keys": jax.random.split(keys[3], 3),
        "rbg": jax.random.key(seed, impl="rbg"),
        "host": np.arange(3) + seed,
        "number": 3 + seed,
    }


def assert_identical(a, b):
    data = lambda x: (
        jax.random.key_data(x)
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        else x
    )
    a, b = jax.tree.map(data, a), jax.tree.map(data, b)
    a, b = jax.tree.map(np.asarray, a), jax.tree.map(np.asarray, b)
    chex.assert_trees_all_equal_shapes_and_dtypes(a, b)
    chex.assert_trees_all_equal(a, b)


@pytest.mark.parametrize("position", [{"next_index": 7}, b"\x00\xffgrain", None])
def test_round_trip_is_exact(tmp_path, position):
    checkpoint.save(tmp_path, 5, make_tree(), config=CONFIG, data_position=position)
    found = checkpoint.restore(tmp_path, make_tree(seed=1), config=CONFIG)
    assert found is not None
    assert_identical(found.tree, make_tree())
    assert (found.data_position, found.step) == (position, 5)
    assert type(found.tree["number"]) is int
    assert type(found.tree["host"]) is np.ndarray
    # The keys are typed keys that still draw the same numbers.
    for name in ("key", "rbg"):
        assert jax.random.key_impl(found.tree[name]) == jax.random.key_impl(
            make_tree()[name]
        )
        np.testing.assert_array_equal(
            jax.random.normal(found.tree[name]), jax.random.normal(make_tree()[name])
        )


def test_example_may_be_abstract(tmp_path):
    arrays = {k: v for k, v in make_tree().items() if k not in ("host", "number")}
    checkpoint.save(tmp_path, 1, arrays, config=CONFIG)
    abstract = jax.eval_shape(lambda: arrays)
    found = checkpoint.restore(tmp_path, abstract, config=CONFIG)
    assert_identical(found.tree, arrays)


def test_restores_to_the_shardings_of_the_example(tmp_path):
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    split = NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())
    value = {"w": jnp.arange(8.0), "key": jax.random.key(3)}
    checkpoint.save(
        tmp_path, 1, jax.device_put(value, {"w": split, "key": whole}), config=CONFIG
    )
    for sharding in (split, whole):
        example = jax.device_put(value, {"w": sharding, "key": whole})
        found = checkpoint.restore(tmp_path, example, config=CONFIG)
        assert found.tree["w"].sharding == sharding
        assert found.tree["key"].sharding == whole
        assert_identical(found.tree, value)


def test_keeps_the_newest(tmp_path):
    for step in range(1, 5):
        checkpoint.save(tmp_path, step, {"w": jnp.ones(2)}, config=CONFIG, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4"]
    found = checkpoint.restore(tmp_path, {"w": jnp.zeros(2)}, config=CONFIG, step=3)
    assert found.step == 3


def test_nothing_there(tmp_path):
    assert checkpoint.latest_step(tmp_path / "none") is None
    assert checkpoint.restore(tmp_path / "none", {}, config=CONFIG) is None
    assert not (tmp_path / "none").exists()


def test_other_configuration_names_the_field(tmp_path):
    checkpoint.save(tmp_path, 1, {"w": jnp.ones(2)}, config=CONFIG)
    other = {"sparsity": 0.5, "model": {"width": 16, "shape": (2, 3)}, "new": 1}
    message = (
        r"model.width: got 8, needed 16; new: got '\(no such field\)', needed 1; "
        r"sparsity: got 0.9, needed 0.5"
    )
    with pytest.raises(ValueError, match=message):
        checkpoint.restore(tmp_path, {"w": jnp.ones(2)}, config=other)
    with pytest.raises(ValueError, match=message):
        checkpoint.save(tmp_path, 2, {"w": jnp.ones(2)}, config=other)
    assert checkpoint.latest_step(tmp_path) == 1


def test_configuration_comes_back_as_json_has_it(tmp_path):
    assert checkpoint.stored_config(tmp_path / "none") is None
    assert not (tmp_path / "none").exists()
    checkpoint.save(tmp_path, 1, {"w": np.ones(2)}, config=CONFIG)
    stored = {"sparsity": 0.9, "model": {"width": 8, "shape": [2, 3]}}
    assert checkpoint.stored_config(tmp_path) == stored


def test_other_leaves_are_named(tmp_path):
    checkpoint.save(tmp_path, 1, {"w": jnp.ones(2), "b": jnp.ones(1)}, config=CONFIG)
    example = {"w": jnp.ones((2, 3)), "c": jnp.ones(1, jnp.bfloat16)}
    with pytest.raises(ValueError) as error:
        checkpoint.restore(tmp_path, example, config=CONFIG)
    for part in (
        "b: got float32[1], needed (no such leaf)",
        "c: got (no such leaf), needed bfloat16[1]",
        "w: got float32[2], needed float32[2, 3]",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(step=3), "step: got 3, needed more than 3"),
        (dict(keep=0), "keep: got 0, needed at least 1"),
        (dict(config=3), "config: got int, needed a dataclass or a mapping"),
        (dict(config={"a": object()}), "config: got a value that JSON cannot hold"),
        (dict(data_position={1, 2}), "data_position: got a value that JSON cannot"),
    ],
)
def test_bad_arguments_write_nothing(tmp_path, kwargs, message):
    checkpoint.save(tmp_path, 3, {"w": jnp.ones(2)}, config=CONFIG)
    arguments = dict(step=4, config=CONFIG) | kwargs
    with pytest.raises(ValueError, match=message):
        checkpoint.save(tmp_path, arguments.pop("step"), {"w": 1.0}, **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["3"]


def test_leftovers_of_a_cut_short_save_are_not_loaded(tmp_path):
    checkpoint.save(tmp_path, 1, {"w": jnp.ones(2)}, config=CONFIG)
    # What orbax leaves when killed: a whole or partial copy under a temporary name.
    leftover = tmp_path / "2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "1", leftover)
    (leftover / "meta" / "metadata").unlink()
    stamped = tmp_path / "3.orbax-checkpoint-tmp-1700000000"
    stamped.mkdir()
    assert checkpoint.latest_step(tmp_path) == 1
    found = checkpoint.restore(tmp_path, {"w": jnp.zeros(2)}, config=CONFIG)
    assert (found.step, found.tree["w"].tolist()) == (1, [1.0, 1.0])
    checkpoint.save(tmp_path, 2, {"w": jnp.ones(2)}, config=CONFIG)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


# Saves forever, one number in every entry; prints each step once it is on disk.
SAVER = """
import sys
import jax.numpy as jnp
from sparsejax import checkpoint
for step in range(1, 10_000):
    tree = {str(i): jnp.full((200, 100), step) for i in range(5)}
    checkpoint.save(sys.argv[1], step, tree, config={}, data_position=step)
    print(step, flush=True)
"""


def test_killed_while_saving_loads_the_last_whole_one(tmp_path):
    root = pathlib.Path(__file__).parents[1]
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        process = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(folder)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"},
        )
        # Kill inside the next save: wait for its temporary directory to appear.
        for _ in range(2 + attempt):
            done = int(process.stdout.readline())
        while not list(folder.glob("*tmp*")) and process.poll() is None:
            pass
        process.send_signal(signal.SIGKILL)
        done = max([done, *map(int, process.stdout.read().split())])
        process.wait()
        process.stdout.close()
        example = {str(i): jnp.zeros((200, 100), jnp.int32) for i in range(5)}
        found = checkpoint.restore(folder, example, config={})
        # The save under way may have become whole before the signal came.
        assert found.step in (done, done + 1) and found.data_position == found.step
        assert all(bool((leaf == found.step).all()) for leaf in found.tree.values())


def test_next_step_after_restore_is_bit_identical(tmp_path):
    optimizer = optax.adam(1e-2)
    target = jnp.arange(6.0)

    @jax.jit
    def step(params, opt_state, key):
        key, draw = jax.random.split(key)
        noise = jax.random.normal(draw, target.shape)
        gradient = jax.grad(lambda w: jnp.sum((w - target + noise) ** 2))(params)
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(gradient, opt_state, params)
        return params + updates, opt_state, key

    state = (jnp.zeros(6), optimizer.init(jnp.zeros(6)), jax.random.key(0))
    fresh = state
    for _ in range(3):
        state = step(*state)
    checkpoint.save(tmp_path, 3, state, config={})
    found = checkpoint.restore(tmp_path, fresh, config={})
    for _ in range(3):
        state, resumed = step(*state), step(*(found.tree))
        found = found._replace(tree=resumed)
        assert_identical(state, resumed)


def test_import_is_light():
    code = "import sys, sparsejax.checkpoint; print('orbax' in sys.modules)"
    root = pathlib.Path(__file__).parents[1]
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    assert found.stdout.strip() == "False"
