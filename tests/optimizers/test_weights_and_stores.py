"""Weights and stores of an optimizer are read, written, and refused where they do not fit."""

from typing import Any

import numpy as np
import pytest

import optimize_loss as ol
from tests.optimizers.stepped import (
    ADORNED,
    INVALID,
    SHAPE,
    VALUE,
    B,
    W,
    assert_equal,
    assert_same_state,
    optim,
    pairs,
    state_of,
    stepped,
    values,
    variables,
)

# Weights, files.


def test_set_weights():
    optimizer, made = stepped(optim.Adam(0.1))
    weights = [3, *(np.full(v.shape, i + 1.0) for i, v in enumerate(optimizer.variables[1:]))]
    optimizer.set_weights(weights)
    assert_equal(values(optimizer.variables), weights)
    other, others = optim.Adam(0.1), [ol.Variable(v, v.name) for v in made]
    other.build(others)
    other.set_weights(optimizer.variables)
    optimizer.apply_gradients(pairs(made))
    other.apply_gradients(pairs(others))
    assert_equal(values(made), values(others))
    other.set_weights(iter(optimizer.variables))


BAD_WEIGHTS = {
    "too-few": (
        [0],
        VALUE,
        "`weights` must be as many as the optimizer has variables, 5. Received: 1",
    ),
    "shape": ([0, np.ones(3)] + [np.ones(2)] * 3, SHAPE, "'adam/m/w' must keep its shape (2,)"),
    "dtype": ([0.5] + [np.ones(2)] * 4, INVALID, "'iteration' must keep its dtype int32"),
    "last": ([7, W, B, W, W], SHAPE, "'adam/v/b' must keep its shape ()"),
    "text": ([7, "a", B, W, B], INVALID, "`value` must be an array or a number"),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_bad_weights_change_nothing(name):
    weights, error, message = BAD_WEIGHTS[name]
    optimizer, _ = stepped(optim.Adam(0.1))
    before = values(optimizer.variables)
    with pytest.raises(error) as caught:
        optimizer.set_weights(weights)
    assert message in str(caught.value)
    assert_equal(values(optimizer.variables), before)


class Group:
    """The part of `h5py.Group` that is needed: paths make groups, arrays are copied."""

    def __init__(self):
        self.inside: dict[str, Any] = {}

    def keys(self):
        return self.inside.keys()

    def __iter__(self):
        return iter(self.inside)

    def __getitem__(self, path):
        first, _, rest = path.partition("/")
        return self.inside[first][rest] if rest else self.inside[first]

    def __setitem__(self, path, value):
        first, _, rest = path.partition("/")
        if rest:
            self.inside.setdefault(first, Group())[rest] = value
        else:
            self.inside[first] = Dataset(np.array(value))


class Dataset:
    """What a group gives in place of arrays."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def __array__(self, dtype=None, copy=None):
        return np.array(self.array, dtype)


@pytest.mark.parametrize("make_store", [dict, Group])
def test_saved_and_loaded(make_store):
    options: dict[str, Any] = {"amsgrad": True, **ADORNED}
    optimizer, made = stepped(optim.Adam(0.1, **options), times=3)
    store = make_store()
    optimizer.save_own_variables(store)
    other, others = optim.Adam(0.1, **options), [ol.Variable(v, v.name) for v in made]
    other.build(others)
    other.load_own_variables(store)
    assert_same_state(state_of(other), state_of(optimizer))
    for _ in range(2):
        optimizer.apply_gradients(pairs(made))
        other.apply_gradients(pairs(others))
    assert_equal(values(made), values(others))
    assert_same_state(state_of(other), state_of(optimizer))


def test_what_is_saved_is_a_copy():
    optimizer, made = stepped(optim.Adam(0.1))
    store: dict[str, Any] = {}
    optimizer.save_own_variables(store)
    before = {name: x.copy() for name, x in store.items()}
    optimizer.apply_gradients(pairs(made))
    assert list(store) == [v.name for v in optimizer.variables]
    assert_equal(store.values(), before.values())


def edited(**changes):
    optimizer, _ = stepped(optim.Adam(0.1))
    store: dict[str, Any] = {}
    optimizer.save_own_variables(store)
    for name, value in changes.items():
        name = name.replace("__", "/")
        if value is None:
            del store[name]
        else:
            store[name] = value
    return store


MISMATCH = {
    "missing": (lambda: edited(adam__m__w=None), "Missing: ['adam/m/w']. Extra: []."),
    "extra": (lambda: edited(adam__x=W), "Missing: []. Extra: ['adam/x']."),
    "shape": (
        lambda: edited(adam__v__b=W),
        "The variable 'adam/v/b' must have the shape and dtype",
    ),
    "dtype": (lambda: edited(adam__v__b=np.float64(1)), "Received: ((), dtype('float64'))."),
    "counter": (lambda: edited(iteration=np.float32(1)), "'iteration' must have the shape and dt"),
    "number": (lambda: edited(adam__v__b=1.0), "'adam/v/b' must have the shape and dtype"),
    "text": (lambda: edited(adam__v__b="a"), "'adam/v/b' must have the shape and dtype"),
    "empty": (dict, "Missing: ['adam/m/b', 'adam/m/w', 'adam/v/b', 'adam/v/w', 'iteration']."),
}


@pytest.mark.parametrize("name", MISMATCH)
def test_what_is_not_this_optimizers_is_not_loaded(name):
    make, message = MISMATCH[name]
    optimizer, _ = stepped(optim.Adam(0.1), times=2)
    before = values(optimizer.variables)
    with pytest.raises(ol.CheckpointMismatch) as caught:
        optimizer.load_own_variables(make())
    assert message in str(caught.value)
    assert_equal(values(optimizer.variables), before)


def test_a_store_is_a_mapping():
    optimizer, _ = stepped(optim.Adam(0.1))
    with pytest.raises(ol.InvalidType, match="`store` must be a mapping of arrays"):
        optimizer.load_own_variables([1.0])


UNBUILT = {
    "set_weights": lambda o: o.set_weights([]),
    "save_own_variables": lambda o: o.save_own_variables({}),
    "load_own_variables": lambda o: o.load_own_variables({}),
    "finalize_variable_values": lambda o: o.finalize_variable_values(variables()),
}


@pytest.mark.parametrize("name", UNBUILT)
def test_what_needs_variables_says_so(name):
    with pytest.raises(ValueError, match=f"`{name}` needs the optimizer's variables: call `build"):
        UNBUILT[name](optim.Adam(0.1))
