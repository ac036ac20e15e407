"""Gather the gradients of several batches, and sum them over devices."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optimize_loss._checks import InvalidType, check_choice, received
from optimize_loss._engine.arrays import zeros
from optimize_loss._engine.kinds import Gate
from optimize_loss._engine.link import Count, Numbers, Slots, Stage, TreeLink

# Stands in the state where a call came without a loss. It is finite, so that tools which look for
# NaN and infinities stay quiet where no link needs one.
NO_LOSS = float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True)
class Accumulate(Gate):
    """Run the later links once in `every` calls, on the mean of the gradients since.

        s ← s + g,   and in every `every`-th call:  u = s / every;  the next one begins with s ← g
        reduce="sum":       u = s
        reduce="weighted":  s ← s + w · g,  W ← W + w,  u = s / W

    In all other calls, parameters, the slots of later links and the count of updates do not change:
    schedules, averages and Adam's correction count updates. The sum is kept in float32 or wider.
    The same parameters must have a gradient in all calls of one update: the sum of a parameter
    without a gradient in the last call is lost.

    With "weighted", the mean over batches of different sizes equals that over one large batch: w is
    the size of the batch over which its loss is a mean, such as its number of tokens. A loss for
    `optimize_loss` returns it in `Aux(weight=...)`; elsewhere it is passed to `update`. A batch
    with weight 0 is ignored, even if it is NaN: guards and loss scales let it through, and no
    running mean changes. If all weights of an update are 0, u is 0.

    Later links that read the loss, such as `ReduceOnPlateau`, see the loss of the update: the same
    mean or sum of the losses since. They ignore an update whose weights are all 0; optax
    transformations then see the loss of the update before, or NaN if there was none.

    Args:
      every: how many gradients make one update, an integer of at least 1.
      reduce: "mean", "sum" or "weighted".
      of_loss: whether to keep the loss of the update. `chain` sets it if a later link may need the
        loss.

    Example:
      >>> import optimize_loss as ol
      >>> tx = ol.transforms.chain(
      ...     accumulate=ol.transforms.Accumulate(2), rate=ol.transforms.ScaleByLearningRate(1.0))
      >>> first, state = tx.update({"w": 1.0}, tx.init({"w": 0.0}), {"w": 0.0})
      >>> second, state = tx.update({"w": 3.0}, state, {"w": 0.0})
      >>> print(first["w"], second["w"], state["step"])
      0.0 -2.0 1

    References:
      Keras 3, `gradient_accumulation_steps`, and `optax.MultiSteps`. In Keras, schedules and
      averages count calls.
    """

    every: Count
    reduce: str = "mean"
    of_loss: bool = False
    needs = "loss_and_weight"
    stage = Stage.GATHER
    elementwise = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("reduce", self.reduce, ("mean", "sum", "weighted"))

    def slots(self, param: jax.Array) -> dict[str, jax.Array]:
        """Return the sum."""
        return {"sum": zeros(param)}

    def memory(self) -> dict[str, float]:
        """Return how many gradients are in the sum, their weights' sum, and the loss."""
        weight = {"weight": 0.0} if self.reduce == "weighted" else {}
        return {"gathered": 0} | weight | ({"loss": 0.0} if self.of_loss else {})

    def scalars(
        self, numbers: Numbers, memory: Numbers, total: Any, step: jax.Array
    ) -> tuple[Numbers, Numbers]:
        """Count one gradient, and open when they are enough."""
        loss, weight = total
        gathered = memory["gathered"] + 1
        enough = gathered >= numbers["every"]
        # The count, not `every`, divides: `every` may have been set lower in between.
        share = newest = 1 / gathered.astype(float)
        k = {"open": enough, "is_first": gathered == 1, "share": share}
        new = {"gathered": jnp.where(enough, 0, gathered)}
        if self.reduce == "weighted":
            weight = self._weight(weight, memory)
            new["weight"] = jnp.where(k["is_first"], weight, memory["weight"] + weight)
            inverse = 1 / jnp.where(new["weight"] == 0, 1, new["weight"])
            k |= {"share": jnp.where(new["weight"] == 0, 0, inverse), "weight": weight}
            newest = jnp.where(weight == new["weight"], 1, weight * inverse)
            newest = jnp.where(weight == 0, 0, newest)
            k |= {"empty_behind": new["weight"] == 0}
        if self.of_loss:
            new["loss"] = self._loss(loss, memory["loss"], k["is_first"], newest)
            k |= {} if loss is None else {"loss_behind": self._loss_behind(new["loss"], k)}
        return k, new

    def _weight(self, weight: Any, memory: Numbers) -> jax.Array:
        if weight is None:
            raise ValueError(
                f"{self!r} needs a weight: return it in `Aux(weight=...)` of the loss, or pass "
                "`weight=...` to `update`."
            )
        return jnp.asarray(weight, memory["weight"].dtype)

    def _loss(self, loss: Any, old: jax.Array, is_first: jax.Array, share: jax.Array) -> jax.Array:
        """Return the loss of the update so far, of which the newest one has a share."""
        if loss is None:
            return jnp.full_like(old, NO_LOSS)
        old = jnp.where(old == NO_LOSS, jnp.nan, old)  # no mean leaves one out in silence
        loss, share = jnp.asarray(loss, old.dtype), share.astype(old.dtype)
        if self.reduce == "sum":
            return jnp.where(is_first, loss, old + loss)
        mean = jnp.where(share == 1, loss, old + (loss - old) * share)
        return jnp.where(share == 0, old, mean)

    def _loss_behind(self, loss: jax.Array, k: Numbers) -> jax.Array:
        """Return the loss as links behind see it: NaN as long as there was none to keep."""
        if self.reduce != "weighted":
            return loss
        return jnp.where(k["empty_behind"] & (loss == 0), jnp.nan, loss)

    def leaf(
        self, update: jax.Array, slots: Slots, param: jax.Array, k: Numbers
    ) -> tuple[jax.Array, Slots]:
        """Add one gradient to the sum."""
        if self.reduce == "weighted":
            update = jnp.where(k["weight"] == 0, 0, update * k["weight"])
        total = jnp.where(k["is_first"], update, slots["sum"] + update)
        return total, {"sum": total}

    def behind(self, k: Numbers) -> jax.Array | None:
        """Return what makes the sum a mean."""
        return None if self.reduce == "sum" else k["share"]

    def with_loss(self) -> Gate:
        """Return the same link, which keeps the loss of the update."""
        return dataclasses.replace(self, of_loss=True)

    def is_empty(self, weight: Any) -> jax.Array | None:
        """Return whether a batch has no weight; None where batches are not weighted."""
        weighs = self.reduce == "weighted" and weight is not None
        return jnp.asarray(weight) == 0 if weighs else None


