"""The decoder-only transformer of ``pretrain_lm.py``: bytes in, logits out.

Pre-norm, rotary positions, squared ReLU. Of the weights only the feed-forward ones are
ever sparse or structured; attention's are the same whichever positions it looks at.
Shapes: B sequences, T bytes, d features, H heads, E experts.
"""

import functools
from typing import Any

import _data
import jax
import jax.numpy as jnp
import numpy as np
from _attention import Attend
from flax import nnx

import sparsejax.nnx
import sparsejax.routing


def rotate(x: jax.Array) -> jax.Array:
    """Rotary positions: turns each pair of features by an angle that grows with t."""
    t, half = x.shape[1], x.shape[-1] // 2
    angle = np.arange(t)[:, None] * 10_000 ** (-np.arange(half) / half)  # (T, half)
    cos, sin = (jnp.asarray(f(angle)[:, None], x.dtype) for f in (np.cos, np.sin))
    a, b = x[..., :half], x[..., half:]  # (B, T, H, half)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


class RMSNorm(nnx.Module):
    """Divides by the root of the mean square, in float32."""

    def __init__(self, d: int):
        self.scale = nnx.Param(jnp.ones(d))

    def __call__(self, x):
        """(..., d) -> (..., d)."""
        x32 = x.astype(jnp.float32)
        mean = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        return (x32 * jax.lax.rsqrt(mean + 1e-6) * self.scale).astype(x.dtype)


