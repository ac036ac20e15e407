"""Hooks around a step: evaluation, early stopping, and a profile."""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import jax

from optimize_loss._checks import (
    AT_LEAST_1,
    NOT_NEGATIVE,
    InvalidType,
    StopRun,
    check_choice,
    check_flags,
    check_integer,
    check_number,
    received,
)
from optimize_loss._state.hook import Hook, check_hooks, mean_of
from optimize_loss._state.train_state import TrainState
from optimize_loss._step.step import Step


class Evaluate(Hook):
    """Evaluate a state every n batches, and pass the result to other hooks.

    Args:
      step: the step whose `evaluate` is called.
      batches: what to evaluate on: an iterable that can be iterated again, such as a list or a
        loader; or a function without arguments that returns an iterable.
      every: the number of batches between two evaluations, at least 1; None to evaluate only at the
        end of a run.
      loss: as for `step.evaluate`.
      name: the prefix of the tags of the result, before a "/".
      then: hooks that are called each time, in order, with the state and the result as metrics:
        loggers, `Checkpoints(best=...)`, `StopEarly`.
      at_end: whether to evaluate also at the end of a run.

    Attributes:
      latest: the last result; empty before the first evaluation.

    Raises:
      InvalidType: an argument is of the wrong kind, or `batches` is an iterator.
      ValueError: `every` is below 1.

    Example:
      >>> import optimize_loss as ol
      >>> step = ol.optimize_loss(lambda p, x: p["w"] * x, learning_rate=1.0, optimizer="SGD")
      >>> show = ol.every(1, lambda state, metrics: print(state.batches, metrics))
      >>> evaluate = ol.Evaluate(step, [1.0, 3.0], every=2, then=[show])
      >>> state, _ = step.run(step.init({"w": 9.0}), [1.0] * 3, hooks=[evaluate])
      2 {'eval/loss': np.float64(14.0)}
      3 {'eval/loss': np.float64(12.0)}
    """

    def __init__(
        self,
        step: Step,
        batches: Iterable[Any] | Callable[[], Iterable[Any]],
        every: int | None,
        *,
        loss: Callable[..., Any] | None = None,
        name: str = "eval",
        then: Iterable[Hook] = (),
        at_end: bool = True,
    ):
        if isinstance(batches, Iterator):
            raise InvalidType(
                "`batches` must be iterable again and again: a list, a loader, or a function that "
                f"returns an iterator. {received('batches', batches)}"
            )
        check_flags(at_end=at_end)
        self.every = None if every is None else check_integer("every", every, AT_LEAST_1)
        self.at_end = at_end
        self.latest: dict[str, Any] = {}
        self._step, self._batches, self._loss, self._name = step, batches, loss, name
        self._then = check_hooks("then", then)

    def __call__(self, state: TrainState, metrics: dict[str, Any]) -> TrainState | None:
        """Evaluate, and call the hooks in `then`.

        Args:
          state: what to evaluate.
          metrics: not used.

        Raises:
          StopRun: a hook in `then` ends the run; the others are called first.
        """
        batches: Any = self._batches() if callable(self._batches) else self._batches
        found = self._step.evaluate(state, batches, loss=self._loss)
        self.latest = {f"{self._name}/{tag}": value for tag, value in found.items()}
        stop = None
        for hook in self._then:
            try:
                state = hook(state, self.latest) or state
            except StopRun as error:
                stop = error
        if stop is not None:
            raise stop
        return state


