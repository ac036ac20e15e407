"""Models of Keras, flax, Equinox and Haiku, each trained by under ten lines of a user's code."""

import inspect
from typing import Any

import equinox
import flax.training.train_state
import haiku
import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
from flax import linen, nnx

import optimize_loss as ol
from optimize_loss import optimizers as optim
from optimize_loss import transforms as T
from optimize_loss.keras import KerasOptimizer
from tests.clients.regression import ADAM, SGD, Momentum, as_keras_needs_it, mse, regression

# Keras' variables make copies for numpy as numpy 1 asked for them.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


# What users write. Each function returns the loss at the end.


def with_keras(x, y, optimizer):
    keras.utils.set_random_seed(0)
    model: Any = keras.Sequential([keras.layers.Dense(16, "tanh"), keras.layers.Dense(1)])
    model.compile(optimizer=KerasOptimizer(optimizer, 0.02), loss="mse")
    model.fit(x, y, epochs=50, verbose=0)
    return model.evaluate(x, y, verbose=0)


def with_nnx(x, y, optimizer):
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(3, 16, rngs=rngs), nnx.tanh, nnx.Linear(16, 1, rngs=rngs))
    graph, params = nnx.split(model, nnx.Param)
    loss = lambda params, x, y: mse(nnx.merge(graph, params)(x), y)
    step = ol.optimize_loss(loss, learning_rate=0.02, optimizer=optimizer)
    state = step.init(params)
    for _ in range(100):
        state, metrics = step(state, x, y)
    return metrics["loss"]


def with_linen(x, y, optimizer):
    model = linen.Sequential([linen.Dense(16), linen.tanh, linen.Dense(1)])
    loss = lambda params, x, y: mse(model.apply(params, x), y)
    step = ol.optimize_loss(loss, learning_rate=0.02, optimizer=optimizer)
    state = step.init(model.init(jax.random.key(0), x))
    for _ in range(100):
        state, metrics = step(state, x, y)
    return metrics["loss"]


def with_equinox(x, y, optimizer):
    model = equinox.nn.MLP(3, 1, 16, 1, jnp.tanh, key=jax.random.key(0))
    params, static = equinox.partition(model, equinox.is_inexact_array)
    loss = lambda params, x, y: mse(jax.vmap(equinox.combine(params, static))(x), y)
    step = ol.optimize_loss(loss, learning_rate=0.02, optimizer=optimizer)
    state = step.init(params)
    for _ in range(100):
        state, metrics = step(state, x, y)
    return metrics["loss"]


def with_haiku(x, y, optimizer):
    model = haiku.without_apply_rng(haiku.transform(lambda x: haiku.nets.MLP([16, 1])(x)))
    loss = lambda params, x, y: mse(model.apply(params, x), y)
    step = ol.optimize_loss(loss, learning_rate=0.02, optimizer=optimizer)
    state = step.init(model.init(jax.random.key(0), x))
    for _ in range(100):
        state, metrics = step(state, x, y)
    return metrics["loss"]


CLIENTS = [with_nnx, with_linen, with_equinox, with_haiku]


@pytest.mark.parametrize("optimizer", ["Nadam", optim.AdamW], ids=["name", "class"])
@pytest.mark.parametrize("client", CLIENTS)
def test_a_model_learns(client, optimizer):
    assert client(*regression(), optimizer) < 0.05


KERAS = {
    "contribs-name": "Adam",
    "keras-name": "Nadam",
    "class": optim.AdamW,
    "own-class": Momentum,
    "function": lambda rate: optim.Muon(rate, clipnorm=1.0),
    "optax": optax.lion,
    "loss-scale": lambda rate: optim.LossScaleOptimizer(optim.Adam(rate)),
}


@pytest.mark.parametrize("given", KERAS)
def test_a_keras_model_learns(given):
    with as_keras_needs_it():
        assert with_keras(*regression(), KERAS[given]) < 0.05


@pytest.mark.parametrize("client", [with_keras, *CLIENTS])
def test_a_client_is_under_ten_lines(client):
    _, *lines = inspect.getsource(client).splitlines()
    assert len(lines) < 10


# Names of parameters in patterns.


def nnx_params():
    ones = nnx.initializers.ones
    return nnx.state(nnx.Linear(3, 2, bias_init=ones, rngs=nnx.Rngs(0)), nnx.Param)


def linen_params():
    return linen.Dense(2, bias_init=linen.initializers.ones).init(
        jax.random.key(0), jnp.ones((1, 3))
    )


def equinox_params():
    model = equinox.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    return equinox.filter(model, equinox.is_inexact_array)


def haiku_params():
    linear = lambda x: haiku.Linear(2, b_init=haiku.initializers.Constant(1.0))(x)
    return haiku.transform(linear).init(jax.random.key(0), jnp.ones((1, 3)))


BIASES = {"nnx": "bias", "linen": "bias", "equinox": "bias", "haiku": "/b$"}


@pytest.mark.parametrize("library", BIASES)
def test_biases_are_excluded_from_weight_decay_by_name(library):
    """Without a gradient a parameter is multiplied by 1 - rate · decay, and a bias stays."""
    params = globals()[f"{library}_params"]()
    optimizer = optim.AdamW(0.5, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_names=[BIASES[library]])
    loss = lambda params: 0 * sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params))
    step = ol.optimize_loss(loss, optimizer=optimizer)
    state, _ = step(step.init(params))
    for new, old in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(new, (0.75 if old.ndim > 1 else 1.0) * old, rtol=1e-6)


