"""A small model, steps of it in a file, and what a restored state must equal."""

from typing import Any

import jax
import jax.numpy as jnp

import optimize_loss
from optimize_loss import optimizers as optim
from optimize_loss._files.named import on_host
from tests.cases import random_like

# Untyped, since what some of these tests pass is wrong on purpose.
ol: Any = optimize_loss
T = optimize_loss.transforms
SHAPES = {"dense": {"bias": (2,), "kernel": (3, 2)}, "head": {"kernel": (2, 2)}}
X = random_like({"x": (50, 4, 3)}, 7)["x"]


def loss(params, x, *, key):
    hidden = jnp.tanh(x @ params["dense"]["kernel"] + params["dense"]["bias"][None])
    noise = 0.1 * jax.random.normal(key, hidden.shape)
    return jnp.mean((hidden + noise) @ params["head"]["kernel"] - 1.0) ** 2


def built(optimizer: Any = "Adam", function: Any = loss, **options: Any) -> Any:
    if isinstance(optimizer, str):
        options = {"learning_rate": 0.01, **options}
    return ol.optimize_loss(function, optimizer=optimizer, **options)


def params(seed=0, **more):
    return random_like({**SHAPES, **more}, seed)


def saved(step, path, steps=3, state=None):
    """Return the leaves by name after some steps, saved in a file."""
    state = step.init(params()) if state is None else state
    state, _ = step.many(state, X[:steps])
    ol.save(path, state)
    return on_host(state)


def assert_matched(state, report, wanted):
    got = on_host(state)
    for name in report.matched:
        assert got[name].tobytes() == wanted[name].tobytes(), name
        assert (got[name].dtype, got[name].shape) == (wanted[name].dtype, wanted[name].shape)


def assert_equal(one, other):
    ours, theirs = on_host(one), on_host(other)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert array.tobytes() == theirs[name].tobytes(), name


SGD, LION = optim.SGD(0.01), optim.Lion(0.001)


def links(**changed):
    made = {
        "clip": T.ClipByValue(1.0),
        "adam": T.ScaleByAdam(),
        "rate": T.ScaleByLearningRate(0.01),
    }
    return T.chain(**{name: x for name, x in (made | changed).items() if x is not None})


def renamed_loss(params, x, *, key):
    return loss({"dense": params["body"]["first"], "head": params["head"]}, x, key=key)


NAMES = ("dense/bias", "dense/kernel", "head/kernel")
PLAIN = built(links())


def quadratic(params, x):
    return sum(jnp.sum(jnp.abs(leaf) ** 2) for leaf in jax.tree.leaves(params)) * x


W = {"w": jnp.ones((2, 3))}
