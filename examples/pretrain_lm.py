r"""Pretrains a byte-level language model whose feed-forward layers are sparse.

A decoder-only transformer on real text (by default the Python standard library's own
sources, nothing to download). The feed-forward weights are dense, masked, or stored as
blocks that move while the model trains, or are products of structured factors, or
belong to experts of which each token uses a few. The commands, from the repository's
root:

    # a dense and a block-sparse model (90%, RigL) side by side, minutes on two cores
    python examples/pretrain_lm.py --compare dense,block_sparse

    # one model; stop it at any time, go on with --resume
    python examples/pretrain_lm.py --ffn block_sparse --sparsity 0.9 --updater rigl \
        --checkpoint-dir runs/checkpoints --resume

    # what the moving topology buys: against a random one that stays
    python examples/pretrain_lm.py --compare block_sparse:rigl,block_sparse:static

    # experts against a dense model of equal work per token: width 1024, two of eight
    python examples/pretrain_lm.py --compare dense,moe --experts 8 \
        --experts-per-token 2 --expert-width 1024

    # structured weights: Monarch matrices, block butterflies plus low rank, low rank
    python examples/pretrain_lm.py --compare dense,monarch,pixelfly,low_rank

    # attention to a window, or to the blocks that a selector finds
    python examples/pretrain_lm.py --length 1024 --batch 2 --attention-block 64 \
        --compare dense,dense+window,dense+blocks --window 256 --budget 4

    # GPT-2 small's body in bf16 over four chips; your own text
    python examples/pretrain_lm.py --preset 124m --mesh fsdp=4 --ffn block_sparse \
        --data corpus/ --checkpoint-dir gs://bucket/run --checkpoint-every 1000

Two programs train a block-sparse model, each compiled once: the train step, in which no
array has the shape of a sparse layer's weight, and, every ``--every`` steps, the
topology step, which drops the blocks of smallest norm and grows those whose gradient
has the largest. What keeps experts busy is a load-balance loss and a bias that each
step moves by the experts' loads; what keeps the router's logits small is a z-loss.
Writes ``loss.png``, ``topology.png`` or ``load.png``, ``<run>.jsonl`` and
``summary.json`` to ``--out``, and prints a table.
"""

import argparse
import collections
import dataclasses
import functools
import math
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import _attention
import _data
import _report
import _transformer
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import sparsejax as sj
import sparsejax.checkpoint
import sparsejax.nnx
import sparsejax.routing
import sparsejax.schedules
import sparsejax.topology
import sparsejax.transforms

# How often each program was traced: tests assert that it is once.
TRACES = collections.Counter()


# ---- configuration -----------------------------------------------------------------

UPDATERS = {
    "dense": ("none",),
    "masked": ("rigl", "static", "set", "gradual_magnitude"),
    "block_sparse": ("rigl", "static", "set"),
    "moe": ("none",),
    "monarch": ("none",),
    "pixelfly": ("none",),
    "low_rank": ("none",),
}

