"""Hyperparameters as state: of a link and of a chain, as arrays and at a step."""

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optimize_loss._checks import Rule, received
from optimize_loss._engine.device import from_host
from optimize_loss._engine.kinds import Gate, LossScale, RateScale
from optimize_loss._engine.link import Link, Numbers, State
from optimize_loss._engine.selection import linked
from optimize_loss._engine.spelling import Entries, all_numbers, meant
from optimize_loss.schedules import Decayed, evaluate

# Stands in the state where a schedule drives the number. It is finite, so that tools which look
# for NaN and infinities stay quiet, and no hyperparameter is that large.
FOLLOW_SCHEDULE = float(np.finfo(np.float32).max)

Links = Mapping[str, Link]  # the links of ours in a chain, by name

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
        # A copy: the next step donates the state, not the caller's array.
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


def set_numbers(entries: Entries, state: State, values: Mapping[str, Any]) -> State:
    """Return the state with other values, by name; None gives back that of the link.

    Where two names mean one number, the one that means fewer decides.
    """
    state, links = dict(state), dict(linked(entries))
    found = {name: meant(entries, name) for name in values}
    for name in sorted(found, key=lambda name: len(found[name]), reverse=True):
        for owner, number in found[name]:
            new = _set(name, values[name], links[owner], number, state[owner])
            state[owner] = {**state[owner], number: new}
    return state


def _set(name: str, value: Any, link: Link, number: str, numbers: Numbers) -> jax.Array:
    """Return what takes the place of a number of a link, where `name` is set to a value."""
    field = link.numbers()[number]
    if value is not None and isinstance(field, Tracer):
        raise ValueError(
            f"`{name}` cannot be set: the link was built with a traced value of it, which "
            "each update takes. Build with a number, and set that in the state."
        )
    return replaced(name, value, field, link.rule(number), numbers[number])


def traced_numbers(links: Links) -> list[str]:
    """Return which numbers the links were given as traced values, as `link/number`."""
    return [
        f"{name}/{number}"
        for name, link in links.items()
        for number, value in link.numbers().items()
        if isinstance(value, Tracer)
    ]


def numbers_at(
    links: Links, state: State, step: Any, owners: Iterable[str] | None = None
) -> dict[str, Numbers]:
    """Return the numbers of links at this step, by link, the rates lowered by plateaus.

    Args:
      links: all links of ours.
      state: of the chain.
      step: the step that schedules see.
      owners: the names of some of the links; all of them unless given.
    """
    scales = [x.scale(state[name]) for name, x in links.items() if isinstance(x, RateScale)]
    names = links if owners is None else owners
    found = {n: all_at_step(n, links[n], state[n], step) for n in names}
    return {n: _lowered(x, scales) if has_rate(links[n]) else x for n, x in found.items()}


def named_at(links: Links, name: str, state: State, step: Any) -> dict[str, jax.Array]:
    """Return the hyperparameter `name` of every link that has it, at this step, by link."""
    owners = [owner for owner, number in all_numbers(links) if number == name]
    return {n: own[name] for n, own in numbers_at(links, state, step, owners).items()}


def judged(links: Links, numbers: Mapping[str, Numbers], state: State) -> dict[str, Any]:
    """Return what `Health` has of loss scales and schedules, from the numbers at this step."""
    shrinking = [x > 1 for x in _scales(links, Gate, state, numbers)]
    held = [
        jnp.all(jnp.isfinite(numbers[name][number]))
        for name, link in links.items()
        for number, value in link.numbers().items()
        if callable(value)
    ]
    return {
        "loss_scale": _product(_scales(links, LossScale, state, numbers)),
        "scale_shrinks": functools.reduce(jnp.logical_or, shrinking, jnp.array(False)),
        "schedules_hold": functools.reduce(jnp.logical_and, held, jnp.array(True)),
    }


def loss_scale(links: Links, state: State, step: Any) -> jax.Array | None:
    """Return what the loss must be multiplied by before its gradients come here, or None."""
    scaling = [name for name, link in links.items() if isinstance(link, LossScale)]
    return _product(_scales(links, LossScale, state, numbers_at(links, state, step, scaling)))


def dynamic_loss_scale(links: Links, state: State) -> jax.Array | None:
    """Return the product of the loss scales that change by themselves, or None."""
    return _product(_scales(links, Gate, state, {}))


def has_rate(link: Any) -> bool:
    """Return whether a link of ours has a learning rate."""
    return isinstance(link, Link) and "learning_rate" in link.numbers()


def _scales(
    links: Links, kind: type[Link], state: State, numbers: Mapping[str, Numbers]
) -> Iterator[jax.Array]:
    """Yield the scale of each loss scale of a kind, from the numbers of links at this step."""
    for name, link in links.items():
        if isinstance(link, LossScale) and isinstance(link, kind):
            yield link.factor_of_loss(numbers.get(name, {}), state[name])


def _product(scales: Iterable[jax.Array]) -> jax.Array | None:
    """Return the product of loss scales; None where there is none."""
    found = list(scales)
    return functools.reduce(jnp.multiply, found) if found else None


def _lowered(numbers: Numbers, scales: list[jax.Array]) -> Numbers:
    """Return the numbers of a link, its learning rate multiplied by what lowers it."""
    rate = numbers["learning_rate"]
    for scale in scales:
        rate = rate * scale.astype(rate.dtype)
    return {**numbers, "learning_rate": rate}
