"""In which order links may stand, and which of them need others."""

import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import optax

from optimize_loss._checks import InvalidType
from optimize_loss._engine.by_name import numbers_by_name
from optimize_loss._engine.kinds import Averaging, Gate, LossScale, RateScale
from optimize_loss._engine.link import Link, Stage, TreeLink, functions_of, passes
from optimize_loss._engine.numbers import has_rate
from optimize_loss._engine.plan import Place, kind_of, lender
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


def check_order(entries: Mapping[str, Any]) -> None:
    """Raise if a link lacks its lender, or one for all parameters does not stand where it must."""
    check_last([Place(n, x, (where(entries[n]) is None,)) for n, x in linked(entries)])
    _check_head(entries)
    _check_rates(entries)
    for name, link in linked(entries):
        _check_functions(name, link)
        _check_by_name(name, link)
        if getattr(link, "needs", None) == "learning_rate":
            lender(entries, name, "learning_rate")


def _check_by_name(name: str, link: Any) -> None:
    """Raise if a number of a link is given by name that must be one for all its parameters."""
    fields = numbers_by_name(link) if isinstance(link, Link) else {}
    kinds = isinstance(link, Gate | LossScale | RateScale | Averaging | TreeLink)
    for field in fields:
        if kinds or field == "learning_rate" or link.memory():
            raise InvalidType(
                f"`{field}` of the link {name!r} must be one number for all its parameters: only "
                "numbers of links that treat each parameter alone may depend on the name. Use "
                f"`ForParameters`, or `rules` of `optimize_loss`. Received: {link!r}."
            )


def _check_functions(name: str, link: Any) -> None:
    """Raise if a link has functions of which one would never run."""
    whole = isinstance(link, TreeLink)
    if whole and (isinstance(link, Gate) or functions_of(type(link)) & {"before", "after"}):
        raise InvalidType(
            f"The link {name!r} must be a `Link` and no `TreeLink`, as it is a gate, or runs "
            f"before or after the update of each parameter. Received: {link!r}."
        )
    own = functions_of(type(link))
    updates = own & {"leaf", "factor", "remember", "direction"}
    if "after" in own and (updates or isinstance(link, Gate)):
        raise InvalidType(
            f"The link {name!r} must not be a gate, and not have `leaf`, its halves or `factor`, "
            f"as it has `after`. Received: {link!r}."
        )


def _check_head(entries: Mapping[str, Any]) -> None:
    """Raise if a guard has a gate or a loss scale before it, or batches are weighed twice."""
    links = dict(linked(entries))
    before: list[str] = []
    for name, link in links.items():
        if getattr(link, "needs", None) == "health" and before:
            raise ValueError(
                f"The link {name!r} must come before {before}, so that nothing of a batch that is "
                f"skipped stays in the state. Received: {[*links]}."
            )
        if _weighs(link) and any(stage_of(links[n]) == Stage.GATHER for n in before):
            raise ValueError(
                f"The link {name!r} weights batches, and must not come after another link that "
                f"gathers them. Received: {[*links]}."
            )
        if isinstance(link, Gate | LossScale):
            before.append(name)


def _check_rates(entries: Mapping[str, Any]) -> None:
    """Raise if a link lowers the learning rates of others, and there are none."""
    links = dict(linked(entries))
    for name, link in links.items():
        if isinstance(link, RateScale) and not any(map(has_rate, links.values())):
            raise ValueError(
                f"The link {name!r} lowers the `learning_rate` of other links, and none has one. "
                f"Received: {[*links]}."
            )


def _weighs(link: Any) -> bool:
    """Return whether a link gathers batches by their weight."""
    return isinstance(link, Gate) and link.is_empty(1.0) is not None


def check_last(places: Sequence[Place]) -> None:
    """Raise if a link that sees all that a parameter moves by has one behind it that changes it."""
    for i, place in enumerate(places):
        for other in places[i + 1 :]:
            if _disturbs(other, place):
                raise ValueError(
                    f"The link {place.name!r} must come last, after {other.name!r}, as it sees "
                    f"all that a parameter moves by. Received: {[p.name for p in places]}."
                )


def _disturbs(other: Place, place: Place) -> bool:
    """Return whether a link must not stand behind one that sees all that a parameter moves by."""
    own, behind = stage_of(place.link), stage_of(other.link)
    if own <= Stage.UPDATE:
        return False
    splits = isinstance(other.link, Gate) or kind_of(type(other.link)) != "leaf"
    looks = behind == Stage.UPDATE and passes(type(other.link))
    meets = any(map(operator.and_, place.takes, other.takes))
    return splits or (behind < own and not looks and meets)


def stage_of(link: Any) -> Stage:
    """Return where a link stands among those of options."""
    stage = link.stage if isinstance(link, Link) else Stage.UPDATE
    return Stage.AFTER if stage == Stage.UPDATE and "after" in functions_of(type(link)) else stage


def arranged(*rows: Mapping[str, Any]) -> dict[str, Any]:
    """Return links in a row, from several rows.

    Links at the head of a row that come before all updates are first, by their stage; links that
    come after all updates are last. Between, the order is that of the rows.

    Raises:
      ValueError: two have one name.
    """
    links = merged(*rows)
    stages = {name: stage_of(link) for name, link in linked(links)}
    heads = [name for row in rows for name in head(row)]
    tails = [name for name in links if stages[name] > Stage.UPDATE]
    middles = [name for name in links if name not in {*heads, *tails}]
    order = [*sorted(heads, key=stages.__getitem__), *middles]
    return {name: links[name] for name in [*order, *sorted(tails, key=stages.__getitem__)]}


def head(links: Mapping[str, Any]) -> dict[str, Any]:
    """Return the links at the head of a row that come before all updates."""
    stages = {name: stage_of(link) for name, link in linked(links)}
    names = itertools.takewhile(lambda name: stages[name] < Stage.UPDATE, links)
    return {name: links[name] for name in names}


def with_losses(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return the links of a chain, each gate with the loss where one behind may need it."""
    links, needed = dict(entries), False
    for name, link in reversed(list(linked(entries))):
        if needed and isinstance(link, Gate):
            links[name] = link.with_loss()
        needed = needed or isinstance(link, optax.GradientTransformationExtraArgs)
        needs = getattr(link, "needs", None)
        needed = needed or needs == "loss"
        needed = needed or (needs == "loss_and_weight" and not isinstance(link, Gate))
    return links
