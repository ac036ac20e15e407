"""Kinds of links that the engine treats specially."""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax

from optimize_loss._engine.link import Link, Numbers, Slots, Stage


@dataclasses.dataclass(frozen=True)
class Gate(Link):
    """A link that decides whether later links run: a guard, an accumulation.

    Its `scalars` include `open`, a bool, for the leaves. If it is false, parameters, the slots of
    later links and the count of updates do not change. If the gate needs "loss_and_weight", it may
    also return `loss_behind`, the loss for later links, and `empty_behind`, whether nothing was
    gathered, so that they keep their memory.

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

        It is applied only if the gate is open, so the updates are not copied.
        """
        return None

    def with_loss(self) -> "Gate":
        """Return the same gate, which also provides its loss to later links."""
        return self

    def is_empty(self, weight: Any) -> jax.Array | None:
        """Return whether a batch of this weight is empty; None if all batches count."""
        return None


class Opening(NamedTuple):
    """What a gate says in one step."""

    gate: Gate
    k: Numbers


@dataclasses.dataclass(frozen=True)
class LossScale(Link):
    """The base of links that divide by the factor of the loss.

    If it is also a `Gate`, it is dynamic: it shrinks if a gradient is not finite.
    """

    stage = Stage.SCALE

    def factor_of_loss(self, numbers: Numbers, memory: Numbers) -> jax.Array:
        """Return the factor of the loss in this step."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class RateScale(Link):
    """A link that multiplies the learning rates of all links by a number in its memory."""

    def scale(self, memory: Numbers) -> jax.Array:
        """Return the factor of all learning rates."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Averaging(Link):
    """A link that keeps parameters to evaluate, such as the average of those that are trained.

    Example:
      A link that keeps the parameter before the last update:

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
          numbers: the hyperparameters in the state.
        """
        raise NotImplementedError


def weighs_nothing(links: Iterable[Any], weight: Any) -> jax.Array | None:
    """Return whether a batch is empty, for links of which one weighs batches; None without one."""
    found = (link.is_empty(weight) for link in links if isinstance(link, Gate))
    return next((empty for empty in found if empty is not None), None)
