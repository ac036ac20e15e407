"""Add noise to gradients."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from optimize_loss._engine.link import Link, NotNegative, Numbers, Seed, Slots
from optimize_loss._random import normal, stream


@dataclasses.dataclass(frozen=True)
class AddNoise(Link):
    """Add independent Gaussian noise to every entry of the gradients.

        g ← g + scale · x,   x ~ N(0, 1), redrawn until |x| ≤ 2 if `truncated`

    The noise of a parameter is a function of the seed, its name and the number of updates: it does
    not change if another parameter is added, removed or sharded, and a resumed run has the same
    noise as an uninterrupted one. The state holds no random key.

    Args:
      scale: the standard deviation of the Gaussian before truncation, at least 0, in the unit of
        the gradients. Truncated noise has the standard deviation 0.8796 · scale, and absolute
        values of at most 2 · scale. To anneal the noise, give a schedule.
      seed: an integer in [0, 2**32).
      truncated: whether to redraw samples beyond two standard deviations, as contrib does.

    Example:
      >>> import jax.numpy as jnp, optimize_loss as ol
      >>> tx = ol.transforms.chain(noise=ol.transforms.AddNoise(0.5))
      >>> g = {"w": jnp.zeros(1000)}
      >>> noise = tx.update(g, tx.init(g))[0]["w"]
      >>> bool(abs(noise).max() <= 1.0), bool(abs(noise.std() - 0.44) < 0.02)
      (True, True)

    References:
      A. Neelakantan et al., "Adding Gradient Noise Improves Learning for Very Deep Networks", 2015,
      https://arxiv.org/abs/1511.06807; `gradient_noise_scale` of `tf.contrib.layers.optimize_loss`,
      whose noise is truncated and not annealed.
    """

    scale: NotNegative
    seed: Seed = 0
    truncated: bool = True

    def scalars(
        self, numbers: Numbers, memory: Numbers, total: Any, step: jax.Array
    ) -> tuple[Numbers, Numbers]:
        """Pass on the step, which keys the noise."""
        return {**numbers, "step": step}, memory

    def for_each(self, names: Sequence[str], k: Numbers) -> Iterator[Numbers]:
        """Return the key of each parameter's noise."""
        return ({"key": stream(k["seed"], name, k["step"])} for name in names)

    def leaf(
        self, update: jax.Array, slots: Slots, param: jax.Array, k: Numbers
    ) -> tuple[jax.Array, Slots]:
        """Add noise to one gradient."""
        bound = 2.0 if self.truncated else math.inf
        noise = normal(k["key"], update.shape, bound).astype(k["scale"].dtype)
        if update.dtype.kind == "c":
            imaginary = normal(k["key"][::-1], update.shape, bound).astype(k["scale"].dtype)
            return update + k["scale"] * (noise + 1j * imaginary), slots
        return update + k["scale"] * noise, slots
