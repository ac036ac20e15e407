"""Numbers by name: {pattern: number} in place of a number, in any link."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optimize_loss as ol
from tests.cases import random_like
from tests.engine.test_bucket import assert_alike, linear

T = ol.transforms
PARAMS = {"a": jnp.array([4.0]), "b": {"bias": jnp.array([8.0]), "kernel": jnp.array([16.0])}}
STILL = jax.tree.map(jnp.zeros_like, PARAMS)


def added(link, params=PARAMS, steps=1, values: Any = None):
    """Return by name what a link adds to gradients of zero in its last step."""
    tx = T.chain(link=link)
    state = tx.set(tx.init(params), **(values or {}))
    updates: Any = None
    for _ in range(steps):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
    return {"a": updates["a"].item(), **{n: x.item() for n, x in updates["b"].items()}}


def halving(step):
    return 0.5 ** step.astype(jnp.float32)


TABLE = {
    "one-pattern": ({"a": 0.5}, {"a": 2, "bias": 0, "kernel": 0}),
    "first-decides": ({"**/bias": 0.0, "b/*": 0.5, "**": 1.0}, {"a": 4, "bias": 0, "kernel": 8}),
    "regex": ({re.compile("a"): 0.5}, {"a": 2, "bias": 4, "kernel": 0}),  # b/bias has an a
    "schedule": ({"a": halving, "**": 0.5}, {"a": 2, "bias": 4, "kernel": 8}),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_first_pattern_that_matches_decides(name):
    decay, want = TABLE[name]
    assert added(T.AddWeightDecay(decay), steps=2) == want


def test_an_exclusion_yields_to_a_number_by_name():
    link = T.AddWeightDecay({"**/bias": 0.5, "**": 1.0}, exclude=("b/*",))
    assert added(link) == {"a": 4, "bias": 4, "kernel": 16}


def test_what_no_pattern_matches_has_the_default_of_the_link():
    tx = T.chain(momentum=T.ScaleByMomentum({"a": 0.5}))
    state = tx.init(PARAMS)
    assert {n: x.item() for n, x in state["momentum"].items() if n != "sum"} == {
        "momentum/a": 0.5,
        "momentum": np.float32(0.9),
    }
    updates, state = tx.update(PARAMS, state)
    updates, state = tx.update(PARAMS, state)
    assert updates["a"] == 1.5 * 4
    np.testing.assert_allclose(updates["b"]["bias"], 1.9 * 8)


@pytest.mark.parametrize("bucket", [None, "auto"])
def test_any_number_may_go_by_name(bucket):
    """The same as a link for each of the parameters, also where they share an array."""
    grads = [random_like({"head": (3,), "body": (2,)}, t) for t in range(3)]

    def trained(**links):
        tx = T.chain(**links, rate=T.ScaleByLearningRate(0.1))
        step = ol.optimize_loss(linear, learning_rate=None, optimizer=tx, bucket=bucket)
        state = step.init(grads[0])
        for batch in grads[1:]:
            state, _ = step(state, batch)
        return state.params

    got = trained(adam=T.ScaleByAdam({"head": 0.5, "**": 0.9}, 0.99, {"body": 1e-3, "**": 1e-2}))
    apart = trained(
        head=T.ForParameters("head", T.ScaleByAdam(0.5, 0.99, 1e-2)),
        body=T.ForParameters("body", T.ScaleByAdam(0.9, 0.99, 1e-3)),
    )
    assert_alike(got, apart, 2)


@pytest.mark.parametrize("bucket", [None, "auto"])
def test_a_bound_by_name_of_the_norm_of_all(bucket):
    grads = {"head": jnp.array([3.0]), "body": jnp.array([4.0])}
    tx = T.chain(
        clip=T.ClipByGlobalNorm({"head": 2.5, "body": 1.25}), rate=T.ScaleByLearningRate(1.0)
    )
    step = ol.optimize_loss(linear, learning_rate=None, optimizer=tx, bucket=bucket)
    state, _ = step(step.init({"head": jnp.zeros(1), "body": jnp.zeros(1)}), grads)
    np.testing.assert_allclose(state.params["head"], [-1.5])
    np.testing.assert_allclose(state.params["body"], [-1.0])


def test_numbers_by_name_are_set_by_name():
    link = T.AddWeightDecay({"**/bias": 0.5, "a": 1.0})
    for name in ("weight_decay/**/bias", "link/weight_decay/**/bias", "link/**/bias"):
        assert added(link, values={name: 0.25}) == {"a": 4, "bias": 2, "kernel": 0}
    assert added(link, values={"link/a": None}) == {"a": 4, "bias": 4, "kernel": 0}
    with pytest.raises(ValueError, match=re.escape("`link/a` must be at least 0")):
        added(link, values={"link/a": -1.0})
    with pytest.raises(ValueError, match="No link has a number `link/b`"):
        added(link, values={"link/b": 1.0})


def test_patterns_are_structure_and_their_numbers_are_not():
    made = lambda decay: T.chain(link=T.AddWeightDecay(decay))
    first = made({"a": 0.5})
    same, state = first.with_numbers_of(made({"a": 1.0}), first.init(PARAMS))
    assert same is first
    assert state["link"]["weight_decay/a"] == 1
    for other in ({"b/bias": 0.5}, {re.compile("a"): 0.5}, 0.5):
        with pytest.raises(ValueError, match="must stay"):
            first.with_numbers_of(made(other), first.init(PARAMS))


def test_traced_numbers_by_name():
    def decayed(number):
        tx = T.chain(link=T.AddWeightDecay({"a": number, "b/*": 0.5}))
        return tx.update(STILL, tx.init(PARAMS), PARAMS)[0]

    updates = jax.vmap(decayed)(jnp.array([0.5, 1.0]))
    np.testing.assert_array_equal(updates["a"], [[2.0], [4.0]])
    np.testing.assert_array_equal(updates["b"]["bias"], [[4.0], [4.0]])


NO_PATTERN: Any = {1: 1.0}
BY_NAME: Any = {"a": 1}

WRONG = {
    "nothing": (lambda: T.AddNoise({}), ol.InvalidType, "`scale` must map names or patterns"),
    "no-pattern": (lambda: T.AddNoise(NO_PATTERN), ol.InvalidType, "`scale` must be a pattern"),
    "range": (lambda: T.AddNoise({"a": -1.0}), ValueError, "`scale['a']` must be at least 0"),
    "same": (
        lambda: T.AddNoise({"a": 1.0, re.compile("a"): 1.0}),
        ValueError,
        "`scale` must have different keys",
    ),
    "seed": (lambda: T.AddNoise(1.0, BY_NAME), ol.InvalidType, "`seed` must be an integer"),
    "typo": (
        lambda: added(T.AddWeightDecay({"bais": 1.0})),
        ValueError,
        "`weight_decay` has a pattern that matches no parameter: 'bais'. Nearest names: 'b/bias'",
    ),
    "never": (
        lambda: added(T.AddWeightDecay({"**": 1.0, "a": 1.0})),
        ValueError,
        "`weight_decay` has a pattern that never decides: 'a'",
    ),
    "rate": (
        lambda: T.chain(rate=T.ScaleByLearningRate({"a": 1.0})),
        ol.InvalidType,
        "`learning_rate` of the link 'rate' must be one number",
    ),
    "gate": (
        lambda: T.chain(clip=T.SkipSpikes({"**": 6.0})),
        ol.InvalidType,
        "of the link 'clip' must be one number",
    ),
    "memory": (
        lambda: T.chain(clip=T.ClipByAdaptiveNorm({"**": 6.0})),
        ol.InvalidType,
        "`std_factor` of the link 'clip' must be one number",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_raises(name):
    make, error, says = WRONG[name]
    with pytest.raises(error, match=re.escape(says)):
        make()
