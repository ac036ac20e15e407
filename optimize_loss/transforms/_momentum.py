"""Momentum, Polyak's and Nesterov's."""

import dataclasses

import jax

from optimize_loss._engine.arrays import zeros
from optimize_loss._engine.link import Fraction, Link, Numbers, Slots


@dataclasses.dataclass(frozen=True)
class ScaleByMomentum(Link):
    """Replace each update by a decayed sum of all updates so far.

        a ← momentum · a + u,   u ← a      (or u + momentum · a with `nesterov`)

    The sum is not divided by its weight: a constant update grows by 1 / (1 - momentum).
    Before `ScaleByLearningRate` this is TensorFlow 1's rule, whose accumulator holds gradients;
    after it, Keras', whose velocity holds steps. The two differ when the rate changes.

    Args:
      momentum: the share of the sum that is kept at each step, in [0, 1].
      nesterov: whether to look ahead by one step.

    Example:
      >>> import jax.numpy as jnp, optimize_loss as ol
      >>> tx = ol.transforms.chain(momentum=ol.transforms.ScaleByMomentum(0.5))
      >>> g = {"w": jnp.array([2.0])}
      >>> first, state = tx.update(g, tx.init(g))
      >>> second, state = tx.update(g, state)
      >>> print(first["w"], second["w"])
      [2.] [3.]

    References:
      I. Sutskever et al., "On the importance of initialization and momentum in deep learning",
      2013, http://proceedings.mlr.press/v28/sutskever13.html, equations 1 to 4; matches
      `tf.train.MomentumOptimizer` and Keras 2.15 `SGD` as said above.
    """

    momentum: Fraction = 0.9
    nesterov: bool = False
    elementwise = True
    means = ("sum",)

    def slots(self, param: jax.Array) -> dict[str, jax.Array]:
        """Return the sum."""
        return {"sum": zeros(param)}

    def remember(self, update: jax.Array, slots: Slots, param: jax.Array, k: Numbers) -> Slots:
        """Add one update to the sum."""
        return {"sum": k["momentum"] * slots["sum"] + update}

    def direction(self, update: jax.Array, slots: Slots, param: jax.Array, k: Numbers) -> jax.Array:
        """Return the sum, or one step ahead of it."""
        return update + k["momentum"] * slots["sum"] if self.nesterov else slots["sum"]
