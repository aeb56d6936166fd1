"""Chooses who computes an operator. Knows no operator.

An operator keeps a literal dict of ``Implementation``s by name, "xla" among them. With
``implementation=None`` every implementation whose ``check`` passes (on shapes, dtype
and chip) is offered to the lowering, which takes the one of its platform, so the choice
is right for arrays placed on a CPU, and for compilation ahead of time. It takes "xla"
where none fits, and where XLA partitions the program by itself: a Mosaic kernel cannot
be cut by it. A named implementation never falls back.
"""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.extend import core as jex_core
from jax.interpreters import batching, mlir


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an operator.

    Attributes:
      name: As users write it.
      platform: Where it can be lowered, "tpu" or "cuda"; None: everywhere.
      check: ``check(problem, chip)`` raises NotImplementedError, saying what it needs,
        where it cannot serve. ``chip`` may be None: not known.
      run: ``run(problem, chip, interpret, *arrays)``.
      needs_chip: The automatic choice takes it only where the chip is known.
      note: ``note(problem)``, a line for ``explain``.
    """

    name: str
    platform: str | None
    check: Callable[[Any, str | None], None]
    run: Callable[..., Any]
    needs_chip: bool = False
    note: Callable[[Any], str] | None = None


@dataclasses.dataclass(frozen=True)
class Interpreted:
    """Stands for an implementation run by Pallas' interpreter; for tests."""

    name: str


Choice = str | Interpreted | None


def call(
    implementations: Mapping[str, Implementation],
    choice: Choice,
    problem: Any,
    *arrays: Any,
) -> Any:
    """Computes ``problem`` on ``arrays`` by the implementation chosen."""
    chip = current_chip()
    decision = decide(implementations, choice, problem, chip)
    if isinstance(choice, Interpreted):
        return implementations[choice.name].run(problem, chip, True, *arrays)
    run = {
        name: functools.partial(implementations[name].run, problem, chip, False)
        for name in decision.offered
    }
    by_platform = {implementations[name].platform: run[name] for name in run}
    default = by_platform.pop(None, None)
    if not by_platform:
        return run[decision.offered[0]](*arrays)
    return _choose(by_platform, default, str(choice), *arrays)


@dataclasses.dataclass(frozen=True)
class Decision:
    """What the automatic choice, or the user, offers to the lowering."""

    problem: Any
    choice: Choice
    chip: str | None
    offered: tuple[str, ...]
    refused: Mapping[str, str]
    notes: Mapping[str, str]
    platforms: Mapping[str, str | None]


def decide(
    implementations: Mapping[str, Implementation],
    choice: Choice,
    problem: Any,
    chip: str | None,
) -> Decision:
    """Applies the checks.

    Raises:
      ValueError: No implementation has the name asked for.
      NotImplementedError: The one asked for does not serve this problem.
    """
    name = choice.name if isinstance(choice, Interpreted) else choice
    if name is not None and name not in implementations:
        known = ", ".join(repr(known) for known in implementations)
        raise ValueError(f"implementation: got {name!r}, needed {known} or None")
    refused, offered = {}, []
    for each in implementations.values():
        if name is not None and each.name != name:
            refused[each.name] = f"implementation={name!r} was asked for"
            continue
        try:
            # The chip of an interpreted kernel is nobody's.
            each.check(problem, None if isinstance(choice, Interpreted) else chip)
        except NotImplementedError as error:
            if name is not None:
                raise
            refused[each.name] = str(error)
            continue
        if name is None and each.needs_chip and chip is None:
            refused[each.name] = "the chip is not known while tracing"
            continue
        offered.append(each.name)
    notes = {
        each: note(problem)
        for each in offered
        if (note := implementations[each].note) is not None
    }
    platforms = {each.name: each.platform for each in implementations.values()}
    decision = Decision(
        problem, choice, chip, tuple(offered), refused, notes, platforms
    )
    record = _recording.get()
    if record is not None:
        record.append(decision)
    return decision


# --- Chips ---------------------------------------------------------------------------

