"""Run the links of a chain over a tree: pass after pass, behind gates only if they are open."""

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optimize_loss._engine.arrays import compute_dtype
from optimize_loss._engine.kinds import Averaging, Opening
from optimize_loss._engine.leaf import Leaf, Wanted, averaged_leaf, for_all, run_leaf
from optimize_loss._engine.link import State, passes
from optimize_loss._engine.plan import Place, Plan, Segment, parts
from optimize_loss._engine.totals import Call, Prepared, Squares, Totals
from optimize_loss._engine.trees import Params
from optimize_loss._engine.whole_tree import run_optax, run_tree


class Flow(NamedTuple):
    """What one pass hands to the next, for each live parameter."""

    updates: list[jax.Array]  # in the dtype in which they came, or in float32 or wider
    moved: list[jax.Array | None]  # what each has moved by before its update
    gate: Opening | None = None
    factor: jax.Array | None = None  # of the gate, which is still to be applied
    squares: Squares = types.MappingProxyType({})  # if known


def _applied(plan: Plan, flow: Flow) -> Flow:
    """Return the same with the factor of the gate before applied."""
    if (factor := flow.factor) is None:
        return flow
    dtypes = [compute_dtype(plan.params.leaves[j].dtype) for j in plan.live]
    updates = [
        update.astype(dtype) * factor.astype(jnp.finfo(dtype).dtype).astype(dtype)
        for update, dtype in zip(flow.updates, dtypes, strict=True)
    ]
    return Flow(updates, flow.moved)


def run(
    plan: Plan, call: Call, updates: list[jax.Array], wanted: Wanted
) -> tuple[list[Any], State]:
    """Return what is wanted for each live parameter, and the new state."""
    flow = Flow(updates, [None] * len(updates))
    return _run_segments(plan, plan.segments(), call, flow, wanted)


def _run_segments(
    plan: Plan, segments: list[Segment], call: Call, flow: Flow, wanted: Wanted
) -> tuple[list[Any], State]:
    """Run pass after pass, those behind a gate under a condition."""
    if not segments:
        return _finished(plan, _applied(plan, flow), wanted), _counted(call)
    first, *rest = segments
    now: Wanted = "rest" if rest or first.ends_in_gate or first.kind != "leaf" else wanted
    flow, new = _RUN[first.kind](plan, first, call, flow, now)
    if now != "rest":
        return flow.updates, {**new, **_counted(call)}
    gate = flow.gate if first.ends_in_gate else None
    if gate is None:
        outputs, behind = _run_segments(plan, rest, call, flow, wanted)
        return outputs, {**new, **behind}
    leaves = [plan.params.leaves[j] for j in plan.live]
    names = ["step", *(place.name for segment in rest for place in segment.places)]
    old = leaves, {name: call.state[name] for name in names}

    def go_on() -> tuple[list[Any], State]:
        seen = _behind(gate, call)
        return jax.tree.map(_split_as, _run_segments(plan, rest, seen, flow, wanted), old)

    def stay() -> tuple[list[Any], State]:
        unchanged = leaves if wanted == "params" else list(map(jnp.zeros_like, leaves))
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
    return {"step": optax.safe_increment(call.step)}


def _behind(gate: Opening, call: Call) -> Call:
    """Return the call as the links behind a gate see it: with the loss that the gate has made.

    The gradient and the loss as a function are those of one batch, and no link behind sees them.
    """
    if gate.gate.needs != "loss_and_weight":
        return call
    call = call._replace(empty=gate.k.get("empty_behind", call.empty))
    if "loss_behind" not in gate.k:
        return call
    extra = {name: x for name, x in call.extra.items() if name not in ("grad", "value_fn")}
    return call._replace(loss=gate.k["loss_behind"], extra=extra)


def _finished(plan: Plan, flow: Flow, wanted: Wanted) -> list[Any]:
    """Return what is wanted of updates that no link is left to change."""
    results = []
    for j, update, moved in zip(plan.live, flow.updates, flow.moved, strict=True):
        param = plan.params.leaves[j]
        result = update.astype(compute_dtype(param.dtype))
        result = result if moved is None else moved + result
        if wanted == "params":
            result = param.astype(result.dtype) + result
        results.append(result.astype(param.dtype))
    return results


def _run_leaves(
    plan: Plan, segment: Segment, call: Call, flow: Flow, wanted: Wanted
) -> tuple[Flow, State]:
    """Run links over one parameter after another; the last of them may be a gate."""
    slots = [plan.slots(place, call.state) for place in segment.places]
    leaves = _leaves_with_slots(plan, segment, call, flow, slots)
    ready = Totals(plan, segment, leaves, call, flow.squares).prepared()
    results = _results(plan, segment, leaves, ready, wanted)
    for j, (_, _, all_new) in zip(plan.live, results, strict=True):
        for i, new in zip(segment.own[j], all_new, strict=True):
            for slot, value in new.items():
                slots[i][slot][j] = value
    new_state = {
        place.name: {**call.state[place.name], **memory, **_trees(plan.params, mine)}
        for place, memory, mine in zip(segment.places, ready.memories, slots, strict=True)
    }
    last = segment.places[-1].link
    gate = Opening(last, ready.shared[-1]) if segment.ends_in_gate else None
    same = flow.factor is None and all(passes(place.link) for place in segment.places)
    updates, moved = [update for update, _, _ in results], [moved for _, moved, _ in results]
    factor = gate.gate.behind(gate.k) if gate else None
    return Flow(updates, moved, gate, factor, ready.squares if same else {}), new_state


