r"""Upcycles a language model: dense -> mixture of experts, and is it worth it?

Pretrains a dense byte-level transformer on real text (by default the Python standard
library's own sources, nothing to download), makes experts of its feed-forward layers,
optimizer state included, and goes on. Beside it the dense model goes on as it is, and a
mixture of experts begins from scratch: at equal extra steps, and at equal extra FLOPs.
The commands, from the repository's root:

    # three seeds, about 25 minutes on one core
    python examples/upcycle_lm.py

    # a look at it in two minutes
    python examples/upcycle_lm.py --seeds 0 --steps 300 --extra-steps 150 \
        --out runs/look

    # how the experts are made, and what becomes of their moments
    python examples/upcycle_lm.py --mode drop --opt-state zeros --out runs/drop

    # your own text, another size
    python examples/upcycle_lm.py --data corpus/ --width 512 --ffn-width 2048 \
        --experts 16 --out runs/mine

Stop it at any time; the same command goes on where it was. Steps follow one schedule,
warm-up and then the inverse square root, whose count the upcycled optimizer state
carries on, so that every point of a curve is a result. The held-out text is cut in two:
settings are chosen on the validation half, the table also has the test half. Writes
``table.md``, ``results.json``, ``curves.png``, ``load.png``, ``report.txt`` (whether
the upcycled model computes what the dense one did) and a log per run to ``--out``.
"""

import argparse
import dataclasses
import functools
import math
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import _data
import _report
import _transformer
import _upcycle_report
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import sparsejax as sj
import sparsejax.checkpoint
import sparsejax.routing
import sparsejax.upcycling
from sparsejax import upcycling

MODES = {
    "copy": upcycling.Copy(),
    "noise": upcycling.Copy(noise=0.05),
    "drop": upcycling.Drop(0.5),
}
# What trains, in this order: the second and third begin where the first ends.
ARMS = ("dense", "continued", "upcycled", "scratch")


# ---- configuration -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """What defines the runs. A folder goes on only under an equal one."""

    steps: int = 3000  # of the dense model, before
    extra_steps: int = 1500  # of every model, after
    mode: str = "copy"
    opt_state: str = "rescale"
    experts: int = 8  # E
    experts_per_token: int = 2  # k
    load_balance: float = 1e-2
    layers: int = 2
    width: int = 128  # d
    heads: int = 4  # H
    ffn_width: int = 512
    length: int = 64  # T, tokens per sequence
    batch: int = 16  # B, sequences per step
    warmup: int = 100
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    clip: float = 1.0
    eval_every: int = 250
    eval_batches: int = 32
    data: str = ""  # digest of the text

    def model(self, ffn: str) -> Any:
        """What the transformer needs to know."""
        fixed = {"dtype": "float32", "remat": False, "scan": False, "expert_width": 0}
        return argparse.Namespace(ffn=ffn, **fixed, **dataclasses.asdict(self))

    def flops_per_step(self, ffn: str) -> int:
        """Six for each weight that a token meets, and attention's two products.

        Of experts those that a token goes to, and the router. Norms, softmaxes and the
        optimizer are not counted.
        """
        d, f, layers = self.width, self.ffn_width, self.layers
        feed_forward = 2 * d * f
        if ffn == "moe":
            feed_forward *= self.experts_per_token
            feed_forward += d * self.experts  # the router
        products = layers * (4 * d * d + feed_forward) + 256 * d
        per_token = 6 * products + 12 * layers * self.length * d
        return per_token * self.batch * self.length

    def steps_of(self, arm: str) -> int:
        """Of training, from where the arm begins; the dense model has equal FLOPs."""
        if arm == "dense":
            return self.steps
        if arm == "continued":
            return self.equal_flops_steps
        return self.extra_steps

    @property
    def equal_flops_steps(self) -> int:
        """Dense steps that cost what the extra steps of the MoE cost."""
        ratio = self.flops_per_step("moe") / self.flops_per_step("dense")
        return round(self.extra_steps * ratio)


