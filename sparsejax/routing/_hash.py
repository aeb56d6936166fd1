"""hash_routing: experts by what a token is, not by what it looks like."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Shaped

from sparsejax.routing._choices import (
    check_count,
    check_mask,
    check_scores,
    only_tokens,
    score_all,
    weigh,
)
from sparsejax.routing._routing import Routing


def hash_routing(
    ids: Shaped[Array, "..."],
    num_experts: int,
    *,
    k: int = 1,
    table: Shaped[Array, "..."] | None = None,
    logits: Shaped[Array, "..."] | None = None,
    normalize: str = "sum",
    mask: Shaped[Array, "..."] | None = None,
) -> Routing:
    """The experts of a token are a fixed function of its id; nothing is learned.

    Ids may be of the vocabulary, as in hash layers; of modalities, so that text and
    images have experts of their own; of tasks or languages: one id for every token of a
    sequence. Without a table the i-th expert of an id is ``(id + i) % e``; with one,
    ``table[id, i]``. Each has the weight 1 / k, or, where logits are given, that of a
    router whose choices alone are fixed. Costs a look-up.

    Args:
      ids: Integers ``[t]``.
      num_experts: e.
      k: Experts per token without a table, k <= e.
      table: Experts of each id, integers ``[v]`` or ``[v, k]`` in [0, e), as
        ``balanced_table`` makes one. An expert named twice counts twice.
      logits: Router logits ``[t, e]`` that weigh the choices by their softmax.
      normalize: With logits only. "none": weights are the probabilities. "sum": divided
        by their sum over the choices; "sum_stopgrad": the same, without a gradient
        through that sum.
      mask: True for tokens, False for padding, bool ``[t]``.

    Returns:
      A ``Routing`` with k places per token. ``probs`` are the weights, spread over all
      experts, or softmax(logits). A traced id that is not in the table, or expert that
      is not in [0, e), makes no valid choice.

    Raises:
      ValueError: Shapes or dtypes do not fit; k is not an int from 1 to e, or was given
        beside a table of another width; a concrete id or entry is out of range.

    Example:
      >>> modality = jnp.array([0, 0, 1])  # text, text, image
      >>> table = jnp.array([[0, 1], [2, 3]])
      >>> routing = sparsejax.routing.hash_routing(modality, 4, table=table)
      >>> print(routing.indices.tolist(), routing.counts())
      [[0, 1], [0, 1], [2, 3]] [2 2 1 1]

    References:
      Roller et al., `Hash Layers For Large Sparse Models
      <https://arxiv.org/abs/2106.04426>`_, 2021.
    """
    if ids.ndim != 1 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"ids: got {ids.dtype} {ids.shape}, needed integers [t]")
    check_mask(mask, ids.shape[0])
    ids = ids.astype(jnp.int32)
    num_experts = check_count("num_experts", num_experts)
    if table is None:
        k = check_count("k", k, num_experts, "experts")
        offsets = jnp.arange(k, dtype=jnp.int32)
        indices = (ids[:, None] % num_experts + offsets) % num_experts
        valid = jnp.ones(indices.shape, bool)
    else:
        indices, valid = _look_up(ids, _check_table(table, num_experts, k), mask)
        valid = valid & (indices >= 0) & (indices < num_experts)
        indices = jnp.clip(indices, 0, num_experts - 1)
    valid = only_tokens(valid, mask)

    if logits is None:
        weights = jnp.where(valid, jnp.float32(1 / indices.shape[1]), 0)
        tokens = jax.lax.broadcasted_iota(jnp.int32, indices.shape, 0)
        probs = jnp.zeros((ids.shape[0], num_experts), jnp.float32)
        probs = probs.at[tokens, indices].add(weights)
    else:
        logits = check_scores(logits, mask)
        if logits.shape != (ids.shape[0], num_experts):
            needed = (ids.shape[0], num_experts)
            raise ValueError(f"logits: got shape {logits.shape}, needed {needed}")
        scores, log_scores, probs = score_all(logits, "softmax")
        weights = weigh(scores, log_scores, indices, valid, normalize)
        probs = only_tokens(probs, mask)
    return Routing(
        indices=indices, weights=weights, valid=valid, probs=probs, mask=mask
    )


def balanced_table(
    counts: Shaped[Array, "..."], num_experts: int, *, k: int = 1
) -> Int[Array, "v k"]:
    """A table for ``hash_routing`` that gives every expert about the same load.

    Ids from the most frequent on go to the k experts that have the least load so far,
    which then grows by the id's count. Experts differ in load by the largest count at
    most. Costs v top-k's of e, in a loop.

    Args:
      counts: How often each id occurs, ``[v]``, not negative; any real dtype.
      num_experts: e.
      k: Experts per id, k <= e.

    Returns:
      Experts of each id, int32 ``[v, k]``, distinct in a row.

    Raises:
      ValueError: Shapes do not fit; k is not an int from 1 to e; a concrete count is
        negative or not finite, or their sum exceeds int32.

    Example:
      >>> print(sparsejax.routing.balanced_table(jnp.array([4, 1, 3]), 2).ravel())
      [0 1 1]

    References:
      Roller et al., `Hash Layers For Large Sparse Models
      <https://arxiv.org/abs/2106.04426>`_, 2021, section 3.1, balanced assignment.
    """
    if counts.ndim != 1 or jnp.issubdtype(counts.dtype, jnp.complexfloating):
        raise ValueError(
            f"counts: got {counts.dtype} {counts.shape}, needed real numbers [v]"
        )
    if not isinstance(counts, jax.core.Tracer):
        given = np.asarray(counts, np.float64)
        if not (np.isfinite(given) & (given >= 0)).all():
            raise ValueError("counts: got some below 0 or not finite, needed counts")
        if given.sum() > np.iinfo(np.int32).max:
            raise ValueError(
                f"counts: got a sum of {given.sum():.4g}, needed one in int32: divide"
            )
    num_experts = check_count("num_experts", num_experts)
    k = check_count("k", k, num_experts, "experts")
    # In float32 a load of 10^8 would no longer notice a count of 1.
    wide = jnp.int32 if jnp.issubdtype(counts.dtype, jnp.integer) else jnp.float32
    counts = counts.astype(wide)

    def assign(load, each):
        _, experts = jax.lax.top_k(-load, k)
        return load.at[experts].add(counts[each]), experts

    falling = jnp.argsort(-counts)  # stable: ties by lowest id
    _, experts = jax.lax.scan(assign, jnp.zeros(num_experts, wide), falling)
    return jnp.zeros((counts.shape[0], k), jnp.int32).at[falling].set(experts)


def _check_table(table: Array, num_experts: int, k: int) -> Int[Array, "v k"]:
    """The table as int32 [v, k]."""
    if table.ndim not in (1, 2) or not jnp.issubdtype(table.dtype, jnp.integer):
        raise ValueError(
            f"table: got {table.dtype} {table.shape}, needed integers [v] or [v, k]"
        )
    table = table.reshape(table.shape[0], -1)
    if 0 in table.shape:
        raise ValueError(f"table: got shape {table.shape}, needed entries")
    if k not in (1, table.shape[1]):
        raise ValueError(f"k: got {k} beside a table of {table.shape[1]} per id")
    if not isinstance(table, jax.core.Tracer):
        given = np.asarray(table)
        if given.min() < 0 or given.max() >= num_experts:
            raise ValueError(
                f"table: got experts from {given.min()} to {given.max()}, needed them "
                f"in [0, {num_experts})"
            )
    return table.astype(jnp.int32)


def _look_up(
    ids: Array, table: Array, mask: Array | None
) -> tuple[Int[Array, "t k"], Bool[Array, "t k"]]:
    """Rows of the table, and whether there is such a row."""
    size = table.shape[0]
    if not isinstance(ids, jax.core.Tracer) and not isinstance(mask, jax.core.Tracer):
        given = np.asarray(ids) if mask is None else np.asarray(ids)[np.asarray(mask)]
        if given.size and (given.min() < 0 or given.max() >= size):
            raise ValueError(
                f"ids: got {given.min()} to {given.max()}, needed them in [0, {size})"
            )
    there = (ids >= 0) & (ids < size)
    rows = table[jnp.where(there, ids, 0)]
    return rows, jnp.broadcast_to(there[:, None], rows.shape)
