"""A step is one program whose numbers are state: what changes bits or traces, and what does not."""

import dataclasses
import gc
import pickle
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optimize_loss as ol
from tests.golden import golden_data as golden
from tests.step.one_number import loss, train


def golden_run():
    step = ol.optimize_loss(
        golden.loss, learning_rate=0.01, clip_gradients=0.5, gradient_noise_scale=0.1,
        gradient_multipliers={"dense/*": 0.5}, summaries=ol.OPTIMIZER_SUMMARIES,
        learning_rate_decay_fn=lambda lr, n: ol.schedules.exponential_decay(lr, n, 5, 0.7),
    )  # fmt: skip
    return step, step.init(golden.initial_params())


def assert_same_bits(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def test_many_equals_single_steps_bit_for_bit():
    step, state = golden_run()
    x, y = golden.batches()
    singles = []
    for batch in zip(x, y, strict=True):
        state, metrics = step(state, *batch)
        singles.append(metrics)
    many_state, many = step.many(step.init(golden.initial_params()), x, y)
    assert_same_bits(jax.device_get(many_state.params), jax.device_get(state.params))
    assert_same_bits(many_state.optimizer, state.optimizer)
    stacked = jax.tree.map(lambda *each: np.stack(each), *singles)
    jax.tree.map(np.testing.assert_array_equal, many, stacked)


def test_a_run_that_is_taken_up_again_repeats_itself():
    step, state = golden_run()
    x, y = golden.batches()
    state, _ = step.many(state, x[:10], y[:10])
    kept = jax.tree.map(np.asarray, state)
    straight, _ = step.many(state, x[10:], y[10:])
    again, _ = step.many(kept, x[10:], y[10:])
    assert_same_bits(jax.device_get(again), jax.device_get(straight))


def test_metrics_have_one_shape_from_the_first_step_on():
    step, state = golden_run()
    x, y = golden.batches()
    state, first = step(state, x[0], y[0])
    _, second = step(state, x[1], y[1])
    assert jax.tree.map(jnp.shape, first) == jax.tree.map(jnp.shape, second)


def count_traces(step, state, batches):
    """Return the state after all batches, and how often the loss was traced anew."""
    calls = []
    counted = dataclasses.replace(step.loss, function=lambda *a: (calls.append(1), loss(*a))[1])
    step = dataclasses.replace(step, loss=counted)
    per_trace = 0
    for change in batches:
        state, _ = step(change(state), 5.0)
        per_trace = per_trace or len(calls)
    return state, len(calls) / per_trace


def test_set_never_traces_anew():
    step = ol.optimize_loss(
        loss,
        learning_rate=ol.schedules.ExponentialDecay(0.1, 10, 0.5),
        optimizer=lambda rate: ol.optimizers.AdamOptimizer(rate),
        clip_gradients=1.0,
        gradient_noise_scale=0.1,
        gradient_multipliers={"w": 2.0},
        moving_average_decay=0.9,
    )
    changes = [
        lambda s, n=name, v=value, kind=kind: s.set(**{n: kind(v)})
        for kind in (float, np.float32, np.float64, jnp.float32)
        for name, value in [
            ("learning_rate", 0.5), ("max_norm", 2), ("scale", 0.2), ("beta_1", 0.5),
            ("epsilon", 1e-3), ("gradient_multipliers/w", 0.5), ("loss_mean/decay", 0.5),
        ]
    ]  # fmt: skip
    changes += [lambda s: s.set(seed=3), lambda s: s.set(step=7), lambda s: s.set(scale=2)]
    changes += [lambda s: s.set(learning_rate=None)]
    state, traces = count_traces(step, step.init({"w": 10.0}), changes)
    assert traces == 1
    assert state.optimizer["adam"]["beta_1"].tolist() == [0.5, 0.5]


def test_set_overrides_a_schedule_and_gives_it_back():
    halving = ol.schedules.ExponentialDecay(0.1, 1, 0.5)
    step = ol.optimize_loss(loss, learning_rate=halving, optimizer="SGD")
    rates, state = [], step.init({"w": 10.0})
    for value in ("", 0.3, "", None):
        state = state if value == "" else state.set(learning_rate=value)
        state, metrics = step(state, 5.0)
        rates.append(float(metrics["learning_rate"]))
    np.testing.assert_allclose(rates, [0.1, 0.3, 0.3, 0.0125], rtol=1e-6)


def test_set_under_a_decay_function_sets_the_rate_that_is_decayed():
    decay = lambda rate, step: ol.schedules.exponential_decay(rate, step, 1, 0.5)
    step = ol.optimize_loss(loss, learning_rate=0.1, optimizer="SGD", learning_rate_decay_fn=decay)
    state, first = step(step.init({"w": 10.0}), 5.0)
    _, second = step(state.set(learning_rate=0.4), 5.0)
    np.testing.assert_allclose(first["learning_rate"], 0.1, rtol=1e-6)
    np.testing.assert_allclose(second["learning_rate"], 0.2, rtol=1e-6)


def test_two_rates_are_one_program():
    programs = set()
    for rate, clip in ((0.1, 1.0), (0.2, 3.0)):
        step = ol.optimize_loss(loss, learning_rate=rate, clip_gradients=clip, seed=int(clip))
        programs.add(step.lower(step.init({"w": 10.0}), 5.0).as_text())
    assert len(programs) == 1


def test_a_sweep_is_a_vmap_over_states():
    step = ol.optimize_loss(golden.loss, learning_rate=0.1, clip_gradients=0.5)
    state, (x, y) = step.init(golden.initial_params()), golden.batches()
    rates = np.array([0.1, 0.01, 0.001], np.float32)
    states = jax.vmap(lambda rate: state.set(learning_rate=rate))(rates)
    swept, _ = jax.vmap(lambda s: step.many(s, x, y))(states)
    for i, rate in enumerate(rates):
        alone = ol.optimize_loss(golden.loss, learning_rate=float(rate), clip_gradients=0.5)
        last, _ = alone.many(alone.init(golden.initial_params()), x, y)
        each = jax.tree.map(lambda leaf, i=i: leaf[i], swept.params)
        np.testing.assert_allclose(golden.flat(each), golden.flat(last.params), rtol=2e-5)


def test_the_state_is_donated_and_params_are_not():
    params = {"w": jnp.float32(10.0)}
    step = ol.optimize_loss(loss, learning_rate=0.1)
    state = step.init(params)
    step(state, 5.0)
    assert params["w"] == 10.0
    with pytest.raises(RuntimeError, match="This state was donated"):
        step(state, 5.0)


def test_tied_parameters_are_trained_as_two():
    shared = jnp.ones(2)
    step = ol.optimize_loss(
        lambda p: jnp.sum(p["a"] * 2 + p["b"]), learning_rate=0.1, optimizer="SGD"
    )
    state, _ = step(step.init({"a": shared, "b": shared}))
    np.testing.assert_allclose(state.params["a"], [0.8, 0.8], rtol=1e-6)
    np.testing.assert_allclose(state.params["b"], [0.9, 0.9], rtol=1e-6)


def test_a_parameter_that_the_loss_does_not_use_is_named_and_left_alone():
    step = ol.optimize_loss(loss, learning_rate=0.1, gradient_noise_scale=1.0)
    state = step.init({"w": 10.0, "spare": 3.0})
    with pytest.warns(UserWarning, match=r"does not depend on the parameters \['spare'\]"):
        state, _ = step(state, 5.0)
    assert state.params["spare"] == 3.0


def test_bfloat16_at_one_stands_still_under_small_updates():
    """A documented limit: the spacing of bfloat16 below 1 is 2**-8, and updates are rounded."""
    step = ol.optimize_loss(
        lambda p: jnp.sum(p["w"].astype(jnp.float32)), learning_rate=1e-3, optimizer="SGD"
    )
    state = step.init({"w": jnp.ones(2, jnp.bfloat16)})
    for _ in range(200):
        state, _ = step(state)
    assert state.params["w"].dtype == jnp.bfloat16
    assert (state.params["w"] == 1).all()


def test_float16_gradients_are_clipped_by_a_norm_that_float16_cannot_hold():
    def steep(params):
        return jnp.sum(params["w"] * jnp.float16(300)).astype(jnp.float32)

    step = ol.optimize_loss(steep, learning_rate=1.0, optimizer="SGD", clip_gradients=1.0)
    state, metrics = step(step.init({"w": jnp.zeros(4, jnp.float16)}))
    assert metrics["global_norm/gradient_norm"] == 600.0
    np.testing.assert_allclose(state.params["w"], np.full(4, -0.5), rtol=1e-3)


def test_a_norm_over_leaves_of_every_size():
    """Each row: gradients, the multiplier before the clip, and the bound of the clip."""
    rows = [
        ({"huge": [1e20], "usual": [0.5]}, 1.0, 1.0),
        ({"huge": [3e38], "usual": [1e-3, 2.0]}, 1.0, 10.0),
        ({"tiny": [1e-25], "tinier": [1e-30]}, 1.0, 1.0),
        ({"usual": [0.6, 2.0]}, 1e-13, 1.0),
        ({"usual": [0.6, 2.0]}, 1e-13, 1e-14),
        ({"usual": [0.6, 2.0]}, 1e13, 1e-13),
        ({"huge": [1e20], "tiny": [1e-20]}, 1e-3, 1e-3),
    ]
    for grads, multiplier, bound in rows:
        tx = ol.transforms.chain(
            multiply=ol.transforms.MultiplyGradients({"*": multiplier}),
            before=ol.transforms.ObserveNorm(),
            clip=ol.transforms.ClipByGlobalNorm(bound),
            after=ol.transforms.ObserveNorm(),
        )
        grads = jax.tree.map(jnp.float32, grads, is_leaf=lambda x: isinstance(x, list))
        updates, state = tx.update(grads, tx.init(grads))
        exact = np.concatenate([np.float64(g) for g in jax.tree.leaves(grads)]) * multiplier
        norm = np.sqrt(np.sum(exact**2))
        np.testing.assert_allclose(state["before"]["norm"], norm, rtol=1e-6)
        np.testing.assert_allclose(state["after"]["norm"], min(norm, bound), rtol=1e-6)
        got = np.concatenate(jax.tree.leaves(updates))
        np.testing.assert_allclose(got, exact * min(1, bound / norm), rtol=1e-5, atol=1e-37)


def test_side_effects_of_the_loss_happen_once_a_step():
    seen = []

    def loss(params, x):
        jax.debug.callback(lambda value: seen.append(float(value)), x)
        return params["w"] * x

    step = ol.optimize_loss(loss, learning_rate=0.1, optimizer="SGD")
    state = step.init({"w": 1.0})
    for x in (1.0, 2.0, 3.0):
        state, _ = step(state, x)
    jax.effects_barrier()
    assert seen == [1.0, 2.0, 3.0]


def test_a_sweep_leaves_the_rates_to_their_owner():
    step = ol.optimize_loss(loss, learning_rate=0.1, optimizer="SGD")
    state, rates = step.init({"w": 10.0}), jnp.array([0.1, 0.2])
    for _ in range(2):
        states = jax.vmap(lambda rate: state.set(learning_rate=rate))(rates)
        states, _ = jax.vmap(lambda s: step(s, 5.0))(states)
        np.testing.assert_allclose(states.params["w"], 10 - 5 * rates, rtol=1e-6)


@pytest.mark.parametrize("increment", [True, False])
def test_setting_the_step_of_committed_parameters_compiles_nothing(increment):
    step = ol.optimize_loss(loss, learning_rate=0.1, increment_global_step=increment)
    params = jax.device_put({"w": jnp.float32(10.0)}, jax.devices()[0])
    lowered = [
        step.lower(state, 5.0).as_text()
        for state in (step.init(params), step.init(params).set(step=3, learning_rate=0.2))
    ]
    assert lowered[0] == lowered[1]


def test_a_schedule_outside_its_rule_is_an_error_or_nan():
    step = ol.optimize_loss(loss, learning_rate=lambda n: -1.0, optimizer="SGD")
    with pytest.raises(ValueError, match=r"`learning_rate` .* must be at least 0"):
        step(step.init({"w": 10.0}), 5.0)
    values, metrics, _ = train(3, learning_rate=lambda n: 0.1 - 0.1 * n.astype(jnp.float32))
    assert values[:2] == [9.5, 9.5]
    assert np.isnan(values[2])
    assert np.isnan(metrics[2]["learning_rate"])


def test_the_average_is_of_parameters_as_they_are_stored():
    chain = ol.transforms.chain(
        rate=ol.transforms.ScaleByLearningRate(1e-3), ema=ol.transforms.AverageParams(0.5)
    )
    params = {"w": jnp.ones(2, jnp.bfloat16)}
    params, state = chain.apply({"w": jnp.ones(2, jnp.bfloat16)}, chain.init(params), params)
    assert (params["w"] == 1).all()
    assert (state["ema"]["average"]["w"] == 1).all()


def test_parameters_may_be_called_like_hyperparameters():
    step = ol.optimize_loss(
        lambda p: p["learning_rate"] * 5.0 + p["scale"],
        learning_rate=0.1,
        optimizer="SGD",
        gradient_noise_scale=0.0,
        gradient_multipliers={"learning_rate": 2.0, "scale": 1.0},
    )
    state, metrics = step(step.init({"learning_rate": 10.0, "scale": 1.0}).set(scale=0.0))
    assert metrics["learning_rate"] == np.float32(0.1)
    assert state.params["learning_rate"] == 9.0


def test_the_rate_of_an_optax_transformation_is_reported_where_it_is_known():
    _, (seen,), _ = train(learning_rate=0.5, optimizer=optax.sgd)
    assert seen["learning_rate"] == 0.5
    _, (seen,), _ = train(learning_rate=None, optimizer=optax.sgd(0.5))
    assert "learning_rate" not in seen


def test_the_rate_goes_before_an_average():
    rule = ol.transforms.chain(
        m=ol.transforms.ScaleByMomentum(), ema=ol.transforms.AverageParams(0.5)
    )
    values, _, state = train(optimizer=rule)
    assert values == [9.5]
    assert state.optimizer["ema"]["average"]["w"] == 9.75


def test_a_step_can_be_pickled_after_it_has_run():
    step = ol.optimize_loss(golden.loss, learning_rate=0.1)
    x, y = golden.batches()
    state, _ = step(step.init(golden.initial_params()), x[0], y[0])
    again, kept = pickle.loads(pickle.dumps((step, jax.device_get(state))))
    state, _ = step(state, x[1], y[1])
    kept, _ = again(kept, x[1], y[1])
    assert_same_bits(jax.device_get(kept.params), jax.device_get(state.params))


def test_a_step_goes_when_nobody_holds_it():
    held = jnp.ones(3)
    gone = weakref.ref(held)
    step = ol.optimize_loss(lambda p, held=held: jnp.sum(p["w"] * held), learning_rate=0.1)
    state, _ = step(step.init({"w": 1.0}))
    del held, step, state
    gc.collect()
    assert gone() is None


def test_a_pattern_for_what_is_not_trained_says_what_is():
    step = ol.optimize_loss(
        loss, learning_rate=0.1, variables=["w"], gradient_multipliers={"spare": 2.0}
    )
    with pytest.raises(ValueError, match="'spare'") as caught:
        step.init({"w": 1.0, "spare": 1.0})
    assert caught.value.__notes__ == ["Only these parameters are trained: ['w']."]


def test_a_loss_scale_of_the_optimizer_comes_before_noise_and_clipping():
    plain = ol.optimizers.SGD(0.1)
    scaled = ol.optimizers.SGD(0.1, loss_scale_factor=1024.0)
    ends = []
    for optimizer in (plain, scaled):
        step = ol.optimize_loss(
            lambda p, x: (p["w"] * x) ** 2,
            optimizer=optimizer,
            clip_gradients=1.0,
            gradient_noise_scale=0.5,
        )
        state, metrics = step(step.init({"w": 3.0}), 2.0)
        ends.append((metrics["loss"], metrics["global_norm/gradient_norm"], state.params["w"]))
    assert ends[0] == ends[1]


def test_every_gathered_batch_has_a_key_of_its_own():
    def loss(params, *, key):
        return params["w"] * jax.random.normal(key)

    step = ol.optimize_loss(loss, optimizer=ol.optimizers.SGD(0.1, gradient_accumulation_steps=3))
    state = step.init({"w": 1.0})
    seen = []
    for _ in range(6):
        before = float(state.params["w"])
        state, metrics = step(state)
        seen.append(float(metrics["loss"] / before))
    assert len(set(seen)) == 6
    assert state.step == 2


def test_links_for_some_parameters_bring_the_rate_or_take_it():
    only = ol.transforms.ForParameters
    groups = ol.transforms.chain(adam=only("a", ol.transforms.ScaleByAdam()))
    step = ol.optimize_loss(lambda p: p["a"] + p["b"], learning_rate=0.5, optimizer=groups)
    state, _ = step(step.init({"a": 1.0, "b": 1.0}))
    np.testing.assert_allclose([state.params["a"], state.params["b"]], [0.5, 0.5], rtol=1e-5)
    clip = only("a", ol.transforms.ClipByValue(0.5))
    step = ol.optimize_loss(
        lambda p: p["a"] + p["b"], learning_rate=1.0, optimizer="SGD", clip_gradients=clip
    )
    state, _ = step(step.init({"a": 1.0, "b": 1.0}))
    assert (state.params["a"], state.params["b"]) == (0.5, 0.0)


def test_a_link_may_return_one_array_as_two_slots():
    @dataclasses.dataclass(frozen=True)
    class Twice(ol.transforms.Link):
        def slots(self, param):
            zero = jnp.zeros_like(param)
            return {"m": zero, "v": zero}

        def leaf(self, update, slots, param, k):
            return update, {"m": slots["m"] + update, "v": slots["v"]}

    links = ol.transforms.chain(twice=Twice())
    step = ol.optimize_loss(lambda p: p["w"] ** 2, learning_rate=0.5, optimizer=links)
    state, _ = step(step.init({"w": 1.0}))
    assert state.params["w"] == 0.0
