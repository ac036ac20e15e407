"""Run links that see the whole tree: those of ours that are written so, and those of optax."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optimize_loss._checks import InvalidType, TreeMismatch
from optimize_loss._engine.arrays import compute_dtype
from optimize_loss._engine.leaf import Leaf
from optimize_loss._engine.plan import Place, Plan, State, parts
from optimize_loss._engine.totals import Prepared
from optimize_loss._names import same_leaves


def run_tree(
    plan: Plan, place: Place, leaves: Sequence[Leaf], state: State, ready: Prepared
) -> tuple[list[Any], State]:
    """Run a link that sees all its parameters at once; return updates, and its new state."""
    mine = state[place.name]
    slots = parts(place.link, mine).slots
    stored = dict(enumerate(plan.params.leaves))
    moved = {j: _moved(leaf) for j, leaf in zip(plan.live, leaves, strict=True)}
    taken = {j: name for j, name in enumerate(plan.params.names) if place.takes[j]}
    params = {name: moved.get(j, _wide(stored[j])) for j, name in taken.items()}
    updates = {
        taken[j]: leaf.update.astype(params[taken[j]].dtype)
        for j, leaf in zip(plan.live, leaves, strict=True)
        if j in taken
    }
    result = place.link.run(updates, slots, params, ready.shared[0])
    new, new_slots = _check_result(place, result, updates, slots)
    names = [plan.params.names[j] for j in plan.live]
    results = [new.get(n, leaf.update) for n, leaf in zip(names, leaves, strict=True)]
    return results, {place.name: {**mine, **ready.memories[0], **new_slots}}


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


def run_optax(
    plan: Plan, place: Place, leaves: Sequence[Leaf], state: State, extra: Mapping[str, Any]
) -> tuple[list[Any], State]:
    """Run an optax transformation over the whole tree; for a gradient of None it sees zeros."""
    updates = [jnp.zeros_like(p) for p in plan.params.leaves]
    params = list(plan.params.leaves)
    for j, leaf in zip(plan.live, leaves, strict=True):
        dtype = params[j].dtype
        updates[j], params[j] = leaf.update.astype(dtype), _moved(leaf).astype(dtype)
    trees = plan.params.unflatten(updates), plan.params.unflatten(params)
    update = optax.with_extra_args_support(place.link).update
    try:
        tree, new = update(trees[0], state[place.name], trees[1], **extra)
    except TypeError as error:
        error.add_note(
            f"The link {place.name!r} was given the extra arguments {sorted(extra)}. For "
            "`grad` and `value_fn`, as a line search needs, pass them to `update`; "
            "`optimize_loss` passes both, but not with `accumulate`, `sam`, `shard_state` or sums "
            "over mapped devices, where an update is made of more than one batch or place."
        )
        raise
    flat = same_leaves(f"the updates from {place.name}", tree, "params", plan.params.tree)
    return [flat[j] for j in plan.live], {place.name: new}
