"""Whether an upcycled network computes what the dense one did, and why."""

import dataclasses
import functools
import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from sparsejax import routing
from sparsejax.upcycling._modes import Adapters, Copy, Drop, Granular, Mode, Shared


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Report:
    """What ``upcycle`` made, in words and numbers; ``print`` it.

    A pytree without leaves, so that a jitted function can return it.

    Attributes:
      exact: Whether the MoE computes what the dense model did, padding tokens apart, to
        the rounding of the dtype. False where it is not known.
      reasons: Why, or why not.
      router_gradient: Whether the router has a gradient at the first step.
      warnings: What to know before training.
      layers: Paths of the MoE layers in the target.
      unmatched: Leaves of the source that nothing was made of.
      given: Leaves of the target whose values were given.
      frozen: Leaves of the target that are to be left out of training (``Adapters``).
    """

    exact: bool
    reasons: tuple[str, ...]
    router_gradient: bool
    warnings: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    unmatched: tuple[str, ...] = ()
    given: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()

    def __str__(self):
        lines = [f"exact: {'yes' if self.exact else 'no'} ({', '.join(self.reasons)})"]
        lines += [f"warning: {warning}" for warning in self.warnings]
        for name in ("layers", "unmatched", "given", "frozen"):
            values = getattr(self, name)
            if values:
                lines.append(f"{name}: {', '.join(values)}")
        return "\n".join(lines)


class Judgement(NamedTuple):
    """The part of a report that follows from mode and router."""

    exact: bool
    reasons: tuple[str, ...]
    router_gradient: bool
    warnings: tuple[str, ...]


# Routers that give every token an expert at least, and weights by ``normalize``.
_KNOWN = (
    routing.top_k,
    routing.top_p,
    routing.threshold,
    routing.dense_to_sparse,
    routing.sinkhorn,
    routing.hash_routing,
)


def arguments_of(router: Any) -> dict[str, Any] | None:
    """Arguments that a known router is called with, and its name; None of another."""
    given = {}
    while isinstance(router, functools.partial):
        if router.args:  # logits are the caller's
            return None
        given = {**router.keywords, **given}
        router = router.func
    if router not in _KNOWN:
        return None
    defaults = {
        name: p.default
        for name, p in inspect.signature(router).parameters.items()
        if p.default is not p.empty
    }
    return {**defaults, **given, "router": router.__name__}


def gain_of(mode: Mode, router: Any, experts: int) -> float:
    """What ``Granular`` scales the output by.

    k experts of mean weight 1 / k, of G to a dense layer: G. Weights that are not
    normalized are 1 / e of a uniform router: e G / k.
    """
    if not isinstance(mode, Granular):
        return 1.0
    found = arguments_of(router)
    if found is None or found["router"] != "top_k" or "k" not in found:
        raise ValueError(
            "router: got None or an unknown function, needed a functools.partial of "
            "routing.top_k with k: the scale of Granular follows from it"
        )
    if _normalized(found, experts) or found["score"] == "sigmoid":
        return float(mode.groups)
    return experts * mode.groups / found["k"]


def judge(
    mode: Mode,
    router: Any,
    tokens: int | None,
    experts: Sequence[int],
    units: Sequence[int],
    router_given: bool,
) -> Judgement:
    """Whether a mode is exact under a router.

    Args:
      mode: How the experts are made.
      router: As in ``Spec``.
      tokens: As in ``Spec``.
      experts: How many the layers have.
      units: Hidden units of an expert of each layer.
      router_given: Whether a router's kernel is other than the mode would make it.

    Raises:
      ValueError: More experts are chosen per token than there are.
    """
    found = arguments_of(router)
    k = None if found is None else found.get("k")
    for e in experts:
        if k is not None and not 1 <= k <= e:
            raise ValueError(f"router: got k={k}, needed 1 to {e}, the experts")
    if isinstance(mode, Shared) or (isinstance(mode, Adapters) and mode.up == 0):
        why = "routed experts begin at zero beside the dense layer"
        warnings = (
            "the router has no gradient until the experts' w_out have moved",
            *_always_one(found),
        )
        return Judgement(True, (why, "any gate and capacity"), False, warnings)

    yes, no = [], []
    _judge_experts(mode, found, units, router_given, yes, no)
    if isinstance(mode, Adapters):
        no = ["adapters' w_out are not zero"]
    else:
        _judge_weights(found, tokens, experts, yes, no)

    identical = isinstance(mode, Copy) and mode.noise == 0
    identical |= isinstance(mode, Drop) and not any(map(mode.count, units))
    identical |= isinstance(mode, Granular) and mode.groups == 1
    in_gradient = found is not None and all(
        _differentiably_one(found, e) for e in experts
    )
    warnings = list(_always_one(found))
    gradient = not (identical and in_gradient) and not warnings
    if identical and in_gradient and not warnings:
        warnings = [
            "the router has no gradient while experts are identical, since weights are "
            "divided by their sum: normalize='sum_stopgrad' gives it one, or noise"
        ]
    return Judgement(not no, tuple(no or yes), gradient, tuple(warnings))


