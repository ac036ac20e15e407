"""What a schedule gives at a step, and what can be wrong with it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optimize_loss._checks import FINITE, InvalidType, Rule, check_takes
from optimize_loss.schedules._arguments import as_plain, as_rate, check_callable, is_real
from optimize_loss.schedules._config import LearningRateSchedule


@dataclasses.dataclass(frozen=True)
class Decayed(LearningRateSchedule):
    """A base rate and a contrib-style function of it: function(learning_rate, step) → rate.

    Args:
      learning_rate: the base rate; at least 0. Whoever keeps a current value of it gives that to
        `evaluate` as `base`.
      function: takes the base rate, a float scalar, and the step.

    Raises:
      InvalidType: `learning_rate` is not a number, or `function` not callable.
      ValueError: `learning_rate` is below 0 or not finite.

    Example:
      >>> from optimize_loss.schedules import exponential_decay
      >>> halved = Decayed(8.0, lambda rate, step: exponential_decay(rate, step, 1, 0.5))
      >>> halved(2)
      Array(2., dtype=float32)

    References:
      `learning_rate_decay_fn` of tf.contrib.layers.optimize_loss.
    """

    learning_rate: float
    function: Callable[[Any, Any], Any]

    def __post_init__(self):
        learning_rate = as_plain("learning_rate", self.learning_rate)
        object.__setattr__(self, "learning_rate", learning_rate)
        check_callable("function", self.function)

    def __call__(self, step: Any) -> Any:
        """Return the rate at `step`."""
        return self.function(as_rate("learning_rate", self.learning_rate), step)


def evaluate(
    name: str, schedule: Any, step: Any, dtype: Any, base: Any = None, rule: Rule = FINITE
) -> jax.Array:
    """Return `schedule(step)` as an array of `dtype` without dimensions, or say what is wrong.

    Args:
      name: the argument that the schedule drives, for messages.
      schedule: a function of the step: one of this file, of optax, or any other.
      step: the step, a number or a traced scalar.
      dtype: of the result.
      base: the current base rate, where `schedule` is `Decayed`; its own unless given.
      rule: what the value must satisfy. Where it is traced, a value that does not is NaN instead.

    Raises:
      InvalidType: the schedule is not callable with these arguments, does not return a real
        number, or needs the value of a traced step.
      ValueError: the schedule returns an array with dimensions, or a number that breaks the rule.

    Example:
      >>> evaluate("learning_rate", lambda step: 0.5 * step, 3, "float32")
      Array(1.5, dtype=float32)
      >>> evaluate("learning_rate", lambda step: None, 3, "float32")  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      optimize_loss._checks.InvalidType: The schedule of `learning_rate` must return a number. \
Received: None from <function <lambda> at 0x...>.
    """
    function, arguments = schedule, (step,)
    if isinstance(schedule, Decayed):
        base = as_rate("learning_rate", schedule.learning_rate) if base is None else base
        function, arguments = schedule.function, (base, step)
    check_callable(name, function)
    wanted = "(step)" if len(arguments) == 1 else "(learning_rate, step)"
    check_takes(f"The schedule of `{name}` must take {wanted}.", function, *arguments)
    try:
        value = function(*arguments)
    except (
        jax.errors.ConcretizationTypeError,
        jax.errors.TracerArrayConversionError,
        jax.errors.TracerIntegerConversionError,
    ) as error:
        raise InvalidType(
            f"The schedule of `{name}` must work on a traced step, whose value is not known yet: "
            "use jnp.where or lax.cond in place of `if`, and jax.numpy in place of math and numpy. "
            f"Received: {schedule!r}."
        ) from error
    _check_value(name, value, rule, repr(schedule))
    value = jnp.asarray(value, dtype)
    return jnp.where(rule.holds(value) & jnp.isfinite(value), value, jnp.nan)


def _check_value(name: str, value: Any, rule: Rule, shown: str) -> None:
    """Raise unless what a schedule returned is a real number that the rule allows, if known."""
    if not is_real(value):
        raise InvalidType(
            f"The schedule of `{name}` must return a number. Received: {value!r} from {shown}."
        )
    if np.shape(value):
        raise ValueError(
            f"The schedule of `{name}` must return a scalar. "
            f"Received: shape {np.shape(value)} from {shown}."
        )
    if not isinstance(value, Tracer) and not (rule.holds(value) and np.isfinite(value)):
        raise ValueError(
            f"The schedule of `{name}` must be {rule.words}. Received: {value} from {shown}."
        )
