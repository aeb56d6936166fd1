"""Checks and products that the families of real matrices share."""

from typing import Any

import jax.numpy as jnp


def check_sizes(spec: Any, *names: str) -> None:
    """Raises ValueError unless the fields are at least 1."""
    for name in names:
        if (got := getattr(spec, name)) < 1:
            raise ValueError(f"{name}: got {got}, needed at least 1")


def check_real(spec: Any, **dtypes: Any) -> None:
    """Raises ValueError unless the dtypes are real floating ones."""
    for name, dtype in dtypes.items():
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"{name}: got {jnp.dtype(dtype)}, needed a real floating dtype: "
                f"{type(spec).__name__} is a family of real matrices"
            )


def check_x(spec: Any, x: Any) -> None:
    """Raises ValueError unless x is real and [..., in_size]."""
    check_real(spec, x=x.dtype)
    if x.ndim < 1 or x.shape[-1] != spec.in_size:
        raise ValueError(f"x: got shape {x.shape}, needed [..., {spec.in_size}]")


def einsum(equation: str, *operands: Any) -> Any:
    """In the operands' promoted dtype, with sums in float32 at least."""
    dtype = jnp.result_type(*(operand.dtype for operand in operands))
    sums = jnp.float64 if dtype == jnp.float64 else jnp.float32
    # Wider before the product: XLA's CPU has no batched one of bfloat16 with such sums.
    wide = (operand.astype(dtype).astype(sums) for operand in operands)
    return jnp.einsum(equation, *wide).astype(dtype)
