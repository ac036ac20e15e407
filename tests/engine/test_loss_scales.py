"""Scales of the loss: chosen by hand or by what overflows, and gone from what is reported."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optimize_loss as ol
from optimize_loss import transforms as T
from tests.cases import grads as grads_of
from tests.cases import params as params_of
from tests.engine.by_hand import (
    DESCEND,
    INF,
    NAN,
    RULES,
    assert_close,
    assert_same,
    quadratic,
    run_as,
    steps,
    train,
    w,
)

# The scale of the loss.

TOP = 2.0**126
# The first scale, after how many finite calls in a row it doubles, gradients, and the scales.
SCALES = {
    "halves": (8.0, 9, [INF, 1, NAN, -INF], [4, 4, 2, 1]),
    "not-below-1": (2.0, 9, [INF, INF, INF], [1, 1, 1]),
    "not-up-to-1": (0.25, 9, [INF, 1], [0.25, 0.25]),
    "not-a-power-of-two": (3.0, 9, [INF, INF], [1.5, 1]),
    "doubles": (1.0, 2, [1, 1, 1, 1, 1], [1, 2, 2, 4, 4]),
    "counts-in-a-row": (4.0, 2, [1, INF, 1, 1], [4, 2, 2, 4]),
    "doubles-each-time": (1.0, 1, [1, 1, INF, 1], [2, 4, 2, 4]),
    "not-to-infinity": (TOP / 2, 1, [1, 1, 1], [TOP, TOP, TOP]),
}


@pytest.mark.parametrize("case", SCALES.values(), ids=SCALES)
def test_dynamic_scales(case):
    scale, growth_steps, gradients, wanted = case
    tx = T.chain(unscale=T.DivideByDynamicLossScale(scale, growth_steps), rate=DESCEND)
    seen = steps(tx, [w(g, 1) for g in gradients], w(0, 0))
    assert [float(s["unscale"]["loss_scale"]) for _, s in seen] == wanted
    assert seen[-1][1]["step"] == sum(np.isfinite(gradients))
    assert [tx.loss_scale(s) for _, s in seen] == wanted


def test_the_largest_scale_still_divides():
    tx = T.chain(
        unscale=T.DivideByDynamicLossScale(TOP), clip=T.ClipByGlobalNorm(0.5), rate=DESCEND
    )
    g = w(0.75 * TOP, TOP)  # of norm 1.25 when divided
    np.testing.assert_allclose(steps(tx, [g], w(0, 0))[0][0]["w"], [-0.3, -0.4], rtol=1e-6)


@pytest.mark.parametrize("bad", [INF, -INF, NAN])
@pytest.mark.parametrize("at", ["encoder", "scale"])
def test_a_skipped_update_leaves_every_bit(bad, at):
    tx = T.chain(unscale=T.DivideByDynamicLossScale(8.0), **dict(RULES))
    ((p, state),) = steps(tx, [grads_of(0)], params_of())
    g = grads_of(1)
    g[at] = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(bad), g[at])
    ((new, after),) = steps(tx, [g], p, state)
    assert_same(new, p)
    assert float(after["unscale"]["loss_scale"]) == float(state["unscale"]["loss_scale"]) / 2
    for name in after.keys() - {"unscale"}:
        assert_same(after[name], state[name])
    updates, _ = jax.jit(tx.update)(g, state, p)
    assert_same(updates, jax.tree.map(jnp.zeros_like, p))


@pytest.mark.parametrize("size", [1, 1000, 10_000])
def test_one_bad_number_is_found_anywhere(size):
    """Also where the maximum on a CPU is taken of vectors, and loses a NaN."""
    tx = T.chain(unscale=T.DivideByDynamicLossScale(8.0))
    step, p = jax.jit(tx.update), {"w": jnp.ones(size)}
    for at, bad in itertools.product({0, size // 3, size - 1}, (INF, -INF, NAN)):
        g = np.ones(size, np.float32)
        g[at] = bad
        assert step({"w": g}, tx.init(p), p)[1]["step"] == 0
    largest = {"w": p["w"] * jnp.finfo(jnp.float32).max}
    assert step(largest, tx.init(p), p)[1]["step"] == 1


@pytest.mark.parametrize("part", [INF, INF * 1j, NAN * 1j])
def test_complex_gradients_are_finite_in_both_parts(part):
    tx = T.chain(unscale=T.DivideByDynamicLossScale(8.0))
    p = w(1 + 1j, 2, dtype=jnp.complex64)
    _, state = tx.update(w(1j, part, dtype=jnp.complex64), tx.init(p), p)
    assert state["step"] == 0


@pytest.mark.parametrize("link", [T.DivideByLossScale(1024.0), T.DivideByDynamicLossScale(1024.0)])
def test_a_scale_that_is_divided_by_changes_nothing(link):
    every = [grads_of(t) for t in range(3)]
    larger = [jax.tree.map(lambda g: 1024 * g, tree) for tree in every]
    got, state = run_as("jit", T.chain(unscale=link, **dict(RULES)), params_of(), larger)
    del state["unscale"]
    assert_close((got, state), run_as("jit", T.chain(**dict(RULES)), params_of(), every))


@pytest.mark.parametrize(
    "link", [T.DivideByLossScale(2.0**15), T.DivideByDynamicLossScale(2.0**15)]
)
@pytest.mark.parametrize("clip", [{}, {"clip": T.ClipByGlobalNorm(1e-9)}])
def test_small_float16_gradients_survive_the_division(link, clip):
    """2⁻³⁰ and its negative are no float16; Adam's first step shows their signs."""
    tx = T.chain(unscale=link, **clip, adam=T.ScaleByAdam(epsilon=1e-30), rate=DESCEND)
    g = w(2**-15, -(2**-15), dtype=jnp.float16)
    ((p, _),) = steps(tx, [g], w(0, 0, dtype=jnp.float16))
    np.testing.assert_allclose(p["w"], [-1, 1], rtol=1e-3)


