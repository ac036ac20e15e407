"""What an optimizer keeps between calls: its variables, its counter, its rate."""

import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from optimize_loss._checks import FINITE, STEP, InvalidType, check_integer, nearest, received
from optimize_loss._names import Pattern, check_patterns
from optimize_loss.optimizers._custom import UpdateStep, tracked
from optimize_loss.optimizers._held import Held
from optimize_loss.optimizers._options import Options
from optimize_loss.optimizers._variable import (
    Variable,
    check_variables,
    different_names,
    value_of,
)
from optimize_loss.schedules import evaluate
from optimize_loss.transforms import Chain, Link
from optimize_loss.transforms._numbers import to_array

INITIALIZERS = {"zeros": jnp.zeros, "ones": jnp.ones}


class VariableList(list[Variable]):
    """A list that returns itself when it is called, as code for Keras 2 does."""

    def __call__(self) -> "VariableList":
        return self


class Stateful(Options, abstract=True):
    """Options with variables; see `Optimizer`."""

    built = False

    def __post_init__(self):
        self._iterations = Variable(jnp.int32(0), "iteration")
        self._variables: list[Variable] = []
        self._given: list[Variable] = []
        self._excluded: tuple[Pattern | Variable, ...] = ()
        self._unbuilt: dict[str, Any] | None = None
        self._held: Held | None = None
        super().__post_init__()

    # What the rule is.

    def links(self) -> dict[str, Any]:
        """Return the links of the rule, by name, in order, with the one that has the rate.

        The default is for subclasses that define `update_step`.
        """
        if type(self).update_step is Stateful.update_step:
            return super().links()
        return {"update_step": UpdateStep(self, self.rate)}

    def update_step(self, gradient: jax.Array, variable: Variable) -> None:
        """Update one variable and what belongs to it, in place; for subclasses to define.

        Args:
          gradient: its gradient, after clipping.
          variable: a box around its value, after weight decay.
        """
        raise NotImplementedError(
            f"{type(self).__name__} is made of links and has no `update_step` of its own."
        )

    def _update_step(self, gradient: jax.Array, variable: Variable) -> None:
        """Call `update_step`, also where it takes the rate, as in Keras 3."""
        takes_rate = len(inspect.signature(self.update_step).parameters) > 2
        rate = (self.learning_rate,) if takes_rate else ()
        self.update_step(gradient, variable, *rate)

    def _worker(self, step: jax.Array, rate: jax.Array | None) -> Any:
        """Return a copy of the optimizer as it was before it was built, at another step."""
        worker = object.__new__(type(self))
        for name, value in (self._unbuilt or vars(self)).items():
            mutable = isinstance(value, list | dict | set)
            worker.__dict__[name] = type(value)(value) if mutable else value
        worker._iterations = Variable(step, "iteration")
        if rate is not None:
            worker._learning_rate = Variable(rate, "learning_rate")
        return worker

    def _own_boxes(self) -> list[Variable]:
        """Return the variables that are not part of the rule's state."""
        rate = self.__dict__.get("_learning_rate")
        excluded = [x for x in self._excluded if isinstance(x, Variable)]
        boxes = [self._iterations, *self._given, *excluded]
        return [*boxes, rate] if isinstance(rate, Variable) else boxes

    # The counter and the rate.

    @property
    def iterations(self) -> Variable:
        """The number of updates made, an int32; can be set until the optimizer is built."""
        return self._iterations

    @iterations.setter
    def iterations(self, value: Any) -> None:
        if self.built:
            raise RuntimeError(
                "`iterations` must be set before the optimizer is built; afterwards use "
                f"`optimizer.iterations.assign(...)`. {received('iterations', value)}"
            )
        self._iterations.assign(check_integer("iterations", value_of(value), STEP))

    def _get_learning_rate(self) -> Any:
        kept = self.__dict__.get("_learning_rate")
        if kept is None:
            raise ValueError(
                f"{type(self).__name__} has no learning rate: give `learning_rate`, or set "
                "`self._learning_rate = self._build_learning_rate(...)` in its `__init__`."
            )
        if isinstance(kept, Variable):
            return kept
        last = jnp.maximum(self._iterations.value - 1, 0)
        return evaluate("learning_rate", kept, last, jnp.float32)

    def _set_learning_rate(self, value: Any) -> None:
        kept = self.__dict__.get("_learning_rate")
        scheduled = callable(value) and not isinstance(value, Variable)
        if isinstance(kept, Variable) and not scheduled:
            kept.assign(jnp.asarray(value_of(value), kept.dtype))
        elif not self.built or scheduled:
            self._learning_rate = self._build_learning_rate(value)
            self._chain_changed()
        else:
            raise InvalidType(
                f"`learning_rate` must stay a schedule, as the optimizer was built with {kept!r}. "
                "Assign another schedule, or build the optimizer with a number. "
                f"{received('learning_rate', value)}"
            )

    def _build_learning_rate(self, learning_rate: Any) -> Any:
        """Return a variable for a number, and a schedule as it is."""
        if callable(learning_rate) and not isinstance(learning_rate, Variable):
            return learning_rate
        value, dtype = value_of(learning_rate), jnp.result_type(float)
        if not isinstance(value, Tracer):
            with jax.ensure_compile_time_eval():
                value = to_array("learning_rate", value, FINITE, dtype)
        return Variable(value, "learning_rate", dtype)

    def _rates(self) -> dict[str, Variable]:
        """Return the variables of learning rates, by the names of their numbers in the state."""
        kept = self.__dict__.get("_learning_rate")
        names = [n for n, _ in self.chain.links if "learning_rate" in _numbers(self.chain, n)]
        return {f"{n}/learning_rate": kept for n in names if isinstance(kept, Variable)}

    # Building.

    def build(self, var_list: Iterable[Any]) -> None:
        """Make the optimizer's variables. Subclasses with an `update_step` extend it.

        Such a subclass calls `super().build(var_list)` first, then `add_variable` or
        `add_variable_from_reference`. Building a second time does nothing.

        Args:
          var_list: the variables to be trained.
        """
        if self.built:
            return
        self._unbuilt = {
            name: type(x)(x) if isinstance(x, list | dict | set) else x
            for name, x in vars(self).items()
        }
        self._given = check_variables(var_list)
        names = different_names([v.name for v in self._given])
        keys = [self._var_key(v) for v in self._given]
        self._index_dict = {key: i for i, key in enumerate(keys)}
        self._name_dict = dict(zip(keys, names, strict=True))
        self.built = True
        if self._excluded:  # variables to exclude have their names now
            self._chain_changed()

    def _hold(self) -> Held:
        """Return the state in boxes, made when it is first needed."""
        if self._held is None:
            params = {self._name_of(v): v.value for v in self._given}
            boxes = {f"update_step/{name}": box for name, box in tracked(self).items()}
            boxes["step"] = self._iterations
            boxes |= self._rates()
            self._held = Held(self._summed_chain, params, boxes, self.mesh)
        return self._held

    def _require_built(self, method: str) -> Held:
        if not self.built:
            raise ValueError(
                f"`{method}` needs the optimizer's variables: call `build(var_list)` first, or "
                "apply gradients."
            )
        return self._hold()

    def _exclude(self) -> tuple[Pattern, ...]:
        names = self.__dict__.get("_name_dict", {})
        return tuple(
            names.get(self._var_key(x), x.name) if isinstance(x, Variable) else x
            for x in self._excluded
        )

    def _chain_changed(self) -> None:
        super()._chain_changed()
        if (held := self.__dict__.get("_held")) is not None:
            try:
                held.chain, state = held.chain.with_numbers_of(self._summed_chain, held.state)
            except ValueError as error:
                raise ValueError(
                    "Once an optimizer is built, only its numbers can be changed. " + str(error)
                ) from error
            held.keep(state)

    def _var_key(self, variable: Variable) -> str:
        """Return what tells one variable from all others."""
        return str(id(variable))

    def _get_variable_index(self, variable: Variable) -> int:
        """Return the place of a variable in the list that the optimizer was built with."""
        self._name_of(variable)
        return self._index_dict[self._var_key(variable)]

    def _name_of(self, variable: Variable) -> str:
        """Return the name under which the state has a variable."""
        names = self.__dict__.get("_name_dict", {})
        if (key := self._var_key(variable)) not in names:
            known = list(names.values())
            raise ValueError(
                f"The variable {variable.name!r} is none of those that the optimizer was built "
                f"with. Build it with all of them, or use one optimizer for each list. "
                f"Nearest: {nearest(variable.name, known)}."
            )
        return names[key]

    # Variables.

    @property
    def variables(self) -> VariableList:
        """The optimizer's variables, the counter first; hyperparameters are not among them."""
        return VariableList(self._hold().variables.values() if self.built else [self._iterations])

    def add_variable(
        self,
        shape: Sequence[int] = (),
        dtype: Any = None,
        initializer: str | Callable[..., Any] = "zeros",
        name: str | None = None,
    ) -> Variable:
        """Return a new variable of the optimizer; for use in `build`.

        Args:
          shape: its shape.
          dtype: float32 if not given.
          initializer: `zeros`, `ones`, or a function of a shape and a dtype.
          name: its name, different from those of the other variables.
        """
        make = INITIALIZERS.get(initializer) if isinstance(initializer, str) else initializer
        if not callable(make):
            raise ValueError(
                f"`initializer` must be one of {sorted(INITIALIZERS)} or a function of a shape and "
                f"a dtype. {received('initializer', initializer)}"
            )
        value = make(tuple(shape), dtype=jnp.dtype(dtype or jnp.float32))
        return self._add(value, name or "variable")

    def add_variable_from_reference(
        self,
        model_variable: Variable,
        variable_name: str,
        shape: Sequence[int] | None = None,
        initial_value: Any = None,
    ) -> Variable:
        """Return a new variable of the optimizer that belongs to one of the model.

        Its name is `{variable_name}/{name of the model's variable}`, its dtype that of the model's
        variable, and its sharding too if it has the same shape.

        Args:
          model_variable: the model's variable.
          variable_name: such as `momentum`.
          shape: that of the model's variable if not given.
          initial_value: 0 if not given.
        """
        like = model_variable.value
        if initial_value is None:
            initial_value = jnp.zeros_like(like, shape=None if shape is None else tuple(shape))
        value = jnp.asarray(value_of(initial_value), like.dtype)
        names = self.__dict__.get("_name_dict", {})
        name = names.get(self._var_key(model_variable), model_variable.name)
        return self._add(value, f"{variable_name}/{name}")

    def _add(self, value: Any, name: str) -> Variable:
        name = different_names([*(v.name for v in self._variables), name])[-1]
        self._variables.append(Variable(value, name))
        return self._variables[-1]

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Assign to all variables, in the order of `variables`.

        Raises:
          ValueError: the optimizer is not built, or the number of weights differs.
          TreeMismatch: a shape differs.
        """
        boxes = list(self._require_built("set_weights").variables.values())
        if len(weights) != len(boxes):
            raise ValueError(
                f"`weights` must be as many as the optimizer has variables, {len(boxes)}. "
                f"Received: {len(weights)}."
            )
        before = [box.value for box in boxes]
        try:
            for box, weight in zip(boxes, weights, strict=True):
                box.assign(weight)
        except ValueError:
            for box, value in zip(boxes, before, strict=True):
                box.assign(value)
            raise

    def save_own_variables(self, store: Any) -> None:
        """Write the variables by name into a mapping, such as a dict or an h5py group."""
        self._require_built("save_own_variables").save(store)

    def load_own_variables(self, store: Any) -> None:
        """Read the variables from what `save_own_variables` wrote.

        Raises:
          CheckpointMismatch: the store has other variables; nothing is changed.
        """
        self._require_built("load_own_variables").load(store)

    def exclude_from_weight_decay(
        self, var_list: Iterable[Variable] | None = None, var_names: Iterable[str] | None = None
    ) -> None:
        """Leave variables out of weight decay; each call replaces what the last one said.

        Args:
          var_list: variables.
          var_names: regular expressions that are searched for in the names, such as `bias`. One
            that is found in none raises a `ValueError` when the optimizer is built. A `:0`, as at
            the end of TensorFlow's names, is ignored.

        Raises:
          ValueError: the optimizer is built.
        """
        if self.built:
            raise ValueError(
                "`exclude_from_weight_decay` must be called before the optimizer is built."
            )
        listed = check_variables([] if var_list is None else var_list)
        texts = check_patterns("var_names", () if var_names is None else var_names)
        searched = [re.compile(t.replace(":0", "")) if isinstance(t, str) else t for t in texts]
        self._excluded = (*listed, *searched)
        self._chain_changed()


def _numbers(links: Chain, name: str) -> dict[str, Any]:
    link = links.link(name)
    return link.numbers() if isinstance(link, Link) else {}
