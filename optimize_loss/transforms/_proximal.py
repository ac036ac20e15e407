"""Rules with exact proximal steps for L1 and L2 penalties, which set parameters to exactly 0."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from optimize_loss._engine.arrays import abs_squared, count, full, zeros
from optimize_loss._engine.link import Link, NotNegative, Numbers, PositiveStart, Slots


def soft_threshold(x: jax.Array, threshold: jax.Array) -> jax.Array:
    """Return sign(x) · max(|x| - threshold, 0)."""
    return jnp.sign(x) * jnp.maximum(jnp.abs(x) - threshold, 0)


def proximal_point(x: jax.Array, rate: jax.Array, k: Numbers) -> jax.Array:
    """Return the minimum over y of (y - x)² / 2 + rate · (l1 · |y| + l2 · y² / 2)."""
    threshold = rate * k["l1_regularization_strength"]
    return soft_threshold(x, threshold) / (1 + rate * k["l2_regularization_strength"])


@dataclasses.dataclass(frozen=True)
class StepByProximalGradient(Link):
    """Take a gradient step, then the proximal step for an L1 and an L2 penalty.

        q = p - learning_rate · g
        p ← sign(q) · max(|q| - learning_rate · l1, 0) / (1 + learning_rate · l2)

    The update is the difference to p: no `ScaleByLearningRate` follows. For real parameters.

    Args:
      learning_rate: at least 0.
      l1_regularization_strength: l1, at least 0; sends small parameters to exactly 0.
      l2_regularization_strength: l2, at least 0.

    Example:
      >>> import jax.numpy as jnp, optimize_loss as ol
      >>> tx = ol.transforms.chain(
      ...     proximal=ol.transforms.StepByProximalGradient(1.0, l1_regularization_strength=0.5))
      >>> p, g = {"w": jnp.array([2.0, 0.25])}, {"w": jnp.array([0.5, 0.0])}
      >>> print(tx.apply(g, tx.init(p), p)[0]["w"])
      [1. 0.]

    References:
      J. Duchi, Y. Singer, "Efficient Learning using Forward-Backward Splitting", 2009,
      https://papers.nips.cc/paper/3793; matches `tf.train.ProximalGradientDescentOptimizer`.
    """

    learning_rate: NotNegative
    l1_regularization_strength: NotNegative = 0.0
    l2_regularization_strength: NotNegative = 0.0
    reads_params = True
    elementwise = True

    def leaf(
        self, update: jax.Array, slots: Slots, param: jax.Array, k: Numbers
    ) -> tuple[jax.Array, Slots]:
        """Return the step of one parameter."""
        new = proximal_point(param - k["learning_rate"] * update, k["learning_rate"], k)
        return new - param, slots


@dataclasses.dataclass(frozen=True)
class StepByProximalAdagrad(Link):
    """Take an Adagrad step, then the proximal step for an L1 and an L2 penalty.

        n ← n + g²,   r = learning_rate / √n,   q = p - r · g
        p ← sign(q) · max(|q| - r · l1, 0) / (1 + r · l2)

    The update is the difference to p: no `ScaleByLearningRate` follows. For real parameters.

    Args:
      learning_rate: at least 0.
      initial_accumulator_value: n before the first step, above 0.
      l1_regularization_strength: l1, at least 0; sends small parameters to exactly 0.
      l2_regularization_strength: l2, at least 0.

    Example:
      >>> import jax.numpy as jnp, optimize_loss as ol
      >>> tx = ol.transforms.chain(proximal=ol.transforms.StepByProximalAdagrad(1.0, 9.0))
      >>> p, g = {"w": jnp.array([2.0])}, {"w": jnp.array([4.0])}
      >>> print(tx.apply(g, tx.init(p), p)[0]["w"].round(6))
      [1.2]

    References:
      J. Duchi, Y. Singer, "Efficient Learning using Forward-Backward Splitting", 2009,
      https://papers.nips.cc/paper/3793; matches `tf.train.ProximalAdagradOptimizer`.
    """

    learning_rate: NotNegative
    initial_accumulator_value: PositiveStart = 0.1
    l1_regularization_strength: NotNegative = 0.0
    l2_regularization_strength: NotNegative = 0.0
    reads_params = True
    elementwise = True

    def slots(self, param: jax.Array) -> dict[str, jax.Array]:
        """Return the sum of squares."""
        return {"sum_of_squares": full(param, self.initial_accumulator_value)}

    def leaf(
        self, update: jax.Array, slots: Slots, param: jax.Array, k: Numbers
    ) -> tuple[jax.Array, Slots]:
        """Return the step of one parameter."""
        n = slots["sum_of_squares"] + abs_squared(update)
        rate = k["learning_rate"] * jax.lax.rsqrt(n)
        new = proximal_point(param - rate * update, rate, k)
        return new - param, {"sum_of_squares": n}


@dataclasses.dataclass(frozen=True)
class StepByDualAveraging(Link):
    """Set each parameter from the sum of all its gradients, scaled as in Adagrad.

        G ← G + g,   n ← n + g²,   t = 1, 2, …
        p ← -learning_rate · sign(G) · max(|G| - l1 · t, 0) / (l2 · t · learning_rate + √n)

    The earlier value of the parameter has no influence. The update is the difference to it: no
    `ScaleByLearningRate` follows. For real parameters.

    Args:
      learning_rate: at least 0.
      initial_accumulator_value: n before the first step, above 0.
      l1_regularization_strength: l1, at least 0; keeps parameters at exactly 0.
      l2_regularization_strength: l2, at least 0.

    Example:
      >>> import jax.numpy as jnp, optimize_loss as ol
      >>> tx = ol.transforms.chain(proximal=ol.transforms.StepByDualAveraging(1.0, 9.0))
      >>> p, g = {"w": jnp.array([7.0])}, {"w": jnp.array([4.0])}
      >>> print(tx.apply(g, tx.init(p), p)[0]["w"].round(6))
      [-0.8]

    References:
      J. Duchi, E. Hazan, Y. Singer, 2011, as for `ScaleByAdagrad`, equation 3; matches
      `tf.train.AdagradDAOptimizer`, where t is `global_step` + 1; here, the number of updates.
    """

    learning_rate: NotNegative
    initial_accumulator_value: PositiveStart = 0.1
    l1_regularization_strength: NotNegative = 0.0
    l2_regularization_strength: NotNegative = 0.0
    reads_params = True
    elementwise = True

    def slots(self, param: jax.Array) -> dict[str, jax.Array]:
        """Return the sum of gradients and the sum of their squares."""
        squares = full(param, self.initial_accumulator_value)
        return {"sum": zeros(param), "sum_of_squares": squares}

    def scalars(
        self, numbers: Numbers, memory: Numbers, total: Any, step: jax.Array
    ) -> tuple[Numbers, Numbers]:
        """Return the strengths multiplied by t."""
        t = count(step, numbers["learning_rate"])
        rate = numbers["learning_rate"]
        threshold = numbers["l1_regularization_strength"] * t
        shift = numbers["l2_regularization_strength"] * t * rate
        return {"learning_rate": rate, "threshold": threshold, "shift": shift}, memory

    def leaf(
        self, update: jax.Array, slots: Slots, param: jax.Array, k: Numbers
    ) -> tuple[jax.Array, Slots]:
        """Return the step of one parameter."""
        total = slots["sum"] + update
        n = slots["sum_of_squares"] + abs_squared(update)
        kept = soft_threshold(total, k["threshold"])
        new = -k["learning_rate"] * kept / (k["shift"] + jnp.sqrt(n))
        return new - param, {"sum": total, "sum_of_squares": n}
