"""Arrays with values: copies of them, and the way to the host and back, without a compilation."""

import functools
import math
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
    """Return an array of the same values in memory of its own, where the other one is.

    Its sharding is written as those of results are: others would compile a step again.
    """
    if has_values(x) and x.is_fully_addressable and x.sharding == whole(x.sharding, x.ndim):
        return jax.device_put(x, may_alias=False)
    return jnp.copy(x)


def is_elsewhere(x: Any) -> bool:
    """Return whether an array is not in the usual memory of its devices."""
    if isinstance(x, Tracer):
        return jax.typeof(x).memory_space == jax.memory.Space.Host
    if not has_values(x) or x.sharding.memory_kind is None:
        return False
    return x.sharding.memory_kind != _usual_memory(x)


def on_device(x: Any) -> Any:
    """Return an array in the usual memory of its devices."""
    if not is_elsewhere(x):
        return x
    return jax.device_put(x, x.sharding.with_memory_kind(_usual_memory(x)))


def _usual_memory(x: jax.Array) -> str:
    return next(iter(x.sharding.device_set)).default_memory().kind


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
    )


def fetched(arrays: Sequence[jax.Array]) -> list[np.ndarray]:
    """Return arrays as numpy's. None of them can be written to, and none outlives the device's.

    These are views of other handles of the memory, since a step cannot donate an array that
    numpy has looked at.
    """
    handles = [_one_handle(x) for x in arrays]
    for handle in handles:
        handle.copy_to_host_async()
    return [np.asarray(handle) for handle in handles]


def _one_handle(x: jax.Array) -> jax.Array:
    if not x.is_fully_addressable and not x.is_fully_replicated:
        x = jax.device_put(x, whole(x.sharding, x.ndim))
    return x.addressable_data(0) if x.is_fully_replicated else x


def places_of(arrays: Sequence[jax.Array]) -> list[Any]:
    """Return to which devices arrays are committed, on all of which `sent` would put them."""
    found = {}
    for x in arrays:
        if x.committed:
            there = x.sharding
            mesh = there.mesh if isinstance(there, NamedSharding) else there
            found[mesh, there.memory_kind] = there
    return [*found.values()]


def sent(arrays: Sequence[np.ndarray], places: Sequence[Any]) -> list[jax.Array]:
    """Return arrays of numpy, which nobody else can write to, as jax's.

    On a processor they may share their memory with numpy's; that a step takes it is then without
    effect on numpy's.

    Args:
      arrays: the arrays.
      places: for each where it is to be; None for one that is committed to no device.
    """
    with jax.ensure_compile_time_eval():  # in a trace of the caller's, too
        if all(there is None or there.is_fully_addressable for there in places):
            return jax.device_put([*arrays], [*places])
        pairs = zip(arrays, places, strict=True)
        return [jax.make_array_from_callback(x.shape, p, x.__getitem__) for x, p in pairs]


@functools.lru_cache(maxsize=1024)
def whole(there: Any, axes: int) -> Any:
    """Return the place of an array of so many axes that has all of it on each of the devices."""
    if not isinstance(there, NamedSharding):
        return there
    spec = PartitionSpec(*[None] * axes) if _is_explicit(there) else PartitionSpec()
    return NamedSharding(there.mesh, spec, memory_kind=there.memory_kind)


@functools.lru_cache(maxsize=1024)
def of_part(there: Any, first: tuple[int, ...], shape: tuple[int, ...]) -> Any:
    """Return where XLA puts a part of an array, cut out of its last axis.

    Args:
      there: where the array is.
      first: the lengths of its axes but for the last one.
      shape: of the part, without these axes.
    """
    if _has_all(there):
        return whole(there, len(first) + len(shape))
    *before, last = *there.spec, *[None] * (len(first) + 1 - len(there.spec))
    along = next((i for i, size in enumerate(shape) if size > 1), None)
    parts = math.prod(there.mesh.shape[axis] for axis in axes_of(last))
    if axes_of(last) and along is not None and not shape[along] % parts:
        before += [*[None] * along, last]
    return NamedSharding(there.mesh, PartitionSpec(*before), memory_kind=there.memory_kind)


def axes_of(part: Any) -> tuple[str, ...]:
    """Return the axes of a mesh over which a dimension is spread."""
    return () if part is None else part if isinstance(part, tuple) else (part,)


def _has_all(there: Any) -> bool:
    """Return whether each device has all of an array, or the array's type says what it has."""
    return not isinstance(there, NamedSharding) or there.is_fully_replicated or _is_explicit(there)


def _is_explicit(there: NamedSharding) -> bool:
    return all(kind == AxisType.Explicit for kind in there.mesh.axis_types)
