"""RMSprop and Adadelta: divide by a running root mean square."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from optimize_loss._engine.arrays import abs_squared, full, zeros
from optimize_loss._engine.link import Decay, Link, Numbers, Positive, Slots, Start


@dataclasses.dataclass(frozen=True)
class ScaleByRMS(Link):
    """Divide each gradient by the root of a running mean of its squares.

        s ← s + (1-ρ)(g² - s),   u = g / √(s + ε)
        centered:  a ← a + (1-ρ)(g - a),   u = g / √(max(s - |a|², 0) + ε)

    ε is under the root. For RMSprop with momentum, follow it with `ScaleByLearningRate` and then
    `ScaleByMomentum`: TensorFlow and Keras both keep the rate inside the momentum.

    Args:
      decay: ρ, in [0, 1).
      epsilon: ε, above 0, in the unit of the gradients squared.
      centered: whether to divide by the standard deviation instead of the root mean square.
      initial_accumulator_value: s before the first step, at least 0: 1 in TensorFlow 1, 0 in
        Keras.

    Example:
      >>> import jax.numpy as jnp, optimize_loss as ol
      >>> tx = ol.transforms.chain(rms=ol.transforms.ScaleByRMS(decay=0.75))
      >>> g = {"w": jnp.array([3.0])}
      >>> print(tx.update(g, tx.init(g))[0]["w"].round(4))
      [2.]

    References:
      T. Tieleman, G. Hinton, "Lecture 6.5, rmsprop", 2012; A. Graves, "Generating Sequences With
      Recurrent Neural Networks", 2013, https://arxiv.org/abs/1308.0850, equations 38 to 40 for
      `centered`. Matches `tf.train.RMSPropOptimizer` (start 1, ε 1e-10) and Keras 2.15 `RMSprop`
      (start 0, ε 1e-7), except that a variance which rounding makes negative counts as 0 here.
    """

    decay: Decay = 0.9
    epsilon: Positive = 1e-7
    centered: bool = False
    initial_accumulator_value: Start = 0.0
    elementwise = True
    means = ("mean",)
    squares = ("mean_square",)

    def slots(self, param: jax.Array) -> dict[str, jax.Array]:
        """Return the running mean of squares, and with `centered` that of the gradients."""
        slots = {"mean_square": full(param, self.initial_accumulator_value)}
        return {**slots, "mean": zeros(param)} if self.centered else slots

    def scalars(
        self, numbers: Numbers, memory: Numbers, total: Any, step: jax.Array
    ) -> tuple[Numbers, Numbers]:
        """Return the weight of the newest gradient."""
        return {"weight": numbers["decay"][1], "epsilon": numbers["epsilon"]}, memory

    def remember(self, update: jax.Array, slots: Slots, param: jax.Array, k: Numbers) -> Slots:
        """Update the running means of one parameter."""
        s = slots["mean_square"]
        new = {"mean_square": s + (abs_squared(update) - s) * k["weight"]}
        if self.centered:
            new["mean"] = slots["mean"] + (update - slots["mean"]) * k["weight"]
        return new

    def direction(self, update: jax.Array, slots: Slots, param: jax.Array, k: Numbers) -> jax.Array:
        """Divide by the root mean square, or by the standard deviation."""
        variance = slots["mean_square"]
        if self.centered:
            variance = jnp.maximum(variance - abs_squared(slots["mean"]), 0)
        return update * jax.lax.rsqrt(variance + k["epsilon"])


@dataclasses.dataclass(frozen=True)
class ScaleByAdadelta(Link):
    """Divide by the running size of the gradients, multiply by that of past updates.

        a ← ρ a + (1-ρ) g²,   u = √(d + ε) / √(a + ε) · g,   d ← ρ d + (1-ρ) u²

    The first updates have the size √ε, so a large ε starts faster.

    Args:
      rho: ρ, in [0, 1).
      epsilon: ε, above 0, in the unit of the parameters squared.

    Example:
      >>> import jax.numpy as jnp, optimize_loss as ol
      >>> tx = ol.transforms.chain(adadelta=ol.transforms.ScaleByAdadelta(rho=0.75, epsilon=1e-6))
      >>> g = {"w": jnp.array([3.0])}
      >>> print(tx.update(g, tx.init(g))[0]["w"].round(6))
      [0.002]

    References:
      M. Zeiler, "ADADELTA: An Adaptive Learning Rate Method", 2012,
      https://arxiv.org/abs/1212.5701, algorithm 1; matches `tf.train.AdadeltaOptimizer` (ε 1e-8)
      and Keras 2.15 `Adadelta`. d holds updates before the learning rate.
    """

    rho: Decay = 0.95
    epsilon: Positive = 1e-7
    elementwise = True
    squares = ("mean_square_gradient", "mean_square_update")

    def slots(self, param: jax.Array) -> dict[str, jax.Array]:
        """Return the running means of squares of gradients and of updates."""
        return {"mean_square_gradient": full(param), "mean_square_update": full(param)}

    def scalars(
        self, numbers: Numbers, memory: Numbers, total: Any, step: jax.Array
    ) -> tuple[Numbers, Numbers]:
        """Return ρ, 1-ρ and ε."""
        rho, weight = numbers["rho"]
        return {"rho": rho, "weight": weight, "epsilon": numbers["epsilon"]}, memory

    def leaf(
        self, update: jax.Array, slots: Slots, param: jax.Array, k: Numbers
    ) -> tuple[jax.Array, Slots]:
        """Update the running means of one parameter."""
        a, d = slots["mean_square_gradient"], slots["mean_square_update"]
        a = k["rho"] * a + k["weight"] * abs_squared(update)
        u = jnp.sqrt(d + k["epsilon"]) * jax.lax.rsqrt(a + k["epsilon"]) * update
        d = k["rho"] * d + k["weight"] * abs_squared(u)
        return u, {"mean_square_gradient": a, "mean_square_update": d}
