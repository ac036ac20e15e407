"""Gates, links for some parameters, links that move parameters, and links of whole trees."""

import dataclasses
import functools
import itertools
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import optimize_loss as ol
from optimize_loss import transforms as T
from optimize_loss._checks import TreeMismatch
from tests.cases import SubtractMean, accumulated, is_no_bias, on_eight_devices
from tests.cases import grads as grads_of
from tests.cases import params as params_of

INF, NAN = np.inf, np.nan
DESCEND = T.ScaleByLearningRate(1.0)  # p ← p - u
RATE = {"rate": T.ScaleByLearningRate(0.5)}
HALF = {"decay": T.ShrinkParams(1.0)}  # with this rate, p ← p / 2


def w(*numbers, dtype=jnp.float32):
    return {"w": jnp.array(numbers, dtype)}


def steps(tx, grads, params, state=None, **extra):
    """Return parameters and state after every gradient; compiled once."""
    step = jax.jit(functools.partial(tx.apply, **extra))
    state, seen = tx.init(params) if state is None else state, []
    for g in grads:
        params, state = step(g, state, params)
        seen.append((params, state))
    return seen


def assert_same(got, want):
    """Compare structures, dtypes and bits."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def assert_close(got, want, relative=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=relative, atol=1e-7), got, want)


def mean(trees):
    return jax.tree.map(lambda *xs: sum(xs) / len(xs), *trees)


# Accumulate.

# every, gradients call by call, the parameter after each call, and updates made.
ACCUMULATED = {
    "of-one": (1, [1, 3], [-1, -4], 2),
    "of-two": (2, [1, 3, 5, 1], [0, -2, -2, -5], 2),
    "of-three-with-one-left": (3, [1, 3, 5, 9], [0, 0, -3, -3], 1),
    "of-more-than-come": (9, [1, 3, 5], [0, 0, 0], 0),
    "one-is-infinite": (2, [INF, 1, 1, 1], [0, -INF, -INF, -INF], 2),
}


@pytest.mark.parametrize("case", ACCUMULATED.values(), ids=ACCUMULATED)
def test_accumulated_values(case):
    every, gradients, wanted, updates = case
    tx = T.chain(accumulate=T.Accumulate(every), rate=DESCEND)
    seen = steps(tx, [w(g) for g in gradients], w(0))
    assert [float(p["w"][0]) for p, _ in seen] == wanted
    assert seen[-1][1]["step"] == updates
    assert seen[-1][1]["accumulate"]["gathered"] == len(gradients) % every


@pytest.mark.parametrize(("every", "wanted"), [(1, -8 / 3), (3, -8 / 3), (4, -10 / 4)])
def test_a_count_set_in_between_divides_by_what_was_gathered(every, wanted):
    """Two of four are gathered; one that is set lower opens at the next call, on three."""
    tx = T.chain(accumulate=T.Accumulate(4), rate=DESCEND)
    p, state = steps(tx, [w(1), w(3)], w(0))[-1]
    seen = steps(tx, [w(4), w(2)], p, tx.set(state, every=every))
    updated = next(p for p, s in seen if s["step"] == 1)
    np.testing.assert_allclose(updated["w"], [wanted], rtol=1e-6)


RULES = accumulated(1, 0.5, (0.9, 0.999, 1e-8), 0.1, 0.1, 0.9).links[1:]


def run_as(way, tx, p, every):
    """Return parameters and state after all gradients, run in one of several ways."""
    state = tx.init(p)
    if way == "scan":
        stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *every)
        body = lambda carry, g: (tx.apply(g, *carry[::-1]), None)
        return jax.jit(lambda *first: jax.lax.scan(body, first, stacked)[0])(p, state)
    step = jax.jit(tx.apply, donate_argnums=(1, 2) if way == "donated" else ())
    p = jax.tree.map(jnp.copy, p)
    for g in every:
        p, state = step(g, state, p)
    return p, state


@pytest.mark.parametrize("way", ["jit", "donated", "scan"])
@pytest.mark.parametrize("k", [2, 3])
def test_accumulation_equals_an_update_on_the_mean(k, way):
    every = [grads_of(t) for t in range(2 * k)]
    means = [mean(every[:k]), mean(every[k:])]
    got, state = run_as(way, T.chain(accumulate=T.Accumulate(k), **dict(RULES)), params_of(), every)
    want, wanted = run_as("jit", T.chain(**dict(RULES)), params_of(), means)
    del state["accumulate"]
    assert_close((got, state), (want, wanted))


def test_accumulation_of_one_changes_no_bit():
    every = [grads_of(t) for t in range(3)]
    got, state = run_as("jit", T.chain(gate=T.Accumulate(1), **dict(RULES)), params_of(), every)
    del state["gate"]
    assert_same((got, state), run_as("jit", T.chain(**dict(RULES)), params_of(), every))


def test_nothing_but_the_sum_changes_before_the_last_gradient():
    tx = T.chain(accumulate=T.Accumulate(3), **dict(RULES))
    first = params_of(), tx.init(params_of())
    for p, state in steps(tx, [grads_of(0), grads_of(1)], params_of()):
        for name in state.keys() - {"accumulate"}:
            assert_same(state[name], first[1][name])
        assert_same(p, first[0])
    assert_same(state["accumulate"]["sum"], jax.tree.map(jnp.add, grads_of(0), grads_of(1)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sum_and_mean_of_narrow_gradients_are_float32(dtype):
    """1 + 2⁻²⁰ needs more bits than either has; momentum sees half of it."""
    tx = T.chain(accumulate=T.Accumulate(2), momentum=T.ScaleByMomentum(0.5))
    gradients = [w(1, dtype=dtype), w(2**-20, dtype=dtype)]
    (_, state), (_, last) = steps(tx, gradients, w(0, dtype=dtype))
    assert state["accumulate"]["sum"]["w"].dtype == jnp.float32
    assert last["momentum"]["momentum"] == 0.5
    (sum_of_momentum,) = (x for x in jax.tree.leaves(last["momentum"]) if x.shape == (1,))
    assert_same(sum_of_momentum, jnp.array([(1 + 2**-20) / 2], jnp.float32))


def test_no_gradient_while_accumulating():
    tx = T.chain(accumulate=T.Accumulate(2), **dict(RULES))
    p = params_of()
    every = [{**grads_of(t), "scale": None} for t in range(2)]
    _, (new, state) = steps(tx, every, p)
    assert_same(new["scale"], p["scale"])
    assert_same(state["adam"]["m"]["scale"], jnp.zeros(()))
    assert_same(state["accumulate"]["sum"]["scale"], jnp.zeros(()))
    assert not np.array_equal(
        new["encoder"]["layer_0"]["kernel"], p["encoder"]["layer_0"]["kernel"]
    )
    assert state["step"] == 1


def test_schedules_and_corrections_go_by_updates():
    rate = lambda step: step.astype(jnp.float32) + 1
    tx = T.chain(accumulate=T.Accumulate(2), rate=T.ScaleByLearningRate(rate))
    seen = steps(tx, [w(1)] * 4, w(0))
    assert [float(p["w"][0]) for p, _ in seen] == [0, -1, -1, -3]


def test_each_row_of_a_vmap_has_its_own_gate():
    tx = T.chain(accumulate=T.Accumulate(1), adam=T.ScaleByAdam(), rate=DESCEND)
    states = [tx.set(tx.init(w(0)), every=n) for n in (1, 2)]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *states)
    step = jax.jit(jax.vmap(tx.apply, in_axes=(None, 0, None)))
    p, state = step(w(1), stacked, w(0))
    assert state["step"].tolist() == [1, 0]
    np.testing.assert_allclose(p["w"], [[-1], [0]], rtol=1e-4)
    assert_same(
        jax.tree.map(lambda x: x[0], state["adam"]), tx.apply(w(1), states[0], w(0))[1]["adam"]
    )
    assert_same(jax.tree.map(lambda x: x[1], state["adam"]), states[1]["adam"])


# A gate at the edges of a chain.


@dataclasses.dataclass(frozen=True)
class OpenFrom(T.Gate):
    """A user's gate, which opens where the norm is large enough, and multiplies by nothing."""

    norm: float
    needs = "global_norm"

    def scalars(self, numbers, memory, total, step):
        return {"open": total >= numbers["norm"]}, memory


