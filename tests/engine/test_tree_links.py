"""Links that see the whole tree."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optimize_loss import transforms as T
from tests.cases import SubtractMean
from tests.engine.by_hand import DESCEND, assert_same, train

# Links that see the whole tree.

NUMBERS = {"a": jnp.array([1.0, 3.0]), "b": jnp.array([4.0, 8.0])}  # of mean 4
DOUBLED = {"m": T.MultiplyGradients({"*": 2.0})}
# Links around one that subtracts the mean, and what they make of NUMBERS.
AROUND = {
    "alone": ({"mean": SubtractMean(1.0)}, [-3, -1], [0, 4]),
    "before": ({"mean": SubtractMean(1.0), **DOUBLED}, [-6, -2], [0, 8]),
    "behind": ({**DOUBLED, "mean": SubtractMean(1.0)}, [-6, -2], [0, 8]),
    "between": ({**DOUBLED, "mean": SubtractMean(1.0), "rate": DESCEND}, [6, 2], [0, -8]),
    "twice": ({"mean": SubtractMean(1.0), "again": SubtractMean(1.0)}, [-3, -1], [0, 4]),
    "half": ({"mean": SubtractMean(0.5)}, [-1, 1], [2, 6]),
    "of-some": ({"mean": T.ForParameters("a", SubtractMean(1.0))}, [-1, 1], [4, 8]),
    "behind-a-gate": ({"gate": T.Accumulate(1), "mean": SubtractMean(1.0)}, [-3, -1], [0, 4]),
    "before-a-gate": ({"mean": SubtractMean(1.0), "gate": T.Accumulate(1)}, [-3, -1], [0, 4]),
}


@pytest.mark.parametrize("case", AROUND.values(), ids=AROUND)
def test_a_link_of_a_user_that_sees_the_whole_tree(case):
    links, a, b = case
    tx = T.chain(**links)
    state = tx.init(NUMBERS)
    updates, after = jax.jit(tx.update)(NUMBERS, state, NUMBERS)
    assert_same(updates, {"a": jnp.array(a, jnp.float32), "b": jnp.array(b, jnp.float32)})
    assert after["mean"]["sum"]["a"] == (8 if next(iter(links)) == "m" else 4)
    assert jax.tree.structure(after) == jax.tree.structure(state)


def test_a_tree_link_trains():
    tx = T.chain(mean=SubtractMean(1.0), rate=T.ScaleByLearningRate(0.5))
    loss = lambda p, x: x * p["a"] + 3 * x * p["b"]  # gradients 1 and 3, less their mean 2
    state, _ = train(tx, loss, [(1.0,)], {"a": 1.0, "b": 1.0})
    assert (state.params["a"], state.params["b"]) == (1.5, 0.5)


def test_a_tree_link_sees_float32_and_no_parameter_without_gradient():
    seen = {}

    @dataclasses.dataclass(frozen=True)
    class Look(T.TreeLink):
        needs = "global_norm"

        def init(self, params):
            return {"kept": jnp.zeros((), jnp.bfloat16)}

        def memory(self):
            return {"norm": 0.0, "calls": 0}

        def scalars(self, numbers, memory, total, step):
            return {"norm": total}, {"norm": total, "calls": memory["calls"] + 1}

        def run(self, updates, slots, params, k):
            seen.update(updates=dict(updates), params=dict(params))
            return {n: u / k["norm"] for n, u in updates.items()}, {"kept": jnp.float32(1.5)}

    tx = T.chain(look=Look(), rate=DESCEND)
    p = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(1, jnp.float16), "i": 3}
    g = {"a": jnp.array([3.0, 4.0], jnp.bfloat16), "b": None, "i": None}
    updates, state = tx.update(g, tx.init(p), p)
    assert {n: x.dtype for n, x in seen["updates"].items()} == {"a": jnp.float32}
    assert {n: x.dtype for n, x in seen["params"].items() if n != "b"} == {"a": jnp.float32}
    np.testing.assert_allclose(updates["a"].astype(jnp.float32), [-0.6, -0.8], rtol=1e-2)
    assert (state["look"]["norm"], state["look"]["calls"], state["look"]["kept"]) == (5, 1, 1.5)
    assert state["look"]["kept"].dtype == jnp.bfloat16


def returning(make):
    """Return a link of a whole tree whose `run` returns what `make` makes."""

    @dataclasses.dataclass(frozen=True)
    class Wrong(T.TreeLink):
        def init(self, params):
            return {"slot": jnp.zeros(2)}

        def run(self, updates, slots, params, k):
            return make(dict(updates), dict(slots))

    return Wrong()


WRONG = {
    "no-pair": (lambda u, s: u, "must return (updates, slots)"),
    "lists": (lambda u, s: (list(u.values()), s), "must return (updates, slots)"),
    "a-name-is-missing": (lambda u, s: ({"a": u["a"]}, s), "must return updates of the shapes"),
    "a-name-is-new": (lambda u, s: ({**u, "c": u["a"]}, s), "must return updates of the shapes"),
    "a-shape": (lambda u, s: ({**u, "a": u["a"][:1]}, s), "must return updates of the shapes"),
    "no-slots": (lambda u, s: (u, {}), "must return slots of the shapes"),
    "a-slot-grows": (lambda u, s: (u, {"slot": jnp.zeros(3)}), "must return slots of the shapes"),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_what_a_tree_link_returns_is_checked(case):
    make, message = case
    tx = T.chain(wrong=returning(make))
    with pytest.raises(ValueError, match=re.escape(message)):
        tx.update(NUMBERS, tx.init(NUMBERS), NUMBERS)


@pytest.mark.parametrize("method", ["before", "after"])
def test_a_tree_link_does_not_run_around_updates(method):
    cls = type("Tree", (SubtractMean,), {method: lambda *args: None})
    with pytest.raises(ValueError, match="must be a `Link` and no `TreeLink`"):
        T.chain(tree=cls(1.0))
