"""Attributes of an optimizer that are assigned to: what may change, and what follows."""

import inspect
from typing import Any

from jax.core import Tracer

from optimize_loss._checks import meant, received
from optimize_loss.optimizers._declaration import checked, options_of, stays
from optimize_loss.optimizers._update_step import has_variables
from optimize_loss.optimizers._variable import check_trace


def assign(optimizer: Any, name: str, value: Any) -> None:
    """Set an option or an attribute; raise, and change nothing, if the variables forbid it."""
    held, there = optimizer._held, inspect.getattr_static(type(optimizer), name, None)
    if held.is_closed:
        _check_settable(optimizer, name, there)
    is_plain = not held.building and not isinstance(there, property)
    if is_plain:
        _check_change(optimizer, name, value)
    if name in options_of(type(optimizer)):
        held.note_array(value)
        value = checked(type(optimizer), name, value)
    if is_plain:
        _exchange(optimizer, name, value)
    else:
        object.__setattr__(optimizer, name, value)


def _exchange(optimizer: Any, name: str, value: Any) -> None:
    """Set an attribute and renew the chain, or do nothing if no chain can be made of it."""
    held, own = optimizer._held, vars(optimizer)
    before = {n: own[n] for n in (name,) if n in own}, held.unbuilt
    object.__setattr__(optimizer, name, value)
    if held.unbuilt is not None:
        held.unbuilt = {**held.unbuilt, name: value}
    try:
        optimizer._chain_changed()
    except Exception:
        own.pop(name, None)
        own.update(before[0])
        held.unbuilt = before[1]
        optimizer._chain_changed()
        raise


def _check_settable(optimizer: Any, name: str, there: Any) -> None:
    """Raise an `AttributeError` if to set this attribute would do nothing, or harm."""
    cls = type(optimizer)
    read_only = isinstance(there, property) and there.fset is None
    if name == "built" or read_only or stays(cls, name):
        raise AttributeError(f"`{name}` of {cls.__name__} can be read, but not set.")
    known = [n for n in (*options_of(cls), *vars(optimizer)) if not n.startswith("_")]
    if name not in (*known, *dir(cls)) and not name.startswith("_"):
        raise AttributeError(
            f"`{name}` is not an attribute of {cls.__name__}.{meant(name, known)} "
            "Set new attributes in `__init__` or `build` of a subclass."
        )


def _check_change(optimizer: Any, name: str, value: Any) -> None:
    """Raise if the variables of an optimizer forbid another value."""
    if isinstance(value, Tracer):
        check_trace(optimizer, [value])
    if not optimizer.built:
        return
    if name == "mesh" and value != optimizer.mesh:
        raise ValueError("`mesh` must be set before the optimizer is built.")
    if has_variables(vars(optimizer).get(name)):
        raise ValueError(
            f"`{name}` must stay: it has variables of the optimizer. Give them other values "
            f"with `assign`. {received(name, value)}"
        )


def check_deletable(optimizer: Any, name: str) -> None:
    """Raise an `AttributeError` if an optimizer needs an attribute, as a complete one needs all."""
    if optimizer._held.is_closed and name in (*vars(optimizer), *options_of(type(optimizer))):
        raise AttributeError(
            f"`{name}` must stay, as the state was made with it. Assign another value; None "
            "where an option may be absent."
        )