GATES = {
    "accumulate": (T.Accumulate(2), [1, 1], 1),
    "loss-scale": (T.DivideByDynamicLossScale(1.0), [INF, 1], 1),
    "of-a-user": (OpenFrom(1.0), [0.5, 1], 1),
}


@pytest.mark.parametrize("how", ["update", "apply"])
@pytest.mark.parametrize("gate", GATES)
def test_a_gate_may_stand_last_and_alone(gate, how):
    link, gradients, wanted = GATES[gate]
    tx = T.chain(gate=link)
    state, p = tx.init(w(0)), w(0)
    for g, outcome in zip(gradients, (0, wanted), strict=True):
        new, state = getattr(tx, how)(w(g), state, p)
        assert_same(new, w(outcome))
        assert state["step"] == outcome


@pytest.mark.parametrize("gate", GATES)
def test_a_gate_without_parameters_or_gradients(gate):
    link, gradients, _ = GATES[gate]
    tx = T.chain(gate=link, adam=T.ScaleByAdam(), rate=DESCEND)
    updates, state = tx.update(w(gradients[0]), tx.init(w(0)))  # no parameters given
    assert_same(updates, w(0))
    assert tx.update(w(gradients[1]), state)[0]["w"] != 0
    for nothing in ({}, {"w": None}):
        assert tx.update(nothing, tx.init(nothing), nothing)[0] == nothing
    updates, state = tx.update({"w": None}, tx.init(w(5)), w(5))
    assert updates == {"w": None}
    assert_same(tx.apply({"w": None}, state, w(5))[0], w(5))


def test_arrays_of_numpy_and_numbers_pass_a_gate():
    tx = T.chain(decay=HALF["decay"], gate=T.Accumulate(1), **RATE)
    p = {"w": np.array([4.0], np.float32), "v": 4.0}
    new, _ = tx.apply({"w": np.array([1.0], np.float32), "v": 1.0}, tx.init(p), p)
    assert_same(new, {"w": jnp.array([1.5]), "v": jnp.float32(1.5)})


def test_integers_pass_a_gate():
    tx = T.chain(gate=T.Accumulate(1), rate=DESCEND)
    p = {"table": jnp.array([3]), **w(1)}
    new, _ = jax.jit(tx.apply)({"table": jnp.array([1]), **w(1)}, tx.init(p), p)
    assert_same(new, {"table": jnp.array([3]), **w(0)})


@pytest.mark.parametrize("gate", GATES)
def test_optax_and_tree_links_run_behind_a_gate(gate):
    link, gradients, _ = GATES[gate]
    inner: dict[str, Any] = {"trace": optax.trace(0.5), "mean": SubtractMean(1.0), "rate": DESCEND}
    tx, plain = T.chain(gate=link, **inner), T.chain(**inner)
    (p, state), (q, after) = steps(tx, [w(g, 0) for g in gradients], w(5, 7))
    wanted, state_wanted = plain.apply(w(1, 0), plain.init(w(5, 7)), w(5, 7))
    assert_same(
        (p, state["trace"], state["mean"]), (w(5, 7), tx.init(p)["trace"], tx.init(p)["mean"])
    )
    del after["gate"]
    assert_close((q, after), (wanted, state_wanted))


def test_what_stands_before_a_gate_always_runs():
    tx = T.chain(seen=T.ObserveNorm(), momentum=T.ScaleByMomentum(1.0), gate=T.Accumulate(9))
    _, state = steps(tx, [w(3), w(4)], w(0))[-1]
    assert state["seen"]["norm"] == 4
    assert 7 in [float(x[0]) for x in jax.tree.leaves(state["momentum"]) if x.shape == (1,)]


