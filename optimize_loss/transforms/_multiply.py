"""Multiply gradients, or complete updates of parameters."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optimize_loss import _checks
from optimize_loss._checks import Rule
from optimize_loss._engine.by_name import ByName, by_name, numbers_by_name
from optimize_loss._engine.link import (
    Finite,
    Link,
    NotNegative,
    Numbers,
    Schedule,
    Slots,
    Stage,
    checked,
)


@dataclasses.dataclass(frozen=True)
class MultiplyGradients(Link):
    """Multiply the gradients of the parameters that a pattern names.

        g ← g · multipliers[first pattern that matches the name], or g where none does

    Each multiplier is a separate hyperparameter: `state.set(**{"multiply/dense/*": 0.5})`. Under a
    rule that normalises gradients, such as Adam, a constant multiplier changes little.

    Args:
      multipliers: {name or pattern: number}. A pattern that decides for no parameter is a
        `ValueError`. A trailing `:0` is ignored.

    Example:
      >>> import jax.numpy as jnp, optimize_loss as ol
      >>> tx = ol.transforms.chain(multiply=ol.transforms.MultiplyGradients({"**/bias": 2.0}))
      >>> g = {"dense": {"kernel": jnp.ones(1), "bias": jnp.ones(1)}}
      >>> updates, _ = tx.update(g, tx.init(g))
      >>> print(updates["dense"]["kernel"], updates["dense"]["bias"])
      [1.] [2.]

    References:
      `gradient_multipliers` of `tf.contrib.layers.optimize_loss`, which ignores unknown names.
    """

    multipliers: Finite
    elementwise = True

    def __post_init__(self) -> None:
        if not isinstance(self.multipliers, ByName):
            check = functools.partial(checked, _checks.FINITE)
            multipliers = by_name("gradient_multipliers", self.multipliers, check, rest=1.0)
            object.__setattr__(self, "multipliers", multipliers)

    def check_names(self, names: Sequence[str]) -> None:
        """Raise if a pattern decides for no parameter."""
        numbers_by_name(self)["multipliers"].check_names("gradient_multipliers", names)

    def factor(self, k: Numbers) -> jax.Array:
        """Return the multiplier of one gradient."""
        return k["multipliers"]


@dataclasses.dataclass(frozen=True)
class MultiplySteps(Link):
    """Multiply the complete update of a parameter, including decoupled decay.

    p_new - p ← multiplier · (p_new - p)
    """

    multiplier: NotNegative
    stage = Stage.MULTIPLY
    elementwise = True

    def after(
        self, param: jax.Array, moved: jax.Array, slots: Slots, k: Numbers
    ) -> tuple[jax.Array, Slots]:
        """Multiply the update of one parameter."""
        return moved * k["multiplier"], slots


@dataclasses.dataclass(frozen=True)
class MultiplyLayers(Link):
    """The same for a parameter that is stacked along its first axis: a number for each layer."""

    multipliers: tuple[float | Schedule, ...]
    stage = Stage.MULTIPLY

    def rule(self, name: str) -> Rule:
        """Return the rule of every multiplier: at least 0."""
        return _checks.NOT_NEGATIVE

    def numbers(self) -> dict[str, Any]:
        """Return the multipliers, called 0, 1, …"""
        return {str(i): number for i, number in enumerate(self.multipliers)}

    def scalars(
        self, numbers: Numbers, memory: Numbers, total: Any, step: jax.Array
    ) -> tuple[Numbers, Numbers]:
        """Return the multipliers as one array."""
        return {"multipliers": jnp.stack([numbers[name] for name in self.numbers()])}, memory

    def after(
        self, param: jax.Array, moved: jax.Array, slots: Slots, k: Numbers
    ) -> tuple[jax.Array, Slots]:
        """Multiply the update of each layer."""
        return moved * k["multipliers"].reshape(-1, *[1] * (moved.ndim - 1)), slots
