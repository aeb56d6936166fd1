"""Native Sparse Attention: compressed keys name the blocks that a query reads whole."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from sparsejax.attention._block_mask import BlockMask
from sparsejax.attention._budget import (
    Budget,
    block_count,
    check_count,
    check_counts,
)
from sparsejax.attention._expressions import Expression
from sparsejax.attention._heads import pair_heads
from sparsejax.attention._per_token import best_per_query, mask_of_choices
from sparsejax.attention._selection import Offset, prepare
from sparsejax.attention._softmax import softmax_over
from sparsejax.attention._stats import BlockStats


class NsaCompression(NamedTuple):
    """Parameters that make one key (or value) of a block: `nsa_compress`.

    Attributes:
      position: ``[length, d]``, added to the rows of a block by their place in it.
      w_in: ``[length * d, hidden]``.
      w_out: ``[hidden, d]``.
    """

    position: Float[Array, "..."]
    w_in: Float[Array, "..."]
    w_out: Float[Array, "..."]


def nsa_compress_init(
    key: Array, *, head_dim: int, length: int = 32, hidden: int | None = None
) -> NsaCompression:
    """Parameters of a compression, of variance 1 / fan-in.

    Args:
      key: A PRNG key.
      head_dim: Size of a head.
      length: Rows per compressed row.
      hidden: Width between; None: twice ``head_dim``.

    Returns:
      An ``NsaCompression`` of float32 arrays.

    Raises:
      ValueError: A size is below 1.

    Example:
      >>> mlp = sparsejax.attention.nsa_compress_init(
      ...     jax.random.key(0), head_dim=4, length=8)
      >>> mlp.w_in.shape, mlp.w_out.shape
      ((32, 8), (8, 4))
    """
    hidden = 2 * head_dim if hidden is None else hidden
    check_counts(head_dim=head_dim, length=length, hidden=hidden)
    one, two, three = jax.random.split(key, 3)
    fan_in = length * head_dim
    return NsaCompression(
        jax.random.normal(one, (length, head_dim)) * 0.02,
        jax.random.normal(two, (fan_in, hidden)) * fan_in**-0.5,
        jax.random.normal(three, (hidden, head_dim)) * hidden**-0.5,
    )


def nsa_compress(
    x: Shaped[Array, "..."],
    mlp: NsaCompression | None = None,
    *,
    length: int = 32,
    stride: int = 16,
) -> Float[Array, "b nc g d"]:
    r"""One row for every ``length`` rows, each ``stride`` after the last.

    .. math::
      \tilde x_c = \varphi(x_{c \sigma}, \ldots, x_{c \sigma + l - 1})

    with the mean as :math:`\varphi`, or :math:`W_2\, \mathrm{gelu}(W_1\, \mathrm{vec}(x
    + e))`. Rows that do not fill a block are left out.

    Args:
      x: Keys or values ``[b, s, g, d]``.
      mlp: Parameters, shared by the heads; None: the mean.
      length: l, a multiple of ``stride``.
      stride: Sigma.

    Returns:
      ``[b, (s - length) // stride + 1, g, d]`` (none where s is below ``length``), in
      the dtype of ``x``, computed in float32.

    Raises:
      ValueError: Shapes do not fit, or ``stride`` does not divide ``length``.

    Example:
      >>> x = jnp.arange(6.0).reshape(1, 6, 1, 1)
      >>> print(sparsejax.attention.nsa_compress(x, length=4, stride=2).ravel())
      [1.5 3.5]

    References:
      Yuan et al., `Native Sparse Attention <https://arxiv.org/abs/2502.11089>`_, 2025.
    """
    _check_strides(length, stride)
    if x.ndim != 4:
        raise ValueError(f"x: got shape {x.shape}, needed [b, s, g, d]")
    b, s, g, d = x.shape
    nc = max(0, (s - length) // stride + 1)
    rows = jnp.arange(nc)[:, None] * stride + jnp.arange(length)
    blocks = x.astype(jnp.float32)[:, rows]  # [b, nc, length, g, d]
    if mlp is None:
        return blocks.mean(axis=2).astype(x.dtype)
    if mlp.position.shape != (length, d):
        raise ValueError(
            f"mlp: got positions {mlp.position.shape}, needed {(length, d)}"
        )
    wide = lambda w: w.astype(jnp.float32)
    blocks = jnp.moveaxis(blocks + wide(mlp.position)[:, None], 3, 2)
    inner = jax.nn.gelu(blocks.reshape(b, nc, g, length * d) @ wide(mlp.w_in))
    return (inner @ wide(mlp.w_out)).astype(x.dtype)


def nsa(
    query: Shaped[Array, "..."],
    key: Shaped[Array, "..."],
    compressed: Shaped[Array, "..."] | None = None,
    *,
    block_shape: tuple[int, int] = (64, 64),
    budget: Budget = 16,
    length: int = 32,
    stride: int = 16,
    initial: int = 1,
    local: int = 2,
    expr: Expression | None = None,
    offset: Offset = 0,
    scale: float | None = None,
    capacity: int | None = None,
) -> tuple[BlockMask, BlockStats]:
    r"""Each query reads the blocks that attention to compressed keys weighs most.

    .. math::
      p_i = \mathrm{softmax}_{c:\, c \sigma + l \le i + 1}
        (\mathrm{scale}\, q_i^\top \tilde k_c), \qquad
      u_i(x) = \sum_{n=0}^{l / \sigma - 1} p_i(x - n), \qquad
      s_{iJ} = \sum_{\mathrm{heads}} \sum_{m=0}^{b / \sigma - 1} u_i(J b / \sigma + m)

    The selected branch of the three: a block's score is the attention to the compressed
    keys that overlap it, by how many strides they do, summed over the query heads of a
    group, which share one choice. The first blocks and the last ones up to the query's
    own are always chosen. Where length, stride and block are the same, s is p itself.
    Exact for every query, as `moba` is: lists hold the union over a query block.
    Costs t nc d products, a panel of block_q queries at a time.

    Args:
      query: ``[b, t, h, d]``, floating; scored in float32.
      key: ``[b, s, h_kv, d]``.
      compressed: Keys from `nsa_compress`, ``[b, nc, h_kv, d]``; None: the means.
      block_shape: (block_q, block_k); b of the equation is block_k, a multiple of
        ``stride``. The last of each may be short.
      budget: Blocks per query, the fixed ones among them: an int; their share of the nk
        blocks, a float in (0, 1], rounded and one at least; or ``Tokens``.
      length: Keys per compressed key, a multiple of ``stride``.
      stride: Keys from one compressed key to the next.
      initial: How many of the first blocks are always chosen.
      local: How many blocks up to the query's own are, 1 at least.
      expr: What may be attended at all; None: `causal`, from ``offset``. Blocks after
        a query's own are never chosen.
      offset: Position of the first query among the keys; may be traced.
      scale: Of the logits; None: ``d ** -0.5``.
      capacity: Slots per query block, static; None: nk.

    Returns:
      A ``BlockMask``, equal lists for the heads of a group, ties to the lowest index,
      and a ``BlockStats``: its density is that of the queries' own choices, within the
      budget, its work that of the union. No gradients: those of the compressed keys
      come from their own branch.

    Raises:
      ValueError: Shapes or dtypes do not fit; a budget of 0, a share above 1, one that
        is no count, or one below ``initial + local``; strides that do not divide.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (1, 8, 1, 4))
      >>> select = jax.jit(lambda x: sparsejax.attention.nsa(
      ...     x, x, block_shape=(1, 2), budget=2, length=2, stride=2, local=1)[0])
      >>> mask = select(x)
      >>> print(mask.kv_cnt[0, 0])  # the first block and its own
      [1 1 2 2 2 2 2 2]

    References:
      Yuan et al., `Native Sparse Attention: Hardware-Aligned and Natively Trainable
      Sparse Attention <https://arxiv.org/abs/2502.11089>`_, 2025.
    """
    query, key, expr = prepare(query, key, block_shape, budget, expr, offset, capacity)
    _check_strides(length, stride)
    check_count("initial", initial, least=0)
    check_count("local", local)
    bk, (b, _, h, d), (_, s, g, _) = block_shape[1], query.shape, key.shape
    if bk % stride:
        raise ValueError(
            f"block_shape: got block_k {bk}, needed a multiple of the stride {stride}"
        )
    nk = -(-s // bk)
    count = block_count(budget, nk, bk)
    if count < min(initial + local, nk):
        raise ValueError(
            f"budget: got {budget}, {count} blocks, needed initial + local = "
            f"{initial + local} at least"
        )
    nc = max(0, (s - length) // stride + 1)
    if compressed is None:
        compressed = nsa_compress(key, length=length, stride=stride)
    elif compressed.shape != (b, nc, g, d):
        raise ValueError(
            f"compressed: got shape {compressed.shape}, needed {(b, nc, g, d)}"
        )
    compressed = jax.lax.stop_gradient(compressed).astype(jnp.float32)
    compressed = jnp.moveaxis(compressed, 1, 2)
    scale = d**-0.5 if scale is None else scale
    end = jnp.arange(nc, dtype=jnp.int32) * stride + (length - 1)

    def scores(position, q):
        logits = pair_heads(jnp.moveaxis(q.astype(jnp.float32), 1, 2), compressed)
        done = jnp.broadcast_to(end <= position[:, None], logits.shape)
        probs = softmax_over(logits * scale, done) if nc else logits
        probs = probs.reshape(b, g, h // g, *probs.shape[2:]).sum(axis=2)
        return _overlaps(probs, nk, bk // stride, length // stride)

    choices = best_per_query(
        scores,
        query,
        nk=nk,
        block_shape=block_shape,
        count=count,
        forced=lambda own, column: (column < initial) | (column > own - local),
        offset=offset,
    )
    return mask_of_choices(
        query,
        key,
        jnp.repeat(choices, h // g, axis=1),
        expr=expr,
        block_shape=block_shape,
        capacity=capacity,
        scale=scale,
    )


def _overlaps(probs, nk, per_block, per_row):
    """Scores of nk blocks of so many strides, from compressed rows of so many."""
    strides = nk * per_block
    room = max(0, strides - probs.shape[-1])
    wide = jnp.pad(probs, [(0, 0)] * (probs.ndim - 1) + [(per_row - 1, room)])
    covered = [
        wide[..., per_row - 1 - n : per_row - 1 - n + strides] for n in range(per_row)
    ]
    covered = functools.reduce(jnp.add, covered)
    return covered.reshape(*probs.shape[:-1], nk, per_block).sum(axis=-1)


def _check_strides(length, stride):
    check_counts(length=length, stride=stride)
    if length % stride:
        raise ValueError(f"length: got {length}, needed a multiple of stride {stride}")
