"""`find_learning_rate` and `sweep`: what separate runs give, from a state that stays as it was."""

import dataclasses
import functools
import itertools
import json
import math
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import optimize_loss
from tests.cases import on_eight_devices

ol: Any = optimize_loss  # untyped, since some of what these tests pass is wrong on purpose
T = ol.transforms
RANDOM = np.random.default_rng(0)


def matrix(rows, columns):
    return (RANDOM.normal(size=(rows, columns)) / math.sqrt(rows)).astype(np.float32)


PARAMS = {
    "in": {"kernel": matrix(64, 80), "bias": np.zeros(80, np.float32)},
    "hidden": {"kernel": matrix(80, 56), "bias": np.zeros(56, np.float32)},
    "out": {"kernel": matrix(56, 10)},
}
STEPS = 12
X = RANDOM.normal(size=(STEPS, 16, 64)).astype(np.float32)
Y = (X @ RANDOM.normal(size=(64, 10)).astype(np.float32)).argmax(-1).astype(np.int32)


def net(params, x, y):
    for name in ("in", "hidden"):
        layer = params[name]
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"][None])
    scores = jax.nn.log_softmax(x @ params["out"]["kernel"])
    return -jnp.mean(jnp.take_along_axis(scores, y[:, None], 1))


def square(params, x):
    return (params["w"] - x) ** 2 / 2


def descent(loss=square, **options):
    return ol.optimize_loss(loss, **({"learning_rate": 0.1, "optimizer": "SGD"} | options))


def bits(tree):
    def of(leaf):
        typed = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if typed else leaf).tobytes()

    return jax.tree.map(of, tree)


def data(tree):
    """Return a tree with random keys as numbers."""
    return jax.tree.map(
        lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x,
        tree,
    )


def assert_close(got, wanted, tolerance=1e-6):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance),
        *map(data, (got, wanted)),
    )


def counted(loss):
    """Return a loss, and a list that has an entry for each time that it was traced."""
    traces = []

    @functools.wraps(loss)
    def counting(*args, **keywords):
        traces.append(1)
        return loss(*args, **keywords)

    return counting, traces


# --- sweep ---

