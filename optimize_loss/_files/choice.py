"""Hyperparameters of a file and of the code: which of the two a restored state has."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
from jax.core import Tracer

from optimize_loss._engine.link import Link
from optimize_loss._engine.numbers import FOLLOW_SCHEDULE, to_array
from optimize_loss._engine.selection import linked
from optimize_loss._engine.transfers import asked_for
from optimize_loss._state.train_state import TrainState
from optimize_loss.schedules import Decayed
from optimize_loss.transforms import Chain

Source = Literal["latest", "code", "file"]
SOURCES = get_args(Source)


def _fields(chain: Chain) -> dict[str, tuple[str, str, Any]]:
    """Return the link, the number and the field of every hyperparameter, by its key in a file."""
    links = [(name, x) for name, x in linked(dict(chain.links)) if isinstance(x, Link)]
    return {
        f"optimizer/{name}/{number}": (name, number, field)
        for name, link in links
        for number, field in link.numbers().items()
    }


@asked_for()
def built_in(state: TrainState) -> dict[str, Any]:
    """Return what `state.set(name=None)` gives back for each number, by key, as JSON has it."""
    links = dict(linked(dict(state.chain.links)))
    found = {}
    for key, (name, number, field) in _fields(state.chain).items():
        if not isinstance(field, Tracer):
            dtype = state.links[name][number].dtype
            array = to_array(number, field, links[name].rule(number), dtype)
            found[key] = np.asarray(array).tolist()
    return found


@dataclasses.dataclass
class Choice:
    """Which numbers come from the file.

    Attributes:
      source: `file` or `code`, for all; or `latest`, for those of the code where the code has
        changed since the file was written, and else for those of the file.
      like: the state that the file is for.
      built: what the links were built with when the file was written; empty if it does not say.
      from_file: numbers that the file has, and the code otherwise.
      from_code: numbers that the code has, and the file otherwise.
      dropped: those of the code that had been set in the run of the file.
    """

    source: str
    like: TrainState
    built: Mapping[str, Any]
    from_file: list[str] = dataclasses.field(default_factory=list)
    from_code: list[str] = dataclasses.field(default_factory=list)
    dropped: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self):
        self._fields = _fields(self.like.chain)
        self._now = built_in(self.like)

    def takes(self, key: str, name: str, theirs: np.ndarray, ours: Any) -> bool:
        """Return whether a leaf of the file is taken: a number may be the code's.

        Args:
          key: of the leaf in the file.
          name: of the leaf in the state.
          theirs: the leaf of the file.
          ours: that of the state.
        """
        if name not in self._fields or np.array_equal(theirs, ours):
            return True
        is_of_code = self._is_of_code(key, name, theirs)
        (self.from_code if is_of_code else self.from_file).append(name)
        if is_of_code and key in self.built and not np.all(theirs == self._first(key, theirs)):
            self.dropped.append(name)
        return not is_of_code

    def _first(self, key: str, like: np.ndarray) -> np.ndarray:
        """Return what a number was built with when the file was written."""
        return np.asarray(self.built[key], like.dtype)

    def _is_of_code(self, key: str, name: str, theirs: np.ndarray) -> bool:
        field = self._fields[name][2]
        has_schedule = callable(field) and not isinstance(field, Decayed)
        if _follows_schedule(theirs) and not has_schedule:
            return True  # there is none that the number could follow
        if self.source != "latest" or key not in self.built:
            return self.source == "code"
        return self.built[key] != self._now.get(name)

    def warning(self) -> str:
        """Return what the user must know of numbers, if `latest` was not asked to choose."""
        if self.source != "latest":
            return ""
        texts = []
        if self.from_file:
            texts.append(
                "`like` has other hyperparameters than the file, and those of the file are taken: "
                f"{_listed(self.from_file)}. For what was built in, such as a schedule: "
                f"`{_to_undo(self.like.chain, self.from_file)}`, or numbers='code'."
            )
        if self.dropped:
            texts.append(
                "Hyperparameters that were set in the run have changed in the code since, and "
                f"those of the code are taken: {_listed(self.dropped)}. For those of the file: "
                "numbers='file'."
            )
        return " ".join(texts)


def _follows_schedule(array: np.ndarray) -> bool:
    return array.dtype.kind == "f" and bool(np.all(array == array.dtype.type(FOLLOW_SCHEDULE)))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f", and {len(names) - 10} more" if len(names) > 10 else "")


def _to_undo(chain: Chain, names: Sequence[str]) -> str:
    """Return the call that gives back what hyperparameters of these names were built with."""
    arguments = [_shortest(chain, *name.split("/", 2)[1:]) for name in names]
    if all(map(str.isidentifier, arguments)):
        return f"state.set({', '.join(f'{argument}=None' for argument in arguments)})"
    return f"state.set(**{dict.fromkeys(arguments)})"


def _shortest(chain: Chain, link: str, number: str) -> str:
    """Return the name of a number for `state.set`: without its link, if that is enough."""
    try:
        is_enough = chain.meant(number) == [(link, number)]
    except ValueError:
        is_enough = False
    return number if is_enough else f"{link}/{number}"
