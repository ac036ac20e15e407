"""Schedules, and all that has a `get_config`, as dicts that JSON can hold, and back."""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optimize_loss._checks import InvalidType, check_options, nearest, received
from optimize_loss.schedules._arguments import unboxed

SCHEDULES: dict[str, type["LearningRateSchedule"]] = {}
"""The schedules of this package, by name."""


class LearningRateSchedule:
    """A function of the step with a configuration: what the schedules of this package are.

    Any function of the step serves as a schedule. To write one that is saved with its optimizer,
    define `__call__` and `get_config`, as for Keras; a dataclass needs no `get_config`.

    Example:
      >>> import dataclasses, optimize_loss as ol
      >>> @dataclasses.dataclass(frozen=True)
      ... class Linear(ol.schedules.LearningRateSchedule):
      ...     slope: float
      ...     def __call__(self, step):
      ...         return self.slope * step
      >>> config = ol.optimizers.SGD(Linear(0.5)).get_config()
      >>> print(config["learning_rate"]["config"])
      {'slope': 0.5}
      >>> ol.optimizers.SGD.from_config(config, custom_objects={"Linear": Linear})
      SGD(learning_rate=Linear(slope=0.5), name='SGD')

    References:
      `tf.keras.optimizers.schedules.LearningRateSchedule`.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls.__module__.startswith("optimize_loss.") and not cls.__name__.startswith("_"):
            SCHEDULES[cls.__name__] = cls

    def __call__(self, step: Any) -> jax.Array:
        """Return the rate at `step`."""
        raise NotImplementedError(f"{type(self).__name__} must define `__call__(self, step)`.")

    def get_config(self) -> dict[str, Any]:
        """Return the arguments as a dict that JSON can hold.

        Raises:
          InvalidType: one has no configuration, as plain functions have none.
          NotImplementedError: the class is no dataclass, and does not define this method.
        """
        if not dataclasses.is_dataclass(self):
            raise NotImplementedError(
                f"`get_config` of {type(self).__name__} must be defined: it is not a dataclass."
            )
        fields = [f.name for f in dataclasses.fields(self) if f.init]
        return {name: serialize(getattr(self, name)) for name in fields}

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], custom_objects: Mapping[str, type] | None = None
    ) -> "LearningRateSchedule":
        """Return a schedule with these arguments; the inverse of `get_config`.

        Args:
          config: as `get_config` returns it, from here or from Keras. It is not changed.
          custom_objects: classes by name, for schedules in it that are not of this package.

        Raises:
          InvalidType: `config` is not a dict, or an argument is unknown.
          ValueError: the value of an argument is wrong.
        """
        if not isinstance(config, Mapping):
            raise InvalidType(f"`config` must be a dict. {received('config', config)}")
        check_options(cls, config, inspect.signature(cls).parameters)
        return cls(**{name: plain(x, custom_objects, SCHEDULES) for name, x in config.items()})


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
    thing = unboxed(thing)
    if not isinstance(thing, type) and hasattr(thing, "get_config"):
        return _described(thing)
    match thing:
        case Mapping():
            return {_key(key): serialize(value) for key, value in thing.items()}
        case list() | tuple():
            return [serialize(value) for value in thing]
        case bool() | int() | float() | str() | None:
            return thing
    if hasattr(thing, "dtype") and not getattr(thing, "shape", ()):
        array = np.asarray(thing)
        is_float = jnp.issubdtype(array.dtype, jnp.floating)  # 0.1, and not 0.10000000149
        return float(str(array[()])) if is_float else array.item()
    raise InvalidType(
        "A configuration holds numbers, text, schedules of `ol.schedules` and optimizers; a "
        f"function has none. Received: {thing!r} of type {type(thing).__name__}."
    )


def _key(key: Any) -> str:
    """Return a key of a dict in a configuration if it is text."""
    if not isinstance(key, str):
        raise InvalidType(
            "A configuration holds dicts whose keys are text. "
            f"Received: {key!r} of type {type(key).__name__}."
        )
    return key


def _described(thing: Any) -> dict[str, Any]:
    """Return the dict for an object; our classes are named with the module where users find them.

    Those of the user's are named with their own.
    """
    own = type(thing).__module__
    return {
        "module": ".".join(own.split(".")[:2]) if own.startswith("optimize_loss.") else own,
        "class_name": type(thing).__name__,
        "config": thing.get_config(),
        "registered_name": None,
    }


def deserialize(
    config: Any, custom_objects: Mapping[str, type] | None, known: Mapping[str, type]
) -> Any:
    """Return what `serialize` made a dict of.

    Args:
      config: a dict with `class_name` and `config`. It is not changed.
      custom_objects: classes by name, before those of this package.
      known: the classes of this package by name.
    """
    if not isinstance(config, Mapping) or not {"class_name", "config"} <= config.keys():
        raise InvalidType(
            f"`config` must be a dict with `class_name` and `config`. {received('config', config)}"
        )
    made, given = (
        _class(config["class_name"], {**known, **(custom_objects or {})}),
        config["config"],
    )
    if not isinstance(given, Mapping):
        raise InvalidType(f"`config` must be a dict. {received('config', given)}")
    if not hasattr(made, "from_config"):
        check_options(made, given, inspect.signature(made).parameters)
        return made(**{key: plain(value, custom_objects, known) for key, value in given.items()})
    takes_objects = "custom_objects" in inspect.signature(made.from_config).parameters
    objects = {"custom_objects": custom_objects} if takes_objects else {}
    return made.from_config(dict(given), **objects)


def _class(full_name: Any, classes: Mapping[str, Any]) -> Any:
    """Return the class of a name, in whichever letters; Keras' own `package>name` is its name."""
    if not isinstance(full_name, str):
        raise InvalidType(f"`class_name` must be text. {received('class_name', full_name)}")
    name = full_name.rpartition(">")[2]
    name = name if name in classes else {n.lower(): n for n in classes}.get(name.lower(), name)
    if name not in classes:
        raise ValueError(
            "`class_name` must be an optimizer, a schedule, or in `custom_objects`. "
            f"{received('class_name', name)} Nearest: {nearest(name, classes)}."
        )
    return classes[name]


def plain(value: Any, custom_objects: Mapping[str, type] | None, known: Mapping[str, type]) -> Any:
    """Return a value of a configuration with the objects in it made; arguments of `deserialize`."""
    if isinstance(value, Mapping):
        if {"class_name", "config"} <= value.keys():
            return deserialize(value, custom_objects, known)
        return {key: plain(inside, custom_objects, known) for key, inside in value.items()}
    if isinstance(value, list):
        return [plain(inside, custom_objects, known) for inside in value]
    return value
