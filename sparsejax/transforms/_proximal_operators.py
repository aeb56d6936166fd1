"""Penalties on groups of weights and their proximal operators, on single arrays."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from sparsejax.transforms._groups import (
    Groups,
    full_blocks,
    group_sizes,
    group_sums,
    safe_sqrt,
    spread,
    widest,
)


def group_lasso_penalty(
    weight: Float[Array, "..."], *, groups: Groups
) -> Float[Array, ""]:
    r"""Sum of the norms of groups of weights, each times the root of its size.

    .. math:: R(w) = \sum_g \sqrt{p_g} \, \lVert w_g \rVert_2

    with :math:`p_g` the number of entries of group g. One pass over the weights. The
    gradient of a group that is zero is zero.

    Args:
      weight: Array of one dimension or more.
      groups: `Rows()`, `Columns()` or `Blocks((bk, bn))` of the last two axes; or the
        sizes of a group along the trailing axes, None for a whole axis: `(1, None)`
        are rows, `(None, None, None, 1)` the filters of a convolution kernel. Axes
        before those have groups of their own. Blocks at the end may be smaller.

    Returns:
      A scalar of the weight's dtype, or float32 if that is narrower.

    Raises:
      ValueError: `groups` does not fit the weight.

    Example:
      >>> w = jnp.array([[3.0, 4.0], [0.0, 0.0]])
      >>> print(round(float(group_lasso_penalty(w, groups=(1, None))), 4))
      7.0711

    References:
      Yuan and Lin, `Model selection and estimation in regression with grouped
      variables <https://doi.org/10.1111/j.1467-9868.2005.00532.x>`_, 2006.
    """
    norms, sizes, _ = _norms_and_sizes(weight, groups)
    return jnp.sum(jnp.sqrt(sizes) * norms)


def prox_group_lasso(
    weight: Float[Array, "..."],
    step: float | Float[Array, ""],
    *,
    groups: Groups,
) -> Float[Array, "..."]:
    r"""Soft-thresholds the norms of groups: the proximal operator of group lasso.

    .. math::
      \mathrm{prox}_{\tau R}(w)_g
        = \left(1 - \frac{\tau \sqrt{p_g}}{\lVert w_g \rVert_2}\right)_+ w_g

    for R of `group_lasso_penalty`. Groups whose norm is at most the threshold become
    exactly zero. NaN stays NaN. Two passes over the weights.

    Args:
      weight: Array of one dimension or more.
      step: tau, the step size times the strength of the penalty.
      groups: As for `group_lasso_penalty`.

    Returns:
      An array like `weight`.

    Raises:
      ValueError: `groups` does not fit the weight.

    Example:
      >>> w = jnp.array([[3.0, 4.0], [0.6, 0.8]])
      >>> print(prox_group_lasso(w, 2.5 / 2**0.5, groups=(1, None)))
      [[1.5 2. ]
       [0.  0. ]]

    References:
      Yuan and Lin, `Model selection and estimation in regression with grouped
      variables <https://doi.org/10.1111/j.1467-9868.2005.00532.x>`_, 2006.
    """
    norms, sizes, blocks = _norms_and_sizes(weight, groups)
    threshold = jnp.asarray(step).astype(norms.dtype) * jnp.sqrt(sizes)
    shrunk = 1 - threshold / jnp.where(norms == 0, 1, norms)
    return _scale_groups(weight, jnp.where(norms <= threshold, 0, shrunk), blocks)


def group_envelope_penalty(
    weight: Float[Array, "..."],
    *,
    count: int,
    groups: Groups,
    group_weights: Float[Array, "..."] | None = None,
) -> Float[Array, ""]:
    r"""The weighted group sparse envelope: a convex stand-in for "at most k groups".

    .. math::
      GS_k(w) = \min_{u \in [0, 1]^m, \, \sum_j u_j \le k} \;
        \frac12 \sum_j \frac{d_j \lVert w_j \rVert_2^2}{u_j}

    the largest convex function below :math:`\frac12 \sum_j d_j \lVert w_j \rVert^2`
    on weights with at most k groups unlike zero (and infinity on others). It equals
    the former on those weights; for k = 1 it is half the square of the group lasso
    without sizes. Costs one pass over the weights and, in float32, 31 over the m
    group norms, without sorting: linear in the number of weights.

    Args:
      weight: Array of one dimension or more.
      count: k, at least 1.
      groups: As for `group_lasso_penalty`.
      group_weights: d, positive, one per group: shaped like the grid of groups, of
        which an axis of size n with blocks of size b has ceil(n / b). None: 1, which
        is the sparse envelope of groups.

    Returns:
      A scalar of the weight's dtype, or float32 if that is narrower. Its gradient at
      a group that is zero is zero.

    Raises:
      ValueError: `count` is below 1, or a shape does not fit the weight.

    Example:
      >>> w = jnp.array([[3.0, 0.0], [0.0, 4.0]])
      >>> penalty = group_envelope_penalty(w, count=1, groups=(1, None))
      >>> print(round(float(penalty), 4))
      24.5

    References:
      Refael, Arbel and Huleihel, `Learning k-level structured sparse neural networks
      using group envelope regularization <https://arxiv.org/abs/2212.12921>`_, 2022.

      Beck and Refael, Sparse regularization via bidualization, Journal of Global
      Optimization, 2022.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    norms, _, _ = _norms_and_sizes(weight, groups)
    d = _group_weights(group_weights, norms)
    # At the minimum over u the value does not move with u: u takes no gradient.
    u = lax.stop_gradient(_shares(jnp.sqrt(d) * norms, jnp.zeros_like(d), count))
    values = d * norms**2 / jnp.where(u > 0, u, 1)
    return 0.5 * jnp.sum(values)


