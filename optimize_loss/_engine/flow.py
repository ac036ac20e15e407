"""What the passes over a tree of parameters share."""

import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax

from optimize_loss._checks import TreeMismatch
from optimize_loss._engine.arrays import compute_dtype
from optimize_loss._engine.health import Outlook
from optimize_loss._engine.leaf import Leaf, Owner, Wanted
from optimize_loss._engine.link import Link, Numbers, TreeLink
from optimize_loss._engine.precision import Codec, Encoded, keys
from optimize_loss._engine.totals import Settings, Squares, prepare
from optimize_loss._engine.trees import Params
from optimize_loss._names import same_leaves

State = dict[str, Any]


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
    def kind(self) -> Literal["ours", "tree", "optax"]:
        """What kind of link it is; neighbours of the kind `ours` share a pass."""
        if isinstance(self.link, TreeLink):
            return "tree"
        return "ours" if isinstance(self.link, Link) else "optax"

    def codec(self, j: int) -> Codec | None:
        """Return how the slots of the parameter numbered `j` are stored; None: as they are."""
        return self.codecs[j] if self.codecs else None

    @property
    def gates(self) -> bool:
        """Whether the links behind run only where this one lets them."""
        return self.kind == "ours" and self.link.gates


class Call(NamedTuple):
    """What one call of `update` or `apply` was given; the same for all passes."""

    params: Params
    state: State
    numbers: Mapping[str, Mapping[str, jax.Array]]  # for each link, what its `scalars` receives
    live: Sequence[int]  # the parameters that have a gradient and can be trained
    wanted: Wanted
    extra: Mapping[str, Any]
    outlook: Outlook = Outlook()  # what guards are told of the chain
    empty: jax.Array | None = None  # whether there was nothing in the batch, if it can be so
    seed: int = 0  # of the random bits by which slots are rounded

    @property
    def leaves(self) -> list[jax.Array]:
        """The live parameters."""
        return [self.params.leaves[j] for j in self.live]

    @property
    def names(self) -> list[str]:
        """Their names."""
        return [self.params.names[j] for j in self.live]

    @property
    def owners(self) -> list[Owner]:
        """Which parameters they are."""
        members, buckets = self.params.members, self.params.buckets
        return [Owner(members[j], buckets[j]) for j in self.live]

    def trees(self, slots: Mapping[str, list[Any]]) -> State:
        """Return slots as trees like the parameters."""
        return {slot: self.params.unflatten(x) for slot, x in slots.items()}


class Gate(NamedTuple):
    """A link that decides whether those behind it run, with what its scalars are."""

    link: Link
    k: Numbers


class Flow(NamedTuple):
    """What one pass hands to the next, for each live parameter."""

    updates: list[jax.Array]  # in the dtype in which they came, or in float32 or wider
    params: list[jax.Array]  # as stored; in float32 or wider where links have moved them
    gate: Gate | None = None  # whose factor is still to be applied
    squares: Mapping[tuple[int, ...], list[jax.Array]] = types.MappingProxyType({})  # if known


def prepared(
    places: list[Place], call: Call, own: Sequence[Any], leaves: list[Leaf], squares: Squares
) -> Any:
    """Return what the leaf functions need: for each leaf, and shared; and the new memories."""
    meant = [place.names(call.params) for place in places]
    settings = Settings(
        numbers=[dict(call.numbers[place.name]) for place in places],
        memories=[{m: call.state[p.name][m] for m in p.link.memory()} for p in places],
        step=call.state["step"],
        loss=call.extra.get("value"),
        weight=call.extra.get("weight"),
        dtype=call.params.dtype,
        squares=squares,
        outlook=call.outlook,
        empty=call.empty,
    )
    return prepare(tuple(p.link for p in places), own, call.owners, meant, leaves, settings)


def finished(call: Call, flow: Flow) -> list[Any]:
    """Return what is wanted of updates that no link is left to change."""
    results = []
    for update, param, old in zip(flow.updates, flow.params, call.leaves, strict=True):
        dtype = compute_dtype(old.dtype)
        result = update.astype(dtype)
        if call.wanted == "params":
            result = param.astype(dtype) + result
        elif param is not old:
            result = result + (param.astype(dtype) - old.astype(dtype))
        results.append(result.astype(old.dtype))
    return results


def last(call: Call, flow: Flow, wanted: Wanted) -> Flow:
    """Return what is wanted in the place of the updates."""
    return flow if wanted == "rest" else flow._replace(updates=finished(call, flow))


def slot_leaves(place: Place, state: State, params: Params) -> dict[str, list[Any]]:
    """Return the slots of a link by name, for each of the parameters, live or not."""
    other = {*place.link.numbers(), *place.link.memory()}
    return {
        slot: same_leaves(f"{place.name}/{slot}", tree, "params", params.tree)
        for slot, tree in state[place.name].items()
        if slot not in other
    }


def own_slots(
    place: Place, slots: dict[str, list[Any]], params: Params, j: int
) -> dict[str, jax.Array]:
    """Return the slots that a link has for the parameter numbered `j`."""
    own = {slot: x[j] for slot, x in slots.items()} if place.takes[j] else {}
    missing = [slot for slot, x in own.items() if x is None]
    if missing:  # other parameters may have other slots, and a pass checks those that are encoded
        made = () if any(place.codecs) else jax.eval_shape(place.link.slots, params.leaves[j])
        missing = [slot for slot in missing if slot in made]
        own = {slot: x for slot, x in own.items() if x is not None}
    if missing:
        raise TreeMismatch(
            f"`state` has no {missing} for the parameter {params.names[j]!r} in the link "
            f"{place.name!r}: it was made for other parameters."
        )
    return own


def held_slots(place: Place, slots: dict[str, list[Any]], call: Call) -> list[Any]:
    """Return the slots that a link has for each live parameter, with what decodes them."""
    own: list[Any] = [own_slots(place, slots, call.params, j) for j in call.live]
    chosen = {i: codec for i, j in enumerate(call.live) if (codec := place.codec(j))}
    if chosen:
        owners = [call.owners[i] for i in chosen]
        found = keys(owners, f"{place.name}/", call.seed, call.state["step"])
        for (i, codec), key in zip(chosen.items(), found, strict=True):
            own[i] = Encoded(own[i], key, codec)
    return own
