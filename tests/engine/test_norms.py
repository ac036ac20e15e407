"""Norms of three sums, as accelerators take them; those of CPU are under the laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optimize_loss._engine import arrays

SIZES = (3e-38, 1e-30, 1e-20, 1e-12, 1.0, 1e15, 1e19, 1e25, 1e38, 3e38)
SUMS = (arrays._plain_sums, arrays._joint_sums)


@pytest.mark.parametrize("sums", SUMS)
def test_no_size_breaks_a_norm_or_its_derivative(sums):
    x = jnp.asarray(np.outer(SIZES, [0.6, -0.8]).astype(np.float32))
    norms = jax.jit(jax.vmap(lambda row: arrays.norm_of_sums(sums(row))))(x)
    np.testing.assert_allclose(norms / jnp.asarray(SIZES, jnp.float32), 1, rtol=1e-6)


def test_the_derivative_is_the_direction():
    x = jnp.asarray(np.outer(SIZES, [0.6, -0.8]).astype(np.float32))
    gradient = jax.grad(lambda row: arrays.norm_of_sums(arrays.sums_of_squares(row, x.dtype)))
    plain = jax.grad(lambda row: arrays.norm_of_sums(arrays._plain_sums(row)))
    wanted = jnp.broadcast_to(jnp.array([0.6, -0.8]), x.shape)
    np.testing.assert_allclose(jax.jit(jax.vmap(plain))(x)[1:], wanted[1:], rtol=1e-5)
    np.testing.assert_allclose(jax.jit(jax.vmap(gradient))(x)[4:6], wanted[4:6], rtol=1e-5)
    np.testing.assert_array_equal(plain(jnp.zeros(2)), 0)


@pytest.mark.parametrize("sums", SUMS)
def test_zero_is_0_infinity_is_infinite_and_nan_is_nan(sums):
    rows = jnp.array([[0.0, 0.0], [jnp.inf, 1.0], [jnp.nan, 1.0], [1e-38, 3e38]])
    norms = jax.vmap(lambda row: arrays.norm_of_sums(sums(row)))(rows)
    np.testing.assert_allclose(norms, [0, np.inf, np.nan, 3e38], rtol=1e-6)
