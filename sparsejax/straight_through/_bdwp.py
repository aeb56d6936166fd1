"""BDWP: a product whose weight is N:M in both directions, each along its own axis."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from sparsejax.masks import nm_mask
from sparsejax.straight_through._leaky import accumulator, check_floating


def bdwp_matmul(
    x: Shaped[Array, "... _k"], w: Shaped[Array, "..."], *, n: int, m: int
) -> Float[Array, "*batch n"]:
    r"""Multiplies by an N:M weight, and back by another: bidirectional weight pruning.

    .. math::
      y = x\, (m_k \odot w), \qquad
      \frac{\partial L}{\partial x} = \frac{\partial L}{\partial y}\,
        (m_n \odot w)^\top, \qquad
      \frac{\partial L}{\partial w} = x^\top \frac{\partial L}{\partial y}

    :math:`m_k` keeps the N largest magnitudes of every M along the inputs, which the
    forward product sums over, and :math:`m_n` those of every M along the outputs,
    which the product back to x sums over. Both of these products are then N:M on
    hardware that has it. The gradient of w is dense.

    Here all three are dense products, as much as in `x @ w`; the masks come on top,
    one each way. A bias is added outside.

    Args:
      x: Activations `[..., k]`; floating.
      w: Weight `[k, n]`; floating.
      n: How many of each group are KEPT.
      m: Group size; divides both sizes of `w`.

    Returns:
      y `[..., n]` in the promoted dtype of x and w; sums in float32.

    Raises:
      ValueError: Shapes or dtypes do not fit, `n` is outside [0, m], or `m` does not
        divide a size of `w`.

    Example:
      >>> w = jnp.array([[1.0, 4.0], [3.0, 2.0]])
      >>> y, back = jax.vjp(lambda x: bdwp_matmul(x, w, n=1, m=2), jnp.ones(2))
      >>> print(y, back(jnp.ones(2))[0])  # the forward weight keeps 3 and 4
      [3. 4.] [4. 3.]

    References:
      Fang et al., `Efficient N:M Sparse DNN Training Using Algorithm, Architecture, and
      Dataflow Co-Design <https://arxiv.org/abs/2309.13015>`_, 2023.
    """
    if w.ndim != 2 or x.ndim < 1 or x.shape[-1] != w.shape[0]:
        raise ValueError(
            f"x must be [..., k] with w [k, n], got shapes {x.shape} and {w.shape}"
        )
    check_floating(w)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x must be floating, got {x.dtype}")
    if m < 1 or any(size % m for size in w.shape):
        raise ValueError(f"m must divide both sizes of w, {w.shape}, got m={m}")
    dtype = jnp.promote_types(x.dtype, w.dtype)
    return _bdwp(x.astype(dtype), w.astype(dtype), n, m)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _bdwp(x, w, n, m):
    return _dot(x, _kept(w, n, m))


def _bdwp_fwd(x, w, n, m):
    return _bdwp(x, w, n, m), (x, w)


def _bdwp_bwd(n, m, saved, dy):
    x, w = saved
    dx = _dot(dy, _kept(w.T, n, m))
    rows = lambda a: a.reshape(-1, a.shape[-1])
    return dx, _dot(rows(x).T, rows(dy))


_bdwp.defvjp(_bdwp_fwd, _bdwp_bwd)


def _kept(w, n, m):
    """N:M of w along its axis 0, which the product sums over."""
    mask = nm_mask(jnp.abs(jax.lax.stop_gradient(w)), n, m, axis=0)
    return jnp.where(mask, w, jnp.zeros((), w.dtype))


def _dot(x, w):
    y = jnp.matmul(x, w, preferred_element_type=accumulator(x))
    return y.astype(x.dtype)
