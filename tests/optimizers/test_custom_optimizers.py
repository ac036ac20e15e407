"""Custom optimizers, written as for Keras, move parameters alike however they are used.

The classes are in `custom_optimizers.py`. What each does is checked against its formula in numpy;
all other ways to run one are checked against the plainest, which is not compiled.
"""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optimize_loss as ol
from tests.cases import on_eight_devices
from tests.optimizers.custom_ways import (
    ADORNED,
    AROUND,
    CLASSES,
    NAMES,
    OPTIONS,
    SCALE,
    SOME,
    STEPS,
    assert_close,
    by_name,
    custom,
    gradients,
    in_steps,
    linear,
    pairs,
    params,
    plainest,
    scaled,
    through_apply,
    through_update,
    through_variables,
    variables,
    wanted,
)


def under_vmap(optimizer, p, grads):
    def stack(*trees):
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    others = gradients(7)
    p, seen = stack(p, params(9)), []
    state = jax.vmap(optimizer.init)(p)
    for g, other in zip(grads, others, strict=True):
        g = stack(scaled(g, optimizer), other)
        updates, state = jax.jit(jax.vmap(optimizer.update))(g, state, p)
        p = optax.apply_updates(p, updates)
        seen.append(jax.tree.map(lambda x: x[0], p))
    return seen


def in_many(optimizer, p, grads):
    step = ol.optimize_loss(linear, optimizer=optimizer)
    state, seen = step.init(p), []
    for t in range(0, len(grads), 2):
        both = jax.tree.map(lambda *leaves: jnp.stack(leaves), *grads[t : t + 2])
        state, _ = step.many(state, both)
        seen += [None, jax.tree.map(jnp.copy, state.params)]
    return seen


