"""A small net, its batches, and how to compare its states."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import optimize_loss

ol: Any = optimize_loss  # untyped, since some of what these tests pass is wrong on purpose
T = ol.transforms
RANDOM = np.random.default_rng(0)


def matrix(rows, columns):
    return (RANDOM.normal(size=(rows, columns)) / math.sqrt(rows)).astype(np.float32)


PARAMS = {
    "in": {"kernel": matrix(64, 80), "bias": np.zeros(80, np.float32)},
    "hidden": {"kernel": matrix(80, 56), "bias": np.zeros(56, np.float32)},
    "out": {"kernel": matrix(56, 10)},
}
STEPS = 12
X = RANDOM.normal(size=(STEPS, 16, 64)).astype(np.float32)
Y = (X @ RANDOM.normal(size=(64, 10)).astype(np.float32)).argmax(-1).astype(np.int32)


def net(params, x, y):
    for name in ("in", "hidden"):
        layer = params[name]
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"][None])
    scores = jax.nn.log_softmax(x @ params["out"]["kernel"])
    return -jnp.mean(jnp.take_along_axis(scores, y[:, None], 1))


def square(params, x):
    return (params["w"] - x) ** 2 / 2


def descent(loss=square, **options):
    return ol.optimize_loss(loss, **({"learning_rate": 0.1, "optimizer": "SGD"} | options))


def bits(tree):
    def of(leaf):
        typed = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if typed else leaf).tobytes()

    return jax.tree.map(of, tree)


def counted(loss):
    """Return a loss, and a list that has an entry for each time that it was traced."""
    traces = []

    @functools.wraps(loss)
    def counting(*args, **keywords):
        traces.append(1)
        return loss(*args, **keywords)

    return counting, traces
