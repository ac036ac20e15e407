"""Save a state to a file by names, and restore what of it has a place in another state."""

import dataclasses
import json
import os
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from optimize_loss._checks import CheckpointMismatch, InvalidType, check_flags, nearest, received
from optimize_loss._engine.numbers import FOLLOW_SCHEDULE
from optimize_loss._engine.selection import linked
from optimize_loss._files.match import Rename, begun, renamed
from optimize_loss._files.named import (
    Frame,
    agreed,
    check_state,
    first_process,
    is_key,
    key_kind,
    on_host,
    outline,
)
from optimize_loss._files.safetensors import Entry, Reader, write
from optimize_loss._state.train_state import TrainState
from optimize_loss.schedules import Decayed
from optimize_loss.transforms import Chain, Link


@dataclasses.dataclass(frozen=True)
class RestoreReport:
    """What `restore` found in a file, by names of leaves such as `optimizer/adam/m/dense/kernel`.

    Attributes:
      matched: leaves that are as in the file, under their names in `like`.
      new: leaves of `like` that the file lacks; they stay as they begin.
      unused: leaves of the file that `like` lacks, under their names in the file.
      changed: hyperparameters among the matched for which `like` had another value.

    Example:
      >>> from optimize_loss import RestoreReport
      >>> print(RestoreReport(matched=("params/w", "optimizer/step"), new=("key",)))
      2 matched, 1 new, 0 unused
        new: key
    """

    matched: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{len(self.matched)} matched, {len(self.new)} new, {len(self.unused)} unused"]
        lines += [
            f"  {title}: {_listed(names)}"
            for title, names in (
                ("new", self.new),
                ("unused", self.unused),
                ("numbers now as in the file", self.changed),
            )
            if names
        ]
        return "\n".join(lines)


def save(path: str | os.PathLike[str], state: TrainState) -> None:
    """Write a state to one file, from which `restore` continues bit for bit.

    The file has the layout of safetensors, and keys by name: `params/<name>`,
    `optimizer/<link>/<slot>/<name>`, `optimizer/<link>/<number>`, `optimizer/step`,
    `model_state/<name>`, `key`, `first_step`, `batches`. It holds no code. Every array and the
    header have a checksum. When `save` returns, the file is on the disk; if it fails or is killed,
    the file that was there before is whole.

    All arrays come to the host at once, those that are spread over devices whole. With several
    processes all must call it; the first one writes, and the call returns in none before it has.

    Args:
      path: of the file; its folder must exist. A file that is there is replaced.
      state: what `TrainStep.init` or a step returned. It may be used on.

    Raises:
      InvalidType: `state` is no TrainState, or traced; or `path` is no path.
      OSError: the disk is full, or there is no right to write; or that is so in the first process.
      RuntimeError: the memory of `state` was given to a step.
      ValueError: two leaves have one name; or `path` is a symbolic link or a device.

    Example:
      >>> import optimize_loss as ol, pathlib, tempfile
      >>> step = ol.optimize_loss(lambda p, x: p["w"] * x, learning_rate=1.0, optimizer="SGD")
      >>> state, _ = step(step.init({"w": 10.0}), 3.0)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     ol.save(pathlib.Path(folder) / "a.safetensors", state)
      ...     again, report = ol.restore(folder + "/a.safetensors", step.init({"w": 0.0}))
      >>> print(again.params["w"], again.step, report)
      7.0 1 6 matched, 0 new, 0 unused

    References:
      https://github.com/huggingface/safetensors#format
    """
    path = _check_path(path)
    check_state("state", state)
    kinds = {name: key_kind(x) for name, x in outline(state).items() if is_key(x)}
    arrays = on_host(state)
    written = not first_process()
    try:
        if first_process():
            write(path, arrays, {"keys": json.dumps(kinds), "versions": _versions()})
            written = True
    finally:
        all_written = agreed(written)
    if not all_written:
        raise OSError(f"The first process did not write the file. Received: path={str(path)!r}.")


def _versions() -> str:
    from optimize_loss._version import __version__

    return json.dumps({"optimize_loss": __version__, "jax": jax.__version__})


