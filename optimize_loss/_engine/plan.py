"""Which links are for which parameters, in which order, and how their slots are stored."""

import copy
import dataclasses
import operator
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import optax
from jax.core import Tracer

from optimize_loss._checks import InvalidType, TreeMismatch
from optimize_loss._engine.kinds import Gate, LossScale, RateScale
from optimize_loss._engine.link import Link, State, TreeLink, number_rules, overrides, passes
from optimize_loss._engine.numbers import has_rate
from optimize_loss._engine.precision import Codec, Encoded, keys
from optimize_loss._engine.selection import ForParameters, linked, where
from optimize_loss._engine.trees import Params
from optimize_loss._names import same_leaves


class Parts(NamedTuple):
    """What the state of a link of ours is made of, each by name."""

    numbers: Mapping[str, jax.Array]  # its hyperparameters
    memory: Mapping[str, jax.Array]  # what it keeps of the whole tree
    slots: Mapping[str, Any]  # what it keeps of each parameter: trees like the parameters


def parts(link: Link, state: Mapping[str, Any]) -> Parts:
    """Return the state of a link in its three parts."""
    numbers, memory = link.numbers(), link.memory()
    return Parts(
        {name: state[name] for name in numbers},
        {name: state[name] for name in memory},
        {name: x for name, x in state.items() if name not in numbers and name not in memory},
    )


class Place(NamedTuple):
    """A link at its place in a chain."""

    name: str
    link: Any
    takes: tuple[bool, ...]  # for each parameter, whether the link is for it
    codecs: tuple[Codec | None, ...] = ()  # how its slots are stored, where not as they are

    def names(self, params: Params) -> list[str]:
        """Return the names of the parameters that the link is for."""
        pairs = zip(params.members, self.takes, strict=True)
        return [name for names, takes in pairs if takes for name in names]

    @property
    def kind(self) -> Literal["leaf", "tree", "optax"]:
        """What kind of link it is; neighbours of the kind `leaf` share a pass."""
        if isinstance(self.link, TreeLink):
            return "tree"
        return "leaf" if isinstance(self.link, Link) else "optax"

    def codec(self, j: int) -> Codec | None:
        """Return how the slots of the parameter numbered `j` are stored; None: as they are."""
        return self.codecs[j] if self.codecs else None


class Segment(NamedTuple):
    """Links that run together: neighbours of the kind `leaf` up to a gate, all others alone."""

    places: tuple[Place, ...]

    @property
    def kind(self) -> Literal["leaf", "tree", "optax"]:
        """The kind of its links."""
        return self.places[0].kind

    @property
    def ends_in_gate(self) -> bool:
        """Whether the links behind run only where its last one lets them."""
        return isinstance(self.places[-1].link, Gate)

    def own(self, j: int) -> tuple[int, ...]:
        """Return which of its links are for the parameter numbered `j`."""
        return tuple(i for i, place in enumerate(self.places) if place.takes[j])


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a chain does with a tree of parameters.

    Attributes:
      params: the parameters.
      places: the links, in order.
      live: the numbers of the parameters that have a gradient and can be trained.
      seed: of the random bits by which slots are rounded.
    """

    params: Params
    places: tuple[Place, ...]
    live: tuple[int, ...] = ()
    seed: int = 0

    def segments(self) -> list[Segment]:
        """Return the links by the pass in which they run."""
        segments: list[Segment] = []
        for place in self.places:
            last = segments[-1] if segments else None
            if last is None or {place.kind, last.kind} != {"leaf"} or last.ends_in_gate:
                segments.append(Segment((place,)))
            else:
                segments[-1] = Segment((*last.places, place))
        return segments

    def slots(self, place: Place, state: State) -> dict[str, list[Any]]:
        """Return the slots of a link by name, for each of the parameters, live or not."""
        return {
            slot: same_leaves(f"{place.name}/{slot}", tree, "params", self.params.tree)
            for slot, tree in parts(place.link, state[place.name]).slots.items()
        }

    def own_slots(self, place: Place, slots: dict[str, list[Any]], j: int) -> dict[str, Any]:
        """Return the slots that a link has for the parameter numbered `j`.

        Raises:
          TreeMismatch: there are none.
        """
        own = {slot: x[j] for slot, x in slots.items()} if place.takes[j] else {}
        missing = [slot for slot, x in own.items() if x is None]
        if missing:  # other parameters may have other slots; a pass checks those that are encoded
            param = self.params.leaves[j]
            made = () if any(place.codecs) else jax.eval_shape(place.link.slots, param)
            missing = [slot for slot in missing if slot in made]
            own = {slot: x for slot, x in own.items() if x is not None}
        if missing:
            raise TreeMismatch(
                f"`state` has no {missing} for the parameter {self.params.names[j]!r} in the link "
                f"{place.name!r}: it was made for other parameters."
            )
        return own

    def held_slots(self, place: Place, slots: dict[str, list[Any]], step: Any) -> list[Any]:
        """Return the slots that a link has for each live parameter, with their codecs."""
        own: list[Any] = [self.own_slots(place, slots, j) for j in self.live]
        chosen = {i: codec for i, j in enumerate(self.live) if (codec := place.codec(j))}
        if chosen:
            owners = [self.params.owners[self.live[i]] for i in chosen]
            found = keys(owners, f"{place.name}/", self.seed, step)
            for (i, codec), key in zip(chosen.items(), found, strict=True):
                own[i] = Encoded(own[i], key, codec)
        return own


def merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return links in a row, from several rows.

    Raises:
      ValueError: two have one name.
    """
    names = [name for part in parts for name in part]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"The links of `optimizer` must have other names than {twice}.")
    return {name: link for part in parts for name, link in part.items()}


def takes(name: str, entry: Any, params: Params, marks: list[bool]) -> tuple[bool, ...]:
    """Return for each parameter whether a link is for it; integers are no link's."""
    if params.are_unknown:
        return ()
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


def with_losses(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return the links of a chain, each gate with the loss where one behind may need it."""
    links, needed = dict(entries), False
    for name, link in reversed(list(linked(entries))):
        if needed and isinstance(link, Gate):
            links[name] = link.with_loss()
        needed = needed or isinstance(link, optax.GradientTransformationExtraArgs)
        needed = needed or getattr(link, "needs", None) == "loss"
    return links
