"""Logs of a run: hooks that write metrics to files and to trackers of experiments.

    from optimize_loss.loggers import JsonLines, Mlflow, Wandb

    state, metrics = step.run(state, batches, hooks=[Wandb(wandb.init(project="mine"), every=100)])

Each logger takes a run of its tracker, so you set the project, name and settings with the tracker
itself; nothing is imported here. `optimize_loss.tensorboard` has the logger for TensorBoard.
"""

import json
import math
import os
from typing import Any

import jax

from optimize_loss._report.logger import Logger as Logger
from optimize_loss._report.logger import scalars

__all__ = ["Aim", "JsonLines", "Logger", "Mlflow", "Wandb"]


class Aim(Logger):
    """Log to a run of Aim. Histograms are skipped.

    Args:
      run: an `aim.Run`.
      every: as for `Logger`.

    Example:
      >>> class Run:  # stands for aim.Run
      ...     def track(self, value, name, step):
      ...         print(step, name, value)
      >>> Aim(Run()).write(7, {"loss": 0.5})
      7 loss 0.5
    """

    def __init__(self, run: Any, every: int | None = 100):
        super().__init__(every)
        self.run = run

    def write_one(self, batch: int, values: dict[str, Any]) -> None:
        """Log one batch.

        Args:
          batch: its number.
          values: by tag.
        """
        for tag, value in scalars(values).items():
            self.run.track(value, name=tag, step=batch)


class JsonLines(Logger):
    """Append one line of JSON for each batch to a file: {"batch": 1, "loss": 0.5, ...}.

    `pandas.read_json(path, lines=True)` reads it. A resumed run appends to it. Histograms are
    skipped, and a value that is not finite is null, as JSON has no NaN.

    Args:
      path: the path of the file; its folder must exist.
      every: as for `Logger`.

    Raises:
      OSError: the file cannot be written.

    Example:
      >>> import pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "log.jsonl"
      >>> with JsonLines(path) as log:
      ...     log.write(2, {"loss": [0.5, 0.25][1]})
      >>> print(path.read_text().strip())
      {"batch": 2, "loss": 0.25}
    """

    def __init__(self, path: str | os.PathLike[str], every: int | None = 100):
        super().__init__(every)
        self._path = path if jax.process_index() == 0 else None
        self._append("" if self._ends_in_a_line() else "\n")

    def write_one(self, batch: int, values: dict[str, Any]) -> None:
        """Append one line, which is in the file when this returns.

        Args:
          batch: its number.
          values: by tag.
        """
        found = {tag: x if math.isfinite(x) else None for tag, x in scalars(values).items()}
        self._append(json.dumps({"batch": batch, **found}, allow_nan=False) + "\n")

    def _ends_in_a_line(self) -> bool:
        """Return whether no line was cut short, as by a killed run."""
        if self._path is None or not os.path.exists(self._path):
            return True
        with open(self._path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - 1, 0))
            return file.read() in (b"", b"\n")

    def _append(self, line: str) -> None:
        if self._path is not None:
            with open(self._path, "a") as file:
                file.write(line)


class Wandb(Logger):
    """Log to a run of Weights & Biases, or of Trackio, which has the same method.

    Histograms are skipped. Both expect batches in order: put it before an `Evaluate` that logs.

    Args:
      run: what `wandb.init(...)` or `trackio.init(...)` returned.
      every: as for `Logger`.

    Example:
      >>> class Run:  # stands for that of wandb
      ...     def log(self, data, step):
      ...         print(step, data)
      >>> Wandb(Run()).write(7, {"loss": [0.5, 0.25][1]})
      7 {'loss': 0.25}
    """

    def __init__(self, run: Any, every: int | None = 100):
        super().__init__(every)
        self.run = run

    def write_one(self, batch: int, values: dict[str, Any]) -> None:
        """Log one batch.

        Args:
          batch: its number.
          values: by tag.
        """
        self.run.log(scalars(values), step=batch)


class Mlflow(Logger):
    """Log to a run of MLflow. Histograms are skipped.

    Args:
      client: `mlflow` itself, for its active run, or an object with its `log_metrics`.
      every: as for `Logger`.

    Example:
      >>> class Client:  # stands for mlflow
      ...     def log_metrics(self, metrics, step):
      ...         print(step, metrics)
      >>> Mlflow(Client()).write(7, {"loss": 0.5})
      7 {'loss': 0.5}
    """

    def __init__(self, client: Any, every: int | None = 100):
        super().__init__(every)
        self.client = client

    def write_one(self, batch: int, values: dict[str, Any]) -> None:
        """Log one batch.

        Args:
          batch: its number.
          values: by tag.
        """
        self.client.log_metrics(scalars(values), step=batch)
