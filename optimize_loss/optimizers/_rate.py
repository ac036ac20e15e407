"""The learning rate of an optimizer, which is a variable or a schedule."""

from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from optimize_loss._checks import NOT_NEGATIVE, POSITIVE
from optimize_loss._engine.numbers import to_array
from optimize_loss.optimizers._variable import Variable, value_of

# What a learning rate may be when it is given; read back, it is a `Variable` or a schedule's value.
Rate = Annotated[Any, NOT_NEGATIVE]
PositiveRate = Annotated[Any, POSITIVE]


class LearningRate(property):
    """A property that a class does not show, so that dataclasses see no default."""

    def __get__(self, optimizer: Any, owner: Any = None) -> Any:
        if optimizer is None:
            raise AttributeError("learning_rate")
        return super().__get__(optimizer, owner)


SHORT_NAME = property(
    lambda optimizer: optimizer.learning_rate,
    lambda optimizer, value: setattr(optimizer, "learning_rate", value),
    doc="The `learning_rate`, as code for Keras 2 calls it.",
)


def is_schedule(rate: Any) -> bool:
    """Return whether a learning rate is a function of the step."""
    return callable(rate) and not isinstance(rate, Variable)


def as_variable(learning_rate: Any) -> Variable:
    """Return a new variable for a number."""
    value, dtype = value_of(learning_rate), jnp.result_type(float)
    value = NOT_NEGATIVE.check("learning_rate", value)
    if not isinstance(value, Tracer):
        with jax.ensure_compile_time_eval():
            value = to_array("learning_rate", value, NOT_NEGATIVE, dtype)
    return Variable(value, "learning_rate", dtype)


def for_links(rate: Any) -> Any:
    """Return the number in a variable; a schedule, or None, as it is."""
    if not isinstance(rate, Variable):
        return rate
    # The shortest number that rounds to what is kept: 0.001 and not 0.0010000000475.
    return rate.value if isinstance(rate.value, Tracer) else float(str(rate.numpy()[()]))