# Flags that say nothing of other feed-forward layers.
FITS = dict.fromkeys(
    ("sparsity", "updater"), ("masked", "block_sparse")
) | dict.fromkeys(
    (
        *("experts", "experts_per_token", "expert_width", "capacity_factor"),
        *("load_balance", "balance_rate", "z_loss"),
    ),
    ("moe",),
)
FITS |= {"monarch_blocks": ("monarch",), "rank": ("pixelfly", "low_rank")}
# Nor these of other attention.
ATTENTION_FITS = {
    "attention_block": ("window", "blocks"),
    "window": ("window",),
    "selector": ("blocks",),
    "budget": ("blocks",),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What defines a run. A checkpoint resumes only under an equal one."""

    ffn: str = "block_sparse"
    sparsity: float = 0.9
    updater: str = "rigl"
    block: int = 64
    every: int = 20  # steps between topology steps
    fraction: float = 0.1  # of the blocks that move, at first
    experts: int = 8  # E
    experts_per_token: int = 2  # k
    expert_width: int = 0  # 0: ffn_width
    capacity_factor: float = 0.0  # of an even share; 0: experts serve all who ask
    load_balance: float = 1e-2  # weight of that loss, the mean over layers
    balance_rate: float = 1e-3  # step of the experts' bias; 0: there is none
    z_loss: float = 1e-3  # weight of that loss, likewise
    monarch_blocks: int = 16  # of each factor
    rank: int = 32  # of a low-rank weight, or beside Pixelfly's blocks
    attention: str = "dense"
    attention_block: int = 64  # queries, and keys, of a block
    window: int = 64  # of --attention window: bytes that a byte sees, itself among them
    selector: str = "moba"  # of --attention blocks
    budget: int = 4  # blocks of keys that it finds for each block of queries
    layers: int = 2
    width: int = 512  # d
    heads: int = 8  # H
    ffn_width: int = 2048
    length: int = 128  # T, tokens per sequence
    batch: int = 16  # B, sequences per step
    dtype: str = "float32"  # of the computation; parameters are float32
    remat: bool = False  # recompute each block in the backward pass
    scan: bool = False  # over layers of stacked weights: one layer to compile
    steps: int = 200
    warmup: int = 20
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    data: str = ""  # digest of the text

    @property
    def moves(self) -> bool:
        """Whether a topology step exists apart from the train step."""
        return self.ffn == "block_sparse" and self.updater != "static"

    @property
    def end(self) -> int:
        """The last step after which the topology may change: three quarters through."""
        return 3 * self.steps // 4


PRESETS = {
    "tiny": Config(),
    # GPT-2 small's twelve layers; of its 124M parameters the 39M of token embeddings
    # fall away, since the vocabulary is 256 bytes.
    "124m": Config(
        block=128,
        every=100,
        fraction=0.3,
        layers=12,
        width=768,
        heads=12,
        ffn_width=3072,
        length=1024,
        batch=128,
        dtype="bfloat16",
        remat=True,
        scan=True,
        steps=50_000,
        warmup=1000,
        learning_rate=6e-4,
    ),
}


def check(config: Config) -> None:
    """Raises ValueError, by flag, for what cannot be trained."""

    def need(holds: bool, flag: str, got: Any, needed: str) -> None:
        if not holds:
            raise ValueError(f"--{flag}: got {got}, needed {needed}")

    need(0 <= config.sparsity <= 1, "sparsity", config.sparsity, "0 to 1")
    updaters = UPDATERS[config.ffn]
    need(
        config.updater in updaters,
        "updater",
        config.updater,
        f"one of {', '.join(updaters)} with --ffn {config.ffn}",
    )
    for flag in (
        *("steps", "every", "batch", "length", "layers", "block", "experts"),
        *("monarch_blocks", "rank", "attention_block", "window", "budget"),
    ):
        got = getattr(config, flag)
        need(got > 0, flag.replace("_", "-"), got, "at least 1")
    for flag, ffn in (("monarch_blocks", "monarch"), ("rank", "low_rank")):
        got, most = getattr(config, flag), min(config.width, config.ffn_width)
        fits = config.ffn != ffn or got <= most
        need(fits, flag.replace("_", "-"), got, f"at most {most}, the smaller width")
    k = config.experts_per_token
    most = f"1 to {config.experts}, --experts"
    need(1 <= k <= config.experts, "experts-per-token", k, most)
    fits = ("expert_width", "capacity_factor", "load_balance", "balance_rate", "z_loss")
    for flag in fits:
        got = getattr(config, flag)
        need(got >= 0, flag.replace("_", "-"), got, "at least 0")
    need(0 < config.fraction <= 1, "fraction", config.fraction, "above 0, at most 1")
    need(
        config.width % (2 * config.heads) == 0,
        "width",
        config.width,
        f"a multiple of 2 * --heads = {2 * config.heads}",
    )
    need(
        config.updater in ("none", "static") or config.every <= config.end,
        "every",
        config.every,
        f"at most {config.end}, three quarters of --steps: else the topology would "
        "never change (--updater static means it)",
    )


# ---- programs ----------------------------------------------------------------------


class State(NamedTuple):
    """All that changes while training, and all that a checkpoint must hold."""

    params: nnx.State
    layouts: nnx.State  # of block-sparse layers; empty else
    balance: nnx.State  # of experts, their bias; empty else
    opt_state: optax.OptState  # of masked layers, with the masks
    key: jax.Array
    step: jax.Array  # int32 []


class Losses(NamedTuple):
    """What a step tells of its batch."""

    loss: jax.Array  # cross-entropy, in nats
    load: jax.Array | None = None  # int32 (layers, E): tokens that ask for each expert
    dropped: jax.Array | None = None  # share of choices beyond the experts' capacity
    attended: jax.Array | None = None  # (layers,): share of attention's blocks computed


class Programs(NamedTuple):
    """The jitted functions of a run, and what they take: shapes and shardings."""

    init: Callable[[jax.Array], State]
    train_step: Callable[[State, jax.Array], tuple[State, Losses]]
    topology_step: Callable[[State, jax.Array], State] | None
    evaluate: Callable[[State, jax.Array], Losses]
    state: State  # of jax.ShapeDtypeStruct
    batch: jax.ShapeDtypeStruct  # uint8 (B, T + 1)


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """AdamW with warm-up and cosine decay; no decay on norms; masked if asked."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0,
        config.learning_rate,
        min(config.warmup, config.steps - 1),
        config.steps,
        config.learning_rate / 10,
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(
            schedule,
            b2=0.95,
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree_util.tree_map_with_path(
                lambda path, _: "norm" not in jax.tree_util.keystr(path), params
            ),
        ),
    )
    if config.ffn == "masked":
        updater = {
            "static": sj.transforms.static,
            "gradual_magnitude": sj.transforms.gradual_magnitude,
            "set": sj.transforms.sparse_evolutionary_training,
            "rigl": sj.transforms.rigl,
        }[config.updater]
        moves = config.updater in ("set", "rigl")
        optimizer = sj.transforms.sparsify(
            optimizer,
            updater(
                sparsity=config.sparsity,
                begin=config.every,
                end=config.end,
                every=config.every,
                key=jax.random.key(config.seed),
                **({"drop_fraction": config.fraction} if moves else {}),
            ),
            leaf_filter=lambda name, _: "mlp" in name.split("/"),
        )
    return optimizer


