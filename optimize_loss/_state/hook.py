"""Hooks: functions that a run calls between batches, and at its end."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from optimize_loss._checks import (
    AT_LEAST_1,
    InvalidType,
    check_flags,
    check_integer,
    check_takes,
    nearest,
)
from optimize_loss._state.train_state import TrainState

Function = Callable[[TrainState, dict[str, Any]], TrainState | None]


class Hook:
    """A function that `TrainStep.run` calls every n batches, and at the end of a run.

    Subclass it and write `__call__`, or make one from a function with `optimize_loss.every(n,
    function)`.

    Attributes:
      every: the number of batches between two calls, counted by `state.batches`: with 100, it is
        called after batches 100, 200, and so on. So a resumed run calls it at the same batches as
        an uninterrupted one. None to call it only at the end.
      at_end: whether it is also called at the end of a run, unless it was just called. A run ends
        after the last batch or step, or when a hook stops it, but an exception is not an end.

    Example:
      >>> import optimize_loss as ol
      >>> class Show(ol.Hook):
      ...     every = 2
      ...     def __call__(self, state, metrics):
      ...         print(state.batches, metrics["loss"])
      >>> step = ol.optimize_loss(lambda p, x: p["w"] * x, learning_rate=1.0, optimizer="SGD")
      >>> state, _ = step.run(step.init({"w": 10.0}), [1.0] * 5, hooks=[Show()])
      2 [10.  9.]
      4 [8. 7.]
      5 [6.]
    """

    every: int | None = None
    at_end: bool = True

    def wait(self, batches: int) -> int | None:
        """Return the number of batches until the next call, at least 1; None for never.

        Args:
          batches: the number of batches so far: `state.batches`.
        """
        return None if self.every is None else self.every - batches % self.every

    def __call__(self, state: TrainState, metrics: dict[str, Any]) -> TrainState | None:
        """Look at a run.

        Args:
          state: reached now. The next step takes its memory: `state.copy()` is what to keep.
          metrics: those of the batches since the last call in this run, stacked along a first
            axis, as numpy arrays.

        Returns:
          The state to go on with; None for the same one.

        Raises:
          StopRun: to end the run here.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Every(Hook):
    every: int | None
    function: Function
    at_end: bool

    def __call__(self, state: TrainState, metrics: dict[str, Any]) -> TrainState | None:
        return self.function(state, metrics)


def every(n: int, function: Function, *, at_end: bool = False) -> Hook:
    """Return a hook that calls a function of (state, metrics) every `n` batches.

    Args:
      n: the number of batches between two calls, at least 1, counted by `state.batches`.
      function: like `Hook.__call__`.
      at_end: whether to call it also at the end of a run, unless it was just called.

    Raises:
      InvalidType: an argument is of the wrong kind.
      ValueError: `n` is below 1.

    Example:
      >>> import optimize_loss as ol
      >>> step = ol.optimize_loss(lambda p, x: p["w"] * x, learning_rate=1.0, optimizer="SGD")
      >>> halve = lambda state, metrics: state.set(learning_rate=metrics["learning_rate"][-1] / 2)
      >>> state, metrics = step.run(step.init({"w": 9.0}), [1.0] * 5, hooks=[ol.every(2, halve)])
      >>> print(metrics["learning_rate"])
      [1.   1.   0.5  0.5  0.25]
    """
    rule = "`function` must be a function of (state, metrics)."
    if not callable(function):
        raise InvalidType(f"{rule} Received: {function!r} of type {type(function).__name__}.")
    check_takes(rule, function, None, {})
    check_flags(at_end=at_end)
    n = check_integer("n", n, AT_LEAST_1)
    return _Every(every=n, function=function, at_end=at_end)


def mean_of(metrics: Mapping[str, Any], tag: str) -> float:
    """Return the mean of a metric, of one batch or of several.

    Raises:
      ValueError: there is no such metric.
    """
    if tag not in metrics:
        raise ValueError(
            f"A hook must be called with the metric {tag!r}. Received: {[*metrics][:20]}. "
            f"Nearest: {nearest(tag, metrics)}."
        )
    return float(np.mean(np.asarray(metrics[tag], np.float64)))


def check_hooks(name: str, hooks: Any) -> tuple[Hook, ...]:
    """Return hooks as a tuple.

    Raises:
      InvalidType: they are no list of hooks.
    """
    given = tuple(hooks) if isinstance(hooks, Iterable) else (hooks,)
    for hook in given:
        if not isinstance(hook, Hook):
            raise InvalidType(
                f"`{name}` must be a list of hooks, such as `[ol.every(100, function)]` or "
                f"`[ol.Checkpoints(folder, every=100)]`. "
                f"Received: {hook!r:.200} of type {type(hook).__name__} in it."
            )
    return given


def check_called(name: str, hooks: Any) -> tuple[Hook, ...]:
    """Return the hooks of a run as a tuple.

    Raises:
      InvalidType: they are no list of hooks.
      ValueError: a run would never call one of them.
    """
    given = check_hooks(name, hooks)
    for hook in given:
        if hook.every is None and not hook.at_end and type(hook).wait is Hook.wait:
            raise ValueError(
                f"`{name}` must have hooks that a run calls. Received: {type(hook).__name__} "
                "with every=None. Give it an `every`, or put it in `then` of an `Evaluate`."
            )
    return given
