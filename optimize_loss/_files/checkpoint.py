"""Save a state to a file by name, and restore all entries that another state has, too."""

import dataclasses
import json
import os
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from optimize_loss._checks import (
    CheckpointMismatch,
    InvalidType,
    check_choice,
    check_flags,
    nearest,
    received,
)
from optimize_loss._files.choice import SOURCES, Choice, Source, built_in
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
from optimize_loss._files.parts import (
    PREFIX,
    Parts,
    check_parts,
    check_present,
    check_processes,
    packed,
    put_back,
    unpacked,
)
from optimize_loss._files.safetensors import Entry, Reader, write
from optimize_loss._state.train_state import TrainState


@dataclasses.dataclass(frozen=True)
class RestoreReport:
    """The result of `restore`: names of leaves such as `optimizer/adam/m/dense/kernel`.

    Attributes:
      matched: leaves in both, under their names in `like`; they have the values of the file, except
        those in `from_code`.
      new: leaves of `like` that the file lacks; they keep their initial values.
      unused: leaves of the file that `like` lacks, under their names in the file.
      from_file: hyperparameters that differ from `like`, with the value of the file.
      from_code: hyperparameters that differ from the file, with the value of `like`.
      parts: the other contents of the file, by name.

    Example:
      >>> from optimize_loss import RestoreReport
      >>> print(RestoreReport(matched=("params/w", "optimizer/step"), new=("key",)))
      2 matched, 1 new, 0 unused
        new: key
    """

    matched: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    from_file: tuple[str, ...] = ()
    from_code: tuple[str, ...] = ()
    parts: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        lines = [f"{len(self.matched)} matched, {len(self.new)} new, {len(self.unused)} unused"]
        lines += [
            f"  {title}: {_listed(names)}"
            for title, names in (
                ("new", self.new),
                ("unused", self.unused),
                ("numbers as in the file", self.from_file),
                ("numbers as in the code", self.from_code),
            )
            if names
        ]
        return "\n".join(lines)


