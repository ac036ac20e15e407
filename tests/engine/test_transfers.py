"""Under `jax.transfer_guard("disallow")`, transfers that a caller has asked for go through."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optimize_loss as ol
from tests.cases import CASES, LOSS


def loss(params, x, *, key):
    noise = jax.random.normal(key, params["w"].shape)
    return jnp.sum((params["w"] + noise) ** 2) * jnp.mean(x) + jnp.sum(params["b"] ** 2)


SCHEDULE = optax.linear_schedule(0.1, 0.0, 10)
STEP = ol.optimize_loss(loss, learning_rate=0.1, clip_gradients=1.0, ema=0.9, skip="nonfinite")
SCHEDULED = ol.optimize_loss(loss, learning_rate=SCHEDULE, precision="bfloat16")
PARAMS = {"w": jnp.ones(3), "b": jnp.ones(2)}
X, XS, RATES = jnp.ones(2), jnp.ones((4, 2)), jnp.array([0.1, 0.2])
RATE, COUNT = jnp.float32(0.3), jnp.int32(3)
HOST = [np.ones(2, np.float32)] * 4
HOOKS = [ol.every(2, lambda state, metrics: state.set(learning_rate=0.1))]

CALLS = {
    "init": lambda step, state: step.init(PARAMS),
    "explain": lambda step, state: step.explain(PARAMS, steps=10),
    "step": lambda step, state: step(state, X),
    "many": lambda step, state: step.many(state, XS),
    "the-step": lambda step, state: state.step,
    "set": lambda step, state: state.set(learning_rate=0.2, step=3),
    "set-from-the-device": lambda step, state: state.set(learning_rate=RATE, step=COUNT),
    "set-what-was-built-in": lambda step, state: state.set(learning_rate=None),
    "reset": lambda step, state: state.reset("w"),
    "eval_params": lambda step, state: state.eval_params,
    "decoded": lambda step, state: state.decoded,
    "offender": lambda step, state: state.offender,
    "run": lambda step, state: step.run(state, [X] * 4),
    "run-numpy": lambda step, state: step.run(state, HOST, hooks=HOOKS),
    "run-numpy-stacked": lambda step, state: step.run(state, HOST, steps_per_call=2),
    "run-numbers": lambda step, state: step.run(state, [1.0, 2.0], steps_per_call=2),
    "sweep": lambda step, state: step.sweep(state, XS, learning_rate=RATES, seeds=2, grid=True),
    "find": lambda step, state: step.find_learning_rate(
        state, [X, X], steps=3, lowest=1e-3, highest=1.0
    ),
}


@pytest.mark.parametrize("step", [STEP, SCHEDULED], ids=["numbers", "schedule"])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore:The loss still falls")
def test_a_call_transfers_what_it_is_given(name, step):
    state = step.init(PARAMS)
    with jax.transfer_guard("disallow"):
        CALLS[name](step, state)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_chain_is_set_up_and_runs(case):
    """For any link: what it makes for its state is asked for, and a program transfers nothing."""
    params, grads = case.params(), case.grads(0)
    name, (_, value) = next(iter(case.numbers.items()), ("", (None, None)))
    with jax.transfer_guard("disallow"):
        state = case.chain.init(params)
        if name:
            state = case.chain.set(state, **{name: value})
        jax.jit(case.chain.update).lower(grads, state, params, value=LOSS)


def test_a_guard_of_explicit_transfers_stays():
    state = STEP.init(PARAMS)
    with jax.transfer_guard("disallow_explicit"), pytest.raises(Exception, match="isallowed"):
        state.set(learning_rate=0.2)


def test_what_hooks_and_batches_do_is_guarded():
    """Only what was asked for goes through: a transfer of the caller's own is still stopped."""

    def batches():
        yield X * np.float32(2)

    state = STEP.init(PARAMS)
    with jax.transfer_guard("disallow"), pytest.raises(Exception, match="Disallowed"):
        STEP.run(state, batches())