def test_no_scale_and_several():
    p = {"loss_scale": 1.0}
    none = T.chain(multiply=T.MultiplyGradients({"loss_scale": 3.0}), rate=DESCEND)
    both = T.chain(a=T.DivideByLossScale(2.0), b=T.DivideByDynamicLossScale(8.0))
    scheduled = T.chain(a=T.DivideByLossScale(lambda step: 2.0 + step.astype(jnp.float32)))
    assert none.loss_scale(none.init(p)) is None
    assert both.loss_scale(both.set(both.init(p), loss_scale=4)) == 32
    assert scheduled.loss_scale(scheduled.init(p)) == 2
    assert scheduled.loss_scale(scheduled.init(p), schedule_step=jnp.int32(5)) == 7


ADAM = {"adam": T.ScaleByAdam(), "rate": T.ScaleByLearningRate(0.1)}


@pytest.mark.parametrize("link", [T.DivideByLossScale(1024.0), T.DivideByDynamicLossScale(1024.0)])
def test_a_scaled_loss_trains_the_same_and_reports_the_same(link):
    plain, wanted = train(T.chain(**ADAM))
    scaled, seen = train(T.chain(unscale=link, **ADAM))
    assert_same(scaled.params, plain.params)
    assert_same([m["loss"] for m in seen], [m["loss"] for m in wanted])


def test_a_scaled_loss_saves_float16_gradients():
    """The gradient 2⁻²⁶ is 0 in float16; times 1024 it is not, and 2²⁰ times it is 2⁻⁶."""

    def loss(params, x):
        return params["w"] * x * x

    x, p = jnp.float16(2**-13), {"w": jnp.float16(1)}
    rate = {"rate": T.ScaleByLearningRate(2.0**20)}
    lost, _ = train(T.chain(**rate), loss, [(x,)], p)
    saved, _ = train(T.chain(unscale=T.DivideByLossScale(1024.0), **rate), loss, [(x,)], p)
    assert (lost.params["w"], saved.params["w"]) == (1, 1 - 2**-6)


def test_a_loss_that_overflows_is_skipped_and_the_scale_halves():
    tx = T.chain(unscale=T.DivideByDynamicLossScale(8.0, 1), **ADAM)
    state, seen = train(tx, batches=[(2.0,), (INF,)])
    once, _ = train(tx, batches=[(2.0,)])
    assert_same(state.params, once.params)
    assert (once.optimizer["unscale"]["loss_scale"], state.optimizer["unscale"]["loss_scale"]) == (
        16,
        8,
    )
    assert (once.step, state.step) == (1, 1)
    assert seen[1]["loss"] == INF


def test_many_steps_through_gates():
    gates = {"unscale": T.DivideByDynamicLossScale(8.0, 1), "accumulate": T.Accumulate(2)}
    step = ol.optimize_loss(quadratic, optimizer=T.chain(**gates, **ADAM))
    xs = jnp.array([2.0, INF, 3.0, -1.0])
    state, metrics = step.many(step.init({"a": 0.3, "b": 0.7}), xs)
    alone, seen = train(T.chain(**gates, **ADAM), batches=[(x,) for x in xs])
    assert_close(state.params, alone.params)
    assert metrics["loss"].tolist() == [float(m["loss"]) for m in seen]
    assert state.step == 1
