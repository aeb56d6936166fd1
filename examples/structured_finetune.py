r"""Makes a trained model's feed-forward weights structured, and fine-tunes it.

Takes a dense checkpoint of ``pretrain_lm.py``, replaces each feed-forward weight by the
nearest Monarch matrix, block butterfly plus low rank (Pixelfly), matrix of low rank and
block-diagonal, and by its largest entries under a mask that stays, all with as many
parameters, and trains each further. Beside them: the dense model trained as long, and
Monarch factors drawn afresh. The commands, from the repository's root:

    # three seeds, each with a dense model of its own: about 20 minutes on one core
    python examples/structured_finetune.py

    # a look at it in a minute
    python examples/structured_finetune.py --seeds 0 --steps 100 \
        --pretrain="--steps 200" --out runs/look

    # a checkpoint that is there; seeds then differ in the order of the data alone
    python examples/pretrain_lm.py --ffn dense --steps 2000 --data corpus/ \
        --checkpoint-dir runs/checkpoints
    python examples/structured_finetune.py --checkpoint runs/checkpoints/dense \
        --data corpus/ --blocks 16 --block 32 --out runs/mine

How many parameters is said by ``--blocks``: those of the Monarch matrix; the others
come as near as they can without exceeding them, and the table has the true counts. Stop
it at any time; the same command goes on where it was. Each model is trained at every
rate of ``--learning-rates``; the table has the one with the lowest loss on the
validation half of the held-out text, and also the test half. Writes ``table.md``,
``results.json``, ``curves.png`` and a log per run to ``--out``.
"""

import argparse
import dataclasses
import functools
import itertools
import math
import pathlib
import shlex
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import _data
import _report
import _structured_report
import _transformer
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pretrain_lm
from flax import nnx

import sparsejax as sj
import sparsejax.checkpoint
import sparsejax.nnx
import sparsejax.transforms
from sparsejax import structured

ARMS = tuple(_structured_report.NAMES)
# The dense models that are trained where none is given. At 128 x 384 all forms have
# the same number of parameters, exactly.
PRETRAIN = (
    "--ffn dense --layers 2 --width 128 --heads 4 --ffn-width 384 --length 64 "
    "--batch 16 --steps 2000 --warmup 100 --learning-rate 3e-3 --every 50 "
    "--eval-every 500 --checkpoint-every 250"
)


# ---- configuration -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """What defines the runs. A folder goes on only under an equal one."""

    steps: int = 400
    blocks: int = 8  # of each Monarch factor; says how many parameters all have
    block: int = 16  # side of Pixelfly's blocks
    warmup: int = 50
    eval_every: int = 100
    eval_batches: int = 32
    data: str = ""  # digest of the text


def check(config: Config, args: argparse.Namespace) -> None:
    """Raises ValueError, by flag, for what cannot be trained."""
    for field in dataclasses.fields(config):
        got = getattr(config, field.name)
        if field.name != "data" and got < 1:
            flag = field.name.replace("_", "-")
            raise ValueError(f"--{flag}: got {got}, needed at least 1")
    if min(args.learning_rates) <= 0:
        got = min(args.learning_rates)
        raise ValueError(f"--learning-rates: got {got}, needed above 0")
    if min(args.seeds) < 0:
        raise ValueError(f"--seeds: got {min(args.seeds)}, needed at least 0")
    given = len(args.checkpoint)
    if given not in (0, 1, len(args.seeds)):
        raise ValueError(
            f"--checkpoint: got {given}, needed one, or one for each of the "
            f"{len(args.seeds)} seeds"
        )
    if given and args.pretrain:
        raise ValueError(
            f"--pretrain: got {args.pretrain!r} beside --checkpoint, needed one of them"
        )
    of_dense = pretrain_lm.parse(pretrain_flags(args))
    if of_dense.ffn != "dense" or of_dense.compare:
        raise ValueError(f"--pretrain: got {args.pretrain!r}, needed --ffn dense")


