"""Train Keras 3 models, on Keras' JAX backend, with the optimizers of this package.

    from optimize_loss.keras import KerasOptimizer

It needs Keras, the extra `keras`, and `KERAS_BACKEND=jax` in the environment before Keras is first
imported.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from optimize_loss._checks import NOT_NEGATIVE, InvalidType, Rule, received
from optimize_loss._engine.kinds import Averaging
from optimize_loss._engine.trees import distinct
from optimize_loss._names import leaf_names
from optimize_loss.optimizers import Optimizer, serialize
from optimize_loss.optimizers._boxes import links_of
from optimize_loss.optimizers._declaration import plain
from optimize_loss.optimizers._keras_view import Shown, as_keras_3, inside, rates
from optimize_loss.optimizers._resolve import instance, resolve
from optimize_loss.optimizers._variable import different_names
from optimize_loss.transforms import Chain, chain

try:
    import keras
except ImportError as error:
    raise ImportError(
        "optimize_loss.keras needs Keras with JAX as its backend. Install it with: "
        "pip install keras, and set KERAS_BACKEND=jax in the environment before "
        f"Keras is imported. ({error})"
    ) from error


@keras.saving.register_keras_serializable("optimize_loss")
class KerasOptimizer(Shown, keras.optimizers.Optimizer):
    """Train a Keras model with any optimizer of this package, or of optax.

    Call `model.compile(optimizer=KerasOptimizer(...))`, then `fit` as usual. Parameters have their
    Keras names, `variable.path`, such as `sequential/dense/kernel`. The state is in Keras
    variables, so it is saved and loaded with the weights. You and callbacks can set `learning_rate`
    at any time, even if it is a schedule; nothing is traced again. With a `MultiOptimizer`, or a
    chain in which several links have a rate, each of `optimizers` has its own rate, which callbacks
    can set. The rate of an optax transformation can be set once it is built, if it is a number in
    `optax.inject_hyperparams`. At the end of `fit`, the model has the averages of the optimizer, if
    it keeps any.

    The options of the optimizer, such as `use_ema`, `clipnorm` and `beta_1`, are attributes, as in
    Keras, and can be set until it is built. With `use_ema`, the average starts at the parameters
    after the first update, as in Keras 3; elsewhere in this package it starts at the initial
    parameters, as in Keras 2.15. An `AverageParams` in a chain is not changed.

    A saved model includes the optimizer's configuration, if it has one: a name, or an `Optimizer`
    without functions in it. Import this module before you load the model. With a chain or an optax
    transformation, load it with `compile=False`.

    Args:
      optimizer: as for `optimize_loss`.
      learning_rate: as for `optimize_loss`; None if `optimizer` brings its own.
      name: as for every Keras optimizer.

    Raises:
      InvalidType: `optimizer` is not one of these.
      ValueError: there is no learning rate, or there are two; or Keras' backend is not JAX.

    Example:
      From w = 1, one step of gradient descent on (w - 3)² at a rate of 0.25:

      >>> import keras, numpy as np, optimize_loss as ol
      >>> from optimize_loss.keras import KerasOptimizer
      >>> layer = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")
      >>> model = keras.Sequential([keras.Input((1,)), layer])
      >>> model.compile(optimizer=KerasOptimizer(ol.optimizers.SGD(0.25)), loss="mse")
      >>> history = model.fit(np.ones((1, 1)), np.full((1, 1), 3.0), verbose=0)
      >>> print(layer.kernel.value, model.optimizer.iterations.value)
      [[2.]] 1
    """

    optimizer: Any
    _given: Any
    _injected: dict[str, float]

    def __init__(self, optimizer: Any, learning_rate: Any = None, name: str | None = None):
        if keras.backend.backend() != "jax":
            raise ValueError(
                "Keras must have JAX as its backend: set KERAS_BACKEND=jax in the environment "
                f"before Keras is imported. Received: {keras.backend.backend()!r}."
            )
        # Past Keras' tracking of attributes: it takes tuples apart, and chains are tuples.
        own = self.__dict__
        own.update(optimizer=optimizer, _given=learning_rate, _injected={})
        own["_made"] = instance(optimizer, learning_rate)
        own["_chain"] = links = self._links()
        own["_rates"] = rates(self._made, links)
        first = {names[0]: self._first_rate(names[0]) for names in self._rates if names}
        rate: Any = float(first.popitem()[1]) if len(first) == len(self._rates) == 1 else _no_rate
        super().__init__(learning_rate=rate, name=name)
        made = {n: self._add(f"{n}/learning_rate", value) for n, value in first.items()}
        own["_rate_boxes"] = {
            link: made.get(names[0], self._learning_rate) for names in self._rates for link in names
        }
        own["_complete"] = True

    def _links(self) -> Chain:
        given = self._given if self._made is self.optimizer else None
        links = resolve(self._made, given)
        return chain(**(as_keras_3(links) if isinstance(self._made, Optimizer) else links))

    def build(self, variables: list[keras.Variable]) -> None:
        """Make the variables of the state, in an order that does not depend on names."""
        if self.built:
            return
        links = self._links()
        names = different_names(v.path for v in variables)
        params = {name: v.value for name, v in zip(names, variables, strict=True)}
        # `fit` gives all memory away, and a state of optax may hold the parameters themselves.
        _, state = distinct((params, links.init(params)))
        if "_scale" in self.__dict__ and links.loss_scale(state) is not None:
            raise ValueError(
                "The loss must be scaled once: leave the scale out of `optimizer`, or compile with "
                "`auto_scale_loss=False`."
            )
        with self._as_keras_needs_it():
            super().build(variables)
        self.__dict__.update(_chain=links, _names=names)
        self._make_boxes(state)

    def _make_boxes(self, state: Mapping[str, Any]) -> None:
        """Make a variable for each array of the state, but for those that Keras has made."""
        leaves, self._structure = jax.tree.flatten(state)
        named = dict(zip(leaf_names(state), leaves, strict=True))
        rates = {f"{link}/learning_rate": box for link, box in self._rate_boxes.items()}
        boxes: dict[str, Any] = {"step": self._iterations}
        boxes |= {n: box for n, box in rates.items() if box is self._learning_rate}
        for name in _ordered(list(named), self._names):
            if name not in boxes:
                is_rate = name in rates
                boxes[name] = (
                    self._put_last(rates[name]) if is_rate else self._add(name, named[name])
                )
        self._boxes = [(boxes[name], x.dtype) for name, x in named.items()]
        self.__dict__["_named_boxes"] = boxes
        if not self._rates:
            self._take_injected_rate(named)

    def _put_last(self, box: keras.Variable) -> keras.Variable:
        """Return one of several rates, which takes its place among the other variables."""
        self._untrack_variable(box)
        self._track_variable(box)
        return box

    def _take_injected_rate(self, state: Mapping[str, jax.Array]) -> None:
        """Let the rate of `optax.inject_hyperparams`, if it is a number, be the learning rate."""
        ending = "hyperparams/learning_rate"
        found = [name for name in state if name.endswith(ending)]
        scheduled = [n.replace(ending, "hyperparams_states/learning_rate") for n in found]
        if len(found) == 1 and not any(n.startswith(scheduled[0]) for n in state):
            own = self.__dict__
            own.update(_rates=[found], _injected={n: float(state[n]) for n in found})
            own["_rate_boxes"] = {n: self._named_boxes[n] for n in found}

    def _rate_of(self, link: str) -> tuple[Any, Rule]:
        if link in self._injected:
            return self._injected[link], NOT_NEGATIVE
        return super()._rate_of(link)

    def _add(self, name: str, value: jax.Array) -> keras.Variable:
        on_mesh = isinstance(value.sharding, jax.sharding.NamedSharding)
        initial: Any = value
        return self.add_variable(
            value.shape,
            initial,
            value.dtype.name,
            layout=value.sharding if on_mesh else None,
            name=name.replace("/", "_"),
        )

    def _params(self) -> dict[str, jax.Array]:
        return {name: v.value for name, v in self._named().items()}

    def _state(self) -> dict[str, Any]:
        return jax.tree.unflatten(self._structure, [box.value.astype(d) for box, d in self._boxes])

    def apply(
        self, grads: list[Any], trainable_variables: list[keras.Variable] | None = None
    ) -> None:
        """Update variables, as every Keras optimizer does."""
        with self._as_keras_needs_it():
            super().apply(grads, trainable_variables)

    def _backend_apply_gradients(
        self, grads: list[jax.Array], trainable_variables: list[keras.Variable]
    ) -> None:
        found = {id(v): g for g, v in zip(grads, trainable_variables, strict=True)}
        given = {name: found.get(id(v)) for name, v in self._named().items()}
        new, state = self._chain.apply(given, self._state(), self._params())
        for name, v in self._named().items():
            v.assign(new[name])
        for (box, _), x in zip(self._boxes, jax.tree.leaves(state), strict=True):
            box.assign(x)
        self._iterations.assign_sub(1)  # the chain has counted, and `apply` is about to

    def scale_loss(self, loss: Any) -> Any:
        """Return the loss, a number or an array, multiplied by the loss scale, if there is one."""
        if self.__dict__.get("_scale") is not None:
            return super().scale_loss(loss)
        state = self._state() if self.built else self._chain.init({})
        scale = self._chain.loss_scale(state)
        if scale is None:
            return loss
        loss = jnp.asarray(loss)
        dtype = loss.dtype if jnp.issubdtype(loss.dtype, jnp.floating) else scale.dtype
        return loss.astype(dtype) * scale.astype(dtype)

    def finalize_variable_values(self, var_list: Iterable[keras.Variable]) -> None:
        """Replace the parameters by the averages that the optimizer keeps, if any."""
        if not any(isinstance(link, Averaging) for link in links_of(self._chain).values()):
            return
        averages = self._chain.averaged(self._state(), self._params())
        wanted = {id(v) for v in var_list}
        for name, v in self._named().items():
            if id(v) in wanted:
                v.assign(jnp.copy(averages[name]))  # as `fit` donates both

    def exclude_from_weight_decay(
        self,
        var_list: Iterable[keras.Variable] | None = None,
        var_names: Iterable[str] | None = None,
    ) -> None:
        """Exclude variables from weight decay, like the method of an `Optimizer`."""
        if self.built:
            raise ValueError(
                "`exclude_from_weight_decay` must be called before the optimizer is built."
            )
        if not isinstance(self._made, Optimizer):
            raise ValueError(
                "`optimizer` must be an `Optimizer`; in a chain, give `exclude` to the link that "
                f"decays. {received('optimizer', self._made)}"
            )
        paths = [re.compile(f"^{re.escape(v.path)}$") for v in var_list or ()]
        inside(self._made).exclude_from_weight_decay(var_names=[*paths, *(var_names or ())])

    def get_config(self) -> dict[str, Any]:
        """Return the arguments of the optimizer, with its original learning rate."""
        try:
            made = {"optimizer": serialize(self.optimizer), "learning_rate": serialize(self._given)}
        except InvalidType as error:
            made = {"unknown": str(error)}  # so that the weights, at least, can be saved
        return {**made, "name": self.name}

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], custom_objects: Mapping[str, type] | None = None
    ) -> "KerasOptimizer":
        """Return an optimizer with this configuration."""
        if "unknown" in config:
            raise ValueError(
                "The optimizer was saved without a configuration: load the model with "
                f"`compile=False`, and compile it with the same optimizer. {config['unknown']}"
            )
        optimizer, known = config["optimizer"], dict(custom_objects or {})
        if isinstance(optimizer, Mapping):  # of a class that `load_model` was given
            name = optimizer["class_name"]
            found = keras.saving.get_registered_object(name, known)
            known |= {} if found is None else {name: found}
        return cls(plain(optimizer, known), plain(config["learning_rate"], known), config["name"])


def _ordered(arrays: list[str], params: list[str]) -> list[str]:
    """Return the names of arrays of the state by slot, and for each slot by parameter.

    Keras saves variables by their order, and may name layers otherwise in another process: what
    parameters are called must not matter.
    """
    numbers = {name: f"{i:09}" for i, name in enumerate(params)}
    longest_first = map(re.escape, sorted(numbers, key=len, reverse=True))
    pattern = re.compile(rf"(?<![^/])({'|'.join(longest_first)})(?![^/_])")
    return sorted(arrays, key=lambda name: pattern.sub(lambda m: numbers.get(m[0], ""), name))


def _no_rate() -> None:
    """Stand for a learning rate: for a function, Keras makes no variable."""
