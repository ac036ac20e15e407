"""Links for some of the parameters."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optimize_loss as ol
from optimize_loss import transforms as T
from tests.engine.by_hand import DESCEND, assert_close, assert_same

# Links for some parameters.

BODY = {"kernel": jnp.array([[3.0, -4.0]]), "bias": jnp.array([1.0, 2.0])}
TWO = {"body": BODY, "head": {"kernel": jnp.array([[5.0], [6.0]]), "bias": jnp.array([-7.0])}}
LINKS = {
    "body": {
        "before": T.ObserveNorm(),
        "multiply": T.MultiplyGradients({"**/bias": 2.0}),
        "clip": T.ClipByGlobalNorm(1.5),
        "after": T.ObserveNorm(),
        "noise": T.AddNoise(0.1),
        "adam": T.ScaleByAdam(),
        "rate": T.ScaleByLearningRate(0.1),
        "average": T.AverageParams(0.5),
    },
    "head": {
        "each": T.ClipByNorm(0.7),
        "adaptive": T.ClipByAdaptiveNorm(),
        "momentum": T.ScaleByMomentum(0.9),
        "rate": T.ScaleByLearningRate(lambda step: 0.1 / (1 + step.astype(jnp.float32))),
    },
}


def only(part, tree):
    none = lambda subtree: jax.tree.map(lambda _: None, subtree)
    return {name: subtree if name == part else none(subtree) for name, subtree in tree.items()}


def test_two_groups_equal_two_chains():
    """Bit by bit: parameters, slots, norms, noise; and no slots for the others."""
    links = {
        f"{link}_{part}": T.ForParameters(f"{part}/**", x)
        for part in LINKS
        for link, x in LINKS[part].items()
    }
    tx = T.chain(**links)
    p, state = TWO, tx.init(TWO)
    alone = {
        part: (only(part, TWO), T.chain(**LINKS[part]).init(only(part, TWO))) for part in LINKS
    }
    for t in range(3):
        g = jax.tree.map(jnp.cos, jax.tree.map(lambda x, t=t: x + t, TWO))
        p, state = tx.apply(g, state, p)
        for part, (own, own_state) in alone.items():
            alone[part] = T.chain(**LINKS[part]).apply(only(part, g), own_state, own)
    for part, (own, own_state) in alone.items():
        assert_same(p[part], own[part])
        assert_same(
            {n: state[f"{n}_{part}"] for n in LINKS[part]}, {n: own_state[n] for n in LINKS[part]}
        )
    assert state["adam_body"]["m"]["head"] == {"kernel": None, "bias": None}


def test_groups_inside_vmap():
    tx = T.chain(one=T.ForParameters("body/**", T.ScaleByAdam()), rate=T.ScaleByLearningRate(0.1))
    states = [tx.set(tx.init(TWO), beta_1=b) for b in (0.9, 0.5)]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *states)
    p, after = jax.jit(jax.vmap(tx.apply, in_axes=(None, 0, None)))(TWO, stacked, TWO)
    for i, state in enumerate(states):
        want = tx.apply(TWO, state, TWO)
        assert_close(jax.tree.map(lambda x, i=i: x[i], (p, after)), want)


def test_numbers_of_a_group_are_set_by_their_names():
    groups = {part: T.ForParameters(f"{part}/**", T.ScaleByLearningRate(0.5)) for part in TWO}
    tx = T.chain(**groups, clip=T.ForParameters("head/*", T.ClipByValue(9.0)))
    state = tx.set(tx.init(TWO), max_value=8.0, **{"head/learning_rate": 0.25})
    updates, _ = tx.update(TWO, state, TWO)
    assert_same(updates["body"]["bias"], -0.5 * TWO["body"]["bias"])
    assert_same(updates["head"]["bias"], -0.25 * TWO["head"]["bias"])
    assert (tx.numbers_named("learning_rate", state)["body"], state["clip"]["max_value"]) == (
        0.5,
        8,
    )
    with pytest.raises(ValueError, match=re.escape("['body/learning_rate', 'head/learning_rate']")):
        tx.set(state, learning_rate=1.0)


BAD_GROUPS = {
    "no-name": (lambda: T.chain(x=T.ForParameters("haed/**", DESCEND)).init(TWO), "'head/bias'"),
    "one-of-two": (
        lambda: T.chain(x=T.ForParameters(("head/**", "tail"), DESCEND)).init(TWO),
        "tail",
    ),
    "none": (
        lambda: T.chain(x=T.ForParameters(lambda n, p: p.ndim == 3, DESCEND)).init(TWO),
        "for a par",
    ),
    "integers": (
        lambda: T.chain(x=T.ForParameters("i", DESCEND)).init({"i": 1, "w": 1.0}),
        "for a par",
    ),
    "at-update": (
        lambda: T.chain(x=T.ForParameters("head/**", DESCEND)).update(
            {"w": 1.0}, T.chain(x=T.ForParameters("w", DESCEND)).init({"w": 1.0})
        ),
        "matches no parameter",
    ),
    "gate": (lambda: T.ForParameters("w", T.Accumulate(2)), "no gate"),
    "scale": (lambda: T.ForParameters("w", T.DivideByLossScale(2.0)), "no loss scale"),
    "optax": (lambda: T.ForParameters("w", optax.trace(0.9)), "must be a `Link`"),  # pyright: ignore
    "where": (lambda: T.ForParameters(3, DESCEND), "must be a pattern"),  # pyright: ignore
    "chain": (lambda: T.chain(x=T.ForParameters), "must be an instance"),
}


@pytest.mark.parametrize("case", BAD_GROUPS.values(), ids=BAD_GROUPS)
def test_groups_that_are_refused(case):
    wrong, message = case
    with pytest.raises(ValueError, match=re.escape(message)):
        wrong()


def test_a_group_that_is_not_trained_is_refused():
    tx = T.chain(x=T.ForParameters("body/**", DESCEND), y=T.ForParameters("head/**", DESCEND))
    step = ol.optimize_loss(lambda p: jnp.sum(p["head"]["bias"]), optimizer=tx, variables="head/**")
    with pytest.raises(ValueError, match="matches no parameter: 'body/"):
        step.init(TWO)


CLIP_A = T.ForParameters("a", T.ClipByGlobalNorm(1.0))
# What stands before a clip to norm 1 of `a` alone; gradients of `a`; those of `b`, which pass; and
# the norm that the clip sees.
CLIPPED = {
    "alone": ({}, [3.0, 4.0], 7.0, 5.0),
    "multiplied": ({"m": T.MultiplyGradients({"a": 2.0, "b": 100.0})}, [3.0, 4.0], 7.0, 10.0),
    "multiplied-back": ({"m": T.MultiplyGradients({"a": 0.1})}, [3.0, 4.0], 7.0, 0.5),
    "rate-of-a": ({"m": T.ForParameters("a", T.ScaleByLearningRate(3.0))}, [3.0, 4.0], 7.0, 15.0),
    "rate-of-b": ({"m": T.ForParameters("b", T.ScaleByLearningRate(3.0))}, [3.0, 4.0], 7.0, 5.0),
    "both": (
        {
            "m": T.ForParameters("b", T.ScaleByLearningRate(3.0)),
            "n": T.MultiplyGradients({"b": 1e30}),
            "o": T.ForParameters("a", T.MultiplyGradients({"a": 0.5})),
        },
        [3.0, 4.0],
        7.0,
        2.5,
    ),
    "value-of-b": ({"m": T.ForParameters("b", T.ClipByValue(1.0))}, [3.0, 4.0], 7.0, 5.0),
    "value-of-a": ({"m": T.ForParameters("a", T.ClipByValue(3.0))}, [3.0, 4.0], 7.0, 18**0.5),
    "clip-of-b": ({"m": T.ForParameters("b", T.ClipByGlobalNorm(1.0))}, [3.0, 4.0], 7.0, 5.0),
    "huge": ({}, [3e30, 4e30], 7.0, 5e30),
    "huge-others": ({}, [3.0, 4.0], 7e30, 5.0),
    "huge-and-multiplied": ({"m": T.MultiplyGradients({"a": 1e-30})}, [3e30, 4e30], 7e30, 5.0),
    "multiplied-to-huge": ({"m": T.MultiplyGradients({"a": 1e30})}, [3.0, 4.0], 7e30, 5e30),
    "tiny": ({"m": T.MultiplyGradients({"a": 1e30})}, [3e-30, 4e-30], 7e30, 5.0),
}


@pytest.mark.parametrize("case", CLIPPED.values(), ids=CLIPPED)
def test_a_norm_in_a_group_counts_its_parameters_alone(case):
    before, a, b, norm = case
    seen = T.ForParameters("a", T.ObserveNorm())
    tx, prefix = T.chain(**before, seen=seen, clip=CLIP_A), T.chain(**before, end=T.ObserveNorm())
    g = {"a": jnp.array(a), "b": jnp.array([b])}
    updates, state = jax.jit(tx.update)(g, tx.init(g), g)
    unclipped, _ = jax.jit(prefix.update)(g, prefix.init(g), g)
    np.testing.assert_allclose(state["seen"]["norm"], norm, rtol=1e-6)
    np.testing.assert_allclose(updates["a"], unclipped["a"] / max(norm, 1), rtol=1e-6)
    assert_same(updates["b"], unclipped["b"])


def test_a_norm_over_all_behind_a_factor_for_some():
    """√((2·3)² + 8²) = 10."""
    tx = T.chain(some=T.ForParameters("a", T.ScaleByLearningRate(2.0)), seen=T.ObserveNorm())
    g = {"a": jnp.array([3.0]), "b": jnp.array([8.0])}
    assert tx.update(g, tx.init(g), g)[1]["seen"]["norm"] == 10


def test_a_pattern_whose_parameter_has_no_gradient_is_no_error():
    """It was matched when the state was made; the others are treated as ever."""
    tx = T.chain(
        multiply=T.MultiplyGradients({"a": 2.0, "b": 3.0}),
        decay=T.AddWeightDecay(1.0, exclude=("a",)),
        some=T.ForParameters("a", T.ClipByGlobalNorm(1.0)),
    )
    p = {"a": jnp.ones(1), "b": jnp.ones(1)}
    updates, _ = tx.update({"a": None, "b": jnp.ones(1)}, tx.init(p), p)
    assert updates["a"] is None
    assert updates["b"] == 4


# What must come last: the average of some, and a link behind it for some.
BEHIND_AN_AVERAGE = {
    "the-same": ("a", "a", True),
    "all-after-some": ("a", None, True),
    "some-after-all": (None, "a", True),
    "overlapping": (("a", "b"), lambda name, p: name == "b", True),
    "others": ("a", "b", False),
    "others-by-function": ("a", lambda name, p: name == "b", False),
}


@pytest.mark.parametrize("case", BEHIND_AN_AVERAGE.values(), ids=BEHIND_AN_AVERAGE)
def test_nothing_changes_a_parameter_behind_its_average(case):
    *wheres, refused = case
    links = [T.AverageParams(0.5), T.ScaleByLearningRate(0.1)]
    average, rate = (
        link if where is None else T.ForParameters(where, link)
        for where, link in zip(wheres, links, strict=True)
    )
    p = {"a": 1.0, "b": 2.0}
    if refused:
        with pytest.raises(ValueError, match="'average' must come last"):
            T.chain(average=average, rate=rate).init(p)
    else:
        T.chain(average=average, rate=rate).init(p)
    with pytest.raises(ValueError, match="must come last"):
        T.chain(average=T.AverageParams(0.5), gate=T.DivideByDynamicLossScale())
