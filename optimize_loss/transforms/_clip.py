"""Shrink gradients that are too large."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optimize_loss._checks import InvalidType, TreeMismatch, check_takes
from optimize_loss._engine.arrays import multiplied, norm, power_of_two, sqrt
from optimize_loss._engine.link import Decay, Link, NotNegative, Numbers, Positive, Slots
from optimize_loss._engine.trees import take_apart


def shrink(norm: jax.Array, max_norm: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return two factors of min(1, max_norm / norm), which may itself be too small for the dtype.

    NaN where the norm is not finite or the bound is NaN, as nothing is right then.
    """
    clips = ~(norm <= max_norm)
    size = jnp.where(clips, norm, 1)
    half = jnp.finfo(norm.dtype).maxexp // 2
    first = power_of_two(size, half, -half)
    scale = jnp.where(clips, max_norm / (size * first), 1)
    return first, jnp.where(jnp.isfinite(norm), scale, jnp.nan)


def shrunk(update: jax.Array, norm: jax.Array, max_norm: jax.Array) -> jax.Array:
    """Return the update times min(1, max_norm / norm)."""
    return multiplied(update, shrink(norm, max_norm))


@dataclasses.dataclass(frozen=True)
class ClipByValue(Link):
    """Limit every entry of the gradients to at most `max_value` in size.

        gᵢ ← min(max(gᵢ, -max_value), max_value)

    NaN stays NaN. Complex entries keep their phase.

    Args:
      max_value: the largest entry, above 0, in the unit of the gradients.

    Example:
      >>> import jax.numpy as jnp, optimize_loss as ol
      >>> tx = ol.transforms.chain(clip=ol.transforms.ClipByValue(2.0))
      >>> g = {"w": jnp.array([-3.0, 1.0, 4.0])}
      >>> print(tx.update(g, tx.init(g))[0]["w"])
      [-2.  1.  2.]

    References:
      Keras 2.15, `Optimizer(clipvalue=...)`.
    """

    max_value: Positive
    elementwise = True

    def leaf(
        self, update: jax.Array, slots: Slots, param: jax.Array, k: Numbers
    ) -> tuple[jax.Array, Slots]:
        """Limit every entry."""
        top = k["max_value"]
        if jnp.iscomplexobj(update):
            return shrunk(update, jnp.abs(update), top), slots
        return jnp.clip(update, -top, top), slots


@dataclasses.dataclass(frozen=True)
class ClipByNorm(Link):
    """Shrink the gradient of each parameter until its L2 norm is at most `max_norm`.

        g ← g · min(1, max_norm / ‖g‖)

    Norms are taken in float32 and do not overflow. A gradient whose norm is infinite or NaN
    becomes NaN throughout; the others do not.

    Args:
      max_norm: the largest norm of a parameter's gradient, above 0.

    Example:
      >>> import jax.numpy as jnp, optimize_loss as ol
      >>> tx = ol.transforms.chain(clip=ol.transforms.ClipByNorm(1.0))
      >>> g = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([0.5, 0.0])}
      >>> updates, _ = tx.update(g, tx.init(g))
      >>> print(updates["a"].round(6), updates["b"])
      [0.6 0.8] [0.5 0. ]

    References:
      Keras 2.15, `Optimizer(clipnorm=...)`.
    """

    max_norm: Positive

    def leaf(
        self, update: jax.Array, slots: Slots, param: jax.Array, k: Numbers
    ) -> tuple[jax.Array, Slots]:
        """Shrink one gradient."""
        return shrunk(update, norm(update), k["max_norm"]), slots


