"""What an optimizer keeps beside its options and its rule, and how it is built."""

import contextlib
import dataclasses
import functools
import operator
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import DTypeLike

from optimize_loss._checks import InvalidType, TreeMismatch, nearest, received
from optimize_loss._engine.chain import Chain
from optimize_loss._names import Pattern, check_patterns
from optimize_loss.optimizers._update_step import attributes_of, duplicate
from optimize_loss.optimizers._variable import (
    Variable,
    as_dtype,
    check_variables,
    different_names,
    placed,
)


@dataclasses.dataclass(eq=False)
class Held:
    """What an optimizer keeps; all its other attributes are options or part of the rule.

    Args:
      iterations: the number of updates made.
      rate: the learning rate, a `Variable` or a schedule; None for none.
      excluded: the variables and patterns that are not decayed.
      from_arrays: whether an option was an array, and no state has been made since.
      outers: the optimizers around this one.
      chains: the rates that the chains were made with, and the chains, if they are made.
      constructing: how many constructors are running; attributes may come until all are over.
      building: whether `build` is running.
      built: whether the variables that are trained are known.
      names: the variables that are trained, in order, with their names in the state.
      unbuilt: the attributes of the rule before `build`, with those assigned since; None until
        then.
      boxes: the state, if it has been made.
    """

    iterations: Variable = dataclasses.field(
        default_factory=lambda: Variable(jnp.int32(0), "iteration")
    )
    rate: Any = None
    excluded: tuple[Pattern | Variable, ...] = ()
    from_arrays: bool = False
    outers: tuple[Any, ...] = ()
    chains: tuple[list[jax.Array], tuple[Chain, Chain]] | None = None
    constructing: int = 0
    building: bool = False
    built: bool = False
    names: dict[Variable, str] = dataclasses.field(default_factory=dict)
    unbuilt: dict[str, Any] | None = None
    boxes: Any = None

    @property
    def is_closed(self) -> bool:
        """Whether no more attributes may come: neither a constructor nor `build` is running."""
        return not self.constructing and not self.building

    def note_array(self, value: Any) -> None:
        """Note that an option was given as an array, as `optax.inject_hyperparams` gives all."""
        self.from_arrays |= isinstance(value, jax.Array) and not isinstance(value, Tracer)

    def know(self, variables: list[Variable]) -> None:
        """Note the variables that are trained."""
        self.names = dict(zip(variables, different_names([v.name for v in variables]), strict=True))
        self.built = True

    def name_of(self, variable: Variable) -> str:
        """Return the name under which the state has a variable."""
        if variable not in self.names:
            advice = "Build it with all of them, or use one optimizer for each list. "
            near = f"Nearest: {nearest(variable.name, self.names.values())}."
            if self.built and not self.names:
                advice, near = "It was used with trees; use another one for variables.", ""
            raise ValueError(
                f"The variable {variable.name!r} is not one of those that the optimizer was built "
                f"with. {advice}{near}"
            )
        return self.names[variable]

    def values(self) -> dict[str, jax.Array]:
        """Return the values of the variables that are trained, by name."""
        return {name: variable.value for variable, name in self.names.items()}

    def exclude(self) -> tuple[Pattern, ...]:
        """Return the names or patterns of the parameters that are not decayed."""
        held = (self, *(outer._held for outer in self.outers))
        names = {v: name for each in held for v, name in each.names.items()}
        return tuple(names.get(x, x.name) if isinstance(x, Variable) else x for x in self.excluded)

    def not_of_the_rule(self) -> list[Variable]:
        """Return the variables that are no part of the rule's state."""
        others = (*self.excluded, self.rate)
        return [self.iterations, *self.names, *(x for x in others if isinstance(x, Variable))]


def excluded(var_list: Any, var_names: Any) -> tuple[Pattern | Variable, ...]:
    """Return what is not decayed; arguments as of `Optimizer.exclude_from_weight_decay`."""
    listed = check_variables([] if var_list is None else var_list)
    texts = check_patterns("var_names", () if var_names is None else var_names)
    try:
        searched = [re.compile(t.replace(":0", "")) if isinstance(t, str) else t for t in texts]
    except re.error as error:
        raise ValueError(
            "`var_names` must be regular expressions. " + received("var_names", texts)
        ) from error
    return (*listed, *searched)


@contextlib.contextmanager
def undone_if_it_fails(optimizer: Any) -> Iterator[None]:
    """Leave an optimizer that is not built as it is, if the block raises."""
    all_attributes = () if optimizer.built else (vars(optimizer), vars(optimizer._held))
    before = [duplicate(attributes, None) for attributes in all_attributes]
    try:
        yield
    except Exception:
        for attributes, old in zip(all_attributes, before, strict=True):
            attributes.clear()
            attributes.update(old)
        raise


def as_a_whole(build: Any) -> Any:
    """Return a `build` that runs once, and changes nothing if it fails.

    What the optimizer is before it is built is kept: `Recipe` begins with that.
    """

    @functools.wraps(build)
    def whole(self: Any, *args: Any, **options: Any) -> None:
        held = self._held
        if held.building:
            build(self, *args, **options)
            return
        if held.built:
            return
        with undone_if_it_fails(self):
            held.unbuilt = duplicate(attributes_of(self), {})
            held.building = True
            build(self, *args, **options)
            if not held.built:
                raise InvalidType(
                    f"`build` of {type(self).__name__} must call `super().build(var_list)`."
                )
            held.building = False
            if not held.constructing:
                self._hold()

    return whole


# Variables that `build` adds.

INITIALIZERS = {"zeros": jnp.zeros, "ones": jnp.ones}


def add_variable(
    optimizer: Any,
    shape: Sequence[int],
    dtype: DTypeLike | None,
    initializer: Any,
    name: str | None,
) -> Variable:
    """Return a new variable of an optimizer; arguments as of `Optimizer.add_variable`."""
    value = _initial(shape, dtype, initializer)
    if name is None:
        name = different_names([*(v.name for v in optimizer._variables), "variable"])[-1]
    return _add(optimizer, value, name)


def add_variable_like(
    optimizer: Any, model_variable: Any, variable_name: Any, shape: Any, initial_value: Any
) -> Variable:
    """Return a new variable; arguments as of `Optimizer.add_variable_from_reference`."""
    if not isinstance(model_variable, Variable):
        raise InvalidType(
            "`model_variable` must be a `Variable`, of those that `build` is given. "
            f"{received('model_variable', model_variable)}"
        )
    if not isinstance(variable_name, str):
        raise InvalidType(
            f"`variable_name` must be text. {received('variable_name', variable_name)}"
        )
    value = _initial_like(model_variable, shape, initial_value)
    name = optimizer._held.names.get(model_variable, model_variable.name)
    return _add(optimizer, value, f"{variable_name}/{name}")


def _initial(shape: Any, dtype: Any, initializer: Any) -> jax.Array:
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


def _initial_like(model_variable: Variable, shape: Any, initial_value: Any) -> jax.Array:
    """Return the first value; arguments as of `Optimizer.add_variable_from_reference`."""
    like = model_variable.value
    shape = None if shape is None else _as_shape(shape)
    if initial_value is None:
        initial_value = jnp.zeros_like(like, shape=shape)
    value = Variable(initial_value, dtype=like.dtype).value
    if shape is not None and value.shape != shape:
        raise TreeMismatch(f"`initial_value` must have the shape {shape}. Received: {value.shape}.")
    return placed(like, value) if value.shape == like.shape else value


def _add(optimizer: Any, value: jax.Array, name: str) -> Variable:
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
