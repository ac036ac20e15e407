"""Small parameters side by side in one array.

A tree of many small parameters costs a few microseconds for each array that a step takes and
returns, and a pass over each. In a *packed* tree, a flat dict by name, parameters that go through
the same elementwise links share one array. Links see it as one parameter.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from optimize_loss._engine.arrays import compute_dtype
from optimize_loss._engine.device import is_elsewhere
from optimize_loss._engine.members import Members, Static
from optimize_loss._names import leaf_names

# In entries. Up to here a step becomes 1.5 to 6 times as fast; where the loss needs each leaf as an
# array of its own, as for a product, 0.9 to 1.3 times (benchmarks/results/bucket-cpu.txt).
LARGEST_IN_A_BUCKET = 4096


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["buffer"], meta_fields=["members"]
)
@dataclasses.dataclass(frozen=True)
class Bucket:
    """Parameters, or their gradients or slots, in one array; None where there are none of them."""

    buffer: Any
    members: Members


@dataclasses.dataclass(frozen=True, eq=False)
class Layout(Static):
    """How a user's tree of parameters is packed.

    Attributes:
      treedef: the structure of the tree.
      names: of its leaves.
      buckets: the members of each bucket, by the name of the bucket.
      trained: the names in the packed tree, of leaves and buckets, that are trained.
      numbers: of the chain's links, `link/number`, that share an array, by the name of the array.
    """

    treedef: Any
    names: tuple[str, ...]
    buckets: tuple[tuple[str, Members], ...]
    trained: frozenset[str]
    numbers: tuple[tuple[str, Members], ...] = ()

    def _key(self) -> Any:
        return self.treedef, self.names, self.buckets, self.trained, self.numbers

    def __reduce__(self) -> Any:
        # As a tree, since pickle refuses structures with nodes of a user's.
        tree = jax.tree.unflatten(self.treedef, range(len(self.names)))
        return _layout_of, (tree, self.names, self.buckets, self.trained, self.numbers)

    def pack(self, tree: Any) -> dict[str, Any]:
        """Return a tree like the user's, packed."""
        return self.gather(dict(zip(self.names, self.treedef.flatten_up_to(tree), strict=True)))

    def pack_shapes(self, tree: Any) -> dict[str, Any]:
        """Return the shapes of a packed tree of shapes on a mesh; shared arrays are replicated."""
        leaves = self.treedef.flatten_up_to(tree)
        places = {name: x.sharding for name, x in zip(self.names, leaves, strict=True)}
        whole = NamedSharding(leaves[0].sharding.mesh, PartitionSpec())

        def placed(name: str, tree: Any) -> Any:
            place = functools.partial(jax.ShapeDtypeStruct, sharding=places.get(name, whole))
            return jax.tree.map(lambda x: place(x.shape, x.dtype), tree)

        return {name: placed(name, x) for name, x in jax.eval_shape(self.pack, tree).items()}

    def gather_grads(self, grads: Mapping[str, Any]) -> dict[str, Any]:
        """Return gradients by name, packed; those in a bucket in float32 or wider, as in links.

        XLA omits the rounding to 16 bits of values that are widened immediately, which an array of
        16 bits would force on it: with the bucket and without, links see the same.
        """
        inside = {name for _, members in self.buckets for name in members.names}
        return self.gather(
            {n: _wide(g) if n in inside and g is not None else g for n, g in grads.items()}
        )

    def gather(self, leaves: Mapping[str, Any]) -> dict[str, Any]:
        """Return leaves by name, packed. All members of a bucket are there, or none is."""
        inside = {name for _, members in self.buckets for name in members.names}
        packed = {name: leaf for name, leaf in leaves.items() if name not in inside}
        for name, members in self.buckets:
            if members.names[0] in leaves:
                parts = [leaves[member] for member in members.names]
                packed[name] = Bucket(members.join(parts), members)
        return packed

    def unpack(self, packed: Mapping[str, Any]) -> Any:
        """Return a packed tree as the user's, with None for what it does not have."""
        leaves = unpacked(packed)
        return jax.tree.unflatten(self.treedef, [leaves.get(name) for name in self.names])

    def with_numbers(self, state: Mapping[str, Any]) -> "Layout":
        """Return the layout in which the numbers of this state share an array for each dtype."""
        groups: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
        for link, mine in state.items():
            for name, x in mine.items() if isinstance(mine, dict) else ():
                if _is_number(x):
                    found = groups.setdefault(f"numbers/{x.dtype.name}", [])
                    found.append((f"{link}/{name}", x.shape))
        numbers = [(key, Members(*zip(*found, strict=True))) for key, found in groups.items()]
        by_path = tuple((f"{key}/{members.digest}", members) for key, members in numbers)
        return dataclasses.replace(self, numbers=by_path)

    def join_numbers(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state of a chain with its numbers in few arrays."""
        joined = dict(state)
        for key, members in self.numbers:
            pairs = [name.split("/", 1) for name in members.names]
            joined[key] = members.join_on_device([state[link][number] for link, number in pairs])
            for link, number in pairs:
                joined[link] = {name: x for name, x in joined[link].items() if name != number}
        return joined

    def split_numbers(self, joined: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state of a chain with its numbers by link."""
        arrays = dict(self.numbers)
        state = _map_links(dict, {name: x for name, x in joined.items() if name not in arrays})
        for key, members in self.numbers:
            for name, x in zip(members.names, members.split_on_device(joined[key]), strict=True):
                link, number = name.split("/", 1)
                state[link][number] = x
        return state

    def unpack_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state of a chain with every slot as a tree like the user's."""
        return _map_slots(self.unpack, self.split_numbers(state))

    def pack_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state of a chain, packed."""
        packed = _map_slots(lambda tree: self.only_trained(self.pack(tree)), state)
        return self.join_numbers(packed)

    def regather_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state of a chain with every slot packed as here, not in another layout."""
        return _map_slots(lambda packed: self.gather(unpacked(packed)), state)

    def own_slots(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state of a chain with of every slot, packed, what is trained."""
        return _map_slots(self.only_trained, state)

    def all_slots(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state of a chain with None in every packed slot for what it does not have."""
        members = dict(self.buckets)
        none = {n: Bucket(None, members[n]) if n in members else None for n in self.trained}
        return _map_slots(lambda packed: {**none, **packed}, state)

    def trains(self, names: Sequence[str]) -> bool:
        """Return whether it was made for a step that trains these parameters."""
        buckets = dict(self.buckets)
        inside = (buckets[x].names if x in buckets else (x,) for x in self.trained)
        return set(itertools.chain(*inside)) == set(names)

    def only_trained(self, packed: Mapping[str, Any]) -> dict[str, Any]:
        """Return the part of a packed tree that is trained."""
        return {name: x for name, x in packed.items() if name in self.trained}

    def parted(self, grads: Mapping[str, Any]) -> "Layout":
        """Return the layout in which the members with and without gradients do not mix."""
        buckets: dict[str, Members] = {}
        trained = set(self.trained)
        for name, members in self.buckets:
            without = [member in grads and grads[member] is None for member in members.names]
            if any(without) and not all(without):
                parts = members.parted(without)
                buckets |= zip((name, f"{name} without gradient"), parts, strict=True)
                trained.add(f"{name} without gradient")
            else:
                buckets[name] = members
        return dataclasses.replace(self, buckets=tuple(buckets.items()), trained=frozenset(trained))


def _wide(leaf: jax.Array) -> jax.Array:
    return leaf.astype(compute_dtype(leaf.dtype))


def _map_links(function: Callable[[Any], Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of a chain with a function applied to that of each link."""
    return {name: function(x) if isinstance(x, dict) else x for name, x in state.items()}


def _map_slots(function: Callable[[Any], Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of a chain with a function applied to each slot, which is a tree."""
    return _map_links(
        lambda mine: {n: x if _is_number(x) else function(x) for n, x in mine.items()}, state
    )


def _is_number(x: Any) -> bool:
    """Return whether what a link keeps is a number, and not the tree of a slot."""
    return jax.tree_util.all_leaves([x])


def _layout_of(tree: Any, *rest: Any) -> Layout:
    return Layout(jax.tree.structure(tree), *rest)


def shown_name(bucket: str) -> str:
    """Return the name of a bucket as tables show it, without the digest of its members."""
    return bucket.rpartition("/")[0]


def is_bucket(node: Any) -> bool:
    """Return whether a node of a tree is a bucket."""
    return isinstance(node, Bucket)


def unpacked(packed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the leaves of a packed tree by name."""
    leaves: dict[str, Any] = {}
    for name, x in packed.items():
        if isinstance(x, Bucket):
            leaves |= zip(x.members.names, x.members.split(x.buffer), strict=True)
        else:
            leaves[name] = x
    return leaves


def find_layout(
    params: Any, kinds: Sequence[Any], trained: Sequence[bool], largest: int
) -> Layout | None:
    """Return how to pack a tree; None where no two leaves would share an array.

    Leaves share one that have the dtype, the place and the kind in common. Those that are spread
    over devices stay by themselves.

    Args:
      params: a tree of arrays.
      kinds: of each leaf; None for one that must stay by itself.
      trained: whether each leaf is trained.
      largest: the number of elements above which a leaf stays by itself.
    """
    names, leaves = leaf_names(params), jax.tree.leaves(params)
    buckets = _buckets(names, leaves, _groups(leaves, kinds, trained, largest))
    if not buckets:
        return None
    alone = set(itertools.compress(names, trained))
    of_buckets = {bucket for bucket, members in buckets.items() if members.names[0] in alone}
    alone.difference_update(*(members.names for members in buckets.values()))
    return Layout(
        treedef=jax.tree.structure(params),
        names=tuple(names),
        buckets=tuple(buckets.items()),
        trained=frozenset(alone | of_buckets),
    )


def _groups(
    leaves: Sequence[Any], kinds: Sequence[Any], trained: Sequence[bool], largest: int
) -> list[list[int]]:
    """Return the numbers of the leaves that share an array."""
    groups: dict[Any, list[int]] = {}
    for i, (leaf, kind) in enumerate(zip(leaves, kinds, strict=True)):
        place = _place(leaf)
        if kind is not None and place is not None and leaf.size <= largest:
            groups.setdefault((leaf.dtype, place, kind, trained[i]), []).append(i)
    return [found for found in groups.values() if len(found) > 1]


def _buckets(
    names: Sequence[str], leaves: Sequence[Any], groups: Sequence[Sequence[int]]
) -> dict[str, Members]:
    """Return the members of each bucket, by a name that no parameter has."""
    buckets: dict[str, Members] = {}
    numbers: dict[str, Iterator[int]] = {}
    for found in groups:
        dtype = leaves[found[0]].dtype.name
        texts = (f"bucket/{dtype}/{n}" for n in numbers.setdefault(dtype, itertools.count()))
        bucket = next(text for text in texts if text not in names)
        members = Members(tuple(names[i] for i in found), tuple(leaves[i].shape for i in found))
        buckets[f"{bucket}/{members.digest}"] = members
    return buckets


def _place(leaf: Any) -> Any:
    """Return where a leaf is, whole and in the usual memory; None where it is not so."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        return None
    if isinstance(leaf, Tracer):
        spec = getattr(getattr(jax.typeof(leaf), "sharding", None), "spec", ())
        return None if any(axis is not None for axis in spec) else "traced"
    if is_elsewhere(leaf) or not leaf.sharding.is_fully_replicated:
        return None
    return leaf.sharding
