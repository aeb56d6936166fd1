"""Structured layers in place of the dense ones of an existing model."""

import dataclasses
from typing import Any, TypeVar

import jax
from flax import nnx
from jaxtyping import Array

from sparsejax import layers
from sparsejax.layers._structure import Rule
from sparsejax.nnx._structured import (
    KroneckerSparseLinear,
    LowRankLinear,
    PixelflyLinear,
    _set,
)

Model = TypeVar("Model", bound=nnx.Module)

_MODULES: dict[type, Any] = {
    layers.KroneckerSparseLinearSpec: KroneckerSparseLinear,
    layers.LowRankLinearSpec: LowRankLinear,
    layers.PixelflyLinearSpec: PixelflyLinear,
}


def structure(
    model: Model, rule: Rule, *, key: Array | None = None
) -> tuple[Model, layers.StructureReport]:
    """Replaces the chosen ``nnx.Linear`` layers of a model by structured ones.

    A chain makes a ``KroneckerSparseLinear``, ``LowRank`` a ``LowRankLinear``,
    ``Pixelfly`` a ``PixelflyLinear``; dtypes and bias are the dense layer's, its
    precision, ``dot_general`` and sharding metadata are not taken over. A layer that
    the model holds in several places stays one layer.

    Args:
      model: Any NNX module; it stays as it is.
      rule: Which layers become what, as for ``layers.structure``: a function ``(path,
        (k, n)) -> form or None``, or a mapping from glob patterns of paths, such as
        "blocks/*/mlp/up", to forms or functions ``(k, n) -> form``.
      key: None: the nearest weight of that form. A PRNG key: drawn afresh.

    Returns:
      (a copy of the model with those layers replaced; the report). Stacked layers, as
      ``nnx.vmap`` makes them, stay stacked.

    Raises:
      ValueError: The rule takes no layer; a pattern matches none, or a form does not
        fit; the message names the path.

    Example:
      >>> import functools
      >>> from flax import nnx
      >>> from sparsejax import structured
      >>> model = nnx.Sequential(
      ...     nnx.Linear(32, 64, rngs=nnx.Rngs(0)), nnx.relu,
      ...     nnx.Linear(64, 8, rngs=nnx.Rngs(1)))
      >>> rule = {"layers/0": functools.partial(structured.monarch, blocks=4)}
      >>> model, report = sparsejax.nnx.structure(model, rule)
      >>> type(model.layers[0]).__name__, model(jnp.ones((2, 32))).shape
      ('KroneckerSparseLinear', (2, 8))
      >>> print(report)
      layer     size   form                    before  after  error   low rank's
      layers/0  32x64  (4, 8, 8, 1) (1, 16, 8, 4)  2,112 ...
    """
    root = {"": nnx.clone(model)}
    found: dict[str, nnx.Linear] = {}
    places = []  # holder, name, layer: a layer that is shared has several
    for path, holder, name, linear in _linears(root):
        places.append((holder, name, linear))
        if all(linear is not other for other in found.values()):
            found[path] = linear
    dense = {path: _parameters(linear) for path, linear in found.items()}
    stacked = [path for path, held in dense.items() if held["kernel"].ndim > 2]
    replaced, report = layers.structure(dense, rule, key=key, stacked=stacked)

    new = {}
    for path, layer in report.layers.items():
        spec = dataclasses.replace(layer.spec, dtype=found[path].dtype)
        new[id(found[path])] = _module(spec, replaced[path])
    for holder, name, linear in places:
        if id(linear) in new:
            _put(holder, name, new[id(linear)])

    params = jax.tree.leaves(nnx.state(model, nnx.Param))
    before = sum(leaf.size for leaf in params)
    after = before - report.parameters_before + report.parameters_after
    report = layers.StructureReport(report.layers, before, after)
    return root[""], report


def _linears(node, path=(), seen=None):
    """Every place of an ``nnx.Linear``: its path, what holds it, under which name."""
    seen = {} if seen is None else seen
    if id(node) in seen:
        return
    seen[id(node)] = node
    if isinstance(node, nnx.Module):
        children = list(vars(node).items())
    elif isinstance(node, dict):
        children = list(node.items())
    else:
        children = list(enumerate(node)) if isinstance(node, list) else []
    for name, child in children:
        if type(child) is nnx.Linear:
            yield "/".join((*path, str(name))[1:]), node, name, child
        else:
            yield from _linears(child, (*path, str(name)), seen)


def _put(holder, name, value):
    if isinstance(holder, nnx.Module):
        setattr(holder, name, value)
    else:
        holder[name] = value


def _parameters(linear):
    params = {"kernel": linear.kernel.get_value()}
    if linear.use_bias:
        params["bias"] = linear.bias.get_value()
    return params


def _module(spec, params):
    """A module that holds these parameters."""
    kind = _MODULES[type(spec)]
    # Shapes alone: what it would draw is not used.
    module = nnx.eval_shape(lambda: kind(**vars(spec), rngs=nnx.Rngs(0)))
    _set(module, params)
    return module
