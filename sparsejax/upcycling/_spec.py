"""What to make of which leaves."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from sparsejax.upcycling import _names
from sparsejax.upcycling._modes import Copy, Mode

# Powers of the gradient that the fields of optax states run means of.
MOMENTS = {
    "mu": 1,
    "trace": 1,
    "acc_grads": 1,
    "nu": 2,
    "nu_max": 2,
    "sum_of_squares": 2,
    "v": 2,
    "e_g": 2,
    "e_x": 0,  # of Adadelta's steps, which do not grow with the gradient
    "v_row": 2,
    "v_col": 2,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ffn:
    """The feed-forward layers of a dense model, and where their experts go.

    Names are paths joined by '/'; a * stands for anything, slashes too, and for the
    same in the target. A layer of the source whose place in the target has no router
    stays dense: so every k-th layer is upcycled where the target says so.

    Attributes:
      source: Path of the layer in the dense model, such as "blocks/*/mlp".
      target: Path of the MoE layer; the same by default.
      w_in: Path of the kernel ``[d, f]`` below ``source``, such as "up/kernel".
      w_out: That of the kernel ``[f, d]``.
      w_gate: That of the gate's kernel ``[d, f]``: for experts that compute
        (activation(x W_gate) * (x W_in)) W_out.
      names: Paths below ``target`` where they are not ``router``, ``w_in``, ``w_gate``,
        ``w_out``, ``shared_in``, ``shared_gate``, ``shared_out``, ``balance``.
      axis: Where layers are stacked for a scan: the axis of layers, of every leaf of
        source and target. None: not stacked.
      layers: Which of the stacked layers go there: a slice, or a number, which takes
        the axis away.
    """

    source: str
    target: str = ""
    w_in: str
    w_out: str
    w_gate: str | None = None
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    axis: int | None = None
    layers: slice | int | None = None

    def __post_init__(self):
        if not self.target:
            object.__setattr__(self, "target", self.source)
        _names.check_stars("Ffn", self.source, self.target)
        _check_layers(self.layers, self.axis)

    @property
    def kernels(self) -> dict[str, str]:
        """Paths of the dense layer's kernels by the experts' names."""
        found = {"w_in": self.w_in, "w_gate": self.w_gate, "w_out": self.w_out}
        return {role: path for role, path in found.items() if path is not None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Move:
    """Leaves that are the same under another path, or of some of the stacked layers.

    What keeps its path needs none.

    Attributes:
      source: Path in the dense model, * as in ``Ffn``.
      target: Path in the target; the same by default.
      axis: The axis of stacked layers, where ``layers`` is given.
      layers: Which of them: a slice, or a number, which takes the axis away.
    """

    source: str
    target: str = ""
    axis: int = 0
    layers: slice | int | None = None

    def __post_init__(self):
        if not self.target:
            object.__setattr__(self, "target", self.source)
        _names.check_stars("Move", self.source, self.target)
        _check_layers(self.layers, self.axis)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """What ``upcycle`` makes.

    Attributes:
      target: Shapes of the MoE model's parameters: ``jax.eval_shape`` of its init, in
        any container. Arrays are put where its leaves have a sharding.
      ffns: The feed-forward layers.
      mode: How experts are made: ``Copy``, ``Granular``, ``Drop``, ``Shared``,
        ``Adapters``.
      router: The router that the MoE layers use, such as
        ``functools.partial(routing.top_k, k=2, normalize="sum_stopgrad")``: the report
        reads from its arguments whether the result is exact, ``Granular`` its scale.
        Of other functions than those of ``routing``, or None, nothing is assumed.
      tokens: How many tokens are routed together: with a capacity of so many none is
        dropped. None: not known.
      router_std: Standard deviation of the router's initial kernel.
      given: Values of leaves of the target by path, * as in ``Ffn``: an array, or a
        function ``(key, shape, dtype) -> array`` such as ``jax.nn.initializers`` make.
        They go before what the mode would make.
      moves: Leaves other than those of feed-forward layers that change their path.
      optimizer: The optax transformation whose state is handed over. Where its masks or
        labels are trees rather than functions of params, a pair: the dense model's and
        the MoE's.
      opt_state: What happens to the moments of experts: "zeros"; "copy" of the dense
        layer's; "rescale", the same times what the gradient changes by: 1 / e for
        running means of gradients, 1 / e^2 for those of squares (of copies; see the
        modes). Those of all other parameters are kept.
      reset_count: Sets every leaf ``count`` to 0: bias corrections and schedules begin
        again.
      moments: Power of the gradient (1 or 2; 0 for none) of further fields of optimizer
        states, such as {"ema": 0}. Known are mu, trace and acc_grads (1), nu, nu_max,
        sum_of_squares, e_g, v, v_row and v_col (2), e_x (0); adamax means nu to the
        power 1.
    """

    target: Any
    ffns: Sequence[Ffn]
    mode: Mode = Copy()
    router: Callable[..., Any] | None = None
    tokens: int | None = None
    router_std: float = 0.02
    given: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    moves: Sequence[Move] = ()
    optimizer: Any = None
    opt_state: Literal["zeros", "copy", "rescale"] = "zeros"
    reset_count: bool = False
    moments: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if not self.ffns:
            raise ValueError("ffns: got none, needed at least one Ffn")
        if self.opt_state not in ("zeros", "copy", "rescale"):
            raise ValueError(
                f"opt_state: got {self.opt_state!r}, needed 'zeros', 'copy' or "
                "'rescale'"
            )
        if not self.router_std >= 0:
            raise ValueError(f"router_std: got {self.router_std}, needed at least 0")


def _check_layers(layers, axis):
    if layers is not None and axis is None:
        raise ValueError(
            f"layers: got {layers}, needed the axis of stacked layers with it"
        )
    if axis is not None and axis < 0:
        raise ValueError(f"axis: got {axis}, needed one counted from the front")
