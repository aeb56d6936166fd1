"""A linear projection per expert, of the tokens that chose it."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsejax._dispatch import Choice
from sparsejax.ops import grouped_matmul
from sparsejax.routing import Routing

_FORMS = ("mix", "split", "join")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupedProjectionSpec:
    """What a projection per expert is made of.

    Attributes:
      in_features: d, size of x's last axis.
      out_features: n, size of y's last axis.
      num_experts: e.
      form: Of every token's k choices, of experts i_j with weights w_j,
        "mix": y = sum_j w_j x W[i_j], from ``[..., d]`` to ``[..., n]``;
        "split": y_j = x W[i_j], from ``[..., d]`` to ``[..., k, n]``;
        "join": y = sum_j w_j x_j W[i_j], from ``[..., k, d]`` to ``[..., n]``.
        A mixture of attention splits into the queries of each choice and joins their
        heads' outputs.
      gain: Factor of the initial kernel; sqrt(k) lets a mix or join of k weights that
        sum to 1 keep the variance of x.
      dtype: In which products are computed; None: promoted from x and the kernel.
      param_dtype: In which the kernel is kept.
      implementation: As for ``ops.grouped_matmul``.
    """

    in_features: int
    out_features: int
    num_experts: int
    form: str = "mix"
    gain: float = 1.0
    dtype: Any = None
    param_dtype: Any = jnp.float32
    implementation: Choice = None

    def __post_init__(self):
        for name in ("in_features", "out_features", "num_experts"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name}: got {getattr(self, name)}, needed a positive int"
                )
        if self.form not in _FORMS:
            raise ValueError(f"form: got {self.form!r}, needed one of {_FORMS}")


def init_grouped_projection(
    key: Array, spec: GroupedProjectionSpec
) -> dict[str, Array]:
    """Draws the kernel, normal with variance gain^2 / d.

    Args:
      key: PRNG key.
      spec: The layer.

    Returns:
      {"kernel" [e, d, n]}.
    """
    shape = (spec.num_experts, spec.in_features, spec.out_features)
    std = spec.gain * spec.in_features**-0.5
    kernel = std * jax.random.normal(key, shape, jnp.float32)
    return {"kernel": kernel.astype(spec.param_dtype)}


def apply_grouped_projection(
    spec: GroupedProjectionSpec,
    params: dict[str, Array],
    x: Float[Array, "..."],
    routing: Routing,
) -> Float[Array, "..."]:
    """Projects every token by the experts that it chose, in one grouped product.

    Costs 2 c d n operations for c choices, and memory for c rows of x and of y.

    Args:
      spec: The layer.
      params: As from ``init_grouped_projection``.
      x: ``[..., d]``, or ``[..., k, d]`` to join; all axes before are the tokens.
      routing: Of these tokens to ``spec.num_experts`` experts.

    Returns:
      y ``[..., n]``, or ``[..., k, n]`` if split, where choices that are not valid are
      0. A token without a valid choice is 0.

    Raises:
      ValueError: x is not of ``routing``'s tokens (or choices, to join) or of
        ``spec.in_features``; the experts are not ``spec.num_experts``; choices listed
        by expert are to be split or joined.

    Example:
      >>> from sparsejax import layers, routing
      >>> project = lambda form, d, n: layers.GroupedProjectionSpec(
      ...     in_features=d, out_features=n, num_experts=4, form=form)
      >>> x = jax.random.normal(jax.random.key(0), (3, 5, 8))
      >>> choice = routing.top_k(x.reshape(15, 8)[:, :4], 2, normalize="sum")
      >>> queries, outputs = project("split", 8, 6), project("join", 6, 8)
      >>> w = layers.init_grouped_projection(jax.random.key(1), queries)
      >>> q = layers.apply_grouped_projection(queries, w, x, choice)
      >>> w = layers.init_grouped_projection(jax.random.key(2), outputs)
      >>> q.shape, layers.apply_grouped_projection(outputs, w, q, choice).shape
      ((3, 5, 2, 6), (3, 5, 8))

    References:
      Zhang et al., "Mixture of Attention Heads: Selecting Attention Heads Per Token",
      EMNLP 2022.
    """
    batch = _check(spec, x, routing)
    x = x.reshape(-1, spec.in_features)
    tokens, experts, weights = routing.choices()
    order = jnp.argsort(experts)  # choices that are not valid come last
    dtype = spec.dtype or jnp.promote_types(x.dtype, params["kernel"].dtype)
    source = order if spec.form == "join" else tokens[order]
    y = grouped_matmul(
        x.astype(dtype)[source],
        params["kernel"],
        routing.counts(),
        dtype=dtype,
        implementation=spec.implementation,
    )
    if spec.form == "split":
        y = jnp.zeros_like(y).at[order].set(y, unique_indices=True)
        return y.reshape(*batch, -1, spec.out_features)
    y = y.astype(jnp.float32) * weights[order][:, None]
    total = jnp.zeros((routing.num_tokens, spec.out_features), jnp.float32)
    total = total.at[tokens[order]].add(y)
    return total.astype(dtype).reshape(*batch, spec.out_features)


def _check(spec, x, routing):
    """The shape of x's tokens."""
    if routing.num_experts != spec.num_experts:
        raise ValueError(
            f"routing: got {routing.num_experts} experts, needed {spec.num_experts}"
        )
    if spec.form != "mix" and routing.by_expert:
        raise ValueError(
            f"routing: got choices listed by expert, needed k per token to "
            f"{spec.form} them"
        )
    t = routing.num_tokens
    ends = (spec.in_features,)
    if spec.form == "join":
        ends = (routing.indices.shape[1], *ends)
    batch = x.shape[: -len(ends)]
    if x.shape[len(batch) :] != ends or math.prod(batch) != t:
        raise ValueError(
            f"x: got {x.shape}, needed [..., {', '.join(map(str, ends))}] of the "
            f"routing's {t} tokens"
        )
    return batch
