"""Input that is no error: skipped, left alone, or right after all."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optimize_loss import schedules
from tests.errors.wrong import T, W, build, ol, run

# What is no error: skipped, left alone, or right after all.


def test_39_the_step_stops_at_its_largest_value():
    last = 2**31 - 1
    step = build(learning_rate=lambda n: jnp.where(n > 0, 0.25, 4.0))
    state = step.init(W).set(step=last - 1)
    seen = []
    for _ in range(3):
        state, metrics = step(state, 1.0)
        seen.append((int(state.step), float(metrics["learning_rate"])))
    assert seen == [(last, 0.25)] * 3
    assert state.params["w"] == 9.25


def test_39_the_count_of_updates_stops_at_its_largest_value():
    last = 2**31 - 1
    tx = T.chain(adam=T.ScaleByAdam())
    state = {**tx.init({"w": 1.0}), "step": jnp.int32(last)}
    updates, state = tx.update({"w": 1.0}, state)
    assert state["step"] == last
    assert np.isfinite(updates["w"])


def test_44_a_parameter_without_gradient_is_left_alone():
    tx = T.chain(adam=T.ScaleByAdam(), rate=T.ScaleByLearningRate(0.5))
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    _, state = tx.update({"a": jnp.ones(2), "b": jnp.ones(3)}, tx.init(params), params)
    updates, new = tx.update({"a": jnp.ones(2), "b": None}, state, params)
    assert updates["b"] is None
    np.testing.assert_array_equal(new["adam"]["m"]["b"], state["adam"]["m"]["b"])
    np.testing.assert_array_equal(new["adam"]["v"]["b"], state["adam"]["v"]["b"])
    assert (new["adam"]["m"]["a"] != state["adam"]["m"]["a"]).all()
    after, _ = tx.apply({"a": jnp.ones(2), "b": None}, state, params)
    np.testing.assert_array_equal(after["b"], params["b"])


def test_45_none_among_the_parameters_stays_none():
    step = build(lambda p, x: p["w"] * x, clip_gradients=9.0, optimizer="Adam")
    state = step.init({"b": None, "w": 1.0})
    state, metrics = step(state, 5.0)
    assert state.params["b"] is None
    assert state.optimizer["adam"]["m"]["b"] is None
    assert metrics["global_norm/gradient_norm"] == 5.0


def test_46_integers_and_bools_are_left_alone():
    step = build(lambda p, x: p["w"] * p["n"].astype("float32") * x, gradient_noise_scale=0.1)
    params = {
        "w": np.float32(1),
        "n": np.int32(2),
        "mask": np.array([True, False]),
        "u": np.array([7], np.uint8),
    }
    state = step.init(params)
    for _ in range(2):
        state, _ = step(state, 5.0)
    for name in ("n", "mask", "u"):
        assert state.params[name].dtype == params[name].dtype
        np.testing.assert_array_equal(state.params[name], params[name])
    assert state.params["w"] < 0.1


def test_46_an_update_of_an_integer_is_zero_and_not_truncated():
    tx = T.chain(rate=T.ScaleByLearningRate(1.0))
    params = {"n": jnp.array([2, 3]), "w": jnp.ones(1)}
    updates, _ = tx.update({"n": jnp.array([1.9, -1.9]), "w": jnp.ones(1)}, tx.init(params), params)
    assert updates["n"].dtype == params["n"].dtype
    np.testing.assert_array_equal(updates["n"], [0, 0])
    np.testing.assert_array_equal(updates["w"], [-1.0])


def test_47_float0_counts_as_no_gradient():
    params = {"n": jnp.array([2, 3]), "w": jnp.ones(2, "float32")}
    grads = jax.grad(lambda p: jnp.sum(p["w"] * p["n"].astype("float32")), allow_int=True)(params)
    assert grads["n"].dtype == jax.dtypes.float0
    tx = T.chain(clip=T.ClipByGlobalNorm(1.0), rate=T.ScaleByLearningRate(1.0))
    after, _ = tx.apply(grads, tx.init(params), params)
    np.testing.assert_array_equal(after["n"], [2, 3])
    np.testing.assert_allclose(after["w"], 1 - np.array([2, 3]) / math.sqrt(13), rtol=1e-6)


def test_48_complex_parameters():
    params = {"z": jnp.array([0j, 0j], jnp.complex64)}
    grads = {"z": jnp.array([3 + 4j, -12j], jnp.complex64)}
    clip = T.chain(seen=T.ObserveNorm(), clip=T.ClipByGlobalNorm(1.0))
    updates, state = clip.update(grads, clip.init(params), params)
    assert state["seen"]["norm"] == 13.0
    np.testing.assert_allclose(updates["z"], np.asarray(grads["z"]) / 13, rtol=1e-6)
    adam = T.chain(adam=T.ScaleByAdam())
    updates, state = adam.update(grads, adam.init(params), params)
    assert state["adam"]["v"]["z"].dtype == jnp.float32
    np.testing.assert_allclose(state["adam"]["v"]["z"], [0.025, 0.144], rtol=1e-6)
    np.testing.assert_allclose(updates["z"], [0.6 + 0.8j, -1j], rtol=1e-5)


def test_48_descent_reaches_a_complex_minimum():
    def distance(p, target):
        return jnp.sum((p["z"] - target).real ** 2 + (p["z"] - target).imag ** 2)

    target = jnp.array([1 + 2j, -3j], jnp.complex64)
    params = {"z": jnp.array([5j, 4 + 0j], jnp.complex64)}
    state, _ = run(distance, target, params=params, learning_rate=0.5)
    np.testing.assert_allclose(state.params["z"], target, atol=1e-6)


RULES = {
    "adam": T.ScaleByAdam(),
    "rms": T.ScaleByRMS(centered=True),
    "adadelta": T.ScaleByAdadelta(),
    "adagrad": T.ScaleByAdagrad(0.0),
    "momentum": T.ScaleByMomentum(),
    "value": T.ClipByValue(1.0),
    "norm": T.ClipByNorm(1.0),
    "global": T.ClipByGlobalNorm(1.0),
    "adaptive": T.ClipByAdaptiveNorm(),
    "noise": T.AddNoise(0.0),
    "multiply": T.MultiplyGradients({"**": 2.0}),
    "decay": T.AddWeightDecay(0.1),
    "ftrl": T.StepByFtrl(0.1),
    "proximal": T.StepByProximalGradient(0.1, 0.1, 0.1),
    "proximal-adagrad": T.StepByProximalAdagrad(0.1),
    "dual": T.StepByDualAveraging(0.1),
    "average": T.AverageParams(0.9, 2, bias_free=True),
    "norms": T.ObserveNorms(),
    "histograms": T.ObserveHistograms(3),
}


@pytest.mark.parametrize("name", RULES)
def test_49_leaves_without_entries_or_dimensions(name):
    tx = T.chain(link=RULES[name], seen=T.ObserveNorm())
    params = {"empty": jnp.zeros((0, 3)), "scalar": jnp.zeros(())}
    grads = jax.tree.map(jnp.zeros_like, params)
    updates, state = tx.update(grads, tx.init(params), params)
    assert updates["empty"].shape == (0, 3)
    assert updates["scalar"] == 0
    assert state["seen"]["norm"] == 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


def test_49_a_tree_without_leaves():
    tx = T.chain(noise=T.AddNoise(1.0), clip=T.ClipByGlobalNorm(1.0), seen=T.ObserveNorm())
    updates, state = tx.update({}, tx.init({}), {})
    assert updates == {}
    assert state["seen"]["norm"] == 0
    assert state["step"] == 1


def test_51_python_numbers_become_strongly_typed():
    params = {"a": 1.0, "b": [2.0]}
    state, _ = run(lambda p, x: p["a"] * p["b"][0] * x, 1.0, params=params, learning_rate=0.5)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(state))
    assert state.params["a"].dtype == jnp.result_type(float)
    assert (state.params["a"], state.params["b"][0]) == (0.0, 1.5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_52_half_precision_stays_and_its_memory_is_float32(dtype):
    step = build(
        lambda p, x: jnp.sum(p["w"].astype("float32") ** 2) * x,
        optimizer="Adam",
        clip_gradients=1.0,
        gradient_noise_scale=0.01,
    )
    state = step.init({"w": jnp.ones(3, dtype)})
    for _ in range(3):
        state, metrics = step(state, 1.0)
    assert state.params["w"].dtype == dtype
    assert {m.dtype for m in jax.tree.leaves(state.optimizer["adam"])} == {jnp.dtype("float32")}
    assert metrics["global_norm/gradient_norm"].dtype == jnp.float32
    np.testing.assert_allclose(state.params["w"].astype("float32"), 0.7, atol=0.01)


def test_54_epsilon_too_small_for_float16_still_counts():
    tx = T.chain(adam=T.ScaleByAdam(epsilon=1e-8), rate=T.ScaleByLearningRate(1.0))
    params = {"w": jnp.zeros(3, "float16")}
    grads = {"w": jnp.array([0.0, 1e-4, -300.0], "float16")}
    updates, _ = tx.update(grads, tx.init(params), params)
    assert updates["w"].dtype == jnp.float16
    # epsilon counts √(1 - β₂) times as much at the first step: 1e-8 against 3.2e-6.
    np.testing.assert_allclose(updates["w"], [0.0, -1.0, 1.0], rtol=4e-3)


def test_55_float32_stays_float32_in_x64_mode():
    with jax.enable_x64(True):
        step = build(
            lambda p, x: jnp.sum(p["w"] ** 2) * x,
            learning_rate=lambda n: jnp.float64(0.1) + 0 * n.astype("float64"),
            optimizer="Adam",
            gradient_noise_scale=np.float64(0.1),
            clip_gradients=np.float64(1.0),
        )
        state = step.init({"w": np.ones(2, np.float32)})
        avals = jax.tree.map(jax.typeof, state)
        for _ in range(2):
            state, metrics = step(state, np.float32(1.0))
        assert jax.tree.map(jax.typeof, state) == avals
        assert state.params["w"].dtype == jnp.float32
        floats = [x for x in jax.tree.leaves((state, metrics)) if x.dtype.kind == "f"]
        assert {x.dtype for x in floats} == {jnp.dtype("float32")}


def traces(caplog) -> int:
    return sum("tracing a step" in record.message for record in caplog.records)


def test_56_weak_types_do_not_trace_anew(caplog):
    caplog.set_level("INFO", "optimize_loss")
    step = build(optimizer="Adam", learning_rate=lambda n: 0.1, clip_gradients=1)
    state = step.init(W)
    for _ in range(5):
        state, _ = step(state, 5.0)
    state, _ = step(state.set(max_norm=2), 5.0)
    assert traces(caplog) == 1


def test_56_a_model_state_of_python_numbers_does_not_trace_anew(caplog):
    caplog.set_level("INFO", "optimize_loss")

    def keeps(params, x, *, model_state):
        return params["w"] * x, ol.Aux(model_state={"mean": 3.0})

    step = build(keeps)
    state = step.init(W, model_state={"mean": np.float32(0)})
    for _ in range(3):
        state, _ = step(state, 5.0)
    assert traces(caplog) == 1
    assert not state.model_state["mean"].weak_type


def test_58_one_array_for_two_parameters():
    array = jnp.ones(2)
    step = build(lambda p, x: jnp.sum(p["a"] * 2 + p["b"] * 3) * x)
    state = step.init({"a": array, "b": array})
    for _ in range(2):
        state, _ = step(state, 1.0)
    np.testing.assert_allclose(state.params["a"], 0.6, rtol=1e-6)
    np.testing.assert_allclose(state.params["b"], 0.4, rtol=1e-6)
    np.testing.assert_array_equal(array, [1.0, 1.0])


def test_58_one_array_for_parameters_and_batch():
    array = jnp.ones(2)
    step = build(lambda p, x: jnp.sum(p["a"] * x))
    state, _ = step(step.init({"a": array}), array)
    state, _ = step(state, array)
    np.testing.assert_allclose(state.params["a"], 0.8, rtol=1e-6)


def test_61_dots_and_indices_make_names_of_their_own():
    params = {"a.b": 1.0, "a": {"b": 2.0}, "c": [3.0, 4.0]}
    _, metrics = run(
        lambda p, x: x * (p["a.b"] + 2 * p["a"]["b"] + 3 * p["c"][0] + 4 * p["c"][1]),
        params=params,
        summaries=["gradient_norm"],
    )
    norms = {n: float(v) for n, v in metrics.items() if n.startswith("gradient_norm/")}
    assert norms == {
        "gradient_norm/a.b": 5.0,
        "gradient_norm/a/b": 10.0,
        "gradient_norm/c/0": 15.0,
        "gradient_norm/c/1": 20.0,
    }


@pytest.mark.parametrize("name", ["v|w", "w:0", " w", "[w]", "w.+"])
def test_61_a_name_names_itself(name):
    state, _ = run(
        lambda p, x: (p[name] + p["w"]) * x,
        params={name: np.float32(10), "w": np.float32(10)},
        gradient_multipliers={name: 0.0},
        variables=[name, "w"],
    )
    assert (state.params[name], state.params["w"]) == (10.0, 9.5)


def test_65_what_is_bound_already_stays():
    def scaled(params, x, *, key, model_state):
        return params["w"] * x * key * model_state

    state, metrics = run(functools.partial(scaled, key=2.0, model_state=3.0))
    assert metrics["loss"] == 300.0
    assert state.params["w"] == 7.0


def test_65_a_batch_does_not_fill_the_defaults_of_an_update_op():
    step = build(update_ops=[lambda old, rate=0.25: {"mean": old["mean"] + rate}])
    state, _ = step(step.init(W, model_state={"mean": 1.0}), 5.0)
    assert state.model_state["mean"] == 1.25


@pytest.mark.parametrize(
    "function",
    [
        lambda p, x: p["w"] * x,
        jax.jit(lambda p, x: p["w"] * x),
        jax.checkpoint(lambda p, x: p["w"] * x),
        lambda p, x: (p["w"] + jax.lax.stop_gradient(p["spare"])) * x,
        lambda p, x: jax.lax.scan(lambda c, _: (c, p["spare"]), p["w"] * x, length=2)[0],
    ],
    ids=["plain", "jit", "checkpoint", "stop-gradient", "scan"],
)
def test_67_a_parameter_without_influence_is_named_and_left_alone(function):
    with pytest.warns(UserWarning, match=r"does not depend on the parameters \['spare'\]"):
        state, _ = run(
            function, params={"w": 10.0, "spare": 3.0}, optimizer="Adam", gradient_noise_scale=1.0
        )
    assert state.params["spare"] == 3.0
    assert state.optimizer["adam"]["m"]["spare"] == 0


def test_68_another_size_of_batch_traces_once(caplog):
    caplog.set_level("INFO", "optimize_loss")
    step = build(lambda p, x: jnp.mean((p["w"] - x) ** 2))
    state = step.init(W)
    for size in (4, 4, 3, 4, 3):
        state, _ = step(state, np.ones(size, np.float32))
    assert traces(caplog) == 2
    assert state.step == 5


def test_70_an_error_in_the_loss_comes_through_and_leaves_the_state():
    error = KeyError("mine")
    good = []

    def fails_at_first(params, x):
        if not good:
            raise error
        return params["w"] * x

    step = build(fails_at_first)
    state = step.init(W)
    with pytest.raises(KeyError) as caught:
        step(state, 5.0)
    assert caught.value is error
    good.append(True)
    state, _ = step(state, 5.0)
    assert (state.params["w"], state.step) == (9.5, 1)


def test_70_an_error_in_a_callback_is_not_taken_for_a_donated_state():
    def fails(x):
        raise KeyError("mine")

    def looked_at(params, x):
        seen = jax.pure_callback(fails, jax.ShapeDtypeStruct((), "float32"), x)
        return params["w"] * x, ol.Aux({"seen": seen})

    def step():
        return jax.block_until_ready(run(looked_at))

    with pytest.raises(Exception, match="mine"):
        step()


def test_75_an_infinite_gradient_under_clipping_makes_all_nan():
    tx = T.chain(clip=T.ClipByGlobalNorm(1.0))
    grads = {"a": jnp.array([1.0, jnp.inf]), "b": jnp.array([0.0])}
    updates, _ = tx.update(grads, tx.init(grads))
    assert all(np.isnan(u).all() for u in jax.tree.leaves(updates))


def test_78_a_norm_that_float16_cannot_hold():
    tx = T.chain(seen=T.ObserveNorm(), clip=T.ClipByGlobalNorm(1.0))
    grads = {"w": jnp.full(10_000, 300, "float16")}
    updates, state = tx.update(grads, tx.init(grads))
    np.testing.assert_allclose(state["seen"]["norm"], 30_000, rtol=1e-6)
    assert updates["w"].dtype == jnp.float16
    np.testing.assert_array_equal(updates["w"], np.full(10_000, 0.01, np.float16))


@pytest.mark.parametrize("link", [T.ClipByGlobalNorm, T.ClipByNorm])
@pytest.mark.parametrize(("size", "bound"), [(1e20, 1.0), (1e38, 1e30), (1e-25, 1e-25)])
def test_79_norms_whose_squares_leave_float32(link, size, bound):
    tx = T.chain(seen=T.ObserveNorm(), clip=link(bound))
    grads = {"w": np.array([3.0, 0.0, -4.0], np.float32) * np.float32(size / 2)}
    updates, state = tx.update(grads, tx.init(grads))
    np.testing.assert_allclose(state["seen"]["norm"], 2.5 * size, rtol=1e-6)
    np.testing.assert_allclose(updates["w"] / bound, [0.6, 0.0, -0.8], rtol=1e-6)


def test_79_a_norm_below_the_bound_changes_nothing_however_small():
    tx = T.chain(clip=T.ClipByGlobalNorm(1.0))
    grads = {"w": np.array([3e-25, -4e-25], np.float32)}
    updates, _ = tx.update(grads, tx.init(grads))
    np.testing.assert_array_equal(updates["w"], grads["w"])


@pytest.mark.parametrize("name", sorted({*RULES} - {"decay", "ftrl", "proximal", "dual"}))
def test_80_gradients_of_zero(name):
    tx = T.chain(link=RULES[name])
    params = {"w": jnp.ones(3)}
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update({"w": jnp.zeros(3)}, state, params)
        np.testing.assert_array_equal(updates["w"], np.zeros(3))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


@pytest.mark.parametrize("bound", [1.0, 1e-15, 1e25])
def test_81_huge_and_tiny_entries_against_float64(bound):
    grads = {
        "huge": np.array([1e19, -2e19], np.float32),
        "tiny": np.array([1e-20, 0.0, -0.0, -3e-20], np.float32),
        "denormal": np.array([1e-40, -1e-40], np.float32),
    }
    tx = T.chain(seen=T.ObserveNorm(), clip=T.ClipByGlobalNorm(bound))
    updates, state = tx.update(grads, tx.init(grads))
    norm = math.sqrt(sum(float(np.sum(g.astype(np.float64) ** 2)) for g in grads.values()))
    np.testing.assert_allclose(state["seen"]["norm"], norm, rtol=1e-6)
    for name, grad in grads.items():
        wanted = grad.astype(np.float64) * min(1.0, float(np.float32(bound)) / norm)
        # Below the least normal number, 1.2e-38, hardware may give zero.
        np.testing.assert_allclose(updates[name], wanted, rtol=1e-6, atol=1.2e-38)


def train(**options: Any) -> np.ndarray:
    step = build(
        lambda p, x: jnp.mean((p["w"] * x - 1) ** 2),
        learning_rate=schedules.InverseTimeDecay(0.1, 1, 1.0),
        optimizer="Adam",
        clip_gradients=1.0,
        gradient_noise_scale=0.01,
        moving_average_decay=0.9,
        **options,
    )
    state = step.init({"w": jnp.zeros(2)})
    for _ in range(3):
        state, metrics = step(state, jnp.array([1.0, 2.0]))
    state, metrics = step.many(state, jnp.ones((2, 2)))
    assert metrics["loss"].shape == (2,)
    return np.asarray(state.params["w"])


@pytest.mark.parametrize("mode", ["debug-nans", "debug-infs", "no-jit", "x64", "checks"])
def test_83_training_works_in_the_modes_of_jax(mode):
    modes = {
        "debug-nans": jax.debug_nans,
        "debug-infs": jax.debug_infs,
        "no-jit": jax.disable_jit,
        "x64": jax.enable_x64,
        "checks": jax.enable_checks,
    }
    plain = train()
    with modes[mode](True):
        np.testing.assert_allclose(train(), plain, rtol=1e-5)
