"""What an updater is: two pure functions and the steps at which the second runs."""

from collections.abc import Callable
from typing import Any, NamedTuple


class MaskUpdate(NamedTuple):
    """What an updater sees when masks are due. Dicts go by leaf name."""

    masks: dict[str, Any]  # bool, shaped like the weights
    memory: Any  # whatever the updater keeps between updates; a pytree of arrays
    params: dict[str, Any]  # the weights, exactly zero where the mask is False
    scores: dict[str, Any]  # dense gradients, or what came as grow_scores; signed
    key: Any  # typed PRNG key, another at every update
    step: Any  # int32 scalar, count of finished steps


class Updater(NamedTuple):
    """A rule for masks, as `sparsify` runs it.

    The rule sees all leaves at once, so that it may move density between them, and
    keeps what it needs in `memory`. Shapes, dtypes and structures must not change
    from one update to the next.

    Attributes:
      steps: Steps at which masks change, from `schedules.update_steps`; empty for
        masks that never do.
      init: `(params, key) -> (masks, memory)` from dicts of leaves by name; `key`
        is None unless the updater carries one.
      update: `MaskUpdate -> (masks, memory, ok)`. `ok` is a boolean scalar: where
        it is False, as for a NaN among what the rule looked at, the old masks and
        memory stay.
      key: PRNG key, or None for a rule without chance.
      observe: `(MaskUpdate, due) -> memory`, run at every step before `update`, for
        rules whose memory is as large as the weights: worked out here it joins the
        optimizer's passes, out of `update` it would be copied at every step. `due`
        is a boolean scalar: whether masks change at this step. NaN and inf are the
        rule's own to keep out. None: memory changes at updates alone.
      momentum: Whether `update` would rather see the inner optimizer's momentum as
        `memory`, which is what `init` and `observe` make where it has none. The inner
        optimizer is then given dense gradients.
    """

    steps: range
    init: Callable[[dict[str, Any], Any], tuple[dict[str, Any], Any]]
    update: Callable[[MaskUpdate], tuple[dict[str, Any], Any, Any]]
    key: Any = None
    observe: Callable[[MaskUpdate, Any], Any] | None = None
    momentum: bool = False
