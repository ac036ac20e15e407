"""The steps of every row of `cases.py`, compiled once, and how to compare them."""

import collections
import contextlib
import functools

import jax
import numpy as np
import pytest

from optimize_loss._names import leaf_names
from tests.cases import (
    LOSS,
    rows,
)

law = pytest.mark.parametrize("case", rows())


def law_where(capability):
    return pytest.mark.parametrize("case", rows(capability))


TRACES = collections.Counter()


@functools.cache
def step_of(tx):
    """Return the jitted step of a chain, shared by all laws: only for trees like its case's."""

    def step(params, state, grads):
        TRACES[tx] += 1
        return tx.apply(grads, state, params, value=LOSS)

    return jax.jit(step)


LOWERED = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: LOWERED.append(event) if "jaxpr_to_mlir" in event else None
)


@contextlib.contextmanager
def nothing_compiles():
    before = len(LOWERED)
    yield
    assert len(LOWERED) == before, "a program was compiled again"


def run(case, state, steps):
    """Return parameters and state after some steps in a Python loop."""
    p = case.params()
    for t in range(steps):
        p, state = step_of(case.chain)(p, state, case.grads(t))
    return p, state


def avals(tree):
    """Return the structure of a tree, and shape, dtype and weak type of its leaves."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [(x.shape, x.dtype, getattr(x, "weak_type", False)) for x in leaves]


def assert_close(got, want, relative=1e-6):
    """Compare leaf by leaf, relative to the largest entry of the leaf.

    Not bit by bit: XLA contracts a * b + c into one rounding where it fuses the two, and what it
    fuses differs from program to program.
    """
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for name, a, b in zip(leaf_names(want), *map(jax.tree.leaves, (got, want)), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name
        size = np.max(np.abs(b.astype(np.complex128)), initial=0)
        np.testing.assert_allclose(a, b, rtol=relative, atol=relative * size, err_msg=name)


def assert_same(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def assert_finite(tree):
    for name, x in zip(leaf_names(tree), jax.tree.leaves(tree), strict=True):
        assert np.isfinite(np.asarray(x, np.complex128)).all(), name


def stacked(*trees):
    return jax.tree.map(lambda *xs: np.stack(xs), *trees)
