"""masked_matmul: the dense product with a masked weight."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from sparsejax import _dispatch
from sparsejax._dispatch import Choice, Implementation
from sparsejax.ops._checks import accumulator, check_floating


def masked_matmul(
    x: Shaped[Array, "... _k"],
    w: Shaped[Array, "..."],
    mask: Shaped[Array, "..."],
    *,
    implementation: Choice = None,
) -> Float[Array, "*batch n"]:
    """Multiplies by the kept entries of a dense matrix.

    ``y[..., j] = sum_i x[..., i] mask[i, j] w[i, j]``. Costs the dense
    product and, on a CPU, a pass over w and the mask before it: it is the form to
    research masks with, and what the sparse products are compared to.

    Args:
      x: Activations ``[..., k]``; float32, bfloat16, float16 (float64 on CPU).
      w: Weight ``[k, n]``.
      mask: True where kept. A pruned entry takes no part, not even an infinite one, and
        has gradient zero: a method that grows by gradients takes them from the dense
        product of weights that are zero already (``transforms.sparsify`` keeps them
        so).
      implementation: "xla" or None, which are the same.

    Returns:
      y ``[..., n]`` in the promoted dtype of x and w; sums in float32.

    Raises:
      ValueError: Shapes or dtypes do not fit; the implementation's name is unknown.

    Example:
      >>> mask = jnp.array([[True, False], [True, True]])
      >>> y = sparsejax.ops.masked_matmul(jnp.ones((1, 2)), jnp.ones((2, 2)), mask)
      >>> print(y)
      [[2. 1.]]

    Note:
      Differentiable in both modes, to any order.
    """
    if w.ndim != 2 or x.ndim < 1 or x.shape[-1] != w.shape[0]:
        raise ValueError(
            f"x: got shape {x.shape} with w {w.shape}, needed [..., k] and [k, n]"
        )
    if mask.shape != w.shape or mask.dtype != jnp.bool_:
        raise ValueError(
            f"mask: got {mask.dtype} {mask.shape}, needed bool {w.shape} as w"
        )
    check_floating(x=x, w=w)
    dtype = jnp.promote_types(x.dtype, w.dtype)
    problem = (
        f"masked_matmul: x {x.dtype.name}[{','.join(map(str, x.shape))}], "
        f"w {w.dtype.name}[{w.shape[0]},{w.shape[1]}]"
    )
    x, w = x.astype(dtype), w.astype(dtype)
    return _dispatch.call(MASKED_MATMUL, implementation, problem, x, w, mask)


def _run_xla(problem, chip, interpret, x, w, mask):
    del problem, chip, interpret
    kept = jnp.where(mask, w, jnp.zeros((), w.dtype))
    y = jnp.matmul(x, kept, preferred_element_type=accumulator(x.dtype))
    return y.astype(x.dtype)


MASKED_MATMUL = {
    "xla": Implementation(
        "xla",
        None,
        lambda problem, chip: None,
        _run_xla,
        note=lambda problem: (
            "dense product of the masked weight; one with zeros is as fast or faster"
        ),
    )
}
