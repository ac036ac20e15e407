"""Schedules: the reference's tables, values from paper, wrong arguments, messages of `evaluate`."""

import fractions
import functools
import math
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optimize_loss import schedules
from optimize_loss.schedules import (
    CosineDecay,
    CosineDecayRestarts,
    Decayed,
    ExponentialDecay,
    InverseSquareRootDecay,
    InverseTimeDecay,
    Join,
    OneCycle,
    PiecewiseConstantDecay,
    PolynomialDecay,
    WarmUpDecay,
    WarmupStableDecay,
    cosine_decay,
    cosine_decay_restarts,
    exponential_decay,
    inverse_time_decay,
    linear_cosine_decay,
    natural_exp_decay,
    piecewise_constant,
    polynomial_decay,
)
from tests.golden import golden_data as golden

GOLDEN = golden.load("schedules.json")
# The calls in golden/schedules.json, with the rate r and the step n.
TF1 = {
    "exponential": lambda r, n: exponential_decay(r, n, decay_steps=5, decay_rate=0.7),
    "exponential_staircase": lambda r, n: exponential_decay(r, n, 5, 0.7, staircase=True),
    "natural_exp": lambda r, n: natural_exp_decay(r, n, 5, 0.7),
    "natural_exp_staircase": lambda r, n: natural_exp_decay(r, n, 5, 0.7, staircase=True),
    "inverse_time": lambda r, n: inverse_time_decay(r, n, 5, 0.7),
    "inverse_time_staircase": lambda r, n: inverse_time_decay(r, n, 5, 0.7, staircase=True),
    "piecewise_constant": lambda r, n: piecewise_constant(n, [5, 10], [0.2, 0.1, 0.02]),
    "polynomial": lambda r, n: polynomial_decay(r, n, 10, end_learning_rate=0.01, power=2.0),
    "polynomial_cycle": lambda r, n: polynomial_decay(r, n, 6, 0.01, power=1.0, cycle=True),
    "cosine": lambda r, n: cosine_decay(r, n, decay_steps=15, alpha=0.1),
    "cosine_restarts": lambda r, n: cosine_decay_restarts(r, n, 4, 2.0, 0.8, alpha=0.05),
    "linear_cosine": lambda r, n: linear_cosine_decay(r, n, 15, 0.5, alpha=0.0, beta=0.001),
}


def replays():
    """The schedule of every recorded table, with its values at steps 0, 1, …"""
    rows = []
    for name, table in GOLDEN["schedules_v1"].items():
        schedule = functools.partial(TF1[name], table["lr"])
        rows.append(pytest.param(schedule, table["values"], id=f"tf1-{name}"))
    for name, table in GOLDEN["schedules"].items():
        config = table["config"]
        schedule = getattr(schedules, config["class_name"])(**config["config"])
        rows.append(pytest.param(schedule, table["values"], id=f"keras-{name}"))
    return rows


RUNS = {
    "eager": lambda schedule, steps: [schedule(int(n)) for n in steps],
    "jit": lambda schedule, steps: [*map(jax.jit(schedule), jnp.asarray(steps))],
    "vmap": lambda schedule, steps: jax.jit(jax.vmap(schedule))(jnp.asarray(steps)),
}


# In units of the last place of the table's largest rate. Piecewise constants are exact. The others
# round n/D, then a power, exponential or cosine, then the product with the rate, at most half a
# unit each when nothing is magnified. TF's kernels (Eigen) and XLA's for pow, exp and cos differ in
# their own last bit; and compiled, XLA puts n·(1/D) for n/D, as TF's graph did for the tf1 tables
# and eager Keras did not.
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(("schedule", "values"), replays())
def test_replays_the_reference(schedule, values, run, request, record_property):
    want = np.array(values, np.float32)
    got = np.array(RUNS[run](schedule, np.arange(len(want), dtype=np.int32)))
    assert got.dtype == np.float32
    ulps = np.max(np.abs(got.astype(np.float64) - want)) / np.spacing(want.max())
    record_property("ulps", float(ulps))
    assert ulps <= (0 if "iecewise" in request.node.name else 2)


def test_every_recorded_table_is_replayed():
    assert set(TF1) == set(GOLDEN["schedules_v1"])
    assert len(GOLDEN["schedules"]) == 11


