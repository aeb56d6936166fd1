"""From dense layers to structured ones: by projection, or drawn afresh."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sparsejax.layers._structured import (
    KroneckerSparseLinearSpec,
    LowRankLinearSpec,
    PixelflyLinearSpec,
    init_kronecker_sparse_linear,
    init_low_rank_linear,
    init_pixelfly_linear,
)
from sparsejax.layouts import gather_blocks
from sparsejax.masks import match_names, named_leaves
from sparsejax.structured import Chain, LowRank, Pattern, Pixelfly, project, to_dense

Form = Chain | Pattern | LowRank | Pixelfly
Rule = (
    Callable[[str, tuple[int, int]], Form | None]
    | Mapping[str, Form | Callable[[int, int], Form]]
)
Spec = KroneckerSparseLinearSpec | LowRankLinearSpec | PixelflyLinearSpec


@dataclasses.dataclass(frozen=True)
class StructuredLayer:
    """What became of one dense layer.

    Attributes:
      spec: The layer that took its place. The module of that name takes its fields:
        ``linen.KroneckerSparseLinear(**vars(spec))``.
      parameters_before: Of the dense layer, stacked ones and the bias among them.
      parameters_after: Of the structured one; entries that meet padding do not count.
      relative_error: ``|W - W'| / |W|`` (Frobenius), over the whole of a stack; None
        for a layer drawn afresh.
      low_rank_error: What the best low-rank matrix of no more parameters would have
        left of it; None for a layer drawn afresh, or itself of low rank.
    """

    spec: Spec
    parameters_before: int
    parameters_after: int
    relative_error: float | None
    low_rank_error: float | None

    @property
    def no_better(self) -> bool:
        """Whether low rank of no more parameters would do as well."""
        if self.relative_error is None or self.low_rank_error is None:
            return False
        return self.low_rank_error <= self.relative_error


@dataclasses.dataclass(frozen=True)
class StructureReport:
    """What ``structure`` replaced; ``print(report)`` shows a table.

    Attributes:
      layers: A ``StructuredLayer`` for each layer that was replaced, by path.
      parameters_before: Of the whole model.
      parameters_after: Of the whole model.
    """

    layers: dict[str, StructuredLayer]
    parameters_before: int
    parameters_after: int

    def __str__(self) -> str:
        error = lambda value: "" if value is None else f"{value:.4g}"
        head = ("layer", "size", "form", "before", "after", "error", "low rank's")
        lines = [head] + [
            (
                path,
                f"{each.spec.in_features}x{each.spec.out_features}",
                _form(each.spec),
                f"{each.parameters_before:,}",
                f"{each.parameters_after:,}",
                error(each.relative_error),
                error(each.low_rank_error),
            )
            for path, each in self.layers.items()
        ]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        pad = lambda cells: [
            cell.ljust(w) for cell, w in zip(cells, widths, strict=True)
        ]
        rows = ["  ".join(pad(cells)).rstrip() for cells in lines]
        before, after = self.parameters_before, self.parameters_after
        rows.append(f"parameters: {before:,} before, {after:,} after")
        if worse := [path for path, each in self.layers.items() if each.no_better]:
            rows.append(f"low rank would do as well at: {', '.join(worse)}")
        return "\n".join(rows)


def structure(
    params: Mapping[str, Any],
    rule: Rule,
    *,
    key: Array | None = None,
    stacked: Sequence[str] = (),
) -> tuple[Any, StructureReport]:
    """Replaces the chosen dense layers of a parameter tree by structured ones.

    A dense layer is a mapping of ``kernel [k, n]`` and perhaps ``bias [n]`` and nothing
    else, as Linen's ``Dense`` has it. It becomes one of ``factor_0``, ``factor_1``, ...
    (or ``down`` and ``up``, ``blocks``) and the bias: the parameters of the structured
    modules, which the model must then have in its place. For NNX models there is
    ``nnx.structure``. Projects and measures errors on the host's request, layer after
    layer; not for use inside jit.

    Args:
      params: Nested mappings of arrays; it stays as it is.
      rule: Which layers become what. A function ``(path, (k, n)) -> form or None``, or
        a mapping from glob patterns of paths (* also matches slashes; the first that
        fits holds) to a form, or to a function ``(k, n) -> form`` such as
        ``functools.partial(structured.monarch, blocks=16)``. Forms are ``Chain``,
        ``Pattern``, ``LowRank`` and ``Pixelfly`` of ``structured``.
      key: None: the nearest weight of that form (``structured.project``), and the bias
        as it is; of ``Pixelfly`` a near one: low rank of what its blocks leave out,
        then the blocks that are best beside it. A PRNG key: the layer is drawn afresh,
        its bias zero.
      stacked: Glob patterns of paths whose kernels are ``[..., k, n]``, layers stacked
        for a scan. Undeclared, a kernel that is no matrix is not a dense layer.

    Returns:
      (the tree with those layers replaced, its other leaves the very same arrays; the
      report).

    Raises:
      ValueError: The rule takes no layer; a pattern matches none, or a form does not
        fit; the message names the path.

    Example:
      >>> import functools
      >>> from sparsejax import layers, structured
      >>> params = {"mlp": {"up": {"kernel": jnp.ones((32, 64)), "bias": jnp.ones(64)}}}
      >>> rule = {"*/up": functools.partial(structured.monarch, blocks=4, rank=1)}
      >>> params, report = layers.structure(params, rule)
      >>> {name: leaf.shape for name, leaf in params["mlp"]["up"].items()}
      {'factor_0': (4, 1, 8, 4), 'factor_1': (1, 4, 4, 16), 'bias': (64,)}
      >>> report.layers["mlp/up"].relative_error < 1e-5
      True
    """
    found = dict(_dense_layers(params, ()))
    names = {"/".join(path): path for path in found}
    stacks = match_names(stacked, names, "stacked")
    offered = {
        name: found[path]
        for name, path in names.items()
        if found[path]["kernel"].ndim == 2 or name in stacks
    }
    shapes = {path: layer["kernel"].shape[-2:] for path, layer in offered.items()}
    forms = _choose(rule, shapes)
    new, report = {}, {}
    for i, (path, form) in enumerate(forms.items()):
        spec = _spec(path, form, offered[path])
        layer_key = None if key is None else jax.random.fold_in(key, i)
        new[names[path]], report[path] = _replace(spec, offered[path], layer_key)
    tree = _rebuild(params, (), new)
    before = sum(leaf.size for leaf in named_leaves(params).values())
    saved = [each.parameters_before - each.parameters_after for each in report.values()]
    return tree, StructureReport(report, before, before - sum(saved))


def _form(spec):
    """In words."""
    if isinstance(spec, LowRankLinearSpec):
        return f"rank {spec.rank}"
    if isinstance(spec, PixelflyLinearSpec):
        (bk, bn), size = spec.block_shape, spec.size
        return f"pixelfly {size} of {bk}x{bn}, rank {spec.rank}"
    patterns = spec.chain.patterns
    if len(patterns) > 2:
        return f"{len(patterns)} factors"
    return " ".join(f"({p.a}, {p.b}, {p.c}, {p.d})" for p in patterns)


def _dense_layers(node, path):
    """Mappings of a kernel and perhaps a bias, by path."""
    if not isinstance(node, Mapping):
        return
    if "kernel" in node and set(node) <= {"kernel", "bias"}:
        if getattr(node["kernel"], "ndim", 0) >= 2:
            yield path, node
        return
    for name, child in node.items():
        yield from _dense_layers(child, (*path, str(name)))


def _rebuild(node, path, new):
    if not isinstance(node, Mapping):
        return node
    of_same_kind: Any = type(node)  # a dict, a FrozenDict
    if path in new:
        return of_same_kind(new[path])
    return of_same_kind(
        {name: _rebuild(child, (*path, str(name)), new) for name, child in node.items()}
    )


def _choose(rule, shapes):
    """The form of each layer that the rule takes."""
    if isinstance(rule, Mapping):
        matched = match_names(rule, shapes, "rule")
        forms = {path: rule[matched[path]] for path in shapes if path in matched}
        forms = {
            path: form(*shapes[path]) if callable(form) else form
            for path, form in forms.items()
        }
    else:
        forms = {path: rule(path, shape) for path, shape in shapes.items()}
        forms = {path: form for path, form in forms.items() if form is not None}
    if not forms:
        raise ValueError(
            f"rule: got one that takes none of the dense layers {list(shapes)}, "
            "needed at least one"
        )
    return forms


def _spec(path, form, layer) -> Spec:
    """Of a layer of this form with the sizes, bias and dtype of a dense one."""
    k, n = layer["kernel"].shape[-2:]
    own: dict[str, Any] = dict(
        in_features=k,
        out_features=n,
        use_bias="bias" in layer,
        param_dtype=layer["kernel"].dtype,
    )
    try:
        if isinstance(form, Chain | Pattern):
            return KroneckerSparseLinearSpec(pattern=form, **own)
        if isinstance(form, LowRank | Pixelfly) and form.shape != (k, n):
            raise ValueError(f"got {form}, needed the sizes {(k, n)}")
        if isinstance(form, LowRank):
            return LowRankLinearSpec(rank=form.rank, **own)
        if isinstance(form, Pixelfly):
            fields = ("block_shape", "size", "rank")
            return PixelflyLinearSpec(**{f: getattr(form, f) for f in fields}, **own)
    except ValueError as error:
        raise ValueError(f"rule: at {path!r}, of {(k, n)}: {error}") from error
    raise ValueError(
        f"rule: got {form!r} at {path!r}, needed a Chain, a Pattern, a LowRank or a "
        "Pixelfly of sparsejax.structured"
    )


def _replace(spec, layer, key):
    """The parameters of one layer, and what there is to say of them."""
    kernel, bias = layer["kernel"], layer.get("bias")
    stack = kernel.shape[:-2]
    over_stack = lambda f: _vmap(f, len(stack))
    if key is None:
        params = over_stack(lambda w: _nearest(spec, w))(kernel)
        w = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
        dense = over_stack(lambda params: _to_dense(spec, params))(params)
        rest = w - dense.astype(w.dtype)
        error = _ratio(jnp.sum(rest**2), jnp.sum(w**2))
        low_rank_error = _low_rank_error(spec, w)
        params.update({} if bias is None else {"bias": bias})
    else:
        keys = jax.random.split(key, stack)
        params = over_stack(lambda key: _INIT[type(spec)](key, spec))(keys)
        error = low_rank_error = None
    before = sum(leaf.size for leaf in layer.values())
    after = math.prod(stack) * spec.parameter_count
    return params, StructuredLayer(spec, before, after, error, low_rank_error)


_INIT = {
    KroneckerSparseLinearSpec: init_kronecker_sparse_linear,
    LowRankLinearSpec: init_low_rank_linear,
    PixelflyLinearSpec: init_pixelfly_linear,
}


def _nearest(spec, w):
    """The weights of that form that are nearest to w."""
    if isinstance(spec, KroneckerSparseLinearSpec):
        factors = project(w, spec.chain)[0]
        params = {f"factor_{i}": factor for i, factor in enumerate(factors)}
    elif isinstance(spec, LowRankLinearSpec):
        params = _truncated(w, spec.rank)
    else:
        layout, family = spec.layout, spec.family
        mask = np.kron(family.block_mask, np.ones(family.block_shape, bool))
        outside = jnp.where(mask[: w.shape[0], : w.shape[1]], 0, w)
        params = _truncated(outside, spec.rank)
        beside = w - family.low_rank.to_dense(params).astype(w.dtype)
        params["blocks"] = gather_blocks(beside, layout)
    return {name: leaf.astype(spec.param_dtype) for name, leaf in params.items()}


def _truncated(w, rank):
    """The best low-rank approximation: of one slice, which is all of w."""
    k, n = w.shape
    chain = Chain((Pattern(1, rank, k, 1), Pattern(1, n, rank, 1)), k, n)
    down, up = project(w, chain)[0]
    return {"down": down[0, 0], "up": up[0, 0]}


def _to_dense(spec, params):
    wide = jnp.promote_types(spec.param_dtype, jnp.float32)
    params = {name: leaf.astype(wide) for name, leaf in params.items()}
    if not isinstance(spec, KroneckerSparseLinearSpec):
        return spec.family.to_dense(params)
    factors = [params[f"factor_{i}"] for i in range(len(spec.chain.patterns))]
    return to_dense(factors, spec.in_features, spec.out_features)


def _vmap(f, times):
    for _ in range(times):
        f = jax.vmap(f)
    return f


def _low_rank_error(spec, w):
    """Of the best matrices with no more parameters; of a stack together."""
    if isinstance(spec, LowRankLinearSpec):
        return None
    k, n = w.shape[-2:]
    weights = spec.parameter_count - spec.use_bias * n
    s = jnp.linalg.svd(w, compute_uv=False)
    return _ratio(jnp.sum(s[..., weights // (k + n) :] ** 2), jnp.sum(s**2))


def _ratio(error, whole):
    """The root of the ratio of two sums of squares, 0 of a weight that is zero."""
    return float(jnp.sqrt(error / whole)) if whole > 0 else 0.0
