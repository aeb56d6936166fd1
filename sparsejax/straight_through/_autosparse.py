"""AutoSparse: learned thresholds, and an annealed gradient below them."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from sparsejax import masks
from sparsejax.straight_through._leaky import (
    Scalar,
    accumulator,
    check_floating,
    leaky_mask,
    scalar_like,
)


def autosparse(
    w: Shaped[Array, "*shape"], threshold: Shaped[Array, "..."], alpha: Scalar
) -> Float[Array, "*shape"]:
    r"""Shrinks a weight by a learned threshold; what is below it keeps a gradient.

    .. math::
      S = \mathrm{sign}(w)\, h(|w| - \sigma(T)), \qquad
      h(x) = \max(x, 0), \qquad
      h'(x) = \begin{cases} 1 & x > 0 \\ \alpha & x \le 0 \end{cases}

    in the forward pass and the backward one:

    .. math::
      \frac{\partial L}{\partial w} = h' g, \qquad
      \frac{\partial L}{\partial T} = -\sigma'(T) \sum \mathrm{sign}(w)\, h' g

    With alpha 1 pruned weights learn as if kept; with alpha 0 this is the gradient of
    the shrinkage itself, under which weights never return and sparsity runs away.
    Anneal alpha from one to the other with `schedules.cosine_sigmoid`. Costs one
    elementwise pass each way and keeps nothing but its arguments.

    Args:
      w: Weight of any shape; floating.
      threshold: T, before the sigmoid: a scalar for one threshold per layer, or what
        broadcasts to `w`: `[n]` beside `[k, n]` is one per output channel. The paper
        starts at -5. No penalty is added to the loss: weight decay on T, towards
        a threshold of one half, is what drives sparsity.
      alpha: Share of the gradient that pruned weights get; may be traced, has
        gradient zero.

    Returns:
      The weight to use, shaped and typed like `w`; computed in float32 at least. NaN
      in `w` or `threshold` comes through, so that a lost threshold is seen.

    Raises:
      ValueError: `w` or `threshold` is not floating, `threshold` does not broadcast
        to `w`, or `alpha` is no scalar.

    Example:
      >>> w, threshold = jnp.array([-2.0, 0.25, 1.0]), jnp.array(0.0)
      >>> print(autosparse(w, threshold, 0.75))
      [-1.5  0.   0.5]
      >>> print(jax.grad(lambda w: autosparse(w, threshold, 0.75).sum())(w))
      [1.   0.75 1.  ]

    References:
      Kundu et al., `AutoSparse <https://arxiv.org/abs/2304.06941>`_, 2023.
    """
    _check_threshold(w, threshold)
    return _shrink(w, threshold, scalar_like(alpha, threshold, "alpha"))


def autosparse_mask(
    w: Shaped[Array, "*shape"], threshold: Shaped[Array, "..."]
) -> Bool[Array, "*shape"]:
    r"""Where `autosparse` keeps a weight: :math:`|w| > \sigma(T)`.

    Args:
      w: Weight of any shape; floating.
      threshold: T, as `autosparse` takes it.

    Returns:
      A boolean array shaped like `w`, for `masks.density` and for what is done with
      masks after training. NaN is not kept.

    Raises:
      ValueError: `w` or `threshold` is not floating, or `threshold` does not
        broadcast to `w`.

    Example:
      >>> mask = autosparse_mask(jnp.array([-2.0, 0.25, 0.5, 0.0]), jnp.array(0.0))
      >>> float(sparsejax.masks.density(mask))
      0.25
    """
    _check_threshold(w, threshold)
    return jnp.abs(_wide(w, threshold)) > _levels(threshold, w)


def autosparse_topk(
    w: Shaped[Array, "*shape"], count: int | Int[Array, ""], alpha: Scalar
) -> Float[Array, "*shape"]:
    r"""Keeps the largest weights; the others are annealed: a fixed budget.

    .. math::
      \tilde w = m \odot w, \qquad
      \frac{\partial L}{\partial w} = (m + \alpha \bar m) \odot g, \qquad
      m = \mathrm{topk}(|w|)

    Gradient annealing with the threshold at the `count`-th magnitude. Kept weights are
    not shrunk: the threshold is not learned, and shrinking would put the last of them
    at zero. Costs a `masks.topk_mask` and one elementwise pass each way.

    Args:
      w: Weight of any shape; floating.
      count: How many entries are kept, exactly; ties go to the lowest index. May be
        traced.
      alpha: Share of the gradient that pruned weights get; may be traced, has
        gradient zero.

    Returns:
      The weight to use, shaped and typed like `w`. NaN ranks below every number.

    Raises:
      ValueError: `count` is outside [0, size], `w` is not floating, or `alpha` is no
        scalar.

    Example:
      >>> w = jnp.array([3.0, -1.0, -2.0])
      >>> print(autosparse_topk(w, 2, 0.5))
      [ 3.  0. -2.]
      >>> print(jax.grad(lambda w: autosparse_topk(w, 2, 0.5).sum())(w))
      [1.  0.5 1. ]

    References:
      Kundu et al., `AutoSparse <https://arxiv.org/abs/2304.06941>`_, 2023.
    """
    check_floating(w)
    mask = masks.topk_mask(jnp.abs(jax.lax.stop_gradient(w)), count)
    return leaky_mask(w, mask, backward=alpha)


@jax.custom_vjp
def _shrink(w, threshold, alpha):
    del alpha
    wide, level = _wide(w, threshold), _levels(threshold, w)
    # sign(w) * max(|w| - t, 0), without -0 and with NaN and inf as they are.
    return (wide - jnp.clip(wide, -level, level)).astype(w.dtype)


def _shrink_fwd(w, threshold, alpha):
    return _shrink(w, threshold, alpha), (w, threshold, alpha)


def _shrink_bwd(saved, g):
    w, threshold, alpha = saved
    wide, g = _wide(w, threshold), _wide(g, threshold)
    level, to_threshold = jax.vjp(lambda t: _levels(t, w), threshold)
    above = jnp.abs(wide) > level
    dw = jnp.where(above, g, alpha.astype(g.dtype) * g)  # h' g
    (d_threshold,) = to_threshold(-jnp.sign(wide) * dw)
    return dw.astype(w.dtype), d_threshold, jnp.zeros_like(alpha)


_shrink.defvjp(_shrink_fwd, _shrink_bwd)


def _levels(threshold, w):
    """The thresholds sigmoid(T), one for each weight."""
    return jnp.broadcast_to(jax.nn.sigmoid(_wide(threshold, w)), w.shape)


def _wide(x, other):
    """Casts to float32, or float64: T's gradient is a sum over all weights."""
    return x.astype(accumulator(x, other))


def _check_threshold(w, threshold):
    check_floating(w)
    if not jnp.issubdtype(threshold.dtype, jnp.floating):
        raise ValueError(f"threshold must be floating, got {threshold.dtype}")
    try:
        fits = np.broadcast_shapes(threshold.shape, w.shape) == w.shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"threshold must broadcast to the shape of w, {w.shape}, got "
            f"{threshold.shape}"
        )
