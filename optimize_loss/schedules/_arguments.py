"""Checks of what schedules are made from."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optimize_loss import _checks
from optimize_loss._checks import NOT_NEGATIVE, POSITIVE, InvalidType, Rule, check_number, received

# What the arguments must satisfy, here and in the classes; "at least 0" where nothing stands.
# Floats such as 1e4 are whole numbers, too. A fraction is a rate in the place of the steps.
_STEPS = Rule("a whole number of at least 1", lambda x: (x >= 1) & (x % 1 == 0))
_STEPS_OR_NONE = Rule("a whole number of at least 0", lambda x: (x >= 0) & (x % 1 == 0))
_BELOW_ONE = Rule("in [0, 1)", lambda x: 0 <= x < 1)
_RULES = {
    "decay": _BELOW_ONE,
    "pct_start": _BELOW_ONE,
    "t_mul": Rule("at least 1", lambda x: x >= 1),
}
_RULES |= dict.fromkeys(("decay_steps", "first_decay_steps", "total_steps"), _STEPS)
_RULES |= dict.fromkeys(("warmup_steps", "stable_steps"), _STEPS_OR_NONE)
_RULES |= dict.fromkeys(("div_factor", "final_div_factor"), POSITIVE)
_FLAGS = ("staircase", "cycle")


def unboxed(value: Any) -> Any:
    """Return the value of a variable as it is now, such as `optimizer.learning_rate`."""
    as_array = None if isinstance(value, type) else getattr(value, "__jax_array__", None)
    return value if as_array is None else as_array()


def is_real(value: Any) -> bool:
    """True for real numbers and arrays of them, traced or not; bools are neither."""
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        kinds = (jnp.integer, jnp.floating)
        return any(jnp.issubdtype(value.dtype, kind) for kind in kinds)
    return isinstance(value, int | float) and not isinstance(value, bool)


def as_scalar(name: str, value: Any, dtype: Any = None) -> Any:
    """Return a real number without dimensions, traced or not; as an array if `dtype` is given."""
    value = unboxed(value)
    if not is_real(value):
        raise InvalidType(f"`{name}` must be a number. {received(name, value)}")
    if np.shape(value):
        raise InvalidType(
            f"`{name}` must be a scalar; for many use jax.vmap. "
            f"Received: {name} of shape {np.shape(value)}."
        )
    return value if dtype is None else jnp.asarray(value, dtype)


def as_rate(name: str, value: Any, rule: Rule = NOT_NEGATIVE) -> jax.Array:
    """Return a rate as a float32 array, or float64 if it is an array of that; else raise."""
    value = unboxed(value)
    if not isinstance(value, jax.Array):
        check_number(name, value, rule)
    if isinstance(value, jax.Array | np.ndarray):
        value = jnp.asarray(as_scalar(name, value))
        if value.dtype == jnp.float64 and not value.weak_type:
            return value
    return jnp.asarray(value, jnp.float32)


def check_all(**arguments: Any) -> list[Any]:
    """Return numbers as floats and flags as bools, in order; raise where one breaks its rule."""
    checked = []
    for name, given in arguments.items():
        value = unboxed(given)
        if isinstance(value, Tracer):
            raise InvalidType(
                f"`{name}` must be known when it is given: of what a schedule is made from, only "
                f"a function's rates may be traced. {received(name, value)}"
            )
        if name in _FLAGS:
            checked.append(_flag(name, value))
        else:
            checked.append(check_number(name, value, _RULES.get(name, NOT_NEGATIVE)))
    return checked


def as_plain(name: str, value: Any) -> Any:
    """Return a field's value, checked, as a Python object that can be hashed and pickled."""
    if name == "name":
        if not isinstance(value, str | None):
            raise InvalidType(f"`name` must be text or None. {received(name, value)}")
        return value
    if name == "warmup_target" and value is None:
        return None
    checked = check_all(**{name: value})[0]
    return int(value) if isinstance(value, int | np.integer) and name not in _FLAGS else checked


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise InvalidType(f"`{name}` must be True or False. {received(name, value)}")
    return bool(value)


def as_sequence(name: str, value: Any) -> tuple:
    """Return a list, a tuple or an array of one dimension as a tuple; else raise."""
    listed = isinstance(value, Sequence | np.ndarray | jax.Array) and not isinstance(value, str)
    if not listed or getattr(value, "ndim", 1) != 1:
        raise InvalidType(f"`{name}` must be a list or a tuple. {received(name, value)}")
    return tuple(value)


def check_increasing(
    boundaries: Any, check: Callable[..., float] = check_number, rule: Rule = _checks.FINITE
) -> tuple:
    """Return `boundaries` as Python numbers that strictly increase; else raise."""
    boundaries = as_sequence("boundaries", boundaries)
    numbers = tuple(check(f"boundaries[{i}]", unboxed(b), rule) for i, b in enumerate(boundaries))
    if any(later <= earlier for earlier, later in itertools.pairwise(numbers)):
        raise ValueError(f"`boundaries` must increase. {received('boundaries', boundaries)}")
    return numbers


def check_one_more(name: str, values: Any, boundaries: tuple) -> tuple:
    """Return the sequence `values` if it is one longer than `boundaries`; else raise."""
    values = as_sequence(name, values)
    if len(values) != len(boundaries) + 1:
        raise ValueError(
            f"`{name}` must be one more than `boundaries`. Received: {len(values)} {name} for "
            f"{len(boundaries)} boundaries, {boundaries}."
        )
    return values


def check_callable(name: str, value: Any) -> None:
    """Raise unless `value` can be called."""
    if not callable(value):
        raise InvalidType(f"`{name}` must be callable. {received(name, value)}")
