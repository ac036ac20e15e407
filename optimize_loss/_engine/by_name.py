"""A number by name: one for some parameters, another one for others."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from optimize_loss._checks import InvalidType, received
from optimize_loss._names import Pattern, check_pattern, first_index, first_matches, pattern_text


@dataclasses.dataclass(frozen=True)
class ByName:
    """A hyperparameter by name: the first pattern that matches a parameter decides.

    Its numbers are called `field/pattern` in the state, and that of the rest `field`.

    Attributes:
      pairs: each pattern with its number or schedule; None for that of the rest.
      rest: the number of all other parameters; None if the link leaves them alone.
      optional: whether a pattern may decide for no parameter.
    """

    pairs: tuple[tuple[Pattern, Any], ...]
    rest: Any = None
    optional: bool = False

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        """The patterns, in order."""
        return tuple(pattern for pattern, _ in self.pairs)

    def numbers(self, field: str) -> dict[str, Any]:
        """Return all numbers by their names in the state."""
        named = {f"{field}/{pattern_text(pattern)}": number for pattern, number in self.pairs}
        return {n: x for n, x in {field: self.rest, **named}.items() if x is not None}

    def check_names(self, field: str, names: Sequence[str]) -> None:
        """Raise a `ValueError` if a pattern that must decide for a parameter does for none."""
        if not self.optional:
            first_matches(field, self.patterns, names)

    def chosen(self, field: str, names: Sequence[str]) -> list[str | None]:
        """Return for each parameter the name of its number; None where the link leaves it alone."""
        rest = None if self.rest is None else field
        keys = [rest if x is None else f"{field}/{pattern_text(p)}" for p, x in self.pairs]
        return [[*keys, rest][i] for i in first_index(self.patterns, tuple(names))]


def by_name(
    argument: str, given: Any, check: Callable[[str, Any], Any], rest: Any = None
) -> ByName:
    """Return a mapping of patterns to numbers as a number by name, checked.

    Raises:
      InvalidType: it is no such mapping, is empty, or a key is not a pattern.
      ValueError: two patterns have the same text, or a number is out of range.
    """
    if not isinstance(given, Mapping) or not given:
        raise InvalidType(
            f"`{argument}` must map names or patterns to numbers, and have at least one. "
            f"{received(argument, given)}"
        )
    texts = [pattern_text(check_pattern(argument, pattern)) for pattern in given]
    if len(set(texts)) < len(texts):
        raise ValueError(f"`{argument}` must have different keys. Received: {texts}.")
    pairs = [
        (pattern, check(f"{argument}[{text!r}]", number))
        for text, (pattern, number) in zip(texts, given.items(), strict=True)
    ]
    return ByName(tuple(pairs), None if "**" in given else rest)


def numbers_by_name(link: Any) -> dict[str, ByName]:
    """Return the hyperparameters of a link that are given by name."""
    fields = {field.name: getattr(link, field.name) for field in dataclasses.fields(link)}
    return {name: value for name, value in fields.items() if isinstance(value, ByName)}


def acts_on(link: Any, names: Sequence[str]) -> list[bool]:
    """Return for each parameter whether it has all numbers that the link has by name."""
    chosen = [number.chosen(field, names) for field, number in numbers_by_name(link).items()]
    if not chosen:
        return [True] * len(names)
    return [None not in keys for keys in zip(*chosen, strict=True)]


def by_numbers(
    link: Any, names: Sequence[str], numbers: Mapping[str, Any]
) -> Iterator[tuple[Sequence[str], Mapping[str, Any]]]:
    """Yield the parameters that have the same numbers, with these, as one number for each field."""
    fields = numbers_by_name(link)
    shared = {n: x for n, x in numbers.items() if n.partition("/")[0] not in fields}
    groups: dict[tuple[Any, ...], list[str]] = {} if fields else {(): [*names]}
    chosen = [number.chosen(field, names) for field, number in fields.items()]
    for name, *keys in zip(names, *chosen, strict=True) if fields else ():
        groups.setdefault(tuple(keys), []).append(name)
    for keys, group in groups.items():
        yield group, {**shared, **{f: numbers[k] for f, k in zip(fields, keys, strict=True)}}
