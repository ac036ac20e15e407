"""Optimizers and schedules as dicts that JSON can hold, and back."""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np

from optimize_loss import schedules
from optimize_loss._checks import InvalidType, nearest, received
from optimize_loss.optimizers._options import CLASSES, Options, check_options
from optimize_loss.optimizers._variable import value_of


def serialize(thing: Any) -> Any:
    """Return an optimizer, a schedule or a plain value as JSON can hold it.

    An optimizer or a schedule becomes a dict as Keras writes it: `module`, `class_name`, `config`
    and `registered_name`.

    Args:
      thing: an optimizer, a schedule, or text, a number, None, a list or dict of these.

    Raises:
      InvalidType: it is a function, or something else that has no configuration.

    Example:
      >>> import optimize_loss as ol
      >>> ol.optimizers.serialize(ol.optimizers.SGD(0.5))["config"]["learning_rate"]
      0.5
    """
    thing = value_of(thing)
    if isinstance(thing, Options):
        return _described(thing, "optimize_loss.optimizers", thing.get_config())
    if _SCHEDULES.get(type(thing).__name__) is type(thing):
        fields = {f.name: getattr(thing, f.name) for f in dataclasses.fields(thing)}
        return _described(thing, "optimize_loss.schedules", serialize(fields))
    if isinstance(thing, Mapping):
        if strange := [key for key in thing if not isinstance(key, str)]:
            raise InvalidType(
                "A configuration holds dicts whose keys are text. "
                f"Received: {strange[0]!r} of type {type(strange[0]).__name__}."
            )
        return {key: serialize(value) for key, value in thing.items()}
    if isinstance(thing, list | tuple):
        return [serialize(value) for value in thing]
    if isinstance(thing, bool | int | float | str | None):
        return thing
    if hasattr(thing, "dtype") and np.ndim(thing) == 0:
        return float(str(np.asarray(thing)[()])) if _is_float(thing) else np.asarray(thing).item()
    if hasattr(thing, "get_config"):
        return _described(thing, type(thing).__module__, thing.get_config())
    raise InvalidType(
        "A configuration holds numbers, text, schedules of `ol.schedules` and optimizers; a "
        f"function has none. Received: {thing!r} of type {type(thing).__name__}."
    )


def _is_float(x: Any) -> bool:
    return np.issubdtype(np.asarray(x).dtype, np.floating)


def _described(thing: Any, module: str, config: Any) -> dict[str, Any]:
    """Return the dict for an object; classes of the user's are named with their own module."""
    own = type(thing).__module__
    return {
        "module": module if own.startswith("optimize_loss.") else own,
        "class_name": type(thing).__name__,
        "config": config,
        "registered_name": None,
    }


def deserialize(config: Any, custom_objects: Mapping[str, type] | None = None) -> Any:
    """Return what `serialize` made a dict of; dicts that Keras wrote are read too.

    Args:
      config: a dict with `class_name` and `config`. It is not changed.
      custom_objects: classes by name, for those that are not of this package.

    Raises:
      InvalidType: it is no such dict.
      ValueError: the class is unknown.

    Example:
      >>> import optimize_loss as ol
      >>> ol.optimizers.deserialize({"class_name": "SGD", "config": {"learning_rate": 0.5}})
      SGD(learning_rate=0.5)
    """
    if not isinstance(config, Mapping) or not {"class_name", "config"} <= config.keys():
        raise InvalidType(
            f"`config` must be a dict with `class_name` and `config`. {received('config', config)}"
        )
    if not isinstance(config["class_name"], str):
        raise InvalidType(
            f"`class_name` must be text. {received('class_name', config['class_name'])}"
        )
    known = {**_SCHEDULES, **CLASSES, **(custom_objects or {})}
    name = config["class_name"].rpartition(">")[2]
    name = name if name in known else {n.lower(): n for n in known}.get(name.lower(), name)
    if name not in known:
        raise ValueError(
            "`class_name` must be an optimizer, a schedule, or in `custom_objects`. "
            f"{received('class_name', name)} Nearest: {nearest(name, known)}."
        )
    made, given = known[name], config["config"]
    if not isinstance(given, Mapping):
        raise InvalidType(f"`config` must be a dict. {received('config', given)}")
    if hasattr(made, "from_config"):
        takes_objects = "custom_objects" in inspect.signature(made.from_config).parameters
        objects = {"custom_objects": custom_objects} if takes_objects else {}
        return made.from_config(dict(given), **objects)
    check_options(made, given, inspect.signature(made).parameters)
    return made(**{key: plain(value, custom_objects) for key, value in given.items()})


def plain(value: Any, custom_objects: Mapping[str, type] | None = None) -> Any:
    """Return a value of a configuration with the objects in it made."""
    if isinstance(value, Mapping):
        if {"class_name", "config"} <= value.keys():
            return deserialize(value, custom_objects)
        return {key: plain(inside, custom_objects) for key, inside in value.items()}
    if isinstance(value, list):
        return [plain(inside, custom_objects) for inside in value]
    return value


_SCHEDULES = {
    name: x for name in schedules.__all__ if isinstance(x := getattr(schedules, name), type)
}