@dataclasses.dataclass(frozen=True)
class ClipByGlobalNorm(Link):
    """Shrink all gradients together until their joint L2 norm is at most `max_norm`.

        n = √Σᵢ‖gᵢ‖²,   gᵢ ← gᵢ · min(1, max_norm / n)

    The direction of the joint gradient is kept. Norms are taken in float32 (float64 for float64)
    and do not overflow: float16 gradients of norm 600 are clipped to the right values. If the norm
    is infinite or NaN, every gradient becomes NaN, as in TensorFlow from 1.14 on and in Keras. Zero
    gradients stay zero, with finite derivatives.

    Args:
      max_norm: the largest joint norm, above 0.

    Example:
      >>> import jax.numpy as jnp, optimize_loss as ol
      >>> tx = ol.transforms.chain(clip=ol.transforms.ClipByGlobalNorm(1.0))
      >>> g = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
      >>> updates, _ = tx.update(g, tx.init(g))
      >>> print(updates["a"].round(6), updates["b"].round(6))
      [0.6] [0.8]

    References:
      R. Pascanu, T. Mikolov, Y. Bengio, "On the difficulty of training recurrent neural networks",
      2013, https://arxiv.org/abs/1211.5063, algorithm 1; `tf.clip_by_global_norm`, which multiplies
      by max_norm · min(1 / n, 1 / max_norm) and so may change unclipped gradients by one rounding.
    """

    max_norm: Positive
    needs = "global_norm"
    elementwise = True

    def scalars(
        self, numbers: Numbers, memory: Numbers, total: Any, step: jax.Array
    ) -> tuple[Numbers, Numbers]:
        """Return the common scale, as two factors."""
        return {"scale": shrink(total, numbers["max_norm"])}, memory

    def factor(self, k: Numbers) -> jax.Array:
        """Return the common scale."""
        return k["scale"]


@dataclasses.dataclass(frozen=True)
class ClipByAdaptiveNorm(Link):
    """Shrink all gradients together when their joint norm is unusually large for this run.

        ℓ = log(n + ε),  μ ← μ + (1-β)(ℓ - μ),  s ← s + (1-β)(ℓ² - s)
        max_norm = exp(μ + std_factor · √max(ε, s - μ²))
        gᵢ ← gᵢ · (1 if n < max_norm else exp(μ) / n)

    n is the joint norm; μ and s, the running means of the log-norm and of its square, start at 0
    and already contain this step. A gradient that is too large is shrunk to the running mean, not
    to the bound. Because μ starts at 0, early norms above 1 are clipped hard; with
    `decay=ol.schedules.WarmUpDecay(0.95)` the mean follows the first steps instead.

    Args:
      std_factor: how many standard deviations of the log-norm count as usual, at least 0.
      decay: β, in [0, 1).
      static_max_norm: if given, a fixed upper bound of the norm.
      epsilon: ε, above 0; the smallest norm and the smallest variance.
      report_summary: whether `optimize_loss` reports max_norm among its metrics.

    Example:
      >>> import jax.numpy as jnp, optimize_loss as ol
      >>> tx = ol.transforms.chain(clip=ol.transforms.ClipByAdaptiveNorm())
      >>> g = {"w": jnp.array([3.0, 4.0])}
      >>> updates, state = tx.update(g, tx.init(g))
      >>> print(state["clip"]["max_norm"].round(4), jnp.linalg.norm(updates["w"]).round(4))
      2.1859 1.0838

    References:
      `tf.contrib.layers.adaptive_clipping_fn` of TensorFlow 1.4 to 1.15, whose code this follows
      where its text differs.
    """

    std_factor: NotNegative = 2.0
    decay: Decay = 0.95
    static_max_norm: Positive | None = None
    epsilon: Positive = 1e-8
    report_summary: bool = False
    needs = "global_norm"
    elementwise = True

    def report(self, name: str, parts: Mapping[str, Any]) -> dict[str, Any]:
        """Return the bound, if `report_summary`."""
        tag = "global_norm/adaptive_max_gradient_norm"
        return {tag: parts["max_norm"]} if self.report_summary else {}

    def memory(self) -> dict[str, float]:
        """Return the running means, and the last bound for reports."""
        return {"mean": 0.0, "sq_mean": 0.0, "max_norm": 0.0}

    def scalars(
        self, numbers: Numbers, memory: Numbers, total: Any, step: jax.Array
    ) -> tuple[Numbers, Numbers]:
        """Update the running means and return the common scale."""
        _, weight = numbers["decay"]
        log_norm = jnp.log(total + numbers["epsilon"])
        mean = memory["mean"] + (log_norm - memory["mean"]) * weight
        sq_mean = memory["sq_mean"] + (log_norm * log_norm - memory["sq_mean"]) * weight
        # As a product, since a fused multiply-add in s - μ² would count its rounding as variance.
        root = sqrt(sq_mean)
        std = jnp.sqrt(jnp.maximum(numbers["epsilon"], (root - mean) * (root + mean)))
        max_norm = jnp.exp(mean + numbers["std_factor"] * std)
        usual = jnp.where(jnp.isnan(max_norm), max_norm, jnp.exp(mean))
        length = jnp.where(total < max_norm, total, usual)
        if "static_max_norm" in numbers:
            length = jnp.minimum(length, numbers["static_max_norm"])
        new = {"mean": mean, "sq_mean": sq_mean, "max_norm": max_norm}
        return {"scale": shrink(total, length)}, new

    def factor(self, k: Numbers) -> jax.Array:
        """Return the common scale."""
        return k["scale"]


