"""A regression to train models with."""

import jax
import jax.numpy as jnp

from optimize_loss import optimizers as optim


def regression():
    """Return 64 points of a smooth function of three variables."""
    x = jax.random.normal(jax.random.key(0), (64, 3))
    return x, jnp.sin(x @ jnp.array([[1.0], [-1.0], [0.5]]))


def mse(prediction, y):
    return jnp.mean((prediction - y) ** 2)


def as_keras_needs_it():
    """Keras adds a bias to a batch, which is of another rank."""
    return jax.numpy_rank_promotion("allow")


class Momentum(optim.Optimizer):
    """A rule of a user's own, written as for Keras."""

    def __init__(self, learning_rate=0.01, name="Momentum", **kwargs):
        super().__init__(name=name, **kwargs)
        self._learning_rate = self._build_learning_rate(learning_rate)

    def build(self, var_list):
        super().build(var_list)
        self.momenta = [self.add_variable_from_reference(v, "momentum") for v in var_list]

    def update_step(self, gradient, variable):
        momentum = self.momenta[self._get_variable_index(variable)]
        momentum.assign(0.9 * momentum.value - self.learning_rate * gradient)
        variable.assign_add(momentum)

    def get_config(self):
        return {**super().get_config(), "learning_rate": self.rate}


ADAM, SGD = optim.Adam(0.01, epsilon=1e-30), optim.SGD(0.1)