def check(config: Config) -> None:
    """Raises ValueError, by flag, for what cannot be trained."""

    def need(holds: bool, flag: str, needed: str) -> None:
        if not holds:
            raise ValueError(
                f"--{flag.replace('_', '-')}: got {getattr(config, flag)}, "
                f"needed {needed}"
            )

    counts = (
        *("steps", "extra_steps", "experts", "experts_per_token", "layers", "width"),
        *("heads", "ffn_width", "length", "batch", "eval_every", "eval_batches"),
    )
    for flag in counts:
        need(getattr(config, flag) >= 1, flag, "at least 1")
    need(
        config.experts_per_token <= config.experts,
        "experts_per_token",
        f"at most the {config.experts} of --experts",
    )
    need(
        config.width % (2 * config.heads) == 0,
        "width",
        f"a multiple of 2 * --heads = {2 * config.heads}",
    )
    need(config.learning_rate > 0, "learning_rate", "above 0")
    need(config.load_balance >= 0, "load_balance", "at least 0")


# ---- programs ----------------------------------------------------------------------


class State(NamedTuple):
    """All that changes while training."""

    params: nnx.State
    opt_state: optax.OptState


class Programs(NamedTuple):
    """Pure functions of a model, jitted."""

    init: Any  # key -> State
    step: Any  # State, batch -> State, loss in nats, load (layers, E) or None
    evaluate: Any  # params, batch -> loss, load
    optimizer: optax.GradientTransformation
    graphdef: Any
    params: Any  # shapes


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """AdamW; warm-up, then the inverse square root of the steps; no decay on norms."""

    def schedule(count):
        count, warmup = count.astype(jnp.float32) + 1, max(config.warmup, 1)
        return config.learning_rate * jnp.minimum(
            count / warmup, jnp.sqrt(warmup / count)
        )

    decayed = lambda params: jax.tree_util.tree_map_with_path(
        lambda path, _: "norm" not in jax.tree_util.keystr(path), params
    )
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(schedule, b2=0.98, weight_decay=config.weight_decay, mask=decayed),
    )


@functools.lru_cache
def build(config: Config, ffn: str) -> Programs:
    """The programs of the dense model or of the mixture of experts."""
    optimizer = make_optimizer(config)

    def make(key):
        model = _transformer.Transformer(
            config.model(ffn), None, rngs=nnx.Rngs(params=key)
        )
        return nnx.split(model, nnx.Param)

    graphdef, shapes = nnx.eval_shape(make, jax.random.key(0))

    def losses(params, batch):
        tokens = batch.astype(jnp.int32)
        logits, experts, _ = nnx.merge(graphdef, params)(tokens[:, :-1])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        loss = loss.mean()
        if experts is None:
            return loss, (loss, None)
        trained = loss + config.load_balance * experts.load_balance.mean()
        return trained, (loss, experts.counts)

    def init(key):
        _, params = make(key)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
            return State(params, optimizer.init(params))

    def step(state, batch):
        gradient, aux = jax.grad(losses, has_aux=True)(state.params, batch)
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(
                gradient, state.opt_state, state.params
            )
            params = optax.apply_updates(state.params, updates)
        return State(params, opt_state), *aux

    evaluate = lambda params, batch: losses(params, batch)[1]
    return Programs(
        init=jax.jit(init),
        step=jax.jit(step, donate_argnums=0),
        evaluate=jax.jit(evaluate),
        optimizer=optimizer,
        graphdef=graphdef,
        params=shapes,
    )


