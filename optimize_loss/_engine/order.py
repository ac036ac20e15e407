"""In which order links may stand, and which of them need others."""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import optax

from optimize_loss._checks import InvalidType
from optimize_loss._engine.kinds import Gate, LossScale, RateScale
from optimize_loss._engine.link import Link, TreeLink, number_rules, overrides, passes
from optimize_loss._engine.numbers import has_rate
from optimize_loss._engine.plan import Place
from optimize_loss._engine.selection import linked, where


def merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return links in a row, from several rows.

    Raises:
      ValueError: two have one name.
    """
    names = [name for part in parts for name in part]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"The links of `optimizer` must have other names than {twice}.")
    return {name: link for part in parts for name, link in part.items()}


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


def check_order(entries: Mapping[str, Any]) -> None:
    """Raise if a link lacks its lender, or one for all parameters does not stand where it must."""
    check_last([Place(n, x, (where(entries[n]) is None,)) for n, x in linked(entries)])
    _check_head(entries)
    for name, link in linked(entries):
        if isinstance(link, TreeLink) and overrides(link, "before", "after"):
            raise InvalidType(
                f"The link {name!r} must be a `Link` and no `TreeLink`, as it runs before or after "
                f"the update of each parameter. Received: {link!r}."
            )
        if getattr(link, "needs", None) == "learning_rate":
            lender(entries, name, "learning_rate")


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
        if isinstance(link, Gate | LossScale):
            before.append(name)
        if isinstance(link, RateScale) and not any(map(has_rate, links.values())):
            raise ValueError(
                f"The link {name!r} lowers the `learning_rate` of other links, and none has one. "
                f"Received: {[*links]}."
            )


def check_last(places: Sequence[Place]) -> None:
    """Raise if a link that sees all that a parameter moves by has one behind it that changes it."""
    for i, place in enumerate(places):
        if not overrides(place.link, "after"):
            continue
        for other in places[i + 1 :]:
            changes = isinstance(other.link, Gate) or not passes(other.link)
            # A link that rounds keeps nothing of what it sees.
            turns = overrides(other.link, "after") and not overrides(other.link, "averaged")
            averages = overrides(place.link, "averaged")
            late = changes or (turns and averages)
            if late and any(map(operator.and_, place.takes, other.takes)):
                raise ValueError(
                    f"The link {place.name!r} must stand last, as it sees all that a parameter "
                    f"moves by. Received: {[p.name for p in places]}."
                )


def with_losses(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return the links of a chain, each gate with the loss where one behind may need it."""
    links, needed = dict(entries), False
    for name, link in reversed(list(linked(entries))):
        if needed and isinstance(link, Gate):
            links[name] = link.with_loss()
        needed = needed or isinstance(link, optax.GradientTransformationExtraArgs)
        needed = needed or getattr(link, "needs", None) == "loss"
    return links
