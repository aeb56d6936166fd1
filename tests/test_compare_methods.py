"""The comparison in small: two real trainings, resuming, the numbers, refusals."""

import ast
import importlib
import json
import math
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[1]
# Examples are scripts: their neighbours are modules beside them.
sys.path.insert(0, str(ROOT / "examples"))
compare_methods = importlib.import_module("compare_methods")
_compare = compare_methods._compare
_compare_report = compare_methods._compare_report

SMALL = "--examples 60 --width 16 --steps 12 --batch 8 --every 3 --seeds 1".split()


@pytest.fixture
def run(tmp_path):
    """Runs the script's main in this process."""

    def run(*flags):
        out = () if "--out" in flags else ("--out", tmp_path / "out")
        return compare_methods.main([*SMALL, *map(str, (*flags, *out))])

    return run


@pytest.fixture
def fake(monkeypatch):
    """Trainings that take no time; what was trained is appended to the list."""
    done = []

    def compile_point(point, traced, task, evaluate):
        def run(seed):
            done.append((str(point), seed))
            score = 100 * (1 - point.sparsity) + seed + sum(point.pattern or ())
            return {"density": 0.5, "validation": score, "test": score + 1}

        return run

    monkeypatch.setattr(compare_methods, "compile_point", compile_point)
    return done


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_two_methods_on_digits(run, tmp_path, capsys):
    run("--methods", "static_uniform", "rigl", "--sparsities", 0.75)
    settings, *rows = lines_of(tmp_path / "out" / "rows.jsonl")
    assert settings["settings"]["width"] == 16 and settings["settings"]["digest"]
    assert [(r["method"], r["sparsity"], r["seed"]) for r in rows] == [
        ("static_uniform", 0.75, 0),
        ("rigl", 0.75, 0),
    ]
    # A quarter of 64 * 16 + 16 * 16 + 16 * 10 weights.
    assert [row["density"] for row in rows] == pytest.approx([360 / 1440] * 2)
    assert all(
        0 <= row[split] <= 100 for row in rows for split in ("validation", "test")
    )
    table = (tmp_path / "out" / "table.md").read_text()
    assert "python examples/compare_methods.py --examples 60" in table
    assert f"| rigl | {rows[1]['test']:.2f} |" in table
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 10_000
    assert "static_uniform 75%" in capsys.readouterr().out