@dataclasses.dataclass(frozen=True)
class SumOverAxis(TreeLink):
    """Sum each gradient over a mapped axis of devices, as `jax.lax.psum` does.

    For use inside `jax.shard_map`, `jax.pmap` or `jax.vmap` with that axis. Gradients that JAX has
    already summed, as it does under `jax.shard_map(check_vma=True)` for replicated parameters, are
    not summed again. Gradients of a loss that is a mean over the local batch must be divided by the
    number of devices, or the loss be.

    Args:
      axis_name: the name of the axis, or a tuple of names.

    Example:
      >>> import jax, jax.numpy as jnp, optimize_loss as ol
      >>> tx = ol.transforms.chain(sum=ol.transforms.SumOverAxis("data"))
      >>> step = lambda g: tx.update(g, tx.init(g), g)[0]["w"]
      >>> print(jax.vmap(step, axis_name="data")({"w": jnp.array([1.0, 2.0])}))
      [3. 3.]

    References:
      Keras 2.15, `Optimizer.aggregate_gradients`.
    """

    axis_name: str | tuple[str, ...]
    stage = Stage.SUM
    reads_params = False

    def __post_init__(self) -> None:
        super().__post_init__()
        axes = self.axis_name if isinstance(self.axis_name, tuple) else (self.axis_name,)
        if not all(isinstance(axis, str) for axis in axes):
            raise InvalidType(
                "`axis_name` must be the name of an axis, or a tuple of names. "
                f"{received('axis_name', self.axis_name)}"
            )

    def run(
        self,
        updates: Mapping[str, jax.Array],
        slots: Mapping[str, Any],
        params: Mapping[str, jax.Array],
        k: Numbers,
    ) -> tuple[Mapping[str, jax.Array], Mapping[str, Any]]:
        """Return the sums."""
        return {name: summed(update, self.axis_name) for name, update in updates.items()}, slots


def summed(gradient: jax.Array, axis_name: str | tuple[str, ...]) -> jax.Array:
    """Return the sum over those of the axes over which JAX has not summed already.

    Where `jax.shard_map` checks what varies, the gradient of a parameter that all devices share
    comes summed.
    """
    left = _not_summed(gradient, axis_name)
    return jax.lax.psum(gradient, left) if left else gradient


def averaged_over(number: jax.Array, axis_name: str | tuple[str, ...]) -> jax.Array:
    """Return the mean over the axes; what is the same on all devices stays as it is."""
    left = _not_summed(number, axis_name)
    return jax.lax.pmean(number, left) if left else number


def _not_summed(x: jax.Array, axis_name: str | tuple[str, ...]) -> tuple[str, ...]:
    """Return those of the axes over which a value varies, or may."""
    axes = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    return tuple(
        axis
        for axis in axes
        if axis in _varying(x) or axis not in _varying(jax.lax.axis_index(axis))
    )


def _varying(x: jax.Array) -> frozenset[str]:
    """Return the axes over which a value is known to vary; none where that is not checked."""
    aval: Any = jax.typeof(x)
    known = getattr(aval, "mat", None)  # before jax 0.10 it is `vma`
    return getattr(aval, "vma", frozenset()) if known is None else known.varying
