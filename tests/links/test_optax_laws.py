"""What optax and others ask of a transformation, of every chain of `cases.py`."""

import dataclasses
import functools
import json
import traceback
from typing import Any

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optimize_loss as ol
from optimize_loss import optimizers as optim
from optimize_loss import transforms as T
from optimize_loss._names import leaf_names
from tests.cases import CASES, LOSS, on_eight_devices, rows
from tests.optimizers.custom_optimizers import MomentumSGD

law = pytest.mark.parametrize("case", rows())


def avals(tree):
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)


# `optax.tree_map_params`.


def slots_of(case, state):
    """Return the names of all arrays in a state that are neither numbers nor memory."""
    found = set()
    for name, _ in case.chain.links:
        link, prefix = case.chain.link(name), f"{name}/"
        own = {*link.numbers(), *link.memory()} if isinstance(link, T.Link) else set()
        for path in leaf_names(state):
            if path.startswith(prefix) and path.removeprefix(prefix) not in own:
                found.add(path)
    return found


@law
def test_a_function_is_mapped_over_all_slots(case):
    state = jax.eval_shape(case.chain.init, case.params())
    got = optax.tree_map_params(
        case.chain, lambda _: "slot", state, transform_non_params=lambda _: "number"
    )
    pairs = zip(leaf_names(state), jax.tree.leaves(got), strict=True)
    mapped = {name for name, value in pairs if value == "slot"}
    assert mapped == slots_of(case, state)


def test_the_slots_of_an_optimizer_get_the_specs_of_its_parameters():
    params = {"w": jnp.zeros((4, 2)), "b": jnp.zeros(2)}
    specs = {"w": P("data"), "b": P()}
    opt = optim.Adam(0.1, weight_decay=0.1, use_ema=True, clipnorm=1.0)
    state = opt.init(params)
    got: Any = optax.tree_map_params(
        opt, lambda _, spec: spec, state, specs, transform_non_params=lambda _: None
    )
    assert got["adam"]["m"] == got["adam"]["v"] == got["ema"]["average"] == specs
    assert got["step"] is got["rate"]["learning_rate"] is None


def test_slots_of_some_parameters_and_in_few_bits_are_mapped():
    params = {"w": jnp.zeros((4, 2)), "b": jnp.zeros(2)}
    tx = optax.chain(optax.scale(1.0), optim.MultiOptimizer({"w": optim.Adam()}, optim.SGD()))
    got: Any = optax.tree_map_params(tx, jnp.shape, tx.init(params))
    assert got[1]["Adam.adam"]["m"] == {"w": (4, 2), "b": None}
    half = T.with_precision(optim.Adam().chain, "bfloat16")
    got = optax.tree_map_params(half, jnp.shape, half.init(params))
    assert got["adam"]["m+v_bf16"] == {"w": (4, 2), "b": (2,)}


# Shapes in the place of parameters.


@law
def test_the_state_of_shapes_is_that_of_arrays(case):
    wanted = avals(case.chain.init(case.params()))
    shapes = jax.eval_shape(case.params)
    assert avals(jax.eval_shape(case.chain.init, shapes)) == wanted
    assert avals(case.chain.init(shapes)) == wanted


OWN = [optim.ScheduleFreeAdamW(), optim.Adam(use_ema=True), MomentumSGD(0.1), optim.Muon()]


@pytest.mark.parametrize("opt", OWN, ids=lambda opt: type(opt).__name__)
def test_the_state_of_shapes_of_an_optimizer(opt):
    params = {"w": jnp.ones((4, 2))}
    assert avals(opt.init(jax.eval_shape(lambda: params))) == avals(opt.init(params))


def test_what_a_value_would_be_needed_for_is_a_shape():
    """And what begins at 0 in any case is an array."""
    tx = T.chain(adam=T.ScaleByAdam(), ema=T.AverageParams(0.9))
    state = tx.init({"w": jax.ShapeDtypeStruct((2,), jnp.bfloat16)})
    assert state["ema"]["average"]["w"] == jax.ShapeDtypeStruct((2,), jnp.float32)
    np.testing.assert_array_equal(state["adam"]["m"]["w"], [0.0, 0.0])


def test_shapes_keep_their_shardings():
    mesh = jax.make_mesh((1,), ("data",), (AxisType.Auto,))
    place = NamedSharding(mesh, P("data"))
    tx = T.chain(adam=T.ScaleByAdam(), ema=T.AverageParams(0.9))
    state = tx.init({"w": jax.ShapeDtypeStruct((2,), jnp.float32, sharding=place)})
    assert state["ema"]["average"]["w"].sharding == place
    assert state["adam"]["m"]["w"].sharding == place


