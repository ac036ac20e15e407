"""A rate in a place where it has no effect is refused."""

from typing import Any

import jax.numpy as jnp
import optax
import pytest

import optimize_loss as ol
from optimize_loss import transforms as T

RATE = T.ScaleByLearningRate(0.1)
NO_EFFECT: Any = {
    "adam": T.chain(rate=RATE, adam=T.ScaleByAdam()),
    "lion": T.chain(rate=RATE, lion=T.ScaleByLion()),
    "adamax": T.chain(rate=RATE, decay=T.AddWeightDecay(0.1), adamax=T.ScaleByAdamax()),
    "for-some": T.chain(rate=RATE, rms=T.ForParameters("w", T.ScaleByRMS())),
    "function": lambda: T.chain(rate=RATE, muon=T.ScaleByMuon()),
}
EFFECT: Any = {
    "behind": T.chain(adam=T.ScaleByAdam(), rate=RATE),
    "momentum": T.chain(rate=RATE, momentum=T.ScaleByMomentum(0.9)),
    "both": T.chain(before=RATE, adam=T.ScaleByAdam(), rate=T.ScaleByLearningRate(0.1)),
    "optax-behind": T.chain(before=RATE, adam=T.ScaleByAdam(), rate=optax.scale(-0.1)),
}


def loss(params):
    return jnp.sum(params["w"] ** 2)


@pytest.mark.parametrize("name", NO_EFFECT)
def test_a_rate_before_a_rule_that_forgets_sizes_is_refused(name):
    with pytest.raises(
        ValueError, match=r"must have the link 'rate' after '.*`chain\(.*rate=...\)`"
    ):
        ol.optimize_loss(loss, optimizer=NO_EFFECT[name])


@pytest.mark.parametrize("name", EFFECT)
def test_a_rate_that_has_an_effect_may_be_anywhere(name):
    ol.optimize_loss(loss, optimizer=EFFECT[name])
