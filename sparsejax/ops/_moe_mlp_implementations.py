"""Who computes moe_mlp and its gradients: XLA in one loop, or a chip's kernels.

Choices come as the router listed them: tokens, experts and weights [c], expert e where
none is meant. ``composed`` is the layer made of grouped products, differentiable to any
order: gradients of gradients are its own, and so are the kernels' gradients.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul import _spec as grouped_spec
from pallas_kernels.moe_mlp import _spec as moe_spec
from sparsejax._dispatch import Implementation
from sparsejax.ops import _moe_mlp_xla
from sparsejax.ops._checks import accumulator
from sparsejax.ops._grouped_matmul import (
    GROUPED_MATMUL,
    Static,
    problem_of,
    products,
)


@dataclasses.dataclass(frozen=True)
class Problem:
    """The static facts of one call.

    ``op`` is "moe_mlp" or "moe_mlp_gradients"; ``by_token``: each token has equally
    many choices, listed one token after the other.
    """

    op: str
    tokens: int
    choices: int
    d: int
    f: int
    experts: int
    gated: bool
    by_token: bool
    dtype: str
    activation: Callable[[jax.Array], jax.Array]

    def __str__(self):
        gated = "gated " if self.gated else ""
        return (
            f"{self.op}: {self.choices} choices of {self.tokens} tokens, "
            f"{self.experts} {gated}experts {self.d}x{self.f}, {self.dtype}"
        )


def hidden(activation, *pre):
    """The hidden layer, of one product with x or, where gated, of two."""
    gate, *up = pre
    return functools.reduce(jnp.multiply, up, activation(gate))


def by_expert(tokens, experts, weights, e):
    """The choices sorted by expert: order, tokens, weights, and how many each has."""
    order = jnp.argsort(experts, stable=True).astype(jnp.int32)
    ends = jnp.searchsorted(experts[order], jnp.arange(e, dtype=jnp.int32), "right")
    starts = jnp.concatenate([jnp.zeros(1, ends.dtype), ends[:-1]])
    return order, tokens[order], weights[order], (ends - starts).astype(jnp.int32)


def composed(
    product: Callable[..., jax.Array],
    problem: Problem,
    x: jax.Array,
    ws: tuple[jax.Array, ...],
    w_out: jax.Array,
    weights: jax.Array,
    tokens: jax.Array,
    experts: jax.Array,
) -> jax.Array:
    """The layer of grouped products ``product(rows, w, sizes)``."""
    wide = accumulator(x.dtype)
    order, *_, sizes = by_expert(tokens, experts, weights, problem.experts)
    back = (
        jnp.zeros_like(order)
        .at[order]
        .set(jnp.arange(order.size, dtype=order.dtype), unique_indices=True)
    )
    rows = _permuted(_spread(problem, x, tokens), order, back)
    # Choices of no expert are last, their weights never looked at.
    valid = jnp.arange(order.size, dtype=jnp.int32) < sizes.sum(dtype=jnp.int32)
    part = jnp.where(valid, _permuted(weights, order, back), 0).astype(wide)[:, None]
    pre = [product(rows, w, sizes).astype(wide) for w in ws]
    # Weighted here, so that no gradient needs the last product's result.
    h = (hidden(problem.activation, *pre) * part).astype(x.dtype)
    h = jnp.where(valid[:, None], h, 0)
    y = _permuted(product(h, w_out, sizes), back, order)
    return _collect(problem, y.astype(wide), tokens).astype(x.dtype)


@jax.custom_vjp
def _permuted(a, order, back):
    """a[order]; ``back`` is the inverse, by which gradients are gathered likewise."""
    return a.at[order].get(mode="promise_in_bounds", unique_indices=True)


_permuted.defvjp(
    lambda a, order, back: (_permuted(a, order, back), (order, back)),
    lambda orders, da: (_permuted(da, *reversed(orders)), None, None),
)


def _spread(problem, x, tokens):
    """A row of x for each choice."""
    if not problem.by_token:
        return x[tokens]
    shape = (problem.tokens, problem.choices // problem.tokens, problem.d)
    return jnp.broadcast_to(x[:, None], shape).reshape(problem.choices, problem.d)


def _collect(problem, y, tokens):
    """The sum over each token's choices."""
    if problem.by_token:
        return y.reshape(problem.tokens, -1, problem.d).sum(1)
    zeros = jnp.zeros((problem.tokens, problem.d), y.dtype)
    return zeros.at[tokens].add(y, mode="promise_in_bounds")


# --- XLA ------------------------------------------------------------------------------


def _run_xla(problem, chip, interpret, x, ws, w_out, weights, tokens, experts):
    del chip, interpret
    _, *choices = by_expert(tokens, experts, weights, problem.experts)
    tokens, weights, sizes = choices
    layer = functools.partial(hidden, problem.activation)
    return _moe_mlp_xla.forward(x, ws, w_out, weights, tokens, sizes, hidden=layer)


