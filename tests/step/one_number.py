"""One number, trained."""

import jax
import jax.numpy as jnp
import numpy as np

import optimize_loss as ol


def loss(params, x):
    return jnp.abs(params["w"] * x)


def train(steps=1, *, w=10.0, function=loss, **options):
    """Return w after each step, the metrics of each, and the last state."""
    options = {"learning_rate": 0.1, "optimizer": "SGD"} | options
    step = ol.optimize_loss(function, **options)
    state = step.init({"w": w})
    values, metrics = [], []
    for _ in range(steps):
        state, seen = step(state, 5.0)
        values.append(float(state.params["w"]))
        metrics.append(jax.tree.map(np.asarray, seen))
    return values, metrics, state
