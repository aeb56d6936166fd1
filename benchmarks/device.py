"""The GPU's tests and benchmarks, in one command, on a machine with one Hopper GPU.

    python benchmarks/device.py                      # all four parts
    python benchmarks/device.py --quick              # 90%, blocks of 128, fewer tests
    python benchmarks/device.py --parts sweep --minutes 9
    python benchmarks/device.py --interpret          # on a CPU: shows that it runs

Parts: ``tests`` runs the GPU's tests with the kernels compiled, not simulated;
``bench`` bench_block_sparse_matmul.py, ratios to cuBLAS; ``experts`` the grouped
kernels and those of a mixture of experts, at 1024 rows an expert, beside dense products
of equal work; ``sweep`` every tile configuration of the block-sparse kernels. Kernels
are checked against float64 before they are timed. Each part runs in processes of its
own: one that fails or kills its process does not stop the others, a configuration that
does is noted and passed over. Needs jax, optax, jaxtyping, numpy and pytest; not that
the package be installed.

Writes device.json (after every part) and sweep.jsonl (as it goes) into ``--out``, by
default $OUT where that is set, else results/. The exit status is the number of parts
that failed or ran out of time.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import tomllib
import traceback
import xml.etree.ElementTree as ElementTree

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
SHAPES = [(4096, 1024, 4096), (4096, 4096, 4096)]
# The first sparsity is swept in full, the others with what came out best there.
SPARSITIES = [0.9, 0.8, 0.95, 0.5]
BLOCKS = [128, 64]
# Shares of the time by which a part must have ended.
UNTIL = {"tests": 0.35, "bench": 0.55, "experts": 0.7, "sweep": 1.0}
# (groups, mean rows of one, k, n) of grouped_matmul: few wide experts, and many.
EXPERTS = [(8, 1024, 4096, 4096), (64, 1024, 2048, 768)]
# What a test of the operators asserts of a CPU, of eight devices or of a TPU's kernels.
NOT_HERE = (
    "mosaic_tpu", "mesh", "shard_map", "explain", "never_falls_back", "no_array",
    "one_dense_product", "memory",
)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--parts", nargs="+", default=list(UNTIL), choices=list(UNTIL))
    add("--quick", action="store_true")
    add("--interpret", action="store_true")
    add("--minutes", type=float, default=25.0, help="for all parts together")
    add("--out", type=pathlib.Path, default=os.environ.get("OUT"))
    add("--commit", default=None, help="where the tree came without git")
    args = parser.parse_args()
    args.out = pathlib.Path(args.out or HERE / "results").resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    args.start = time.monotonic()
    config = {name: str(getattr(args, name)) for name in ("quick", "interpret")}
    record = {"config": config, "parts": {}}
    with tempfile.TemporaryDirectory() as folder:
        args.folder = pathlib.Path(folder)
        args.env = environment_of_children(args)
        guarded(record, "environment", lambda: worker(args, "environment", 120))
        for part in args.parts:
            print(f"\n=== {part}", flush=True)
            run = PARTS[part]
            guarded(record["parts"], part, lambda run=run: run(args))
            (args.out / "device.json").write_text(json.dumps(record, indent=2) + "\n")
    report(record)
    failed = [name for name, part in record["parts"].items() if not part.get("ok")]
    print("failed:", ", ".join(failed) or "nothing")
    sys.exit(len(failed))


def guarded(record, name, run):
    """Keeps what ``run()`` gives, or what it raised."""
    start = time.monotonic()
    try:
        record[name] = run()
    except Exception:
        traceback.print_exc()
        record[name] = {"ok": False, "error": traceback.format_exc()}
    record[name]["seconds"] = round(time.monotonic() - start, 1)


# --- Processes ------------------------------------------------------------------------


def environment_of_children(args):
    """Variables under which tree and tests work, installed or not."""
    path = [str(ROOT), str(HERE)]
    try:
        importlib.metadata.version("sparsejax")
    except importlib.metadata.PackageNotFoundError:
        # The package asks for its version, which only an installed one has.
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        info = args.folder / f"sparsejax-{project['version']}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: sparsejax\nVersion: {project['version']}\n"
        )
        path.append(str(args.folder))
    env = dict(os.environ, PYTHONUNBUFFERED="1", XLA_PYTHON_CLIENT_PREALLOCATE="false")
    env["PYTHONPATH"] = os.pathsep.join([*path, env.get("PYTHONPATH", "")])
    if args.interpret:
        env["JAX_PLATFORMS"] = "cpu"
    else:
        env["SPARSEJAX_COMPILED"] = "mosaic_gpu"  # read by conftest.py
    return env


def seconds_left(args, part="sweep"):
    share = 1.0 if part == args.parts[-1] else UNTIL[part]
    return args.minutes * 60 * share - (time.monotonic() - args.start)


def call(args, command, seconds):
    """Exit status of a command that prints as it goes; None: it ran out of time."""
    try:
        return subprocess.run(
            command, env=args.env, cwd=ROOT, timeout=max(seconds, 1)
        ).returncode
    except subprocess.TimeoutExpired:
        return None


def worker(args, what, timeout, **job):
    """Does ``what`` of device_worker.py in a process; gives what it writes."""
    out = args.folder / f"{what}.json"
    out.unlink(missing_ok=True)
    job = {**job, "commit": args.commit, "out": str(out), "interpret": args.interpret}
    command = [sys.executable, str(HERE / "device_worker.py"), what, json.dumps(job)]
    status = call(args, command, timeout)
    got = json.loads(out.read_text()) if out.exists() else {}
    return {"ok": status == 0, "status": status, **got}


# --- Parts ----------------------------------------------------------------------------


def run_tests(args):
    kernels = sorted(str(p) for p in ROOT.glob("tests/pallas_kernels/*gpu*.py"))
    here = " and ".join(f"not {word}" for word in NOT_HERE)
    # nm_matmul's kernels are compiled in its operator's tests; these only simulate.
    runs = {"kernels": (kernels, "not simulated and not against_float64")}
    for name in ("block_sparse_matmul", "nm_matmul", "grouped_matmul", "moe_mlp"):
        file = ROOT / f"tests/ops/test_{name}.py"
        if file.exists():
            quick = "test_value_and_gradients and " if args.quick else ""
            runs[name] = ([str(file)], quick + here)
    if args.interpret:
        runs = {
            "kernels": (kernels, "no_block_at_all or refuses"),
            "block_sparse_matmul": (runs["block_sparse_matmul"][0], "references"),
        }
    results = {}
    for name, (files, keyword) in runs.items():
        xml = args.folder / f"{name}.xml"
        # pyproject's options name plugins that may be absent, and make an error of
        # any warning that another version of a dependency gives.
        command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-o"]
        command += ["filterwarnings=", "--import-mode=importlib", "-k", keyword]
        command += ["-p", "no:cacheprovider", f"--junitxml={xml}", *files]
        status = call(args, command, seconds_left(args, "tests"))
        results[name] = {"status": status, **counts(xml)}
    return {"ok": all(r["status"] == 0 for r in results.values()), "runs": results}


def counts(xml):
    if not xml.exists():
        return {}
    root = ElementTree.parse(xml).getroot()
    cases = list(root.iter("testcase"))
    has = lambda *tags: [c for c in cases if any(c.find(t) is not None for t in tags)]
    failed = has("failure", "error")
    return {
        "tests": len(cases),
        "skipped": len(has("skipped")),
        "failed": [f"{c.get('classname')}::{c.get('name')}" for c in failed],
    }


def cases(args):
    """(m, k, n), block of what is measured."""
    if args.interpret:
        return [((96, 256, 128), 64)]
    blocks = BLOCKS[:1] if args.quick else BLOCKS
    return [(shape, block) for block in blocks for shape in SHAPES]


def sparsities(args):
    return SPARSITIES[: 2 if args.interpret else 1 if args.quick else None]


def run_bench(args):
    results = {}
    for shape, block in cases(args):
        command = ["--shape", *shape, "--block", block, "--dtype", "bfloat16"]
        command += ["--sparsities", *sparsities(args), "--no-sparse-anchors"]
        # Mosaic GPU is no choice on a CPU: there the bench itself is what is shown.
        command += ["--implementations", "xla" if args.interpret else "mosaic_gpu"]
        command += ["--repeat", 2 if args.interpret else 20]
        command += ["--rounds", 2 if args.interpret else 7 if args.quick else 15]
        seconds = seconds_left(args, "bench")
        name = "x".join(map(str, shape)) + f" blocks of {block}"
        results[name] = worker(args, "bench", seconds, argv=list(map(str, command)))
    return {"ok": all(r["ok"] for r in results.values()), "runs": results}


def run_experts(args):
    shapes = EXPERTS[:1] if args.quick else EXPERTS
    if args.interpret:
        shapes = [(2, 40, 64, 128)]
    results = {}
    for shape in shapes:
        job = dict(shape=shape, loads=["even"] if args.quick else ["even", "uneven"])
        job["sweep"] = not (args.quick or args.interpret)
        seconds = seconds_left(args, "experts")
        results["x".join(map(str, shape))] = worker(args, "experts", seconds, **job)
    rows = [row for run in results.values() for row in run.get("rows", [])]
    right = all(row["result"] == "ok" and "wrong" not in row for row in rows)
    return {"ok": right and all(r["ok"] for r in results.values()), "runs": results}


def run_sweep(args):
    """Sweeps every case, starting again past whatever kills the process."""
    log = args.out / "sweep.jsonl"
    log.write_text("")
    todo, whole = cases(args), True
    for i, (shape, block) in enumerate(todo):
        share = time.monotonic() + seconds_left(args) / (len(todo) - i)
        for _ in range(5):
            left = share - time.monotonic()
            job = dict(shape=shape, block=block, sparsities=sparsities(args))
            job.update(log=str(log), seconds=left, quick=args.quick)
            done = left > 0 and worker(args, "sweep", left + 30, **job)
            if done and done["ok"] or left <= 0:
                break
            with log.open("a") as file:  # the worker passes over what it finds so
                file.write(json.dumps({"died": done["status"]}) + "\n")
        whole &= bool(done) and done.get("complete", False)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    results = [row for row in rows if "result" in row]
    wrong = [row for row in results if row["result"] not in ("ok", "does not compile")]
    unfit = [r for r in results if r["default"] and r["result"] != "ok"]
    died = sum("died" in row for row in rows)
    return {
        "ok": whole and bool(results) and not wrong and not unfit and not died,
        "complete": whole,
        "died": died,
        "wrong": wrong,
        "rows": [row for row in rows if "us" in row],
    }


PARTS = {
    "tests": run_tests,
    "bench": run_bench,
    "experts": run_experts,
    "sweep": run_sweep,
}


# --- What is printed ------------------------------------------------------------------


def report(record):
    print("\n" + json.dumps(record["environment"], indent=2))
    for name, run in record["parts"].get("tests", {}).get("runs", {}).items():
        failed = run.get("failed", [])
        print(f"tests of {name}: {run.get('tests')}, failed {len(failed)}")
        for each in failed:
            print(f"  {each}")
    for name, run in record["parts"].get("bench", {}).get("runs", {}).items():
        for row in run.get("rows", []):
            ratio = next(v for k, v in row.items() if k.startswith("ratio_to"))
            print(f"{name}: {row['what']}, {row['case']}: {ratio:.3f}")
    for run in record["parts"].get("experts", {}).get("runs", {}).values():
        for row in run.get("rows", []):
            ratio = f"{row['ratio_to_dense']:.3f}" if "us" in row else row["result"]
            print(f"{row['case']}: {ratio}")
    rows = record["parts"].get("sweep", {}).get("rows", [])
    if not rows:
        return
    print(f"\n{'case':44} {'default us':>10} {'best us':>8} {'/ dense':>8}  best tiles")
    for group in dict.fromkeys(row["group"] for row in rows):
        mine = [row for row in rows if row["group"] == group]
        best = min(mine, key=lambda row: row["us"])
        default = next((row["us"] for row in mine if row["default"]), float("nan"))
        print(
            f"{group:44} {default:10.1f} {best['us']:8.1f} "
            f"{best['ratio_to_dense']:8.3f}  {best['tiles']}"
        )


if __name__ == "__main__":
    main()