def build(config: Config, mesh: Mesh, *, implementation: str | None = None) -> Programs:
    """Makes the programs of a run over a mesh of one or more devices.

    The batch is split over all axes of the mesh, the state over the axis ``fsdp``,
    where there is one: each large array along one dimension. The loss runs inside
    shard_map, so that each device runs the kernels on its share. Nothing is computed
    here: the programs also compile for devices that are not there.
    """
    axes, shards = mesh.axis_names, mesh.shape.get("fsdp", 1)
    if config.batch % mesh.size:
        raise ValueError(
            f"--batch: got {config.batch}, needed a multiple of {mesh.size}, the "
            "devices of --mesh"
        )
    optimizer = make_optimizer(config)

    more: dict[str, Any] = dict(attend=_attention.make_attend(config, implementation))
    if config.ffn == "moe":
        more["balance"] = config.balance_rate > 0
    if config.ffn == "moe" and config.capacity_factor:
        more["capacity"] = sj.routing.capacity(
            config.batch // mesh.size * config.length,  # tokens of a device
            config.experts,
            config.experts_per_token,
            config.capacity_factor,
        )

    # -- the model as pure functions of its state

    def make_model(key):
        model = _transformer.Transformer(
            config, implementation, rngs=nnx.Rngs(params=key), **more
        )
        return nnx.split(
            model, nnx.Param, sj.nnx.Layout, sj.nnx.Balance, sj.nnx.GrowthProbe
        )

    def init(key):
        model_key, key = jax.random.split(key)
        _, params, layouts, balance, _ = make_model(model_key)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
            opt_state = optimizer.init(params)
        if config.ffn == "masked":
            masks = sj.transforms.get_masks(opt_state)
            params = sj.masks.apply_masks(params, masks)
        return State(params, layouts, balance, opt_state, key, jnp.int32(0))

    graphdef, *_, probes = nnx.eval_shape(make_model, jax.random.key(0))
    zeros = lambda: jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), probes)

    # -- where its arrays live

    everywhere, by_sequence = PartitionSpec(), PartitionSpec(axes)

    def spec(x: Any) -> PartitionSpec:
        """Which dimension fsdp splits: the largest of those that it divides."""
        sizes = [size if size % shards == 0 else 0 for size in x.shape]
        index = jnp.issubdtype(x.dtype, jnp.integer)  # layouts are small, and whole
        if shards == 1 or x.ndim < 2 or index or not any(sizes):
            return everywhere
        return PartitionSpec(*(None,) * sizes.index(max(sizes)), "fsdp")

    def on_mesh(x: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        place = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    state = jax.eval_shape(init, jax.random.key(0))
    state = jax.tree.map(lambda x: on_mesh(x, spec(x)), state)
    batch = jax.ShapeDtypeStruct((config.batch, config.length + 1), jnp.uint8)
    batch = on_mesh(batch, by_sequence)
    places = jax.tree.map(lambda x: x.sharding, state)
    param_specs = jax.tree.map(lambda place: place.spec, places.params)

    def gather(params):
        """A device's shards -> whole arrays; its transpose scatters the gradients."""

        def whole(p, spec):
            if "fsdp" not in spec:
                return p
            return jax.lax.all_gather(p, "fsdp", axis=spec.index("fsdp"), tiled=True)

        return jax.tree.map(whole, params, param_specs)

    # -- the programs

    def on_devices(f, out_specs):
        """Runs f(params, layouts, balance, probes, batch) on each device's share."""
        specs = (param_specs, everywhere, everywhere, everywhere, by_sequence)
        return jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=out_specs)

    def losses_of(params, layouts, balance, probes, batch):
        """Means over all devices, so that gradients are those of the whole batch."""
        model = nnx.merge(graphdef, gather(params), layouts, balance, probes)
        tokens = batch.astype(jnp.int32)
        logits, experts, attended = model(tokens[:, :-1])  # (B / devices, T, 256)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        loss = jax.lax.pmean(loss.mean(), axes)
        if attended is not None:
            attended = jax.lax.pmean(attended, axes)
        if experts is None:
            return loss, Losses(loss, attended=attended)
        # Loads are of the whole batch: a device's own sequences need not be balanced.
        of_batch = functools.partial(sj.routing.load_balance_loss, axis_name=axes)
        uneven = jax.lax.pmean(jax.vmap(of_batch)(experts.routing).mean(), axes)
        z = jax.lax.pmean(experts.z.mean(), axes)
        trained = loss + config.load_balance * uneven + config.z_loss * z
        load = jax.lax.psum(experts.counts, axes)
        dropped = jax.lax.pmean(experts.metrics.dropped.mean(), axes)
        return trained, Losses(loss, load, dropped, attended)

    def rebalance(balance, load):
        """The next bias of each layer, by what its experts were asked for."""

        def moved(path, bias):
            update = functools.partial(sj.routing.update_bias, rate=config.balance_rate)
            if bias.ndim == 2:  # of stacked layers
                return jax.vmap(update)(bias, load)
            return update(bias, load[path[1].key])  # blocks, layer, ...

        return jax.tree.map_with_path(moved, balance)

    def train_step(state, batch):
        TRACES["train_step"] += 1
        gradient_of = jax.grad(losses_of, has_aux=True)
        gradient, losses = on_devices(gradient_of, (param_specs, everywhere))(
            state.params, state.layouts, state.balance, zeros(), batch
        )
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(
                gradient, state.opt_state, state.params
            )
            params = optax.apply_updates(state.params, updates)
        state = state._replace(
            params=params,
            balance=rebalance(state.balance, losses.load),
            opt_state=opt_state,
            step=state.step + 1,
        )
        return state, losses

    def topology_step(state, batch):
        TRACES["topology_step"] += 1
        key, draw = jax.random.split(state.key)
        if config.updater == "rigl":
            # A probe's gradient is the norm of each block of the dense gradient, of
            # its sum over the devices.
            score = jax.grad(losses_of, argnums=3, has_aux=True)
            scores, _ = on_devices(score, everywhere)(
                state.params, state.layouts, state.balance, zeros(), batch
            )
        else:  # sparse evolutionary training grows at random
            leaves, tree = jax.tree.flatten(probes)
            keys = jax.random.split(draw, len(leaves))
            draws = [
                jax.random.uniform(k, p.shape)
                for k, p in zip(keys, leaves, strict=True)
            ]
            scores = jax.tree.unflatten(tree, draws)
        fraction = sj.schedules.cosine_drop_fraction(
            state.step, fraction=config.fraction, end=config.end
        )
        params, layouts, opt_state = sj.topology.step(
            state.params,
            state.layouts,
            state.opt_state,
            scores,
            fraction=fraction,
        )
        return State(params, layouts, state.balance, opt_state, key, state.step)

    def evaluate(state, batch):
        TRACES["evaluate"] += 1
        _, losses = on_devices(losses_of, everywhere)(
            state.params, state.layouts, state.balance, zeros(), batch
        )
        return losses

    number = NamedSharding(mesh, everywhere)
    jit = functools.partial(jax.jit, donate_argnums=0)
    return Programs(
        init=jax.jit(init, out_shardings=places),
        train_step=jit(train_step, out_shardings=(places, number)),
        topology_step=jit(topology_step, out_shardings=places),
        evaluate=jax.jit(evaluate, out_shardings=number),
        state=state,
        batch=batch,
    )


