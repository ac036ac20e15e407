"""Axes of a mesh that are explicit, automatic, or some of each: a step computes the same."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optimize_loss as ol
from tests.cases import on_eight_devices

KINDS = {"explicit": AxisType.Explicit, "auto": AxisType.Auto}
# The kinds of the axes "x" and "y", how a parameter is spread, and options.
MESHES = {
    "spread-over-the-explicit-axis": ("explicit", "auto", P(), {"shard_state": "x"}),
    "spread-over-the-automatic-axis": ("explicit", "auto", P("x"), {"shard_state": "y"}),
    "the-other-way-round": ("auto", "explicit", P(None, "y"), {"shard_state": "y"}),
    "float8-last-axis": ("explicit", "explicit", P(None, "y"), {"precision": "float8"}),
    "float8-both-axes": ("explicit", "explicit", P(None, ("x", "y")), {"precision": "float8"}),
    "float8-mixed": ("explicit", "auto", P(None, "x"), {"precision": "float8"}),
    "float8-spread": ("explicit", "auto", P(), {"precision": "float8", "shard_state": "x"}),
}


def loss(params):
    return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(params))


def trained(params, **options):
    """Return the parameters after two steps, how often a step was traced, and the slots."""
    traced = []

    def counted(params):
        traced.append(1)
        return loss(params)

    step = ol.optimize_loss(counted, learning_rate=0.1, clip_gradients=1.0, **options)
    state = step.init(params)
    for _ in range(2):
        state, _ = step(state)
    return state.params, len(traced), state.optimizer["adam"]


def runs():
    """Return for each mesh how far the parameters are from those on one device."""
    random = np.random.default_rng(0)
    shapes = {"w": (4, 2048), "b": (8,), "odd": (3,)}
    params = {n: random.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    found = {}
    for name, (x, y, spec, options) in MESHES.items():
        alone = {key: value for key, value in options.items() if key != "shard_state"}
        wanted, _, _ = trained(params, **alone)
        mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(KINDS[x], KINDS[y]))
        specs = {"w": spec, "b": P(), "odd": P()}
        placed = {n: jax.device_put(p, NamedSharding(mesh, specs[n])) for n, p in params.items()}
        got, traces, slots = trained(placed, **options)
        found[name] = {
            "error": max(float(np.abs(got[n] - wanted[n]).max()) for n in params),
            "traces": traces,
            "slots": [str(s.sharding.spec) for s in jax.tree.leaves(slots) if s.shape == (4, 2048)],
        }
    return json.dumps(found)


@functools.cache
def found():
    return on_eight_devices(__name__, "runs")


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_the_parameters_are_those_of_one_device(name):
    assert found()[name]["error"] < 1e-5
    assert found()[name]["traces"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MESHES if "shard_state" in MESHES[name][3]])
def test_slots_are_spread_over_the_axis(name):
    assert any(repr(MESHES[name][3]["shard_state"]) in spec for spec in found()[name]["slots"])