def restore(
    path: str | os.PathLike[str],
    like: TrainState,
    *,
    rename: Rename | None = None,
    strict: bool = False,
) -> tuple[TrainState, RestoreReport]:
    """Return a state with the leaves of a file, and a report of what had a place in it.

    Leaves go by their names, so that links may have come, gone or changed places since, and
    parameters may lie otherwise in memory or on other devices. What is in the file is taken; what
    is not stays as in `like`, except that a slot in which a parameter is copied, such as an
    average, begins from the restored parameter. Corrections of a start, such as Adam's, go by the
    step, so that they are not made again for a slot that is new late in training.

    Hyperparameters are taken as well, as `state.set` may have set them, also where `like` has a
    schedule and the file a number: `state.set(learning_rate=None)` gives back what was built in.
    The report lists those for which `like` had another value, and there is a warning. But where
    the file has a schedule and `like` has a number, the number is new.

    A file from before states counted their batches has as many batches as it has updates.

    With several processes all must call it, and see the file.

    Moments in another `precision` are other slots, and are not converted: they are new, begin at
    zero, and those of the file are unused.

    Args:
      path: of a file that `save` wrote.
      like: a state with the structure wanted, as `step.init(params)` returns it. It is not
        changed, and may be used on.
      rename: {name: new name} of parameters and of leaves of the model state, or of their first
        parts, as in `{"encoder": "body/encoder"}`; the first that fits counts, and each must fit.
        Or a function of the name. Slots follow their parameters.
      strict: whether anything new or unused is an error.

    Returns:
      The state, with every leaf where that of `like` is, and the report.

    Raises:
      CheckpointCorrupt: the file is damaged, cut short or of another kind.
      CheckpointMismatch: a shape, a dtype or the kind of a random key differs; nothing is cast.
        Or no parameter has a place. With `strict`, something is new or unused.
      CheckpointVersion: the file was written by a newer version.
      InvalidType: an argument is of the wrong kind.
      OSError: the file cannot be read.
      ValueError: `rename` does not fit.

    Example:
      An average of the parameters is added to a run:

      >>> import optimize_loss as ol, tempfile
      >>> T = ol.transforms
      >>> def built(**links):
      ...     links = {"rate": T.ScaleByLearningRate(1.0), **links}
      ...     return ol.optimize_loss(lambda p, x: p["w"] * x, optimizer=T.chain(**links))
      >>> state, _ = built()(built().init({"w": 10.0}), 3.0)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     ol.save(folder + "/a.safetensors", state)
      ...     like = built(ema=T.AverageParams(0.5)).init({"w": 0.0})
      ...     state, report = ol.restore(folder + "/a.safetensors", like)
      >>> print(report)
      6 matched, 2 new, 0 unused
        new: optimizer/ema/average/w, optimizer/ema/decay
      >>> print(state.optimizer["ema"]["average"]["w"])
      7.0
    """
    path = _check_path(path)
    check_flags(strict=strict)
    frame = Frame(check_state("like", like))
    with Reader(path) as file:
        found = renamed(file.entries, list(frame.outline), rename, like.chain)
        _check_parameters(path, frame, found)
        _check_kinds(path, file, frame, found)
        match = _Match(frame, like, found)
        if strict:
            _check_all_used(path, match.report())  # before all is read
        match.read(file)
        report = match.report()
        if strict:
            _check_all_used(path, report)
        state = frame.state()
    if report.changed:
        warnings.warn(
            "`like` has other hyperparameters than the file, and those of the file are taken: "
            f"{_listed(report.changed)}. For what was built in, such as a schedule: "
            f"`{_to_undo(like.chain, report.changed)}`.",
            stacklevel=2,
        )
    return state, report


class _Match:
    """The leaves that a file and a state have in common, while they go from one to the other."""

    def __init__(self, frame: Frame, like: TrainState, found: Mapping[str, str]):
        self._frame = frame
        self._like = like
        self._fields = {
            f"optimizer/{name}/{number}": field
            for name, link in linked(dict(like.chain.links))
            if isinstance(link, Link)
            for number, field in link.numbers().items()
        }
        self._found = {file: name for file, name in found.items() if name in frame.outline}
        self._unused = [file for file in found if file not in self._found]
        self._derived = set() if "batches" in self._found.values() else {"batches"}
        self._changed: list[str] = []

    def report(self) -> RestoreReport:
        """Return what is known so far."""
        matched = {*self._found.values(), *self._derived}
        names = [*self._frame.outline]
        return RestoreReport(
            matched=tuple(name for name in names if name in matched),
            new=tuple(name for name in names if name not in matched),
            unused=tuple(self._unused),
            changed=tuple(self._changed),
        )

    def read(self, file: Reader) -> None:
        """Put the arrays of a file into the state, and see to it that the new slots fit them."""
        fresh = self._fresh()
        for key, array in file.arrays():
            name = self._found.get(key)
            if name in self._fields and not self._takes_number(name, array):
                del self._found[key]
                self._unused.append(key)
            elif name is not None:
                self._frame.put(name, array)
        for name, slot in begun(self._like, self._frame, fresh):
            self._frame.put(name, slot)
        for name in self._derived:  # an older file counts updates alone
            self._frame.put(name, self._frame.get("optimizer/step"))

    def _takes_number(self, name: str, array: np.ndarray) -> bool:
        """Return whether a hyperparameter can be taken; a schedule that is gone cannot."""
        if array.dtype.kind == "f" and np.all(array == array.dtype.type(FOLLOW_SCHEDULE)):
            field = self._fields[name]
            if not callable(field) or isinstance(field, Decayed):
                return False
        if not np.array_equal(array, self._frame.get(name)):
            self._changed.append(name)
        return True

    def _fresh(self) -> list[str]:
        """Return the new slots that are as a link begins them with the parameters of `like`."""
        return [
            name
            for name, slot in begun(self._like, self._frame, self.report().new)
            if np.array_equal(np.asarray(slot), np.asarray(self._frame.get(name)))
        ]


