"""Keras: what `fit`, callbacks and files make of the adapter."""

import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest

import optimize_loss as ol
from optimize_loss import optimizers as optim
from optimize_loss import transforms as T
from optimize_loss.keras import KerasOptimizer
from tests.clients.regression import Momentum, as_keras_needs_it, mse, regression

# Keras' variables make copies for numpy as numpy 1 asked for them.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


# Keras: what `fit`, callbacks and files make of the adapter.


def keras_model(names=("first", "second"), **kwargs) -> Any:
    """Return a model with two layers of the same shape."""
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [keras.Input((3,)), *(keras.layers.Dense(3, name=name, **kwargs) for name in names)],
        name="model",
    )


def fit(model, optimizer=None, epochs=2, loss: Any = "mse", callbacks=()):
    """Compile the model if there is an optimizer, train it for epochs of 8 batches, return it."""
    x, y = regression()
    with as_keras_needs_it():
        if optimizer is not None:
            model.compile(optimizer=optimizer, loss=loss)
        model.fit(x, jnp.tile(y, 3), 8, epochs, verbose=0, shuffle=False, callbacks=list(callbacks))
    return model


def assert_same_weights(got, wanted, relative=1e-6):
    for a, b in zip(got.get_weights(), wanted.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, relative, relative)


# ours, Keras'; the same numbers.
EQUAL = {
    "adam": (optim.Adam(0.01), lambda: keras.optimizers.Adam(0.01)),
    "sgd-with-options": (
        optim.SGD(0.1, momentum=0.9, nesterov=True, weight_decay=0.1, clipnorm=0.1),
        lambda: keras.optimizers.SGD(
            0.1, momentum=0.9, nesterov=True, weight_decay=0.1, clipnorm=0.1
        ),
    ),
    "own-class": (Momentum(0.05), lambda: keras.optimizers.SGD(0.05, momentum=0.9)),
    "accumulation": (
        optim.Adam(0.01, gradient_accumulation_steps=4),
        lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=4),
    ),
}


@pytest.mark.parametrize("name", EQUAL)
def test_fit_does_what_keras_does(name):
    ours, theirs = EQUAL[name]
    got, wanted = fit(keras_model(), KerasOptimizer(ours)), fit(keras_model(), theirs())
    assert_same_weights(got, wanted, 1e-5)
    assert int(got.optimizer.iterations) == int(wanted.optimizer.iterations)


def test_parameters_have_the_paths_of_keras():
    model = fit(keras_model(), KerasOptimizer(optim.Adam(0.01, clipvalue=1.0)))
    paths = [v.path.replace("/", "_") for v in model.trainable_variables]
    slots = [f"adam_{slot}_{path}" for slot in "mv" for path in paths]
    numbers = ["iteration", "learning_rate", "adam_beta_1", "adam_beta_2", "adam_epsilon"]
    names = [v.name for v in model.optimizer.variables]
    assert sorted(names) == sorted([*numbers, "clip_max_value", *slots])


class Seen(keras.callbacks.Callback):
    """Keeps the weights after every batch."""

    model: Any

    def on_train_begin(self, logs=None):
        self.weights = [self.model.get_weights()]

    def on_train_batch_end(self, batch, logs=None):
        self.weights.append(self.model.get_weights())


def test_the_model_has_the_averages_at_the_end():
    """a ← a + (1-β)(w - a), from the first new weights on, as in Keras 3."""
    seen = Seen()
    model = fit(
        keras_model(),
        KerasOptimizer(optim.SGD(0.1, use_ema=True, ema_momentum=0.8)),
        callbacks=[seen],
    )
    _, average, *later = seen.weights
    for weights in later:
        average = [0.8 * a + 0.2 * w for a, w in zip(average, weights, strict=True)]
    for a, w, last in zip(average, model.get_weights(), seen.weights[-1], strict=True):
        np.testing.assert_allclose(w, a, 1e-5, 1e-6)
        assert not np.allclose(w, last, 1e-3)


def halved(epoch, rate):
    return rate / 2


def plateau():
    return keras.callbacks.ReduceLROnPlateau("loss", min_delta=10.0, patience=1, factor=0.1)


