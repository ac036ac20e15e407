"""Names of parameters in every kind of tree, and patterns."""

import dataclasses
import re
from typing import Any, NamedTuple

import equinox
import haiku
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import optimize_loss as ol
from optimize_loss._names import first_matches, leaf_names, matching


class Pair(NamedTuple):
    left: Any
    right: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Attention:
    query: Any
    key: Any
    value: Any


class Box(nnx.Module):
    def __init__(self):
        self.inner = nnx.Linear(2, 3, rngs=nnx.Rngs(0))


def linen_params():
    return linen.Dense(3).init(jax.random.key(0), jnp.ones((1, 2)))["params"]


def equinox_params():
    model = equinox.nn.Linear(2, 3, key=jax.random.key(0))
    return equinox.partition(model, equinox.is_inexact_array)[0]


def haiku_params():
    net = haiku.without_apply_rng(haiku.transform(lambda x: haiku.nets.MLP([3])(x)))
    return net.init(jax.random.key(0), jnp.ones((1, 2)))


TREES = {
    "dict": ({"a": {"b": 1.0}, "c": 2.0}, ["a/b", "c"]),
    "list-and-tuple": ([1.0, (2.0, 3.0)], ["0", "1/0", "1/1"]),
    "named-tuple": (Pair(1.0, {"w": 2.0}), ["left", "right/w"]),
    "dataclass": ({"attn": Attention(1.0, 2.0, 3.0)}, ["attn/query", "attn/key", "attn/value"]),
    "nnx": (nnx.state(Box(), nnx.Param), ["inner/bias", "inner/kernel"]),
    "linen": (linen_params(), ["bias", "kernel"]),
    "equinox": (equinox_params(), ["weight", "bias"]),
    "haiku": (haiku_params(), ["mlp/~/linear_0/b", "mlp/~/linear_0/w"]),
    "integer-keys": ({0: 1.0, 1: 2.0}, ["0", "1"]),
    "none": ({"a": None, "b": 1.0}, ["b"]),
    "array": (1.0, ["params"]),
    "empty": ({}, []),
}


@pytest.mark.parametrize("name", TREES)
def test_names(name):
    tree, names = TREES[name]
    assert leaf_names(tree) == names


NAMES = ["body/0/bias", "body/0/kernel", "head/bias", "scale"]
PATTERNS = [
    ("scale", [3]),
    ("scale:0", [3]),
    ("head/*", [2]),
    ("*/bias", [2]),
    ("**/bias", [0, 2]),
    ("**", [0, 1, 2, 3]),
    ("body/**", [0, 1]),
    ("body/**/kernel", [1]),
    ("head/* | scale", [2, 3]),
    (re.compile("b.as$"), [0, 2]),
]


@pytest.mark.parametrize("pattern", ["dense/bias:0", "**/bias:0", "*/b*:0", "**:0", "x|**/bias:0"])
def test_a_pattern_of_tensorflow_matches_names_of_tensorflow(pattern):
    names = ["dense/bias:0", "dense/kernel:0"]
    assert matching(pattern, names) == [True, pattern == "**:0"]


def _loss(params, batch):
    return sum(jnp.sum(x) for x in jax.tree.leaves(params)) * sum(jax.tree.leaves(batch))


MIXED = {"body": [{1: np.ones(2, np.float32), "a": np.ones(2, np.float32)}]}
ONE = {"w": np.ones(2, np.float32)}
STEP = ol.optimize_loss(_loss, learning_rate=0.1)
CHAIN = ol.transforms.chain(rate=ol.transforms.ScaleByLearningRate(0.1))
MIXED_KEYS = {
    "init": lambda: STEP.init(MIXED),
    "explain": lambda: STEP.explain(MIXED),
    "chain": lambda: CHAIN.init(MIXED),
    "updates": lambda: CHAIN.update(MIXED, CHAIN.init(ONE), ONE),
    "optimizer": lambda: ol.optimizers.SGD(0.1).init(MIXED),
    "apply": lambda: ol.optimizers.SGD(0.1).apply(MIXED, MIXED),
    "step": lambda: STEP(STEP.init(ONE), MIXED),
    "many": lambda: STEP.many(STEP.init(ONE), MIXED),
    "run": lambda: STEP.run(STEP.init(ONE), [MIXED]),
}


@pytest.mark.parametrize("call", MIXED_KEYS)
def test_keys_that_cannot_be_sorted_are_named(call):
    with pytest.raises(ol.InvalidType, match=r"the keys \[1, 'a'\] at .*\['body'\]\[0\]"):
        MIXED_KEYS[call]()


@pytest.mark.parametrize(("pattern", "hits"), PATTERNS)
def test_patterns(pattern, hits):
    chosen = first_matches("variables", [pattern], NAMES)
    assert [i for i, p in enumerate(chosen) if p is not None] == hits


def test_the_first_pattern_that_matches_decides():
    assert first_matches("x", ["head/bias", "**/bias"], NAMES) == [
        "**/bias",
        None,
        "head/bias",
        None,
    ]
    with pytest.raises(ValueError, match=r"never decides: 'head/bias'"):
        first_matches("x", ["**/bias", "head/bias"], NAMES)


BIAS = {"nnx": "**/bias", "linen": "bias", "equinox": "bias", "haiku": "**/b"}


@pytest.mark.parametrize("framework", BIAS)
def test_a_model_of_any_framework_trains_by_names(framework):
    params, names = TREES[framework]

    def loss(params):
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params))

    step = ol.optimize_loss(
        loss, learning_rate=1.0, optimizer="SGD", gradient_multipliers={BIAS[framework]: 3.0}
    )
    state, _ = step(step.init(params))
    moved = jax.tree.map(lambda new, old: jnp.mean(old - new), state.params, params)
    expected = [3.0 if name.endswith(("b", "bias")) else 1.0 for name in names]
    assert [round(float(m), 4) for m in jax.tree.leaves(moved)] == expected
    assert type(state.params) is type(params)
