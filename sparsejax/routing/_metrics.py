"""What a routing did, in a few numbers."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparsejax.routing._losses import asked, distributions, entropies
from sparsejax.routing._routing import Routing


class RoutingMetrics(NamedTuple):
    """Figures of one routing: arrays, so that they leave jit, scan and vmap.

    Attributes:
      load: Tokens that each expert serves, int32 ``[e]``.
      dropped: Share of choices that were turned away, float32 scalar like all below.
      unserved: Share of tokens that no expert serves.
      usage: Share of experts that serve at least one token.
      max_over_mean: Largest load over the mean load: 1 at balance, up to e.
      load_entropy: Entropy of the load's shares in nats: log e at balance, 0 where one
        expert serves all.
      entropy: Mean entropy of a token's scores in nats; see `entropy`.
      margin: Mean gap, in shares of a token's scores, between the last expert that
        serves it and the next best, if the n that serve it are the n best: how much a
        score must change to change the choice. Tokens served by none or by all experts
        have none.
    """

    load: Int[Array, "..."]
    dropped: Float[Array, "..."]
    unserved: Float[Array, "..."]
    usage: Float[Array, "..."]
    max_over_mean: Float[Array, "..."]
    load_entropy: Float[Array, "..."]
    entropy: Float[Array, "..."]
    margin: Float[Array, "..."]


def routing_metrics(
    routing: Routing, *, axis_name: str | tuple[str, ...] | None = None
) -> RoutingMetrics:
    """Counts what a routing did: loads, drops, certainty.

    Shares of nothing (no tokens, no choices) are 0. Costs a sort of each token's
    scores. Padding has no part in anything.

    Args:
      routing: What a router returned.
      axis_name: Mapped axes over which tokens are spread: the figures are those of all
        of them, the same on every device.

    Returns:
      A ``RoutingMetrics``, without gradients.

    Example:
      >>> from sparsejax.routing import top_k
      >>> logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.75, 0.125, 0.125]]))
      >>> metrics = routing_metrics(top_k(logits, 1, capacity=1))
      >>> print(metrics.load, metrics.dropped, metrics.max_over_mean)
      [1 0 0] 0.5 3.0
    """
    routing = jax.lax.stop_gradient(routing)
    e = routing.num_experts
    over_all = lambda x: x if axis_name is None else jax.lax.psum(x, axis_name)
    count = lambda which: over_all(which.sum(dtype=jnp.int32))
    float32 = lambda x: x.astype(jnp.float32)
    ratio = lambda part, whole: float32(part) / jnp.maximum(float32(whole), 1)

    load = over_all(routing.counts())
    served = load.sum()
    demand = over_all(asked(routing)).sum()
    shares, some = distributions(routing)
    experts_of = _experts_per_token(routing)
    mask = jnp.ones_like(some) if routing.mask is None else routing.mask
    chosen_among = some & (experts_of > 0) & (experts_of < e)
    gap = jnp.where(chosen_among, _gap_after(shares, experts_of), 0)
    return RoutingMetrics(
        load=load,
        dropped=ratio(demand - served, demand),
        unserved=ratio(count(mask & (experts_of == 0)), count(mask)),
        usage=float32(load > 0).mean(),
        max_over_mean=e * ratio(load.max(), served),
        load_entropy=entropies(ratio(load, served)),
        entropy=ratio(over_all(entropies(shares).sum()), count(some)),
        margin=ratio(over_all(gap.sum()), count(chosen_among)),
    )


def _experts_per_token(routing):
    tokens, experts, _ = routing.choices()
    served = (experts < routing.num_experts).astype(jnp.int32)
    return jnp.zeros(routing.num_tokens, jnp.int32).at[tokens].add(served)


def _gap_after(shares, n):
    """Between the n-th and the next largest of each row."""
    falling = jnp.sort(shares, axis=1, descending=True)
    following = jnp.pad(falling[:, 1:], ((0, 0), (0, 1)))
    place = jnp.maximum(n - 1, 0)[:, None]
    return jnp.take_along_axis(falling - following, place, 1)[:, 0]
