"""Divide the gradients of a scaled loss by its scale."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from optimize_loss._engine.kinds import Gate, LossScale
from optimize_loss._engine.link import Count, Numbers, Positive, PositiveStart


@dataclasses.dataclass(frozen=True)
class DivideByLossScale(LossScale):
    """Divide every gradient by the factor that the loss was multiplied by.

        g ← g / loss_scale

    If its optimizer has this link, `optimize_loss` multiplies the loss before it takes the
    gradients; elsewhere the caller must.

    Args:
      loss_scale: above 0. Above 1 it prevents the underflow of small float16 gradients.

    Example:
      >>> import optimize_loss as ol
      >>> tx = ol.transforms.chain(unscale=ol.transforms.DivideByLossScale(4.0))
      >>> print(tx.update({"w": 2.0}, tx.init({"w": 0.0}))[0]["w"])
      0.5

    References:
      P. Micikevicius et al., "Mixed Precision Training", 2018, https://arxiv.org/abs/1710.03740,
      section 3.2; Keras 3, `loss_scale_factor`.
    """

    loss_scale: Positive
    elementwise = True

    def factor_of_loss(self, numbers: Numbers, memory: Numbers) -> jax.Array:
        """Return the number."""
        return numbers["loss_scale"]

    def factor(self, k: Numbers) -> jax.Array:
        """Return the reciprocal of the scale."""
        return 1 / k["loss_scale"]


@dataclasses.dataclass(frozen=True)
class DivideByDynamicLossScale(Gate, LossScale):
    """Divide by a scale that halves when a gradient is not finite, and skip that update.

        not all g finite:  scale ← max(scale / 2, 1), and later links do not run all g finite:
        g ← g / scale; after `growth_steps` such calls in a row scale ← 2 · scale

    The scale grows to at most 2¹²⁶, whose reciprocal is a normal float32. When an update is
    skipped, parameters, slots and the count of updates do not change.

    Args:
      initial_scale: the scale before the first call, above 0.
      growth_steps: how many calls in a row must be finite before the scale doubles.

    Example:
      >>> import jax.numpy as jnp, optimize_loss as ol
      >>> tx = ol.transforms.chain(unscale=ol.transforms.DivideByDynamicLossScale(8.0))
      >>> updates, state = tx.update({"w": jnp.array([jnp.inf])}, tx.init({"w": jnp.zeros(1)}))
      >>> print(updates["w"], state["unscale"]["loss_scale"], state["step"])
      [0.] 4.0 0

    References:
      P. Micikevicius et al., "Mixed Precision Training", 2018, https://arxiv.org/abs/1710.03740,
      section 3.2. Keras 2.15's `LossScaleOptimizer` counts skipped steps; that of Keras 3 does
      not, but has no floor of 1.
    """

    initial_scale: PositiveStart = 2.0**15
    growth_steps: Count = 2000
    needs = "finite"
    elementwise = True

    def memory(self) -> dict[str, float]:
        """Return the scale, and how many calls in a row were finite."""
        return {"loss_scale": self.initial_scale, "finite_in_a_row": 0}

    def factor_of_loss(self, numbers: Numbers, memory: Numbers) -> jax.Array:
        """Return the scale that the memory has."""
        return memory["loss_scale"]

    def scalars(
        self, numbers: Numbers, memory: Numbers, total: Any, step: jax.Array
    ) -> tuple[Numbers, Numbers]:
        """Open where all numbers are finite; double or halve the scale."""
        scale, finite = memory["loss_scale"], total
        in_a_row = jnp.where(finite, memory["finite_in_a_row"] + 1, 0)
        grows = in_a_row >= numbers["growth_steps"]
        fits = 2 * scale <= 1 / jnp.finfo(scale.dtype).tiny
        doubled = jnp.where(fits, 2 * scale, scale)
        halved = jnp.maximum(scale / 2, jnp.minimum(scale, 1))
        new = {
            "loss_scale": jnp.where(finite, jnp.where(grows, doubled, scale), halved),
            "finite_in_a_row": jnp.where(grows, 0, in_a_row),
        }
        return {"open": finite, "scale": scale}, new

    def was_open(self, old: Numbers, new: Numbers) -> jax.Array:
        """Return whether the gradients were finite in the call from one memory to the next."""
        before, after = old["loss_scale"], new["loss_scale"]
        # What is finite sets the count to 0 only where the scale doubles, or is too large to.
        at_most = (after == before) & (before > 1)
        return (new["finite_in_a_row"] > 0) | (after > before) | at_most

    def behind(self, k: Numbers) -> jax.Array | None:
        """Return the reciprocal of the scale."""
        return 1 / k["scale"]
