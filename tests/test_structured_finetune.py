"""structured_finetune.py in small: counts, projections, table, kill and resume."""

import dataclasses
import importlib
import json
import pathlib
import random
import shutil
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax import checkpoint

ROOT = pathlib.Path(__file__).parents[1]
# Examples are scripts: their neighbours are modules beside them.
sys.path.insert(0, str(ROOT / "examples"))
finetune = importlib.import_module("structured_finetune")
pretrain_lm = importlib.import_module("pretrain_lm")

TINY = "--width 16 --ffn-width 48 --heads 2 --layers 1 --length 6 --batch 2 --steps 2"


@pytest.fixture
def text(tmp_path):
    """A small text, so that nobody reads 30 MB."""
    path = tmp_path / "text.txt"
    words = random.Random(0).choices(["sparse", "dense", "block", "mask"], k=3000)
    path.write_text(" ".join(words))
    return str(path)


@pytest.fixture(scope="module")
def dense():
    """A model that was not trained."""
    flags = [*TINY.split(), "--ffn", "dense"]
    (config,) = pretrain_lm.configure(pretrain_lm.parse(flags)).values()
    model = finetune._transformer.Transformer(config, None, rngs=nnx.Rngs(0))
    return finetune.Dense(config, *nnx.split(model))


@pytest.mark.parametrize(
    ("sizes", "counts"),
    [
        # Monarch: 8 blocks of 16 x 16 and of 16 x 48. Pixelfly: 8 x 24 blocks of 16 x
        # 16, one in each column, and rank 4. Rank 16. Six blocks of 64 columns.
        ((128, 384, 8, 16), (8192, 24 * 256 + 4 * 512, 16 * 512, 128 * 64)),
        ((384, 128, 8, 16), (8192, 24 * 256 + 4 * 512, 16 * 512, 128 * 64)),
        # 8 (16 * 16 + 16 * 64). 32 blocks and rank 3; rank 16; seven blocks of 19 x 74,
        # the last 14 x 68.
        ((128, 512, 8, 16), (10240, 8192 + 3 * 640, 10240, 6 * 19 * 74 + 14 * 68)),
        # Smaller blocks leave room for strides 1, 2, 4 and 8 beside the diagonal: five
        # 4 x 4 blocks in each of 96 columns, and rank 1.
        ((128, 384, 8, 4), (8192, 96 * 80 + 512, 16 * 512, 128 * 64)),
    ],
)
def test_forms_have_as_many_parameters_as_fit(sizes, counts):
    forms = finetune.forms(*sizes)
    arms = ("monarch", "pixelfly", "low_rank", "block_diagonal")
    assert tuple(forms[arm].params for arm in arms) == counts
    assert forms["afresh"] == forms["monarch"]
    assert forms["pixelfly"].size == (16 if sizes[-1] == 4 else 1)


def test_blocks_that_do_not_fit_are_named():
    message = "--block: got 16, whose diagonal of blocks and rank 1 have more than the "
    with pytest.raises(ValueError, match=message + "256 parameters of --blocks 4"):
        finetune.forms(16, 48, 4, 16)


QUICK = ("magnitude", "monarch")


@pytest.mark.parametrize(
    "arm",
    [
        pytest.param(arm, marks=() if arm in QUICK else pytest.mark.slow)
        for arm in finetune.ARMS
    ],
)
def test_every_arm_begins_with_the_nearest_weights(dense, arm):
    config = finetune.Config(blocks=4, block=2)
    start = finetune.begin(arm, dense, config, jax.random.key(1))
    # Monarch's: four blocks of 4 x 4 and four of 4 x 12, up; as many down.
    assert start.weights == (2 * 16 * 48 if arm == "dense" else 2 * 4 * 4 * (4 + 12))

    before = nnx.merge(dense.graphdef, dense.params)
    after = nnx.merge(start.graphdef, start.params)
    weights, rest = [], []
    for name, k in (("up", 16), ("down", 48)):
        w = getattr(before.blocks[0].mlp, name).kernel[...]
        made = getattr(after.blocks[0].mlp, name)(jnp.eye(k))
        weights.append(np.asarray(w, np.float64))
        rest.append(weights[-1] - np.asarray(made, np.float64))
        of_layer = start.layers.get(f"blocks/0/mlp/{name}/kernel", {}).get("error")
        if of_layer is not None:
            want = np.linalg.norm(rest[-1]) / np.linalg.norm(w)
            assert of_layer == pytest.approx(want, rel=1e-4)
    if arm == "afresh":
        assert start.error is None
    else:
        norm = lambda arrays: np.sqrt(sum((a**2).sum() for a in arrays))
        error = norm(rest) / norm(weights)
        assert start.error == pytest.approx(error, rel=1e-4, abs=1e-6)
    if arm == "low_rank":  # 256 entries are rank 4
        values = [np.linalg.svd(w, compute_uv=False)[4:] for w in weights]
        assert start.error == pytest.approx(norm(values) / norm(weights), rel=1e-4)
    if arm == "magnitude":  # the smallest of each go
        small = [np.sort(np.abs(w).ravel())[:-256] for w in weights]
        assert start.error == pytest.approx(norm(small) / norm(weights), rel=1e-4)
    # Nothing else has changed.
    chex.assert_trees_all_equal(
        nnx.state(before.blocks[0].attention), nnx.state(after.blocks[0].attention)
    )
    chex.assert_trees_all_equal(nnx.state(before.head), nnx.state(after.head))


