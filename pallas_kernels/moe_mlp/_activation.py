"""Which activations Mosaic GPU lowers, and how they are given to it."""

from collections.abc import Callable

import jax
from jax import numpy as jnp
from jax.extend import core

# What is lowered of arrays in registers; found by compiling each.
_LOWERED = frozenset(
    "abs add and broadcast_in_dim convert_element_type cos div eq erf exp exp2 ge gt "
    "integer_pow le log logistic lt max min mul ne neg not or rsqrt select_n sign sin "
    "square sub tanh xor".split()
)


def check_activation(activation: Callable[[jax.Array], jax.Array]) -> None:
    """Raises NotImplementedError where Mosaic GPU does not lower the activation.

    Args:
        activation: elementwise function of one float32 array.
    """
    closed = _traced(activation, (8, 8))
    shapes = [(a.shape, a.dtype.name) for a in closed.out_avals]
    if shapes != [((8, 8), "float32")]:
        raise NotImplementedError(
            f"mosaic_gpu: activation makes {shapes} of one float32 (8, 8), needs one "
            "float32 (8, 8)"
        )
    found = set(_primitives(closed))
    if not found <= _LOWERED:
        raise NotImplementedError(
            f"mosaic_gpu: activation has {', '.join(sorted(found - _LOWERED))}, needs "
            f"to be made of {', '.join(sorted(_LOWERED))}"
        )


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
    return eqn.params.get("call_jaxpr", eqn.params.get("jaxpr"))


def _primitives(closed):
    if any(getattr(const, "ndim", 0) for const in closed.consts):
        yield "a captured array"
    for eqn in closed.jaxpr.eqns:
        inner = _inner(eqn)
        if inner is None:
            yield eqn.primitive.name
        else:
            yield from _primitives(inner)


def _evaluate(closed, *args):
    jaxpr = closed.jaxpr
    known = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    known |= dict(zip(jaxpr.invars, args, strict=True))

    def read(atom):
        return atom.val if isinstance(atom, core.Literal) else known[atom]

    for eqn in jaxpr.eqns:
        values, inner = [read(v) for v in eqn.invars], _inner(eqn)
        if inner is not None:
            outs = _evaluate(inner, *values)
        else:
            outs = eqn.primitive.bind(*values, **eqn.params)
            outs = outs if eqn.primitive.multiple_results else [outs]
        known |= dict(zip(eqn.outvars, outs, strict=True))
    return [read(v) for v in jaxpr.outvars]
