"""`find_learning_rate`: the rates and losses of steps, and where to begin."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.search.net import PARAMS, T, X, Y, bits, counted, descent, net, ol, square

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
    adam, sgd = ol.optimizers.Adam(1e-3), ol.optimizers.SGD(1e-3)
    step = ol.optimize_loss(
        lambda p: p["a"] ** 2 + p["b"] ** 2,
        optimizer=ol.optimizers.MultiOptimizer({"a": adam}, sgd),
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