def pretrain_flags(args: argparse.Namespace) -> list[str]:
    """What ``pretrain_lm.py`` is told, all but the seed and the folders."""
    flags = [*shlex.split(PRETRAIN), *shlex.split(args.pretrain)]
    return [*flags, "--data", *args.data] if args.data else flags


# ---- the dense model ---------------------------------------------------------------


class Dense(NamedTuple):
    """A trained model, as its checkpoint has it."""

    config: pretrain_lm.Config
    graphdef: Any
    params: nnx.State


def pretrain(args: argparse.Namespace, seed: int) -> pathlib.Path:
    """Trains a dense model, from where it was; returns the folder of its checkpoints.

    As the command ``pretrain_lm.py`` would.
    """
    folder = args.out / "dense" / f"seed-{seed}"
    where = ["--out", str(folder), "--checkpoint-dir", str(folder), "--resume"]
    flags = [*pretrain_flags(args), "--seed", str(seed), *where]
    steps = pretrain_lm.parse(flags).steps
    if sj.checkpoint.latest_step(folder / "dense") != steps:
        pretrain_lm.main(flags)
    return folder / "dense"


def load(folder: pathlib.Path | str) -> Dense:
    """The newest checkpoint of a dense model, without its optimizer's state."""
    stored = sj.checkpoint.stored_config(folder)
    if stored is None:
        raise ValueError(f"--checkpoint: got {folder}, which holds none, needed one")
    known = {field.name for field in dataclasses.fields(pretrain_lm.Config)}
    if set(stored) != known or stored["ffn"] != "dense":
        raise ValueError(
            f"--checkpoint: got {folder}, of {stored.get('ffn', 'something else')}, "
            "needed one of pretrain_lm.py --ffn dense"
        )
    config = pretrain_lm.Config(**stored)
    programs = pretrain_lm.build(config, pretrain_lm.make_mesh("data=1"))
    found = sj.checkpoint.restore(folder, programs.state, config=config)
    assert found is not None
    make = lambda: nnx.split(_transformer.Transformer(config, None, rngs=nnx.Rngs(0)))
    graphdef, _ = nnx.eval_shape(make)
    # Off the mesh that it was restored to.
    params = jax.tree.map(lambda p: jnp.asarray(np.asarray(p)), found.tree.params)
    return Dense(config, graphdef, params)


# ---- structure ---------------------------------------------------------------------