# ---- one run -----------------------------------------------------------------------


@dataclasses.dataclass
class Run:
    """A model on its way: what ``train`` moves forward."""

    name: str
    config: Config
    programs: Programs
    state: State
    batches: Any  # grain.DatasetIterator
    log: _report.Log
    first_topology: dict[str, np.ndarray]
    compile_seconds: float
    step: int = 0
    validation: float = math.nan  # bits per byte


def start(name: str, config: Config, text: _data.Text, args) -> Run:
    """Builds and compiles a run; with --resume, from its newest checkpoint."""
    programs = build(config, make_mesh(args.mesh), implementation=args.implementation)
    batches = _data.train_batches(
        text.train, length=config.length, batch=config.batch, seed=config.seed
    )
    state, step = programs.init(jax.random.key(config.seed)), 0
    first_topology = _report.topology_of(state, config)
    if args.checkpoint_dir:
        folder = f"{args.checkpoint_dir}/{name}"
        if args.resume:
            found = sj.checkpoint.restore(folder, state, config=config)
            if found is not None:
                state, position, step = found
                batches.set_state(position)
        elif (newest := sj.checkpoint.latest_step(folder)) is not None:
            raise ValueError(
                f"--checkpoint-dir: got {args.checkpoint_dir}, which holds {name} at "
                f"step {newest}; needed --resume to go on, or another folder"
            )

    begin = time.perf_counter()
    shapes = (programs.state, programs.batch)
    programs = programs._replace(
        train_step=programs.train_step.lower(*shapes).compile(),
        evaluate=programs.evaluate.lower(*shapes).compile(),
    )
    if config.moves:
        topology_step = programs.topology_step.lower(*shapes).compile()
        programs = programs._replace(topology_step=topology_step)
    return Run(
        name,
        config,
        programs,
        state,
        batches,
        _report.Log(args.out / f"{name}.jsonl"),
        first_topology,
        compile_seconds=time.perf_counter() - begin,
        step=step,
    )


