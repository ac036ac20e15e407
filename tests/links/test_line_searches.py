"""optax's line searches in a step: each is given the loss of its batch as a function."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optimize_loss as ol
from optimize_loss import transforms as T

STEPS = 4
BATCHES = jnp.array([1.0, 2.0, 1.5, 0.5])


@pytest.fixture(autouse=True)
def as_optax_needs_it():
    """Line searches of optax compare integers with floats."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def params():
    return {"w": jnp.array([0.0, 0.5, 1.0]), "b": jnp.ones(2)}


def loss(p, x):
    """Rosenbrock's function, and a square."""
    w = p["w"]
    rosenbrock = jnp.sum(10 * (w[1:] - w[:-1] ** 2) ** 2 + (1 - w[:-1]) ** 2)
    return x * rosenbrock + jnp.sum(p["b"] ** 2)


def by_optax(tx, start, loss):
    """Return the losses of steps as optax's documentation has them."""

    @jax.jit
    def step(p, state, x):
        value, grad = jax.value_and_grad(loss)(p, x)
        updates, state = tx.update(
            grad, state, p, value=value, grad=grad, value_fn=lambda p: loss(p, x)
        )
        return optax.apply_updates(p, updates), state, value

    p, state, seen = start, tx.init(start), []
    for x in BATCHES:
        p, state, value = step(p, state, x)
        seen.append(value)
    return np.stack(seen)


def by_steps(step, start, **given):
    """Return the losses of single steps."""
    state, seen = step.init(start, **given), []
    for x in BATCHES:
        state, metrics = step(state, x)
        seen.append(metrics["loss"])
    return np.stack(seen)


SEARCHES: Any = {
    "lbfgs": optax.lbfgs(memory_size=2, linesearch=optax.scale_by_zoom_linesearch(4)),
    "backtracking": optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(6)),
    "polyak": optax.polyak_sgd(),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_steps_are_those_of_optax(name):
    """One by one, many in a call, and in a loop."""
    tx = SEARCHES[name]
    wanted = by_optax(tx, params(), loss)
    step = ol.optimize_loss(loss, optimizer=tx)
    np.testing.assert_allclose(by_steps(step, params()), wanted, rtol=1e-4)
    _, metrics = step.many(step.init(params()), BATCHES)
    np.testing.assert_allclose(metrics["loss"], wanted, rtol=1e-4)
    _, metrics = step.run(step.init(params()), list(BATCHES))
    np.testing.assert_allclose(metrics["loss"], wanted, rtol=1e-4)


def test_lbfgs_as_it_comes():
    step = ol.optimize_loss(lambda p: jnp.sum((p["w"] - 1.0) ** 2), optimizer=optax.lbfgs())
    state, _ = step(step.init({"w": jnp.zeros(3)}))
    state, _ = step(state)
    np.testing.assert_allclose(state.params["w"], 1.0, atol=1e-5)


def test_a_search_is_over_the_parameters_that_are_trained():
    """With a key, a model state, a loss scale and a guard around it."""

    def with_more(p, x, *, key, model_state):
        noise = 0 * jax.random.normal(key)
        return loss(p, x) * model_state + noise, ol.Aux(model_state=model_state)

    start, tx = params(), SEARCHES["backtracking"]
    wanted = by_optax(tx, {"w": start["w"]}, lambda p, x: loss({**start, **p}, x))
    step = ol.optimize_loss(
        with_more, optimizer=tx, variables="w", loss_scale=8.0, skip="nonfinite"
    )
    got = by_steps(step, start, model_state=jnp.float32(1.0))
    np.testing.assert_allclose(got, wanted, rtol=1e-4)


@pytest.mark.parametrize("options", [{"accumulate": 2}, {"sam": 0.1}], ids=lambda o: next(iter(o)))
def test_where_an_update_is_made_of_more_there_is_no_search(options):
    step = ol.optimize_loss(loss, optimizer=SEARCHES["backtracking"], **options)
    with pytest.raises(TypeError, match="'grad' and 'value_fn'") as caught:
        step(step.init(params()), 1.0)
    assert any("not with `accumulate`, `sam`" in note for note in caught.value.__notes__)


def test_a_rule_that_needs_the_value_alone_works_behind_an_accumulation():
    """Polyak's rate of the mean of both losses: (1 + 3)² / 2 at a gradient of 2 · (1 + 3) / 2."""
    step = ol.optimize_loss(
        lambda p, x: x * p["w"] ** 2, optimizer=optax.polyak_sgd(), accumulate=2
    )
    state = step.init({"w": 1.0})
    for x in (1.0, 3.0):
        state, _ = step(state, x)
    np.testing.assert_allclose(state.params["w"], 0.5, rtol=1e-5)


RULES: Any = {
    "of-all": (optax.polyak_sgd(), {"b": {"optimizer": optax.sgd(0.1)}}),
    "of-a-rule": (optax.sgd(0.1), {"w": {"optimizer": optax.polyak_sgd()}}),
}


@pytest.mark.parametrize("name", RULES)
def test_a_rule_that_needs_the_value_alone_works_for_some_parameters(name):
    """Polyak's rate of the loss and of the gradients of w; of b a tenth of the gradient."""
    optimizer, rules = RULES[name]
    step = ol.optimize_loss(loss, optimizer=optimizer, rules=rules)
    start = params()
    state, _ = step(step.init(start), 1.0)
    value, grads = jax.value_and_grad(loss)(start, 1.0)
    rate = jnp.minimum(value / jnp.sum(grads["w"] ** 2), 1.0)
    np.testing.assert_allclose(state.params["w"], start["w"] - rate * grads["w"], rtol=1e-5)
    np.testing.assert_allclose(state.params["b"], 0.8, rtol=1e-6)


def test_a_search_for_some_parameters_is_refused():
    step = ol.optimize_loss(
        loss, optimizer=SEARCHES["backtracking"], rules={"b": {"optimizer": optax.sgd(0.1)}}
    )
    with pytest.raises(TypeError, match="'value_fn'") as caught:
        step(step.init(params()), 1.0)
    assert any("the optimizer of all parameters" in note for note in caught.value.__notes__)


def test_a_search_goes_with_rules_that_share_its_optimizer():
    """A frozen parameter is none that is searched over."""
    start, tx = params(), SEARCHES["lbfgs"]
    wanted = by_optax(tx, {"w": start["w"]}, lambda p, x: loss({**start, **p}, x))
    step = ol.optimize_loss(loss, optimizer=tx, rules={"b": {"freeze": True}})
    np.testing.assert_allclose(by_steps(step, start), wanted, rtol=1e-4)


def test_a_chain_passes_what_it_is_given():
    tx = T.chain(search=SEARCHES["backtracking"], average=T.AverageParams(0.5))
    np.testing.assert_allclose(
        by_optax(tx, params(), loss), by_optax(SEARCHES["backtracking"], params(), loss), rtol=1e-4
    )
