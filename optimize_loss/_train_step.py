"""`optimize_loss`: from a loss and options to a compiled training step."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optimize_loss import _metrics
from optimize_loss import _options as options
from optimize_loss._around import Around
from optimize_loss._checks import (
    DECAY,
    SEED,
    STEP,
    InvalidType,
    TreeMismatch,
    check_flags,
    check_integer,
    check_number,
    received,
)
from optimize_loss._explain import Explanation, Setup, explain
from optimize_loss._lint import check_horizon
from optimize_loss._loop import Run, check_plan
from optimize_loss._loss import Loss
from optimize_loss._model_state import run_update_ops
from optimize_loss._names import Pattern
from optimize_loss._rule_links import clips, precision_of, with_noise, with_rules
from optimize_loss._rules import NO_RULES, Rules, check_rules
from optimize_loss._skips import check_ready
from optimize_loss._state import TrainState
from optimize_loss._steepest import flat_gradients, told
from optimize_loss._trainable import Trainable, colocated, find_trainable
from optimize_loss.optimizers._resolve import resolve
from optimize_loss.transforms import (
    Accumulate,
    AverageLoss,
    Chain,
    Lookahead,
    Precision,
    ReduceOnPlateau,
    SkipNonFinite,
    SkipSpikes,
    chain,
    with_precision,
)
from optimize_loss.transforms._bucket import Layout, find_layout, unpacked
from optimize_loss.transforms._guard import kept
from optimize_loss.transforms._params import PARAMETER, copied, distinct, placed_like
from optimize_loss.transforms._precision import check_precision
from optimize_loss.transforms._sharding import check_axis, check_on_mesh, devices_along, init_spread

logger = logging.getLogger("optimize_loss")


@dataclasses.dataclass(frozen=True, eq=False)
class TrainStep:
    """A training step: `state, metrics = step(state, batch)`. `optimize_loss` makes it.

    Attributes:
      loss: the loss, a function of `(params, *batch)`.
      chain: what happens to its gradients.
      variables: patterns of the parameters to train; None for all.
      update_ops: functions of the model state, or of it and the batch, run before the loss.
      summaries: names of what to report.
      name: prefix of the names of metrics; "" for none.
      first_step: the global step before the first update.
      increment_step: whether updates advance the global step.
      colocate_gradients: whether to keep each gradient where its parameter is.
      seed: of the random key, for losses that take one.
      learning_rate: the rate that the optimizer was made with; None if it brings its own.
      bucket: the most entries of a parameter that shares an array with others; None for none.
      shard_state: the mesh axis over which slots are spread; None where they lie as parameters do.
      rules: what some parameters have for themselves.
    """

    loss: Loss
    chain: Chain
    variables: tuple[Pattern, ...] | None
    update_ops: tuple[Callable[..., Any], ...]
    summaries: tuple[str, ...]
    name: str
    first_step: int
    increment_step: bool
    colocate_gradients: bool
    seed: int
    learning_rate: Any
    bucket: int | None
    shard_state: str | None = None
    rules: Rules = NO_RULES

    def init(self, params: Any, *, model_state: Any = None, key: Any = None) -> TrainState:
        """Return the state before the first step.

        Args:
          params: the parameters, a tree of arrays and numbers. They are copied, as a step takes
            the memory of the state that it is given.
          model_state: the first model state, for losses and update ops that take one.
          key: a random key, for losses that take one; made from `seed` if not given.

        Raises:
          InvalidType: a leaf of `params` is no array and no number.
          ValueError: a pattern matches no parameter; there is nothing to train; or `model_state`
            or `key` is missing or given in vain.
        """
        if isinstance(params, TrainState):
            raise InvalidType("`params` must be a tree of arrays. Received: a TrainState.")
        params = copied(PARAMETER, params)
        self.rules.check(params)
        trainable = self._trainable(params)
        trained = trainable.tree(trainable.leaves)
        if self.shard_state:
            check_on_mesh(self.shard_state, trainable.names, trainable.leaves)
        try:
            layout = self._layout(trainable)
            packed = params if layout is None else layout.pack(params)
            inner = trained if layout is None else layout.only_trained(packed)
            axis = self.shard_state
            optimizer = init_spread(self.chain, inner, axis) if axis else self.chain.init(inner)
            if layout is not None:
                layout = layout.with_numbers(optimizer)
                optimizer = layout.join_numbers(optimizer)
        except ValueError as error:
            if self.variables is not None:
                error.add_note(f"Only these parameters are trained: {trainable.names}.")
            raise
        state = TrainState(
            packed_params=packed,
            packed_optimizer=optimizer,
            model_state=copied("`model_state` at", self._check_model_state(model_state)),
            key=self._check_key(key),
            first_step=jnp.asarray(self.first_step, jnp.int32),
            chain=self.chain,
            increment_step=self.increment_step,
            layout=layout,
        )
        state = placed_like(params, distinct(state))
        return state.placed() if self.shard_state else state

    def _trainable(self, params: Any) -> Trainable:
        """Return the parameters with a mark for those that are trained."""
        frozen = self.rules.frozen if self.rules.having_frozen else None
        return find_trainable(params, self.variables, frozen)

    def _layout(self, trainable: Trainable) -> Layout | None:
        """Return how small parameters lie in one array; None where each lies by itself."""
        if self.bucket is None:
            return None
        kinds: Iterator[Any] = iter(self.chain.kinds(trainable.tree(trainable.leaves)))
        if axis := self.shard_state:  # members that can be parted equally have an array that can
            pairs = zip(kinds, trainable.leaves, strict=True)
            kinds = (kind and (kind, x.size % devices_along(axis, x) == 0) for kind, x in pairs)
        of_all = [next(kinds) if trained else () for trained in trainable.marks]
        return find_layout(trainable.params, of_all, trainable.marks, self.bucket)

    def _check_model_state(self, model_state: Any) -> Any:
        """Return the first model state if there is one exactly where something takes it."""
        takers = ["the loss"] if self.loss.takes("model_state") else []
        takers += ["`update_ops`"] if self.update_ops else []
        if takers and model_state is None:
            raise ValueError(
                "`model_state` must be given, as in `step.init(params, model_state=...)`: "
                f"needed by {' and '.join(takers)}."
            )
        if model_state is not None and not takers:
            raise ValueError(
                "`model_state` must not be given: the loss does not take one. It would declare it "
                "by keyword only, as in `loss(params, x, *, model_state)`."
            )
        return model_state

    def _check_key(self, key: Any) -> Any:
        """Return a random key where the loss takes one: that given, or one made from the seed."""
        takes_key = self.loss.takes("key")
        if key is None:
            return jax.random.key(self.seed) if takes_key else None
        if not takes_key:
            raise ValueError("`key` must not be given: the loss does not take one.")
        if not isinstance(key, jax.Array):
            raise InvalidType(f"`key` must be a random key. {received('key', key)}")
        typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        if key.shape if typed else (key.shape, key.dtype) != ((2,), jnp.uint32):
            raise InvalidType(
                f"`key` must be one random key. Received: shape {key.shape}, dtype {key.dtype}."
            )
        return jnp.copy(key)

    def __call__(self, state: TrainState, *batch: Any) -> tuple[TrainState, dict[str, Any]]:
        """Take one step; compiled once for each shape and dtype of batch.

        Args:
          state: from `init` or from the step before. Its memory goes to the new state: use the
            old one no more.
          *batch: what the loss takes after the parameters.

        Returns:
          The new state, and metrics: {tag: array}, with the same tags at every step. `loss` is
          that of the parameters before the update.

        Raises:
          RuntimeError: this state was given to a step before.
          NonFiniteError: `skip` has left out too many batches in a row before this state, and the
            device has finished it; one that it has not is not waited for.
        """
        return self._dispatch(False, state, batch)

    def many(self, state: TrainState, *batches: Any) -> tuple[TrainState, dict[str, Any]]:
        """Take k steps in one call, without returning to Python between them.

        Compiled once for each k.

        Args:
          state: as for a single step.
          *batches: as for a single step, with k batches stacked along the first axis of every
            array.

        Returns:
          The state after k steps, and the metrics of each, stacked along a first axis.

        Raises:
          ValueError: the arrays differ in the length of their first axis, or have none.
        """
        lengths = {np.shape(x)[:1] for x in jax.tree.leaves(batches)}
        if len(lengths) != 1 or lengths == {()}:
            raise ValueError(
                "`batches` must be arrays with one first axis, of one length: the number of steps. "
                f"Received: shapes {[np.shape(x) for x in jax.tree.leaves(batches)]}."
            )
        return self._dispatch(True, state, batches)

    def run(
        self,
        state: TrainState,
        batches: Iterable[Any],
        *,
        steps: int | None = None,
        steps_per_call: int = 1,
        hooks: Mapping[int, Callable[[TrainState, dict[str, Any]], Any]] | None = None,
        prefetch: int = 2,
        sharding: Any = None,
        progress: bool = False,
    ) -> tuple[TrainState, dict[str, Any]]:
        """Take a step for each batch of an iterable, while the device stays busy.

        The results are those of single steps, and of `many` for calls of several steps. Batches
        are pulled, stacked and sent to the device while it computes, up to a call before they are
        needed but never more than `steps`. What comes from the host is copied when it is pulled.

        Args:
          state: from `init` or from the step before; its memory is taken, as by a single step.
          batches: an iterable. A tuple or list in it is `*batch` of a single step, anything else
            is a batch of one part. Leaves that are not jax arrays become numpy arrays, such as
            torch's and TensorFlow's tensors.
          steps: how many steps to take, at least 1; None to take them until `batches` ends.
          steps_per_call: the most steps in one call of the device, at least 1. A call has fewer
            where a hook is due, where shapes change and at the end; each number of steps is
            compiled once.
          hooks: {n: function of (state, metrics)}, called after every n steps of this run with
            the metrics of these n. It returns None, or the state to go on with, such as
            `state.set(learning_rate=1e-4)`. Its state is donated to the next step: copy what is
            to be kept. Several that are due are called in this order.
          prefetch: the most calls in flight, at least 1. Before one more, the loop waits for the
            metrics of the oldest.
          sharding: where the arrays of a batch go, a NamedSharding or a device: one for all, or a
            tuple with one, or a tree of them, for each part. Stacked batches get an axis before.
          progress: whether to show a bar of steps and the loss, with tqdm.

        Returns:
          The state after the last step, and the metrics of all, stacked along a first axis as
          numpy arrays. A metric whose shape differs between steps is a list, an entry a step.

        Raises:
          ImportError: tqdm is not installed, for `progress`.
          InvalidType: an argument is of the wrong kind, or a hook returned something else.
          ValueError: an argument is out of range, or `batches` is empty.
          RuntimeError: this state was given to a step before.
          NonFiniteError: `skip` has left out too many batches in a row; raised with the metrics
            that tell, after as many calls as are in flight.

          What the iterable, a hook or a step raises is passed on; the state reached is then the
          error's attribute `state`. There is a warning if `batches` ends before `steps`.

        Example:
          >>> import optimize_loss as ol
          >>> step = ol.optimize_loss(lambda p, x: p["w"] * x, learning_rate=1.0, optimizer="SGD")
          >>> state, metrics = step.run(step.init({"w": 10.0}), [1.0, 2.0, 3.0])
          >>> print(state.params["w"], metrics["loss"])
          4.0 [10. 18. 21.]
        """
        self._check_state(state)
        plan = check_plan(steps, steps_per_call, hooks, prefetch, sharding, progress)
        return Run(self, self.many, f"{self.name}loss", plan, state).over(batches)

    def explain(
        self, params: Any, *, steps: int | None = None, model_state: Any = None
    ) -> Explanation:
        """Return what this step will do with each parameter, before anything is allocated.

        Printed, it is a table: the rule of each parameter, its rate and decay at the first step,
        the bytes of its state, and the array that it shares with others, or its sharding; then the
        links in order, the bytes in all, and warnings of what looks like a mistake: parameters of
        at most one axis that are decayed, 16-bit parameters that small updates do not move, a
        schedule that begins at 0 or ends before the run, clipping behind the rule, and options
        without effect.

        Args:
          params: as for `init`; `jax.ShapeDtypeStruct`s, too.
          steps: of the run that is planned, at least 1; None if that is open.
          model_state: as for `init`; it counts in `total_bytes`.

        Raises:
          InvalidType, ValueError: as `init`.

        Example:
          >>> import jax.numpy as jnp, optimize_loss as ol
          >>> step = ol.optimize_loss(lambda p: p["w"].sum(), learning_rate=0.1,
          ...                         rules={"w": dict(learning_rate_multiplier=0.5)})
          >>> told = step.explain({"w": jnp.zeros((2, 3))})
          >>> told.rows[0].rule, told.rows[0].multiplier, told.rows[0].state_bytes, told.warnings
          ('w', 0.5, 48, ())
        """
        key = jax.random.key(0) if self.loss.takes("key") else None
        return explain(
            Setup(
                chain=self.chain,
                rules=self.rules,
                trainable=self._trainable,
                layout=self._layout,
                horizon=check_horizon(self.first_step, steps, self.increment_step),
                rest=(np.int32(self.first_step), key, model_state),
            ),
            params,
        )

    @functools.cached_property
    def _programs(self) -> dict[tuple[bool, bool], Any]:
        """The compiled programs; they live as long as this object."""
        return {}

    def _program(self, many: bool, donate: bool) -> Any:
        """Return the compiled program of one step or of many.

        Inside a transformation of the caller's, such as vmap, there is no memory to donate.
        """
        if (many, donate) not in self._programs:
            function = self._advance_many if many else self._advance
            self._programs[many, donate] = jax.jit(
                function, static_argnums=0, donate_argnums=1 if donate else ()
            )
        return self._programs[many, donate]

    def __getstate__(self) -> dict[str, Any]:
        """Return the options, for pickle: compiled programs stay behind."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def lower(self, state: TrainState, *batch: Any) -> jax.stages.Lowered:
        """Return the program of a single step before compilation, to look at or to compile."""
        return self._program(False, True).lower(self._shardings(state), state, batch)

    def _dispatch(self, many: bool, state: TrainState, batch: tuple[Any, ...]) -> Any:
        self._check_state(state)
        check_ready(state)
        traced = isinstance(state.packed_optimizer["step"], Tracer)
        try:
            return self._program(many, not traced)(self._shardings(state), state, batch)
        except TypeError as error:
            strange = [x for x in jax.tree.leaves(batch) if isinstance(x, str | bytes)]
            if not strange:
                raise
            raise InvalidType(
                f"`batch` must be arrays and numbers. Received: {strange[0]!r} of type "
                f"{type(strange[0]).__name__}."
            ) from error

    def _check_state(self, state: Any) -> None:
        """Raise unless `state` is one of this step, or of one with equal options, and alive."""
        if not isinstance(state, TrainState):
            raise InvalidType(
                "`state` must be a TrainState, from `step.init(params)` or the step before. "
                f"Received: {type(state).__name__}."
            )
        if state.increment_step != self.increment_step:
            raise TreeMismatch(
                "`state` must come from a step with this `increment_global_step`, "
                f"{self.increment_step}. Received: {state.increment_step}."
            )
        for name in ("model_state", "key"):
            if self.loss.takes(name) and getattr(state, name) is None:
                raise TreeMismatch(f"`state` must have a `{name}`, which the loss takes.")
        if (state.placement is None) != (self.shard_state is None):
            raise TreeMismatch(
                "`state` must come from a step with this `shard_state`, "
                f"{self.shard_state!r}. Received: one whose slots are "
                f"{'not ' if state.placement is None else ''}spread over a mesh axis."
            )
        if state.chain != self.chain:
            ours, theirs = dict(self.chain.links), dict(state.chain.links)
            differ = [n for n in {**ours, **theirs} if ours.get(n) != theirs.get(n)]
            same = state.chain.precision == self.chain.precision
            what = differ or ("their order" if same else f"precision {state.chain.precision}")
            raise TreeMismatch(
                "`state` must come from the `init` of this step, or of one with equal options. "
                f"Links that differ: {what}. Received: "
                f"{ {n: theirs.get(n) for n in differ} }, for a step with "
                f"{ {n: ours.get(n) for n in differ} }."
            )
        step = state.packed_optimizer["step"]
        if isinstance(step, jax.Array) and not isinstance(step, Tracer) and step.is_deleted():
            raise RuntimeError(
                "This state was donated: a step gives its memory to the state that it returns. "
                "Use that one, as in `state, metrics = step(state, batch)`."
            )

    def _shardings(self, state: TrainState) -> tuple[Any, ...] | None:
        if not self.colocate_gradients:
            return None
        trained = self._trainable(state.params).leaves
        return tuple(getattr(leaf, "sharding", None) for leaf in trained)

    def _advance(
        self, shardings: tuple[Any, ...] | None, state: TrainState, batch: tuple[Any, ...]
    ) -> tuple[TrainState, dict[str, Any]]:
        """Take one step, while being traced."""
        shapes = jax.tree.map(lambda x: jax.typeof(x).str_short(), batch)
        logger.info("tracing a step for a batch of %s", shapes)
        model_state = run_update_ops(self.update_ops, state.model_state, batch)
        key = state.key
        if key is not None:
            key = jax.random.fold_in(key, state.packed_optimizer["step"])
            for name, link in self.chain.links:
                if isinstance(link, Accumulate):  # calls between two updates
                    key = jax.random.fold_in(key, state.links[name]["gathered"])
        trainable = self._trainable(state.params)
        loss, aux, grads = flat_gradients(
            lambda params: self.loss(params, batch, model_state, key),
            trainable,
            self.chain.loss_scale(state.links, state.step),
            self.chain.numbers_named("rho", state.links, state.step).get("sam"),
        )
        if shardings is not None:
            grads = colocated(grads, shardings)
        new = self._updated(state, trainable, grads, told(loss, aux, self.chain))
        model_state = kept(self.chain.links, new.links, state.model_state, aux.model_state)
        new = dataclasses.replace(new, model_state=model_state).constrained()
        metrics = {"loss": loss, **_metrics.read(self.chain, new.links)}
        if "learning_rate" in self.summaries:
            metrics |= _metrics.rates(self.chain, state.links, state.step, self.learning_rate)
        return new, _metrics.joined(metrics, aux.metrics, self.name)

    def _updated(
        self, state: TrainState, trainable: Trainable, grads: list[Any], extra: dict[str, Any]
    ) -> TrainState:
        """Return the state with the parameters and the optimizer's state after an update."""
        apply = functools.partial(self.chain.apply, schedule_step=state.step, **extra)
        packed, optimizer, layout = state.packed_params, state.links, state.layout
        if layout is None or not layout.trains(trainable.names):
            tree = trainable.tree
            trained, optimizer = apply(tree(grads), state.optimizer, tree(trainable.leaves))
            return state.with_trees(trainable.replace(jax.tree.leaves(trained)), optimizer)
        by_name = dict(zip(trainable.names, grads, strict=True))
        parted = layout.parted(by_name)
        if parted == layout:
            old = layout.only_trained(packed)
            trained, optimizer = apply(layout.gather_grads(by_name), optimizer, old)
        else:
            old = parted.gather(dict(zip(trainable.names, trainable.leaves, strict=True)))
            optimizer = parted.regather_state(optimizer)
            trained, optimizer = apply(parted.gather_grads(by_name), optimizer, old)
            trained = layout.gather(unpacked(trained))
            optimizer = layout.regather_state(optimizer)
        new = dataclasses.replace(state, packed_params={**packed, **trained})
        return new.with_links(optimizer)

    def _advance_many(self, shardings: Any, state: TrainState, batches: Any) -> Any:
        """Take as many steps as the batches have entries, while being traced."""
        step = functools.partial(self._advance, shardings)
        state, metrics = jax.lax.scan(step, state, batches)
        return state.constrained(), metrics


