"""Optimizers: options that become a chain, and three ways to use it."""

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from optimize_loss._checks import STEP, InvalidType, check_integer, received
from optimize_loss._engine.kinds import LossScale
from optimize_loss._engine.trees import is_inexact, take_apart, with_strangers, without_strangers
from optimize_loss._names import flatten, same_leaves
from optimize_loss.optimizers._boxes import Boxes, on_mesh
from optimize_loss.optimizers._held import (
    add_variable,
    add_variable_like,
    excluded,
    undone_if_it_fails,
)
from optimize_loss.optimizers._options import Options
from optimize_loss.optimizers._pairs import (
    apply_in_place,
    check_pairs,
    gradients_of,
    paired,
)
from optimize_loss.optimizers._update_step import UpdateStep, tracked
from optimize_loss.optimizers._variable import (
    Variable,
    VariableList,
    check_trace,
    check_variables,
    is_variable,
    placed,
    value_of,
)
from optimize_loss.transforms import chain
from optimize_loss.transforms._accumulate import summed


class Optimizer(Options):
    """The base class of optimizers: options that become a chain of links, and its variables.

    Every optimizer of this package is a subclass, with its own options, the options below, and a
    rule. The gradients pass through these steps, in this order:

        sum over devices → divide by the loss scale → accumulate → clip → weight decay
        → the rule, with the learning rate → average the parameters → count

    `opt.chain` is the chain of links (`ol.transforms`) that does all of this. The optimizer holds
    the options, and, in the first two of the three ways to use it, the state.

    In place, as in Keras, with a `Variable` for each parameter:

      >>> import jax, jax.numpy as jnp, optimize_loss as ol
      >>> w, opt = ol.Variable(3.0, name="w"), ol.optimizers.SGD(learning_rate=0.25)
      >>> opt.minimize(lambda: w * w, [w])
      >>> print(w, opt.iterations)
      1.5 1
      >>> opt.learning_rate = 0.5
      >>> print(opt.apply_gradients([(2.0, w)]), w)
      2 0.5

    With trees: the caller keeps the parameters, and the optimizer keeps the state:

      >>> opt = ol.optimizers.SGD(learning_rate=0.25)
      >>> params = opt.apply({"w": 6.0, "b": 2.0}, {"w": 3.0, "b": 1.0})
      >>> print(params["w"], params["b"])
      1.5 0.5

    As pure functions: the caller keeps both. An optimizer is an optax transformation, which works
    with `jit`, `vmap` and `scan`, with `optax.chain` and flax, and as the `optimizer` of
    `optimize_loss`:

      >>> params = {"w": jnp.array(3.0)}
      >>> state = opt.init(params)
      >>> updates, state = jax.jit(opt.update)({"w": jnp.array(6.0)}, state, params)
      >>> print(updates["w"], state["step"])
      -1.5 1
      >>> step = ol.optimize_loss(lambda p, x: (p["w"] - x) ** 2, optimizer=opt)
      >>> train_state, metrics = step(step.init(params), 0.0)
      >>> print(train_state.params["w"], metrics["loss"])
      1.5 9.0

    Args:
      learning_rate: at least 0; a number, or a schedule: a function of the number of earlier
        updates, or of the global step of `optimize_loss`. Keyword-only here; the first argument of
        all subclasses that have one.
      name: the name of the optimizer in its configuration and in a `MultiOptimizer`; by default the
        name of the class.
      weight_decay: at least 0, per unit of the learning rate: p ← p - learning_rate · weight_decay
        · p before the rule, which sees the decayed p if it reads p. None for none.
      clipnorm: above 0, in the unit of the gradients: the largest L2 norm of each gradient.
      clipvalue: above 0: the largest size of each entry of the gradients.
      global_clipnorm: above 0: the largest joint L2 norm of all gradients. At most one of these
        three options can be given. Gradients with an infinite norm become NaN.
      use_ema: whether to keep an exponential moving average of every parameter, a ← a +
        (1 - ema_momentum)(p - a), starting at the initial parameters and updated after every
        update. `finalize_variable_values` replaces the parameters by it.
      ema_momentum: in [0, 1]; at 0 the average equals the parameters, at 1 it never changes.
      ema_overwrite_frequency: if given, the parameters become their average after every so many
        updates; an integer of at least 1.
      jit_compile: whether `minimize`, `apply_gradients` and `apply` run a compiled program.
      mesh: a `jax.sharding.Mesh`: state that is not on it is replicated over its devices. With or
        without it, slots have the sharding of their parameter.
      gradient_accumulation_steps: if given, so many calls make one update, with the mean of their
        gradients; an integer of at least 1. Clipping, decay, schedules, averages and `iterations`
        count updates. A parameter should have a gradient in every call of an update, or in no call.
      loss_scale_factor: above 0: `minimize`, `compute_gradients` and `optimize_loss` multiply the
        loss by it, and the gradients are first divided by it. `scale_loss` is for gradients that
        you take by hand.
      axis_name: name of an axis of devices, inside `jax.shard_map`, `jax.pmap` or `jax.vmap`:
        gradients are first summed over it. If the loss is a mean over the local batch, divide it by
        the number of devices.

    You can assign to options at any time, as in `opt.weight_decay = 0.1`. Once the optimizer is
    built, you can change numbers, but not add or remove them. Nothing is compiled again. Assigning
    to an unknown attribute, or deleting one, is an `AttributeError`.

    Attributes:
      learning_rate: a `Variable`, or with a schedule the rate of the last update. You can assign a
        number, or a schedule, which compiles again. Once the optimizer is built, a schedule can
        only be replaced by another schedule. `lr` is an alias.
      iterations: the number of updates made, a `Variable`. You can assign a number until the
        optimizer is built; later use `iterations.assign`.
      variables: a list of the optimizer's `Variable`s, the counter first, then the state, without
        hyperparameters.
      built: whether the parameters are known.
      chain: all links, for direct use.
      rate: the learning rate as links take it, a number or a schedule.

    To write one from links, declare its options as fields and define `links`. Fields with the types
    of `ol.transforms` (`NotNegative`, `Decay`, …) are checked; it inherits all the options above:

      >>> from optimize_loss.transforms import Decay, NotNegative, ScaleByLearningRate, ScaleByLion
      >>> class Signum(ol.optimizers.Optimizer):
      ...     learning_rate: NotNegative = 0.01
      ...     beta: Decay = 0.9
      ...     def links(self):
      ...         sign = ScaleByLion(self.beta, self.beta)
      ...         return {"sign": sign, "rate": ScaleByLearningRate(self.rate)}
      >>> opt = Signum(0.25, weight_decay=0.5)
      >>> opt, opt.apply({"w": -7.0}, {"w": 8.0})["w"].item()
      (Signum(learning_rate=0.25, weight_decay=0.5), 7.25)

    That is 8 - 0.25 · 0.5 · 8 for the decay, and + 0.25. If a rule does not exist yet, write your
    own link, which is a few functions of arrays: see `ol.transforms.Link`.

    To write one as in Keras, define `build`, which makes variables, and `update_step`, which
    assigns to them. `get_config` adds your own options; it is optional if they are attributes of
    the same names, as here:

      >>> class Momentum(ol.optimizers.Optimizer):
      ...     def __init__(self, learning_rate=0.01, momentum=0.9, name=None, **options):
      ...         super().__init__(name, **options)
      ...         self._learning_rate = self._build_learning_rate(learning_rate)
      ...         self.momentum = momentum
      ...     def build(self, var_list):
      ...         super().build(var_list)
      ...         self.sums = [self.add_variable_from_reference(v, "sum") for v in var_list]
      ...     def update_step(self, gradient, variable):
      ...         total = self.sums[self._get_variable_index(variable)]
      ...         total.assign(self.momentum * total + gradient)
      ...         variable.assign_sub(self.learning_rate * total)
      ...     def get_config(self):
      ...         return {**super().get_config(), "momentum": self.momentum}

    Two steps down 4a + 2b. The sums are 4 and 2, then 6 and 3:

      >>> a, b = ol.Variable(10.0, name="a"), ol.Variable(10.0, name="b")
      >>> opt = Momentum(learning_rate=0.25, momentum=0.5)
      >>> for _ in range(2):
      ...     opt.minimize(lambda: 4 * a + 2 * b, [a, b])
      ...     print(a, b)
      9.0 9.5
      7.5 8.75
      >>> print({v.name: v.item() for v in opt.variables})
      {'iteration': 2, 'sum/a': 6.0, 'sum/b': 3.0}

    The same with `optimize_loss` and its options, here clipping. A gradient of norm √20, clipped to
    the half of that, gives the half of each step:

      >>> step = ol.optimize_loss(lambda p: 4 * p["a"] + 2 * p["b"], optimizer=Momentum(0.25, 0.5),
      ...                         clip_gradients=5**0.5)
      >>> train_state = step.init({"a": 10.0, "b": 10.0})
      >>> for _ in range(2):
      ...     train_state, metrics = step(train_state)
      >>> print(train_state.params["a"].round(4), train_state.params["b"].round(4))
      8.75 9.375

    To continue in another process, save the configuration and the variables: here in a dict, or in
    an h5py group or with `numpy.savez(file, **saved)`:

      >>> import json
      >>> saved, text = {}, json.dumps(opt.get_config())
      >>> opt.save_own_variables(saved)
      >>> sorted(saved)
      ['iteration', 'update_step/sum/a', 'update_step/sum/b']
      >>> again = Momentum.from_config(json.loads(text))
      >>> again.build([a, b])
      >>> again.load_own_variables(saved)
      >>> again.minimize(lambda: 4 * a + 2 * b, [a, b])
      >>> print(a, b, again.iterations)
      5.75 7.875 3

    `ol.optimizers.serialize(opt)` also keeps the class, by name, and
    `ol.optimizers.deserialize(config, custom_objects={"Momentum": Momentum})` finds it.

    `build` and `update_step` are traced: they run on copies of the optimizer, with boxes around
    traced values. Values that change from step to step must be variables that `build` creates and
    keeps; an `update_step` that assigns to anything else is an error. Other attributes, such as
    `momentum` here, are compiled in, and setting one compiles again. Add new attributes in
    `__init__` and `build`; elsewhere only names that begin with an underscore are allowed. Use
    `jnp.where`, not `if`, for conditions on values.

    `init`, `update` and `optimize_loss` never touch the optimizer's own variables, so one optimizer
    can be used in all three ways, each with its own state and counter. Inside a JAX transformation,
    use these functions, or create the variables and the optimizer there. A variable from outside
    cannot keep a value that is traced inside.

    References:
      `tf.keras.optimizers.Optimizer` of Keras 2.15, and Keras 3. docs/migration.md lists the
      differences, and why.
    """

    # The functional way: nothing of the optimizer changes.

    def init(self, params: Any) -> dict[str, Any]:
        """Return the state before the first update, for `update`: `Chain.init`, placed on `mesh`.

        Args:
          params: the parameters, a tree of arrays and numbers.
        """
        self._held.from_arrays = False
        state = self.chain.init(params)
        for path, box in self._rates().items():
            link, _, number = path.rpartition("/")
            old = state[link][number]
            # A copy: a step may donate the state, not the variable.
            state[link][number] = placed(old, jnp.array(box.value, old.dtype))
        return on_mesh(state, self.mesh)

    def update(
        self, updates: Any, state: dict[str, Any], params: Any = None, **extra: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Return what to add to the parameters, and the new state: `Chain.update`.

        Args:
          updates: the gradients, a tree like the parameters.
          state: from `init`, or from the update before.
          params: the parameters. Optional if no link reads them.
          **extra: `value`, the loss, for links that take it.

        The numbers are those of the state, except traced values that the optimizer was built with,
        which every update uses. Outside `jit`, this also applies to arrays in an optimizer that has
        not made a state, because `optax.inject_hyperparams` builds an optimizer for each update.
        """
        if self._held.from_arrays and not isinstance(state["step"], Tracer):
            state = self.chain.with_own_numbers(state)
        return self.chain.update(updates, state, params, **extra)

    def set(self, state: dict[str, Any], **values: Any) -> dict[str, Any]:
        """Return a state of `init` or `update` with other hyperparameters: `Chain.set`.

        The optimizer itself, and the state that it keeps for `minimize` and `apply`, do not
        change. To change those, assign to the optimizer's options.

        Args:
          state: a state of this optimizer.
          **values: number by name, or by `link/number` where several links have that name. None
            restores the value that the optimizer was built with, such as its schedule.

        Raises:
          ValueError: no link, or more than one, has such a number; or its rule does not hold.

        Example:
          >>> import optimize_loss as ol
          >>> opt = ol.optimizers.SGD(0.5)
          >>> state = opt.set(opt.init({"w": 1.0}), learning_rate=0.25)
          >>> updates, state = opt.update({"w": 1.0}, state)
          >>> print(updates["w"], opt.learning_rate)
          -0.25 0.5
        """
        return self.chain.set(state, **values)

    # The way of pytrees: the optimizer keeps the state, the caller the parameters.

    def apply(self, grads: Any, params: Any = None) -> Any:
        """Return the new parameters; the state stays in the optimizer.

        Args:
          grads: a tree like `params`; a parameter whose gradient is None does not change.
          params: a tree of arrays; or one of variables, which are updated in place. By default, the
            variables that the optimizer was built with.

        Returns:
          A tree like `params`; for variables, the number of updates made.

        Raises:
          TreeMismatch: the trees differ.
          ValueError: there is no gradient at all; or the parameters differ from those of earlier
            calls.
        """
        if params is None:
            params = list(self._held.names)
            if not params:
                raise ValueError(
                    "`params` must be given unless the optimizer was built with variables."
                )
        if any(map(is_variable, flatten(params, is_variable)[0])):
            return self.apply_gradients(paired(grads, params))
        return self._apply_tree(grads, params, aggregates=True)

    def _apply_tree(self, grads: Any, params: Any, aggregates: bool) -> Any:
        """Return the new parameters, a tree like the old ones; integers stay as they are."""
        known = without_strangers(grads, params)
        taken = take_apart(known)
        same_leaves("grads", grads, "params", taken.tree)
        pairs = zip(taken.check_updates(grads), taken.leaves, strict=True)
        summed = self.aggregate_gradients(pairs) if aggregates else pairs
        named = dict(zip(taken.names, summed, strict=True))
        trained = {name: pair for name, pair in named.items() if is_inexact(pair[1])}
        new = self._apply_named(trained)
        result = taken.unflatten([new.get(name, p) for name, (_, p) in named.items()])
        return result if known is params else with_strangers(result, params)

    def _apply_named(self, pairs: Mapping[str, tuple[Any, jax.Array]]) -> dict[str, jax.Array]:
        """Return the new parameters by name, from gradients and parameters, whose caller keeps."""
        grads = {name: g for name, (g, _) in pairs.items()}
        params = {name: p for name, (_, p) in pairs.items()}
        check_trace(self, [*grads.values(), *params.values()])
        with undone_if_it_fails(self):
            if not self.built:
                self.build([Variable(p, name) for name, p in params.items()])
                self._hold()
                self._held.names = {}  # the caller keeps the values
            new, state = self._hold().after(grads, params, self.jit_compile)
        self._hold().keep(state)
        return new

    # The imperative way: variables are updated in place.

    def minimize(
        self,
        loss: Callable[[], Any],
        var_list: Sequence[Variable] | Callable[[], Sequence[Variable]],
        tape: None = None,
    ) -> None:
        """Update variables in place, one step down the gradient of `loss`.

        Args:
          loss: a function without arguments of the variables' values. For a loss that is not a
            scalar, the gradient of its sum is used, as in TensorFlow.
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

        Integer variables have none.

        They are multiplied by the loss scale, if there is one, as `apply_gradients` expects.

        Args:
          loss: as for `minimize`.
          var_list: as for `minimize`.
          tape: None.

        Raises:
          InvalidType: `loss` is not a function, or `tape` is not None.
        """
        if tape is not None or not callable(loss):
            raise InvalidType(
                "`loss` must be a function without arguments, as JAX takes gradients of functions "
                "and has no tape: `optimizer.minimize(lambda: 3 * v * v, [v])`. "
                f"Received: loss={loss!r}, tape={tape!r}."
            )
        if callable(var_list):
            loss()  # the first call may make the variables
            var_list = var_list()
        return gradients_of(loss, check_variables(var_list), self._loss_scale())

    def apply_gradients(
        self,
        grads_and_vars: Iterable[tuple[Any, Any]],
        name: str | None = None,
        skip_gradients_aggregation: bool = False,
        experimental_aggregate_gradients: bool = True,
    ) -> Any:
        """Update variables in place.

        In this order: sum over devices, divide by the loss scale, accumulate, clip, decay, apply
        the rule, average, count; then the variables' constraints. A variable whose gradient is None
        does not change, and there is a warning.

        Args:
          grads_and_vars: pairs of a gradient and a variable. If they hold arrays in place of
            variables, the new arrays are returned.
          name: ignored; in TensorFlow a name scope.
          skip_gradients_aggregation: whether to skip `aggregate_gradients`.
          experimental_aggregate_gradients: the older, inverse form of the same option.

        Returns:
          The number of updates made, a `Variable`; or a list of arrays.

        Raises:
          InvalidType: there are no such pairs.
          ValueError: there is no gradient at all, or a variable is not one of those that the
            optimizer was built with.
        """
        pairs = check_pairs(grads_and_vars)
        aggregates = experimental_aggregate_gradients and not skip_gradients_aggregation
        if not pairs:
            return self.iterations
        if not any(isinstance(v, Variable) for _, v in pairs):
            return self._apply_tree([g for g, _ in pairs], [p for _, p in pairs], aggregates)
        apply_in_place(self, pairs, aggregates)
        return self.iterations

    def aggregate_gradients(
        self, grads_and_vars: Iterable[tuple[Any, Any]]
    ) -> list[tuple[Any, Any]]:
        """Return the pairs with the gradients summed over the devices along `axis_name`, if any.

        `minimize`, `apply_gradients` and `apply` call this. `update` and `optimize_loss` do not:
        they have a link in its place.

        Args:
          grads_and_vars: pairs of a gradient, or None, and a variable.
        """
        pairs = list(grads_and_vars)
        if self.axis_name is None:
            return pairs
        return [(None if g is None else summed(g, self.axis_name), v) for g, v in pairs]

    def finalize_variable_values(self, var_list: Any) -> Any:
        """Replace the parameters by the averages that the optimizer keeps, if any.

        Args:
          var_list: variables, which are assigned to; or a tree of arrays.

        Returns:
          None for variables; else the tree of averages.

        Raises:
          ValueError: the optimizer is not built.
        """
        leaves = jax.tree.leaves(var_list, is_leaf=is_variable)
        boxes = self._require_built("finalize_variable_values")
        if any(map(is_variable, leaves)):
            named = {self._held.name_of(v): v for v in check_variables(leaves)}
            averages = boxes.averaged(self._held.values())
            for name, v in named.items():
                v.assign(averages[name])
            return None
        taken = take_apart(var_list)
        named = dict(zip(taken.names, taken.leaves, strict=True))
        values = {name: p for name, p in named.items() if is_inexact(p)}
        boxes.check_names(values)
        return taken.unflatten([*{**named, **boxes.averaged(values)}.values()])

    # Building.

    @property
    def built(self) -> bool:
        """Whether the variables that are trained are known."""
        return self._held.built

    @built.setter
    def built(self, value: bool) -> None:
        """Let a `build` for Keras say so; only the one here makes it true."""

    def build(self, var_list: Sequence[Variable]) -> None:
        """Make the optimizer's variables. Subclasses with an `update_step` extend it.

        Such a subclass calls `super().build(var_list)` first, then `add_variable` or
        `add_variable_from_reference`. Building a second time does nothing.

        Args:
          var_list: the variables to be trained.
        """
        variables = check_variables(var_list)
        check_trace(self, [v.value for v in variables])
        self._held.know(variables)
        self._chain_changed()  # variables that are not decayed have their names now

    def _hold(self) -> Boxes:
        """Return the state in boxes, made when it is first needed."""
        if self._held.boxes is None:
            is_custom = isinstance(dict(self._summed_chain.links).get("update_step"), UpdateStep)
            prefix = "update_step/" if is_custom else ""
            boxes = {f"{prefix}{name}": box for name, box in tracked(self).items()}
            boxes |= {**self._rates(), "step": self._held.iterations}
            params = self._held.values()
            self._held.boxes = Boxes(self._summed_chain, params, boxes, self.mesh)
        return self._held.boxes

    def _require_built(self, method: str) -> Boxes:
        if not self.built:
            raise ValueError(
                f"`{method}` needs the optimizer's variables: call `build(var_list)` first, or "
                "apply gradients."
            )
        return self._hold()

    def _var_key(self, variable: Variable) -> str:
        """Return what tells one variable from all others."""
        return variable._unique_id

    @property
    def _index_dict(self) -> dict[str, int]:
        """The places of the variables that the optimizer was built with, by their keys."""
        return {self._var_key(v): i for i, v in enumerate(self._held.names)}

    def _get_variable_index(self, variable: Variable) -> int:
        """Return the place of a variable in the list that the optimizer was built with."""
        return list(self._held.names.values()).index(self._held.name_of(variable))

    # Variables.

    @property
    def iterations(self) -> Variable:
        """The number of updates made, an int32; can be set until the optimizer is built."""
        return self._held.iterations

    @iterations.setter
    def iterations(self, value: Any) -> None:
        if self.built:
            raise RuntimeError(
                "`iterations` must be set before the optimizer is built; afterwards use "
                f"`optimizer.iterations.assign(...)`. {received('iterations', value)}"
            )
        self._held.iterations.assign(check_integer("iterations", value_of(value), STEP))

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

    @property
    def variables(self) -> VariableList:
        """The optimizer's variables, the counter first; hyperparameters are not among them."""
        known = self._hold().variables.values() if self.built else [self._held.iterations]
        return VariableList(known)

    def add_variable(
        self,
        shape: Sequence[int] = (),
        dtype: DTypeLike | None = None,
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
        return add_variable(self, shape, dtype, initializer, name)

    def add_variable_from_reference(
        self,
        model_variable: Variable,
        variable_name: str,
        shape: Sequence[int] | None = None,
        initial_value: ArrayLike | Variable | None = None,
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
        return add_variable_like(self, model_variable, variable_name, shape, initial_value)

    def assign(self, variable: Variable, value: Any) -> None:
        """Assign to a variable, as `update_step` for Keras 3 does; `variable.assign(value)`."""
        variable.assign(value)

    def assign_add(self, variable: Variable, value: Any) -> None:
        """Add to a variable: `variable.assign_add(value)`."""
        variable.assign_add(value)

    def assign_sub(self, variable: Variable, value: Any) -> None:
        """Subtract from a variable: `variable.assign_sub(value)`."""
        variable.assign_sub(value)

    def set_weights(self, weights: Sequence[ArrayLike | Variable]) -> None:
        """Assign to all variables, in the order of `variables`; if that fails, to none.

        Args:
          weights: arrays, as many as there are variables.

        Raises:
          ValueError: the optimizer is not built, or the number of weights differs.
          TreeMismatch: a shape differs.
        """
        self._require_built("set_weights").set(list(weights))

    def save_own_variables(self, store: MutableMapping[str, Any]) -> None:
        """Write the variables by name, without hyperparameters.

        Args:
          store: a mapping that can be written to, such as a dict or an h5py group.

        Raises:
          ValueError: the optimizer is not built.
        """
        self._require_built("save_own_variables").save(store)

    def load_own_variables(self, store: Mapping[str, Any]) -> None:
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
        """Exclude variables from weight decay; each call replaces the last one.

        Args:
          var_list: variables.
          var_names: regular expressions that are searched for in the names, such as `bias`. An
            expression that matches no name is a `ValueError` at the first update. A `:0`, as at the
            end of TensorFlow's names, is ignored.

        Raises:
          ValueError: the optimizer is built.
        """
        if self.built:
            raise ValueError(
                "`exclude_from_weight_decay` must be called before the optimizer is built."
            )
        self._held.excluded = excluded(var_list, var_names)
        self._chain_changed()
