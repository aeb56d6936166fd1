"""Specs of sparse layers that have the FLOPs of a dense one and are larger."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax._dispatch import Choice
from sparsejax.layers._linear import BlockSparseLinearSpec, MaskedLinearSpec

Activation = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _IsoFlopSpec:
    """What the four have in common; ``in_features * out_features`` is the budget."""

    in_features: int
    out_features: int
    block_shape: tuple[int, int] | None = None
    own_masks: bool = True
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    implementation: Choice = None

    def __post_init__(self):
        if self.block_shape is not None and not self.own_masks:
            raise ValueError(
                f"own_masks: got False with block_shape {self.block_shape}, needed "
                "True: sparsify moves masks of entries, topology.step moves blocks"
            )
        if min(self.in_features, self.out_features) < 1:
            raise ValueError(
                f"in_features, out_features: got {self.in_features}, "
                f"{self.out_features}, needed positive ints"
            )
        _ = self.linears  # the checks of what is inside

    @property
    def linears(self) -> dict[str, Any]:
        """The linear layers inside, by the name under which their parameters are."""
        raise NotImplementedError

    @property
    def flops_per_row(self) -> int:
        """Multiplications and additions by kept weights, for one row of x."""
        return 2 * sum(_kept(linear) for linear in self.linears.values())

    @property
    def dense_flops_per_row(self) -> int:
        """The same of the dense layer that this one replaces."""
        return 2 * self.in_features * self.out_features

    @property
    def parameter_count(self) -> int:
        """Kept weights and biases."""
        linears = self.linears.values()
        return sum(_kept(each) + each.use_bias * each.out_features for each in linears)

    @property
    def sparsity(self) -> float:
        """Fraction of the sparse weights that is zero, as it came out by rounding."""
        sparse = [each for name, each in self.linears.items() if "sparse" in name]
        return 1 - sum(map(_kept, sparse)) / sum(map(_size, sparse))

    def _sparse(self, k: int, n: int, units: int, bias: bool = True) -> Any:
        """A linear layer that keeps so many entries, or blocks, of [k, n]."""
        common: dict[str, Any] = dict(
            in_features=k,
            out_features=n,
            use_bias=self.use_bias and bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            implementation=self.implementation,
        )
        if self.block_shape is None:
            whole = k * n
        else:
            common["block_shape"] = self.block_shape
            whole = math.prod(map(_ceil_div, (k, n), self.block_shape))
        if not 1 <= units <= whole:
            raise ValueError(
                f"sizes: got {self}, which leaves {units} of the {whole} "
                f"{'blocks' if self.block_shape else 'weights'} of a ({k}, {n}) "
                "matrix, needed at least 1 and at most all"
            )
        kind = BlockSparseLinearSpec if self.block_shape else MaskedLinearSpec
        return kind(**common, sparsity=1 - units / whole)

    def _dense(self, k: int, n: int) -> MaskedLinearSpec:
        return MaskedLinearSpec(
            in_features=k,
            out_features=n,
            use_bias=False,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )

    def _units(self, macs: int) -> int:
        """How many entries, or blocks, cost so many multiply-adds; nearest."""
        return round(macs / math.prod(self.block_shape or (1, 1)))

    def _scales(self) -> dict[str, float]:
        """By what the drawn kernels are multiplied, where it is not 1."""
        return {}

    def _equation(self, linear: Callable[[str, Any], Any], x: Any) -> Any:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseWideSpec(_IsoFlopSpec):
    """A sparse layer wider than a dense one of equal FLOPs: ``y = x W + b``.

    W is ``[wide_in, wide_out]`` and keeps ``in_features * out_features`` entries, so at
    sparsity s the sizes may be ``1 / sqrt(1 - s)`` times the dense layer's. It is no
    drop-in for one layer: its neighbours must be as wide. ``iso_flop_chain`` widens
    what lies between layers, such as the hidden size of an MLP, and is one.

    Attributes:
      in_features: Input size of the dense layer that it replaces.
      out_features: Output size of the same.
      wide_in: Size of x's last axis, at least in_features.
      wide_out: Size of y's last axis, at least out_features.
      block_shape: None: entries are kept (``MaskedLinearSpec``); (bk, bn): blocks
        (``BlockSparseLinearSpec``), as many as come nearest to the FLOPs.
      own_masks: Whether the layer draws a random mask and keeps it. False: it has none,
        for weights that ``transforms.sparsify`` keeps zero, whose growth by gradients
        needs them dense; kernels are drawn for their sparsity all the same.
      use_bias: Whether biases are there.
      dtype: In which products are computed; None: promoted from x and the kernel.
      param_dtype: In which parameters are kept.
      implementation: Of the sparse products.
    """

    wide_in: int
    wide_out: int

    def __post_init__(self):
        if self.wide_in < self.in_features or self.wide_out < self.out_features:
            raise ValueError(
                f"wide_in, wide_out: got {self.wide_in}, {self.wide_out}, needed at "
                f"least in_features, {self.in_features}, and out_features, "
                f"{self.out_features}"
            )
        super().__post_init__()

    @property
    def linears(self) -> dict[str, Any]:
        """The linear layers inside, by the name under which their parameters are."""
        units = self._units(self.in_features * self.out_features)
        return {"sparse": self._sparse(self.wide_in, self.wide_out, units)}

    def _equation(self, linear, x):
        return linear("sparse", x)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseParallelSpec(_IsoFlopSpec):
    """Sparse branches with a nonlinearity each: ``y = g sum_j act(x W_j + b_j)``.

    The J branches are columns of one matrix ``[in_features, J * out_features]`` that
    keeps ``in_features * out_features`` entries: density 1 / J over all, and in each
    branch but for chance. So it is one product and one leaf, and a moving topology
    may move weights between branches. ``g = 1 / sqrt(J var(act(z)))``, z standard
    normal, gives y the variance of a dense layer; the paper leaves that to the
    normalization that follows. The mean is ``g J mean(act(z))``.

    Attributes:
      in_features: Size of x's last axis.
      out_features: Size of y's last axis.
      branches: J.
      activation: act; without one the sum would be one linear layer.
      block_shape: As for ``SparseWideSpec``, and so are the others.
      own_masks: The same.
      use_bias: The same; one bias per branch.
      dtype: The same.
      param_dtype: The same.
      implementation: The same.
    """

    branches: int
    activation: Activation | None = jax.nn.relu

    def __post_init__(self):
        if self.branches < 1:
            raise ValueError(f"branches: got {self.branches}, needed at least 1")
        if self.activation is None:
            raise ValueError(
                "activation: got None, needed a function: without one the sum of "
                "branches is one linear layer"
            )
        _check_varies(self.activation)
        super().__post_init__()

    @property
    def linears(self) -> dict[str, Any]:
        """The linear layers inside, by the name under which their parameters are."""
        units = self._units(self.in_features * self.out_features)
        all_branches = self.branches * self.out_features
        return {"sparse": self._sparse(self.in_features, all_branches, units)}

    def _equation(self, linear, x):
        z = linear("sparse", x)
        z = z.reshape(*z.shape[:-1], self.branches, self.out_features)
        gain = 1 / math.sqrt(self.branches * _variance(self.activation))
        # pyrefly: ignore[not-callable]  # not None, by __post_init__
        return gain * jnp.sum(self.activation(z), axis=-2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseFactorizedSpec(_IsoFlopSpec):
    """Two sparse factors: ``y = act(x U) V + b``.

    U is ``[in_features, inner]``, V ``[inner, out_features]``; at the same density
    they keep ``in_features * out_features`` entries together.

    Attributes:
      in_features: Size of x's last axis.
      out_features: Size of y's last axis.
      inner: Columns of U and rows of V.
      activation: act, or None for the identity.
      block_shape: As for ``SparseWideSpec``, and so are the others.
      own_masks: The same.
      use_bias: The same; b alone.
      dtype: The same.
      param_dtype: The same.
      implementation: The same.
    """

    inner: int
    activation: Activation | None = None

    def __post_init__(self):
        _check_varies(self.activation)
        super().__post_init__()

    @property
    def linears(self) -> dict[str, Any]:
        """The linear layers inside, by the name under which their parameters are."""
        k, n = self.in_features, self.out_features
        units = self._units(k * n)
        first = round(units * k / (k + n))
        return {
            "sparse_in": self._sparse(k, self.inner, first, bias=False),
            "sparse_out": self._sparse(self.inner, n, units - first),
        }

    def _scales(self):
        return {"sparse_out": 1 / math.sqrt(_moments(self.activation)[1])}

    def _equation(self, linear, x):
        z = linear("sparse_in", x)
        return linear("sparse_out", self.activation(z) if self.activation else z)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseDopedSpec(_IsoFlopSpec):
    """A dense product of low rank and a sparse one: ``y = x U V + g act(x S + b)``.

    U is ``[in_features, rank]``, V ``[rank, out_features]``, both dense; S keeps what
    they leave of ``in_features * out_features``. Each part has the share of y's
    variance that it has of the FLOPs; with an activation g sees to that, without one
    g is 1 and S is drawn so.

    Attributes:
      in_features: Size of x's last axis.
      out_features: Size of y's last axis.
      rank: Columns of U and rows of V.
      activation: act, or None for the identity.
      block_shape: Of S; as for ``SparseWideSpec``, and so are the others.
      own_masks: The same. U and V are not to be masked: give ``sparsify`` the
        ``leaf_filter="*sparse*/kernel"``.
      use_bias: The same; b alone.
      dtype: The same.
      param_dtype: The same.
      implementation: The same.
    """

    rank: int
    activation: Activation | None = None

    def __post_init__(self):
        if self.rank < 1 or self._low_rank_macs >= self.in_features * self.out_features:
            raise ValueError(
                f"rank: got {self.rank}, needed at least 1 and fewer multiply-adds "
                f"than the dense layer's {self.in_features * self.out_features}: a "
                f"rank costs {self.in_features + self.out_features}"
            )
        _check_varies(self.activation)
        super().__post_init__()

    @property
    def linears(self) -> dict[str, Any]:
        """The linear layers inside, by the name under which their parameters are."""
        k, n = self.in_features, self.out_features
        return {
            "dense_in": self._dense(k, self.rank),
            "dense_out": self._dense(self.rank, n),
            "sparse": self._sparse(k, n, self._units(k * n - self._low_rank_macs)),
        }

    @property
    def _low_rank_macs(self):
        return self.rank * (self.in_features + self.out_features)

    @property
    def _share(self):
        return self._low_rank_macs / (self.in_features * self.out_features)

    def _scales(self):
        sparse = 1.0 if self.activation else math.sqrt(1 - self._share)
        return {"dense_out": math.sqrt(self._share), "sparse": sparse}

    def _equation(self, linear, x):
        low_rank = linear("dense_out", linear("dense_in", x))
        z = linear("sparse", x)
        if self.activation is None:
            return low_rank + z
        gain = math.sqrt((1 - self._share) / _variance(self.activation))
        return low_rank + gain * self.activation(z)


IsoFlopSpec = (
    SparseWideSpec | SparseParallelSpec | SparseFactorizedSpec | SparseDopedSpec
)


def _kept(linear):
    """How many weights a linear layer multiplies by; blocks count whole."""
    return round((1 - linear.sparsity) * _size(linear))


def _size(linear):
    shape = (linear.in_features, linear.out_features)
    if isinstance(linear, MaskedLinearSpec):
        return math.prod(shape)
    blocks = math.prod(map(_ceil_div, shape, linear.block_shape))
    return blocks * math.prod(linear.block_shape)


def _ceil_div(a, b):
    return -(-a // b)


def _check_varies(activation):
    """Outputs are divided by their spread, which is 0 where all are alike."""
    variance, second = _variance(activation), _moments(activation)[1]
    # Of a constant, rounding leaves some 1e-16 of its square.
    if not 1e-12 * second < variance < math.inf:
        raise ValueError(
            f"activation: got {activation}, of variance {variance:.3g} for standard "
            "normal inputs, needed a function that varies, of finite values"
        )


def _variance(activation):
    mean, second = _moments(activation)
    return second - mean * mean


@functools.lru_cache
def _moments(activation):
    """Mean of act(z) and of its square, z standard normal, by the trapezoidal rule."""
    if activation is None:
        return 0.0, 1.0
    z = np.linspace(-10.0, 10.0, 20_001)
    weight = np.exp(-z * z / 2)
    weight /= weight.sum()
    with jax.ensure_compile_time_eval():
        values = np.asarray(activation(jnp.asarray(z, jnp.float32)), np.float64)
    with np.errstate(all="ignore"):  # what is not finite is the caller's to refuse
        return float(weight @ values), float(weight @ values**2)
