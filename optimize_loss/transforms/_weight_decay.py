"""Decay parameters towards zero."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optimize_loss._engine.by_name import ByName
from optimize_loss._engine.link import Link, NotNegative, Numbers, Slots
from optimize_loss._names import Pattern, any_matches, check_patterns, first_index


@dataclasses.dataclass(frozen=True)
class _WeightDecay(Link):
    """What the ways to decay have in common: a decay for each parameter."""

    weight_decay: NotNegative
    exclude: tuple[Pattern, ...] = ()
    reads_params = True
    elementwise = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "exclude", check_patterns("exclude", self.exclude))

    def check_names(self, names: Sequence[str]) -> None:
        """Raise if a pattern of `exclude`, or of a decay by name, matches no parameter."""
        super().check_names(names)
        any_matches("exclude", self.exclude, names)

    def for_each(self, names: Sequence[str], k: Numbers) -> Iterator[Numbers]:
        """Return the decay of each parameter."""
        rate = k["weight_decay"]
        zero = jnp.zeros_like(rate)
        return ({"weight_decay": zero if spared else rate} for spared in self.spared(names))

    def spared(self, names: Sequence[str]) -> list[bool]:
        """Return for each parameter whether it is not decayed; a decay by name comes first."""
        excluded = [i < len(self.exclude) for i in first_index(self.exclude, tuple(names))]
        if not isinstance(self.weight_decay, ByName):
            return excluded
        chosen = self.weight_decay.chosen("weight_decay", names)
        return [x and n == "weight_decay" for x, n in zip(excluded, chosen, strict=True)]


@dataclasses.dataclass(frozen=True)
class AddWeightDecay(_WeightDecay):
    """Add a multiple of each parameter to its update.

        u ← u + weight_decay · p

    After the rule and before the rate this is decoupled decay, as in AdamW: the parameter shrinks
    by rate · weight_decay · p. Before the rule it is L2 regularisation with a penalty of
    weight_decay · ‖p‖² / 2, whose gradient the rule sees.

    Args:
      weight_decay: at least 0; per unit of the learning rate when decoupled.
      exclude: names or patterns of parameters that are not decayed. A pattern that matches no
        parameter is a `ValueError`.

    Example:
      >>> import jax.numpy as jnp, optimize_loss as ol
      >>> tx = ol.transforms.chain(decay=ol.transforms.AddWeightDecay(0.5, exclude=["**/bias"]))
      >>> p = {"kernel": jnp.array([2.0]), "bias": jnp.array([2.0])}
      >>> updates, _ = tx.update({"kernel": jnp.ones(1), "bias": jnp.ones(1)}, tx.init(p), p)
      >>> print(updates["kernel"], updates["bias"])
      [2.] [1.]

    References:
      I. Loshchilov, F. Hutter, "Decoupled Weight Decay Regularization", 2019,
      https://arxiv.org/abs/1711.05101, algorithm 1, lines 6 and 12; here, as in Keras and optax,
      the decay is multiplied by the learning rate, not only by the schedule multiplier ηₜ.
    """

    elementwise = True

    def leaf(
        self, update: jax.Array, slots: Slots, param: jax.Array, k: Numbers
    ) -> tuple[jax.Array, Slots]:
        """Add the decay to one update."""
        return update + k["weight_decay"] * param, slots


@dataclasses.dataclass(frozen=True)
class ShrinkParams(_WeightDecay):
    """Shrink each parameter before later links see it. It comes before the rule.

        p ← p - learning_rate · weight_decay · p

    The learning rate is that of the only link that has one. With a rule that does not read the
    parameter, such as Adam, this is decoupled decay; a rule that reads it, such as `StepByFtrl`,
    sees the decayed parameter. If no link reads the parameter, the decay is added to the update,
    and the new parameter is rounded once.

    Args:
      weight_decay: at least 0; per unit of the learning rate.
      exclude: names or patterns of parameters that are not decayed. A pattern that matches no
        parameter is a `ValueError`.

    Example:
      >>> import jax.numpy as jnp, optimize_loss as ol
      >>> tx = ol.transforms.chain(decay=ol.transforms.ShrinkParams(0.5),
      ...                          rate=ol.transforms.ScaleByLearningRate(0.5))
      >>> p = {"w": jnp.array([4.0])}
      >>> print(tx.apply({"w": jnp.array([1.0])}, tx.init(p), p)[0]["w"])
      [2.5]

    References:
      `weight_decay` of Keras 2.15's and Keras 3's `Optimizer`, which apply it first.
    """

    needs = "learning_rate"
    elementwise = True

    def scalars(
        self, numbers: Numbers, memory: Numbers, total: Any, step: jax.Array
    ) -> tuple[Numbers, Numbers]:
        """Pass on the learning rate."""
        return {**numbers, "learning_rate": total}, memory

    def before(self, param: jax.Array, k: Numbers) -> jax.Array:
        """Return the decay of one parameter."""
        return -(k["learning_rate"] * k["weight_decay"]) * param
