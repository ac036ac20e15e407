"""Keep running means: of the parameters, and of the loss."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from optimize_loss._checks import DECAY, Rule
from optimize_loss._engine.arrays import compute_dtype, count
from optimize_loss._engine.kinds import Averaging
from optimize_loss._engine.link import Count, Decay, FullDecay, Link, Numbers, Slots, Stage


@dataclasses.dataclass(frozen=True)
class AverageParams(Averaging):
    """Keep an exponential moving average of the parameters. It comes last in a chain.

        a ← a + (1-β)(p - a),   p the parameter after this update, as it is stored

    The average is the slot `average`, in float32 or wider, and starts as a copy of the parameter.
    With `bias_free` it is the mean of p₁ … pₜ with weights βᵗ⁻ⁱ, so the initial parameters are
    excluded: the weight of the newest is (1-β) / (1-βᵗ) in place of (1-β), and 1/t where a schedule
    gives 1.

    Args:
      decay: β, in [0, 1]; below 1 if `bias_free`, unless it is a schedule. At 1 the average never
        changes.
      overwrite_every: if given, the parameter becomes the average after every so many updates.
      bias_free: whether to exclude the initial parameters from the average.

    Example:
      >>> import jax.numpy as jnp, optimize_loss as ol
      >>> tx = ol.transforms.chain(
      ...     rate=ol.transforms.ScaleByLearningRate(1.0), ema=ol.transforms.AverageParams(0.5))
      >>> params = {"w": jnp.array([2.0])}
      >>> params, state = tx.apply({"w": jnp.array([1.0])}, tx.init(params), params)
      >>> print(params["w"], state["ema"]["average"]["w"])
      [1.] [1.5]

    References:
      Keras 2.15, `Optimizer(use_ema=True, ema_momentum=..., ema_overwrite_frequency=...)`.
    """

    decay: FullDecay = 0.999
    overwrite_every: Count | None = None
    bias_free: bool = False
    stage = Stage.AVERAGE
    reads_params = True
    elementwise = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.decay):
            self.rule("decay").check("decay", self.decay)

    def rule(self, name: str) -> Rule:
        """Return what the number must satisfy: a decay that is always 1 averages nothing."""
        below_1 = name == "decay" and self.bias_free and not callable(self.decay)
        return DECAY if below_1 else super().rule(name)

    def slots(self, param: jax.Array) -> dict[str, jax.Array]:
        """Return a copy of the parameter."""
        return {"average": jnp.array(param, dtype=compute_dtype(param.dtype), copy=True)}

    def scalars(
        self, numbers: Numbers, memory: Numbers, total: Any, step: jax.Array
    ) -> tuple[Numbers, Numbers]:
        """Return the weight of the newest parameters, and whether to overwrite."""
        beta, weight = numbers["decay"]
        if self.bias_free:
            t = count(step, beta)
            rest = jnp.where(beta == 1, 1, 1 - beta**t)
            weight = jnp.where(beta == 1, 1 / t, weight / rest)
        k = {"weight": weight}
        if self.overwrite_every is not None:
            every = numbers["overwrite_every"]
            k["overwrite"] = step % every == every - 1
        return k, memory

    def averaged(self, param: jax.Array, slots: Slots, numbers: Numbers) -> jax.Array:
        """Return the average."""
        return slots["average"]

    def after(
        self, param: jax.Array, moved: jax.Array, slots: Slots, k: Numbers
    ) -> tuple[jax.Array, Slots]:
        """Update one average, and overwrite the parameter with it when it is due."""
        old = param.astype(moved.dtype)
        new = (old + moved).astype(param.dtype).astype(moved.dtype)  # as it is stored
        average = slots["average"] + (new - slots["average"]) * k["weight"]
        if self.overwrite_every is not None:
            moved = jnp.where(k["overwrite"], average - old, moved)
        return moved, {"average": average}


@dataclasses.dataclass(frozen=True)
class AverageLoss(Link):
    """Keep an exponential moving average of the loss, for reports; updates pass unchanged.

        mean ← mean + (1-β)(loss - mean),   starting at 0, not corrected

    After an `Accumulate` it averages the losses of complete updates.

    Args:
      decay: β, in [0, 1).
      metric: the name under which `optimize_loss` reports it; None for no report.

    Example:
      >>> import optimize_loss as ol
      >>> tx = ol.transforms.chain(loss_mean=ol.transforms.AverageLoss(0.5))
      >>> _, state = tx.update({"w": 1.0}, tx.init({"w": 1.0}), value=8.0)
      >>> print(state["loss_mean"]["mean"])
      4.0

    References:
      `moving_average_decay` of `tf.contrib.layers.optimize_loss`, versions 0.8 to 0.10.
    """

    decay: Decay = 0.9
    metric: str | None = None
    needs = "loss"
    elementwise = True

    def report(self, name: str, parts: Mapping[str, Any]) -> dict[str, Any]:
        """Return the mean."""
        return {} if self.metric is None else {self.metric: parts["mean"]}

    def memory(self) -> dict[str, float]:
        """Return the mean."""
        return {"mean": 0.0}

    def scalars(
        self, numbers: Numbers, memory: Numbers, total: Any, step: jax.Array
    ) -> tuple[Numbers, Numbers]:
        """Update the mean."""
        _, weight = numbers["decay"]
        return {}, {"mean": memory["mean"] + (total - memory["mean"]) * weight}
