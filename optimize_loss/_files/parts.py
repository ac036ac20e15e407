"""What a file holds beside a state: positions of iterators, and notes.

A part is an object with `get_state` and `set_state` or `state_dict` and `load_state_dict`, a
function without arguments that returns a value, or a value. What it gives is kept as JSON, in
which bytes, tuples, arrays and dicts are marked. No code is kept, and none is run.
"""

import base64
import json
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from optimize_loss._checks import CheckpointMismatch, InvalidType, received

PREFIX = "parts/"
_METHODS = (("get_state", "set_state"), ("state_dict", "load_state_dict"))

Parts = Mapping[str, Any]


def check_parts(parts: Any) -> dict[str, Any]:
    """Return parts by name; None is none.

    Raises:
      InvalidType: they are no mapping from names without a "/".
    """
    parts = {} if parts is None else parts
    rule = "`parts` must map names without a '/' to what is saved with the state."
    if not isinstance(parts, Mapping):
        raise InvalidType(f"{rule} {received('parts', parts)}")
    if strange := [name for name in parts if not isinstance(name, str) or "/" in name]:
        raise InvalidType(f"{rule} Received: {strange[0]!r}.")
    return dict(parts)


def packed(parts: Parts) -> dict[str, np.ndarray]:
    """Return what parts give now, as arrays of bytes by key. All processes must call it.

    Raises:
      InvalidType: a part gives what JSON and arrays cannot hold.
    """
    arrays = {}
    for name, part in parts.items():
        methods = _methods(part)
        value = methods[0]() if methods else part() if callable(part) else part
        try:
            text = json.dumps(_marked(value)).encode()
        except TypeError as error:
            raise InvalidType(
                f"`parts` must give numbers, text, bytes, arrays, and lists and dicts of them. "
                f"Received, for {name!r}: {error}."
            ) from error
        for process, data in enumerate(_of_all(text)):
            arrays[f"{PREFIX}{name}/{process}"] = np.frombuffer(data, np.uint8)
    return arrays


def unpacked(found: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return the values of a file by name: those of this process, or of the first one.

    Args:
      found: arrays of bytes, as `packed` returned them.
    """
    mine: dict[str, np.ndarray] = {}
    for key, array in found.items():
        name, _, process = key.removeprefix(PREFIX).rpartition("/")
        if name not in mine or int(process) == jax.process_index():
            mine[name] = array
    return {name: _unmarked(json.loads(array.tobytes())) for name, array in mine.items()}


def check_processes(parts: Parts, found: Mapping[str, Any]) -> None:
    """Raise unless as many processes have saved a position as are to go on from it."""
    for name in parts:
        count = sum(key.startswith(f"{PREFIX}{name}/") for key in found)
        if count not in (0, jax.process_count()) and _methods(parts[name]):
            raise CheckpointMismatch(
                f"`parts` must be restored by as many processes as have saved them. Received: "
                f"{name!r} of {count} processes, in one of {jax.process_count()}."
            )


def check_present(path: Any, parts: Parts, values: Mapping[str, Any], strict: bool) -> None:
    """Warn if a file lacks the state of a part that takes one; with `strict`, raise."""
    for name in parts:
        if name not in values and _methods(parts[name]):
            text = f"The file has no part {name!r}, which stays as it is. Its path: {str(path)!r}."
            if strict:
                raise CheckpointMismatch(text)
            warnings.warn(text, stacklevel=3)


def put_back(parts: Parts, values: Mapping[str, Any]) -> None:
    """Give objects that take one the state that they had."""
    for name in parts.keys() & values.keys():
        if methods := _methods(parts[name]):
            methods[1](values[name])


def _methods(part: Any) -> tuple[Callable[[], Any], Callable[[Any], Any]] | None:
    """Return the methods of a part that give and take its state."""
    for names in _METHODS:
        getter, setter = (getattr(part, name, None) for name in names)
        if callable(getter) and callable(setter):
            return getter, setter
    return None


def _of_all(data: bytes) -> list[bytes]:
    """Return these bytes of every process."""
    if jax.process_count() == 1:
        return [data]
    sizes = multihost_utils.process_allgather(np.asarray(len(data)))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    every = multihost_utils.process_allgather(padded)
    return [row[:size].tobytes() for row, size in zip(every, sizes, strict=True)]


def _marked(value: Any) -> Any:
    """Return a value for JSON; what JSON does not have is a dict with one key, its kind."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [*map(_marked, value)]
    if isinstance(value, tuple):
        return {"tuple": [*map(_marked, value)]}
    if isinstance(value, Mapping):
        return {"dict": [[_marked(key), _marked(x)] for key, x in value.items()]}
    if isinstance(value, bytes | bytearray):
        return {"bytes": base64.b64encode(value).decode()}
    return _marked_array(value)


def _marked_array(value: Any) -> dict[str, Any]:
    if not hasattr(value, "__array__"):
        raise TypeError(f"{value!r:.200} of type {type(value).__name__}")
    kind = "tensor" if hasattr(value, "detach") else "array"
    array = np.asarray(value.detach().cpu() if kind == "tensor" else value)
    if array.dtype.kind not in "biufc":
        raise TypeError(f"an array of {array.dtype}")
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
    return {kind: [array.dtype.str, [*array.shape], data]}


def _unmarked(value: Any) -> Any:
    if isinstance(value, list):
        return [*map(_unmarked, value)]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    return _KINDS[kind](content)


def _array(content: Any) -> np.ndarray:
    dtype, shape, data = content
    return np.frombuffer(base64.b64decode(data), np.dtype(dtype)).reshape(shape).copy()


def _tensor(content: Any) -> Any:
    """Return a tensor of torch, where that is in use, else the array."""
    torch = sys.modules.get("torch")
    return torch.from_numpy(_array(content)) if torch else _array(content)


_KINDS: dict[str, Callable[[Any], Any]] = {
    "tuple": lambda content: tuple(map(_unmarked, content)),
    "dict": lambda content: {_unmarked(key): _unmarked(x) for key, x in content},
    "bytes": base64.b64decode,
    "array": _array,
    "tensor": _tensor,
}
