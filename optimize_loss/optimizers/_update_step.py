"""A rule written as `build` and `update_step`, as a link."""

import copy
import dataclasses
import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optimize_loss._engine.link import NotNegative, TreeLink
from optimize_loss.optimizers._variable import (
    Variable,
    different_names,
    made_meanwhile,
)
from optimize_loss.schedules import evaluate


def attributes_of(optimizer: Any) -> dict[str, Any]:
    """Return the attributes that are part of the rule: all but what the optimizer keeps."""
    return {name: value for name, value in vars(optimizer).items() if name != "_held"}


@dataclasses.dataclass(frozen=True)
class Bound:
    """Stands for a method of the optimizer itself in one of its attributes."""

    function: Callable[..., Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Recipe:
    """An optimizer as it is before it is built; a value, equal to one with equal attributes.

    Args:
      cls: its class, which defines `build` and `update_step`.
      attributes: what its `__init__` has set, and what was set since; not to be changed.
    """

    cls: type
    attributes: Mapping[str, Any]

    @functools.cached_property
    def key(self) -> Any:
        """What two equal recipes share; it can be hashed."""
        return self.cls, as_key(self.attributes)

    @classmethod
    def of(cls, optimizer: Any, attributes: Mapping[str, Any]) -> "Recipe":
        """Return the recipe for an optimizer of this class with copies of these attributes."""

        def free(value: Any) -> Any:
            is_own = isinstance(value, types.MethodType) and value.__self__ is optimizer
            return Bound(value.__func__) if is_own else value

        kept = {name: free(x) for name, x in attributes.items()}
        return cls(type(optimizer), duplicate(kept, {}))

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Recipe) and self.key == other.key)

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:
        options = {n: x for n, x in self.attributes.items() if x is not None}
        return f"{self.cls.__name__}({', '.join(f'{n}={x!r}' for n, x in options.items())})"

    def worker(self, step: jax.Array, rate: Any) -> Any:
        """Return a fresh optimizer that is at this step and has this rate, if any."""
        cls: Any = self.cls
        made = cls.__new__(cls)
        for name, value in duplicate(self.attributes, {}).items():
            is_bound = isinstance(value, Bound)
            made.__dict__[name] = types.MethodType(value.function, made) if is_bound else value
        held = made._held
        held.constructing = 1  # for good: it holds no state, and takes new attributes
        held.iterations = Variable(step, "iteration")
        held.rate = None if rate is None else Variable(rate, "learning_rate")
        return made


@dataclasses.dataclass(frozen=True)
class UpdateStep(TreeLink):
    """Run the `update_step` of an optimizer for every parameter, as a pure function.

    For every trace, a fresh optimizer is built on boxes around the parameters; its variables are
    given the state, and what the boxes contain afterwards is the new state. The optimizer that the
    user holds is not touched.

    Args:
      recipe: the optimizer before it is built.
      learning_rate: its rate; None if it has none.
    """

    recipe: Recipe
    learning_rate: NotNegative | None

    def init(self, params):
        """Return the values of the variables that `build` makes, by name."""
        step, rate = jnp.int32(0), self.learning_rate
        if callable(rate):
            rate = evaluate("learning_rate", rate, step, jnp.result_type(float))
        worker, _, _ = self._built(params, step, rate)
        return {name: box.value for name, box in tracked(worker).items()}

    def scalars(self, numbers, memory, total, step):
        """Return the rate and the step."""
        return {**numbers, "step": step}, memory

    def run(self, updates, slots, params, k):
        """Return what the boxes gained, and the new values of the variables."""
        worker, boxes, others = self._built(params, k["step"], k.get("learning_rate"))
        variables = tracked(worker)
        for name, box in variables.items():
            box.assign(slots[name])
        others += [boxes[name] for name in boxes if name not in updates]
        before = _attributes(worker), [box.value for box in others]
        for name, update in updates.items():
            _call_update_step(worker, update, boxes[name])
        self._check_nothing_is_lost(worker, variables, others, *before)
        new = {name: boxes[name].value - params[name] for name in updates}
        return new, {name: box.value for name, box in variables.items()}

    def _built(
        self, params: Mapping[str, jax.Array], step: jax.Array, rate: Any
    ) -> tuple[Any, dict[str, Variable], list[Variable]]:
        """Return an optimizer, the boxes that it was built with, and those that it does not keep.

        The last are its counter, its rate, and what `build` made and did not put in an attribute.
        """
        boxes = {name: Variable(p, name) for name, p in params.items()}
        with made_meanwhile() as made:
            worker = self.recipe.worker(step, rate)
            worker.build(list(boxes.values()))
        kept = {id(box) for box in tracked(worker).values()}
        return worker, boxes, [box for box in made if id(box) not in kept]

    def _check_nothing_is_lost(
        self, worker: Any, variables: Any, others: Any, attributes: Any, values: Any
    ) -> None:
        """Raise if `update_step` has changed what is not kept until the next step."""
        name = f"`update_step` of {self.recipe.cls.__name__}"
        for box, value in zip(others, values, strict=True):
            if box.value is not value:
                raise ValueError(
                    f"{name} must assign only to the variable that it is given and to variables "
                    "that `build` makes and keeps in attributes, lists and dicts of the optimizer. "
                    f"Received: a new value for {box.name!r}."
                )
        if more := tracked(worker).keys() - variables.keys():
            raise ValueError(
                f"{name} must make no variables: make them in `build`. Received: {sorted(more)}."
            )
        now = _attributes(worker)
        if changed := [n for n, value in attributes.items() if now.get(n) != value]:
            raise ValueError(
                f"{name} must not change attributes: compiled, it runs only once for many steps. "
                "Keep what changes in a `Variable`, made in `build`. "
                f"Received: a new value of `{changed[0]}`."
            )