def train(run: Run, text: _data.Text, args) -> Iterator[int]:
    """Trains to the end; yields every --log-every steps, so that runs can take turns.

    What is timed is the train steps of a turn; what else happens in it is put aside.
    """
    config, programs = run.config, run.programs
    put = lambda batch: jax.device_put(batch, programs.batch.sharding)
    validation = _data.validation_batches(
        text.validation,
        length=config.length,
        batch=config.batch,
        count=args.eval_batches,
    )

    def evaluate() -> float:
        losses = [programs.evaluate(run.state, put(batch)).loss for batch in validation]
        return float(np.mean(losses)) / math.log(2)

    def timed(work: Callable[[], None]) -> float:
        jax.block_until_ready(run.state)
        begin = time.perf_counter()
        work()
        jax.block_until_ready(run.state)
        return time.perf_counter() - begin

    def move_blocks():
        run.state = programs.topology_step(run.state, batch)

    def save():
        sj.checkpoint.save(
            f"{args.checkpoint_dir}/{run.name}",
            run.step,
            run.state,
            config=config,
            data_position=run.batches.get_state(),
        )

    while run.step < config.steps:
        first, losses, topology_seconds, save_seconds = run.step, [], [], 0.0
        begin = time.perf_counter()
        while True:
            batch = put(next(run.batches))
            run.state, of_step = programs.train_step(run.state, batch)
            run.step += 1
            losses.append(of_step)
            last = run.step == config.steps
            if config.moves and run.step % config.every == 0 and run.step <= config.end:
                topology_seconds.append(timed(move_blocks))
            turn_ends = last or run.step % args.log_every == 0
            due = last or run.step % args.checkpoint_every == 0
            if args.checkpoint_dir and due and not turn_ends:
                save_seconds += timed(save)
            if turn_ends:
                break
        jax.block_until_ready(run.state)
        seconds = time.perf_counter() - begin - sum(topology_seconds) - save_seconds
        losses = jax.device_get(losses)
        loss = float(np.mean([each.loss for each in losses]))  # of the turn
        record = {
            "step": run.step,
            "train_bits_per_byte": loss / math.log(2),
            "step_seconds": seconds / (run.step - first),
            "topology_step_seconds": topology_seconds,
        }
        if config.ffn == "moe":
            record["load"] = np.mean([each.load for each in losses], axis=0).tolist()
            record["dropped"] = float(np.mean([each.dropped for each in losses]))
        if config.attention != "dense":
            density = np.mean([each.attended for each in losses], axis=0)
            record["attention_density"] = density.tolist()
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"--learning-rate: got {config.learning_rate}, with which the loss of "
                f"{run.name} is {loss} by step {run.step}; needed a smaller one"
            )
        if last or run.step // args.eval_every > first // args.eval_every:
            run.validation = evaluate()
            record["validation_bits_per_byte"] = run.validation
        run.log.write(record)
        # After the record: a run killed between the two would go on without it.
        if args.checkpoint_dir and due:
            save()
        yield run.step
    if math.isnan(run.validation):  # there was nothing left to train
        run.validation = evaluate()


