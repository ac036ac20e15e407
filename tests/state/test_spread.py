"""A mesh whose devices all do the same work is named, once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optimize_loss as ol
from optimize_loss._state.spread import check_spread


def mesh(*names):
    sizes = (4, 2)[: len(names)]
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(names))


def put(x, names, *spec):
    return jax.device_put(x, NamedSharding(mesh(*names), P(*spec)))


W, X = jnp.ones((8, 4)), np.ones((8, 4), np.float32)
ONE, TWO = ("data",), ("data", "model")
# parameters, the batch, the axes along which all devices do the same
IDLE = {
    "from-the-host": (put(W, ONE), X, "'data'"),
    "on-one-device": (put(W, ONE), jnp.ones((8, 4)), "'data'"),
    "on-each-device": (put(W, ONE), put(X, ONE), "'data'"),
    "parameters-alone": (put(W, TWO, None, "model"), X, "'data'"),
    "batch-alone": (put(W, TWO), put(X, TWO, "data"), "'model'"),
    "neither": (put(W, TWO), X, "'data', 'model'"),
}
BUSY = {
    "batch": (put(W, ONE), put(X, ONE, "data")),
    "stacked-batches": (put(W, ONE), put(X, ONE, None, "data")),
    "a-part-of-the-batch": (put(W, ONE), (X, put(X, ONE, "data"))),
    "both": (put(W, TWO, None, "model"), put(X, TWO, "data")),
    "batch-over-two-axes": (put(W, TWO), put(X, TWO, ("data", "model"))),
    "parameters": (put(W, ONE, "data"), X),
    "one-device": (jnp.ones((8, 4)), X),
    "no-batch": (put(W, ONE), ()),
    "numbers": (put(W, ONE), (3.0, jnp.ones(()))),
}


@pytest.mark.parametrize("name", IDLE)
def test_idle_axes_are_named(name):
    params, batch, axes = IDLE[name]
    with pytest.warns(UserWarning, match=f"along the axis {axes} of the mesh do the same work"):
        check_spread(params, batch)


@pytest.mark.parametrize("name", BUSY)
def test_no_warning_where_work_is_spread(name):
    check_spread(*BUSY[name])


def test_a_step_warns_once():
    step = ol.optimize_loss(lambda p, x: jnp.mean(p * x), learning_rate=0.1)
    state = step.init(put(W, ONE))
    with pytest.warns(UserWarning, match=r"PartitionSpec\('data'\)") as caught:
        state, _ = step(state, X)
    assert caught[0].filename == __file__
    step(state, X)  # a warning would be an error here
