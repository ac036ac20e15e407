"""What contrib's documentation and code promise of `optimize_loss`, and what ours adds.

Most tests train one number, w = 10, on |w · x| with x = 5: the gradient is 5 throughout.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optimize_loss as ol
from tests.step.one_number import train


def test_the_loss_is_that_before_the_update():
    values, metrics, state = train()
    assert values == [9.5]
    assert metrics[0]["loss"] == 50.0
    assert state.step == 1


def test_the_norm_is_after_multipliers_and_before_clipping():
    values, metrics, _ = train(gradient_multipliers={"w": 7.0}, clip_gradients=3.0)
    assert metrics[0]["global_norm/gradient_norm"] == 35.0
    np.testing.assert_allclose(metrics[0]["global_norm/clipped_gradient_norm"], 3.0, rtol=1e-6)
    np.testing.assert_allclose(values, [9.7], rtol=1e-6)


def test_norms_and_histograms_of_parameters_are_after_clipping():
    _, (seen,), _ = train(clip_gradients=0.5, summaries=ol.OPTIMIZER_SUMMARIES)
    np.testing.assert_allclose(seen["gradient_norm/w"], 0.5, rtol=1e-6)
    counts, edges = seen["gradients/w"]
    assert counts.sum() == 1
    assert edges[0] <= 0.5 <= edges[-1]


@pytest.mark.parametrize("key", ["w", "w:0", "*", "**", "v|w"])
def test_multipliers_go_by_name_or_pattern(key):
    values, _, _ = train(gradient_multipliers={key: 7})
    assert values == [6.5]


@pytest.mark.parametrize(
    ("options", "after"),
    [
        ({"clip_gradients": 5}, 9.5),
        ({"clip_gradients": np.float32(0.5)}, 9.95),
        ({"clip_gradients": jnp.float32(0.5)}, 9.95),
        ({"learning_rate": 1}, 5.0),
        ({"learning_rate": np.float32(0.5)}, 7.5),
        ({"learning_rate": 0.0}, 10.0),
        ({"learning_rate": None, "optimizer": optax.sgd(0.5)}, 7.5),
        ({"learning_rate": 0.5, "optimizer": optax.sgd}, 7.5),
        ({"optimizer": ol.optimizers.GradientDescentOptimizer}, 9.5),
        ({"learning_rate": None, "optimizer": ol.optimizers.GradientDescentOptimizer(0.5)}, 7.5),
        ({"optimizer": ol.transforms.ScaleByMomentum()}, 9.5),
        ({"optimizer": ol.transforms.chain(m=ol.transforms.ScaleByMomentum())}, 9.5),
        ({"learning_rate": None, "optimizer": ol.transforms.StepByProximalGradient(0.1)}, 9.5),
        ({"optimizer": lambda rate: ol.optimizers.GradientDescentOptimizer(2 * rate)}, 9.0),
        ({"learning_rate": ol.schedules.PiecewiseConstantDecay([0], [0.5, 0.1])}, 7.5),
        ({"learning_rate": optax.constant_schedule(0.5)}, 7.5),
    ],
)
def test_ways_to_say_it(options, after):
    values, _, _ = train(**options)
    np.testing.assert_allclose(values, [after], rtol=1e-6)


def test_a_rate_set_after_the_optimizer_was_made_is_the_one_that_counts():
    optimizer = ol.optimizers.SGD(0.1)
    optimizer.learning_rate = 0.5
    values, _, _ = train(learning_rate=None, optimizer=optimizer)
    np.testing.assert_allclose(values, [7.5], rtol=1e-6)


def test_a_clipping_function_sees_gradients_with_names():
    def clip(pairs):
        return [(g / 10 if p.name == "w" else g, p) for g, p in pairs]

    values, (seen,), _ = train(clip_gradients=clip)
    np.testing.assert_allclose(values, [9.95], rtol=1e-6)
    assert seen["global_norm/gradient_norm"] == 5.0
    np.testing.assert_allclose(seen["global_norm/clipped_gradient_norm"], 0.5, rtol=1e-6)


def test_a_decay_function_is_ignored_without_a_rate():
    def never(rate, step):
        raise AssertionError("called")

    momentum = ol.optimizers.MomentumOptimizer(0.05, 0.5)
    with pytest.warns(UserWarning, match="`learning_rate_decay_fn` is ignored"):
        values, _, _ = train(
            learning_rate=None, optimizer=lambda: momentum, learning_rate_decay_fn=never
        )
    assert values == [9.75]


def test_adaptive_clipping_from_means_of_zero():
    clip = ol.adaptive_clipping_fn(report_summary=True)
    values, metrics, _ = train(3, clip_gradients=clip)
    np.testing.assert_allclose(values, [9.891621, 9.774631, 9.648828], rtol=1e-6)
    bounds = [m["global_norm/adaptive_max_gradient_norm"] for m in metrics]
    np.testing.assert_allclose(bounds, [2.1858606, 3.039701, 3.8773613], rtol=1e-6)


def test_adaptive_clipping_that_follows_the_step_never_clips_at_first():
    clip = ol.adaptive_clipping_fn(global_step=0, report_summary=True)
    values, (seen,), _ = train(clip_gradients=clip)
    assert values == [9.5]
    bound = seen["global_norm/adaptive_max_gradient_norm"]
    np.testing.assert_allclose(bound, 5 * math.exp(2e-4), rtol=1e-6)


def test_the_average_of_the_loss_starts_at_zero_and_changes_nothing():
    def given(params, value):
        return params["w"] * 0 + value

    step = ol.optimize_loss(given, learning_rate=0.1, optimizer="SGD", moving_average_decay=0.9)
    state, means = step.init({"w": 1.0}), []
    for value in (50.0, 28.5, 18.4, 9.0):
        state, metrics = step(state, value)
        means.append(metrics["loss/mean"])
    np.testing.assert_allclose(means, [5.000001, 7.350001, 8.455002, 8.509501], rtol=1e-6)
    assert "loss/mean" not in train()[1][0]


def test_without_increment_the_rate_stays_that_of_the_first_step():
    decay = lambda rate, step: ol.schedules.exponential_decay(rate, step, 1, 0.5)
    values, metrics, state = train(3, learning_rate_decay_fn=decay, increment_global_step=False)
    np.testing.assert_allclose(values, [9.5, 9.0, 8.5], rtol=1e-6)
    assert state.step == 0
    assert [float(m["learning_rate"]) for m in metrics] == [np.float32(0.1)] * 3
    values, _, state = train(3, learning_rate_decay_fn=decay, global_step=1)
    np.testing.assert_allclose(values, [9.75, 9.625, 9.5625], rtol=1e-6)
    assert state.step == 4


@pytest.mark.parametrize(
    ("name", "after"),
    [
        ("Momentum", [9.5, 8.55, 7.195]),
        ("Adagrad", [9.900199, 9.829559, 9.771863]),
        ("RMSProp", [9.728837, 9.516789, 9.334264]),
        ("Ftrl", [9.269005, 9.198364, 9.140668]),
    ],
)
def test_values_of_the_rules(name, after):
    values, _, _ = train(3, optimizer=name)
    np.testing.assert_allclose(values, after, rtol=1e-6)


def test_adam_adds_epsilon_to_the_root_that_is_not_corrected():
    adam = lambda rate: ol.optimizers.AdamOptimizer(rate, epsilon=0.1)
    values, _, _ = train(3, optimizer=adam, function=lambda p, x: p["w"])
    np.testing.assert_allclose(values, [9.975975, 9.945079, 9.909701], rtol=1e-6)


def test_the_rate_is_outside_the_accumulator():
    halving = lambda rate, step: ol.schedules.exponential_decay(rate, step, 1, 0.5)
    momentum = lambda rate: ol.optimizers.MomentumOptimizer(rate, 0.9)
    values, _, _ = train(3, optimizer=momentum, learning_rate_decay_fn=halving)
    np.testing.assert_allclose(values, [9.5, 9.025, 8.68625], rtol=1e-6)


def test_only_the_named_variables_are_trained_and_have_state():
    def both(params, x):
        return jnp.sum(params["body"]["w"] * x) + jnp.sum(params["head"]["w"])

    step = ol.optimize_loss(both, learning_rate=0.1, variables=["head/**"])
    params = {"body": {"w": jnp.ones(2)}, "head": {"w": jnp.ones(2)}}
    state = step.init(params)
    assert len(jax.tree.leaves(state.optimizer["adam"]["m"])) == 1
    state, _ = step(state, 5.0)
    assert (state.params["body"]["w"] == 1).all()
    assert (state.params["head"]["w"] < 1).all()


def test_the_loss_may_report_keep_a_state_and_draw():
    def noisy(params, x, *, model_state, key):
        seen = {"calls": model_state["calls"] + 1}
        draw = jax.random.uniform(key)
        return params["w"] * x, ol.Aux(metrics={"draw": draw}, model_state=seen)

    step = ol.optimize_loss(noisy, learning_rate=0.1, optimizer="SGD", name="main")
    state = step.init({"w": 1.0}, model_state={"calls": 0})
    draws = []
    for _ in range(3):
        state, metrics = step(state, 5.0)
        draws.append(float(metrics["main/draw"]))
    assert state.model_state == {"calls": 3}
    assert len(set(draws)) == 3
    assert set(metrics) == {
        "main/loss", "main/batches", "main/learning_rate", "main/global_norm/gradient_norm",
        "main/draw",
    }  # fmt: skip


def test_update_ops_run_in_order_before_the_loss():
    def uses(params, x, *, model_state):
        return params["w"] * model_state

    ops = [lambda state: state + 1, lambda state, x: state * x]
    step = ol.optimize_loss(uses, learning_rate=0.1, optimizer="SGD", update_ops=ops)
    state, metrics = step(step.init({"w": 1.0}, model_state=1.0), 5.0)
    assert metrics["loss"] == 10.0
    assert state.model_state == 10.0
