"""What experts are made of: one feed-forward layer -> the arrays of a MoE layer.

A mode is two pure functions of one layer: ``weights`` makes the experts,
``moments`` does to an optimizer's running means of gradients (power 1) or of their
squares (power 2) what the change of weights does to gradients. Names of arrays: w_in
``[d, f]``, w_gate ``[d, f]`` (gated only) and w_out ``[f, d]`` of the dense layer;
with a leading axis of experts e those of the MoE layer.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

Arrays = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Copy:
    """Every expert is the dense layer, with noise if wanted (sparse upcycling).

    The gradient of the dense layer is then the sum of its copies' gradients, so each
    has 1 / e of it in the mean: the factor of "rescale".

    Attributes:
      noise: Standard deviation of the normal noise added to each expert, in units of
        the standard deviation of the weight.

    References:
      Komatsuzaki et al., "Sparse Upcycling: Training Mixture-of-Experts from Dense
      Checkpoints", ICLR 2023.
    """

    noise: float = 0.0

    def __post_init__(self):
        _need(self.noise >= 0, "noise", self.noise, "at least 0")

    def weights(self, ffn: Arrays, like: Arrays, gain: float, key: Any) -> Arrays:
        """[d, f] -> [e, d, f]: w + noise * std(w) * normal."""
        experts = {role: _copies(w, like) for role, w in ffn.items()}
        return _with_noise(experts, ffn, self.noise, key)

    def moments(
        self, ffn: Arrays, like: Arrays, gain: float, key: Any, power: int
    ) -> Arrays:
        """m -> m / e^power for each expert."""
        e = _experts(like)
        return {role: _copies(m, like) / e**power for role, m in ffn.items()}


@dataclasses.dataclass(frozen=True)
class Granular:
    """Expert i is shard i % groups of the dense layer's hidden units, scaled.

    The shards of one copy of the dense layer are a virtual group: their columns of
    the router begin equal, so that tokens choose whole groups and k experts, k a
    multiple of ``groups``, are k / groups dense layers. Their mean weight is 1 / k, and
    each is a ``groups``-th of the layer's sum, so the product of all scales must be
    ``groups``; e groups / k where weights are not normalized, exact only for a router
    that is uniform.

    Attributes:
      groups: G, shards that the hidden units are split into; divides f and e.
      scale: "out": on w_out alone, which is exact for every activation. "spread": the
        root of it on each matrix, as NVIDIA train, who found it better; exact only if
        the activation is positively homogeneous.
      homogeneous: p with activation(a x) = a^p activation(x) for a > 0: 1 for relu, 2
        for its square; None: there is none, as of silu and gelu. Of "spread" alone.

    References:
      He et al., "Upcycling Large Language Models into Mixture of Experts", 2024.
    """

    groups: int
    scale: str = "out"
    homogeneous: int | None = None

    def __post_init__(self):
        _need(self.groups >= 1, "groups", self.groups, "at least 1")
        _need(self.scale in ("out", "spread"), "scale", self.scale, "'out' or 'spread'")

    def scales(self, gated: bool, gain: float) -> dict[str, float]:
        """Factor of each matrix, such that the layer's output is times ``gain``."""
        if self.scale == "out":
            return {"w_in": 1.0, "w_gate": 1.0, "w_out": gain}
        # a^p for what the activation sees, a for every other matrix.
        a = gain ** (1 / ((self.homogeneous or 1) + 1 + gated))
        return {"w_in": a, "w_gate": a, "w_out": a}

    def weights(self, ffn: Arrays, like: Arrays, gain: float, key: Any) -> Arrays:
        """[d, f] -> [e, d, f / G], times the scale."""
        scales = self.scales("w_gate" in ffn, gain)
        return {r: self._shards(r, w, like) * scales[r] for r, w in ffn.items()}

    def moments(
        self, ffn: Arrays, like: Arrays, gain: float, key: Any, power: int
    ) -> Arrays:
        """The shards of m over (e / G times the scale)^power."""
        scales = self.scales("w_gate" in like, gain)
        copies = _experts(like) // self.groups
        return {
            role: self._shards(role, m, like) / (copies * scales[role]) ** power
            for role, m in ffn.items()
        }

    def router(self, draw: Any) -> Any:
        """Columns [d, e] of which those of each virtual group are equal."""
        return jnp.repeat(draw[:, :: self.groups], self.groups, axis=1)

    def _shards(self, role, w, like):
        axis = 0 if role == "w_out" else 1
        shards = jnp.stack(jnp.split(w, self.groups, axis))
        return jnp.tile(shards, (_experts(like) // self.groups, 1, 1))


@dataclasses.dataclass(frozen=True)
class Drop:
    """Copies of which each draws a share of its hidden units anew (Drop-Upcycling).

    The units differ from expert to expert, and are the same in w_in, w_gate and
    w_out of one expert: a unit is new altogether or kept altogether. New entries are
    normal, with mean and standard deviation of the entries that they replace. Their
    moments begin at zero.

    Attributes:
      fraction: r, share of the hidden units drawn anew; round(r f) of them.

    References:
      Nakamura et al., "Drop-Upcycling: Training Sparse Mixture of Experts with Partial
      Re-initialization", ICLR 2025.
    """

    fraction: float = 0.5

    def __post_init__(self):
        holds = 0 <= self.fraction <= 1
        _need(holds, "fraction", self.fraction, "0 to 1")

    def count(self, units: int) -> int:
        """Hidden units drawn anew, of so many."""
        return round(self.fraction * units)

    def weights(self, ffn: Arrays, like: Arrays, gain: float, key: Any) -> Arrays:
        """where(new, mean + std * normal, w), by expert."""
        new = self._new(like, key)
        experts = {}
        for role, k in zip(ffn, _split(key, ffn), strict=True):
            w = _copies(ffn[role], like).astype(jnp.float32)
            where = jnp.broadcast_to(_along_units(role, new), w.shape)
            over = {"axis": (1, 2), "keepdims": True, "where": where}
            # A mean of nothing would be NaN.
            mean, std = (
                (jnp.mean(w, **over), jnp.std(w, **over))
                if self.count(new.shape[-1])
                else (0.0, 0.0)
            )
            drawn = mean + std * jax.random.normal(k, w.shape)
            experts[role] = jnp.where(where, drawn, w).astype(ffn[role].dtype)
        return experts

    def moments(
        self, ffn: Arrays, like: Arrays, gain: float, key: Any, power: int
    ) -> Arrays:
        """m / e^power, and 0 where the weight is new."""
        new, e = self._new(like, key), _experts(like)
        moments = {role: _copies(m, like) / e**power for role, m in ffn.items()}
        return {
            role: jnp.where(_along_units(role, new), jnp.zeros_like(m), m)
            for role, m in moments.items()
        }

    def _new(self, like, key):
        """Bool [e, f], count True in each row."""
        e, f, _ = like["w_out"].shape
        first = jnp.arange(f) < self.count(f)
        keys = jax.random.split(jax.random.fold_in(key, 1), e)
        return jax.vmap(lambda key: jax.random.permutation(key, first))(keys)


@dataclasses.dataclass(frozen=True)
class Shared:
    """The dense layer becomes the shared expert; routed copies of it begin silent.

    Routed experts have its w_in and w_gate and a w_out of zeros: exact for every
    router, every k and every capacity. Moments of routed experts begin at zero.

    Attributes:
      noise: Of the routed experts' w_in and w_gate, as in ``Copy``; no loss of
        exactness.
    """

    noise: float = 0.0

    def __post_init__(self):
        _need(self.noise >= 0, "noise", self.noise, "at least 0")

    def weights(self, ffn: Arrays, like: Arrays, gain: float, key: Any) -> Arrays:
        """[d, f] -> shared [d, f], routed [e, d, f] with w_out 0."""
        experts = {role: _copies(w, like) for role, w in ffn.items()}
        experts = _with_noise(experts, ffn, self.noise, key)
        experts["w_out"] = jnp.zeros_like(experts["w_out"])
        return {**experts, **_as_shared(ffn)}

    def moments(
        self, ffn: Arrays, like: Arrays, gain: float, key: Any, power: int
    ) -> Arrays:
        """The shared expert keeps its own, the routed ones begin at zero."""
        routed = {role: jnp.zeros_like(_copies(m, like)) for role, m in ffn.items()}
        return {**routed, **_as_shared(ffn)}


@dataclasses.dataclass(frozen=True)
class Adapters:
    """The dense layer stays, as the shared expert; routed adapters act on its OUTPUT.

    y = h + sum_j w_j (activation(h w_in_j) w_out_j) with h the dense layer's output,
    w_in ``[e, d, r]`` and w_out ``[e, r, d]`` narrow: low-rank updates where the
    activation is the identity, adapters where it is not. Exact for every router if
    ``up`` is 0. The report lists the frozen paths, to be left out of training. With
    ``ops.moe_mlp``: ``h + moe_mlp(h, routing, w_in, w_out, ...)``.

    Attributes:
      down: Standard deviation of w_in (and w_gate); None: d^-1/2.
      up: Standard deviation of w_out.

    References:
      Wu et al., "Parameter-Efficient Sparsity Crafting from Dense to Mixture-of-Experts
      for Instruction Tuning on General Tasks", EMNLP 2024.
    """

    down: float | None = None
    up: float = 0.0

    def __post_init__(self):
        _need((self.down or 0) >= 0, "down", self.down, "at least 0")
        _need(self.up >= 0, "up", self.up, "at least 0")

    def weights(self, ffn: Arrays, like: Arrays, gain: float, key: Any) -> Arrays:
        """Shared [d, f] as they are, adapters [e, d, r] and [e, r, d] drawn."""
        roles = [role for role in ("w_in", "w_gate", "w_out") if role in like]
        d = like["w_in"].shape[1]
        down = d**-0.5 if self.down is None else self.down
        stds = {"w_in": down, "w_gate": down, "w_out": self.up}
        adapters = {
            role: _normal(k, like[role], stds[role])
            for role, k in zip(roles, _split(key, roles), strict=True)
        }
        return {**adapters, **_as_shared(ffn)}

    def moments(
        self, ffn: Arrays, like: Arrays, gain: float, key: Any, power: int
    ) -> Arrays:
        """The dense layer keeps its own."""
        return _as_shared(ffn)


Mode = Copy | Granular | Drop | Shared | Adapters


def roles_of(mode: Mode, gated: bool, like: Arrays) -> set[str]:
    """Names of the arrays that a mode makes for a MoE layer."""
    roles = {"router", "w_in", "w_out"}
    if gated and not isinstance(mode, Adapters):
        roles.add("w_gate")
    if isinstance(mode, Shared | Adapters):
        roles |= {"shared_in", "shared_out"} | ({"shared_gate"} if gated else set())
    optional = {"balance", *(["w_gate"] if isinstance(mode, Adapters) else [])}
    return roles | (optional & set(like))


def fit(mode: Mode, ffn: Arrays, like: Arrays) -> str | None:
    """Why the sizes of a layer do not fit; None: they do."""
    d, f = ffn["w_in"].shape
    e, _, hidden = like["w_in"].shape
    if isinstance(mode, Adapters):
        return None
    groups = mode.groups if isinstance(mode, Granular) else 1
    if f % groups or e % groups:
        return f"{f} hidden units and {e} experts, needed multiples of groups {groups}"
    if hidden != f // groups:
        return (
            f"{hidden} hidden units of an expert, needed {f // groups} of the "
            f"source's {f}"
        )
    return None


def _need(holds, argument, got, needed):
    if not holds:
        raise ValueError(f"{argument}: got {got}, needed {needed}")


def _experts(like):
    return like["w_in"].shape[0]


def _copies(w, like):
    return jnp.broadcast_to(w, (_experts(like), *w.shape))


def _as_shared(ffn):
    return {role.replace("w_", "shared_"): w for role, w in ffn.items()}


def _split(key, roles):
    return list(jax.random.split(key, len(roles)))


def _normal(key, like, std):
    return (std * jax.random.normal(key, like.shape)).astype(like.dtype)


def _with_noise(experts, ffn, noise, key):
    """W + noise * std(w) * normal, in float32."""
    if not noise:
        return experts
    noisy = {}
    for role, k in zip(experts, _split(key, experts), strict=True):
        w = experts[role]
        std = jnp.std(ffn[role].astype(jnp.float32))
        draw = std * noise * jax.random.normal(k, w.shape)
        noisy[role] = (w.astype(jnp.float32) + draw).astype(w.dtype)
    return noisy


def _along_units(role, mask):
    """[e, f] beside [e, d, f], or [e, f, d] of w_out."""
    return mask[:, :, None] if role == "w_out" else mask[:, None, :]
