"""Options after `build`: numbers take effect, and what is not a number is refused."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import optimize_loss as ol
from tests.optimizers.stepped import (
    ADORNED,
    GB,
    GW,
    B,
    T,
    W,
    assert_close,
    assert_equal,
    assert_same_state,
    optim,
    pairs,
    state_of,
    stepped,
    values,
    variables,
)

# Options after build: numbers take effect, and what is not a number is refused.


class Counted(T.ScaleByLearningRate):
    traces = 0

    def factor(self, k):
        Counted.traces += 1
        return super().factor(k)


class CountedAdam(optim.Adam):
    def links(self):
        return {**super().links(), "rate": Counted(self.rate)}


def traces_of(function):
    before = Counted.traces
    function()
    return Counted.traces - before


NUMBERS = {
    "beta_1": 0.25,
    "beta_2": 0.5,
    "epsilon": 0.5,
    "weight_decay": 0.5,
    "clipnorm": 0.25,
    "ema_momentum": 0.125,
    "ema_overwrite_frequency": 3,
    "gradient_accumulation_steps": 3,
    "loss_scale_factor": 2.0,
}


def test_numbers_take_effect_without_a_trace():
    options = {**ADORNED, "loss_scale_factor": 4.0}
    optimizer = CountedAdam(0.1, **options)
    assert traces_of(lambda: stepped(optimizer)) > 0
    made = variables()
    optimizer = CountedAdam(0.1, **options)
    optimizer.build(made)
    for option, value in NUMBERS.items():
        setattr(optimizer, option, value)
    other = CountedAdam(0.1, **{**options, **NUMBERS})
    assert optimizer.get_config() == other.get_config()
    assert traces_of(lambda: [optimizer.apply_gradients(pairs(made)) for _ in range(6)]) == 0
    _, others = stepped(other, times=6)
    assert_equal(values(made), values(others))
    optimizer.finalize_variable_values(made)
    other.finalize_variable_values(others)
    assert_equal(values(made), values(others))


def test_a_changed_number_retraces_no_step_and_no_scan(caplog):
    step = ol.optimize_loss(lambda p: jnp.sum(p["w"] ** 2), optimizer=optim.Adam(0.1))
    state = step.init({"w": W})
    with caplog.at_level(logging.INFO, logger="optimize_loss"):
        state, _ = step(state)
        state, _ = step(state.set(learning_rate=0.2, beta_1=0.5))
    assert len([r for r in caplog.records if r.message.startswith("tracing a step")]) == 1


def test_a_number_may_become_a_schedule():
    optimizer, made = stepped(optim.SGD(1.0, momentum=0.0))
    optimizer.momentum = lambda step: jnp.where(step < 2, 0.0, 1.0)
    for _ in range(2):
        optimizer.apply_gradients(pairs(made))
    assert_close(values(made), [W - 4 * GW, B - 4 * GB])  # 1 + 1 + (1 + 1)


STRUCTURE = {
    "amsgrad": True,
    "weight_decay": None,
    "clipnorm": None,
    "use_ema": False,
    "gradient_accumulation_steps": None,
    "ema_overwrite_frequency": None,
    "loss_scale_factor": 4.0,
    "mesh": jax.make_mesh((1,), ("x",), (AxisType.Auto,)),
}
WRONG = {
    "beta_1": 1.5,
    "epsilon": 0.0,
    "weight_decay": -1.0,
    "clipnorm": "a",
    "clipvalue": 1.0,
    "use_ema": 1,
    "jit_compile": None,
    "ema_momentum": 2.0,
    "ema_overwrite_frequency": 0,
    "gradient_accumulation_steps": 1.5,
    "name": 3,
    "axis_name": 3,
    "mesh": "mesh",
}


@pytest.mark.parametrize(
    ("kind", "option"),
    [*(("structure", name) for name in STRUCTURE), *(("wrong", name) for name in WRONG)],
)
def test_other_options_are_refused_and_nothing_changes(kind, option):
    value = (STRUCTURE if kind == "structure" else WRONG)[option]
    optimizer, made = stepped(optim.Adam(0.1, **ADORNED), times=3)
    same, others = stepped(optim.Adam(0.1, **ADORNED), times=3)
    before = getattr(optimizer, option)
    with pytest.raises((ValueError, TypeError)) as caught:
        setattr(optimizer, option, value)
    if kind == "wrong" or option == "mesh":
        assert f"`{option}`" in str(caught.value)
    else:
        assert "Once an optimizer is built, only its numbers can be changed." in str(caught.value)
    assert getattr(optimizer, option) == before
    assert optimizer.chain == same.chain
    assert_same_state(state_of(optimizer), state_of(same))
    optimizer.apply_gradients(pairs(made))
    same.apply_gradients(pairs(others))
    assert_equal(values(made), values(others))


def test_before_build_every_option_can_be_changed():
    optimizer = optim.Adam(0.1)
    for option, value in {**ADORNED, "amsgrad": True, "jit_compile": False}.items():
        setattr(optimizer, option, value)
    _, made = stepped(optimizer, times=4)
    _, others = stepped(optim.Adam(0.1, amsgrad=True, jit_compile=False, **ADORNED), times=4)
    assert_equal(values(made), values(others))
    with pytest.raises(ValueError, match="At most one of `clipnorm`"):
        optim.Adam(clipnorm=1.0).clipvalue = 1.0


@pytest.mark.parametrize(
    "around",
    [
        lambda inner: optim.MultiOptimizer({"**": inner}),
        lambda inner: optim.LossScaleOptimizer(inner, initial_scale=1.0),
    ],
    ids=["multi", "loss-scale"],
)
def test_options_of_an_optimizer_inside_take_effect(around):
    inner = optim.Adam(0.1, weight_decay=0.1)
    outer = around(inner)
    _ = outer.chain
    inner.amsgrad = True
    made = variables()
    outer.build(made)
    inner.beta_1, inner.weight_decay = 0.25, 0.5
    inner.learning_rate = 0.5
    for _ in range(3):
        outer.apply_gradients(pairs(made))
    _, others = stepped(optim.Adam(0.5, beta_1=0.25, amsgrad=True, weight_decay=0.5), times=3)
    assert_equal(values(made), values(others))
    with pytest.raises(ValueError, match="only its numbers can be changed"):
        inner.amsgrad = False
    assert inner.amsgrad
    inner.learning_rate = ol.schedules.ExponentialDecay(0.5, 1, 0.5)
    before = values(made)
    outer.apply_gradients(pairs(made))
    assert not np.array_equal(made[0].value, before[0])
    with pytest.raises(ValueError, match="must be called on what is inside"):
        outer.exclude_from_weight_decay(made)