def forms(k: int, n: int, blocks: int, block: int) -> dict[str, Any]:
    """The form of a k x n weight in each arm, none with more parameters than Monarch's.

    Pixelfly has the largest butterfly that leaves parameters for a rank of 1.
    """
    monarch = structured.monarch(k, n, blocks=blocks)
    target = monarch.params  # at least k + n, as rank 1 has
    side = min(block, k, n)
    sizes = [2**i for i in range((-(-min(k, n) // side) - 1).bit_length() + 1)]
    spare = {  # beside the blocks of a butterfly of that size
        size: target + k + n - structured.Pixelfly(k, n, (side, side), size, 1).params
        for size in sizes
    }
    size = max((s for s in sizes if spare[s] >= k + n), default=None)
    if size is None:
        raise ValueError(
            f"--block: got {block}, whose diagonal of blocks and rank 1 have more than "
            f"the {target} parameters of --blocks {blocks}; needed smaller"
        )
    diagonals = (
        structured.block_diagonal(k, n, blocks=b) for b in range(1, min(k, n) + 1)
    )
    return {
        "monarch": monarch,
        "afresh": monarch,
        "pixelfly": structured.Pixelfly(
            k, n, (side, side), size, min(spare[size] // (k + n), k, n)
        ),
        "low_rank": structured.LowRank(k, n, target // (k + n)),
        "block_diagonal": next((c for c in diagonals if c.params <= target), None),
    }


class Begin(NamedTuple):
    """What an arm begins with."""

    graphdef: Any
    params: nnx.State
    masks: Any  # of the magnitude arm: a tree like params; else None
    weights: int  # of the feed-forward layers, those that count
    error: float | None  # |W - W'| / |W| over all of them; None: drawn afresh
    layers: dict[str, dict[str, Any]]  # form and error of each


def in_ffn(name: str, _: Any = None) -> bool:
    """Whether a parameter, or a layer, is of a feed-forward layer."""
    return "mlp" in name.split("/")


def begin(arm: str, dense: Dense, config: Config, key: jax.Array) -> Begin:
    """The dense model with an arm's feed-forward weights."""
    choose = functools.partial(forms, blocks=config.blocks, block=config.block)
    named = sj.masks.named_leaves(dense.params)
    kernels = {name: p for name, p in named.items() if in_ffn(name)}
    norms = {name: float(jnp.linalg.norm(p)) for name, p in kernels.items()}
    if arm == "dense":
        count = sum(p.size for p in kernels.values())
        return Begin(dense.graphdef, dense.params, None, count, 0.0, {})
    if arm == "magnitude":

        def largest(name, p):
            count = choose(*p.shape[-2:])["monarch"].params
            keep = functools.partial(sj.masks.topk_mask, count=count)
            for _ in p.shape[:-2]:  # stacked layers
                keep = jax.vmap(keep)
            return keep(jnp.abs(p))

        kept = {name: largest(name, p) for name, p in kernels.items()}
        leaves = [kept.get(name, optax.MaskedNode()) for name in named]
        masks = jax.tree.unflatten(jax.tree.structure(dense.params), leaves)
        params = sj.masks.apply_masks(dense.params, masks)
        graphdef, count = dense.graphdef, sum(int(m.sum()) for m in kept.values())
        layers = {
            name: {
                "form": f"{int(kept[name].sum())} of {p.size}",
                "error": float(jnp.linalg.norm(p[~kept[name]])) / norms[name],
            }
            for name, p in kernels.items()
        }
    else:
        masks = None
        model, report = sj.nnx.structure(
            nnx.merge(dense.graphdef, dense.params),
            lambda path, shape: choose(*shape)[arm] if in_ffn(path) else None,
            key=key if arm == "afresh" else None,
        )
        graphdef, params = nnx.split(model)
        count = sum(layer.parameters_after for layer in report.layers.values())
        layers = {
            f"{path}/kernel": {
                "form": str(
                    choose(layer.spec.in_features, layer.spec.out_features)[arm]
                ),
                "error": layer.relative_error,
            }
            for path, layer in report.layers.items()
        }
    error = None
    if arm != "afresh":
        lost = sum((layers[name]["error"] * norm) ** 2 for name, norm in norms.items())
        error = math.sqrt(lost / sum(norm**2 for norm in norms.values()))
    return Begin(graphdef, params, masks, count, error, layers)


# ---- programs ----------------------------------------------------------------------


class State(NamedTuple):
    """All that changes while training."""

    params: nnx.State
    opt_state: optax.OptState


class Programs(NamedTuple):
    """Pure functions of a model, jitted."""

    step: Any  # State, learning rate, batch -> State, loss in nats
    evaluate: Any  # params, batch -> loss


def make_optimizer(config: Config, dense: pretrain_lm.Config, masks: Any):
    """That of ``pretrain_lm.py`` with a warm-up of its own; takes the peak's ``rate``.

    The rate is an argument of ``update``, so that one program serves all rates.
    """
    of_rate_1 = pretrain_lm.make_optimizer(
        dataclasses.replace(
            dense, steps=config.steps, warmup=config.warmup, learning_rate=1.0
        )
    )

    def scale(updates, state, params=None, *, rate):
        return jax.tree.map(lambda u: rate * u, updates), state

    scaled = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), scale)
    optimizer = optax.chain(of_rate_1, scaled)
    if masks is None:
        return optimizer
    return sj.transforms.sparsify(
        optimizer,
        sj.transforms.fixed(masks),
        leaf_filter=in_ffn,
    )


def build(graphdef: Any, optimizer: optax.GradientTransformationExtraArgs) -> Programs:
    """The programs of an arm. Masks are in the state, so they serve every seed."""

    def loss_of(params, batch):
        tokens = batch.astype(jnp.int32)
        logits, *_ = nnx.merge(graphdef, params)(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, tokens[:, 1:]
        ).mean()

    def step(state, rate, batch):
        loss, gradient = jax.value_and_grad(loss_of)(state.params, batch)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
            updates, opt_state = optimizer.update(
                gradient, state.opt_state, state.params, rate=rate
            )
            params = optax.apply_updates(state.params, updates)
        return State(params, opt_state), loss

    return Programs(jax.jit(step, donate_argnums=0), jax.jit(loss_of))


# ---- one run -----------------------------------------------------------------------


class HeldOut(NamedTuple):
    """Batches of the two halves of the held-out text."""

    validation: list[np.ndarray]
    test: list[np.ndarray]


def train(
    name: str,
    state: State,
    rate: float,
    programs: Programs,
    batches: Any,
    held_out: HeldOut,
    steps: int,
    every: int,
    identity: dict[str, Any],
    folder: pathlib.Path,
    show: Callable[[dict[str, Any]], None],
) -> list[dict[str, Any]]:
    """Trains to the end, from the newest checkpoint if there is one.

    Returns the log: a record per evaluation, the first before any step. ``show`` sees
    each that is new.
    """
    log = _report.Log(folder / "logs" / f"{name}.jsonl")
    states = folder / "states" / name
    found = sj.checkpoint.restore(states, state, config=identity)
    step = 0
    if found is not None:
        state, position, step = found
        batches.set_state(position)
    log.open(keep=-1 if found is None else step)

    def record(losses, seconds):
        mean = lambda losses: float(np.mean(jax.device_get(losses))) / math.log(2)
        of = lambda half: mean([programs.evaluate(state.params, each) for each in half])
        train = mean(losses) if losses else None
        validation = of(held_out.validation)
        if not math.isfinite(validation):
            raise FloatingPointError(
                f"--learning-rates: got {rate}, with which the loss of {name} is "
                f"{validation} at step {step}; needed a smaller one"
            )
        log.write(
            {"step": step, "train": train, "validation": validation}
            | {"test": of(held_out.test), "seconds": seconds}
        )
        show(log.records[-1])

    if found is None:
        record([], 0.0)
    losses, since = [], time.perf_counter()
    while step < steps:
        state, loss = programs.step(state, rate, next(batches))
        losses.append(loss)
        step += 1
        if step % every == 0 or step == steps:
            jax.block_until_ready(losses)
            record(losses, time.perf_counter() - since)
            sj.checkpoint.save(
                states,
                step,
                state,
                config=identity,
                data_position=batches.get_state(),
                keep=1,
            )
            losses, since = [], time.perf_counter()
    return log.records


# ---- command line ------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; every field of Config is a flag."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--checkpoint",
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="of pretrain_lm.py --ffn dense: one, or one for each seed (default: they "
        "are trained first)",
    )
    add(
        "--pretrain",
        default="",
        metavar="FLAGS",
        help="of pretrain_lm.py, beside or instead of its own for those that are "
        f"trained first ({PRETRAIN.replace('%', '%%')})",
    )
    helps = {
        "steps": "train steps after",
        "blocks": "of each Monarch factor",
        "block": "side of Pixelfly's blocks",
        "warmup": "steps until the learning rate's peak",
        "eval_every": "steps between evaluations, and checkpoints",
        "eval_batches": "batches of each half of the held-out text",
    }
    for field in dataclasses.fields(Config):
        if field.name in helps:
            add(
                f"--{field.name.replace('_', '-')}",
                type=int,
                default=field.default,
                help=f"{helps[field.name]} ({field.default})",
            )
    add(
        "--learning-rates",
        nargs="+",
        type=float,
        default=[1e-3, 3e-3, 1e-2],
        help="at their peaks; each model takes its best (0.001 0.003 0.01)",
    )
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="one or more (0 1 2)")
    add("--data", nargs="+", default=[], metavar="PATH", help="text files or folders")
    out = pathlib.Path("runs/structured_finetune")
    add("--out", type=pathlib.Path, default=out, help="folder of reports")
    return parser.parse_args(argv)


def split(text: _data.Text, dense: pretrain_lm.Config, config: Config) -> HeldOut:
    """The held-out text's first half for validation, its second for test."""
    middle = len(text.validation) // 2
    batches = functools.partial(
        _data.validation_batches,
        length=dense.length,
        batch=dense.batch,
        count=config.eval_batches,
    )
    return HeldOut(batches(text.validation[:middle]), batches(text.validation[middle:]))


def main(argv: list[str] | None = None) -> list[_structured_report.Row]:
    """Trains what is missing and reports; returns a row per model, rate and seed."""
    args = parse(argv)
    args.seeds = list(dict.fromkeys(args.seeds))
    rates = list(dict.fromkeys(args.learning_rates))
    fields = [
        field.name for field in dataclasses.fields(Config) if field.name != "data"
    ]
    config = Config(**{name: getattr(args, name) for name in fields})
    check(config, args)
    folders = args.checkpoint * (len(args.seeds) if len(args.checkpoint) == 1 else 1)
    models = [load(folder) for folder in folders]
    lengths = [model.config.length for model in models]
    text = _data.load_text(args.data, needed=2 * max(lengths, default=1) + 2)
    config = dataclasses.replace(config, data=text.digest)

    if not models:
        models = [load(pretrain(args, seed)) for seed in args.seeds]
    programs: dict[str, Programs] = {}
    rows = []
    total = len(args.seeds) * len(ARMS) * len(rates) * config.steps
    with _structured_report.Display(total, text) as display:
        for (seed, dense), arm in itertools.product(
            zip(args.seeds, models, strict=True), ARMS
        ):
            start = begin(arm, dense, config, jax.random.key(seed))
            optimizer = make_optimizer(config, dense.config, start.masks)
            if arm not in programs:
                programs[arm] = build(start.graphdef, optimizer)
            for rate in rates:
                name = f"{arm}-{rate:g}-{seed}"
                with jax.numpy_dtype_promotion("standard"):
                    # A step takes its state away.
                    params = jax.tree.map(jnp.copy, start.params)
                    state = State(params, optimizer.init(params))
                identity = dataclasses.asdict(config) | {
                    "arm": arm,
                    "rate": rate,
                    "seed": seed,
                    "dense": dataclasses.asdict(dense.config),
                }
                # All see the same batches, in an order that is not the dense model's.
                batches = _data.train_batches(
                    text.train,
                    length=dense.config.length,
                    batch=dense.config.batch,
                    seed=10_000 + seed,
                )
                records = train(
                    name,
                    state,
                    rate,
                    programs[arm],
                    batches,
                    split(text, dense.config, config),
                    config.steps,
                    config.eval_every,
                    identity,
                    args.out,
                    functools.partial(display.update, name, config.steps),
                )
                rows.append(
                    _structured_report.Row(
                        arm,
                        rate,
                        seed,
                        weights=start.weights,
                        error=start.error,
                        layers=start.layers,
                        records=records,
                    )
                )
    words = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", "examples/structured_finetune.py", *words])
    _structured_report.finish(
        rows,
        config,
        {"checkpoints": folders, "pretrain": "" if folders else PRETRAIN}
        | {"pretrain_flags": args.pretrain, "dense": models[0].config},
        command,
        text.source,
        args.out,
    )
    return rows


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FloatingPointError) as error:
        sys.exit(f"structured_finetune.py: {error}")