@pytest.mark.parametrize(
    "callback",
    [lambda: keras.callbacks.LearningRateScheduler(halved), plateau],
    ids=["scheduler", "plateau"],
)
def test_callbacks_set_the_rate_and_nothing_is_traced_anew(callback):
    traces = []

    def loss(y, prediction):
        traces.append(0)
        return mse(prediction, y)

    model = fit(keras_model(), KerasOptimizer(optim.SGD(0.1)), 1, loss)
    before = len(traces)
    fit(model, None, 4, loss, [callback()])
    assert len(traces) == before
    wanted = fit(keras_model(), keras.optimizers.SGD(0.1), 1)
    fit(wanted, None, 4, callbacks=[callback()])
    assert_same_weights(model, wanted)
    assert model.history.history["learning_rate"] == wanted.history.history["learning_rate"]
    assert model.history.history["learning_rate"][-1] < 0.1


def test_a_rate_set_over_a_schedule_holds_until_it_is_given_back():
    schedule = ol.schedules.ExponentialDecay(0.1, 8, 0.5)  # halved with every epoch
    model = fit(keras_model(), KerasOptimizer("SGD", schedule), 2)
    optimizer = model.optimizer
    np.testing.assert_allclose(optimizer.learning_rate, 0.025, 1e-6)
    before = model.get_weights()
    optimizer.learning_rate = 0.0
    fit(model, None, 1)
    for a, b in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)
    optimizer.learning_rate = None
    np.testing.assert_allclose(model.optimizer.learning_rate, 0.0125, 1e-6)
    with pytest.raises(ValueError, match=r"`learning_rate` must be at least 0\. Received: "):
        optimizer.learning_rate = -1.0


STATEFUL = {
    "adam": lambda: optim.Adam(0.01, use_ema=True, clipnorm=1.0),
    "own-class": lambda: Momentum(0.05),
    "optax": lambda: optax.lion(0.01),
    "chain": lambda: T.chain(
        noise=T.AddNoise(1.0), adam=T.ScaleByAdam(), rate=T.ScaleByLearningRate(0.01)
    ),
}


@pytest.mark.parametrize("name", STATEFUL)
def test_training_goes_on_from_a_file_of_weights(name, tmp_path):
    """A file of another process may have other names in it; their order must not matter.

    Noise is a function of the names, so for the chain with noise these stay.
    """
    make, path = STATEFUL[name], str(tmp_path / "model.weights.h5")
    model = fit(keras_model(("b", "a")), KerasOptimizer(make()))
    model.save_weights(path)
    again = keras_model(("b", "a") if name == "chain" else ("a", "b"))
    again.compile(optimizer=KerasOptimizer(make()), loss="mse")
    again.optimizer.build(again.trainable_variables)
    again.load_weights(path)
    assert_same_weights(fit(again), fit(model))
    assert int(again.optimizer.iterations) == int(model.optimizer.iterations) == 32


@pytest.mark.parametrize("name", ["adam", "own-class"])
def test_training_goes_on_from_a_file_of_the_model(name, tmp_path):
    model = fit(keras_model(), KerasOptimizer(STATEFUL[name](), name="mine"))
    model.optimizer.learning_rate = 0.02
    model.save(tmp_path / "model.keras")
    objects = {"Momentum": Momentum}
    again: Any = keras.saving.load_model(tmp_path / "model.keras", custom_objects=objects)
    assert again.optimizer.get_config() == model.optimizer.get_config()
    np.testing.assert_allclose(again.optimizer.learning_rate, 0.02)
    assert_same_weights(fit(again), fit(model))


def test_a_configuration_becomes_an_equal_optimizer():
    schedule = ol.schedules.CosineDecay(0.1, 10)
    config: Any = keras.optimizers.serialize(KerasOptimizer("Nadam", schedule))
    again: Any = keras.optimizers.deserialize(config)
    assert again.get_config() == config["config"]
    assert_same_weights(
        fit(keras_model(), again), fit(keras_model(), KerasOptimizer("Nadam", schedule))
    )


def test_what_has_no_configuration_is_saved_without(tmp_path):
    model = fit(keras_model(), KerasOptimizer(STATEFUL["chain"]()))
    model.save(tmp_path / "model.keras")
    with pytest.raises(ValueError, match="load the model with `compile=False`"):
        keras.saving.load_model(tmp_path / "model.keras")
    again: Any = keras.saving.load_model(tmp_path / "model.keras", compile=False)
    assert_same_weights(again, model)


