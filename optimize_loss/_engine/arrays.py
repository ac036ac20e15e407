"""Arithmetic on arrays that dtypes, zeros and large values do not break."""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optimize_loss._engine.device import filled


@functools.cache
def is_narrow(dtype: Any) -> bool:
    """Return whether numbers of `dtype` are floats of fewer than 32 bits."""
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32


@functools.cache
def compute_dtype(dtype: Any) -> np.dtype:
    """Return the dtype in which leaves of `dtype` are computed: at least 32 bits a number."""
    return jnp.dtype(jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype)


def real_dtype(dtype: Any) -> np.dtype:
    """Return the dtype of the absolute value of a number of `dtype`."""
    return jnp.finfo(dtype).dtype


def zeros(param: jax.Array) -> jax.Array:
    """Return zeros like `param`, float32 or wider, sharded as it is: memory for a mean."""
    return filled(param, 0, compute_dtype(param.dtype))


def copy(param: jax.Array) -> jax.Array:
    """Return a copy of `param`, float32 or wider: memory for what begins at the parameter."""
    return jnp.array(param, dtype=compute_dtype(param.dtype), copy=True)


def widened(values: Any, dtype: Any) -> Any:
    """Return a tree of arrays in the dtype of a computation; integers stay as they are."""
    leaves, structure = jax.tree.flatten(values)
    pairs = [(x, _wider(x.dtype, dtype)) for x in leaves]
    return structure.unflatten([x if wide is None else x.astype(wide) for x, wide in pairs])


@functools.cache
def _wider(dtype: Any, wanted: Any) -> np.dtype | None:
    """Return the dtype of floats and complex numbers in a computation; None for other dtypes."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return jnp.dtype(wanted)
    return real_dtype(wanted) if jnp.issubdtype(dtype, jnp.floating) else None


def stored_as(x: jax.Array, dtype: Any) -> jax.Array:
    """Return the nearest numbers that `dtype` has, in the dtype of `x`."""
    return x.astype(dtype).astype(x.dtype)


def full(param: jax.Array, value: float = 0.0) -> jax.Array:
    """Return real numbers like `param`, float32 or wider: memory for a mean of squares."""
    return filled(param, value, real_dtype(compute_dtype(param.dtype)))


def abs_squared(x: jax.Array) -> jax.Array:
    """Return |x|², real for complex `x`."""
    return (x * x.conj()).real if jnp.iscomplexobj(x) else x * x


def sqrt(x: jax.Array) -> jax.Array:
    """Return √x, with derivative 0 at 0 in place of infinity; NaN of NaN and below 0."""
    return jnp.where(x == 0, 0, jnp.sqrt(jnp.where(x == 0, 1, x)))


def power_of_two(x: jax.Array, limit: int, exponent: int) -> jax.Array:
    """Return 2^exponent where x > 2^limit, 2^-exponent where x < 2^-limit, and else 1.

    Products with it are exact. XLA computes a / (b / c) as a c / b, which may overflow: multiply
    a divisor by the power of the opposite sign.
    """
    large, small = jnp.asarray(2.0**exponent, x.dtype), jnp.asarray(2.0**-exponent, x.dtype)
    usual = jnp.where(x < 2.0**-limit, small, jnp.asarray(1.0, x.dtype))
    return jnp.where(x > 2.0**limit, large, usual)


def unit_of(x: jax.Array) -> jax.Array:
    """Return a power of two by which to divide x, so that its squares stay in range."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), initial=0))
    most = jnp.finfo(largest.dtype).maxexp
    return power_of_two(largest, most * 5 // 16, most * 5 // 8)


def norm(x: jax.Array) -> jax.Array:
    """Return the L2 norm of `x`, a scalar that neither overflows nor underflows on the way."""
    unit = unit_of(x)
    return unit * sqrt(sum_of_squares(x / unit))


def sum_of_squares(x: jax.Array) -> jax.Array:
    """Return Σ|x|² of what was multiplied or divided by a power of two.

    XLA computes (u c)² as u² c² where it knows c, and c² may overflow; not where a maximum comes
    between.
    """
    return jnp.sum(abs_squared(x if jnp.iscomplexobj(x) else jnp.maximum(x, -x)))


def ratio(length: jax.Array, norm: jax.Array) -> tuple[jax.Array, ...]:
    """Return factors of length / norm, to multiply by one after the other, whatever its size.

    XLA on CPU takes a quotient for 0 that is too small to be a normal number, and divides by way
    of the reciprocal.
    """
    half = jnp.finfo(norm.dtype).maxexp // 2
    first, last = power_of_two(norm, half, -half), power_of_two(length, half, half)
    return first, length * power_of_two(length, half, -half) / (norm * first), last


def multiplied(x: jax.Array, factors: Iterable[jax.Array]) -> jax.Array:
    """Return x times one factor after the other."""
    return functools.reduce(jnp.multiply, factors, x)


def count(step: jax.Array, like: jax.Array) -> jax.Array:
    """Return t = step + 1, the number of this update, in the dtype of `like`."""
    return step.astype(like.dtype) + 1
