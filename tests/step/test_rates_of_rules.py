"""A name alone is a number of the step; one of a rule has the name of its link before it."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import optimize_loss

ol: Any = optimize_loss  # untyped, since some of what these tests pass is wrong on purpose
T = ol.transforms
PARAMS = {"body": jnp.ones((2, 2)), "head": jnp.ones((2, 2))}
SCHEDULE = ol.schedules.InverseTimeDecay(0.5, 1, 1.0)


def linear(params, x):
    return jnp.sum(params["body"] + params["head"]) * x


def made(optimizer, **options):
    given = {"learning_rate": 0.5, "optimizer": "SGD", **options}
    return ol.optimize_loss(linear, rules={"head": {"optimizer": optimizer}}, **given)


def rates(state):
    """The rate of the step, and that of the rule."""
    links = (state.links[name] for name, _ in state.chain.links)
    return [float(own["learning_rate"]) for own in links if "learning_rate" in own]


OWN = {
    "optimizer": ol.optimizers.AdamW(0.25),
    "the-same-rate": ol.optimizers.SGD(0.5),
    "chain": T.chain(rate=T.ScaleByLearningRate(0.5)),
    "relative": ol.optimizers.Adafactor(0.5),
    "part-of-the-rate": lambda rate: ol.optimizers.SGD(rate / 2),
}


@pytest.mark.parametrize("name", OWN)
def test_a_rate_alone_is_that_of_the_step(name):
    state = made(OWN[name]).init(PARAMS)
    _, own = rates(state)
    assert rates(state.set(learning_rate=0.125)) == [0.125, own]
    (full,) = [n for n in state.links if n.partition(".")[2] and "learning_rate" in state.links[n]]
    changed = state.set(**{f"{full}/learning_rate": 0.0625})
    assert rates(changed) == [0.5, 0.0625]
    assert rates(changed.set(learning_rate=None)) == [0.5, 0.0625]


SHARED = {
    "name": "SGD",
    "class": ol.optimizers.Adam,
    "function": lambda rate: ol.optimizers.SGD(rate),
    "link": T.ScaleByMomentum(0.5),
    "relative": "Adafactor",
    "no-factor": "Ftrl",
}


@pytest.mark.parametrize("name", SHARED)
def test_a_rule_without_a_rate_of_its_own_shares_that_of_the_step(name):
    state = made(SHARED[name]).init(PARAMS)
    assert rates(state) == [0.5, 0.5]
    assert rates(state.set(learning_rate=0.125)) == [0.125, 0.125]
    assert rates(state.set(**{"rate/learning_rate": 0.125})) == [0.125, 0.5]


@pytest.mark.parametrize(
    "options",
    [
        {"learning_rate": SCHEDULE},
        {"learning_rate_decay_fn": lambda rate, step: rate * jnp.where(step == 1, 0.5, 1.0)},
    ],
    ids=["schedule", "decay"],
)
def test_a_schedule_is_shared_too(options):
    step = made("SGD", **options)
    state = step.init(PARAMS)
    built = rates(state)
    changed = state.set(learning_rate=0.25)
    assert rates(changed) == [0.25, 0.25]
    assert rates(changed.set(learning_rate=None)) == built
    at = step.chain.numbers_named("learning_rate", changed.links, jnp.int32(1))
    assert [*at.values()] == [0.25 if "learning_rate" in options else 0.125] * 2


def test_a_full_name_comes_before_one_that_is_shared():
    state = made("SGD").init(PARAMS)
    both = {"learning_rate": 0.25, "SGD.rate/learning_rate": 0.125}
    for names in (both, dict(reversed(both.items()))):
        assert rates(state.set(**names)) == [0.25, 0.125]


def test_other_numbers_alone_are_those_of_the_step_too():
    rules = {"head": {"optimizer": ol.optimizers.AdamW(0.1), "clip_norm": 2.0}}
    step = ol.optimize_loss(linear, learning_rate=0.1, clip_gradients=1.0, rules=rules)
    state = step.init(PARAMS).set(epsilon=0.5, max_norm=3.0, weight_decay=0.25)
    assert state.links["adam"]["epsilon"] == 0.5 != state.links["AdamW.adam"]["epsilon"]
    assert state.links["clip_gradients"]["max_norm"] == 3.0
    assert state.links["rules.clip_norm.head"]["max_norm"] == 2.0
    assert state.links["AdamW.weight_decay"]["weight_decay"] == 0.25  # no other has one


def test_the_rate_of_the_step_is_the_metric_and_a_plateau_lowers_all():
    plateau = T.ReduceOnPlateau(0.5, patience=0)
    step = made(ol.optimizers.SGD(0.25), plateau=plateau)
    _, metrics = step.many(step.init(PARAMS), jnp.zeros(3))
    np.testing.assert_array_equal(metrics["learning_rate"], [0.5, 0.5, 0.25])
    np.testing.assert_array_equal(metrics["learning_rate/SGD.rate"], [0.25, 0.25, 0.125])
    assert {tag for tag in metrics if "learning_rate" in tag} == {
        "learning_rate",
        "learning_rate/SGD.rate",
    }


def test_searches_try_rates_of_the_step():
    step = made(ol.optimizers.SGD(0.25))
    state = step.init(PARAMS)
    found = step.sweep(state, jnp.ones(1), learning_rate=[0.0, 1.0])
    np.testing.assert_array_equal(found.states.params["body"][:, 0, 0], [1.0, 0.0])
    np.testing.assert_array_equal(found.states.params["head"][:, 0, 0], [0.75, 0.75])
    np.testing.assert_array_equal(found.metrics["learning_rate"], [[0.0], [1.0]])
    with pytest.warns(UserWarning, match="still falls"):
        test = step.find_learning_rate(state, [1.0], lowest=0.5, highest=2.0, steps=3, smoothing=0)
    # The loss falls by 4 · rate for the body, and by 4 · 1/4 for the head.
    np.testing.assert_allclose(test.losses, [8.0, 5.0, 0.0], atol=1e-5)


def test_shared_rates_are_searched_together():
    step = made("SGD")
    found = step.sweep(step.init(PARAMS), jnp.ones(1), learning_rate=[0.0, 1.0])
    np.testing.assert_array_equal(found.states.params["head"][:, 0, 0], [1.0, 0.0])


def test_rates_of_several_optimizers_for_all_have_no_name_alone():
    several = ol.optimizers.MultiOptimizer(
        {"body": ol.optimizers.SGD(0.1)}, ol.optimizers.Adam(0.1)
    )
    step = ol.optimize_loss(linear, optimizer=several)
    with pytest.raises(ValueError, match="`learning_rate` is a number of several links"):
        step.init(PARAMS).set(learning_rate=0.1)


@pytest.mark.parametrize("optimizer", ["SGD", ol.optimizers.SGD(0.5)])
def test_a_step_among_others_has_its_rate_too(optimizer):
    state = ol.together(one=made(optimizer)).init(PARAMS)
    shared = optimizer == "SGD"
    assert rates(state.set(learning_rate=0.25)) == [0.25, 0.25 if shared else 0.5]