def nothing(y, prediction):
    """A loss without a slope."""
    return jnp.mean(0 * prediction)


def test_variables_are_excluded_from_weight_decay():
    """One by its name, one as a variable; the others are multiplied by 1 - rate · decay."""
    model = keras_model(bias_initializer="ones")
    before = model.get_weights()
    optimizer = KerasOptimizer(optim.AdamW(0.5, weight_decay=0.5))
    excluded = [model.trainable_variables[0]]
    optimizer.exclude_from_weight_decay(var_list=excluded, var_names=["second/bias"])
    fit(model, optimizer, 1, nothing)
    kept = [bool(np.array_equal(a, b)) for a, b in zip(model.get_weights(), before, strict=True)]
    assert kept == [True, False, False, True]
    with pytest.raises(ValueError, match="must be called before the optimizer is built"):
        optimizer.exclude_from_weight_decay(var_names=["bias"])


FIRST_STAYS = {
    "multiplier": T.chain(
        multiply=T.MultiplyGradients({"**/first/*": 0.0}), rate=T.ScaleByLearningRate(0.1)
    ),
    "multi-optimizer": optim.MultiOptimizer({"**/first/*": optim.SGD(0.0)}, optim.Adam(0.1)),
}


@pytest.mark.parametrize("name", FIRST_STAYS)
def test_patterns_are_matched_against_paths(name):
    model = keras_model()
    before = model.get_weights()
    fit(model, KerasOptimizer(FIRST_STAYS[name]), 1)
    kept = [bool(np.array_equal(a, b)) for a, b in zip(model.get_weights(), before, strict=True)]
    assert kept == [True, True, False, False]


def test_a_pattern_that_matches_nothing_names_the_nearest_paths():
    tx = T.chain(multiply=T.MultiplyGradients({"**/frist/*": 0.0}), sgd=T.ScaleByLearningRate(0.1))
    with pytest.raises(ValueError, match=r"'\*\*/frist/\*'\. Nearest names: '\w+/first/"):
        fit(keras_model(), optimizer := KerasOptimizer(tx))
    assert not optimizer.built


def test_a_state_may_hold_the_parameters_themselves_twice():
    """As that of optax.lookahead; `fit` gives the memory of both to its steps."""
    downhill: Any = lambda grads, state, _: (jax.tree.map(lambda g: -0.1 * g, grads), state)
    tx = optax.GradientTransformation(lambda params: (params, params), downhill)
    wanted = fit(keras_model(), KerasOptimizer(optim.SGD(0.1)))
    assert_same_weights(fit(keras_model(), KerasOptimizer(tx)), wanted)


def test_constraints_hold_after_every_update():
    model = fit(keras_model(kernel_constraint="non_neg"), KerasOptimizer(optim.SGD(0.5)))
    assert all(kernel.min() >= 0 for kernel in model.get_weights()[::2])


@pytest.mark.parametrize("optimizer", [optim.Adam(0.1), Momentum(0.1), FIRST_STAYS["multiplier"]])
def test_a_keras_model_keeps_an_optimizer_as_it_is(optimizer):
    model = keras_model()
    model.mine = optimizer
    assert model.mine is optimizer


def variables():
    return [keras.Variable(jnp.array([1.0, 2.0]), name=name) for name in ("one", "two")]


def test_a_gradient_that_is_none_leaves_its_variable_alone():
    (one, two), optimizer = variables(), KerasOptimizer(optim.SGD(0.5, momentum=1.0))
    optimizer.apply([jnp.ones(2), jnp.ones(2)], [one, two])
    with pytest.warns(UserWarning, match="Gradients do not exist for variables"):
        optimizer.apply([jnp.ones(2), None])
    np.testing.assert_array_equal(one.numpy(), [-0.5, 0.5])
    np.testing.assert_array_equal(two.numpy(), [0.5, 1.5])
    assert int(optimizer.iterations) == 2
    with pytest.raises(ValueError, match="No gradients provided for any variable"):
        optimizer.apply([None, None])


