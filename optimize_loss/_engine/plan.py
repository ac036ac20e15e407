"""Which links are for which parameters, in which order, and how their slots are stored."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax

from optimize_loss._checks import TreeMismatch
from optimize_loss._engine.by_name import acts_on, numbers_by_name
from optimize_loss._engine.equal import same
from optimize_loss._engine.kinds import Gate
from optimize_loss._engine.link import (
    Link,
    Slots,
    State,
    TreeLink,
    by_entry,
)
from optimize_loss._engine.precision import Codec, Key, keys
from optimize_loss._engine.selection import ForParameters, link_of, linked, where
from optimize_loss._engine.trees import Owner, Params
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


Kind = Literal["leaf", "tree", "optax"]


@functools.cache
def kind_of(cls: type) -> Kind:
    """Return the kind of a class of links; neighbours of the kind `leaf` share a pass."""
    if issubclass(cls, TreeLink):
        return "tree"
    return "leaf" if issubclass(cls, Link) else "optax"


@dataclasses.dataclass(frozen=True)
class Place:
    """A link at its place in a chain.

    Attributes:
      name: of the link.
      link: a link of ours, or one of optax.
      takes: for each parameter, whether the link is for it.
      codecs: for each, how its slots are stored, None for as they are; empty without a precision.
    """

    name: str
    link: Any
    takes: tuple[bool, ...]
    codecs: tuple[Codec | None, ...] = ()

    def names(self, params: Params) -> list[str]:
        """Return the names of the parameters that the link is for."""
        pairs = zip(params.members, self.takes, strict=True)
        return [name for names, takes in pairs if takes for name in names]

    def codec(self, j: int) -> Codec | None:
        """Return how the slots of the parameter numbered `j` are stored; None: as they are."""
        return self.codecs[j] if self.codecs else None

    @functools.cached_property
    def memory(self) -> tuple[str, ...]:
        """The names of the memory of a link for the complete tree."""
        return (*self.link.memory(),)

    @functools.cached_property
    def of_tree(self) -> frozenset[str]:
        """The names of what a link of ours keeps that is no slot."""
        return frozenset((*self.link.numbers(), *self.memory))


@dataclasses.dataclass(frozen=True)
class Segment:
    """Links that run together: neighbours of the kind `leaf` up to a gate, all others alone.

    Attributes:
      kind: of the links.
      places: the links.
      own: for each live parameter, which of the links are for it.
    """

    kind: Kind
    places: tuple[Place, ...]
    own: list[tuple[int, ...]]

    @functools.cached_property
    def gate(self) -> Gate | None:
        """The last link, if those behind run only where it lets them."""
        last = self.places[-1].link if self.places else None
        return last if isinstance(last, Gate) else None


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

    @functools.cached_property
    def owners(self) -> list[Owner]:
        """Which parameters the live leaves are."""
        owners = self.params.owners
        return [owners[j] for j in self.live]

    def segments(self) -> list[Segment]:
        """Return the links by the pass in which they run; the last is one over the leaves."""
        rows: list[list[Place]] = []
        is_open = False
        for place in self.places:
            kind = kind_of(type(place.link))
            if is_open and kind == "leaf":
                rows[-1].append(place)
            else:
                rows.append([place])
            is_open = kind == "leaf" and not isinstance(place.link, Gate)
        return [self._segment(row) for row in (rows if is_open else [*rows, []])]

    def _segment(self, places: Sequence[Place]) -> Segment:
        kind: Kind = kind_of(type(places[0].link)) if places else "leaf"
        own = [tuple([i for i, x in enumerate(places) if x.takes[j]]) for j in self.live]
        return Segment(kind, tuple(places), own)

    def kind(self, j: int) -> Any:
        """Return what parameters share with that numbered `j` that may lie in one array with it.

        None where it must lie by itself.
        """
        own = [(i, x.link, x.codec(j)) for i, x in enumerate(self.places) if x.takes[j]]
        if all(_by_entry(x) and (codec is None or codec.by_entry) for _, x, codec in own):
            return tuple((i, type(codec)) for i, _, codec in own)
        return None

    def slots(self, place: Place, state: State) -> dict[str, list[Any]]:
        """Return the slots of a link by name, for each of the parameters, live or not."""
        return {
            slot: same_leaves(f"{place.name}/{slot}", tree, "params", self.params.tree)
            for slot, tree in state[place.name].items()
            if slot not in place.of_tree
        }

    def own_slots(self, place: Place, slots: Mapping[str, Sequence[Any]], j: int) -> Slots:
        """Return the slots that a link has for the parameter numbered `j`, as they are stored.

        Raises:
          TreeMismatch: there are none.
        """
        if not place.takes[j]:
            return {}
        own = {slot: x[j] for slot, x in slots.items() if x[j] is not None}
        # Other parameters may have other slots; a pass checks those that are encoded.
        if len(own) < len(slots) and not any(place.codecs):
            made = jax.eval_shape(place.link.slots, self.params.leaves[j])
            self._check_made(place, j, sorted(made.keys() & slots.keys() - own.keys()))
        return own

    def _check_made(self, place: Place, j: int, missing: Sequence[str]) -> None:
        """Raise a `TreeMismatch` if slots of a link are missing for a parameter."""
        if missing:
            raise TreeMismatch(
                f"`state` has no {missing} for the parameter {self.params.names[j]!r} in the "
                f"link {place.name!r}: it was made for other parameters, or by a link whose "
                "`slots` had other names for it. They must follow from its shape and dtype."
            )

    def keys(self, place: Place, step: Any) -> list[Key | None]:
        """Return for each live parameter what keys the bits by which a link's slots are rounded."""
        found: list[Key | None] = [None] * len(self.live)
        chosen = [n for n, j in enumerate(self.live) if place.codecs and place.codecs[j]]
        if chosen:
            owners = [self.owners[n] for n in chosen]
            of_chosen = keys(owners, f"{place.name}/", self.seed, step)
            for n, key in zip(chosen, of_chosen, strict=True):
                found[n] = key
        return found


def _by_entry(link: Link) -> bool:
    """Return whether a link treats every entry by itself, with numbers that can be spread."""
    pairs = (name for name in numbers_by_name(link) if link.rule(name).kind == "decay")
    return by_entry(type(link)) and not any(pairs)


def takes(name: str, entry: Any, params: Params, marks: list[bool]) -> tuple[bool, ...]:
    """Return for each parameter whether a link is for it; integers are no link's.

    Raises:
      ValueError: there is none, or a pattern of the link matches none.
    """
    if params.are_unknown:
        return ()
    found = _meant(name, entry, params, marks) if isinstance(entry, ForParameters) else tuple(marks)
    link = link_of(entry)
    if not isinstance(link, Link):
        return found
    link.check_names(Place(name, link, found).names(params))
    acts = acts_on(link, [names[0] for names in params.members])
    return tuple([a and b for a, b in zip(found, acts, strict=True)])


def _meant(name: str, entry: ForParameters, params: Params, marks: list[bool]) -> tuple[bool, ...]:
    """Return for each parameter whether a link for some of them is for it."""
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
    ]
    own = where(entries[borrower])
    wider = (own, getattr(own, "within", None), getattr(own, "whole", None), None)
    suited = [n for n in others if any(same(where(entries[n]), x) for x in wider)]
    if len(suited) != 1:
        raise ValueError(
            f"The link {borrower!r} needs the `{number}` of one other link, which is for all "
            f"parameters or for the same ones. Links that have one: {others}."
        )
    return suited[0]
