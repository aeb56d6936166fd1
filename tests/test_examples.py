"""The main job in small: every feed-forward, kill and resume, programs, refusals."""

import dataclasses
import importlib
import json
import math
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import chex
import jax
import numpy as np
import pytest

from sparsejax import checkpoint

ROOT = pathlib.Path(__file__).parents[1]
# Examples are scripts: their neighbours are modules beside them.
sys.path.insert(0, str(ROOT / "examples"))
pretrain_lm = importlib.import_module("pretrain_lm")
upcycle_lm = importlib.import_module("upcycle_lm")
tradeoffs = importlib.import_module("sparse_attention_tradeoffs")
_report = importlib.import_module("_report")

# 10% of 20 blocks. No other array of these programs has as many entries as a
# feed-forward weight has, or would have: 64 x 320.
WIDTH, FFN_WIDTH, BLOCK = 64, 320, 32
SMALL = (
    f"--width {WIDTH} --ffn-width {FFN_WIDTH} --block {BLOCK} --heads 2 --layers 1 "
    "--batch 3 --length 20 --eval-batches 1 --every 2 --fraction 0.9"
).split()


@pytest.fixture
def text(tmp_path):
    """A small text, so that nobody reads 30 MB."""
    path = tmp_path / "text.txt"
    words = random.Random(0).choices(["sparse", "dense", "block", "mask"], k=3000)
    path.write_text(" ".join(words))
    return str(path)


@pytest.fixture
def run(text, tmp_path):
    """Runs the script's main in this process."""

    def run(*flags, out="out"):
        return pretrain_lm.main(
            [*SMALL, "--data", text, "--out", str(tmp_path / out), *map(str, flags)]
        )

    return run


LOW_RANK = 2 * 3 * (WIDTH + FFN_WIDTH)  # of rank 3, up and down
DENSITY = dict(
    dense=1,
    masked=0.1,
    block_sparse=0.1,
    moe=0.5,
    # Four blocks of 16 x 16 and four of 16 x 80, up and down.
    monarch=2 * 4 * 16 * (16 + 80) / (2 * WIDTH * FFN_WIDTH),
    # Two of the four blocks along the shorter side.
    pixelfly=0.5 + LOW_RANK / (2 * WIDTH * FFN_WIDTH),
    low_rank=LOW_RANK / (2 * WIDTH * FFN_WIDTH),
)


WINDOW = "--attention", "window", "--attention-block=4", "--window=6"
MOBA = "--attention", "blocks", "--attention-block=4", "--budget=2"


