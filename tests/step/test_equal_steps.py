"""A step that is built again, as by a cell of a notebook, takes the state of the first one."""

import dataclasses
import functools
import pickle
import re
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optimize_loss as ol
from optimize_loss import transforms as T
from optimize_loss._engine.equal import same, structural_hash
from tests.cases import CASES

PARAMS = {"w": jnp.ones(3), "b": jnp.ones(2)}


@pytest.fixture(autouse=True)
def as_users_write_schedules():
    """They divide by an integer step, which strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def loss(params):
    return sum(jnp.sum(x**2) for x in params.values())


def halves(params):
    return jax.tree.map(lambda x: x.ndim > 1, params)


LABELS = {"w": "a", "b": "b"}
BUILT = {
    "lambda": lambda: {"learning_rate": lambda step: 0.1 / (1.0 + step)},
    "partial": lambda: {"learning_rate": functools.partial(lambda a, step: a / (1.0 + step), 0.1)},
    "optax-schedule": lambda: {"learning_rate": optax.warmup_cosine_decay_schedule(0.0, 1.0, 2, 9)},
    "optax-joined": lambda: {
        "learning_rate": optax.join_schedules(
            [optax.constant_schedule(1.0), optax.linear_schedule(1.0, 0.0, 5)], [3]
        )
    },
    "contrib-decay": lambda: {
        "learning_rate": 0.1,
        "learning_rate_decay_fn": lambda rate, step: rate * 0.9**step,
    },
    "contrib-clip": lambda: {
        "learning_rate": 0.1,
        "clip_gradients": lambda pairs: [(g / 2, p) for g, p in pairs],
    },
    "optax": lambda: {"optimizer": optax.adamw(optax.linear_schedule(0.1, 0.0, 5), mask=halves)},
    "optax-chain": lambda: {"optimizer": optax.chain(optax.clip(1.0), optax.lion(0.1))},
    "optax-parts": lambda: {
        "optimizer": optax.multi_transform({"a": optax.adam(0.1), "b": optax.sgd(0.1)}, LABELS)
    },
    "in-a-rule": lambda: {
        "learning_rate": 0.1,
        "rules": {"b": {"optimizer": optax.sgd(0.1)}},
    },
}


def built(name):
    options: Any = BUILT[name]()
    return ol.optimize_loss(loss, **options)


@pytest.mark.parametrize("name", BUILT)
def test_a_step_built_again_takes_the_state(name):
    first, second = built(name), built(name)
    assert first.chain == second.chain
    assert hash(first.chain) == hash(second.chain)
    one, _ = first(first.init(PARAMS))
    two, _ = second(second.init(PARAMS))
    assert jax.tree.structure(one) == jax.tree.structure(two)
    state, _ = second(one)
    wanted, _ = second(two)
    jax.tree.map(np.testing.assert_array_equal, state.params, wanted.params)


def test_a_state_of_an_equal_step_is_one_program():
    """And its chain is that of the step from then on, so that nothing is compared again."""
    traced = []

    def counted(params):
        traced.append(1)
        return loss(params)

    def build():
        return ol.optimize_loss(counted, learning_rate=lambda step: 0.1 / (1.0 + step))

    first, second = build(), build()
    state, _ = second(second.init(PARAMS))
    state, _ = second(first.init(PARAMS))
    assert len(traced) == 1
    assert state.chain is second.chain


def test_functions_that_differ_are_refused_with_a_way_on():
    def build(power):
        return ol.optimize_loss(loss, learning_rate=lambda step: 0.1 / (1.0 + step) ** power)

    step, state = build(2), build(1).init(PARAMS)
    with pytest.raises(ol.TreeMismatch, match=re.escape("(state, chain=step.chain)")):
        step(state)
    step(dataclasses.replace(state, chain=step.chain))


class Slope:
    def __init__(self, by):
        self.by = by

    def at(self, x):
        return self.by * x


@dataclasses.dataclass(frozen=True)
class Scale:
    by: float
    function: Any

    def __call__(self, x):
        return self.by * self.function(x)


SLOPE = Slope(2.0)
TABLE = np.arange(3.0)


def recursive(depth):
    def fall(n):
        return fall(n - 1) + depth if n else 0

    return fall


def with_default(x, by=1.0):
    return x * by


def keyword(by):
    def function(x, *, by=by):
        return x * by

    return function


def nested(by):
    return lambda x: (lambda y: y * by)(x)


def decorated(by):
    @functools.wraps(with_default)
    def function(x):
        return with_default(x, by)

    return function


EQUAL = {
    "no-closure": lambda: lambda x: x + 1,
    "closure": lambda: keyword(2.0),
    "nested": lambda: nested(2.0),
    "array-in-a-closure": lambda: nested(np.arange(3.0)),
    "jax-array-in-a-closure": lambda: nested(jnp.arange(3.0)),
    "key-in-a-closure": lambda: nested(jax.random.key(1)),
    "list-in-a-closure": lambda: nested([1, (2.0, "a")]),
    "dict-in-a-closure": lambda: nested({"a": lambda x: x}),
    "nan-in-a-closure": lambda: nested(float("nan")),
    "recursive": lambda: recursive(1),
    "wrapped": lambda: decorated(2.0),
    "partial": lambda: functools.partial(with_default, by=2.0),
    "method": lambda: SLOPE.at,
    "builtin": lambda: abs,
    "ufunc": lambda: np.sin,
    "dataclass": lambda: Scale(2.0, lambda x: x),
    "array-in-a-dataclass": lambda: Scale(2.0, TABLE.copy()),
}


@pytest.mark.parametrize("name", EQUAL)
def test_made_twice_is_the_same(name):
    one, two = EQUAL[name](), EQUAL[name]()
    assert same(one, two)
    assert structural_hash(one) == structural_hash(two)


def of_module(name, text, **names):
    """Return the function `f` of a module of this text."""
    module = types.ModuleType(name)
    vars(module).update(names)
    exec(text, vars(module))
    return vars(module)["f"]


READS = "def f(x): return K * x"
CALLS = "def g(x): return {} * x\ndef f(x): return g(x)"
DIFFER = {
    "code": (lambda x: x + 1, lambda x: x + 2),
    "type-of-a-constant": (lambda x: x * 1, lambda x: x * 1.0),
    "sign-of-zero": (nested(0.0), nested(-0.0)),
    "closure": (nested(1.0), nested(2.0)),
    "type-in-a-closure": (nested(1), nested(True)),
    "dtype-in-a-closure": (nested(np.float32(1)), nested(np.float64(1))),
    "array-in-a-closure": (nested(np.zeros(2)), nested(np.ones(2))),
    "shape-in-a-closure": (nested(np.zeros((2, 1))), nested(np.zeros((1, 2)))),
    "kind-of-array": (nested(np.zeros(2, np.float32)), nested(jnp.zeros(2))),
    "function-in-a-closure": (nested(lambda x: x), nested(lambda x: -x)),
    "keyword-default": (keyword(1.0), keyword(2.0)),
    "partial": (functools.partial(with_default, by=1.0), functools.partial(with_default, by=2.0)),
    "partial-and-function": (functools.partial(with_default), with_default),
    "methods-of-two": (Slope(1.0).at, Slope(1.0).at),
    "builtins": (abs, round),
    "dataclasses": (Scale(1.0, abs), Scale(2.0, abs)),
    "order-of-a-dict": (nested({"a": 1, "b": 2}), nested({"b": 2, "a": 1})),
    "modules": (of_module("a", READS, K=1.0), of_module("b", READS, K=1.0)),
    "globals": (of_module("a", READS, K=1.0), of_module("a", READS, K=2.0)),
    "missing-global": (of_module("a", READS, K=1.0), of_module("a", READS)),
    "called": (of_module("a", CALLS.format(1.0)), of_module("a", CALLS.format(2.0))),
    "instances": (object(), object()),
}


@pytest.mark.parametrize("name", DIFFER)
def test_what_may_do_something_else_is_not_the_same(name):
    one, two = DIFFER[name]
    assert same(one, one)
    assert not same(one, two)
    assert not same(two, one)


def test_a_function_that_came_from_another_process_is_the_same():
    """Its module is then another dict, in which the names that it reads stand for the same."""
    one, two = (of_module("a", "\n" + CALLS.format(2.0)), of_module("a", CALLS.format(2.0)))
    assert one.__globals__ is not two.__globals__
    assert same(one, two)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_chains_with_other_numbers_differ(case):
    assert same(case.chain, case.chain)
    assert (case.chain == case.other) == (not case.numbers)
    if case.is_value:
        again = pickle.loads(pickle.dumps(case.chain))
        assert again == case.chain
        assert hash(again) == hash(case.chain)


def test_what_was_equal_stays_equal():
    """Among fields of links, 1 is 1.0, and the order of a dict does not count."""

    @dataclasses.dataclass(frozen=True)
    class Kept(T.Link):
        what: Any = None

    assert T.chain(a=Kept(1)) == T.chain(a=Kept(1.0))
    assert T.chain(a=Kept({"a": 1, "b": 2})) == T.chain(a=Kept({"b": 2, "a": 1}))
    assert hash(T.chain(a=Kept(1))) == hash(T.chain(a=Kept(1.0)))
    assert T.chain(a=Kept()) != T.chain(b=Kept())
    assert T.chain(a=Kept(np.ones(2))) == T.chain(a=Kept(np.ones(2)))