def test_a_move_before_a_gate_waits_with_the_rest():
    """4 - 0.5 · 0.5 · 4 - 0.5 · 2, once, when the gate opens."""
    tx = T.chain(decay=T.ShrinkParams(0.5), gate=T.Accumulate(2), rate=T.ScaleByLearningRate(0.5))
    first, second = steps(tx, [w(1), w(3)], w(4))
    assert (first[0]["w"], second[0]["w"]) == (4, 2)
    updates, _ = tx.update(w(3), first[1], first[0])
    assert_same(updates, w(-2))


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


# Gates behind gates: gradients, the parameter, the scale, how many are gathered, and updates.
NESTED = [
    (1, 0, 8, 1, 0),
    (INF, 0, 4, 1, 0),
    (NAN, 0, 2, 1, 0),
    (3, -(1 / 8 + 3 / 2) / 2, 2, 0, 1),
]


def test_a_gate_behind_a_gate():
    """What is not finite is not gathered, and takes no turn."""
    gates = {"unscale": T.DivideByDynamicLossScale(8.0), "accumulate": T.Accumulate(2)}
    tx = T.chain(**gates, rate=DESCEND)
    seen = steps(tx, [w(g) for g, *_ in NESTED], w(0))
    for (_, wanted, scale, gathered, updates), (p, state) in zip(NESTED, seen, strict=True):
        assert p["w"] == wanted
        assert state["unscale"]["loss_scale"] == scale
        assert state["accumulate"]["gathered"] == gathered
        assert state["step"] == updates


def test_a_gate_behind_a_gate_the_other_way_round():
    """An infinite sum halves the scale once, and the next one begins anew."""
    gates = {"accumulate": T.Accumulate(2), "unscale": T.DivideByDynamicLossScale(8.0)}
    tx = T.chain(**gates, rate=DESCEND)
    seen = steps(tx, [w(g) for g in (INF, 1, 4, 4)], w(0))
    assert [float(p["w"][0]) for p, _ in seen] == [0, 0, 0, -1]
    assert [float(s["unscale"]["loss_scale"]) for _, s in seen] == [8, 4, 4, 4]
    assert [int(s["step"]) for _, s in seen] == [0, 0, 0, 1]


# The scale of the loss in optimize_loss.


def quadratic(params, x):
    return jnp.sum((params["a"] * x - params["b"]) ** 2)


def train(tx, loss=quadratic, batches=((2.0,), (3.0,), (-1.0,)), params=None):
    step = ol.optimize_loss(loss, optimizer=tx)
    state, seen = step.init({"a": 0.3, "b": 0.7} if params is None else params), []
    for batch in batches:
        state, metrics = step(state, *batch)
        seen.append(metrics)
    return state, seen


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


# Links for some parameters.

BODY = {"kernel": jnp.array([[3.0, -4.0]]), "bias": jnp.array([1.0, 2.0])}
TWO = {"body": BODY, "head": {"kernel": jnp.array([[5.0], [6.0]]), "bias": jnp.array([-7.0])}}
LINKS = {
    "body": {
        "before": T.ObserveNorm(),
        "multiply": T.MultiplyGradients({"**/bias": 2.0}),
        "clip": T.ClipByGlobalNorm(1.5),
        "after": T.ObserveNorm(),
        "noise": T.AddNoise(0.1),
        "adam": T.ScaleByAdam(),
        "rate": T.ScaleByLearningRate(0.1),
        "average": T.AverageParams(0.5),
    },
    "head": {
        "each": T.ClipByNorm(0.7),
        "adaptive": T.ClipByAdaptiveNorm(),
        "momentum": T.ScaleByMomentum(0.9),
        "rate": T.ScaleByLearningRate(lambda step: 0.1 / (1 + step.astype(jnp.float32))),
    },
}


def only(part, tree):
    none = lambda subtree: jax.tree.map(lambda _: None, subtree)
    return {name: subtree if name == part else none(subtree) for name, subtree in tree.items()}


def test_two_groups_equal_two_chains():
    """Bit by bit: parameters, slots, norms, noise; and no slots for the others."""
    links = {
        f"{link}_{part}": T.ForParameters(f"{part}/**", x)
        for part in LINKS
        for link, x in LINKS[part].items()
    }
    tx = T.chain(**links)
    p, state = TWO, tx.init(TWO)
    alone = {
        part: (only(part, TWO), T.chain(**LINKS[part]).init(only(part, TWO))) for part in LINKS
    }
    for t in range(3):
        g = jax.tree.map(jnp.cos, jax.tree.map(lambda x, t=t: x + t, TWO))
        p, state = tx.apply(g, state, p)
        for part, (own, own_state) in alone.items():
            alone[part] = T.chain(**LINKS[part]).apply(only(part, g), own_state, own)
    for part, (own, own_state) in alone.items():
        assert_same(p[part], own[part])
        assert_same(
            {n: state[f"{n}_{part}"] for n in LINKS[part]}, {n: own_state[n] for n in LINKS[part]}
        )
    assert state["adam_body"]["m"]["head"] == {"kernel": None, "bias": None}


def test_groups_inside_vmap():
    tx = T.chain(one=T.ForParameters("body/**", T.ScaleByAdam()), rate=T.ScaleByLearningRate(0.1))
    states = [tx.set(tx.init(TWO), beta_1=b) for b in (0.9, 0.5)]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *states)
    p, after = jax.jit(jax.vmap(tx.apply, in_axes=(None, 0, None)))(TWO, stacked, TWO)
    for i, state in enumerate(states):
        want = tx.apply(TWO, state, TWO)
        assert_close(jax.tree.map(lambda x, i=i: x[i], (p, after)), want)


def test_numbers_of_a_group_are_set_by_their_names():
    groups = {part: T.ForParameters(f"{part}/**", T.ScaleByLearningRate(0.5)) for part in TWO}
    tx = T.chain(**groups, clip=T.ForParameters("head/*", T.ClipByValue(9.0)))
    state = tx.set(tx.init(TWO), max_value=8.0, **{"head/learning_rate": 0.25})
    updates, _ = tx.update(TWO, state, TWO)
    assert_same(updates["body"]["bias"], -0.5 * TWO["body"]["bias"])
    assert_same(updates["head"]["bias"], -0.25 * TWO["head"]["bias"])
    assert (tx.numbers_named("learning_rate", state)["body"], state["clip"]["max_value"]) == (
        0.5,
        8,
    )
    with pytest.raises(ValueError, match=re.escape("['body/learning_rate', 'head/learning_rate']")):
        tx.set(state, learning_rate=1.0)


