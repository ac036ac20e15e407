"""Optimizers as dicts that JSON can hold, and back."""

from collections.abc import Mapping
from typing import Any

from optimize_loss.optimizers._options import CLASSES
from optimize_loss.schedules import _config
from optimize_loss.schedules._config import SCHEDULES
from optimize_loss.schedules._config import serialize as serialize


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