def test_a_step_keeps_the_mask_of_its_state(dense):
    """One program serves every seed, whose masks differ."""
    config = finetune.Config(blocks=4, block=2, steps=10, warmup=1)
    negated = dense._replace(params=jax.tree.map(lambda p: p[..., ::-1], dense.params))
    starts = [
        finetune.begin("magnitude", one, config, jax.random.key(0))
        for one in (dense, negated)
    ]
    optimizers = [
        finetune.make_optimizer(config, dense.config, start.masks) for start in starts
    ]
    programs = finetune.build(starts[0].graphdef, optimizers[0])
    with jax.numpy_dtype_promotion("standard"):
        state = optimizers[1].init(starts[1].params)
    state = finetune.State(jax.tree.map(jnp.copy, starts[1].params), state)
    batch = np.arange(14, dtype=np.uint8).reshape(2, 7)
    for rate in (0.0, 1e-2):
        state, _ = programs.step(state, rate, batch)
    moved = [
        np.asarray(params.blocks[0].mlp.up.kernel[...])
        for params in (
            nnx.merge(starts[1].graphdef, starts[1].params),
            nnx.merge(starts[1].graphdef, state.params),
        )
    ]
    np.testing.assert_array_equal(moved[0] != 0, moved[1] != 0)
    kept = moved[0] != 0
    # Adam's second step at its peak is about the rate long.
    step = np.abs(moved[1] - moved[0])[kept]
    assert kept.sum() == 256 and 1e-3 < np.median(step) < 2e-2


