"""Schedules: wrong arguments, and messages of `evaluate`."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optimize_loss import _checks
from optimize_loss.schedules import (
    CosineDecay,
    Decayed,
    ExponentialDecay,
    InverseSquareRootDecay,
    Join,
    OneCycle,
    PiecewiseConstantDecay,
    WarmUpDecay,
    WarmupStableDecay,
    cosine_decay,
    cosine_decay_restarts,
    evaluate,
    exponential_decay,
    inverse_time_decay,
    linear_cosine_decay,
    natural_exp_decay,
    piecewise_constant,
    polynomial_decay,
)

RANGE, KIND = ValueError, _checks.InvalidType


def rows(call, good, *bad):
    """One case for each (argument, wrong value, error, text); the other arguments are good."""
    return [
        pytest.param(call, good | {argument: value}, error, text, id=f"{call.__name__}-{argument}")
        for argument, value, error, text in bad
    ]


EXPONENTIAL = {"learning_rate": 0.1, "global_step": 3, "decay_steps": 5, "decay_rate": 0.7}
COSINE = {"learning_rate": 0.1, "global_step": 3, "decay_steps": 5}
RESTARTS = {"learning_rate": 0.1, "global_step": 3, "first_decay_steps": 5}
WARMUP = {"peak_learning_rate": 0.1, "warmup_steps": 5}
STABLE = WARMUP | {"stable_steps": 5, "decay_steps": 5}
BAD = [
    *rows(
        exponential_decay,
        EXPONENTIAL,
        ("learning_rate", -0.1, RANGE, "`learning_rate` must be at least 0. Rec.*=-0.1"),
        ("learning_rate", math.nan, RANGE, "learning_rate=nan"),
        ("learning_rate", None, KIND, "`learning_rate` must be a number"),
        ("learning_rate", "0.1", KIND, "learning_rate='0.1'"),
        ("learning_rate", True, KIND, "learning_rate=True"),
        ("learning_rate", jnp.ones(2), KIND, r"`learning_rate` must be a scalar.* \(2,\)"),
        ("learning_rate", np.ones(2), KIND, r"`learning_rate` must be a scalar.* \(2,\)"),
        ("learning_rate", jnp.array(1j), KIND, "`learning_rate` must be a number"),
        ("global_step", None, KIND, "`global_step` must be a number"),
        ("global_step", True, KIND, "global_step=True"),
        ("global_step", 1j, KIND, "global_step=1j"),
        ("global_step", jnp.array(True), KIND, "`global_step` must be a number"),
        ("global_step", jnp.arange(2), KIND, r"scalar; for many use jax.vmap.* \(2,\)"),
        (
            "decay_steps",
            0,
            RANGE,
            "`decay_steps` must be a whole number of at least 1. Received: decay_steps=0.",
        ),
        ("decay_steps", -5, RANGE, "decay_steps=-5"),
        (
            "decay_steps",
            math.inf,
            RANGE,
            "`decay_steps` must be a whole number of at least 1 and finite",
        ),
        ("decay_steps", None, KIND, "decay_steps=None"),
        ("decay_rate", -0.7, RANGE, "`decay_rate` must be at least 0. Received: decay_rate=-0.7."),
        ("decay_rate", [0.7], KIND, r"decay_rate=\[0.7\]"),
        ("staircase", "no", KIND, "`staircase` must be True or False. Received: staircase='no'."),
        ("staircase", 1, KIND, "staircase=1"),
    ),
    *rows(natural_exp_decay, EXPONENTIAL, ("decay_rate", -1, RANGE, "decay_rate=-1")),
    *rows(inverse_time_decay, EXPONENTIAL, ("decay_steps", 0, RANGE, "decay_steps=0")),
    *rows(
        piecewise_constant,
        {"x": 3, "boundaries": [5, 10], "values": [3.0, 2.0, 1.0]},
        ("x", None, KIND, "`x` must be a number"),
        ("x", jnp.arange(2), KIND, r"`x` must be a scalar.* \(2,\)"),
        ("boundaries", [10, 5], RANGE, r"`boundaries` must increase.*=\(10, 5\)"),
        ("boundaries", [5, 5], RANGE, r"`boundaries` must increase.*=\(5, 5\)"),
        ("boundaries", [5], RANGE, "`values` must be one more.* 3 values for 1 boundaries"),
        ("boundaries", 5, KIND, "`boundaries` must be a list or a tuple. .*=5"),
        ("boundaries", "ab", KIND, "boundaries='ab'"),
        ("boundaries", np.array(5), KIND, "`boundaries` must be a list or a tuple"),
        ("boundaries", np.array([[5, 10]]), KIND, "`boundaries` must be a list or a tuple"),
        ("boundaries", [5, None], KIND, r"`boundaries\[1\]` must be a number"),
        ("values", [3.0, 2.0], RANGE, "2 values for 2 boundaries"),
        ("values", [], RANGE, "0 values"),
        ("values", [3.0, math.nan, 1.0], RANGE, r"`values\[1\]` must be a finite number.*nan"),
        ("values", [3.0, "2", 1.0], KIND, r"values\[1\]='2'"),
    ),
    *rows(
        polynomial_decay,
        COSINE,
        ("decay_steps", 0, RANGE, "decay_steps=0"),
        ("end_learning_rate", -1.0, RANGE, "`end_learning_rate` must be at least 0"),
        ("power", -1.0, RANGE, "`power` must be at least 0"),
        ("cycle", None, KIND, "`cycle` must be True or False"),
    ),
    *rows(cosine_decay, COSINE, ("alpha", -0.1, RANGE, "`alpha` must be at least 0")),
    *rows(
        cosine_decay_restarts,
        RESTARTS,
        ("first_decay_steps", 0, RANGE, "`first_decay_steps` must be a whole number of at least 1"),
        ("t_mul", 0.5, RANGE, "`t_mul` must be at least 1. Received: t_mul=0.5."),
        ("m_mul", -1, RANGE, "m_mul=-1"),
        ("alpha", -1, RANGE, "alpha=-1"),
    ),
    *rows(
        linear_cosine_decay,
        COSINE,
        ("num_periods", -1, RANGE, "`num_periods` must be at least 0"),
        ("alpha", -1, RANGE, "alpha=-1"),
        ("beta", -1, RANGE, "beta=-1"),
    ),
    *rows(
        ExponentialDecay,
        {"initial_learning_rate": 0.1, "decay_steps": 5, "decay_rate": 0.7},
        ("initial_learning_rate", -0.1, RANGE, "initial_learning_rate=-0.1"),
        ("decay_steps", 0, RANGE, "decay_steps=0"),
        ("decay_rate", None, KIND, "decay_rate=None"),
        ("staircase", 0, KIND, "staircase=0"),
        ("name", 3, KIND, "`name` must be text or None. Received: name=3."),
    ),
    *rows(
        PiecewiseConstantDecay,
        {"boundaries": [5], "values": [2.0, 1.0]},
        ("boundaries", [5, 4], RANGE, "`boundaries` must increase"),
        ("values", [1.0], RANGE, "1 values for 1 boundaries"),
        ("values", [1.0, None], KIND, r"values\[1\]=None"),
        ("name", 3, KIND, "name=3"),
    ),
    *rows(
        CosineDecay,
        {"initial_learning_rate": 0.1, "decay_steps": 5},
        ("warmup_steps", 3, RANGE, "`warmup_steps` must be 0 where there is no `warmup_target`"),
        ("warmup_steps", -3, RANGE, "`warmup_steps` must be a whole number of at least 0"),
        ("warmup_target", -3, RANGE, "`warmup_target` must be at least 0"),
        ("warmup_target", "label", KIND, "warmup_target='label'"),
    ),
    *rows(
        WarmupStableDecay,
        STABLE,
        ("stable_steps", -1, RANGE, "stable_steps=-1"),
        ("decay_steps", 0, RANGE, "decay_steps=0"),
        ("peak_learning_rate", -1, RANGE, "peak_learning_rate=-1"),
    ),
    *rows(InverseSquareRootDecay, WARMUP, ("warmup_steps", -1, RANGE, "warmup_steps=-1")),
    *rows(
        OneCycle,
        {"peak_learning_rate": 0.1, "total_steps": 5},
        ("total_steps", 0, RANGE, "total_steps=0"),
        ("pct_start", 1.0, RANGE, r"`pct_start` must be in \[0, 1\)"),
        ("div_factor", 0, RANGE, "`div_factor` must be above 0"),
        ("final_div_factor", 0, RANGE, "`final_div_factor` must be above 0"),
    ),
    *rows(
        Join,
        {"schedules": [abs, abs], "boundaries": [5]},
        ("schedules", [abs], RANGE, "`schedules` must be one more.* 1 schedules for 1 boundaries"),
        ("schedules", [abs, 0.1], KIND, r"`schedules\[1\]` must be callable.*=0.1"),
        ("schedules", abs, KIND, "`schedules` must be a list or a tuple"),
        ("boundaries", [5, 5], RANGE, "`boundaries` must increase"),
        ("boundaries", [0], RANGE, r"`boundaries\[0\]` must be an integer of at least 1"),
        ("boundaries", [1.5], KIND, r"boundaries\[0\]=1.5"),
    ),
    *rows(
        WarmUpDecay,
        {},
        ("decay", 1.0, RANGE, r"`decay` must be in \[0, 1\). Received: decay=1.0."),
        ("decay", -0.1, RANGE, "decay=-0.1"),
    ),
    *rows(
        Decayed,
        {"learning_rate": 0.1, "function": exponential_decay},
        ("learning_rate", -0.1, RANGE, "learning_rate=-0.1"),
        ("learning_rate", None, KIND, "learning_rate=None"),
        ("function", 0.5, KIND, "`function` must be callable. Received: function=0.5."),
    ),
]


@pytest.mark.parametrize(("call", "arguments", "error", "text"), BAD)
def test_wrong_arguments_fail_where_they_are_given(call, arguments, error, text):
    with pytest.raises(error, match=text) as caught:
        call(**arguments)
    assert isinstance(caught.value, TypeError) == (error is KIND)


def test_a_traced_decay_rate_is_refused():
    with pytest.raises(KIND, match=r"`decay_rate` must be known.*only a function's rates may be"):
        jax.jit(lambda r: exponential_decay(0.1, 3, 5, r))(0.7)


def no_step():
    return 0.1


NO_STEP: Any = no_step


def python_if(step):
    return 0.1 if step > 3 else 0.2


def index(step):
    return [0.1, 0.2][step]


GOOD = {
    "float": lambda n: 0.5,
    "int": lambda n: 3,
    "numpy": lambda n: np.float64(0.5),
    "int-array": lambda n: n + 1,
    "weak": lambda n: jnp.where(n > 3, 0.5, 1.0),
    "half": lambda n: jnp.bfloat16(0.5),
    "more-parameters-with-defaults": lambda n, scale=0.5, *, shift=0: scale,
    "any-parameters": lambda *args: 0.5,
    "partial": functools.partial(exponential_decay, 0.5, decay_steps=3, decay_rate=0.5),
    "class": ExponentialDecay(0.5, 3, 0.5),
    "builtin": abs,
    "jitted": jax.jit(ExponentialDecay(0.5, 3, 0.5)),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("schedule", GOOD.values(), ids=GOOD)
def test_evaluate_gives_a_scalar_of_the_dtype(schedule, dtype):
    eps = float(jnp.finfo(dtype).eps)
    at = jax.jit(lambda step: evaluate("learning_rate", schedule, step, dtype))
    for got in (at(5), evaluate("learning_rate", schedule, 5, dtype)):
        assert (got.shape, got.dtype, got.weak_type) == ((), dtype, False)
        np.testing.assert_allclose(float(got), float(schedule(jnp.int32(5))), rtol=eps)


@pytest.mark.parametrize(
    "schedule",
    [
        optax.constant_schedule(0.5),
        optax.cosine_decay_schedule(0.5, 10),
        optax.exponential_decay(0.5, 3, 0.5),
        optax.piecewise_constant_schedule(0.5, {3: 0.5}),
    ],
    ids=["constant", "cosine", "exponential", "piecewise"],
)
def test_evaluate_takes_optax_schedules(schedule):
    with jax.numpy_dtype_promotion("standard"):
        at = jax.jit(lambda step: evaluate("learning_rate", schedule, step, jnp.float32))
        np.testing.assert_allclose(at(jnp.int32(5)), schedule(5), rtol=1e-6)
        assert at(jnp.int32(5)).dtype == jnp.float32


OUTCOMES = {
    "vector": (lambda n: jnp.ones(2), RANGE, r"must return a scalar. Received: shape \(2,\) from"),
    "one-element": (lambda n: np.ones(1), RANGE, r"shape \(1,\)"),
    "none": (lambda n: None, KIND, "must return a number. Received: None"),
    "text": (lambda n: "0.1", KIND, "'0.1'"),
    "complex": (lambda n: 1j, KIND, "1j"),
    "complex-array": (lambda n: jnp.asarray(1j), KIND, "must return a number"),
    "bool": (lambda n: True, KIND, "True"),
    "bool-array": (lambda n: n > 3, KIND, "must return a number"),
    "list": (lambda n: [0.1], KIND, r"\[0.1\]"),
    "no-parameter": (no_step, KIND, r"must take \(step\).*no_step.* signature \(\)"),
    "two-parameters": (lambda rate, n: n, KIND, r"must take \(step\).*signature \(rate, n\)"),
    "keyword-only": (lambda *, n: n, KIND, r"signature \(\*, n\)"),
    "decayed": (
        Decayed(0.1, NO_STEP),
        KIND,
        r"must take \(learning_rate, step\).*signature \(\)",
    ),
    "not-callable": (0.1, KIND, "`learning_rate` must be callable.*0.1"),
    "python-if": (python_if, KIND, "traced step.*jnp.where or lax.cond.*python_if"),
    "math": (lambda n: math.sqrt(n), KIND, "jax.numpy in place of math and numpy"),
    "numpy": (lambda n: np.sqrt(n), KIND, "jax.numpy in place of math and numpy"),
    "index": (index, KIND, "traced step"),
}


@pytest.mark.parametrize(("schedule", "error", "text"), OUTCOMES.values(), ids=OUTCOMES)
def test_evaluate_says_what_is_wrong(schedule, error, text):
    with pytest.raises(error, match=text) as caught:
        jax.jit(lambda n: evaluate("learning_rate", schedule, n, jnp.float32))(jnp.int32(5))
    assert "`learning_rate`" in str(caught.value)
    assert isinstance(caught.value, TypeError) == (error is KIND)


def test_evaluate_raises_from_the_tracer_error():
    with pytest.raises(KIND) as caught:
        jax.jit(lambda n: evaluate("rate", python_if, n, jnp.float32))(jnp.int32(5))
    assert isinstance(caught.value.__cause__, jax.errors.TracerBoolConversionError)


def test_evaluate_leaves_errors_of_the_schedule_alone():
    def broken(step):
        return step + "text"

    def calls_wrongly(step):
        return NO_STEP(step)

    for schedule in (broken, calls_wrongly):
        with pytest.raises(TypeError) as caught:
            evaluate("learning_rate", schedule, 5, jnp.float32)
        assert not isinstance(caught.value, KIND)


def test_evaluate_gives_a_decayed_rate_its_current_base():
    schedule = Decayed(0.5, lambda rate, step: exponential_decay(rate, step, 1, 0.5))

    @jax.jit
    def at(base, step):
        return evaluate("learning_rate", schedule, step, jnp.float32, base=base)

    assert evaluate("learning_rate", schedule, 1, jnp.float32) == 0.25
    assert at(jnp.float32(4.0), 1) == 2.0
    assert schedule(1).dtype == jnp.float32