def _to_undo(chain: Chain, names: Sequence[str]) -> str:
    """Return the call that gives back what hyperparameters of these names were built with."""
    arguments = [_shortest(chain, *name.split("/", 2)[1:]) for name in names]
    if all(map(str.isidentifier, arguments)):
        return f"state.set({', '.join(f'{argument}=None' for argument in arguments)})"
    return f"state.set(**{dict.fromkeys(arguments)})"


def _shortest(chain: Chain, link: str, number: str) -> str:
    """Return the name of a number for `state.set`: without its link, if that is enough."""
    try:
        is_enough = chain.find(number) == (link, number)
    except ValueError:
        is_enough = False
    return number if is_enough else f"{link}/{number}"


def _check_parameters(path: pathlib.Path, frame: Frame, found: Mapping[str, str]) -> None:
    """Raise if nothing of a model would come back: then the file is of another one."""
    wanted = [name for name in frame.outline if _is_parameter(name)]
    there = [name for name in found.values() if _is_parameter(name)]
    if set(wanted).isdisjoint(there):
        raise CheckpointMismatch(
            f"`like` must have a parameter of the file; `rename` gives new names. "
            f"Received: path={str(path)!r} with {_listed(there)}, and `like` with "
            f"{_listed(wanted)}."
        )


def _is_parameter(name: str) -> bool:
    return name.partition("/")[0] == "params"


def _check_kinds(path: pathlib.Path, file: Reader, frame: Frame, found: Mapping[str, str]) -> None:
    keys = file.texts("keys")
    differ = []
    for key, name in found.items():
        if name in frame.outline:
            ours, theirs = _kind(frame.outline[name]), _kind_in_file(file.entries[key], keys, key)
            if ours != theirs:
                differ.append(f"{name!r} is {theirs} in the file and {ours} in `like`")
    if differ:
        raise CheckpointMismatch(
            f"`like` must have the shapes and dtypes of the file: nothing is cast. "
            f"Received: path={str(path)!r}, in which {_listed(differ, '; ')}."
        )


def _kind(leaf: Any) -> str:
    return f"{key_kind(leaf) if is_key(leaf) else leaf.dtype.name}{[*leaf.shape]}"


def _kind_in_file(entry: Entry, keys: Mapping[str, str], name: str) -> str:
    if name in keys:
        return f"{keys[name]}{[*entry.shape[:-1]]}"
    return f"{entry.dtype.name}{[*entry.shape]}"


def _check_all_used(path: pathlib.Path, report: RestoreReport) -> None:
    """Raise if a leaf of the file or of the state has no match."""
    if not report.new and not report.unused:
        return
    pairs = (("`like`", report.new, report.unused), ("the file", report.unused, report.new))
    parts = [
        f"Only in {where}: {_listed([_with_nearest(name, others) for name in names])}."
        for where, names, others in pairs
        if names
    ]
    raise CheckpointMismatch(
        f"`like` must have the leaves of the file, with `strict`. {' '.join(parts)} "
        f"Received: path={str(path)!r}."
    )


def _with_nearest(name: str, others: Sequence[str]) -> str:
    return f"{name!r} (nearest: {nearest(name, others, most=1)[0]!r})" if others else repr(name)


def _listed(names: Sequence[str], separator: str = ", ", most: int = 10) -> str:
    more = f"{separator}and {len(names) - most} more" if len(names) > most else ""
    return separator.join(names[:most]) + more


def _check_path(path: Any) -> pathlib.Path:
    if not isinstance(path, str | os.PathLike):
        raise InvalidType(f"`path` must be the path of a file. {received('path', path)}")
    return pathlib.Path(path)
