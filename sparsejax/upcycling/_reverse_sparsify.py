"""From structured layers to dense ones, in the middle of a training run."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsejax import structured
from sparsejax.upcycling import _names
from sparsejax.upcycling._optimizer import convert_state
from sparsejax.upcycling._plan import Plan, check_leaves, place
from sparsejax.upcycling._spec import Ffn, Move, Spec


class Densified(NamedTuple):
    """What ``reverse_sparsify`` returns.

    Attributes:
      params: In the containers of ``target``.
      opt_state: As the dense model's optimizer has it; None if none was given.
    """

    params: Any
    opt_state: Any


def reverse_sparsify(
    params: Any,
    opt_state: Any = None,
    *,
    target: Any,
    optimizer: Any = None,
    moments: Mapping[str, int] | None = None,
) -> Densified:
    """Multiplies the factors of structured layers out, so that training goes on dense.

    The network computes what it did, to rounding. Layers with ``factor_0``,
    ``factor_1``, ... (as ``MonarchLinear``, ``ButterflyLinear`` and
    ``KroneckerSparseLinear`` have them) or ``down`` and ``up`` (``LowRankLinear``)
    become a ``kernel`` at the same path; all other leaves keep theirs, with their
    moments. Layers stacked for a scan, their axis in front, become stacked kernels.
    Pure, and works under ``jit``.

    Of the optimizer's state, for a kernel:

    - Running means of the gradient (power 1) begin at zero. Which gradient of the
      kernel that of the factors came from is not known: they see no more of it than
      what moves the kernel among such products.
    - Running means of its square begin at what explains the factors' best, if entries
      of the kernel's gradient are independent: then the mean square of a factor's entry
      e is ``sum_kn (dW[k, n] / d e)^2 v[k, n]``; what it is in the mean over the k, n
      that it reaches goes back to them, weighted in the same way. Exact where v is
      constant. Zeros would make Adam's next steps, whose count goes on,
      ``(1 - b1) / sqrt(1 - b2)`` or 3 times too long. Entries that no factor
      reaches (outside a block-diagonal) have the mean of the others.
    - Anything else of a kernel begins at zero.

    Args:
      params: Of the structured model, any pytree; leaves are matched by path as in
        ``upcycle``.
      opt_state: State of ``optimizer`` for them; None: none is made.
      target: Shapes of the dense model's parameters, as from ``jax.eval_shape`` of its
        init, in any container.
      optimizer: The optax transformation, or a pair: the structured model's and the
        dense one's, where masks or labels differ. Their states must have one form.
      moments: Powers of fields of the state that are not known, as in ``Spec``.

    Returns:
      A ``Densified``, (params, opt_state).

    Raises:
      ValueError: By path, what in the target has no source or in params no place, which
        shape or dtype does not fit, which field cannot be converted.

    Example:
      >>> from sparsejax import structured, upcycling
      >>> left, right = structured.init_chain(
      ...     jax.random.key(0), structured.monarch(6, 4, blocks=2))
      >>> params = {"up": {"factor_0": left, "factor_1": right, "bias": jnp.ones(4)}}
      >>> target = {"up": {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)}}
      >>> adam = optax.adam(1e-3)
      >>> params, state = upcycling.reverse_sparsify(
      ...     params, adam.init(params), target=target, optimizer=adam)
      >>> params["up"]["kernel"].shape, state[0].nu["up"]["kernel"].shape
      ((6, 4), (6, 4))

    References:
      Dao et al., `Monarch: Expressive Structured Matrices for Efficient and Accurate
      Training <https://arxiv.org/abs/2204.00595>`_, 2022, from which the name is.
    """
    source = _names.named(params, "params")
    wanted = _names.named(target, "target")
    kernels = _kernels(source, wanted)
    kept: dict[str, tuple[str, Move | None]] = {
        n: (n, None) for n in wanted if n not in kernels and n in source
    }
    missing = [n for n in wanted if n not in kernels and n not in kept]
    used = {*kept, *(n for names in kernels.values() for n in names)}
    left = [n for n in source if n not in used]
    if missing or left:
        raise ValueError(
            f"target: got {', '.join(missing) or 'nothing'} without a source, and of "
            f"params {', '.join(left) or 'nothing'} without a place; needed a kernel "
            "for factor_0, factor_1, ... or down and up, and the rest as it is"
        )

    def values(source):
        made = {n: source[n] for n in kept}
        for name, parts in kernels.items():
            like = wanted[name]
            factors = [_factor(source[n], n) for n in parts]
            made[name] = _over_layers(_dense, like)(factors).astype(like.dtype)
        return made

    check_leaves("target", jax.eval_shape(values, source), wanted)

    def convert(means, power, like):
        """By name in params -> by name in the target."""
        made = {}
        for name, leaf in like.items():
            parts = kernels.get(name, ())
            known = all(n in means for n in parts)
            if name in kept and name in means:
                made[name] = means[name]
            elif parts and power == 2 and known and leaf.shape == wanted[name].shape:
                factors = [_factor(source[n], n) for n in parts]
                squares = [_factor(means[n], n) for n in parts]
                made[name] = _over_layers(_squares, leaf)(factors, squares)
                made[name] = made[name].astype(leaf.dtype)
            else:
                made[name] = jnp.zeros(leaf.shape, leaf.dtype)
        return made

    if opt_state is not None:
        # Its rules of layers say nothing to what is already planned.
        spec = Spec(
            target=target,
            ffns=[Ffn(source="*", w_in="kernel", w_out="kernel")],
            optimizer=optimizer,
            moments=moments or {},
        )
        plan = Plan((), kept, {}, ())
        opt_state, _ = convert_state(params, opt_state, plan, spec, convert)
    made = values(source)
    leaves = [place(made[name], leaf) for name, leaf in wanted.items()]
    return Densified(jax.tree.unflatten(jax.tree.structure(target), leaves), opt_state)


def _kernels(source, wanted):
    """Name of each kernel that is made -> names of its factors, the first first."""
    found = {}
    for name in wanted:
        path = re.fullmatch("(.*/)?kernel", name)
        if path is None or name in source:
            continue
        prefix = path[1] or ""
        count = 0
        while f"{prefix}factor_{count}" in source:
            count += 1
        if count:
            found[name] = [f"{prefix}factor_{i}" for i in range(count)]
        elif f"{prefix}down" in source and f"{prefix}up" in source:
            found[name] = [f"{prefix}down", f"{prefix}up"]
    return found


def _factor(x, name):
    """[..., a, d, c, b]; of low rank 1, 1, in and rank, or rank and out."""
    low = jnp.finfo(x.dtype).bits < 32
    x = x.astype(jnp.float32) if low else x
    return x if "factor_" in name.rsplit("/", 1)[-1] else x[..., None, None, :, :]


def _over_layers(one, like):
    """A function of one layer's factors and sizes, for however many are stacked."""
    over = lambda *factors: one(*factors, *like.shape[-2:])
    for _ in like.shape[:-2]:
        over = jax.vmap(over)
    return over