# ---- command line ------------------------------------------------------------------


def make_mesh(text: str) -> Mesh:
    """``data=2,fsdp=4`` -> a mesh of the first eight devices."""
    try:
        pairs = [part.split("=") for part in text.split(",")]
        shape = {axis.strip(): int(size) for axis, size in pairs}
    except ValueError:
        shape = {}
    if not shape or set(shape) - {"data", "fsdp"} or min(shape.values()) < 1:
        raise ValueError(f"--mesh: got {text!r}, needed such as data=4 or fsdp=4")
    devices = jax.devices()
    count = math.prod(shape.values())
    if count > len(devices):
        raise ValueError(
            f"--mesh: got {text}, {count} devices, needed at most the "
            f"{len(devices)} that are here"
        )
    return Mesh(np.reshape(devices[:count], tuple(shape.values())), tuple(shape))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; every field of Config that is not given is the preset's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("the model and its sparsity").add_argument
    add("--preset", choices=PRESETS, default="tiny", help="sizes (default: tiny)")
    add("--ffn", choices=UPDATERS, help="feed-forward weights (block_sparse)")
    add("--sparsity", type=float, help="share of them that is zero (0.9)")
    add(
        "--updater",
        choices=sorted({name for names in UPDATERS.values() for name in names}),
        help="how the topology moves (rigl); static: it stays",
    )
    add("--block", type=int, help="side of a block; also of a tile of topology.png")
    add("--every", type=int, help="steps between changes of the topology")
    add("--fraction", type=float, help="share that moves, at first; falls by a cosine")
    add("--experts", type=int, help="of --ffn moe, in each layer (8)")
    add("--experts-per-token", type=int, help="of them that each token uses (2)")
    add("--expert-width", type=int, help="hidden features of each (--ffn-width)")
    add(
        "--capacity-factor",
        type=float,
        help="how many times an even share of the tokens an expert serves; choices "
        "beyond it are dropped (0: it serves all)",
    )
    add("--load-balance", type=float, help="weight of the load-balance loss (0.01)")
    add(
        "--balance-rate",
        type=float,
        help="step by which each train step moves the bias that balances experts "
        "(0.001); 0: none",
    )
    add("--z-loss", type=float, help="weight of the loss on router logits (0.001)")
    add("--monarch-blocks", type=int, help="of --ffn monarch, in each factor (16)")
    add("--rank", type=int, help="of --ffn low_rank, or beside Pixelfly's blocks (32)")
    add("--attention", choices=_attention.KINDS, help="which bytes it sees (dense)")
    add("--attention-block", type=int, help="bytes of a block of attention (64)")
    add("--window", type=int, help="of --attention window: the last bytes (64)")
    add(
        "--selector",
        choices=_attention.SELECTORS,
        help="of --attention blocks: who finds them (moba)",
    )
    add("--budget", type=int, help="how many it finds for each block of queries (4)")
    add("--layers", type=int, help="transformer blocks")
    add("--width", type=int, help="features between the layers")
    add("--heads", type=int, help="attention heads")
    add("--ffn-width", type=int, help="hidden features of the feed-forward layers")
    add(
        "--compare",
        metavar="FFN[:UPDATER][+ATTENTION],...",
        help="train several models in turns on the same data, such as "
        "dense,block_sparse:rigl+window; the first is what the table compares to",
    )
    add = parser.add_argument_group("training").add_argument
    add("--data", nargs="+", default=[], metavar="PATH", help="text files or folders")
    add("--steps", type=int, help="train steps")
    add("--batch", type=int, help="sequences per step, over all devices")
    add("--length", type=int, help="bytes per sequence")
    add("--learning-rate", type=float, help="at its peak")
    add("--warmup", type=int, help="steps until then")
    add("--weight-decay", type=float, help="AdamW's, norms excepted")
    add("--clip", type=float, help="global norm that gradients are clipped to")
    add("--seed", type=int, help="of parameters, topology and order of the data")
    add = parser.add_argument_group("where and how it runs").add_argument
    add("--dtype", choices=("float32", "bfloat16"), help="of the computation")
    add(
        "--remat",
        action=argparse.BooleanOptionalAction,
        help="recompute to save memory",
    )
    add(
        "--scan",
        action=argparse.BooleanOptionalAction,
        help="stack the layers' weights and compile one layer",
    )
    add("--mesh", default="data=1", help="devices, such as data=4 or fsdp=4 (data=1)")
    add(
        "--implementation",
        choices=("xla", "mosaic_tpu", "mosaic_gpu"),
        help="of block-sparse and experts' products and of sparse attention (default: "
        "the best that serves)",
    )
    add(
        "--out", type=pathlib.Path, default="runs/pretrain_lm", help="folder of reports"
    )
    add("--checkpoint-dir", help="folder of checkpoints (default: none are written)")
    add("--checkpoint-every", type=int, default=100, help="steps (100)")
    add("--resume", action="store_true", help="go on from the newest checkpoint")
    add("--log-every", type=int, help="steps (default: --every)")
    add("--eval-every", type=int, default=50, help="steps between validations (50)")
    add("--eval-batches", type=int, default=16, help="batches of a validation (16)")
    return parser.parse_args(argv)


