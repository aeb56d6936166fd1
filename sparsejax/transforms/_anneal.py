"""A schedule whose present value lives in the optimizer's state."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class AnnealState(NamedTuple):
    """State of `anneal`: arrays only."""

    annealed_steps: Any  # count of finished steps; shape=(), dtype=int32
    annealed_value: Any  # the schedule's value for the coming step


def anneal(schedule: Callable[[Any], Any]) -> optax.GradientTransformationExtraArgs:
    """Counts steps and holds a schedule's value; the updates pass unchanged.

    `value = schedule(t)` with t the count of finished steps, for a loss that anneals
    something (`straight_through`): `get_annealed` reads it from the state, of which a
    checkpoint then resumes it. In a chain it may stand anywhere. Inside
    `optax.MultiSteps` it counts real steps, inside `optax.apply_if_finite` those that
    were taken. Costs nothing.

    Args:
      schedule: Step -> number or, for several, any tree of numbers; of `schedules` or
        of optax. It must accept a traced int32 step.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Example:
      >>> half = optax.linear_schedule(1.0, 0.0, transition_steps=2)
      >>> tx = optax.chain(optax.sgd(0.1), anneal(lambda t: {"alpha": half(t)}))
      >>> params = {"w": jnp.ones(3)}
      >>> state = tx.init(params)
      >>> print(get_annealed(state)["alpha"])
      1.0
      >>> updates, state = tx.update(params, state, params)
      >>> print(get_annealed(state)["alpha"])
      0.5
    """

    def at(count):
        # Typed strongly, so that the second step finds the types of the first.
        as_array = lambda value: jnp.asarray(value, jnp.result_type(value))
        return AnnealState(count, jax.tree.map(as_array, schedule(count)))

    def init_fn(params):
        del params
        return at(jnp.zeros((), jnp.int32))

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        return updates, at(optax.safe_increment(state.annealed_steps))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def get_annealed(opt_state: Any) -> Any:
    """The value that `anneal` holds for the coming step, under any nesting of wrappers.

    Args:
      opt_state: State of `anneal`, or of transformations around it.

    Returns:
      What the schedule returned, as arrays; usable inside jit.

    Raises:
      ValueError: There is not exactly one `AnnealState` inside. Several values are one
        schedule that returns a tree.

    Example:
      >>> state = anneal(optax.constant_schedule(0.75)).init(jnp.ones(3))
      >>> print(get_annealed(state))
      0.75
    """
    is_mine = lambda node: isinstance(node, AnnealState)
    nodes = jax.tree.leaves(opt_state, is_leaf=is_mine)
    states = [node for node in nodes if is_mine(node)]
    if len(states) != 1:
        raise ValueError(
            f"opt_state must contain exactly one AnnealState, got {len(states)} in a "
            f"{type(opt_state).__name__}"
        )
    return states[0].annealed_value
