"""Hyperparameters as state: how a field becomes an array, and an array the value of this step."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optimize_loss._checks import Rule, received
from optimize_loss.schedules import Decayed, evaluate
from optimize_loss.transforms._arrays import from_host
from optimize_loss.transforms._base import Link

# Stands in the state where a schedule drives the number. It is finite, so that tools which look
# for NaN and infinities stay quiet, and no hyperparameter is that large.
FOLLOW_SCHEDULE = float(np.finfo(np.float32).max)

DTYPES = {"count": jnp.int32, "seed": jnp.uint32}


def to_array(name: str, value: Any, rule: Rule, dtype: Any) -> jax.Array:
    """Return a hyperparameter as it enters the state; β as the pair (β, 1-β), each rounded once.

    Raises:
      ValueError: the rule holds for the number, but not for what `dtype` makes of it.
    """
    if isinstance(value, Decayed):
        value = value.learning_rate
    elif callable(value):
        return from_host([FOLLOW_SCHEDULE] * 2 if rule.kind == "decay" else FOLLOW_SCHEDULE, dtype)
    dtype = DTYPES.get(rule.kind, dtype)
    if isinstance(value, Tracer):
        # A copy, since the next step takes the memory of the state, not of the caller's array.
        value = jnp.copy(value).astype(dtype)
        return jnp.stack([value, 1 - value]) if rule.kind == "decay" else value
    with np.errstate(over="ignore", under="ignore"):
        pair = np.array([value, 1 - value] if rule.kind == "decay" else value).astype(dtype)
    stored = pair.flat[0]
    if not np.isfinite(stored) or not rule.holds(stored):
        raise ValueError(
            f"`{name}` must be {rule.words} as {np.dtype(dtype).name}, which makes it {stored}. "
            f"{received(name, value)}"
        )
    return from_host(pair, dtype)


def at_step(name: str, value: Any, rule: Rule, number: jax.Array, step: jax.Array) -> jax.Array:
    """Return a hyperparameter at this step.

    A schedule's value that breaks the rule raises where it is known, and becomes NaN where it is
    traced: the step then shows it in the loss, and does not climb or freeze in silence. A decay
    rate from a schedule gives the pair (β, 1-β) in the dtype of the state.

    Args:
      name: its name, for messages.
      value: the link's field: a number, a schedule, or a `Decayed`.
      rule: the field's rule.
      number: what the state holds: the value, or that the schedule is to be followed.
      step: the step that schedules see, an int32.
    """
    if isinstance(value, Decayed):
        return evaluate(name, value, step, number.dtype, number, rule)
    if not callable(value):
        return number
    now = evaluate(name, value, step, number.dtype, None, rule)
    if rule.kind == "decay":
        now = jnp.stack([now, 1 - now])
    return jnp.where(number == FOLLOW_SCHEDULE, now, number)


def all_at_step(
    owner: str, link: Link, state: Mapping[str, Any], step: jax.Array
) -> dict[str, jax.Array]:
    """Return all hyperparameters of the link called `owner` at this step, by name."""
    return {
        name: at_step(f"{name}` of the link `{owner}", value, link.rule(name), state[name], step)
        for name, value in link.numbers().items()
    }


def replaced(name: str, value: Any, field: Any, rule: Rule, number: jax.Array) -> jax.Array:
    """Return the array that takes the place of `number` in the state, of the same kind.

    Args:
      name: the hyperparameter's name, for messages.
      value: a scalar, checked as the link checks it (a traced one goes unchecked), or None for
        what the link was built with.
      field: the link's field.
      rule: the field's rule.
      number: the array now in the state.
    """
    value = field if value is None else rule.check(name, value)
    new = to_array(name, value, rule, number.dtype)
    if isinstance(number, Tracer) or isinstance(new, Tracer):
        return new
    # An array that was put somewhere compiles another program than one that was not.
    return jax.device_put(new, number.sharding) if number.committed else new