def test_a_method_on_text(run, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("what is sparse is not dense; " * 200)
    rows = run("--data", "text", "--paths", path, "--methods", "dense", "--context", 2)
    (row,) = rows.rows
    # Eight steps of so small a model are about as good as guessing: 8 bits.
    assert 3 < row["test"] < 12 and row["density"] == 1 and row["sparsity"] == 0


@pytest.mark.parametrize("name", compare_methods.METHODS)
def test_every_method_is_a_program_of_the_key(name):
    args = compare_methods.parse([*SMALL, "--methods", name, "--patterns", "1:4"])
    settings, points = compare_methods.configure(args)
    task = _compare.load_task(settings, [])
    point = points[0]

    def program(key, train):
        case = _compare.Case(task, train, settings, point.sparsity, point.pattern, key)
        with jax.numpy_dtype_promotion("standard"):
            return compare_methods.METHODS[name].run(case)

    found = jax.eval_shape(program, jax.random.key(0), task.train)
    for params in found if isinstance(found, list) else [found]:
        assert params["layer_2"]["kernel"].shape == (16, 10)


def test_a_second_run_does_what_is_missing(run, fake, tmp_path):
    few = ("--methods", "static_uniform", "--sparsities", 0.5, 0.75)
    run(*few)
    assert fake == [("static_uniform 50%", 0), ("static_uniform 75%", 0)]
    path = tmp_path / "out" / "rows.jsonl"
    before = path.read_text()
    run(*few)
    assert len(fake) == 2 and path.read_text() == before
    run(*few, "--seeds", 2, "--methods", "static_uniform", "set")
    assert fake[2:] == [
        ("static_uniform 50%", 1),
        ("static_uniform 75%", 1),
        *[(f"set {s}%", seed) for s in (50, 75) for seed in (0, 1)],
    ]
    assert path.read_text().startswith(before)


@pytest.mark.parametrize("damage", ["cut", "no newline", "zeros", "settings"])
def test_a_damaged_last_line_loses_nothing_else(run, fake, tmp_path, damage):
    flags = ("--methods", "set", "--sparsities", 0.5, 0.75)
    run(*flags)
    path = tmp_path / "out" / "rows.jsonl"
    whole = path.read_bytes()
    damaged = {
        "cut": whole[:-20],
        "no newline": whole[:-1],
        "zeros": whole[: whole.rindex(b"{")] + bytes(40),
        "settings": whole[:30],
    }[damage]
    path.write_bytes(damaged)
    fake.clear()
    run(*flags)
    again = [("set 50%", 0), ("set 75%", 0)]
    assert fake == (again if damage == "settings" else again[1:])
    records = lines_of(path)
    assert [r.get("sparsity") for r in records] == [None, 0.5, 0.75]
    assert records[:2] == [json.loads(line) for line in whole.splitlines()][:2] or (
        damage == "settings"
    )


def test_patterns_of_equal_sparsity_are_kept_apart(run, fake, tmp_path):
    few = ("--methods", "sr_ste", "--patterns")
    run(*few, "1:4")
    run(*few, "2:8")
    assert fake == [("sr_ste 1:4 (75%)", 0), ("sr_ste 2:8 (75%)", 0)]
    rows = lines_of(tmp_path / "out" / "rows.jsonl")[1:]
    assert [row["pattern"] for row in rows] == [[1, 4], [2, 8]]
    table = tmp_path / "out" / "table.md"
    # A quarter is kept, the seed is 0, the test split has 1 more.
    only = "| method | 2:8 (75%) |\n| --- | --- |\n| sr_ste | 36.00 |\n"
    assert only in table.read_text()
    run(*few, "2:8", "1:4", "02:08")
    assert len(fake) == 2
    both = "| method | 1:4 (75%) | 2:8 (75%) |\n"
    assert both in table.read_text()
    assert "| sr_ste | 31.00 | 36.00 |" in table.read_text()


def test_reports_are_of_what_was_asked(run, fake, tmp_path, capsys):
    few = ("--methods", "set", "--sparsities")
    run(*few, 0.5, 0.75, "--seeds", 3)
    run(*few, 0.5)
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| method | 50% |\n| --- | --- |\n| set | 51.00 |\n" in table
    assert "\n1 seed; " in table
    assert len(lines_of(tmp_path / "out" / "rows.jsonl")) == 1 + 6
    run(*few, 0.75, 0.9, "--seeds", 2)  # the new score beside those there
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| set | 26.50 ± 0.50 | 11.50 ± 0.50 |" in table and "\n2 seeds; " in table
    assert "set 90%: 11.500 ± 0.500" in capsys.readouterr().out


@pytest.mark.parametrize("data", ["digits", "text"])
def test_committed_rows_without_patterns_give_the_committed_table(tmp_path, data):
    committed = ROOT / "benchmarks" / "results" / f"compare_methods.{data}"
    path = tmp_path / "rows.jsonl"
    path.write_bytes(committed.with_name(f"{committed.name}.jsonl").read_bytes())
    settings = _compare.Settings(**lines_of(path)[0]["settings"])
    args = compare_methods.parse(["--data", data])
    points = compare_methods.configure(args)[1]
    rows = compare_methods.read_rows(path, settings)
    assert compare_methods.find_missing(rows, points, args.seeds) == {}

    words = ["python examples/compare_methods.py", *["--data text"] * (data == "text")]
    compare_methods.report(
        rows, points, args.seeds, settings, args.split, " ".join(words)
    )
    expected = committed.with_name(f"{committed.name}.md").read_text()
    assert (tmp_path / "table.md").read_text() == expected


def test_a_row_without_a_pattern_that_is_none_of_1_to_m_is_left_alone(tmp_path):
    settings = _compare.Settings()
    rows = _compare_report.Rows(tmp_path / "rows.jsonl", vars(settings))
    rows.open()
    for method, sparsity in [("sr_ste", 0.25), ("sr_ste", 1 - 1 / 3), ("set", 0.75)]:
        rows.add({"method": method, "sparsity": sparsity, "seed": 0})
    found = compare_methods.read_rows(rows.path, settings).rows
    assert [row.get("pattern") for row in found] == [None, [1, 3], None]


def test_damage_elsewhere_and_other_settings_are_refused_and_kept(run, fake, tmp_path):
    flags = ("--methods", "set", "--sparsities", 0.5, 0.75)
    run(*flags)
    folder = tmp_path / "out"
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match="--out: .* whose rows have steps 12, needed"):
        run(*flags, "--steps", 13)
    with pytest.raises(ValueError, match="have learning_rate 0.002, needed 0.001"):
        run(*flags, "--learning-rate", 1e-3)
    assert before == {path: path.read_bytes() for path in folder.iterdir()}
    path = folder / "rows.jsonl"
    path.write_bytes(before[path].replace(b'{"method', b"{method", 1))
    before[path] = path.read_bytes()
    with pytest.raises(ValueError, match="whose line 2 is no record"):
        run(*flags)
    assert before == {path: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--methods rigl rigll", "--methods: got 'rigll', needed some of dense, "),
        ("--sparsities 0.9 90", "--sparsities: got 90.0, needed numbers between 0"),
        ("--sparsities nan", "--sparsities: got nan, needed numbers"),
        ("--patterns 8:1", "--patterns: got '8:1', needed N:M with N kept of M"),
        ("--patterns 1:3", "--patterns: got '1:3', needed M to divide 64 inputs"),
        ("--seeds 0", "--seeds: got 0, needed at least 1"),
        ("--steps 3", "--every: got 3, needed at most 2, three quarters of --steps"),
        ("--width 0", "--width: got 0, needed at least 1"),
        ("--learning-rate 0", "--learning-rate: got 0.0, needed above 0"),
        ("--weight-decay -5", "--weight-decay: got -5.0, needed a number, 0 or above"),
        ("--weight-decay nan", "--weight-decay: got nan, needed a number"),
        ("--weight-decay inf", "--weight-decay: got inf, needed a number"),
        ("--examples 1200", "--examples: got 1200, needed 1 to 597"),
        ("--paths x.txt", "--paths: got .*, needed --data text with it"),
        ("--data text --paths none", "--paths: got none, which is not there"),
    ],
)
def test_bad_flags_are_named_before_anything_is_written(run, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        run(*flags.split())
    assert not list(tmp_path.iterdir())


def test_what_cannot_train_is_named_before_anything_is_written(run, fake, tmp_path):
    flags = "--methods static_uniform srigl structure_decay --width 128"
    flags += " --sparsities 0.5 0.995 0.999 --patterns 1:4 3:4"
    with pytest.raises(ValueError) as caught:
        run(*flags.split())
    needed = "needed one at which {} can train: "
    starts = [
        f"--sparsities: got 0.995, {needed.format('srigl')}sparsity must leave every ",
        f"--sparsities: got 0.999, {needed.format('srigl')}sparsity must leave every ",
        f"--patterns: got 3:4, {needed.format('structure_decay')}m must be n times a ",
    ]
    lines = str(caught.value).splitlines()
    assert len(lines) == len(starts)
    assert all(map(str.startswith, lines, starts))
    assert not fake and not list(tmp_path.iterdir())


def test_patterns_that_no_method_uses_need_not_fit(run, fake):
    run("--patterns", "1:3", "--methods", "set", "--sparsities", "0.5")
    assert fake == [("set 50%", 0)]


def test_refusals_are_one_line_for_the_user(tmp_path):
    found = subprocess.run(
        [sys.executable, ROOT / "examples" / "compare_methods.py", "--seeds", "-1"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 1 and not list(tmp_path.iterdir())
    assert found.stderr == "compare_methods.py: --seeds: got -1, needed at least 1\n"


def test_an_interruption_is_one_line_for_the_user(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(compare_methods, "main", interrupted)
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as caught:
        compare_methods.run()
    assert caught.value.code == 130
    message = "compare_methods.py: stopped; the same command goes on where it was\n"
    assert capsys.readouterr().err == message


def test_help_prints_commands_as_they_are_typed(capsys):
    with pytest.raises(SystemExit):
        compare_methods.parse(["--help"])
    command = "--methods dense static_uniform rigl \\\n        --sparsities 0.9 0.95"
    assert command in capsys.readouterr().out


@pytest.mark.parametrize(
    "path", sorted((ROOT / "examples").glob("[a-z]*.py")), ids=lambda path: path.name
)
def test_docstrings_that_are_printed_lose_no_line_ends(path):
    source = path.read_text()
    assert ast.get_docstring(ast.parse(source), clean=False) in source


def test_help_names_every_method_and_flag(capsys):
    with pytest.raises(SystemExit):
        compare_methods.parse(["--help"])
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    for name in compare_methods.METHODS:
        assert name in text
    for (
        flag
    ) in "--data --methods --sparsities --patterns --seeds --split --out".split():
        assert flag in text


# ---- numbers -----------------------------------------------------------------------


def rows_of(method, sparsity, validation, test):
    return [
        {"method": method, "sparsity": sparsity, "seed": i, "validation": v, "test": t}
        for i, (v, t) in enumerate(zip(validation, test, strict=True))
    ]


def test_mean_and_standard_error_by_hand():
    # Deviations -2, 0, 2: variance 8 / 2 = 4; 2 / sqrt(3).
    found = _compare_report.score([1.0, 3.0, 5.0])
    assert found == pytest.approx((3.0, 2 / math.sqrt(3), 3))
    assert f"{found:.2f}" == "3.00 ± 1.15" and f"{found:+.1f}" == "+3.0 ± 1.2"
    assert f"{_compare_report.score([7.0]):.2f}" == "7.00"
    assert math.isnan(_compare_report.score([]).mean)


@pytest.mark.parametrize("sign", [1, -1], ids=["accuracy", "bits per byte"])
def test_claims_by_hand(sign):
    rows = [
        *rows_of("dense", 0.0, [0, 0], [sign * 10.0, sign * 12.0]),
        *rows_of("static", 0.9, [0, 0], [sign * 5.0, sign * 6.0]),
        # The better one on validation is worse on test: no choice by test.
        *rows_of("one", 0.9, [sign * 2.0] * 2, [sign * 5.5, sign * 6.5]),
        *rows_of("two", 0.9, [sign * 1.0] * 2, [sign * 9.0, sign * 9.0]),
        # 1 below dense, whose standard error is sqrt(2) / sqrt(2) = 1; and 1.5 below.
        *rows_of("near", 0.9, [0, 0], [sign * 9.0, sign * 11.0]),
        *rows_of("near", 0.8, [0, 0], [sign * 8.5, sign * 10.5]),
        *rows_of("worse", 0.9, [0, 0], [sign * 2.0, sign * 10.0]),
    ]
    claim = _compare_report.Claim
    claims = [
        claim("beats", ("one", "two", "absent"), "static", (0.9, 0.95)),
        claim("near", ("near",), "dense", (0.9, 0.8), within=True),
        claim("noisy", ("worse",), "static", (0.9,)),
        claim("absent", ("absent",), "static", (0.9,)),
    ]
    found = _compare_report.check_claims(
        claims,
        _compare_report.Scores(rows, "validation"),
        _compare_report.Scores(rows, "test"),
        sign,
        seeds=2,
    )
    show = lambda mean, error: f"{sign * mean:.2f} ± {error}"
    assert found == [
        (
            *("beats", "0.9", f"one {show(6, '0.50')}"),
            *(f"static {show(5.5, '0.50')}", f"{sign * 0.5:+.2f} ± 0.00", "holds"),
        ),
        (
            *("near", "0.9", f"near {show(10, '1.00')}"),
            *(f"dense {show(11, '1.00')}", f"{sign * -1.0:+.2f} ± 0.00", "holds"),
        ),
        (
            *("near", "0.8", f"near {show(9.5, '1.00')}"),
            *(f"dense {show(11, '1.00')}", f"{sign * -1.5:+.2f} ± 0.00"),
            "does not hold",
        ),
        (
            # Differences -3 and 4: mean 0.5, error 7 / 2.
            *("noisy", "0.9", f"worse {show(6, '4.00')}"),
            *(f"static {show(5.5, '0.50')}", f"{sign * 0.5:+.2f} ± 3.50"),
            "holds, within one standard error",
        ),
    ]


def verdicts_of(rows, sign=1, **claim):
    """Score columns and verdict of "new beats old" by five seeds on the test split."""
    claim = {"other": "old", "sparsities": (0.9,), **claim}
    (found,) = _compare_report.check_claims(
        [_compare_report.Claim("claim", ("new",), **claim)],
        _compare_report.Scores(rows, "validation"),
        _compare_report.Scores(rows, "test"),
        sign,
        seeds=5,
    )
    return found[2:]


def test_claims_are_decided_on_the_seeds_that_both_have():
    # The old one's last seeds are bad: by all seeds the new one would be better.
    old = rows_of("old", 0.9, [0] * 5, [10.0, 10.0, 11.0, 1.0, 1.0])
    new = rows_of("new", 0.9, [0] * 3, [9.0, 9.0, 9.0])
    assert verdicts_of(old + new) == (
        *("new 9.00 ± 0.00", "old 10.33 ± 0.33", "-1.33 ± 0.33"),
        "does not hold, on 3 of 5 seeds",
    )
    # And within one standard error of those seeds: it is 1 / 3.
    near = rows_of("new", 0.9, [0] * 3, [10.0, 10.0, 10.0])
    assert verdicts_of(old + near, within=True)[3] == "holds, on 3 of 5 seeds"
    far = rows_of("new", 0.9, [0] * 3, [10.0, 10.0, 9.9])
    assert verdicts_of(old + far, within=True)[3] == "does not hold, on 3 of 5 seeds"


def test_no_difference_is_no_gain():
    old = rows_of("old", 0.9, [0] * 5, [0.1, 0.2, 0.3, 0.4, 0.5])
    verdict = "does not hold, within one standard error"
    for new in ([0.5, 0.4, 0.3, 0.2, 0.1], [0.2, 0.4, 0.0, 0.4, 0.5]):
        for sign in (1, -1):
            rows = [*old, *rows_of("new", 0.9, [0] * 5, new)]
            assert verdicts_of(rows, sign)[3] == verdict
        assert verdicts_of(rows, within=True)[3] == "holds"


@pytest.mark.parametrize("within", [False, True])
def test_of_one_common_seed_the_standard_error_is_not_known(within):
    old = rows_of("old", 0.9, [0] * 5, [1.0, 2.0, 3.0, 4.0, 5.0])
    new = rows_of("new", 0.9, [0], [2.0])
    assert verdicts_of(old + new, within=within) == (
        *("new 2.00", "old 1.00", "+1.00"),
        ("not decided" if within else "holds")
        + ", on 1 of 5 seeds, standard error not known from one seed",
    )


def test_claims_are_checked_for_each_pattern_of_a_sparsity():
    patterns = [[1, 8], [2, 16]]
    rows = [
        {**row, "pattern": pattern}
        for pattern, gain in zip(patterns, (1, -1), strict=True)
        for method, score in [("new", 2.0 + gain), ("old", 2.0)]
        for row in rows_of(method, 7 / 8, [0] * 2, [score] * 2)
    ]
    found = _compare_report.check_claims(
        [_compare_report.Claim("claim", ("new",), "old", (7 / 8,))],
        _compare_report.Scores(rows, "validation"),
        _compare_report.Scores(rows, "test"),
        sign=1,
        seeds=2,
    )
    assert [(line[1], line[-1]) for line in found] == [
        ("1:8 (87.5%)", "holds"),
        ("2:16 (87.5%)", "does not hold"),
    ]


def test_the_picture_has_patterns_of_equal_sparsity_side_by_side(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(_compare_report.plt, "close", figures.append)
    rows = [
        *rows_of("sr_ste", 0.9, [0], [70.0]),
        *[
            {**rows_of("sr_ste", 0.75, [0], [80.0])[0], "pattern": [n, 4 * n]}
            for n in (2, 1)
        ],
    ]
    _compare_report.plot(
        _compare_report.Scores(rows, "test"),
        {"N:M": ["sr_ste"]},
        (),
        ylabel="accuracy",
        percent=True,
        path=tmp_path / "picture.png",
    )
    monkeypatch.undo()
    (top,) = figures[0].axes[0].child_axes
    names = [label.get_text() for label in top.get_xticklabels()]
    # A factor of 1.2 apart, around the density of both; sparser is to the right.
    root = 1.2**0.5
    assert names == ["1:4", "2:8"]
    assert list(top.get_xticks()) == pytest.approx([0.25 * root, 0.25 / root])
    _compare_report.plt.close(figures[0])


def test_splits_do_not_overlap_and_are_equal_for_all_settings():
    load = lambda n: _compare.load_task(_compare.Settings(examples=n), [])
    task, more = load(100), load(597)
    parts = {
        name: {image.tobytes() for image in images}
        for name, (images, _) in {**more.held_out, "train": more.train}.items()
    }
    assert {k: len(v) for k, v in parts.items()} == {
        "validation": 400,
        "test": 800,
        "train": 597,
    }
    assert len(set.union(*parts.values())) == 1797
    for split, (images, _) in task.held_out.items():
        assert (images == more.held_out[split][0]).all()
    assert (more.train[0][:100] == task.train[0]).all()