def upcycle(config: Config, dense: State, key: jax.Array) -> tuple[State, str]:
    """The dense model's state -> the mixture's, and the report in words."""
    spec = upcycling.Spec(
        target=build(config, "moe").params,
        ffns=[
            upcycling.Ffn(
                source="blocks/*/mlp",
                target="blocks/*/mlp/moe",
                w_in="up/kernel",
                w_out="down/kernel",
            )
        ],
        mode=MODES[config.mode],
        # As the transformer has it.
        router=functools.partial(
            sj.routing.top_k, k=config.experts_per_token, normalize="sum_stopgrad"
        ),
        optimizer=build(config, "dense").optimizer,
        opt_state=config.opt_state,
    )
    dense = jax.tree.map(jnp.copy, dense)  # what is kept would be the same arrays
    params, opt_state, report = upcycling.upcycle(*dense, spec=spec, key=key)
    return State(params, opt_state), str(report)


# ---- one run -----------------------------------------------------------------------


class HeldOut(NamedTuple):
    """Batches of the two halves of the held-out text."""

    validation: list[np.ndarray]
    test: list[np.ndarray]


def train(
    config: Config,
    arm: str,
    seed: int,
    begin: State,
    text: _data.Text,
    held_out: HeldOut,
    folder: pathlib.Path,
    show: Callable[[list[dict[str, Any]]], None] = lambda records: None,
) -> tuple[State, list[dict[str, Any]]]:
    """Trains an arm to its end, from its newest checkpoint if there is one.

    Returns:
      Its last state and its log: a record per evaluation, the first before any step.
      ``show`` sees the log whenever it has grown.
    """
    name = f"{arm}-{seed}"
    programs = build(config, "dense" if arm in ("dense", "continued") else "moe")
    # All that train after the dense model see the same batches.
    batches = _data.train_batches(
        text.train, length=config.length, batch=config.batch, seed=seed
    )
    log = _report.Log(folder / "logs" / f"{name}.jsonl")
    identity = {**dataclasses.asdict(config), "arm": arm, "seed": seed}
    found = sj.checkpoint.restore(folder / "states" / name, begin, config=identity)
    if found is None:
        state, position, step = begin, None, 0
        log.open(keep=-1)
        if arm != "dense":  # the dense model has seen the first ones
            position = _position(batches, config.steps)
    else:
        state, position, step = found
        log.open(keep=step)
    if position is not None:
        batches.set_state(position)

    def evaluate(params, of: Sequence[np.ndarray]):
        found = [programs.evaluate(params, batch) for batch in of]
        loss = float(np.mean([loss for loss, _ in found])) / math.log(2)
        loads = [load for _, load in found if load is not None]
        return loss, np.sum(loads, axis=0).tolist() if loads else None

    def record(losses, seconds):
        validation, load = evaluate(state.params, held_out.validation)
        test, _ = evaluate(state.params, held_out.test)
        train = float(np.mean(losses)) / math.log(2) if losses else None
        if not math.isfinite(validation):
            raise FloatingPointError(
                f"--learning-rate: got {config.learning_rate}, with which the loss of "
                f"{name} is {validation} at step {step}; needed a smaller one"
            )
        log.write(
            {
                "step": step,
                "train": train,
                "validation": validation,
                "test": test,
                "load": load,
                "seconds": seconds,
            }
        )
        show(log.records)

    last = config.steps_of(arm)
    marks = {last} if arm == "dense" else {config.extra_steps, last}  # of the table
    if log.records:
        show(log.records)
    else:
        record([], 0.0)
    losses, since = [], time.perf_counter()
    while step < last:
        state, loss, _ = programs.step(state, next(batches))
        losses.append(loss)
        step += 1
        if step % config.eval_every == 0 or step in marks:
            losses = jax.device_get(losses)
            record(losses, time.perf_counter() - since)
            sj.checkpoint.save(
                folder / "states" / name,
                step,
                state,
                config=identity,
                data_position=batches.get_state(),
                keep=1,
            )
            losses, since = [], time.perf_counter()
    return state, log.records


def _position(batches, steps):
    """Where a pipeline is after so many batches."""
    for _ in range(steps):
        next(batches)
    return batches.get_state()


