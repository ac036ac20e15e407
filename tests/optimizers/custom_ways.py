"""A problem for custom optimizers, and the ways to use one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optimize_loss as ol
from tests.cases import random_like
from tests.optimizers import custom_optimizers

SHAPES = {"dense": {"bias": (), "kernel": (8, 2)}, "scale": ()}
NAMES = ["dense/bias", "dense/kernel", "scale"]
STEPS = 4
SCALE = 8.0
# For type checkers a subclass has the constructor of its own fields, and not its parent's.
custom: Any = custom_optimizers
Optimizer: Any = ol.optimizers.Optimizer
CLASSES = [pytest.param(cls, id=cls.__name__) for cls in custom.OPTIONS]
SOME = CLASSES[4:5]  # where options around the rule are tried too, as these do not depend on it
ADORNED = {
    "weight_decay": 0.1,
    "global_clipnorm": 0.5,
    "use_ema": True,
    "ema_momentum": 0.5,
    "ema_overwrite_frequency": 2,
    "learning_rate": ol.schedules.ExponentialDecay(0.1, 2, 0.5),
}
AROUND = {"gradient_accumulation_steps": 2, "loss_scale_factor": SCALE}
OPTIONS = {"plain": {}, "adorned": ADORNED, "adorned-around": {**ADORNED, **AROUND}}


def params(seed=0):
    return random_like(SHAPES, seed)


def gradients(seed=1):
    return [random_like(SHAPES, seed + t) for t in range(STEPS)]


def by_name(tree):
    return dict(zip(NAMES, jax.tree.leaves(tree), strict=True))


def scaled(grads, optimizer):
    """Return what one gets by hand: gradients of the scaled loss."""
    return jax.tree.map(lambda g: optimizer.scale_loss(g), grads)


def variables(tree):
    return [ol.Variable(p, name) for name, p in by_name(tree).items()]


def pairs(grads, made):
    return list(zip(jax.tree.leaves(grads, is_leaf=lambda x: x is None), made, strict=True))


def assert_close(got, wanted, rtol=2e-6):
    def close(a, b):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=rtol, atol=rtol / 10)

    jax.tree.map(close, got, wanted)


# The ways to use an optimizer: each returns the parameters after every step.


def through_variables(optimizer, p, grads):
    made, seen = variables(p), []
    for g in grads:
        optimizer.apply_gradients(pairs(scaled(g, optimizer), made))
        seen.append(jax.tree.unflatten(jax.tree.structure(p), [v.value for v in made]))
    return seen


def through_apply(optimizer, p, grads):
    seen = []
    for g in grads:
        p = optimizer.apply(scaled(g, optimizer), p)
        seen.append(p)
    return seen


def through_update(optimizer, p, grads):
    state, seen = optimizer.init(p), []
    for g in grads:
        updates, state = jax.jit(optimizer.update)(scaled(g, optimizer), state, p)
        p = optax.apply_updates(p, updates)
        seen.append(p)
    return seen


def linear(p, g):
    """A loss whose gradient is `g`."""
    return sum(jax.tree.leaves(jax.tree.map(lambda x, y: jnp.sum(x * y), p, g)))


def in_steps(optimizer, p, grads):
    step = ol.optimize_loss(linear, optimizer=optimizer)
    state, seen = step.init(p), []
    for g in grads:
        state, _ = step(state, g)
        seen.append(jax.tree.map(jnp.copy, state.params))
    return seen


def plainest(cls, options):
    """Return what every other way must give: variables, and nothing compiled as a whole."""
    return through_variables(cls(**options, jit_compile=False), params(), gradients())


_PLAINEST: dict[Any, Any] = {}


def wanted(cls, kind):
    if (cls, kind) not in _PLAINEST:
        _PLAINEST[cls, kind] = plainest(cls, {**custom.OPTIONS[cls], **OPTIONS[kind]})
    return _PLAINEST[cls, kind]


# What is wrong is loud.


class Plain(Optimizer):
    """A custom optimizer with nothing but a rate."""

    def __init__(self, learning_rate=0.1, **kwargs):
        super().__init__(learning_rate=learning_rate, **kwargs)

    def update_step(self, gradient, variable):
        variable.assign_sub(jnp.asarray(self.learning_rate, variable.dtype) * gradient)
