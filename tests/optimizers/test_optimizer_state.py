"""What an optimizer keeps between calls can be read, set, saved and restored, or says why not."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optimize_loss as ol
from tests.cases import on_eight_devices
from tests.optimizers.stepped import (
    ADORNED,
    GB,
    GRADS,
    GW,
    TREE,
    B,
    W,
    assert_close,
    assert_equal,
    optim,
    pairs,
    stepped,
    values,
    variables,
)

# Variables.


def test_variables_is_a_list_that_can_be_called():
    optimizer = optim.Adam(0.1)
    assert optimizer.variables == optimizer.variables() == [optimizer.iterations]
    optimizer.build(variables())
    names = ["iteration", "adam/m/w", "adam/m/b", "adam/v/w", "adam/v/b"]
    assert [v.name for v in optimizer.variables] == names
    assert [v.name for v in optimizer.variables()] == names
    assert optimizer.variables[0] is optimizer.iterations
    assert optimizer.variables[1] is optimizer.variables[1]  # and stays so


def test_hyperparameters_are_not_among_the_variables():
    optimizer, _ = stepped(optim.AdamW(0.1, **{**ADORNED, "loss_scale_factor": 8.0}))
    names = {v.name for v in optimizer.variables}
    slots = [
        f"{s}/{n}" for s in ("adam/m", "adam/v", "accumulate/sum", "ema/average") for n in "wb"
    ]
    assert names == {"iteration", "accumulate/gathered", *slots}


def test_building_twice_does_nothing():
    optimizer, made = stepped(optim.Adam(0.1))
    before = values(optimizer.variables)
    optimizer.build([ol.Variable(1.0, "other")])
    optimizer.build(made)
    assert_equal(values(optimizer.variables), before)


def test_an_optimizer_of_no_variables():
    optimizer = optim.Adam(0.1)
    optimizer.build([])
    assert optimizer.variables == [optimizer.iterations]
    assert optimizer.apply_gradients([]) is optimizer.iterations
    assert int(optimizer.iterations) == 0


def test_no_pairs_change_nothing_and_build_nothing():
    optimizer = optim.Adam(0.1)
    assert optimizer.apply_gradients(zip([], [], strict=True)) is optimizer.iterations
    assert not optimizer.built
    stepped(optimizer)
    optimizer.apply_gradients([])
    assert int(optimizer.iterations) == 1


# Averages.


def test_averages_are_put_in_place():
    optimizer, made = stepped(optim.SGD(1.0, use_ema=True, ema_momentum=0.5), times=2)
    averages = [0.25 * p + 0.25 * (p - g) + 0.5 * (p - 2 * g) for p, g in ((W, GW), (B, GB))]
    tree = optimizer.finalize_variable_values({"w": made[0].value, "b": made[1].value})
    assert_close([tree["w"], tree["b"]], averages)
    assert_close(values(made), [W - 2 * GW, B - 2 * GB])  # a tree is not assigned to
    assert optimizer.finalize_variable_values([made[1]]) is None
    assert_close(values(made), [W - 2 * GW, averages[1]])
    optimizer.finalize_variable_values(made)
    assert_close(values(made), averages)


def test_without_averages_values_stay():
    optimizer, made = stepped(optim.Adam(0.1))
    before = values(made)
    optimizer.finalize_variable_values(made)
    assert_equal(values(made), before)
    tree = optim.SGD(0.1)
    new = tree.apply({"w": GW, "n": 0}, {"w": W, "n": 3})
    same = tree.finalize_variable_values(new)
    assert_equal([same["w"], same["n"]], [new["w"], new["n"]])
    with pytest.raises(ValueError, match="other parameters"):
        tree.finalize_variable_values({"x": W})


# Compiled or not, wherever the arrays are.


@pytest.mark.parametrize("name", ["SGD", "Adam", "Adafactor", "Ftrl", "Muon", "ScheduleFreeAdamW"])
def test_compiled_equals_not_compiled(name):
    matrix, g = np.outer(W, W), np.outer(GW, W)
    seen = []
    for jit_compile in (False, True):
        optimizer = optim.get(name)
        optimizer.jit_compile = jit_compile
        made = [ol.Variable(matrix, "matrix"), *variables()]
        for _ in range(3):
            optimizer.apply_gradients([(g, made[0]), *pairs(made[1:])])
        seen.append(values(made))
    assert_close(*seen)


def built_inside(w):
    """Return what two steps give, of an optimizer that is made where it is used."""
    optimizer, v = optim.Adam(0.1, clipnorm=0.5, use_ema=True), ol.Variable(w, "w")
    for _ in range(2):
        optimizer.minimize(lambda: v.value @ v.value, [v])
    assert optimizer.chain.links  # the rate is still a number, and not traced
    tree = optim.Adam(0.1, clipnorm=0.5)
    p = {"w": w}
    for _ in range(2):
        p = tree.apply({"w": 2 * p["w"]}, p)
    return v.value, p["w"], optimizer.iterations.value


def test_an_optimizer_that_is_made_inside_works():
    expected = [np.asarray(x) for x in built_inside(W)]
    assert_close([expected[1]], [expected[0]])
    assert_close(jax.jit(built_inside)(W), expected)
    batched = jax.vmap(built_inside)(jnp.stack([W, W]))
    assert_close([x[1] for x in batched], expected)
    jax.grad(lambda w: built_inside(w)[0].sum())(W)


@pytest.mark.parametrize("is_built", [False, True])
@pytest.mark.parametrize("way", ["jit", "constants", "vmap", "grad"])
def test_an_optimizer_from_outside_is_loud_and_stays_as_it_is(way, is_built):
    optimizer, made = stepped(optim.Adam(0.1)) if is_built else (optim.Adam(0.1), variables())
    tree = optim.Adam(0.1)
    if is_built:
        tree.apply(GRADS, TREE)
    before = values(made)

    def use(g):
        optimizer.apply_gradients([(g, v) for v in made])
        return g

    def use_tree(g):
        return tree.apply({"w": GW * g, "b": GB * g}, TREE)["b"]

    ways = {
        "jit": lambda f: jax.jit(f)(1.0),
        "constants": lambda f: jax.jit(lambda: f(1.0))(),
        "vmap": lambda f: jax.vmap(f)(jnp.ones(2)),
        "grad": lambda f: jax.grad(f)(1.0),
    }
    for function in (use, use_tree):
        with pytest.raises(ol.InvalidType, match=r"made outside of a JAX transformation|shape"):
            ways[way](function)
    assert optimizer.built == tree.built == is_built
    assert int(optimizer.iterations) == int(tree.iterations) == int(is_built)
    assert_equal(values(made), before)
    optimizer.apply_gradients(pairs(made))
    tree.apply(GRADS, TREE)


def test_functions_work_wherever_the_optimizer_was_made():
    optimizer = optim.Adam(0.1)

    @jax.jit
    def two(w):
        p, state = {"w": w}, optimizer.init({"w": w})
        for _ in range(2):
            updates, state = optimizer.update({"w": 2 * p["w"]}, state, p)
            p = {"w": p["w"] + updates["w"]}
        return p["w"]

    v = ol.Variable(W, "w")
    for _ in range(2):
        optimizer.minimize(lambda: v.value @ v.value, [v])
    assert_close([two(W)], [v.value])


def test_float64():
    with jax.enable_x64(True):
        optimizer, v = optim.Adam(0.1, weight_decay=0.1), ol.Variable(W.astype(np.float64), "w")
        narrow = ol.Variable(B, "b")
        assert optimizer.learning_rate.dtype == np.float64
        for _ in range(3):
            optimizer.apply_gradients([(GW, v), (GB, narrow)])
        optimizer.learning_rate = 0.05
        optimizer.apply_gradients([(GW, v), (GB, narrow)])
        assert (v.dtype, narrow.dtype, optimizer.iterations.dtype) == (
            "float64",
            "float32",
            "int32",
        )
        assert {x.name: str(x.dtype) for x in optimizer.variables} == {
            "iteration": "int32",
            "adam/m/w": "float64",
            "adam/m/b": "float32",
            "adam/v/w": "float64",
            "adam/v/b": "float32",
        }
        p, m, u = W.astype(np.float64), 0.0, 0.0
        for t, rate in enumerate([0.1, 0.1, 0.1, 0.05], start=1):
            m, u = 0.9 * m + 0.1 * GW.astype(float), 0.999 * u + 0.001 * GW.astype(float) ** 2
            alpha = rate * np.sqrt(1 - 0.999**t) / (1 - 0.9**t)
            p = p - rate * 0.1 * p - alpha * m / (np.sqrt(u) + 1e-7)
        np.testing.assert_allclose(v.value, p, rtol=1e-12)
        store: dict[str, Any] = {}
        optimizer.save_own_variables(store)
        optimizer.load_own_variables(store)


def on_a_mesh():
    """Return where the arrays of optimizers with `mesh` are, and how far they are from none."""
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    split = NamedSharding(mesh, P("data"))
    big, g = np.linspace(-1, 1, 16, dtype=np.float32), np.linspace(1, 2, 16, dtype=np.float32)
    report = {}
    for name in ("Adam", "Adafactor", "SGD"):
        seen = []
        for placed in (True, False):
            optimizer = optim.get({"class_name": name, "config": {"use_ema": True}})
            optimizer.mesh = mesh if placed else None
            v = ol.Variable(jax.device_put(big, split) if placed else big, "big")
            w = ol.Variable(jax.device_put(W, NamedSharding(mesh, P())) if placed else W, "w")
            traces = []
            for _ in range(3):
                optimizer.apply_gradients([(g, v), (GW, w)])
                traces.append(_compiled_programs())
            seen.append(np.asarray(v.value))
            if placed:
                slots = [x for x in optimizer.variables if x.name.endswith("/big") and x.size == 16]
                shardings = [x.sharding for x in optimizer.variables]
                fresh = optim.get({"class_name": name, "config": {"use_ema": True}})
                fresh.mesh = mesh
                fresh.build([ol.Variable(v, "big"), ol.Variable(w, "w")])
                store: dict[str, Any] = {}
                optimizer.save_own_variables(store)
                fresh.load_own_variables(store)
                report[name] = {
                    "split": len(slots) > 0 and all(x.sharding == split for x in slots),
                    "on the mesh": all(x.mesh == mesh for x in shardings),
                    "rate too": optimizer.learning_rate.sharding.mesh == mesh,
                    "programs": traces[-1] - traces[0],
                    "restored where it was": [x.sharding for x in fresh.variables] == shardings,
                }
        report[name]["apart"] = float(np.max(np.abs(seen[0] - seen[1])))
    state = optim.Adam(0.1, mesh=mesh).init({"w": W})
    report["init"] = all(x.sharding.mesh == mesh for x in jax.tree.leaves(state))
    return json.dumps(report)


def _compiled_programs():
    from optimize_loss.optimizers import _boxes

    compiled: Any = _boxes._apply_compiled
    return compiled._cache_size()


@pytest.mark.slow
def test_on_a_mesh():
    report = on_eight_devices(__name__, "on_a_mesh")
    assert report.pop("init")
    for found in report.values():
        assert found.pop("apart") < 1e-6
        assert found == {
            "split": True,
            "on the mesh": True,
            "rate too": True,
            "programs": 0,
            "restored where it was": True,
        }
