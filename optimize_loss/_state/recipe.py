"""What a step is made of, and what of it must agree with the states that it takes."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.core import Tracer

from optimize_loss._checks import InvalidType, TreeMismatch
from optimize_loss._engine.bucket import Layout, find_layout
from optimize_loss._engine.chain import Chain
from optimize_loss._engine.equal import same
from optimize_loss._engine.sharding import devices_along
from optimize_loss._names import Pattern
from optimize_loss._state.gradients import Trainable, find_trainable
from optimize_loss._state.loss import Loss
from optimize_loss._state.modules import Graph, check_trained, split
from optimize_loss._state.rules import NO_RULES, Rules
from optimize_loss._state.train_state import TrainState


@dataclasses.dataclass(frozen=True, eq=False)
class Recipe:
    """What decides on the first state of a step and on the next ones; `TrainStep` has examples.

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

    def trainable(self, params: Any) -> Trainable:
        """Return the parameters with a mark for those that are trained."""
        frozen = self.rules.frozen if self.rules.having_frozen else None
        return find_trainable(params, self.variables, frozen)

    def parted(self, model: Any, model_state: Any) -> tuple[Any, Any, Graph | None]:
        """Return the parameters, the first model state, and the structure of a module.

        Raises:
          InvalidType: there is state among the parameters.
          ValueError: a module has its own state, and another is given or taken.
        """
        params, rest, graph = split(model)
        if graph is None:
            check_trained(params)
            return params, model_state, None
        if model_state is not None or self.loss.takes("model_state"):
            raise ValueError(
                "`model_state` must not be given with a module of flax nnx, nor taken by its loss: "
                "the module has its own state."
            )
        return params, rest, graph

    def check_model_state(self, model_state: Any) -> Any:
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

    def layout(self, trainable: Trainable) -> Layout | None:
        """Return how small parameters lie in one array; None where each lies by itself."""
        if self.bucket is None:
            return None
        kinds: Iterator[Any] = iter(self.chain.kinds(trainable.tree(trainable.leaves)))
        axis = self.shard_state
        if axis:  # members that can be parted equally have an array that can
            pairs = zip(kinds, trainable.leaves, strict=True)
            kinds = (kind and (kind, x.size % devices_along(axis, x) == 0) for kind, x in pairs)
        of_all = [next(kinds) if trained else () for trained in trainable.marks]
        return find_layout(trainable.params, of_all, trainable.marks, self.bucket)

    @functools.cached_property
    def form(self) -> "Form":
        """What a state must agree with."""
        return Form(self.increment_step, (), self.shard_state is not None, self.chain)

    @functools.cached_property
    def _needed(self) -> tuple[str, ...]:
        """What the loss takes of the state besides parameters."""
        return tuple(name for name in ("model_state", "key") if self.loss.takes(name))

    def check_state(self, state: Any) -> None:
        """Raise unless `state` is one of this step, or of one with equal options, and alive."""
        if not isinstance(state, TrainState):
            raise InvalidType(
                "`state` must be a TrainState, from `step.init(params)` or the step before. "
                f"Received: {type(state).__name__}."
            )
        if (form := Form.of(state, self._needed)) != self.form:
            raise TreeMismatch(self.form.difference(form))
        step = state.packed_optimizer["step"]
        if isinstance(step, jax.Array) and not isinstance(step, Tracer) and step.is_deleted():
            raise RuntimeError(
                "This state was donated: a step gives its memory to the state that it returns. "
                "Use that one, as in `state, metrics = step(state, batch)`."
            )


_ADVICE = (
    " Functions are equal where they have the same code, closure and defaults. To go on with a "
    "state whose links do the same: `dataclasses.replace(state, chain=step.chain)`."
)


class Form(NamedTuple):
    """What must agree between a step and a state.

    Every call compares two of them. It costs little: a tuple looks first whether its parts are
    the same objects.

    Attributes:
      increment_step: whether updates advance the global step.
      missing: what the loss takes and the state does not have; nothing, for a step.
      spread: whether slots are spread over a mesh axis.
      chain: the links.
    """

    increment_step: bool
    missing: tuple[str, ...]
    spread: bool
    chain: Chain

    @classmethod
    def of(cls, state: TrainState, needed: tuple[str, ...]) -> "Form":
        """Return that of a state, for a step whose loss takes these attributes of it."""
        missing = needed and tuple(n for n in needed if getattr(state, n) is None)
        return cls(state.increment_step, missing, state.placement is not None, state.chain)

    def difference(self, other: "Form") -> str:
        """Return how the form of a state differs from this one, that of a step."""
        if self.increment_step != other.increment_step:
            return (
                "`state` must come from a step with this `increment_global_step`, "
                f"{self.increment_step}. Received: {other.increment_step}."
            )
        if other.missing:
            return f"`state` must have a `{other.missing[0]}`, which the loss takes."
        if self.spread != other.spread:
            return (
                "`state` must come from a step with this `shard_state`. Received: one whose slots "
                f"are {'' if other.spread else 'not '}spread over a mesh axis."
            )
        return _difference_of_chains(self.chain, other.chain)


def _difference_of_chains(mine: Chain, other: Chain) -> str:
    ours, theirs = dict(mine.links), dict(other.links)
    differ = [n for n in {**ours, **theirs} if not same(ours.get(n), theirs.get(n))]
    as_here = other.precision == mine.precision
    what: Any = differ or ("their order" if as_here else f"precision {other.precision}")
    came, wanted = ({n: links.get(n) for n in differ} for links in (theirs, ours))
    alike = differ and [*map(type, came.values())] == [*map(type, wanted.values())]
    return (
        "`state` must come from the `init` of this step, or of one with equal options. Links that "
        f"differ: {what}. Received: {came}, for a step with {wanted}.{_ADVICE if alike else ''}"
    )
