"""Optimizers as dicts that JSON can hold, and back."""

import inspect
from collections.abc import Mapping
from typing import Any

from optimize_loss._checks import InvalidType, check_options, received
from optimize_loss.optimizers._declaration import options_of
from optimize_loss.schedules import _config
from optimize_loss.schedules._config import SCHEDULES
from optimize_loss.schedules._config import serialize as serialize

CLASSES: dict[str, type] = {}
"""The optimizers of this package, by name; `optimizers/_get.py` enters them."""

_ELSEWHERE = ("learning_rate", "mesh")
_IF_GIVEN = ("gradient_accumulation_steps", "loss_scale_factor", "axis_name")


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
    return _config.deserialize(config, custom_objects, {**SCHEDULES, **CLASSES})


def plain(value: Any, custom_objects: Mapping[str, type] | None = None) -> Any:
    """Return a value of a configuration with the objects in it made."""
    return _config.plain(value, custom_objects, {**SCHEDULES, **CLASSES})


def config_of(optimizer: Any, is_complete: bool) -> dict[str, Any]:
    """Return the options of an optimizer as a dict that JSON can hold.

    Args:
      optimizer: the optimizer.
      is_complete: whether its class adds the options that its constructor takes beside.
    """
    given = _given_options(optimizer)
    parameters = inspect.signature(type(optimizer)).parameters
    if not _takes_any(parameters):
        given = {name: x for name, x in given.items() if name in parameters}
    if not is_complete:
        absent = (*given, *_ELSEWHERE, *_IF_GIVEN)
        named = [n for n, p in parameters.items() if not is_any(p) and n not in absent]
        given |= {name: _own_option(optimizer, name) for name in named}
    return {name: serialize(x) for name, x in given.items()}


def _given_options(optimizer: Any) -> dict[str, Any]:
    """Return the options that a class declares, with the learning rate and a name."""
    names = sorted(options_of(type(optimizer)), key=_IF_GIVEN.__contains__)
    values = {name: getattr(optimizer, name) for name in names if name not in _ELSEWHERE}
    given = {n: x for n, x in values.items() if x is not None or n not in _IF_GIVEN}
    rate = {} if optimizer.rate is None else {"learning_rate": optimizer.rate}
    return {**given, **rate, "name": optimizer.name or type(optimizer).__name__}


def _own_option(optimizer: Any, name: str) -> Any:
    """Return an option of a subclass, which is an attribute of the same name."""
    for attribute in (name, f"_{name}"):
        if attribute in vars(optimizer):
            return vars(optimizer)[attribute]
    raise NotImplementedError(
        f"`get_config` of {type(optimizer).__name__} must be defined: its constructor takes "
        f"`{name}`, which is no attribute of it."
    )


def made_from(
    cls: Any, config: Mapping[str, Any], custom_objects: Mapping[str, type] | None
) -> Any:
    """Return an optimizer; arguments as of `Optimizer.from_config`."""
    if not isinstance(config, Mapping):
        raise InvalidType(f"`config` must be a dict. {received('config', config)}")
    if config.get("is_legacy_optimizer"):
        raise ValueError("`config` must not be of one of Keras' legacy optimizers.")
    given = {name: plain(x, custom_objects) for name, x in config.items()}
    given.pop("is_legacy_optimizer", None)
    parameters = inspect.signature(cls).parameters
    if not _takes_any(parameters):
        check_options(cls, given, parameters)
    return cls(**given)


def _takes_any(parameters: Mapping[str, inspect.Parameter]) -> bool:
    """Return whether a function with these parameters takes any keyword."""
    return any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def is_any(parameter: inspect.Parameter) -> bool:
    """Return whether a parameter takes any arguments, by place or by keyword."""
    return parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
