"""Sparse modules that have the FLOPs of a dense layer."""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from sparsejax import layers
from sparsejax.nnx._variables import GrowthProbe, Layout, Mask

_KINDS = {
    "kernel": nnx.Param,
    "bias": nnx.Param,
    "kernel_mask": Mask,
    "kernel_layout": Layout,
    "kernel_probe": GrowthProbe,
}


class SparseWide(nnx.Module):
    """y = x W + b, W wider than a dense layer's and sparse.

    See ``layers.SparseWideSpec``.
    """

    def __init__(self, spec: layers.SparseWideSpec, *, rngs: nnx.Rngs):
        """Draws parameters and random masks or layouts from ``rngs.params()``."""
        _draw(self, spec, layers.SparseWideSpec, rngs)

    def __call__(self, x: Float[Array, "*batch k"]) -> Float[Array, "*batch n"]:
        """Computes y ``[..., n]`` of x ``[..., k]``."""
        return _apply(self, x)


class SparseParallel(nnx.Module):
    """y = g sum_j act(x W_j + b_j) over sparse branches.

    See ``layers.SparseParallelSpec``.
    """

    def __init__(self, spec: layers.SparseParallelSpec, *, rngs: nnx.Rngs):
        """Draws parameters and random masks or layouts from ``rngs.params()``."""
        _draw(self, spec, layers.SparseParallelSpec, rngs)

    def __call__(self, x: Float[Array, "*batch k"]) -> Float[Array, "*batch n"]:
        """Computes y ``[..., n]`` of x ``[..., k]``."""
        return _apply(self, x)


class SparseFactorized(nnx.Module):
    """y = act(x U) V + b with sparse factors.

    See ``layers.SparseFactorizedSpec``.
    """

    def __init__(self, spec: layers.SparseFactorizedSpec, *, rngs: nnx.Rngs):
        """Draws parameters and random masks or layouts from ``rngs.params()``."""
        _draw(self, spec, layers.SparseFactorizedSpec, rngs)

    def __call__(self, x: Float[Array, "*batch k"]) -> Float[Array, "*batch n"]:
        """Computes y ``[..., n]`` of x ``[..., k]``."""
        return _apply(self, x)


class SparseDoped(nnx.Module):
    """y = x U V + g act(x S + b), of low rank plus sparse.

    See ``layers.SparseDopedSpec``.
    """

    def __init__(self, spec: layers.SparseDopedSpec, *, rngs: nnx.Rngs):
        """Draws parameters and random masks or layouts from ``rngs.params()``."""
        _draw(self, spec, layers.SparseDopedSpec, rngs)

    def __call__(self, x: Float[Array, "*batch k"]) -> Float[Array, "*batch n"]:
        """Computes y ``[..., n]`` of x ``[..., k]``."""
        return _apply(self, x)


class _Variables(nnx.Module):
    """Parameters and topology of one of the linear layers inside."""

    def __init__(self, values: dict[str, Any]):
        for name, value in values.items():
            setattr(self, name, _KINDS[name](value))


def _draw(module, spec, kind, rngs):
    if not isinstance(spec, kind):
        raise ValueError(f"spec: got {spec}, needed a {kind.__name__}")
    module.spec = spec
    params, topology = layers.init_iso_flop(rngs.params(), spec)
    for name, values in params.items():
        setattr(module, name, _Variables({**values, **topology.get(name, {})}))


def _apply(module, x):
    params: dict[str, Any] = {}
    topology: dict[str, Any] = {}
    for name in module.spec.linears:
        held = vars(getattr(module, name))
        values = {key: held[key].get_value() for key in _KINDS if key in held}
        params[name] = {
            key: values.pop(key) for key in ("kernel", "bias") if key in values
        }
        topology[name] = values
    return layers.apply_iso_flop(module.spec, params, topology, x)
