"""Every link and every chain does in one pass what the plain executor does step by step."""

import dataclasses

import jax
import numpy as np
import pytest

from optimize_loss._engine.plain import plain
from optimize_loss._names import leaf_names
from tests.cases import LOSS, rows
from tests.links.law import step_of


def by_name(tree):
    return dict(zip(leaf_names(tree), jax.tree.leaves(tree), strict=True))


@pytest.mark.parametrize("case", rows())
def test_a_chain_means_what_the_plain_executor_does(case):
    tx = dataclasses.replace(case.chain, precision=None)
    p, q = case.params(), by_name(case.params())
    state, same = tx.init(p), tx.init(q)
    for t in range(3):
        g = case.grads(t)
        p, state = step_of(tx)(p, state, g)
        q, same = plain(tx, by_name(g), same, q, LOSS)
    assert leaf_names((p, state)) == leaf_names((q, same))
    for mine, meant in zip(jax.tree.leaves((p, state)), jax.tree.leaves((q, same)), strict=True):
        np.testing.assert_allclose(mine, meant, rtol=2e-5, atol=1e-6)
