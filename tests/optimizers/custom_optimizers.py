"""Optimizers as users write them for Keras, with only the imports changed."""

import jax
import jax.numpy as jnp

from optimize_loss import Variable
from optimize_loss import optimizers as keras_optimizers


class MomentumSGD(keras_optimizers.Optimizer):
    """The documentation's own example of a custom optimizer: slots in a list, `_index_dict`."""

    def __init__(self, learning_rate=0.01, momentum=0.9, name="MomentumSGD", **kwargs):
        super().__init__(name=name, **kwargs)
        self._learning_rate = self._build_learning_rate(learning_rate)
        self.momentum = momentum

    def build(self, var_list):
        super().build(var_list)
        self.momentums = []
        for var in var_list:
            self.momentums.append(
                self.add_variable_from_reference(model_variable=var, variable_name="m")
            )

    def update_step(self, gradient, variable):
        lr = jnp.asarray(self.learning_rate, variable.dtype)
        m = self.momentums[self._index_dict[self._var_key(variable)]]
        m.assign(-gradient * lr + m * self.momentum)
        variable.assign_add(m)

    def get_config(self):
        config = super().get_config()
        config.update(
            {
                "learning_rate": self._serialize_hyperparameter(self._learning_rate),
                "momentum": self.momentum,
            }
        )
        return config


class GuardedAdam(keras_optimizers.Optimizer):
    """Keras 2.15's own Adam: the guard `_built`, and bias correction by `iterations`."""

    def __init__(
        self, learning_rate=0.001, beta_1=0.9, beta_2=0.999, epsilon=1e-7, name="Adam", **kwargs
    ):
        super().__init__(name=name, **kwargs)
        self._learning_rate = self._build_learning_rate(learning_rate)
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        self.epsilon = epsilon

    def build(self, var_list):
        super().build(var_list)
        if hasattr(self, "_built") and self._built:
            return
        self._built = True
        self._momentums = []
        self._velocities = []
        for var in var_list:
            self._momentums.append(
                self.add_variable_from_reference(model_variable=var, variable_name="m")
            )
            self._velocities.append(
                self.add_variable_from_reference(model_variable=var, variable_name="v")
            )

    def update_step(self, gradient, variable):
        lr = jnp.asarray(self.learning_rate, variable.dtype)
        local_step = jnp.asarray(self.iterations + 1, variable.dtype)
        beta_1_power = jnp.power(jnp.asarray(self.beta_1, variable.dtype), local_step)
        beta_2_power = jnp.power(jnp.asarray(self.beta_2, variable.dtype), local_step)
        var_key = self._var_key(variable)
        m = self._momentums[self._index_dict[var_key]]
        v = self._velocities[self._index_dict[var_key]]
        alpha = lr * jnp.sqrt(1 - beta_2_power) / (1 - beta_1_power)
        m.assign_add((gradient - m) * (1 - self.beta_1))
        v.assign_add((jnp.square(gradient) - v) * (1 - self.beta_2))
        variable.assign_sub((m * alpha) / (jnp.sqrt(v) + self.epsilon))

    def get_config(self):
        config = super().get_config()
        config.update(
            {
                "learning_rate": self._serialize_hyperparameter(self._learning_rate),
                "beta_1": self.beta_1,
                "beta_2": self.beta_2,
                "epsilon": self.epsilon,
            }
        )
        return config


class DecayingMomentum(keras_optimizers.Optimizer):
    """A product over the steps that is a mere attribute, as Keras' Nadam has it."""

    def __init__(self, learning_rate=0.01, beta=0.9, name="DecayingMomentum", **kwargs):
        super().__init__(name=name, **kwargs)
        self._learning_rate = self._build_learning_rate(learning_rate)
        self.beta = beta

    def build(self, var_list):
        super().build(var_list)
        if getattr(self, "_built", False):
            return
        self._built = True
        self._u_product = Variable(1.0, dtype=var_list[0].dtype)
        self._momentums = [Variable(jnp.zeros_like(v)) for v in var_list]

    def update_step(self, gradient, variable):
        lr = jnp.asarray(self.learning_rate, variable.dtype)
        index = self._index_dict[self._var_key(variable)]
        if index == 0:  # once a step
            self._u_product.assign(self._u_product * self.beta)
        m = self._momentums[index]
        m.assign(self._u_product * m + gradient)
        variable.assign_sub(lr * m)

    def get_config(self):
        config = super().get_config()
        rate = self._serialize_hyperparameter(self._learning_rate)
        config.update({"learning_rate": rate, "beta": self.beta})
        return config


class GlobalAdagrad(keras_optimizers.Optimizer):
    """One number for all variables, by `add_variable`; counts its own steps too."""

    def __init__(self, learning_rate=0.1, name="GlobalAdagrad", **kwargs):
        super().__init__(name=name, **kwargs)
        self._learning_rate = self._build_learning_rate(learning_rate)

    def build(self, var_list):
        super().build(var_list)
        self.total = self.add_variable(shape=[], name="total", initializer="ones")
        self.calls = self.add_variable(shape=(1,), dtype="int32", name="calls")

    def update_step(self, gradient, variable):
        self.total.assign_add(jnp.sum(jnp.square(gradient)).astype(self.total.dtype))
        self.calls.assign_add([1])
        lr = jnp.asarray(self.learning_rate, variable.dtype)
        variable.assign_sub(lr * gradient / jnp.sqrt(self.total.value).astype(variable.dtype))

    def get_config(self):
        config = super().get_config()
        config["learning_rate"] = self._serialize_hyperparameter(self._learning_rate)
        return config