BAD_GROUPS = {
    "no-name": (lambda: T.chain(x=T.ForParameters("haed/**", DESCEND)).init(TWO), "'head/bias'"),
    "one-of-two": (
        lambda: T.chain(x=T.ForParameters(("head/**", "tail"), DESCEND)).init(TWO),
        "tail",
    ),
    "none": (
        lambda: T.chain(x=T.ForParameters(lambda n, p: p.ndim == 3, DESCEND)).init(TWO),
        "for a par",
    ),
    "integers": (
        lambda: T.chain(x=T.ForParameters("i", DESCEND)).init({"i": 1, "w": 1.0}),
        "for a par",
    ),
    "at-update": (
        lambda: T.chain(x=T.ForParameters("head/**", DESCEND)).update(
            {"w": 1.0}, T.chain(x=T.ForParameters("w", DESCEND)).init({"w": 1.0})
        ),
        "matches no parameter",
    ),
    "gate": (lambda: T.ForParameters("w", T.Accumulate(2)), "no gate"),
    "scale": (lambda: T.ForParameters("w", T.DivideByLossScale(2.0)), "no loss scale"),
    "optax": (lambda: T.ForParameters("w", optax.trace(0.9)), "must be a `Link`"),  # pyright: ignore
    "where": (lambda: T.ForParameters(3, DESCEND), "must be a pattern"),  # pyright: ignore
    "chain": (lambda: T.chain(x=T.ForParameters), "must be an instance"),
}


@pytest.mark.parametrize("case", BAD_GROUPS.values(), ids=BAD_GROUPS)
def test_groups_that_are_refused(case):
    wrong, message = case
    with pytest.raises(ValueError, match=re.escape(message)):
        wrong()


def test_a_group_that_is_not_trained_is_refused():
    tx = T.chain(x=T.ForParameters("body/**", DESCEND), y=T.ForParameters("head/**", DESCEND))
    step = ol.optimize_loss(lambda p: jnp.sum(p["head"]["bias"]), optimizer=tx, variables="head/**")
    with pytest.raises(ValueError, match="matches no parameter: 'body/"):
        step.init(TWO)


CLIP_A = T.ForParameters("a", T.ClipByGlobalNorm(1.0))

# What stands before a clip to norm 1 of `a` alone; gradients of `a`; those of `b`, which pass; and
# the norm that the clip sees.
CLIPPED = {
    "alone": ({}, [3.0, 4.0], 7.0, 5.0),
    "multiplied": ({"m": T.MultiplyGradients({"a": 2.0, "b": 100.0})}, [3.0, 4.0], 7.0, 10.0),
    "multiplied-back": ({"m": T.MultiplyGradients({"a": 0.1})}, [3.0, 4.0], 7.0, 0.5),
    "rate-of-a": ({"m": T.ForParameters("a", T.ScaleByLearningRate(3.0))}, [3.0, 4.0], 7.0, 15.0),
    "rate-of-b": ({"m": T.ForParameters("b", T.ScaleByLearningRate(3.0))}, [3.0, 4.0], 7.0, 5.0),
    "both": (
        {
            "m": T.ForParameters("b", T.ScaleByLearningRate(3.0)),
            "n": T.MultiplyGradients({"b": 1e30}),
            "o": T.ForParameters("a", T.MultiplyGradients({"a": 0.5})),
        },
        [3.0, 4.0],
        7.0,
        2.5,
    ),
    "value-of-b": ({"m": T.ForParameters("b", T.ClipByValue(1.0))}, [3.0, 4.0], 7.0, 5.0),
    "value-of-a": ({"m": T.ForParameters("a", T.ClipByValue(3.0))}, [3.0, 4.0], 7.0, 18**0.5),
    "clip-of-b": ({"m": T.ForParameters("b", T.ClipByGlobalNorm(1.0))}, [3.0, 4.0], 7.0, 5.0),
    "huge": ({}, [3e30, 4e30], 7.0, 5e30),
    "huge-others": ({}, [3.0, 4.0], 7e30, 5.0),
    "huge-and-multiplied": ({"m": T.MultiplyGradients({"a": 1e-30})}, [3e30, 4e30], 7e30, 5.0),
    "multiplied-to-huge": ({"m": T.MultiplyGradients({"a": 1e30})}, [3.0, 4.0], 7e30, 5e30),
    "tiny": ({"m": T.MultiplyGradients({"a": 1e30})}, [3e-30, 4e-30], 7e30, 5.0),
}


@pytest.mark.parametrize("case", CLIPPED.values(), ids=CLIPPED)
def test_a_norm_in_a_group_counts_its_parameters_alone(case):
    before, a, b, norm = case
    seen = T.ForParameters("a", T.ObserveNorm())
    tx, prefix = T.chain(**before, seen=seen, clip=CLIP_A), T.chain(**before, end=T.ObserveNorm())
    g = {"a": jnp.array(a), "b": jnp.array([b])}
    updates, state = jax.jit(tx.update)(g, tx.init(g), g)
    unclipped, _ = jax.jit(prefix.update)(g, prefix.init(g), g)
    np.testing.assert_allclose(state["seen"]["norm"], norm, rtol=1e-6)
    np.testing.assert_allclose(updates["a"], unclipped["a"] / max(norm, 1), rtol=1e-6)
    assert_same(updates["b"], unclipped["b"])


def test_a_norm_over_all_behind_a_factor_for_some():
    """√((2·3)² + 8²) = 10."""
    tx = T.chain(some=T.ForParameters("a", T.ScaleByLearningRate(2.0)), seen=T.ObserveNorm())
    g = {"a": jnp.array([3.0]), "b": jnp.array([8.0])}
    assert tx.update(g, tx.init(g), g)[1]["seen"]["norm"] == 10