def optimize_loss(
    loss: Callable[..., Any],
    global_step: Any = 0,
    learning_rate: Any = None,
    optimizer: Any = "Adam",
    gradient_noise_scale: Any = None,
    gradient_multipliers: Mapping[Pattern, Any] | None = None,
    clip_gradients: Any = None,
    learning_rate_decay_fn: Callable[[Any, Any], Any] | None = None,
    update_ops: Iterable[Callable[..., Any]] | None = None,
    variables: Iterable[Pattern] | Pattern | None = None,
    name: str | None = None,
    summaries: Iterable[str] | None = None,
    colocate_gradients_with_ops: bool = False,
    increment_global_step: bool = True,
    *,
    moving_average_decay: float | None = None,
    rules: Mapping[Pattern, Mapping[str, Any]] | None = None,
    skip: Literal["nonfinite"] | SkipNonFinite | SkipSpikes | None = None,
    loss_scale: Any = None,
    accumulate: int | Accumulate | None = None,
    ema: Any = None,
    lookahead: int | Lookahead | None = None,
    sam: Any = None,
    plateau: ReduceOnPlateau | None = None,
    precision: Literal["float32", "bfloat16", "float8"] | Precision | None = None,
    shard_state: str | None = None,
    seed: int = 0,
    bucket: Literal["auto"] | int | None = "auto",
) -> TrainStep:
    """Build the training step of a loss: one compiled, donating program.

    Gradients pass through noise, multipliers and clipping, in this order, before the optimizer.

    Args:
      loss: a function of `(params, *batch)` that returns a float scalar, or the scalar and an
        `Aux`. If it declares the keyword-only parameters `model_state` or `key`, it is given the
        model state, or a random key that differs from step to step.
      global_step: the step at which counting starts, an integer of at least 0. Schedules see it;
        noise, corrections such as Adam's, and averages go by the number of updates made. None:
        there is no step; schedules see 0, and `learning_rate_decay_fn` is an error.
      learning_rate: a number of at least 0, or a schedule (a function of the step). None if the
        optimizer brings its own.
      optimizer: one of `OPTIMIZER_CLS_NAMES`, which mean TensorFlow 1's optimizers, or the name
        of another of Keras', such as `AdamW`; a subclass of `ol.optimizers.Optimizer`; a function
        of the learning rate, or of nothing when that is None, which returns one of the following;
        an `Optimizer`, a chain or link of `ol.transforms`, to which the rate is added if they have
        none, or an optax transformation, which must contain it. An `Optimizer` keeps its own
        variables: its options are taken, its state is not.
      gradient_noise_scale: standard deviation of normal noise added to every gradient, before it
        is redrawn within two of them; at least 0; a number or a schedule.
      gradient_multipliers: {name or pattern: number}, multiplied to the gradients it names.
      clip_gradients: a number above 0, the largest global norm; a link, such as
        `adaptive_clipping_fn()`; or a function of `[(gradient, parameter), …]` that returns the
        same with other gradients.
      learning_rate_decay_fn: a function of `(learning_rate, step)` that returns the rate of that
        step, such as `lambda rate, step: ol.schedules.cosine_decay(rate, step, 1000)`.
        `state.set(learning_rate=...)` sets the rate that it is given. Ignored, with a warning,
        when `learning_rate` is None.
      update_ops: functions of the model state, or of it and the batch, that return the new model
        state; run in order before the loss, in the same step.
      variables: names or patterns of the parameters to train. The rest get no gradient and no
        state.
      name: stands before the name of every metric, as in `name/loss`.
      summaries: which metrics to report, of `OPTIMIZER_SUMMARIES`: by default the loss, the
        learning rate and the global norms. The loss is always there.
      colocate_gradients_with_ops: whether to constrain each gradient to its parameter's sharding.
      increment_global_step: whether a step advances the global step that schedules see.
      moving_average_decay: where given, the metric `loss/mean` is a moving average of the loss,
        which starts at 0. Training is not affected.
      rules: {pattern: rule}, in order: the first pattern that matches a parameter decides which
        rule it has. A rule is a dict with some of these keys, whose numbers may be schedules, and
        are set as `state.set(**{"rules.weight_decay/**/bias": 0.0})`:
        `learning_rate_multiplier`: at least 0, of all that a step moves the parameter by, decay
        that goes by the rate too; or a list with one for each entry of the first axis, for layers
        that are stacked, set as `rules.learning_rate_multiplier_of_layers/pattern[0]`.
        `weight_decay`: at least 0, in place of the optimizer's; where that has none, as in `AdamW`.
        `clip_norm`: above 0, the largest joint norm of the rule's parameters, before
        `clip_gradients`, which stays global; set as `rules.clip_norm.` + the pattern with `.` for
        `/` + `/max_norm`.
        `noise_scale`: at least 0, in place of `gradient_noise_scale`.
        `freeze`: True for no gradient and no state, as if `variables` did not name it.
        `optimizer`: as the argument of this name; the others do not see the parameter. Its links
        are called by its name, as `SGD.rate`; without a rate of its own it has `learning_rate`.
        `state_dtype`: "float32", "bfloat16" or "float8", as `precision` has it for all others.
        A rule that decides for no float parameter raises in `step.init`.
      skip: "nonfinite", `ol.transforms.SkipNonFinite()` or `ol.Spike()`: a batch whose loss or
        gradients are not finite, or unusually large, leaves no trace in the state, the model state
        included, but for being counted, in the metrics `skipped` and `skipped_in_a_row`.
        `state.offender` names the parameter. So many in a row, by default 10, are a
        `NonFiniteError`, raised when the host comes to know of it. With a dynamic loss scale
        above 1, gradients alone that are not finite are left to that.
      loss_scale: "dynamic", or a number above 0, or a link of that kind: by what the loss is
        multiplied for the gradients, which lifts those of float16 over its smallest number.
      accumulate: how many batches make one update, at least 1, or an `ol.transforms.Accumulate`
        with another `reduce` than the mean. What goes by steps, goes by updates.
      ema: the decay of an average of the parameters, in [0, 1), a schedule of it, or an
        `ol.transforms.AverageParams`. `state.eval_params` shows the average, in which the first
        parameters do not count: after n updates the newest have the weight (1-β) / (1-βⁿ), about
        1/n at first.
      lookahead: how many updates come before one of slow parameters, at least 1, or an
        `ol.transforms.Lookahead`. `state.eval_params` shows the slow ones.
      sam: the radius ρ within which the parameters are first moved to where the loss is larger,
        above 0: sharpness-aware minimization. The gradients are those of there, at twice the
        cost; loss, metrics and model state those of the parameters. `state.set(rho=...)` sets it.
      plateau: an `ol.transforms.ReduceOnPlateau`, which lowers the learning rate where the loss
        does not fall; its factor is the metric `plateau_scale`.
      precision: how exactly the optimizer's moments are kept: "bfloat16", half of the memory, or
        "float8", a quarter. Parameters of bfloat16 and float16 are then rounded stochastically, so
        that small updates are not lost. `ol.Precision` has more choices and all conditions;
        `state.decoded` shows the moments in float32. None, or "float32", changes nothing.
      shard_state: the name of an axis of the mesh that the parameters are on: each device along it
        keeps and updates its part of every slot, and gathers the new parameters (ZeRO-1). A slot
        none of whose dimensions is a multiple of the number of devices stays whole on each.
      seed: of the noise, of stochastic rounding, and of the key of losses that take one; an
        integer in [0, 2**32).
      bucket: parameters of at most so many entries share one array inside of the state, which
        makes a step with many small ones faster. None: none do. What is computed is the same, but
        for the order of sums in a norm over all gradients, and last bits where XLA contracts other
        products and sums. Links that are not `elementwise` keep
        their parameters by themselves, and an optax transformation, or any other that sees the
        whole tree, keeps all.

    Returns:
      A `TrainStep`: `state = step.init(params)`, then `state, metrics = step(state, batch)`. Its
      links are `gradient_noise`, `gradient_multipliers`, `clip_gradients`, then the optimizer's,
      such as `adam` and `rate`: `state.set(**{"clip_gradients/max_norm": 2.0})`.

    Raises:
      InvalidType: an argument is of the wrong kind. It is a `ValueError`, as contrib promises,
        and a `TypeError`.
      ValueError: an argument has a wrong value, or contradicts another one.

    Example:
      One step of gradient descent on |w · x|, from w = 10 with x = 5:

      >>> import jax.numpy as jnp, optimize_loss as ol
      >>> step = ol.optimize_loss(lambda p, x: abs(p["w"] * x), learning_rate=0.1, optimizer="SGD")
      >>> state, metrics = step(step.init({"w": 10.0}), 5.0)
      >>> print(metrics["loss"], state.params["w"], state.step)
      50.0 9.5 1

    References:
      `tf.contrib.layers.optimize_loss`, TensorFlow 0.8 to 1.15. The README lists the differences.
    """
    check_flags(
        colocate_gradients_with_ops=colocate_gradients_with_ops,
        increment_global_step=increment_global_step,
    )
    rate = options.check_rate(learning_rate, learning_rate_decay_fn, global_step)
    chosen = _metrics.check_summaries(summaries)
    own = check_rules(rules)
    links = options.gradient_links(gradient_noise_scale, seed, gradient_multipliers)
    links = with_noise(own, links, seed)
    links |= _metrics.observed(chosen, clips(own) | options.clip_links(clip_gradients))
    if moving_average_decay is not None:
        check_number("moving_average_decay", moving_average_decay, DECAY)
        links["loss_mean"] = AverageLoss(moving_average_decay)
    around = Around(skip, loss_scale, accumulate, ema, lookahead, sam, plateau)
    inner = options.joined(links, with_rules(own, resolve(optimizer, rate), rate))
    seed = check_integer("seed", seed, SEED)
    kept_as = precision_of(own, check_precision(precision, seed))
    return TrainStep(
        loss=Loss(loss),
        chain=with_precision(chain(**around.links(inner)), kept_as, seed=seed),
        variables=options.check_variables(variables),
        update_ops=options.check_functions("update_ops", update_ops),
        summaries=chosen,
        name=options.check_name(name),
        first_step=0 if global_step is None else check_integer("global_step", global_step, STEP),
        increment_step=increment_global_step and global_step is not None,
        colocate_gradients=colocate_gradients_with_ops,
        seed=seed,
        learning_rate=rate,
        shard_state=check_axis(shard_state),
        bucket=options.check_bucket(bucket),
        rules=own,
    )
