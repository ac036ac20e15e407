"""LAMB: Adam's direction, as long as the parameter."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from optimize_loss._engine.arrays import (
    abs_squared,
    count,
    full,
    multiplied,
    norm,
    ratio,
    sqrt,
    zeros,
)
from optimize_loss._engine.link import Decay, Link, Numbers, Positive, Slots


@dataclasses.dataclass(frozen=True)
class ScaleByLamb(Link):
    """Give Adam's update of each parameter the norm of that parameter.

        m ← m + (1-β₁)(g - m),   v ← v + (1-β₂)(g² - v),   t = 1, 2, …
        u = m / (1-β₁ᵗ) / (√(v / (1-β₂ᵗ)) + ε)
        update = r · u,   r = ‖p‖ / ‖u‖, or 1 where ‖p‖ or ‖u‖ is 0

    So the learning rate is the relative change of a parameter: 0.01 moves each by 1% of its norm.
    Norms are L2 norms of complete parameters, and do not overflow. If u has a NaN, r is 1. Weight
    decay is a separate link, outside r. Complex numbers: |g|² for g².

    Args:
      beta_1: β₁, in [0, 1).
      beta_2: β₂, in [0, 1).
      epsilon: ε, above 0, in the unit of the gradients.

    Example:
      Adam's first step is (0, -1); it becomes as long as (3, 4):

      >>> import jax.numpy as jnp, optimize_loss as ol
      >>> tx = ol.transforms.chain(lamb=ol.transforms.ScaleByLamb())
      >>> p, g = {"w": jnp.array([3.0, 4.0])}, {"w": jnp.array([0.0, -7.0])}
      >>> print(tx.update(g, tx.init(p), p)[0]["w"].round(5))
      [ 0. -5.]

    References:
      Y. You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes",
      2020, https://arxiv.org/abs/1904.00962, algorithm 2, with φ(x) = x; matches Keras 3 `Lamb`,
      which decays p before it takes ‖p‖. In the paper and in `optax.lamb` weight decay is part of
      u, and so of r; without it optax gives the same.
    """

    beta_1: Decay = 0.9
    beta_2: Decay = 0.999
    epsilon: Positive = 1e-7
    reads_params = True
    means = ("m",)
    squares = ("v",)

    def slots(self, param: jax.Array) -> dict[str, jax.Array]:
        """Return the running means."""
        return {"m": zeros(param), "v": full(param)}

    def scalars(
        self, numbers: Numbers, memory: Numbers, total: Any, step: jax.Array
    ) -> tuple[Numbers, Numbers]:
        """Return the corrections for the start at zero."""
        (b1, one_minus_b1), (b2, one_minus_b2) = numbers["beta_1"], numbers["beta_2"]
        t = count(step, b1)
        k = {"c1": one_minus_b1, "c2": one_minus_b2, "epsilon": numbers["epsilon"]}
        return {**k, "of_m": 1 / (1 - b1**t), "of_v": 1 / (1 - b2**t)}, memory

    def remember(self, update: jax.Array, slots: Slots, param: jax.Array, k: Numbers) -> Slots:
        """Update m and v of one parameter."""
        m = slots["m"] + (update - slots["m"]) * k["c1"]
        v = slots["v"] + (abs_squared(update) - slots["v"]) * k["c2"]
        return {"m": m, "v": v}

    def direction(self, update: jax.Array, slots: Slots, param: jax.Array, k: Numbers) -> jax.Array:
        """Give Adam's direction the parameter's norm."""
        u = k["of_m"] * slots["m"] / (sqrt(k["of_v"] * slots["v"]) + k["epsilon"])
        p_norm, u_norm = norm(param), norm(u)
        both = (p_norm > 0) & (u_norm > 0)
        length, size = jnp.where(both, p_norm, 1), jnp.where(both, u_norm, 1)
        return multiplied(u, ratio(length, size))
