"""Adafactor: Adam's denominator from the means of rows and columns."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from optimize_loss._engine.arrays import abs_squared, count, full, sqrt
from optimize_loss._engine.link import Link, NotNegative, NotPositive, Numbers, Positive, Slots


@dataclasses.dataclass(frozen=True)
class StepByAdafactor(Link):
    """Divide by a root mean square that is kept for rows and columns; step in proportion to p.

        q = |g|² + ε₁,   b = 1 - t^beta_2_decay,   t = 1, 2, …
        two axes or more:  r ← b r + (1-b) · mean of q over the last axis
                           c ← b c + (1-b) · mean of q over the last but one
                           V = r c / mean(r)
        fewer:             V ← b V + (1-b) q
        x = g / √V,   ρ = min(learning_rate, 1/√t)
        p ← p - max(ε₂, rms(p)) · ρ · x / max(1, rms(x) / clip_threshold)

    rms is the root mean square of all entries. A matrix of n by m keeps n + m numbers, the slots
    `row` and `column`, and no V; a vector and a scalar keep V, the slot `v`. Unused slots are
    empty. Parameters with more than two axes are treated as stacks of matrices. At first b is 0, so
    no correction is needed. A zero gradient gives a zero step. The update is the step: no
    `ScaleByLearningRate` follows.

    Args:
      learning_rate: at least 0, relative to rms(p); a number or a schedule.
      beta_2_decay: at most 0; 0 forgets all gradients but the newest.
      epsilon_1: ε₁, above 0, in the unit of the gradients squared.
      epsilon_2: ε₂, above 0, in the unit of the parameters: the lower bound of rms(p).
      clip_threshold: the upper bound of rms(x), above 0.
      relative_step: whether the rate, a schedule's too, is at most 1/√t; else ρ = learning_rate.

    Example:
      All entries of the first x are ±1, and rms(p) is 5:

      >>> import jax.numpy as jnp, optimize_loss as ol
      >>> tx = ol.transforms.chain(adafactor=ol.transforms.StepByAdafactor(learning_rate=0.5))
      >>> p, g = {"w": jnp.array([1.0, 7.0])}, {"w": jnp.array([-3.0, 0.25])}
      >>> print(tx.update(g, tx.init(p), p)[0]["w"].round(5))
      [ 2.5 -2.5]

    References:
      N. Shazeer, M. Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", 2018,
      https://arxiv.org/abs/1804.04235, algorithms 4 to 6. Matches Keras 2.15 and Keras 3
      `Adafactor`, which also store V in full, cap the rate at 1/√t even with
      `relative_step=False`, and give NaN where a row and a column are both zero. Without the cap,
      matrices and vectors move as in `optax.adafactor(min_dim_size_to_factor=1)`.
    """

    learning_rate: NotNegative = 0.001
    beta_2_decay: NotPositive = -0.8
    epsilon_1: Positive = 1e-30
    epsilon_2: Positive = 1e-3
    clip_threshold: Positive = 1.0
    relative_step: bool = True
    reads_params = True

    def slots(self, param: jax.Array) -> dict[str, jax.Array]:
        """Return the means of rows and columns, or V; empty arrays in the place of the others."""
        v = full(param)
        if param.ndim < 2:  # two arrays, as a step that takes their memory cannot take it twice
            return {"row": jnp.zeros(0, v.dtype), "column": jnp.zeros(0, v.dtype), "v": v}
        # Sums of zeros and not new zeros, as these are sharded as the rows and columns are.
        return {"row": jnp.sum(v, -1), "column": jnp.sum(v, -2), "v": jnp.zeros(0, v.dtype)}

    def scalars(
        self, numbers: Numbers, memory: Numbers, total: Any, step: jax.Array
    ) -> tuple[Numbers, Numbers]:
        """Return ρ and 1-b, and the other numbers as they are."""
        rate = numbers["learning_rate"]
        t = count(step, rate)
        if self.relative_step:
            rate = jnp.minimum(rate, 1 / jnp.sqrt(t))
        return {**numbers, "rate": rate, "weight": t ** numbers["beta_2_decay"]}, memory

    def leaf(
        self, update: jax.Array, slots: Slots, param: jax.Array, k: Numbers
    ) -> tuple[jax.Array, Slots]:
        """Return the step of one parameter."""
        q, new = abs_squared(update) + k["epsilon_1"], dict(slots)
        if param.ndim < 2:
            new["v"] = slots["v"] + (q - slots["v"]) * k["weight"]
            x = update / jnp.sqrt(new["v"])
        else:
            row = slots["row"] + (_mean(q, -1) - slots["row"]) * k["weight"]
            column = slots["column"] + (_mean(q, -2) - slots["column"]) * k["weight"]
            # Roots before products: r · c of a zero row and a zero column underflows to 0.
            by_row = jnp.sqrt(_mean(row, -1)[..., None]) / jnp.sqrt(row)
            x = update * by_row[..., None] * (1 / jnp.sqrt(column))[..., None, :]
            new |= {"row": row, "column": column}
        length = jnp.maximum(k["epsilon_2"], _rms(param)) * k["rate"]
        return -length / jnp.maximum(1, _rms(x) / k["clip_threshold"]) * x, new


def _mean(x: jax.Array, axis: int) -> jax.Array:
    """Return the mean over one axis; 0 where that axis is empty."""
    return jnp.sum(x, axis) / max(x.shape[axis], 1)


def _rms(x: jax.Array) -> jax.Array:
    """Return the root mean square of all entries; 0 where there are none."""
    return sqrt(jnp.sum(abs_squared(x)) / max(x.size, 1))
