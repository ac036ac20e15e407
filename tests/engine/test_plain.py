"""Every link and every chain does in one pass what the plain executor does step by step."""

import dataclasses

import jax
import numpy as np
import pytest

from optimize_loss._engine.plain import plain
from optimize_loss._names import leaf_names
from tests.cases import LOSS, rows


def by_name(tree):
    return dict(zip(leaf_names(tree), jax.tree.leaves(tree), strict=True))


@pytest.mark.parametrize("case", rows())
def test_a_chain_means_what_the_plain_executor_does(case):
    tx = dataclasses.replace(case.chain, precision=None)
    p = q = by_name(case.params())
    state = same = tx.init(p)
    step = jax.jit(tx.apply)
    for t in range(3):
        g = by_name(case.grads(t))
        p, state = step(g, state, p, value=LOSS)
        q, same = plain(tx, g, same, q, LOSS)
    assert jax.tree.structure((p, state)) == jax.tree.structure((q, same))
    for mine, meant in zip(jax.tree.leaves((p, state)), jax.tree.leaves((q, same)), strict=True):
        np.testing.assert_allclose(mine, meant, rtol=2e-5, atol=1e-6)
