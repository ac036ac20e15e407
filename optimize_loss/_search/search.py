"""Searches over hyperparameters: a learning-rate range test, and sweeps of states side by side."""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optimize_loss._checks import InvalidType, NonFiniteError
from optimize_loss._engine.transfers import asked_for
from optimize_loss._search.range_test import Ramp, check_rate, gathered, steepest
from optimize_loss._search.results import LearningRateTest, Sweep
from optimize_loss._search.sweep import Grid, stacked, starts
from optimize_loss._state.batches import refusal
from optimize_loss._state.train_state import TrainState

_STILL_FALLING = (
    "The loss still falls most steeply at the highest rate tried, {}, so that the best one may be "
    "above: call again with a greater `highest` before you trust the `suggestion`."
)
Advance = Callable[[Any, TrainState, Any], tuple[TrainState, dict[str, Any]]]


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
        _check_not_traced("state", state, "find_learning_rate")
        check_rate(state, ramp)
        rates = ramp.rates
        count, batches = gathered(batches, len(rates))
        _check_not_traced("batches", batches, "find_learning_rate")
        form = (shardings, ramp.number, count)
        options = (rates.astype(np.float32), float(ramp.smoothing), float(ramp.divergence))
        with asked_for():
            found = self._ramp(form, state, batches, options)
        taken, diverged, losses, smoothed = jax.device_get(found)
        if not np.isfinite(losses[0]):
            raise NonFiniteError(
                "The loss must be finite before the first update of a range test. Received: "
                f"{losses[0]}, which no rate has a part in: look at the state and the batches."
            )
        kept = slice(int(taken))
        rates, losses, smoothed = rates[kept], losses[kept], smoothed[kept]
        suggestion, at_end = steepest(rates, smoothed, ramp.smoothing)
        falling, diverged = at_end and not diverged, bool(diverged)
        if falling:
            warnings.warn(_STILL_FALLING.format(ramp.highest), stacklevel=3)
        return LearningRateTest(rates, losses, smoothed, suggestion, diverged, falling, ramp.number)

    def sweep(
        self, shardings: Any, state: TrainState, batches: tuple[Any, ...], grid: Grid
    ) -> Sweep:
        """Return the runs of all points."""
        _check_not_traced("state", state, "sweep")
        _check_not_traced("batches", batches, "sweep")
        with asked_for():
            axes, leaves = stacked([jax.tree.leaves(each) for each in starts(state, grid)])
        points, structure = len(grid.points), jax.tree.structure(state)
        try:
            states, metrics = self._sweep(shardings, (structure, axes, points), leaves, batches)
        except TypeError as error:
            if (refused := refusal(error, batches, stacked=True)) is None:
                raise
            raise refused from error
        metrics = jax.device_get(metrics)
        return Sweep(grid.points, metrics[self.loss], metrics, states)

    @functools.cached_property
    def _ramp(self) -> Any:
        return jax.jit(self._trace_ramp, static_argnums=0)

    @functools.cached_property
    def _sweep(self) -> Any:
        return jax.jit(self._trace_sweep, static_argnums=(0, 1))

    def _trace_ramp(self, form: Any, state: TrainState, batches: Any, options: Any) -> Any:
        """Take steps until the rates end or the loss diverges, while being traced.

        Returns:
          How many steps were taken, whether the loss diverged, the losses and the smoothed ones.
        """
        shardings, number, count = form
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


def _check_not_traced(name: str, tree: Any, caller: str) -> None:
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree)):
        raise InvalidType(
            f"`{name}` must not be traced by jit or vmap: `{caller}` returns numpy arrays."
        )
