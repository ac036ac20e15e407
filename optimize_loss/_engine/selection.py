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
    """A value that selects some of the parameters, given all of them."""

    def takes(self, names: Sequence[str], leaves: Sequence[Any]) -> list[bool]:
        """Return for each parameter whether it is selected."""
        ...


@dataclasses.dataclass(frozen=True)
class ForParameters:
    """A link that acts only on the parameters that `where` selects; it has no slots for the others.

    The totals of the link, such as a global norm, include only these parameters. The gradients of
    all others pass unchanged, in the same pass over the parameters.

    Args:
      where: one or several patterns, each of which must match a parameter; or a function of a
        parameter's name and the parameter that returns a bool, for example to select matrices; or a
        value with a method `takes` of all names and parameters that returns a list of bools.
      link: a `Link` that is neither a gate nor a loss scale: these are for all parameters.
      optional: whether `where` may select no parameter.

    Raises:
      InvalidType: `where` is neither a pattern nor a function, or `link` is not such a link.
      ValueError: at `init`, if `where` selects no parameter.

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
    """Return for each parameter whether the `where` of a `ForParameters` selects it."""
    if isinstance(where, Selection):
        return where.takes(names, leaves)
    if callable(where):
        return [bool(where(*each)) for each in zip(names, leaves, strict=True)]
    patterns = check_patterns("where", where)
    return [chosen is not None for chosen in first_matches("where", patterns, names)]


@dataclasses.dataclass(frozen=True)
class ByRule:
    """Selects the parameters for which the first pattern that matches is one of those chosen.

    Patterns may match nothing here: whoever makes the rules has proven that they match.

    Args:
      patterns: of all rules, in order.
      chosen: the indices of some; the index after the last means parameters without a match.
      within: if given, only parameters that this selects, like the `where` of `ForParameters`.
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
        """Return for each parameter whether it is selected."""
        ours = [i in self.chosen for i in first_index(self.patterns, tuple(names))]
        return _both(ours, self.within, names, leaves)


@dataclasses.dataclass(frozen=True)
class Outside:
    """Selects the parameters that no given selection selects.

    Args:
      of: as the `where` of `ForParameters`, each.
      within: if given, only parameters that this selects.
    """

    of: tuple[Any, ...]
    within: Any = None

    def takes(self, names: Sequence[str], leaves: Sequence[Any]) -> list[bool]:
        """Return for each parameter whether it is selected."""
        found = [told(each, names, leaves) for each in self.of]
        ours = [not any(marks) for marks in zip(*found, strict=True)]
        return _both(ours, self.within, names, leaves)


def _both(ours: list[bool], within: Any, names: Sequence[str], leaves: Sequence[Any]) -> list[bool]:
    """Return the parameters that are selected here and by `within`, if given."""
    theirs = ours if within is None else told(within, names, leaves)
    return [a and b for a, b in zip(ours, theirs, strict=True)]


def link_of(entry: Any) -> Any:
    """Return a link, without its `ForParameters`."""
    return entry.link if isinstance(entry, ForParameters) else entry


def linked(entries: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Return the links by name, without their `ForParameters`."""
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