@pytest.mark.parametrize(("schedule", "values"), replays())
def test_every_kind_of_step_gives_one_strong_float32(schedule, values):
    of_int = schedule(7)
    assert (of_int.shape, of_int.dtype, of_int.weak_type) == ((), jnp.float32, False)
    for step in (np.int32(7), jnp.int32(7), jnp.uint32(7), 7.0, jnp.float32(7), jnp.bfloat16(7)):
        same = schedule(step)
        assert (same.shape, same.dtype, same.weak_type) == ((), jnp.float32, False)
        assert same == of_int


WARMED = CosineDecay(0.0, decay_steps=10, alpha=0.1, warmup_target=0.2, warmup_steps=5)
AT_STEPS = {
    "boundary-has-the-earlier-value": (
        PiecewiseConstantDecay([5, 10], [0.2, 0.1, 0.02]),
        {5: 0.2, 6: 0.1, 10: 0.1, 11: 0.02},
    ),
    "cycles-end-at-multiples": (
        PolynomialDecay(0.1, decay_steps=6, end_learning_rate=0.01, cycle=True),
        {5: 0.025, 6: 0.01, 7: 0.0475, 12: 0.01, 13: 0.035},
    ),
    "warmup-then-cosine": (WARMED, {0: 0, 4: 0.16, 5: 0.2, 15: 0.02, 99: 0.02}),
    "target-without-warmup-steps": (
        CosineDecay(7.0, decay_steps=10, warmup_target=0.2),
        {0: 0.2, 5: 0.1, 10: 0.0},
    ),
    "one-value-and-no-boundary": (PiecewiseConstantDecay([], [0.5]), {0: 0.5, 9: 0.5}),
    "boundary-between-steps": (PiecewiseConstantDecay([4.5], [2.0, 1.0]), {4: 2, 5: 1}),
    "boundary-beyond-int32": (PiecewiseConstantDecay([1e12], [2.0, 1.0]), {2**31 - 1: 2}),
    "boundary-beyond-float32": (
        PiecewiseConstantDecay([2**24], [2.0, 1.0]),
        {2**24: 2, 2**24 + 1: 1},
    ),
    "warmup-stable-decay": (
        WarmupStableDecay(
            0.8, 4, stable_steps=3, decay_steps=2, initial_learning_rate=0.4, end_learning_rate=0.2
        ),
        {0: 0.4, 2: 0.6, 4: 0.8, 7: 0.8, 8: 0.5, 9: 0.2, 99: 0.2},
    ),
    "stable-without-warmup": (WarmupStableDecay(0.8, 0, 1, 2), {0: 0.8, 1: 0.8, 2: 0.4, 3: 0}),
    "square-root": (
        InverseSquareRootDecay(0.8, 100),
        {0: 0, 50: 0.4, 100: 0.8, 400: 0.4, 1600: 0.2},
    ),
    "square-root-without-warmup": (InverseSquareRootDecay(0.8, 0), {0: 0.8, 1: 0.8, 4: 0.4}),
    "join": (
        Join(
            [
                PolynomialDecay(0.0, 4, 0.4),
                lambda n: 0.3,
                lambda n: 0.1 * jnp.asarray(n, jnp.float32),
            ],
            [4, 6],
        ),
        {0: 0, 2: 0.2, 3: 0.3, 4: 0.3, 5: 0.3, 6: 0.0, 8: 0.2},
    ),
    "average-of-all-then-decay": (WarmUpDecay(0.95), {0: 0, 1: 1 / 2, 18: 18 / 19, 40: 0.95}),
    "no-decay": (ExponentialDecay(0.5, decay_steps=3, decay_rate=1.0), {0: 0.5, 100: 0.5}),
    "decay-to-nothing": (ExponentialDecay(0.5, decay_steps=3, decay_rate=0.0), {0: 0.5, 1: 0}),
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(("schedule", "values"), AT_STEPS.values(), ids=AT_STEPS)
def test_values_from_paper(schedule, values, run):
    got = RUNS[run](schedule, np.array([*values], np.int32))
    np.testing.assert_allclose(np.array(got), [*values.values()], rtol=3e-7, atol=1e-8)


# 41, 47, 55 … are lengths for which D·(1/D), which XLA computes for D/D, is below 1 in float32.
@pytest.mark.parametrize("length", [1, 3, 41, 47, 55, 61, 82, 1000])
def test_multiples_of_the_length_are_exact_when_compiled(length):
    steps = length * np.arange(1, 9)

    def at_multiples(schedule):
        return np.array(RUNS["vmap"](schedule, steps))

    inverse = InverseTimeDecay(1.0, length, decay_rate=1.0, staircase=True)
    before = RUNS["vmap"](inverse, steps - 1)
    one_over = [1 / np.float32(1 + i) for i in range(10)]
    np.testing.assert_array_equal(at_multiples(inverse), one_over[1:9])
    np.testing.assert_array_equal(before, one_over[:8])
    low = PolynomialDecay(1.0, length, end_learning_rate=0.25, power=0.125)
    np.testing.assert_array_equal(at_multiples(low), 0.25)
    cycle = PolynomialDecay(1.0, length, end_learning_rate=0.25, power=0.125, cycle=True)
    np.testing.assert_array_equal(at_multiples(cycle), 0.25)
    same_length = CosineDecayRestarts(1.0, length, t_mul=1.0, m_mul=0.5)
    np.testing.assert_array_equal(at_multiples(same_length), 0.5 ** np.arange(1, 9))


@pytest.mark.parametrize("t_mul", ["1", "1.5", "2", "2.5", "3"])
@pytest.mark.parametrize("first", [1, 7, 41])
def test_restarts_come_at_their_steps(first, t_mul):
    steps = 2000
    wanted, start, height, length = [], fractions.Fraction(0), 1.0, fractions.Fraction(first)
    for step in range(steps):  # in exact fractions
        if step >= start + length:
            start, height, length = start + length, height * 0.9, length * fractions.Fraction(t_mul)
        part = float((step - start) / length)
        wanted.append(height * 0.5 * (1 + math.cos(math.pi * part)))
    schedule = CosineDecayRestarts(1.0, first, t_mul=float(t_mul), m_mul=0.9)
    got = RUNS["vmap"](schedule, np.arange(steps))
    # A restart one step early or late is off by up to 1.
    np.testing.assert_allclose(got, wanted, atol=1e-5, rtol=0)


OPTAX = {
    "one-cycle": (OneCycle(0.5, 20), optax.cosine_onecycle_schedule(20, 0.5)),
    "one-cycle-options": (
        OneCycle(0.5, 20, pct_start=0.5, div_factor=4.0, final_div_factor=10.0),
        optax.cosine_onecycle_schedule(20, 0.5, 0.5, 4.0, 10.0),
    ),
    "warmup-cosine": (
        CosineDecay(0.1, decay_steps=10, alpha=0.5, warmup_target=0.4, warmup_steps=5),
        optax.warmup_cosine_decay_schedule(0.1, 0.4, 5, 15, 0.2),
    ),
    "polynomial": (PolynomialDecay(0.5, 10, 0.1, 3.0), optax.polynomial_schedule(0.5, 0.1, 3, 10)),
    "join": (
        Join([ExponentialDecay(0.5, 2, 0.5), PolynomialDecay(0.5, 4, 0.1)], [7]),
        optax.join_schedules(
            [optax.exponential_decay(0.5, 2, 0.5), optax.linear_schedule(0.5, 0.1, 4)], [7]
        ),
    ),
}


@pytest.mark.parametrize(("ours", "theirs"), OPTAX.values(), ids=OPTAX)
def test_equals_optax(ours, theirs):
    steps = jnp.arange(25)
    with jax.numpy_dtype_promotion("standard"):
        want = jax.vmap(theirs)(steps)
    np.testing.assert_allclose(jax.vmap(ours)(steps), want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("decay", TF1.values(), ids=TF1)
def test_the_rate_may_be_traced(decay):
    """As a state's number is: in a sweep over rates, and under a derivative."""
    rates = jnp.array([0.0, 0.1, 1.0], jnp.float32)
    swept = jax.jit(jax.vmap(decay, in_axes=(0, None)))(rates, jnp.int32(7))
    np.testing.assert_allclose(swept, [decay(float(r), 7) for r in rates], rtol=3e-7, atol=1e-8)
    assert jnp.isfinite(jax.jit(jax.grad(decay))(jnp.float32(0.1), jnp.int32(40)))


def test_rates_made_from_the_traced_rate():
    """`values` and `end_learning_rate` are rates too."""

    @jax.jit
    def halved_after_5(rate, step):
        return piecewise_constant(step, [5], [rate, rate / 2])

    @jax.jit
    def to_a_tenth(rate, step):
        return polynomial_decay(rate, step, 10, end_learning_rate=rate / 10)

    assert halved_after_5(jnp.float32(0.5), 6) == 0.25
    assert to_a_tenth(jnp.float32(0.5), 10) == jnp.float32(0.5) / 10


@pytest.mark.parametrize("decay", TF1.values(), ids=TF1)
def test_dtype_follows_the_rate(decay, request):
    fixed = "piecewise" in request.node.name  # its values are numbers
    with jax.enable_x64(True):
        wide = decay(jnp.array(0.1, jnp.float64), jnp.int32(7))
        assert wide.dtype == (jnp.float32 if fixed else jnp.float64)
        np.testing.assert_allclose(wide, decay(jnp.float32(0.1), jnp.int32(7)), rtol=2e-6)
        for rate in (0.1, np.float64(0.1), jnp.float32(0.1), jnp.bfloat16(0.1)):
            for step in (7, jnp.int32(7), jnp.int64(7), jnp.float64(7)):
                assert decay(rate, step).dtype == jnp.float32
        assert jax.jit(decay)(0.1, 7).dtype == jnp.float32  # traced, and still a Python number
        if not fixed:
            assert decay(np.array(0.1), 7).dtype == jnp.float64
    with jax.enable_x64(False):
        assert decay(np.array(0.1), 7).dtype == jnp.float32


def test_float64_is_computed_in_float64():
    with jax.enable_x64(True):
        got = exponential_decay(jnp.array(0.1, jnp.float64), 7, 5, 0.7)
        np.testing.assert_allclose(float(got), 0.1 * 0.7 ** (7 / 5), rtol=1e-15)
        two = [jnp.array(0.1, jnp.float64), 0.2]
        assert piecewise_constant(0, [5], two).dtype == jnp.float64


VALUES = {
    "ExponentialDecay": lambda: ExponentialDecay(0.1, 5, 0.7, staircase=True, name="rate"),
    "InverseTimeDecay": lambda: InverseTimeDecay(0.1, 5, 0.7),
    "PiecewiseConstantDecay": lambda: PiecewiseConstantDecay([5, 10], [0.2, 0.1, 0.02]),
    "PolynomialDecay": lambda: PolynomialDecay(0.1, 10, cycle=True),
    "CosineDecay": lambda: CosineDecay(0.0, 10, warmup_target=0.2, warmup_steps=5),
    "CosineDecayRestarts": lambda: CosineDecayRestarts(0.1, 4),
    "WarmupStableDecay": lambda: WarmupStableDecay(0.1, 5, 10, 5),
    "InverseSquareRootDecay": lambda: InverseSquareRootDecay(0.1, 5),
    "OneCycle": lambda: OneCycle(0.1, 10),
    "Join": lambda: Join([WarmUpDecay(0.9), ExponentialDecay(0.1, 5, 0.7)], [3]),
    "WarmUpDecay": lambda: WarmUpDecay(0.9),
    "Decayed": lambda: Decayed(0.1, TF1["exponential"]),
}


@pytest.mark.parametrize("build", VALUES.values(), ids=VALUES)
def test_a_schedule_is_a_value(build):
    one, other = build(), build()
    assert one == other
    assert hash(one) == hash(other)
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def at(schedule, step):
        traces.append(step)
        return schedule(step)

    assert at(one, 7) == at(other, 7)
    assert at(one, 8).dtype == jnp.float32
    assert len(traces) == 1
    if not isinstance(one, Decayed):  # which is as picklable as its function
        assert pickle.loads(pickle.dumps(one)) == one
        assert repr(one).startswith(type(one).__name__)


def test_a_decayed_rate_is_as_picklable_as_its_function():
    one = Decayed(0.1, functools.partial(exponential_decay, decay_steps=5, decay_rate=0.5))
    assert pickle.loads(pickle.dumps(one))(5) == one(5) == jnp.float32(0.1) * 0.5


def test_fields_become_plain_numbers():
    five: Any = np.int64(5)
    half: Any = jnp.float32(0.5)
    arrays: Any = [np.array([5, 10]), jnp.array([4.0, 2.0, 1.0])]
    built = PiecewiseConstantDecay(*arrays)
    assert built == PiecewiseConstantDecay([5, 10], [4, 2, 1])
    assert built != PiecewiseConstantDecay([5, 10], [4, 2, 0])
    decay = ExponentialDecay(half, five, 1)
    assert decay == ExponentialDecay(0.5, 5, 1.0)
    assert hash(decay) == hash(ExponentialDecay(0.5, 5, 1.0))
    assert "initial_learning_rate=0.5, decay_steps=5, decay_rate=1," in repr(decay)
