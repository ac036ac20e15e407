"""Accumulation and other gates: what waits behind them, and what does not."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from optimize_loss import transforms as T
from tests.cases import SubtractMean, accumulated, on_eight_devices
from tests.cases import grads as grads_of
from tests.cases import params as params_of
from tests.engine.by_hand import (
    DESCEND,
    HALF,
    INF,
    NAN,
    RATE,
    RULES,
    assert_close,
    assert_same,
    mean,
    run_as,
    steps,
    w,
)

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


@pytest.mark.slow
def test_sums_over_eight_devices_go_through_gates_together():
    """Three of four calls are finite, two of them make an update; the infinity is of one device."""
    assert on_eight_devices(__name__, "on_devices") == [1, 4]
