"""What updaters are given and cannot use: refused at once, by name; or warned of."""

import inspect
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax import schedules, transforms
from sparsejax.masks import FanIn, Rows, density, erdos_renyi
from sparsejax.transforms import _shared, sparsify

KEY = jax.random.key(0)
TIMES = {"end": 9, "every": 3}
PARAMS = {"down": jnp.ones((12, 8)), "up": jnp.ones((8, 16))}

half = lambda shapes, density: dict.fromkeys(shapes, 0.5)
lacking = lambda shapes, density: {"up": density}
beyond = lambda shapes, density: {"down": 1.5, "up": 0.0}


def make(name, **options):
    options = {"sparsity": 0.75, **options}
    if name not in ("static", "iterative_soft_shrinkage"):
        options |= TIMES
    if name not in ("gradual_magnitude", "iterative_soft_shrinkage"):
        options.setdefault("key", KEY)
    made = getattr(transforms, name)
    if name == "iterative_soft_shrinkage":
        return made(end=9, **options)
    return sparsify(optax.sgd(0.1, momentum=0.9), made(**options))


BY_LEAF = [
    "static",
    "sparse_evolutionary_training",
    "rigl",
    "sparse_momentum",
    "exploration_exploitation",
    "srigl",
    "gradual_magnitude",
    "granet",
    "iterative_soft_shrinkage",
]


@pytest.mark.parametrize("name", BY_LEAF)
def test_a_distribution_must_meet_the_density(name):
    with pytest.raises(ValueError, match="distribution .*density of 0.25.*got 112"):
        make(name, distribution=half).init(PARAMS)


@pytest.mark.parametrize("name", BY_LEAF)
@pytest.mark.parametrize(
    "distribution, message",
    [
        (lacking, r"distribution must give every leaf, lacks \['down'\]"),
        (beyond, "distribution: the density at 'down' must be in .* got 1.5"),
    ],
)
def test_a_distribution_that_is_none(name, distribution, message):
    with pytest.raises(ValueError, match=message):
        make(name, distribution=distribution).init(PARAMS)


def test_a_distribution_by_name():
    leaf_densities = inspect.unwrap(_shared.leaf_densities)
    with pytest.raises(ValueError, match="distribution must be a function.* got 'erk'"):
        leaf_densities(PARAMS, 0.25, "erk")


def test_the_first_masks_of_granet_meet_their_density_too():
    with pytest.raises(ValueError, match="distribution .*density of 0.4.*got 112"):
        make("granet", initial_sparsity=0.6, initial_distribution=half).init(PARAMS)


def test_group_envelope_too():
    step = transforms.group_envelope(
        0.1, 0.1, sparsity=0.75, groups=Rows(), distribution=half
    )
    with pytest.raises(ValueError, match="distribution .*density of 0.25"):
        step.init(PARAMS)


def test_a_distribution_written_with_jax():
    """What it computes is static, inside jit and at an update too."""

    def jax_uniform(shapes, density):
        return {name: jnp.full((), density) for name in shapes}

    tx = make("rigl", distribution=jax_uniform)
    state = jax.jit(tx.init)(PARAMS)
    _, state = jax.jit(tx.update)(PARAMS, state, PARAMS)
    assert density(state.masks).leaves == {"down": (24, 96), "up": (32, 128)}


@pytest.mark.parametrize("name", BY_LEAF[1:6])
@pytest.mark.parametrize("key", [None, 0])
def test_a_key_that_is_none(name, key):
    with pytest.raises(ValueError, match="key must be a PRNG key.* got"):
        make(name, key=key).init(PARAMS)


@pytest.mark.parametrize(
    "times, message",
    [
        ({"end": 0.75 * 1000}, "end must be an integer, got 750.0"),
        ({"end": 9, "every": 1e2}, "every must be an integer, got 100.0"),
        ({"end": 9, "begin": None}, "begin must be an integer, got None"),
    ],
)
def test_times_are_integers(times, message):
    # Without the types, which the tests check before that.
    update_steps = inspect.unwrap(schedules.update_steps)
    with pytest.raises(ValueError, match=message):
        update_steps(**{"begin": 0, "every": 1} | times)
    assert update_steps(np.int64(0), np.int32(6), np.int64(3)) == range(0, 7, 3)


def test_a_leaf_that_loses_everything_is_warned_of():
    tx = make("rigl", sparsity=0.9, structure=FanIn())
    with pytest.warns(UserWarning, match="'w' will be zero .* 0.1 of 3 units"):
        state = tx.init({"w": jnp.ones((3, 64)), "wide": jnp.ones((30, 64))})
    assert density(state.masks).leaves == {"w": (0, 192), "wide": (192, 1920)}
    ramp = sparsify(
        optax.sgd(0.1),
        transforms.gradual_magnitude(sparsity=0.9, structure=Rows(), end=9),
    )
    with pytest.warns(UserWarning, match="'w' will be zero .* 0.1 of 4 units"):
        ramp.init({"w": jnp.ones((4, 8))})


def test_masks_that_never_move_are_warned_of():
    """One input each, of which three tenths round to none."""
    params = {"w": jnp.ones((10, 64))}
    tx = make("rigl", sparsity=0.9, structure=FanIn())
    state = tx.init(params)
    with pytest.warns(UserWarning, match="mask of 'w' will never move: .* 0.3 of 1 "):
        tx.update(params, state, params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in ({"drop_fraction": 0.6}, {"drop_fraction": 0.0}):
            tx = make("rigl", sparsity=0.9, structure=FanIn(), **options)
            tx.update(params, tx.init(params), params)


@pytest.mark.parametrize("name", BY_LEAF)
def test_a_leaf_without_entries_is_in_nobodys_way(name):
    params = {**PARAMS, "none": jnp.zeros((0, 4))}
    tx = make(name)
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(params, state, params)
    assert updates["none"].shape == (0, 4)
    one = make("gradual_magnitude", distribution="global")
    assert one.init(params).masks["none"].shape == (0, 4)


def test_erdos_renyi_meets_any_density():
    shapes = {"a": (100, 100), "b": (100, 10), "c": (3, 3, 16, 4)}
    for sparsity in np.linspace(0, 1, 21):
        make("static", sparsity=float(sparsity), distribution=erdos_renyi).init(
            {name: jnp.ones(shape) for name, shape in shapes.items()}
        )
