"""Variables that are added to an optimizer, by its class or by hand."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import optimize_loss as ol
from tests.optimizers.stepped import INVALID, SHAPE, VALUE, W, optim, stepped

# Adding variables.


class Bare(optim.SGD):
    """An optimizer to add variables to."""


ADDED = {
    "scalar": (lambda o, v: o.add_variable(), ("variable", (), "float32", 0.0)),
    "list": (lambda o, v: o.add_variable([2], name="x"), ("x", (2,), "float32", 0.0)),
    "array": (lambda o, v: o.add_variable(np.array([2, 1])), ("variable", (2, 1), "float32", 0.0)),
    "ones": (lambda o, v: o.add_variable((), "int32", "ones"), ("variable", (), "int32", 1)),
    "case": (lambda o, v: o.add_variable(initializer="Ones"), ("variable", (), "float32", 1.0)),
    "function": (
        lambda o, v: o.add_variable((2,), initializer=lambda s, d: jnp.full(s, 3, d)),
        ("variable", (2,), "float32", 3.0),
    ),
    "like": (lambda o, v: o.add_variable_from_reference(v, "m"), ("m/w", (2,), "float32", 0.0)),
    "shape": (lambda o, v: o.add_variable_from_reference(v, "m", ()), ("m/w", (), "float32", 0.0)),
    "initial": (
        lambda o, v: o.add_variable_from_reference(v, "m", initial_value=[3, 3]),
        ("m/w", (2,), "float32", 3.0),
    ),
}


@pytest.mark.parametrize("name", ADDED)
def test_added_variables(name):
    add, (expected, shape, dtype, value) = ADDED[name]
    v = add(Bare(), ol.Variable(W, "w"))
    assert (v.name, v.shape, str(v.dtype)) == (expected, shape, dtype)
    np.testing.assert_array_equal(v.value, np.full(shape, value))


BAD_VARIABLES = {
    "initializer": (lambda o, v: o.add_variable(initializer="glorot"), VALUE, "`initializer` must"),
    "initial-shape": (
        lambda o, v: o.add_variable((2,), initializer=lambda s, d: jnp.ones(3)),
        SHAPE,
        "`initializer` must return an array of the shape (2,). Received: (3,).",
    ),
    "shape": (
        lambda o, v: o.add_variable(3),
        INVALID,
        "`shape` must be integers. Received: shape=3",
    ),
    "lengths": (lambda o, v: o.add_variable((1.5,)), INVALID, "`shape` must be integers."),
    "negative": (lambda o, v: o.add_variable((-1,)), VALUE, "`shape` must be at least 0"),
    "dtype": (lambda o, v: o.add_variable((), "real"), INVALID, "`dtype` must be a dtype."),
    "name": (lambda o, v: o.add_variable(name=3), INVALID, "`name` must be text."),
    "reference": (
        lambda o, v: o.add_variable_from_reference(W, "m"),
        INVALID,
        "`model_variable` must be a `Variable`",
    ),
    "prefix": (
        lambda o, v: o.add_variable_from_reference(v, 3),
        INVALID,
        "`variable_name` must be text. Received: variable_name=3.",
    ),
    "value": (
        lambda o, v: o.add_variable_from_reference(v, "m", initial_value="a"),
        INVALID,
        "`initial_value` must be an array or a number.",
    ),
    "value-shape": (
        lambda o, v: o.add_variable_from_reference(v, "m", shape=(3,), initial_value=1.0),
        SHAPE,
        "`initial_value` must have the shape (3,). Received: ().",
    ),
    "twice": (
        lambda o, v: [o.add_variable_from_reference(v, "m") for _ in range(2)],
        VALUE,
        "`name` must differ from those of the optimizer's other variables, ['m/w'].",
    ),
}


@pytest.mark.parametrize("name", BAD_VARIABLES)
def test_bad_variables(name):
    add, error, message = BAD_VARIABLES[name]
    with pytest.raises(error) as caught:
        add(Bare(), ol.Variable(W, "w"))
    assert message in str(caught.value)


def test_variables_added_to_an_optimizer_made_of_links_are_saved():
    class WithCount(optim.SGD):
        def build(self, var_list):
            super().build(var_list)
            self.seen = self.add_variable(name="seen")

        def apply_gradients(self, grads_and_vars, *args, **kwargs):
            result = super().apply_gradients(grads_and_vars, *args, **kwargs)
            self.seen.assign_add(1.0)
            return result

    optimizer, _ = stepped(WithCount(0.1), times=2)
    store: dict[str, Any] = {}
    optimizer.save_own_variables(store)
    assert store["seen"] == 2.0
    assert optimizer.variables[-1] is optimizer.seen
