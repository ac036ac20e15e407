"""Take one step with the package that is installed, as the wheel's check does."""

import jax.numpy as jnp

import optimize_loss as ol

step = ol.optimize_loss(lambda p, x: jnp.sum((p - x) ** 2), learning_rate=0.25, optimizer="SGD")
state, metrics = step(step.init(jnp.zeros(2)), jnp.ones(2))
assert metrics["loss"] == 2.0
assert state.params.tolist() == [0.5, 0.5]
print(ol.__version__, ol.__file__)
