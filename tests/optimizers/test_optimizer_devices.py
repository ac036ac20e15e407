"""Gradients that devices share are summed once, whether JAX has done it or not."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

import optimize_loss as ol
from tests.cases import on_eight_devices

DEVICES = 8
BATCH = np.arange(1.0, DEVICES + 1, dtype=np.float32)
RATE = 1 / 64


def loss(params, x):
    return jnp.sum(params["w"] * x)


def minimized(w, x, axis_name):
    opt, box = ol.optimizers.SGD(RATE, axis_name=axis_name), ol.Variable(w)
    opt.minimize(lambda: jnp.sum(box.value * x), [box])
    return box.value


def applied(w, x, axis_name):
    opt = ol.optimizers.SGD(RATE, axis_name=axis_name)
    return opt.apply(jax.grad(loss)({"w": w}, x), {"w": w})["w"]


def updated(w, x, axis_name):
    opt = ol.optimizers.SGD(RATE, axis_name=axis_name)
    updates, _ = opt.update(jax.grad(loss)({"w": w}, x), opt.init({"w": w}), {"w": w})
    return w + updates["w"]


def stepped(w, x, axis_name):
    step = ol.optimize_loss(loss, optimizer=ol.optimizers.SGD(RATE, axis_name=axis_name))
    return step(step.init({"w": w}), x)[0].params["w"]


WAYS = {f.__name__: f for f in (minimized, applied, updated, stepped)}


def on_devices():
    """Return the parameter after one step, by way and by whether JAX checks what varies."""
    mesh = Mesh(np.array(jax.devices()), ("d",))
    specs = {"in_specs": (PartitionSpec(), PartitionSpec("d")), "out_specs": PartitionSpec()}
    found = {}
    for name, way in WAYS.items():
        for checked in (True, False):
            run = jax.shard_map(
                lambda w, x, way=way: way(w, x, "d"), mesh=mesh, check_vma=checked, **specs
            )
            found[f"{name}-{checked}"] = float(jax.jit(run)(jnp.float32(1.0), BATCH))
    return json.dumps(found)


@pytest.fixture(scope="module")
def measured():
    return on_eight_devices(__name__, "on_devices")


@pytest.mark.slow
@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("name", WAYS)
def test_a_shared_parameter_gets_the_sum_of_all_gradients(measured, name, checked):
    alone = WAYS[name](jnp.float32(1.0), BATCH, None)
    np.testing.assert_allclose(measured[f"{name}-{checked}"], alone, rtol=1e-6)
    np.testing.assert_allclose(alone, 1 - RATE * BATCH.sum(), rtol=1e-6)
