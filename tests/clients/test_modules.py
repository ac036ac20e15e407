"""Models with dropout and running statistics, against the loop that their library would have."""

import pickle
from typing import Any

import equinox
import flax.serialization
import haiku
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optimize_loss as ol

STEPS = 4
RATE = 0.125


def mse(prediction, y):
    return jnp.mean((prediction - y) ** 2)


def batches(steps=STEPS):
    x = jax.random.normal(jax.random.key(1), (steps, 8, 3))
    return x, jnp.sum(x, 2, keepdims=True)


def steps_of(step, state):
    """Return the state and the losses after a step for each batch."""
    losses = []
    for batch in zip(*batches(), strict=True):
        state, metrics = step(state, *batch)
        losses.append(metrics["loss"])
    return state, losses


def raw(tree):
    """Return the leaves of a tree as numpy arrays, random keys as their data."""
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    data = (jax.random.key_data(x) if is_key(x) else x for x in jax.tree.leaves(tree))
    return [np.asarray(x) for x in data]


def assert_same(got, wanted):
    for a, b in zip(raw(got), raw(wanted), strict=True):
        np.testing.assert_array_equal(a, b)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(nnx.tanh(self.norm(self.first(x)))))


def net():
    return Net(nnx.Rngs(0))


def of_model(model, x, y):
    return mse(model(x), y)


# What each library would have: the losses, the parameters, and all other state, after the steps.


def nnx_by_hand():
    model = net()
    optimizer = nnx.Optimizer(model, optax.sgd(RATE), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x, y):
        loss, grads = nnx.value_and_grad(of_model)(model, x, y)
        optimizer.update(model, grads)
        return loss

    losses = [step(model, optimizer, x, y) for x, y in zip(*batches(), strict=True)]
    _, params, rest = nnx.split(model, nnx.Param, ...)
    return losses, params, rest


def by_hand(loss, params, rest, key=None):
    """Return what gradient descent by hand gives; `loss` returns it and the new state."""

    @jax.jit
    def step(params, rest, key, x, y):
        (value, rest), grads = jax.value_and_grad(loss, has_aux=True)(params, rest, key, x, y)
        return value, jax.tree.map(lambda p, g: p - RATE * g, params, grads), rest

    losses = []
    for i, batch in enumerate(zip(*batches(), strict=True)):
        own = None if key is None else jax.random.fold_in(key, i)
        value, params, rest = step(params, rest, own, *batch)
        losses.append(value)
    return losses, params, rest


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        x = linen.Dense(4)(x)
        x = linen.tanh(linen.BatchNorm(use_running_average=not train, momentum=0.5)(x))
        return linen.Dense(1)(linen.Dropout(0.5, deterministic=not train)(x))


def linen_loss(params, rest, key, x, y):
    variables = {"params": params, "batch_stats": rest}
    rngs, names = {"dropout": key}, ["batch_stats"]
    out, new = LinenNet().apply(variables, x, train=True, rngs=rngs, mutable=names)
    return mse(out, y), new["batch_stats"]


def linen_start():
    variables = LinenNet().init(jax.random.key(0), jnp.ones((1, 3)), train=False)
    return variables["params"], variables["batch_stats"]


@haiku.transform_with_state
def haiku_net(x):
    x = haiku.BatchNorm(True, True, 0.5)(haiku.Linear(4)(x), is_training=True)
    return haiku.Linear(1)(haiku.dropout(haiku.next_rng_key(), 0.5, jnp.tanh(x)))


def haiku_loss(params, rest, key, x, y):
    out, rest = haiku_net.apply(params, rest, key, x)
    return mse(out, y), rest


def haiku_start():
    return haiku_net.init(jax.random.key(0), jnp.ones((2, 3)))


class EquinoxNet(equinox.Module):
    first: equinox.nn.Linear
    norm: equinox.nn.BatchNorm
    dropout: equinox.nn.Dropout
    last: equinox.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key)
        self.first = equinox.nn.Linear(3, 4, key=keys[0])
        self.norm = equinox.nn.BatchNorm(4, "batch", momentum=0.5, mode="batch")
        self.dropout = equinox.nn.Dropout(0.5)
        self.last = equinox.nn.Linear(4, 1, key=keys[1])

    def __call__(self, x, state, key):
        x, state = self.norm(self.first(x), state)
        return self.last(self.dropout(jnp.tanh(x), key=key)), state


def equinox_start():
    model, rest = equinox.nn.make_with_state(EquinoxNet)(jax.random.key(0))
    params, _ = equinox.partition(model, equinox.is_inexact_array)
    return params, rest


