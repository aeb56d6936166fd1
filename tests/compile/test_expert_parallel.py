"""Training steps of expert-parallel layers for 512 v5p chips, by the TPU compiler.

Run where libtpu is installed, with SPARSEJAX_COMPILE=tpu and -s for the figures. No TPU
is needed.
"""

import collections
import functools
import math
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

if os.environ.get("SPARSEJAX_COMPILE") != "tpu":
    pytest.skip("needs SPARSEJAX_COMPILE=tpu and libtpu", allow_module_level=True)

import sparsejax as sj

MEMORY = 95e9  # bytes of one v5p chip
AXES = ("data", "expert", "fsdp")
TOKENS = 4096  # per device
LAYERS, D, F, E, K = 94, 4096, 1536, 128, 8  # 227e9 weights

# Options, and what a layer sends over the expert axis in a step, worked by hand. A row
# of 4096 bfloat16 numbers is 8192 bytes; 7/8 of what is exchanged leaves the device.
# Rows cross five times: there and back, there again when the layer is rematerialized,
# and for the derivatives there and back. Experts, 3 * 4096 * 1536 * 2 bytes = 37.7 MB
# each, cross three times: there, there again, and their gradients back.
EXCHANGES = {
    # 8 peers * 1.25 * 4096 * 8 / 8 rows.
    "all_to_all, capacity 1.25": (
        dict(exchange="all_to_all", capacity_factor=1.25),
        5 * 8 * 5120 * 8192 * 7 / 8,
    ),
    # Room for all choices at each of 8 peers: 4096 * 8 rows.
    "all_to_all, worst case": (
        dict(exchange="all_to_all"),
        5 * 8 * 32768 * 8192 * 7 / 8,
    ),
    # The choices that there are; with 512 bytes for an expert's number, or a weight: on
    # a TPU rows are no narrower. Those cross five times in all.
    "ragged_all_to_all, capacity 2": (
        dict(exchange="ragged_all_to_all", capacity_factor=2.0),
        5 * 32768 * (8192 + 512) * 7 / 8,
    ),
    # All tokens of 8 devices.
    "gather_tokens": (
        dict(exchange="gather_tokens"),
        5 * 8 * 4096 * 8192 * 7 / 8,
    ),
    "gather_experts, all 128": (
        dict(exchange="gather_experts"),
        3 * 128 * 37_748_736 * 7 / 8,
    ),
    "gather_experts, 4 of each 16": (
        dict(exchange="gather_experts", max_experts=4),
        3 * 32 * 37_748_736 * 7 / 8,
    ),
}
# Over the axis of FSDP: a layer's 16 local experts gathered, gathered again, and their
# gradients scattered; over the data axis the all-reduce of an eighth of those.
FSDP = 3 * 16 * 37_748_736 * 7 / 8
DATA = 2 * 2 * 37_748_736 * 7 / 8


@pytest.fixture(scope="module")
def mesh():
    """512 chips that are not there: 8 data x 8 expert x 8 fsdp."""
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5p:8x8x8")
    return jax.sharding.Mesh(np.array(topology.devices).reshape(8, 8, 8), AXES)


SPECS = {
    "router": P(),
    "w_in": P(None, "expert", "fsdp"),
    "w_gate": P(None, "expert", "fsdp"),
    "w_out": P(None, "expert", "fsdp"),
}
SHAPES = {
    "router": (D, E),
    "w_in": (E, D, F),
    "w_gate": (E, D, F),
    "w_out": (E, F, D),
}


def route(x, router):
    """The eight experts of highest probability, weights summing to 1."""
    logits = jnp.matmul(x, router.astype(x.dtype), preferred_element_type=jnp.float32)
    probs = jax.nn.softmax(logits)
    weights, indices = jax.lax.top_k(probs, K)
    weights = weights / jnp.sum(weights, axis=1, keepdims=True)
    return sj.routing.Routing(indices, weights, jnp.ones_like(indices, bool), probs)


def layer(how, x, params):
    gather = lambda name: jax.lax.all_gather(
        params[name].astype(jnp.bfloat16), "fsdp", axis=1, tiled=True
    )
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=1, keepdims=True) + 1e-6)
    normed = (x32 * scale).astype(x.dtype)
    y, dropped = sj.ops.expert_parallel_moe_mlp(
        normed,
        route(normed, params["router"]),
        gather("w_in"),
        gather("w_out"),
        w_gate=gather("w_gate"),
        axis_name="expert",
        **how,
    )
    return x + y, jax.lax.psum(dropped, AXES)


def train_step(mesh, how):
    """(step, shapes) of the layers under a squared loss and AdamW."""
    optimizer = optax.adamw(1e-3)
    each = jax.checkpoint(functools.partial(layer, how))

    def forward(params, x, target):
        x, dropped = jax.lax.scan(each, x, params)
        error = (x - target).astype(jnp.float32)
        return jax.lax.pmean(jnp.mean(error * error), AXES), jnp.sum(dropped)

    mapped = jax.shard_map(
        forward,
        mesh=mesh,
        in_specs=(SPECS, P(AXES), P(AXES)),
        out_specs=(P(), P()),
    )

    def step(params, state, x, target):
        (loss, dropped), grads = jax.value_and_grad(mapped, has_aux=True)(
            params, x, target
        )
        with jax.numpy_dtype_promotion("standard"):  # optax breaks the strict one
            updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss, dropped

    place = lambda shape, dtype, spec: jax.ShapeDtypeStruct(
        shape, dtype, sharding=NamedSharding(mesh, spec)
    )
    params = {
        name: place((LAYERS, *SHAPES[name]), jnp.float32, SPECS[name])
        for name in SHAPES
    }
    adam, *rest = jax.eval_shape(optimizer.init, params)
    adam = adam._replace(
        count=place((), jnp.int32, P()), mu=params, nu=params
    )  # moments lie where their weights lie
    x = place((TOKENS * mesh.size, D), jnp.bfloat16, P(AXES))
    return jax.jit(step, donate_argnums=(0, 1)), (params, (adam, *rest), x, x)