def prox_group_envelope(
    weight: Float[Array, "..."],
    step: float | Float[Array, ""],
    *,
    count: int,
    groups: Groups,
    group_weights: Float[Array, "..."] | None = None,
) -> Float[Array, "..."]:
    r"""Proximal operator of the weighted group sparse envelope.

    .. math::
      \mathrm{prox}_{\lambda GS_k}(w)_j = \frac{u_j}{\lambda d_j + u_j} w_j, \quad
      u_j = \min\!\left(1, \left(\eta \sqrt{d_j} \lVert w_j \rVert_2
        - \lambda d_j\right)_+\right)

    where :math:`\eta` is such that :math:`\sum_j u_j = k`, or large enough for
    :math:`u_j = 1` where k or fewer groups are unlike zero. The sum grows with
    :math:`\eta`, which is found by bisection on its bits: 31 passes over the group
    norms in float32, none sorts them.

    At least k groups stay unlike zero (or all that were). Just k do where the gap
    below the k-th norm is wide enough for `step`: steps near 0 zero no group, large
    ones all but k. NaN stays NaN.

    Args:
      weight: Array of one dimension or more.
      step: lambda, the step size times the strength of the penalty.
      count: k; 0 gives zeros.
      groups: As for `group_lasso_penalty`.
      group_weights: d, as for `group_envelope_penalty`.

    Returns:
      An array like `weight`.

    Raises:
      ValueError: `count` is negative, or a shape does not fit the weight.

    Example:
      >>> w = jnp.array([[0.0, 4.0], [2.0, 0.0]])
      >>> print(prox_group_envelope(w, 1.0, count=1, groups=(1, None)))
      [[0. 2.]
       [0. 0.]]

    References:
      Refael, Arbel and Huleihel, `Learning k-level structured sparse neural networks
      using group envelope regularization <https://arxiv.org/abs/2212.12921>`_, 2022.
    """
    if count < 0:
        raise ValueError(f"count must be at least 0, got {count}")
    norms, _, blocks = _norms_and_sizes(weight, groups)
    d = _group_weights(group_weights, norms)
    shift = jnp.asarray(step).astype(norms.dtype) * d
    u = _shares(jnp.sqrt(d) * norms, shift, count)
    kept = u / jnp.where(u == 0, 1, shift + u)
    return _scale_groups(weight, kept, blocks)


def _shares(slopes: Any, shifts: Any, count: int) -> Any:
    """u = clip(eta * slope - shift, 0, 1) at the smallest eta with sum(u) >= count."""
    bits = {4: jnp.int32, 8: jnp.int64}[slopes.dtype.itemsize]

    def shares(eta_bits):
        eta = lax.bitcast_convert_type(eta_bits, slopes.dtype)
        return jnp.clip(eta * slopes - shifts, 0, 1)

    def halve(_, bracket):
        # Positive floats are ordered as their bits are.
        low, high = bracket
        middle = low + (high - low) // 2
        u = shares(middle)
        # Ones are counted apart, in integers: a long float sum would lose them.
        ones = jnp.sum(u >= 1, dtype=jnp.int32)
        rest = jnp.sum(jnp.where(u < 1, u, 0))
        enough = rest >= (count - ones).astype(u.dtype)
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    largest = jnp.asarray(jnp.finfo(slopes.dtype).max, slopes.dtype)
    high = lax.bitcast_convert_type(largest, bits)
    steps = 8 * slopes.dtype.itemsize - 1
    low, high = lax.fori_loop(0, steps, halve, (jnp.zeros((), bits), high))
    # For k = 0 the lower end, which is 0: the other may give a share to all.
    return shares(low if count == 0 else high)


def _norms_and_sizes(weight: Any, groups: Groups) -> tuple[Any, Any, Any]:
    blocks = full_blocks(weight.shape, groups)
    # Half-precision squares would overflow, and sums lose what is small.
    w = weight.astype(widest(weight.dtype, jnp.float32))
    norms = safe_sqrt(group_sums(w**2, blocks))
    return norms, group_sizes(w.shape, blocks, w.dtype), blocks


def _group_weights(group_weights: Any, norms: Any) -> Any:
    if group_weights is None:
        return jnp.ones_like(norms)
    if group_weights.shape != norms.shape:
        raise ValueError(
            f"group_weights must be shaped like the grid of groups, {norms.shape}, "
            f"got {group_weights.shape}"
        )
    return group_weights.astype(norms.dtype)


def _scale_groups(weight: Any, scales: Any, blocks: tuple[int, ...]) -> Any:
    scales = spread(scales, weight.shape, blocks)
    zero = jnp.zeros((), scales.dtype)
    # Not 0 * w, which is -0 for some and NaN for infinite w.
    scaled = jnp.where(scales == 0, zero, scales * weight.astype(scales.dtype))
    return scaled.astype(weight.dtype)
