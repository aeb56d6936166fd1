"""hash_routing and balanced_table by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.routing import balanced_table, hash_routing


def test_without_a_table_by_hand():
    ids = jnp.array([0, 3, 7, -1])
    routing = hash_routing(ids, 4, k=2)
    # (id + i) % 4, half each; that of an id below 0 is in range too.
    assert routing.indices.tolist() == [[0, 1], [3, 0], [3, 0], [3, 0]]
    assert (routing.weights == 0.5).all() and routing.valid.all()
    assert routing.probs.tolist() == [[0.5, 0.5, 0, 0]] + [[0.5, 0, 0, 0.5]] * 3


def test_with_a_table_by_hand():
    table = jnp.array([[0, 1], [2, 2]])
    mask = jnp.array([True, True, False])
    routing = hash_routing(jnp.array([1, 0, 9]), 3, table=table, mask=mask)
    assert routing.indices[:2].tolist() == [[2, 2], [0, 1]]
    assert routing.valid.tolist() == [[True] * 2, [True] * 2, [False] * 2]
    assert routing.probs.tolist() == [[0, 0, 1], [0.5, 0.5, 0], [0, 0, 0]]
    assert routing.counts().tolist() == [1, 1, 2]


def test_logits_weigh_what_the_ids_choose():
    # Softmax (.25, .125, .625): of experts 0 and 2 .25 and .625, or 2/7 and 5/7.
    logits = jnp.log(jnp.array([[2.0, 1.0, 5.0]]))
    ids, table = jnp.array([0]), jnp.array([[0, 2]])
    plain = hash_routing(ids, 3, table=table, logits=logits, normalize="none")
    np.testing.assert_allclose(plain.weights, [[0.25, 0.625]], rtol=1e-6)
    np.testing.assert_allclose(plain.probs, [[0.25, 0.125, 0.625]], rtol=1e-6)
    of_one = hash_routing(ids, 3, table=table, logits=logits)
    np.testing.assert_allclose(of_one.weights, [[2 / 7, 5 / 7]], rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8, jnp.int8, jnp.uint32])
def test_traced_ids_out_of_the_table_choose_nobody(dtype):
    """A gather would clamp them to the last row, or count from the end."""
    table = jnp.array([[0], [1], [5], [-1]], dtype if dtype == jnp.int8 else jnp.int32)
    ids = jnp.array([0, 1, 2, 3, 4, 120], dtype)
    routing = jax.jit(lambda i, table: hash_routing(i, 2, table=table))(ids, table)
    assert routing.valid[:, 0].tolist() == [True, True] + [False] * 4
    assert routing.indices.min() >= 0 and routing.indices.max() < 2
    assert routing.probs[2:].sum() == 0 and routing.weights[2:].sum() == 0
    assert routing.counts().tolist() == [1, 1]


def test_traced_ids_below_0_choose_nobody():
    run = jax.jit(lambda i: hash_routing(i, 2, table=jnp.array([0, 1])))
    assert run(jnp.array([-1, 1])).valid[:, 0].tolist() == [False, True]


def test_concrete_padding_may_have_any_id():
    ids, mask = jnp.array([0, -100]), jnp.array([True, False])
    routing = hash_routing(ids, 2, table=jnp.array([1]), mask=mask)
    assert routing.valid[:, 0].tolist() == [True, False]


def test_balanced_table_by_hand():
    # 5 to 0; 4 to 1; 3 to 1, the least so far; 2 to 0; 1 to the first of two with 7.
    table = balanced_table(jnp.array([1, 2, 3, 4, 5]), 2)
    assert table.ravel().tolist() == [0, 0, 1, 1, 0]
    # Two each: 3 to (0, 1); 2 to (2, 0), the first of 0 and 1; 1 to (2, 1).
    table = balanced_table(jnp.array([3, 2, 1]), 3, k=2)
    assert table.tolist() == [[0, 1], [2, 0], [2, 1]]


def test_balanced_table_balances_zipf():
    """Hashing alone gives the expert of the most frequent id far too much."""
    counts = 1_000_000 // jnp.arange(1, 2001, dtype=jnp.int32)
    table = jax.jit(lambda c: balanced_table(c, 8))(counts)[:, 0]
    load = np.bincount(np.asarray(table), np.asarray(counts), 8)
    assert load.max() / load.mean() < 1.01
    # Counts of 2^24 and 1: in float32 their sum is 2^24.
    table = balanced_table(jnp.array([2**24, 2**24] + [1] * 6), 2)
    assert np.bincount(table[:, 0]).tolist() == [4, 4]


IDS = jnp.array([0, 1, 2])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: hash_routing(IDS[None], 2), r"ids: got int32 \(1, 3\)"),
        (lambda: hash_routing(IDS.astype(jnp.float32), 2), "ids: got float32"),
        (lambda: hash_routing(IDS, 0), "num_experts: got 0"),
        (lambda: hash_routing(IDS, 2, k=3), "k: got 3, .* the 2 experts"),
        (lambda: hash_routing(IDS, 2, table=jnp.array([0, 1])), "ids: got 0 to 2"),
        (lambda: hash_routing(IDS, 2, table=jnp.array([0, 1, 2])), "table: .* 0 to 2"),
        (lambda: hash_routing(IDS, 2, table=jnp.eye(3)), "table: got float32"),
        (
            lambda: hash_routing(IDS, 4, k=3, table=jnp.zeros((3, 2), int)),
            "k: got 3 beside a table of 2",
        ),
        (lambda: hash_routing(IDS, 2, logits=jnp.ones((3, 3))), "logits: got shape"),
        (lambda: hash_routing(IDS, 2, mask=jnp.ones(2, bool)), "mask: got bool"),
        (
            lambda: hash_routing(IDS, 2, logits=jnp.ones((3, 2)), normalize="max"),
            "normalize: got 'max'",
        ),
        (lambda: balanced_table(IDS[None], 2), r"counts: got int32 \(1, 3\)"),
        (lambda: balanced_table(-IDS, 2), "counts: got some below 0"),
        (lambda: balanced_table(jnp.full(3, 2**30), 2), "counts: got a sum"),
        (lambda: balanced_table(IDS, 2, k=3), "k: got 3"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
