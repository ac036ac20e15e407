"""Results of searches over hyperparameters."""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from optimize_loss import plot
from optimize_loss._checks import NonFiniteError
from optimize_loss._state.train_state import TrainState

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True, eq=False)
class LearningRateTest:
    """The result of a learning-rate range test; made by `TrainStep.find_learning_rate`.

    Attributes:
      rates: the rate of each step taken, equally spaced in the logarithm. Shape (steps,).
      losses: the loss at each step, before its update. Shape (steps,).
      smoothed: the running mean of the losses, without bias. Shape (steps,).
      suggestion: the rate at which the smoothed loss falls most steeply over the logarithm of the
        rate, before its minimum; None if it never falls.
      diverged: whether the test ended because the loss rose or was not finite.
      still_falling: whether the smoothed loss falls most steeply at the highest rate tried. A
        better rate may then be above: the suggestion is only the best of those tried.
      number: the name of the number that was raised; the rates are its values.

    Example:
      >>> import optimize_loss as ol
      >>> step = ol.optimize_loss(lambda p: (p["w"] - 1) ** 2, learning_rate=0.1, optimizer="SGD")
      >>> found = step.find_learning_rate(step.init({"w": 0.0}), [()], lowest=1e-3, highest=0.1)
      >>> found.losses.shape, found.diverged
      ((100,), False)
    """

    rates: np.ndarray
    losses: np.ndarray
    smoothed: np.ndarray
    suggestion: float | None
    diverged: bool
    still_falling: bool = False
    number: str = "learning_rate"

    @property
    def minimum(self) -> float:
        """The rate at which the smoothed loss is least; a tenth of it is another usual choice."""
        return float(self.rates[np.nanargmin(self.smoothed)])

    def plot(self) -> "Figure":
        """Return a matplotlib figure of the loss over the rate, as `ol.plot.learning_rate`."""
        return plot.learning_rate(self)


@dataclasses.dataclass(frozen=True, eq=False)
class Sweep:
    """The runs of a sweep; made by `TrainStep.sweep`.

    Attributes:
      points: for each run, its numbers by name, and its `seed` where there are seeds.
      losses: the loss at each step, before its update. Shape (points, steps).
      metrics: {tag: array}, as numpy arrays of shape (points, steps, ...).
      states: the states after the last step, as one whose arrays have a first axis of points.

    Example:
      >>> import jax.numpy as jnp, optimize_loss as ol
      >>> step = ol.optimize_loss(
      ...     lambda p, x: (p["w"] - x) ** 2, learning_rate=0.1, optimizer="SGD")
      >>> found = step.sweep(step.init({"w": 0.0}), jnp.ones(20), learning_rate=[0.01, 0.1])
      >>> found.points[found.best]
      {'learning_rate': 0.1}
    """

    points: tuple[dict[str, Any], ...]
    losses: np.ndarray
    metrics: dict[str, Any]
    states: TrainState

    @property
    def final(self) -> np.ndarray:
        """The mean loss of each run over the last tenth of its steps. Shape (points,)."""
        last = max(1, self.losses.shape[1] // 10)
        return self.losses[:, -last:].astype(np.float64).mean(axis=1)

    @property
    def best(self) -> int:
        """The index of the run with the least `final` loss; runs that are not finite do not count.

        Raises:
          NonFiniteError: no run has a finite loss.
        """
        finite = np.where(np.isfinite(self.final), self.final, np.inf)
        if np.isinf(finite).all():
            raise NonFiniteError(
                f"None of the {len(self.points)} runs of the sweep ended with a finite loss. This "
                "is usually rates that are all too high."
            )
        return int(finite.argmin())

    def state(self, point: int | None = None) -> TrainState:
        """Return the final state of one run, by default of the best one.

        Args:
          point: the index of the run in `points`; negative numbers count from the end.

        Raises:
          IndexError: there is no such run.
          NonFiniteError: `point` is not given, and no run has a finite loss.
        """
        point = self.best if point is None else point
        if point not in range(-len(self.points), len(self.points)):
            raise IndexError(
                f"`point` must be below {len(self.points)}, the number of runs. "
                f"Received: point={point!r}."
            )
        return jax.tree.map(lambda x: x[point], self.states)

    def plot(self) -> "Figure":
        """Return a matplotlib figure of the loss over each number, as `ol.plot.sweep`."""
        return plot.sweep(self)
