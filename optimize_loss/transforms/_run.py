"""Run the links of a chain over a tree: pass after pass, behind gates only if they are open."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optimize_loss._checks import InvalidType, TreeMismatch
from optimize_loss._names import same_leaves
from optimize_loss.transforms._base import Link, Numbers, TreeLink, compute_dtype
from optimize_loss.transforms._fused import (
    PASS,
    Behind,
    Leaf,
    Settings,
    Wanted,
    averaged_leaf,
    prepare,
    run_leaf,
)
from optimize_loss.transforms._params import Params

State = dict[str, Any]

_BEHIND = "/"  # stands for the name of the link that applies a gate's factor; no link has it


class Place(NamedTuple):
    """A link at its place in a chain."""

    name: str
    link: Any
    takes: tuple[bool, ...]  # for each parameter, whether the link is for it

    @property
    def kind(self) -> Literal["ours", "tree", "optax"]:
        """What kind of link it is; neighbours of the kind `ours` share a pass."""
        if isinstance(self.link, TreeLink):
            return "tree"
        return "ours" if isinstance(self.link, Link) else "optax"

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

    @property
    def leaves(self) -> list[jax.Array]:
        """The live parameters."""
        return [self.params.leaves[j] for j in self.live]

    @property
    def names(self) -> list[str]:
        """Their names."""
        return [self.params.names[j] for j in self.live]

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


def run(places: Sequence[Place], call: Call, updates: list[jax.Array]) -> tuple[list[Any], State]:
    """Return what is wanted for each live parameter, and the new state."""
    return _run_passes(_passes(places), call, Flow(updates, call.leaves))


def _passes(places: Sequence[Place]) -> list[list[Place]]:
    """Return the links that run together: neighbours of ours up to a gate, all others alone."""
    passes: list[list[Place]] = []
    for place in places:
        last = passes[-1][-1] if passes else None
        if last is None or place.kind != "ours" or last.kind != "ours" or last.gates:
            passes.append([place])
        else:
            passes[-1].append(place)
    return passes


def _run_passes(passes: list[list[Place]], call: Call, flow: Flow) -> tuple[list[Any], State]:
    """Run pass after pass, those behind a gate under a condition."""
    if flow.gate is not None and (not passes or passes[0][0].kind != "ours"):
        flow, _ = _run_links([], call, flow, "rest")
    if not passes:
        return _finished(call, flow), _counted(call)
    first, *rest = passes
    wanted = "rest" if rest or first[-1].gates else call.wanted
    flow, new = _RUN[first[0].kind](first, call, flow, wanted)
    if wanted != "rest":
        return flow.updates, {**new, **_counted(call)}

    def go_on() -> tuple[list[Any], State]:
        return _run_passes(rest, call, flow)

    def stay() -> tuple[list[Any], State]:
        unchanged = (
            call.leaves if call.wanted == "params" else list(map(jnp.zeros_like, call.leaves))
        )
        names = ["step", *(place.name for places in rest for place in places)]
        return unchanged, {name: call.state[name] for name in names}

    gate = flow.gate
    outputs, behind = go_on() if gate is None else jax.lax.cond(gate.k["open"], go_on, stay)
    return outputs, {**new, **behind}


def _counted(call: Call) -> State:
    return {"step": optax.safe_increment(call.state["step"])}


def _finished(call: Call, flow: Flow) -> list[Any]:
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


def _run_links(places: list[Place], call: Call, flow: Flow, wanted: Wanted) -> tuple[Flow, State]:
    """Run links of ours, of which the last may be a gate."""
    if flow.gate is not None and flow.gate.link.multiplies:
        places = [
            Place(_BEHIND, Behind(flow.gate.link), (True,) * len(call.params.leaves)),
            *places,
        ]
        numbers = {**call.numbers, _BEHIND: flow.gate.k}
        call = call._replace(numbers=numbers, state={**call.state, _BEHIND: {}})
    links = tuple(place.link for place in places)
    own = [tuple(p.link if p.takes[j] else PASS for p in places) for j in call.live]
    slots = [_slot_leaves(place, call.state, call.params) for place in places]
    held = list(zip(places, slots, strict=True))
    leaves = [
        Leaf(
            update,
            param,
            None if param is old else old,
            tuple(_own_slots(place, mine, call.params, j) for place, mine in held),
        )
        for j, update, param, old in zip(
            call.live, flow.updates, flow.params, call.leaves, strict=True
        )
    ]
    ks, shared, memories = _prepared(places, call, own, leaves)
    results = []
    for name, mine, leaf, k in zip(call.names, own, leaves, ks, strict=True):
        try:
            results.append(run_leaf(mine, wanted, leaf, k))
        except Exception as error:
            shown = {place.name: place.link for place in places}
            error.add_note(f"This is about the parameter {name!r}, in {shown}.")
            raise
    for j, (_, _, all_new) in zip(call.live, results, strict=True):
        for mine, new in zip(slots, all_new, strict=True):
            for slot, value in new.items():
                mine[slot][j] = value
    new_state = {
        place.name: {**call.state[place.name], **memory, **call.trees(mine)}
        for place, memory, mine in zip(places, memories, slots, strict=True)
        if place.name != _BEHIND
    }
    moved = [p if new is None else new for p, (_, new, _) in zip(flow.params, results, strict=True)]
    gate = Gate(links[-1], shared[-1]) if places and places[-1].gates else None
    return Flow([update for update, _, _ in results], moved, gate), new_state


def _prepared(places: list[Place], call: Call, own: Sequence[Any], leaves: list[Leaf]) -> Any:
    """Return what the leaf functions need: for each leaf, and shared; and the new memories."""
    meant = [
        [name for name, takes in zip(call.params.names, place.takes, strict=True) if takes]
        for place in places
    ]
    settings = Settings(
        numbers=[dict(call.numbers[place.name]) for place in places],
        memories=[{m: call.state[p.name][m] for m in p.link.memory()} for p in places],
        step=call.state["step"],
        loss=call.extra.get("value"),
        dtype=call.params.dtype,
    )
    return prepare(tuple(p.link for p in places), own, call.names, meant, leaves, settings)


def averaged(places: Sequence[Place], state: State, params: Params) -> list[Any]:
    """Return each parameter as the last link that averages it has it, or as it is."""
    leaves = list(params.leaves)
    for place in places:
        if not (place.kind == "ours" and place.link.averages):
            continue
        slots = _slot_leaves(place, state, params)
        for j, leaf in enumerate(params.leaves):
            if place.takes[j]:
                own = _own_slots(place, slots, params, j)
                leaves[j] = averaged_leaf(place.link, leaf, own, state[place.name])
    return leaves


def _slot_leaves(place: Place, state: State, params: Params) -> dict[str, list[Any]]:
    """Return the slots of a link by name, for each of the parameters, live or not."""
    other = {*place.link.numbers(), *place.link.memory()}
    return {
        slot: same_leaves(f"{place.name}/{slot}", tree, "params", params.tree)
        for slot, tree in state[place.name].items()
        if slot not in other
    }


def _own_slots(
    place: Place, slots: dict[str, list[Any]], params: Params, j: int
) -> dict[str, jax.Array]:
    """Return the slots that a link has for the parameter numbered `j`."""
    own = {slot: x[j] for slot, x in slots.items()} if place.takes[j] else {}
    if missing := [slot for slot, x in own.items() if x is None]:
        raise TreeMismatch(
            f"`state` has no {missing} for the parameter {params.names[j]!r} in the link "
            f"{place.name!r}: it was made for other parameters."
        )
    return own


def _run_tree(places: list[Place], call: Call, flow: Flow, wanted: Wanted) -> tuple[Flow, State]:
    """Run a link that sees all its parameters at once."""
    (place,) = places
    own = [(place.link if place.takes[j] else PASS,) for j in call.live]
    parts = [Leaf(u, p, None, ({},)) for u, p in zip(flow.updates, flow.params, strict=True)]
    _, (k,), (memory,) = _prepared(places, call, own, parts)
    mine = call.state[place.name]
    slots = {n: x for n, x in mine.items() if n not in {**place.link.numbers(), **memory}}
    leaves = dict(zip(call.live, flow.params, strict=True))
    taken = {j: name for j, name in enumerate(call.params.names) if place.takes[j]}
    params = {name: _wide(leaves.get(j, call.params.leaves[j])) for j, name in taken.items()}
    updates = {
        taken[j]: u.astype(params[taken[j]].dtype)
        for j, u in zip(call.live, flow.updates, strict=True)
        if j in taken
    }
    result = place.link.run(updates, slots, params, k)
    new, new_slots = _check_result(place, result, updates, slots)
    results = [new.get(name, old) for name, old in zip(call.names, flow.updates, strict=True)]
    state = {place.name: {**mine, **memory, **new_slots}}
    return _last(call, flow._replace(updates=results), wanted), state


def _wide(leaf: Any) -> jax.Array:
    return leaf.astype(compute_dtype(leaf.dtype))


def _check_result(place: Place, result: Any, updates: State, slots: State) -> tuple[State, State]:
    """Return what `run` of a link returned, in the dtypes of before, if it has the right form.

    Raises:
      InvalidType: it is no pair of mappings.
      TreeMismatch: its names or shapes are not those of `updates` and `slots`.
    """
    is_pair = isinstance(result, tuple) and len(result) == 2
    if not is_pair or not all(isinstance(x, Mapping) for x in result):
        raise InvalidType(
            f"`run` of the link {place.name!r} must return (updates, slots), both by name. "
            f"Received: {result!r}."
        )
    kept = []
    for what, came, old in zip(("updates", "slots"), result, (updates, slots), strict=True):
        shapes, wanted = (jax.tree.map(jnp.shape, dict(tree)) for tree in (came, old))
        if shapes != wanted:
            raise TreeMismatch(
                f"`run` of the link {place.name!r} must return {what} of the shapes {wanted}. "
                f"Received: {shapes}."
            )
        kept.append(jax.tree.map(_in_dtype_of, old, dict(came)))
    return kept[0], kept[1]


def _in_dtype_of(old: jax.Array, new: Any) -> Any:
    is_key = jnp.issubdtype(old.dtype, jax.dtypes.extended)
    return new if is_key else jnp.asarray(new).astype(old.dtype)


def _run_optax(places: list[Place], call: Call, flow: Flow, wanted: Wanted) -> tuple[Flow, State]:
    """Run an optax transformation over the whole tree; for a gradient of None it sees zeros."""
    (place,) = places
    updates = [jnp.zeros_like(p) for p in call.params.leaves]
    params = list(call.params.leaves)
    for j, update, param in zip(call.live, flow.updates, flow.params, strict=True):
        dtype = params[j].dtype
        updates[j], params[j] = update.astype(dtype), param.astype(dtype)
    trees = call.params.unflatten(updates), call.params.unflatten(params)
    update = optax.with_extra_args_support(place.link).update
    tree, new = update(trees[0], call.state[place.name], trees[1], **call.extra)
    flat = same_leaves(f"the updates from {place.name}", tree, "params", call.params.tree)
    results = [flat[j] for j in call.live]
    return _last(call, flow._replace(updates=results), wanted), {place.name: new}


def _last(call: Call, flow: Flow, wanted: Wanted) -> Flow:
    """Return what is wanted in the place of the updates."""
    return flow if wanted == "rest" else flow._replace(updates=_finished(call, flow))


_RUN = {"ours": _run_links, "tree": _run_tree, "optax": _run_optax}