def equinox_loss(params, rest, key, x, y):
    model, _ = equinox.nn.make_with_state(EquinoxNet)(jax.random.key(0))
    model = equinox.combine(params, equinox.partition(model, equinox.is_inexact_array)[1])
    keys = jax.random.split(key, len(x))
    model = jax.vmap(model, in_axes=(0, None, 0), out_axes=(0, None), axis_name="batch")
    out, rest = model(x, rest, keys)
    return mse(out, y), rest


def test_nnx_is_as_by_hand():
    step = ol.optimize_loss(of_model, learning_rate=RATE, optimizer="SGD")
    state, losses = steps_of(step, step.init(net()))
    assert_same((losses, state.params, state.model_state), nnx_by_hand())
    assert len(set(map(float, losses))) == STEPS


BY_LIBRARY: dict[str, Any] = {
    "linen": (linen_start, linen_loss),
    "haiku": (haiku_start, haiku_loss),
    "equinox": (equinox_start, equinox_loss),
}


@pytest.fixture
def as_libraries_need_it():
    """Haiku and Equinox add and multiply arrays of other kinds and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.usefixtures("as_libraries_need_it")
@pytest.mark.parametrize("library", BY_LIBRARY)
def test_another_library_is_as_by_hand(library):
    """With a guard, too, which keeps the state from before the loss has used it up."""
    start, of_parts = BY_LIBRARY[library]

    def loss(params, x, y, *, model_state, key):
        value, rest = of_parts(params, model_state, key, x, y)
        return value, ol.Aux(model_state=rest)

    step = ol.optimize_loss(loss, learning_rate=RATE, optimizer="SGD", skip="nonfinite")
    params, rest = start()
    state, losses = steps_of(step, step.init(params, model_state=rest, key=jax.random.key(7)))
    params, rest = start()
    wanted = by_hand(of_parts, params, rest, jax.random.key(7))
    assert_same((losses, state.params, state.model_state), wanted)


# Modules of flax nnx in all that a step can do.


def made(**options):
    return ol.optimize_loss(of_model, **{"learning_rate": RATE, "optimizer": "SGD"} | options)


def test_many_steps_of_a_module_are_single_ones():
    step = made()
    state, metrics = step.many(step.init(net()), *batches())
    losses, params, rest = nnx_by_hand()
    np.testing.assert_allclose(metrics["loss"], losses, 1e-6)
    for a, b in zip(raw((state.params, state.model_state)), raw((params, rest)), strict=True):
        np.testing.assert_allclose(a, b, 1e-5, 1e-6)


def test_a_split_module_is_trained_as_the_module():
    graph, params, rest = nnx.split(net(), nnx.Param, ...)

    def loss(params, x, y, *, model_state):
        model = nnx.merge(graph, params, model_state)
        value = of_model(model, x, y)
        return value, ol.Aux(model_state=nnx.state(model, nnx.Not(nnx.Param)))

    step = ol.optimize_loss(loss, learning_rate=RATE, optimizer="SGD", skip="nonfinite")
    state, losses = steps_of(step, step.init(params, model_state=rest))
    assert_same((losses, state.params, state.model_state), nnx_by_hand())


def test_the_trained_module_comes_back():
    step, model = made(), net()
    before = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    state, _ = steps_of(step, step.init(model))
    assert_same(nnx.state(model, nnx.Param), before)
    x, y = (part[0] for part in batches())
    trained = state.model
    trained.eval()
    nnx.update(model, state.params, state.model_state)
    model.eval()
    np.testing.assert_array_equal(trained(x), model(x))
    assert of_model(trained, x, y) == of_model(model, x, y)
    steps_of(step, state.set(learning_rate=0.0))  # the state was not changed by its modules


def test_a_batch_that_is_skipped_changes_no_state_of_a_module():
    step = made(skip="nonfinite")
    state = step.init(net())
    before = raw((state.params, state.model_state))
    x, y = (part[0] for part in batches())
    state, metrics = step(state, x * jnp.nan, y)
    assert metrics["skipped"] == 1
    for a, b in zip(raw((state.params, state.model_state)), before, strict=True):
        np.testing.assert_array_equal(a, b)
    state, losses = steps_of(step, state)
    assert_same(losses, nnx_by_hand()[0])


def test_each_batch_of_an_accumulation_advances_a_module():
    step = made(accumulate=STEPS)
    state, _ = step.run(step.init(net()), zip(*batches(), strict=True), steps_per_call=2)
    assert state.step == 1
    assert state.model_state["dropout"]["rngs"]["count"][...] == STEPS
    mean = jnp.zeros(4)
    for x in batches()[0]:
        mean = 0.5 * mean + 0.5 * net().first(x).mean(0)
    np.testing.assert_allclose(state.model_state["norm"]["mean"][...], mean, 1e-5, 1e-6)


def test_both_gradients_of_sam_see_one_dropout():
    """At a radius that moves nothing, they are the gradient of the parameters."""
    step = made(sam=1e-12)
    state, losses = steps_of(step, step.init(net()))
    wanted, params, _ = nnx_by_hand()
    np.testing.assert_allclose(losses, wanted, 1e-5)
    for a, b in zip(raw(state.params), raw(params), strict=True):
        np.testing.assert_allclose(a, b, 1e-4, 1e-5)


def saved_and_restored(state, step, folder):
    ol.save(folder / "state.safetensors", state)
    return ol.restore(folder / "state.safetensors", like=step.init(Net(nnx.Rngs(1))))[0]


def through_dicts(state, step, folder):
    return ol.from_state_dict(step.init(Net(nnx.Rngs(1))), ol.to_state_dict(state))


def through_flax(state, step, folder):
    data = flax.serialization.to_bytes(state)
    return flax.serialization.from_bytes(step.init(Net(nnx.Rngs(1))), data)


def pickled(state, step, folder):
    return pickle.loads(pickle.dumps(state))


@pytest.mark.parametrize("way", [saved_and_restored, through_dicts, through_flax, pickled])
def test_a_state_of_a_module_is_kept(way, tmp_path):
    step = made()
    state, _ = step(step.init(net()), *(part[0] for part in batches()))
    new = way(state, step, tmp_path)
    assert_same((new.params, new.model_state), (state.params, state.model_state))
    wanted, _ = step(state, *(part[1] for part in batches()))
    got, _ = step(new, *(part[1] for part in batches()))
    assert_same((got.params, got.model_state), (wanted.params, wanted.model_state))


def test_a_module_is_explained():
    shown = made().explain(net())
    assert [row.name for row in shown.rows] == [
        "first/bias", "first/kernel", "last/bias", "last/kernel", "norm/bias", "norm/scale",
    ]  # fmt: skip
    as_shapes = made().explain(nnx.eval_shape(net))
    assert as_shapes.rows == shown.rows
    rest = raw(made().init(net()).model_state)
    assert shown.total_bytes >= shown.param_bytes + sum(x.nbytes for x in rest if x.ndim)


def test_a_module_on_a_mesh_stays_there():
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    model = net()
    spread = NamedSharding(mesh, PartitionSpec())
    nnx.update(model, jax.device_put(nnx.state(model), spread))
    step = made(shard_state="data", optimizer="Adam")
    state, _ = step(step.init(model), *(part[0] for part in batches()))
    assert {x.sharding for x in jax.tree.leaves(state.model_state)} == {spread}


def test_runs_of_a_sweep_have_modules_of_their_own():
    step = made()
    init = lambda key: Net(nnx.Rngs(key))
    found = step.sweep(step.init(net()), *batches(), seeds=2, init=init)
    _, metrics = step.many(step.init(init(jax.random.key(1))), *batches())
    np.testing.assert_allclose(found.losses[1], metrics["loss"], 1e-5)
    assert not np.array_equal(found.losses[0], found.losses[1])


def test_several_modules_are_one_tree():
    model = {"body": nnx.Linear(3, 4, rngs=nnx.Rngs(0)), "head": nnx.Linear(4, 1, rngs=nnx.Rngs(1))}
    loss = lambda model, x, y: mse(model["head"](model["body"](x)), y)
    step = ol.optimize_loss(loss, learning_rate=RATE, variables="head/**")
    state, _ = step(step.init(model), *(part[0] for part in batches()))
    assert_same(state.model["body"].kernel, model["body"].kernel)
    assert not np.array_equal(state.model["head"].kernel[...], model["head"].kernel[...])


# What a user may get wrong.


def test_a_module_beside_arrays_is_refused():
    with pytest.raises(ol.InvalidType, match=r"tree of modules alone. Received: .*\['scale'\]"):
        made().init({"net": net(), "scale": jnp.ones(3)})


def test_a_module_has_its_own_model_state():
    with pytest.raises(ValueError, match="the module has its own state"):
        made().init(net(), model_state=jnp.ones(3))
    step = ol.optimize_loss(lambda model, x, *, model_state: 0.0, learning_rate=RATE)
    with pytest.raises(ValueError, match="the module has its own state"):
        step.init(net())
    returned = lambda model, x: (of_model(model, x, x), ol.Aux(model_state=jnp.ones(3)))
    step = ol.optimize_loss(returned, learning_rate=RATE)
    with pytest.raises(ValueError, match="the state that it leaves in the module is taken"):
        step(step.init(net()), jnp.ones((8, 3)))


def test_a_state_of_parameters_has_no_model():
    step = ol.optimize_loss(lambda p: p["w"] ** 2, learning_rate=RATE)
    with pytest.raises(ol.InvalidType, match=r"was given to `step\.init"):
        _ = step.init({"w": 1.0}).model


class Adding(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jnp.ones(3))

    def __call__(self, x):
        self.seen = nnx.Intermediate(x)
        return x * self.w[...]


def test_state_that_the_loss_adds_is_named():
    step = ol.optimize_loss(lambda model, x: jnp.sum(model(x)), learning_rate=RATE)
    with pytest.raises(ol.TreeMismatch, match=r"seen.*nnx.pop"):
        step(step.init(Adding()), jnp.ones(3))

    def popped(model, x):
        loss = jnp.sum(model(x))
        seen: Any = nnx.pop(model, nnx.Intermediate)
        return loss, ol.Aux(metrics={"seen": jnp.sum(seen["seen"][...])})

    step = ol.optimize_loss(popped, learning_rate=RATE)
    _, metrics = step(step.init(Adding()), jnp.ones(3))
    assert metrics["seen"] == 3


def test_a_parameter_that_the_loss_writes_to_is_named():
    def loss(model, x, y):
        value = of_model(model, x, y)
        model.last.bias[...] = jnp.zeros(1)
        return value

    step = ol.optimize_loss(loss, learning_rate=RATE)
    with pytest.warns(UserWarning, match=r"writes to parameters.*'last/bias'"):
        step(step.init(net()), *(part[0] for part in batches()))


def unmade_equinox():
    model = EquinoxNet(jax.random.key(0))
    return equinox.partition(model, equinox.is_inexact_array)[0]


MIXED: dict[str, tuple[Any, str]] = {
    "nnx-without-a-filter": (
        lambda: nnx.split(net())[1],
        r"RngCount 'dropout/rngs/count', RngKey 'dropout/rngs/key', BatchStat 'norm/mean'.*"
        r"step.init\(model\)",
    ),
    "nnx-statistics-alone": (
        lambda: nnx.state(net(), nnx.BatchStat),
        r"BatchStat 'norm/mean', BatchStat 'norm/var'",
    ),
    "nnx-own-kind": (
        lambda: nnx.state(nnx.Dict(w=nnx.Param(jnp.ones(2)), mean=nnx.Variable(jnp.ones(2)))),
        r"Variable 'mean'",
    ),
    "linen": (
        lambda: LinenNet().init(jax.random.key(0), jnp.ones((1, 3)), train=False),
        r"the collection 'batch_stats'.*variables\['params'\]",
    ),
    "haiku": (haiku_start, r"the state '1/batch_norm/~/mean_ema/average'.*model.init"),
    "equinox": (equinox_start, r"State at '1'.*make_with_state"),
    "equinox-without-its-state": (unmade_equinox, r"StateIndex at 'norm/.*make_with_state"),
}


@pytest.mark.usefixtures("as_libraries_need_it")
@pytest.mark.parametrize("name", MIXED)
def test_state_among_the_parameters_is_named(name):
    start, message = MIXED[name]
    params = start()
    step = ol.optimize_loss(lambda params: 0.0, learning_rate=RATE)
    for of_params in (step.init, step.explain):
        with pytest.raises(ol.InvalidType, match=f"parameters alone.*{message}"):
            of_params(params)


class Scale(nnx.Variable):
    """A user's own kind of parameter."""


@pytest.mark.parametrize(
    "params",
    [
        lambda: nnx.state(nnx.Dict(w=Scale(jnp.ones(2)))),
        lambda: {"params": jnp.ones(2), "scale": jnp.ones(2)},
        lambda: ({"w": jnp.ones(2)}, {"mean_ema": {"average": jnp.ones(2)}}),
    ],
    ids=["own-kind-alone", "params-of-a-user", "two-trees"],
)
def test_parameters_of_any_name_are_trained(params):
    step = ol.optimize_loss(lambda p: sum(map(jnp.sum, jax.tree.leaves(p))), learning_rate=RATE)
    state, _ = step(step.init(params()))
    assert all((x != 1).all() for x in jax.tree.leaves(state.params))
