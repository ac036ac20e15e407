"""The means of losses and their metrics over batches, without a step."""

import collections
import contextlib
import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optimize_loss._engine.transfers import asked_for
from optimize_loss._state.batches import Source, check_batches, check_sharding
from optimize_loss._state.loss import Loss
from optimize_loss._state.train_state import TrainState

IN_FLIGHT = 2  # batches whose results were not fetched yet


class Means:
    """Weighted means of trees of numbers, summed in float64."""

    def __init__(self):
        self._weight = 0.0
        self._sums: Any = None

    def add(self, values: Any, weight: Any) -> None:
        """Add the means over one batch."""
        weight = float(np.asarray(weight))
        new = jax.tree.map(lambda x: weight * np.asarray(x, np.float64), values)
        self._weight += weight
        self._sums = new if self._sums is None else jax.tree.map(np.add, self._sums, new)

    def result(self) -> dict[str, Any]:
        """Return the means over all.

        Raises:
          ValueError: there was nothing to evaluate.
        """
        if not self._weight:
            raise ValueError(
                "`batches` must hold a batch of some weight: it is empty, or an iterator at its "
                "end."
            )
        return jax.tree.map(lambda x: np.asarray(x / self._weight)[()], self._sums)


class Evaluated(NamedTuple):
    """A loss to evaluate.

    Attributes:
      prefix: the prefix of the names of its means.
      loss: the loss.
      key: from which it has a random key for each batch; None for none.
    """

    prefix: str
    loss: Loss
    key: Any


def evaluate(
    losses: Sequence[Evaluated], state: TrainState, batches: Iterable[Any], sharding: Any
) -> dict[str, Any]:
    """Return the means of losses and their metrics over batches.

    Raises:
      ValueError: a loss takes what the state does not have; or there is no batch.
    """
    check_batches(batches)
    _check_has(state, losses)
    run = functools.partial(_of_batch, tuple(own.loss for own in losses), state)
    keys = [own.key for own in losses]
    means, pending = [Means() for _ in losses], collections.deque()
    with contextlib.closing(Source(batches, check_sharding(sharding))) as source:
        taken = 0
        while (call := source.gather(1)) is not None:
            with asked_for():
                pending.append(run(keys, np.int32(taken), call.parts))
            taken += 1
            while len(pending) > IN_FLIGHT:
                _add(means, pending.popleft())
        source.raise_error()
    for results in pending:
        _add(means, results)
    named = zip(losses, means, strict=True)
    return {own.prefix + tag: x for own, mean in named for tag, x in mean.result().items()}


def _check_has(state: TrainState, losses: Sequence[Evaluated]) -> None:
    """Raise if a loss takes what the state does not have."""
    for name in ("model_state", "key"):
        if getattr(state, name) is None and any(own.loss.takes(name) for own in losses):
            raise ValueError(f"`state` must have a `{name}`, which the loss takes.")


def _add(means: Sequence[Means], results: Any) -> None:
    """Add what the losses are over one batch."""
    for mean, of_batch in zip(means, jax.device_get(results), strict=True):
        mean.add(*of_batch)


@functools.partial(jax.jit, static_argnums=0)
def _of_batch(
    losses: tuple[Loss, ...],
    state: TrainState,
    keys: list[Any],
    n: jax.Array,
    batch: tuple[Any, ...],
) -> list[tuple[dict[str, Any], Any]]:
    """Return for each loss itself and its metrics, means over one batch, and what that weighs."""
    params, results = state.eval_params, []
    for loss, key in zip(losses, keys, strict=True):
        key = None if key is None else jax.random.fold_in(key, n)
        value, aux = loss(params, batch, state.model_state, key, state.graph)
        weight = _examples(batch) if aux.weight is None else aux.weight
        results.append(({"loss": value, **aux.metrics}, jnp.asarray(weight, jnp.float32)))
    return results


def _examples(batch: tuple[Any, ...]) -> int:
    """Return the length of the first axis of the first array that has one; 1 if none has."""
    lengths = (x.shape[0] for x in map(jnp.asarray, jax.tree.leaves(batch)) if x.ndim)
    return next(lengths, 1)
