"""The count of batches: what steps have taken, whether or not an update came of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optimize_loss as ol


def linear(**options):
    return ol.optimize_loss(
        lambda params, x: jnp.mean(params["w"] * x), learning_rate=1.0, optimizer="SGD", **options
    )


def test_skipped_and_gathered_batches_count():
    step = linear(accumulate=2, skip="nonfinite")
    state, seen = step.init({"w": 9.0}), []
    for x in (1.0, float("nan"), 1.0, 1.0):
        state, metrics = step(state, x)
        seen.append((int(metrics["batches"]), int(state.batches), int(state.step)))
    assert seen == [(1, 1, 0), (2, 2, 0), (3, 3, 1), (4, 4, 1)]
    state, metrics = step.many(state, jnp.ones(3))
    assert metrics["batches"].tolist() == [5, 6, 7]
    assert state.set(step=100).batches == 7
    assert (state.set(batches=0).batches, state.set(batches=0).step) == (0, state.step)


def test_states_side_by_side_count_alike():
    step = linear()
    state, _ = step(step.init({"w": 9.0}), 1.0)
    found = step.sweep(state, jnp.ones(3), learning_rate=[0.1, 1.0])
    assert [found.state(i).batches for i in (0, 1)] == [4, 4]
    states = jax.vmap(lambda rate: state.set(learning_rate=rate))(jnp.array([0.1, 1.0]))
    states, metrics = jax.vmap(step, (0, None))(states, 1.0)
    assert states.batches.tolist() == metrics["batches"].tolist() == [2, 2]
    moved = jax.vmap(lambda n: state.set(batches=n))(jnp.array([3, 4]))
    assert moved.batches.tolist() == [3, 4]


def test_the_count_ends_where_an_int32_does():
    step = linear()
    most = np.iinfo(np.int32).max
    state, metrics = step(step.init({"w": 9.0}).set(batches=most - 1), 1.0)
    state, metrics = step(state, 1.0)
    assert state.batches == metrics["batches"] == most


def test_it_has_the_prefix_of_the_metrics():
    step = linear(name="task")
    assert "task/batches" in step(step.init({"w": 9.0}), 1.0)[1]


@pytest.mark.parametrize("value", [-1, 1.5, True, jnp.ones(2)])
def test_what_is_no_count(value):
    with pytest.raises(ValueError, match="`batches` must be"):
        linear().init({"w": 9.0}).set(batches=value)
