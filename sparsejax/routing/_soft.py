"""Soft MoE: experts work on mixtures of tokens, tokens get mixtures of outputs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Shaped

from sparsejax.routing._choices import check_mask, check_scores, only_tokens


class SoftRouting(NamedTuple):
    """Which mixtures of tokens experts take, and which of their outputs tokens take.

    Attributes:
      dispatch: Weights of the tokens in each slot, float32 ``[t, e, p]``; sum to 1 over
        tokens, 0 for padding.
      combine: Weights of the slots in each token, float32 ``[t, e, p]``; sum to 1 over
        slots, 0 for padding.
      mask: True for tokens, False for padding, bool ``[t]``; None: all are tokens.
    """

    dispatch: Float[Array, "..."]
    combine: Float[Array, "..."]
    mask: Bool[Array, "..."] | None = None


def soft_logits(
    x: Shaped[Array, "..."],
    slots: Shaped[Array, "..."],
    scale: Shaped[Array, ""] | float = 1.0,
    *,
    mask: Shaped[Array, "..."] | None = None,
) -> Float[Array, "t e p"]:
    """Logits of Soft MoE: scaled cosines of tokens and slot parameters.

    ``l[t, j, i] = scale * x[t] . slots[:, j, i] / (|x[t]| |slots[:, j, i]|)``, of which
    those with a zero vector are 0. Without the norms the softmax collapses onto single
    tokens as the width grows. Costs ``t * d * e * p`` multiply-adds.

    Args:
      x: Tokens ``[t, d]``; computed in float32.
      slots: Parameters ``[d, e, p]``, p slots for each of e experts.
      scale: Learnable scalar, 1 at first.
      mask: True for tokens, False for padding, bool ``[t]``, whose x may be anything,
        and whose logits are 0. None: all are tokens.

    Returns:
      Logits float32 ``[t, e, p]``.

    Raises:
      ValueError: Shapes do not fit.

    Example:
      >>> x = jnp.array([[3.0, 4.0], [0.0, 0.0]])
      >>> print(sparsejax.routing.soft_logits(x, jnp.eye(2)[:, :, None])[:, :, 0])
      [[0.6 0.8]
       [0.  0. ]]

    References:
      Puigcerver et al., `From Sparse to Soft Mixtures of Experts
      <https://arxiv.org/abs/2308.00951>`_, 2023, section 2.3.
    """
    if x.ndim != 2:
        raise ValueError(f"x: got shape {x.shape}, needed [t, d]")
    if slots.ndim != 3 or slots.shape[0] != x.shape[1]:
        raise ValueError(f"slots: got {slots.shape}, needed [{x.shape[1]}, e, p]")
    check_mask(mask, x.shape[0])
    x, slots = _unit(only_tokens(x, mask), axis=1), _unit(slots, axis=0)
    return jnp.asarray(scale, jnp.float32) * jnp.einsum(
        "td,dep->tep", x, slots, precision="highest"
    )


def soft(
    logits: Shaped[Array, "..."], *, mask: Shaped[Array, "..."] | None = None
) -> SoftRouting:
    """Slots are averages of all tokens, tokens averages of all slots' outputs.

    ``dispatch = softmax over tokens``, ``combine = softmax over slots`` of the same
    logits. Nothing is dropped, sorted or discrete; experts have equal loads. Costs
    ``O(t * e * p)``.

    Args:
      logits: ``[t, e, p]``, p slots for each of e experts, as ``soft_logits`` makes
        them; of any floating dtype, computed in float32.
      mask: True for tokens, False for padding, bool ``[t]``. Padding is in no slot, and
        its output is 0.

    Returns:
      A ``SoftRouting``, for ``soft_mlp`` or ``apply_soft``.

    Raises:
      ValueError: Shapes or dtypes do not fit.

    Example:
      >>> logits = jnp.array([[[0.0], [9.0]], [[0.0], [-9.0]]])
      >>> routing = sparsejax.routing.soft(logits)
      >>> print(routing.dispatch[:, :, 0].round(3))  # columns sum to 1
      [[0.5 1. ]
       [0.5 0. ]]
      >>> print(routing.combine[:, :, 0].round(3))  # rows do
      [[0. 1.]
       [1. 0.]]

    References:
      Puigcerver et al., `From Sparse to Soft Mixtures of Experts
      <https://arxiv.org/abs/2308.00951>`_, 2023.

    Note:
      Slots mix all tokens, those after a token included: not for models that predict
      the next token.
    """
    logits = check_scores(logits, mask, axes="[t, e, p]")
    among = None if mask is None else mask[:, None, None]
    return SoftRouting(
        dispatch=jax.nn.softmax(logits, axis=0, where=among),
        combine=only_tokens(jax.nn.softmax(logits, axis=(1, 2)), mask),
        mask=mask,
    )


def apply_soft(
    x: Shaped[Array, "..."],
    routing: SoftRouting,
    expert_fn: Callable[[Array], Array],
) -> Shaped[Array, "t d_out"]:
    """Computes any experts on the slots that a Soft MoE router fills.

    ``y[t] = sum_s combine[t, s] f_s(sum_u dispatch[u, s] x[u])`` over slots s. Costs
    twice ``t * d * e * p`` multiply-adds, and the experts'.

    Args:
      x: Tokens ``[t, d]``.
      routing: What ``soft`` returns for them.
      expert_fn: ``[e, p, d] -> [e, p, d_out]``: p slots of each expert, in x's dtype.

    Returns:
      y ``[t, d_out]`` in the dtype of the experts' output; sums are float32.

    Raises:
      ValueError: Shapes do not fit.

    Example:
      >>> x = jnp.array([[1.0], [5.0]])
      >>> routing = sparsejax.routing.soft(jnp.zeros((2, 1, 1)))
      >>> print(sparsejax.routing.apply_soft(x, routing, lambda slots: 2 * slots))
      [[6.]
       [6.]]
    """
    tokens, experts, slots = routing.dispatch.shape
    if x.ndim != 2 or x.shape[0] != tokens:
        raise ValueError(f"x: got shape {x.shape}, needed [{tokens}, d]")
    # Padding may hold anything; NaN times a weight of 0 would still be NaN.
    rows = only_tokens(x, routing.mask).astype(jnp.float32)
    inputs = jnp.einsum("tep,td->epd", routing.dispatch, rows).astype(x.dtype)
    outputs = expert_fn(inputs)
    if outputs.ndim != 3 or outputs.shape[:2] != (experts, slots):
        raise ValueError(
            f"expert_fn: made {outputs.shape}, needed [{experts}, {slots}, d_out]"
        )
    wide = outputs.astype(jnp.float32)
    y = jnp.einsum("tep,epd->td", routing.combine, wide)
    return y.astype(outputs.dtype)


def soft_mlp(
    x: Shaped[Array, "..."],
    routing: SoftRouting,
    w_in: Shaped[Array, "..."],
    w_out: Shaped[Array, "..."],
    *,
    w_gate: Shaped[Array, "..."] | None = None,
    activation: Callable[[Array], Array] = jax.nn.silu,
    dtype: DTypeLike | None = None,
) -> Shaped[Array, "t d"]:
    """The Soft MoE layer: ``apply_soft`` with the experts of ``ops.moe_mlp``.

    ``f(x) = activation(x w_in) w_out``, or with w_gate ``(activation(x w_gate) * (x
    w_in)) w_out``, by its own weights in each expert.

    Args:
      x: Tokens ``[t, d]``.
      routing: What ``soft`` returns for them.
      w_in: ``[e, d, f]``.
      w_out: ``[e, f, d]``.
      w_gate: ``[e, d, f]``, or None.
      activation: Elementwise.
      dtype: In which x and the weights are multiplied, and that of y; default, their
        promoted dtype.

    Returns:
      y ``[t, d]``.

    Raises:
      ValueError: Shapes do not fit.

    Example:
      >>> x, w = jnp.ones((4, 8)), jnp.ones((2, 8, 16))
      >>> routing = sparsejax.routing.soft(jnp.zeros((4, 2, 3)))
      >>> y = sparsejax.routing.soft_mlp(x, routing, w, w.mT, activation=jax.nn.relu)
      >>> print(y.shape, y[0, 0])
      (4, 8) 128.0
    """
    experts = routing.dispatch.shape[1]
    if w_in.ndim != 3 or x.ndim != 2 or w_in.shape[:2] != (experts, x.shape[1]):
        raise ValueError(
            f"w_in: got {w_in.shape} for x {x.shape}, needed [{experts}, d, f]"
        )
    if w_out.shape[:2] != (experts, w_in.shape[2]) or w_out.ndim != 3:
        raise ValueError(
            f"w_out: got {w_out.shape}, needed [{experts}, {w_in.shape[2]}, d]"
        )
    if w_gate is not None and w_gate.shape != w_in.shape:
        raise ValueError(f"w_gate: got {w_gate.shape}, needed {w_in.shape}")
    dtype = jnp.result_type(x.dtype, w_in.dtype) if dtype is None else dtype

    def product(x: Any, w: Any) -> Any:
        return jnp.einsum("epd,edf->epf", x, w.astype(dtype))

    def experts_of(inputs: Any) -> Any:
        hidden = product(inputs, w_in)
        if w_gate is None:
            hidden = activation(hidden)
        else:
            hidden = activation(product(inputs, w_gate)) * hidden
        return product(hidden, w_out)

    return apply_soft(x.astype(dtype), routing, experts_of)


def _unit(vectors: Array, axis: int) -> Float[Array, "..."]:
    """Vectors of length 1, in float32; those of length 0 stay, without a gradient."""
    vectors = vectors.astype(jnp.float32)
    largest = jnp.max(jnp.abs(vectors), axis=axis, keepdims=True)
    some = largest > 0
    # Relative to the largest entry, whose square may be no float32.
    vectors = vectors / jax.lax.stop_gradient(jnp.where(some, largest, 1))
    squares = jnp.sum(vectors * vectors, axis=axis, keepdims=True)
    return vectors * jnp.where(some, jax.lax.rsqrt(jnp.where(some, squares, 1)), 0)
