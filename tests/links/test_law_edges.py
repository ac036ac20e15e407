"""What holds for every link and every chain at zero, without gradients, and for complex numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optimize_loss import transforms
from optimize_loss._names import leaf_names
from tests.cases import (
    CASES,
    LOSS,
    SMALL_SHAPES,
    random_like,
)
from tests.links.law import assert_close, assert_finite, assert_same, avals, law, law_where, run

# Edges.


@pytest.mark.slow
@law_where("smooth_at_zero")
def test_derivatives_at_zero_are_finite(case):
    """With respect to the gradients, and to the numbers in the state that are real."""
    p = case.random_like(SMALL_SHAPES, 0)
    state = case.chain.init(p)
    numbers = {
        tuple(name.split("/", 1)): value
        for name, value in zip(leaf_names(state), jax.tree.leaves(state), strict=True)
        if name in case.numbers and jnp.issubdtype(value.dtype, jnp.floating)
    }

    def size(g, numbers, state):
        for (link, number), value in numbers.items():
            state = {**state, link: {**state[link], number: value}}
        updates, _ = case.chain.update(g, state, p, value=LOSS)
        return optax.tree.norm(updates, squared=True)

    zeros = jax.tree.map(jnp.zeros_like, p)
    by_gradient, by_number = jax.jit(jax.grad(size, argnums=(0, 1)))(zeros, numbers, state)
    assert_finite(by_gradient)
    assert_finite(list(by_number.values()))


@functools.cache
def step_without_kernel(case):
    """Return what comes before and after a step in which the kernel has no gradient."""
    before = run(case, case.chain.init(case.params()), steps=1)
    g = case.grads(1)
    g["encoder"]["layer_0"]["kernel"] = None
    return before, jax.jit(lambda p, s: case.chain.apply(g, s, p, value=LOSS))(*before)


@law
def test_gradient_of_none_leaves_the_parameter_alone(case):
    (p, state), (new, after) = step_without_kernel(case)
    assert_same(new["encoder"]["layer_0"]["kernel"], p["encoder"]["layer_0"]["kernel"])
    assert avals((new, after)) == avals((p, state))
    assert_finite((new, after))


@law_where("keeps_slots")
def test_gradient_of_none_leaves_slots_alone(case):
    (_, state), (_, after) = step_without_kernel(case)
    was, now = (dict(zip(leaf_names(s), jax.tree.leaves(s), strict=True)) for s in (state, after))
    for name in was:
        if name.endswith("/encoder/layer_0/kernel"):
            assert_same(now[name], was[name])


@law
def test_update_of_none_is_none(case):
    state = jax.eval_shape(case.chain.init, case.params())
    g = case.grads(0)
    g["encoder"]["layer_0"]["kernel"] = None
    update = functools.partial(case.chain.update, value=LOSS)
    updates, _ = jax.eval_shape(update, g, state, case.params())
    assert avals(updates) == avals(jax.eval_shape(lambda: g))


INTEGER_GRADS = {
    "float0": np.zeros((2,), jax.dtypes.float0),
    "int32": np.ones((2,), np.int32),
    "None": None,
}


@pytest.mark.parametrize("grad", INTEGER_GRADS.values(), ids=INTEGER_GRADS)
@law_where("integers_ok")
def test_integer_parameter_is_left_alone(case, grad):
    p = {**case.params(), "table": jnp.array([3, 4])}
    state = case.chain.init(p)
    new, after = case.chain.apply({**case.grads(0), "table": grad}, state, p, value=LOSS)
    assert_same(new["table"], jnp.array([3, 4]))
    assert avals((new, after)) == avals((p, state))
    without, _ = run(case, case.chain.init(case.params()), steps=1)
    assert_close({k: new[k] for k in without}, without)


@law_where("empty_ok")
def test_empty_tree(case):
    state = case.chain.init({})
    new, after = case.chain.apply({}, state, {}, value=LOSS)
    assert new == {}
    assert avals(after) == avals(state)
    assert after["step"] == 1
    assert_finite(after)


@law
def test_leaf_without_entries(case):
    p = {**case.params(), "none": jnp.zeros((0, 3))}
    state = case.chain.init(p)
    new, after = case.chain.apply({**case.grads(0), "none": p["none"]}, state, p, value=LOSS)
    assert avals((new, after)) == avals((p, state))
    assert_finite((new, after))


@law
def test_tree_of_one_array(case):
    """A leaf of one entry that is the whole tree; where a pattern wants a name, in a dict."""
    bare = jnp.full_like(case.random_like((), 0), 2.0)
    p = bare if case.empty_ok else {"scale": bare, "layer": {"bias": bare}}
    state = case.chain.init(p)
    new, after = case.chain.apply(p, state, p, value=LOSS)
    assert avals((new, after)) == avals((p, state))
    assert_finite((new, after))


# Complex numbers.


def total_norm(g):
    return np.sqrt(np.sum(np.abs(g) ** 2))


# The first step on one leaf by numpy: |z|² wherever the rule for real numbers has a square.
ORACLES = {
    "clip-value": lambda g: g * np.minimum(1, 0.3 / np.abs(g)),
    "clip-norm": lambda g: g * np.minimum(1, 0.5 / total_norm(g)),
    "clip-global-norm": lambda g: g * np.minimum(1, 0.5 / total_norm(g)),
    "adagrad": lambda g: g / np.sqrt(0.1 + np.abs(g) ** 2 + 1e-7),
    "rms": lambda g: g / np.sqrt(0.1 * np.abs(g) ** 2 + 1e-7),
    "rms-centered": lambda g: g / np.sqrt(0.1 * np.abs(g) ** 2 - np.abs(0.1 * g) ** 2 + 1e-4),
    "adadelta": lambda g: g * np.sqrt(1e-6) / np.sqrt(0.05 * np.abs(g) ** 2 + 1e-6),
    "adam": lambda g: g / (np.abs(g) + 1e-8 / np.sqrt(0.001)),
    "amsgrad": lambda g: g / (np.abs(g) + 1e-8 / np.sqrt(0.001)),
}


@pytest.mark.parametrize("name", ORACLES)
def test_complex_squares_are_those_of_the_absolute_value(name):
    tx = next(case.chain for case in CASES if case.name == name)
    g = random_like((3, 2), 5, "complex64")
    updates, _ = tx.update({"w": g}, tx.init({"w": g}), {"w": g})
    assert_close(updates["w"], np.complex64(ORACLES[name](np.asarray(g))), 1e-5)


def test_complex_norms():
    """One complex and one real parameter, of norms √(1 + 4 + 4) = 3 and 4."""
    tx = transforms.chain(all=transforms.ObserveNorm(), each=transforms.ObserveNorms())
    g = {"a": jnp.array([1 + 2j, -2j]), "b": jnp.array([4.0])}
    _, state = tx.update(g, tx.init(g), g)
    assert_close(state["all"]["norm"], np.float32(5))
    assert_close(state["each"]["norm"], {"a": np.float32(3), "b": np.float32(4)})
