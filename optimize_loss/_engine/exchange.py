"""Links that differ in numbers alone, and links without their traced numbers."""

import copy
import dataclasses
import operator
from collections.abc import Mapping
from typing import Any

from jax.core import Tracer

from optimize_loss._engine.by_name import ByName
from optimize_loss._engine.equal import same
from optimize_loss._engine.link import Link, State, number_rules
from optimize_loss._engine.numbers import replaced
from optimize_loss._engine.selection import ForParameters


def exchanged(old: Mapping[str, Any], new: Mapping[str, Any], state: State) -> tuple[State, bool]:
    """Return the state of links with the numbers of others, and whether a schedule comes or goes.

    Raises:
      ValueError: the new links are other ones, or differ in more than numbers.
    """
    if [*old] != [*new]:
        raise ValueError(f"The links must stay {[*old]}. Received: {[*new]}.")
    state, retraced = dict(state), False
    for name, entry in old.items():
        if not same(structure(entry), structure(new[name])):
            raise ValueError(
                f"The link {name!r} must stay {entry!r} but for its numbers. "
                f"Received: {new[name]!r}."
            )
        link, before = _link_of(new[name]), _numbers_of(_link_of(entry))
        for number, value in _numbers_of(link).items():
            if _differ(value, before[number]):
                retraced = retraced or callable(value) or callable(before[number])
                changed = replaced(number, None, value, link.rule(number), state[name][number])
                state[name] = {**state[name], number: changed}
    return state, retraced


def _link_of(entry: Any) -> Any:
    return entry.link if isinstance(entry, ForParameters) else entry


def _numbers_of(link: Any) -> dict[str, Any]:
    return link.numbers() if isinstance(link, Link) else {}


def _differ(one: Any, other: Any) -> bool:
    is_traced = isinstance(one, Tracer) or isinstance(other, Tracer)
    return one is not other and (is_traced or not same(one, other))


def structure(entry: Any) -> Any:
    """Return what of a link of ours is not a number in its state."""
    if isinstance(entry, ForParameters):
        return {**_fields(entry), "link": structure(entry.link)}
    if not isinstance(entry, Link):
        return entry
    numbers, rules = entry.numbers(), number_rules(type(entry))
    inside = [value for name, value in numbers.items() if name.partition("/")[0] not in rules]
    fields = {n: x for n, x in _fields(entry).items() if n not in numbers or isinstance(x, ByName)}
    return type(entry), {n: _without(inside, x) for n, x in fields.items()}, [*numbers]


def settled(link: Any) -> Any:
    """Return a link as its functions may see it: with 1 for the numbers that are traced.

    They read them from the state, and a link that is hashed has no traced ones.
    """
    if not isinstance(link, Link):
        return link
    changed = {n: x for n, old in _fields(link).items() if (x := _known(old)) is not old}
    if not changed:
        return link
    new = copy.copy(link)
    for name, value in changed.items():
        object.__setattr__(new, name, value)
    return new


def _known(field: Any) -> Any:
    """Return a field with 1 for what is traced in it; the same one where nothing is."""
    if isinstance(field, Tracer):
        return 1.0
    if isinstance(field, ByName):
        known = _known(numbers := (field.pairs, field.rest))
        changed = dict(zip(("pairs", "rest"), known, strict=True))
        return field if known is numbers else dataclasses.replace(field, **changed)
    if type(field) is tuple:
        parts = tuple(map(_known, field))
        return parts if any(map(operator.is_not, parts, field)) else field
    return field


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def _without(numbers: list[Any], field: Any) -> Any:
    """Return a field without the numbers that stand inside it, as multipliers do."""
    if isinstance(field, ByName):
        return field.patterns, field.optional
    if isinstance(field, tuple):
        return tuple(_without(numbers, part) for part in field)
    return None if any(field is number for number in numbers) else field
