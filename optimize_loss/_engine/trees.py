"""A tree of parameters taken apart into names and leaves, and gradients checked against it."""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from optimize_loss._checks import InvalidType, TreeMismatch
from optimize_loss._engine.bucket import Bucket, is_bucket
from optimize_loss._engine.device import copy, from_host, has_values, is_elsewhere, on_device
from optimize_loss._engine.members import Members
from optimize_loss._names import leaf_names, leaf_paths, same_leaves

PARAMETER = "The parameter"


class Owner(NamedTuple):
    """The parameter that a leaf is, or those in it."""

    names: tuple[str, ...]
    bucket: Members | None

    def __str__(self) -> str:
        first, *rest = map(repr, self.names)
        return f"the parameters {', '.join((first, *rest))}" if rest else f"the parameter {first}"

    def own(self, each: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
        """Return what is its own, from that of each parameter by name."""
        if (bucket := self.bucket) is None:
            return each[self.names[0]]
        found = (each[name] for name in self.names)
        return jax.tree.map(lambda *numbers: bucket.spread(numbers), *found)


@dataclasses.dataclass(frozen=True)
class Params:
    """A tree of parameters, taken apart. A bucket is one leaf."""

    tree: Any
    names: list[str]
    leaves: list[Any]
    buckets: list[Members | None]  # for each leaf, what is in it if it is a bucket

    @functools.cached_property
    def dtype(self) -> Any:
        """The dtype of numbers in the state: float64 where a parameter is, else float32."""
        wide = [p for p in self.leaves if is_inexact(p) and jnp.finfo(p.dtype).dtype == jnp.float64]
        return jnp.dtype(jnp.float64 if wide else jnp.float32)

    @property
    def are_unknown(self) -> bool:
        """Whether the tree is a node of another's own that stands for any parameters.

        `optax.tree_map_params` gives such a one to `init`.
        """
        structure = jax.tree.structure(self.tree)
        is_plain = isinstance(self.tree, dict | list | tuple | None)
        return structure.num_nodes == 1 and not self.leaves and not is_plain

    @functools.cached_property
    def members(self) -> list[tuple[str, ...]]:
        """For each leaf, the names of the parameters in it."""
        pairs = zip(self.names, self.buckets, strict=True)
        return [(name,) if bucket is None else bucket.names for name, bucket in pairs]

    @functools.cached_property
    def owners(self) -> list[Owner]:
        """For each leaf, which parameters it is."""
        return list(map(Owner, self.members, self.buckets))

    def each(self) -> tuple[list[str], list[Any]]:
        """Return names and leaves, with those in a bucket one by one."""
        parts = zip(self.buckets, self.leaves, strict=True)
        split = [[x] if bucket is None else bucket.split(x) for bucket, x in parts]
        return list(itertools.chain(*self.members)), list(itertools.chain(*split))

    def unflatten(self, leaves: Sequence[Any]) -> Any:
        """Return a tree of the same structure with these leaves."""
        return jax.tree.unflatten(jax.tree.structure(self.tree), leaves)

    def check_updates(self, updates: Any) -> list[Any]:
        """Return the leaves of `updates`: None stays None, those of integers become zeros.

        Raises:
          TreeMismatch: leaves are missing or extra, or a shape differs.
          InvalidType: a complex update is meant for a real parameter.
        """
        flat = same_leaves("updates", updates, "params", self.tree)
        return [self._check(*each) for each in zip(self.names, flat, self.leaves, strict=True)]

    def live(self, updates: Sequence[Any]) -> tuple[int, ...]:
        """Return the numbers of the leaves that have an update and can be trained."""
        pairs = enumerate(zip(updates, self.leaves, strict=True))
        return tuple([j for j, (u, p) in pairs if u is not None and is_inexact(p)])

    def _check(self, name: str, update: Any, param: Any) -> Any:
        if update is None:
            return None
        if not is_inexact(param):
            return jnp.zeros_like(param)
        update = as_array("The update of", name, update)
        if update.shape != param.shape:
            raise TreeMismatch(
                f"The update of {name!r} must have the parameter's shape {param.shape}. "
                f"Received: shape {update.shape}."
            )
        if jnp.iscomplexobj(update) and not jnp.iscomplexobj(param):
            raise InvalidType(
                f"The update of {name!r} must be real, as the parameter is. "
                f"Received: dtype {update.dtype}."
            )
        return update


def take_apart(tree: Any) -> Params:
    """Return names and leaves of `tree`; Python numbers become arrays.

    Raises:
      InvalidType: a leaf is neither a number nor an array.
      ValueError: two leaves have one name.
    """
    names = leaf_names(tree)
    nodes = jax.tree.leaves(tree, is_leaf=is_bucket)
    return Params(
        tree,
        names,
        [as_array(PARAMETER, n, p) for n, p in zip(names, jax.tree.leaves(tree), strict=True)],
        [node.members if isinstance(node, Bucket) else None for node in nodes],
    )


def as_array(what: str, name: str, leaf: Any) -> Any:
    """Return `leaf` if it has a shape and a dtype; Python numbers become strongly typed arrays.

    Raises:
      InvalidType: it is neither; the message begins with `what` and `name`.
    """
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype") and _holds_numbers(leaf.dtype):
        return leaf
    if isinstance(leaf, bool | int | float | complex):
        return from_host(leaf, jnp.result_type(leaf))
    advice = ""
    if what == PARAMETER:
        advice = (
            " Keep values that are not arrays out of the parameters, for example with "
            "`equinox.partition(model, equinox.is_inexact_array)`."
        )
    raise InvalidType(
        f"{what} {name!r} must be an array of numbers. "
        f"Received: {leaf!r} of type {type(leaf).__name__}.{advice}"
    )


@functools.cache
def _holds_numbers(dtype: Any) -> bool:
    kinds = (jnp.number, jnp.bool_, jax.dtypes.extended)
    return any(jnp.issubdtype(dtype, kind) for kind in kinds)


def check_on_device(names: Sequence[str], leaves: Sequence[Any]) -> None:
    """Raise a `ValueError` if a parameter that is to be trained is in the memory of the host."""
    for name, leaf in zip(names, leaves, strict=True):
        if is_elsewhere(leaf):
            raise ValueError(
                f"{PARAMETER} {name!r} must be in the memory of its device to be trained. "
                f"Received: {jax.typeof(leaf)} in the memory of the host. Move it, as in "
                "`jax.device_put(params, jax.memory.Space.Device)`; a state can be there between "
                "steps."
            )


def without_strangers(updates: Any, params: Any) -> Any:
    """Return the parameters with None for what is no array and has an update of None.

    So a model of Equinox has functions among its arrays, and its gradients None in their place.
    """
    leaves, structure = jax.tree.flatten(params)
    if all(map(_is_number, leaves)):
        return params
    flat = same_leaves("updates", updates, "params", params)
    pairs = zip(leaves, flat, strict=True)
    return structure.unflatten(p if _is_number(p) or u is not None else None for p, u in pairs)


def with_strangers(params: Any, before: Any) -> Any:
    """Return new parameters with what `without_strangers` has taken out of those of before."""
    strangers = jax.tree.map(lambda x: None if _is_number(x) else x, before)
    return jax.tree.map(
        lambda new, old: old if new is None else new, params, strangers, is_leaf=_is_none
    )


def _is_none(leaf: Any) -> bool:
    return leaf is None


def _is_number(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") or isinstance(leaf, bool | int | float | complex)


def copied(what: str, tree: Any) -> Any:
    """Return a copy of a tree of arrays and numbers, strongly typed, so that there is one trace.

    Raises:
      InvalidType: a leaf is neither an array nor a number, or has no values; the message begins
        with `what`.
    """
    for name, leaf in zip(leaf_paths(tree), jax.tree.leaves(tree), strict=True):
        as_array(what, name, leaf)
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise InvalidType(
                f"{what} {name!r} must have values. Received: {leaf!r}. For the shapes of "
                "a state, use `jax.eval_shape(step.init, params)`."
            )
    return jax.tree.map(_copy, tree)


def _copy(leaf: Any) -> jax.Array:
    if _is_extended(leaf):
        return copy(leaf)
    dtype = jnp.result_type(leaf)
    if has_values(leaf) and leaf.dtype == dtype and not leaf.weak_type:
        return copy(leaf)
    if isinstance(leaf, jax.Array):
        return jnp.array(leaf, dtype=dtype, copy=True)
    return from_host(leaf, dtype)


def _is_extended(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.extended)


def owned(tree: Any) -> Any:
    """Return a tree with copies of all arrays: some may be kept by whoever made the tree.

    They are made one after the other, and each may free its original.
    """
    leaves, treedef = jax.tree.flatten(tree)
    del tree
    for i, leaf in enumerate(leaves):
        leaves[i] = copy(leaf) if isinstance(leaf, jax.Array) else leaf
    return treedef.unflatten(leaves)


def copied_like(what: str, tree: Any, old: Any) -> Any:
    """Return what `copied` does of a tree like another one, committed to devices where that is."""

    def put(new: jax.Array, there: Any) -> jax.Array:
        is_free = not isinstance(new, Tracer) and not new.committed
        return jax.device_put(new, there.sharding) if is_free and _is_committed(there) else new

    return jax.tree.map(put, copied(what, tree), old)


def spread_like(new: Any, old: Any) -> Any:
    """Return an array spread as another one is, if they are on the same devices."""
    if not _is_committed(old) or isinstance(new, Tracer) or new.sharding == old.sharding:
        return new
    same = new.sharding.device_set == old.sharding.device_set
    return jax.device_put(new, old.sharding) if same else new


def distinct(tree: Any) -> Any:
    """Return a tree in which no array comes twice: the memory of each will be given away."""
    seen: set[int] = set()

    def own(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and id(leaf) in seen:
            leaf = copy(leaf)
        seen.add(id(leaf))
        return leaf

    return jax.tree.map(own, tree)


def placed_like(params: Any, tree: Any) -> Any:
    """Return `tree` with its arrays committed to devices if those of `params` are.

    A step commits all its results once a parameter is committed. Beginning with such a state,
    the first step is the same program as the second.
    """
    arrays = (p for p in jax.tree.leaves(params) if _is_committed(p))
    sharding = getattr(on_device(next(arrays, None)), "sharding", None)
    if isinstance(sharding, jax.sharding.NamedSharding):
        sharding = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    elif not isinstance(sharding, jax.sharding.SingleDeviceSharding):
        return tree
    return jax.tree.map(lambda x: x if _is_committed(x) else jax.device_put(x, sharding), tree)


def _is_committed(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) and leaf.committed


def is_inexact(leaf: Any) -> bool:
    """Return whether a leaf can be trained: float or complex."""
    return jnp.issubdtype(leaf.dtype, jnp.inexact)
