"""Ragged all-to-all: only the rows that are there travel. TPU and GPU."""

import functools

import jax
import jax.numpy as jnp
from jax.extend import core as jex_core
from jax.interpreters import mlir

from sparsejax import _dispatch
from sparsejax.ops._exchange import AxisName, Exchange, positions


def ragged(peer: jax.Array, axis_name: AxisName, room: int) -> Exchange:
    """Exchange of segments, one for each peer; ``room`` rows in all at a receiver.

    Segments arrive in the order of their senders. What is beyond the room is not sent:
    the end of the segment that crosses it, and the senders after that.
    """
    peers = jax.lax.axis_size(axis_name)
    me = jax.lax.axis_index(axis_name)
    place, counts, starts = positions(peer, peers)
    sizes = jax.lax.all_gather(counts, axis_name)  # [sender, receiver]
    ends = jnp.cumsum(sizes, axis=0)
    at = jnp.minimum(ends - sizes, room)  # of each segment in the receiver's buffer
    sent = jnp.minimum(ends, room) - at
    begin = jnp.cumsum(sizes, axis=1) - sizes  # in the sender's buffer

    c = peer.size
    travels = (peer < peers) & (place < sent[me].at[peer].get(mode="clip"))
    slot = jnp.where(travels, starts.at[peer].get(mode="clip") + place, c)
    there = (begin[me], sent[me], at[me], sent[:, me])
    back = (at[:, me], sent[:, me], begin[:, me], sent[me])

    return Exchange(
        c,
        slot,
        lambda rows, empty=0: _move((axis_name, c, room, empty), rows, there, back),
        lambda rows: _move((axis_name, room, c, 0), rows, back, there),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _move(static, rows, there, back):
    """Rows into a new buffer; static: axis name, both sizes, what the buffer starts as.

    The transpose is the way back. JAX's own would do, but makes the cotangent of the
    buffer too, by a mask that empty segments confuse.
    """
    axis_name, _, size, empty = static
    out = jnp.full((size, *rows.shape[1:]), empty, rows.dtype)
    rows, out = _dispatch.vary_alike(rows, out)
    return _collective(rows, out, *there, axis_name=axis_name)


def _move_fwd(static, rows, there, back):
    return _move(static, rows, there, back), (there, back)


def _move_bwd(static, residuals, dout):
    axis_name, before, after, _ = static
    there, back = residuals
    return _move((axis_name, after, before, 0), dout, back, there), None, None


_move.defvjp(_move_fwd, _move_bwd)


def _collective(rows, out, *offsets_and_sizes, axis_name):
    return jax.lax.ragged_all_to_all(
        _not_on_cpu_p.bind(rows), out, *offsets_and_sizes, axis_name=axis_name
    )


# --- A clear refusal, where the program is lowered for a CPU --------------------------

_not_on_cpu_p = jex_core.Primitive("sparsejax_not_on_cpu")
_not_on_cpu_p.def_abstract_eval(lambda rows: rows)
mlir.register_lowering(_not_on_cpu_p, lambda ctx, rows: [rows])


def _refuse(ctx, rows):
    raise NotImplementedError(
        "exchange='ragged_all_to_all' needs a TPU or a GPU: XLA has no such collective "
        "for cpu; exchange='all_to_all' runs everywhere"
    )


mlir.register_lowering(_not_on_cpu_p, _refuse, platform="cpu")
