"""A link for some of the parameters."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax

from optimize_loss._checks import InvalidType, received
from optimize_loss._engine.kinds import Gate, LossScale, RateScale
from optimize_loss._engine.link import Link
from optimize_loss._names import Pattern, check_patterns, first_index, first_matches


@runtime_checkable
class Selection(Protocol):
    """A value that tells some of the parameters, knowing all of them."""

    def takes(self, names: Sequence[str], leaves: Sequence[Any]) -> list[bool]:
        """Return for each parameter whether it is meant."""
        ...


@dataclasses.dataclass(frozen=True)
class ForParameters:
    """A link that acts only on the parameters that `where` tells; it has no slots for the others.

    What the link counts over the whole tree, such as a global norm, it counts over these. All
    others pass as if the link were not there, in the same pass over the parameters.

    Args:
      where: a pattern or several, of which each must match a parameter; or a function of a
        parameter's name and the parameter that returns a bool, such as one that tells matrices;
        or a value with a method `takes` of all names and parameters that returns a list of bools.
      link: a `Link` that is no gate and has no loss scale: these are for all parameters.
      optional: whether there may be no such parameter.

    Raises:
      InvalidType: `where` is no pattern and no function, or `link` is no such link.
      ValueError: at `init`, where no parameter is meant.

    Example:
      Two rates in one chain:

      >>> import optimize_loss as ol
      >>> from optimize_loss.transforms import ForParameters, ScaleByLearningRate, chain
      >>> tx = chain(body=ForParameters("body/**", ScaleByLearningRate(0.5)),
      ...            head=ForParameters("head/**", ScaleByLearningRate(0.25)))
      >>> params = {"body": {"w": 1.0}, "head": {"w": 1.0}}
      >>> updates, _ = tx.update({"body": {"w": 2.0}, "head": {"w": 2.0}}, tx.init(params))
      >>> print(updates["body"]["w"], updates["head"]["w"])
      -1.0 -0.5
    """

    where: Pattern | tuple[Pattern, ...] | Callable[[str, Any], bool] | Selection
    link: Link
    optional: bool = False

    def __post_init__(self):
        if not isinstance(self.link, Link) or isinstance(self.link, Gate):
            raise InvalidType(f"`link` must be a `Link` and no gate. {received('link', self.link)}")
        if isinstance(self.link, LossScale | RateScale):
            raise InvalidType(
                "`link` must have no loss scale, nor one of rates: these are for all parameters. "
                f"{received('link', self.link)}"
            )
        if not (callable(self.where) or isinstance(self.where, Selection)):
            object.__setattr__(self, "where", check_patterns("where", self.where))

    def takes(self, names: Sequence[str], leaves: Sequence[jax.Array]) -> list[bool]:
        """Return for each parameter whether the link acts on it."""
        return told(self.where, names, leaves)


@dataclasses.dataclass(frozen=True)
class Sharing(ForParameters):
    """A link for some of the parameters, of which a number is shared with the links of others.

    Where the number is set by its name alone, it is set in all of them.

    Args:
      number: its name.
    """

    number: str = ""


def told(where: Any, names: Sequence[str], leaves: Sequence[Any]) -> list[bool]:
    """Return for each parameter whether the `where` of a `ForParameters` means it."""
    if isinstance(where, Selection):
        return where.takes(names, leaves)
    if callable(where):
        return [bool(where(*each)) for each in zip(names, leaves, strict=True)]
    patterns = check_patterns("where", where)
    return [chosen is not None for chosen in first_matches("where", patterns, names)]


@dataclasses.dataclass(frozen=True)
class ByRule:
    """Tells the parameters for which the first pattern that matches is one of those chosen.

    Patterns may match nothing here: whoever makes the rules has proven that they match.

    Args:
      patterns: of all rules, in order.
      chosen: the indices of some; the index behind the last means parameters that none matches.
      within: where given, only those that this tells: as the `where` of `ForParameters`.
    """

    patterns: tuple[Pattern, ...]
    chosen: tuple[int, ...]
    within: Any = None

    @property
    def has_rest(self) -> bool:
        """Whether parameters without a rule are meant."""
        return len(self.patterns) in self.chosen

    @property
    def whole(self) -> "ByRule":
        """The same rules without what narrows them."""
        return dataclasses.replace(self, within=None)

    def takes(self, names: Sequence[str], leaves: Sequence[Any]) -> list[bool]:
        """Return for each parameter whether it is meant."""
        ours = [i in self.chosen for i in first_index(self.patterns, tuple(names))]
        return _both(ours, self.within, names, leaves)


@dataclasses.dataclass(frozen=True)
class Outside:
    """Tells the parameters that none of some selections tells.

    Args:
      of: as the `where` of `ForParameters`, each.
      within: where given, only those that this tells.
    """

    of: tuple[Any, ...]
    within: Any = None

    def takes(self, names: Sequence[str], leaves: Sequence[Any]) -> list[bool]:
        """Return for each parameter whether it is meant."""
        found = [told(each, names, leaves) for each in self.of]
        ours = [not any(marks) for marks in zip(*found, strict=True)]
        return _both(ours, self.within, names, leaves)


def _both(ours: list[bool], within: Any, names: Sequence[str], leaves: Sequence[Any]) -> list[bool]:
    """Return what is told here and by `within`, if that is given."""
    theirs = ours if within is None else told(within, names, leaves)
    return [a and b for a, b in zip(ours, theirs, strict=True)]


def link_of(entry: Any) -> Any:
    """Return a link, one for some parameters without telling which."""
    return entry.link if isinstance(entry, ForParameters) else entry


def linked(entries: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Return the links by name, those for some parameters without telling which."""
    return ((name, link_of(entry)) for name, entry in entries.items())


def is_of_rules(entry: Any) -> bool:
    """Return whether a link is only for parameters that have a rule."""
    which = where(entry)
    while which is not None:
        if isinstance(which, ByRule) and not which.has_rest:
            return True
        which = getattr(which, "within", None)
    return False


def where(entry: Any) -> Any:
    """Return which parameters a link is for; None for all."""
    return entry.where if isinstance(entry, ForParameters) else None
