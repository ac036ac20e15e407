"""Metrics as numbers by batch, for all kinds of logs."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optimize_loss._checks import AT_LEAST_1, STEP, InvalidType, check_integer, received
from optimize_loss._state.hook import Hook
from optimize_loss._state.train_state import TrainState


class Logger(Hook):
    """Write the metrics of each batch to a log: as a hook of `TrainStep.run`, or by hand.

    Subclasses define `write_one`. If several processes train together, only the first one writes.

    Args:
      every: as a hook, the number of batches between two writes, at least 1; None to write only at
        the end of a run.

    Raises:
      InvalidType: `every` is not an integer.
      ValueError: `every` is below 1.

    Example:
      >>> import optimize_loss as ol
      >>> from optimize_loss.loggers import Logger
      >>> class Show(Logger):
      ...     def write_one(self, batch, values):
      ...         print(batch, values["loss"])
      >>> step = ol.optimize_loss(lambda p, x: p["w"] * x, learning_rate=1.0, optimizer="SGD")
      >>> state, _ = step.run(step.init({"w": 9.0}), [1.0] * 3, hooks=[Show(every=2)])
      1 9.0
      2 8.0
      3 7.0
    """

    def __init__(self, every: int | None = 100):
        self.every = None if every is None else check_integer("every", every, AT_LEAST_1)

    def write_one(self, batch: int, values: dict[str, Any]) -> None:
        """Write the metrics of one batch.

        Args:
          batch: the number of the batch, from 1.
          values: {tag: value}: numbers, or histograms as pairs (counts, edges) of arrays.
        """
        raise NotImplementedError

    def write(self, batch: Any, metrics: Mapping[str, Any]) -> None:
        """Write the metrics of one batch, or of k batches in a row.

        Args:
          batch: the number of the batch, an integer of at least 0; after a step, that is
            `state.batches`. For stacked metrics it is the number of the last batch: they belong to
            batches batch - k + 1 to batch.
          metrics: {tag: value}. Each value is a real scalar, or a pair (counts, edges) of shapes
            (bins,) and (bins + 1,); or each has a leading axis of length k.

        Raises:
          InvalidType: a value is not one of these, or only some values are stacked; then nothing is
            written. Or `batch` is not an integer.
          ValueError: `batch` is negative, or too small for k batches.
        """
        last = check_integer("batch", batch, STEP)
        read = {tag: _read(tag, value) for tag, value in metrics.items()}
        stack = _stack(read)
        first = last - (stack[0] if stack else 1) + 1
        if first < 0:
            raise ValueError(
                "`batch` must be the last batch of stacked metrics, counted from 0, as "
                f"`state.batches` is. Received: batch={last} for metrics of {stack[0]} batches."
            )
        if jax.process_index() != 0:
            return
        columns = {tag: [*_each(value)] if stack else [value] for tag, value in read.items()}
        for i in range(last - first + 1):
            self.write_one(first + i, {tag: values[i] for tag, values in columns.items()})

    def __call__(self, state: TrainState, metrics: dict[str, Any]) -> None:
        """Write the metrics of a run, or of an evaluation.

        Args:
          state: that of the last batch.
          metrics: as for `write`.
        """
        self.write(state.batches, metrics)

    def close(self) -> None:
        """Write everything that is pending; a second call does nothing."""

    def __enter__(self) -> "Logger":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()


def scalars(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of one batch that are numbers, as Python's."""
    return {tag: float(x) for tag, x in values.items() if not isinstance(x, tuple)}


def _read(tag: Any, value: Any) -> Any:
    """Return a value as a float64 array, and a histogram as a pair of them."""
    if not isinstance(tag, str):
        raise InvalidType(f"A tag of `metrics` must be text. {received('tag', tag)}")
    if not isinstance(value, tuple):
        return _numbers(tag, value)
    if len(value) == 2:
        counts, edges = (_numbers(tag, part) for part in value)
        if counts.ndim and (*counts.shape[:-1], counts.shape[-1] + 1) == edges.shape:
            return counts, edges
        value = (counts.shape, edges.shape)
    raise InvalidType(
        f"`metrics` must have a scalar or a histogram (counts, edges), of shapes (bins,) and "
        f"(bins + 1,), under each tag. Received, under {tag!r}: a tuple of {value!r:.200}."
    )


def _numbers(tag: str, value: Any) -> np.ndarray:
    if isinstance(value, Tracer):
        raise InvalidType(
            f"`metrics` must be known when they are written: write outside jit, what a step has "
            f"returned. Received, under {tag!r}: {value!r:.200}."
        )
    if not _is_real(value):
        raise InvalidType(
            "`metrics` must have a real scalar or a histogram (counts, edges) under each tag. "
            f"Received, under {tag!r}: {value!r:.200} of type {type(value).__name__}."
        )
    return np.asarray(jax.device_get(value), np.float64)


def _is_real(value: Any) -> bool:
    if not isinstance(value, np.ndarray | np.generic | jax.Array):
        return isinstance(value, bool | int | float)
    kinds = (jnp.floating, jnp.integer, jnp.bool_)
    return any(jnp.issubdtype(value.dtype, kind) for kind in kinds)


def _stack(metrics: dict[str, Any]) -> tuple[int, ...]:
    """Return (k,) for metrics of k steps and () for those of one."""
    stacks = {}
    for tag, value in metrics.items():
        stack = value[0].shape[:-1] if isinstance(value, tuple) else value.shape
        stacks[tag] = stack
        first, expected = next(iter(stacks.items()))
        if len(stack) > 1 or stack != expected:
            raise InvalidType(
                "`metrics` must have scalars and histograms, or all of them with one first axis "
                f"of one length. Received, under {tag!r}: the axes {stack}"
                + (f", but {expected} under {first!r}." if tag != first else ".")
            )
    return next(iter(stacks.values()), ())


def _each(value: Any) -> Iterator[Any]:
    return zip(*value, strict=True) if isinstance(value, tuple) else iter(value)
