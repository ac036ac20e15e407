"""A loss, and steps with links around the rule."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import optimize_loss as ol

T: Any = ol.transforms
W = {"w": np.float32(4)}


def assert_close(got, want, relative=1e-6):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        size = np.max(np.abs(np.asarray(b)), initial=0)
        np.testing.assert_allclose(a, b, rtol=relative, atol=relative * size)


def loss(params, x):
    return params["w"] * x


def build(function: Any = loss, **options: Any) -> Any:
    return ol.optimize_loss(function, **{"learning_rate": 1.0, "optimizer": "SGD", **options})


def weighing(weight, **options):
    return build(lambda p, x: (p["w"] * x, ol.Aux(weight=weight)), **options)


# Accumulation.


def squares(params, x, y, mask):
    """A mean over the rows that the mask leaves, and how many these are."""
    error = jnp.tanh(x @ params["kernel"] + params["bias"]) @ params["out"] - y
    weight = jnp.sum(mask)
    mean = jnp.sum(mask * jnp.sum(error * error, 1)) / jnp.maximum(weight, 1)
    return mean, ol.Aux(weight=weight)


def network_params():
    rng = np.random.default_rng(0)
    shapes = {"kernel": (3, 8), "bias": (1, 8), "out": (8, 2)}
    return {name: rng.normal(size=s).astype(np.float32) for name, s in shapes.items()}


def rows(updates, k, ragged):
    """Return k batches of 6 rows for each update; ragged, a random number of them counts."""
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(updates, k, 6, 3)), rng.normal(size=(updates, k, 6, 2))
    counts = rng.integers(0, 7, (updates, k, 1)) if ragged else np.full((updates, k, 1), 6)
    return [part.astype(np.float32) for part in (x, y, np.arange(6) < counts)]


# Loss scale.


def small(params, x):
    """A loss of float16 whose gradient, 2e-8, float16 does not have."""
    error = x * params["w"] - 2 * x
    return jnp.mean(error * error)
