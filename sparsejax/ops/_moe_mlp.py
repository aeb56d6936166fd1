"""moe_mlp: the feed-forward network of a mixture of experts, dropless."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from sparsejax._dispatch import Choice
from sparsejax.ops._checks import accumulator, check_floating
from sparsejax.ops._grouped_matmul import grouped_matmul
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
      activation: Any elementwise function of one array.
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
    wide = accumulator(compute)
    e = w_in.shape[0]
    tokens, experts, weights = routing.choices()
    order = jnp.argsort(experts, stable=True)
    tokens, weights = tokens[order], weights[order]
    valid = (experts[order] < e)[:, None]
    product = functools.partial(
        grouped_matmul,
        group_sizes=routing.counts(),
        dtype=compute,
        implementation=implementation,
    )
    rows = x[tokens]
    wide_product = lambda w: product(rows, w).astype(wide)
    up = wide_product(w_in)
    h = activation(up) if w_gate is None else activation(wide_product(w_gate)) * up
    z = product(h.astype(compute), w_out).astype(wide) * weights[:, None].astype(wide)
    y = jnp.zeros(x.shape, wide).at[tokens].add(jnp.where(valid, z, 0))
    return y.astype(compute)


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
    z = jnp.where(experts[:, None] < routing.num_experts, z * weights[:, None], 0)
    return jnp.zeros(x.shape, wide).at[tokens].add(z.astype(wide)).astype(dtype)


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
