"""Make the slots of some parameters again."""

import collections
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from optimize_loss._checks import TreeMismatch
from optimize_loss._engine.chain import Chain
from optimize_loss._engine.device import copy, on_device
from optimize_loss._engine.link import Link, TreeLink
from optimize_loss._engine.plan import parts
from optimize_loss._engine.precision import Codec, Precision, codecs
from optimize_loss._engine.trees import take_apart
from optimize_loss._names import leaf_names, leaf_paths

State = dict[str, Any]


def reset(
    chain: Chain, state: Mapping[str, Any], params: Any, names: set[str]
) -> tuple[State, set[str]]:
    """Return the state of a chain with the slots of some parameters as before the first update.

    Numbers and memories for the complete tree do not change. A link that sees the complete tree is
    initialized again, and what is in its state under the name of one of these parameters is taken.

    Args:
      chain: the links.
      state: their state, with slots as trees like `params`, None where a parameter has none.
      params: all parameters, as they are now.
      names: of those whose slots are made again.

    Returns:
      The state, and the names of all parameters that have slots.

    Raises:
      TreeMismatch: the new state of a link that sees the complete tree has another structure.
    """
    params = jax.tree.map(on_device, params)
    new, have = dict(state), set()
    for name, _ in chain.links:
        link = chain.link(name)
        if isinstance(link, Link) and not isinstance(link, TreeLink):
            new[name], found = _of_link(link, state[name], params, names, chain.precision)
        else:
            new[name], found = _of_whole(name, link, state[name], params, names)
        have |= found
    return new, have


def _of_link(
    link: Link, state: State, params: Any, names: set[str], precision: Precision | None
) -> tuple[State, set[str]]:
    treedef = jax.tree.structure(params)
    slots = {slot: treedef.flatten_up_to(x) for slot, x in parts(link, state).slots.items()}
    taken, have = take_apart(params), set()
    takes = [
        any(leaves[j] is not None for leaves in slots.values()) for j in range(len(taken.names))
    ]
    coded: Sequence[Codec | None] = [None] * len(takes)
    if precision is not None:
        coded = codecs(link, takes, precision.formats(taken), taken)
    for j in itertools.compress(range(len(takes)), takes):
        have.add(taken.names[j])
        if taken.names[j] in names:
            fresh = link.slots(taken.leaves[j])
            fresh = fresh if (codec := coded[j]) is None else codec.encoded(fresh)
            _renew(slots, j, fresh)
    return {**state, **{slot: treedef.unflatten(x) for slot, x in slots.items()}}, have


def _renew(slots: Mapping[str, list[Any]], j: int, fresh: Mapping[str, jax.Array]) -> None:
    """Put fresh slots in the place of those that the parameter numbered `j` has."""
    for slot, leaves in slots.items():
        if leaves[j] is not None:
            leaves[j] = _placed(fresh[slot], leaves[j])


def _of_whole(
    name: str, link: Any, state: Any, params: Any, names: set[str]
) -> tuple[Any, set[str]]:
    state, rest = _parted(link, state)
    owners = owners_of(state, leaf_names(params))
    have = {owner for owner in owners if owner is not None}
    if have & names:
        fresh = jax.tree.leaves(_made(name, link, state, params, have))
        pairs = zip(fresh, jax.tree.leaves(state), owners, strict=True)
        leaves = [_placed(new, old) if owner in names else old for new, old, owner in pairs]
        state = jax.tree.unflatten(jax.tree.structure(state), leaves)
    return ({**rest, **state} if rest else state), have


def made_of(name: str, link: Any, state: Any, params: Any) -> Any:
    """Return the initial state of a link that sees the complete tree, for its own parameters.

    Args:
      name: of the link.
      link: an optax transformation, or a `TreeLink`, without its numbers and memory.
      state: its state, which names the parameters.
      params: all parameters.

    Raises:
      TreeMismatch: it has another structure than the state.
    """
    slots, _ = _parted(link, state)
    owners = owners_of(slots, leaf_names(params))
    return _made(name, link, slots, params, {owner for owner in owners if owner is not None})


def _parted(link: Any, state: Any) -> tuple[Any, State]:
    """Return the state of a link without its numbers and its memory, and these."""
    if not isinstance(link, TreeLink):
        return state, {}
    numbers, memory, slots = parts(link, state)
    return dict(slots), {**numbers, **memory}


def _made(name: str, link: Any, state: Any, params: Any, have: set[str]) -> Any:
    """Return what a link makes of the parameters that it was made for, as its state tells.

    These are all, or those that have something in it: the others may not be trained.
    """
    known, leaves = leaf_names(params), jax.tree.leaves(params)
    error = None
    for chosen in (set(known), have):
        own: Any = [p if n in chosen else None for n, p in zip(known, leaves, strict=True)]
        try:
            if isinstance(link, TreeLink):
                made = link.init({n: p for n, p in zip(known, own, strict=True) if n in chosen})
            else:
                made = link.init(jax.tree.unflatten(jax.tree.structure(params), own))
        except (TypeError, ValueError) as caught:  # of masks that have no place for the others
            error = caught
            continue
        if jax.tree.structure(made) == jax.tree.structure(state):
            return made
    raise TreeMismatch(
        f"The state of the link {name!r} must have the structure that the link makes for all "
        f"parameters, or for those that have a state in it: {sorted(have)}."
    ) from error


def owners_of(state: Any, names: Iterable[str]) -> list[str | None]:
    """Return for each leaf the parameter whose name its path ends with, or None.

    Of several names, it is the one that has most others beside it: the path before it then is
    that of a tree like the parameters. A single integer is nobody's: it counts updates.

    Example:
      >>> owners_of({"count": 3, "mu": {"mu": {"w": 0.0}, "w": 0.0}}, ["w", "mu/w", "count"])
      [None, 'mu/w', 'w']
    """
    known, leaves = set(names), jax.tree.leaves(state)
    ends = [
        [] if _counts(leaf) else list(_ends(path.split("/"), known))
        for path, leaf in zip(leaf_paths(state), leaves, strict=True)
    ]
    beside = collections.Counter(before for pairs in ends for before, _ in pairs)
    likely = (max(pairs, key=lambda pair: beside[pair[0]], default=None) for pairs in ends)
    return [None if pair is None else pair[1] for pair in likely]


def _counts(leaf: Any) -> bool:
    return jnp.ndim(leaf) == 0 and jnp.issubdtype(jnp.result_type(leaf), jnp.integer)


def _ends(parts: list[str], known: set[str]) -> Iterator[tuple[str, str]]:
    """Yield the names that a path ends with, the longest first, each behind the path before it."""
    for i in range(len(parts)):
        if (name := "/".join(parts[i:])) in known:
            yield "/".join(parts[:i]), name


def _placed(new: jax.Array, old: jax.Array) -> jax.Array:
    """Return a fresh slot of the dtype and where the old one is, so that nothing is traced again.

    It is a copy: whoever made it may keep it.
    """
    new = copy(new.astype(old.dtype))
    if isinstance(new, Tracer) or isinstance(old, Tracer) or not old.committed:
        return new
    return jax.device_put(new, old.sharding)
