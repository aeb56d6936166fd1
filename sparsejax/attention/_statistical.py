"""Statistical top-k: a Gaussian's quantile as threshold, with gradients."""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Shaped

from sparsejax.attention._budget import check_count, gaussian_bound


def statistical_top_k(
    x: Shaped[Array, "..."],
    count: int,
    *,
    where: ArrayLike | None = None,
    rest: float = 0.0,
) -> Shaped[Array, "..."]:
    r"""About the ``count`` largest entries, less a threshold; no sort.

    .. math::
      y_j = \max(x_j - \theta, 0), \qquad
      \theta = \mu + \sigma\, \Phi^{-1}(1 - \mathrm{count} / n)

    with the mean and the deviation (of n - 1) of the n entries of the last axis: as
    many are kept as asked for in the mean, where they are Gaussian. The threshold is
    soft: y is continuous, and its gradient also goes through mean and deviation. Linear
    in n. The budget ``GaussianTopK`` has the same threshold.

    Args:
      x: ``[..., n]``, floating; computed in float32.
      count: Entries of a row to keep, about.
      where: Boolean, of a shape that broadcasts to x's: what is a row's own, such as
        the keys up to a query. The others get ``rest`` and do not count.
      rest: What is not kept becomes this: 0 for activations; -inf for logits, whose
        softmax then is over what is kept (and does not see the threshold).

    Returns:
      ``[..., n]`` in the dtype of x. Rows of no more than ``count`` entries are kept as
      they are; nothing is of a row of more whose entries are all equal.

    Raises:
      ValueError: x has no axis or is not floating, or ``count`` is below 1.

    Example:
      >>> x = jnp.array([0.0, 1.0, 2.0, 5.0])
      >>> top = jax.jit(lambda x: sparsejax.attention.statistical_top_k(x, 2))
      >>> print(top(x))  # less the mean
      [0. 0. 0. 3.]
      >>> print(jax.grad(lambda x: top(x)[3])(x))
      [-0.25 -0.25 -0.25  0.75]

    References:
      You et al., `Spark Transformer: Reactivating Sparsity in FFN and Attention
      <https://arxiv.org/abs/2506.06644>`_, 2025.
    """
    check_count("count", count)
    if x.ndim < 1 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x: got {x.dtype} {x.shape}, needed floating [..., n]")
    wide = x.astype(jnp.float32)
    real = True if where is None else where
    real = jnp.broadcast_to(jnp.asarray(real), x.shape) & (wide > -jnp.inf)
    bound = gaussian_bound(wide, real, count)
    kept = real & (wide > bound)
    less = jnp.where(bound > -jnp.inf, bound, 0.0)
    return jnp.where(kept, wide - less, rest).astype(x.dtype)