# An optimizer by class where flax and Equinox expect one of optax's.


def in_train_state(tx):
    x, y = regression()
    model = linen.Dense(1)
    state = flax.training.train_state.TrainState.create(
        apply_fn=model.apply, params=model.init(jax.random.key(0), x), tx=tx
    )
    step = jax.jit(
        lambda s: s.apply_gradients(grads=jax.grad(lambda p: mse(s.apply_fn(p, x), y))(s.params))
    )
    for _ in range(10):
        state = step(state)
    return state.params


def in_nnx_optimizer(tx):
    x, y = regression()
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda m: mse(m(x), y))(model))

    for _ in range(10):
        step(model, optimizer)
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def in_equinox(tx):
    x, y = regression()
    model = equinox.nn.Linear(3, 1, key=jax.random.key(0))
    state = tx.init(equinox.filter(model, equinox.is_inexact_array))

    @equinox.filter_jit
    def step(model, state):
        grads = equinox.filter_grad(lambda m: mse(jax.vmap(m)(x), y))(model)
        updates, state = tx.update(grads, state, equinox.filter(model, equinox.is_inexact_array))
        return equinox.apply_updates(model, updates), state

    for _ in range(10):
        model, state = step(model, state)
    return equinox.filter(model, equinox.is_inexact_array)


def adamw_but_for_biases():
    optimizer = optim.AdamW(0.01, epsilon=1e-30, weight_decay=0.1)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    return optimizer


def no_biases(params):
    """Return True for what is no bias, as optax wants to be told."""
    keep = lambda path, _: "bias" not in jax.tree_util.keystr(path)
    return jax.tree_util.tree_map_with_path(keep, params)


RULES = {
    "adamw": (adamw_but_for_biases, optax.adamw(0.01, eps=1e-30, weight_decay=0.1, mask=no_biases)),
    "own-class": (lambda: Momentum(0.01), optax.sgd(0.01, 0.9)),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("place", [in_train_state, in_nnx_optimizer, in_equinox])
def test_an_optimizer_by_class_in_place_of_optaxs(place, rule):
    ours, theirs = RULES[rule]
    with jax.numpy_dtype_promotion("standard"):  # optax multiplies integers by floats
        wanted = place(theirs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), place(ours()), wanted)


def labels(params):
    """Return for each parameter which of `TWO` it is for, as optax wants to be told."""
    return jax.tree.map(lambda keep: "rest" if keep else "bias", no_biases(params))


TWO: Any = {"rest": optax.adam(0.01, eps=1e-30), "bias": optax.sgd(0.1)}
# optax given a tree for the parameters, as its documentation has it; ours; optax given a function.
GROUPS = {
    "mask": (
        lambda params: optax.adamw(0.01, eps=1e-30, weight_decay=0.1, mask=no_biases(params)),
        adamw_but_for_biases,
        RULES["adamw"][1],
    ),
    "partition": (
        lambda params: optax.partition(TWO, labels(params)),
        lambda: optim.MultiOptimizer({"bias": SGD}, ADAM),
        optax.partition(TWO, labels),
    ),
    "multi-transform": (
        lambda params: optax.multi_transform(TWO, labels(params)),
        lambda: T.chain(
            adam=T.ForParameters("kernel", T.ScaleByAdam(epsilon=1e-30)),
            slow=T.ForParameters("kernel", T.ScaleByLearningRate(0.01)),
            fast=T.ForParameters("bias", T.ScaleByLearningRate(0.1)),
        ),
        optax.multi_transform(TWO, labels),
    ),
}


@pytest.mark.parametrize("name", GROUPS)
def test_groups_inside_of_nnx_optimizer(name):
    """A second tree does not match that of the gradients there; patterns need none."""
    with_a_tree, ours, with_a_function = GROUPS[name]
    params = nnx.state(nnx.Linear(3, 1, rngs=nnx.Rngs(0)), nnx.Param)
    with jax.numpy_dtype_promotion("standard"):
        with pytest.raises(ValueError, match=r"structure error|node type mismatch"):
            in_nnx_optimizer(with_a_tree(params))
        wanted = in_nnx_optimizer(with_a_function)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), in_nnx_optimizer(ours()), wanted
    )


def test_an_optimizer_by_class_among_optaxs():
    """Adam for the kernel, behind a clip; the bias stays as it is."""
    adam: Any = optim.Adam(0.01, epsilon=1e-30)
    tx = optax.chain(optax.clip(0.1), adam)
    label = lambda path, _: "no" if "bias" in jax.tree_util.keystr(path) else "yes"
    labels = lambda params: jax.tree_util.tree_map_with_path(label, params)
    with jax.numpy_dtype_promotion("standard"):
        got, wanted = (
            in_train_state(optax.multi_transform({"yes": yes, "no": optax.set_to_zero()}, labels))
            for yes in (tx, optax.chain(optax.clip(0.1), optax.adam(0.01, eps=1e-30)))
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), got, wanted)
