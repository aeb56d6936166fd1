"""expert_parallel_moe_mlp: experts over the devices of a mesh axis."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from sparsejax import _dispatch
from sparsejax._dispatch import Choice
from sparsejax.ops import _exchange
from sparsejax.ops._checks import check_floating
from sparsejax.ops._exchange import AxisName, collect, spread
from sparsejax.ops._exchange_ragged import ragged
from sparsejax.ops._moe_mlp import moe_mlp
from sparsejax.routing import Routing


def expert_parallel_moe_mlp(
    x: Shaped[Array, "..."],
    routing: Routing,
    w_in: Shaped[Array, "..."],
    w_out: Shaped[Array, "..."],
    *,
    axis_name: AxisName,
    w_gate: Shaped[Array, "..."] | None = None,
    exchange: str = "all_to_all",
    capacity_factor: float | None = None,
    max_experts: int | None = None,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.silu,
    dtype: jax.typing.DTypeLike | None = None,
    implementation: Choice = None,
) -> tuple[Float[Array, "t d"], Int[Array, ""]]:
    """``moe_mlp`` inside ``jax.shard_map``, the experts over a mesh axis.

    Each of the p devices of the axis holds tokens of its own, with their routing to all
    e experts, and e / p of the experts: device i those from i * e / p on. The result
    for a token is that of ``moe_mlp`` with all experts. ``exchange`` says what travels;
    c = t k are a device's choices, and numbers are those that a device sends forward
    (of them 1 / p to itself); derivatives send as many again:

    ``"all_to_all"``
        A row for each choice to its expert and back, in buffers of equal size for each
        peer: 2 c d ``capacity_factor`` numbers per device. Runs everywhere.
    ``"ragged_all_to_all"``
        The same rows in segments of their true sizes: 2 c d numbers however large the
        receiver's buffer. TPU and GPU; refused on a CPU. First choice there.
    ``"gather_tokens"``
        All tokens to all devices; each computes what its experts give, and the results
        are reduce-scattered: 2 p t d numbers, nothing that could overflow. For small
        meshes, or k near p.
    ``"gather_experts"``
        Tokens stay. Each device fetches the experts that its tokens chose, at most
        ``max_experts`` of each peer, most chosen first; gradients go back to the owners
        and are summed: 2 d f p ``max_experts`` numbers, 3 with a gate. For many tokens
        per device, or tokens that choose few experts.

    Args:
      x: This device's tokens ``[t, d]``; cut them over all axes that hold data.
      routing: Of these tokens, to all experts. Global load: ``jax.lax.psum`` of its
        ``counts()``. Where by expert, each expert chose among the device's tokens.
      w_in: This device's experts ``[e / p, d, f]``.
      w_out: ``[e / p, f, d]``.
      axis_name: The mesh axis over which the experts lie, or a tuple of axes.
      w_gate: ``[e / p, d, f]`` or None.
      exchange: One of the four.
      capacity_factor: For the two all-to-alls, room relative to a balanced load:
        ``ceil(capacity_factor * c / p)`` rows to each peer ("all_to_all"), or
        ``ceil(capacity_factor * c)`` rows received in all ("ragged_all_to_all").
        None: room for the worst case, all choices at one device; nothing is dropped
        as long as no token chooses an expert twice.
      max_experts: For "gather_experts": how many a device fetches of each peer. None:
        all; nothing is dropped.
      activation: As for ``moe_mlp``.
      dtype: As for ``moe_mlp``; tokens travel in it. Weights travel in their own dtype:
        cast float32 ones before the call to halve what "gather_experts" moves.
      implementation: As for ``moe_mlp``.

    Returns:
      y ``[t, d]``, and how many valid choices of this device's tokens found no room,
      int32 scalar (``jax.lax.psum`` over the axes that hold data for all). They
      contribute nothing; weights of the others stay as they are. Choices with room are
      the first in the routing's storage order; in the ragged exchange those of
      the first devices; in "gather_experts" those of the experts chosen most.

    Raises:
      ValueError: Shapes do not fit; the axis is not one of an enclosing ``shard_map``;
        an argument has no meaning for this exchange, or is out of range.
      NotImplementedError: "ragged_all_to_all" is lowered for a CPU; a named
        implementation does not serve.

    Example:
      Tokens over all three axes, experts over one, the rows of their matrices over
      another, gathered before use (and their gradients reduce-scattered):

      >>> P, lax = jax.sharding.PartitionSpec, jax.lax
      >>> axes = ("data", "expert", "fsdp")
      >>> mesh = jax.make_mesh(
      ...     (1, 1, 1), axes, axis_types=(jax.sharding.AxisType.Auto,) * 3)
      >>> def layer(x, routing, w_in, w_out):
      ...     w_in = lax.all_gather(w_in, "fsdp", axis=1, tiled=True)
      ...     w_out = lax.all_gather(w_out, "fsdp", axis=1, tiled=True)
      ...     y, dropped = sparsejax.ops.expert_parallel_moe_mlp(
      ...         x, routing, w_in, w_out, axis_name="expert", activation=jax.nn.relu)
      ...     return y, lax.psum(dropped, axes), lax.psum(routing.counts(), axes)
      >>> weights = P("expert", "fsdp")
      >>> layer = jax.shard_map(
      ...     layer, mesh=mesh, in_specs=(P(axes), P(axes), weights, weights),
      ...     out_specs=(P(axes), P(), P()))
      >>> routing = sparsejax.routing.Routing(
      ...     indices=jnp.array([[0], [1]]), weights=jnp.array([[1.0], [0.5]]),
      ...     valid=jnp.array([[True], [True]]), probs=jnp.eye(2))
      >>> y, dropped, load = jax.jit(layer)(
      ...     jnp.ones((2, 2)), routing, jnp.ones((2, 2, 3)), jnp.ones((2, 3, 2)))
      >>> print(y, dropped, load)
      [[6. 6.]
       [3. 3.]] 0 [1 1]

    References:
      Lepikhin et al., `GShard <https://arxiv.org/abs/2006.16668>`_, 2020, for experts
      over devices; Hwang et al., `Tutel <https://arxiv.org/abs/2206.03382>`_, 2022, for
      changing the exchange by the load; Qing et al., `Hecate
      <https://arxiv.org/abs/2502.02581>`_, 2025, for experts that go to the tokens.

    Note:
      Reverse mode, as ``moe_mlp``; derivatives travel as the rows and weights do.
    """
    gates = {} if w_gate is None else {"w_gate": w_gate}
    weights = dict(w_in=w_in, w_out=w_out, **gates)
    p = _axis_size(axis_name)
    _check(x, routing, weights, p)
    room = _room(routing, p, exchange, capacity_factor, max_experts)
    if dtype is None:  # strict promotion refuses bfloat16 beside float32
        dtypes = [a.dtype for a in (x, *weights.values())]
        dtype = functools.reduce(jnp.promote_types, dtypes)
    compute = jnp.dtype(dtype)
    check_floating(dtype=jax.ShapeDtypeStruct((), compute))

    def mlp(x, routing, weights):
        how = dict(activation=activation, dtype=compute, implementation=implementation)
        return moe_mlp(x, routing, **weights, **how)

    # What travels over the axis differs over it, and over whatever x differs over.
    flat, tree = jax.tree.flatten((x.astype(compute), routing, weights))
    x, routing, weights = jax.tree.unflatten(tree, _dispatch.vary_alike(*flat))
    run = functools.partial(_EXCHANGES[exchange], mlp, axis_name, room)
    if routing.by_expert:
        return _by_expert(run, x, routing, weights)
    return run(x, routing, weights)


# --- The exchanges: (mlp, axis, room, x, routing, weights) -> y, dropped --------------


def _to_experts(make, mlp, axis_name, room, x, routing, weights):
    """Each choice's row to the device of its expert, and its result back."""
    local = weights["w_in"].shape[0]
    t, k = routing.indices.shape
    tokens, experts, gates = routing.choices()
    way = make(experts // local, axis_name, room)
    numbers = jnp.arange(tokens.size, dtype=jnp.int32)
    beyond = jnp.full(way.slots, tokens.size, jnp.int32)
    choice = beyond.at[way.slot].set(numbers, mode="drop")  # in each slot
    source = tokens.at[choice].get(mode="fill", fill_value=t)
    places = way.slot.reshape(t, k)

    expert = (experts % local).at[choice].get(mode="fill", fill_value=local)
    expert = way.send(expert, empty=local)
    gate = way.send(spread(gates[:, None], choice, way.slot[:, None]))
    rows = way.send(spread(x, source, places))
    z = mlp(rows, _routing(expert[:, None], gate, local), weights)
    y = collect(way.back(z), source, places)
    return y, _count(routing.valid.ravel() & (way.slot == way.slots))


def _gather_tokens(mlp, axis_name, room, x, routing, weights):
    """Every device computes its experts on all tokens; the partial sums are summed."""
    del room
    local = weights["w_in"].shape[0]
    gather = lambda a: jax.lax.all_gather(a, axis_name, tiled=True)
    experts = jnp.where(routing.valid, routing.indices, routing.num_experts)
    experts = gather(experts) - local * jax.lax.axis_index(axis_name)
    mine = _routing(experts, gather(routing.weights), local)
    y = mlp(gather(x), mine, weights)
    y = jax.lax.psum_scatter(y, axis_name, scatter_dimension=0, tiled=True)
    return y, _count(jnp.zeros_like(routing.valid))


def _gather_experts(mlp, axis_name, room, x, routing, weights):
    """The experts that this device's tokens chose come to it, ``room`` of each peer."""
    local, p = weights["w_in"].shape[0], jax.lax.axis_size(axis_name)
    if room == local:
        gather = lambda w: jax.lax.all_gather(w, axis_name, tiled=True)
        y = mlp(x, routing, jax.tree.map(gather, weights))
        return y, _count(jnp.zeros_like(routing.valid))
    swap = lambda a: jax.lax.all_to_all(a, axis_name, 0, 0, tiled=True)
    load = routing.counts().reshape(p, local)
    wanted = jnp.argsort(-load, axis=1, stable=True)[:, :room].astype(jnp.int32)
    asked = swap(wanted).ravel()
    fetched = jax.tree.map(lambda w: swap(w[asked]), weights)

    fetch = jnp.arange(p * room, dtype=jnp.int32)
    experts = wanted + local * jnp.arange(p, dtype=jnp.int32)[:, None]
    slot = jnp.full(p * local, p * room, jnp.int32).at[experts.ravel()].set(fetch)
    experts = jnp.where(routing.valid, slot[routing.indices], p * room)
    here = _routing(experts, routing.weights, p * room)
    return mlp(x, here, fetched), _count(routing.valid & ~here.valid)


_EXCHANGES: dict[str, Callable[..., Any]] = {
    "all_to_all": functools.partial(_to_experts, _exchange.padded),
    "ragged_all_to_all": functools.partial(_to_experts, ragged),
    "gather_tokens": _gather_tokens,
    "gather_experts": _gather_experts,
}


def _by_expert(run, x, routing, weights):
    """Choices listed by expert are rows with one choice each, summed by token."""
    tokens, experts, gates = routing.choices()
    single = _routing(experts[:, None], gates[:, None], routing.num_experts)
    rows, dropped = run(x[tokens], single, weights)
    wide = _exchange.accumulator(rows.dtype)
    y = jnp.zeros(x.shape, wide).at[tokens].add(rows.astype(wide))
    return y.astype(rows.dtype), dropped


def _routing(experts, weights, e):
    """Choices among e experts; one that is out of range is not valid."""
    valid = (0 <= experts) & (experts < e)
    return Routing(
        indices=jnp.where(valid, experts, 0),
        weights=jnp.where(valid, weights, 0),
        valid=valid,
        probs=jnp.zeros((experts.shape[0], e), jnp.float32),
    )


def _count(flags):
    return jnp.sum(flags, dtype=jnp.int32)


# --- Checks ---------------------------------------------------------------------------


def _axis_size(axis_name):
    try:
        return jax.lax.axis_size(axis_name)
    except NameError as error:
        raise ValueError(
            f"axis_name: got {axis_name!r}, needed an axis of the jax.shard_map around "
            "the call"
        ) from error


def _check(x, routing, weights, p):
    check_floating(x=x, **weights)
    if x.ndim != 2 or x.shape[0] != routing.num_tokens:
        raise ValueError(
            f"x: got shape {x.shape}, needed [{routing.num_tokens}, d]: the tokens of "
            "the routing"
        )
    e = routing.num_experts
    for name, w in weights.items():
        if w.ndim != 3 or w.shape[0] * p != e:
            raise ValueError(
                f"{name}: got shape {w.shape} on each of {p} devices, needed "
                f"[{e} / {p}, ..., ...]: the routing has {e} experts"
                + (f", which {p} devices cannot share equally" if e % p else "")
            )


def _room(routing, p, exchange, capacity_factor, max_experts):
    """Rows of a buffer, or experts fetched of each peer."""
    if exchange not in _EXCHANGES:
        known = ", ".join(repr(name) for name in _EXCHANGES)
        raise ValueError(f"exchange: got {exchange!r}, needed one of {known}")
    buffered = exchange.endswith("all_to_all")
    if capacity_factor is not None and not (buffered and capacity_factor > 0):
        raise ValueError(
            f"capacity_factor: got {capacity_factor} with exchange={exchange!r}, "
            "needed a positive number for an all-to-all, None for the others"
        )
    local = routing.num_experts // p
    if max_experts is not None and not (
        exchange == "gather_experts" and 1 <= max_experts <= local
    ):
        raise ValueError(
            f"max_experts: got {max_experts} with exchange={exchange!r}, needed 1 to "
            f"{local} for 'gather_experts', None for the others"
        )
    if exchange == "gather_experts":
        return local if max_experts is None else max_experts
    # A token goes to an expert at most once; an expert has a list of its own.
    lists, length = routing.indices.shape
    worst = local * length if routing.by_expert else lists * min(length, local)
    balanced, senders = lists * length / p, 1
    if exchange == "ragged_all_to_all":
        balanced, senders = lists * length, p
    if capacity_factor is None:
        return senders * worst
    return min(senders * worst, math.ceil(capacity_factor * balanced))
