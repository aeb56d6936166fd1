"""Sparse layers that have the FLOPs of a dense one: which, their start, their maths."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsejax.layers._iso_flop_specs import (
    IsoFlopSpec,
    SparseDopedSpec,
    SparseFactorizedSpec,
    SparseParallelSpec,
    SparseWideSpec,
)
from sparsejax.layers._linear import (
    BlockSparseLinearSpec,
    MaskedLinearSpec,
    apply_block_sparse_linear,
    apply_masked_linear,
    init_block_sparse_linear,
    init_masked_linear,
)

KINDS = ("wide", "parallel", "factorized", "doped")
_OPTIONS_OF_DENSE = ("use_bias", "dtype", "param_dtype", "implementation")


def iso_flop(
    dense: Sequence[int] | MaskedLinearSpec,
    kind: str,
    sparsity: float,
    **options: Any,
) -> IsoFlopSpec:
    r"""Replaces a dense layer by a sparse one of equal FLOPs.

    For a dense layer of k inputs and n outputs, at sparsity s:

    ========== ==================================================================
    wide       :math:`(k/\sqrt{1-s},\ n/\sqrt{1-s})`, both rounded up
    parallel   :math:`1/(1-s)` branches, rounded up
    factorized inner size :math:`kn / ((k+n)(1-s))`, rounded up
    doped      rank :math:`s\,kn / (k+n)`, rounded down
    ========== ==================================================================

    Then weights are kept until there are exactly k n of them: FLOPs are equal, and the
    rounding is in the sparsity, which is s or more (doped: s or less);
    ``spec.sparsity`` says what it is. With ``block_shape``, sizes are rounded up to
    multiples of both sides of the block (not branches and rank), and the number of
    blocks is the nearest: FLOPs differ by at most half a block.

    A wide layer is no drop-in, since its neighbours must be as wide: see
    ``iso_flop_chain``. The other three are.

    Args:
      dense: (k, n), or the spec of a dense layer, whose options hold unless given.
      kind: "wide", "parallel", "factorized" or "doped".
      sparsity: s in [0, 1).
      **options: Fields of the spec, such as ``activation``, ``block_shape``,
        ``own_masks``.

    Returns:
      A ``SparseWideSpec``, ``SparseParallelSpec``, ``SparseFactorizedSpec`` or
      ``SparseDopedSpec``.

    Raises:
      ValueError: ``kind`` is unknown, ``sparsity`` is outside [0, 1), the spec given is
        not dense, the sizes are not two or leave no rank or no weight, or the
        activation is constant.

    Example:
      >>> for kind in ("wide", "parallel", "factorized", "doped"):
      ...     spec = iso_flop((64, 96), kind, 0.75)
      ...     print(spec.flops_per_row, spec.parameter_count, round(spec.sparsity, 4))
      12288 6336 0.75
      12288 6528 0.75
      12288 6240 0.7506
      12288 6240 0.7292

    References:
      Thangarasa et al., `Sparse-IFT: Sparse Iso-FLOP Transformations for Maximizing
      Training Efficiency <https://arxiv.org/abs/2303.11525>`_, 2024.
    """
    kept = _density(kind, sparsity)
    if isinstance(dense, MaskedLinearSpec):
        if dense.sparsity:
            raise ValueError(f"dense: got {dense}, needed sparsity 0")
        options = {name: getattr(dense, name) for name in _OPTIONS_OF_DENSE} | options
        dense = (dense.in_features, dense.out_features)
    if not isinstance(dense, Sequence) or len(dense) != 2:
        raise ValueError(
            f"dense: got {dense}, needed sizes (k, n) or a MaskedLinearSpec"
        )
    k, n = dense
    if min(k, n) < 1:
        raise ValueError(f"dense: got sizes {dense}, needed positive ints")
    unit = _unit(options)
    common: dict[str, Any] = dict(in_features=k, out_features=n, **options)
    if kind == "wide":
        wide_in, wide_out = (_widened(size, 1 / kept, unit) for size in (k, n))
        return SparseWideSpec(wide_in=wide_in, wide_out=wide_out, **common)
    if kind == "parallel":
        return SparseParallelSpec(branches=math.ceil(1 / kept), **common)
    if kind == "factorized":
        inner = math.ceil(k * n / ((k + n) * kept) / unit) * unit
        return SparseFactorizedSpec(inner=inner, **common)
    rank = math.floor((1 - kept) * k * n / (k + n))
    if rank < 1 and k * n <= k + n:
        raise ValueError(
            f"dense: got sizes {dense}, of {k * n} multiply-adds, needed more than "
            f"{k + n}, the cost of one rank"
        )
    if rank < 1:
        raise ValueError(
            f"sparsity: got {sparsity} for sizes {dense}, which leaves no rank; needed "
            f"at least {(k + n) / (k * n):.3g}, the cost of one rank"
        )
    return SparseDopedSpec(rank=rank, **common)


def iso_flop_chain(
    sizes: Sequence[int],
    kind: str,
    sparsity: float,
    *,
    chosen: Iterable[int] | None = None,
    **options: Any,
) -> list[IsoFlopSpec | MaskedLinearSpec]:
    r"""Replaces layers of a chain, such as an MLP, each by one of equal FLOPs.

    "wide" widens the hidden sizes alone, so the chain is a drop-in: those between two
    chosen layers, by one factor. Where some layer is wide on both sides that is
    :math:`1/\sqrt{1-s}`, such layers have sparsity s, and those at the ends
    :math:`1-\sqrt{1-s}`. Where none is, as in an MLP of two layers, it is
    :math:`1/(1-s)` and all have sparsity s. Other kinds replace layer by layer.

    Args:
      sizes: Input, hidden and output sizes; layer i is (sizes[i], sizes[i + 1]).
      kind: As for ``iso_flop``.
      sparsity: s in [0, 1).
      chosen: Layers that may change; None: all. Others, and a wide chain's that touch
        no widened size, are dense: ``MaskedLinearSpec`` of sparsity 0.
      **options: Fields of the specs.

    Returns:
      One spec per layer.

    Raises:
      ValueError: As ``iso_flop``; a choice that is not a layer; "wide" where no two
        chosen layers follow each other.

    Example:
      >>> for spec in iso_flop_chain([64, 256, 64], "wide", 0.75):
      ...     print(spec.wide_in, spec.wide_out, spec.sparsity)
      64 1024 0.75
      1024 64 0.75
    """
    kept = _density(kind, sparsity)
    count = len(sizes) - 1
    picked = set(range(count) if chosen is None else chosen)
    if count < 1 or not picked <= set(range(count)):
        raise ValueError(
            f"sizes, chosen: got {list(sizes)} and {sorted(picked)}, needed two sizes "
            f"or more and layers out of {list(range(max(count, 0)))}"
        )
    shared = {name: options[name] for name in _OPTIONS_OF_DENSE if name in options}

    def as_it_was(i):
        return MaskedLinearSpec(
            in_features=sizes[i], out_features=sizes[i + 1], **shared
        )

    if kind != "wide":
        return [
            iso_flop((sizes[i], sizes[i + 1]), kind, sparsity, **options)
            if i in picked
            else as_it_was(i)
            for i in range(count)
        ]
    between = [{i - 1, i} <= picked for i in range(count + 1)]
    if not any(between):
        raise ValueError(
            f"chosen: got layers {sorted(picked)} of {count}, needed two that follow "
            "each other: only what lies between them can be widened"
        )
    both_sides = any(a and b for a, b in zip(between, between[1:], strict=False))
    square = 1 / kept if both_sides else 1 / kept**2
    unit = _unit(options)
    wide = [
        _widened(size, square, unit) if inside else size
        for size, inside in zip(sizes, between, strict=True)
    ]
    return [
        SparseWideSpec(
            in_features=sizes[i],
            out_features=sizes[i + 1],
            wide_in=wide[i],
            wide_out=wide[i + 1],
            **options,
        )
        if between[i] or between[i + 1]
        else as_it_was(i)
        for i in range(count)
    ]


def init_iso_flop(
    key: Array, spec: IsoFlopSpec
) -> tuple[dict[str, dict[str, Array]], dict[str, dict[str, Any]]]:
    """Draws parameters and random masks or layouts.

    For x of variance 1 and mean 0, y has variance 1 over inputs and outputs together,
    as a dense layer's with kernels of variance 1 / fan-in.

    Args:
      key: PRNG key.
      spec: The layer.

    Returns:
      (params, topology), by the names of ``spec.linears``: what the inner layers'
      ``init_`` give; names of dense factors, and of all where ``own_masks`` is False,
      are not in the topology.

    Example:
      >>> spec = iso_flop((64, 96), "factorized", 0.75)
      >>> params, topology = init_iso_flop(jax.random.key(0), spec)
      >>> {name: p["kernel"].shape for name, p in params.items()}
      {'sparse_in': (64, 154), 'sparse_out': (154, 96)}
      >>> print(sum(int(t["kernel_mask"].sum()) for t in topology.values()), 64 * 96)
      6144 6144
    """
    params: dict[str, Any] = {}
    topology: dict[str, Any] = {}
    linears = spec.linears
    keys = jax.random.split(key, len(linears))
    for (name, linear), each in zip(linears.items(), keys, strict=True):
        scale = spec._scales().get(name, 1.0)
        if isinstance(linear, BlockSparseLinearSpec):
            params[name], topology[name] = init_block_sparse_linear(each, linear)
        elif linear.sparsity > 0 and spec.own_masks:
            params[name], topology[name] = init_masked_linear(each, linear)
        else:
            # Masks that come later leave this density of a kernel drawn whole.
            scale /= math.sqrt(1 - linear.sparsity)
            whole = dataclasses.replace(linear, sparsity=0.0)
            params[name], _ = init_masked_linear(each, whole)
        params[name]["kernel"] = params[name]["kernel"] * scale
    return params, topology


def apply_iso_flop(
    spec: IsoFlopSpec,
    params: dict[str, dict[str, Array]],
    topology: dict[str, dict[str, Any]],
    x: Float[Array, "*batch k"],
) -> Float[Array, "*batch n"]:
    """Computes y by the equation in the spec's docstring.

    Args:
      spec: The layer.
      params: As from ``init_iso_flop``.
      topology: The same; a kernel without an entry is multiplied whole.
      x: ``[..., in_features]``, or wide_in.

    Returns:
      y ``[..., out_features]``, or wide_out.

    Example:
      RigL on a parallel layer, with the FLOPs of a dense (16, 16) at every step:

      >>> from sparsejax.transforms import get_masks, rigl, sparsify
      >>> spec = iso_flop((16, 16), "parallel", 0.75, own_masks=False)
      >>> params, topology = init_iso_flop(jax.random.key(0), spec)
      >>> updater = rigl(
      ...     sparsity=spec.sparsity, end=8, every=2, key=jax.random.key(1))
      >>> tx = sparsify(optax.adamw(1e-2), updater, leaf_filter="*sparse*/kernel")
      >>> state = tx.init(params)
      >>> params = sparsejax.masks.apply_masks(params, get_masks(state))
      >>> x = jax.random.normal(jax.random.key(2), (8, 16))
      >>> @jax.jit
      ... def step(params, state):
      ...     loss = lambda p: jnp.mean((apply_iso_flop(spec, p, topology, x) - x) ** 2)
      ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
      ...     return optax.apply_updates(params, updates), state
      >>> for _ in range(10):
      ...     params, state = step(params, state)
      >>> print(int((params["sparse"]["kernel"] != 0).sum()), 16 * 16)
      256 256
    """
    linears = spec.linears

    def linear(name, x):
        one, where = linears[name], topology.get(name, {})
        if isinstance(one, BlockSparseLinearSpec):
            layout, probe = where["kernel_layout"], where.get("kernel_probe")
            return apply_block_sparse_linear(one, params[name], layout, x, probe)
        mask = where.get("kernel_mask")
        if mask is None:
            mask = jnp.ones(params[name]["kernel"].shape, bool)
        return apply_masked_linear(one, params[name], mask, x)

    return spec._equation(linear, x)


def _density(kind, sparsity):
    """1 - sparsity, exactly: 1/10 for 0.9, so that 1 / density is 10, not 11."""
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, needed one of {KINDS}")
    if not 0 <= sparsity < 1:  # NaN fails too
        raise ValueError(f"sparsity: got {sparsity}, needed a number in [0, 1)")
    return 1 - Fraction(repr(float(sparsity)))


def _unit(options):
    block_shape = options.get("block_shape") or (1, 1)
    if min(block_shape) < 1:
        raise ValueError(f"block_shape: got {block_shape}, needed positive ints")
    # A width is the columns of one matrix and the rows of the next.
    return math.lcm(*block_shape)


def _widened(size, square, unit):
    """The least multiple of ``unit`` that is at least ``size * sqrt(square)``."""
    needed = square * Fraction(size, unit) ** 2
    root = math.isqrt(math.ceil(needed))
    return unit * (root if root * root >= needed else root + 1)
