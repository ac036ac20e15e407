"""Rules: what some parameters have for themselves, by pattern, checked and proven to cover."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optimize_loss._checks import (
    NOT_NEGATIVE,
    POSITIVE,
    InvalidType,
    Rule,
    check_choice,
    check_flags,
    check_number,
    nearest,
    received,
)
from optimize_loss._engine.by_name import ByName
from optimize_loss._engine.precision import FORMATS
from optimize_loss._names import (
    Pattern,
    check_pattern,
    first_index,
    first_matches,
    leaf_names,
    pattern_text,
)


@dataclasses.dataclass(frozen=True)
class Rules:
    """An ordered list of rules: the first whose pattern matches decides for a parameter.

    Attributes:
      patterns: of all rules, in order.
      options: of each, its keys with their values, checked.
    """

    patterns: tuple[Pattern, ...] = ()
    options: tuple[Mapping[str, Any], ...] = ()

    @property
    def texts(self) -> list[str]:
        """The patterns as text."""
        return [pattern_text(pattern) for pattern in self.patterns]

    def having(self, key: str) -> list[int]:
        """Return the indices of the rules that say something about parameters that are trained."""
        return [
            i for i, own in enumerate(self.options) if key in own and not own.get("freeze", False)
        ]

    @property
    def having_frozen(self) -> bool:
        """Whether a rule freezes its parameters."""
        return any(own.get("freeze", False) for own in self.options)

    def number(self, key: str, chosen: Sequence[int], rest: Any) -> Any:
        """Return a number by name: of the rules that are chosen their own, of all others `rest`."""
        if not chosen:
            return rest
        values = [own[key] if i in chosen else None for i, own in enumerate(self.options)]
        return ByName(tuple(zip(self.patterns, values, strict=True)), rest, optional=True)

    def index(self, names: Sequence[str]) -> list[int]:
        """Return for each parameter the index of its rule; behind the last for none."""
        return first_index(self.patterns, tuple(names))

    def frozen(self, names: Sequence[str]) -> list[bool]:
        """Return for each parameter whether its rule freezes it."""
        marks = [own.get("freeze", False) for own in (*self.options, {})]
        return [marks[i] for i in self.index(names)]

    def check(self, params: Any) -> None:
        """Raise unless every rule decides for a float parameter, and multipliers fit their shapes.

        Raises:
          ValueError: a rule has no parameter, because none has such a name or because earlier
            rules take them all; or it has another number of multipliers than a parameter layers.
        """
        pairs = zip(leaf_names(params), jax.tree.leaves(params), strict=True)
        floats = {n: x for n, x in pairs if jnp.issubdtype(jnp.result_type(x), jnp.inexact)}
        for text in floats.keys() & {*self.patterns}:
            if not {*text}.isdisjoint("*|"):
                raise ValueError(
                    f"`rules[{text!r}]` must not be the name of a parameter and a pattern at once: "
                    "write `re.compile(...)` for what is meant."
                )
        first_matches("rules", self.patterns, list(floats))
        for name, i in zip(floats, self.index([*floats]), strict=True):
            self._check_layers(i, name, np.shape(floats[name]))

    def _check_layers(self, i: int, name: str, shape: tuple[int, ...]) -> None:
        """Raise unless a parameter has a layer for each multiplier of its rule."""
        own: Mapping[str, Any] = [*self.options, {}][i]
        each = own.get("learning_rate_multiplier")
        if isinstance(each, tuple) and shape[:1] != (len(each),):
            label = _label(self.patterns[i], "learning_rate_multiplier")
            raise ValueError(
                f"`{label}` must have a number for each entry of the first axis of {name!r}, "
                f"whose shape is {shape}. Received: {len(each)} numbers."
            )


NO_RULES = Rules()


def check_rules(rules: Any) -> Rules:
    """Return rules, checked as far as they can be without parameters.

    Raises:
      InvalidType: `rules` is not a mapping of patterns to dicts, or a value is of the wrong kind.
      ValueError: a key is unknown, two patterns have the same text, or a value is out of range.

    Example:
      >>> check_rules({"**/bias": dict(wieght_decay=0)})
      Traceback (most recent call last):
      ValueError: `rules['**/bias']` must have keys of ['learning_rate_multiplier', \
'weight_decay', 'clip_norm', 'noise_scale', 'freeze', 'optimizer', 'state_dtype']. \
Received: 'wieght_decay'. Nearest: 'weight_decay'.
    """
    if rules is None:
        return NO_RULES
    if not isinstance(rules, Mapping):
        raise InvalidType(f"`rules` must map patterns to dicts. {received('rules', rules)}")
    patterns = tuple(check_pattern("rules", pattern) for pattern in rules)
    texts = [pattern_text(pattern) for pattern in patterns]
    if len(set(texts)) < len(texts):
        raise ValueError(f"`rules` must have different patterns. Received: {texts}.")
    return Rules(patterns, tuple(_check_rule(p, rules[p]) for p in patterns))


def _label(pattern: Pattern, key: str) -> str:
    return f"rules[{pattern_text(pattern)!r}][{key!r}]"


def _check_rule(pattern: Pattern, rule: Any) -> dict[str, Any]:
    name = f"rules[{pattern_text(pattern)!r}]"
    if not isinstance(rule, Mapping):
        raise InvalidType(f"`{name}` must be a dict of {[*KEYS]}. {received(name, rule)}")
    for key in rule:
        if key not in KEYS:
            near = nearest(str(key), KEYS, most=1)[0]
            raise ValueError(
                f"`{name}` must have keys of {[*KEYS]}. Received: {key!r}. Nearest: {near!r}."
            )
    return {key: _CHECKS[key](_label(pattern, key), value) for key, value in rule.items()}


def _number(rule: Rule, label: str, value: Any) -> Any:
    """Return a number that a rule allows; a schedule as it is."""
    return value if callable(value) else check_number(label, value, rule)


def _multiplier(label: str, value: Any) -> Any:
    """Return a multiplier, or a tuple of one for each layer."""
    if not _is_vector(value):
        return _number(NOT_NEGATIVE, label, value)
    return tuple(check_number(f"{label}[{i}]", x, NOT_NEGATIVE) for i, x in enumerate(value))


def _is_vector(value: Any) -> bool:
    if isinstance(value, np.ndarray | jax.Array):
        return value.ndim == 1 and value.size > 0
    return isinstance(value, list | tuple) and len(value) > 0


def _flag(label: str, value: Any) -> bool:
    check_flags(**{label: value})
    return value


def _optimizer(label: str, value: Any) -> Any:
    if value is None:
        raise InvalidType(f"`{label}` must be an optimizer. {received(label, value)}")
    return value


def _state_dtype(label: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InvalidType(f"`{label}` must be one of {[*FORMATS]}. {received(label, value)}")
    return check_choice(label, value, FORMATS)


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "learning_rate_multiplier": _multiplier,
    "weight_decay": functools.partial(_number, NOT_NEGATIVE),
    "clip_norm": functools.partial(_number, POSITIVE),
    "noise_scale": functools.partial(_number, NOT_NEGATIVE),
    "freeze": _flag,
    "optimizer": _optimizer,
    "state_dtype": _state_dtype,
}

KEYS = tuple(_CHECKS)
"""The keys of a rule."""