# ---- command line ------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; every field of Config is a flag."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    helps = {
        "steps": "train steps of the dense model, before",
        "extra_steps": "train steps after; the continued one has more, of equal FLOPs",
        "mode": "how experts are made",
        "opt_state": "what becomes of their moments",
        "experts": "in each layer",
        "experts_per_token": "of them that each token uses",
        "load_balance": "weight of the load-balance loss",
        "layers": "transformer blocks",
        "width": "features between the layers",
        "heads": "attention heads",
        "ffn_width": "hidden features of the dense layers, and of each expert",
        "length": "bytes per sequence",
        "batch": "sequences per step",
        "warmup": "steps until the learning rate's peak",
        "learning_rate": "at its peak",
        "weight_decay": "AdamW's, norms excepted",
        "clip": "global norm that gradients are clipped to",
        "eval_every": "steps between evaluations, and checkpoints",
        "eval_batches": "batches of each half of the held-out text",
    }
    choices = {"mode": tuple(MODES), "opt_state": ("zeros", "copy", "rescale")}
    for field in dataclasses.fields(Config):
        if field.name in helps:
            add(
                f"--{field.name.replace('_', '-')}",
                type=type(field.default),
                default=field.default,
                choices=choices.get(field.name),
                help=f"{helps[field.name]} ({field.default})",
            )
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="one or more (0 1 2)")
    add("--data", nargs="+", default=[], metavar="PATH", help="text files or folders")
    add("--out", type=pathlib.Path, default="runs/upcycle_lm", help="folder of reports")
    return parser.parse_args(argv)


def split(text: _data.Text, config: Config) -> HeldOut:
    """The held-out text's first half for validation, its second for test."""
    middle = len(text.validation) // 2
    halves = text.validation[:middle], text.validation[middle:]
    return HeldOut(
        *(
            _data.validation_batches(
                half,
                length=config.length,
                batch=config.batch,
                count=config.eval_batches,
            )
            for half in halves
        )
    )


def main(argv: list[str] | None = None) -> list[_upcycle_report.Row]:
    """Trains what is missing and reports; returns a row per arm and seed."""
    args = parse(argv)
    names = [field.name for field in dataclasses.fields(Config) if field.name != "data"]
    config = Config(**{name: getattr(args, name) for name in names})
    check(config)
    seeds = list(dict.fromkeys(args.seeds))
    if min(seeds) < 0:
        raise ValueError(f"--seeds: got {min(seeds)}, needed at least 0")
    text = _data.load_text(args.data, needed=2 * config.length + 2)
    config = dataclasses.replace(config, data=text.digest)
    held_out = split(text, config)

    rows, report = [], ""
    with _upcycle_report.Display(config, ARMS, seeds, text) as display:
        for seed in seeds:
            key = jax.random.key(seed)
            dense: Any = None
            for arm in ARMS:
                if arm == "dense":
                    begin = build(config, "dense").init(key)
                elif arm == "continued":
                    # A step takes its state away.
                    begin = jax.tree.map(jnp.copy, dense)
                elif arm == "upcycled":
                    begin, report = upcycle(config, dense, jax.random.fold_in(key, 1))
                else:
                    begin = build(config, "moe").init(jax.random.fold_in(key, 2))
                show = functools.partial(display.update, arm, seed)
                state, records = train(
                    config, arm, seed, begin, text, held_out, args.out, show
                )
                if arm == "dense":
                    dense = state
                count = sum(p.size for p in jax.tree.leaves(state.params))
                rows.append(
                    _upcycle_report.Row(arm, seed, parameters=count, records=records)
                )
    words = sys.argv[1:] if argv is None else argv
    command = " ".join(["python examples/upcycle_lm.py", *map(str, words)])
    _upcycle_report.finish(rows, config, report, command, text.source, args.out)
    return rows


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FloatingPointError) as error:
        sys.exit(f"upcycle_lm.py: {error}")
