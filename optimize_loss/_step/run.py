"""The loop around a step: batches in, metrics out, hooks between, and no state lost."""

import collections
import contextlib
import dataclasses
import itertools
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from optimize_loss._checks import (
    AT_LEAST_1,
    InvalidType,
    NonFiniteError,
    StopRun,
    check_flags,
    check_integer,
)
from optimize_loss._engine.transfers import asked_for
from optimize_loss._state.batches import Call, Source, check_batches, check_sharding
from optimize_loss._state.hook import Hook, check_called
from optimize_loss._state.skips import check_metric
from optimize_loss._state.train_state import TrainState
from optimize_loss._step.signals import Signals, signals

logger = logging.getLogger("optimize_loss")
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


@dataclasses.dataclass(frozen=True)
class Plan:
    """How to run: the options of `TrainStep.run`, checked."""

    steps: int | None
    steps_per_call: int
    hooks: tuple[Hook, ...]
    prefetch: int
    sharding: Any
    progress: bool


def check_plan(
    steps: Any, steps_per_call: Any, hooks: Any, prefetch: Any, sharding: Any, progress: Any
) -> Plan:
    """Return the options of a run.

    Raises:
      InvalidType: one is of the wrong kind.
      ValueError: one is out of range, or a hook would never be called.
    """
    check_flags(progress=progress)
    return Plan(
        steps=None if steps is None else check_integer("steps", steps, AT_LEAST_1),
        steps_per_call=check_integer("steps_per_call", steps_per_call, AT_LEAST_1),
        hooks=check_called("hooks", () if hooks is None else hooks),
        prefetch=check_integer("prefetch", prefetch, AT_LEAST_1),
        sharding=check_sharding(sharding),
        progress=progress,
    )


@dataclasses.dataclass
class Visit:
    """One hook in a run.

    Attributes:
      hook: the hook.
      due: after how many steps of this run it is called next; None for never.
      last: after how many it was called last.
    """

    hook: Hook
    due: int | None
    last: int = 0


