"""Values of the variables that a rule keeps beside the parameters."""

import operator
from typing import Any

import jax
import jax.numpy as jnp

from optimize_loss._checks import InvalidType, TreeMismatch, received
from optimize_loss.optimizers._boxes import placed
from optimize_loss.optimizers._variable import Variable, as_dtype

INITIALIZERS = {"zeros": jnp.zeros, "ones": jnp.ones}


def initial(shape: Any, dtype: Any, initializer: Any) -> jax.Array:
    """Return the first value of a variable; arguments as of `Optimizer.add_variable`."""
    known = isinstance(initializer, str)
    make = INITIALIZERS.get(initializer.lower()) if known else initializer
    if not callable(make):
        raise ValueError(
            f"`initializer` must be one of {sorted(INITIALIZERS)} or a function of a shape and "
            f"a dtype. {received('initializer', initializer)}"
        )
    shape = _as_shape(shape)
    value = Variable(make(shape, as_dtype(dtype) or jnp.dtype(jnp.float32))).value
    if value.shape != shape:
        raise TreeMismatch(
            f"`initializer` must return an array of the shape {shape}. Received: {value.shape}."
        )
    return value


def initial_like(model_variable: Variable, shape: Any, initial_value: Any) -> jax.Array:
    """Return the first value; arguments as of `Optimizer.add_variable_from_reference`."""
    like = model_variable.value
    shape = None if shape is None else _as_shape(shape)
    if initial_value is None:
        initial_value = jnp.zeros_like(like, shape=shape)
    value = Variable(initial_value, dtype=like.dtype).value
    if shape is not None and value.shape != shape:
        raise TreeMismatch(f"`initial_value` must have the shape {shape}. Received: {value.shape}.")
    return placed(like, value) if value.shape == like.shape else value


def add(optimizer: Any, value: jax.Array, name: str) -> Variable:
    """Give an optimizer another variable, and return it."""
    if optimizer.built and not optimizer._held.building:
        raise ValueError(
            "Variables must be added in `build`, as the state is made of them then. "
            f"{received('name', name)}"
        )
    if name in (known := [v.name for v in optimizer._variables]):
        raise ValueError(
            f"`name` must differ from those of the optimizer's other variables, {known}. "
            f"{received('name', name)}"
        )
    optimizer._variables.append(Variable(value, name))
    return optimizer._variables[-1]


def _as_shape(shape: Any) -> tuple[int, ...]:
    try:
        lengths = tuple(operator.index(length) for length in shape)
    except TypeError as error:
        raise InvalidType(f"`shape` must be integers. {received('shape', shape)}") from error
    if any(length < 0 for length in lengths):
        raise ValueError(f"`shape` must be at least 0 everywhere. {received('shape', shape)}")
    return lengths
