"""Batches on their way to the device: pulled, gathered into calls, stacked and sent."""

import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from optimize_loss._checks import InvalidType, received
from optimize_loss._engine.transfers import asked_for
from optimize_loss._names import check_keys, flatten


class Batch(NamedTuple):
    """What one step takes, flat.

    Attributes:
      leaves: numpy arrays, jax arrays and Python numbers.
      kind: equal for batches that can be stacked.
      structure: of the tuple of parts.
    """

    leaves: list[Any]
    kind: Any
    structure: Any


class Call(NamedTuple):
    """What one call takes.

    Attributes:
      steps: how many.
      parts: of the batch, or of that many stacked ones if there are several.
    """

    steps: int
    parts: tuple[Any, ...]


_END = object()


class Source:
    """The batches of an iterable, as calls."""

    def __init__(self, batches: Iterable[Any], sharding: Any):
        self._iterator = iter(batches)
        self._shardings = (sharding, jax.tree.map(_of_stacked, sharding))
        self._pulled: Batch | None = None  # not given to a call yet
        self._ended = False
        self._error: Exception | None = None  # why it ended, unless there are no more

    def gather(self, most: int) -> Call | None:
        """Return a call of at most so many steps; None if there is nothing more to take.

        What the iterator raises waits for `raise_error`, so that what came before it is used.
        """
        batches: list[Batch] = []
        while len(batches) < most and (batch := self._peek()) is not None:
            if batches and (not batch.leaves or batch[1:] != batches[0][1:]):
                break  # nothing tells `many` how often to take what has no leaves
            batches.append(batch)
            self._pulled = None
        try:
            with asked_for():
                return Call(len(batches), self._send(batches)) if batches else None
        except Exception as error:
            self._ended, self._error = True, error
            return None

    def raise_error(self) -> None:
        """Raise what ended the batches, if it was not that there are no more."""
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
        finally:
            del error  # it holds this frame, and all that lives there

    def close(self) -> None:
        """Let go of an error, which holds this object."""
        self._error = None

    def _peek(self) -> Batch | None:
        """Return the next batch, which stays the next; None if there is none."""
        if self._pulled is None and not self._ended:
            try:
                item = next(self._iterator, _END)
                self._ended = item is _END
                self._pulled = None if self._ended else _read(item)
            except Exception as error:
                self._ended, self._error = True, error
        return self._pulled

    def _send(self, batches: list[Batch]) -> tuple[Any, ...]:
        """Return the parts of one batch, or of several as one; where a sharding is given, there.

        Without one the call itself sends them, which costs less time in Python.
        """
        sharding = self._shardings[len(batches) > 1]
        leaves = batches[0].leaves
        if len(batches) > 1:
            columns = zip(*(batch.leaves for batch in batches), strict=True)
            leaves = [_stacked(column) for column in columns]
        parts = jax.tree.unflatten(batches[0].structure, leaves)
        return parts if sharding is None else jax.device_put(parts, sharding)


def _read(item: Any) -> Batch:
    leaves, structure = flatten(tuple(item) if _is_parts(item) else (item,))
    leaves = [_array(leaf) for leaf in leaves]
    return Batch(leaves, [_kind(leaf) for leaf in leaves], structure)


def _is_parts(tree: Any) -> bool:
    return type(tree) in (tuple, list)  # a NamedTuple is one part


def _array(leaf: Any) -> Any:
    """Return a leaf as a step takes it.

    Numpy's memory is copied: who made it may use it again, and a transfer may still read it then.
    Python numbers stay what they are, since they do not decide a dtype.
    """
    if isinstance(leaf, jax.Array) or type(leaf) in (bool, int, float, complex):
        return leaf
    array = np.array(_of_numpy(leaf))
    if array.dtype.kind in "OSUTMm":
        raise InvalidType(
            "`batches` must hold arrays and numbers. "
            f"Received: {leaf!r} of type {type(leaf).__name__}."
        )
    return array


_NOT_OF_NUMPY = ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")


