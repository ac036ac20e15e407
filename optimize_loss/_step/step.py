"""What every step can do: its compiled programs, its loop and its searches."""

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.core import Tracer

from optimize_loss._checks import InvalidType, TreeMismatch
from optimize_loss._names import flatten
from optimize_loss._report.explain import Explanation
from optimize_loss._search.range_test import Ramp
from optimize_loss._search.results import LearningRateTest, Sweep
from optimize_loss._search.search import Search
from optimize_loss._search.sweep import check_grid
from optimize_loss._state.batches import as_arrays, check_stacked, is_foreign, ranks, refusal
from optimize_loss._state.form import Form
from optimize_loss._state.hook import Hook
from optimize_loss._state.loss import Loss
from optimize_loss._state.skips import check_ready
from optimize_loss._state.spread import check_spread
from optimize_loss._state.train_state import TrainState
from optimize_loss._step.advance import (
    advance_many,
)
from optimize_loss._step.evaluation import Evaluated, evaluate
from optimize_loss._step.run import Run, check_plan


@dataclasses.dataclass(frozen=True, eq=False)
class Step(abc.ABC):
    """A step: its compiled programs, its loop and its searches.

    Subclasses say how a state begins, and how one step is taken while being traced.
    """

    @functools.cached_property
    @abc.abstractmethod
    def _form(self) -> Form:
        """What must agree between this step and its states."""

    @functools.cached_property
    @abc.abstractmethod
    def _needed(self) -> tuple[str, ...]:
        """What a loss takes of the state besides parameters."""

    @property
    @abc.abstractmethod
    def _prefixes(self) -> dict[str, str]:
        """For each loss the prefix of its metrics, with that of its links; the main one first."""

    @abc.abstractmethod
    def _advance(self, shardings: Any, state: TrainState, batch: Any) -> Any:
        """Return the next state and the metrics, while being traced."""

    @abc.abstractmethod
    def _evaluated(self, state: TrainState) -> tuple[Evaluated, ...]:
        """Return the losses, with what their metrics are called by in an evaluation."""

    @abc.abstractmethod
    def _shardings(self, state: TrainState) -> tuple[Any, ...] | None:
        """Return where gradients are to lie; None where XLA may choose."""

    @abc.abstractmethod
    def init(self, params: Any, *, model_state: Any = None, key: Any = None) -> TrainState:
        """Return the state before the first step."""

    @abc.abstractmethod
    def explain(
        self, params: Any, *, steps: int | None = None, model_state: Any = None
    ) -> Explanation:
        """Describe what this step will do with each parameter, before anything is allocated."""

    def __call__(self, state: TrainState, *batch: Any) -> tuple[TrainState, dict[str, Any]]:
        """Take one step; compiled once for each shape and dtype of batch.

        Args:
          state: from `init` or from the step before. Its memory goes to the new state: use the
            old one no more. Where it or the batch is traced, by vmap, grad or jit, it stays.
          *batch: what the loss takes after the parameters. Arrays of other libraries, such as
            torch's tensors, become numpy arrays.

        Returns:
          The new state, and metrics: {tag: array}, with the same tags at every step. `loss` is
          that of the parameters before the update.

        Raises:
          RuntimeError: this state was donated to an earlier step.
          NonFiniteError: `skip` has left out too many batches in a row before this state, and the
            device has finished it; one that it has not is not waited for.
        """
        return self._dispatch(False, state, batch)

    def many(self, state: TrainState, *batches: Any) -> tuple[TrainState, dict[str, Any]]:
        """Take k steps in one call, without returning to Python in between.

        Compiled once for each k.

        Args:
          state: as for a single step.
          *batches: as for a single step, with k batches stacked along the first axis of every
            array, k at least 1. A list or tuple is one argument of the loss, whose arrays are
            stacked.

        Returns:
          The state after k steps, and the metrics of each, stacked along a first axis.

        Raises:
          ValueError: the arrays differ in the length of their first axis, or are scalars; or this
            step has already taken a single batch with as many axes, so these look like one batch.
          InvalidType: a leaf is not an array; or the loss fails with a list that is one argument.
          NonFiniteError: as for a single step, if the skips continue up to this state. Skips in a
            row that end within a call show only in the maximum of the metric `skipped_in_a_row`.
        """
        check_stacked(batches, self._ranks)
        return self._many(state, *batches)

    def _many(self, state: TrainState, *batches: Any) -> tuple[TrainState, dict[str, Any]]:
        """Take k steps with batches that are known to be stacked."""
        return self._dispatch(True, state, batches)

    def run(
        self,
        state: TrainState,
        batches: Iterable[Any],
        *,
        steps: int | None = None,
        steps_per_call: int = 1,
        hooks: Iterable[Hook] = (),
        prefetch: int = 2,
        sharding: Any = None,
        progress: bool = False,
    ) -> tuple[TrainState, dict[str, Any]]:
        """Take a step for each batch of an iterable, and keep the device busy.

        The results are those of single steps, or of `many` for several steps per call. Batches are
        read, stacked and sent to the device while it computes, up to one call in advance but never
        more than `steps`. Batches on the host are copied when they are read.

        If the iterable, a hook or a step raises, the exception carries the last good state as
        `error.state`. There is a warning if `batches` ends before `steps`.

        The same holds if a signal handler raises, for example KeyboardInterrupt. It is raised
        between two calls, when the state is available. Batches that were read for the next call are
        then lost. If a batch or a hook takes longer than a tenth of a second, it is raised there. A
        second Ctrl-C is raised immediately, and may lose the state. All this applies to the main
        thread and to handlers written in Python; Python does not raise elsewhere.

        Args:
          state: from `init` or from the step before; it is donated, as in a single step.
          batches: an iterable. A tuple or list in it is `*batch` of a single step; anything else is
            a batch with one argument. Leaves that are not jax arrays become numpy arrays, such as
            torch's and TensorFlow's tensors.
          steps: how many steps to take, at least 1; None to take them until `batches` ends.
          steps_per_call: the most steps in one call of the device, at least 1. A call has fewer
            steps if a hook is due, if shapes change, and at the end. Each number of steps is
            compiled once.
          hooks: a list of hooks, such as `ol.every(100, function)` or `ol.Checkpoints(folder,
            every=100)`. Each is called with the state and the metrics since it was last called,
            in this order if several are due. It returns None, or the state to continue with, such
            as `state.set(learning_rate=1e-4)`, or raises `ol.StopRun` to end the run. Its state is
            donated to the next step: keep `state.copy()`.
          prefetch: the most calls in flight, at least 1. Before it starts another one, the loop
            waits for the metrics of the oldest.
          sharding: a NamedSharding or a device for the arrays of a batch: one for all, or a tuple
            with one, or a tree of them, for each argument. Stacked batches get a leading axis.
          progress: whether to show a progress bar with the loss, using tqdm.

        Returns:
          The state after the last step, and the metrics of all, stacked along a first axis as
          numpy arrays. A metric whose shape differs between steps is a list with one entry per
          step.

        Raises:
          ImportError: tqdm is not installed, for `progress`.
          InvalidType: an argument is of the wrong kind, or a hook returned something other than
            None or a state.
          ValueError: an argument is out of range, or `batches` is empty.
          RuntimeError: this state was donated to an earlier step.
          NonFiniteError: `skip` has skipped too many batches in a row; raised when their metrics
            arrive, up to `prefetch` calls later.

        Example:
          >>> import optimize_loss as ol
          >>> step = ol.optimize_loss(lambda p, x: p["w"] * x, learning_rate=1.0, optimizer="SGD")
          >>> state, metrics = step.run(step.init({"w": 10.0}), [1.0, 2.0, 3.0])
          >>> print(state.params["w"], metrics["loss"])
          4.0 [10. 18. 21.]
        """
        self._check_state(state)
        plan = check_plan(steps, steps_per_call, hooks, prefetch, sharding, progress)
        return Run(self, self._many, self._prefixes, plan, state).over(batches)

    def evaluate(
        self,
        state: TrainState,
        batches: Iterable[Any],
        *,
        loss: Callable[..., Any] | None = None,
        sharding: Any = None,
    ) -> dict[str, Any]:
        """Return the means of the loss and its metrics over batches, without a step.

        The loss is computed at `state.eval_params`, the averaged parameters if the state keeps an
        average. One program is compiled per shape of batch. Batches are weighted by the length of
        the first axis of their first array, or by the `weight` in the `Aux` of the loss, if it has
        one. Sums are in float64. The state is not changed and not donated.

        Args:
          state: from `init` or from a step.
          batches: an iterable, as for `run`; it is read to the end.
          loss: a function of `(params, *batch)` as for `optimize_loss`, whose `Aux(metrics=...)`
            has your own metrics, such as an accuracy; None for the loss of this step.
          sharding: as for `run`.

        Returns:
          {tag: mean}: `loss`, and each metric of the loss. A `JointStep` returns those of all its
          losses, with the tags of a step, as `critic/loss`.

        Raises:
          InvalidType: an argument is of the wrong kind.
          ValueError: `batches` is empty; or the loss takes a model state or key that the state does
            not have.

        Example:
          >>> import jax.numpy as jnp, optimize_loss as ol
          >>> step = ol.optimize_loss(lambda p, x: jnp.mean(p["w"] * x), learning_rate=1.0)
          >>> found = step.evaluate(step.init({"w": 2.0}), [jnp.ones(3), 5 * jnp.ones(1)])
          >>> print(found)
          {'loss': np.float64(4.0)}
        """
        self._check_state(state)
        own = self._evaluated(state) if loss is None else (Evaluated("", Loss(loss), state.key),)
        return evaluate(own, state, batches, sharding)

    def find_learning_rate(
        self,
        state: TrainState,
        batches: Iterable[Any],
        *,
        lowest: float = 1e-7,
        highest: float = 10.0,
        steps: int = 100,
        smoothing: float = 0.9,
        divergence: float = 4.0,
        number: str = "learning_rate",
    ) -> LearningRateTest:
        """Try rates from low to high, one per step, and return the losses.

            rateᵢ = lowest · (highest / lowest)^(i / (steps - 1))

        The test ends early when the loss is not finite, or when the smoothed loss is above
        `divergence` times its minimum so far: least + (divergence - 1) · |least|, which also holds
        for losses below 0. A batch that `skip` skips as not finite also ends it. The caller's state
        is not changed and not donated. One program is compiled per `steps` and shape of batches. A
        schedule of the rate is overridden; with `accumulate`, a step is one micro-batch.

        Args:
          state: from `init` or from a step: the start of training.
          batches: an iterable, as for `run`: write [batch] for a single one. At most `steps` of
            them are kept on the device at once. If there are fewer, they are repeated.
          lowest: the first rate, above 0.
          highest: the last rate, above `lowest`.
          steps: how many rates, at least 3.
          smoothing: the weight of earlier losses in the running mean, in [0, 1).
          divergence: the test ends at this multiple of the least smoothed loss, above 1.
          number: the number of the state to raise, as `state.set` names it, such as
            "AdamW.rate/learning_rate" for the rate of a rule's own optimizer, or "weight_decay".

        Returns:
          A `LearningRateTest`. Its `suggestion` is the rate at which the smoothed loss falls most
          steeply over the logarithm of the rate, before its minimum; the slope is measured between
          points about 1 / (1 - smoothing) steps apart. The smoothed loss lags by about smoothing /
          (1 - smoothing) steps. If the loss falls most steeply at the highest rate, the result is
          `still_falling`, and there is a warning: a better rate may be above.

        Raises:
          InvalidType: an argument is of the wrong kind, or `state` is traced.
          ValueError: an argument is out of range; `batches` is empty, or the batches differ in
            shape; the rate is not a number of the state, like that of an optax transformation; or a
            `learning_rate_decay_fn` or `plateau` would change it.
          NonFiniteError: the loss is not finite before the first update.

        Example:
          The loss is (w - 3)² / 2, which gradient descent at a rate of 1 solves at once:

          >>> import optimize_loss as ol
          >>> step = ol.optimize_loss(
          ...     lambda p, x: (p["w"] - x) ** 2 / 2, learning_rate=0.1, optimizer="SGD")
          >>> state = step.init({"w": 0.0})
          >>> found = step.find_learning_rate(state, [3.0], lowest=1e-4, highest=100.0)
          >>> 0.01 < found.suggestion < 1.0, float(state.params["w"])
          (True, 0.0)

        References:
          L. N. Smith, "Cyclical Learning Rates for Training Neural Networks", 2017,
          https://arxiv.org/abs/1506.01186; with the exponential spacing, the smoothing and the
          bound of four times the minimum of fastai's `Learner.lr_find`.
        """
        self._check_state(state)
        ramp = Ramp(lowest, highest, steps, smoothing, divergence, number)
        return self._search.find_learning_rate(self._shardings(state), state, batches, ramp)

    def sweep(
        self,
        state: TrainState,
        *batches: Any,
        seeds: int | Iterable[int] | None = None,
        init: Callable[[Any], Any] | None = None,
        grid: bool = True,
        **numbers: Any,
    ) -> Sweep:
        """Take the same steps from many states at once, with different numbers or seeds.

        One program does all runs side by side: `jax.vmap` over the states around the scan of
        `many`. It is compiled once per number of runs and steps. The results are those of separate
        runs, up to the order of sums. The caller's state is not changed and not donated. The runs
        need memory for as many states.

        Args:
          state: from `init` or from a step: the start of all runs. With `init`, it must not have
            made a step: all runs use its model state, counters and statistics.
          *batches: as for `many`, stacked along the first axis; the same for all runs.
          seeds: the number of seeds, for 0, 1, …; or a list of integers in [0, 2**32). A run of
            seed s has the random key and the noise that it would have under
            `optimize_loss(seed=s)`.
          init: if given, a function of a random key that returns parameters: a run of seed s
            begins with `init(jax.random.key(s))`, and with slots as before the first update.
          grid: whether to run all combinations of several lists, the last one changing fastest;
            otherwise the first values of all lists are one run, then the second values, and so on.
          **numbers: lists of values, by the names of `state.set`, such as
            `learning_rate=[0.01, 0.1]` or `**{"adam/beta_1": [0.8, 0.9]}`.

        Returns:
          A `Sweep`.

        Raises:
          InvalidType: an argument is not a list, a value is not a number, or `state` is traced.
          ValueError: there is no list, or a list is empty; `state.set` does not accept a name or
            a value; seeds would change nothing; `state` has made a step, with `init`; or `batches`
            are not as for `many`.
          TreeMismatch: what `init` returns has other leaves, shapes or dtypes than the parameters.

        Example:
          Gradient descent from 1 on w · x, with x = 1, for two steps at three rates:

          >>> import jax.numpy as jnp, optimize_loss as ol
          >>> step = ol.optimize_loss(lambda p, x: p["w"] * x, learning_rate=1.0, optimizer="SGD")
          >>> found = step.sweep(step.init({"w": 1.0}), jnp.ones(2), learning_rate=[0.0, 0.5, 1.0])
          >>> print(found.losses, found.points[found.best])
          [[1.  1. ]
           [1.  0.5]
           [1.  0. ]] {'learning_rate': 1.0}
          >>> print(found.state().params["w"])
          -1.0
        """
        self._check_state(state)
        check_stacked(batches, self._ranks)
        points = check_grid(numbers, seeds, init, grid)
        return self._search.sweep(self._shardings(state), state, as_arrays(batches), points)

    @property
    def _loss(self) -> str:
        """The metric that is the loss of a search, and of a progress bar."""
        return f"{next(iter(self._prefixes))}loss"

    @functools.cached_property
    def _search(self) -> Search:
        """The programs of searches; they live as long as this object."""
        many = functools.partial(advance_many, self._advance)
        return Search(self._advance, many, self._loss)

    @functools.cached_property
    def _ranks(self) -> set[Any]:
        """The structures and ranks of the single batches that a program was traced for."""
        return set()

    @functools.cached_property
    def _seen(self) -> list[None]:
        """An entry once it was looked at where a state and a batch lie."""
        return []

    @functools.cached_property
    def _programs(self) -> dict[tuple[bool, bool], Any]:
        """By whether they take many steps, and the memory of the state; they live as long as this.

        Inside a transformation of the caller's, such as vmap, there is no memory to take.
        """
        functions = ((False, self._take_one), (True, self._take_many))
        return {
            (many, donate): jax.jit(f, static_argnums=0, donate_argnums=[1] * donate)
            for many, f in functions
            for donate in (False, True)
        }

    def _take_one(self, shardings: Any, state: TrainState, *batch: Any) -> Any:
        self._ranks.add(ranks(batch))
        return self._advance(shardings, state, batch)

    def _take_many(self, shardings: Any, state: TrainState, *batches: Any) -> Any:
        return advance_many(self._advance, shardings, state, batches)

    def __getstate__(self) -> dict[str, Any]:
        """Return the options, for pickle: compiled programs stay behind."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def lower(self, state: TrainState, *batch: Any) -> jax.stages.Lowered:
        """Return the program of a single step before compilation, to inspect or to compile.

        Call the compiled program like the step; it also donates the state:

            compiled = step.lower(state, x).compile()
            state, metrics = compiled(state, x)
        """
        self._check_state(state)
        return self._programs[False, True].lower(self._shardings(state), state, *as_arrays(batch))

    def _look(self, traced: bool, state: TrainState, batch: tuple[Any, ...]) -> None:
        """Warn of a batch that is not spread over a mesh, before the first call."""
        if not (traced or self._seen):
            self._seen.append(None)
            check_spread(state.packed_params, batch)

    def _dispatch(self, many: bool, state: TrainState, batch: tuple[Any, ...]) -> Any:
        self._check_state(state)
        if state.chain is not self._form.chain:  # so that the next state need not be compared
            state = dataclasses.replace(state, chain=self._form.chain)
        check_ready(state)
        kinds = set(map(type, flatten(batch)[0]))
        if any(map(is_foreign, kinds)):
            batch = as_arrays(batch)
        traced = state.is_traced or any(issubclass(kind, Tracer) for kind in kinds)
        self._look(traced, state, batch)
        try:
            new, metrics = self._programs[many, not traced](self._shardings(state), state, *batch)
        except (TypeError, ValueError, jax.errors.JaxRuntimeError) as error:
            if (refused := refusal(error, batch, stacked=many, state=state)) is None:
                raise
            raise refused from error
        if not traced and not isinstance(new.packed_optimizer["step"], Tracer):
            vars(new)["is_traced"] = False  # so that the next call need not look at each leaf
        return new, metrics

    def _check_state(self, state: Any) -> None:
        """Raise unless `state` is one of this step, or of one with equal options, and alive."""
        if not isinstance(state, TrainState):
            raise InvalidType(
                "`state` must be a TrainState, from `step.init(params)` or the step before. "
                f"Received: {type(state).__name__}."
            )
        if (form := Form.of(state, self._needed)) != self._form:
            raise TreeMismatch(self._form.difference(form))
        state.check_alive()
