"""What holds for every link and every chain on many devices."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optimize_loss import transforms
from tests.cases import (
    CASES,
    LOSS,
    grads,
    on_eight_devices,
    params,
)
from tests.links.law import assert_close, law, nothing_compiles, run, stacked, step_of

# Many devices.


def sharded(p, axis_type):
    """Return parameters with the kernel split over eight devices, and the sharding of each."""
    mesh = jax.make_mesh((8,), ("data",), (axis_type,))
    shardings = jax.tree.map(lambda _: NamedSharding(mesh, P()), p)
    shardings["encoder"]["layer_0"]["kernel"] = NamedSharding(mesh, P("data"))
    return jax.device_put(p, shardings), shardings


def partition(x):
    """Return the axes of the mesh over which an array, or the type of one, is split."""
    return [axis for axis in getattr(x.sharding, "spec", ()) if axis]


def on_a_mesh(case):
    """Three steps are those of one device, and everything stays as it is split."""
    p, shardings = sharded(case.params(), AxisType.Auto)
    state = case.chain.init(p)
    before = jax.tree.map(partition, (p, state))
    step = jax.jit(lambda p, state, g: case.chain.apply(g, state, p, value=LOSS))
    for t in range(3):
        p, state = step(p, state, jax.device_put(case.grads(t), shardings))
    assert jax.tree.map(partition, (p, state)) == before
    assert_close((p, state), run(case, case.chain.init(case.params()), steps=3), 5e-6)


def with_shardings_in_types(case):
    """Parameters and slots stay as they are split, by the types, which say so."""
    p, shardings = sharded(case.params(), AxisType.Explicit)
    state = case.chain.init(p)
    apply = functools.partial(case.chain.apply, value=LOSS)
    new = jax.eval_shape(apply, jax.device_put(case.grads(0), shardings), state, p)
    assert jax.tree.map(partition, new) == jax.tree.map(partition, (p, state))


def in_shard_map(case):
    """With one gradient on each device, a step with their mean is that of one device."""
    every = stacked(*map(case.grads, range(8)))

    def step(p, state, g):
        g = jax.tree.map(lambda x: jax.lax.pmean(x[0], "data"), g)
        return case.chain.apply(g, state, p, value=LOSS)

    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P())
    first = case.params(), case.chain.init(case.params())
    mean = jax.tree.map(lambda x: jnp.mean(x, 0), every)
    assert_close(jax.jit(mapped)(*first, every), step_of(case.chain)(*first, mean), 5e-6)


def compiles_once(placement):
    """With parameters put somewhere, as from a file, only the first step is compiled."""
    tx = transforms.chain(clip=transforms.ClipByGlobalNorm(1.0), adam=transforms.ScaleByAdam())
    p = jax.device_put(params(), placement)
    state, step = tx.init(p), jax.jit(tx.apply)
    every = [jax.device_put(grads(t), placement) for t in range(3)]
    p, state = step(every[0], state, p)
    with nothing_compiles():
        for g in every[1:]:
            p, state = step(g, state, p)


def test_on_one_device_only_the_first_step_is_compiled():
    compiles_once(jax.devices()[0])


MANY_DEVICES = {"mesh": on_a_mesh, "explicit": with_shardings_in_types, "shard_map": in_shard_map}


def many_devices(way, name):
    """Run a law where there are eight devices."""
    (case,) = (case for case in CASES if case.name == name)
    MANY_DEVICES[way](case)
    return "true"


@pytest.mark.parametrize("way", MANY_DEVICES)
@law
def test_eight_devices_equal_one(case, way):
    assert on_eight_devices(__name__, "many_devices", way, case.name)


def compiles_once_on_a_mesh():
    compiles_once(sharded(params(), AxisType.Auto)[1])
    return "true"


def test_on_eight_devices_only_the_first_step_is_compiled():
    assert on_eight_devices(__name__, "compiles_once_on_a_mesh")