class NamedParam(NamedTuple):
    """A parameter as a clipping function sees it."""

    name: str
    value: jax.Array


@dataclasses.dataclass(frozen=True)
class ClipByFunction:
    """Change the gradients with a function of `[(gradient, parameter), …]`.

    The parameters are pairs (name, value). The function sees the complete tree, so it splits the
    fused pass in two.

    Args:
      function: takes a list of pairs and returns a list of equal length, in the same order.

    Example:
      >>> import jax.numpy as jnp, optimize_loss as ol
      >>> halve = lambda pairs: [(g / 2, p) for g, p in pairs]
      >>> tx = ol.transforms.chain(clip=ol.transforms.ClipByFunction(halve))
      >>> g = {"w": jnp.array([4.0])}
      >>> print(tx.update(g, tx.init(g), g)[0]["w"])
      [2.]

    References:
      `clip_gradients=` of `tf.contrib.layers.optimize_loss`, where it is a callable.
    """

    function: Callable[[list[tuple[jax.Array, NamedParam]]], Any]

    def init(self, params: Any) -> dict[str, Any]:
        """Return the state, which is empty."""
        return {}

    def update(self, updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        """Return the gradients as the function changed them.

        Raises:
          InvalidType: the function returned no list of pairs.
          TreeMismatch: it returned another number of pairs, or gradients of other shapes.
        """
        parts = take_apart(updates if params is None else params)
        grads = parts.check_updates(updates)
        named = [NamedParam(n, p) for n, p in zip(parts.names, parts.leaves, strict=True)]
        check_takes("`clip_gradients` must take one list of pairs.", self.function, [])
        try:
            pairs = self.function(list(zip(grads, named, strict=True)))
        except Exception as error:
            error.add_note("This happened in the function given as `clip_gradients`.")
            raise
        _check_pairs(pairs, len(named))
        try:
            clipped = parts.check_updates(parts.unflatten([grad for grad, _ in pairs]))
        except (TreeMismatch, InvalidType) as error:
            raise type(error)(f"The function given as `clip_gradients`: {error}") from error
        return parts.unflatten(clipped), state


def _check_pairs(pairs: Any, count: int) -> None:
    """Raise unless a clipping function returned as many pairs as it was given."""
    if not isinstance(pairs, list | tuple) or any(
        not isinstance(pair, tuple | list) or len(pair) != 2 for pair in pairs
    ):
        raise InvalidType(
            "`clip_gradients` must return a list of pairs (gradient, parameter). "
            f"Received: {pairs!r}."
        )
    if len(pairs) != count:
        raise TreeMismatch(
            f"`clip_gradients` must return {count} pairs, as many as it was given. "
            f"Received: {len(pairs)}."
        )
