"""The metrics of a run: in flight, then fetched, then joined."""

import collections
import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

COMPACTED = 256  # fetched calls between two times that their metrics are joined


class Record(NamedTuple):
    """The metrics of consecutive steps.

    Attributes:
      steps: how many.
      metrics: a tree of numpy arrays with a first axis of that length.
    """

    steps: int
    metrics: Any

    @property
    def kind(self) -> Any:
        """Equal for records that can be joined to one."""
        leaves, structure = jax.tree.flatten(self.metrics)
        return structure, [(leaf.shape[1:], leaf.dtype) for leaf in leaves]


class History:
    """The metrics of all steps of a run, in order."""

    def __init__(self, show: Callable[[int, Any], None]):
        self._show = show
        self._in_flight: collections.deque[tuple[int, Any]] = collections.deque()
        self._records: list[Record] = []
        self._compact = 0  # how many records at the start are not joined again

    def add(self, steps: int, metrics: Any) -> None:
        """Take the metrics of a call of so many steps, which need not have happened yet."""
        for leaf in jax.tree.leaves(metrics):
            if isinstance(leaf, jax.Array):
                leaf.copy_to_host_async()
        self._in_flight.append((steps, metrics))

    def wait(self, most: int) -> None:
        """Fetch the metrics of the oldest calls until at most so many are in flight."""
        while len(self._in_flight) > most:
            steps, metrics = self._in_flight.popleft()
            fetched = fetch(metrics)
            if steps == 1:
                fetched = jax.tree.map(lambda x: x[None], fetched)
            self._records.append(Record(steps, fetched))
            self._show(steps, fetched)
        if len(self._records) - self._compact >= COMPACTED:
            self._records[self._compact :] = _joined(self._records[self._compact :])
            self._compact = len(self._records)

    def stacked(self, steps: int | None = None) -> dict[str, Any]:
        """Return the metrics of the last steps, or of all, after waiting for them.

        By tag: trees of arrays stacked along a first axis; lists of them where shapes differ.
        """
        self.wait(0)
        records = self._records if steps is None else list(self._last(steps))[::-1]
        tags = dict.fromkeys(tag for record in records for tag in record.metrics)
        return {tag: _column(tag, records) for tag in tags}

    def _last(self, steps: int) -> Iterable[Record]:
        """Yield the records of the last steps, the last one first."""
        for record in reversed(self._records):
            taken = min(steps, record.steps)
            start = record.steps - taken
            yield Record(taken, jax.tree.map(lambda x, start=start: x[start:], record.metrics))
            steps -= taken
            if not steps:
                return


def fetch(tree: Any) -> Any:
    """Return a tree as numpy arrays, once they are there."""
    with jax.transfer_guard_device_to_host("allow"):
        return jax.tree.map(np.asarray, tree)


def _joined(records: list[Record]) -> list[Record]:
    """Join neighbours of one kind; to copies, even alone."""
    joined = []
    for _, group in itertools.groupby(records, lambda record: record.kind):
        steps, metrics = zip(*group, strict=True)
        joined.append(Record(sum(steps), jax.tree.map(lambda *xs: np.concatenate(xs), *metrics)))
    return joined


def _column(tag: str, records: list[Record]) -> Any:
    joined = _joined([Record(steps, metrics.get(tag)) for steps, metrics in records])
    if len(joined) == 1:
        return joined[0].metrics
    return [
        jax.tree.map(lambda x, i=i: x[i], record.metrics)
        for record in joined
        for i in range(record.steps)
    ]
