"""The training step: a compiled program from a state and a batch to the next state."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optimize_loss._checks import InvalidType
from optimize_loss._engine.device import from_host
from optimize_loss._engine.sharding import check_on_mesh, placement_of
from optimize_loss._engine.transfers import asked_for
from optimize_loss._engine.trees import PARAMETER, check_on_device, copied, distinct, placed_like
from optimize_loss._files.named import register_with_flax
from optimize_loss._report.explain import Explanation, explain
from optimize_loss._report.lint import Horizon, check_horizon
from optimize_loss._state.form import Form
from optimize_loss._state.gradients import Trainable
from optimize_loss._state.recipe import (
    Recipe,
    check_model_state,
    layout_of,
    parted,
    trainable_of,
)
from optimize_loss._state.train_state import TrainState
from optimize_loss._step.advance import (
    advance,
    first_arrays,
    first_key,
)
from optimize_loss._step.evaluation import Evaluated
from optimize_loss._step.step import Step


@dataclasses.dataclass(frozen=True, eq=False)
class TrainStep(Recipe, Step):
    """A training step: `state, metrics = step(state, batch)`. `optimize_loss` makes it.

    Attributes:
      loss: the loss, a function of `(params, *batch)`.
      chain: the links that process its gradients.
      variables: patterns of the parameters to train; None for all parameters.
      update_ops: functions of the model state, or of it and the batch, run before the loss.
      summaries: the names of the metrics to report.
      name: the prefix of the names of metrics; "" for no prefix.
      first_step: the global step before the first update.
      increment_step: whether updates advance the global step.
      colocate_gradients: whether to keep each gradient where its parameter is.
      seed: the seed of the random key, for losses that take one.
      learning_rate: the rate given to `optimize_loss`; None if the optimizer brings its own.
      bucket: the most entries of a parameter that shares an array with others; None if no
        parameters do.
      shard_state: the mesh axis over which slots are sharded; None if they have the sharding of
        their parameters.
      rules: the options of some parameters, by pattern.

    Example:
      The gradient is 2 (w - x), so the step goes half of the way to x:

      >>> import optimize_loss as ol
      >>> step = ol.optimize_loss(
      ...     lambda p, x: (p["w"] - x) ** 2, learning_rate=0.25, optimizer="SGD")
      >>> state, metrics = step(step.init({"w": 0.0}), 1.0)
      >>> print(state.params["w"], metrics["loss"])
      0.5 1.0
    """

    @asked_for()
    def init(self, params: Any, *, model_state: Any = None, key: Any = None) -> TrainState:
        """Return the state before the first step.

        Args:
          params: the parameters, a tree of arrays and numbers; or a flax nnx module, or a tree of
            modules, for a loss of `(model, *batch)`: each `nnx.Param` is trained, and everything
            else is the model state, such as running statistics and random number streams. They are
            copied, because a step donates its state.
          model_state: the first model state, for losses and update ops that take one.
          key: a random key, for losses that take one; made from `seed` if not given.

        Raises:
          InvalidType: a leaf of `params` is neither an array nor a number; or is state, such as
            running statistics.
          ValueError: a pattern matches no parameter; there is nothing to train; a parameter to
            train is in host memory; or `model_state` or `key` is missing, or is given although the
            loss does not take it.
        """
        if isinstance(params, TrainState):
            raise InvalidType("`params` must be a tree of arrays. Received: a TrainState.")
        register_with_flax()
        params, model_state, graph = parted(self, params, model_state)
        if graph is None:
            check_model_state(self, model_state)
        params = copied(PARAMETER, params)
        trainable, axis = self._checked(params), self.shard_state
        try:
            packed, optimizer, layout = first_arrays(self, trainable)
        except ValueError as error:
            if self.variables is not None:
                error.add_note(f"Only these parameters are trained: {trainable.names}.")
            raise
        state = TrainState(
            packed_params=packed,
            packed_optimizer=optimizer,
            model_state=copied("`model_state` at", model_state),
            key=first_key(self.loss.takes("key"), self.seed, key),
            first_step=from_host(self.first_step, jnp.int32),
            batches=from_host(0, jnp.int32),
            chain=self.chain,
            increment_step=self.increment_step,
            layout=layout,
            graph=graph,
        )
        state = placed_like(params, distinct(state))
        placement = (
            placement_of(state.packed_params, state.packed_optimizer, axis) if axis else None
        )
        return dataclasses.replace(state, placement=placement)

    @asked_for()
    def explain(
        self, params: Any, *, steps: int | None = None, model_state: Any = None
    ) -> Explanation:
        """Describe what this step will do with each parameter, before anything is allocated.

        `print` shows a table: the rule of each parameter, its rate and decay at the first step, the
        bytes of its state, and the array that it shares with others, or its sharding. Below are the
        links in order, the total bytes, and warnings of likely mistakes: decayed parameters with at
        most one axis, 16-bit parameters that small updates do not move, a schedule that begins at 0
        or ends before the run, clipping after the rule, and options without effect.

        Args:
          params: as for `init`; or `jax.ShapeDtypeStruct`s.
          steps: the number of steps of the planned run, at least 1; None if it is not known.
          model_state: as for `init`; it counts in `total_bytes`.

        Raises:
          InvalidType, ValueError: as `init`.

        Example:
          >>> import jax.numpy as jnp, optimize_loss as ol
          >>> step = ol.optimize_loss(lambda p: p["w"].sum(), learning_rate=0.1,
          ...                         rules={"w": dict(learning_rate_multiplier=0.5)})
          >>> seen = step.explain({"w": jnp.zeros((2, 3))})
          >>> seen.rows[0].rule, seen.rows[0].multiplier, seen.rows[0].state_bytes, seen.warnings
          ('w', 0.5, 48, ())
        """
        key = jax.random.key(0) if self.loss.takes("key") else None
        params, model_state, _ = parted(self, params, model_state)
        rest = (np.int32(self.first_step), np.int32(0), key, model_state)
        layout = functools.partial(layout_of, self)
        return explain(self, params, self._horizon(steps), rest, layout)

    def _horizon(self, steps: int | None) -> Horizon:
        return check_horizon(self.first_step, steps, self.increment_step)

    def _checked(self, params: Any) -> Trainable:
        """Return which of these arrays are trained, if this step can train them."""
        self.rules.check(params)
        trainable = trainable_of(self, params)
        check_on_device(trainable.names, trainable.leaves)
        if self.shard_state:
            check_on_mesh(self.shard_state, trainable.names, trainable.leaves)
        return trainable

    def _evaluated(self, state: TrainState) -> tuple[Evaluated, ...]:
        return (Evaluated("", self.loss, state.key),)

    @property
    def _prefixes(self) -> dict[str, str]:
        return {self.name: ""}

    def _advance(self, shardings: Any, state: TrainState, batch: Any) -> Any:
        return advance(self, shardings, state, batch)

    def _shardings(self, state: TrainState) -> tuple[Any, ...] | None:
        """Return where gradients are to lie; None where XLA may choose."""
        if not self.colocate_gradients:
            return None
        trained = trainable_of(self, state.outline).leaves
        return tuple(getattr(leaf, "sharding", None) for leaf in trained)

    @functools.cached_property
    def _form(self) -> Form:
        return Form(self.increment_step, (), self.shard_state is not None, self.chain)

    @functools.cached_property
    def _needed(self) -> tuple[str, ...]:
        """What the loss takes of the state besides parameters."""
        return tuple(name for name in ("model_state", "key") if self.loss.takes(name))