@pytest.mark.parametrize(
    "flags",
    [
        ("--ffn", "dense"),
        ("--ffn", "masked", "--updater", "rigl"),
        ("--ffn", "block_sparse", "--updater", "set"),
        pytest.param(
            ("--ffn", "block_sparse", "--dtype", "bfloat16", "--scan", "--remat"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("--ffn", "moe", "--dtype", "bfloat16", "--scan", "--remat", "--experts=4"),
            marks=pytest.mark.slow,
        ),
        ("--ffn", "monarch", "--monarch-blocks", "4"),
        pytest.param(
            ("--ffn", "pixelfly", "--rank=3", "--block=16", "--scan", "--remat"),
            marks=pytest.mark.slow,
        ),
        pytest.param(("--ffn", "low_rank", "--rank", "3"), marks=pytest.mark.slow),
        ("--ffn", "dense", *WINDOW),
        pytest.param(
            ("--ffn", "moe", *MOBA, "--experts=4", "--dtype=bfloat16", "--scan"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("--ffn", "masked", *MOBA, "--scan", "--remat"),
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(("--ffn", "monarch", *WINDOW), marks=pytest.mark.exhaustive),
        pytest.param(
            ("--ffn", "block_sparse", *MOBA, "--selector=quest"),
            marks=pytest.mark.exhaustive,
        ),
    ],
    ids=lambda flags: "-".join(flags[1:4:2]),
)
def test_five_steps(run, tmp_path, flags):
    (one,) = run("--steps", 5, *flags)
    assert one.step == 5 and math.isfinite(one.validation)
    out = tmp_path / "out"
    lines = (out / f"{one.name}.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 5]
    (row,) = json.loads((out / "summary.json").read_text())
    assert row["validation_bits_per_byte"] == one.validation
    assert row["density"] == pytest.approx(DENSITY[flags[1]], abs=1e-3)
    assert (out / "loss.png").stat().st_size > 10_000
    assert (out / "topology.png").exists() == (DENSITY[flags[1]] == 0.1)
    assert (out / "load.png").exists() == (flags[1] == "moe")
    attention = one.config.attention
    # Blocks of 4 x 4 of 20 x 20. A window of 6: rows of 1, 2, 3, 3 and 3 of the 5.
    # MoBA: a query's own and one other, so that four queries have 2 to 5.
    low, high = {"window": (12, 12), "blocks": (9, 15), "dense": (25, 25)}[attention]
    assert low / 25 <= row["attention_density"] + 1e-6
    assert row["attention_density"] <= high / 25 + 1e-6
    for record in map(json.loads, lines):
        assert ("attention_density" in record) == (attention != "dense")
    if attention != "dense":
        assert record["attention_density"] == pytest.approx([row["attention_density"]])


@pytest.mark.slow
def test_attention_side_by_side(run, capsys):
    """A window of the whole length is dense attention."""
    flags = "--steps 4 --attention-block 8 --window 20 --compare dense,dense+window"
    dense, window = run(*flags.split())
    assert [one.name for one in (dense, window)] == ["dense", "dense+window"]
    losses = [
        [r["train_bits_per_byte"] for r in one.log.records] for one in (dense, window)
    ]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    shown = " ".join(capsys.readouterr().out.split())
    assert "attention 66.7% dense" in shown and "attention density" in shown
    rows = [_report.summarize(one) for one in (dense, window)]
    # Two products of 20 x 20 x 64, forward and twice that backward, of which 6 of 9.
    gap = 3 * 2 * 2 * 20 * WIDTH * (1 - 6 / 9)
    assert rows[0]["flops_per_token"] - rows[1]["flops_per_token"] == round(gap)


@pytest.mark.parametrize("updater", pretrain_lm.UPDATERS["masked"])
def test_every_mask_updater_is_made_from_the_flags(updater):
    optimizer = pretrain_lm.make_optimizer(small_config(ffn="masked", updater=updater))
    params = {
        "mlp": {"up": {"kernel": np.ones((20, 10), np.float32)}},
        "attention": {"out": {"kernel": np.ones((20, 10), np.float32)}},
    }
    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(params)
    (mask,) = jax.tree.leaves(pretrain_lm.sj.transforms.get_masks(state))
    assert mask.sum() == (200 if updater == "gradual_magnitude" else 20)


def test_side_by_side_compiles_once_and_moves_blocks(run, capsys):
    pretrain_lm.TRACES.clear()
    dense, sparse = run("--compare", "dense,block_sparse", "--steps", 9)
    # Two models, of which one has a topology that moves.
    assert pretrain_lm.TRACES == {"train_step": 2, "evaluate": 2, "topology_step": 1}

    after = pretrain_lm._report.topology_of(sparse.state, sparse.config)
    assert after.keys() == {"layer 0 up", "layer 0 down"}
    for name, before in sparse.first_topology.items():
        assert before.sum() == after[name].sum() == 2
    assert any((after[name] != sparse.first_topology[name]).any() for name in after)

    table = capsys.readouterr().out
    for words in (
        "bits per byte",
        "stored parameters",
        "MFLOPs per token",
        "amortized",
    ):
        assert words in table
    weights = 2 * WIDTH * FFN_WIDTH
    rows = [pretrain_lm._report.summarize(one) for one in (dense, sparse)]
    stored = [row["stored_parameters"] for row in rows]
    assert stored[0] - stored[1] == weights - weights // 10
    flops = [row["flops_per_token"] for row in rows]
    assert flops[0] - flops[1] == 6 * (weights - weights // 10)
    # Both saw the same bytes in the same order.
    assert dense.batches.get_state() == sparse.batches.get_state()


@pytest.mark.slow
def test_experts_go_on_from_a_checkpoint_with_their_bias(run, tmp_path, capsys):
    """Stopped at 4 of 8 steps: what follows is that of a run which was not."""
    flags = "--ffn moe --experts 4 --capacity-factor 1 --balance-rate 0.01 --steps 8"
    flags = [*flags.split(), "--layers", 2, "--checkpoint-every", 4]
    (whole,) = run(*flags, "--checkpoint-dir", tmp_path / "whole")
    (newest,) = (tmp_path / "whole" / "moe").glob("8")
    shutil.rmtree(newest)  # as if it had been killed before
    (resumed,) = run(*flags, "--checkpoint-dir", tmp_path / "whole", "--resume")
    data = lambda state: jax.tree.map(
        np.asarray, state._replace(key=jax.random.key_data(state.key))
    )
    chex.assert_trees_all_equal(data(resumed.state), data(whole.state))
    biases = jax.tree.leaves(resumed.state.balance)
    # Eight steps of 0.01, centred, for each layer.
    assert [bias.shape for bias in biases] == [(4,), (4,)]
    assert all(0.005 < np.abs(bias).max() < 0.081 for bias in biases)

    for record in resumed.log.records:  # 3 * 20 tokens, two experts each
        assert np.sum(record["load"], axis=1).tolist() == pytest.approx([120, 120])
        # An expert serves 30: the rest is turned away.
        assert 0 < record["dropped"] < 0.75
    row = pretrain_lm._report.summarize(resumed)
    assert row["dropped"] == resumed.log.records[-1]["dropped"]
    # Each layer: two of four experts, of 2 d f weights, are idle for a token.
    idle = 2 * 2 * 2 * WIDTH * FFN_WIDTH
    assert pretrain_lm._report.idle_parameters(resumed.config) == idle
    shown = capsys.readouterr().out
    assert "x the mean" in shown and "choices dropped" in shown


@pytest.mark.slow
def test_experts_on_a_mesh_compute_the_same():
    """The balance is of the whole batch, not of a device's share of it."""
    batch = np.random.default_rng(0).integers(0, 256, (4, 21)).astype(np.uint8)

    def steps(mesh, **changes):
        config = small_config(
            **{"ffn": "moe", "updater": "none", "batch": 4, "layers": 2, **changes}
        )
        programs = pretrain_lm.build(config, pretrain_lm.make_mesh(mesh))
        state = programs.init(jax.random.key(0))
        state, losses = programs.train_step(state, batch)
        return jax.tree.leaves(state.balance), losses

    (one, one_losses), (many, many_losses) = map(steps, ("data=1", "data=2,fsdp=2"))
    np.testing.assert_allclose(one_losses.loss, many_losses.loss, rtol=1e-5)
    np.testing.assert_array_equal(one_losses.load, many_losses.load)
    assert one_losses.load.sum(axis=1).tolist() == [160, 160]
    # u sign(mean - load), centred: layer by layer.
    for layer, (bias, its_bias) in enumerate(zip(one, many, strict=True)):
        step = np.sign(20 - np.asarray(one_losses.load)[layer])
        np.testing.assert_allclose(bias, 1e-3 * (step - step.mean()), atol=1e-7)
        np.testing.assert_array_equal(bias, its_bias)
    (stacked,), losses = steps("data=1", scan=True)
    step = np.sign(20 - np.asarray(losses.load))
    want = 1e-3 * (step - step.mean(axis=1, keepdims=True))
    np.testing.assert_allclose(stacked, want, atol=1e-7)
    config = small_config(ffn="moe", updater="none", balance_rate=0.0)
    programs = pretrain_lm.build(config, pretrain_lm.make_mesh("data=1"))
    assert not jax.tree.leaves(programs.state.balance)


def small_config(**changes):
    args = pretrain_lm.parse([*SMALL, "--steps", "8"])
    (config,) = pretrain_lm.configure(args).values()
    return dataclasses.replace(config, **changes)


def arrays_in(jaxpr):
    """Every array of a jaxpr and of the jaxprs inside it."""
    yield from (v.aval for v in [*jaxpr.invars, *jaxpr.constvars])
    for equation in jaxpr.eqns:
        yield from (v.aval for v in equation.outvars)
        for inner in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"),
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from arrays_in(inner)


@pytest.mark.parametrize("ffn", ["dense", "block_sparse"])
def test_train_step_holds_no_weight_of_a_sparse_layer(ffn):
    config = small_config(ffn=ffn, updater="none" if ffn == "dense" else "rigl")
    programs = pretrain_lm.build(config, pretrain_lm.make_mesh("data=1"))
    traced = programs.train_step.trace(programs.state, programs.batch)
    sizes = {math.prod(aval.shape) for aval in arrays_in(traced.jaxpr.jaxpr)}
    assert (WIDTH * FFN_WIDTH in sizes) == (ffn == "dense")
    # Nor has XLA made one of it.
    compiled = traced.lower().compile().as_text()
    shapes = re.findall(r"[a-z]\w*\[([\d,]+)\]", compiled)
    sizes = {math.prod(map(int, shape.split(","))) for shape in shapes}
    assert (WIDTH * FFN_WIDTH in sizes) == (ffn == "dense")


@pytest.mark.slow
def test_a_mesh_computes_the_same():
    config = small_config(batch=4)
    batch = np.random.default_rng(0).integers(0, 256, (4, 21)).astype(np.uint8)

    def step(mesh):
        programs = pretrain_lm.build(config, pretrain_lm.make_mesh(mesh))
        state = programs.init(jax.random.key(0))
        state, loss = programs.train_step(state, batch)
        return programs.topology_step(state, batch), loss

    (one, one_loss), (many, many_loss) = step("data=1"), step("data=2,fsdp=2")
    np.testing.assert_allclose(one_loss.loss, many_loss.loss, rtol=1e-5)
    # The same blocks moved: scores are norms of the gradient over all devices.
    chex.assert_trees_all_equal(
        jax.tree.map(np.asarray, one.layouts), jax.tree.map(np.asarray, many.layouts)
    )
    # AdamW's first step divides by the gradient's own size: compare where it is not
    # rounding noise.
    chex.assert_trees_all_close(
        jax.tree.map(np.asarray, one.params),
        jax.tree.map(np.asarray, many.params),
        atol=2e-4,
    )
    # And each device holds half of every weight.
    for leaf in jax.tree.leaves(many.params):
        assert leaf.sharding.is_fully_replicated == (leaf.ndim == 1)


@pytest.mark.parametrize(
    "flags",
    [
        ("--ffn", "block_sparse"),
        ("--ffn", "masked"),
    ],
)
@pytest.mark.slow
def test_killed_and_resumed_is_bit_identical(run, text, tmp_path, flags):
    flags = (*flags, "--steps", 160, "--every", 7, "--log-every", 20)
    (whole,) = run(*flags, out="whole")

    folder = tmp_path / "checkpoints"
    flags = (*flags, "--checkpoint-dir", folder, "--checkpoint-every", 5)
    process = subprocess.Popen(
        [sys.executable, ROOT / "examples" / "pretrain_lm.py"]
        + [*SMALL, "--data", text, "--out", str(tmp_path / "out"), *map(str, flags)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    # A moment that differs from test to test: after a random checkpoint, then some.
    until = str(random.randrange(5, 100, 5))
    while process.poll() is None and not (folder / whole.name / until).exists():
        time.sleep(0.005)
    time.sleep(random.random() * 0.1)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, f"it ended by itself: {errors}"
    assert checkpoint.latest_step(folder / whole.name) >= int(until)

    (resumed,) = run(*flags, "--resume")
    assert [r["step"] for r in resumed.log.records] == [*range(20, 161, 20)]
    data = lambda state: jax.tree.map(
        np.asarray, state._replace(key=jax.random.key_data(state.key))
    )
    chex.assert_trees_all_equal(data(resumed.state), data(whole.state))
    assert resumed.batches.get_state() == whole.batches.get_state()


class Stopped(Exception):
    """As if the process were killed."""


@pytest.mark.parametrize(
    ("what", "after"),
    [
        ("record", False),
        pytest.param("record", True, marks=pytest.mark.slow),
        pytest.param("checkpoint", False, marks=pytest.mark.slow),
        pytest.param("checkpoint", True, marks=pytest.mark.slow),
    ],
)
def test_stopped_around_a_record_or_a_checkpoint_no_record_is_lost(
    run, tmp_path, monkeypatch, what, after
):
    flags = ("--ffn", "dense", "--steps", 6, "--log-every", 2, "--checkpoint-every", 1)
    flags = (*flags, "--checkpoint-dir", tmp_path / "checkpoints")

    def stops_at_4(function, step):
        def stopping(*args, **kwargs):
            if step(*args) == 4 and not after:
                raise Stopped
            function(*args, **kwargs)
            if step(*args) == 4:
                raise Stopped

        return stopping

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        if what == "record":
            write = stops_at_4(_report.Log.write, lambda log, record: record["step"])
            patch.setattr(_report.Log, "write", write)
        else:
            save = stops_at_4(checkpoint.save, lambda folder, step, *_: step)
            patch.setattr(checkpoint, "save", save)
        run(*flags)
    (resumed,) = run(*flags, "--resume")
    assert [record["step"] for record in resumed.log.records] == [2, 4, 6]


def test_checkpoints_of_another_run_are_refused_and_kept(run, text, tmp_path):
    folder = tmp_path / "checkpoints"
    run("--ffn", "dense", "--steps", 4, "--checkpoint-dir", folder)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    again = ("--ffn", "dense", "--checkpoint-dir", folder)
    with pytest.raises(ValueError, match=r"--checkpoint-dir: got .* at step 4; needed"):
        run(*again, "--steps", 4)
    with pytest.raises(ValueError, match="steps: got 4, needed 6"):
        run(*again, "--steps", 6, "--resume")
    with pytest.raises(ValueError, match=r"data: got '\w+', needed '\w+'"):
        pathlib.Path(text).write_text("another text" * 100)
        run(*again, "--steps", 4, "--resume")
    del before[pathlib.Path(text)]
    assert all(path.read_bytes() == was for path, was in before.items())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--sparsity 1.5", "--sparsity: got 1.5, needed 0 to 1"),
        ("--data none.txt", "--data: got none.txt, which is not there, needed"),
        ("--every 9 --steps 8", "--every: got 9, needed at most 6"),
        ("--updater gradual_magnitude", "--updater: got .*needed one of rigl, static"),
        ("--ffn masked --updater none", "--updater: got none, needed one of"),
        (
            "--compare dense,spars",
            "--compare: got 'spars', needed one of dense, masked",
        ),
        ("--mesh model=2", "--mesh: got 'model=2', needed such as"),
        ("--mesh data=99", "--mesh: got data=99, 99 devices, needed at most the"),
        ("--mesh data=2", "--batch: got 3, needed a multiple of 2"),
        ("--heads 3", "--width: got 64, needed a multiple of"),
        ("--steps 0", "--steps: got 0, needed at least 1"),
        ("--log-every 0", "--log-every: got 0, needed at least 1"),
        ("--resume", "--resume: got no --checkpoint-dir"),
        (
            "--ffn moe --experts 4 --experts-per-token 5",
            "--experts-per-token: got 5, needed 1 to 4, --experts",
        ),
        ("--ffn moe --experts 0", "--experts: got 0, needed at least 1"),
        (
            "--ffn moe --capacity-factor -1",
            "--capacity-factor: got -1.0, needed at least 0",
        ),
        ("--ffn monarch --monarch-blocks 65", "--monarch-blocks: got 65, needed at m"),
        ("--ffn low_rank --rank 0", "--rank: got 0, needed at least 1"),
        ("--ffn monarch --rank 4", "--rank: got 4, needed --ffn pixelfly or low_rank"),
        ("--ffn moe --sparsity 0.5", "--sparsity: got 0.5, needed --ffn masked or"),
        ("--ffn dense --experts 4", "--experts: got 4, needed --ffn moe"),
        ("--attention window --window 0", "--window: got 0, needed at least 1"),
        ("--window 8", "--window: got 8, needed --attention window"),
        (
            "--compare dense,dense+window --budget 2",
            "--budget: got 2, needed --attention blocks",
        ),
        (
            "--compare dense+widow",
            r"--compare: got 'dense\+widow', needed one of dense",
        ),
    ],
)
def test_bad_flags_are_named_before_anything_is_written(run, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        run(*flags.split())
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.parametrize("flag", ["--implementation", "--ffn", "--attention"])
def test_unknown_choices_are_named(run, capsys, flag):
    with pytest.raises(SystemExit):
        run(flag, "bogus")
    assert re.search(
        rf"{flag}: invalid choice: '?bogus.*choose", capsys.readouterr().err
    )


def test_refusals_are_one_line_for_the_user(text, tmp_path):
    found = subprocess.run(
        [sys.executable, ROOT / "examples" / "pretrain_lm.py", "--sparsity", "2"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 1
    assert found.stderr == "pretrain_lm.py: --sparsity: got 2.0, needed 0 to 1\n"


def test_every_flag_has_help(capsys):
    with pytest.raises(SystemExit):
        pretrain_lm.parse(["--help"])
    text = capsys.readouterr().out
    for field in dataclasses.fields(pretrain_lm.Config):
        assert f"--{field.name.replace('_', '-')}" in text, field.name


# ---- upcycle_lm.py -----------------------------------------------------------------

TINY = (
    "--width 8 --ffn-width 16 --heads 2 --layers 1 --length 4 --batch 2 --experts 4 "
    "--experts-per-token 2"
).split()


def tiny_config(*flags):
    args = upcycle_lm.parse([*TINY, *map(str, flags)])
    fields = [f.name for f in dataclasses.fields(upcycle_lm.Config) if f.name != "data"]
    return upcycle_lm.Config(**{name: getattr(args, name) for name in fields})


def test_flops_of_dense_and_of_experts():
    config = tiny_config("--extra-steps", 100)
    # Weights: 4 d^2 + 2 d f + 256 d = 256 + 256 + 2048; attention: 12 T d. 8 tokens.
    assert config.flops_per_step("dense") == 8 * (6 * 2560 + 384) == 125952
    # Two experts for the one feed-forward layer, and a router of d E = 32.
    assert config.flops_per_step("moe") == 8 * (6 * 2848 + 384) == 139776
    # 139776 / 125952 = 1.1098
    assert config.equal_flops_steps == 111


def test_table_takes_each_arm_at_its_step():
    config = tiny_config("--steps", 10, "--extra-steps", 100)
    rows = [
        upcycle_lm._upcycle_report.Row(
            arm,
            seed,
            parameters=8,
            records=[
                {"step": step, "validation": loss + seed, "test": loss}
                for step, loss in losses.items()
            ],
        )
        for seed in (0, 1)
        for arm, losses in {
            "dense": {0: 8.0, 10: 4.0},
            "continued": {0: 4.0, 100: 3.0, 111: 2.5},
            "upcycled": {0: 4.0, 100: 2.75},
            "scratch": {0: 8.0, 100: 5.0},
        }.items()
    ]
    lines, results = upcycle_lm._upcycle_report.compare(rows, config)
    assert [found["validation"] for found in results] == [
        *([4, 5], [3, 4], [2.5, 3.5], [2.75, 3.75], [5, 6])
    ]
    gaps = [found["test_minus_upcycled"] for found in results]
    assert gaps == [[1.25, 1.25], [0.25, 0.25], [-0.25, -0.25], [0, 0], [2.25, 2.25]]
    assert [found["extra_steps"] for found in results] == [0, 100, 111, 100, 100]
    assert lines[3][5] == "-0.2500 ± 0.0000"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--experts-per-token 5", "--experts-per-token: got 5, needed at most the 4"),
        ("--width 9", "--width: got 9, needed a multiple of 2"),
        ("--extra-steps 0", "--extra-steps: got 0, needed at least 1"),
        ("--learning-rate 0", "--learning-rate: got 0.0, needed above 0"),
        ("--seeds 0 -1", "--seeds: got -1, needed at least 0"),
        ("--data none.txt", "--data: got none.txt, which is not there, needed"),
    ],
)
def test_upcycling_refuses_before_anything_is_written(tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        upcycle_lm.main([*TINY, "--out", str(tmp_path / "out"), *flags.split()])
    assert not [*tmp_path.iterdir()]


def test_every_flag_of_upcycling_has_help(capsys):
    with pytest.raises(SystemExit):
        upcycle_lm.parse(["--help"])
    text = capsys.readouterr().out
    for field in dataclasses.fields(upcycle_lm.Config):
        assert f"--{field.name.replace('_', '-')}" in text, field.name


@pytest.mark.slow
def test_upcycling_killed_anywhere_and_run_again_is_the_same(
    text, tmp_path, monkeypatch, capsys
):
    flags = "--steps 4 --extra-steps 6 --eval-every 4 --eval-batches 1 --seeds 5"

    def run(out):
        folder = tmp_path / out
        upcycle_lm.main([*TINY, *flags.split(), "--data", text, "--out", str(folder)])
        return json.loads((folder / "results.json").read_text())

    whole = run("whole")
    # Evaluations at 0, 4; at 0, 4, 6 and the 7 of equal FLOPs; twice at 0, 4, 6.
    steps = {curve["arm"]: curve["step"] for curve in whole["curves"]}
    assert steps["dense"] == [0, 4] and steps["continued"] == [0, 4, 6, 7]
    assert steps["upcycled"] == steps["scratch"] == [0, 4, 6]
    # What the upcycled model computes at first is what the dense one did at last.
    losses = {curve["arm"]: curve["validation"] for curve in whole["curves"]}
    assert losses["upcycled"][0] == pytest.approx(losses["dense"][-1], abs=2e-5)
    assert losses["continued"][0] == losses["dense"][-1] != losses["scratch"][0]
    assert "exact: yes" in whole["report"]
    logs = tmp_path / "whole" / "logs"
    lines = (logs / "upcycled-5.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    # 8 tokens, two experts each.
    assert [sum(record["load"][0]) for record in records] == [16, 16, 16]
    for name in ("curves.png", "load.png", "table.md"):
        assert (tmp_path / "whole" / name).stat().st_size > 1000
    assert "minus upcycled" in capsys.readouterr().out

    class Killed(BaseException):
        pass

    save = checkpoint.save

    def dies(*args, **kwargs):
        # Half of the time what the log says is not in a checkpoint yet.
        if after:
            save(*args, **kwargs)
        raise Killed

    # Each run makes one save and dies, or dies before a save and makes none.
    for turn in range(40):
        after = turn % 2 == 1
        with monkeypatch.context() as patched:
            patched.setattr(checkpoint, "save", dies)
            try:
                again = run("again")
                break
            except Killed:
                continue
    assert turn == 16  # of eight saves
    assert again == whole | {"command": again["command"]}

    with pytest.raises(ValueError, match="steps: got 4, needed 9"):
        flags = flags.replace("--steps 4", "--steps 9")
        run("again")


# ---- sparse_attention_tradeoffs.py -------------------------------------------------

TRADED = (
    "--selectors window moba --budgets 1 3 --sequences 2 --length 24 "
    "--attention-block 8 --width 16 --ffn-width 16 --heads 2 --steps 4"
).split()


def test_table_of_tradeoffs():
    row = lambda selector, budget, loss, work, recall: {
        "selector": selector,
        "budget": budget,
        "loss": loss,
        "work": [[work, work]],
        "recall": [[recall, 1.0]],
    }
    rows = [
        row("full", None, [2.0, 3.0], 0.5, 1.0),
        row("window", 2, [2.1, 3.3], 0.25, 0.5),
        row(tradeoffs.TOP_P, 0.8, [2.0, 3.0], 0.3, 0.8),
    ]
    _, full, window, top_p = tradeoffs.table(rows)
    assert full == (
        *("full attention", "50.0%", "100.0%", "1.000", "1.000", "2.5000", ""),
    )
    # Above by 0.1 and 0.3: their deviation is 0.1414, over the root of two.
    assert window == (
        *("sliding window, 2 blocks", "25.0%", "50.0%", "0.750", "0.500", "2.7000"),
        "+0.2000 ± 0.1000",
    )
    assert top_p[0] == "pooled blocks, p = 0.8" and top_p[-1] == "+0.0000 ± 0.0000"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--budgets 0", "--budgets: got 0, needed at least 1"),
        ("--top-p 1.5", r"--top-p: got \[1.5\], needed above 0, at most 1"),
        ("--widthh 3", "unrecognized"),
    ],
)
def test_tradeoffs_refuse_before_anything_is_written(tmp_path, flags, message, capsys):
    with pytest.raises((ValueError, SystemExit)) as found:
        tradeoffs.main(["--out", str(tmp_path / "out"), *flags.split()])
    assert re.search(message, str(found.value) + capsys.readouterr().err)
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_tradeoffs_killed_and_run_again_are_the_same(text, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def run(out):
        flags = [*TRADED, "--data", text, "--out", str(tmp_path / out)]
        return tradeoffs.main(flags)

    whole = run("whole")
    assert [(r["selector"], r["budget"]) for r in whole] == [
        *[("full", None), ("window", 1), ("window", 3), ("moba", 1), ("moba", 3)]
    ]
    full, one, three, *_ = whole
    # Rows of 1, 2 and 3 of three blocks; a window of 8: of 1, 2 and 2; of 24: all.
    for row, work in ((full, 6 / 9), (one, 5 / 9), (three, 6 / 9)):
        np.testing.assert_allclose(row["work"], np.full((2, 2), work), rtol=1e-6)
    assert np.shape(full["loss"]) == (2,) and np.mean(one["recall"]) < 1
    for row in (full, three, whole[-1]):
        np.testing.assert_allclose(row["loss"], full["loss"], rtol=1e-5)
        np.testing.assert_allclose(row["recall"], 1, rtol=1e-5)
    for name in ("table.md", "tradeoffs.png"):
        assert (tmp_path / "whole" / name).stat().st_size > 1000

    validate = tradeoffs.validate
    with monkeypatch.context() as patch, pytest.raises(Killed):
        calls = []

        def dies(*args):
            if len(calls) == 2:
                raise Killed
            calls.append(args)
            return validate(*args)

        patch.setattr(tradeoffs, "validate", dies)
        run("again")
    assert run("again") == whole
