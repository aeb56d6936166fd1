"""From all experts to a few: a temperature that falls while the gate trains."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from sparsejax.routing._choices import (
    NORMALIZE,
    check_bound,
    check_count,
    check_option,
    check_scores,
    largest,
    only_tokens,
    score_all,
    weigh,
)
from sparsejax.routing._routing import Routing
from sparsejax.routing._sinkhorn import check_temperature


def dense_to_sparse(
    logits: Shaped[Array, "..."],
    k: int,
    *,
    temperature: float | Float[Array, ""],
    threshold: float | Float[Array, ""] = 1e-3,
    max_k: int | None = None,
    normalize: str = "none",
    mask: Shaped[Array, "..."] | None = None,
    key: PRNGKeyArray | None = None,
) -> Routing:
    r"""Uses every expert of some weight, of which a falling temperature leaves k.

    .. math::
      g_t = \mathrm{softmax}\left(\frac{z_t + \zeta}{\tau}\right), \qquad
      S_t = \{i : g_{ti} > \theta\} \cup \mathrm{top}_k(g_t)

    At a high temperature all weights are about 1 / e, and all experts learn from every
    token; as it falls, fewer are above the threshold, until the k best are left. Both
    numbers may be traced, so that a schedule moves them without compiling anew::

        temperature = schedules.linear(step, initial=2.0, final=0.3, end=10_000)

    The work falls with the number of choices, the arrays keep their `max_k` places.
    With ``max_k=k`` or a threshold of 1 it is `top_k` of the logits over the
    temperature.

    Args:
      logits: Router outputs ``[t, e]``, of any floating dtype; computed in float32.
      k: Choices that a token has at least.
      temperature: :math:`\tau > 0`; the paper goes from 2 to 0.3 or less.
      threshold: Weight above which an expert is used, :math:`\theta`.
      max_k: Choices that a token has at most, the number of places; experts beyond it
        are counted in ``demand``. None: e.
      normalize: As for `top_k`, over the choices that are used.
      mask: True for tokens, False for padding, bool ``[t]``, which is not routed.
        None: all are tokens.
      key: Adds Gumbel noise :math:`\zeta`, as the paper does in training. None: none.

    Returns:
      A ``Routing`` of variable k, a token's choices in falling order of weight, ties to
      the expert of lowest index; ``probs`` are the g of all experts.

    Raises:
      ValueError: `k` is not in [1, e] or `max_k` not in [k, e], a temperature that is
        not positive, shapes that do not fit.

    Example:
      >>> logits = jnp.array([[0.0, 1.0, 2.0, 3.0]])
      >>> route = lambda tau: dense_to_sparse(logits, 1, temperature=tau)
      >>> [int(route(tau).valid.sum()) for tau in (9.0, 0.4, 0.1)]
      [4, 3, 1]

    References:
      Nie et al., `EvoMoE: An Evolutional Mixture-of-Experts Training Framework via
      Dense-To-Sparse Gate <https://arxiv.org/abs/2112.14397>`_, 2021.
    """
    logits = check_scores(logits, mask)
    e = logits.shape[1]
    k, bound = check_count("k", k, e, "experts"), check_bound(max_k, e)
    if bound < k:
        raise ValueError(f"max_k: got {max_k}, needed at least k, {k}")
    temperature = check_temperature(temperature)
    check_option("normalize", normalize, NORMALIZE)
    if key is not None:
        logits = logits + jax.random.gumbel(key, logits.shape, jnp.float32)
    logits = logits / temperature
    gates, log_gates, _ = score_all(logits, "softmax")

    tokens = True if mask is None else mask[:, None]
    above = tokens & ~(gates <= threshold)  # NaN as well, to be seen in the output
    best, indices = largest(logits, bound)
    surely = tokens & ~jnp.isneginf(best[:, :k])
    used = jnp.take_along_axis(above, indices, 1)
    # All that are above the threshold, and of the k best those that are not.
    below = jnp.where(surely & ~used[:, :k], indices[:, :k], e)
    demand = above.sum(0, dtype=jnp.int32).at[below].add(1, mode="drop")
    valid = used.at[:, :k].set(surely)
    return Routing(
        indices=indices,
        weights=weigh(gates, log_gates, indices, valid, normalize),
        valid=valid,
        probs=only_tokens(gates, mask),
        mask=mask,
        demand=demand,
    )
