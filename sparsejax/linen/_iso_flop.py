"""Sparse modules that have the FLOPs of a dense layer."""

from typing import Any

from flax import linen as nn
from jaxtyping import Array, Float

from sparsejax import layers


class SparseWide(nn.Module):
    """y = x W + b, W wider than a dense layer's and sparse.

    See ``layers.SparseWideSpec``.
    """

    spec: layers.SparseWideSpec

    @nn.compact
    def __call__(self, x: Float[Array, "*batch k"]) -> Float[Array, "*batch n"]:
        """Computes y ``[..., n]`` of x ``[..., k]``."""
        return _apply(self, layers.SparseWideSpec, x)


class SparseParallel(nn.Module):
    """y = g sum_j act(x W_j + b_j) over sparse branches.

    See ``layers.SparseParallelSpec``.
    """

    spec: layers.SparseParallelSpec

    @nn.compact
    def __call__(self, x: Float[Array, "*batch k"]) -> Float[Array, "*batch n"]:
        """Computes y ``[..., n]`` of x ``[..., k]``."""
        return _apply(self, layers.SparseParallelSpec, x)


class SparseFactorized(nn.Module):
    """y = act(x U) V + b with sparse factors.

    See ``layers.SparseFactorizedSpec``.
    """

    spec: layers.SparseFactorizedSpec

    @nn.compact
    def __call__(self, x: Float[Array, "*batch k"]) -> Float[Array, "*batch n"]:
        """Computes y ``[..., n]`` of x ``[..., k]``."""
        return _apply(self, layers.SparseFactorizedSpec, x)


class SparseDoped(nn.Module):
    """y = x U V + g act(x S + b), of low rank plus sparse.

    See ``layers.SparseDopedSpec``.
    """

    spec: layers.SparseDopedSpec

    @nn.compact
    def __call__(self, x: Float[Array, "*batch k"]) -> Float[Array, "*batch n"]:
        """Computes y ``[..., n]`` of x ``[..., k]``."""
        return _apply(self, layers.SparseDopedSpec, x)


def _apply(module, kind, x):
    """Draws all variables at initialisation, reads them later."""
    spec = module.spec
    if not isinstance(spec, kind):
        raise ValueError(f"spec: got {spec}, needed a {kind.__name__}")
    if module.is_initializing():
        params, topology = layers.init_iso_flop(module.make_rng("params"), spec)
        for name, values in params.items():
            module.param(name, lambda _, values=values: values)
        for name, values in topology.items():
            probes = {key: a for key, a in values.items() if key.endswith("_probe")}
            places = {key: a for key, a in values.items() if key not in probes}
            for collection, held in (("topology", places), ("probes", probes)):
                if held:
                    module.variable(collection, name, lambda held=held: held)
        return layers.apply_iso_flop(spec, params, topology, x)
    params: dict[str, Any] = {}
    topology: dict[str, Any] = {}
    for name in spec.linears:
        params[name] = module.get_variable("params", name)
        topology[name] = {
            **module.get_variable("topology", name, {}),
            **module.get_variable("probes", name, {}),
        }
    return layers.apply_iso_flop(spec, params, topology, x)
