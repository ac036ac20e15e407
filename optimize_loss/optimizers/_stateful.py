"""What an optimizer keeps between calls: its variables, its counter, its rate."""

import inspect
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from optimize_loss._checks import (
    NOT_NEGATIVE,
    STEP,
    InvalidType,
    TreeMismatch,
    check_integer,
    check_number,
    nearest,
    received,
)
from optimize_loss._names import Pattern, check_patterns
from optimize_loss.optimizers._custom import (
    INTERNAL,
    Recipe,
    UpdateStep,
    as_a_whole,
    has_variables,
    tracked,
)
from optimize_loss.optimizers._held import Held, placed
from optimize_loss.optimizers._options import Options
from optimize_loss.optimizers._variable import (
    Variable,
    as_dtype,
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


class Stateful(Options):
    """Options with variables; see `Optimizer`."""

    built = False
    _is_worker = False

    def __init_subclass__(cls):
        """Let a `build` of a subclass run as a whole or not at all."""
        super().__init_subclass__()
        if "build" in vars(cls):
            cls.build = as_a_whole(cls.build)

    def __post_init__(self):
        self._start()
        super().__post_init__()

    def _start(self) -> None:
        """Begin without variables."""
        self._iterations = Variable(jnp.int32(0), "iteration")
        self._variables: list[Variable] = []
        self._given: list[Variable] = []
        self._excluded: tuple[Pattern | Variable, ...] = ()
        self._unbuilt: dict[str, Any] | None = None
        self._building = False
        self._set_later: list[str] = []
        self._outers: list[Stateful] = []
        self._held: Held | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an option or an attribute; raise, and change nothing, if the variables forbid it."""
        own = self.__dict__
        if name == "learning_rate" or name in INTERNAL or "_held" not in own or self._building:
            super().__setattr__(name, value)
            return
        if self.built and name == "mesh" and value != self.mesh:
            raise ValueError("`mesh` must be set before the optimizer is built.")
        if self.built and has_variables(own.get(name)):
            raise ValueError(
                f"`{name}` must stay: it has variables of the optimizer. Give them other values "
                f"with `assign`. {received(name, value)}"
            )
        before = {n: own[n] for n in (name,) if n in own}, list(self._set_later)
        super().__setattr__(name, value)
        if self._unbuilt is not None and name not in self._set_later:
            self._set_later.append(name)
        try:
            self._chain_changed()
        except Exception:
            del own[name]
            own.update(before[0])
            self._set_later = before[1]
            self._chain_changed()
            raise

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes; variables have other keys wherever this is loaded."""
        state = {name: x for name, x in vars(self).items() if name != "_index_dict"}
        if "_name_dict" in state:
            state["_name_dict"] = [self._name_dict[self._var_key(v)] for v in self._given]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if "_name_dict" in state:
            self._know(state["_name_dict"])

    # What the rule is.

    def _rule(self) -> dict[str, Any]:
        """Return the links, or the `update_step` where a subclass defines that above them."""
        first = next(c for c in type(self).__mro__ if {"links", "update_step"} & vars(c).keys())
        if first is Stateful or "links" in vars(first):
            return self.links()
        return {"update_step": UpdateStep(self._recipe(), self.rate)}

    def _recipe(self) -> Recipe:
        """Return the class and the attributes before `build`, with those set after it."""
        own = vars(self)
        later = {name: own[name] for name in self._set_later}
        attributes = own if self._unbuilt is None else {**self._unbuilt, **later}
        return Recipe.of(self, attributes)

    def update_step(self, gradient: jax.Array, variable: Variable) -> None:
        """Update one variable and what belongs to it, in place; for subclasses to define.

        It may take `learning_rate` as a third parameter, as in Keras 3.

        Args:
          gradient: its gradient, after clipping.
          variable: a box around its value, after weight decay.
        """
        raise NotImplementedError(
            f"{type(self).__name__} is made of links and has no `update_step` to call. To change "
            "what it does, add links of your own to those that `links` returns."
        )

    def _update_step(self, gradient: jax.Array, variable: Variable) -> None:
        """Call `update_step`, also where it takes the rate, as in Keras 3."""
        third = list(inspect.signature(self.update_step).parameters.values())[2:3]
        wants_rate = any(p.name == "learning_rate" or p.default is p.empty for p in third)
        positional = all(p.kind is p.POSITIONAL_OR_KEYWORD for p in third)
        rate = (self.learning_rate,) if wants_rate and positional else ()
        self.update_step(gradient, variable, *rate)

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
        if value is None and kept is None:
            return  # a rule may do without
        scheduled = callable(value) and not isinstance(value, Variable)
        if isinstance(kept, Variable) and not scheduled:
            kept.assign(self._build_learning_rate(value).value.astype(kept.dtype))
        elif scheduled or not self.built:
            self._learning_rate = self._build_learning_rate(value)
            if "_held" in self.__dict__:
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
            value = check_number("learning_rate", value, NOT_NEGATIVE)
            with jax.ensure_compile_time_eval():
                value = to_array("learning_rate", value, NOT_NEGATIVE, dtype)
        return Variable(value, "learning_rate", dtype)

    def _rates(self) -> dict[str, Variable]:
        """Return the variables of learning rates, by the names of their numbers in the state."""
        kept = self.__dict__.get("_learning_rate")
        names = [n for n, _ in self.chain.links if "learning_rate" in _numbers(self.chain, n)]
        return {f"{n}/learning_rate": kept for n in names if isinstance(kept, Variable)}

    # Building.

    @as_a_whole
    def build(self, var_list: Iterable[Any]) -> None:
        """Make the optimizer's variables. Subclasses with an `update_step` extend it.

        Such a subclass calls `super().build(var_list)` first, then `add_variable` or
        `add_variable_from_reference`. Building a second time does nothing.

        Args:
          var_list: the variables to be trained.
        """
        self._given = check_variables(var_list)
        self._check_trace([v.value for v in self._given])
        self._know(different_names([v.name for v in self._given]))
        self.built = True
        self._chain_changed()  # variables that are not decayed have their names now

    def _know(self, names: Sequence[str]) -> None:
        """Note the names and the places of the variables that the optimizer was built with."""
        keys = [self._var_key(v) for v in self._given]
        self._index_dict = {key: i for i, key in enumerate(keys)}
        self._name_dict = dict(zip(keys, names, strict=True))

    def _hold(self) -> Held:
        """Return the state in boxes, made when it is first needed."""
        if self._held is None:
            params = {self._name_of(v): v.value for v in self._given}
            rule = self._summed_chain
            inside = (
                "update_step/"
                if isinstance(dict(rule.links).get("update_step"), UpdateStep)
                else ""
            )
            boxes = {f"{inside}{name}": box for name, box in tracked(self).items()}
            boxes |= {**self._rates(), "step": self._iterations}
            self._held = Held(rule, params, boxes, self.mesh)
        return self._held

    def _check_trace(self, values: Iterable[Any]) -> None:
        """Raise if the optimizer was made outside of the transformation that uses it."""
        if self._iterations.is_elsewhere(*values):
            raise InvalidType(
                "An optimizer that is made outside of a JAX transformation (jit, grad, vmap, scan) "
                "cannot keep what is traced inside. Make it inside, or use its functions `init` "
                f"and `update`. Received: {self!r}."
            )

    def _forget_variables(self) -> None:
        """Keep the state alone, where the caller keeps the parameters."""
        self._hold()
        self._given = []
        self._know([])

    def _require_built(self, method: str) -> Held:
        if not self.built:
            raise ValueError(
                f"`{method}` needs the optimizer's variables: call `build(var_list)` first, or "
                "apply gradients."
            )
        return self._hold()

    def _exclude(self) -> tuple[Pattern, ...]:
        known = [x.__dict__.get("_name_dict", {}) for x in (self, *self._outers)]
        names = {key: name for names in known for key, name in names.items()}
        return tuple(
            names.get(self._var_key(x), x.name) if isinstance(x, Variable) else x
            for x in self._excluded
        )

    def _chain_changed(self) -> None:
        """Make the chain anew after something in it has changed, if it was made."""
        if self.__dict__.pop("_kept_chains", None) is not None:
            _ = self.chain
        if self._held is not None:
            try:
                self._held.renew(self._summed_chain)
            except ValueError as error:
                raise ValueError(
                    "Once an optimizer is built, only its numbers can be changed. " + str(error)
                ) from error
        for outer in self._outers:
            outer._chain_changed()

    def _var_key(self, variable: Variable) -> str:
        """Return what tells one variable from all others."""
        return variable._unique_id

    def _get_variable_index(self, variable: Variable) -> int:
        """Return the place of a variable in the list that the optimizer was built with."""
        self._name_of(variable)
        return self._index_dict[self._var_key(variable)]

    def _name_of(self, variable: Variable) -> str:
        """Return the name under which the state has a variable."""
        names = self.__dict__.get("_name_dict", {})
        if (key := self._var_key(variable)) not in names:
            advice = "Build it with all of them, or use one optimizer for each list. "
            near = f"Nearest: {nearest(variable.name, names.values())}."
            if self.built and not names:
                advice, near = "It was used with trees; use another one for variables.", ""
            raise ValueError(
                f"The variable {variable.name!r} is none of those that the optimizer was built "
                f"with. {advice}{near}"
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

        Raises:
          TreeMismatch: `initializer` returned another shape.
          ValueError: another variable has that name; or `build` is over.
        """
        known = isinstance(initializer, str)
        make = INITIALIZERS.get(initializer.lower()) if known else initializer
        if not callable(make):
            raise ValueError(
                f"`initializer` must be one of {sorted(INITIALIZERS)} or a function of a shape and "
                f"a dtype. {received('initializer', initializer)}"
            )
        shape = _as_shape(shape)
        made = Variable(make(shape, as_dtype(dtype) or jnp.dtype(jnp.float32)))
        if made.shape != shape:
            raise TreeMismatch(
                f"`initializer` must return an array of the shape {shape}. Received: {made.shape}."
            )
        if name is None:
            name = different_names([*(v.name for v in self._variables), "variable"])[-1]
        return self._add(made.value, name)

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

        Raises:
          ValueError: another variable has that name; or `build` is over.
        """
        if not isinstance(model_variable, Variable):
            raise InvalidType(
                "`model_variable` must be a `Variable`, of those that `build` is given. "
                f"{received('model_variable', model_variable)}"
            )
        if not isinstance(variable_name, str):
            raise InvalidType(
                f"`variable_name` must be text. {received('variable_name', variable_name)}"
            )
        like = model_variable.value
        shape = None if shape is None else _as_shape(shape)
        if initial_value is None:
            initial_value = jnp.zeros_like(like, shape=shape)
        value = Variable(initial_value, dtype=like.dtype).value
        if shape is not None and value.shape != shape:
            raise TreeMismatch(
                f"`initial_value` must have the shape {shape}. Received: {value.shape}."
            )
        if value.shape == like.shape:
            value = placed(like, value)
        names = self.__dict__.get("_name_dict", {})
        name = names.get(self._var_key(model_variable), model_variable.name)
        return self._add(value, f"{variable_name}/{name}")

    def _add(self, value: Any, name: str) -> Variable:
        if self.built and not self._building:
            raise ValueError(
                "Variables must be added in `build`, as the state is made of them then. "
                f"{received('name', name)}"
            )
        if name in (known := [v.name for v in self._variables]):
            raise ValueError(
                f"`name` must differ from those of the optimizer's other variables, {known}. "
                f"{received('name', name)}"
            )
        self._variables.append(Variable(value, name))
        return self._variables[-1]

    def assign(self, variable: Variable, value: Any) -> None:
        """Assign to a variable, as `update_step` for Keras 3 does; `variable.assign(value)`."""
        variable.assign(value)

    def assign_add(self, variable: Variable, value: Any) -> None:
        """Add to a variable: `variable.assign_add(value)`."""
        variable.assign_add(value)

    def assign_sub(self, variable: Variable, value: Any) -> None:
        """Subtract from a variable: `variable.assign_sub(value)`."""
        variable.assign_sub(value)

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Assign to all variables, in the order of `variables`; if that fails, to none.

        Args:
          weights: arrays, as many as there are variables.

        Raises:
          ValueError: the optimizer is not built, or the number of weights differs.
          TreeMismatch: a shape differs.
        """
        boxes = list(self._require_built("set_weights").variables.values())
        weights = list(weights)
        if len(weights) != len(boxes):
            raise ValueError(
                f"`weights` must be as many as the optimizer has variables, {len(boxes)}. "
                f"Received: {len(weights)}."
            )
        before = [box.value for box in boxes]
        try:
            for box, old, weight in zip(boxes, before, weights, strict=True):
                box.assign(placed(old, box.assign(weight).value))
        except Exception:
            for box, value in zip(boxes, before, strict=True):
                box.assign(value)
            raise

    def save_own_variables(self, store: Any) -> None:
        """Write the variables by name, hyperparameters not among them.

        Args:
          store: a mapping that can be written to, such as a dict or an h5py group.

        Raises:
          ValueError: the optimizer is not built.
        """
        self._require_built("save_own_variables").save(store)

    def load_own_variables(self, store: Any) -> None:
        """Read the variables from what `save_own_variables` wrote.

        Args:
          store: a mapping of names to arrays, such as a dict, an h5py group, or what `numpy.load`
            gives.

        Raises:
          CheckpointMismatch: the store has other variables; nothing is changed.
          ValueError: the optimizer is not built.
        """
        self._require_built("load_own_variables").load(store)

    def exclude_from_weight_decay(
        self, var_list: Iterable[Variable] | None = None, var_names: Iterable[str] | None = None
    ) -> None:
        """Leave variables out of weight decay; each call replaces what the last one said.

        Args:
          var_list: variables.
          var_names: regular expressions that are searched for in the names, such as `bias`. One
            that is found in none raises a `ValueError` at the first update. A `:0`, as at the end
            of TensorFlow's names, is ignored.

        Raises:
          ValueError: the optimizer is built.
        """
        if self.built:
            raise ValueError(
                "`exclude_from_weight_decay` must be called before the optimizer is built."
            )
        listed = check_variables([] if var_list is None else var_list)
        texts = check_patterns("var_names", () if var_names is None else var_names)
        try:
            searched = [re.compile(t.replace(":0", "")) if isinstance(t, str) else t for t in texts]
        except re.error as error:
            raise ValueError(
                "`var_names` must be regular expressions. " + received("var_names", texts)
            ) from error
        self._excluded = (*listed, *searched)
        self._chain_changed()


def _as_shape(shape: Any) -> tuple[int, ...]:
    try:
        lengths = tuple(operator.index(length) for length in shape)
    except TypeError as error:
        raise InvalidType(f"`shape` must be integers. {received('shape', shape)}") from error
    if any(length < 0 for length in lengths):
        raise ValueError(f"`shape` must be at least 0 everywhere. {received('shape', shape)}")
    return lengths


def _numbers(links: Chain, name: str) -> dict[str, Any]:
    link = links.link(name)
    return link.numbers() if isinstance(link, Link) else {}
