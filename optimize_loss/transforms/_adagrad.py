"""Adagrad: divide by the root of the sum of squares."""

import dataclasses

import jax
import jax.numpy as jnp

from optimize_loss._engine.arrays import abs_squared, full
from optimize_loss._engine.link import Link, NotNegative, Numbers, Slots, Start


@dataclasses.dataclass(frozen=True)
class ScaleByAdagrad(Link):
    """Divide each gradient by the root of the sum of all its squares.

        n ← n + g²,   u = g / √(n + ε)      (0 where n + ε is 0)

    Args:
      initial_accumulator_value: n before the first step, at least 0.
      epsilon: ε, at least 0, in the unit of the gradients squared; 0 in TensorFlow 1.

    Example:
      >>> import jax.numpy as jnp, optimize_loss as ol
      >>> tx = ol.transforms.chain(adagrad=ol.transforms.ScaleByAdagrad(9.0, epsilon=0.0))
      >>> g = {"w": jnp.array([4.0])}
      >>> print(tx.update(g, tx.init(g))[0]["w"].round(6))
      [0.8]

    References:
      J. Duchi, E. Hazan, Y. Singer, "Adaptive Subgradient Methods for Online Learning and
      Stochastic Optimization", 2011, https://jmlr.org/papers/v12/duchi11a.html, figure 1, with a
      diagonal matrix; matches `tf.train.AdagradOptimizer` (ε 0) and Keras 2.15 `Adagrad`.
    """

    initial_accumulator_value: Start = 0.1
    epsilon: NotNegative = 1e-7
    elementwise = True

    def slots(self, param: jax.Array) -> dict[str, jax.Array]:
        """Return the sum of squares."""
        return {"sum_of_squares": full(param, self.initial_accumulator_value)}

    def leaf(
        self, update: jax.Array, slots: Slots, param: jax.Array, k: Numbers
    ) -> tuple[jax.Array, Slots]:
        """Add one gradient to the sum."""
        n = slots["sum_of_squares"] + abs_squared(update)
        denominator = n + k["epsilon"]
        is_zero = denominator == 0
        scale = jnp.where(is_zero, 0, jax.lax.rsqrt(jnp.where(is_zero, 1, denominator)))
        return update * scale, {"sum_of_squares": n}
