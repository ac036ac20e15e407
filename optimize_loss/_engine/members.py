"""Which parameters share an array, and how they lie in it."""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from optimize_loss._checks import InvalidType
from optimize_loss._engine.device import (
    can_be_fetched,
    fetched,
    has_values,
    is_elsewhere,
    of_part,
    places_of,
    sent,
    whole,
)


class Static:
    """A value that is compared at every call of a compiled program, and so compared quickly."""

    def _key(self) -> Any:
        raise NotImplementedError

    def __eq__(self, other: object) -> bool:
        if self is other or not isinstance(other, type(self)):
            return self is other
        return self._hash == other._hash and self._key() == other._key()

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self._key())


@dataclasses.dataclass(frozen=True, eq=False)
class Members(Static):
    """Which parameters share an array, in which order, with which shapes."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    def _key(self) -> Any:
        return self.names, self.shapes

    def __reduce__(self) -> Any:
        return Members, (self.names, self.shapes)  # without its hash: other processes have others

    @functools.cached_property
    def sizes(self) -> list[int]:
        """The number of elements of each."""
        return [math.prod(shape) for shape in self.shapes]

    @functools.cached_property
    def digest(self) -> str:
        """Text that is another one for other names or shapes, the same in every process.

        It is part of the path of the array: what saves trees by their paths then refuses to give
        back the values of other parameters, as it would without a bucket.
        """
        text = json.dumps([self.names, self.shapes])
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def join(self, parts: Sequence[Any]) -> Any:
        """Return one array of all parts, along the last axis; of nothing, nothing.

        Parts with values are joined on the host: a program of as many operands takes long to
        compile.
        """
        if all(part is None for part in parts):
            return None
        if not all(map(has_values, parts)):
            return self._join(parts)
        if not all(map(can_be_fetched, parts)) or len(places := places_of(parts)) > 1:
            return self.join_on_device(parts)
        joined = self._join(fetched(parts))
        return sent([joined], [whole(there, joined.ndim) for there in places or [None]])[0]

    def join_on_device(self, parts: Sequence[Any]) -> Any:
        """Return what `join` does, without waiting for values that a device computes."""
        if all(is_elsewhere(part) and can_be_fetched(part) for part in parts):
            return self.join(parts)
        if not all(map(has_values, parts)):
            return self._join(parts)
        with jax.ensure_compile_time_eval():  # in a trace of the caller's, too
            return _join(self, parts)

    def _join(self, parts: Sequence[Any]) -> Any:
        rows = [
            part.reshape(*part.shape[: part.ndim - len(shape)], size)
            for part, shape, size in zip(parts, self.shapes, self.sizes, strict=True)
        ]
        on_host = all(isinstance(row, np.ndarray) for row in rows)
        return (np if on_host else jnp).concatenate(rows, axis=-1)

    def split(self, buffer: Any) -> list[Any]:
        """Return the parts of an array; what is no array, such as a sharding, is that of each.

        Axes before the last one stay: a state under `vmap` has them. An array with values is split
        on the host: a program of as many results takes long to compile.
        """
        if not can_be_fetched(buffer):
            return self.split_on_device(buffer)
        there = buffer.sharding if buffer.committed else None
        places = [of_part(there, buffer.shape[:-1], shape) for shape in self.shapes]
        return sent(self._split(fetched([buffer])[0].copy()), places)

    def split_on_device(self, buffer: Any) -> list[Any]:
        """Return what `split` does, without waiting for values that a device computes."""
        if is_elsewhere(buffer) and can_be_fetched(buffer):
            return self.split(buffer)
        if not hasattr(buffer, "shape"):
            return [buffer] * len(self.names)
        if isinstance(buffer, jax.ShapeDtypeStruct):
            first, dtype = buffer.shape[:-1], buffer.dtype
            places = [of_part(buffer.sharding, first, shape) for shape in self.shapes]
            pairs = zip(self.shapes, places, strict=True)
            return [jax.ShapeDtypeStruct(first + s, dtype, sharding=place) for s, place in pairs]
        if not has_values(buffer):
            return self._split(buffer)
        with jax.ensure_compile_time_eval():
            return _split(self, buffer)

    def _split(self, buffer: Any) -> list[Any]:
        first, buffer = buffer.shape[:-1], _on_all(buffer)
        ends = itertools.accumulate(self.sizes)
        return [
            _cut(buffer, end - size, end).reshape(first + shape)
            for shape, size, end in zip(self.shapes, self.sizes, ends, strict=True)
        ]

    def spread(self, numbers: Sequence[Any]) -> Any:
        """Return what is each member's own: as it is where all have the same, else for each entry.

        Raises:
          InvalidType: the members have different arrays, and these are no scalars.
        """
        kinds = {id(number): number for number in numbers}
        result, *others = kinds.values()
        if others and any(map(jnp.ndim, kinds.values())):
            raise InvalidType(
                "`for_each` of a link that is `elementwise` must give scalars. "
                f"Received: {[*map(jnp.shape, kinds.values())]}."
            )
        order = {key: i for i, key in enumerate(kinds)}
        which = np.repeat([order[id(number)] for number in numbers], self.sizes)
        if len(kinds) > 4:
            return jnp.stack([*kinds.values()])[which]
        for i, other in enumerate(others, 1):
            result = jnp.where(which == i, other, result)
        return result

    def parted(self, marks: Sequence[bool]) -> list["Members"]:
        """Return the members without a mark, and those with one."""
        found: list[Members] = []
        for chosen in ([not mark for mark in marks], marks):
            names = tuple(itertools.compress(self.names, chosen))
            found.append(Members(names, tuple(itertools.compress(self.shapes, chosen))))
        return found


# Outside of a trace as one program for each bucket, and not as one for each member.
_join = jax.jit(Members._join, static_argnums=0)

_split = jax.jit(Members._split, static_argnums=0)


def _on_all(buffer: Any) -> Any:
    """Return an array whole on every device if its type says that it is spread."""
    sharding = getattr(jax.typeof(buffer), "sharding", None)
    if sharding is None or all(part is None for part in sharding.spec):
        return buffer
    return jax.sharding.reshard(buffer, NamedSharding(sharding.mesh, PartitionSpec()))


def _cut(buffer: Any, start: int, end: int) -> Any:
    if isinstance(buffer, jax.Array):
        return jax.lax.slice_in_dim(buffer, start, end, axis=buffer.ndim - 1)
    return buffer[..., start:end]
