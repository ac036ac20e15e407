"""A mesh whose devices all do the same work is named, once."""

import json
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optimize_loss as ol
from optimize_loss._state.spread import check_spread
from tests.cases import on_eight_devices


def put(x, names, *spec):
    """Return an array as it would be on a mesh of these axes."""
    mesh = AbstractMesh((4, 2)[: len(names)], names)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P(*spec)))


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


def on_devices():
    """Return the warnings of two steps whose batch is on each device, and whose batch is spread.

    And the bytes of a state on a device, as explained and as they are.
    """
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spread, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    found: list[Any] = []
    for batch in (X, jax.device_put(X, spread)):
        step = ol.optimize_loss(lambda p, x: jnp.mean(p * x), learning_rate=0.1)
        state = step.init(jax.device_put(W, whole))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                state, _ = step(state, batch)
        found.append([[str(w.message), w.filename] for w in caught])
    tree = {"w": W, "odd": jnp.ones((3, 5)), "b": jnp.ones(8), "large": jnp.ones((128, 64))}
    params = jax.device_put(tree, whole)
    step = ol.optimize_loss(loss_of_tree, learning_rate=0.1, shard_state="data")
    told, leaves = step.explain(params), jax.tree.leaves(step.init(params))
    here = [shard.data.nbytes for x in leaves for shard in x.addressable_shards[:1]]
    found.append([told.device_bytes, sum(here), told.total_bytes, sum(x.nbytes for x in leaves)])
    found.append(f"{told.device_bytes:,} on each device" in str(told))
    return json.dumps(found)


def loss_of_tree(params):
    return sum(map(jnp.sum, jax.tree.leaves(params)))


def test_a_mesh_of_eight_devices():
    """A step warns once; and explained are the bytes that a device has."""
    warned, silent, (told, on_one, told_in_all, in_all), is_shown = on_eight_devices(
        __name__, "on_devices"
    )
    assert (told, told_in_all) == (on_one, in_all)
    assert told < told_in_all
    assert is_shown
    assert len(warned) == 1
    message, file = warned[0]
    assert "PartitionSpec('data')" in message
    assert file == __file__
    assert not silent