# In a device's kind, first match wins.
_KINDS = (
    ("v6", "v6e"),
    ("7x", "tpu7x"),
    ("v7", "tpu7x"),
    ("v5 lite", "v5e"),
    ("v5e", "v5e"),
    ("v5", "v5p"),
    ("v4", "v4"),
    ("H200", "h200"),
    ("H100", "h100"),
    ("H800", "h100"),
    ("H20", "h100"),
)


def current_chip() -> str | None:
    """The chip that the program being traced is for, where that is known.

    That of ``jax.sharding.use_abstract_mesh``'s abstract device, else the default
    backend's; None on a CPU, whose programs may be lowered for something else.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        kind = device.device_kind
    elif jax.default_backend() == "cpu":
        return None
    else:
        kind = jax.devices()[0].device_kind
    return next((chip for word, chip in _KINDS if word in kind), kind)


def current_platform() -> str:
    """The lowering platform, as far as tracing can know it: "cpu", "cuda" or "tpu"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = jax.default_backend() if device is None else device.platform
    return "cuda" if platform == "gpu" else platform


# --- The choice at lowering -----------------------------------------------------------

_choose_p = jex_core.Primitive("sparsejax_choose")
_choose_p.multiple_results = True


def _choose(
    by_platform: Mapping[str | None, Callable[..., Any]],
    default: Callable[..., Any] | None,
    name: str,
    *arrays: Any,
) -> Any:
    """Calls the function of the platform that the program is lowered for.

    Unlike ``lax.platform_dependent`` it sees whether XLA will partition the program,
    and takes ``default`` there.
    """
    flat, tree = jax.tree.flatten(arrays)

    def traced(fn):
        run = lambda *flat: fn(*jax.tree.unflatten(tree, flat))
        jaxpr, shapes = jax.make_jaxpr(run, return_shape=True)(*flat)
        results.append(jax.tree.structure(shapes))
        return jaxpr

    results = []  # the same for all
    branches = tuple((platform, traced(fn)) for platform, fn in by_platform.items())
    out = _choose_p.bind(
        *flat,
        branches=branches,
        default=None if default is None else traced(default),
        name=name,
    )
    return jax.tree.unflatten(results[0], out)


def _branch(platform, partitioned, branches, default, name):
    """The jaxpr to lower, by the rules of the module docstring."""
    branch = dict(branches).get(platform)
    if branch is not None and not partitioned:
        return branch
    if default is not None:
        return default
    if branch is None:
        wanted = " or ".join(each for each, _ in branches)
        raise NotImplementedError(
            f"implementation={name!r} needs platform {wanted}, got {platform}"
        )
    raise NotImplementedError(
        f"implementation={name!r} needs jax.shard_map around it: XLA cannot partition "
        "a Mosaic kernel"
    )


def _is_partitioned(axis_context: Any) -> bool:
    """Whether XLA, rather than shard_map, distributes the program."""
    manual = getattr(axis_context, "manual_axes", None)
    if manual is not None:  # under shard_map, over all axes or over some
        return set(axis_context.mesh.axis_names) != set(manual)
    return (getattr(axis_context, "num_devices", None) or 1) > 1


def _lower(platform, ctx, *arrays, branches, default, name):
    partitioned = _is_partitioned(ctx.module_context.axis_context)
    jaxpr = _branch(platform, partitioned, branches, default, name)
    fn = jex_core.jaxpr_as_fun(jaxpr)
    return mlir.lower_fun(fn, multiple_results=True)(ctx, *arrays)


for _platform in ("cpu", "cuda", "rocm", "tpu"):
    mlir.register_lowering(
        _choose_p, functools.partial(_lower, _platform), platform=_platform
    )


@_choose_p.def_abstract_eval
def _(*avals, branches, default, name):
    return (branches[0][1] if default is None else default).out_avals


@_choose_p.def_impl
def _(*arrays, branches, default, name):  # reached under jax.disable_jit only
    platform = current_platform()
    return jex_core.jaxpr_as_fun(_branch(platform, False, branches, default, name))(
        *arrays
    )