def test_a_pattern_whose_parameter_has_no_gradient_is_no_error():
    """It was matched when the state was made; the others are treated as ever."""
    tx = T.chain(
        multiply=T.MultiplyGradients({"a": 2.0, "b": 3.0}),
        decay=T.AddWeightDecay(1.0, exclude=("a",)),
        some=T.ForParameters("a", T.ClipByGlobalNorm(1.0)),
    )
    p = {"a": jnp.ones(1), "b": jnp.ones(1)}
    updates, _ = tx.update({"a": None, "b": jnp.ones(1)}, tx.init(p), p)
    assert updates["a"] is None
    assert updates["b"] == 4


# What must stand last: the average of some, and a link behind it for some.
BEHIND_AN_AVERAGE = {
    "the-same": ("a", "a", True),
    "all-after-some": ("a", None, True),
    "some-after-all": (None, "a", True),
    "overlapping": (("a", "b"), lambda name, p: name == "b", True),
    "others": ("a", "b", False),
    "others-by-function": ("a", lambda name, p: name == "b", False),
}


@pytest.mark.parametrize("case", BEHIND_AN_AVERAGE.values(), ids=BEHIND_AN_AVERAGE)
def test_nothing_changes_a_parameter_behind_its_average(case):
    *wheres, refused = case
    links = [T.AverageParams(0.5), T.ScaleByLearningRate(0.1)]
    average, rate = (
        link if where is None else T.ForParameters(where, link)
        for where, link in zip(wheres, links, strict=True)
    )
    p = {"a": 1.0, "b": 2.0}
    if refused:
        with pytest.raises(ValueError, match="'average' must stand last"):
            T.chain(average=average, rate=rate).init(p)
    else:
        T.chain(average=average, rate=rate).init(p)
    with pytest.raises(ValueError, match="must stand last"):
        T.chain(average=T.AverageParams(0.5), gate=T.DivideByDynamicLossScale())


# Decay that comes first.


def adam_with(**decay):
    return T.chain(**decay, adam=T.ScaleByAdam(), rate=T.ScaleByLearningRate(0.1))


def test_decay_first_equals_decoupled_decay_where_the_rule_does_not_read_parameters():
    first = adam_with(decay=T.ShrinkParams(0.3, exclude=("**/bias",)))
    later = T.chain(
        adam=T.ScaleByAdam(),
        decay=T.AddWeightDecay(0.3, exclude=("**/bias",)),
        rate=T.ScaleByLearningRate(0.1),
    )
    every = [grads_of(t) for t in range(5)]
    (got, _), (want, _) = (steps(tx, every, params_of())[-1] for tx in (first, later))
    assert_close(got, want, 3e-7)
    plain, _ = steps(adam_with(), every, params_of())[-1]
    assert_close(got["encoder"]["layer_0"]["bias"], plain["encoder"]["layer_0"]["bias"], 3e-7)
    assert not np.array_equal(got["scale"], plain["scale"])


@pytest.mark.parametrize("how", ["update", "apply"])
def test_a_parameter_that_ftrl_holds_at_zero_stays_zero_under_decay(how):
    rule = T.StepByFtrl(0.1, l1_regularization_strength=10.0)
    tx = T.chain(decay=T.ShrinkParams(0.3), ftrl=rule)
    p = w(0.7, -0.123, 1e-8)
    new, _ = jax.jit(getattr(tx, how))(w(0.1, 0.2, -0.3), tx.init(p), p)
    assert_same(new if how == "apply" else optax.apply_updates(p, new), w(0, 0, 0))


@dataclasses.dataclass(frozen=True)
class Double(T.Link):
    """A rule that reads the parameter: p ← p + 2p - g."""

    reads_params = True

    def leaf(self, update, slots, param, k):
        return 2 * param - update, slots


@dataclasses.dataclass(frozen=True)
class Shift(T.Link):
    """Moves by a number, and reads nothing."""

    by: float

    def before(self, param, k):
        return jnp.full_like(param, k["by"])


# Links, and where they take p = 4 with g = 1.
MOVED = {
    "nothing-reads": ({**HALF, **RATE}, 1.5),
    "a-rule-reads": ({**HALF, "double": Double(), **RATE}, 2 - 1.5),
    "read-before": ({"double": Double(), **HALF, **RATE}, 2 - 3.5),
    "read-twice": ({**HALF, "a": Double(), "b": Double(), **RATE}, 2 - (4 - (4 - 1)) / 2),
    "optax-between": ({**HALF, "optax": optax.identity(), **RATE}, 1.5),
    "optax-reads": ({**HALF, "optax": optax.add_decayed_weights(2.0), **RATE}, 2 - 2.5),
    "optax-last": ({**RATE, **HALF, "optax": optax.scale(2.0)}, 2 - 1),
    "tree-between": ({**HALF, "tree": SubtractMean(0.5), **RATE}, 2 - 0.25),
    "tree-then-read": ({**HALF, "tree": SubtractMean(0.0), "double": Double(), **RATE}, 2 - 1.5),
    "gate-between": ({**HALF, "gate": T.Accumulate(1), **RATE}, 1.5),
    "gate-last": ({**HALF, **RATE, "gate": T.Accumulate(1)}, 1.5),
    "gate-then-read": ({**HALF, "gate": T.Accumulate(1), "double": Double(), **RATE}, 2 - 1.5),
    "average-last": ({**HALF, **RATE, "average": T.AverageParams(0.5, 1)}, (4 + 1.5) / 2),
    "two-moves": ({"a": Shift(1.0), "b": Shift(2.0), **RATE}, 4 + 3 - 0.5),
    "move-then-decay": ({"a": Shift(2.0), **HALF, **RATE}, 3 - 0.5),
    "decay-then-move": ({**HALF, "a": Shift(2.0), **RATE}, 4 - 0.5),
    "move-last": ({**RATE, "a": Shift(2.0)}, 6 - 0.5),
    "some": ({"decay": T.ForParameters("w", T.ShrinkParams(1.0)), **RATE}, 1.5),
    "others": ({"decay": T.ForParameters("x", T.ShrinkParams(1.0)), **RATE}, 3.5),
}


