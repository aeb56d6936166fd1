"""The one rule behind the masked forms: what leaks forward, and what leaks back."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

# Checked by scalar_like, for users without a type checker too.
Scalar = float | int | Shaped[Array, "..."]


def leaky_mask(
    w: Shaped[Array, "*shape"],
    mask: Bool[Array, "..."],
    *,
    forward: Scalar = 0.0,
    backward: Scalar = 0.0,
    decay: Scalar | None = None,
) -> Float[Array, "*shape"]:
    r"""Masks a weight, and lets a share of what is pruned through.

    .. math::
      \tilde w = \begin{cases} w & m \\ b\,w & \bar m \end{cases}, \qquad
      \frac{\partial L}{\partial w} = \begin{cases}
        g & m \\ a\,g + \lambda w & \bar m \end{cases}, \qquad
      g = \frac{\partial L}{\partial \tilde w}

    The masked forms of this package are cases of it, and so is any other mask: of
    blocks, rows, or constant fan-in. Costs one elementwise pass each way, and one
    byte per weight kept for the backward pass.

    ============================  ==========  =========  ==========
    form                          forward b   backward a decay λ
    ============================  ==========  =========  ==========
    masked                        0           0
    straight-through              0           1
    SR-STE                        0           1          2e-4
    annealed top-k                0           annealed
    mask decay, straight_through  annealed    1
    mask decay, scaled            annealed    the same
    ============================  ==========  =========  ==========

    Args:
      w: Weight of any shape; floating.
      mask: True where kept; shaped like `w`. It has no gradient.
      forward: Share of a pruned weight that the forward pass sees, b. At 0 a pruned
        NaN or inf takes no part.
      backward: Share of the gradient that a pruned weight gets, a.
      decay: Pulls pruned weights to zero through their gradient, λ. It is added once
        for each time that a gradient passes here: use the result more than once, not
        the function, and take gradients of gradients without it. None: no pull.

    Returns:
      The weight to use, shaped and typed like `w`. The scalars are rounded to its
      dtype, may be traced, and have gradient zero.

    Raises:
      ValueError: `w` is not floating, `mask` is not boolean or not shaped like `w`,
        or a scalar is no scalar.

    Example:
      >>> mask = jnp.array([True, False])
      >>> f = lambda w: leaky_mask(w, mask, forward=0.5, backward=0.25)
      >>> print(f(jnp.array([3.0, 2.0])), jax.grad(lambda w: f(w).sum())(jnp.ones(2)))
      [3. 1.] [1.   0.25]
    """
    check_floating(w)
    if mask.dtype != jnp.bool_ or mask.shape != w.shape:
        raise ValueError(
            f"mask must be boolean and shaped like w, {w.shape}, got {mask.dtype} "
            f"{mask.shape}"
        )
    return _leaky(
        w,
        mask,
        scalar_like(forward, w, "forward"),
        scalar_like(backward, w, "backward"),
        None if decay is None else scalar_like(decay, w, "decay"),
    )


@jax.custom_vjp
def _leaky(w, mask, forward, backward, decay):
    del backward, decay
    # Not 0 * w, which a weight that overflowed would turn into NaN.
    leak = jnp.where(forward == 0, jnp.zeros((), w.dtype), forward * w)
    return jnp.where(mask, w, leak)


def _leaky_fwd(w, mask, forward, backward, decay):
    saved = (mask, forward, backward, decay, None if decay is None else w)
    return _leaky(w, mask, forward, backward, decay), saved


def _leaky_bwd(saved, g):
    mask, forward, backward, decay, w = saved
    leak = backward * g if decay is None else backward * g + decay * w
    no_gradient = jax.tree.map(jnp.zeros_like, (forward, backward, decay))
    return jnp.where(mask, g, leak), None, *no_gradient


_leaky.defvjp(_leaky_fwd, _leaky_bwd)


def accumulator(*arrays: Any) -> Any:
    """In which their sums are taken: float32, or float64."""
    wide = any(array.dtype == jnp.float64 for array in arrays)
    return jnp.float64 if wide else jnp.float32


def check_floating(w: Any) -> None:
    """Raises ValueError unless a weight is floating."""
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(f"w must be floating, got {w.dtype}")


def scalar_like(value: Any, w: Any, name: str) -> Any:
    """A scalar argument, traced or not, in the dtype of `w`."""
    if jnp.ndim(value) != 0:
        raise ValueError(f"{name} must be a scalar, got shape {jnp.shape(value)}")
    return jnp.asarray(value).astype(w.dtype)
