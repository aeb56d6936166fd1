"""moe_mlp: the feed-forward network of a mixture of experts, dropless."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Shaped

from pallas_kernels.moe_mlp._activation import captures_traced_values
from sparsejax import _dispatch
from sparsejax._dispatch import Choice
from sparsejax.ops._checks import accumulator, check_floating
from sparsejax.ops._grouped_matmul import grouped_matmul
from sparsejax.ops._moe_mlp_implementations import (
    MOE_MLP,
    MOE_MLP_GRADIENTS,
    Problem,
    composed,
)
from sparsejax.ops._products import batched_by_loop, in_turn
from sparsejax.routing import Routing


def moe_mlp(
    x: Shaped[Array, "..."],
    routing: Routing,
    w_in: Shaped[Array, "..."],
    w_out: Shaped[Array, "..."],
    *,
    w_gate: Shaped[Array, "..."] | None = None,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.silu,
    dtype: jax.typing.DTypeLike | None = None,
    implementation: Choice = None,
) -> Float[Array, "t d"]:
    """Applies to each token the experts that it is routed to.

    ``y[t] = sum over the valid choices (t, e) of weight * h_e(x[t]) w_out[e]``, where
    ``h_e(x) = activation(x w_in[e])``, or with ``w_gate`` ``activation(x w_gate[e]) *
    (x w_in[e])``. No token is dropped, and none is padded: the multiply-adds are those
    of the valid choices.

    Args:
      x: Tokens ``[t, d]``; float32, bfloat16, float16 (float64 on CPU).
      routing: Which token goes to which expert, as routers return it, by token or by
        expert. Traced contents: other choices do not recompile. Differentiated in its
        weights.
      w_in: First weights ``[e, d, f]``.
      w_out: Last weights ``[e, f, d]``.
      w_gate: Weights of the gate ``[e, d, f]``, which the activation is applied to.
      activation: Any elementwise function of one array. One that closes over traced
        values, say a learned slope, is differentiated in them too; the layer is then
        made of grouped products.
      dtype: In which x and the weights are multiplied, and that of y; default, their
        promoted dtype. Sums are float32 in any case, and the gradients of float32
        weights come out of those sums unrounded: keep float32 master weights and pass
        ``dtype=jnp.bfloat16``.
      implementation: "xla", "mosaic_tpu" or "mosaic_gpu"; None chooses and always
        works. A named implementation never falls back.

    Returns:
      y ``[t, d]``; zeros of a token that no expert serves.

    Raises:
      ValueError: Shapes or dtypes do not fit; the implementation's name is unknown.
      NotImplementedError: The named implementation does not serve these shapes, this
        dtype or this platform.

    Example:
      >>> routing = sparsejax.routing.Routing(
      ...     indices=jnp.array([[0], [1]]), weights=jnp.array([[1.0], [0.5]]),
      ...     valid=jnp.array([[True], [True]]), probs=jnp.eye(2))
      >>> w_in, w_out = jnp.ones((2, 2, 3)), jnp.ones((2, 3, 2))
      >>> y = sparsejax.ops.moe_mlp(
      ...     jnp.ones((2, 2)), routing, w_in, w_out, activation=jax.nn.relu)
      >>> print(y)
      [[6. 6.]
       [3. 3.]]

    References:
      Gale et al., `MegaBlocks <https://arxiv.org/abs/2211.15841>`_, 2022, for dropless
      experts; Tan et al., `Scattered Mixture-of-Experts
      <https://arxiv.org/abs/2403.08245>`_, 2024, for products without copies of rows.

    Note:
      Reverse mode to any order, in x, the routing's weights and the experts' weights.
      Forward mode raises JAX's error for ``custom_vjp``; ``moe_mlp_reference`` has it.
    """
    gates = {} if w_gate is None else {"w_gate": w_gate}
    _check(x, routing, w_in, w_out, gates)
    weights_in = dict(w_in=w_in, **gates)
    if dtype is None:  # strict promotion refuses bfloat16 beside float32
        dtypes = [a.dtype for a in (x, *weights_in.values(), w_out)]
        dtype = functools.reduce(jnp.promote_types, dtypes)
    compute = jnp.dtype(dtype)
    check_floating(dtype=jax.ShapeDtypeStruct((), compute))
    ws = (w_in,) if w_gate is None else (w_gate, w_in)
    tokens, experts, weights = _choices(routing)
    if 0 in (*x.shape, *w_in.shape, tokens.size):
        return jnp.zeros(x.shape, compute)
    captures = captures_traced_values(activation, w_in.shape[2])
    by_token = not routing.by_expert
    static = _Static(implementation, compute, activation, captures, by_token)
    operands = x.astype(compute), ws, w_out, weights, tokens, experts
    return _over_explicit_axes(static, *operands)


def moe_mlp_reference(
    x: Float[Array, "t d"],
    routing: Routing,
    w_in: Float[Array, "e d f"],
    w_out: Float[Array, "e f d"],
    *,
    w_gate: Float[Array, "e d f"] | None = None,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.silu,
) -> Float[Array, "t d"]:
    """The equation of ``moe_mlp`` in a few lines: every expert on every token; slow.

    Differentiable in both modes.
    """
    dtype = functools.reduce(jnp.promote_types, [x.dtype, w_in.dtype, w_out.dtype])
    wide = accumulator(dtype)
    product = functools.partial(jnp.einsum, preferred_element_type=wide)
    x, w_in, w_out = (a.astype(dtype) for a in (x, w_in, w_out))
    h = product("td,edf->etf", x, w_in)
    if w_gate is None:
        h = activation(h)
    else:
        h = activation(product("td,edf->etf", x, w_gate.astype(dtype))) * h
    z = product("etf,efd->etd", h.astype(dtype), w_out)
    tokens, experts, weights = routing.choices()
    z = z.at[experts, tokens].get(mode="fill", fill_value=0)
    z = z * weights.astype(wide)[:, None]
    z = jnp.where(experts[:, None] < routing.num_experts, z, 0)
    return jnp.zeros(x.shape, wide).at[tokens].add(z).astype(dtype)


def _check(x, routing, w_in, w_out, gates):
    check_floating(x=x, w_in=w_in, w_out=w_out, **gates)
    if x.ndim != 2:
        raise ValueError(f"x: got shape {x.shape}, needed [t, d]")
    (t, d), e = x.shape, routing.num_experts
    if routing.num_tokens != t:
        raise ValueError(
            f"routing: got {routing.num_tokens} tokens, needed {t}, the rows of x"
        )
    if w_in.ndim != 3 or w_in.shape[:2] != (e, d):
        raise ValueError(f"w_in: got shape {w_in.shape}, needed [{e}, {d}, f]")
    f = w_in.shape[2]
    for name, gate in gates.items():
        if gate.shape != w_in.shape:
            raise ValueError(f"{name}: got shape {gate.shape}, needed {w_in.shape}")
    if w_out.shape != (e, f, d):
        raise ValueError(f"w_out: got shape {w_out.shape}, needed {(e, f, d)}")


def _choices(routing):
    """The choices; one that is out of range is none."""
    if _explicit_axes():
        routing = jax.tree.map(lambda a: jax.sharding.reshard(a, P()), routing)
    tokens, experts, weights = routing.choices()
    t, e = routing.num_tokens, routing.num_experts
    inside = (experts >= 0) & (experts < e) & (tokens >= 0) & (tokens < t)
    experts = jnp.where(inside, experts, e)
    return jnp.clip(tokens, 0, max(t - 1, 0)), experts, weights


# --- The layer and its derivatives ----------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Static:
    """What is fixed while tracing: who computes, in which dtype, and what."""

    choice: Choice
    compute: jnp.dtype
    activation: Callable[[jax.Array], jax.Array]
    captures: bool  # traced values, which no derivative rule of ours would see
    by_token: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _layer(static, x, ws, w_out, weights, tokens, experts):
    return _call(static, x, ws, w_out, weights, tokens, experts)


def _composed(static, x, ws, w_out, weights, tokens, experts):
    """The layer made of grouped products, whose derivatives are theirs."""
    how = dict(dtype=static.compute, implementation=static.choice)
    product = functools.partial(grouped_matmul, **how)
    problem = _problem("moe_mlp", static, x, ws, tokens)
    return composed(product, problem, x, ws, w_out, weights, tokens, experts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gradients(static, x, ws, w_out, weights, tokens, experts, dy):
    """Of x, ws, w_out and weights."""
    return _call_gradients(static, x, ws, w_out, weights, tokens, experts, dy)


def _layer_bwd(static, operands, dy):
    return *_gradients(static, *operands, dy), None, None


def _gradients_bwd(static, operands, cotangents):
    x, ws, w_out, weights, tokens, experts, dy = operands

    def gradients(x, ws, w_out, weights, dy):
        def layer(x, ws, w_out, weights):
            return _composed(static, x, ws, w_out, weights, tokens, experts)

        return jax.vjp(layer, x, ws, w_out, weights)[1](dy)

    *ds, ddy = jax.vjp(gradients, x, ws, w_out, weights, dy)[1](cotangents)
    return *ds, None, None, ddy


_keep = lambda fn: lambda static, *operands: (fn(static, *operands), operands)
_layer.defvjp(_keep(_layer), _layer_bwd)
_gradients.defvjp(_keep(_gradients), _gradients_bwd)


@_dispatch.jit
def _call(static, *operands):
    def call(x, ws, w_out, weights, tokens, experts):
        problem = _problem("moe_mlp", static, x, ws, tokens)
        operands = x, ws, w_out, weights, tokens, experts
        return _dispatch.call(MOE_MLP, static.choice, problem, *operands)

    return _batched_by_tokens(call)(*operands)


@_dispatch.jit
def _call_gradients(static, *operands):
    def call(x, ws, w_out, weights, tokens, experts, dy):
        problem = _problem("moe_mlp_gradients", static, x, ws, tokens)
        operands = x, ws, w_out, weights, tokens, experts, dy
        return _dispatch.call(MOE_MLP_GRADIENTS, static.choice, problem, *operands)

    return batched_by_loop(call, more_rows=False)(*operands)


def _batched_by_tokens(fn):
    """``fn`` whose batch, where members share the weights, is just more tokens."""
    batching = custom_vmap(fn)

    @batching.def_vmap
    def _(size, batched, x, ws, w_out, *choices):
        if any(jax.tree.leaves(batched[1:3])):
            return in_turn(batching, batched, (x, ws, w_out, *choices)), True
        every = lambda a, is_batched: (
            a if is_batched else jnp.broadcast_to(a, (size, *a.shape))
        )
        x, choices = every(x, batched[0]), map(every, choices, batched[3:])
        weights, tokens, experts = choices
        tokens = tokens + x.shape[1] * jnp.arange(size, dtype=tokens.dtype)[:, None]
        flat = weights.ravel(), tokens.ravel(), experts.ravel()
        y = batching(x.reshape(-1, x.shape[2]), ws, w_out, *flat)
        return y.reshape(x.shape), True

    return batching


def _problem(op, static, x, ws, tokens):
    (t, d), (e, _, f) = x.shape, ws[0].shape
    return Problem(
        op=op,
        tokens=t,
        choices=tokens.size,
        d=d,
        f=f,
        experts=e,
        gated=len(ws) == 2,
        by_token=static.by_token,
        dtype=x.dtype.name,
        activation=static.activation,
    )


def _over_explicit_axes(static, x, *rest):
    """The layer under shard_map over a mesh's explicit axes, if any.

    A Mosaic kernel cannot be partitioned by XLA. Where choices are listed by token,
    each device computes its own tokens'; else each computes all.
    """
    layer = _composed if static.captures else _layer

    def local(x, ws, w_out, weights, tokens, experts):
        if static.by_token:
            tokens = tokens - tokens[0]
        leaves, tree = jax.tree.flatten((x, ws, w_out, weights, tokens, experts))
        operands = jax.tree.unflatten(tree, _dispatch.vary_alike(*leaves))
        return layer(static, *operands)

    explicit = _explicit_axes()
    if not explicit:
        return local(x, *rest)
    cut = tuple(jax.typeof(x).sharding.spec)[0] if static.by_token else None
    *weights, _, _, _ = (jax.tree.map(lambda _: P(), each) for each in rest)
    specs = (P(cut, None), *weights, P(cut), P(cut), P(cut))
    args = jax.tree.map(
        lambda spec, a: jax.sharding.reshard(a, spec),
        specs,
        (x, *rest),
        is_leaf=lambda a: isinstance(a, P),
    )
    mapped = jax.shard_map(
        local, in_specs=specs, out_specs=P(cut, None), axis_names=set(explicit)
    )
    return mapped(*args)


def _explicit_axes():
    mesh = jax.sharding.get_abstract_mesh()
    return () if mesh.empty else mesh.explicit_axes
