"""long_conv: convolutions as long as the signal, by DFTs on matrix units."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Shaped

from sparsejax import _dispatch
from sparsejax._dispatch import Choice, Implementation
from sparsejax.ops import _long_conv_xla
from sparsejax.ops._checks import accumulator, check_floating
from sparsejax.ops._long_conv_xla import GRADIENTS, Problem
from sparsejax.ops._products import SAMPLED, closed_products


def long_conv(
    u: Shaped[Array, "..."],
    k: Shaped[Array, "..."],
    *,
    causal: bool = True,
    pre_gate: Shaped[Array, "..."] | None = None,
    post_gate: Shaped[Array, "..."] | None = None,
    keep_frequencies: int | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    implementation: Choice = None,
) -> Float[Array, "*batch h t"]:
    """Convolves every feature's signal with its own kernel, which may be as long.

    With v = pre_gate u (or u),

        causal     y[..., i] = post_gate[..., i] sum_{j <= i} k[j] v[..., i - j]
        circular   y[..., i] = post_gate[..., i] sum_j k[j] v[..., (i - j) mod t]

    so ``causal`` never wraps around, and signals of length t need no padding by the
    caller. ``l < t`` taps are the partial convolution: the transform is then of
    t + l - 1 entries rather than 2 t.

    ``keep_frequencies=f`` is the frequency-sparse convolution: with n = 2 t if causal,
    n = t if circular, both of u and k filled up with zeros to n,

        y = irfft(rfft(v, n) * where(arange(n // 2 + 1) < f, rfft(k, n), 0), n)[..., :t]

    which is a convolution with the low-passed kernel. That kernel has n taps, wherever
    k had its own, so y[i] depends on later entries of u too, also with ``causal=True``:
    there the zeros keep most of the end of the signal from its beginning, not the
    future from the past.

    Each transform is a Monarch decomposition of the DFT: n = n1 n2 by two products with
    DFT matrices of n1 and n2, about n (2 n1 + 4 n2) operations, half of the first saved
    where half of the signal is zeros; of long signals n2 is again split in two.
    Frequencies that are not kept are columns left out of the last product. Neither the
    spectra nor the padded signals are kept for the backward pass. XLA computes the
    products, on TPU and GPU by their matrix units: there is no Pallas kernel, and what
    is between products goes through memory. On a CPU a cache's worth of signals is
    computed at a time, by jnp.fft where that is faster by a static rule (``explain``
    says which).

    Args:
      u: Signals ``[..., h, t]``; float32, bfloat16, float16 (float64 on CPU). Time is
        the last axis, as for jnp.fft and in FlashFFTConv: a signal is then cut into
        rows for the first product without being moved. ``LongConv`` takes
        ``[..., t, h]``.
      k: Kernels ``[h, l]``, 1 <= l <= t; leading axes of 1 are allowed.
      causal: Linear convolution, of which the first t entries are wanted; else circular
        with period t.
      pre_gate: As u, or None.
      post_gate: As u, or None.
      keep_frequencies: f >= 1, of n // 2 + 1; None: all. The fewer are kept the less
        is multiplied, if n has factors that suit; other n are computed as a circular
        convolution with the low-passed kernel.
      dtype: That u and k are rounded to, and that of y; default, the promoted dtype of
        all operands. Spectra are float32 in any case (float64 of float64), in bfloat16
        each product would add its rounding; and the gradient of float32 ``k`` comes out
        of them unrounded.
      implementation: "xla", or None, which is the same today.

    Returns:
      y ``[..., h, t]``.

    Raises:
      ValueError: Shapes or dtypes do not fit; a length is 0; k is longer than the
        signal; keep_frequencies is not from 1 to n // 2 + 1; the implementation's name
        is unknown.

    Example:
      >>> u = jnp.array([[1.0, 2.0, 3.0]])
      >>> k = jnp.array([[1.0, 10.0]])
      >>> print(sparsejax.ops.long_conv(u, k).round(4))
      [[ 1. 12. 23.]]
      >>> print(sparsejax.ops.long_conv(u, k, causal=False).round(4))
      [[31. 12. 23.]]

    References:
      Fu et al., `FlashFFTConv <https://arxiv.org/abs/2311.05908>`_, 2023. There the
      size of the transform says whether the result wraps around; here ``causal`` does.

    Note:
      Reverse mode to any order, in u, k and the gates. Forward mode raises JAX's error
      for ``custom_vjp``; ``long_conv_reference`` has it.
    """
    k = _check(u, k, pre_gate, post_gate, causal, keep_frequencies)
    gates = [gate for gate in (pre_gate, post_gate) if gate is not None]
    wanted = [array.dtype for array in (u, k, *gates)]
    compute = functools.reduce(jnp.promote_types, wanted) if dtype is None else dtype
    check_floating(dtype=jax.ShapeDtypeStruct((), jnp.dtype(compute)))
    static = _Static(implementation, jnp.dtype(compute))
    if pre_gate is not None:
        u = pre_gate.astype(compute) * u.astype(compute)

    def local(u, k):
        (h, t), batch = u.shape[-2:], u.shape[:-2]
        rows = u.reshape(math.prod(batch), h, t)
        if not u.size:
            return jnp.zeros(u.shape, compute)
        rows, k = _dispatch.vary_alike(rows, k)
        if keep_frequencies is not None or not causal:
            n = 2 * t if causal else t
            y = _circular(static, rows, k, n, keep_frequencies)
        else:
            y = _linear(static, rows, k, t)
        return y.reshape(u.shape)

    y = _over_explicit_axes(local, u, k)
    return y if post_gate is None else post_gate.astype(compute) * y


def long_conv_reference(
    u: Float[Array, "*batch h t"],
    k: Float[Array, "h l"],
    *,
    causal: bool = True,
    pre_gate: Float[Array, "*batch h t"] | None = None,
    post_gate: Float[Array, "*batch h t"] | None = None,
    keep_frequencies: int | None = None,
) -> Float[Array, "*batch h t"]:
    """The equations of ``long_conv`` by jnp.fft.

    Differentiable in both modes. The transform has 2 t entries if causal, else t.
    """
    operands = [a for a in (u, k, pre_gate, post_gate) if a is not None]
    dtype = functools.reduce(jnp.promote_types, [a.dtype for a in operands])
    wide = accumulator(dtype)
    t = u.shape[-1]
    n = 2 * t if causal else t
    v = u.astype(wide) if pre_gate is None else u.astype(wide) * pre_gate.astype(wide)
    spectrum = jnp.fft.rfft(k.astype(wide), n)
    if keep_frequencies is not None:
        kept = jnp.arange(n // 2 + 1) < keep_frequencies
        spectrum = jnp.where(kept, spectrum, jnp.zeros_like(spectrum))
    y = jnp.fft.irfft(jnp.fft.rfft(v, n) * spectrum, n)[..., :t]
    y = y if post_gate is None else y * post_gate.astype(wide)
    return y.astype(dtype)


# --- Which transform ------------------------------------------------------------------


def _linear(static, u, k, out):
    """The first ``out`` entries of the linear convolution."""
    (_, _, t), l = u.shape, k.shape[1]
    return _conv(dataclasses.replace(static, sizes=(t, l, out), n=t + l - 1), u, k)


def _circular(static, u, k, n, keep):
    """The first entries, as many as u has, of the circular convolution of length n."""
    (_, _, t), l = u.shape, k.shape[1]
    if keep is not None and keep > n // 2:
        keep = None  # all of them
    if keep is None and n >= t + l - 1:
        return _linear(static, u, k, t)
    if _long_conv_xla.divides_well(n, t, l, keep):
        exact = dict(sizes=(t, l, t), n=n, exact=True, keep=keep)
        return _conv(dataclasses.replace(static, **exact), u, k)
    if keep is not None:
        spectrum = jnp.fft.rfft(k.astype(accumulator(static.compute)), n)
        return _circular(static, u, jnp.fft.irfft(spectrum[..., :keep], n), n, None)
    y = _linear(static, u, k, t + l - 1)
    y, wrapped = y[..., :n], y[..., n:]
    return (y + jnp.pad(wrapped, ((0, 0), (0, 0), (0, n - wrapped.shape[-1]))))[..., :t]


# --- The products of spectra ----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Static:
    """What is fixed while tracing."""

    choice: Choice
    compute: jnp.dtype
    sizes: tuple[int, int, int] = (0, 0, 0)  # of u, k and y
    n: int = 0
    exact: bool = False
    keep: int | None = None
    out: jnp.dtype | None = None  # of a sampled product


def _multiply(static, op, a, b, where):
    del where
    out = static.out if op == SAMPLED else static.compute
    return _call((static, op), a, b).astype(out)


_product, _transposed, _sampled = closed_products(_multiply)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _conv(static, u, k):
    return _product(static, u, k, None)


def _conv_fwd(static, u, k):
    return _product(static, u, k, None), (u, k)


def _conv_bwd(static, residuals, dy):
    return _gradients(static, *residuals, dy)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gradients(static, u, k, dy):
    """Both gradients at once: the transform of dy is shared."""
    du, dk = _call((static, GRADIENTS), u, k, dy)
    return du.astype(u.dtype), dk.astype(k.dtype)


def _gradients_fwd(static, u, k, dy):
    return _gradients(static, u, k, dy), (u, k, dy)


def _gradients_bwd(static, residuals, cotangents):
    """Of du = dy * k reversed and dk = sum_b dy * u reversed."""
    u, k, dy = residuals
    gu, gk = cotangents
    of_u = _transposed(static, dy, gk, None).astype(u.dtype)
    of_k = _sampled(dataclasses.replace(static, out=k.dtype), gu, dy, None)
    of_dy = _product(static, gu, k, None) + _product(static, u, gk, None)
    return of_u, of_k, of_dy.astype(dy.dtype)


_conv.defvjp(_conv_fwd, _conv_bwd)
_gradients.defvjp(_gradients_fwd, _gradients_bwd)


@_dispatch.jit
def _call(static_and_op, *arrays):
    static, op = static_and_op
    arrays = [array.astype(static.compute) for array in arrays]
    signal, taps, out = static.sizes
    problem = Problem(
        op=op,
        batch=arrays[0].shape[0],
        features=arrays[0].shape[1],
        signal=signal,
        taps=taps,
        out=out,
        n=static.n,
        exact=static.exact,
        keep=static.keep,
        dtype=static.compute.name,
    )
    return _dispatch.call(LONG_CONV, static.choice, problem, *arrays)


# Sides of what a matrix unit takes, or of a product that a CPU's core is quick at.
_SIDE, _SIDE_CPU = 128, 32
# How many entries of u a CPU works on at a time: their spectra then stay in cache. But
# its FFT takes one signal per lane of a vector, on each core.
_PIECE, _TOGETHER = 2**18, 32


def _run_xla(problem, chip, interpret, *arrays):
    del chip, interpret
    forms = dict(cpu=_on_cpu(problem), default=_long_conv_xla.monarch(problem, _SIDE))
    runs = {
        platform: functools.partial(_long_conv_xla.run, problem, form)
        for platform, form in forms.items()
    }
    return jax.lax.platform_dependent(*arrays, **runs)


def _on_cpu(problem):
    if _long_conv_xla.prefers_fft(problem):
        return _long_conv_xla.fft(problem, max(_PIECE, _TOGETHER * problem.signal))
    return _long_conv_xla.monarch(problem, _SIDE_CPU, _PIECE)


def _note_xla(problem):
    on_cpu = _dispatch.current_platform() == "cpu"
    if on_cpu and _long_conv_xla.prefers_fft(problem):
        return "jnp.fft, faster on a CPU than DFTs by products"
    grid = _long_conv_xla.choose_grid(problem, _SIDE_CPU if on_cpu else _SIDE)
    kept = len(grid.columns) / grid.q
    less = "" if kept == 1 else f", {kept:.0%} of the last factor"
    factors = " x ".join(str(f) for f in (grid.n1, grid.p, grid.q) if f > 1)
    return f"DFT of {grid.n} = {factors} by products{less}"


def _anything(problem, chip):
    """XLA takes every problem."""


LONG_CONV = {"xla": Implementation("xla", None, _anything, _run_xla, note=_note_xla)}


# --- Operands -------------------------------------------------------------------------


def _check(u, k, pre_gate, post_gate, causal, keep):
    """k as [h, l], if all fits."""
    gates = dict(pre_gate=pre_gate, post_gate=post_gate)
    gates = {name: gate for name, gate in gates.items() if gate is not None}
    check_floating(u=u, k=k, **gates)
    if u.ndim < 2 or u.shape[-1] < 1:
        raise ValueError(
            f"u: got shape {u.shape}, needed [..., h, t] of a length t of at least 1"
        )
    h, t = u.shape[-2:]
    if k.ndim < 2 or k.shape[-2] != h or math.prod(k.shape[:-2]) != 1:
        raise ValueError(
            f"k: got shape {k.shape}, needed [{h}, l]: a kernel for each of u's "
            f"{h} features"
        )
    if not 1 <= k.shape[-1] <= t:
        raise ValueError(
            f"k: got length {k.shape[-1]}, needed 1 to {t}, the length of the signal"
        )
    for name, gate in gates.items():
        if gate.shape != u.shape:
            raise ValueError(f"{name}: got shape {gate.shape}, needed u's {u.shape}")
    bins = (2 * t if causal else t) // 2 + 1
    if keep is not None and not 1 <= keep <= bins:
        raise ValueError(
            f"keep_frequencies: got {keep}, needed 1 to {bins}, all frequencies of a "
            f"signal of {t}{' and as many zeros' if causal else ''}"
        )
    return k.reshape(h, k.shape[-1])


def _over_explicit_axes(fn, u, k):
    """Under shard_map over a mesh's explicit axes, if any: signals stay whole."""
    mesh = jax.sharding.get_abstract_mesh()
    explicit = () if mesh.empty else mesh.explicit_axes
    if not explicit:
        return fn(u, k)
    lead = tuple(jax.typeof(u).sharding.spec)[: u.ndim - 1]
    specs = P(*lead, None), P(lead[-1], None)
    u, k = (
        jax.sharding.reshard(a, spec) for a, spec in zip((u, k), specs, strict=True)
    )
    mapped = jax.shard_map(
        fn, in_specs=specs, out_specs=specs[0], axis_names=set(explicit)
    )
    return mapped(u, k)
