"""The counter and the rate of an optimizer are read and set at any time."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optimize_loss as ol
from tests.optimizers.stepped import (
    GB,
    GW,
    INVALID,
    VALUE,
    B,
    W,
    assert_close,
    optim,
    pairs,
    stepped,
    values,
    variables,
)

# The counter.


def test_iterations_can_be_set_before_the_first_step():
    """Adam at t = 3 corrects by 1 - βᵗ: the first step is not of the size of the rate."""
    optimizer = optim.Adam(0.1, beta_1=0.5, beta_2=0.75)
    optimizer.iterations = 2
    assert int(optimizer.iterations) == 2
    stepped(optimizer)
    made = variables()
    optimizer = optim.Adam(0.1, beta_1=0.5, beta_2=0.75)
    optimizer.iterations = ol.Variable(2)
    optimizer.apply_gradients(pairs(made))
    m, v = 0.5 * GW, 0.25 * GW**2
    step = 0.1 * m / (1 - 0.5**3) / np.sqrt(v / (1 - 0.75**3))
    assert_close([made[0].value], [W - step], rtol=1e-5)
    assert int(optimizer.iterations) == int(optimizer.variables[0]) == 3


def test_iterations_are_assigned_to_after_build():
    schedule = ol.schedules.PiecewiseConstantDecay([4], [0.5, 0.25])
    optimizer, made = stepped(optim.SGD(schedule))
    with pytest.raises(
        RuntimeError, match=r"`iterations` must be set before.*Received: iterations=Variable"
    ):
        optimizer.iterations = ol.Variable(9)
    optimizer.iterations.assign(9)
    optimizer.apply_gradients(pairs(made))
    assert_close(values(made), [W - 0.75 * GW, B - 0.75 * GB])
    assert int(optimizer.iterations) == 10


@pytest.mark.parametrize(("wrong", "error"), [(-1, VALUE), (1.5, INVALID), ("a", INVALID)])
def test_iterations_are_integers_from_0_on(wrong, error):
    optimizer = optim.SGD()
    with pytest.raises(error, match="`iterations` must be an integer of at least 0"):
        optimizer.iterations = wrong
    assert int(optimizer.iterations) == 0


# The rate.


def test_a_rate_is_read_and_set_at_any_time():
    optimizer = optim.SGD(0.5)
    assert isinstance(optimizer.learning_rate, ol.Variable)
    optimizer.learning_rate = 0.25
    assert float(optimizer.learning_rate) == 0.25
    optimizer, made = stepped(optimizer)
    assert_close(values(made), [W - 0.25 * GW, B - 0.25 * GB])
    for rate in (0.5, np.float32(0.5), jnp.float32(0.5), ol.Variable(0.5)):
        before = values(made)
        optimizer.learning_rate = 1
        optimizer.learning_rate = rate
        optimizer.apply_gradients(pairs(made))
        assert_close(values(made), [before[0] - 0.5 * GW, before[1] - 0.5 * GB])
    kept: Any = optimizer.learning_rate
    kept.assign(0.125)
    assert optimizer.learning_rate is kept
    before = values(made)
    optimizer.apply_gradients(pairs(made))
    assert_close(values(made), [before[0] - 0.125 * GW, before[1] - 0.125 * GB])
    assert optimizer.get_config()["learning_rate"] == 0.125
    assert repr(optimizer) == "SGD(learning_rate=0.125)"


def test_a_rate_that_was_set_reaches_functions_and_steps():
    optimizer = optim.SGD(0.5)
    for assign in (
        lambda: setattr(optimizer, "learning_rate", 0.25),
        lambda: optimizer.learning_rate.assign(0.25),
    ):
        optimizer.learning_rate = 0.5
        _ = optimizer.chain
        assign()
        assert float(optimizer.init({"w": W})["rate"]["learning_rate"]) == 0.25
        assert float(optimizer.chain.init({"w": W})["rate"]["learning_rate"]) == 0.25
        step = ol.optimize_loss(lambda p: jnp.sum(p["w"]), optimizer=optimizer)
        assert float(step.init({"w": W}).optimizer["rate"]["learning_rate"]) == 0.25


def test_a_state_does_not_share_the_memory_of_the_rate():
    optimizer = optim.Adam(0.1)
    state = optimizer.init({"w": W})
    update = jax.jit(optimizer.update, donate_argnums=1)
    update({"w": GW}, state, {"w": W})
    assert float(optimizer.learning_rate) == np.float32(0.1)


WRONG_RATES = {
    "negative": (-1.0, VALUE, "`learning_rate` must be at least 0. Received: learning_rate=-1.0."),
    "nan": (float("nan"), VALUE, "`learning_rate` must be at least 0 and finite."),
    "text": ("fast", INVALID, "`learning_rate` must be a number. Received: learning_rate='fast'."),
    "none": (None, INVALID, "`learning_rate` must be"),
    "array": (jnp.ones(2), INVALID, "`learning_rate` must be a scalar"),
}


@pytest.mark.parametrize("is_built", [False, True])
@pytest.mark.parametrize("name", WRONG_RATES)
def test_wrong_rates_are_refused(name, is_built):
    rate, error, message = WRONG_RATES[name]
    optimizer = optim.SGD(0.5)
    if is_built:
        stepped(optimizer)
    with pytest.raises(error) as caught:
        optimizer.learning_rate = rate
    assert message in str(caught.value)
    assert float(optimizer.learning_rate) == 0.5
    with pytest.raises(error):
        optim.SGD(rate)


def test_a_schedule_is_read_as_the_rate_of_the_last_step():
    rates = [0.2, 0.1, 0.05]
    schedule = ol.schedules.PiecewiseConstantDecay([0, 1], rates)
    optimizer, made = optim.SGD(schedule), variables()
    seen = [float(optimizer.learning_rate)]
    for _ in range(3):
        optimizer.apply_gradients(pairs(made))
        seen.append(float(optimizer.learning_rate))
    assert_close(seen, [rates[0], *rates])
    assert_close(values(made), [W - sum(rates) * GW, B - sum(rates) * GB])
    assert optimizer.get_config()["learning_rate"]["class_name"] == "PiecewiseConstantDecay"


def test_schedules_and_numbers_take_turns_where_they_can():
    halving = ol.schedules.ExponentialDecay(0.5, 1, 0.5)
    optimizer = optim.SGD(halving)
    optimizer.learning_rate = 0.25  # not built: anything goes
    optimizer.learning_rate = halving
    optimizer.learning_rate = 0.25
    optimizer, made = stepped(optimizer)
    optimizer.learning_rate = halving  # its value after one step is 0.25
    optimizer.apply_gradients(pairs(made))
    assert_close(values(made), [W - 0.5 * GW, B - 0.5 * GB])
    with pytest.raises(TypeError, match="`learning_rate` must stay a schedule"):
        optimizer.learning_rate = 0.5
    optimizer.learning_rate = lambda step: jnp.where(step == 2, 0.25, 0.0)
    optimizer.apply_gradients(pairs(made))
    assert_close(values(made), [W - 0.75 * GW, B - 0.75 * GB])


def test_a_schedule_takes_the_counter():
    optimizer, _ = stepped(optim.SGD(0.1), times=2)
    for schedule in (
        ol.schedules.ExponentialDecay(0.5, 1, 0.5),
        ol.schedules.PiecewiseConstantDecay([1], [0.5, 0.125]),
        ol.schedules.PolynomialDecay(0.25, 4, 0.0),
    ):
        assert float(schedule(optimizer.iterations)) == 0.125
