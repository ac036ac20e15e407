"""What a step is made of."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from optimize_loss._engine.bucket import Layout, find_layout
from optimize_loss._engine.chain import Chain
from optimize_loss._engine.sharding import devices_along
from optimize_loss._names import Pattern, flatten
from optimize_loss._state.gradients import Trainable, find_trainable
from optimize_loss._state.loss import Loss
from optimize_loss._state.modules import Graph, check_trained, split
from optimize_loss._state.rules import NO_RULES, Rules


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


def trainable_of(recipe: Recipe, params: Any) -> Trainable:
    """Return the parameters with a mark for those that are trained."""
    frozen = recipe.rules.frozen if recipe.rules.having_frozen else None
    return find_trainable(params, recipe.variables, frozen)


def parted(recipe: Recipe, model: Any, model_state: Any) -> tuple[Any, Any, Graph | None]:
    """Return the parameters, the first model state, and the structure of a module.

    Raises:
      InvalidType: there is state among the parameters.
      ValueError: a module has its own state, and another is given or taken.
    """
    flatten(model)  # where keys cannot be sorted, it says which
    params, rest, graph = split(model)
    if graph is None:
        check_trained(params)
        return params, model_state, None
    if model_state is not None or recipe.loss.takes("model_state"):
        raise ValueError(
            "`model_state` must not be given with a module of flax nnx, nor taken by its loss: "
            "the module has its own state."
        )
    return params, rest, graph


def check_model_state(recipe: Recipe, model_state: Any) -> Any:
    """Return the first model state if there is one exactly where something takes it."""
    takers = ["the loss"] if recipe.loss.takes("model_state") else []
    takers += ["`update_ops`"] if recipe.update_ops else []
    if takers and model_state is None:
        raise ValueError(
            "`model_state` must be given, as in `step.init(params, model_state=...)`: "
            f"needed by {' and '.join(takers)}."
        )
    if model_state is not None and not takers:
        raise ValueError(
            "`model_state` must not be given: the loss does not take one. To take one, "
            "declare it keyword-only, as in `loss(params, x, *, model_state)`."
        )
    return model_state


def layout_of(recipe: Recipe, trainable: Trainable) -> Layout | None:
    """Return how small parameters lie in one array; None where each lies by itself."""
    if recipe.bucket is None:
        return None
    kinds = kinds_of(recipe, trainable)
    return find_layout(trainable.params, kinds, trainable.marks, recipe.bucket)


def kinds_of(recipe: Recipe, trainable: Trainable) -> list[Any]:
    """Return for each parameter what those share that may lie in one array; None for none."""
    kinds: Iterator[Any] = iter(recipe.chain.kinds(trainable.tree(trainable.leaves)))
    axis = recipe.shard_state
    if axis:  # members that can be parted equally have an array that can
        pairs = zip(kinds, trainable.leaves, strict=True)
        kinds = (kind and (kind, x.size % devices_along(axis, x) == 0) for kind, x in pairs)
    return [next(kinds) if trained else () for trained in trainable.marks]
