"""A chain with other numbers goes on from a state; one of another structure is refused."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optimize_loss import transforms as T
from tests.cases import grads as grads_of
from tests.cases import is_no_bias
from tests.cases import params as params_of
from tests.engine.by_hand import assert_same

# Going on with other numbers.


def numbered(
    rate: Any = 0.1, bound=1.0, multiplier=2.0, every=2, flag=False, where="**", name="clip"
):
    return T.chain(
        unscale=T.DivideByDynamicLossScale(),
        accumulate=T.Accumulate(every),
        multiply=T.MultiplyGradients({"scale": multiplier}),
        **{name: T.ForParameters(where, T.ClipByNorm(bound))},
        momentum=T.ScaleByMomentum(0.9, nesterov=flag),
        rate=T.ScaleByLearningRate(rate),
    )


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"rate": 0.2}, ("rate", "learning_rate", 0.2)),
        ({"bound": 3.0}, ("clip", "max_norm", 3.0)),
        ({"multiplier": -1.0}, ("multiply", "multipliers/scale", -1.0)),
        ({"every": 5}, ("accumulate", "every", 5)),
        ({}, ("rate", "learning_rate", 0.1)),
    ],
)
def test_other_numbers_keep_the_chain(change, place):
    tx, traced = numbered(), []

    @jax.jit
    def step(state):
        traced.append(1)
        return tx.apply(grads_of(0), state, params_of())[1]

    state = step(tx.init(params_of()))
    same, after = tx.with_numbers_of(numbered(**change), state)
    step(after)
    assert same is tx
    assert len(traced) == 1
    link, number, value = place
    assert_same(after[link][number], jnp.asarray(value, state[link][number].dtype))
    assert_same(after, {**state, link: {**state[link], number: after[link][number]}})


def test_a_number_that_was_set_stays_unless_it_changes():
    tx = numbered()
    state = tx.set(tx.init(params_of()), learning_rate=0.5)
    _, after = tx.with_numbers_of(numbered(bound=3.0), state)
    assert after["rate"]["learning_rate"] == 0.5


def test_another_schedule_gives_the_other_chain():
    tx, scheduled = numbered(), numbered(rate=lambda step: 0.5 + step.astype(jnp.float32))
    first = tx.init(params_of())
    chain, state = tx.with_numbers_of(scheduled, first)
    assert chain is scheduled
    assert chain.numbers_named("learning_rate", state)["rate"] == 0.5
    back, again = chain.with_numbers_of(tx, state)
    assert back is tx
    assert_same(again, first)


OTHERS = {
    "names": numbered(name="bound"),
    "flag": numbered(flag=True),
    "where": numbered(where="**/kernel"),
    "patterns": T.chain(**{**dict(numbered().links), "multiply": T.MultiplyGradients({"*": 2.0})}),
    "kind": T.chain(**{**dict(numbered().links), "momentum": T.ScaleByAdam()}),
    "start": T.chain(**{**dict(numbered().links), "unscale": T.DivideByDynamicLossScale(2.0)}),
    "for-all": T.chain(**{**dict(numbered().links), "clip": T.ClipByNorm(1.0)}),
    "optax": T.chain(**{**dict(numbered().links), "momentum": optax.trace(0.9)}),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_other_structure_is_refused(other):
    tx = numbered()
    state = tx.init(params_of())
    with pytest.raises(ValueError, match="must stay"):
        tx.with_numbers_of(other, state)


def test_a_group_by_function_is_the_same_group():
    make = lambda rate: T.chain(x=T.ForParameters(is_no_bias, T.ScaleByLearningRate(rate)))
    tx = make(0.1)
    same, state = tx.with_numbers_of(make(0.2), tx.init(params_of()))
    assert same is tx
    assert state["x"]["learning_rate"] == np.float32(0.2)
