"""Raise when too many batches in a row were skipped, without waiting for the device."""

import functools
import itertools
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from optimize_loss._checks import NonFiniteError
from optimize_loss._engine.bucket import Layout
from optimize_loss._engine.transfers import asked_for
from optimize_loss._state.train_state import TrainState
from optimize_loss.transforms._guard import guards_of

_COUNT = "skipped_in_a_row"


def check_ready(state: TrainState) -> None:
    """Look at a state that the device has finished; one that it has not passes.

    Raises:
      NonFiniteError: too many batches in a row were skipped.
    """
    for name, guard in guards_of(state.chain.links):
        if guard.most is not None and _is_reached(state, name, guard.most):
            raise _too_many(state, name)


def _is_reached(state: TrainState, name: str, most: int) -> bool:
    """Return whether the count of a guard is known, and so many or more."""
    if state.layout is None:
        array, index = state.packed_optimizer[name][_COUNT], ()
    else:
        key, start = _place(state.layout, name)
        array, index = state.packed_optimizer[key], (start,)
    if isinstance(array, Tracer) or not getattr(array, "is_ready", _is_on_the_host)():
        return False
    return jax.device_get(array)[index] >= most


def check_metric(state: TrainState, in_a_row: Any, prefix: str = "") -> None:
    """Look at the metric `skipped_in_a_row` of several steps.

    Args:
      state: the state after these steps, or a later one.
      in_a_row: the metric.
      prefix: of the names of the links that it is of.

    Raises:
      NonFiniteError: after one of these steps it was an error.
    """
    found = next(guards_of(state.chain.links, prefix), None)
    if found is None or found[1].most is None or np.max(in_a_row) < found[1].most:
        return
    raise _too_many(state, found[0], int(np.max(in_a_row)))


def _is_on_the_host() -> bool:
    """Stand in for `is_ready` of an array of numpy."""
    return True


@functools.lru_cache(maxsize=16)
def _place(layout: Layout, name: str) -> tuple[str, int]:
    """Return in which array of numbers the count of a guard is, and where."""
    for key, members in layout.numbers:
        starts = itertools.accumulate(members.sizes, initial=0)
        for member, start in zip(members.names, starts, strict=False):
            if member == f"{name}/{_COUNT}":
                return key, start
    raise KeyError(f"{name}/{_COUNT}")


@asked_for()
def _too_many(state: TrainState, name: str, in_a_row: int | None = None) -> NonFiniteError:
    mine = state.links[name]
    count = int(mine[_COUNT]) if in_a_row is None else in_a_row
    error = NonFiniteError(
        f"{count} batches in a row were skipped, of {int(mine['skipped'])} so far, before "
        f"step {int(state.step)}. The last one because of: {state.offender!r}. This is usually "
        "a learning rate that is too high, or data that is not finite. To go on without them, take "
        "the error's attribute `state`; `most` of `SkipNonFinite` and `Spike` says how many "
        "are an error."
    )
    rested = {**mine, _COUNT: jax.numpy.zeros_like(mine[_COUNT])}
    error.state = state.with_links({**state.links, name: rested})
    return error
