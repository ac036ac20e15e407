"""Lion: the sign of a momentum."""

import dataclasses

import jax
import jax.numpy as jnp

from optimize_loss._engine.arrays import zeros
from optimize_loss._engine.link import Decay, Link, Numbers, Slots


@dataclasses.dataclass(frozen=True)
class ScaleByLion(Link):
    """Keep only the sign of a mean of the gradients: every entry moves by the same amount.

        u = sign(β₁ m + (1-β₁) g),   m ← β₂ m + (1-β₂) g

    If β₁ < β₂, the newest gradient has a larger weight in u than in m. All entries have size 1, so
    rates are typically 3 to 10 times smaller than Adam's. Where the mean is 0, the update is 0. NaN
    and infinity give NaN. Complex entries keep their phase, z / |z|, and so also move by the same
    amount.

    Args:
      beta_1: β₁, in [0, 1); 0 takes the sign of the gradient alone.
      beta_2: β₂, in [0, 1).

    Example:
      The gradient -1 is outweighed by the momentum of the 4 before it:

      >>> import jax.numpy as jnp, optimize_loss as ol
      >>> tx = ol.transforms.chain(lion=ol.transforms.ScaleByLion(beta_1=0.5, beta_2=0.5))
      >>> first, state = tx.update({"w": jnp.array([4.0, 0.0])}, tx.init({"w": jnp.zeros(2)}))
      >>> second, state = tx.update({"w": jnp.array([-1.0, -0.1])}, state)
      >>> print(first["w"], second["w"], state["lion"]["m"]["w"])
      [1. 0.] [ 1. -1.] [ 0.5  -0.05]

    References:
      X. Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023,
      https://arxiv.org/abs/2302.06675, algorithm 2, whose weight decay is `AddWeightDecay` between
      this link and the rate; matches `optax.scale_by_lion` and Keras 2.15 and 3 `Lion`, which
      reject β₁ = 0 and accept β₁ = 1.
    """

    beta_1: Decay = 0.9
    beta_2: Decay = 0.99
    elementwise = True
    means = ("m",)

    def slots(self, param: jax.Array) -> dict[str, jax.Array]:
        """Return the momentum."""
        return {"m": zeros(param)}

    def leaf(
        self, update: jax.Array, slots: Slots, param: jax.Array, k: Numbers
    ) -> tuple[jax.Array, Slots]:
        """Update the momentum of one parameter."""
        (b1, c1), (b2, c2) = k["beta_1"], k["beta_2"]
        m = slots["m"]
        mean = b1 * m + c1 * update
        # Of infinity it is NaN, since the momentum would stay infinite for ever.
        return jnp.sign(mean) + 0 * mean, {"m": b2 * m + c2 * update}
