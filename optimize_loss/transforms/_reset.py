"""Make the slots of some parameters anew."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
from jax.core import Tracer

from optimize_loss._checks import TreeMismatch
from optimize_loss._names import leaf_names, leaf_paths
from optimize_loss.transforms._base import Link, TreeLink
from optimize_loss.transforms._chain import Chain

State = dict[str, Any]


def reset(
    chain: Chain, state: Mapping[str, Any], params: Any, names: set[str]
) -> tuple[State, set[str]]:
    """Return the state of a chain with the slots of some parameters as before the first update.

    Numbers and memories for the whole tree stay. A link that sees the whole tree is initialised
    anew, and what stands in its state under the name of one of these parameters is taken.

    Args:
      chain: the links.
      state: their state, with slots as trees like `params`, None where a parameter has none.
      params: all parameters, as they are now.
      names: of those whose slots are made anew.

    Returns:
      The state, and the names of all parameters that have slots.

    Raises:
      TreeMismatch: what a link that sees the whole tree makes anew has another structure.
    """
    new, have = dict(state), set()
    for name, _ in chain.links:
        link = chain.link(name)
        of_leaves = isinstance(link, Link) and not isinstance(link, TreeLink)
        function = _of_link if of_leaves else _of_whole
        new[name], found = function(name, link, state[name], params, names)
        have |= found
    return new, have


def _of_link(
    _: str, link: Link, state: State, params: Any, names: set[str]
) -> tuple[State, set[str]]:
    other, treedef = {*link.numbers(), *link.memory()}, jax.tree.structure(params)
    slots = {slot: treedef.flatten_up_to(x) for slot, x in state.items() if slot not in other}
    have = set()
    for j, (name, param) in enumerate(
        zip(leaf_names(params), jax.tree.leaves(params), strict=True)
    ):
        if all(leaves[j] is None for leaves in slots.values()):
            continue
        have.add(name)
        if name in names:
            fresh = link.slots(param)
            for slot, leaves in slots.items():
                leaves[j] = _placed(fresh[slot], leaves[j])
    return {**state, **{slot: treedef.unflatten(x) for slot, x in slots.items()}}, have


def _of_whole(
    name: str, link: Any, state: Any, params: Any, names: set[str]
) -> tuple[Any, set[str]]:
    known = leaf_names(params)
    owners = owners_of(state, known)
    have = {owner for owner in owners if owner is not None}
    if not have & names:
        return state, have
    own = [p if n in have else None for n, p in zip(known, jax.tree.leaves(params), strict=True)]
    if isinstance(link, TreeLink):
        made = link.init({n: p for n, p in zip(known, own, strict=True) if p is not None})
        fresh = {**state, **made}
    else:
        fresh = link.init(jax.tree.unflatten(jax.tree.structure(params), own))
    if jax.tree.structure(fresh) != jax.tree.structure(state):
        raise TreeMismatch(
            f"The state of the link {name!r} must have the structure that the link makes for the "
            f"parameters that have a state in it: {sorted(have)}."
        )
    pairs = zip(*map(jax.tree.leaves, (fresh, state)), owners, strict=True)
    leaves = [_placed(new, old) if owner in names else old for new, old, owner in pairs]
    return jax.tree.unflatten(jax.tree.structure(state), leaves), have


def owners_of(state: Any, names: Iterable[str]) -> list[str | None]:
    """Return for each leaf the longest name of a parameter that its path ends with, or None.

    Example:
      >>> owners_of({"count": 0, "mu": {"head": {"w": 0}, "w": 0}}, ["w", "head/w"])
      [None, 'head/w', 'w']
    """
    known = set(names)
    owners = []
    for path in leaf_paths(state):
        parts = path.split("/")
        ends = ("/".join(parts[i:]) for i in range(len(parts)))
        owners.append(next((end for end in ends if end in known), None))
    return owners


def _placed(new: jax.Array, old: jax.Array) -> jax.Array:
    """Return a fresh slot of the dtype and where the old one is, so that nothing is traced anew."""
    new = new.astype(old.dtype)
    if isinstance(new, Tracer) or isinstance(old, Tracer) or not old.committed:
        return new
    return jax.device_put(new, old.sharding)
