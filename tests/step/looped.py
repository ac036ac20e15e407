"""Steps to run in a loop, and how to compare what they made."""

from typing import Any

import jax.numpy as jnp
import numpy as np

import optimize_loss

ol: Any = optimize_loss  # untyped, since some of what these tests pass is wrong on purpose


class Tensor:
    """What a tensor of another library has in common with an array."""

    def __init__(self, value):
        self.value = np.asarray(value, np.float32)

    def __array__(self, dtype=None):  # as torch's: without `copy`
        return self.value


class Counted:
    """An iterator that counts what was pulled."""

    def __init__(self, batches):
        self.batches = iter(batches)
        self.pulled = 0

    def __iter__(self):
        return self

    def __next__(self):
        batch = next(self.batches)
        self.pulled += 1
        return batch


def linear(**options):
    """A step that subtracts x from w."""
    options = {"learning_rate": 1.0, "optimizer": "SGD"} | options
    return ol.optimize_loss(lambda params, x: jnp.mean(params["w"] * x), **options)


def start(step, w=100.0):
    return step.init({"w": np.float32(w)})