def _leaves_with_slots(
    plan: Plan, segment: Segment, call: Call, flow: Flow, slots: Sequence[dict[str, list[Any]]]
) -> list[Leaf]:
    """Return the live parameters, each with the slots of its links."""
    pairs = zip(segment.places, slots, strict=True)
    held = [plan.held_slots(place, mine, call.step) for place, mine in pairs]
    trios = zip(plan.live, flow.updates, flow.moved, strict=True)
    return [
        Leaf(
            u, plan.params.leaves[j], moved, flow.factor, tuple(held[i][n] for i in segment.own[j])
        )
        for n, (j, u, moved) in enumerate(trios)
    ]


def _results(
    plan: Plan, segment: Segment, leaves: Sequence[Leaf], ready: Prepared, wanted: Wanted
) -> list[Any]:
    """Return what `run_leaf` returns for each live parameter."""
    links = [tuple(segment.places[i].link for i in segment.own[j]) for j in plan.live]
    try:
        return for_all(
            run_leaf, wanted, list(zip(links, leaves, ready.ks, strict=True)), plan.owners
        )
    except Exception as error:
        names = {place.name: place.link for place in segment.places}
        error.add_note(f"The links are {names}.")
        raise


def _trees(params: Params, slots: Mapping[str, list[Any]]) -> State:
    """Return slots as trees like the parameters."""
    return {slot: params.unflatten(leaves) for slot, leaves in slots.items()}


def _run_tree(
    plan: Plan, segment: Segment, call: Call, flow: Flow, wanted: Wanted
) -> tuple[Flow, State]:
    """Run a link that sees all its parameters at once."""
    leaves = _leaves(plan, segment, _applied(plan, flow))
    ready = Totals(plan, segment, leaves, call, {}).prepared()
    updates, state = run_tree(plan, segment.places[0], leaves, call.state, ready)
    return Flow(updates, flow.moved), state


def _run_optax(
    plan: Plan, segment: Segment, call: Call, flow: Flow, wanted: Wanted
) -> tuple[Flow, State]:
    """Run an optax transformation over the whole tree."""
    leaves = _leaves(plan, segment, _applied(plan, flow))
    extra = call.extra if call.loss is None else {**call.extra, "value": call.loss}
    updates, state = run_optax(plan, segment.places[0], leaves, call.state, extra)
    return Flow(updates, flow.moved), state


def _leaves(plan: Plan, segment: Segment, flow: Flow) -> list[Leaf]:
    """Return the live parameters for a link that sees all of them at once."""
    return [
        Leaf(update, plan.params.leaves[j], moved, None, ({},) * len(segment.own[j]))
        for j, update, moved in zip(plan.live, flow.updates, flow.moved, strict=True)
    ]


_RUN: dict[str, Callable[..., tuple[Flow, State]]] = {
    "leaf": _run_leaves,
    "tree": _run_tree,
    "optax": _run_optax,
}


def averaged(plan: Plan, state: State) -> list[Any]:
    """Return each parameter as the last link that averages it has it, or as it is."""
    leaves = list(plan.params.leaves)
    for place in plan.places:
        if not isinstance(place.link, Averaging):
            continue
        slots = plan.slots(place, state)
        for j, leaf in enumerate(plan.params.leaves):
            if place.takes[j]:
                own = _decoded(plan, place, slots, j)
                leaves[j] = averaged_leaf(place.link, leaf, own, state[place.name])
    return leaves


def decoded(plan: Plan, state: State) -> State:
    """Return the state of each link whose slots are encoded, with these as the link has them."""
    return {
        place.name: _decoded_state(plan, place, state) for place in plan.places if any(place.codecs)
    }


def _decoded_state(plan: Plan, place: Place, state: State) -> State:
    numbers, memory, _ = parts(place.link, state[place.name])
    slots = plan.slots(place, state)
    own = [_decoded(plan, place, slots, j) for j in range(len(plan.params.leaves))]
    names = dict.fromkeys(name for x in own for name in x)
    trees = _trees(plan.params, {n: [x.get(n) for x in own] for n in names})
    return {**numbers, **memory, **trees}


def _decoded(plan: Plan, place: Place, slots: dict[str, list[Any]], j: int) -> dict[str, Any]:
    """Return the slots that a link has for the parameter numbered `j`, as the link has them."""
    own = plan.own_slots(place, slots, j)
    codec = place.codec(j)
    return codec.decoded(own) if codec and own else own
