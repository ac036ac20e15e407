"""Turn a direction of ascent into a step of descent."""

import dataclasses

import jax

from optimize_loss._engine.link import Link, NotNegative, Numbers


@dataclasses.dataclass(frozen=True)
class ScaleByLearningRate(Link):
    """Multiply every update by minus the learning rate.

        u ← -learning_rate · u

    Its place matters for rules with momentum: after them, the rate is outside the accumulator, as
    in TensorFlow 1; before them, it is inside, as in Keras.

    Args:
      learning_rate: at least 0; a number or a schedule.

    Example:
      >>> import jax.numpy as jnp, optimize_loss as ol
      >>> tx = ol.transforms.chain(rate=ol.transforms.ScaleByLearningRate(0.5))
      >>> g = {"w": jnp.array([3.0])}
      >>> print(tx.update(g, tx.init(g))[0]["w"])
      [-1.5]
    """

    learning_rate: NotNegative
    elementwise = True

    def factor(self, k: Numbers) -> jax.Array:
        """Return minus the rate."""
        return -k["learning_rate"]
