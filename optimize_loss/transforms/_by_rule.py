"""Links whose number depends on the first of several rules that names a parameter."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from optimize_loss import _checks
from optimize_loss._engine.link import Link, Seed, Stage
from optimize_loss._engine.selection import told
from optimize_loss._names import Pattern, first_index, pattern_text
from optimize_loss.transforms._noise import AddNoise


@dataclasses.dataclass(frozen=True)
class ByRule:
    """Tells the parameters for which the first pattern that matches is one of those chosen.

    Patterns may match nothing here: whoever makes the rules has proven that they match.

    Args:
      patterns: of all rules, in order.
      chosen: the indices of some; the index behind the last means parameters that none matches.
      within: where given, only those that this tells: as the `where` of `ForParameters`.
    """

    patterns: tuple[Pattern, ...]
    chosen: tuple[int, ...]
    within: Any = None

    @property
    def whole(self) -> "ByRule":
        """The same rules without what narrows them."""
        return dataclasses.replace(self, within=None)

    def takes(self, names: Sequence[str], leaves: Sequence[Any]) -> list[bool]:
        """Return for each parameter whether it is meant."""
        ours = [i in self.chosen for i in first_index(self.patterns, tuple(names))]
        if self.within is None:
            return ours
        return [a and b for a, b in zip(ours, told(self.within, names, leaves), strict=True)]


@dataclasses.dataclass(frozen=True)
class _OfRules(Link):
    """A number for each rule, called after the rule's pattern.

    Args:
      patterns: of all rules, in order: the first that matches decides.
      values: for each rule a number or a schedule, or None where the rule says nothing.
    """

    patterns: tuple[Pattern, ...]
    values: tuple[Any, ...]

    def rule(self, name):
        """Return the rule of every number of a rule: at least 0."""
        return _checks.NOT_NEGATIVE

    def numbers(self):
        """Return each number under the text of its pattern."""
        pairs = zip(self.patterns, self.values, strict=True)
        return {pattern_text(p): value for p, value in pairs if value is not None}

    def scalars(self, numbers, memory, total, step):
        """Keep the numbers of rules by themselves, as a pattern may be any text."""
        return {"of_rules": numbers}, memory

    def for_each(self, names, k):
        """Return the number of each parameter."""
        texts = [pattern_text(pattern) for pattern in self.patterns]
        found = first_index(self.patterns, tuple(names))
        return ({"number": k["of_rules"][texts[i]]} for i in found)


@dataclasses.dataclass(frozen=True)
class MultiplySteps(_OfRules):
    """Multiply all that a step moves a parameter by: the update, and decay that went before.

    p_new - p ← multiplier · (p_new - p)
    """

    stage = Stage.MULTIPLY
    elementwise = True

    def after(self, param, moved, slots, k):
        """Multiply what one parameter moves by."""
        return moved * k["number"], slots


@dataclasses.dataclass(frozen=True)
class MultiplyLayers(_OfRules):
    """The same for parameters that are stacked along their first axis: a multiplier for each layer.

    `values` are tuples here, and the numbers are called `pattern[0]`, `pattern[1]`, …
    """

    stage = Stage.MULTIPLY

    def numbers(self):
        """Return the multiplier of each layer under the text of its pattern, with its index."""
        return {
            f"{pattern_text(pattern)}[{i}]": value
            for pattern, each in zip(self.patterns, self.values, strict=True)
            for i, value in enumerate(each or ())
        }

    def for_each(self, names, k):
        """Return the multipliers of each parameter, as an array."""
        stacks = [
            jnp.stack([k["of_rules"][f"{pattern_text(pattern)}[{i}]"] for i in range(len(each))])
            if each
            else None
            for pattern, each in zip(self.patterns, self.values, strict=True)
        ]
        return ({"numbers": stacks[i]} for i in first_index(self.patterns, tuple(names)))

    def after(self, param, moved, slots, k):
        """Multiply what each layer moves by."""
        return moved * k["numbers"].reshape(-1, *[1] * (moved.ndim - 1)), slots


@dataclasses.dataclass(frozen=True)
class ShrinkByRule(_OfRules):
    """`ShrinkParams` with the decay of the rule: p ← p - learning_rate · weight_decay · p."""

    needs = "learning_rate"
    reads_params = True
    elementwise = True

    def scalars(self, numbers, memory, total, step):
        """Pass on the learning rate."""
        return {"of_rules": numbers, "learning_rate": total}, memory

    def before(self, param, k):
        """Return the decay of one parameter."""
        return -(k["learning_rate"] * k["number"]) * param


@dataclasses.dataclass(frozen=True)
class AddDecayByRule(_OfRules):
    """`AddWeightDecay` with the decay of the rule: u ← u + weight_decay · p."""

    reads_params = True
    elementwise = True

    def leaf(self, update, slots, param, k):
        """Add the decay to one update."""
        return update + k["number"] * param, slots


@dataclasses.dataclass(frozen=True)
class AddNoiseByRule(_OfRules):
    """`AddNoise` with the scale of the rule, and the noise that the same seed gives there."""

    seed: Seed = 0

    def rule(self, name):
        """Return the rule of the seed, or of a scale."""
        return _checks.SEED if name == "seed" else super().rule(name)

    def numbers(self):
        """Return the scales, and the seed."""
        return {**super().numbers(), "seed": self.seed}

    def scalars(self, numbers, memory, total, step):
        """Pass on the step, which keys the noise."""
        return {"of_rules": numbers, "seed": numbers["seed"], "step": step}, memory

    def for_each(self, names, k):
        """Return the scale of each parameter's noise, and its key."""
        keys = AddNoise(0.0).for_each(names, k)
        scales = super().for_each(names, k)
        return ({**key, "scale": scale["number"]} for key, scale in zip(keys, scales, strict=True))

    def leaf(self, update, slots, param, k):
        """Add noise to one gradient."""
        return AddNoise(0.0).leaf(update, slots, param, k)