# Numbers that are traced.


def with_numbers(tx, numbers):
    """Return a chain whose links have these numbers, by `link/number`, where they are fields."""

    def renewed(name, entry):
        if isinstance(entry, T.ForParameters):
            return dataclasses.replace(entry, link=renewed(name, entry.link))
        if not isinstance(entry, T.Link):
            return entry
        fields = {field.name for field in dataclasses.fields(entry)}
        own = {n: numbers[f"{name}/{n}"] for n in fields if f"{name}/{n}" in numbers}
        return dataclasses.replace(entry, **own)

    return T.chain(**{name: renewed(name, entry) for name, entry in tx.links})


@law
def test_a_chain_can_be_built_of_traced_numbers(case):
    def run(numbers):
        tx = with_numbers(case.chain, numbers)
        return tx.update(case.grads(0), tx.init(case.params()), case.params(), value=LOSS)

    numbers = {name: np.array(x) for name, (x, _) in case.numbers.items()}
    numbers = {name: x.astype("i4" if x.dtype == int else "f4") for name, x in numbers.items()}
    without = dataclasses.replace(case.chain, precision=None)
    update = functools.partial(without.update, value=LOSS)
    wanted = jax.eval_shape(update, case.grads(0), without.init(case.params()), case.params())
    assert avals(jax.eval_shape(run, numbers)) == avals(wanted)


RATES = jnp.array([0.5, 0.25])
TRACED = {
    "link": lambda x: T.chain(rate=T.ScaleByLearningRate(x)),
    "multiplier": lambda x: T.chain(m=T.MultiplyGradients({"w": x}), rate=T.ScaleByLearningRate(1)),
    "some": lambda x: T.chain(rate=T.ForParameters("w", T.ScaleByLearningRate(x))),
    "optimizer": optim.SGD,
    "inside": lambda x: optim.LossScaleOptimizer(optim.SGD(x), 1.0),
    "inner": lambda x: T.chain(inner=optim.SGD(x)),
    "own-class": lambda x: MomentumSGD(x, momentum=0.0),
}


@pytest.mark.parametrize("make", TRACED.values(), ids=TRACED)
def test_a_number_can_be_mapped_over(make):
    """In a loop, with a state of another rate, too: each update has the rate of its chain."""
    params = {"w": jnp.ones(())}

    def run(rate):
        tx = make(rate)

        def step(carry, _):
            p, state = carry
            updates, state = tx.update({"w": jnp.ones(())}, state, p)
            return (optax.apply_updates(p, updates), state), updates["w"]

        (_, first), seen = jax.lax.scan(step, (params, tx.init(params)), None, 2)
        again, _ = make(2 * rate).update({"w": jnp.ones(())}, first, params)
        return seen, again["w"]

    seen, again = jax.jit(jax.vmap(run))(RATES)
    np.testing.assert_array_equal(seen, -RATES[:, None] * jnp.ones((1, 2)))
    np.testing.assert_array_equal(again, -2 * RATES)


def test_decays_and_counts_can_be_traced():
    def run(decay, every):
        tx = T.chain(rate=T.ScaleByLearningRate(0.5), ema=T.AverageParams(decay, every))
        params, state = tx.apply({"w": 2.0}, tx.init({"w": 4.0}), {"w": 4.0})
        return params["w"], state["ema"]["decay"]

    p, decay = jax.jit(run)(0.5, 1)
    assert p == 3.5
    np.testing.assert_array_equal(decay, [0.5, 0.5])


def test_what_a_traced_number_cannot_do():
    def set_it(rate):
        tx = T.chain(rate=T.ScaleByLearningRate(rate))
        return tx.set(tx.init({"w": 1.0}), learning_rate=0.1)

    with pytest.raises(ValueError, match=r"`learning_rate` cannot be set: the link was built with"):
        jax.jit(set_it)(0.5)
    with pytest.raises(
        ValueError, match=r"`learning_rate` must be a scalar number. .*shape \(2,\)"
    ):
        jax.jit(lambda x: T.ScaleByLearningRate(x).learning_rate)(jnp.ones(2))
    with pytest.raises(ValueError, match=r"`every` must be a scalar integer. .*float32"):
        jax.jit(lambda x: T.Accumulate(x).every)(1.0)
    opt = optim.SGD(0.5, weight_decay=0.5)
    for name in ("learning_rate", "weight_decay"):
        with pytest.raises(ValueError, match=r"made outside of (a|the) JAX"):
            jax.jit(lambda x, name=name: setattr(opt, name, x))(0.1)
    assert (opt.rate, opt.weight_decay) == (0.5, 0.5)


