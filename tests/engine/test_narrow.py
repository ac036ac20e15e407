"""Parameters of 16 bits and fewer: what is kept beside them is as exact as for those of 32."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optimize_loss as ol
from optimize_loss._engine.bits import round_to

optim = ol.optimizers
AIM = 0.3  # no number of these dtypes

# Each moves a parameter of size 1 by some percent in an update, at least at first.
RULES: dict[str, Any] = {
    "sgd": optim.SGD(0.1),
    "momentum": optim.SGD(0.05, momentum=0.5, nesterov=True),
    "adam": optim.Adam(0.01),
    "amsgrad": optim.Adam(0.01, amsgrad=True),
    "adamw": optim.AdamW(0.01, weight_decay=1e-4),
    "nadam": optim.Nadam(0.01),
    "adamax": optim.Adamax(0.01),
    "lion": optim.Lion(0.005),
    "lamb": optim.Lamb(0.01),
    "rmsprop": optim.RMSprop(0.01, centered=True),
    "adagrad": optim.Adagrad(0.1),
    "adadelta": optim.Adadelta(1.0),
    "adafactor": optim.Adafactor(0.03),
    "ftrl": optim.Ftrl(0.5),
    "muon": optim.Muon(0.02, weight_decay=None, adam_weight_decay=None),
    "schedule-free": optim.ScheduleFreeAdamW(0.01),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "stochastic": {"precision": "bfloat16"},
    "lookahead-stochastic": {"lookahead": 3, "precision": "bfloat16"},
    "ema-stochastic": {"ema": 0.9, "precision": "bfloat16"},
}


def loss(params):
    return 0.5 * sum(jnp.sum((x.astype(jnp.float32) - AIM) ** 2) for x in params.values())


def trained(params, steps, **options):
    """Return the state after so many steps, all in one program."""
    step = ol.optimize_loss(loss, **options)

    def advance(state):
        return jax.lax.fori_loop(0, steps, lambda _, now: step(now)[0], state)

    return jax.jit(advance)(step.init(params))


def error(x):
    return float(np.abs(np.asarray(x, np.float32) - AIM).max())


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", RULES)
def test_what_is_evaluated_is_as_near_to_the_optimum_as_in_float32(name, option):
    """Within five units in the last place of a bfloat16, in one program with float32."""
    params = {"narrow": jnp.ones((2, 2), jnp.bfloat16), "wide": jnp.ones((2, 2))}
    state = trained(params, 1500, optimizer=RULES[name], **OPTIONS[option])
    found = state.eval_params
    assert found["narrow"].dtype == jnp.bfloat16
    assert error(found["narrow"]) <= error(found["wide"]) + 5 * 2.0**-9


DTYPES = [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn, jnp.float8_e5m2]
RATE = 0.01  # by which no update moves a parameter of these that is near the optimum
NEAREST: dict[str, dict[str, Any]] = {
    "schedule-free": {"optimizer": optim.ScheduleFreeAdamW(RATE)},
    "lookahead": {"optimizer": optim.SGD(RATE), "lookahead": 2},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: jnp.dtype(dtype).name)
@pytest.mark.parametrize("name", NEAREST)
def test_what_is_evaluated_needs_no_stochastic_rounding(name, dtype):
    """What is kept beside the parameters moves where they cannot."""
    for steps in (1500, 5000):
        state = trained({"w": jnp.ones(4, dtype)}, steps, **NEAREST[name])
        last_place = 2.0**-2 * float(jnp.finfo(dtype).eps)
        assert error(state.eval_params["w"]) <= last_place + 0.005


@pytest.mark.parametrize("precision", [None, "bfloat16"])
def test_decay_before_a_schedule_free_step_moves_the_mean(precision):
    """What moves the parameter besides the rule counts as it does in float32."""
    params = {"narrow": jnp.ones((2, 2), jnp.bfloat16), "wide": jnp.ones((2, 2))}
    rule = optim.ScheduleFreeAdamW(RATE, weight_decay=0.2)
    for steps in (10, 1000):
        found = trained(params, steps, optimizer=rule, precision=precision).eval_params
        gap = np.asarray(found["narrow"], np.float32) - np.asarray(found["wide"])
        assert np.abs(gap).max() <= 2.0**-8


def test_what_a_user_puts_in_moves_the_mean_of_a_schedule_free_rule():
    step = ol.optimize_loss(loss, optimizer=optim.ScheduleFreeAdamW(RATE))
    for dtype in (jnp.bfloat16, jnp.float32):
        state, _ = step(step.init({"w": jnp.ones(2, dtype)}))
        before = state.eval_params["w"].astype(jnp.float32)
        moved = state.with_trees({"w": state.params["w"] - jnp.asarray(0.5, dtype)})
        gap = before - moved.eval_params["w"].astype(jnp.float32)
        np.testing.assert_allclose(gap, 0.5 / 0.9, rtol=2.0**-7)


def test_slots_of_parameters_of_32_bits_are_as_ever():
    params = {"narrow": jnp.ones(2, jnp.float16), "wide": jnp.ones(2), "other": jnp.ones(2)}
    step = ol.optimize_loss(
        lambda p: sum(jnp.sum(x.astype(jnp.float32)) for x in p.values()),
        optimizer=optim.ScheduleFreeAdamW(RATE),
        variables=["narrow", "wide"],
        lookahead=2,
    )
    state, _ = step(step.init(params))
    free, ahead = state.optimizer["schedule_free"], state.optimizer["lookahead"]
    assert {n: x["wide"] is not None for n, x in free.items() if isinstance(x, dict)} == {
        "z": True, "v": True, "x": False, "p": False,
    }  # fmt: skip
    assert (ahead["slow"]["wide"].dtype, ahead["start"]["wide"]) == (jnp.float32, None)
    assert (free["p"]["narrow"].dtype, free["x"]["narrow"].dtype) == (jnp.float16, jnp.float32)
    same = state.reset("narrow").optimizer["schedule_free"]
    np.testing.assert_array_equal(same["p"]["narrow"], state.params["narrow"])
    assert state.eval_params["other"].tolist() == [1, 1]
    assert state.eval_params["wide"].tolist() == ahead["slow"]["wide"].tolist()


# Stochastic rounding.


@pytest.mark.parametrize(
    "dtype",
    [jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.float8_e4m3b11fnuz, jnp.float8_e3m4, jnp.float16],
    ids=lambda dtype: jnp.dtype(dtype).name,
)
def test_rounding_is_to_a_neighbour_and_unbiased(dtype):
    tiny = float(jnp.finfo(dtype).smallest_normal)
    bits = jax.random.bits(jax.random.key(0), (40_000,))
    for x in (0.3, -0.7, 1.03, 0.37 * tiny, 2.6 * tiny):
        found = round_to(jnp.full(bits.shape, x, jnp.float32), jnp.dtype(dtype), bits)
        np.testing.assert_array_equal(found, found.astype(dtype).astype(jnp.float32))
        low, high = float(found.min()), float(found.max())
        assert low < x < high
        np.testing.assert_allclose(found.mean(), x, atol=0.02 * (high - low))


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.float8_e5m2fnuz])
def test_every_number_of_8_bits_rounds_to_itself_and_the_largest_do_not_wrap(dtype):
    info = jnp.finfo(dtype)
    every = jax.lax.bitcast_convert_type(jnp.arange(256, dtype=jnp.uint8), dtype)
    for random in (0, 2**32 - 1):
        bits = jnp.full(256, random, jnp.uint32)
        found = round_to(every.astype(jnp.float32), jnp.dtype(dtype), bits)
        np.testing.assert_array_equal(found, every.astype(jnp.float32))
        large = jnp.full(256, float(info.max) * 1.01, jnp.float32)
        found = round_to(large, jnp.dtype(dtype), bits).astype(dtype)
        np.testing.assert_array_equal(found, large.astype(dtype))


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2], ids=["e4m3", "e5m2"])
def test_small_updates_of_8_bit_parameters_count(dtype):
    """200 updates of 1/10000 each: 0.02, a small part of what one place is."""
    step = ol.optimize_loss(
        lambda p, x: jnp.sum(p["w"].astype(jnp.float32) * x),
        learning_rate=1e-4,
        optimizer="SGD",
        precision="bfloat16",
    )
    state, _ = step.many(step.init({"w": jnp.ones(2000, dtype)}), np.ones(200, np.float32))
    np.testing.assert_allclose(1 - state.params["w"].astype(jnp.float32).mean(), 0.02, rtol=0.15)
