"""Let fast parameters look ahead of slow ones."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from optimize_loss._engine.arrays import copy, is_narrow, stored_as
from optimize_loss._engine.kinds import Averaging
from optimize_loss._engine.link import Count, Fraction, Numbers, Slots


@dataclasses.dataclass(frozen=True)
class Lookahead(Averaging):
    """Go back, every few updates, to a point between where they began and where they led.

        φ ← φ + slow_rate · (p - φ)  and  p ← φ,   in every `every`-th update,  p after the update

    The slow parameters φ are the slot `slow`, in float32 or wider, and start as a copy of the
    parameters. They are what to evaluate and to keep: `averaged` returns them. It works with any
    rule, and comes after the rule and its rate. The rule keeps its own memory. Parameters of 16
    bits or fewer restart near φ, not exactly at it; one more slot keeps that point, and φ moves by
    its share of the distance from there.

    Args:
      every: how many updates of the fast parameters come before one of the slow ones; at least 1.
      slow_rate: in [0, 1]; at 1 the fast parameters are taken as they are.

    Example:
      Two updates lead from 8 to 4; half of the way is kept:

      >>> import optimize_loss as ol
      >>> tx = ol.transforms.chain(rate=ol.transforms.ScaleByLearningRate(1.0),
      ...                          lookahead=ol.transforms.Lookahead(every=2))
      >>> p = {"w": 8.0}
      >>> state = tx.init(p)
      >>> for _ in range(2):
      ...     p, state = tx.apply({"w": 2.0}, state, p)
      >>> print(p["w"], state["lookahead"]["slow"]["w"])
      6.0 6.0

    References:
      M. Zhang et al., "Lookahead Optimizer: k steps forward, 1 step back", 2019,
      https://arxiv.org/abs/1907.08610, algorithm 1. `optax.lookahead` keeps pairs of parameters
      in their place.
    """

    every: Count = 6
    slow_rate: Fraction = 0.5
    reads_params = True
    elementwise = True

    def slots(self, param: jax.Array) -> dict[str, jax.Array]:
        """Return a copy of the parameter; for few bits, one more as it is stored."""
        start = {"start": jnp.array(param, copy=True)} if is_narrow(param.dtype) else {}
        return {"slow": copy(param), **start}

    def scalars(
        self, numbers: Numbers, memory: Numbers, total: Any, step: jax.Array
    ) -> tuple[Numbers, Numbers]:
        """Return whether this update is the last of its few."""
        every = numbers["every"]
        return {"rate": numbers["slow_rate"], "syncs": step % every == every - 1}, memory

    def averaged(self, param: jax.Array, slots: Slots, numbers: Numbers) -> jax.Array:
        """Return the slow parameters."""
        return slots["slow"]

    def after(
        self, param: jax.Array, moved: jax.Array, slots: Slots, k: Numbers
    ) -> tuple[jax.Array, Slots]:
        """Update one slow parameter, and go back to it, when it is due."""
        old, slow = param.astype(moved.dtype), slots["slow"]
        # Of few bits: by how far the fast parameter went from what φ was rounded to.
        start = slots.get("start", slow)
        slow = jnp.where(k["syncs"], slow + k["rate"] * (old + moved - start), slow)
        if "start" not in slots:
            return jnp.where(k["syncs"], slow - old, moved), {"slow": slow}
        start = jnp.where(k["syncs"], stored_as(slow, param.dtype), start)
        return jnp.where(k["syncs"], start - old, moved), {"slow": slow, "start": start}
