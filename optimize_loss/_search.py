"""Searches over hyperparameters: a learning-rate range test, and sweeps of states side by side."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optimize_loss._batches import Source, check_batches
from optimize_loss._checks import (
    DECAY,
    POSITIVE,
    InvalidType,
    NonFiniteError,
    Rule,
    check_integer,
    check_number,
    received,
)
from optimize_loss._found import LearningRateTest, Sweep
from optimize_loss._grid import Grid, stacked, starts
from optimize_loss._state import TrainState
from optimize_loss.schedules import Decayed

ABOVE_1 = Rule("above 1", lambda x: x > 1)
Advance = Callable[[Any, TrainState, Any], tuple[TrainState, dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Ramp:
    """The options of a range test, checked."""

    rates: np.ndarray
    smoothing: float
    divergence: float
    number: str


def check_ramp(
    lowest: Any, highest: Any, steps: Any, smoothing: Any, divergence: Any, number: Any
) -> Ramp:
    """Return the options of a range test.

    Raises:
      InvalidType: one is of the wrong kind.
      ValueError: one is out of range.
    """
    lowest = check_number("lowest", lowest, POSITIVE)
    highest = check_number("highest", highest, POSITIVE)
    if highest <= lowest:
        raise ValueError(
            f"`highest` must be above `lowest`, {lowest}. {received('highest', highest)}"
        )
    if not isinstance(number, str):
        raise InvalidType(f"`number` must be a name. {received('number', number)}")
    rule = Rule("an integer of at least 3", lambda x: x >= 3, kind="count")
    return Ramp(
        rates=np.geomspace(lowest, highest, check_integer("steps", steps, rule)),
        smoothing=check_number("smoothing", smoothing, DECAY),
        divergence=check_number("divergence", divergence, ABOVE_1),
        number=number,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Search:
    """The programs of searches; they live as long as this object.

    Attributes:
      advance: the function that takes one step, while being traced.
      many: the function that takes several, with stacked batches.
      loss: the tag of the loss among the metrics.
    """

    advance: Advance
    many: Advance
    loss: str

    def find_learning_rate(
        self, shardings: Any, state: TrainState, batches: Any, ramp: Ramp
    ) -> LearningRateTest:
        """Return what the losses are while the rate rises."""
        _check_not_traced(state, "find_learning_rate")
        _check_rate(state, ramp)
        count, gathered = _gathered(batches, len(ramp.rates))
        options = (ramp.rates.astype(np.float32), ramp.smoothing, ramp.divergence)
        taken, diverged, losses, smoothed = jax.device_get(
            self._ramp(shardings, ramp.number, count, state, gathered, options)
        )
        if not np.isfinite(losses[0]):
            raise NonFiniteError(
                "The loss must be finite before the first update of a range test. Received: "
                f"{losses[0]}, which no rate has a part in: look at the state and the batches."
            )
        kept = slice(int(taken))
        rates, smoothed = ramp.rates[kept], smoothed[kept]
        found = _steepest(rates, smoothed, ramp.smoothing)
        return LearningRateTest(rates, losses[kept], smoothed, found, bool(diverged))

    def sweep(
        self, shardings: Any, state: TrainState, batches: tuple[Any, ...], grid: Grid
    ) -> Sweep:
        """Return the runs of all points."""
        _check_not_traced(state, "sweep")
        axes, leaves = stacked([jax.tree.leaves(each) for each in starts(state, grid)])
        points, structure = len(grid.points), jax.tree.structure(state)
        states, metrics = self._sweep(shardings, (structure, axes, points), leaves, batches)
        metrics = jax.device_get(metrics)
        return Sweep(grid.points, metrics[self.loss], metrics, states)

    @functools.cached_property
    def _ramp(self) -> Any:
        return jax.jit(self._trace_ramp, static_argnums=(0, 1, 2))

    @functools.cached_property
    def _sweep(self) -> Any:
        return jax.jit(self._trace_sweep, static_argnums=(0, 1))

    def _trace_ramp(
        self, shardings: Any, number: str, count: int, state: TrainState, batches: Any, options: Any
    ) -> Any:
        """Take steps until the rates end or the loss diverges, while being traced.

        Returns:
          How many steps were taken, whether the loss diverged, the losses and the smoothed ones.
        """
        rates, smoothing, divergence = options
        steps = len(rates)

        def goes_on(carry: Any) -> jax.Array:
            i, diverged, *_ = carry
            return (i < steps) & ~diverged

        def take(carry: Any) -> Any:
            i, _, losses, smoothed, mean, least, state = carry
            batch = jax.tree.map(lambda x: x[i % count], batches)
            state, metrics = self.advance(shardings, state.set(**{number: rates[i]}), batch)
            loss = metrics[self.loss].astype(jnp.float32)
            mean = smoothing * mean + (1 - smoothing) * loss
            unbiased = mean / (1 - smoothing ** (i + 1).astype(jnp.float32))
            least = jnp.minimum(least, unbiased)
            bound = least + (divergence - 1) * jnp.abs(least)
            diverged = ~jnp.isfinite(loss) | (unbiased > bound)
            losses, smoothed = losses.at[i].set(loss), smoothed.at[i].set(unbiased)
            return i + 1, diverged, losses, smoothed, mean, least, state

        zero, curve = jnp.float32(0), jnp.zeros(steps, jnp.float32)
        start = (jnp.int32(0), jnp.bool_(False), curve, curve, zero, jnp.float32(jnp.inf), state)
        return jax.lax.while_loop(goes_on, take, start)[:4]

    def _trace_sweep(self, shardings: Any, form: Any, leaves: list[Any], batches: Any) -> Any:
        """Take the steps of all points, while being traced."""
        structure, axes, points = form

        def run(leaves: list[Any]) -> Any:
            return self.many(shardings, jax.tree.unflatten(structure, leaves), batches)

        return jax.vmap(run, in_axes=(list(axes),), axis_size=points)(leaves)


def _check_not_traced(state: TrainState, what: str) -> None:
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(state)):
        raise InvalidType(
            f"`state` must not be traced by jit or vmap: `{what}` returns numpy arrays."
        )


def _check_rate(state: TrainState, ramp: Ramp) -> None:
    """Raise unless the rate is a number of the state, and all that decides on the rate."""
    chain, number = state.chain, ramp.number
    try:
        owner, name = chain.find(number)
    except ValueError as error:
        raise ValueError(
            f"`number` must be one of the state, to which `state.set({number}=...)` gives a value. "
            "An optax transformation has its rate built in: stand it in a chain with a "
            f"`rate=ScaleByLearningRate(...)` of its own. {error}"
        ) from error
    for rate in (ramp.rates[0], ramp.rates[-1]):
        state.set(**{number: rate})
    if isinstance(chain.link(owner).numbers()[name], Decayed):
        raise ValueError(
            "`find_learning_rate` must be called on a step without `learning_rate_decay_fn`, which "
            "would change each rate that is tried: build one without it for the test."
        )
    lowered = [n for n, _ in chain.links if name in getattr(chain.link(n), "lowers", ())]
    if lowered:
        raise ValueError(
            f"`find_learning_rate` must be called on a step without {lowered[0]!r}, which would "
            "change the rates that are tried: build one without it for the test."
        )


def _gathered(batches: Any, most: int) -> tuple[int, tuple[Any, ...]]:
    """Return how many batches there are, and at most so many of them, stacked."""
    check_batches(batches)
    source = Source(batches, None)
    call = source.gather(most)
    source.raise_error()
    if call is None:
        raise ValueError("`batches` must hold a batch: it is empty, or an iterator at its end.")
    if call.steps < most and source.gather(1) is not None:
        raise ValueError(
            f"`batches` must have one shape: the first {call.steps} do, the next does not. Leave "
            "out a smaller one at the end, or ask for fewer `steps`."
        )
    source.raise_error()
    if call.steps == 1:
        return 1, jax.tree.map(lambda x: jnp.asarray(x)[None], call.parts)
    return call.steps, call.parts


def _steepest(rates: np.ndarray, smoothed: np.ndarray, smoothing: float) -> float | None:
    """Return the rate at which the curve falls most steeply before its minimum, or None.

    The running mean is one of some n = 1 / (1 - smoothing) losses. Slopes are taken over as many
    steps, n / 2 to each side, so that the noise of single batches does not decide. The first n
    steps, in which the mean has few losses yet, are left out. n is at most a quarter of all steps.
    """
    curve, logs = smoothed.astype(np.float64), np.log(rates)
    width = min(round(1 / (1 - smoothing)), len(rates) // 4)
    last, half = int(np.nanargmin(curve)), max(1, width // 2)
    if last - width < 1:
        return None
    at = np.arange(width, last + 1)
    low, high = np.maximum(at - half, 0), np.minimum(at + half, last)
    slopes = (curve[high] - curve[low]) / (logs[high] - logs[low])
    best = int(slopes.argmin())
    return float(rates[at[best]]) if slopes[best] < 0 else None
