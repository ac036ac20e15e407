"""Links that move parameters themselves: decay, averages, and the rates that they borrow."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optimize_loss import transforms as T
from optimize_loss._checks import TreeMismatch
from tests.cases import SubtractMean
from tests.cases import grads as grads_of
from tests.cases import params as params_of
from tests.engine.by_hand import DESCEND, HALF, RATE, assert_close, assert_same, steps, w

# Decay that comes first.


def adam_with(**decay):
    return T.chain(**decay, adam=T.ScaleByAdam(), rate=T.ScaleByLearningRate(0.1))


def test_decay_first_equals_decoupled_decay_where_the_rule_does_not_read_parameters():
    first = adam_with(decay=T.ShrinkParams(0.3, exclude=("**/bias",)))
    later = T.chain(
        adam=T.ScaleByAdam(),
        decay=T.AddWeightDecay(0.3, exclude=("**/bias",)),
        rate=T.ScaleByLearningRate(0.1),
    )
    every = [grads_of(t) for t in range(5)]
    (got, _), (want, _) = (steps(tx, every, params_of())[-1] for tx in (first, later))
    assert_close(got, want, 3e-7)
    plain, _ = steps(adam_with(), every, params_of())[-1]
    assert_close(got["encoder"]["layer_0"]["bias"], plain["encoder"]["layer_0"]["bias"], 3e-7)
    assert not np.array_equal(got["scale"], plain["scale"])


@pytest.mark.parametrize("how", ["update", "apply"])
def test_a_parameter_that_ftrl_holds_at_zero_stays_zero_under_decay(how):
    rule = T.StepByFtrl(0.1, l1_regularization_strength=10.0)
    tx = T.chain(decay=T.ShrinkParams(0.3), ftrl=rule)
    p = w(0.7, -0.123, 1e-8)
    new, _ = jax.jit(getattr(tx, how))(w(0.1, 0.2, -0.3), tx.init(p), p)
    assert_same(new if how == "apply" else optax.apply_updates(p, new), w(0, 0, 0))


@dataclasses.dataclass(frozen=True)
class Double(T.Link):
    """A rule that reads the parameter: p ← p + 2p - g."""

    reads_params = True

    def leaf(self, update, slots, param, k):
        return 2 * param - update, slots


@dataclasses.dataclass(frozen=True)
class Shift(T.Link):
    """Moves by a number, and reads nothing."""

    by: float

    def before(self, param, k):
        return jnp.full_like(param, k["by"])


# Links, and where they take p = 4 with g = 1.
MOVED = {
    "nothing-reads": ({**HALF, **RATE}, 1.5),
    "a-rule-reads": ({**HALF, "double": Double(), **RATE}, 2 - 1.5),
    "read-before": ({"double": Double(), **HALF, **RATE}, 2 - 3.5),
    "read-twice": ({**HALF, "a": Double(), "b": Double(), **RATE}, 2 - (4 - (4 - 1)) / 2),
    "optax-between": ({**HALF, "optax": optax.identity(), **RATE}, 1.5),
    "optax-reads": ({**HALF, "optax": optax.add_decayed_weights(2.0), **RATE}, 2 - 2.5),
    "optax-last": ({**RATE, **HALF, "optax": optax.scale(2.0)}, 2 - 1),
    "tree-between": ({**HALF, "tree": SubtractMean(0.5), **RATE}, 2 - 0.25),
    "tree-then-read": ({**HALF, "tree": SubtractMean(0.0), "double": Double(), **RATE}, 2 - 1.5),
    "gate-between": ({**HALF, "gate": T.Accumulate(1), **RATE}, 1.5),
    "gate-last": ({**HALF, **RATE, "gate": T.Accumulate(1)}, 1.5),
    "gate-then-read": ({**HALF, "gate": T.Accumulate(1), "double": Double(), **RATE}, 2 - 1.5),
    "average-last": ({**HALF, **RATE, "average": T.AverageParams(0.5, 1)}, (4 + 1.5) / 2),
    "two-moves": ({"a": Shift(1.0), "b": Shift(2.0), **RATE}, 4 + 3 - 0.5),
    "move-then-decay": ({"a": Shift(2.0), **HALF, **RATE}, 3 - 0.5),
    "decay-then-move": ({**HALF, "a": Shift(2.0), **RATE}, 4 - 0.5),
    "move-last": ({**RATE, "a": Shift(2.0)}, 6 - 0.5),
    "some": ({"decay": T.ForParameters("w", T.ShrinkParams(1.0)), **RATE}, 1.5),
    "others": ({"decay": T.ForParameters("x", T.ShrinkParams(1.0)), **RATE}, 3.5),
}


@pytest.mark.parametrize("case", MOVED.values(), ids=MOVED)
def test_moved_parameters(case):
    """`update` gives the whole difference, and `apply` the same."""
    links, wanted = case
    tx = T.chain(**links)
    p, g = {**w(4), "x": jnp.zeros(1)}, {**w(1), "x": jnp.ones(1)}
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        new, state = jax.jit(tx.apply)(g, tx.init(p), p)
        updates, after = jax.jit(tx.update)(g, tx.init(p), p)
    assert_same(new["w"], jnp.array([wanted], jnp.float32))
    assert_same(optax.apply_updates(p, updates), new)
    assert_same(after, state)


@pytest.mark.parametrize("links", [["clip"], ["multiply", "clip"], ["optax", "clip"]])
def test_a_norm_behind_a_decay_is_of_the_gradients_alone(links):
    known = {"multiply": T.MultiplyGradients({"*": 2.0}), "optax": optax.scale(2.0)}
    behind = {n: known.get(n, T.ClipByGlobalNorm(1.0)) for n in links}
    tx = T.chain(decay=T.ShrinkParams(0.5), **behind, seen=T.ObserveNorm(), rate=DESCEND)
    p, state = tx.apply(w(3, 4), tx.init(w(100, 0)), w(100, 0))
    np.testing.assert_allclose(state["seen"]["norm"], 1, rtol=1e-6)
    np.testing.assert_allclose(p["w"], [50 - 0.6, -0.8], rtol=1e-6)


@pytest.mark.parametrize("between", [None, optax.identity(), SubtractMean(0.0), T.Accumulate(1)])
def test_a_bfloat16_parameter_is_rounded_once(between):
    """2⁻⁹ of the decay alone, or 2⁻¹⁰ of the gradient, is no step from 1 to another bfloat16."""
    rate = T.ScaleByLearningRate(2**-9)
    links = {} if between is None else {"between": between}
    tx = T.chain(decay=T.ShrinkParams(1.0), **links, rate=rate)
    p, g = w(1, dtype=jnp.bfloat16), w(0.5, dtype=jnp.bfloat16)
    assert_same(tx.apply(g, tx.init(p), p)[0], w(1 - 2**-8, dtype=jnp.bfloat16))


def test_the_decay_follows_the_rate_of_its_lender():
    rate = lambda step: jnp.where(step == 0, 0.5, 0.25)
    tx = T.chain(decay=T.ShrinkParams(1.0), rate=T.ScaleByLearningRate(rate))
    seen = steps(tx, [w(0), w(0)], w(8))
    assert [float(p["w"][0]) for p, _ in seen] == [4, 3]
    state = tx.set(tx.init(w(8)), learning_rate=0.125, weight_decay=2)
    assert tx.apply(w(0), state, w(8))[0]["w"] == 6


A, B = (functools.partial(T.ForParameters, part) for part in "ab")
# Links of which the first borrows a rate; who lends it, or None where nobody can.
LENDERS = {
    "the-only-one": ({"decay": T.ShrinkParams(0.1), "rate": DESCEND}, True),
    "a-rule": ({"decay": T.ShrinkParams(0.1), "ftrl": T.StepByFtrl(0.1)}, True),
    "the-same-some": ({"decay": A(T.ShrinkParams(0.1)), "a": A(DESCEND), "b": B(DESCEND)}, True),
    "all-for-some": ({"decay": A(T.ShrinkParams(0.1)), "rate": DESCEND}, True),
    "nobody": ({"decay": T.ShrinkParams(0.1)}, False),
    "two": ({"decay": T.ShrinkParams(0.1), "rate": DESCEND, "more": DESCEND}, False),
    "some-for-all": ({"decay": T.ShrinkParams(0.1), "a": A(DESCEND)}, False),
    "others": ({"decay": A(T.ShrinkParams(0.1)), "b": B(DESCEND)}, False),
    "some-and-all": ({"decay": A(T.ShrinkParams(0.1)), "a": A(DESCEND), "all": DESCEND}, False),
    "a-parameter-of-that-name": (
        {"decay": T.ShrinkParams(0.1), "m": T.MultiplyGradients({"learning_rate": 1.0})},
        False,
    ),
}


@pytest.mark.parametrize("case", LENDERS.values(), ids=LENDERS)
def test_a_decay_needs_one_rate(case):
    links, lent = case
    if lent:
        T.chain(**links)
    else:
        with pytest.raises(ValueError, match="'decay' needs the `learning_rate` of one other link"):
            T.chain(**links)


def test_a_decay_needs_the_parameters():
    tx = T.chain(move=Shift(1.0))
    with pytest.raises(ValueError, match="`params` must be given: the link 'move' reads them"):
        tx.update(w(1), tx.init(w(1)))
    with pytest.raises(ValueError, match="matches no parameter: 'bias'"):
        T.chain(decay=T.ShrinkParams(0.1, exclude="bias"), rate=DESCEND).init(w(1))  # pyright: ignore


# Averages to use after training.


def test_averaged_parameters():
    """The average of 8 and 8 - 2 where there is one; all else as it is."""
    average = T.ForParameters(("a", "b"), T.AverageParams(0.5))
    tx = T.chain(rate=DESCEND, average=average)
    p = {
        "a": jnp.array([8.0]),
        "b": jnp.bfloat16(8),
        "c": jnp.ones(1),
        "i": jnp.array(3),
        "n": None,
    }
    g = {"a": jnp.array([2.0]), "b": jnp.bfloat16(2), "c": jnp.ones(1), "i": None, "n": None}
    new, state = tx.apply(g, tx.init(p), p)
    wanted = {**new, "a": jnp.array([7.0]), "b": jnp.bfloat16(7)}
    assert_same(tx.averaged(state, new), wanted)
    assert_same(jax.jit(tx.averaged)(state, new), wanted)
    assert_same(T.chain(rate=DESCEND).averaged(T.chain(rate=DESCEND).init(p), p), p)


@pytest.mark.parametrize("made", [w(1, 2, 3), {"v": jnp.ones(2)}, {"w": jnp.array([1, 2])}])
def test_averages_of_other_parameters_are_refused(made):
    tx = T.chain(average=T.AverageParams(0.5))
    with pytest.raises(TreeMismatch):
        tx.averaged(tx.init(made), w(1, 2))
    with pytest.raises(TreeMismatch, match="this chain's `init`"):
        tx.averaged(T.chain(rate=DESCEND).init(w(1, 2)), w(1, 2))