def test_table_takes_each_arm_at_its_best_rate():
    losses = {  # arm, rate, seed: before, after
        ("dense", 0.1, 0): (4.0, 3.0),
        ("dense", 0.1, 1): (5.0, 3.5),
        ("monarch", 0.1, 0): (8.0, 4.0),
        ("monarch", 0.1, 1): (8.0, 6.0),
        ("monarch", 0.3, 0): (8.0, 4.5),  # worse for one seed, better in the mean
        ("monarch", 0.3, 1): (8.0, 5.0),
        ("afresh", 0.1, 0): (9.0, 7.0),
        ("afresh", 0.1, 1): (9.0, 7.0),
    }
    rows = [
        finetune._structured_report.Row(
            *where,
            weights=1000,
            error=None if where[0] == "afresh" else 0.5,
            layers={},
            records=[
                {"step": 0, "validation": before, "test": 0.0},
                {"step": 9, "validation": after, "test": 2 * after},
            ],
        )
        for where, (before, after) in losses.items()
    ]
    lines, results = finetune._structured_report.compare(rows[::-1])
    found = {result["arm"]: result for result in results}
    assert [found[arm]["rate"] for arm in ("dense", "monarch")] == [0.1, 0.3]
    assert found["monarch"]["validation"] == [4.5, 5.0]
    assert found["dense"]["before"] == [4.0, 5.0]
    assert found["dense"]["validation_minus_monarch"] == [-1.5, -1.5]
    assert found["afresh"]["test_minus_monarch"] == [5.0, 4.0]
    by_name = {line[0]: line[1:] for line in lines}
    # Of 4.5 and 5: standard error 0.25.
    assert by_name["Monarch"] == (
        *("1,000", "0.500", "0.3", "8.000 ± 0.000", "4.7500 ± 0.2500", ""),
        *("9.5000 ± 0.5000", ""),
    )
    assert by_name["Monarch, drawn afresh"][1] == ""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--steps 0", "--steps: got 0, needed at least 1"),
        ("--blocks 0", "--blocks: got 0, needed at least 1"),
        ("--eval-every 0", "--eval-every: got 0, needed at least 1"),
        ("--learning-rates 1 0", "--learning-rates: got 0.0, needed above 0"),
        ("--seeds 0 -1", "--seeds: got -1, needed at least 0"),
        ("--data none.txt", "--data: got none.txt, which is not there, needed"),
        ("--checkpoint none", "--checkpoint: got none, which holds none, needed one"),
        (
            "--checkpoint a b",
            "--checkpoint: got 2, needed one, or one for each of the 3",
        ),
        ("--checkpoint a --pretrain=x", "--pretrain: got 'x' beside --checkpoint"),
        ("--pretrain=--ffn=moe", "--pretrain: got '--ffn=moe', needed --ffn den"),
    ],
)
def test_bad_flags_are_named_before_anything_is_written(tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        finetune.main(["--out", str(tmp_path / "out"), *flags.split()])
    assert not [*tmp_path.iterdir()]


def test_checkpoints_of_other_models_are_refused(tmp_path):
    config = dataclasses.asdict(pretrain_lm.Config(ffn="moe"))
    checkpoint.save(tmp_path / "moe", 1, {"w": np.ones(2)}, config=config)
    with pytest.raises(ValueError, match=r"--checkpoint: .*moe, of moe, needed one of"):
        finetune.load(tmp_path / "moe")


def test_every_flag_has_help(capsys):
    with pytest.raises(SystemExit):
        finetune.parse(["--help"])
    text = capsys.readouterr().out
    for field in dataclasses.fields(finetune.Config):
        assert f"--{field.name.replace('_', '-')}" in text, field.name


# ---- from a checkpoint to a table --------------------------------------------------

FLAGS = (
    "--steps 3 --eval-every 2 --eval-batches 1 --blocks 4 --block 2 --warmup 1 "
    "--learning-rates 1e-2"
).split()


def run(text, folder, *flags):
    finetune.main([*FLAGS, "--data", text, "--out", str(folder), *flags])
    return json.loads((folder / "results.json").read_text())


@pytest.mark.slow
def test_a_checkpoint_of_stacked_layers(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(finetune, "ARMS", ("dense", "magnitude", "monarch"))
    flags = [*TINY.split(), "--layers", "2", "--ffn", "dense", "--scan", "--data", text]
    folder = tmp_path / "checkpoints"
    (one,) = pretrain_lm.main(
        [*flags, "--out", str(tmp_path / "a"), "--checkpoint-dir", str(folder)]
    )
    found = run(
        text, tmp_path / "out", "--checkpoint", str(folder / "dense"), "--seeds", "4"
    )
    runs = {each["arm"]: each for each in found["runs"]}
    assert tuple(runs) == finetune.ARMS
    assert all(len(each["layers"]) == 2 for each in runs.values() if each["error"])
    assert all(each["step"] == [0, 2, 3] for each in runs.values())
    # Two layers, up and down, of 4 * 4 * (4 + 12).
    weights = {result["arm"]: result["weights"] for result in found["results"]}
    assert weights.pop("dense") == 4 * 16 * 48
    assert set(weights.values()) == {4 * 256}
    # What the dense model begins with is what the checkpoint computes.
    held_out = finetune.split(
        finetune._data.load_text([text], needed=14),
        one.config,
        finetune.Config(eval_batches=1),
    )
    (batch,) = held_out.validation
    want = float(one.programs.evaluate(one.state, batch).loss) / np.log(2)
    assert runs["dense"]["validation"][0] == pytest.approx(want, abs=2e-5)
    assert runs["magnitude"]["validation"][0] != runs["dense"]["validation"][0]
    for name in ("curves.png", "table.md"):
        assert (tmp_path / "out" / name).stat().st_size > 1000
    assert "minus Monarch" in capsys.readouterr().out


@pytest.mark.slow
def test_killed_anywhere_and_run_again_is_the_same(text, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "ARMS", ("magnitude", "monarch"))
    flags = ("--seeds", "5", f"--pretrain={TINY} --eval-batches 1")
    whole = run(text, tmp_path / "whole", *flags)

    class Killed(BaseException):
        pass

    save = checkpoint.save

    def dies(*args, **kwargs):
        # Half of the time what the log says is not in a checkpoint yet.
        if after:
            save(*args, **kwargs)
        raise Killed

    # The dense model is there; it is pretrain_lm.py that trains it again or goes on.
    shutil.copytree(tmp_path / "whole" / "dense", tmp_path / "again" / "dense")
    # Each run makes one save and dies, or dies before a save and makes none.
    for turn in range(20):
        after = turn % 2 == 1
        with monkeypatch.context() as patched:
            patched.setattr(checkpoint, "save", dies)
            try:
                again = run(text, tmp_path / "again", *flags)
                break
            except Killed:
                continue
    assert turn == 8  # of two saves of each arm
    assert again == whole | {"command": again["command"]}

    with pytest.raises(ValueError, match="steps: got 3, needed 9"):
        run(text, tmp_path / "again", *flags, "--steps", "9")
