"""What programs for accelerators are made of; they are lowered here, and compiled nowhere."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optimize_loss as ol
from optimize_loss import transforms as T
from optimize_loss._engine import arrays

VALUES = {
    "usual": [[0.5, -1.0, 2.0], [0.0, 1.0, 1.0]],
    "infinite": [[jnp.inf, 1.0], [-jnp.inf, 0.0]],
    "nan": [[jnp.nan, 1.0, 3.0]],
    "one": [7.0],
}


def lowered(function, platform, *arguments):
    """Return the text of a program for a platform that need not be here."""
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_one_reduction_counts_and_finds_the_ends_as_several_do(values):
    x, bounds = jnp.array(values), jnp.array([-1.0, 0.5, 1.0, jnp.nan, jnp.inf])
    joint = jax.jit(lambda x: (arrays._joint_counts(x, bounds), arrays._joint_ends(x)))(x)
    several = jax.jit(lambda x: (arrays._several_counts(x, bounds), arrays._two_ends(x)))(x)
    jax.tree.map(np.testing.assert_array_equal, joint, several)
    np.testing.assert_array_equal(joint[0], [np.sum(x < bound) for bound in bounds])


def test_on_gpu_a_histogram_takes_two_reductions():
    tx = T.chain(seen=T.ObserveHistograms(30))
    grads = {"w": jnp.zeros((4, 8))}
    text = lowered(tx.update, "cuda", grads, tx.init(grads))
    assert len(re.findall(r"stablehlo\.reduce\b", text)) == 2


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_random_numbers_are_arithmetic_that_fuses(platform):
    params = {"w": jnp.zeros((4, 8), jnp.bfloat16)}
    step = ol.optimize_loss(
        lambda p, x: jnp.sum(p["w"] * x),
        learning_rate=0.1,
        gradient_noise_scale=1e-3,
        precision="bfloat16",
    )
    text = lowered(step, platform, step.init(params), jnp.ones((), jnp.bfloat16))
    found = set(re.findall(r"rng\w*|threefry\w*|stablehlo\.custom_call|stablehlo\.while", text))
    assert "stablehlo.xor" in text
    assert not found