def configure(args: argparse.Namespace) -> dict[str, Config]:
    """The named configurations to train, checked; fills in what follows from others."""
    given = {
        field.name: value
        for field in dataclasses.fields(Config)
        if (value := getattr(args, field.name, None)) is not None
    }
    given.pop("data")  # its digest comes when it has been read
    base = dataclasses.replace(PRESETS[args.preset], **given)
    configs = {}
    for name in (args.compare or base.ffn).split(","):
        ffn, _, attention = name.partition("+")
        ffn, _, updater = ffn.partition(":")
        attention = attention or base.attention
        if ffn not in UPDATERS or attention not in _attention.KINDS:
            raise ValueError(
                f"--compare: got {name!r}, needed one of {', '.join(UPDATERS)}, each "
                f"with :updater and +{', +'.join(_attention.KINDS)} if wanted"
            )
        updater = updater or ("none" if UPDATERS[ffn] == ("none",) else base.updater)
        config = dataclasses.replace(
            base, ffn=ffn, updater=updater, attention=attention
        )
        check(config)
        configs[name.replace(":", "-")] = config
    for kind, fits in (("ffn", FITS), ("attention", ATTENTION_FITS)):
        kinds = {getattr(config, kind) for config in configs.values()}
        for flag, needed in fits.items():
            got = getattr(args, flag)
            if got not in (None, "none") and not kinds & {*needed}:
                raise ValueError(
                    f"--{flag.replace('_', '-')}: got {got}, needed --{kind} "
                    f"{' or '.join(needed)}"
                )
    for flag in ("log_every", "eval_every", "eval_batches", "checkpoint_every"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise ValueError(
                f"--{flag.replace('_', '-')}: got {getattr(args, flag)}, needed "
                "at least 1"
            )
    if args.resume and not args.checkpoint_dir:
        raise ValueError("--resume: got no --checkpoint-dir, needed where to look")
    args.log_every = args.log_every or base.every
    return configs


def main(argv: list[str] | None = None) -> list[Run]:
    """Trains what the command line says and reports."""
    args = parse(argv)
    configs = configure(args)
    length = max(config.length for config in configs.values())
    text = _data.load_text(args.data, needed=length + 1)
    runs = [
        start(name, dataclasses.replace(config, data=text.digest), text, args)
        for name, config in configs.items()
    ]
    # Whatever was to be refused has been: from here on files are written.
    for run in runs:
        run.log.open(keep=run.step)
    with _report.Display(runs, text) as display:
        # In turns, so that what else the machine does slows all of them alike.
        waiting = collections.deque((run, train(run, text, args)) for run in runs)
        while waiting:
            run, training = waiting.popleft()
            if next(training, "done") != "done":
                display.update(run)
                waiting.append((run, training))
    _report.finish(runs, args.out)
    return runs


if __name__ == "__main__":
    try:
        main()
    except (ValueError, NotImplementedError, FloatingPointError) as error:
        sys.exit(f"pretrain_lm.py: {error}")
