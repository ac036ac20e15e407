"""Schedules as configurations, here and in Keras 3; numbers of steps; rates in a variable."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optimize_loss as ol
from optimize_loss import schedules
from tests.optimizers.test_optimizer_configs import HALVING, SCHEDULES

keras: Any = pytest.importorskip("keras", minversion="3.15")

# For type checkers the fields are floats; what is no number is what is tried here.
S: Any = schedules
FOR_KERAS = [name for name in SCHEDULES if hasattr(keras.optimizers.schedules, name)]
AT = (0, 1, 2, 3, 7)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_configuration_becomes_an_equal_schedule(name):
    schedule = SCHEDULES[name]
    config = json.loads(json.dumps(schedule.get_config()))
    assert list(config) == [field.name for field in dataclasses.fields(schedule)]
    assert type(schedule).from_config(config) == schedule
    described = ol.optimizers.serialize(schedule)
    assert described["config"] == config
    assert described["module"] == "optimize_loss.schedules"
    assert isinstance(schedule, schedules.LearningRateSchedule)


@pytest.mark.parametrize("name", FOR_KERAS)
def test_keras_reads_and_writes_the_same_configurations(name):
    ours = SCHEDULES[name]
    with jax.numpy_dtype_promotion("standard"):
        made = getattr(keras.optimizers.schedules, name)
        theirs = made.from_config({**ours.get_config(), "name": ours.name or name})
        wanted = [float(theirs(step)) for step in AT]
    read = type(ours).from_config(theirs.get_config())
    assert dataclasses.replace(read, name=ours.name) == ours
    np.testing.assert_allclose([float(read(step)) for step in AT], wanted, rtol=1e-6)


def test_all_of_keras_schedules_are_here():
    theirs = {n for n, x in vars(keras.optimizers.schedules).items() if isinstance(x, type)}
    assert theirs <= set(schedules.__all__)


class Root(S.LearningRateSchedule):
    """As one writes it for Keras."""

    def __init__(self, rate):
        self.rate = rate

    def __call__(self, step):
        return self.rate / jnp.sqrt(jnp.asarray(step, jnp.float32) + 1.0)

    def get_config(self):
        return {"rate": self.rate}


@dataclasses.dataclass(frozen=True)
class Floored(schedules.ExponentialDecay):
    floor: float = 0.25

    def __call__(self, step):
        return jnp.maximum(super().__call__(step), self.floor)


@pytest.mark.parametrize("schedule", [Root(0.5), Floored(0.5, 1, 0.5)], ids=["class", "subclass"])
def test_a_schedule_of_ones_own_is_saved_with_its_optimizer(schedule):
    config = json.loads(json.dumps(ol.optimizers.SGD(schedule).get_config()))
    objects: Any = {"Root": Root, "Floored": Floored}
    read = ol.optimizers.SGD.from_config(config, objects).rate
    assert type(read) is type(schedule)
    assert [float(read(step)) for step in AT] == [float(schedule(step)) for step in AT]
    joined = S.Join([HALVING, schedule], [2])
    read = S.Join.from_config(joined.get_config(), custom_objects=objects)
    assert float(read(4)) == float(joined(4))
    with pytest.raises(ValueError, match="`class_name` must be an optimizer, a schedule, or in"):
        S.Join.from_config(joined.get_config())


def test_what_is_missing_in_a_schedule_is_said():
    class Bare(S.LearningRateSchedule):
        pass

    with pytest.raises(NotImplementedError, match="`get_config` of Bare must be defined"):
        Bare().get_config()
    with pytest.raises(NotImplementedError, match="Bare must define `__call__"):
        Bare()(0)
    with pytest.raises(ol.InvalidType, match="A configuration holds"):
        S.Decayed(0.1, lambda rate, step: rate).get_config()
    with pytest.raises(ol.InvalidType, match=r"`rate` is not an option of CosineDecay\. "):
        S.CosineDecay.from_config({"rate": 1.0, "decay_steps": 10})
    with pytest.raises(ol.InvalidType, match="`config` must be a dict"):
        S.CosineDecay.from_config(None)


# Numbers of steps: the others are good, as is the first of each row.

RATE, STEP = 0.5, 3
STEPS = {
    "ExponentialDecay": lambda n: S.ExponentialDecay(RATE, n, 0.5),
    "InverseTimeDecay": lambda n: S.InverseTimeDecay(RATE, n, 0.5),
    "PolynomialDecay": lambda n: S.PolynomialDecay(RATE, n),
    "CosineDecay": lambda n: S.CosineDecay(RATE, n),
    "CosineDecayRestarts": lambda n: S.CosineDecayRestarts(RATE, n),
    "WarmupStableDecay": lambda n: S.WarmupStableDecay(RATE, 1, 1, n),
    "OneCycle": lambda n: S.OneCycle(RATE, n),
    "exponential_decay": lambda n: S.exponential_decay(RATE, STEP, n, 0.5),
    "natural_exp_decay": lambda n: S.natural_exp_decay(RATE, STEP, n, 0.5),
    "inverse_time_decay": lambda n: S.inverse_time_decay(RATE, STEP, n, 0.5),
    "polynomial_decay": lambda n: S.polynomial_decay(RATE, STEP, n),
    "cosine_decay": lambda n: S.cosine_decay(RATE, STEP, n),
    "cosine_decay_restarts": lambda n: S.cosine_decay_restarts(RATE, STEP, n),
    "linear_cosine_decay": lambda n: S.linear_cosine_decay(RATE, STEP, n),
}
WARMUPS = {
    "CosineDecay": lambda n: S.CosineDecay(0.0, 10, warmup_target=RATE, warmup_steps=n),
    "WarmupStableDecay-warmup": lambda n: S.WarmupStableDecay(RATE, n, 1, 5),
    "WarmupStableDecay-stable": lambda n: S.WarmupStableDecay(RATE, 1, n, 5),
    "InverseSquareRootDecay": lambda n: S.InverseSquareRootDecay(RATE, n),
}


@pytest.mark.parametrize("wrong", [0, 1e-3, 1.5, -1, float("inf")])
@pytest.mark.parametrize("name", STEPS)
def test_steps_are_whole_and_at_least_1(name, wrong):
    for whole in (1, 10, 1e4, np.int64(10), np.float32(10)):
        STEPS[name](whole)
    with pytest.raises(
        ValueError, match=rf"_steps` must be a whole number of at least 1.*={wrong}"
    ):
        STEPS[name](wrong)


@pytest.mark.parametrize("wrong", [1e-3, 1.5, -1])
@pytest.mark.parametrize("name", WARMUPS)
def test_steps_of_a_warmup_are_whole_and_may_be_none(name, wrong):
    for whole in (0, 1, 10, 1e4):
        assert np.isfinite(WARMUPS[name](whole)(STEP))
    with pytest.raises(
        ValueError, match=rf"_steps` must be a whole number of at least 0.*={wrong}"
    ):
        WARMUPS[name](wrong)


def test_swapped_arguments_are_told():
    with pytest.raises(ValueError, match=r"`decay_steps` must be a whole .* decay_steps=0\.001"):
        S.CosineDecay(1000, 1e-3)


# Rates in a variable, as `optimizer.learning_rate` is.

OF_A_RATE = {
    "ExponentialDecay": lambda x: S.ExponentialDecay(x, 4, 0.5)(STEP),
    "PolynomialDecay": lambda x: S.PolynomialDecay(x, 4, end_learning_rate=x)(STEP),
    "CosineDecay": lambda x: S.CosineDecay(0.0, 4, warmup_target=x, warmup_steps=2)(STEP),
    "PiecewiseConstantDecay": lambda x: S.PiecewiseConstantDecay([2], [1.0, x])(STEP),
    "OneCycle": lambda x: S.OneCycle(x, 4)(STEP),
    "Decayed": lambda x: S.Decayed(x, lambda rate, step: rate / 2)(STEP),
    "cosine_decay": lambda x: S.cosine_decay(x, STEP, 4),
    "piecewise_constant": lambda x: S.piecewise_constant(STEP, [2], [1.0, x]),
    "polynomial_decay": lambda x: S.polynomial_decay(x, STEP, 4, end_learning_rate=x),
}


@pytest.mark.parametrize("name", OF_A_RATE)
def test_a_rate_may_be_a_variable(name):
    optimizer = ol.optimizers.SGD(0.25)
    wanted = OF_A_RATE[name](0.25)
    assert OF_A_RATE[name](optimizer.learning_rate) == wanted
    assert OF_A_RATE[name](keras.Variable(0.25)) == wanted


def test_a_schedule_has_the_value_that_the_variable_had():
    optimizer = ol.optimizers.SGD(0.5)
    schedule = S.PolynomialDecay(optimizer.learning_rate, 4, end_learning_rate=0.0)
    optimizer.learning_rate = 8.0
    assert schedule == S.PolynomialDecay(0.5, 4, end_learning_rate=0.0)
    optimizer.learning_rate = schedule
    assert float(optimizer.learning_rate) == 0.5
    with pytest.raises(ValueError, match="`initial_learning_rate` must be at least 0"):
        S.PolynomialDecay(ol.Variable(-1.0), 4)
