"""A folder of checkpoints, which keeps the newest files, and restores the newest intact one."""

import contextlib
import json
import math
import os
import pathlib
import re
import warnings
from collections.abc import Mapping
from typing import Any, Literal

from optimize_loss._checks import (
    AT_LEAST_1,
    CheckpointCorrupt,
    CheckpointVersion,
    InvalidType,
    check_choice,
    check_flags,
    check_integer,
    received,
)
from optimize_loss._files.atomic import sweep
from optimize_loss._files.checkpoint import RestoreReport, restore, write_state
from optimize_loss._files.choice import Source
from optimize_loss._files.match import Rename
from optimize_loss._files.named import check_state, first_process
from optimize_loss._files.parts import Parts, check_parts
from optimize_loss._files.safetensors import Reader
from optimize_loss._state.hook import Hook, mean_of
from optimize_loss._state.train_state import TrainState

_NAME = re.compile(r"step_(0|[1-9]\d*)\.safetensors")


class Checkpoints(Hook):
    """Keep the newest checkpoints of a run in a folder, and resume from the newest intact one.

    The files are `step_<n>.safetensors`, where n is the global step, or the number of updates if
    the global step does not advance. No other file is touched. A file with such a name is not
    deleted if its header is damaged, or if another program wrote it. As a hook of `TrainStep.run`,
    it saves every n batches and at the end of the run: `step.run(state, batches,
    hooks=[checkpoints])`.

    Args:
      folder: the folder of the files; created if it does not exist.
      keep: how many of the newest files to keep, at least 1.
      every: as a hook, it saves when `state.batches` is a multiple of this, at least 1. None to
        save only at the end of a run.
      at_end: whether to save also at the end of a run.
      parts: what else to save, as for `optimize_loss.save`: {"data": iterator} saves the position
        in the data, and `resume` restores it. When a hook is called, the run has used every batch
        that it has read, so the position matches the state.
      best: if given, the tag of a metric: as a hook, it saves only if this metric is better than in
        its newest file; of several batches, the mean is used. So the newest file is the best one.
      mode: whether a lower metric is better, `min`, or a higher one, `max`.

    Raises:
      InvalidType: an argument is of the wrong kind.
      OSError: the folder cannot be created.
      ValueError: an argument is out of range.

    Example:
      >>> import optimize_loss as ol, tempfile
      >>> step = ol.optimize_loss(lambda p, x: p["w"] * x, learning_rate=1.0, optimizer="SGD")
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     checkpoints = ol.Checkpoints(folder, keep=2, every=2)
      ...     state, _ = step.run(step.init({"w": 9.0}), [1.0] * 7, hooks=[checkpoints])
      ...     state, report = checkpoints.newest(like=step.init({"w": 0.0}))
      ...     steps = checkpoints.steps
      >>> print(steps, state.step, state.params["w"])
      (6, 7) 7 2.0
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        keep: int = 3,
        every: int | None = 1000,
        at_end: bool = True,
        *,
        parts: Parts | None = None,
        best: str | None = None,
        mode: Literal["min", "max"] = "min",
    ):
        if not isinstance(folder, str | os.PathLike):
            raise InvalidType(
                f"`folder` must be the path of a folder. {received('folder', folder)}"
            )
        self.keep = check_integer("keep", keep, AT_LEAST_1)
        self.every = None if every is None else check_integer("every", every, AT_LEAST_1)
        check_flags(at_end=at_end)
        self.at_end = at_end
        self.parts = check_parts(parts)
        if best is not None and not isinstance(best, str):
            raise InvalidType(f"`best` must be the tag of a metric. {received('best', best)}")
        self.best = best
        self._sign = {"min": 1, "max": -1}[check_choice("mode", mode, ("min", "max"))]
        self.folder = pathlib.Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._done: tuple[int, int] | None = None  # the step and batches saved or restored last

    def __repr__(self) -> str:
        return f"Checkpoints({str(self.folder)!r}, keep={self.keep}, every={self.every})"

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps with a file, in order; a file may be damaged."""
        found = ((_NAME.fullmatch(entry.name), entry) for entry in os.scandir(self.folder))
        return tuple(sorted(int(m[1]) for m, x in found if m and x.is_file(follow_symlinks=False)))

    def path(self, step: int) -> pathlib.Path:
        """Return the path of the file of a step, whether or not it exists.

        Args:
          step: the global step.
        """
        return self.folder / f"step_{step}.safetensors"

    def save(self, state: TrainState, metric: float | None = None) -> pathlib.Path:
        """Write a file for this step, then delete all but the newest ones.

        The new file is always kept. There is a warning if there are files of later steps, because
        `newest` would return one of those.

        Args:
          state: what to write; its step is in the name of the file.
          metric: the value that decides which file is best; None if `best` is not used.

        Returns:
          The path of the file, which is on the disk.

        Raises:
          As `optimize_loss.save`; nothing is deleted then.
        """
        step = _step(check_state("state", state))
        path = self.path(step)
        notes = {} if metric is None else {"metric": json.dumps(metric)}
        write_state(path, state, self.parts, notes)
        self._done = step, int(state.batches)
        if first_process():
            self._clean(step)
        return path

    def _clean(self, step: int) -> None:
        sweep(self.folder, "step_*.safetensors")
        steps = self.steps
        if later := [n for n in steps if n > step]:
            warnings.warn(
                f"There are files of later steps than {step} in {str(self.folder)!r}: {later}. "
                "`newest` returns the last of them. Delete them, or use another folder.",
                stacklevel=3,
            )
        for old in steps[: -self.keep]:
            if old != step and _is_ours(self.path(old)):
                self.path(old).unlink(missing_ok=True)

    def resume(
        self,
        state: TrainState,
        *,
        rename: Rename | None = None,
        strict: bool = False,
        numbers: Source = "latest",
    ) -> TrainState:
        """Return the state of the newest intact file, or `state` if there is no file.

        The `parts` are restored, too.

        Args:
          state: the start of a new run, such as `step.init(params)`.
          rename: as for `optimize_loss.restore`.
          strict: as there.
          numbers: as there.

        Raises:
          As `newest`.
        """
        found = self.newest(state, rename=rename, strict=strict, numbers=numbers)
        return state if found is None else found[0]

    def newest(
        self,
        like: TrainState,
        *,
        rename: Rename | None = None,
        strict: bool = False,
        numbers: Source = "latest",
    ) -> tuple[TrainState, RestoreReport] | None:
        """Restore the newest intact file; None if the folder has no file.

        A damaged file is skipped with a warning that names it. Warnings about hyperparameters are
        those of `optimize_loss.restore`. With several processes, all must see the same folder.

        Args:
          like: as for `optimize_loss.restore`.
          rename: as there.
          strict: as there; a damaged file is then an error as well.
          numbers: as there.

        Raises:
          CheckpointCorrupt: all files are damaged; or, with `strict`, the newest one is.
          As `optimize_loss.restore`.
        """
        steps = self.steps
        for step in reversed(steps):
            try:
                found = restore(
                    self.path(step),
                    like,
                    rename=rename,
                    strict=strict,
                    numbers=numbers,
                    parts=self.parts,
                )
            except FileNotFoundError:  # the run that writes has newer ones by now
                return self.newest(like, rename=rename, strict=strict, numbers=numbers)
            except CheckpointCorrupt as error:
                if strict:
                    raise
                warnings.warn(f"A checkpoint is skipped. {error}", stacklevel=2)
                continue
            self._done = step, int(found[0].batches)
            return found
        if steps:
            raise CheckpointCorrupt(
                f"`folder` must have an intact checkpoint: those of steps {[*steps]} are "
                f"damaged. Move them away to begin again. Received: folder={str(self.folder)!r}."
            )
        return None

    def __call__(self, state: TrainState, metrics: Any = None) -> None:
        """Save, unless this state was just saved or restored.

        Args:
          state: as for `save`.
          metrics: with `best`, they must have this tag.

        Raises:
          As `save`.
        """
        step = _step(check_state("state", state))
        if self.best is not None:
            self._save_if_best(state, metrics)
        elif (step, int(state.batches)) != self._done:
            self.save(state)

    def _save_if_best(self, state: TrainState, metrics: Mapping[str, Any]) -> None:
        value = mean_of(metrics, str(self.best))
        if math.isfinite(value) and self._sign * value < self._sign * self._least():
            self.save(state, value)

    def _least(self) -> float:
        """Return the metric of the newest intact file; the worst possible one without a file."""
        for step in reversed(self.steps):
            with contextlib.suppress(CheckpointCorrupt, OSError), Reader(self.path(step)) as file:
                return json.loads(file.metadata.get("metric", f"{self._sign}e999"))
        return self._sign * math.inf


def _is_ours(path: pathlib.Path) -> bool:
    """Return whether `save` wrote a file, as its header tells."""
    try:
        with Reader(path):
            return True
    except (CheckpointCorrupt, CheckpointVersion, OSError):
        return False


def _step(state: TrainState) -> int:
    """Return the number in the name of a file: the global step, or the updates made."""
    return int(state.step if state.increment_step else state.packed_optimizer["step"])
