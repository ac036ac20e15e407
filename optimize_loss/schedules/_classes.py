"""Schedules as values: Keras' classes, and those that users write again most often."""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from optimize_loss import _checks
from optimize_loss._checks import check_number, received
from optimize_loss.schedules._arguments import (
    as_plain,
    as_scalar,
    check_callable,
    check_increasing,
    check_one_more,
    unboxed,
)
from optimize_loss.schedules._config import LearningRateSchedule
from optimize_loss.schedules._evaluate import evaluate
from optimize_loss.schedules._functions import (
    along_cosine,
    cosine_decay,
    cosine_decay_restarts,
    exponential_decay,
    inverse_time_decay,
    piecewise_constant,
    polynomial_decay,
)


@dataclasses.dataclass(frozen=True)
class _Checked(LearningRateSchedule):
    """A value whose fields are checked, and kept as plain Python objects, when it is built."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = as_plain(field.name, getattr(self, field.name))
            object.__setattr__(self, field.name, value)


@dataclasses.dataclass(frozen=True)
class _Function(_Checked):
    """One of TensorFlow 1's functions, whose arguments, in its order, are the first fields."""

    function: ClassVar[Callable[..., jax.Array]]

    def __call__(self, step: Any) -> jax.Array:
        """Return the rate at `step`."""
        count = len(inspect.signature(self.function).parameters) - 1  # a subclass may have more
        fields = dataclasses.fields(self)[:count]
        rate, *options = (getattr(self, field.name) for field in fields)
        return self.function(rate, step, *options)


@dataclasses.dataclass(frozen=True)
class ExponentialDecay(_Function):
    """Multiply the rate by `decay_rate` once every `decay_steps` steps: `exponential_decay`.

    Args:
      initial_learning_rate: the rate at step 0; at least 0.
      decay_steps: steps; a whole number of at least 1.
      decay_rate: a factor; at least 0.
      staircase: keep the rate for `decay_steps` steps, then change it at once.
      name: a label, as in Keras.

    Raises:
      InvalidType: an argument is of the wrong kind.
      ValueError: an argument is outside its range.

    Example:
      >>> ExponentialDecay(8.0, decay_steps=1, decay_rate=0.5)(2)
      Array(2., dtype=float32)

    References:
      Matches Keras 2.15; a staircase is exact at every multiple of `decay_steps`.
    """

    initial_learning_rate: float
    decay_steps: float
    decay_rate: float
    staircase: bool = False
    name: str | None = None

    function = staticmethod(exponential_decay)


@dataclasses.dataclass(frozen=True)
class InverseTimeDecay(_Function):
    """Divide the rate by a number that grows linearly with the step: `inverse_time_decay`.

    Args:
      initial_learning_rate: the rate at step 0; at least 0.
      decay_steps: steps; a whole number of at least 1.
      decay_rate: per `decay_steps` steps; at least 0.
      staircase: keep the rate for `decay_steps` steps, then change it at once.
      name: a label, as in Keras.

    Raises:
      InvalidType: an argument is of the wrong kind.
      ValueError: an argument is outside its range.

    Example:
      >>> InverseTimeDecay(8.0, decay_steps=1, decay_rate=1.0)(3)
      Array(2., dtype=float32)

    References:
      Matches Keras 2.15; a staircase is exact at every multiple of `decay_steps`.
    """

    initial_learning_rate: float
    decay_steps: float
    decay_rate: float
    staircase: bool = False
    name: str | None = None

    function = staticmethod(inverse_time_decay)


@dataclasses.dataclass(frozen=True)
class PiecewiseConstantDecay(LearningRateSchedule):
    """Return the value of the interval that the step lies in: `piecewise_constant`.

    Args:
      boundaries: steps, strictly increasing. A boundary itself still has the earlier value.
      values: numbers, one more than `boundaries`.
      name: a label, as in Keras.

    Raises:
      InvalidType: an argument is of the wrong kind.
      ValueError: `boundaries` do not increase, or `values` are not one more.

    Example:
      >>> schedule = PiecewiseConstantDecay([5, 10], [4.0, 2.0, 1.0])
      >>> [float(schedule(step)) for step in (0, 5, 6, 11)]
      [4.0, 4.0, 2.0, 1.0]

    References:
      Matches Keras 2.15; boundaries that do not increase raise.
    """

    boundaries: Sequence[float]
    values: Sequence[float]
    name: str | None = None

    def __post_init__(self):
        boundaries = check_increasing(self.boundaries)
        values = check_one_more("values", self.values, boundaries)
        values = tuple(check_number(f"values[{i}]", unboxed(x)) for i, x in enumerate(values))
        object.__setattr__(self, "boundaries", boundaries)
        object.__setattr__(self, "values", values)
        as_plain("name", self.name)

    def __call__(self, step: Any) -> jax.Array:
        """Return the value at `step`."""
        return piecewise_constant(step, self.boundaries, self.values)