def save(path: str | os.PathLike[str], state: TrainState, *, parts: Parts | None = None) -> None:
    """Write a state to one file, from which `restore` continues bit for bit.

    The file has the layout of safetensors, and these keys: `params/<name>`,
    `optimizer/<link>/<slot>/<name>`, `optimizer/<link>/<number>`, `optimizer/step`,
    `model_state/<name>`, `key`, `first_step`, `batches`. It holds no code. Every array and the
    header have a checksum. When `save` returns, the file is on the disk. If it fails or is killed,
    an existing file stays intact.

    All arrays are fetched to the host at once; sharded arrays are gathered. With several processes,
    all must call it. The first one writes, and all calls return after it has finished.

    Args:
      path: the path of the file; its folder must exist. An existing file is replaced.
      state: from `TrainStep.init` or a step. You can still use it.
      parts: {name: part}, to save with the state. A part is an object with a method `get_state` or
        `state_dict`, such as the iterator of a loader; a function without arguments, which is
        called; or a value: numbers, text, bytes, arrays, lists and dicts.

    Raises:
      InvalidType: `state` is not a TrainState, or is traced; `path` is not a path; or a part cannot
        be saved.
      OSError: the disk is full, or the path is not writable, in this process or the first one.
      RuntimeError: `state` was donated to a step.
      ValueError: two leaves have the same name; or `path` is a symbolic link or a device.

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
    write_state(path, state, check_parts(parts), {})


def write_state(path: Any, state: TrainState, parts: Parts, notes: Mapping[str, str]) -> None:
    """Save a state with some texts by name, which can be read without the rest of the file."""
    path = _check_path(path)
    check_state("state", state)
    kinds = {name: key_kind(x) for name, x in outline(state).items() if is_key(x)}
    texts = {"keys": kinds, "versions": _versions(), "numbers": built_in(state)}
    arrays = on_host(state) | packed(parts)
    written = not first_process()
    try:
        if first_process():
            texts = {name: json.dumps(text) for name, text in texts.items()}
            write(path, arrays, {**texts, **notes})
            written = True
    finally:
        all_written = agreed(written)
    if not all_written:
        raise OSError(f"The first process did not write the file. Received: path={str(path)!r}.")


def _versions() -> dict[str, str]:
    from optimize_loss._version import __version__

    return {"optimize_loss": __version__, "jax": jax.__version__}


def restore(
    path: str | os.PathLike[str],
    like: TrainState,
    *,
    rename: Rename | None = None,
    strict: bool = False,
    numbers: Source = "latest",
    parts: Parts | None = None,
) -> tuple[TrainState, RestoreReport]:
    """Return a state with the leaves of a file, and a report.

    Leaves are matched by name, so you may have added, removed or reordered links since, and
    parameters may be packed or sharded differently. Leaves in the file are restored; all others
    stay as in `like`, except that a slot which copies a parameter, such as an average, starts from
    the restored parameter. Bias corrections such as Adam's count the step, so they do not start
    again for a slot that is added late in training.

    By default, hyperparameters have the `latest` values: those of the code if the code has changed
    since the file was written, otherwise those of the file, which `state.set` may have set. So if
    you edit a learning rate, the new value is used, and a value that was set during the run is
    kept. The report lists the source of each, and there is a warning about each value that was set
    during the run. Files that do not record this count as set during the run. Schedules are code:
    the schedule of the code is always used.

    For a file without a count of batches, the number of updates is used.

    With several processes, all must call it and have access to the file.

    Moments in another `precision` are different slots, and are not converted: they are new and
    start at zero, and those of the file are unused.

    Args:
      path: the path of a file that `save` wrote.
      like: a state with the structure wanted, as `step.init(params)` returns it. It is not changed,
        and you can still use it.
      rename: {name: new name} for parameters and leaves of the model state, or for their first
        parts, as in `{"encoder": "body/encoder"}`. The first match is used, and every key must
        match. Or a function of the name. Slots follow their parameters.
      strict: whether anything new or unused is an error.
      numbers: the source of hyperparameters: the `file`, the `code`, which is `like`, or the
        `latest` of both.
      parts: as for `save`: the state of an object with `set_state` or `load_state_dict` is
        restored. The values of all parts are in the report.

    Returns:
      The state, with the sharding of `like`, and the report.

    Raises:
      CheckpointCorrupt: the file is damaged, cut short or of another kind.
      CheckpointMismatch: a shape, a dtype or the kind of a random key differs; nothing is cast.
        Or the file has no parameter of `like`. With `strict`, something is new or unused.
      CheckpointVersion: the file was written by a newer version.
      InvalidType: an argument is of the wrong kind.
      OSError: the file cannot be read.
      ValueError: `rename` does not match.

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
    check_choice("numbers", numbers, SOURCES)
    parts = check_parts(parts)
    frame = Frame(check_state("like", like))
    with Reader(path) as file:
        leaves = {k: x for k, x in file.entries.items() if not k.startswith(PREFIX)}
        check_processes(parts, file.entries)
        found = renamed(leaves, list(frame.outline), rename, like.chain)
        _check_parameters(path, frame, found)
        _check_kinds(path, file, frame, found)
        built = json.loads(file.metadata.get("numbers", "{}"))
        match = _Match(frame, like, found, Choice(numbers, like, built))
        if strict:
            _check_all_used(path, match.report())  # before all is read
        match.read(file)
        report = match.report()
        if strict:
            _check_all_used(path, report)
        state = frame.state()
    check_present(path, parts, report.parts, strict)
    put_back(parts, report.parts)
    if text := match.choice.warning():
        warnings.warn(text, stacklevel=2)
    return state, report


class _Match:
    """The leaves that a file and a state have in common, while they go from one to the other."""

    def __init__(self, frame: Frame, like: TrainState, found: Mapping[str, str], choice: Choice):
        self.choice = choice
        self._frame = frame
        self._like = like
        self._parts: dict[str, np.ndarray] = {}
        self._found = {file: name for file, name in found.items() if name in frame.outline}
        self._unused = [file for file in found if file not in self._found]
        self._derived = set() if "batches" in self._found.values() else {"batches"}

    def report(self) -> RestoreReport:
        """Return what is known so far."""
        matched = {*self._found.values(), *self._derived}
        names = [*self._frame.outline]
        return RestoreReport(
            matched=tuple(name for name in names if name in matched),
            new=tuple(name for name in names if name not in matched),
            unused=tuple(self._unused),
            from_file=tuple(self.choice.from_file),
            from_code=tuple(self.choice.from_code),
            parts=unpacked(self._parts),
        )

    def read(self, file: Reader) -> None:
        """Put the arrays of a file into the state, and see to it that the new slots fit them."""
        fresh = self._fresh()
        for key, array in file.arrays():
            name = self._found.get(key)
            if key.startswith(PREFIX):
                self._parts[key] = array
            elif name and self.choice.takes(key, name, array, self._frame.get(name)):
                self._frame.put(name, array)
        for name, slot in begun(self._like, self._frame, fresh):
            self._frame.put(name, slot)
        for name in self._derived:  # an older file counts updates alone
            self._frame.put(name, self._frame.get("optimizer/step"))

    def _fresh(self) -> list[str]:
        """Return the new slots that are as a link begins them with the parameters of `like`."""
        return [
            name
            for name, slot in begun(self._like, self._frame, self.report().new)
            if np.array_equal(np.asarray(slot), np.asarray(self._frame.get(name)))
        ]


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
