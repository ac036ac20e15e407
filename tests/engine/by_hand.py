"""Chains on few numbers, step by step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import optimize_loss as ol
from optimize_loss import transforms as T
from tests.cases import accumulated

INF, NAN = np.inf, np.nan
DESCEND = T.ScaleByLearningRate(1.0)  # p ← p - u
RATE = {"rate": T.ScaleByLearningRate(0.5)}
HALF = {"decay": T.ShrinkParams(1.0)}  # with this rate, p ← p / 2


def w(*numbers, dtype=jnp.float32):
    return {"w": jnp.array(numbers, dtype)}


def steps(tx, grads, params, state=None, **extra):
    """Return parameters and state after every gradient; compiled once."""
    step = jax.jit(functools.partial(tx.apply, **extra))
    state, seen = tx.init(params) if state is None else state, []
    for g in grads:
        params, state = step(g, state, params)
        seen.append((params, state))
    return seen


def assert_same(got, want):
    """Compare structures, dtypes and bits."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def assert_close(got, want, relative=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=relative, atol=1e-7), got, want)


def mean(trees):
    return jax.tree.map(lambda *xs: sum(xs) / len(xs), *trees)


RULES = accumulated(1, 0.5, (0.9, 0.999, 1e-8), 0.1, 0.1, 0.9).links[1:]


def run_as(way, tx, p, every):
    """Return parameters and state after all gradients, run in one of several ways."""
    state = tx.init(p)
    if way == "scan":
        stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *every)
        body = lambda carry, g: (tx.apply(g, *carry[::-1]), None)
        return jax.jit(lambda *first: jax.lax.scan(body, first, stacked)[0])(p, state)
    step = jax.jit(tx.apply, donate_argnums=(1, 2) if way == "donated" else ())
    p = jax.tree.map(jnp.copy, p)
    for g in every:
        p, state = step(g, state, p)
    return p, state


# The scale of the loss in optimize_loss.


def quadratic(params, x):
    return jnp.sum((params["a"] * x - params["b"]) ** 2)


def train(tx, loss=quadratic, batches=((2.0,), (3.0,), (-1.0,)), params=None):
    step = ol.optimize_loss(loss, optimizer=tx)
    state, seen = step.init({"a": 0.3, "b": 0.7} if params is None else params), []
    for batch in batches:
        state, metrics = step(state, *batch)
        seen.append(metrics)
    return state, seen
