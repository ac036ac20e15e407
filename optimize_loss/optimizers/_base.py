"""What an optimizer is: options that become a chain, and three ways to use it."""

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optimize_loss._checks import InvalidType, nearest, received
from optimize_loss._trainable import Trainable, derivatives
from optimize_loss.optimizers._config import plain, serialize
from optimize_loss.optimizers._held import on_mesh
from optimize_loss.optimizers._options import options_of
from optimize_loss.optimizers._stateful import Stateful
from optimize_loss.optimizers._variable import Variable, check_variables, value_of
from optimize_loss.transforms import chain
from optimize_loss.transforms._params import take_apart


class Optimizer(Stateful, abstract=True):
    """DOC"""

    # The functional way: nothing of the optimizer changes.

    def init(self, params: Any) -> dict[str, Any]:
        """Return the state before the first update: `Chain.init`, placed on `mesh`."""
        state = self.chain.init(params)
        for path, box in self._rates().items():
            link, _, number = path.rpartition("/")
            state[link][number] = box.value.astype(state[link][number].dtype)
        return on_mesh(state, self.mesh)

    def update(
        self, updates: Any, state: dict[str, Any], params: Any = None, **extra: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Return what to add to the parameters, and the new state: `Chain.update`."""
        return self.chain.update(updates, state, params, **extra)

    # The way of pytrees: the optimizer keeps the state, the caller the parameters.

    def apply(self, grads: Any, params: Any = None) -> Any:
        """Return the new parameters; the state stays in the optimizer.

        Args:
          grads: a tree like `params`; where it has None, the parameter is left alone.
          params: a tree of arrays; or a list of variables, which are updated in place. If left
            out, the variables that the optimizer was built with.

        Returns:
          A tree like `params`; for variables, the number of updates made.

        Raises:
          TreeMismatch: the trees differ.
          ValueError: there is no gradient at all; or the parameters are not those of before.
        """
        if params is None:
            params = self._given
            if not params:
                raise ValueError(
                    "`params` must be given unless the optimizer was built with variables."
                )
        if any(isinstance(p, Variable) for p in jax.tree.leaves(params)):
            return self.apply_gradients(zip(grads, params, strict=True))
        taken = take_apart(params)
        flat = taken.check_updates(grads)
        if not self.built:
            pairs = zip(taken.leaves, taken.names, strict=True)
            self._build([Variable(p, name) for p, name in pairs])
            self._hold()
            self._given = []  # the caller keeps the values
        named = dict(zip(taken.names, taken.leaves, strict=True))
        summed = [g for g, _ in self.aggregate_gradients(zip(flat, taken.leaves, strict=True))]
        new = self._advance(dict(zip(taken.names, summed, strict=True)), named)
        return taken.unflatten([new[name] for name in taken.names])

    # The imperative way: variables are updated in place.

    def minimize(
        self,
        loss: Callable[[], Any],
        var_list: Sequence[Variable] | Callable[[], Sequence[Variable]],
        tape: None = None,
    ) -> None:
        """Update variables in place, one step down the gradient of `loss`.

        Args:
          loss: a function without arguments of the variables' values.
          var_list: the variables, or a function that returns them.
          tape: None; there is no tape in JAX.
        """
        self.apply_gradients(self.compute_gradients(loss, var_list, tape))

    def compute_gradients(
        self,
        loss: Callable[[], Any],
        var_list: Sequence[Variable] | Callable[[], Sequence[Variable]],
        tape: None = None,
    ) -> list[tuple[jax.Array | None, Variable]]:
        """Return the gradients of `loss`, None where it does not depend on a variable.

        They are as `apply_gradients` takes them: multiplied by the loss scale, if there is one.

        Args:
          loss: as for `minimize`.
          var_list: as for `minimize`.
          tape: None.

        Raises:
          InvalidType: `loss` is no function, or `tape` is not None: gradients are of functions.
        """
        if tape is not None or not callable(loss):
            raise InvalidType(
                "`loss` must be a function without arguments, as JAX takes gradients of functions "
                "and has no tape: `optimizer.minimize(lambda: 3 * v * v, [v])`. "
                f"Received: loss={loss!r}, tape={tape!r}."
            )
        variables = check_variables(var_list() if callable(var_list) else var_list)

        def loss_of(values: list[jax.Array]) -> tuple[jax.Array, None]:
            before = [v.value for v in variables]
            try:
                for v, value in zip(variables, values, strict=True):
                    v._value = value
                return jnp.asarray(value_of(loss())), None
            finally:
                for v, value in zip(variables, before, strict=True):
                    v._value = value

        everything = Trainable([v.value for v in variables], (True,) * len(variables))
        _, _, grads = derivatives(loss_of, everything, self._loss_scale())
        return list(zip(grads, variables, strict=True))

    def apply_gradients(
        self,
        grads_and_vars: Iterable[tuple[Any, Any]],
        name: str | None = None,
        skip_gradients_aggregation: bool = False,
        experimental_aggregate_gradients: bool = True,
    ) -> Any:
        """Update variables in place.

        In this order: sum over devices, divide by the loss scale, clip, decay, apply the rule,
        average, count. A variable whose gradient is None is left alone, with a warning.

        Args:
          grads_and_vars: pairs of a gradient and a variable. If they hold arrays in place of
            variables, the new arrays are returned.
          name: ignored; in TensorFlow a name scope.
          skip_gradients_aggregation: whether to leave out `aggregate_gradients`.
          experimental_aggregate_gradients: the same the other way round, as of old.

        Returns:
          The number of updates made, a `Variable`; or a list of arrays.

        Raises:
          InvalidType: there are no such pairs.
          ValueError: there is no gradient at all, or a variable is not one of those that the
            optimizer was built with.
        """
        pairs = _check_pairs(grads_and_vars)
        if not pairs:
            return self.iterations
        if not any(isinstance(v, Variable) for _, v in pairs):
            return self.apply([g for g, _ in pairs], [v for _, v in pairs])
        variables = check_variables([v for _, v in pairs])
        if not self.built:
            self._build(variables)
        names = [self._name_of(v) for v in variables]
        if not skip_gradients_aggregation and experimental_aggregate_gradients:
            pairs = list(self.aggregate_gradients(pairs))
        every = self._given
        values = {self._name_of(v): v.value for v in every}
        new = self._advance(dict(zip(names, [g for g, _ in pairs], strict=True)), values)
        for v in every:
            v.assign(new[self._name_of(v)])
            if v.constraint is not None:
                v.assign(v.constraint(v.value))
        return self.iterations

    def aggregate_gradients(
        self, grads_and_vars: Iterable[tuple[Any, Any]]
    ) -> list[tuple[Any, Any]]:
        """Return the pairs with the gradients summed over the devices along `axis_name`, if any."""
        pairs = list(grads_and_vars)
        if self.axis_name is None:
            return pairs
        return [(None if g is None else jax.lax.psum(g, self.axis_name), v) for g, v in pairs]

    def finalize_variable_values(self, var_list: Any) -> Any:
        """Put the averages that the optimizer keeps, if any, in the place of the parameters.

        Args:
          var_list: variables, which are assigned to; or a tree of arrays.

        Returns:
          None for variables; else the tree of averages.
        """
        leaves = jax.tree.leaves(var_list)
        held = self._require_built("finalize_variable_values")
        if any(isinstance(p, Variable) for p in leaves):
            values = {self._name_of(v): v.value for v in self._given}
            averages = held.chain.averaged(held.state, values)
            for v in check_variables(leaves):
                v.assign(averages[self._name_of(v)])
            return None
        taken = take_apart(var_list)
        values = dict(zip(taken.names, taken.leaves, strict=True))
        averages = held.chain.averaged(held.state, values)
        return taken.unflatten([averages[name] for name in taken.names])

    def scale_loss(self, loss: Any) -> Any:
        """Return the loss multiplied by the loss scale, if there is one.

        For gradients that are taken by hand: `minimize` and `optimize_loss` do this themselves.
        """
        scale = self._loss_scale()
        return loss if scale is None else loss * scale

    def _loss_scale(self) -> jax.Array | None:
        if self.built:
            return self.chain.loss_scale(self._hold().state)
        scaling = {n: x for n, x in self.chain.links if n == "loss_scale"}
        return chain(**scaling).loss_scale(chain(**scaling).init({})) if scaling else None

    def _advance(self, grads: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
        """Return the new parameters by name, and keep the new state."""
        held = self._hold()
        if unknown := sorted(grads.keys() - set(held.names)):
            raise ValueError(
                f"The optimizer was built for other parameters: it has no {unknown}. "
                f"Nearest: {nearest(unknown[0], held.names)}."
            )
        missing = [name for name, grad in grads.items() if grad is None]
        if len(missing) == len(grads):
            raise ValueError(
                f"No gradients: the gradient of every parameter is None. Parameters: {missing}."
            )
        if missing:
            warnings.warn(
                f"There is no gradient for {missing}: they are left as they are.", stacklevel=3
            )
        return held.apply(grads, params, self.jit_compile)

    def _build(self, variables: Sequence[Variable]) -> None:
        self.build(variables)
        if not self.built:
            raise ValueError(
                f"`build` of {type(self).__name__} must call `super().build(var_list)`."
            )

    # Configurations.

    def get_config(self) -> dict[str, Any]:
        """Return the options as a dict that JSON can hold: plain values, and dicts for schedules.

        Subclasses with an `__init__` of their own add their options to what `super()` returns.
        `mesh` is of this process, and is left out.
        """
        values = {n: getattr(self, n) for n in options_of(type(self)) if n != "learning_rate"}
        later = ("gradient_accumulation_steps", "loss_scale_factor", "axis_name")
        config = {n: serialize(x) for n, x in values.items() if n not in ("mesh", *later)}
        config |= {n: serialize(values[n]) for n in later if values[n] is not None}
        if self.rate is not None and "learning_rate" in inspect.signature(type(self)).parameters:
            config["learning_rate"] = serialize(self.rate)
        return {**config, "name": self.name or type(self).__name__}

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], custom_objects: Mapping[str, type] | None = None
    ) -> "Optimizer":
        """Return an optimizer with these options; the inverse of `get_config`.

        Args:
          config: as `get_config` returns it, from here or from Keras. It is not changed.
          custom_objects: classes by name, for schedules and optimizers in it that are not of this
            package.

        Raises:
          InvalidType: an option is unknown.
        """
        if config.get("is_legacy_optimizer"):
            raise ValueError("`config` must not be of one of Keras' legacy optimizers.")
        given = {n: plain(x, custom_objects) for n, x in config.items()}
        given.pop("is_legacy_optimizer", None)
        return cls(**given)

    def _serialize_hyperparameter(self, hyperparameter: Any) -> Any:
        """Return a rate or another hyperparameter for a configuration, as Keras' helper does."""
        return serialize(hyperparameter)


def _check_pairs(grads_and_vars: Any) -> list[tuple[Any, Any]]:
    """Return a list of pairs of a gradient and a variable or an array."""
    try:
        pairs = list(grads_and_vars)
        for pair in pairs:
            _, _ = pair
    except (TypeError, ValueError) as error:
        raise InvalidType(
            "`grads_and_vars` must be pairs of a gradient and a variable, as in "
            f"`zip(grads, variables)`. {received('grads_and_vars', grads_and_vars)}"
        ) from error
    return pairs