# --- What the compiled program sends --------------------------------------------------

BYTES = {"pred": 1, "s32": 4, "u32": 4, "f32": 4, "bf16": 2}
COLLECTIVE = re.compile(
    r"(%\S+) = (.*?) (all-gather|reduce-scatter|all-to-all|ragged-all-to-all|"
    r"all-reduce|collective-permute|collective-broadcast)(?:-start)?\((%[^\s,)]+)"
)
STRIDES = {64: "data", 8: "expert", 1: "fsdp"}


def size(text):
    """Bytes of the arrays in an HLO type."""
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", text)
    return sum(
        BYTES[dtype] * math.prod(int(n) for n in dims.split(",") if n)
        for dtype, dims in arrays
    )


def axis(line):
    """The mesh axis that a collective runs over, and its number of devices."""
    pair = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", line)
    if pair:
        return STRIDES[abs(int(pair[1]) - int(pair[2]))], 8
    explicit = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    if explicit:
        group = np.array(explicit[1].split(","), int)
    else:
        groups, shape, order = re.search(
            r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line
        ).groups()
        ids = np.arange(512).reshape([int(n) for n in shape.split(",")])
        ids = ids.transpose([int(n) for n in order.split(",")]) if order else ids
        group = ids.reshape([int(n) for n in groups.split(",")])[0]
    one = len(group) == 8
    return STRIDES[int(group[1] - group[0])] if one else "several", len(group)


def traffic(text):
    """Bytes that a device sends for each layer, and outside of layers, by mesh axis.

    Of p pieces one stays; a ring's all-reduce sends all of them twice. A ragged
    exchange is counted by the smaller of its buffers, which bounds what devices send on
    average. A loop around a collective is the one over layers.
    """
    types = dict(re.findall(r"(%\S+) = (\S+\[[\d,]*\])", text))
    within, where, found = {}, None, []
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            where = line.split()[line.startswith("ENTRY")]
        for kind, name in re.findall(r"(body|calls|to_apply)=(%[^\s,}]+)", line):
            within[name] = (where, kind == "body")
        match = COLLECTIVE.search(line)
        if match:
            found.append((where, line, *match.groups()[1:]))
    layer, outside = collections.Counter(), collections.Counter()
    for where, line, result, kind, operand in found:
        name, p = axis(line)
        moved = size(result)
        if kind == "reduce-scatter":
            moved *= p
        # The compiler's other form of a reduce-scatter: fused with taking the part.
        if kind == "all-reduce" and "all-reduce-scatter" not in where:
            moved *= 2
        if kind == "ragged-all-to-all":
            moved = min(moved, size(types[operand]))
        if kind == "collective-permute":  # all of it leaves
            moved = size(types[operand]) * p / (p - 1)
        loops = 0
        while where in within:
            where, loop = within[where]
            loops += loop
        assert loops <= 1, line
        (layer if loops else outside)[name] += moved * (p - 1) / p
    return layer, outside


# A minute each: these are compiled by hand.
BY_HAND = (
    "all_to_all, capacity 1.25",
    "all_to_all, worst case",
    "gather_experts, all 128",
    "gather_tokens",
)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.exhaustive] if name in BY_HAND else [])
        for name in EXCHANGES
    ],
)
def test_trains_on_512_chips(mesh, name):
    how, expected = EXCHANGES[name]
    step, shapes = train_step(mesh, how)
    compiled = step.trace(*shapes).lower(lowering_platforms=("tpu",)).compile()
    memory = compiled.memory_analysis()
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    used += memory.output_size_in_bytes - memory.alias_size_in_bytes
    layer, outside = traffic(compiled.as_text())
    print(
        f"\n{name}: {used / 1e9:.1f} GB of {MEMORY / 1e9:.0f} GB per chip; sent by "
        "each per layer and step: "
        + ", ".join(f"{a} {b / 1e9:.3f} GB" for a, b in sorted(layer.items()))
        + f"; outside of layers {outside.total() / 1e6:.1f} MB; "
        f"{(layer.total() * LAYERS + outside.total()) / 1e9:.0f} GB in all"
    )
    # Weights and two moments, 12 bytes each: 42.58 GB of experts, cut in 64; 0.59 GB of
    # routers, which each chip has; 0.07 GB of tokens and targets.
    assert 43.2e9 < memory.argument_size_in_bytes < 43.3e9
    # Then what layers keep of their inputs, 3.2 GB, gradients, 14.2 GB, and one layer.
    assert used < MEMORY
    # Indices, weights of choices and the router's gradient are the 2% above.
    assert expected <= layer["expert"] <= 1.02 * expected
    assert layer["fsdp"] == FSDP
    assert layer["data"] == DATA
    assert layer["several"] + outside.total() < 10e6