class RMSInDict(keras_optimizers.Optimizer):
    """Slots in a dict by `_var_key`, some made with `Variable` alone; hyperparameters too."""

    def __init__(self, learning_rate=0.01, rho=0.9, name="RMSInDict", **kwargs):
        super().__init__(name=name, **kwargs)
        self._learning_rate = self._build_learning_rate(learning_rate)
        self.rho = Variable(rho, name="rho")
        self.slots = {}

    def build(self, var_list):
        super().build(var_list)
        for var in var_list:
            self.slots[self._var_key(var)] = {
                "square": self.add_variable_from_reference(var, "square"),
                "last": Variable(jnp.zeros_like(var)),
            }

    def update_step(self, gradient, variable):
        slots = self.slots[self._var_key(variable)]
        rho = jnp.asarray(self.rho, variable.dtype)
        slots["square"].assign(rho * slots["square"] + (1 - rho) * jnp.square(gradient))
        lr = jnp.asarray(self.learning_rate, variable.dtype)
        step = gradient / (jnp.sqrt(slots["square"]) + 1e-3)
        variable.assign_sub(lr * (step + 0.5 * slots["last"]))
        slots["last"].assign(step)

    def get_config(self):
        config = super().get_config()
        rate = self._serialize_hyperparameter(self._learning_rate)
        config.update({"learning_rate": rate, "rho": float(self.rho)})
        return config


class Anchored(keras_optimizers.Optimizer):
    """Slots with an `initial_value`: where a variable began, and sums that begin at a number."""

    def __init__(self, learning_rate=0.1, pull=0.5, start=0.1, name="Anchored", **kwargs):
        super().__init__(name=name, **kwargs)
        self._learning_rate = self._build_learning_rate(learning_rate)
        self.pull = pull
        self.start = start

    def build(self, var_list):
        super().build(var_list)
        self._anchors, self._sums = [], []
        for var in var_list:
            full = jnp.full(var.shape, self.start, var.dtype)
            self._anchors.append(self.add_variable_from_reference(var, "anchor", initial_value=var))
            self._sums.append(self.add_variable_from_reference(var, "sum", initial_value=full))

    def update_step(self, gradient, variable):
        index = self._index_dict[self._var_key(variable)]
        gradient = gradient + self.pull * (variable - self._anchors[index])
        self._sums[index].assign_add(gradient**2)
        lr = jnp.asarray(self.learning_rate, variable.dtype)
        variable.assign_sub(lr * gradient * jax.lax.rsqrt(self._sums[index].value))

    def get_config(self):
        config = super().get_config()
        rate = self._serialize_hyperparameter(self._learning_rate)
        return {**config, "learning_rate": rate, "pull": self.pull, "start": self.start}


class Keras3RMS(keras_optimizers.Optimizer):
    """As one writes it for Keras 3."""

    def __init__(self, learning_rate=0.001, rho=0.9, epsilon=1e-3, name="rms", **kwargs):
        super().__init__(learning_rate=learning_rate, name=name, **kwargs)
        self.rho = rho
        self.epsilon = epsilon

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        self._velocities = []
        for variable in variables:
            self._velocities.append(self.add_variable_from_reference(variable, "velocity"))

    def update_step(self, gradient, variable, learning_rate):
        lr = jnp.asarray(learning_rate, variable.dtype)
        gradient = jnp.asarray(gradient, variable.dtype)
        velocity = self._velocities[self._get_variable_index(variable)]
        self.assign(velocity, self.rho * velocity + (1 - self.rho) * jnp.square(gradient))
        self.assign_sub(variable, lr * gradient / jnp.sqrt(velocity + self.epsilon))

    def get_config(self):
        config = super().get_config()
        config.update({"rho": self.rho, "epsilon": self.epsilon})
        return config


class WarmSGD(keras_optimizers.SGD):
    """A built-in class with a constructor of its own: momentum from a half-life."""

    def __init__(self, learning_rate=0.1, half_life=1.0, **kwargs):
        super().__init__(learning_rate=learning_rate, momentum=0.5 ** (1 / half_life), **kwargs)
        self.half_life = half_life

    def get_config(self):
        config = {**super().get_config(), "half_life": self.half_life}
        config.pop("momentum")
        return config


class SignSGD(keras_optimizers.Optimizer):
    """No slots, no `get_config`; options that are attributes of the same name."""

    def __init__(self, learning_rate=0.01, threshold=0.1, name="SignSGD", **kwargs):
        super().__init__(name=name, **kwargs)
        self._learning_rate = self._build_learning_rate(learning_rate)
        self._threshold = threshold

    def build(self, var_list):
        super().build(var_list)

    def update_step(self, gradient, variable):
        lr = jnp.asarray(self.learning_rate, variable.dtype)
        large = jnp.abs(gradient) > self._threshold
        variable.assign_sub(jnp.where(large, lr * jnp.sign(gradient), 0.0))


OPTIONS = {
    MomentumSGD: {"learning_rate": 0.1, "momentum": 0.75},
    GuardedAdam: {"learning_rate": 0.1, "beta_1": 0.5, "beta_2": 0.75, "epsilon": 1e-3},
    DecayingMomentum: {"learning_rate": 0.1, "beta": 0.5},
    GlobalAdagrad: {"learning_rate": 0.5},
    RMSInDict: {"learning_rate": 0.1, "rho": 0.5},
    Anchored: {"learning_rate": 0.25, "pull": 0.25, "start": 0.5},
    Keras3RMS: {"learning_rate": 0.1, "rho": 0.5},
    WarmSGD: {"learning_rate": 0.1, "half_life": 2.0},
    SignSGD: {"learning_rate": 0.1, "threshold": 0.5},
}
"""Every class, with options other than its defaults."""
