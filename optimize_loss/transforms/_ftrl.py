"""Follow the regularised leader."""

import dataclasses

import jax
import jax.numpy as jnp

from optimize_loss._engine.arrays import abs_squared, full, zeros
from optimize_loss._engine.link import (
    Link,
    NotNegative,
    NotPositive,
    Numbers,
    Positive,
    Slots,
    Start,
)


@dataclasses.dataclass(frozen=True)
class StepByFtrl(Link):
    """Set each parameter to the point that would have been best for all gradients so far.

        n' = n + g²,   σ = (n'^-power - n^-power) / learning_rate
        z ← z + g + 2 · l2_shrinkage · p - σ · p
        p ← 0 if |z| ≤ l1, else (l1 · sign(z) - z) / ((n'^-power + beta) / learning_rate + 2 · l2)

    z starts at 0, so the first step forgets the initial parameter. The update is the difference
    to p: no `ScaleByLearningRate` follows. For real parameters.

    Args:
      learning_rate: above 0. A schedule must not reach 0.
      learning_rate_power: power, at most 0; -1/2 as in the paper, 0 for a fixed rate.
      initial_accumulator_value: n before the first step, at least 0.
      l1_regularization_strength: l1, at least 0; keeps parameters at exactly 0.
      l2_regularization_strength: l2, at least 0.
      l2_shrinkage_regularization_strength: l2_shrinkage, at least 0: a penalty on the parameters
        that does not affect n.
      beta: at least 0, as in the paper.

    Example:
      >>> import jax.numpy as jnp, optimize_loss as ol
      >>> tx = ol.transforms.chain(ftrl=ol.transforms.StepByFtrl(1.0, -0.5, 9.0))
      >>> p, g = {"w": jnp.array([0.0])}, {"w": jnp.array([4.0])}
      >>> print(tx.apply(g, tx.init(p), p)[0]["w"].round(6))
      [-0.8]

    References:
      H. B. McMahan et al., "Ad Click Prediction: a View from the Trenches", 2013,
      https://research.google.com/pubs/archive/41159.pdf, algorithm 1, with 2 · l2 for its λ₂;
      matches `tf.train.FtrlOptimizer` and Keras 2.15 `Ftrl`.
    """

    learning_rate: Positive
    learning_rate_power: NotPositive = -0.5
    initial_accumulator_value: Start = 0.1
    l1_regularization_strength: NotNegative = 0.0
    l2_regularization_strength: NotNegative = 0.0
    l2_shrinkage_regularization_strength: NotNegative = 0.0
    beta: NotNegative = 0.0
    reads_params = True
    elementwise = True

    def slots(self, param: jax.Array) -> dict[str, jax.Array]:
        """Return z and n."""
        return {"z": zeros(param), "n": full(param, self.initial_accumulator_value)}

    def leaf(
        self, update: jax.Array, slots: Slots, param: jax.Array, k: Numbers
    ) -> tuple[jax.Array, Slots]:
        """Return the step of one parameter."""
        rate, power, l1 = (
            k["learning_rate"],
            -k["learning_rate_power"],
            k["l1_regularization_strength"],
        )
        n = slots["n"] + abs_squared(update)
        root, old_root = n**power, slots["n"] ** power
        shrinkage = 2 * k["l2_shrinkage_regularization_strength"]
        z = slots["z"] + update + (shrinkage - (root - old_root) / rate) * param
        curvature = (root + k["beta"]) / rate + 2 * k["l2_regularization_strength"]
        # Zero times the curvature, and NaN where |z| ≤ l1 does not hold: what is NaN stays NaN.
        zero, elsewhere = 0 * curvature, (l1 * jnp.sign(z) - z) / curvature
        new = jnp.where(jnp.abs(z) <= l1, zero, elsewhere)
        return new - param, {"z": z, "n": n}