STEPS = {
    "rate": lambda x: {"learning_rate": x},
    "optimizer": lambda x: {"optimizer": optim.SGD(x)},
    "clip": lambda x: {"learning_rate": 0.1, "clip_gradients": T.ClipByNorm(x)},
}


@pytest.mark.parametrize("options", STEPS.values(), ids=STEPS)
def test_a_step_is_not_built_of_traced_numbers(options):
    """It is a value, and compiled once; its state has the numbers."""

    def build(x):
        return ol.optimize_loss(lambda p: p["w"], **options(x)).learning_rate

    with pytest.raises(ol.InvalidType, match=r"must be known when it is given.*`state\.set\("):
        jax.jit(build)(0.1)


# `optax.inject_hyperparams`.


INJECTED = {
    "sgd": optim.SGD,
    "own-class": lambda learning_rate: MomentumSGD(learning_rate, momentum=0.0),
    "inside": lambda learning_rate: optim.LossScaleOptimizer(optim.SGD(learning_rate), 1.0),
    "group": lambda learning_rate: optim.MultiOptimizer({"w": optim.SGD(learning_rate)}),
    "in-chain": lambda learning_rate: T.chain(inner=optim.SGD(learning_rate)),
}


def injected(tx, compiled):
    """Return the updates of three steps with gradients of 1."""
    params = {"w": jnp.ones(())}
    state, seen = tx.init(params), []
    update = jax.jit(tx.update) if compiled else tx.update
    for _ in range(3):
        updates, state = update({"w": jnp.ones(())}, state, params)
        seen.append(float(updates["w"]))
    return seen, state


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("make", INJECTED.values(), ids=INJECTED)
def test_an_injected_rate_is_that_of_each_update(make, compiled):
    with jax.numpy_dtype_promotion("standard"):
        tx = optax.inject_hyperparams(make)(learning_rate=lambda step: 0.5 * 0.5**step)
        state: Any
        seen, state = injected(tx, compiled)
    assert seen == [-0.5, -0.25, -0.125]
    assert state.hyperparams["learning_rate"] == 0.125


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_an_injected_rate_can_be_written_to_the_state(compiled):
    """As sbx does between the updates of a policy."""
    tx: Any = optax.inject_hyperparams(optim.Adam)(learning_rate=0.5, epsilon=1e-30)
    params = {"w": jnp.ones(())}
    state = tx.init(params)
    update = jax.jit(tx.update) if compiled else tx.update
    _, state = update({"w": jnp.ones(())}, state, params)
    state.hyperparams["learning_rate"] = jnp.float32(0.125)
    updates, _ = update({"w": jnp.ones(())}, state, params)
    np.testing.assert_allclose(updates["w"], -0.125, rtol=1e-5)


EVERY = [
    name
    for name in ol.optimizers.__all__
    if isinstance(cls := getattr(optim, name), type)
    and issubclass(cls, optim.Optimizer)
    and name not in ("Optimizer", "LossScaleOptimizer", "MultiOptimizer")
]


@pytest.mark.parametrize("name", EVERY)
def test_all_numbers_of_an_optimizer_can_be_injected(name):
    """All its numbers, as optax takes the defaults of the signature, too."""
    cls = getattr(optim, name)
    options: Any = {"static_args": "ns_steps"} if "Muon" in name else {}
    needed: Any = {"momentum": 0.5} if name == "MomentumOptimizer" else {}
    tx = optax.inject_hyperparams(cls, **options)(0.25, **needed)
    params = {"w": jnp.ones((2, 2))}
    state = tx.init(params)
    assert avals(jax.eval_shape(tx.update, params, state, params)[1]) == avals(state)


def test_an_optimizer_that_made_its_state_goes_by_it():
    """Built of an array, its number can be set as that of any other."""
    opt = optim.SGD(jnp.float32(0.5))
    params = {"w": jnp.ones(())}
    state = opt.set(opt.init(params), learning_rate=0.25)
    updates, _ = opt.update({"w": jnp.ones(())}, state, params)
    assert updates["w"] == -0.25


# Numbers are set in a state.


