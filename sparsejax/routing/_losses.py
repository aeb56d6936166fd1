"""Losses that keep experts busy and router logits small; scalars in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped

from sparsejax.routing._choices import check_count, check_scores, jittered, largest
from sparsejax.routing._routing import Routing


def load_balance_loss(
    routing: Routing,
    *,
    counts: Shaped[Array, "..."] | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Float[Array, ""]:
    r"""How far experts are from an even share of tokens; 1 where all are equal.

    .. math::
      L = e \sum_i f_i P_i, \qquad \sum_i f_i = 1, \quad
      P_i = \frac{1}{t} \sum_t \frac{s_{ti}}{\sum_j s_{tj}}

    with f the share of all choices that asked for expert i, before any was turned away,
    and P its mean share of a token's scores s. Both sum to 1, so L is 1 at perfect
    balance and e where all choices and scores are at one expert, for every k, constant
    or not, and for scores that do not sum to 1. Scores are divided by their sum itself:
    there is no epsilon below which a router could shrink them all to lower the loss.
    The gradient goes through P alone.

    Padding has no part in it, nor have tokens whose scores are all 0.

    Args:
      routing: What a router returned.
      counts: Choices per expert ``[e]`` to take f from instead of the routing's own:
        those of a larger batch, such as the sum over accumulated micro-batches.
      axis_name: Mapped axes to sum the counts over. The mean of L over devices, each
        with its own P, is then the loss of the whole batch (if all have as many
        tokens): reduce it as any other mean over tokens.

    Returns:
      The loss, a float32 scalar. It has no side effects: a rematerialized layer counts
      its tokens once.

    Raises:
      ValueError: `counts` is not one number per expert.

    Example:
      >>> from sparsejax.routing import top_k
      >>> even = jnp.array([[1.0, 0.0], [0.0, 1.0]])
      >>> round(float(load_balance_loss(top_k(even, 1))), 6)
      1.0
      >>> round(float(load_balance_loss(top_k(jnp.array([[9.0, 0.0]] * 2), 1))), 3)
      2.0

    References:
      Fedus et al., `Switch Transformers <https://arxiv.org/abs/2101.03961>`_, 2021.
      Counts of a larger batch: Qiu et al., `Demons in the Detail
      <https://arxiv.org/abs/2501.11873>`_, 2025.
    """
    e = routing.num_experts
    if counts is None:
        counts = asked(routing)
    elif counts.shape != (e,):
        raise ValueError(f"counts: got shape {counts.shape}, needed ({e},)")
    if axis_name is not None:
        counts = jax.lax.psum(counts, axis_name)
    counts = jax.lax.stop_gradient(counts).astype(jnp.float32)
    f = counts / jnp.maximum(counts.sum(), 1)
    shares, some = distributions(routing)
    p = shares.sum(0) / jnp.maximum(some.sum(), 1).astype(jnp.float32)
    return e * jnp.sum(f * p)


def importance_loss(routing: Routing) -> Float[Array, ""]:
    r"""Squared coefficient of variation of the experts' sums of scores.

    .. math:: L = \frac{\mathrm{Var}_i\, I_i}{(\mathrm{Mean}_i\, I_i)^2}, \qquad
              I_i = \sum_t \frac{s_{ti}}{\sum_j s_{tj}}

    0 at perfect balance, e - 1 where all is at one expert. Padding has no part in it.

    Args:
      routing: What a router returned.

    Returns:
      The loss, a float32 scalar. Its gradient is 0, not NaN, at perfect balance.

    Example:
      >>> from sparsejax.routing import top_k
      >>> routing = top_k(jnp.log(jnp.array([[0.75, 0.25]])), 1)
      >>> round(float(importance_loss(routing)), 4)  # (1/4)^2 / (1/2)^2
      0.25

    References:
      Shazeer et al., `Outrageously Large Neural Networks
      <https://arxiv.org/abs/1701.06538>`_, 2017.
    """
    shares, _ = distributions(routing)
    return _squared_variation(shares.sum(0))


def load_loss(
    logits: Shaped[Array, "..."],
    k: int,
    *,
    jitter: float | Float[Array, ""],
    key: PRNGKeyArray,
    mask: Shaped[Array, "..."] | None = None,
) -> Float[Array, ""]:
    r"""Squared coefficient of variation of the expected loads under noise.

    .. math::
      L = \frac{\mathrm{Var}_i\, l_i}{(\mathrm{Mean}_i\, l_i)^2}, \qquad
      l_i = \frac{1}{t} \sum_t \Phi\left(\frac{z_{ti} - \theta_t}{\sigma}\right)

    where :math:`\theta_t` is the k-th largest of the noisy logits
    :math:`z_t + \sigma \epsilon_t`, and :math:`\Phi(\cdot)` so the chance that expert i
    would be among the k were its noise drawn again: a count of tokens that has a
    gradient. The noise is that which `top_k` adds for the same `jitter` and `key`.

    Args:
      logits: Router outputs ``[t, e]`` without noise, of any floating dtype; computed
        in float32.
      k: Choices per token.
      jitter: Standard deviation of the noise, :math:`\sigma`, above 0; V-MoE has 1 / e.
      key: The key that `top_k` was given.
      mask: True for tokens, False for padding, bool ``[t]``. None: all are tokens.

    Returns:
      The loss, a float32 scalar; 0 at perfect balance.

    Raises:
      ValueError: `k` is not in [1, e], `jitter` is not positive, shapes do not fit.

    Example:
      >>> logits = jnp.array([[1.0, 0.0], [0.0, 1.0]])
      >>> loss = load_loss(logits, 1, jitter=0.5, key=jax.random.key(0))
      >>> 0 <= float(loss) < 1
      True

    References:
      Shazeer et al., `Outrageously Large Neural Networks
      <https://arxiv.org/abs/1701.06538>`_, 2017, as simplified by Riquelme et al.,
      `Scaling Vision with Sparse Mixture of Experts
      <https://arxiv.org/abs/2106.05974>`_, 2021.
    """
    logits = check_scores(logits, mask)
    k = check_count("k", k, logits.shape[1], "experts")
    if isinstance(jitter, float | int) and jitter <= 0:
        raise ValueError(f"jitter: got {jitter}, needed a positive number")
    noisy = jittered(logits, jitter, key)
    _, indices = largest(noisy, k)
    threshold = jnp.take_along_axis(noisy, indices[:, -1:], 1)
    chance = jax.scipy.stats.norm.cdf(
        (logits - threshold) / jnp.asarray(jitter, jnp.float32)
    )
    return _squared_variation(_mean_over_tokens(chance, mask))


def z_loss(
    logits: Shaped[Array, "..."], mask: Shaped[Array, "..."] | None = None
) -> Float[Array, ""]:
    r"""Mean squared logarithm of the softmax's denominator; keeps logits small.

    .. math:: L = \frac{1}{t} \sum_t \Big(\log \sum_i e^{z_{ti}}\Big)^2

    Args:
      logits: Router outputs ``[t, e]``, of any floating dtype; computed in float32.
      mask: True for tokens, False for padding, bool ``[t]``, whose logits may be
        anything. None: all are tokens.

    Returns:
      The loss, a float32 scalar; 0 if there is no token.

    Raises:
      ValueError: Shapes or dtypes do not fit.

    Example:
      >>> round(float(z_loss(jnp.zeros((3, 4)))), 4)  # log(4)^2
      1.9218

    References:
      Zoph et al., `ST-MoE <https://arxiv.org/abs/2202.08906>`_, 2022.
    """
    logits = check_scores(logits, mask)
    # A token that may go nowhere, all experts at -inf, has no denominator.
    nowhere = jnp.isneginf(logits).all(1, keepdims=True)
    z = jax.nn.logsumexp(jnp.where(nowhere, 0, logits), axis=1)
    return _mean_over_tokens(jnp.where(nowhere[:, 0], 0, z**2), mask)


def entropy(routing: Routing) -> Float[Array, ""]:
    r"""Mean entropy of a token's scores, in nats: low where the router is sure.

    .. math:: H = -\frac{1}{t} \sum_t \sum_i p_{ti} \log p_{ti}, \qquad
              p_{ti} = \frac{s_{ti}}{\sum_j s_{tj}}

    Between 0 and log e. Add it to a loss to sharpen choices, subtract it to keep them
    open. Padding has no part in it, nor have tokens whose scores are all 0.

    Args:
      routing: What a router returned.

    Returns:
      The entropy, a float32 scalar. A score of 0 adds nothing, and has gradient 0.

    Example:
      >>> from sparsejax.routing import top_k
      >>> round(float(entropy(top_k(jnp.zeros((3, 4)), 1))), 4)  # log(4)
      1.3863
    """
    shares, some = distributions(routing)
    each = entropies(shares)
    return each.sum() / jnp.maximum(some.sum(), 1).astype(jnp.float32)


def asked(routing: Routing) -> Int[Array, "e"]:
    """Choices of each expert before any was turned away."""
    return routing.counts() if routing.demand is None else routing.demand


def distributions(
    routing: Routing,
) -> tuple[Float[Array, "t e"], Bool[Array, "t"]]:
    """Scores divided by their sum, and which tokens have a score; 0 for the others."""
    # By the largest first, lest a sum of tiny scores rounds to nothing.
    top = jax.lax.stop_gradient(routing.probs.max(1, keepdims=True))
    some = top != 0
    relative = routing.probs / jnp.where(some, top, 1)
    total = jnp.where(some, relative.sum(1, keepdims=True), 1)
    return relative / total, some[:, 0]


def entropies(shares: Float[Array, "*b e"]) -> Float[Array, "*b"]:
    """Entropy over the last axis, in nats."""
    # 0 log 0 is 0; the logarithm's gradient there is kept out as well.
    return -jnp.sum(shares * jnp.log(jnp.where(shares == 0, 1, shares)), -1)


def _mean_over_tokens(values, mask):
    """Mean over the first axis of what is not padding; 0 if all is."""
    if mask is None:
        return values.sum(0) / max(len(values), 1)
    values = jnp.where(mask.reshape(-1, *[1] * (values.ndim - 1)), values, 0)
    return values.sum(0) / jnp.maximum(mask.sum(), 1).astype(jnp.float32)


def _squared_variation(values):
    # Not by the standard deviation, whose gradient at 0 is NaN.
    mean = values.mean()
    return jnp.where(mean == 0, 0, values.var() / jnp.where(mean == 0, 1, mean) ** 2)
