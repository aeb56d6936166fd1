"""merge_attention: one softmax out of partial ones."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

from sparsejax.ops._checks import accumulator, check_floating


def merge_attention(
    outs: Sequence[Shaped[Array, "..."]], lses: Sequence[Shaped[Array, "..."]]
) -> tuple[Float[Array, "*rows d"], Float[Array, "*rows"]]:
    """Merges attentions of the same queries over disjoint sets of keys.

    ``lse = log(sum of exp(lses))`` and ``out = sum of exp(lses - lse) outs``, which is
    attention over the union of the keys. Linear in the size of ``outs``.

    Args:
      outs: Results ``[..., d]``, of equal shapes and dtypes.
      lses: Logarithms of their softmax's sums ``[...]``, float32; -inf where a query
        had no key, whose result takes no part.

    Returns:
      out ``[..., d]`` and lse ``[...]``; 0 and -inf where no part had a key.

    Raises:
      ValueError: There is no part; numbers, shapes or dtypes do not fit.

    Example:
      >>> out, lse = sparsejax.ops.merge_attention(
      ...     [jnp.array([[1.0]]), jnp.array([[4.0]])],
      ...     [jnp.log(jnp.array([2.0])), jnp.log(jnp.array([1.0]))])
      >>> print(out, jnp.exp(lse))
      [[2.]] [3.]

    References:
      Milakov, Gimelshein, `Online normalizer calculation for softmax
      <https://arxiv.org/abs/1805.02867>`_, 2018.

    Note:
      Differentiable in both modes, to any order.
    """
    outs, lses = list(outs), list(lses)
    if not outs or len(outs) != len(lses):
        raise ValueError(
            f"outs, lses: got {len(outs)} and {len(lses)} arrays, needed as many of "
            "both, one at least"
        )
    for name, arrays in (("outs", outs), ("lses", lses)):
        check_floating(**{f"{name}[{i}]": a for i, a in enumerate(arrays)})
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        if (out.shape, out.dtype) != (outs[0].shape, outs[0].dtype):
            raise ValueError(
                f"outs[{i}]: got {out.dtype} {out.shape}, needed {outs[0].dtype} "
                f"{outs[0].shape}, as outs[0]"
            )
        if lse.shape != out.shape[:-1]:
            raise ValueError(
                f"lses[{i}]: got shape {lse.shape}, needed {out.shape[:-1]}"
            )
    wide = accumulator(outs[0].dtype)
    lse = jnp.stack([lse.astype(wide) for lse in lses])
    # Not -inf - -inf, nor the derivative of log at 0, where no part has a key.
    some = (lse > -jnp.inf).any(0)
    lse = jnp.where(some, lse, 0)
    top = lax.stop_gradient(lse.max(0))
    weights = jnp.exp(lse - top)
    total = weights.sum(0)
    merged = (weights[..., None] * jnp.stack(outs).astype(wide)).sum(0)
    out = jnp.where(some[..., None], merged / total[..., None], 0)
    lse = jnp.where(some, top + jnp.log(total), -jnp.inf)
    return out.astype(outs[0].dtype), lse
