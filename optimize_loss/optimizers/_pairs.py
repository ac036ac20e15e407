"""Pairs of a gradient and a variable, as Keras' methods take them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optimize_loss._checks import InvalidType, received
from optimize_loss._engine.trees import as_array, is_inexact
from optimize_loss._names import same_leaves
from optimize_loss._state.gradients import Trainable, derivatives
from optimize_loss.optimizers._held import undone_if_it_fails
from optimize_loss.optimizers._variable import (
    Variable,
    check_trace,
    check_variables,
    is_variable,
    value_of,
)


def paired(grads: Any, params: Any) -> list[tuple[Any, Variable]]:
    """Return pairs of a gradient and a variable, of two trees or two sequences."""
    if isinstance(params, list | tuple):
        grads, params = list(grads), list(params)
    values = jax.tree.map(value_of, params, is_leaf=is_variable)
    variables = jax.tree.leaves(params, is_leaf=is_variable)
    return list(zip(same_leaves("grads", grads, "params", values), variables, strict=True))


def gradient_of(gradient: Any, variable: Variable) -> Any:
    """Return a gradient as an array, or None."""
    value = value_of(gradient)
    return None if value is None else as_array("The gradient of", variable.name, value)


def constrained(variable: Variable, value: jax.Array) -> jax.Array:
    """Return a new value as the constraint of the variable makes it."""
    if variable.constraint is None:
        return value
    return Variable(value, variable.name).assign(variable.constraint(value)).value


def gradients_of(
    loss: Callable[[], Any], variables: list[Variable], scale: jax.Array | None
) -> list[tuple[jax.Array | None, Variable]]:
    """Return the gradients of a loss that reads variables, each with its variable.

    Args:
      loss: a function without arguments.
      variables: the variables; those of integers have no gradient.
      scale: what to multiply the loss by, if anything.
    """

    def loss_of(values: list[jax.Array]) -> tuple[jax.Array, None]:
        before = [v.value for v in variables]
        try:
            for v, value in zip(variables, values, strict=True):
                v._value = value
            return jnp.asarray(value_of(loss())), None
        finally:
            for v, value in zip(variables, before, strict=True):
                v._value = value

    values = [v.value for v in variables]
    trained = Trainable(values, tuple(map(is_inexact, values)))
    try:
        _, _, found = derivatives(loss_of, trained, scale)
    except jax.errors.UnexpectedTracerError as error:
        raise InvalidType(
            "`loss` must not call a function under `jax.jit` that reads variables from outside: it "
            "sees the values of its first call only. Pass it `v.value`, or leave jit out. "
            f"{received('loss', loss)}"
        ) from error
    grads = iter(found)
    return [(next(grads) if t else None, v) for t, v in zip(trained.marks, variables, strict=True)]


def apply_in_place(optimizer: Any, pairs: list[tuple[Any, Any]], aggregates: bool) -> None:
    """Update variables by their gradients, or change nothing if that fails.

    Args:
      optimizer: the optimizer.
      pairs: each a gradient and a variable.
      aggregates: whether to sum the gradients over devices first.
    """
    held = optimizer._held
    with undone_if_it_fails(optimizer):
        optimizer.build(check_variables([v for _, v in pairs]))
        summed = optimizer.aggregate_gradients(pairs) if aggregates else pairs
        grads = {held.name_of(v): gradient_of(g, v) for g, v in summed}
        params = held.values()
        check_trace(optimizer, [*grads.values(), *params.values()])
        new, state = optimizer._hold().after(grads, params, optimizer.jit_compile)
        moved = {v: n for v, n in held.names.items() if grads.get(n) is not None}
        values = [constrained(v, new[name]) for v, name in moved.items()]
    optimizer._hold().keep(state)
    for v, value in zip(moved, values, strict=True):
        v.assign(value)


def check_pairs(grads_and_vars: Any) -> list[tuple[Any, Any]]:
    """Return a list of pairs of a gradient and a variable or an array."""
    try:
        pairs = list(grads_and_vars)
        firsts, seconds = [g for g, _ in pairs], [v for _, v in pairs]
    except (TypeError, ValueError) as error:
        raise InvalidType(
            "`grads_and_vars` must be pairs of a gradient and a variable, as in "
            f"`zip(grads, variables)`. {received('grads_and_vars', grads_and_vars)}"
        ) from error
    _check_order(firsts, seconds)
    return pairs


def _check_order(grads: list[Any], variables: list[Any]) -> None:
    """Raise if gradients and variables are exchanged, or if the variables are of Keras."""
    if any(map(is_variable, grads)) and not any(map(is_variable, variables)):
        raise InvalidType(
            "`grads_and_vars` must be pairs (gradient, variable), and not the other way round. "
            f"{received('grads_and_vars', list(zip(grads, variables, strict=True)))}"
        )
    if strange := [v for v in variables if type(v).__module__.startswith("keras.")]:
        raise InvalidType(
            "`grads_and_vars` must have variables of `optimize_loss.Variable`. A Keras model is "
            "trained with `optimize_loss.keras.KerasOptimizer`. "
            f"Received: {strange[0]!r}."
        )
