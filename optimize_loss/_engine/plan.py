"""Which links are for which parameters, in which order, and with which numbers of others."""

import copy
import dataclasses
import operator
from collections.abc import Iterator, Mapping
from typing import Any

from jax.core import Tracer

from optimize_loss._checks import InvalidType
from optimize_loss._engine.flow import Place
from optimize_loss._engine.link import Link, TreeLink, number_rules
from optimize_loss._engine.loss_scale import LossScale
from optimize_loss._engine.plateau import ReduceOnPlateau
from optimize_loss._engine.selection import ForParameters
from optimize_loss._engine.trees import Params


def linked(entries: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Return the links by name, those for some parameters without telling which."""
    return ((n, x.link if isinstance(x, ForParameters) else x) for n, x in entries.items())


def merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return links in a row, from several rows.

    Raises:
      ValueError: two have one name.
    """
    names = [name for part in parts for name in part]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"The links of `optimizer` must have other names than {twice}.")
    return {name: link for part in parts for name, link in part.items()}


def has_rate(link: Any) -> bool:
    """Return whether a link of ours has a learning rate, and no parameter of that name."""
    is_ours = isinstance(link, Link) and "learning_rate" in number_rules(type(link))
    return is_ours and "learning_rate" in link.numbers()


def takes(name: str, entry: Any, params: Params, marks: list[bool]) -> tuple[bool, ...]:
    """Return for each parameter whether a link is for it; integers are no link's."""
    if params.are_unknown:
        return ()
    link = entry.link if isinstance(entry, ForParameters) else entry
    if isinstance(link, Link):
        marks = [m and link.suits(p) for m, p in zip(marks, params.leaves, strict=True)]
    if not isinstance(entry, ForParameters):
        return tuple(marks)
    # Parameters in one bucket go through the same links: the first of them tells.
    names, leaves = params.each()
    meant = dict(zip(names, entry.takes(names, leaves), strict=True))
    takes = [meant[m[0]] and mark for m, mark in zip(params.members, marks, strict=True)]
    if not any(takes) and not entry.optional:
        raise ValueError(
            f"The link {name!r} must be for a parameter. Received: {entry!r}, for the parameters "
            f"{names}."
        )
    return tuple(takes)


def lender(entries: Mapping[str, Any], borrower: str, number: str) -> str:
    """Return the name of the one link whose number another one borrows.

    Raises:
      ValueError: no link has such a number, or more than one.
    """
    others = [
        name
        for name, link in linked(entries)
        if name != borrower and isinstance(link, Link) and number in link.numbers()
        if number in number_rules(type(link))  # and is not named after a parameter
    ]
    own = where(entries[borrower])
    wider = (own, getattr(own, "within", None), getattr(own, "whole", None), None)
    suited = [n for n in others if where(entries[n]) in wider]
    if len(suited) != 1:
        raise ValueError(
            f"The link {borrower!r} needs the `{number}` of one other link, which is for all "
            f"parameters or for the same ones. Links that have one: {others}."
        )
    return suited[0]


def where(entry: Any) -> Any:
    """Return which parameters a link is for; None for all."""
    return entry.where if isinstance(entry, ForParameters) else None


def check_order(entries: Mapping[str, Any]) -> None:
    """Raise if a link lacks its lender, or one for all parameters does not stand where it must."""
    check_last([Place(n, x, (where(entries[n]) is None,)) for n, x in linked(entries)])
    _check_head(entries)
    for name, link in linked(entries):
        if isinstance(link, TreeLink) and (link.gates or link.moves or link.needs_stored):
            raise InvalidType(
                f"The link {name!r} must be a `Link` and no `TreeLink`, as it is a gate, moves "
                f"parameters or needs them as they are stored. Received: {link!r}."
            )
        for number in getattr(link, "borrows", ()):
            lender(entries, name, number)


def _check_head(entries: Mapping[str, Any]) -> None:
    """Raise if a guard has a gate or a loss scale before it, or a number to lower is not there."""
    links = dict(linked(entries))
    before: list[str] = []
    for name, link in links.items():
        if not isinstance(link, Link):
            continue
        if link.needs == "health" and before:
            raise ValueError(
                f"The link {name!r} must stand before {before}, so that nothing of a batch that is "
                f"left out stays in the state. Received: {[*links]}."
            )
        if link.gates or isinstance(link, LossScale):
            before.append(name)
        if isinstance(link, ReduceOnPlateau) and not any(map(has_rate, links.values())):
            raise ValueError(
                f"The link {name!r} lowers the `learning_rate` of other links, and none has one. "
                f"Received: {[*links]}."
            )


def check_last(places: list[Place]) -> None:
    """Raise if a link that averages what is stored has one behind it that changes it."""
    for i, place in enumerate(places):
        if not getattr(place.link, "needs_stored", False):
            continue
        for other in places[i + 1 :]:
            looks = getattr(other.link, "observes", False)
            # A link that rounds keeps nothing of what it sees.
            looks = looks or (other.link.averages and not place.link.averages)
            changes = other.gates or not looks
            if changes and any(map(operator.and_, place.takes, other.takes)):
                raise ValueError(
                    f"The link {place.name!r} must stand last, as it averages what is stored. "
                    f"Received: {[p.name for p in places]}."
                )


def structure(entry: Any) -> Any:
    """Return what of a link of ours is not a number in its state."""
    if isinstance(entry, ForParameters):
        return {**_fields(entry), "link": structure(entry.link)}
    if not isinstance(entry, Link):
        return entry
    numbers, rules = entry.numbers(), number_rules(type(entry))
    inside = [value for name, value in numbers.items() if name not in rules]
    rest = {n: _without(inside, x) for n, x in _fields(entry).items() if n not in numbers}
    return type(entry), rest, [*numbers]


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
    if type(field) is tuple:
        parts = tuple(map(_known, field))
        return parts if any(map(operator.is_not, parts, field)) else field
    return field


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def _without(numbers: list[Any], field: Any) -> Any:
    """Return a field without the numbers that stand inside it, as multipliers do."""
    if isinstance(field, tuple):
        return tuple(_without(numbers, part) for part in field)
    return None if any(field is number for number in numbers) else field