def test_stateless_apply_is_apply():
    ours, theirs = variables(), variables()
    grads = [jnp.ones(2), jnp.array([-1.0, 3.0])]
    first, second = KerasOptimizer(optim.Adam(0.1)), KerasOptimizer(optim.Adam(0.1))
    second.build(theirs)
    values, state = [v.value for v in theirs], [v.value for v in second.variables]
    step = jax.jit(second.stateless_apply)
    for _ in range(3):
        first.apply_gradients(zip(grads, ours, strict=True))
        values, state = step(state, grads, values)
    for v, value in zip(ours, values, strict=True):
        np.testing.assert_allclose(v.numpy(), value, 1e-6)


@pytest.mark.parametrize("of_keras", [False, True], ids=["of-its-own", "of-keras"])
def test_the_loss_is_scaled_once(of_keras):
    scaled: Any = optim.Adam(0.01) if of_keras else optim.LossScaleOptimizer(optim.Adam(0.01))
    optimizer = KerasOptimizer(scaled)
    if of_keras:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    wanted = fit(keras_model(), KerasOptimizer(optim.Adam(0.01)))
    assert_same_weights(fit(keras_model(), optimizer), wanted)


def test_a_loss_scaled_twice_is_an_error():
    inner = KerasOptimizer(optim.Adam(0.01, loss_scale_factor=8.0))
    with pytest.raises(ValueError, match=r"must be scaled once: .*`auto_scale_loss=False`"):
        keras.optimizers.LossScaleOptimizer(inner).build(variables())


WITHOUT_ONE_RATE = {
    "optax": (optax.adam(0.1), "`optimizer` has no `learning_rate` that can be read and set"),
    "many": (FIRST_STAYS["multi-optimizer"], "There is a `learning_rate` for each of"),
}


@pytest.mark.parametrize("name", WITHOUT_ONE_RATE)
def test_without_one_rate_there_is_no_learning_rate(name):
    optimizer, message = WITHOUT_ONE_RATE[name]
    made: Any = KerasOptimizer(optimizer)
    assert not hasattr(made, "learning_rate")
    with pytest.raises(AttributeError, match=message):
        made.learning_rate = 0.1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((3,), "`optimizer` must be a name"),
        (("Adma", 0.1), "`optimizer` must be one of"),
        (("Adam",), "`learning_rate` must be given"),
        ((optim.Adam(0.1), 0.1), "`learning_rate` must be None"),
    ],
)
def test_what_is_no_optimizer_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        KerasOptimizer(*given)


# In processes of their own.


def run(code, **environment):
    """Run Python code with one line of output, its last line of errors if it fails."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", **environment},
    )
    return (done.stderr if done.returncode else done.stdout).strip().splitlines()[-1]


def test_another_backend_is_refused():
    code = "from optimize_loss.keras import KerasOptimizer; KerasOptimizer('Adam', 0.1)"
    assert "set KERAS_BACKEND=jax" in run(code, KERAS_BACKEND="numpy")


def test_without_keras_the_error_says_what_to_install():
    code = "import sys; sys.modules['keras'] = None; import optimize_loss.keras"
    assert "ImportError: " in (message := run(code))
    assert "pip install keras" in message


SHARDED = """
import keras, numpy as np
from keras import distribution
from optimize_loss.keras import KerasOptimizer

mesh = distribution.DeviceMesh((2, 2), ("batch", "model"), distribution.list_devices())
layout = distribution.LayoutMap(mesh)
layout[".*/kernel"] = (None, "model")
distribution.set_distribution(
    distribution.ModelParallel(layout_map=layout, batch_dim_name="batch"))
model = keras.Sequential([keras.layers.Dense(4)])
model.compile(optimizer=KerasOptimizer("Nadam", 0.01), loss="mse")
model.fit(np.ones((8, 3)), np.ones((8, 4)), verbose=0)
kernel = model.trainable_variables[0]
slots = [v for v in model.optimizer.variables if v.shape == kernel.shape]
print(len(slots), {tuple(v.value.sharding.spec) for v in [kernel, *slots]})
"""


def test_slots_are_sharded_as_their_parameters_are():
    got = run(SHARDED, XLA_FLAGS="--xla_force_host_platform_device_count=4")
    assert got == "2 {(None, 'model')}"