@dataclasses.dataclass
class Run:
    """A run over batches, and how far it has come.

    Attributes:
      single: the function that takes one step.
      many: the function that takes several, with stacked batches.
      prefixes: of the metrics of each loss, with that of its links; the main one first.
      plan: the options.
      state: the state reached.
      taken: the number of steps taken.
      stopped: whether a hook ended it.
    """

    single: Callable[..., tuple[TrainState, dict[str, Any]]]
    many: Callable[..., tuple[TrainState, dict[str, Any]]]
    prefixes: Mapping[str, str]
    plan: Plan
    state: TrainState
    taken: int = 0
    stopped: bool = False

    def __post_init__(self):
        self._before = 0  # the batches that the state had taken before this run
        self._visits: list[Visit] = []

    def over(self, batches: Iterable[Any]) -> tuple[TrainState, dict[str, Any]]:
        """Return the state after the last step, and the metrics of all."""
        check_batches(batches)
        if self.state.is_traced:
            raise InvalidType(
                "`state` must not be traced by jit or vmap: `run` is a loop in Python. "
                "`step.many` works there."
            )
        held = signals()
        with held.during_run(self._attach_state):
            metrics = self._take(batches, held)
            if self.plan.steps not in (None, self.taken) and not self.stopped:
                warnings.warn(
                    f"`batches` ended after {self.taken} of {self.plan.steps} steps.", stacklevel=3
                )
            return self.state, metrics

    def _take(self, batches: Iterable[Any], held: Signals) -> dict[str, Any]:
        """Take all steps, and return their metrics."""
        with (
            _bar(self.plan, f"{next(iter(self.prefixes))}loss") as show,
            contextlib.closing(Source(batches, self.plan.sharding)) as source,
        ):
            history = History(self._watched(show))
            self._begin_visits()
            self._advance(source, history, held)
            source.raise_error()
            held.within(self._is_alive, self._call_hooks, history, self._ends)
            if not self.taken:
                raise ValueError(
                    "`batches` must hold a batch: it is empty, or an iterator at its end."
                )
            return history.stacked()

    def _advance(self, source: Source, history: History, held: Signals) -> None:
        """Take all steps; the next call is on its way to the device while the last computes."""
        call = self._gather(source, held)
        held.install()  # a loader may have put handlers
        while call is not None and not self.stopped:
            history.wait(self.plan.prefetch - 1)
            held.check()
            advance = self.single if call.steps == 1 else self.many
            with asked_for():
                state, metrics = advance(self.state, *call.parts)
            self.state, self.taken = state, self.taken + call.steps
            history.add(call.steps, metrics)
            held.check()
            held.within(self._is_alive, self._call_hooks, history, self._is_due)
            call = self._gather(source, held)

    def _gather(self, source: Source, held: Signals) -> Call | None:
        """Return the next call, which ends where a hook is due; so none was pulled for later."""
        if self.stopped:
            return None
        ends = [self.plan.steps, *(visit.due for visit in self._visits)]
        room = [end - self.taken for end in ends if end is not None]
        return held.within(self._is_alive, source.gather, min([self.plan.steps_per_call, *room]))

    def _begin_visits(self) -> None:
        """Ask all hooks when they are due. The count of batches is fetched for them alone."""
        if self.plan.hooks:
            self._before = int(jax.device_get(self.state.batches))
        self._visits = [Visit(hook, self._next(hook)) for hook in self.plan.hooks]

    def _next(self, hook: Hook) -> int | None:
        """Return after how many steps of this run a hook is due."""
        wait = hook.wait(self._before + self.taken)
        return None if wait is None else self.taken + check_integer("wait", wait, AT_LEAST_1)

    def _is_due(self, visit: Visit) -> bool:
        return visit.due == self.taken

    def _ends(self, visit: Visit) -> bool:
        return visit.hook.at_end and visit.last < self.taken

    def _call_hooks(self, history: History, chosen: Callable[[Visit], bool]) -> None:
        for visit in filter(chosen, self._visits):
            metrics = history.stacked(self.taken - visit.last)
            visit.last = self.taken
            try:
                self._put(visit.hook, visit.hook(self.state, metrics))
            except StopRun as stop:
                logger.info("a hook ended the run after %d steps: %s", self.taken, stop)
                self.stopped = True
            visit.due = self._next(visit.hook)

    def _put(self, hook: Hook, new: Any) -> None:
        """Go on with what a hook has returned."""
        if new is None:
            return
        if not isinstance(new, TrainState):
            raise InvalidType(
                "A hook must return None or a TrainState. "
                f"Received: {new!r} of type {type(new).__name__}, from {hook!r}."
            )
        if new.batches is not self.state.batches:
            self._before = int(jax.device_get(new.batches)) - self.taken
        self.state = new

    def _watched(self, show: Callable[[int, Any], None]) -> Callable[[int, Any], None]:
        """Return a function that shows fetched metrics, and raises if too much was left out."""

        def seen(steps: int, metrics: Any) -> None:
            show(steps, metrics)
            for prefix, of_links in self.prefixes.items():
                if (tag := f"{prefix}skipped_in_a_row") in metrics:
                    check_metric(self.state, metrics[tag], of_links)

        return seen

    def _is_alive(self) -> bool:
        """Return whether the state reached can be used."""
        return not any(leaf.is_deleted() for leaf in _arrays(self.state))

    def _attach_state(self, error: Any) -> None:
        """Make the state reached an attribute of the error, if it can be used."""
        if isinstance(error, NonFiniteError) and error.state is not None:
            self.state = error.state
        if not self._is_alive():
            return
        # The device may have failed, or an exception may take no attributes.
        with contextlib.suppress(Exception):
            jax.block_until_ready(_arrays(self.state))
            error.state = self.state
            error.add_note(
                f"The state after {self.taken} steps of this run is the error's attribute `state`, "
                "as in `sys.last_value.state`."
            )


def _arrays(state: TrainState) -> list[jax.Array]:
    return [leaf for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array)]


@contextlib.contextmanager
def _bar(plan: Plan, loss: str) -> Iterator[Callable[[int, Any], None]]:
    """Give a function that shows fetched metrics of so many steps, or one that does nothing."""
    if not plan.progress:
        yield lambda steps, metrics: None
        return
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError(
            f"`progress` needs tqdm. Install it with: pip install tqdm. ({error})"
        ) from error
    with tqdm(total=plan.steps, unit="step") as bar:

        def show(steps: int, metrics: Any) -> None:
            bar.set_postfix(loss=float(metrics[loss][-1]), refresh=False)
            bar.update(steps)

        yield show
