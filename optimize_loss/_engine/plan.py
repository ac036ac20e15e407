"""Which links are for which parameters, in which order, and how their slots are stored."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax

from optimize_loss._checks import TreeMismatch
from optimize_loss._engine.kinds import Gate
from optimize_loss._engine.link import Link, State, TreeLink, by_entry
from optimize_loss._engine.precision import Codec, Encoded, keys
from optimize_loss._engine.selection import ForParameters
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


@dataclasses.dataclass(frozen=True)
class Segment:
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

    @functools.cached_property
    def own(self) -> list[tuple[int, ...]]:
        """For each parameter, which of the links are for it."""
        takes = zip(*(place.takes for place in self.places), strict=True)
        return [tuple(i for i, mine in enumerate(each) if mine) for each in takes]


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
        """Return the links by the pass in which they run."""
        segments: list[Segment] = []
        for place in self.places:
            last = segments[-1] if segments else None
            if last is None or {place.kind, last.kind} != {"leaf"} or last.ends_in_gate:
                segments.append(Segment((place,)))
            else:
                segments[-1] = Segment((*last.places, place))
        return segments

    def kind(self, j: int) -> Any:
        """Return what parameters share with that numbered `j` that may lie in one array with it.

        None where it must lie by itself.
        """
        own = [(i, x.link, x.codec(j)) for i, x in enumerate(self.places) if x.takes[j]]
        if all(by_entry(type(x)) and (codec is None or codec.by_entry) for _, x, codec in own):
            return tuple((i, type(codec)) for i, _, codec in own)
        return None

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
                f"{place.name!r}: it was made for other parameters, or by a link whose `slots` "
                "had other names for it then. They must follow from its shape and dtype alone."
            )
        return own

    def held_slots(self, place: Place, slots: dict[str, list[Any]], step: Any) -> list[Any]:
        """Return the slots that a link has for each live parameter, with their codecs."""
        own: list[Any] = [self.own_slots(place, slots, j) for j in self.live]
        chosen = {i: codec for i, j in enumerate(self.live) if (codec := place.codec(j))}
        if chosen:
            owners = [self.owners[i] for i in chosen]
            found = keys(owners, f"{place.name}/", self.seed, step)
            for (i, codec), key in zip(chosen.items(), found, strict=True):
                own[i] = Encoded(own[i], key, codec)
        return own


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
