"""Adamax: Adam with a maximum in place of the mean of squares."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from optimize_loss._engine.arrays import count, full, zeros
from optimize_loss._engine.link import Decay, Link, Numbers, Positive, Slots


@dataclasses.dataclass(frozen=True)
class ScaleByAdamax(Link):
    """Divide a running mean of the gradients by their largest size, which fades.

        m ← m + (1-β₁)(g - m),   u ← max(β₂ u, |g|),   t = 1, 2, …
        update = m / ((1-β₁ᵗ) (u + ε))

    Gradients are not squared, so small ones do not underflow and large ones do not overflow. An
    entry whose gradients are all 0 does not move. Complex gradients: their absolute value.

    Args:
      beta_1: β₁, in [0, 1).
      beta_2: β₂, in [0, 1); the factor by which the largest size decays per step.
      epsilon: ε, above 0, in the unit of the gradients.

    Example:
      The gradient falls from 4 to 1; the size by which it is divided only from 4 to 2:

      >>> import jax.numpy as jnp, optimize_loss as ol
      >>> tx = ol.transforms.chain(adamax=ol.transforms.ScaleByAdamax(beta_1=0.0, beta_2=0.5))
      >>> first, state = tx.update({"w": jnp.array([4.0])}, tx.init({"w": jnp.zeros(1)}))
      >>> second, state = tx.update({"w": jnp.array([1.0])}, state)
      >>> print(first["w"].round(6), second["w"].round(6), state["adamax"]["u"]["w"])
      [1.] [0.5] [2.]

    References:
      D. Kingma, J. Ba, "Adam: A Method for Stochastic Optimization", 2015,
      https://arxiv.org/abs/1412.6980, algorithm 2, which has no ε; matches Keras 2.15 and 3
      `Adamax`. optax adds its ε to |g| before the maximum, where it decays: the two differ if ε is
      not negligible compared with the gradients.
    """

    beta_1: Decay = 0.9
    beta_2: Decay = 0.999
    epsilon: Positive = 1e-7
    elementwise = True
    means = ("m", "u")

    def slots(self, param: jax.Array) -> dict[str, jax.Array]:
        """Return the running mean, and the largest size."""
        return {"m": zeros(param), "u": full(param)}

    def scalars(
        self, numbers: Numbers, memory: Numbers, total: Any, step: jax.Array
    ) -> tuple[Numbers, Numbers]:
        """Return the correction for the start at zero, which only the mean needs."""
        (b1, one_minus_b1), (b2, _) = numbers["beta_1"], numbers["beta_2"]
        k = {"c1": one_minus_b1, "beta_2": b2, "epsilon": numbers["epsilon"]}
        return {**k, "correction": 1 / (1 - b1 ** count(step, b1))}, memory

    def remember(self, update: jax.Array, slots: Slots, param: jax.Array, k: Numbers) -> Slots:
        """Update m and u of one parameter."""
        m = slots["m"] + (update - slots["m"]) * k["c1"]
        u = jnp.maximum(k["beta_2"] * slots["u"], jnp.abs(update))
        return {"m": m, "u": u}

    def direction(self, update: jax.Array, slots: Slots, param: jax.Array, k: Numbers) -> jax.Array:
        """Divide m by u."""
        return k["correction"] * slots["m"] / (slots["u"] + k["epsilon"])
