"""Run the links of a chain over a tree: pass after pass, behind gates only if they are open."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optimize_loss._engine.flow import (
    Call,
    Flow,
    Gate,
    Place,
    State,
    finished,
    held_slots,
    own_slots,
    prepared,
    slot_leaves,
)
from optimize_loss._engine.leaf import PASS, Behind, Leaf, Wanted, averaged_leaf, for_all, run_leaf
from optimize_loss._engine.trees import Params
from optimize_loss._engine.whole_tree import run_optax, run_tree

_BEHIND = "/"  # stands for the name of the link that applies a gate's factor; no link has it


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
        return finished(call, flow), _counted(call)
    first, *rest = passes
    wanted = "rest" if rest or first[-1].gates else call.wanted
    flow, new = _RUN[first[0].kind](first, call, flow, wanted)
    if wanted != "rest":
        return flow.updates, {**new, **_counted(call)}
    if (gate := flow.gate) is None:
        outputs, behind = _run_passes(rest, call, flow)
        return outputs, {**new, **behind}
    seen = _after(gate, call)
    names = ["step", *(place.name for places in rest for place in places)]
    old = call.leaves, {name: call.state[name] for name in names}

    def go_on() -> tuple[list[Any], State]:
        return jax.tree.map(_split_as, _run_passes(rest, seen, flow), old)

    def stay() -> tuple[list[Any], State]:
        unchanged = (
            call.leaves if call.wanted == "params" else list(map(jnp.zeros_like, call.leaves))
        )
        return jax.tree.map(_split_as, (unchanged, old[1]), old)

    outputs, behind = jax.lax.cond(gate.k["open"], go_on, stay)
    return outputs, {**new, **behind}


def _split_as(new: Any, old: Any) -> Any:
    """Return an array of the type of `old`, which may say that it is split over devices."""
    came, wanted = (getattr(jax.typeof(x), "sharding", None) for x in (new, old))
    if wanted is None or wanted.mesh.empty or came == wanted:
        return new
    return jax.sharding.reshard(new, wanted)


def _counted(call: Call) -> State:
    return {"step": optax.safe_increment(call.state["step"])}


def _after(gate: Gate, call: Call) -> Call:
    """Return the call as the links behind a gate see it: with the loss that the gate has made.

    The gradient and the loss as a function are those of one batch, and no link behind sees them.
    """
    if gate.link.needs != "loss_and_weight":
        return call
    extra, empty = call.extra, gate.k.get("empty_behind")
    if "loss_behind" in gate.k:
        extra = {name: x for name, x in extra.items() if name not in ("grad", "value_fn")}
        extra["value"] = gate.k["loss_behind"]
    return call._replace(extra=extra, empty=empty)


def _behind(gate: Gate, places: list[Place], call: Call) -> tuple[list[Place], Call]:
    """Return the links with one before them that multiplies by the factor of a gate."""
    first = Place(_BEHIND, Behind(gate.link), (True,) * len(call.params.leaves))
    numbers, state = {**call.numbers, _BEHIND: gate.k}, {**call.state, _BEHIND: {}}
    return [first, *places], call._replace(numbers=numbers, state=state)


def _run_links(places: list[Place], call: Call, flow: Flow, wanted: Wanted) -> tuple[Flow, State]:
    """Run links of ours, of which the last may be a gate."""
    if flow.gate is not None and flow.gate.link.multiplies:
        places, call = _behind(flow.gate, places, call)
    links = tuple(place.link for place in places)
    own = [tuple(p.link if p.takes[j] else PASS for p in places) for j in call.live]
    slots = [slot_leaves(place, call.state, call.params) for place in places]
    each = [held_slots(place, mine, call) for place, mine in zip(places, slots, strict=True)]
    held = list(zip(*each, strict=True)) if each else [()] * len(call.live)
    leaves = [
        Leaf(update, param, None if param is old else old, mine)
        for mine, update, param, old in zip(
            held, flow.updates, flow.params, call.leaves, strict=True
        )
    ]
    squares = dict(flow.squares)
    ks, shared, memories = prepared(places, call, own, leaves, squares)
    arguments = list(zip(own, leaves, ks, strict=True))
    try:
        results = for_all(run_leaf, wanted, arguments, call.owners)
    except Exception as error:
        error.add_note(f"The links are { ({place.name: place.link for place in places}) }.")
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
    known = squares if all(link.observes for link in links) else {}
    return Flow([update for update, _, _ in results], moved, gate, known), new_state


def averaged(places: Sequence[Place], state: State, params: Params) -> list[Any]:
    """Return each parameter as the last link that averages it has it, or as it is."""
    leaves = list(params.leaves)
    for place in places:
        if not (place.kind == "ours" and place.link.averages):
            continue
        slots = slot_leaves(place, state, params)
        for j, leaf in enumerate(params.leaves):
            if place.takes[j]:
                own = own_slots(place, slots, params, j)
                if codec := place.codec(j):
                    own = codec.decoded(own)
                leaves[j] = averaged_leaf(place.link, leaf, own, state[place.name])
    return leaves


def decoded(places: Sequence[Place], state: State, params: Params) -> State:
    """Return the state of each link whose slots are encoded, with these as the link has them."""
    found = {}
    for place in places:
        if not any(place.codecs):
            continue
        slots = slot_leaves(place, state, params)
        own = [own_slots(place, slots, params, j) for j in range(len(params.leaves))]
        own = [
            codec.decoded(x) if x and (codec := place.codec(j)) else x for j, x in enumerate(own)
        ]
        names = dict.fromkeys(name for x in own for name in x)
        trees = {n: params.unflatten([x.get(n) for x in own]) for n in names}
        rest = {n: x for n, x in state[place.name].items() if n not in slots}
        found[place.name] = {**rest, **trees}
    return found


_RUN = {"ours": _run_links, "tree": run_tree, "optax": run_optax}
