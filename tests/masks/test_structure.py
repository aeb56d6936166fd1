"""Units and groups: which entries each structure keeps, by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import masks, transforms
from sparsejax.masks import NM, Blocks, Columns, FanIn, Rows, Unstructured

W = jnp.array(
    [
        [1.0, -8.0, 3.0, 0.0],
        [-5.0, 2.0, 3.0, 1.0],
        [4.0, 2.0, -1.0, 7.0],
        [0.0, 6.0, 1.0, -2.0],
    ]
)
CASES = {
    # The three largest |w|: 8, 7, 6.
    Unstructured(): (3 / 16, ["0100", "0000", "0001", "0100"]),
    # Pairs down each column. Column 0: 5 of (1, 5), 4 of (4, 0); column 2 has two
    # ties, which go to the upper entry.
    NM(1, 2): (1 / 2, ["0110", "1001", "1011", "0100"]),
    # Sums of |w|: 16 and 7 above, 12 and 11 below. Signed sums would order otherwise:
    # -10, 7, 12, 5.
    Blocks((2, 2)): (1 / 2, ["1100", "1100", "1100", "1100"]),
    # The two largest |w| of each column; rows 0 and 1 of the 3s in column 2.
    FanIn(): (1 / 2, ["0110", "1010", "1001", "0101"]),
    # Sums: 12, 11, 14, 9.
    Rows(): (1 / 4, ["0000", "0000", "1111", "0000"]),
    # Sums: 10, 18, 8, 10; of the two tens the first.
    Columns(): (1 / 2, ["1100", "1100", "1100", "1100"]),
}


def bits(mask):
    return ["".join(str(int(x)) for x in row) for row in np.asarray(mask)]


@pytest.mark.parametrize("structure", CASES, ids=repr)
def test_structured_mask_by_hand(structure):
    density, want = CASES[structure]
    assert bits(masks.structured_mask(W, density, structure)) == want
    narrow = W.astype(jnp.bfloat16)
    assert bits(masks.structured_mask(narrow, density, structure)) == want


@pytest.mark.parametrize("structure", [s for s in CASES if s != Unstructured()])
def test_every_matrix_of_a_stack_by_itself(structure):
    # Ten times the weights: one choice over the stack would take all units there.
    density, want = CASES[structure]
    stacked = masks.structured_mask(jnp.stack([W, 10 * W]), density, structure)
    assert bits(stacked[0]) == bits(stacked[1]) == want


def test_columns_are_not_rows():
    # Guards the reading of [in, out]: a column is what one output sees.
    w = jnp.array([[1.0, 5.0], [2.0, 5.0]])
    assert bits(masks.structured_mask(w, 0.5, Columns())) == ["01", "01"]
    assert bits(masks.structured_mask(w, 0.5, Rows())) == ["00", "11"]


def test_counts_are_whole_units_rounded_exactly():
    # 0.29 * 100 is 28.999999999999996 in floats; 29 rows of 100.
    w = jnp.arange(200.0).reshape(100, 2)
    assert int(masks.structured_mask(w, 0.29, Rows()).sum()) == 58


@pytest.mark.parametrize(
    "structure, density, shape, message",
    [
        ("rows", 0.5, (4, 4), "structure must be Unstructured, NM.*got 'rows'"),
        (NM(2, 4), 0.25, (4, 4), r"sparsity must be 1 - n/m = 0.5 .*got 0.75"),
        (NM(1, 3), 1 / 3, (4, 4), r"NM\(n=1, m=3\) must divide.*\(4, 4\)"),
        (Blocks((3, 2)), 0.5, (4, 4), r"Blocks.*must divide.*\(4, 4\)"),
        (FanIn(), 0.5, (4,), r"FanIn\(\) needs weights of rank 2.*\(4,\)"),
    ],
)
def test_what_does_not_fit_is_refused(structure, density, shape, message):
    with pytest.raises(ValueError, match=message):
        masks.structured_mask(jnp.ones(shape), density, structure)


def test_impossible_structures_are_refused():
    with pytest.raises(ValueError, match="integers, 1 <= n <= m, got 5:4"):
        NM(5, 4)
    with pytest.raises(ValueError, match=r"block_shape.*got \(0, 4\)"):
        Blocks((0, 4))


def test_given_densities_and_what_is_left():
    shapes = {"a/kernel": (10, 10), "b/kernel": (10, 10), "head": (10, 20)}
    # 400 entries at 0.5 are 200; head has 0.75 * 200 = 150; 50 left for 200.
    densities = masks.given({"head": 0.75})(shapes, 0.5)
    assert densities == {"a/kernel": 0.25, "b/kernel": 0.25, "head": 0.75}
    # All given: 0.5 * 200 + 0.25 * 200 = 150 of 400.
    densities = masks.given({"*/kernel": 0.5, "head": 0.25})(shapes, 0.375)
    assert list(densities.values()) == [0.5, 0.5, 0.25]


@pytest.mark.parametrize(
    "densities, density, message",
    [
        ({"hed": 0.5}, 0.5, "every pattern must match a leaf, got 'hed'"),
        ({"head": 0.9}, 0.3, "allow a density of 0.45 to 0.95 .*got density=0.3"),
        ({"*": 0.5}, 0.4, "allow a density of 0.5 to 0.5 .*got density=0.4"),
        ({"head": 1.5}, 0.5, r"densities\['head'\] must be in \[0, 1\], got 1.5"),
    ],
)
def test_given_densities_that_cannot_be_are_refused(densities, density, message):
    shapes = {"body": (10, 10), "head": (10, 10)}
    with pytest.raises(ValueError, match=message):
        masks.given(densities)(shapes, density)


def test_a_structure_that_does_not_fit_the_updater_is_refused():
    params = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 4))}
    times = {"sparsity": 0.75, "end": 4, "key": None}
    with pytest.raises(ValueError, match=r"1 - n/m = 0.5 for structure NM\(n=2, m=4\)"):
        transforms.rigl(**times, structure=NM(2, 4))
    with pytest.raises(ValueError, match="structure must be FanIn.. for srigl"):
        transforms.srigl(**times, structure=Rows())
    uneven = masks.given({"down": 0.5})
    updater = transforms.gradual_magnitude(
        **times, structure=NM(1, 4), distribution=uneven
    )
    with pytest.raises(ValueError, match="keep 1 of 4 in every leaf.*got 2 at 'down'"):
        updater.init(params, None)
    for updater in (
        transforms.sparse_momentum(**times, structure=FanIn()),
        transforms.granet(**times, structure=Rows()),
        transforms.gradual_magnitude(**times, structure=FanIn(), distribution="global"),
    ):
        with pytest.raises(ValueError, match="units that may move between leaves"):
            updater.init(params, None)
