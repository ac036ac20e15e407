"""Whether two values do the same, where Python compares functions by identity.

A cell of a notebook that is run again, or another process, makes other functions of the same
code. So do the functions of optax that return a schedule or a transformation.
"""

import dataclasses
import functools
import types
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

# What of a code object says what it does; not in which line it is.
_OF_CODE = (
    "co_name",
    "co_argcount",
    "co_posonlyargcount",
    "co_kwonlyargcount",
    "co_flags",
    "co_code",
    "co_exceptiontable",
    "co_names",
    "co_varnames",
    "co_freevars",
    "co_cellvars",
    "co_consts",
)
_FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)


def same(one: Any, other: Any) -> bool:
    """Return whether two values are equal; functions are by code, closure and defaults.

    The names that functions read from their modules must stand for the same, too. Instances of
    classes are compared as these say; classes, builtins and compiled functions by identity.

    Example:
      >>> def twice(): return lambda x: 2 * x
      >>> def power(n): return lambda x: x**n
      >>> same(twice(), twice()), same(power(2), power(2)), same(power(2), power(3))
      (True, True, False)
    """
    return _equal(one, other) or _Comparison().same(one, other, strict=False)


def structural_hash(value: Any) -> int:
    """Return a hash that is equal for values that are the `same`."""
    if isinstance(value, types.FunctionType):
        return hash((value.__name__, value.__code__.co_code))
    if isinstance(value, functools.partial):
        return structural_hash(value.func)
    if isinstance(value, types.MethodType):
        return structural_hash(value.__func__)
    if _is_plain_dataclass(value):
        return hash((type(value), *(structural_hash(x) for x in _fields(value).values())))
    if isinstance(value, tuple) and type(value).__eq__ is tuple.__eq__:
        return hash(tuple(map(structural_hash, value)))
    try:
        return hash(value)
    except TypeError:
        return 0


class _Comparison:
    """One comparison of two values; pairs that are met again, as in a cycle, count as equal."""

    def __init__(self):
        self._met: dict[tuple[int, int, bool], Any] = {}

    def same(self, one: Any, other: Any, strict: bool) -> bool:
        """Return whether two values are equal.

        Args:
          one: any value.
          other: any value.
          strict: whether types and the sign of zero count, as they may inside of a function.
        """
        pair = id(one), id(other), strict
        if one is other or pair in self._met:
            return True
        if isinstance(one, np.ndarray | np.generic | jax.Array):
            return _same_arrays(one, other)
        if type(one) is not type(other):
            return not strict and _equal(one, other)
        parts, theirs = _parts(one), _parts(other)
        if None in (parts, theirs):
            return _same_values(one, other, strict)
        self._met[pair] = one, other  # kept, so that no other value has the id
        strict = strict or isinstance(one, _FUNCTIONS)
        return self._same_globals(one, other) and self._same_parts(parts, theirs, strict)

    def _same_parts(self, parts: Any, theirs: Any, strict: bool) -> bool:
        """Return whether two lists of parts are the same, one after the other."""
        pairs = zip(parts, theirs, strict=False)
        return len(parts) == len(theirs) and all(self.same(*each, strict) for each in pairs)

    def _same_globals(self, one: Any, other: Any) -> bool:
        """Return whether the names that a function reads from its module stand for the same."""
        if not isinstance(one, types.FunctionType) or one.__globals__ is other.__globals__:
            return True
        names = set(_names(one.__code__))
        mine, theirs = (
            {n: f.__globals__[n] for n in names & {*f.__globals__}} for f in (one, other)
        )
        return (
            one.__module__ == other.__module__
            and mine.keys() == theirs.keys()
            and all(self.same(mine[name], theirs[name], strict=True) for name in mine)
        )


def _same_values(one: Any, other: Any, strict: bool) -> bool:
    """Return whether two values without parts are equal."""
    exact = strict and isinstance(one, float | complex | set | frozenset)
    return repr(one) == repr(other) if exact else _equal(one, other)


def _parts(value: Any) -> list[Any] | None:
    """Return the values that decide on what a value is; None for one without parts."""
    match value:
        case types.FunctionType():
            cells = [_content(cell) for cell in value.__closure__ or ()]
            given = [value.__defaults__, value.__kwdefaults__, value.__dict__]
            return [value.__code__, *given, *cells]
        case types.CodeType():
            return [getattr(value, name) for name in _OF_CODE]
        case types.MethodType():
            return [value.__func__, value.__self__]
        case functools.partial():
            return [value.func, value.args, value.keywords]
        case tuple() if type(value).__eq__ is tuple.__eq__:
            return list(value)
        case list() if type(value).__eq__ is list.__eq__:
            return list(value)
        case dict() if type(value).__eq__ is dict.__eq__:
            return [x for pair in value.items() for x in pair]
    return list(_fields(value).values()) if _is_plain_dataclass(value) else None


def _content(cell: types.CellType) -> Any:
    """Return what a function has from around it; None for what is not there yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _names(code: types.CodeType) -> Iterator[str]:
    """Yield the names that a function, and those inside of it, may read from their module."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _is_plain_dataclass(value: Any) -> bool:
    """Return whether a value is compared by its fields, by a method that Python has written."""
    compare = getattr(type(value).__eq__, "__code__", None)
    is_one = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return is_one and compare is not None and compare.co_filename == "<string>"


def _fields(value: Any) -> Mapping[str, Any]:
    return {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.compare}


def _same_arrays(one: Any, other: Any) -> bool:
    if type(one) is not type(other) or isinstance(one, Tracer) or isinstance(other, Tracer):
        return False
    if (one.shape, one.dtype) != (other.shape, other.dtype) or one.dtype == object:
        return False
    if jnp.issubdtype(one.dtype, jax.dtypes.extended):
        one, other = jax.random.key_data(one), jax.random.key_data(other)
    one, other = jax.device_get((one, other))
    return one.tobytes() == other.tobytes()


def _equal(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except Exception:
        return False
