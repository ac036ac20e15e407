"""Optimizers by name."""

import fnmatch
import inspect
from collections.abc import Mapping
from typing import Any

from optimize_loss._checks import InvalidType, nearest, received
from optimize_loss.optimizers import _keras, _multi, _muon, _tf1
from optimize_loss.optimizers._config import CLASSES, deserialize, is_any
from optimize_loss.optimizers._optimizer import Optimizer

for _module in (_keras, _muon, _tf1, _multi):
    for _name, _made in vars(_module).items():
        if isinstance(_made, type) and issubclass(_made, Optimizer) and _made is not Optimizer:
            CLASSES[_name] = _made


def names(pattern: str = "*") -> list[str]:
    """Return the names of all optimizers that match a pattern, whatever the case.

    Args:
      pattern: `*` stands for any text, `?` for one letter.

    Example:
      >>> import optimize_loss as ol
      >>> ol.optimizers.names("ada*w")
      ['AdamW']
    """
    return sorted(name for name in CLASSES if fnmatch.fnmatch(name.lower(), pattern.lower()))


def get(identifier: Any, custom_objects: Mapping[str, type[Optimizer]] | None = None) -> Any:
    """Return an optimizer by its name, with its defaults; from its configuration; or as it is.

    None gives None, as in Keras.

    Args:
      identifier: a name, in any case; a dict as `serialize` returns it; an `Optimizer`; or None.
      custom_objects: classes by name, beside those of this package.

    Raises:
      InvalidType: it is none of these, or a configuration of something else.
      ValueError: the name is unknown.

    Example:
      >>> import optimize_loss as ol
      >>> ol.optimizers.get("adamw")
      AdamW(learning_rate=0.001)
    """
    is_config = isinstance(identifier, Mapping)
    made = deserialize(identifier, custom_objects) if is_config else identifier
    if made is None or isinstance(made, Optimizer):
        return made
    if not isinstance(identifier, str):
        raise InvalidType(
            "`identifier` must be a name, a configuration or an optimizer. "
            f"{received('identifier', identifier)}"
        )
    known: dict[str, Any] = {**CLASSES, **(custom_objects or {})}
    by_lower = {name.lower(): made for name, made in known.items()}
    if identifier.lower() not in by_lower:
        raise ValueError(
            f"`identifier` must be one of {sorted(known)}. {received('identifier', identifier)} "
            f"Nearest: {nearest(identifier, known, most=1)[0]!r}."
        )
    made = by_lower[identifier.lower()]
    if missing := _required(made):
        raise InvalidType(
            f"`identifier` must be a configuration, as {made.__name__} has no default for "
            f"{missing}. {received('identifier', identifier)}"
        )
    return made()


def _required(made: Any) -> list[str]:
    """Return the names of arguments that must be given."""
    parameters = inspect.signature(made).parameters.values()
    return [p.name for p in parameters if not is_any(p) and p.default is p.empty]