RATES, DECAYS = np.geomspace(1e-5, 1e-3, 8), [0.0, 0.1]
OPTIONS = {
    "adamw": {"optimizer": "AdamW", "clip_gradients": 1.0},
    "each-by-itself": {"optimizer": "AdamW", "bucket": None},
    "guarded": {"optimizer": "AdamW", "skip": "nonfinite", "ema": 0.9, "accumulate": 2},
    "noise": {"optimizer": "AdamW", "gradient_noise_scale": 0.01, "moving_average_decay": 0.9},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_sweep_of_16_points_equals_16_runs_in_one_program(name):
    loss, traces = counted(net)
    step = ol.optimize_loss(loss, learning_rate=1e-3, **OPTIONS[name])
    assert sum(x.size for x in jax.tree.leaves(PARAMS)) > 10_000
    state = step.init(PARAMS)
    before = bits(state)
    found = step.sweep(state, X, Y, learning_rate=RATES, weight_decay=DECAYS)
    once = len(traces)
    step.sweep(state, X, Y, learning_rate=RATES[::-1], weight_decay=DECAYS)
    assert len(traces) == once
    assert bits(state) == before
    assert len(found.points) == 16
    for i, (rate, decay) in enumerate(itertools.product(RATES.tolist(), DECAYS)):
        assert found.points[i] == {"learning_rate": rate, "weight_decay": decay}
        own = step.init(PARAMS).set(learning_rate=rate, weight_decay=decay)
        own, metrics = step.many(own, X, Y)
        assert_close(jax.tree.map(lambda x, i=i: x[i], found.metrics), metrics)
        assert_close(found.state(i).params, own.params)


def test_a_sweep_is_what_runs_are_in_float64_at_any_rate():
    """At a rate of 0.1 Adam makes much of last bits, so that float32 would not tell."""
    with jax.enable_x64(True):
        params, x = jax.tree.map(np.float64, (PARAMS, X))
        step = ol.optimize_loss(net, learning_rate=1e-3, optimizer="AdamW", clip_gradients=1.0)
        rates = [1e-4, 1e-2, 1e-1]
        found = step.sweep(step.init(params), x, Y, learning_rate=rates)
        for i, rate in enumerate(rates):
            own, metrics = step.many(step.init(params).set(learning_rate=rate), x, Y)
            assert_close(jax.tree.map(lambda x, i=i: x[i], found.metrics), metrics, 1e-9)
            assert_close(found.state(i).params, own.params, 1e-9)
            assert_close(found.state(i).optimizer, own.optimizer, 1e-9)


def test_a_sweep_begins_where_the_state_is_and_goes_on_from_it():
    step = descent()
    state, _ = step(step.init({"w": np.float32(8.0)}), np.float32(0.0))  # 7.2
    found = step.sweep(state, np.zeros(2, np.float32), learning_rate=[0.5, 1.0])
    np.testing.assert_allclose(found.states.params["w"], [1.8, 0.0], 1e-6)
    assert found.best == 1
    after, _ = step(found.state(0), np.float32(0.0))  # the rate stays the point's
    np.testing.assert_allclose(after.params["w"], 0.9, 1e-6)
    assert int(after.step) == 4


def test_decay_rates_are_those_of_set_to_the_bit():
    step = descent(optimizer="Adam")
    state = step.init({"w": np.float32(1.0)})
    found = step.sweep(state, np.ones(1, np.float32), **{"adam/beta_2": [0.9, 0.9999]})
    wanted = state.set(**{"adam/beta_2": 0.9999}).optimizer["adam"]["beta_2"]
    assert bits(found.state(1).optimizer["adam"]["beta_2"]) == bits(wanted)


def test_none_gives_back_the_schedule():
    step = descent(learning_rate=lambda step: 0.5 / (1.0 + step.astype(jnp.float32)))
    state = step.init({"w": np.float32(8.0)})
    found = step.sweep(state, np.zeros(2, np.float32), learning_rate=[None, 0.5])
    np.testing.assert_allclose(found.states.params["w"], [3.0, 2.0], 1e-6)


def test_lists_are_paired_without_a_grid():
    step = descent(optimizer="AdamW")
    found = step.sweep(
        step.init({"w": np.float32(1.0)}),
        np.ones(1, np.float32),
        learning_rate=(0.1, 0.2),
        weight_decay=jnp.array([0.0, 1.0]),
        grid=False,
    )
    assert found.points == (
        {"learning_rate": 0.1, "weight_decay": 0.0},
        {"learning_rate": 0.2, "weight_decay": 1.0},
    )


def drawing(params, x, *, key):
    return jnp.mean((params["w"] - x) ** 2 * jax.random.uniform(key, x.shape))


@pytest.mark.parametrize("noise", [None, 0.1])
def test_seeds_are_those_of_the_step(noise):
    batches = np.ones((3, 4), np.float32)
    step = descent(drawing, gradient_noise_scale=noise)
    found = step.sweep(step.init({"w": np.ones(4, np.float32)}), batches, seeds=[5, 0, 9])
    for i, seed in enumerate((5, 0, 9)):
        own = descent(drawing, gradient_noise_scale=noise, seed=seed)
        state, metrics = own.many(own.init({"w": np.ones(4, np.float32)}), batches)
        assert found.points[i] == {"seed": seed}
        assert_close(found.losses[i], metrics["loss"])
        assert_close(found.state(i).params, state.params)


def test_seeds_of_an_old_key_and_of_noise_alone():
    step = descent(drawing)
    state = step.init({"w": np.ones(4, np.float32)}, key=jax.random.PRNGKey(3))
    found = step.sweep(state, np.ones((2, 4), np.float32), seeds=2)
    wanted = step.init({"w": np.ones(4, np.float32)}, key=jax.random.PRNGKey(1))
    _, metrics = step.many(wanted, np.ones((2, 4), np.float32))
    np.testing.assert_allclose(found.losses[1], metrics["loss"], 1e-6)
    step = descent(gradient_noise_scale=1.0)
    found = step.sweep(step.init({"w": np.float32(0.0)}), np.ones(3, np.float32), seeds=2)
    assert found.losses[0, 1] != found.losses[1, 1]


def first(key):
    return {"w": jax.random.normal(key, ())}


def test_parameters_of_a_key_begin_with_slots_of_their_own():
    step = descent(ema=0.5)
    state = step.init({"w": np.float32(0.0)}).set(learning_rate=0.5)
    found = step.sweep(state, np.ones(3, np.float32), seeds=3, init=first)
    for seed in range(3):
        own = step.init(first(jax.random.key(seed))).set(learning_rate=0.5)
        own, metrics = step.many(own, np.ones(3, np.float32))
        assert_close(found.losses[seed], metrics["loss"])
        assert_close(found.state(seed).eval_params, own.eval_params)
    both = step.sweep(state, np.ones(3, np.float32), learning_rate=[0.1, 0.5], seeds=2, init=first)
    assert [tuple(p.values()) for p in both.points] == [(0.1, 0), (0.1, 1), (0.5, 0), (0.5, 1)]
    assert_close(both.losses[2:], found.losses[:2])


BEGUN = {
    "moments": {"optimizer": "Adam"},
    "plateau": {"plateau": T.ReduceOnPlateau()},
    "spikes": {"skip": T.SkipSpikes()},
    "gathered": {"accumulate": 7},
    "no-global-step": {"increment_global_step": False},
}


@pytest.mark.parametrize("name", BEGUN)
def test_parameters_of_a_key_are_for_states_that_have_made_no_step(name):
    step = descent(**BEGUN[name])
    state = step.init({"w": np.float32(0.0)})
    begun, _ = step.many(step.init({"w": np.float32(0.0)}), np.ones(5, np.float32))
    with pytest.raises(ValueError, match="`state` must be one that has made no step"):
        step.sweep(begun, np.ones(2, np.float32), seeds=2, init=first)
    assert step.sweep(state.set(step=40), np.ones(2, np.float32), seeds=2, init=first).best in (
        0,
        1,
    )


def test_a_batch_left_out_counts_as_a_step():
    step = descent(skip="nonfinite")
    state, _ = step(step.init({"w": np.float32(0.0)}), np.float32(np.nan))
    with pytest.raises(ValueError, match=r"not as at first: .*'skip/skipped'"):
        step.sweep(state, np.ones(2, np.float32), seeds=2, init=first)


def test_parameters_of_a_key_are_cast_as_by_init():
    step, x = descent(), np.ones(3, np.float32)
    found = step.sweep(
        step.init({"w": np.float64(0.0)}), x, seeds=2, init=lambda key: {"w": np.float64(0.25)}
    )
    _, metrics = step.many(step.init({"w": np.float64(0.25)}), x)
    assert_close(found.losses[1], metrics["loss"])


def test_a_single_point():
    step = descent()
    found = step.sweep(
        step.init({"w": np.float32(1.0)}), np.zeros(3, np.float32), learning_rate=[1]
    )
    assert found.losses.tolist() == [[0.5, 0.0, 0.0]]


def test_the_best_is_finite_and_of_the_last_tenth():
    step = descent()
    state = step.init({"w": np.float32(1.0)})
    found = step.sweep(state, np.zeros(200, np.float32), learning_rate=[1e30, 0.01, 0.1])
    assert not np.isfinite(found.final[0])
    assert found.best == 2
    np.testing.assert_allclose(found.final[1], found.losses[1, -20:].mean(), 1e-6)
    with pytest.raises(ol.NonFiniteError, match="None of the 1 runs"):
        _ = step.sweep(state, np.zeros(200, np.float32), learning_rate=[1e30]).best


def test_there_are_states_of_the_points_alone():
    step = descent()
    found = step.sweep(step.init({"w": np.float32(1.0)}), np.ones(2), learning_rate=[0.0, 1.0])
    assert float(found.state(-2).params["w"]) == float(found.state(0).params["w"]) == 1.0
    for point in (2, -3):
        with pytest.raises(IndexError, match="`point` must be below 2"):
            found.state(point)


def test_metrics_have_the_name_of_the_step():
    step = descent(name="head")
    found = step.sweep(
        step.init({"w": np.float32(1.0)}), np.zeros(2, np.float32), learning_rate=[1]
    )
    assert found.metrics["head/loss"] is found.losses


def test_guards_of_single_runs_do_not_end_a_sweep():
    step = descent(skip=T.SkipNonFinite(most=2))
    state = step.init({"w": np.float32(1.0)})
    found = step.sweep(state, np.full(4, np.nan, np.float32), learning_rate=[0.1, 0.2])
    assert found.metrics["skipped"][:, -1].tolist() == [4, 4]
    with pytest.raises(ol.NonFiniteError):
        step(jax.block_until_ready(found.state(0)), np.float32(1.0))


FAULTS = {
    "nothing": ({}, ValueError, "must be given lists of numbers"),
    "scalar": ({"learning_rate": 0.1}, ol.InvalidType, "`learning_rate` must be a list"),
    "text": ({"learning_rate": "0.1"}, ol.InvalidType, "must be a list of numbers"),
    "matrix": ({"learning_rate": np.ones((2, 2))}, ol.InvalidType, "must be a list of numbers"),
    "empty": ({"learning_rate": []}, ValueError, "`learning_rate` must have a value"),
    "unknown": ({"learning_rates": [0.1]}, ValueError, "No link has a number `learning_rates`"),
    "below-0": ({"learning_rate": [0.1, -0.1]}, ValueError, "must be at least 0"),
    "nan": ({"learning_rate": [np.nan]}, ValueError, "`learning_rate` must be"),
    "no-number": ({"learning_rate": ["a"]}, ol.InvalidType, "must be a number"),
    "lengths": (
        {"learning_rate": [0.1, 0.2], "momentum": [0.5], "grid": False},
        ValueError,
        "must have one length",
    ),
    "grid": ({"learning_rate": [0.1], "grid": 1}, ol.InvalidType, "`grid` must be True or False"),
    "seeds-in-vain": ({"seeds": 3}, ValueError, "`seeds` must make a difference"),
    "no-seeds": ({"seeds": 0}, ValueError, "`seeds` must be an integer of at least 1"),
    "negative-seed": ({"seeds": [-1]}, ValueError, r"`seeds` must be an integer in \[0"),
    "float-seed": ({"seeds": [0.5]}, ol.InvalidType, "`seeds` must be an integer"),
    "seeds-twice": ({"seeds": [1, 1]}, ValueError, "`seeds` must differ"),
    "seed-and-seeds": ({"seeds": 2, "seed": [1]}, ValueError, "must not both be given"),
    "init-alone": ({"init": first}, ValueError, "`seeds` must be given with `init`"),
    "init-no-function": ({"seeds": 2, "init": 3}, ol.InvalidType, "`init` must be a function"),
    "init-arguments": (
        {"seeds": 2, "init": lambda: 0},
        ol.InvalidType,
        "`init` must be a function of a random key",
    ),
    "init-other-tree": (
        {"seeds": 2, "init": lambda key: {"v": jnp.zeros(())}},
        ol.TreeMismatch,
        "params",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_sweep_says_why_and_changes_nothing(name):
    options, error, words = FAULTS[name]
    step = descent()
    state = step.init({"w": np.float32(1.0)})
    before = bits(state)
    with pytest.raises(error, match=words):
        step.sweep(state, np.zeros(2, np.float32), **options)
    assert bits(state) == before


def test_batches_of_a_sweep_are_stacked():
    step = descent()
    with pytest.raises(ValueError, match="one first axis"):
        step.sweep(step.init({"w": np.float32(1.0)}), np.float32(1.0), learning_rate=[0.1])


@pytest.mark.parametrize("take", ["many", "sweep"])
def test_a_run_has_a_step(take):
    step = descent()
    options = {"learning_rate": [0.1]} if take == "sweep" else {}
    with pytest.raises(ValueError, match="the number of steps, at least 1"):
        getattr(step, take)(step.init({"w": np.float32(1.0)}), np.zeros((0,)), **options)


LISTS = {
    "numbers": ([np.zeros(3, np.float32)] * 2, lambda p, x: jnp.mean(p["w"] * x)),
    "ragged": ([np.zeros(3, np.float32), np.zeros(2, np.float32)], square),
    "scalars": ([np.float32(1.0), np.float32(2.0)], square),
    "tuple": ((np.zeros(3, np.float32),) * 2, lambda p, x: jnp.mean(p["w"] * x)),
}


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("take", ["many", "sweep"])
def test_a_list_of_batches_is_to_be_stacked(take, name):
    batches, loss = LISTS[name]
    step = descent(loss)
    options = {"learning_rate": [0.1]} if take == "sweep" else {}
    with pytest.raises(ValueError, match=r"Stack one that holds .*np.stack\(x\), \*batches"):
        getattr(step, take)(step.init({"w": np.float32(1.0)}), batches, **options)


def test_a_list_that_the_loss_takes_is_a_part():
    step = descent(lambda p, pair: square(p, pair[0] + pair[1]))
    state = step.init({"w": np.float32(1.0)})
    x = np.ones(2, np.float32)
    for pair in ([x, x], (x, x)):
        assert step.sweep(state, pair, learning_rate=[1.0]).losses.tolist() == [[0.5, 0.0]]


def test_an_error_of_the_loss_stays_what_it_is():
    step = descent(lambda p, x: p["w"] * None)
    with pytest.raises(TypeError, match="unsupported operand") as caught:
        step.sweep(step.init({"w": np.float32(1.0)}), np.zeros(2), learning_rate=[1.0])
    assert not isinstance(caught.value, ol.InvalidType)


def test_text_among_the_batches():
    step = descent()
    state = step.init({"w": np.float32(1.0)})
    text = np.array(["a", "b"])
    with pytest.raises(ol.InvalidType, match="Received: an array of <U1"):
        step.sweep(state, text, learning_rate=[0.1])
    with pytest.raises(ol.InvalidType, match="Received: an array of <U1"):
        step.many(state, text)
    with pytest.raises(ol.InvalidType, match="Received: 'a' of type str"):
        step(state, "a")


def test_points_and_messages_have_plain_numbers():
    step = descent()
    state = step.init({"w": np.float32(1.0)})
    found = step.sweep(state, np.zeros(2, np.float32), learning_rate=[*np.geomspace(0.01, 1.0, 2)])
    assert repr(found.points) == "({'learning_rate': 0.01}, {'learning_rate': 1.0})"
    with pytest.raises(ValueError, match=r"Received: learning_rate=-0.5\."):
        step.sweep(state, np.zeros(2, np.float32), learning_rate=[np.float64(-0.5)])
    with pytest.raises(ValueError, match=r"Received: lowest=-0.5\."):
        step.find_learning_rate(state, [0.0], lowest=np.float64(-0.5))


def sweep_on_a_mesh():
    """Return how far sweeps are from runs, without and with slots that are spread, and the axes."""
    mesh = jax.make_mesh((8,), ("data",))
    whole, parted = (
        NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), (None, "data", None))
    )
    params = jax.device_put({"w": matrix(64, 128), "b": np.ones((1, 128), np.float32)}, whole)
    x = jax.device_put(X, parted)
    told = []
    for axis in (None, "data"):
        step = ol.optimize_loss(
            lambda p, x: jnp.mean((x @ p["w"] + p["b"]) ** 2),
            learning_rate=0.1,
            optimizer="AdamW",
            shard_state=axis,
        )
        state = step.init(params)
        found = step.sweep(state, x, learning_rate=[0.001, 0.002])
        _, metrics = step.many(step.init(params).set(learning_rate=0.002), x)
        error = np.max(np.abs(found.losses[1] / np.asarray(metrics["loss"]) - 1))
        spec = found.state(1).optimizer["adam"]["m"]["w"].sharding.spec
        curve = step.find_learning_rate(state, list(x), steps=5)
        told.append([float(error), "data" in spec, bool(np.all(np.isfinite(curve.losses)))])
    return json.dumps(told)


def test_searches_on_eight_devices_keep_slots_where_they_lie():
    [plain, spread] = on_eight_devices(__name__, "sweep_on_a_mesh")
    assert plain[0] < 1e-6
    assert spread[0] < 1e-6
    assert (plain[1:], spread[1:]) == ([False, True], [True, True])


def test_a_step_that_has_searched_can_be_pickled():
    step = ol.optimize_loss(remembered, learning_rate=0.1, optimizer="SGD")
    step.sweep(step.init({"w": np.float32(1.0)}), np.zeros(2, np.float32), learning_rate=[1.0])
    assert pickle.loads(pickle.dumps(step)).learning_rate == 0.1


def remembered(params, x):
    return square(params, x)


# --- find_learning_rate ---


def test_the_rates_and_the_losses_are_those_of_steps():
    step = descent()
    state = step.init({"w": np.float32(5.0)})
    options = {"lowest": 0.01, "highest": 1.0, "steps": 5, "smoothing": 0.5}
    with pytest.warns(UserWarning, match="still falls"):
        found = step.find_learning_rate(state, [0.0], **options)
    np.testing.assert_allclose(found.rates, [0.01, 10**-1.5, 0.1, 10**-0.5, 1.0], 1e-6)
    w, losses = 5.0, []
    for rate in found.rates:
        losses.append(w * w / 2)
        w -= rate * w
    np.testing.assert_allclose(found.losses, losses, 1e-5)
    weights = 0.5 ** np.arange(5)
    means = [
        np.dot(weights[: i + 1][::-1], losses[: i + 1]) / weights[: i + 1].sum() for i in range(5)
    ]
    np.testing.assert_allclose(found.smoothed, means, 1e-5)
    assert not found.diverged


def test_the_state_stays_and_one_program_serves_all_bounds():
    loss, traces = counted(net)
    step = ol.optimize_loss(loss, learning_rate=1e-3, clip_gradients=1.0)
    state = step.init(PARAMS)
    before = bits(state)
    batches = list(zip(X, Y, strict=True))
    found = step.find_learning_rate(state, batches, steps=30)
    once = len(traces)
    other = step.find_learning_rate(
        state, iter(batches), steps=30, lowest=1e-5, highest=1.0, smoothing=0.5, divergence=2.0
    )
    assert len(traces) == once
    assert bits(state) == before
    step(state, X[0], Y[0])  # and was not donated
    assert found.losses[0] == other.losses[0]


@pytest.mark.parametrize("wide", [False, True])
def test_a_state_in_float64_or_bfloat16(wide):
    with jax.enable_x64(wide):
        state = (step := descent()).init({"w": np.float64(1.0) if wide else jnp.bfloat16(1.0)})
        x = state.params["w"] * 3
        found = step.find_learning_rate(state, [x])
        assert found.losses.dtype == np.float32
        np.testing.assert_allclose(found.losses[0], 2.0)
        assert step.sweep(state, x[None], learning_rate=[0.1]).losses.tolist() == [[2.0]]


def test_batches_come_again_in_turn():
    step = descent()
    state = step.init({"w": np.float32(0.0)})
    options = {"lowest": 1e-9, "highest": 1e-8, "steps": 5, "divergence": 1e9}
    found = step.find_learning_rate(state, [2.0, 4.0], **options)
    np.testing.assert_allclose(found.losses, [2, 8, 2, 8, 2], 1e-5)
    endless = (np.float32(x) for x in itertools.count(1))
    found = step.find_learning_rate(state, endless, **options)
    np.testing.assert_allclose(found.losses, [0.5, 2, 4.5, 8, 12.5], 1e-5)
    assert next(endless) == 6  # no more were pulled


@pytest.mark.parametrize("least", [1.0, -100.0])
def test_it_stops_where_the_smoothed_loss_diverges(least):
    """Of (w - x)² / 2, the factor of a step is 1 - rate: far above 2 the loss explodes."""
    step = descent(lambda p, x: square(p, x) + least)
    state = step.init({"w": np.float32(1.0)})
    found = step.find_learning_rate(state, [0.0, 1.0], lowest=1e-3, highest=1e6, steps=40)
    assert found.diverged
    assert len(found.rates) == len(found.losses) == len(found.smoothed) < 40
    assert 2 < found.rates[-1] < 1e5
    before = found.smoothed[:-1]
    bound = before.min() + 3 * abs(before.min())
    assert found.smoothed[-1] > bound >= before.max()
    assert found.minimum < found.rates[-1]


def test_a_loss_that_is_not_finite_ends_the_test():
    """It is √w, and a step of the rate times 1 / (2 √w) goes below 0."""
    step = descent(lambda p: jnp.sqrt(p["w"]))
    state = step.init({"w": np.float32(1.0)})
    found = step.find_learning_rate(state, [()], lowest=1e-2, highest=100.0)
    assert found.diverged
    assert np.isnan(found.losses[-1])
    assert np.all(np.isfinite(found.losses[:-1]))
    assert found.suggestion < found.rates[-1]


def test_the_suggestion_is_where_the_curve_is_steepest():
    """A loss that is a given curve: each step adds one to w, whatever the rate."""
    curve = 3 - 2 / (1 + np.exp(-(np.arange(60) - 40.0) / 3)).astype(np.float32)

    def loss(params):
        at = jax.lax.stop_gradient(params["w"]).astype(jnp.int32)
        return jnp.asarray(curve)[at] + 0 * params["w"]

    @ol_link
    def leaf(self, update, slots, param, k):
        return jnp.ones_like(update) + 0 * k["learning_rate"], slots

    step = descent(loss, learning_rate=None, optimizer=T.chain(count=leaf))
    state = step.init({"w": np.float32(0.0)})
    found = step.find_learning_rate(state, [()], steps=60, smoothing=0.0)
    np.testing.assert_allclose(found.losses, curve, 1e-6)
    assert found.suggestion == found.rates[40]
    assert found.minimum == found.rates[59]
    late = step.find_learning_rate(state, [()], steps=60, smoothing=0.5)
    assert found.rates[40] < late.suggestion < found.rates[44]


def ol_link(leaf):
    """Return a link with a learning rate and this leaf function."""
    fields = [("learning_rate", T.NotNegative)]
    made = dataclasses.make_dataclass(
        "Made", fields, bases=(T.Link,), namespace={"leaf": leaf}, frozen=True
    )
    return made(0.1)


@pytest.mark.parametrize("seed", range(10))
def test_noise_of_batches_does_not_decide(seed):
    """Adam moves w by 9 times the rate until then, so that the loss falls as the rate nears 0.1."""
    random = np.random.default_rng(seed)
    batches = random.normal(size=(100, 32, 8)).astype(np.float32)
    step = ol.optimize_loss(
        lambda p, x: jnp.mean((x @ p["w"] - x.sum(-1)) ** 2), learning_rate=0.1, optimizer="Adam"
    )
    state = step.init({"w": np.zeros(8, np.float32)})
    found = step.find_learning_rate(state, list(batches), lowest=1e-4)
    assert 0.03 < found.suggestion < 0.5


def test_a_curve_that_falls_to_the_end_is_marked():
    step = descent()
    state = step.init({"w": np.float32(5.0)})
    with pytest.warns(UserWarning, match=r"highest rate tried, 0.01,.*a greater `highest`"):
        found = step.find_learning_rate(state, [0.0], highest=0.01)
    assert found.still_falling
    assert found.suggestion > 0.005
    found = step.find_learning_rate(state, [0.0], highest=1000.0)
    assert found.diverged
    assert not found.still_falling


def test_the_name_of_another_number():
    step = ol.optimize_loss(square, learning_rate=0.1, optimizer="AdamW")
    state = step.init({"w": np.float32(5.0)})
    found = step.find_learning_rate(state, [0.0], number="weight_decay", highest=1e3)
    assert found.number == "weight_decay"
    assert found.plot().axes[0].get_xlabel() == "weight decay"


def test_there_is_no_suggestion_where_nothing_falls():
    step = descent(lambda p: 1.0 + 0 * p["w"])
    found = step.find_learning_rate(step.init({"w": np.float32(1.0)}), [()])
    assert found.suggestion is None
    assert not found.diverged


def test_a_schedule_is_overridden():
    step = descent(learning_rate=ol.schedules.ExponentialDecay(1e-3, 1, 0.1))
    plain = descent()
    curves = [
        each.find_learning_rate(each.init({"w": np.float32(0.0)}), [3.0]).losses
        for each in (step, plain)
    ]
    np.testing.assert_array_equal(*curves)


def test_one_rate_of_several():
    step = descent(
        lambda p: p["a"] ** 2 + p["b"] ** 2, rules={"a": {"optimizer": ol.optimizers.Adam(1e-3)}}
    )
    state = step.init({"a": np.float32(1.0), "b": np.float32(1.0)})
    names = ["/".join(pair) for pair in step.chain.all_numbers() if pair[1] == "learning_rate"]
    assert len(names) == 2
    with pytest.raises(ValueError, match="is a number of several links"):
        step.find_learning_rate(state, [()])
    for name in names:
        assert step.find_learning_rate(state, [()], number=name).suggestion


CANNOT = {
    "optax": ({"learning_rate": None, "optimizer": optax.adam(1e-3)}, "has its rate built in"),
    "optax-and-ours": (
        {"learning_rate": None, "optimizer": optax.adam(1e-3), "clip_gradients": 1.0},
        "has its rate built in",
    ),
    "decay-fn": ({"learning_rate_decay_fn": lambda rate, step: rate / 2}, "learning_rate_decay_fn"),
    "plateau": ({"plateau": T.ReduceOnPlateau()}, "'plateau', which would change"),
}


@pytest.mark.parametrize("name", CANNOT)
def test_a_rate_that_is_not_the_states_to_decide(name):
    options, words = CANNOT[name]
    step = descent(**options)
    with pytest.raises(ValueError, match=words):
        step.find_learning_rate(step.init({"w": np.float32(1.0)}), [1.0])


def test_an_optax_rule_in_a_chain_with_a_rate():
    chain = T.chain(trace=optax.trace(0.5), rate=T.ScaleByLearningRate(0.1))
    step = descent(learning_rate=None, optimizer=chain)
    assert step.find_learning_rate(step.init({"w": np.float32(1.0)}), [5.0]).suggestion


def test_a_loss_that_is_not_finite_from_the_start():
    step = descent()
    with pytest.raises(ol.NonFiniteError, match="before the first update"):
        step.find_learning_rate(step.init({"w": np.float32(np.nan)}), [1.0])


WRONG = {
    "array": ({"batches": np.zeros(3)}, ol.InvalidType, "an iterable of batches"),
    "empty": ({"batches": []}, ValueError, "must hold a batch"),
    "ragged": ({"batches": [np.zeros(3), np.zeros(2)]}, ValueError, "the next is smaller"),
    "one-batch": ({"batches": (np.zeros((3, 2)), np.zeros(3))}, ValueError, r"as in \[\(x, y\)\]"),
    "larger": ({"batches": [np.zeros(2), np.zeros(3)]}, ValueError, r"\[2\], then float64\[3\]"),
    "dtype": ({"batches": [np.zeros(2), np.zeros(2, int)]}, ValueError, "must be alike"),
    "structure": (
        {"batches": [{"x": 1.0}, {"x": 1.0}, {"y": 1.0}]},
        ValueError,
        r"Received: \{x: float\d*\[\]\}, then \{y: float\[\]\}",
    ),
    "no-arrays": ({"batches": [(), ()]}, ValueError, r"write \[\(\)\]"),
    "underflow": ({"lowest": 1e-60}, ValueError, "`lowest` must be at least 1.2e-38"),
    "overflow": ({"highest": 1e39}, ValueError, r"`highest` must be at most 3.4e\+38"),
    "lowest": ({"lowest": 0.0}, ValueError, "`lowest` must be above 0"),
    "highest": ({"lowest": 1.0, "highest": 0.1}, ValueError, "`highest` must be above `lowest`"),
    "steps": ({"steps": 2}, ValueError, "`steps` must be an integer of at least 3"),
    "smoothing": ({"smoothing": 1.0}, ValueError, r"`smoothing` must be in \[0, 1\)"),
    "divergence": ({"divergence": 1.0}, ValueError, "`divergence` must be above 1"),
    "number": ({"number": 3}, ol.InvalidType, "`number` must be a name"),
    "unknown": ({"number": "rate"}, ValueError, "`number` must be one of the state"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_says_why(name):
    options, error, words = WRONG[name]
    step = descent(lambda p, x: jnp.mean(p["w"] * x))
    with pytest.raises(error, match=words):
        step.find_learning_rate(step.init({"w": np.float32(1.0)}), **({"batches": [1.0]} | options))


def test_what_the_batches_raise_is_passed_on():
    def broken():
        yield 1.0
        raise OSError("disk")

    step = descent()
    with pytest.raises(OSError, match="disk"):
        step.find_learning_rate(step.init({"w": np.float32(1.0)}), broken())


def test_no_search_in_a_program():
    step = descent()
    for search in (
        lambda state: step.find_learning_rate(state, [1.0]).rates,
        lambda state: step.sweep(state, np.zeros(2), learning_rate=[0.1]).losses,
    ):
        with pytest.raises(ol.InvalidType, match="must not be traced"):
            jax.jit(search)(step.init({"w": np.float32(1.0)}))


@pytest.mark.parametrize("method", ["find_learning_rate", "sweep"])
def test_a_search_takes_states_of_this_step_alone(method):
    step = descent()
    with pytest.raises(ol.InvalidType, match="must be a TrainState"):
        getattr(step, method)({"w": 1.0}, [1.0])
    with pytest.raises(ol.TreeMismatch, match="Links that differ"):
        getattr(step, method)(descent(optimizer="Adam").init({"w": np.float32(1.0)}), [1.0])
