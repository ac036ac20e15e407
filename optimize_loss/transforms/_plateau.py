"""Lower the learning rate when the loss stops falling."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import optax

from optimize_loss._checks import STEP
from optimize_loss._engine.kinds import RateScale
from optimize_loss._engine.link import Count, Fraction, NotNegative, Numbers


@dataclasses.dataclass(frozen=True)
class ReduceOnPlateau(RateScale):
    """Multiply the learning rate by a factor when the loss has not improved for a while.

        improved:  mean loss < best - threshold · |best|   (- threshold, if not `relative`)
        after more than `patience` means without, outside of a cooldown:  scale ← multiplier · scale

    `scale` starts at 1, is kept in the state, and multiplies the `learning_rate` of all links,
    whether it is a number, a schedule, or the rate of a rule. The loss of an update affects the
    next update; after an `Accumulate` it is the loss of all batches of the update. A mean over
    several updates, `every`, is less noisy. A loss that is not finite is not an improvement.

    Args:
      multiplier: in [0, 1].
      patience: how many means in a row may pass without an improvement, an integer of at least 0.
      threshold: the least improvement, at least 0: relative to the best mean, or absolute.
      cooldown: how many means after a reduction are ignored, an integer of at least 0.
      min_scale: the least `scale`, in [0, 1].
      every: the number of losses in each mean, an integer of at least 1.
      relative: whether the threshold is relative to the absolute value of the best mean.

    Example:
      The second loss is no better than the first, so the third update has half the rate:

      >>> import optimize_loss as ol
      >>> tx = ol.transforms.chain(rate=ol.transforms.ScaleByLearningRate(1.0),
      ...     plateau=ol.transforms.ReduceOnPlateau(0.5, patience=0))
      >>> state = tx.init({"w": 0.0})
      >>> for loss in (-3.0, -3.0, -4.0):
      ...     updates, state = tx.update({"w": 1.0}, state, value=loss)
      >>> print(updates["w"], state["plateau"]["scale"], state["plateau"]["best"])
      -0.5 0.5 -4.0

    References:
      `torch.optim.lr_scheduler.ReduceLROnPlateau`, whose relative threshold, best · (1 - t), and
      that of `optax.contrib.reduce_on_plateau` accept a worse loss as an improvement if the loss is
      negative.
    """

    multiplier: Fraction = 0.1
    patience: Annotated[int, STEP] = 10
    threshold: NotNegative = 1e-4
    cooldown: Annotated[int, STEP] = 0
    min_scale: Fraction = 0.0
    every: Count = 1
    relative: bool = True
    needs = "loss"
    elementwise = True

    def report(self, name: str, parts: Mapping[str, Any]) -> dict[str, Any]:
        """Return the scale."""
        return {"plateau_scale": parts["scale"]}

    def scale(self, memory: Numbers) -> jax.Array:
        """Return by what all learning rates are multiplied."""
        return memory["scale"]

    def memory(self) -> dict[str, float]:
        """Return the scale, the best mean, the sum for the next mean, and the counts."""
        counts = {"means": 0, "without": 0, "cooling": 0, "gathered": 0}
        return {"scale": 1.0, "best": 0.0, "sum": 0.0, **counts}

    def scalars(
        self, numbers: Numbers, memory: Numbers, total: Any, step: jax.Array
    ) -> tuple[Numbers, Numbers]:
        """Add one loss to the mean, and compare the mean when it is complete."""
        gathered = memory["gathered"] + 1
        summed = memory["sum"] + total
        judged = gathered >= numbers["every"]
        after = self._judged(numbers, memory, summed / gathered.astype(summed.dtype))
        new = {name: jnp.where(judged, after[name], memory[name]) for name in after}
        new["gathered"] = jnp.where(judged, 0, gathered)
        new["sum"] = jnp.where(judged, 0, summed)
        return {}, new

    def _judged(self, numbers: Numbers, memory: Numbers, loss: jax.Array) -> dict[str, jax.Array]:
        """Return the memory after a mean."""
        best, threshold = memory["best"], numbers["threshold"]
        least = threshold * jnp.abs(best) if self.relative else threshold
        is_first = memory["means"] == 0
        improved = jnp.isfinite(loss) & (is_first | (loss < best - least))
        cooling = memory["cooling"] > 0
        without = jnp.where(improved | cooling, 0, memory["without"] + 1)
        reduces = without > numbers["patience"]
        lowered = jnp.maximum(memory["scale"] * numbers["multiplier"], numbers["min_scale"])
        seen = improved | ~is_first
        # A `min_scale` above the scale does not lift it.
        scale = jnp.where(reduces, jnp.minimum(lowered, memory["scale"]), memory["scale"])
        return {
            "scale": scale + 0 * threshold,  # NaN if that is, which compares to nothing
            "best": jnp.where(improved, loss, best),
            "means": jnp.where(seen, optax.safe_increment(memory["means"]), memory["means"]),
            "without": jnp.where(reduces, 0, without),
            "cooling": jnp.where(
                reduces, numbers["cooldown"], jnp.maximum(memory["cooling"] - 1, 0)
            ),
        }