WAYS = {
    "variables": through_variables,
    "apply": through_apply,
    "update": through_update,
    "vmap": under_vmap,
    "steps": in_steps,
    "many": in_many,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cls", CLASSES)
def test_all_ways_agree(cls, way):
    check_way(cls, "plain", way)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cls", SOME)
def test_all_ways_agree_with_options_around(cls, way):
    check_way(cls, "adorned-around", way)


def kept(optimizer):
    """Return all attributes, and what the optimizer keeps, but for the chains made of them."""
    held = {n: x for n, x in vars(optimizer._held).items() if n != "chains"}
    return {n: x for n, x in vars(optimizer).items() if n != "_held"} | {"_held": held}


def check_way(cls, kind, way):
    optimizer = cls(**{**custom.OPTIONS[cls], **OPTIONS[kind]})
    before = kept(optimizer)
    seen = WAYS[way](optimizer, params(), gradients())
    if way not in ("variables", "apply"):  # functions, which leave the optimizer as it is
        assert kept(optimizer) == before
        assert optimizer.variables == [optimizer.iterations]
    for got, expected in zip(seen, wanted(cls, kind), strict=True):
        if got is not None:
            assert_close(got, expected)
    assert jax.tree.map(jnp.shape, seen[-1]) == jax.tree.map(jnp.shape, params())


@pytest.mark.parametrize("cls", CLASSES)
def test_inside_another_optimizer(cls):
    multi = ol.optimizers.MultiOptimizer({"**": cls(**custom.OPTIONS[cls])})
    assert_close(through_variables(multi, params(), gradients()), wanted(cls, "plain"))


@pytest.mark.parametrize("cls", SOME)
def test_inside_other_optimizers_with_options(cls):
    expected = wanted(cls, "adorned-around")
    inner = cls(**{**custom.OPTIONS[cls], **ADORNED})
    multi = ol.optimizers.MultiOptimizer({"**": inner}, **AROUND)
    assert_close(through_variables(multi, params(), gradients()), expected)
    assert_close(in_steps(multi, params(), gradients()), expected)

    inner = cls(**{**custom.OPTIONS[cls], **ADORNED})
    dynamic = ol.optimizers.LossScaleOptimizer(inner, initial_scale=SCALE)
    expected = wanted(cls, "adorned")
    assert_close(through_variables(dynamic, params(), gradients()), expected)
    assert_close(in_steps(dynamic, params(), gradients()), expected)


def test_a_custom_optimizer_for_some_of_the_parameters():
    cls = custom.MomentumSGD
    mine, theirs = cls(**custom.OPTIONS[cls]), ol.optimizers.SGD(0.5)
    multi = ol.optimizers.MultiOptimizer({"**/bias|scale": mine}, default_optimizer=theirs)
    seen = through_variables(multi, params(), gradients())
    alone = wanted(cls, "plain")
    other = through_variables(ol.optimizers.SGD(0.5), params(), gradients())
    for got, a, b in zip(seen, alone, other, strict=True):
        expected = {"dense": {"bias": a["dense"]["bias"], "kernel": b["dense"]["kernel"]}}
        assert_close(got, {**expected, "scale": a["scale"]})


# What each of them does, in numpy.


def formula(cls, name, t, p, g, m, o, shared):
    """Return the new parameter; `m` keeps what is its own, `shared` what is everybody's."""
    lr = o["learning_rate"]
    if cls in (custom.MomentumSGD, custom.WarmSGD):
        momentum = o["momentum"] if "momentum" in o else 0.5 ** (1 / o["half_life"])
        m["m"] = momentum * m.get("m", 0) - lr * g
        return p + m["m"]
    if cls is custom.GuardedAdam:
        b1, b2 = o["beta_1"], o["beta_2"]
        m["m"] = b1 * m.get("m", 0) + (1 - b1) * g
        m["v"] = b2 * m.get("v", 0) + (1 - b2) * g * g
        alpha = lr * np.sqrt(1 - b2 ** (t + 1)) / (1 - b1 ** (t + 1))
        return p - alpha * m["m"] / (np.sqrt(m["v"]) + o["epsilon"])
    if cls is custom.DecayingMomentum:
        m["m"] = o["beta"] ** (t + 1) * m.get("m", 0) + g
        return p - lr * m["m"]
    if cls is custom.GlobalAdagrad:
        shared["total"] = shared.get("total", 1) + np.sum(g * g)
        return p - lr * g / np.sqrt(shared["total"])
    if cls is custom.RMSInDict:
        m["square"] = o["rho"] * m.get("square", 0) + (1 - o["rho"]) * g * g
        last, m["last"] = m.get("last", 0), g / (np.sqrt(m["square"]) + 1e-3)
        return p - lr * (m["last"] + 0.5 * last)
    if cls is custom.Anchored:
        g = g + o["pull"] * (p - m.setdefault("anchor", p))
        m["sum"] = m.get("sum", o["start"]) + g * g
        return p - lr * g / np.sqrt(m["sum"])
    if cls is custom.Keras3RMS:
        m["velocity"] = o["rho"] * m.get("velocity", 0) + (1 - o["rho"]) * g * g
        return p - lr * g / np.sqrt(m["velocity"] + 1e-3)
    assert cls is custom.SignSGD
    return p - np.where(np.abs(g) > o["threshold"], lr * np.sign(g), 0)


def in_numpy(cls, grads, order=NAMES):
    """Return the parameters after every step; a gradient of None leaves all as it is."""
    p = {name: np.float64(x) for name, x in by_name(params()).items()}
    memory, shared, seen = {name: {} for name in NAMES}, {}, []
    for t, g in enumerate(grads):
        for name in order:
            if g[name] is not None:
                args = p[name], np.float64(g[name]), memory[name]
                p[name] = formula(cls, name, t, *args, custom.OPTIONS[cls], shared)
        seen.append(dict(p))
    return seen


@pytest.mark.parametrize("cls", CLASSES)
def test_it_does_what_its_formula_says(cls):
    expected = in_numpy(cls, [by_name(g) for g in gradients()])
    assert_close([by_name(p) for p in wanted(cls, "plain")], expected, rtol=1e-5)


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("cls", CLASSES)
def test_variables_without_a_gradient_keep_their_slots_and_places(cls, jit_compile):
    """The order is that of the list, not of the names, and the second one has no gradient twice."""
    order = ["scale", "dense/kernel", "dense/bias"]
    made = {name: ol.Variable(by_name(params())[name], name) for name in order}
    optimizer = cls(**custom.OPTIONS[cls], jit_compile=jit_compile)
    optimizer.build(list(made.values()))
    assert [optimizer._get_variable_index(v) for v in made.values()] == [0, 1, 2]
    grads = [by_name(g) for g in gradients()]
    for t, g in enumerate(grads):
        if t in (0, 2):
            g["dense/kernel"] = None
            with pytest.warns(
                UserWarning, match=r"no gradient for .'dense/kernel'.: they are left"
            ):
                optimizer.apply_gradients([(g[n], v) for n, v in made.items()])
        else:
            optimizer.apply_gradients([(g[n], v) for n, v in made.items()])
    expected = in_numpy(cls, grads, order)[-1]
    assert_close({n: v.value for n, v in made.items()}, {n: expected[n] for n in made}, rtol=1e-5)
    assert int(optimizer.iterations) == STEPS


def test_pairs_may_come_in_another_order_and_not_all():
    cls = custom.MomentumSGD
    optimizer, made = cls(**custom.OPTIONS[cls]), dict(zip(NAMES, variables(params()), strict=True))
    optimizer.build(list(made.values()))
    grads = [by_name(g) for g in gradients()]
    for g in grads:
        g["dense/bias"] = None
        optimizer.apply_gradients([(g[n], made[n]) for n in ("scale", "dense/kernel")])
    expected = in_numpy(cls, grads)[-1]
    assert_close({n: v.value for n, v in made.items()}, {n: expected[n] for n in made}, rtol=1e-5)
    np.testing.assert_array_equal(optimizer.momentums[0].value, jnp.zeros(2))


# What users see: the variables that `build` makes are those of the state.


@pytest.mark.parametrize("cls", CLASSES)
def test_the_variables_show_the_state(cls):
    optimizer = cls(**custom.OPTIONS[cls])
    through_variables(optimizer, params(), gradients())
    names = [v.name for v in optimizer.variables]
    assert names[0] == "iteration"
    assert int(optimizer.variables[0]) == STEPS
    moved = [v for v in optimizer.variables[1:] if v.name not in ("rho",)]
    assert all(np.any(v.numpy() != 0) for v in moved)
    if cls is custom.GuardedAdam:
        assert names[1:] == [f"{slot}/{name}" for name in NAMES for slot in "mv"]
        assert optimizer._momentums[1] is optimizer.variables[3]
    if cls is custom.GlobalAdagrad:
        assert optimizer.calls.value.tolist() == [STEPS * len(NAMES)]
    if cls is custom.RMSInDict:
        assert [v.name for v in optimizer.variables[4:]] == ["rho"] + ["Variable"] * 3


def test_a_variable_made_in_the_constructor_is_a_number_that_can_be_assigned():
    cls = custom.RMSInDict
    optimizer = cls(learning_rate=0.1, rho=0.9)
    optimizer.build(made := variables(params()))
    optimizer.rho.assign(custom.OPTIONS[cls]["rho"])
    for g in gradients():
        optimizer.apply_gradients(pairs(g, made))
    assert_close([v.value for v in made], jax.tree.leaves(wanted(cls, "plain")[-1]))


# Over eight devices.


def sharded(tree, mesh):
    def put(leaf):
        spec = P("data") if leaf.ndim == 2 else P()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(put, tree)


def is_split(x):
    return len({str(shard.index) for shard in x.addressable_shards}) == 8


def on_a_replica(g):
    """Return what one device has after two steps with a part of the gradients."""
    options = {**custom.OPTIONS[custom.GuardedAdam], "axis_name": "data", "clipnorm": 1.0}
    mine = jax.tree.map(lambda x: x[0], g)
    optimizer = custom.GuardedAdam(**options)
    imperative = through_variables(optimizer, params(), [mine, mine])
    assert optimizer.chain
    return jax.tree.map(
        lambda x: x[None], (imperative, through_update(optimizer, params(), [mine] * 2))
    )


def report_on_eight_devices():
    """Return for each class and way how far it is from one device, and what is split."""
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    parts = jax.tree.map(lambda x: jnp.stack([t / 36 * x for t in range(1, 9)]), gradients()[0])
    mapped = jax.shard_map(on_a_replica, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    summed = jax.jit(mapped)(parts)
    options = {**custom.OPTIONS[custom.GuardedAdam], "clipnorm": 1.0}
    alone = through_variables(custom.GuardedAdam(**options), params(), gradients()[:1] * 2)
    apart = jax.tree.map(
        lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max(), summed, (alone, alone)
    )
    report: dict[str, Any] = {"shard_map": float(max(jax.tree.leaves(apart)))}
    ways = {"variables": through_variables, "apply": through_apply, "steps": in_steps}
    for cls, options in custom.OPTIONS.items():
        expected = plainest(cls, options)[-1]
        for name, way in ways.items():
            if name == "apply" and cls is not custom.MomentumSGD:
                continue  # the same program as for variables
            optimizer = cls(**options, mesh=mesh)
            p, grads = sharded(params(), mesh), [sharded(g, mesh) for g in gradients()]
            got = way(optimizer, p, grads)[-1]
            apart = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), got, expected)
            slots = [v for v in optimizer.variables if v.ndim == 2]
            report[f"{cls.__name__}-{name}"] = {
                "apart": max(jax.tree.leaves(apart)),
                "split": is_split(got["dense"]["kernel"]) and all(is_split(v.value) for v in slots),
                "on mesh": all(
                    getattr(v.sharding, "mesh", None) == mesh
                    for v in optimizer.variables
                    if optimizer.built
                ),
                "rate on mesh": name == "steps" or optimizer.learning_rate.sharding.mesh == mesh,
            }
        state = cls(**options).init(sharded(params(), mesh))
        big = [x for x in jax.tree.leaves(state) if x.ndim == 2]
        report[f"{cls.__name__}-init"] = {"split": all(is_split(x) for x in big)}
    return json.dumps(report)


@pytest.fixture(scope="module")
def report():
    return on_eight_devices(__name__, "report_on_eight_devices")


@pytest.mark.slow
def test_replicas_sum_their_gradients(report):
    assert report["shard_map"] < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("cls", CLASSES)
def test_eight_devices_equal_one(cls, report):
    for way in ("variables", "steps", *(["apply"] if cls is custom.MomentumSGD else [])):
        found = report[f"{cls.__name__}-{way}"]
        assert found.pop("apart") < 1e-6
        assert found == {"split": True, "on mesh": True, "rate on mesh": True}
    assert report[f"{cls.__name__}-init"] == {"split": True}