@pytest.mark.parametrize("case", MOVED.values(), ids=MOVED)
def test_moved_parameters(case):
    """`update` gives the whole difference, and `apply` the same."""
    links, wanted = case
    tx = T.chain(**links)
    p, g = {**w(4), "x": jnp.zeros(1)}, {**w(1), "x": jnp.ones(1)}
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        new, state = jax.jit(tx.apply)(g, tx.init(p), p)
        updates, after = jax.jit(tx.update)(g, tx.init(p), p)
    assert_same(new["w"], jnp.array([wanted], jnp.float32))
    assert_same(optax.apply_updates(p, updates), new)
    assert_same(after, state)


@pytest.mark.parametrize("links", [["clip"], ["multiply", "clip"], ["optax", "clip"]])
def test_a_norm_behind_a_decay_is_of_the_gradients_alone(links):
    known = {"multiply": T.MultiplyGradients({"*": 2.0}), "optax": optax.scale(2.0)}
    behind = {n: known.get(n, T.ClipByGlobalNorm(1.0)) for n in links}
    tx = T.chain(decay=T.ShrinkParams(0.5), **behind, seen=T.ObserveNorm(), rate=DESCEND)
    p, state = tx.apply(w(3, 4), tx.init(w(100, 0)), w(100, 0))
    np.testing.assert_allclose(state["seen"]["norm"], 1, rtol=1e-6)
    np.testing.assert_allclose(p["w"], [50 - 0.6, -0.8], rtol=1e-6)


@pytest.mark.parametrize("between", [None, optax.identity(), SubtractMean(0.0), T.Accumulate(1)])
def test_a_bfloat16_parameter_is_rounded_once(between):
    """2⁻⁹ of the decay alone, or 2⁻¹⁰ of the gradient, is no step from 1 to another bfloat16."""
    rate = T.ScaleByLearningRate(2**-9)
    links = {} if between is None else {"between": between}
    tx = T.chain(decay=T.ShrinkParams(1.0), **links, rate=rate)
    p, g = w(1, dtype=jnp.bfloat16), w(0.5, dtype=jnp.bfloat16)
    assert_same(tx.apply(g, tx.init(p), p)[0], w(1 - 2**-8, dtype=jnp.bfloat16))


def test_the_decay_follows_the_rate_of_its_lender():
    rate = lambda step: jnp.where(step == 0, 0.5, 0.25)
    tx = T.chain(decay=T.ShrinkParams(1.0), rate=T.ScaleByLearningRate(rate))
    seen = steps(tx, [w(0), w(0)], w(8))
    assert [float(p["w"][0]) for p, _ in seen] == [4, 3]
    state = tx.set(tx.init(w(8)), learning_rate=0.125, weight_decay=2)
    assert tx.apply(w(0), state, w(8))[0]["w"] == 6


A, B = (functools.partial(T.ForParameters, part) for part in "ab")

# Links of which the first borrows a rate; who lends it, or None where nobody can.
LENDERS = {
    "the-only-one": ({"decay": T.ShrinkParams(0.1), "rate": DESCEND}, True),
    "a-rule": ({"decay": T.ShrinkParams(0.1), "ftrl": T.StepByFtrl(0.1)}, True),
    "the-same-some": ({"decay": A(T.ShrinkParams(0.1)), "a": A(DESCEND), "b": B(DESCEND)}, True),
    "all-for-some": ({"decay": A(T.ShrinkParams(0.1)), "rate": DESCEND}, True),
    "nobody": ({"decay": T.ShrinkParams(0.1)}, False),
    "two": ({"decay": T.ShrinkParams(0.1), "rate": DESCEND, "more": DESCEND}, False),
    "some-for-all": ({"decay": T.ShrinkParams(0.1), "a": A(DESCEND)}, False),
    "others": ({"decay": A(T.ShrinkParams(0.1)), "b": B(DESCEND)}, False),
    "some-and-all": ({"decay": A(T.ShrinkParams(0.1)), "a": A(DESCEND), "all": DESCEND}, False),
    "a-parameter-of-that-name": (
        {"decay": T.ShrinkParams(0.1), "m": T.MultiplyGradients({"learning_rate": 1.0})},
        False,
    ),
}


@pytest.mark.parametrize("case", LENDERS.values(), ids=LENDERS)
def test_a_decay_needs_one_rate(case):
    links, lent = case
    if lent:
        T.chain(**links)
    else:
        with pytest.raises(ValueError, match="'decay' needs the `learning_rate` of one other link"):
            T.chain(**links)


def test_a_decay_needs_the_parameters():
    tx = T.chain(move=Shift(1.0))
    with pytest.raises(ValueError, match="`params` must be given: the link 'move' reads them"):
        tx.update(w(1), tx.init(w(1)))
    with pytest.raises(ValueError, match="matches no parameter: 'bias'"):
        T.chain(decay=T.ShrinkParams(0.1, exclude="bias"), rate=DESCEND).init(w(1))  # pyright: ignore


# Links that see the whole tree.

NUMBERS = {"a": jnp.array([1.0, 3.0]), "b": jnp.array([4.0, 8.0])}  # of mean 4
DOUBLED = {"m": T.MultiplyGradients({"*": 2.0})}

# Links around one that subtracts the mean, and what they make of NUMBERS.
AROUND = {
    "alone": ({"mean": SubtractMean(1.0)}, [-3, -1], [0, 4]),
    "before": ({"mean": SubtractMean(1.0), **DOUBLED}, [-6, -2], [0, 8]),
    "behind": ({**DOUBLED, "mean": SubtractMean(1.0)}, [-6, -2], [0, 8]),
    "between": ({**DOUBLED, "mean": SubtractMean(1.0), "rate": DESCEND}, [6, 2], [0, -8]),
    "twice": ({"mean": SubtractMean(1.0), "again": SubtractMean(1.0)}, [-3, -1], [0, 4]),
    "half": ({"mean": SubtractMean(0.5)}, [-1, 1], [2, 6]),
    "of-some": ({"mean": T.ForParameters("a", SubtractMean(1.0))}, [-1, 1], [4, 8]),
    "behind-a-gate": ({"gate": T.Accumulate(1), "mean": SubtractMean(1.0)}, [-3, -1], [0, 4]),
    "before-a-gate": ({"mean": SubtractMean(1.0), "gate": T.Accumulate(1)}, [-3, -1], [0, 4]),
}


