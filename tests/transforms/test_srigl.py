"""SRigL by hand: salience, ablation, the new fan-in, growth."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax import transforms
from sparsejax.masks import apply_masks
from sparsejax.transforms import MaskUpdate, _srigl

KEY = jax.random.key(0)
# Columns are neurons: 6 inputs, 3 neurons, 9 weights, 3 each.
W = jnp.array(
    [
        [9.0, 6.0, 0.3],
        [-8.0, -5.0, 0.2],
        [7.0, 4.0, 0.1],
        [0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0],
    ]
)
G = jnp.array(
    [
        [9.0, 9.0, 9.0],
        [9.0, 9.0, 9.0],
        [9.0, 9.0, 9.0],
        [0.1, 0.8, 0.05],
        [-0.9, -0.3, -0.7],
        [0.2, 0.1, 0.01],
    ]
)


def columns(mask):
    return ["".join(str(int(x)) for x in column) for column in np.asarray(mask).T]


def move(w=W, g=G, mask=None, step=0, names=("w", "z"), **options):
    """One update of the first leaf; the second is there to be the last."""
    options = {"sparsity": 0.5, "end": 9, "drop_fraction": lambda t: 0.34} | options
    updater = transforms.srigl(**options, key=KEY)
    first, last = names
    params = {first: w, last: jnp.ones((2, 1))}
    masks = {
        first: w != 0 if mask is None else mask,
        last: jnp.array([[True], [False]]),
    }
    scores = {first: g, last: jnp.ones((2, 1))}
    now = MaskUpdate(masks, (), params, scores, None, jnp.int32(step))
    masks, _, ok = jax.jit(updater.update)(now)
    assert bool(ok)
    return columns(masks[first])


def test_ablation_and_the_new_fan_in_by_hand():
    # K = round(0.34 * 9) = 3. The 6 largest |w|: 9, 8, 7, 6, 5, 4. The 3 largest |g|
    # among zeros: 0.9, 0.8, 0.7, one per neuron. Salient: 4, 4, 1. Needed:
    # ceil(0.5 * 3) = 2, so neuron 2 goes. Fan-in of the two left: 9 // 2 = 4. They
    # keep their three and grow 0.9 and 0.8.
    assert move(gamma_sal=0.5) == ["111010", "111100", "000000"]
    # Needed ceil(0.3 * 3) = 1: all stay. Neuron 2 kept nothing and grows three.
    assert move(gamma_sal=0.3) == ["111000", "111000", "000111"]


def test_zeros_alone_may_be_salient_by_gradient():
    # Gradients of kept weights, 9 each, would make all nine salient three times over.
    assert move(gamma_sal=0.6)[2] == "000000"


def test_a_dropped_weight_does_not_grow_back_while_there_are_others():
    assert move(gamma_sal=0.0)[2] == "000111"


def test_ablation_is_for_good():
    mask = jnp.stack([W[:, 0] != 0, W[:, 1] != 0, jnp.zeros(6, bool)], axis=1)
    mask = mask.at[3, 0].set(True).at[3, 1].set(True)
    w = jnp.where(mask, jnp.where(W == 0, 0.5, W), 0.0)
    # n = 8, K = 3, five largest: 9, 8, 7, 6, 5. Largest |g| among zeros of active
    # neurons only: 0.9, 0.3, 0.2, so salient are 5 and 3 of ceil(0.75 * 4) = 3 needed.
    got = move(w=w, mask=mask, gamma_sal=0.75)
    assert got[2] == "000000" and [c.count("1") for c in got] == [4, 4, 0]


def test_as_many_neurons_stay_as_the_density_needs():
    # K = round(0.67 * 9) = 6. The three largest |w| are of neuron 0, and so are three
    # of the six largest |g|; then 0.5 of neuron 1, and of the zeros by index one each
    # of neurons 2 and 1. Salient: 6, 2, 1 of 3 needed. Two neurons hold 9 weights, one
    # cannot, so neuron 1 stays.
    w = W.at[:3, 1].set(0.4)
    g = jnp.zeros((6, 3)).at[3:, 0].set(1.0).at[3, 1].set(0.5)
    got = move(w=w, g=g, gamma_sal=1.0, drop_fraction=lambda t: 0.67)
    assert [c.count("1") for c in got] == [4, 4, 0]


def test_the_density_is_never_exceeded():
    # 11 weights for 4 neurons: 2 each, 8 in all, not 3 each.
    updater = transforms.srigl(sparsity=0.45, end=9, key=KEY)
    masks, _ = updater.init({"w": jnp.ones((5, 4))}, KEY)
    assert masks["w"].sum(0).tolist() == [2, 2, 2, 2]


def test_too_many_weights_of_a_neuron_are_cut_by_magnitude():
    # The authors sort booleans there: which weights go is arbitrary. Neuron 0 has five
    # of fan-in 2 (5 // 2) and keeps 9 and -8, not the first two.
    w = jnp.array([[1.0, 0], [9.0, 0], [2.0, 0], [-8.0, 3.0], [7.0, 0]])
    got = move(w=w, g=jnp.ones((5, 2)), gamma_sal=0.0, drop_fraction=lambda t: 0.0)
    assert got == ["01010", "10010"]


def test_the_last_layer_keeps_all_neurons_by_default():
    # In the authors' code it is ablated unless named: a default of None becomes [].
    dead = {"gamma_sal": 0.5}
    assert move(**dead, names=("body", "z"))[2] == "000000"
    assert move(**dead, names=("z", "body"))[2] != "000000"
    spared = lambda name: name in _srigl.keeps_all(None, {name: W, "z": W})
    assert all(map(spared, ("head", "lm_head", "Classifier_0", "head/kernel")))
    assert not any(map(spared, ("heads", "multi_head_attention", "overhead")))
    assert move(**dead, names=("z", "body"), spared=())[2] == "000000"
    assert move(**dead, names=("body", "z"), spared="bo*")[2] != "000000"
    with pytest.raises(ValueError, match="spared: every pattern must match"):
        move(**dead, spared="nothing")


def test_every_matrix_of_a_stack_by_itself():
    updater = transforms.srigl(
        sparsity=0.5,
        end=9,
        key=KEY,
        drop_fraction=lambda t: 0.34,
        spared=(),
        gamma_sal=0.5,
    )
    other = W[:, ::-1]
    now = MaskUpdate(
        {"w": jnp.stack([W, 100 * other]) != 0},
        (),
        {"w": jnp.stack([W, 100 * other])},
        {"w": jnp.stack([G, G[:, ::-1] / 100])},
        None,
        jnp.int32(0),
    )
    masks, _, _ = jax.jit(updater.update)(now)
    assert columns(masks["w"][0]) == ["111010", "111100", "000000"]
    assert columns(masks["w"][1]) == ["000000", "111100", "111010"]


def test_gradients_are_averaged_with_their_signs():
    # Devices that average |gradient| would grow where the gradients cancel.
    tx = transforms.sparsify(
        optax.sgd(0.0),
        transforms.srigl(
            sparsity=0.5, end=0, drop_fraction=lambda t: 0.5, gamma_sal=0.0, key=KEY
        ),
    )
    tx = optax.MultiSteps(tx, 2).gradient_transformation()
    params = {"w": jnp.ones((4, 1))}
    state = tx.init(params)
    mask = transforms.get_masks(state)["w"]
    params = apply_masks(params, {"w": mask})
    first, second = np.flatnonzero(~np.asarray(mask)[:, 0])
    g = jnp.zeros((4, 1))
    for sign in (1.0, -1.0):
        step = {"w": g.at[first].set(9.0 * sign).at[second].set(0.1)}
        with jax.numpy_dtype_promotion("standard"):
            _, state = tx.update(step, state, params)
    new = transforms.get_masks(state)["w"]
    assert bool(new[second, 0]) and not bool(new[first, 0])


def test_a_neuron_without_inputs_is_refused():
    updater = transforms.srigl(sparsity=0.9, end=9, key=KEY)
    with pytest.raises(
        ValueError, match="an input, got 2 weights for 4 neurons at 'w'"
    ):
        updater.init({"w": jnp.ones((5, 4))}, KEY)
