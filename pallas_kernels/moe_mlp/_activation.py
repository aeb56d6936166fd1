"""Which activations the chips' compilers lower, and how they are given to them."""

from collections.abc import Callable

import jax
import numpy as np
from jax import numpy as jnp
from jax.extend import core

# What is lowered of arrays in registers; found by compiling each.
_GPU = (
    "abs add broadcast_in_dim convert_element_type div eq exp exp2 ge gt integer_pow "
    "le log logistic lt max min mul ne neg rsqrt select_n square sub tanh"
)
_TPU = (
    f"{_GPU} and ceil clamp cos floor is_finite not or pow rem round sin sqrt tan xor"
)
_LOWERED = {
    "mosaic_gpu": frozenset(_GPU.split()),
    "mosaic_tpu": frozenset(_TPU.split()),
}


def _erfc(x):
    """Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.28: 3e-7 off."""
    size = jnp.abs(x)
    total = 2.765672e-4 + 4.30638e-5 * size
    for term in 1.520143e-4, 9.2705272e-3, 4.22820123e-2, 7.05230784e-2, 1.0:
        total = total * size + term
    y = 1.0 / jax.lax.integer_pow(total, 16)
    return jnp.where(x < 0, 2.0 - y, y)


# What is written otherwise; errors are those of float32 sums near 1.
_REWRITTEN = {
    "copy": lambda x: x,
    "erf": lambda x: 1.0 - _erfc(x),
    "erfc": _erfc,
    "expm1": lambda x: jnp.exp(x) - 1.0,
    "log1p": lambda x: jnp.log(1.0 + x),
    # Mosaic TPU looks for the chip in this process to lower it.
    "sign": lambda x: jnp.where(x > 0, 1, jnp.where(x < 0, -1, x)),
}
# Calls of another function, which stands in its place.
_CALLS = frozenset(
    "checkpoint closed_call custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr jit "
    "pjit remat2".split()
)


def check_activation(
    activation: Callable[[jax.Array], jax.Array], name: str, width: int
) -> None:
    """Raises NotImplementedError where the backend does not lower the activation.

    Args:
        activation: elementwise function of one float32 array.
        name: "mosaic_tpu" or "mosaic_gpu".
        width: columns of the hidden layer.
    """
    closed = _traced(activation, (8, width))
    shapes = [(a.shape, a.dtype.name) for a in closed.out_avals]
    if shapes != [((8, width), "float32")]:
        raise NotImplementedError(
            f"{name}: activation makes {shapes} of one float32 (8, {width}), needs one "
            f"float32 (8, {width})"
        )
    served = _LOWERED[name].union(_REWRITTEN)
    refused = {f"a captured {kind}" for kind in _captured(closed)}
    refused |= set(_primitives(closed)) - served
    if refused:
        raise NotImplementedError(
            f"{name}: activation has {', '.join(sorted(refused))}, needs to be "
            f"made of {', '.join(sorted(served))}"
        )


def captures_traced_values(
    activation: Callable[[jax.Array], jax.Array], width: int
) -> bool:
    """Whether the activation closes over values that are being traced themselves."""
    return "traced value" in _captured(_traced(activation, (8, width)))


def inlined(activation: Callable[[jax.Array], jax.Array]):
    """The activation without custom derivative rules, which kernels do not take."""

    def run(x):
        [y] = _evaluate(_traced(activation, x.shape), x)
        return y

    return run


def _traced(activation, shape):
    return jax.make_jaxpr(activation)(jax.ShapeDtypeStruct(shape, jnp.float32))


def _inner(eqn):
    """The function that a call (jit, a custom rule) stands for, or None."""
    if eqn.primitive.name not in _CALLS:
        return None
    inner = eqn.params.get("call_jaxpr", eqn.params.get("jaxpr"))
    return inner if hasattr(inner, "consts") else core.ClosedJaxpr(inner, ())


def _captured(closed):
    """What else than numbers the function closes over: "traced value", "array"."""
    for const in closed.consts:
        if isinstance(const, jax.core.Tracer):
            yield "traced value"
        elif np.ndim(const):
            yield "array"
    for inner in filter(None, map(_inner, closed.jaxpr.eqns)):
        yield from _captured(inner)


def _primitives(closed):
    for eqn in closed.jaxpr.eqns:
        inner = _inner(eqn)
        if inner is None:
            yield eqn.primitive.name
        else:
            yield from _primitives(inner)


def _evaluate(closed, *args):
    jaxpr = closed.jaxpr
    # Numbers, not arrays, which a kernel does not capture.
    consts = [np.asarray(const)[()] for const in closed.consts]
    known = dict(zip(jaxpr.constvars, consts, strict=True))
    known |= dict(zip(jaxpr.invars, args, strict=True))

    def read(atom):
        return atom.val if isinstance(atom, core.Literal) else known[atom]

    for eqn in jaxpr.eqns:
        values, inner = [read(v) for v in eqn.invars], _inner(eqn)
        if inner is not None:
            outs = _evaluate(inner, *values)
        elif eqn.primitive.name in _REWRITTEN:
            outs = [_REWRITTEN[eqn.primitive.name](*values)]
        else:
            outs = eqn.primitive.bind(*values, **eqn.params)
            outs = outs if eqn.primitive.multiple_results else [outs]
        known |= dict(zip(eqn.outvars, outs, strict=True))
    return [read(v) for v in jaxpr.outvars]