def _judge_experts(mode, found, units, router_given, yes, no):
    """Whether the experts that a token chooses average to the dense layer."""
    if isinstance(mode, Copy):
        if mode.noise:
            no.append(f"experts have noise of {mode.noise:g}")
        else:
            yes.append("experts identical")
    elif isinstance(mode, Drop):
        if any(map(mode.count, units)):
            no.append(f"{mode.fraction:.0%} of each expert's hidden units are new")
        else:
            yes.append("experts identical")
    elif isinstance(mode, Granular):
        groups = mode.groups
        if found is not None and found.get("k", groups) % groups:
            no.append(f"k={found['k']} does not choose whole groups of {groups}")
        if router_given and groups > 1:
            no.append("the router was given, not made for virtual groups")
        if found is not None and groups > 1:
            if not _is_zero(found["jitter"]):
                no.append("jitter tells the experts of a group apart")
            if found["groups_kept"] is not None:
                no.append("groups_kept may tell the experts of a group apart")
            if found["bias"] is not None:
                no.append("a bias may tell the experts of a group apart")
        if mode.scale == "spread" and groups > 1 and mode.homogeneous is None:
            no.append("the scale is spread over an activation that is not homogeneous")
        yes.append("every group is the dense layer, scaled")


def _judge_weights(found, tokens, experts, yes, no):
    """Whether the weights of every token's experts sum to 1."""
    if found is None:
        no.append("of this router it is not known that gates sum to 1 for every token")
        return
    if all(_normalized(found, e) for e in experts):
        yes.append("gates sum to 1")
    else:
        no.append(f"gates do not sum to 1 (normalize={found['normalize']!r})")
    if found["router"] == "threshold" and not found["at_least_one"]:
        no.append("a token that reaches no threshold has no expert")
    if found["router"] == "hash_routing" and found["table"] is not None:
        no.append("an id that is not in the table has no expert")
    capacity = found.get("capacity")
    if capacity is None:
        yes.append("no drops")
    elif tokens is not None and capacity >= tokens:
        yes.append(f"a capacity of {capacity} drops none of {tokens} tokens")
    elif found["renormalize"]:
        no.append(f"a capacity of {capacity} may leave a token without an expert")
    else:
        no.append(f"a capacity of {capacity} may drop choices")


def _normalized(found, e):
    """Whether weights sum to 1 before any is dropped."""
    divided = found["normalize"] in ("sum", "sum_stopgrad")
    return divided or _differentiably_one(found, e)


def _differentiably_one(found, e):
    """Whether that sum is 1 whatever the logits, so that it has no gradient."""
    score = found.get("score", "softmax")
    all_of_softmax = (
        score == "softmax" and _exactly(found) == e and found["normalize"] == "none"
    )
    return found["normalize"] == "sum" or score == "softmax_chosen" or all_of_softmax


def _exactly(found):
    """Choices of every token, where all have as many."""
    counted = found["router"] in ("top_k", "sinkhorn", "hash_routing")
    return found.get("k") if counted and found.get("table") is None else None


def _always_one(found):
    """The weight of a single expert, divided by itself."""
    if found is not None and _exactly(found) == 1:
        if found["normalize"] == "sum" or found.get("score") == "softmax_chosen":
            return (
                "the router never has a gradient: the weight of the one expert is "
                "divided by itself; take normalize='none' or 'sum_stopgrad'",
            )
    return ()


def _is_zero(jitter):
    return isinstance(jitter, int | float) and jitter == 0