def _run_gradients_xla(
    problem, chip, interpret, x, ws, w_out, weights, tokens, experts, dy
):
    del chip, interpret
    order, *choices = by_expert(tokens, experts, weights, problem.experts)
    tokens, weights, sizes = choices
    layer = functools.partial(hidden, problem.activation)
    dx, dws, dw_out, dweights = _moe_mlp_xla.gradients(
        x, ws, w_out, weights, tokens, sizes, dy, hidden=layer
    )
    dweights = jnp.zeros_like(dweights).at[order].set(dweights, unique_indices=True)
    return dx, tuple(dws), dw_out, dweights


def _anything(problem, chip):
    """XLA takes every problem."""


def _note_xla(problem):
    return "one loop over the experts' tiles; holds no row per choice"


# --- Kernels --------------------------------------------------------------------------


def _check_kernel(name, problem, chip):
    """Raises NotImplementedError where the backend's grouped products do not serve."""
    check = getattr(grouped_spec, f"check_{name}")
    for k, n in ((problem.d, problem.f), (problem.f, problem.d)):
        for op in ("grouped", "grouped_transposed", "grouped_sampled"):
            out = problem.dtype
            each = grouped_spec.Problem(
                op, problem.choices, k, n, problem.experts, problem.dtype, out
            )
            check(each, chip)


def _products(name, chip, interpret):
    """The grouped product of one implementation, which is not chosen again."""

    def run(static, op, out, a, b, sizes):
        problem = problem_of(op, out, a, b, sizes)
        return GROUPED_MATMUL[name].run(problem, chip, interpret, a, b, sizes)

    product, _, _ = products(run)
    return lambda rows, w, sizes: product(Static(name, rows.dtype), rows, w, sizes)


def _fused(name, problem, chip):
    """The backend's kernels of this very layer, or None where they do not serve it."""
    from pallas_kernels.moe_mlp import _activation

    try:
        for half in _halves(problem):
            getattr(moe_spec, f"check_{name}")(half, chip)
        _activation.check_activation(problem.activation, name, problem.f)
    except NotImplementedError:
        return None
    if name == "mosaic_tpu":
        from pallas_kernels.moe_mlp import mosaic_tpu

        return mosaic_tpu, moe_spec.config_mosaic_tpu
    from pallas_kernels.moe_mlp import mosaic_gpu

    return mosaic_gpu, moe_spec.config_mosaic_gpu


def _halves(problem):
    """The layer up to its hidden width, and from there on."""
    names = "tokens", "choices", "d", "f", "experts", "dtype"
    same = {name: getattr(problem, name) for name in names}
    up = "moe_hidden_gated" if problem.gated else "moe_hidden"
    return moe_spec.Problem(up, **same), moe_spec.Problem("moe_down", **same)


def _run_kernel(name, problem, chip, interpret, *operands):
    fused = _fused(name, problem, chip)
    if fused is None:
        return composed(_products(name, chip, interpret), problem, *operands)
    (kernels, config), (up, down) = fused, _halves(problem)
    how = lambda half: dict(config=config(half, chip), interpret=interpret)
    x, ws, w_out, weights, tokens, experts = operands
    choices = by_expert(tokens, experts, weights, problem.experts)
    order, sorted_tokens, part, sizes = choices
    *gate, w_in = (w.astype(x.dtype) for w in ws)
    h = kernels.hidden(
        x,
        w_in,
        gate[0] if gate else None,
        sorted_tokens,
        sizes,
        activation=problem.activation,
        **how(up),
    )
    part = part.astype(jnp.float32)
    y = kernels.down(h, w_out.astype(x.dtype), order, part, sizes, **how(down))
    return _collect(problem, y.astype(jnp.float32), tokens).astype(x.dtype)


def _run_gradients_kernel(name, problem, chip, interpret, *operands):
    x, ws, w_out, weights, tokens, experts, dy = operands
    product = _products(name, chip, interpret)

    def layer(x, ws, w_out, weights):
        return composed(product, problem, x, ws, w_out, weights, tokens, experts)

    return jax.vjp(layer, x, ws, w_out, weights)[1](dy)


def _note_kernel(name, problem):
    if problem.op == "moe_mlp" and _fused(name, problem, None) is not None:
        return "gather, products, activation and gate in two kernels"
    return "grouped products; rows are gathered before and combined after them"


def _implementations(run_xla: Any, run_kernel: Any) -> dict[str, Implementation]:
    each = lambda fn, name: functools.partial(fn, name)
    return {
        "xla": Implementation("xla", None, _anything, run_xla, note=_note_xla),
        "mosaic_tpu": Implementation(
            "mosaic_tpu",
            "tpu",
            each(_check_kernel, "mosaic_tpu"),
            each(run_kernel, "mosaic_tpu"),
            note=each(_note_kernel, "mosaic_tpu"),
        ),
        # Hopper only: not offered to a GPU of which nothing is known.
        "mosaic_gpu": Implementation(
            "mosaic_gpu",
            "cuda",
            each(_check_kernel, "mosaic_gpu"),
            each(run_kernel, "mosaic_gpu"),
            needs_chip=True,
            note=each(_note_kernel, "mosaic_gpu"),
        ),
    }


MOE_MLP = _implementations(_run_xla, _run_kernel)
MOE_MLP_GRADIENTS = _implementations(_run_gradients_xla, _run_gradients_kernel)
