"""Adam and AMSGrad."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from optimize_loss._engine.arrays import abs_squared, count, full, sqrt, zeros
from optimize_loss._engine.link import Decay, Link, Numbers, Positive, Slots


@dataclasses.dataclass(frozen=True)
class ScaleByAdam(Link):
    """Divide a running mean of the gradients by the root of a running mean of their squares.

        m ← m + (1-β₁)(g - m),   v ← v + (1-β₂)(g² - v),   t = 1, 2, …
        u = √(1-β₂ᵗ) / (1-β₁ᵗ) · m / (√v + ε)

    ε is added to the root that is not corrected ("ε-hat"), as in TensorFlow and Keras: its effect
    is 1/√(1-β₂ᵗ) times that in the paper's algorithm 1 and in optax. With `amsgrad` the denominator
    uses the largest v so far, itself not corrected. Complex gradients: |g|² for g².

    Args:
      beta_1: β₁, in [0, 1).
      beta_2: β₂, in [0, 1).
      epsilon: ε, above 0, in the unit of the gradients.
      amsgrad: whether the denominator may never shrink.

    Example:
      The first step has size 1 whatever the gradient's scale:

      >>> import jax.numpy as jnp, optimize_loss as ol
      >>> tx = ol.transforms.chain(adam=ol.transforms.ScaleByAdam())
      >>> g = {"w": jnp.array([4.0, -0.5])}
      >>> print(tx.update(g, tx.init(g))[0]["w"].round(3))
      [ 1. -1.]

    References:
      D. Kingma, J. Ba, "Adam: A Method for Stochastic Optimization", 2015,
      https://arxiv.org/abs/1412.6980, section 2, last paragraph; S. Reddi, S. Kale, S. Kumar,
      "On the Convergence of Adam and Beyond", 2018, https://arxiv.org/abs/1904.09237, algorithm 2;
      matches `tf.train.AdamOptimizer` and Keras 2.15 `Adam`.
    """

    beta_1: Decay = 0.9
    beta_2: Decay = 0.999
    epsilon: Positive = 1e-8
    amsgrad: bool = False
    elementwise = True
    means = ("m",)
    squares = ("v", "v_max")

    def slots(self, param: jax.Array) -> dict[str, jax.Array]:
        """Return the running means, and with `amsgrad` the largest v."""
        slots = {"m": zeros(param), "v": full(param)}
        return {**slots, "v_max": full(param)} if self.amsgrad else slots

    def scalars(
        self, numbers: Numbers, memory: Numbers, total: Any, step: jax.Array
    ) -> tuple[Numbers, Numbers]:
        """Return the corrections for the start at zero."""
        (b1, one_minus_b1), (b2, one_minus_b2) = numbers["beta_1"], numbers["beta_2"]
        t = count(step, b1)
        correction = jnp.sqrt(1 - b2**t) / (1 - b1**t)
        k = {"c1": one_minus_b1, "c2": one_minus_b2, "epsilon": numbers["epsilon"]}
        return {**k, "correction": correction}, memory

    def remember(self, update: jax.Array, slots: Slots, param: jax.Array, k: Numbers) -> Slots:
        """Update m and v of one parameter."""
        m = slots["m"] + (update - slots["m"]) * k["c1"]
        v = slots["v"] + (abs_squared(update) - slots["v"]) * k["c2"]
        new = {"m": m, "v": v}
        if self.amsgrad:
            new["v_max"] = jnp.maximum(slots["v_max"], v)
        return new

    def direction(self, update: jax.Array, slots: Slots, param: jax.Array, k: Numbers) -> jax.Array:
        """Divide m by the root of v."""
        v = slots["v_max"] if self.amsgrad else slots["v"]
        return k["correction"] * slots["m"] / (sqrt(v) + k["epsilon"])