@pytest.mark.parametrize("case", AROUND.values(), ids=AROUND)
def test_a_link_of_a_user_that_sees_the_whole_tree(case):
    links, a, b = case
    tx = T.chain(**links)
    state = tx.init(NUMBERS)
    updates, after = jax.jit(tx.update)(NUMBERS, state, NUMBERS)
    assert_same(updates, {"a": jnp.array(a, jnp.float32), "b": jnp.array(b, jnp.float32)})
    assert after["mean"]["sum"]["a"] == (8 if next(iter(links)) == "m" else 4)
    assert jax.tree.structure(after) == jax.tree.structure(state)


def test_a_tree_link_trains():
    tx = T.chain(mean=SubtractMean(1.0), rate=T.ScaleByLearningRate(0.5))
    loss = lambda p, x: x * p["a"] + 3 * x * p["b"]  # gradients 1 and 3, less their mean 2
    state, _ = train(tx, loss, [(1.0,)], {"a": 1.0, "b": 1.0})
    assert (state.params["a"], state.params["b"]) == (1.5, 0.5)


def test_a_tree_link_sees_float32_and_no_parameter_without_gradient():
    seen = {}

    @dataclasses.dataclass(frozen=True)
    class Look(T.TreeLink):
        needs = "global_norm"

        def init(self, params):
            return {"kept": jnp.zeros((), jnp.bfloat16)}

        def memory(self):
            return {"norm": 0.0, "calls": 0}

        def scalars(self, numbers, memory, total, step):
            return {"norm": total}, {"norm": total, "calls": memory["calls"] + 1}

        def run(self, updates, slots, params, k):
            seen.update(updates=dict(updates), params=dict(params))
            return {n: u / k["norm"] for n, u in updates.items()}, {"kept": jnp.float32(1.5)}

    tx = T.chain(look=Look(), rate=DESCEND)
    p = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(1, jnp.float16), "i": 3}
    g = {"a": jnp.array([3.0, 4.0], jnp.bfloat16), "b": None, "i": None}
    updates, state = tx.update(g, tx.init(p), p)
    assert {n: x.dtype for n, x in seen["updates"].items()} == {"a": jnp.float32}
    assert {n: x.dtype for n, x in seen["params"].items() if n != "b"} == {"a": jnp.float32}
    np.testing.assert_allclose(updates["a"].astype(jnp.float32), [-0.6, -0.8], rtol=1e-2)
    assert (state["look"]["norm"], state["look"]["calls"], state["look"]["kept"]) == (5, 1, 1.5)
    assert state["look"]["kept"].dtype == jnp.bfloat16


def returning(make):
    """Return a link of a whole tree whose `run` returns what `make` makes."""

    @dataclasses.dataclass(frozen=True)
    class Wrong(T.TreeLink):
        def init(self, params):
            return {"slot": jnp.zeros(2)}

        def run(self, updates, slots, params, k):
            return make(dict(updates), dict(slots))

    return Wrong()


WRONG = {
    "no-pair": (lambda u, s: u, "must return (updates, slots)"),
    "lists": (lambda u, s: (list(u.values()), s), "must return (updates, slots)"),
    "a-name-is-missing": (lambda u, s: ({"a": u["a"]}, s), "must return updates of the shapes"),
    "a-name-is-new": (lambda u, s: ({**u, "c": u["a"]}, s), "must return updates of the shapes"),
    "a-shape": (lambda u, s: ({**u, "a": u["a"][:1]}, s), "must return updates of the shapes"),
    "no-slots": (lambda u, s: (u, {}), "must return slots of the shapes"),
    "a-slot-grows": (lambda u, s: (u, {"slot": jnp.zeros(3)}), "must return slots of the shapes"),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_what_a_tree_link_returns_is_checked(case):
    make, message = case
    tx = T.chain(wrong=returning(make))
    with pytest.raises(ValueError, match=re.escape(message)):
        tx.update(NUMBERS, tx.init(NUMBERS), NUMBERS)


@pytest.mark.parametrize("method", ["before", "after"])
def test_a_tree_link_does_not_run_around_updates(method):
    cls = type("Tree", (SubtractMean,), {method: lambda *args: None})
    with pytest.raises(ValueError, match="must be a `Link` and no `TreeLink`"):
        T.chain(tree=cls(1.0))


# Sums over devices.


def test_sums_over_the_axes_of_a_vmap():
    g = {"w": jnp.arange(6.0).reshape(2, 3)}  # of sum 15

    def updates(axis):
        tx = T.chain(sum=T.SumOverAxis(axis), rate=DESCEND)
        step = lambda g: tx.update(g, tx.init(g), g)[0]["w"]
        return jax.vmap(jax.vmap(step, axis_name="inner"), axis_name="outer")(g).tolist()

    assert updates("inner") == [[-3] * 3, [-12] * 3]
    assert updates("outer") == [[-3, -5, -7]] * 2
    assert updates(("inner", "outer")) == [[-15] * 3] * 2


@pytest.mark.parametrize("axis", [None, 0, ["data"], ("data", 1)])
def test_an_axis_is_a_name(axis):
    with pytest.raises(ValueError, match="`axis_name` must be the name of an axis"):
        T.SumOverAxis(axis)


def on_devices():
    """Return what three updates on eight devices make, and what one device makes of the sums."""
    links = dict(accumulated(2, 0.5, (0.9, 0.999, 1e-8), 0.1, 0.1, 0.9).links)
    gates = {"unscale": T.DivideByDynamicLossScale(8.0), **links}
    many, one = T.chain(sum=T.SumOverAxis("data"), **gates), T.chain(**gates)
    every = jax.tree.map(lambda *xs: jnp.stack(xs), *map(grads_of, range(8)))
    broken = {**every, "scale": every["scale"].at[3].set(INF)}
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    step = lambda p, s, g: many.apply(jax.tree.map(lambda x: x[0], g), s, p)
    mapped = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P()))
    p, state = params_of(), many.init(params_of())
    q, wanted = params_of(), one.init(params_of())
    for g in (every, broken, every, every):
        p, state = mapped(p, state, g)
        q, wanted = jax.jit(one.apply)(jax.tree.map(lambda x: jnp.sum(x, 0), g), wanted, q)
    del state["sum"]
    assert_close((p, state), (q, wanted), 5e-6)
    return json.dumps([int(state["step"]), float(state["unscale"]["loss_scale"])])