class StopEarly(Hook):
    """End a run when a metric has stopped improving.

    It can be a part of a checkpoint, so that a resumed run continues its count.

    Args:
      metric: the tag of the metric; of several batches, the mean is used.
      patience: how many calls in a row may pass without an improvement, at least 1.
      mode: whether less is better, `min`, or more, `max`.
      change: the least improvement that counts, at least 0.
      every: how often it reads the metrics of a run, in batches; None in `then` of `Evaluate`,
        which calls it each time.

    Raises:
      InvalidType, ValueError: an argument is of the wrong kind, or out of range.

    Example:
      >>> import optimize_loss as ol
      >>> step = ol.optimize_loss(lambda p, x: p["w"] * x, learning_rate=1.0, optimizer="SGD")
      >>> state, metrics = step.run(
      ...     step.init({"w": 3.0}), [1.0] * 6,
      ...     hooks=[ol.StopEarly("loss", patience=2, mode="max", every=1)])
      >>> print(metrics["loss"])
      [3. 2. 1.]
    """

    at_end = False

    def __init__(
        self,
        metric: str,
        patience: int,
        *,
        mode: Literal["min", "max"] = "min",
        change: float = 0.0,
        every: int | None = None,
    ):
        if not isinstance(metric, str):
            raise InvalidType(f"`metric` must be the tag of a metric. {received('metric', metric)}")
        self.metric = metric
        self.patience = check_integer("patience", patience, AT_LEAST_1)
        self.change = check_number("change", change, NOT_NEGATIVE)
        self.every = None if every is None else check_integer("every", every, AT_LEAST_1)
        self._sign = {"min": 1, "max": -1}[check_choice("mode", mode, ("min", "max"))]
        self._best, self._waited = math.inf, 0

    def get_state(self) -> dict[str, Any]:
        """Return the best value and the count, for a checkpoint."""
        return {"best": self._best, "waited": self._waited}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from a saved best value and count.

        Args:
          state: what `get_state` returned.
        """
        self._best, self._waited = float(state["best"]), int(state["waited"])

    def __call__(self, state: TrainState, metrics: dict[str, Any]) -> None:
        """Look at the metric.

        Args:
          state: not used.
          metrics: they must have this tag.

        Raises:
          StopRun: it has not become better for too long.
        """
        value = self._sign * mean_of(metrics, self.metric)
        if value < self._best - self.change:
            self._best, self._waited = value, 0
            return
        self._waited += 1
        if self._waited >= self.patience:
            raise StopRun(
                f"{self.metric!r} has not become better than {self._sign * self._best} in "
                f"{self._waited} calls."
            )


class Profile(Hook):
    """Record what happens between two batches of a run, for TensorBoard, XProf or Perfetto.

    The operations carry the names of the links. Start after the first batches, which compile.

    Args:
      folder: the folder to write the profile to.
      start: the batch after which it starts, at least 1, counted by `state.batches`.
      stop: the batch after which it ends, above `start`.

    Raises:
      InvalidType: an argument is of the wrong kind.
      ValueError: `start` is below 1, or `stop` not above it.

    Example:
      >>> import optimize_loss as ol, tempfile
      >>> profile = ol.Profile(tempfile.mkdtemp(), start=10, stop=13)
      >>> print(profile.wait(0), profile.wait(10), profile.wait(13))
      10 3 None
    """

    def __init__(self, folder: str | os.PathLike[str], start: int, stop: int):
        self.folder = os.fspath(folder)
        self.start = check_integer("start", start, AT_LEAST_1)
        self.stop = check_integer("stop", stop, AT_LEAST_1)
        if self.stop <= self.start:
            raise ValueError(f"`stop` must be above `start`. Received: {start=}, {stop=}.")
        self._running = False

    def wait(self, batches: int) -> int | None:
        """Return after how many more batches the profile begins or ends.

        Args:
          batches: how many have been taken.
        """
        return next((n - batches for n in (self.start, self.stop) if n > batches), None)

    def __call__(self, state: TrainState, metrics: dict[str, Any]) -> None:
        """Begin, or end, once the device has done all before.

        Args:
          state: reached now; it is waited for.
          metrics: not used.
        """
        jax.block_until_ready(state)
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
        elif int(jax.device_get(state.batches)) == self.start:
            self._running = True
            jax.profiler.start_trace(self.folder)
