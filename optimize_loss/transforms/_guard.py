"""Skip a batch whose loss or gradients are not finite, or unusually large."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import optax

from optimize_loss._checks import AT_LEAST_1, STEP
from optimize_loss._engine.arrays import sqrt
from optimize_loss._engine.health import A_SCHEDULE, NOBODY, THE_LOSS, THE_NORM, Health
from optimize_loss._engine.kinds import Gate
from optimize_loss._engine.link import Decay, NotNegative, Numbers, Positive, Stage
from optimize_loss.transforms._loss_scale import DivideByDynamicLossScale

Most = Annotated[int, dataclasses.replace(AT_LEAST_1, initial=True)]


@dataclasses.dataclass(frozen=True)
class Guard(Gate):
    """The base of the guards: their counts, and their place before other gates.

    Subclasses have a field `most`: how many skips in a row are an error, or None.
    """

    needs = "health"
    stage = Stage.GUARD
    elementwise = True

    def memory(self) -> dict[str, float]:
        """Return the numbers of skipped batches, in total and last in a row, and the offender."""
        return {"skipped": 0, "skipped_in_a_row": 0, "offender": 0}

    def report(self, name: str, parts: Mapping[str, Any]) -> dict[str, Any]:
        """Return the numbers of skipped batches, in total and last in a row."""
        return {count: parts[count] for count in ("skipped", "skipped_in_a_row")}

    def is_sound(self, health: Health) -> jax.Array:
        """Return whether the loss is finite, and so are the gradients or else the scale shrinks.

        No schedule may have a value that cannot be, either.
        """
        finite = health.loss_is_finite & (jnp.isfinite(health.norm) | health.scale_shrinks)
        return finite & health.schedules_hold

    def counted(self, memory: Numbers, health: Health, is_open: jax.Array) -> Numbers:
        """Return the memory after this batch, of what all guards count."""
        skipped, in_a_row, offender = (memory[x] for x in Guard.memory(self))
        who = jnp.where(
            health.loss_is_finite, jnp.where(health.schedules_hold, THE_NORM, A_SCHEDULE), THE_LOSS
        )
        who = jnp.where(health.offender == NOBODY, who, health.offender)
        return {
            "skipped": jnp.where(is_open, skipped, optax.safe_increment(skipped)),
            "skipped_in_a_row": jnp.where(is_open, 0, optax.safe_increment(in_a_row)),
            "offender": jnp.where(is_open, offender, who),
        }


@dataclasses.dataclass(frozen=True)
class SkipNonFinite(Guard):
    """Run the later links only if the loss and all gradients are finite.

        loss or ‖g‖ not finite:  parameters, slots, counts stay;  skipped ← skipped + 1

    It comes first in a chain, before loss scales and `Accumulate`: then a skipped batch changes
    nothing in the state but its own counts. `optimize_loss(skip="nonfinite")` puts it there, and
    also keeps the model state. If a dynamic loss scale above 1 comes later, it handles infinite
    gradients, by shrinking and skipping; the loss is checked in any case. Without `value=loss` in
    `update`, only gradients are checked. A step is also skipped if a schedule has an invalid value,
    such as a negative rate.

    The state keeps `skipped`, the number so far, `skipped_in_a_row`, and `offender`, which marks
    the first parameter, by name, whose gradient was not finite in the last skipped batch.

    Args:
      most: so many skips in a row raise a `NonFiniteError` in `optimize_loss`; at least 1, or None
        for no error. `step.run` sees every skip. A state shows only the last skips in a row:
        earlier ones within a call of `step.many` show only in the metric `skipped_in_a_row`. States
        that are stepped together under `jax.vmap` count, but never raise.

    Example:
      >>> import jax.numpy as jnp, optimize_loss as ol
      >>> tx = ol.transforms.chain(
      ...     skip=ol.transforms.SkipNonFinite(), rate=ol.transforms.ScaleByLearningRate(1.0))
      >>> p = {"w": jnp.array([5.0])}
      >>> updates, state = tx.update({"w": jnp.array([jnp.nan])}, tx.init(p), p)
      >>> print(updates["w"], state["skip"]["skipped"], state["step"])
      [0.] 1 0

    References:
      `optax.apply_if_finite`, which lets the update through after so many errors in a row.
    """

    most: Most | None = 10

    def scalars(
        self, numbers: Numbers, memory: Numbers, total: Any, step: jax.Array
    ) -> tuple[Numbers, Numbers]:
        """Open where all is finite, and count."""
        is_open = self.is_sound(total)
        return {"open": is_open}, self.counted(memory, total, is_open)


@dataclasses.dataclass(frozen=True)
class SkipSpikes(Guard):
    """Run the later links only if all is finite and the gradients are not unusually large.

        ℓ = log(n + ε),  n the joint norm of the gradients;  t batches were let through before
        spike:  t ≥ warmup_steps  and  ℓ > μ + k_sigma · max(σ, min_sigma),  σ² = s - μ²
        else:   β' = min(β, t / (t+1)),  μ ← μ + (1-β')(ℓ - μ),  s ← s + (1-β')(ℓ² - s)

    The running means of the log-norm and of its square are those of `ClipByAdaptiveNorm`, here
    over batches that were let through: a spike is compared with earlier batches, and does not
    change the means. Batches that are not finite are skipped as by `SkipNonFinite`; see there for
    the rest.

    Args:
      k_sigma: how many standard deviations of the log-norm count as usual, at least 0.
      decay: β, in [0, 1).
      warmup_steps: the number of batches to let through before the first check, at least 0.
      min_sigma: the least standard deviation of the log-norm, at least 0. At 0.1, with a
        `k_sigma` of 6, a norm below 1.8 times the usual one is never a spike.
      epsilon: ε, above 0; added to the norm.
      most: so many skips in a row raise a `NonFiniteError` in `optimize_loss`; at least 1, or None
        for no error. `step.run` sees every skip. A state shows only the last skips in a row:
        earlier ones within a call of `step.many` show only in the metric `skipped_in_a_row`. States
        that are stepped together under `jax.vmap` count, but never raise.

    Example:
      A norm of 50 after two of 5 is 10 times the usual one; log 10 is 2.3, above 6 · 0.1:

      >>> import jax.numpy as jnp, optimize_loss as ol
      >>> tx = ol.transforms.chain(skip=ol.transforms.SkipSpikes(6.0, warmup_steps=2))
      >>> g = {"w": jnp.array([3.0, 4.0])}
      >>> state = tx.init(g)
      >>> for times in (1.0, 1.0, 10.0):
      ...     updates, state = tx.update({"w": times * g["w"]}, state)
      >>> print(updates["w"], state["skip"]["skipped"])
      [0. 0.] 1

    References:
      `tf.contrib.layers.adaptive_clipping_fn`, whose means include the batch that they check: with
      β = 0.95, no batch can then exceed 4.4 σ.
    """

    k_sigma: NotNegative = 6.0
    decay: Decay = 0.99
    warmup_steps: Annotated[int, STEP] = 20
    min_sigma: NotNegative = 0.1
    epsilon: Positive = 1e-8
    most: Most | None = 10

    def memory(self) -> dict[str, float]:
        """Return the counts, and the running means over so many batches."""
        return {**super().memory(), "seen": 0, "mean": 0.0, "sq_mean": 0.0}

    def scalars(
        self, numbers: Numbers, memory: Numbers, total: Any, step: jax.Array
    ) -> tuple[Numbers, Numbers]:
        """Open where all is finite and usual; then update the running means."""
        mean, sq_mean, seen = memory["mean"], memory["sq_mean"], memory["seen"]
        norm = total.norm if total.loss_scale is None else total.norm / total.loss_scale
        log_norm = jnp.log(norm + numbers["epsilon"])
        root = sqrt(sq_mean)
        variance = jnp.maximum((root - mean) * (root + mean), numbers["min_sigma"] ** 2)
        bound = mean + numbers["k_sigma"] * sqrt(variance)
        known = (seen > 0) & (seen >= numbers["warmup_steps"])  # the first has none to judge it by
        # Not above the bound, so that a bound that is NaN lets nothing through.
        is_spike = known & jnp.isfinite(norm) & ~(log_norm <= bound)
        is_open = self.is_sound(total) & ~is_spike
        weight = jnp.maximum(numbers["decay"][1], 1 / (seen.astype(mean.dtype) + 1))
        counts = is_open & jnp.isfinite(norm)  # else it is the loss scale's
        new = {
            **self.counted(memory, total, is_open),
            "seen": jnp.where(counts, optax.safe_increment(seen), seen),
            "mean": jnp.where(counts, mean + (log_norm - mean) * weight, mean),
            "sq_mean": jnp.where(counts, sq_mean + (log_norm**2 - sq_mean) * weight, sq_mean),
        }
        return {"open": is_open}, new


def guards_of(links: Sequence[tuple[str, Any]], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the name of each guard among the links of a chain, and the guard.

    Args:
      links: of the chain.
      prefix: with which its name begins.
    """
    return ((n, link) for n, link in links if isinstance(link, Guard) and n.startswith(prefix))


def guard_of(links: Sequence[tuple[str, Any]]) -> tuple[str, Any] | None:
    """Return the name of the guard among the links of a chain, and the guard; None without one."""
    return next(guards_of(links), None)


def was_open(links: Sequence[tuple[str, Any]], old: Any, new: Any) -> jax.Array | None:
    """Return whether guard and loss scale let the last batch through; None if it always is.

    Args:
      links: of a chain.
      old: their state before the batch.
      new: their state after it.
    """
    found = []
    if guard := guard_of(links):
        found.append(new[guard[0]]["skipped_in_a_row"] == 0)
    for name, link in links:
        if isinstance(link, DivideByDynamicLossScale):
            found.append(link.was_open(old[name], new[name]))
        elif isinstance(link, Gate) and not isinstance(link, Guard):
            break  # a scale behind it may not have seen the batch
    return functools.reduce(jnp.logical_and, found) if found else None


def kept(is_open: jax.Array | None, old: Any, new: Any) -> Any:
    """Return the new tree of arrays, or the old one if the batch was skipped."""
    if is_open is None:
        return new
    return jax.tree.map(lambda a, b: jnp.where(is_open, a, b), new, old)