def test_sums_over_eight_devices_go_through_gates_together():
    """Three of four calls are finite, two of them make an update; the infinity is of one device."""
    assert on_eight_devices(__name__, "on_devices") == [1, 4]


# Averages to use after training.


def test_averaged_parameters():
    """The average of 8 and 8 - 2 where there is one; all else as it is."""
    average = T.ForParameters(("a", "b"), T.AverageParams(0.5))
    tx = T.chain(rate=DESCEND, average=average)
    p = {
        "a": jnp.array([8.0]),
        "b": jnp.bfloat16(8),
        "c": jnp.ones(1),
        "i": jnp.array(3),
        "n": None,
    }
    g = {"a": jnp.array([2.0]), "b": jnp.bfloat16(2), "c": jnp.ones(1), "i": None, "n": None}
    new, state = tx.apply(g, tx.init(p), p)
    wanted = {**new, "a": jnp.array([7.0]), "b": jnp.bfloat16(7)}
    assert_same(tx.averaged(state, new), wanted)
    assert_same(jax.jit(tx.averaged)(state, new), wanted)
    assert_same(T.chain(rate=DESCEND).averaged(T.chain(rate=DESCEND).init(p), p), p)


@pytest.mark.parametrize("made", [w(1, 2, 3), {"v": jnp.ones(2)}, {"w": jnp.array([1, 2])}])
def test_averages_of_other_parameters_are_refused(made):
    tx = T.chain(average=T.AverageParams(0.5))
    with pytest.raises(TreeMismatch):
        tx.averaged(tx.init(made), w(1, 2))
    with pytest.raises(TreeMismatch, match="this chain's `init`"):
        tx.averaged(T.chain(rate=DESCEND).init(w(1, 2)), w(1, 2))


# Going on with other numbers.


def numbered(
    rate: Any = 0.1, bound=1.0, multiplier=2.0, every=2, flag=False, where="**", name="clip"
):
    return T.chain(
        unscale=T.DivideByDynamicLossScale(),
        accumulate=T.Accumulate(every),
        multiply=T.MultiplyGradients({"scale": multiplier}),
        **{name: T.ForParameters(where, T.ClipByNorm(bound))},
        momentum=T.ScaleByMomentum(0.9, nesterov=flag),
        rate=T.ScaleByLearningRate(rate),
    )


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"rate": 0.2}, ("rate", "learning_rate", 0.2)),
        ({"bound": 3.0}, ("clip", "max_norm", 3.0)),
        ({"multiplier": -1.0}, ("multiply", "scale", -1.0)),
        ({"every": 5}, ("accumulate", "every", 5)),
        ({}, ("rate", "learning_rate", 0.1)),
    ],
)
def test_other_numbers_keep_the_chain(change, place):
    tx, traced = numbered(), []

    @jax.jit
    def step(state):
        traced.append(1)
        return tx.apply(grads_of(0), state, params_of())[1]

    state = step(tx.init(params_of()))
    same, after = tx.with_numbers_of(numbered(**change), state)
    step(after)
    assert same is tx
    assert len(traced) == 1
    link, number, value = place
    assert_same(after[link][number], jnp.asarray(value, state[link][number].dtype))
    assert_same(after, {**state, link: {**state[link], number: after[link][number]}})


def test_a_number_that_was_set_stays_unless_it_changes():
    tx = numbered()
    state = tx.set(tx.init(params_of()), learning_rate=0.5)
    _, after = tx.with_numbers_of(numbered(bound=3.0), state)
    assert after["rate"]["learning_rate"] == 0.5


def test_another_schedule_gives_the_other_chain():
    tx, scheduled = numbered(), numbered(rate=lambda step: 0.5 + step.astype(jnp.float32))
    first = tx.init(params_of())
    chain, state = tx.with_numbers_of(scheduled, first)
    assert chain is scheduled
    assert chain.numbers_named("learning_rate", state)["rate"] == 0.5
    back, again = chain.with_numbers_of(tx, state)
    assert back is tx
    assert_same(again, first)


OTHERS = {
    "names": numbered(name="bound"),
    "flag": numbered(flag=True),
    "where": numbered(where="**/kernel"),
    "patterns": T.chain(**{**dict(numbered().links), "multiply": T.MultiplyGradients({"*": 2.0})}),
    "kind": T.chain(**{**dict(numbered().links), "momentum": T.ScaleByAdam()}),
    "start": T.chain(**{**dict(numbered().links), "unscale": T.DivideByDynamicLossScale(2.0)}),
    "for-all": T.chain(**{**dict(numbered().links), "clip": T.ClipByNorm(1.0)}),
    "optax": T.chain(**{**dict(numbered().links), "momentum": optax.trace(0.9)}),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_other_structure_is_refused(other):
    tx = numbered()
    state = tx.init(params_of())
    with pytest.raises(ValueError, match="must stay"):
        tx.with_numbers_of(other, state)


def test_a_group_by_function_is_the_same_group():
    make = lambda rate: T.chain(x=T.ForParameters(is_no_bias, T.ScaleByLearningRate(rate)))
    tx = make(0.1)
    same, state = tx.with_numbers_of(make(0.2), tx.init(params_of()))
    assert same is tx
    assert state["x"]["learning_rate"] == np.float32(0.2)