@functools.lru_cache(maxsize=64)
def is_foreign(kind: type) -> bool:
    """Return whether a class is one of arrays of another library, such as torch's tensors."""
    ours = (jax.Array, Tracer, np.ndarray, np.generic)
    return hasattr(kind, "__array__") and not issubclass(kind, ours)


def as_arrays(batch: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return a batch with arrays of other libraries as those of numpy."""
    return jax.tree.map(lambda x: _of_numpy(x) if is_foreign(type(x)) else x, batch)


def _of_numpy(leaf: Any) -> np.ndarray:
    """Return an array of numpy; of a tensor of torch, wherever it is, its value.

    Raises:
      InvalidType: it does not become one, as a sparse tensor.
    """
    try:
        if not hasattr(leaf, "detach"):
            return np.asarray(leaf)
        leaf = leaf.detach().cpu()
        for name in ("resolve_conj", "resolve_neg"):
            leaf = getattr(leaf, name, lambda leaf=leaf: leaf)()
        name = str(leaf.dtype).removeprefix("torch.")
        if name not in _NOT_OF_NUMPY:
            return np.asarray(leaf)
        return np.asarray(leaf.float()).astype(jnp.dtype(name))  # float32 holds each exactly
    except (TypeError, RuntimeError) as error:
        raise InvalidType(
            "`batch` must be arrays and numbers. Received: one of type "
            f"{type(leaf).__name__} that does not become an array of numpy: {error}"
        ) from error


def _kind(leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray):
        return leaf.shape, leaf.dtype
    return jax.typeof(leaf), getattr(leaf, "sharding", None)


def _stacked(leaves: Sequence[Any]) -> Any:
    """Stack leaves where they are: on the host, or where their sharding has them."""
    if isinstance(leaves[0], np.ndarray):
        return np.stack(leaves)
    sharding = getattr(leaves[0], "sharding", None)
    stacked = _stack_on_device(*leaves)
    many = isinstance(sharding, NamedSharding)
    return jax.device_put(stacked, _of_stacked(sharding)) if many else stacked


@jax.jit
def _stack_on_device(*leaves: Any) -> jax.Array:
    return jnp.stack(leaves)


def _of_stacked(sharding: Any) -> Any:
    """Return the sharding of stacked arrays for that of one of them."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    spec = PartitionSpec(None, *sharding.spec)
    return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)