@dataclasses.dataclass(frozen=True)
class PolynomialDecay(_Function):
    """Lower the rate along a power of the steps that remain: `polynomial_decay`.

    Args:
      initial_learning_rate: the rate at step 0; at least 0.
      decay_steps: steps; a whole number of at least 1.
      end_learning_rate: the rate from `decay_steps` on; at least 0.
      power: at least 0; 1 is a straight line.
      cycle: start again, lower, after each multiple of `decay_steps`.
      name: a label, as in Keras.

    Raises:
      InvalidType: an argument is of the wrong kind.
      ValueError: an argument is outside its range.

    Example:
      >>> PolynomialDecay(4.0, decay_steps=10, end_learning_rate=2.0)(5)
      Array(3., dtype=float32)

    References:
      Matches Keras 2.15; at the end of a cycle the rate is exactly `end_learning_rate`.
    """

    initial_learning_rate: float
    decay_steps: float
    end_learning_rate: float = 0.0001
    power: float = 1.0
    cycle: bool = False
    name: str | None = None

    function = staticmethod(polynomial_decay)


@dataclasses.dataclass(frozen=True)
class CosineDecay(_Checked):
    """Lower the rate along half a cosine wave, after a linear warmup if one is asked for.

    The warmup leads from `initial_learning_rate` to `warmup_target` within `warmup_steps`; the
    `cosine_decay` from there to `alpha` · `warmup_target` takes another `decay_steps`.

    Args:
      initial_learning_rate: the rate at step 0; at least 0.
      decay_steps: steps, after the warmup; a whole number of at least 1.
      alpha: the final rate as a fraction of the one that the decay starts from; at least 0.
      name: a label, as in Keras.
      warmup_target: the rate that the warmup leads to; at least 0. None: no warmup.
      warmup_steps: steps; a whole number of at least 0; needs `warmup_target`.

    Raises:
      InvalidType: an argument is of the wrong kind.
      ValueError: an argument is outside its range, or `warmup_steps` has no `warmup_target`.

    Example:
      >>> schedule = CosineDecay(0.0, decay_steps=10, warmup_target=4.0, warmup_steps=4)
      >>> [float(schedule(step)) for step in (0, 1, 4, 14)]
      [0.0, 1.0, 4.0, 0.0]

    References:
      Matches Keras 2.15, which ignores `warmup_steps` without `warmup_target`.
    """

    initial_learning_rate: float
    decay_steps: float
    alpha: float = 0.0
    name: str | None = None
    warmup_target: float | None = None
    warmup_steps: float = 0

    def __post_init__(self):
        super().__post_init__()
        if self.warmup_target is None and self.warmup_steps:
            raise ValueError(
                "`warmup_steps` must be 0 where there is no `warmup_target`. "
                f"{received('warmup_steps', self.warmup_steps)}"
            )

    def __call__(self, step: Any) -> jax.Array:
        """Return the rate at `step`."""
        start, target = self.initial_learning_rate, self.warmup_target
        if target is None:
            return cosine_decay(start, step, self.decay_steps, self.alpha)
        decayed = cosine_decay(
            target, _since(step, self.warmup_steps), self.decay_steps, self.alpha
        )
        return _warmed_up(step, self.warmup_steps, start, target, decayed)


@dataclasses.dataclass(frozen=True)
class CosineDecayRestarts(_Function):
    """Run cosine decays, each `t_mul` times longer and `m_mul` times as high.

    Args:
      initial_learning_rate: the rate at step 0; at least 0.
      first_decay_steps: the length of the first decay in steps; a whole number of at least 1.
      t_mul: the factor from one length to the next; at least 1.
      m_mul: the factor from one height to the next; at least 0.
      alpha: the lowest rate as a fraction of the first; at least 0.
      name: a label, as in Keras.

    Raises:
      InvalidType: an argument is of the wrong kind.
      ValueError: an argument is outside its range.

    Example:
      Decays begin at steps 0, 4 and 12.

      >>> schedule = CosineDecayRestarts(4.0, first_decay_steps=4, m_mul=0.5)
      >>> [float(schedule(step)) for step in (0, 4, 12)]
      [4.0, 2.0, 1.0]

    References:
      Matches Keras 2.15; see `cosine_decay_restarts`. It differs for t_mul below 1, which raises.
    """

    initial_learning_rate: float
    first_decay_steps: float
    t_mul: float = 2.0
    m_mul: float = 1.0
    alpha: float = 0.0
    name: str | None = None

    function = staticmethod(cosine_decay_restarts)


