"""Numpy statements that the selectors are held against."""

import jax
import jax.numpy as jnp
import numpy as np


def run(select, *arrays, **options):
    """A selector, compiled as a whole."""
    return jax.jit(lambda *xs: select(*xs, **options))(*arrays)


def lists(select, *arrays, **options):
    """Its mask alone: without statistics it compiles in half the time."""
    return jax.jit(lambda *xs: select(*xs, **options)[0])(*arrays)


def heads(seed, b=2, t=21, s=21, h=4, g=2, d=8):
    """Query [b, t, h, d] and key [b, s, g, d], float32."""
    rng = np.random.default_rng(seed)
    make = lambda n, m: jnp.float32(rng.standard_normal((b, n, m, d)))
    return make(t, h), make(s, g)


def logits(query, key, scale=None):
    """[b, h, t, s] in float64."""
    q, k = (np.moveaxis(np.asarray(x, np.float64), 1, 2) for x in (query, key))
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    return q @ k.swapaxes(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)


def softmax(x):
    top = x.max(axis=-1, keepdims=True)
    e = np.exp(x - np.where(np.isfinite(top), top, 0))
    total = e.sum(axis=-1, keepdims=True)
    return e / np.where(total > 0, total, 1)


def probabilities(query, key, dense, scale=None):
    """Dense attention's, under the boolean mask ``dense``."""
    return softmax(np.where(dense, logits(query, key, scale), -np.inf))


def recall(query, key, dense, mask, scale=None):
    """[b, h]: the mass of dense attention on the mask; 1 where dense has no key."""
    probs = probabilities(query, key, dense, scale)
    share = np.where(np.broadcast_to(mask, probs.shape), probs, 0).sum(-1)
    return np.where(np.broadcast_to(dense, probs.shape).any(-1), share, 1).mean(-1)


def pool(x, size, how=np.mean):
    """[b, h, n, d] of x [b, t, h, d], block after block."""
    parts = [
        how(np.asarray(x, np.float64)[:, a : a + size], 1)
        for a in range(0, x.shape[1], size)
    ]
    return np.stack(parts, axis=2)


def repeat(x, h):
    return np.repeat(x, h // x.shape[1], axis=1)


def spread(blocks, t, s, block_shape):
    """Blocks [.., nq, nk] to elements."""
    i, j = np.arange(t) // block_shape[0], np.arange(s) // block_shape[1]
    return blocks[..., i[:, None], j[None]]


def best(scores, count):
    """Indices of the largest, ties to the lowest index."""
    return np.argsort(-scores, kind="stable")[:count]


def own(i, t, block_shape, offset=0):
    """Key blocks at the positions of query block i."""
    bq, bk = block_shape
    first, last = i * bq + offset, min((i + 1) * bq, t) - 1 + offset
    return list(range(first // bk, last // bk + 1))
