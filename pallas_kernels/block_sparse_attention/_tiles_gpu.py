"""Logits, masks and products of the Hopper kernels, in registers."""

import functools
import math
from collections.abc import Callable

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_sparse_attention._spec import HOPPER_ROWS as ROWS
from pallas_kernels.block_sparse_attention._spec import HOPPER_WORD as WORD
from pallas_kernels.block_sparse_attention._spec import Elements

# Exponentials are of base 2, as the hardware has them.
LOG2E = math.log2(math.e)
LOWEST = float(jnp.finfo(jnp.float32).min)
LAYOUT = plgpu.Layout.WGMMA


def logits(z, scale: float, soft_cap: float | None, bias):
    """Products as logits of base 2; with a cap also its derivative."""
    slope = None
    if soft_cap is None:
        z = z * (scale * LOG2E)
    else:
        # The hardware's tanh is good to 2**-11 only.
        ratio = 1 - 2 / (jnp.exp2(z * (2 * LOG2E * scale / soft_cap)) + 1)
        z, slope = ratio * (soft_cap * LOG2E), 1 - ratio * ratio
    return (z if bias is None else z + bias * LOG2E), slope


def of_step(elements: Elements, rows, cols, dense) -> Elements:
    """The same with a step's buffers as operands, each kind as (references, index)."""
    pick = lambda refs, at: tuple(ref.at[at] for ref in refs)
    return elements._replace(rows=pick(*rows), cols=pick(*cols), dense=pick(*dense))


def masked(z, elements: Elements, place, step, config, transposed=False):
    """Sets to -inf what is not allowed; the elements' operands are the step's buffers.

    With ``transposed`` the rows of z are keys.
    """
    ragged = config.keys % config.block_k
    if elements.predicate is None and not ragged:
        return z
    queries = 1 if transposed else 0

    def ask(z):
        place_of = lambda axis: plgpu.broadcasted_iota(
            jnp.int32, z.shape, axis, layout=LAYOUT
        )
        first = (step.column, place.row) if transposed else (place.row, step.column)
        i, j = first[0] + place_of(queries), first[1] + place_of(1 - queries)
        allowed = j < config.keys
        if elements.predicate is not None:
            of = lambda refs, axis: tuple(numbers(x, z.shape, axis) for x in refs)
            some = _without_not(elements.predicate)(
                *(i, j, of(elements.rows, queries), of(elements.cols, 1 - queries)),
                step.scalars,
                tuple(_bits(words, z.shape) for words in elements.dense),
            )
            allowed = allowed & some if ragged else some
        return jnp.where(allowed, z, -jnp.inf)

    return lax.cond(step.partial, ask, lambda z: z, z)


def _bits(words, shape):
    """bool of z's shape: column c of a row is bit c % 32 of the row's word c // 32."""
    column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=LAYOUT)
    word = numbers(words.at[0], shape, 0)
    for number in range(1, shape[1] // WORD):
        later = numbers(words.at[number], shape, 0)
        word = jnp.where(column < number * WORD, word, later)
    return (lax.shift_right_logical(word, column & (WORD - 1)) & 1) != 0


def _without_not(predicate: Callable) -> Callable:
    """The same with ``~x`` as ``x != True``: Mosaic GPU cannot lower the former."""

    def run(jaxpr, constants, *args):
        values = dict(
            zip(jaxpr.constvars + jaxpr.invars, [*constants, *args], strict=True)
        )
        value = lambda v: v.val if hasattr(v, "val") else values[v]
        for equation in jaxpr.eqns:
            operands, params = [value(v) for v in equation.invars], equation.params
            inner = params.get("jaxpr")
            if equation.primitive is lax.not_p and operands[0].dtype == bool:
                results = [operands[0] != True]  # noqa: E712
            elif inner is not None:
                results = run(inner.jaxpr, inner.consts, *operands)
            else:
                results = equation.primitive.bind(*operands, **params)
                if not equation.primitive.multiple_results:
                    results = [results]
            values.update(zip(equation.outvars, results, strict=True))
        return [value(v) for v in jaxpr.outvars]

    def call(*args):
        closed = jax.make_jaxpr(predicate)(*args)
        return run(closed.jaxpr, closed.consts, *jax.tree.leaves(args))[0]

    return call


def probabilities(z, lse, axis: int, bias):
    """exp2(z - lse), the latter of the rows (axis 0) or columns of z."""
    p = jnp.exp2(z - numbers(lse, z.shape, axis))
    # Rows of padding have an lse of 0, above which a bias may lie.
    return p if bias is None else jnp.minimum(p, 1)


def numbers(ref, shape, axis: int):
    """A buffer's numbers of rows (axis 0) or columns (1), over all of these."""
    x = plgpu.layout_cast(ref[...], LAYOUT.reduce(1 - axis))
    return spread(x, shape, axis)


def product(left, right, shape, turn=None):
    """``left @ right.T``, both in SMEM."""

    def multiply(acc):
        plgpu.wgmma(acc, left, right.transpose((1, 0)))
        take_turns(turn)
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def accumulate(total, left, right):
    """``total + left @ right``, left from registers."""
    if isinstance(left, jax.Array):
        run = lambda acc: plgpu.wgmma(acc, left, right)
        return pl.run_state(run)(plgpu.ACC.init(total))

    # In jax's interpreter a product is of SMEM, into a sum that begins at zero.
    return total + product(left, right.transpose((1, 0)), total.shape)


def summed(walk, one, *sizes: int):
    """Sums of so many columns, over the steps that are walked."""

    def run(*sums):
        walk(functools.partial(one, sums), ())
        return [acc[...] for acc in sums]

    return pl.run_scoped(run, *(plgpu.ACC((ROWS, n), jnp.float32) for n in sizes))


def add(acc, left, right):
    """Adds ``left @ right`` to a sum, left a ``left_operand``."""
    plgpu.wgmma(acc, left, right)
    plgpu.wgmma_wait(0)


def left_operand(x, spare, mine):
    """The left operand of a product: registers, or SMEM where simulated."""
    if spare is None:
        return x
    spare[mine] = x
    plgpu.commit_smem()
    return spare.at[mine]


def take_turns(turn):
    """Waits for the other warpgroup to come here as well."""
    if turn is not None:
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)


def spread(x, shape, axis: int):
    """Numbers of rows (axis 0) or columns (1), over all of these."""
    return lax.broadcast_in_dim(x, shape, [axis])


def zeros(shape):
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), LAYOUT)


def of_each_row(value: float):
    x = jnp.full((ROWS,), value, jnp.float32)
    return plgpu.layout_cast(x, LAYOUT.reduce(1))
