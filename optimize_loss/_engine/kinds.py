"""Kinds of links that the engine treats in a way of their own."""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax

from optimize_loss._engine.link import Link, Numbers, Slots, Stage


@dataclasses.dataclass(frozen=True)
class Gate(Link):
    """A link behind which others run only where it lets them: a guard, an accumulation.

    Among what `scalars` returns for the leaves is `open`, a bool. Unless it is true, parameters,
    the slots of the links behind and the count of updates stay as they are. Of a gate that needs
    "loss_and_weight", a `loss_behind` among it is the loss which the links behind see, and
    `empty_behind` says whether nothing was gathered, so that they keep their memory.

    Example:
      A gate that lets small gradients through:

      >>> import dataclasses, optimize_loss as ol
      >>> @dataclasses.dataclass(frozen=True)
      ... class Below(ol.transforms.Gate):
      ...     bound: ol.transforms.Positive
      ...     needs = "global_norm"
      ...     def scalars(self, numbers, memory, total, step):
      ...         return {"open": total < numbers["bound"]}, memory
      >>> tx = ol.transforms.chain(
      ...     below=Below(2.0), rate=ol.transforms.ScaleByLearningRate(1.0))
      >>> state = tx.init({"w": 0.0})
      >>> print(tx.update({"w": 1.0}, state)[0]["w"], tx.update({"w": 3.0}, state)[0]["w"])
      -1.0 0.0
    """

    def behind(self, k: Numbers) -> jax.Array | None:
        """Return the scalar that multiplies the updates on the way out; None for 1.

        It is applied where the gate is open, so no copy of all updates is made.
        """
        return None

    def with_loss(self) -> "Gate":
        """Return the same gate, with what the links behind need to see its loss."""
        return self

    def is_empty(self, weight: Any) -> jax.Array | None:
        """Return whether a batch of this weight has nothing in it; None where all batches count."""
        return None


class Opening(NamedTuple):
    """What a gate says in one step."""

    gate: Gate
    k: Numbers


@dataclasses.dataclass(frozen=True)
class LossScale(Link):
    """What the links have in common that divide by the factor of the loss.

    One that is a `Gate`, too, is dynamic: it shrinks where a gradient is not finite.
    """

    stage = Stage.SCALE

    def factor_of_loss(self, numbers: Numbers, memory: Numbers) -> jax.Array:
        """Return by what the loss is multiplied in this step."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class RateScale(Link):
    """A link that multiplies the learning rates of all links by a number in its memory."""

    def scale(self, memory: Numbers) -> jax.Array:
        """Return by what all learning rates are multiplied."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Averaging(Link):
    """A link that keeps better parameters than those that are trained, such as their average.

    Example:
      A link that keeps the parameter before the last update, as a better one:

      >>> import dataclasses, optimize_loss as ol
      >>> @dataclasses.dataclass(frozen=True)
      ... class Before(ol.transforms.Averaging):
      ...     def slots(self, param):
      ...         return {"before": param}
      ...     def after(self, param, moved, slots, k):
      ...         return moved, {"before": param}
      ...     def averaged(self, param, slots, numbers):
      ...         return slots["before"]
      >>> tx = ol.transforms.chain(
      ...     rate=ol.transforms.ScaleByLearningRate(1.0), before=Before())
      >>> params, state = tx.apply({"w": 1.0}, tx.init({"w": 3.0}), {"w": 3.0})
      >>> print(params["w"], tx.averaged(state, params)["w"])
      2.0 3.0
    """

    def averaged(self, param: jax.Array, slots: Slots, numbers: Numbers) -> jax.Array:
        """Return the parameter to use after training.

        Args:
          param: the parameter as it is trained, in float32 or wider.
          slots: the slots.
          numbers: the hyperparameters as they are in the state.
        """
        raise NotImplementedError


def weighs_nothing(links: Iterable[Any], weight: Any) -> jax.Array | None:
    """Return whether a batch is empty, for links of which one weighs batches; None without one."""
    found = (link.is_empty(weight) for link in links if isinstance(link, Gate))
    return next((empty for empty in found if empty is not None), None)