def _batch(arrays, dims, *, branches, default, name):
    mapped = lambda jaxpr: jax.vmap(jex_core.jaxpr_as_fun(jaxpr), dims)
    traced = lambda jaxpr: jax.make_jaxpr(mapped(jaxpr))(*arrays)
    out = _choose_p.bind(
        *arrays,
        branches=tuple((platform, traced(jaxpr)) for platform, jaxpr in branches),
        default=None if default is None else traced(default),
        name=name,
    )
    return out, (0,) * len(out)


batching.primitive_batchers[_choose_p] = _batch


# --- Under shard_map ------------------------------------------------------------------


def varying_axes(a: jax.Array) -> frozenset[str]:
    """Mesh axes over which shard_map lets ``a`` differ; none outside it."""
    return frozenset(jax.typeof(a).mat.varying)


def vary_alike(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Marks all arrays as varying over the mesh axes that any of them varies over.

    Does nothing outside shard_map. The transpose of the mark is the sum over those
    axes, so a weight that is the same on all devices gets the sum of its gradients.
    """
    axes = frozenset().union(*(varying_axes(a) for a in arrays))

    def mark(a):
        missing = axes - varying_axes(a)
        return jax.lax.pcast(a, tuple(missing), to="varying") if missing else a

    return tuple(mark(a) for a in arrays)


# --- explain --------------------------------------------------------------------------

_recording: contextvars.ContextVar[list[Decision] | None] = contextvars.ContextVar(
    "sparsejax_decisions", default=None
)


@contextlib.contextmanager
def _record() -> Iterator[list[Decision]]:
    decisions: list[Decision] = []
    token = _recording.set(decisions)
    try:
        yield decisions
    finally:
        _recording.reset(token)


def jit(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``jax.jit``, first argument static, that ``explain`` sees through.

    Operators called eagerly need it: their loops would be compiled at every call.
    """
    compiled = jax.jit(fn, static_argnums=0)

    @functools.wraps(fn)
    def wrapper(*args):
        return compiled(*args) if _recording.get() is None else fn(*args)

    return wrapper


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Says which implementation computes each sparse product in ``fn(*args)``, and why.

    Traces ``fn``; computes nothing. Works for an operator and for any function of
    arrays that calls operators, say a model's loss, also through ``jax.grad``.

    Args:
      fn: A function. Of a function under ``jax.jit`` the plain one inside is traced.
      *args: Its arguments: arrays, or jax.ShapeDtypeStruct in their place.
      **kwargs: Its keyword arguments.

    Returns:
      A text: per product the implementation that runs on the platform at hand, why the
      others do not, and whether a dense product would be faster at this density.
    """
    if hasattr(fn, "lower"):  # jitted: it may have been traced before, unrecorded
        fn = getattr(fn, "__wrapped__")  # noqa: B009  # the type does not say it
    with _record() as decisions:
        leaves, tree = jax.tree.flatten((args, kwargs))
        is_array = [
            hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves
        ]

        def run(arrays):
            arrays = iter(arrays)
            filled = [
                next(arrays) if known else leaf
                for known, leaf in zip(is_array, leaves, strict=True)
            ]
            args, kwargs = jax.tree.unflatten(tree, filled)
            fn(*args, **kwargs)

        jax.eval_shape(
            run, [a for a, known in zip(leaves, is_array, strict=True) if known]
        )
    if not decisions:
        return "no sparse product of sparsejax is traced in this call"
    return "\n".join(dict.fromkeys(_describe(each) for each in decisions))


def _describe(decision: Decision) -> str:
    platform = current_platform()
    here = [n for n in decision.offered if decision.platforms[n] == platform]
    runs = (
        here or [n for n in decision.offered if decision.platforms[n] is None] or [None]
    )[0]
    lines = [str(decision.problem)]
    if runs is None:
        lines.append(
            f"  nothing runs: {decision.choice!r} cannot be lowered for {platform}"
        )
    else:
        note = decision.notes.get(runs)
        lines.append(f"  {runs}" + (f": {note}" if note else ""))
    for name, wanted in decision.platforms.items():
        if name in decision.refused:
            lines.append(f"  not {name}: {decision.refused[name]}")
        elif name != runs:
            slower = f"{runs} is chosen on {platform}"
            other = f"platform is {platform}, it needs {wanted}"
            lines.append(f"  not {name}: {slower if wanted is None else other}")
    return "\n".join(lines)
