"""Rows that travel between the devices of a mesh axis, and back.

A row goes into a slot of the sender's buffer, the buffers are exchanged, and what comes
back in the same slots is added up. ``spread`` and ``collect`` are each other's
transposes, and so are an exchange's two directions: derivatives are the same steps.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sparsejax.ops._checks import accumulator

AxisName = str | tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Exchange:
    """How the choices of a device reach the devices that hold their experts.

    Attributes:
      slots: Size of the sender's buffer.
      slot: Slot of each choice, int32 ``[c]``; ``slots`` where it does not travel.
      send: From the sender's buffers to the receivers'; ``send(rows, empty)`` has
        ``empty`` in rows that nobody sent.
      back: From the receivers' buffers to the senders'.
    """

    slots: int
    slot: jax.Array
    send: Callable[..., jax.Array]
    back: Callable[[jax.Array], jax.Array]


def positions(peer: jax.Array, peers: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Place of each choice among those that go to the same peer, in storage order.

    Args:
      peer: int32 ``[c]``; ``peers`` where the choice goes nowhere.
      peers: Size of the axis.

    Returns:
      The place ``[c]``; the number of choices of each peer ``[peers]``; the place of
      the peer's first choice were all sorted by peer ``[peers]``.
    """
    order = jnp.argsort(peer, stable=True)
    numbers = jnp.arange(peer.size, dtype=jnp.int32)
    rank = jnp.zeros_like(peer).at[order].set(numbers, unique_indices=True)
    counts = jnp.zeros(peers, jnp.int32).at[peer].add(1, mode="drop")
    starts = jnp.cumsum(counts) - counts
    return rank - starts.at[peer].get(mode="clip"), counts, starts


def padded(peer: jax.Array, axis_name: AxisName, room: int) -> Exchange:
    """All-to-all of buffers with ``room`` rows for each peer; what is beyond stays."""
    peers = jax.lax.axis_size(axis_name)
    place, _, _ = positions(peer, peers)
    slots = peers * room
    slot = jnp.where((peer < peers) & (place < room), peer * room + place, slots)

    def swap(rows, empty=0):
        return jax.lax.all_to_all(rows, axis_name, 0, 0, tiled=True)

    return Exchange(slots, slot, swap, swap)


@jax.custom_vjp
def spread(x: jax.Array, source: jax.Array, places: jax.Array) -> jax.Array:
    """``rows[s] = x[source[s]]``; 0 where source is beyond x.

    Args:
      x: ``[t, d]``.
      source: int32 ``[s]``.
      places: The same from the other side, int32 ``[t, k]``: the rows that are x[t];
        beyond the rows where there is none. The derivative needs it: a sum of gathered
        rows is quick where a scattered sum is not.

    Returns:
      ``[s, d]``.
    """
    return x.at[source].get(mode="fill", fill_value=0)


@jax.custom_vjp
def collect(rows: jax.Array, source: jax.Array, places: jax.Array) -> jax.Array:
    """``x[t] = sum_j rows[places[t, j]]``, in float32; the transpose of ``spread``."""
    terms = rows.at[places].get(mode="fill", fill_value=0)
    return jnp.sum(terms, axis=1, dtype=accumulator(rows.dtype)).astype(rows.dtype)


spread.defvjp(
    lambda x, source, places: (spread(x, source, places), (source, places)),
    lambda where, rows: (collect(rows, *where), None, None),
)
collect.defvjp(
    lambda rows, source, places: (collect(rows, source, places), (source, places)),
    lambda where, x: (spread(x, *where), None, None),
)
