"""native_sparse_attention: compressed, selected and sliding attention, gated."""

import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from sparsejax import attention as at
from sparsejax._dispatch import Choice
from sparsejax.ops._attention_arguments import check_heads
from sparsejax.ops._block_sparse_attention import block_sparse_attention


def native_sparse_attention(
    query: Shaped[Array, "..."],
    key: Shaped[Array, "..."],
    value: Shaped[Array, "..."],
    gates: Shaped[Array, "..."],
    *,
    key_mlp: at.NsaCompression | None = None,
    value_mlp: at.NsaCompression | None = None,
    block_shape: tuple[int, int] = (64, 64),
    budget: int | float | at.Tokens = 16,
    length: int = 32,
    stride: int = 16,
    initial: int = 1,
    local: int = 2,
    window: int = 512,
    offset: int | Int[Array, ""] = 0,
    scale: float | None = None,
    implementation: Choice = None,
) -> Shaped[Array, "..."]:
    r"""Three attentions of the past, coarse, chosen and near, weighed by gates.

    .. math::
      o_i = \sum_{r} g_i^r\, \mathrm{attention}(q_i, K^r_i, V^r_i), \qquad
      r \in \{\mathrm{compressed}, \mathrm{selected}, \mathrm{sliding}\}

    The compressed keys and values are one of every ``length``, each of which a query
    sees when it is past; the selected are the blocks of `attention.nsa`; the sliding
    are the last ``window``. Each has a softmax of its own. Costs about (s / stride +
    budget block_k + window) products per query, where the queries of a block agree in
    their choice; more where they do not.

    Args:
      query: ``[b, t, h, d]``, floating.
      key: ``[b, s, h_kv, d]``; a group of h // h_kv query heads shares one choice.
      value: ``[b, s, h_kv, dv]``.
      gates: ``[b, t, h, 3]``, of the compressed, selected and sliding branch, after
        their sigmoid.
      key_mlp: Makes compressed keys, `attention.nsa_compress`; None: their mean.
      value_mlp: Makes compressed values; None: their mean.
      block_shape: (block_q, block_k); block_k is a multiple of ``stride``.
      budget: Blocks selected per query, as `attention.nsa` has it.
      length: Keys per compressed key, a multiple of ``stride``.
      stride: Keys from one compressed key to the next.
      initial: How many of the first blocks are always selected.
      local: How many blocks up to the query's own are.
      window: Keys in the sliding branch, the query's own among them.
      offset: Position of the first query among the keys; may be traced.
      scale: Of the logits; None: ``1 / sqrt(d)``.
      implementation: As `block_sparse_attention` has it.

    Returns:
      ``[b, t, h, dv]`` of the query's dtype. The choice of blocks has no gradient; the
      compressions have theirs through their own branch.

    Raises:
      ValueError: Shapes or dtypes do not fit, a budget cannot be met.
      NotImplementedError: The named implementation does not serve this.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (1, 16, 2, 8))
      >>> gates = jnp.full((1, 16, 2, 3), 0.5)
      >>> attend = jax.jit(lambda x, gates: sparsejax.ops.native_sparse_attention(
      ...     x, x, x, gates, block_shape=(4, 4), budget=3, length=4, stride=2,
      ...     window=4))
      >>> jax.eval_shape(attend, x, gates).shape
      (1, 16, 2, 8)

    References:
      Yuan et al., `Native Sparse Attention: Hardware-Aligned and Natively Trainable
      Sparse Attention <https://arxiv.org/abs/2502.11089>`_, 2025.
    """
    check_heads(query, key, value)
    if gates.shape != (*query.shape[:3], 3):
        raise ValueError(
            f"gates: got shape {gates.shape}, needed {(*query.shape[:3], 3)}"
        )
    t, s = query.shape[1], key.shape[1]
    small_key = at.nsa_compress(key, key_mlp, length=length, stride=stride)
    small_value = at.nsa_compress(value, value_mlp, length=length, stride=stride)
    selected, _ = at.nsa(
        query,
        key,
        small_key,
        block_shape=block_shape,
        budget=budget,
        length=length,
        stride=stride,
        initial=initial,
        local=local,
        offset=offset,
        scale=scale,
    )
    recent = (at.causal() & at.sliding_window(window)).shift(queries=offset)
    sliding = at.block_mask(recent, t, s, block_shape=block_shape)

    def attend(gate, key, value, mask):
        out = block_sparse_attention(
            query, key, value, mask, scale=scale, implementation=implementation
        )
        return gates[..., gate, None].astype(out.dtype) * out

    out = attend(1, key, value, selected) + attend(2, key, value, sliding)
    nc = small_key.shape[1]
    if not nc:
        return out
    # A compressed key is past when the last of its keys is.
    position = jnp.arange(t, dtype=jnp.int32) + offset
    last = jnp.arange(nc, dtype=jnp.int32) * stride + (length - 1)
    past = at.in_order(position[None, None], last[None, None])
    mask = at.block_mask(past, t, nc, block_shape=block_shape)
    return out + attend(0, small_key, small_value, mask)