def _dense(factors, k, n):
    return structured.to_dense(factors, k, n)


def _squares(factors, squares, k, n):
    """Mean squares of the factors' gradients -> of the matrix's; see the public one.

    (dW[k, n] / d e)^2 = before[k, e]^2 after[e, n]^2 of an entry e of a factor, of the
    products of the factors on both sides of it.
    """
    put, weight = 0.0, 0.0
    for t, square in enumerate(squares):
        a, d, c, b = square.shape
        before = jnp.eye(k, a * c * d, dtype=square.dtype)
        after = jnp.eye(a * b * d, n, dtype=square.dtype)
        if t:
            before = structured.to_dense(factors[:t], k)
        if t + 1 < len(factors):
            after = structured.to_dense(factors[t + 1 :], None, n)
        before, after = before**2, after**2
        inputs = before.sum(0).reshape(a, c, d).transpose(0, 2, 1)
        outputs = after.sum(1).reshape(a, b, d).transpose(0, 2, 1)
        reach = inputs[..., None] * outputs[:, :, None, :]
        mean = jnp.where(reach > 0, square / jnp.where(reach > 0, reach, 1), 0)
        put = put + before @ structured.to_dense([mean]) @ after
        weight = weight + before @ structured.to_dense([jnp.ones_like(mean)]) @ after
    inside = weight > 0
    v = jnp.where(inside, put / jnp.where(inside, weight, 1), 0)
    count = jnp.maximum(1, jnp.sum(inside, dtype=v.dtype))
    return jnp.where(inside, v, jnp.sum(v) / count)
