"""Multiply the gradients of named parameters."""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp

from optimize_loss import _checks
from optimize_loss._checks import InvalidType, received
from optimize_loss._engine.link import Link, Number
from optimize_loss._names import Pattern, check_pattern, first_matches, pattern_text


@dataclasses.dataclass(frozen=True)
class MultiplyGradients(Link):
    """Multiply the gradients of the parameters that a pattern names.

        g ← g · multipliers[first pattern that matches the name], or g where none does

    Each multiplier is a hyperparameter of its own: `state.set(**{"multiply/dense/*": 0.5})`.
    Under a rule that normalises gradients, such as Adam, a constant multiplier changes little.

    Args:
      multipliers: {name or pattern: number}. A pattern that decides for no parameter raises
        a `ValueError`. A trailing `:0` is ignored.

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

    multipliers: Mapping[Pattern, Number] | tuple[tuple[Pattern, Number], ...]
    elementwise = True

    def __post_init__(self):
        given = self.multipliers
        pairs_given = isinstance(given, tuple) and all(
            isinstance(pair, tuple) and len(pair) == 2 for pair in given
        )
        if not given or not (isinstance(given, Mapping) or pairs_given):
            raise InvalidType(
                "`gradient_multipliers` must map names or patterns to numbers, and have at least "
                f"one. {received('gradient_multipliers', self.multipliers)}"
            )
        pairs = []
        for pattern, value in dict(self.multipliers).items():
            text = pattern_text(check_pattern("gradient_multipliers", pattern))
            name = f"gradient_multipliers[{text!r}]"
            pairs.append((pattern, value if callable(value) else _checks.FINITE.check(name, value)))
        texts = [pattern_text(pattern) for pattern, _ in pairs]
        if len(set(texts)) < len(texts):
            raise ValueError(f"`gradient_multipliers` must have different keys. Received: {texts}.")
        object.__setattr__(self, "multipliers", tuple(pairs))

    def rule(self, name):
        """Return the rule of every multiplier: a finite number."""
        return _checks.FINITE

    def numbers(self):
        """Return each multiplier under the text of its pattern."""
        return {pattern_text(pattern): value for pattern, value in dict(self.multipliers).items()}

    def check_names(self, names):
        """Raise if a pattern decides for no parameter."""
        first_matches("gradient_multipliers", dict(self.multipliers), names)

    def for_each(self, names, k):
        """Return the multiplier of each parameter."""
        one = jnp.ones_like(next(iter(k.values())))
        for pattern in first_matches("gradient_multipliers", dict(self.multipliers), names):
            yield {"multiplier": one if pattern is None else k[pattern_text(pattern)]}

    def factor(self, k):
        """Return the multiplier of one gradient."""
        return k["multiplier"]
