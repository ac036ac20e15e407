"""Adamax, Nadam, Lion and LAMB: values derived on paper, and optax where it agrees."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optimize_loss import transforms as T
from tests.cases import SHAPES, params, random_like

NAN = float("nan")
ADAMAX, NADAM, LAMB = (
    link(0.5, 0.5, 1e-30) for link in (T.ScaleByAdamax, T.ScaleByNadam, T.ScaleByLamb)
)
LION = T.ScaleByLion(0.5, 0.5)
MU = [0.5 * (1 - 0.96**t / 2) for t in (1, 2, 3)]  # Nadam's momentum with β₁ = 0.5
FIRST = 1 + MU[1] * 0.5 / (1 - MU[0] * MU[1])  # its first update, where m = 0.5 g

# link, gradients of one parameter step by step, the parameter, and its updates.
VALUES: dict[str, tuple[T.Link, Any, Any, Any]] = {
    "adamax-zero-gradient": (ADAMAX, [[0.0]], [2.0], [[0.0]]),
    "adamax-first-step-has-size-1": (ADAMAX, [[4.0, -1e-20]], [0.0, 0.0], [[1.0, -1.0]]),
    "adamax-gradient-stops": (ADAMAX, [[8.0], [0.0], [0.0]], [0.0], [[1.0], [2 / 3], [4 / 7]]),
    "adamax-maximum-fades": (
        T.ScaleByAdamax(0.0, 0.5, 1e-30),
        [[8.0], [10.0], [6.0], [1.0]],
        [0.0],
        [[1.0], [1.0], [1.0], [1 / 3]],
    ),
    "adamax-epsilon": (T.ScaleByAdamax(0.5, 0.5, 1.0), [[4.0]], [0.0], [[4 / 5]]),
    "adamax-no-overflow": (ADAMAX, [[1e30]], [0.0], [[1.0]]),
    "adamax-complex": (ADAMAX, [[3 + 4j, 0j]], [0j, 0j], [[0.6 + 0.8j, 0j]]),
    "nadam-zero-gradient": (NADAM, [[0.0]], [2.0], [[0.0]]),
    "nadam-first-step": (NADAM, [[4.0, -1e-15]], [0.0, 0.0], [[FIRST, -FIRST]]),
    "nadam-gradient-stops": (  # m = 1, v = 4
        NADAM,
        [[4.0], [0.0]],
        [0.0],
        [[FIRST], [MU[2] / (1 - MU[0] * MU[1] * MU[2]) / np.sqrt(4 / 0.75)]],
    ),
    "nadam-without-momentum": (  # v = 4.5, then 10.25
        T.ScaleByNadam(0.0, 0.5, 1e-30),
        [[3.0], [-4.0]],
        [0.0],
        [[1.0], [-4 / np.sqrt(10.25 / 0.75)]],
    ),
    "nadam-epsilon-meets-the-corrected-root": (
        T.ScaleByNadam(0.5, 0.5, 1.0),
        [[4.0]],
        [0.0],
        [[FIRST * 4 / 5]],
    ),
    "nadam-complex": (NADAM, [[3 + 4j]], [0j], [[FIRST * (0.6 + 0.8j)]]),
    "lion-sign": (LION, [[4.0, -1e-6, 0.0]], [0.0] * 3, [[1.0, -1.0, 0.0]]),
    "lion-momentum-outweighs": (LION, [[4.0], [-1.0], [-3.0]], [0.0], [[1.0], [1.0], [-1.0]]),
    "lion-tie": (LION, [[4.0], [-2.0]], [0.0], [[1.0], [0.0]]),
    "lion-gradient-outweighs-where-beta-1-is-small": (
        T.ScaleByLion(0.125, 0.5),
        [[4.0], [-1.0]],
        [0.0],
        [[1.0], [-1.0]],
    ),
    "lion-nan": (LION, [[NAN, 1.0]], [0.0, 0.0], [[NAN, 1.0]]),
    "lion-complex": (LION, [[3 + 4j, -2j, 0j]], [0j] * 3, [[0.6 + 0.8j, -1j, 0j]]),
    "lamb-zero-gradient": (LAMB, [[0.0, 0.0]], [3.0, 4.0], [[0.0, 0.0]]),
    "lamb-zero-parameter": (LAMB, [[2.0, -3.0]], [0.0, 0.0], [[1.0, -1.0]]),
    "lamb-as-long-as-the-parameter": (LAMB, [[0.0, -7.0]], [3.0, 4.0], [[0.0, -5.0]]),
    "lamb-gradient-stops": (LAMB, [[4.0], [0.0]], [0.0], [[1.0], [4 / 3 / np.sqrt(4 / 0.75)]]),
    "lamb-epsilon": (T.ScaleByLamb(0.5, 0.5, 1.0), [[4.0]], [0.0], [[4 / 5]]),
    "lamb-no-overflow": (LAMB, [[0.0, 2.0]], [3e20, 4e20], [[0.0, 5e20]]),
    "lamb-nan": (LAMB, [[NAN, 2.0]], [3.0, 4.0], [[NAN, 1.0]]),
    "lamb-scalar": (LAMB, [-2.0], 3.0, [-3.0]),
    "lamb-complex": (LAMB, [[2j]], [3 + 4j], [[5j]]),
}


def updates_of(tx, grads, p):
    """Return the updates step by step; the parameters stay where they are."""
    state, seen = tx.init(p), []
    for g in grads:
        updates, state = tx.update(g, state, p)
        seen.append(updates)
    return seen, state


@pytest.mark.parametrize("name", VALUES)
def test_value(name):
    link, grads, p, wanted = VALUES[name]
    dtype = jnp.complex64 if np.iscomplexobj(p) else jnp.float32
    got, _ = updates_of(
        T.chain(link=link), [jnp.array(g, dtype) for g in grads], jnp.array(p, dtype)
    )
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


def test_nadam_multiplies_its_product_once_a_step():
    """However many parameters there are, and whether or not they have gradients."""
    p = {"a": jnp.ones(2), "b": jnp.ones(3), "c": jnp.ones(())}
    for g in (p, {"a": p["a"], "b": None, "c": None}):
        _, state = updates_of(T.chain(nadam=NADAM), [g] * 3, p)
        np.testing.assert_allclose(state["nadam"]["product"], np.prod(MU), rtol=1e-6)


def test_nadam_remembers_a_momentum_that_has_changed():
    """A first step with β₁ = 0.5, a second with half of that."""
    tx = T.chain(nadam=NADAM)
    p = jnp.zeros(())
    _, state = tx.update(p, tx.init(p))
    _, state = tx.update(p, tx.set(state, beta_1=0.25))
    np.testing.assert_allclose(state["nadam"]["product"], MU[0] * MU[1] / 2, rtol=1e-6)


def test_nadam_of_a_constant_gradient_tends_to_1():
    """As a bias-free mean of a constant does; μ is then β₁, and what is left of P nothing."""
    got, _ = updates_of(T.chain(nadam=T.ScaleByNadam(0.9, 0.5)), [jnp.float32(3.0)] * 200, 0.0)
    np.testing.assert_allclose(got[-1], 1.0, rtol=1e-4)


def test_lamb_takes_the_norm_of_each_parameter_by_itself():
    p = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([-2.0]), "c": jnp.zeros(1)}
    g = {"a": jnp.array([0.0, 1.0]), "b": jnp.array([5.0]), "c": jnp.array([7.0])}
    ((updates,), _) = updates_of(T.chain(lamb=LAMB), [g], p)
    np.testing.assert_allclose([updates["a"][1], updates["b"][0], updates["c"][0]], [5, 2, 1])


def test_lamb_does_not_scale_a_weight_decay_behind_it():
    tx = T.chain(lamb=LAMB, decay=T.AddWeightDecay(0.5))
    ((update,), _) = updates_of(tx, [jnp.array([0.0, -7.0])], jnp.array([3.0, 4.0]))
    np.testing.assert_allclose(update, [1.5, -5 + 2], rtol=1e-6)


def test_lamb_needs_the_parameters():
    tx = T.chain(lamb=LAMB)
    with pytest.raises(ValueError, match="`params` must be given"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))


# ours, optax's; over 20 steps. optax has no momentum schedule for Nadam.
EQUAL = {
    "adamax": (T.ScaleByAdamax(epsilon=1e-30), optax.scale_by_adamax(eps=1e-30)),
    "lion": (T.ScaleByLion(), optax.scale_by_lion()),
    "lamb": (
        T.ScaleByLamb(epsilon=1e-3),
        optax.chain(optax.scale_by_adam(eps=1e-3), optax.scale_by_trust_ratio()),
    ),
}


def trajectory(link):
    """Return the parameters after every step, stacked."""
    tx = T.chain(rule=link, rate=T.ScaleByLearningRate(0.01))
    grads = [random_like(SHAPES, 100 + t) for t in range(20)]

    def step(carry, g):
        p, state = carry
        new = tx.apply(g, state, p)
        return new, new[0]

    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *grads)
    with jax.numpy_dtype_promotion("standard"):  # optax multiplies integers by floats
        return jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), stacked))(params())[1]


@pytest.mark.parametrize("name", EQUAL)
def test_equals_optax(name):
    ours, theirs = map(trajectory, EQUAL[name])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), ours, theirs)