def _call_update_step(worker: Any, gradient: jax.Array, variable: Variable) -> None:
    """Call `update_step`, also where it takes the rate, as in Keras 3."""
    third = list(inspect.signature(worker.update_step).parameters.values())[2:3]
    wants_rate = any(p.name == "learning_rate" or p.default is p.empty for p in third)
    positional = all(p.kind is p.POSITIONAL_OR_KEYWORD for p in third)
    rate = (worker.learning_rate,) if wants_rate and positional else ()
    worker.update_step(gradient, variable, *rate)


def tracked(optimizer: Any) -> dict[str, Variable]:
    """Return the variables of a built optimizer: those added, and those it merely has.

    A variable that is only an attribute is kept under the attribute's name: nothing that an
    `update_step` assigns to is lost between steps.
    """
    held, found = optimizer._held, {box.name: box for box in optimizer._variables}
    known = {id(box) for box in (*found.values(), *held.not_of_the_rule())}
    names = {v._unique_id: name for v, name in held.names.items()}
    for attribute, value in attributes_of(optimizer).items():
        for name, box in _boxes(attribute, value, names):
            if id(box) not in known:
                known.add(id(box))
                found[different_names([*found, name])[-1]] = box
    return found


def _boxes(name: str, value: Any, names: Mapping[str, str]) -> Iterator[tuple[str, Variable]]:
    """Return the variables in an attribute and in the lists and dicts there, by name.

    What stands under a variable of the model, or under its key, is named after that variable.
    """
    if isinstance(value, Variable):
        yield name, value
    elif isinstance(value, list | tuple | dict):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inside in items:
            key = key._unique_id if isinstance(key, Variable) else str(key)
            yield from _boxes(f"{name}/{names.get(key, key)}", inside, names)


def has_variables(value: Any) -> bool:
    """Return whether an attribute is a variable, or a list or dict with one in it."""
    return any(_boxes("", value, {}))


def duplicate(value: Any, boxes: dict[int, Variable] | None) -> Any:
    """Return a copy of lists, dicts and sets, with copies of the variables in them.

    Args:
      value: the value of an attribute, or all attributes.
      boxes: the copies so far, so that one variable stays one; None leaves the variables.
    """

    def copied(x: Any) -> Any:
        if boxes is None or not isinstance(x, Variable):
            return x
        if id(x) not in boxes:
            options = {"trainable": x.trainable, "constraint": x.constraint}
            boxes[id(x)] = Variable(x.value, x.name, **options)
        return boxes[id(x)]

    return _rebuilt(value, copied)


def _rebuilt(value: Any, of: Callable[[Any], Any]) -> Any:
    """Return a copy of lists, dicts and sets, with `of` everything that is in lists and dicts."""
    if isinstance(value, dict):
        new = copy.copy(value)
        new.update({key: _rebuilt(inside, of) for key, inside in value.items()})
        return new
    if isinstance(value, list):
        new = copy.copy(value)
        new[:] = [_rebuilt(inside, of) for inside in value]
        return new
    if type(value) is tuple:
        return tuple(_rebuilt(inside, of) for inside in value)
    return copy.copy(value) if isinstance(value, set) else of(value)


class _Itself:
    """Stands for something that equals only itself."""

    def __init__(self, thing: Any):
        self.thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self.thing is other.thing

    def __hash__(self) -> int:
        return id(self.thing)


def as_key(value: Any, by_value: bool = True) -> Any:
    """Return what can be hashed, and is equal for equal attributes.

    Args:
      value: the value of an attribute.
      by_value: whether variables are equal that have equal values; if not, each only to itself.
    """
    if isinstance(value, Mapping):
        return type(value), *((key, as_key(x, by_value)) for key, x in value.items())
    if isinstance(value, list | tuple):
        return type(value), *(as_key(x, by_value) for x in value)
    if isinstance(value, set):
        return set, frozenset(value)
    if isinstance(value, Variable):
        return (Variable, value.name, _leaf_key(value.value)) if by_value else _Itself(value)
    return _leaf_key(value)


def _leaf_key(value: Any) -> Any:
    """Return the key of what is no variable and has nothing in it."""
    if isinstance(value, Tracer):
        return _Itself(value)
    if isinstance(value, np.ndarray | jax.Array):
        is_key = jnp.issubdtype(value.dtype, jax.dtypes.extended)
        data = np.asarray(jax.random.key_data(value) if is_key else value)
        return type(value), str(value.dtype), data.shape, data.tobytes()
    try:
        hash(value)
    except TypeError:
        return _Itself(value)
    return type(value), value


def _attributes(worker: Any) -> dict[str, Any]:
    """Return all attributes of an optimizer that are part of its rule, each as a key."""
    return {n: as_key(x, by_value=False) for n, x in attributes_of(worker).items()}
