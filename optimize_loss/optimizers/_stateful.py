"""The counter, the rates and the variables of an optimizer, as code for Keras sees them."""

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
    received,
)
from optimize_loss._engine.kinds import LossScale
from optimize_loss._engine.numbers import to_array
from optimize_loss._names import check_patterns
from optimize_loss.optimizers._held import placed
from optimize_loss.optimizers._holding import Holding
from optimize_loss.optimizers._variable import (
    Variable,
    as_dtype,
    check_variables,
    different_names,
    value_of,
)
from optimize_loss.schedules import evaluate
from optimize_loss.transforms import chain

INITIALIZERS = {"zeros": jnp.zeros, "ones": jnp.ones}


class VariableList(list[Variable]):
    """A list that returns itself when it is called, as code for Keras 2 does."""

    def __call__(self) -> "VariableList":
        return self


class Stateful(Holding):
    """A state with a counter, a rate and variables; see `Optimizer`."""

    # The counter, the rate and the loss scale.

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

    @property
    def lr(self) -> Any:
        """The `learning_rate`, as code for Keras 2 calls it."""
        return self.learning_rate

    @lr.setter
    def lr(self, value: Any) -> None:
        self.learning_rate = value

    def _build_learning_rate(self, learning_rate: Any) -> Any:
        """Return a variable for a number, and a schedule as it is."""
        if callable(learning_rate) and not isinstance(learning_rate, Variable):
            return learning_rate
        self._note_array(learning_rate)
        value, dtype = value_of(learning_rate), jnp.result_type(float)
        value = NOT_NEGATIVE.check("learning_rate", value)
        if not isinstance(value, Tracer):
            with jax.ensure_compile_time_eval():
                value = to_array("learning_rate", value, NOT_NEGATIVE, dtype)
        return Variable(value, "learning_rate", dtype)

    def scale_loss(self, loss: Any) -> Any:
        """Return the loss multiplied by the loss scale, if there is one.

        For gradients that are taken by hand: `minimize` and `optimize_loss` do this themselves.

        Args:
          loss: a number or an array.
        """
        scale = self._loss_scale()
        return loss if scale is None else loss * scale

    def _loss_scale(self) -> jax.Array | None:
        if self.built:
            return self._hold().chain.loss_scale(self._hold().state)
        scaling = {n: x for n, x in self.chain.links if isinstance(x, LossScale)}
        return chain(**scaling).loss_scale(chain(**scaling).init({})) if scaling else None

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