def test_an_optimizer_sets_what_its_chain_sets():
    opt = optim.SGD(0.5, momentum=0.5, clipnorm=2.0)
    state = opt.init({"w": jnp.ones(())})
    state = opt.set(state, learning_rate=0.25, max_norm=1.0, **{"momentum/momentum": 0.0})
    updates, _ = jax.jit(opt.update)({"w": jnp.float32(8.0)}, state)
    assert updates["w"] == -0.25
    assert (opt.rate, opt.momentum) == (0.5, 0.5)
    with pytest.raises(ValueError, match="`learning_rate` must be at least 0"):
        opt.set(state, learning_rate=-1.0)
    with pytest.raises(ValueError, match=r"Nearest: .*learning_rate"):
        opt.set(state, lerning_rate=1.0)


# Parameters among what is no array.


@law
def test_what_is_no_array_passes(case):
    """As a function in a model, where the gradient is None."""
    p, g = case.params(), case.grads(0)
    state = case.chain.init({**p, "f": None})
    without = case.chain.init(p)

    def step(method, g, state, p):
        new, state = method({**g, "f": None}, state, {**p, "f": jnp.tanh}, value=LOSS)
        kept.append(new.pop("f"))
        return new, state

    kept: list[Any] = []
    for method in (case.chain.update, case.chain.apply):
        wanted = avals(jax.eval_shape(functools.partial(method, value=LOSS), g, without, p))
        got = avals(jax.eval_shape(functools.partial(step, method), g, state, p))
        assert jax.tree.leaves(got) == jax.tree.leaves(wanted)
    assert kept == [None, jnp.tanh]


@pytest.mark.parametrize("way", ["update", "apply"])
def test_a_model_of_equinox_is_a_tree_of_parameters(way):
    """As trainax gives it to an optimizer."""
    model: Any = equinox.nn.MLP(2, 1, 4, 1, key=jax.random.key(0))
    grads = equinox.filter_grad(lambda model: jnp.sum(model(jnp.ones(2))))(model)
    opt = optim.Adam(0.1, weight_decay=0.5)
    if way == "apply":
        new = opt.apply(grads, model)
    else:
        state = opt.init(equinox.filter(model, equinox.is_array))
        updates, _ = opt.update(grads, state, model)
        new = equinox.apply_updates(model, updates)
    arrays = equinox.filter(model, equinox.is_array)
    wanted, _ = opt.chain.apply(grads, opt.chain.init(arrays), arrays)
    jax.tree.map(np.testing.assert_array_equal, equinox.filter(new, equinox.is_array), wanted)
    assert new.activation is model.activation
    assert new(jnp.ones(2)).shape == (1,)


def test_an_update_for_what_is_no_array_is_an_error():
    tx = T.chain(rate=T.ScaleByLearningRate(0.1))
    with pytest.raises(ol.InvalidType, match="The parameter 'f' must be an array of numbers"):
        tx.update({"w": 1.0, "f": 1.0}, tx.init({"w": 1.0}), {"w": 1.0, "f": jnp.tanh})


# Without parameters.


def test_rounding_needs_parameters_only_where_some_are_rounded():
    tx = T.with_precision(optim.Adam(0.1).chain, "bfloat16")
    for dtype, needs in ((jnp.float32, False), (jnp.bfloat16, True)):
        g = {"w": jnp.ones(3, dtype)}
        if needs:
            with pytest.raises(ValueError, match="`params` must be given: the link 'round_params'"):
                tx.update(g, tx.init(g))
        else:
            updates, _ = tx.update(g, tx.init(g))
            np.testing.assert_allclose(updates["w"], -0.1, rtol=1e-2)


# A mesh whose types say how arrays are split.


def behind_gates():
    """Return as JSON what went wrong where a mesh with explicit axes is that of the context."""
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Explicit,))
    split = NamedSharding(mesh, P("data"))
    report = {}
    for case in CASES:
        if not any(isinstance(case.chain.link(n), T.Gate) for n, _ in case.chain.links):
            continue
        p = jax.device_put(case.params(), NamedSharding(mesh, P()))
        p["encoder"]["layer_0"]["kernel"] = jax.device_put(
            case.params()["encoder"]["layer_0"]["kernel"], split
        )
        g = jax.tree.map(jnp.ones_like, p)
        try:
            with jax.set_mesh(mesh):
                state = case.chain.init(p)
                for method in (case.chain.update, case.chain.apply):
                    _, after = method(g, state, p, value=LOSS)
                    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
            report[case.name] = ""
        except Exception:
            report[case.name] = traceback.format_exc()
    return json.dumps(report)


@pytest.mark.slow
def test_gates_on_a_mesh_with_explicit_axes():
    report = on_eight_devices(__name__, "behind_gates")
    assert len(report) > 3
    assert not any(report.values()), "\n".join(report.values())
