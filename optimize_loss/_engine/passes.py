"""Run the links of a chain over a tree: pass after pass, behind gates only if they are open."""

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optimize_loss._checks import InvalidType, TreeMismatch
from optimize_loss._engine.arrays import compute_dtype
from optimize_loss._engine.kinds import Averaging
from optimize_loss._engine.leaf import Leaf, Stored, Wanted, averaged_leaf, for_all, run_leaf
from optimize_loss._engine.link import Numbers, State, passes
from optimize_loss._engine.plan import Place, Plan, Segment, parts
from optimize_loss._engine.totals import Call, Prepared, Squares, Totals
from optimize_loss._engine.trees import Params
from optimize_loss._names import same_leaves


class Flow(NamedTuple):
    """What one pass hands to the next, for each live parameter."""

    updates: list[jax.Array]  # in the dtype in which they came, or in float32 or wider
    moved: list[jax.Array | None]  # what each has moved by before its update
    gate: Numbers | None = None  # what the gate says in this step, at which the pass has ended
    factor: jax.Array | None = None  # of the gate, which is still to be applied
    squares: Squares = types.MappingProxyType({})  # if known


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
    first, *rest = segments
    if not rest:
        flow, new = _run_leaves(plan, first, call, flow, wanted)
        return flow.updates, {**new, "step": optax.safe_increment(call.step)}
    flow, new = _RUN[first.kind](plan, first, call, flow, "rest")
    if flow.gate is None:
        outputs, behind = _run_segments(plan, rest, call, flow, wanted)
    else:
        outputs, behind = _run_behind(plan, rest, call, flow, wanted)
    return outputs, {**new, **behind}


def _run_behind(
    plan: Plan, segments: list[Segment], call: Call, flow: Flow, wanted: Wanted
) -> tuple[list[Any], State]:
    """Run passes if the gate before them is open; else all that they would change stays."""
    assert flow.gate is not None
    leaves = [plan.params.leaves[j] for j in plan.live]
    names = ["step", *(place.name for segment in segments for place in segment.places)]
    old = leaves, {name: call.state[name] for name in names}
    seen = _behind(flow.gate, call)

    def go_on() -> tuple[list[Any], State]:
        return jax.tree.map(_split_as, _run_segments(plan, segments, seen, flow, wanted), old)

    def stay() -> tuple[list[Any], State]:
        unchanged = leaves if wanted == "params" else list(map(jnp.zeros_like, leaves))
        return jax.tree.map(_split_as, (unchanged, old[1]), old)

    return jax.lax.cond(flow.gate["open"], go_on, stay)


def _split_as(new: Any, old: Any) -> Any:
    """Return an array of the type of `old`, which may say that it is split over devices."""
    came, wanted = (getattr(jax.typeof(x), "sharding", None) for x in (new, old))
    if wanted is None or wanted.mesh.empty or came == wanted:
        return new
    return jax.sharding.reshard(new, wanted)


def _behind(gate: Numbers, call: Call) -> Call:
    """Return the call as the links behind a gate see it: with the loss that the gate has made.

    The gradient and the loss as a function are those of one batch, and no link behind sees them.
    """
    call = call._replace(empty=gate.get("empty_behind", call.empty))
    if "loss_behind" not in gate:
        return call
    extra = {name: x for name, x in call.extra.items() if name not in ("grad", "value_fn")}
    return call._replace(loss=gate["loss_behind"], extra=extra)


def _run_leaves(
    plan: Plan, segment: Segment, call: Call, flow: Flow, wanted: Wanted
) -> tuple[Flow, State]:
    """Run links over one parameter after another; the last of them may be a gate."""
    slots = [plan.slots(place, call.state) for place in segment.places]
    leaves = _leaves_with_slots(plan, segment, call, flow, slots)
    ready = Totals(plan, segment, leaves, call, flow.squares).prepared()
    results = _results(plan, segment, leaves, ready, wanted)
    updates, moved, new = map(list, zip(*results, strict=True)) if results else ([], [], [])
    state = _put(plan, segment, call.state, slots, new)
    for place, memory in zip(segment.places, ready.memories, strict=True):
        state[place.name] |= memory
    same = flow.factor is None and all(passes(type(place.link)) for place in segment.places)
    squares = ready.squares if same else {}
    if segment.gate is None:
        return Flow(updates, moved, squares=squares), state
    k = ready.shared[-1]
    return Flow(updates, moved, k, segment.gate.behind(k), squares), state


def _leaves_with_slots(
    plan: Plan, segment: Segment, call: Call, flow: Flow, slots: Sequence[Mapping[str, list[Any]]]
) -> list[Leaf]:
    """Return the live parameters, each with the slots of its links."""
    keys = [plan.keys(place, call.step) for place in segment.places]
    leaves = []
    for n, (j, own) in enumerate(zip(plan.live, segment.own, strict=True)):
        mine = tuple([plan.own_slots(segment.places[i], slots[i], j) for i in own])
        own_keys = tuple([keys[i][n] for i in own])
        param, moved = plan.params.leaves[j], flow.moved[n]
        leaves.append(Leaf(flow.updates[n], param, moved, flow.factor, mine, own_keys))
    return leaves


def _results(
    plan: Plan, segment: Segment, leaves: Sequence[Leaf], ready: Prepared, wanted: Wanted
) -> list[Any]:
    """Return what `run_leaf` returns for each live parameter."""
    try:
        arguments = list(zip(ready.links, leaves, ready.ks, strict=True))
        return for_all(run_leaf, wanted, arguments, plan.owners)
    except Exception as error:
        names = {place.name: place.link for place in segment.places}
        error.add_note(f"The links are {names}.")
        raise


