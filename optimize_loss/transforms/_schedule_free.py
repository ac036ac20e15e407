"""Schedule-free Adam: averaging instead of a decaying rate."""

import dataclasses
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from optimize_loss._checks import INNER_DECAY, STEP
from optimize_loss._engine.arrays import abs_squared, copy, count, full, is_narrow, sqrt, stored_as
from optimize_loss._engine.kinds import Averaging
from optimize_loss._engine.link import Decay, NotNegative, Numbers, Positive, Slots


@dataclasses.dataclass(frozen=True)
class StepByScheduleFree(Averaging):
    """Update z by Adam, and take gradients between z and the mean x of all z so far.

        v ← v + (1-β₂)(|g|² - v),   t = 1, 2, …
        z ← z - learning_rate · min(t / warmup_steps, 1) · g / (√(v / (1-β₂ᵗ)) + ε)
        x ← x + (z - x) / t
        p ← (1-β₁) z + β₁ x

    z starts as a copy of p, and so does x. β₁ replaces momentum, and the mean replaces a decaying
    rate. Train p, but evaluate and keep x: `averaged` returns it. x is not stored, but computed
    from p and z, so anything else that changes p, such as weight decay, also changes x. The update
    is the difference to p: no `ScaleByLearningRate` follows. If p has 16 bits or fewer, x cannot be
    computed from it: two more slots hold x, and p after the last update.

    Args:
      learning_rate: at least 0; a number or a schedule.
      beta_1: β₁, in (0, 1); a number, not a schedule, because x is computed from p and β₁.
      beta_2: β₂, in [0, 1).
      epsilon: ε, above 0, in the unit of the gradients.
      warmup_steps: the number n of updates in which the rate rises, at least 0; in the first it is
        `learning_rate` / n, from the nth on `learning_rate`.

    Example:
      The first step has the size of the rate, in z, x and p alike:

      >>> import jax.numpy as jnp, optimize_loss as ol
      >>> tx = ol.transforms.chain(free=ol.transforms.StepByScheduleFree(0.5))
      >>> p, g = {"w": jnp.array([2.0])}, {"w": jnp.array([4.0])}
      >>> p, state = tx.apply(g, tx.init(p), p)
      >>> print(p["w"], state["free"]["z"]["w"])
      [1.5] [1.5]

    References:
      A. Defazio et al., "The Road Less Scheduled", 2024, https://arxiv.org/abs/2405.15682,
      algorithm 1, except that there, as in `optax.contrib.schedule_free_adamw`, the mean has the
      squares of the rates as weights: a difference only where the rate changes. Matches Keras 3
      `ScheduleFreeAdamW` on JAX; on TensorFlow, Keras 3.15.1 uses the new z in place of the old
      one.
    """

    learning_rate: NotNegative = 0.0025
    beta_1: Annotated[float, INNER_DECAY] = 0.9
    beta_2: Decay = 0.999
    epsilon: Positive = 1e-8
    warmup_steps: Annotated[int, STEP] = 0
    needs = "stored_param"
    reads_params = True
    elementwise = True
    squares = ("v",)

    def __post_init__(self) -> None:
        INNER_DECAY.check("beta_1", self.beta_1)  # no schedule: see `averaged`
        super().__post_init__()

    def slots(self, param: jax.Array) -> dict[str, jax.Array]:
        """Return z, a copy of the parameter, and the running mean of squares; x for few bits."""
        slots = {"z": copy(param), "v": full(param)}
        if is_narrow(param.dtype):
            slots |= {"x": copy(param), "p": jnp.array(param, copy=True)}
        return slots

    def scalars(
        self, numbers: Numbers, memory: Numbers, total: Any, step: jax.Array
    ) -> tuple[Numbers, Numbers]:
        """Return the rate of this step, the correction of v, and the weights of the means."""
        (b1, one_minus_b1), (_, one_minus_b2) = numbers["beta_1"], numbers["beta_2"]
        t = count(step, b1)
        warmup = jnp.maximum(numbers["warmup_steps"], 1).astype(t.dtype)
        rate = numbers["learning_rate"] * jnp.minimum(t / warmup, 1)
        # From the 1-β₂ that is in v: float32 has 1 - 0.999 wrong by 5e-5 of itself.
        one_minus_power = -jnp.expm1(t * jnp.log1p(-one_minus_b2))
        k = {"c2": one_minus_b2, "of_v": 1 / one_minus_power, "epsilon": numbers["epsilon"]}
        k |= {"b1": b1, "one_minus_b1": one_minus_b1}
        return {**k, "rate": rate, "of_d": one_minus_b1 + b1 / t, "t": t}, memory

    def leaf(
        self, update: jax.Array, slots: Slots, param: jax.Array, k: Numbers
    ) -> tuple[jax.Array, Slots]:
        """Return the step of one parameter."""
        z, v = slots["z"], slots["v"]
        v = v + (abs_squared(update) - v) * k["c2"]
        d = -k["rate"] * update / (sqrt(k["of_v"] * v) + k["epsilon"])
        if "x" not in slots:
            # What the formulas give for p when x, (p - (1-β₁) z) / β₁, is put in and cancels.
            return k["of_d"] * d + (z - param) / k["t"], {"z": z + d, "v": v}
        z, x = z + d, slots["x"] + (param - slots["p"]) / k["b1"]
        x = x + (z - x) / k["t"]
        p = stored_as(k["one_minus_b1"] * z + k["b1"] * x, k["stored"].dtype)
        return p - param, {"z": z, "v": v, "x": x, "p": p}

    def averaged(self, param: jax.Array, slots: Slots, numbers: Numbers) -> jax.Array:
        """Return x, from the β₁ with which the parameter was made."""
        b1, one_minus_b1 = numbers["beta_1"].astype(param.dtype)
        if "x" in slots:
            return slots["x"] + (param - slots["p"]) / b1
        return param + one_minus_b1 / b1 * (param - slots["z"])