@dataclasses.dataclass(frozen=True)
class WarmupStableDecay(_Checked):
    """Raise the rate linearly, hold it, then lower it to a final value (WSD, a trapezoid).

    Linear from `initial_learning_rate` to `peak_learning_rate` in `warmup_steps`; constant for
    `stable_steps`; then `polynomial_decay` to `end_learning_rate` in `decay_steps`.

    Args:
      peak_learning_rate: the rate that is held; at least 0.
      warmup_steps: steps; a whole number of at least 0.
      stable_steps: steps; a whole number of at least 0.
      decay_steps: steps; a whole number of at least 1.
      initial_learning_rate: the rate at step 0 of a warmup; at least 0.
      end_learning_rate: the rate after all phases; at least 0.
      power: of the decay; at least 0; 1 is a straight line.

    Raises:
      InvalidType: an argument is of the wrong kind.
      ValueError: an argument is outside its range.

    Example:
      >>> schedule = WarmupStableDecay(4.0, warmup_steps=4, stable_steps=10, decay_steps=2)
      >>> [float(schedule(step)) for step in (0, 1, 4, 14, 15, 16, 99)]
      [0.0, 1.0, 4.0, 4.0, 2.0, 0.0, 0.0]

    References:
      S. Hu et al., "MiniCPM: Unveiling the potential of small language models with scalable
      training strategies", 2024, https://arxiv.org/abs/2404.06395, section 4; the decay there is
      exponential. The linear one: A. Hägele et al., "Scaling laws and compute-optimal training
      beyond fixed training durations", 2024, https://arxiv.org/abs/2405.18392.
    """

    peak_learning_rate: float
    warmup_steps: float
    stable_steps: float
    decay_steps: float
    initial_learning_rate: float = 0.0
    end_learning_rate: float = 0.0
    power: float = 1.0

    def __call__(self, step: Any) -> jax.Array:
        """Return the rate at `step`."""
        peak, decaying = (
            self.peak_learning_rate,
            _since(step, self.warmup_steps + self.stable_steps),
        )
        decayed = polynomial_decay(
            peak, decaying, self.decay_steps, self.end_learning_rate, self.power
        )
        return _warmed_up(step, self.warmup_steps, self.initial_learning_rate, peak, decayed)


@dataclasses.dataclass(frozen=True)
class InverseSquareRootDecay(_Checked):
    """Raise the rate linearly, then lower it with the square root of the step.

    ηₙ = η · √(w / max(n, w)), after a warmup from `initial_learning_rate` to η in w steps; without
    a warmup, w = 1.

    Args:
      peak_learning_rate: η, the rate at the end of the warmup; at least 0.
      warmup_steps: w, steps; a whole number of at least 0. At step 4w the rate is half the highest.
      initial_learning_rate: the rate at step 0; at least 0.

    Raises:
      InvalidType: an argument is of the wrong kind.
      ValueError: an argument is outside its range.

    Example:
      >>> schedule = InverseSquareRootDecay(4.0, warmup_steps=4)
      >>> [float(schedule(step)) for step in (0, 1, 4, 16, 64)]
      [0.0, 1.0, 4.0, 2.0, 1.0]

    References:
      A. Vaswani et al., "Attention is all you need", 2017, https://arxiv.org/abs/1706.03762,
      equation 3, with η = 1/√(d_model · w) and its step counted from 0.
    """

    peak_learning_rate: float
    warmup_steps: float
    initial_learning_rate: float = 0.0

    def __call__(self, step: Any) -> jax.Array:
        """Return the rate at `step`."""
        peak, warmup = self.peak_learning_rate, max(self.warmup_steps, 1.0)
        decayed = peak * jnp.sqrt(warmup / (warmup + _since(step, warmup)))
        return _warmed_up(step, self.warmup_steps, self.initial_learning_rate, peak, decayed)


