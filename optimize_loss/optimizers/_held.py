"""What an optimizer keeps beside its options and its rule."""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from optimize_loss._checks import InvalidType, nearest, received
from optimize_loss._names import Pattern, check_patterns
from optimize_loss.optimizers._boxes import Boxes
from optimize_loss.optimizers._update_step import UpdateStep, attributes_of, duplicate, tracked
from optimize_loss.optimizers._variable import Variable, check_variables, different_names
from optimize_loss.transforms import Chain


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
    boxes: Boxes | None = None

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
                f"The variable {variable.name!r} is none of those that the optimizer was built "
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


def boxes_of(optimizer: Any) -> Boxes:
    """Return the state of a built optimizer, in which its variables are boxes."""
    chain = optimizer._summed_chain
    has_rule = isinstance(dict(chain.links).get("update_step"), UpdateStep)
    prefix = "update_step/" if has_rule else ""
    boxes = {f"{prefix}{name}": box for name, box in tracked(optimizer).items()}
    boxes |= {**optimizer._rates(), "step": optimizer.iterations}
    return Boxes(chain, optimizer._held.values(), boxes, optimizer.mesh)


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
