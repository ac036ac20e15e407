"""Keras' callbacks set each learning rate of a `KerasOptimizer`; errors say when to use one."""

from typing import Any

import jax
import keras
import numpy as np
import optax
import pytest

from optimize_loss import optimizers as optim
from optimize_loss import transforms as T
from optimize_loss.keras import KerasOptimizer
from tests.optimizers.custom_optimizers import MomentumSGD

# Keras' variables make copies for numpy as numpy 1 asked for them.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

theirs: Any = keras.optimizers


def callbacks():
    """Return a schedule that halves the rate and a plateau in every epoch but the first."""
    plateau = keras.callbacks.ReduceLROnPlateau("loss", 0.4, 0, min_delta=100.0)
    return [keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2), plateau]


def fitted(optimizer):
    """Return the rates of three epochs by name, and the weights after them."""
    keras.utils.set_random_seed(0)
    model: Any = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, name="head")])
    x = np.array([[1, 2], [3, -1]], np.float32)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        model.compile(optimizer=optimizer, loss="mse")
        history = model.fit(x, x[:, :1], 2, 3, verbose=0, callbacks=callbacks()).history
    return {n: x for n, x in history.items() if n != "loss"}, model.get_weights()


# Ways to give one rate of 0.1, and what Keras makes of the same.
ONE_RATE = {
    "number": (lambda: KerasOptimizer(optim.SGD(0.1)), "SGD"),
    "schedule": (lambda: KerasOptimizer(optim.SGD(lambda step: 0.1 + 0.0 * step)), "SGD"),
    "name": (lambda: KerasOptimizer("SGD", 0.1), "SGD"),
    "class": (lambda: KerasOptimizer(optim.SGD, 0.1), "SGD"),
    "function": (lambda: KerasOptimizer(lambda rate: T.ScaleByLearningRate(rate), 0.1), "SGD"),
    "link": (lambda: KerasOptimizer(T.ScaleByMomentum(0.0), 0.1), "SGD"),
    "scaled": (lambda: KerasOptimizer(optim.LossScaleOptimizer(optim.SGD(0.1))), "SGD"),
    "inside-the-rule": (lambda: KerasOptimizer(optim.Ftrl(0.1)), "Ftrl"),
    "decay": (lambda: KerasOptimizer(optim.AdamW(0.1)), "AdamW"),
    "two-rules": (lambda: KerasOptimizer(optim.Muon(0.1)), "Muon"),
    "injected": (lambda: KerasOptimizer(optax.inject_hyperparams(optax.sgd)(0.1)), "SGD"),
    "injected-in-a-chain": (
        lambda: KerasOptimizer(T.chain(a=optax.inject_hyperparams(optax.sgd)(0.1))),
        "SGD",
    ),
}


@pytest.fixture(scope="module")
def of_keras():
    return {name: fitted(getattr(theirs, name)(0.1)) for name in {n for _, n in ONE_RATE.values()}}


@pytest.mark.parametrize("name", ONE_RATE)
def test_callbacks_set_one_rate(name, of_keras):
    make, same = ONE_RATE[name]
    (rates, weights), (wanted_rates, wanted) = fitted(make()), of_keras[same]
    assert rates == {"learning_rate": pytest.approx([0.05, 0.025, 0.005])}
    assert rates == {n: pytest.approx(x) for n, x in wanted_rates.items()}
    for got, w in zip(weights, wanted, strict=True):
        np.testing.assert_allclose(got, w, 1e-4, 1e-6)


OWN = {
    "update-step": (MomentumSGD(0.1, momentum=0.5), optim.SGD(0.1, momentum=0.5)),
    "chain": (
        T.chain(momentum=T.ScaleByMomentum(0.5), rate=T.ScaleByLearningRate(0.1)),
        optim.MomentumOptimizer(0.1, 0.5),
    ),
}


@pytest.mark.parametrize("name", OWN)
def test_callbacks_set_the_rate_of_rules_of_ones_own(name):
    (rates, weights), (_, wanted) = (fitted(KerasOptimizer(made)) for made in OWN[name])
    assert rates == {"learning_rate": pytest.approx([0.05, 0.025, 0.005])}
    for got, w in zip(weights, wanted, strict=True):
        np.testing.assert_allclose(got, w, 1e-5)


def test_callbacks_set_each_rate_of_a_chain():
    links = {
        "slow": T.ForParameters("**/bias", T.ScaleByLearningRate(0.1)),
        "fast": T.ForParameters("**/kernel", T.ScaleByLearningRate(0.2)),
        "average": T.AverageParams(0.5),
    }
    made: Any = KerasOptimizer(T.chain(**links))
    with pytest.raises(AttributeError, match=r"each of \['slow', 'fast'\]. Set those of `optimi"):
        _ = made.learning_rate
    rates, _ = fitted(made)
    assert rates == {
        "learning_rate_slow": pytest.approx([0.05, 0.025, 0.005]),
        "learning_rate_fast": pytest.approx([0.1, 0.05, 0.01]),
    }
    slow, fast = made.optimizers
    assert (len(slow._trainable_variables), len(fast._trainable_variables)) == (2, 0)
    with pytest.raises(AttributeError, match="`momentum` is not an option of 'slow'"):
        _ = slow.momentum


@pytest.mark.parametrize(
    "made", [optax.sgd(0.1), optax.adam(lambda step: 0.1)], ids=["sgd", "adam"]
)
def test_a_rate_inside_of_optax_says_how_to_give_it(made):
    optimizer: Any = KerasOptimizer(made)
    with pytest.raises(AttributeError, match=r"if it is a number in `optax.inject_hyperparams`"):
        _ = optimizer.learning_rate


@pytest.mark.parametrize("made", [optim.Adam(0.5), MomentumSGD(0.5)], ids=["adam", "own"])
def test_keras_says_what_to_write_around_an_optimizer(made):
    model: Any = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    advice = f"In Keras write `optimize_loss.keras.KerasOptimizer({made!r})`"
    with pytest.raises(ValueError, match="Could not interpret optimizer") as caught:
        model.compile(optimizer=made, loss="mse")
    assert str(caught.value).endswith(advice)
    assert f"{made}" == f"{made:s}" == str(made) == repr(made)  # elsewhere it is only itself