def check_batches(batches: Any) -> None:
    """Raise unless `batches` is an iterable of batches, rather than a batch.

    Raises:
      InvalidType: it is an array, a mapping or text, or cannot be iterated.
    """
    single = hasattr(batches, "__array__") or isinstance(batches, Mapping | str | bytes)
    if single or not (hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")):
        raise InvalidType(
            "`batches` must be an iterable of batches: write [batch] for a single one, and call "
            f"`step.many` for stacked ones. Received: {type(batches).__name__}."
        )


def check_sharding(sharding: Any) -> Any:
    """Return `sharding` as a prefix of the tuple of parts of a batch.

    Raises:
      InvalidType: a leaf is no NamedSharding, and no single device.
    """
    for leaf in jax.tree.leaves(sharding):
        if not isinstance(leaf, NamedSharding | SingleDeviceSharding | jax.Device):
            raise InvalidType(
                "`sharding` must be a NamedSharding or a device, or a tuple with one for each part "
                f"of a batch. {received('sharding', leaf)}"
            )
    if _is_parts(sharding):
        return tuple(sharding)
    return sharding if sharding is None or jax.tree.leaves(sharding) == [sharding] else (sharding,)


def ranks(batch: tuple[Any, ...]) -> Any:
    """Return the structure of a batch and how many axes each of its arrays has."""
    leaves, structure = jax.tree.flatten(batch)
    return structure, tuple(map(np.ndim, leaves))


def check_stacked(batches: tuple[Any, ...], of_single: Collection[Any] = ()) -> None:
    """Raise unless `batches` are stacked: arrays with one first axis, of at least 1.

    Args:
      batches: the parts.
      of_single: the `ranks` of batches that are not stacked.

    Raises:
      ValueError: the arrays differ in the length of their first axis, have none, or no steps; or
        they have the ranks of a single batch.
    """
    lengths = {np.shape(x)[:1] for x in flatten(batches)[0]}
    if len(lengths) != 1 or lengths <= {(), (0,)}:
        raise ValueError(
            "`batches` must be arrays with one first axis, of one length: the number of steps, at "
            f"least 1.{_how_to_stack(batches)} "
            f"Received: shapes {[np.shape(x) for x in jax.tree.leaves(batches)]}."
        )
    if ranks(batches) in of_single:
        raise ValueError(
            "`batches` must be stacked, with one axis more than a single batch. This step has "
            "taken a single batch with as many axes: call `step(state, *batch)` for one batch. For "
            "steps over its examples, make another step with `optimize_loss`. "
            f"Received: shapes {[np.shape(x) for x in jax.tree.leaves(batches)]}."
        )


def _how_to_stack(batches: tuple[Any, ...]) -> str:
    """Return what to do with a list of batches, if there may be one among the parts."""
    if not any(_is_parts(part) for part in batches):
        return ""
    return (
        " A list or tuple is one part, of stacked arrays. Stack one that holds batch after batch: "
        "`jax.tree.map(lambda *x: np.stack(x), *batches)`."
    )


def refusal(
    error: Exception,
    batch: tuple[Any, ...],
    stacked: bool,
    state: Any = None,
) -> ValueError | None:
    """Return what to raise for an error of a program that was given this batch; None for itself."""
    if isinstance(error, jax.errors.JaxRuntimeError):
        return _aliased(batch, stacked, state)
    if not isinstance(error, TypeError):
        check_keys(batch)
        return None
    if strange := [x for x in flatten(batch)[0] if _is_strange(x)]:
        x, dtype = strange[0], getattr(strange[0], "dtype", None)
        came = f"{x!r} of type {_kind_of(x)}" if dtype is None else f"an array of {dtype}"
        return InvalidType(f"`{_argument(stacked)}` must be arrays and numbers. Received: {came}.")
    return _not_stacked(error, batch) if stacked else None


def _not_stacked(error: TypeError, batch: tuple[Any, ...]) -> ValueError | None:
    """Return what to raise where a list of batches may have been meant as a stack of them."""
    advice = _how_to_stack(batch)
    if advice and isinstance(error, InvalidType):
        error.add_note(advice.strip())
    elif advice:
        return InvalidType(
            f"`batches` must be what the loss takes, stacked.{advice} Received: parts of type "
            f"{[_kind_of(part) for part in batch]}, with which it fails: {str(error)[:200]}"
        )
    return None


def _argument(stacked: bool) -> str:
    return "batches" if stacked else "batch"


def _aliased(batch: tuple[Any, ...], stacked: bool, state: Any) -> ValueError | None:
    """Return what to raise if an array of the state is in the batch as well."""
    mine = _buffers(jax.tree.leaves(state))
    shared = [x for x in jax.tree.leaves(batch) if mine & _buffers([x])]
    if not shared:
        return None
    return ValueError(
        f"`{_argument(stacked)}` must not hold an array of the state, whose memory "
        "goes to the new state. Copy it, as in `jnp.copy(state.params[...])`. "
        f"Received: {jax.typeof(shared[0]).str_short()}."
    )


def _buffers(leaves: Sequence[Any]) -> set[int]:
    """Return where the living arrays among these are in memory."""
    arrays = [x for x in leaves if isinstance(x, jax.Array) and not isinstance(x, Tracer)]
    shards = [s.data for x in arrays if not x.is_deleted() for s in x.addressable_shards]
    return {shard.unsafe_buffer_pointer() for shard in shards if shard.size}


def _kind_of(value: Any) -> str:
    return type(value).__name__


def _is_strange(leaf: Any) -> bool:
    is_array = isinstance(leaf, np.ndarray | np.generic)
    return isinstance(leaf, str | bytes) or (is_array and leaf.dtype.kind in "OSUTMm")
