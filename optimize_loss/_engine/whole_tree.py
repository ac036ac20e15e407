"""Run links that see the whole tree: those of ours that are written so, and those of optax."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optimize_loss._checks import InvalidType, TreeMismatch
from optimize_loss._engine.arrays import compute_dtype
from optimize_loss._engine.flow import Call, Flow, Place, State, last, prepared
from optimize_loss._engine.leaf import PASS, Leaf, Wanted
from optimize_loss._names import same_leaves


def run_tree(places: list[Place], call: Call, flow: Flow, wanted: Wanted) -> tuple[Flow, State]:
    """Run a link that sees all its parameters at once."""
    (place,) = places
    own = [(place.link if place.takes[j] else PASS,) for j in call.live]
    parts = [Leaf(u, p, None, ({},)) for u, p in zip(flow.updates, flow.params, strict=True)]
    _, (k,), (memory,) = prepared(places, call, own, parts, {})
    mine = call.state[place.name]
    slots = {n: x for n, x in mine.items() if n not in {**place.link.numbers(), **memory}}
    leaves = {
        **dict(enumerate(call.params.leaves)),
        **dict(zip(call.live, flow.params, strict=True)),
    }
    taken = {j: name for j, name in enumerate(call.params.names) if place.takes[j]}
    params = {name: _wide(leaves[j]) for j, name in taken.items()}
    updates = {
        taken[j]: u.astype(params[taken[j]].dtype)
        for j, u in zip(call.live, flow.updates, strict=True)
        if j in taken
    }
    result = place.link.run(updates, slots, params, k)
    new, new_slots = _check_result(place, result, updates, slots)
    results = [new.get(name, old) for name, old in zip(call.names, flow.updates, strict=True)]
    state = {place.name: {**mine, **memory, **new_slots}}
    return last(call, flow._replace(updates=results, squares={}), wanted), state


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


def run_optax(places: list[Place], call: Call, flow: Flow, wanted: Wanted) -> tuple[Flow, State]:
    """Run an optax transformation over the whole tree; for a gradient of None it sees zeros."""
    (place,) = places
    updates = [jnp.zeros_like(p) for p in call.params.leaves]
    params = list(call.params.leaves)
    for j, update, param in zip(call.live, flow.updates, flow.params, strict=True):
        dtype = params[j].dtype
        updates[j], params[j] = update.astype(dtype), param.astype(dtype)
    trees = call.params.unflatten(updates), call.params.unflatten(params)
    update = optax.with_extra_args_support(place.link).update
    try:
        tree, new = update(trees[0], call.state[place.name], trees[1], **call.extra)
    except TypeError as error:
        error.add_note(
            f"The link {place.name!r} was given the extra arguments {sorted(call.extra)}. For "
            "`grad` and `value_fn`, as a line search needs, pass them to `update`; "
            "`optimize_loss` passes both, but not with `accumulate`, `sam`, `shard_state` or sums "
            "over mapped devices, where an update is made of more than one batch or place."
        )
        raise
    flat = same_leaves(f"the updates from {place.name}", tree, "params", call.params.tree)
    results = [flat[j] for j in call.live]
    flow = flow._replace(updates=results, squares={})
    return last(call, flow, wanted), {place.name: new}