def _put(
    plan: Plan,
    segment: Segment,
    state: State,
    slots: Sequence[dict[str, list[Any]]],
    new: Sequence[Sequence[Mapping[str, Any]]],
) -> State:
    """Return the state of the links of a pass with new slots, for each parameter of its links."""
    for j, own, of_leaf in zip(plan.live, segment.own, new, strict=True):
        for i, mine in zip(own, of_leaf, strict=True):
            for slot, value in mine.items():
                slots[i][slot][j] = value
    pairs = zip(segment.places, slots, strict=True)
    return {x.name: {**state[x.name], **_trees(plan.params, mine)} for x, mine in pairs}


def _trees(params: Params, slots: Mapping[str, list[Any]]) -> State:
    """Return slots as trees like the parameters."""
    return {slot: params.unflatten(leaves) for slot, leaves in slots.items()}


def _run_tree(
    plan: Plan, segment: Segment, call: Call, flow: Flow, wanted: Wanted
) -> tuple[Flow, State]:
    """Run a link that sees all its parameters at once."""
    leaves, place = _leaves(plan, segment, flow), segment.places[0]
    ready = Totals(plan, segment, leaves, call, {}).prepared()
    slots = parts(place.link, call.state[place.name]).slots
    moved = {j: _moved(leaf) for j, leaf in zip(plan.live, leaves, strict=True)}
    taken = {j: name for j, name in enumerate(plan.params.names) if place.takes[j]}
    params = {name: moved.get(j, _wide(plan.params.leaves[j])) for j, name in taken.items()}
    updates = {
        taken[j]: leaf.update.astype(params[taken[j]].dtype)
        for j, leaf in zip(plan.live, leaves, strict=True)
        if j in taken
    }
    result = place.link.run(updates, slots, params, ready.shared[0])
    new, new_slots = _check_result(place, result, updates, slots)
    results = [
        new.get(plan.params.names[j], leaf.update)
        for j, leaf in zip(plan.live, leaves, strict=True)
    ]
    state = {**call.state[place.name], **ready.memories[0], **new_slots}
    return Flow(results, flow.moved), {place.name: state}


def _wide(leaf: Any) -> jax.Array:
    return leaf.astype(compute_dtype(leaf.dtype))


def _moved(leaf: Leaf) -> jax.Array:
    """Return a parameter as links before have moved it, in float32 or wider."""
    return _wide(leaf.param) if leaf.moved is None else _wide(leaf.param) + leaf.moved


def _check_result(
    place: Place, result: Any, updates: State, slots: Mapping[str, Any]
) -> tuple[State, State]:
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
        kept.append(jax.tree.map(_in_dtype_of, dict(old), dict(came)))
    return kept[0], kept[1]


def _in_dtype_of(old: jax.Array, new: Any) -> Any:
    is_key = jnp.issubdtype(old.dtype, jax.dtypes.extended)
    return new if is_key else jnp.asarray(new).astype(old.dtype)


def _run_optax(
    plan: Plan, segment: Segment, call: Call, flow: Flow, wanted: Wanted
) -> tuple[Flow, State]:
    """Run an optax transformation over the whole tree; for a gradient of None it sees zeros."""
    place = segment.places[0]
    extra = call.extra if call.loss is None else {**call.extra, "value": call.loss}
    updates = [jnp.zeros_like(p) for p in plan.params.leaves]
    params = list(plan.params.leaves)
    for j, leaf in zip(plan.live, _leaves(plan, segment, flow), strict=True):
        dtype = params[j].dtype
        updates[j], params[j] = leaf.update.astype(dtype), _moved(leaf).astype(dtype)
    trees = plan.params.unflatten(updates), plan.params.unflatten(params)
    update = optax.with_extra_args_support(place.link).update
    try:
        tree, new = update(trees[0], call.state[place.name], trees[1], **extra)
    except TypeError as error:
        error.add_note(
            f"The link {place.name!r} was given the extra arguments {sorted(extra)}. For "
            "`grad` and `value_fn`, as a line search needs, pass them to `update`; "
            "`optimize_loss` passes both, but not with `accumulate`, `sam`, `shard_state` or sums "
            "over mapped devices, where an update is made of more than one batch or place."
        )
        raise
    flat = same_leaves(f"the updates from {place.name}", tree, "params", plan.params.tree)
    return Flow([flat[j] for j in plan.live], flow.moved), {place.name: new}


def _leaves(plan: Plan, segment: Segment, flow: Flow) -> list[Leaf]:
    """Return the live parameters for a link that sees all of them at once."""
    leaves = []
    for n, (j, own) in enumerate(zip(plan.live, segment.own, strict=True)):
        update, param, nothing = flow.updates[n], plan.params.leaves[j], len(own)
        if flow.factor is not None:
            dtype = compute_dtype(param.dtype)
            factor = flow.factor.astype(jnp.finfo(dtype).dtype)
            update = update.astype(dtype) * factor.astype(dtype)
        leaves.append(Leaf(update, param, flow.moved[n], None, ({},) * nothing, (None,) * nothing))
    return leaves


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
                own = plan.own_slots(place, slots, j)
                stored = Stored(place.link, place.codec(j) if own else None)
                leaves[j] = averaged_leaf(stored, leaf, own, state[place.name])
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


def _decoded(plan: Plan, place: Place, slots: Mapping[str, list[Any]], j: int) -> Mapping[str, Any]:
    """Return the slots that a link has for the parameter numbered `j`, as the link has them."""
    own = plan.own_slots(place, slots, j)
    codec = place.codec(j)
    return codec.decoded(own) if codec and own else own
