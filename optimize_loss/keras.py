"""Train Keras 3 models, on Keras' JAX backend, with the optimizers of this package.

    from optimize_loss.keras import KerasOptimizer

It needs Keras, `pip install 'optimize_loss[keras]'`, and `KERAS_BACKEND=jax` in the environment
before Keras is first imported.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from optimize_loss._checks import InvalidType, Rule
from optimize_loss._names import leaf_names
from optimize_loss.optimizers import serialize
from optimize_loss.optimizers._config import plain
from optimize_loss.optimizers._resolve import resolve
from optimize_loss.optimizers._variable import different_names
from optimize_loss.transforms import Chain, Link, chain
from optimize_loss.transforms._numbers import at_step, replaced, to_array
from optimize_loss.transforms._params import distinct

try:
    import keras
except ImportError as error:
    raise ImportError(
        "optimize_loss.keras needs Keras with JAX as its backend. Install it with: "
        "pip install 'optimize_loss[keras]', and set KERAS_BACKEND=jax in the environment before "
        f"Keras is imported. ({error})"
    ) from error


@keras.saving.register_keras_serializable("optimize_loss")
class KerasOptimizer(keras.optimizers.Optimizer):
    """Train a Keras model with any optimizer of this package, or of optax.

    `model.compile(optimizer=KerasOptimizer(...))`, then `fit` as ever. Parameters have the names
    that Keras has for them, `variable.path`, such as `sequential/dense/kernel`. The state is in
    Keras variables, so that weights are saved and loaded with it. `learning_rate` can be set at
    any time, by callbacks too, over a schedule or not; nothing is traced anew. At the end of `fit`
    the model has the averages that the optimizer keeps, if any.

    A whole model is saved with the optimizer's configuration, if it has one: an `Optimizer`
    without functions in it, or a name. Import this module before you load it. With a chain or an
    optax transformation, load it with `compile=False`.

    Args:
      optimizer: what `optimize_loss` takes.
      learning_rate: as for `optimize_loss`; None if `optimizer` brings its own.
      name: as for every Keras optimizer.

    Raises:
      InvalidType: `optimizer` is none of these.
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
    _chain: Chain
    _names: list[str]

    def __init__(self, optimizer: Any, learning_rate: Any = None, name: str | None = None):
        if keras.backend.backend() != "jax":
            raise ValueError(
                "Keras must have JAX as its backend: set KERAS_BACKEND=jax in the environment "
                f"before Keras is imported. Received: {keras.backend.backend()!r}."
            )
        links = chain(**resolve(optimizer, learning_rate))
        # Past Keras' tracking of attributes: it takes tuples apart, and chains are tuples.
        self.__dict__.update(optimizer=optimizer, _given=learning_rate, _chain=links)
        try:
            _, field, rule = self._rate()
            rate: Any = float(to_array("learning_rate", field, rule, jnp.float32))
        except AttributeError:
            rate = _no_rate
        super().__init__(learning_rate=rate, name=name)
        self.loss_scale_factor = 1.0  # Keras' own LossScaleOptimizer takes it away

    def build(self, variables: list[keras.Variable]) -> None:
        """Make the variables of the state, in an order that does not depend on names."""
        if self.built:
            return
        links = chain(**resolve(self.optimizer, self._given))
        names = different_names(v.path for v in variables)
        params = {name: v.value for name, v in zip(names, variables, strict=True)}
        # `fit` gives all memory away, and a state of optax may hold the parameters themselves.
        _, state = distinct((params, links.init(params)))
        if self.loss_scale_factor is None and links.loss_scale(state) is not None:
            raise ValueError(
                "The loss must be scaled once: leave the scale out of `optimizer`, or compile with "
                "`auto_scale_loss=False`."
            )
        super().build(variables)
        self.__dict__.update(_chain=links, _names=names)
        boxes: dict[str, Any] = {"step": self._iterations}
        if isinstance(self._learning_rate, keras.Variable):
            boxes[f"{self._rate()[0]}/learning_rate"] = self._learning_rate
        leaves, self._structure = jax.tree.flatten(state)
        named = dict(zip(leaf_names(state), leaves, strict=True))
        for name in _ordered([n for n in named if n not in boxes], names):
            boxes[name] = self._add(name, named[name])
        self._boxes = [(boxes[name], x.dtype) for name, x in named.items()]

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

    def _named(self) -> dict[str, keras.Variable]:
        return dict(zip(self._names, self._trainable_variables, strict=True))

    def _params(self) -> dict[str, jax.Array]:
        return {name: v.value for name, v in self._named().items()}

    def _state(self) -> dict[str, Any]:
        return jax.tree.unflatten(self._structure, [box.value.astype(d) for box, d in self._boxes])

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

    def scale_loss(self, loss: jax.Array) -> jax.Array:
        """Return the loss multiplied by the loss scale, if there is one."""
        scale = self._chain.loss_scale(self._state())
        return loss if scale is None else loss * scale.astype(loss.dtype)

    def finalize_variable_values(self, var_list: Iterable[keras.Variable]) -> None:
        """Put the averages that the optimizer keeps, if any, in the place of the parameters."""
        links = [self._chain.link(name) for name, _ in self._chain.links]
        if not any(isinstance(link, Link) and link.averages for link in links):
            return
        averages = self._chain.averaged(self._state(), self._params())
        wanted = {id(v) for v in var_list}
        for name, v in self._named().items():
            if id(v) in wanted:
                v.assign(jnp.copy(averages[name]))  # as `fit` donates both

    def _rate(self) -> tuple[str, Any, Rule]:
        """Return which link has the learning rate, what it was built with, and its rule."""
        links = {name: self._chain.link(name) for name, _ in self._chain.links}
        rates = {n: x.numbers() for n, x in links.items() if isinstance(x, Link)}
        owners = [name for name, numbers in rates.items() if "learning_rate" in numbers]
        if len(owners) != 1:
            raise AttributeError(f"One link must have a `learning_rate`. Links that do: {owners}.")
        (name,) = owners
        return name, rates[name]["learning_rate"], links[name].rule("learning_rate")

    @property
    def learning_rate(self) -> Any:
        """The rate of the next update: a variable, or what a schedule says."""
        _, field, rule = self._rate()
        if not callable(field):
            return self._learning_rate
        number, step = self._learning_rate.value, self._iterations.value
        return at_step("learning_rate", field, rule, number, step)

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        _, field, rule = self._rate()
        number = self._learning_rate.value
        self._learning_rate.assign(replaced("learning_rate", learning_rate, field, rule, number))

    def exclude_from_weight_decay(
        self,
        var_list: Iterable[keras.Variable] | None = None,
        var_names: Iterable[str] | None = None,
    ) -> None:
        """Leave variables out of weight decay, as the method of an `Optimizer` does."""
        if self.built:
            raise ValueError(
                "`exclude_from_weight_decay` must be called before the optimizer is built."
            )
        paths = [re.compile(f"^{re.escape(v.path)}$") for v in var_list or ()]
        self.optimizer.exclude_from_weight_decay(var_names=[*paths, *(var_names or ())])

    def get_config(self) -> dict[str, Any]:
        """Return what the optimizer was made of, with its learning rate as it was then."""
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