@dataclasses.dataclass(frozen=True)
class OneCycle(_Checked):
    """Raise the rate to a peak along half a cosine wave, then lower it far below its start.

    From peak/div_factor to peak within pct_start · total_steps, then to
    peak/(div_factor · final_div_factor) at total_steps; both are `cosine_decay`.

    Args:
      peak_learning_rate: the highest rate; at least 0.
      total_steps: steps; a whole number of at least 1.
      pct_start: the fraction of the steps in which the rate rises; in [0, 1).
      div_factor: peak over first rate; above 0.
      final_div_factor: first over final rate; above 0.

    Raises:
      InvalidType: an argument is of the wrong kind.
      ValueError: an argument is outside its range.

    Example:
      >>> schedule = OneCycle(8.0, total_steps=10, pct_start=0.4, div_factor=4, final_div_factor=2)
      >>> [float(schedule(step)) for step in (0, 2, 4, 7, 10, 99)]
      [2.0, 5.0, 8.0, 4.5, 1.0, 1.0]

    References:
      L. N. Smith and N. Topin, "Super-convergence: Very fast training of neural networks using
      large learning rates", 2018, https://arxiv.org/abs/1708.07120. Matches
      optax.cosine_onecycle_schedule if pct_start · total_steps is an integer (optax rounds it
      down); torch's OneCycleLR ends one step earlier.
    """

    peak_learning_rate: float
    total_steps: float
    pct_start: float = 0.3
    div_factor: float = 25.0
    final_div_factor: float = 1e4

    def __call__(self, step: Any) -> jax.Array:
        """Return the rate at `step`."""
        peak, rising = self.peak_learning_rate, self.pct_start * self.total_steps
        alpha = 1 / (self.div_factor * self.final_div_factor)
        falling = along_cosine(peak, _since(step, rising), self.total_steps - rising, alpha)
        if not rising:
            return falling
        step = as_scalar("step", step, jnp.float32)
        raised = along_cosine(peak / self.div_factor, step, rising, self.div_factor)
        return jnp.where(step < rising, raised, falling)


@dataclasses.dataclass(frozen=True)
class Join(LearningRateSchedule):
    """Follow one schedule after the other, each counting its steps from 0.

    Args:
      schedules: functions of the step that give a number; at least one.
      boundaries: the steps at which the next schedule begins: integers of at least 1, strictly
        increasing, one fewer than `schedules`.

    Raises:
      InvalidType: an argument is of the wrong kind.
      ValueError: the numbers of schedules and boundaries do not fit, or boundaries do not increase.

    Example:
      >>> warmup = PolynomialDecay(0.0, decay_steps=4, end_learning_rate=4.0)
      >>> schedule = Join([warmup, ExponentialDecay(4.0, decay_steps=1, decay_rate=0.5)], [4])
      >>> [float(schedule(step)) for step in (0, 1, 4, 5, 6)]
      [0.0, 1.0, 4.0, 2.0, 1.0]

    References:
      Matches optax.join_schedules, except that a schedule is never called with a negative step.
      The step at a boundary belongs to the later schedule, unlike in `piecewise_constant`.
    """

    schedules: Sequence[Callable[[Any], Any]]
    boundaries: Sequence[int]

    def __post_init__(self):
        boundaries = check_increasing(self.boundaries, _checks.check_integer, _checks.COUNT)
        schedules = check_one_more("schedules", self.schedules, boundaries)
        for i, schedule in enumerate(schedules):
            check_callable(f"schedules[{i}]", schedule)
        object.__setattr__(self, "schedules", schedules)
        object.__setattr__(self, "boundaries", boundaries)

    def __call__(self, step: Any) -> jax.Array:
        """Return the value at `step`."""
        step = as_scalar("step", step)
        value = evaluate("schedules[0]", self.schedules[0], step, jnp.float32)
        for i, boundary in enumerate(self.boundaries, start=1):
            since = jnp.maximum(step - boundary, 0)
            later = evaluate(f"schedules[{i}]", self.schedules[i], since, jnp.float32)
            value = jnp.where(step < boundary, value, later)
        return value


@dataclasses.dataclass(frozen=True)
class WarmUpDecay(_Checked):
    """Let a decay rate grow from 0 to `decay`, so that an average forgets its start.

    βₙ = min(β, n/(n + 1)): as long as n/(n + 1) is smaller, the average weighs all steps alike.

    Args:
      decay: β, the decay rate of a moving average; in [0, 1).

    Raises:
      InvalidType: `decay` is not a number.
      ValueError: `decay` is outside [0, 1).

    Example:
      >>> [float(WarmUpDecay(0.75)(step)) for step in (0, 1, 3, 4)]
      [0.0, 0.5, 0.75, 0.75]

    References:
      Matches tf.contrib.layers.adaptive_clipping_fn with a `global_step`, as it computes; its
      documentation has β·n/(n + 1).
    """

    decay: float

    def __call__(self, step: Any) -> jax.Array:
        """Return the decay rate at `step`."""
        n = as_scalar("step", step, jnp.float32)
        return jnp.minimum(n / (n + 1), self.decay)


def _since(step: Any, start: float) -> jax.Array:
    return jnp.maximum(as_scalar("step", step, jnp.float32) - start, 0.0)


def _warmed_up(
    step: Any, steps: float, start: float, target: float, decayed: jax.Array
) -> jax.Array:
    """Return `decayed`, or before `steps` the line from `start` to `target`."""
    if not steps:
        return decayed
    step = as_scalar("step", step, jnp.float32)
    line = (target - start) * (step / steps) + start
    return jnp.where(step < steps, line, decayed)