class Attention(nnx.Module):
    """Causal self-attention with rotary positions, dense unless told how to attend."""

    def __init__(self, config: Any, attend: Attend | None, *, rngs: nnx.Rngs):
        d, dtype = config.width, jnp.dtype(config.dtype)
        linear = lambda n: nnx.Linear(d, n, use_bias=False, dtype=dtype, rngs=rngs)
        self.heads, self.attend = config.heads, attend
        self.qkv, self.out = linear(3 * d), linear(d)

    def __call__(self, x):
        """(B, T, d) -> (B, T, d), and what ``attend`` tells or None."""
        b, t, d = x.shape
        qkv = self.qkv(x).reshape(b, t, 3, self.heads, d // self.heads)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]  # (B, T, H, d / H)
        q, k = rotate(q), rotate(k)
        if self.attend is not None:
            y, stats = self.attend(q, k, v)
            return self.out(y.reshape(b, t, d)), stats
        logits = jnp.einsum("bthd,bshd->bhts", q, k)
        logits = logits.astype(jnp.float32) * (d // self.heads) ** -0.5
        logits = jnp.where(np.tri(t, dtype=bool), logits, -jnp.inf)
        weights = jax.nn.softmax(logits).astype(x.dtype)  # (B, H, T, T)
        y = jnp.einsum("bhts,bshd->bthd", weights, v)
        return self.out(y.reshape(b, t, d)), None


def squared_relu(x: jax.Array) -> jax.Array:
    """Zero below zero, the square above."""
    return jnp.square(jax.nn.relu(x))


class Mlp(nnx.Module):
    """Feed-forward layer with squared ReLU: where the sparsity is."""

    def __init__(self, config: Any, implementation: str | None, *, rngs: nnx.Rngs):
        d, f, dtype = config.width, config.ffn_width, jnp.dtype(config.dtype)
        how: dict[str, Any] = dict(use_bias=False, dtype=dtype, rngs=rngs)
        ours = dict(implementation=implementation)
        if config.ffn in ("block_sparse", "pixelfly"):
            ours["block_shape"] = config.block, config.block
        if config.ffn == "block_sparse":
            kind, how = sparsejax.nnx.BlockSparseLinear, how | ours
            how["sparsity"] = config.sparsity
        elif config.ffn == "monarch":
            kind, how = sparsejax.nnx.MonarchLinear, how | ours
            how["blocks"] = config.monarch_blocks
        elif config.ffn == "pixelfly":
            kind, how = sparsejax.nnx.PixelflyLinear, how | ours
            # Blocks on the diagonal and beside it: two to a row of them.
            how |= dict(size=2, rank=config.rank)
        elif config.ffn == "low_rank":
            kind, how = sparsejax.nnx.LowRankLinear, how | dict(rank=config.rank)
        else:  # a masked layer is a dense one whose optimizer keeps zeros
            kind = nnx.Linear
        linear = functools.partial(kind, **how)
        self.up, self.down = linear(d, f), linear(f, d)

    def __call__(self, x):
        """(B, T, d) -> (B, T, d), by (B, T, ffn_width)."""
        return self.down(squared_relu(self.up(x))), None


class MoeMlp(nnx.Module):
    """The same, of which each token takes ``experts_per_token`` of many."""

    def __init__(
        self,
        config: Any,
        implementation: str | None,
        *,
        balance: bool = False,  # by a bias, nnx.Balance
        capacity: int | None = None,  # choices that an expert serves; None: all
        rngs: nnx.Rngs,
    ):
        self.moe = sparsejax.nnx.MoE(
            config.width,
            config.expert_width or config.ffn_width,
            num_experts=config.experts,
            # Weights sum to 1. Dividing by the sum itself would take most of the
            # gradient from the router while experts are alike.
            router=functools.partial(
                sparsejax.routing.top_k,
                k=config.experts_per_token,
                normalize="sum_stopgrad",
                capacity=capacity,
            ),
            activation=squared_relu,
            balance=balance,
            dtype=jnp.dtype(config.dtype),
            implementation=implementation,
            rngs=rngs,
        )

    def __call__(self, x):
        """(B, T, d) -> (B, T, d), and what the experts were."""
        return self.moe(x)


class Block(nnx.Module):
    """Pre-norm attention, then pre-norm feed-forward."""

    def __init__(
        self,
        config: Any,
        implementation: str | None,
        *,
        attend: Attend | None = None,
        rngs: nnx.Rngs,
        **moe: Any,
    ):
        d = config.width
        self.norm1 = RMSNorm(d)
        self.attention = Attention(config, attend, rngs=rngs)
        self.norm2 = RMSNorm(d)
        kind = MoeMlp if config.ffn == "moe" else Mlp
        self.mlp = kind(config, implementation, rngs=rngs, **moe)

    def __call__(self, x):
        """(B, T, d) -> (B, T, d), and what experts and attention tell, or None."""
        y, stats = self.attention(self.norm1(x))
        x = x + y
        y, experts = self.mlp(self.norm2(x))
        return x + y, (experts, stats)


class Transformer(nnx.Module):
    """Bytes in, logits over the next byte out; ``more`` is what Block takes besides."""

    def __init__(
        self, config: Any, implementation: str | None, *, rngs: nnx.Rngs, **more: Any
    ):
        d, dtype = config.width, jnp.dtype(config.dtype)
        self.remat = config.remat
        self.embed = nnx.Embed(_data.VOCABULARY, d, dtype=dtype, rngs=rngs)
        make_block = lambda rngs: Block(config, implementation, rngs=rngs, **more)
        if config.scan:  # one block whose variables have a leading axis of layers
            self.blocks = nnx.vmap(make_block)(rngs.split(config.layers))
        else:
            self.blocks = nnx.List(make_block(rngs) for _ in range(config.layers))
        self.norm = RMSNorm(d)
        self.head = nnx.Linear(
            d, _data.VOCABULARY, use_bias=False, dtype=dtype, rngs=rngs
        )

    def __call__(self, tokens):
        """Integers (B, T) -> float32 (B, T, 256), and what the layers' blocks tell."""
        x = self.embed(tokens)  # (B, T, d)
        apply = lambda graphdef, state, x: nnx.merge(graphdef, state)(x)
        if self.remat:  # keep one (B, T, d) per block for the backward pass
            apply = jax.checkpoint(apply, static_argnums=0)
        if isinstance(self.blocks, Block):
            graphdef, state = nnx.split(self.blocks)
            layer = lambda x, state: apply(graphdef, state, x)
            x, told = jax.lax.scan(layer, x, state)
        else:
            told = []
            for block in self.blocks:
                x, of_block = apply(*nnx.split(block), x)
                told.append(of_block)
            told = jax.tree.map(lambda *layers: jnp.stack(layers), *told)
        logits = self.head(self.norm(x)).astype(jnp.float32)  # (B, T, 256)
        return logits, *told
