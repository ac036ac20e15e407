"""Nadam: Adam with Nesterov's momentum, which grows on a schedule."""

import dataclasses
from typing import Any

import jax

from optimize_loss._engine.arrays import abs_squared, count, full, sqrt, zeros
from optimize_loss._engine.link import Decay, Link, Numbers, Positive, Slots


@dataclasses.dataclass(frozen=True)
class ScaleByNadam(Link):
    """Look one step ahead of Adam's mean, by a momentum μ that grows from about β₁ / 2 to β₁.

        m ← m + (1-β₁)(g - m),   v ← v + (1-β₂)(g² - v),   t = 1, 2, …
        μₜ = β₁ (1 - 0.96ᵗ / 2),   P ← P · μₜ
        m̂ = μₜ₊₁ · m / (1 - P μₜ₊₁) + (1-μₜ) · g / (1 - P)
        update = m̂ / (√(v / (1-β₂ᵗ)) + ε)

    P, the product of all μ so far, starts at 1 and is multiplied once a step, regardless of the
    number of parameters. It is stored because β₁ may change during training. Complex gradients:
    |g|² for g².

    Args:
      beta_1: β₁, in [0, 1).
      beta_2: β₂, in [0, 1).
      epsilon: ε, above 0, in the unit of the gradients.

    Example:
      The first momentum is 0.5 · (1 - 0.96 / 2) = 0.26:

      >>> import jax.numpy as jnp, optimize_loss as ol
      >>> tx = ol.transforms.chain(nadam=ol.transforms.ScaleByNadam(beta_1=0.5))
      >>> g = {"w": jnp.array([4.0]), "b": jnp.array([0.0])}
      >>> updates, state = tx.update(g, tx.init(g))
      >>> print(state["nadam"]["product"].round(6), updates["b"])
      0.26 [0.]

    References:
      T. Dozat, "Incorporating Nesterov Momentum into Adam", 2016,
      https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ, algorithm 2, except that the mean there
      decays by μₜ, and v̂ has a factor β₂; matches Keras 3 `Nadam`, and Keras 2.15 run eagerly
      (inside `tf.function` it multiplies P once for every parameter). PyTorch lets μ grow 250
      times slower, by 0.96^(t/250); optax has μ = β₁ throughout.
    """

    beta_1: Decay = 0.9
    beta_2: Decay = 0.999
    epsilon: Positive = 1e-7
    elementwise = True
    means = ("m",)
    squares = ("v",)

    def slots(self, param: jax.Array) -> dict[str, jax.Array]:
        """Return the running means."""
        return {"m": zeros(param), "v": full(param)}

    def memory(self) -> dict[str, float]:
        """Return the product of all μ so far."""
        return {"product": 1.0}

    def scalars(
        self, numbers: Numbers, memory: Numbers, total: Any, step: jax.Array
    ) -> tuple[Numbers, Numbers]:
        """Update the product, and return the weights of the mean and of the gradient."""
        (b1, one_minus_b1), (b2, _) = numbers["beta_1"], numbers["beta_2"]
        t = count(step, b1)
        now, ahead = b1 * (1 - 0.96**t / 2), b1 * (1 - 0.96 ** (t + 1) / 2)
        product = memory["product"] * now
        # 1 - b2, so that what rounding β₂ did to v is undone by 1 - b2**t; as in Keras.
        k = {"c1": one_minus_b1, "c2": 1 - b2, "epsilon": numbers["epsilon"]}
        k["of_mean"] = ahead / (1 - product * ahead)
        k["of_gradient"] = (1 - now) / (1 - product)
        return {**k, "correction": 1 / (1 - b2**t)}, {"product": product}

    def remember(self, update: jax.Array, slots: Slots, param: jax.Array, k: Numbers) -> Slots:
        """Update m and v of one parameter."""
        m = slots["m"] + (update - slots["m"]) * k["c1"]
        v = slots["v"] + (abs_squared(update) - slots["v"]) * k["c2"]
        return {"m": m, "v": v}

    def direction(self, update: jax.Array, slots: Slots, param: jax.Array, k: Numbers) -> jax.Array:
        """Divide the mean, one step ahead, by the root of v."""
        ahead = k["of_mean"] * slots["m"] + k["of_gradient"] * update
        return ahead / (sqrt(k["correction"] * slots["v"]) + k["epsilon"])
