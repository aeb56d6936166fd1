"""What the report calls exact is, and what it does not is not: measured.

The dense layer and the mixture are loops over experts in float64 numpy; routing alone
is the library's, as a model would use it. test_modules.py has all of it in modules.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import routing, upcycling

T, D, F, E = 96, 8, 24, 8

ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "identity": lambda x: x,
}


def ffn(x, w_in, w_out, w_gate, act):
    """(act(x w_in)) w_out, or (act(x w_gate) * (x w_in)) w_out."""
    up = x @ w_in
    hidden = act(up) if w_gate is None else act(x @ w_gate) * up
    return hidden @ w_out


def mixture(x, moe, chosen, act, adapters):
    """y_t = shared(x_t) + sum_j w_tj expert_j(x_t), of x's output for adapters."""
    moe = {name: np.asarray(w, np.float64) for name, w in moe.items()}
    y = np.zeros_like(x)
    if "shared_in" in moe:
        y = ffn(x, moe["shared_in"], moe["shared_out"], moe.get("shared_gate"), act)
    seen = y if adapters else x
    gate = moe.get("w_gate", [None] * E)
    experts = [
        ffn(seen, moe["w_in"][i], moe["w_out"][i], gate[i], act)
        for i in range(len(moe["w_in"]))
    ]
    total = y.copy()
    for token, expert, weight in zip(*map(np.asarray, chosen.choices()), strict=True):
        if expert < len(experts):
            total[token] += np.float64(weight) * experts[expert][token]
    return total


def make_dense(gated, key=7):
    rng = np.random.default_rng(key)
    draw = lambda *s: jnp.asarray(rng.normal(size=s) / s[0] ** 0.5, jnp.float32)
    dense = {"up": draw(D, F), "down": draw(F, D)}
    return {"mlp": dense | ({"gate": draw(D, F)} if gated else {})}


def target_of(mode, gated, e=E):
    f = F // (mode.groups if isinstance(mode, upcycling.Granular) else 1)
    shapes = {"router": (D, e), "w_in": (e, D, f), "w_out": (e, f, D)}
    if gated and not isinstance(mode, upcycling.Adapters):
        shapes["w_gate"] = (e, D, f)
    if isinstance(mode, upcycling.Shared | upcycling.Adapters):
        shapes |= {"shared_in": (D, F), "shared_out": (F, D)}
        shapes |= {"shared_gate": (D, F)} if gated else {}
    if isinstance(mode, upcycling.Adapters):
        shapes |= {"w_in": (e, D, 3), "w_out": (e, 3, D)}
    return {"mlp": {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()}}


def upcycled(mode, router, gated, e=E, tokens=T, **spec):
    spec = upcycling.Spec(
        target=target_of(mode, gated, e),
        ffns=[
            upcycling.Ffn(
                source="mlp", w_in="up", w_out="down", w_gate="gate" if gated else None
            )
        ],
        mode=mode,
        router=router,
        tokens=tokens,
        **{"router_std": 0.3, **spec},
    )
    return upcycling.upcycle(make_dense(gated), spec=spec, key=jax.random.key(3))


def measure(mode, router, gated, act, e=E, **spec):
    """(the report, largest difference of outputs relative to the largest output)."""
    dense = make_dense(gated)["mlp"]
    made, _, report = upcycled(mode, router, gated, e, **spec)
    x = np.random.default_rng(0).normal(size=(T, D))
    logits = jnp.asarray(x, jnp.float32) @ made["mlp"]["router"]
    act = ACTIVATIONS[act]
    before = {k: np.asarray(w, np.float64) for k, w in dense.items()}
    y = ffn(x, before["up"], before["down"], before.get("gate"), act)
    adapters = isinstance(mode, upcycling.Adapters)
    z = mixture(x, made["mlp"], router(logits), act, adapters)
    return report, np.abs(z - y).max() / np.abs(y).max()


def top_k(**arguments):
    return functools.partial(routing.top_k, **arguments)


MODES = {
    "copy": upcycling.Copy(),
    "noise": upcycling.Copy(noise=0.05),
    "one group": upcycling.Granular(1),
    "granular out": upcycling.Granular(2),
    "granular spread": upcycling.Granular(2, scale="spread"),
    "granular spread, homogeneous": upcycling.Granular(
        2, scale="spread", homogeneous=1
    ),
    "drop": upcycling.Drop(0.5),
    "drop nothing": upcycling.Drop(0.01),  # round(0.24) of 24 units
    "shared": upcycling.Shared(),
    "shared noise": upcycling.Shared(noise=0.5),
    "adapters": upcycling.Adapters(),
    "adapters up": upcycling.Adapters(up=0.1),
}
GATES = {
    f"{score} {normalize} k={k}": {"score": score, "normalize": normalize, "k": k}
    for score in ("softmax", "softmax_chosen", "sigmoid")
    for normalize in ("none", "sum", "sum_stopgrad")
    for k in (1, 2, 3, E)
    if (score, normalize) != ("softmax_chosen", "sum_stopgrad")
}
CAPACITIES = {
    "dropless": {},
    "all fit": {"capacity": T},
    "some dropped": {"capacity": 16, "renormalize": False},
    "some dropped, renormalized": {"capacity": 16, "renormalize": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODES)
def test_exact_is_what_is_measured(name):
    """Every gate and capacity: exact iff the outputs are equal."""
    mode, homogeneous = MODES[name], name == "granular spread, homogeneous"
    act = "relu" if homogeneous else "silu"
    seen = set()
    for (gate, k), (policy, capacity) in itertools.product(
        GATES.items(), CAPACITIES.items()
    ):
        gated = not homogeneous and k["k"] != 1
        report, error = measure(mode, top_k(**k, **capacity), gated, act)
        case = f"{name}, {gate}, {policy}: {error:.1e}\n{report}"
        seen.add(report.exact)
        if report.exact:
            assert error < 1e-5, case
        elif policy == "some dropped, renormalized":
            pass  # each token may have kept one: that is luck, and not promised
        else:
            assert error > 1e-3, case
    always = isinstance(mode, upcycling.Shared) or name == "adapters"
    never = name in ("noise", "granular spread", "drop", "adapters up")
    assert seen == ({True} if always else {False} if never else {True, False})
