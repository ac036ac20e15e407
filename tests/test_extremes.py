"""What holds for every link at NaN, infinity, and the largest and smallest numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.cases import LOSS, rows

law = pytest.mark.parametrize("case", rows())


@functools.cache
def step_of(tx):
    return jax.jit(lambda p, state, g: tx.apply(g, state, p, value=LOSS))


def is_nan(tree):
    return [bool(np.isnan(x).all()) for x in map(np.asarray, jax.tree.leaves(tree)) if x.size]


def floats(tree):
    leaves = map(jnp.asarray, jax.tree.leaves(tree))
    return [np.asarray(x) for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]


def with_nan(case, state, link, number):
    bad = jnp.full_like(state[link][number], jnp.nan)
    return {**state, link: {**state[link], number: bad}}


def real_numbers(case):
    state = case.chain.init(case.params())
    pairs = case.chain.all_numbers()
    return [x for x in pairs if jnp.issubdtype(state[x[0]][x[1]].dtype, jnp.floating)]


def seen_after(case, link, number, size):
    """Return after how many of three steps with a NaN number a parameter is NaN; None: none is."""
    p = q = case.params()
    state = case.chain.init(p)
    bad = with_nan(case, state, link, number)
    for t in range(3):
        g = jax.tree.map(lambda x: (size * x).astype(x.dtype), case.grads(t))
        p, state = step_of(case.chain)(p, state, g)
        q, bad = step_of(case.chain)(q, bad, g)
        hit = is_nan(q)
        for a, b, nan in zip(jax.tree.leaves(p), jax.tree.leaves(q), hit, strict=True):
            assert nan or np.array_equal(a, b), f"{link}/{number}: {b}, not {a}"
        if any(hit):
            return t + 1
    assert any(np.isnan(x).any() for x in floats(bad))
    return None


@pytest.mark.parametrize("size", [1.0, 1e-3])
@law
def test_a_number_that_is_nan_gives_nan(case, size):
    for link, number in real_numbers(case):
        n = seen_after(case, link, number, size)
        if n != 1:
            print("XX", case.name, link, number, n)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@law
def test_bad_gradient(case, bad):
    p = case.params()
    state = case.chain.init(p)
    for t in range(3):
        g = case.grads(t)
        if t == 0:
            k = g["encoder"]["layer_0"]["kernel"]
            g["encoder"]["layer_0"]["kernel"] = k.at[0, 0].set(bad)
        p, state = step_of(case.chain)(p, state, g)
    x = p["encoder"]["layer_0"]["kernel"][0, 0]
    if not np.isnan(x):
        print("YY", bad, case.name, x, case.params()["encoder"]["layer_0"]["kernel"][0, 0])
