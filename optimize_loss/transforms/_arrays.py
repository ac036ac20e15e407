"""Arrays with values: copies of them, and the way to the host and back, without a compilation."""

import functools
from collections.abc import Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding


# In entries. Up to here constants come from the host; larger ones are made on the device by a
# program for each shape.
_SMALL = 1 << 16


def has_values(x: Any) -> TypeGuard[jax.Array]:
    """Return whether `x` is jax's array, outside of a trace."""
    return isinstance(x, jax.Array) and not isinstance(x, Tracer)


def copy(x: jax.Array) -> jax.Array:
    """Return an array of the same values in memory of its own, where the other one is."""
    if has_values(x) and x.is_fully_addressable:
        return jax.device_put(x, may_alias=False)
    return jnp.copy(x)


def from_host(x: Any, dtype: Any) -> jax.Array:
    """Return a copy of a number or an array of numpy, strongly typed.

    Where a mesh is set, it goes there, as all new arrays do.
    """
    array = np.array(x, dtype=dtype)
    return jax.device_put(array) if jax.sharding.get_abstract_mesh().empty else jnp.asarray(array)


def filled(like: Any, value: float, dtype: Any) -> jax.Array:
    """Return an array that has one value everywhere, with the shape and the place of another."""
    if not has_values(like) or like.size > _SMALL or not like.is_fully_addressable:
        return jnp.full_like(like, value, dtype=dtype)
    there = like.sharding if like.committed else None
    return jax.device_put(np.full(like.shape, value, dtype), there)


def can_be_fetched(x: Any) -> bool:
    """Return whether `fetched` and `sent` keep all of an array: its values, dtype and place."""
    return (
        has_values(x)
        and not jnp.issubdtype(x.dtype, jax.dtypes.extended)
        and jax.dtypes.canonicalize_dtype(x.dtype) == x.dtype
        and isinstance(x.sharding, NamedSharding | SingleDeviceSharding)
        and x.is_fully_replicated
    )


def fetched(arrays: Sequence[jax.Array]) -> list[np.ndarray]:
    """Return arrays as numpy's. None of them can be written to, and none outlives the device's.

    These are views of other handles of the memory, since a step cannot take the memory of an array
    that numpy has looked at.
    """
    handles = [x.addressable_data(0) for x in arrays]
    for handle in handles:
        handle.copy_to_host_async()
    return [np.asarray(handle) for handle in handles]


def places_of(arrays: Sequence[jax.Array]) -> list[Any]:
    """Return the places, for `sent`, to which arrays are committed that are on all devices."""
    found = {}
    for x in arrays:
        if x.committed:
            there = x.sharding
            mesh = there.mesh if isinstance(there, NamedSharding) else there
            found[mesh, there.memory_kind] = there
    return [*found.values()]


def sent(arrays: Sequence[np.ndarray], there: Any = None) -> list[jax.Array]:
    """Return arrays of numpy, which nobody else can write to, as jax's.

    They are on all devices of a place, or committed to none. On a processor they may share their
    memory with numpy's; that a step takes it is then without effect on numpy's.
    """
    with jax.ensure_compile_time_eval():  # in a trace of the caller's, too
        places: Any = there
        if isinstance(there, NamedSharding):
            places = [_whole(there, x.ndim) for x in arrays]
            if not there.is_fully_addressable:
                pairs = zip(arrays, places, strict=True)
                return [jax.make_array_from_callback(x.shape, p, x.__getitem__) for x, p in pairs]
        return jax.device_put([*arrays], places)


@functools.cache
def _whole(there: NamedSharding, axes: int) -> NamedSharding:
    """Return the place of an array of so many axes, whole on all devices, as results have it."""
    explicit = all(kind == AxisType.Explicit for kind in there.mesh.axis_types)
    spec = PartitionSpec(*[None] * axes) if explicit else PartitionSpec()
    return NamedSharding(there.mesh, spec, memory_kind=there.memory_kind)
