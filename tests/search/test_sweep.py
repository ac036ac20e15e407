"""`sweep`: what separate runs give, from a state that stays as it was."""

import itertools
import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests.cases import on_eight_devices
from tests.search.net import PARAMS, T, X, Y, bits, counted, descent, matrix, net, ol, square


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


@pytest.mark.slow
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
