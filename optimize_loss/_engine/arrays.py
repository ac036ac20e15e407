"""Arithmetic on arrays that dtypes, zeros and large values do not break."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

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
    return jax.lax.platform_dependent(x, cpu=_norm_by_maximum, default=_norm_by_sums)


def _norm_by_maximum(x: jax.Array) -> jax.Array:
    unit = unit_of(x)
    return unit * sqrt(sum_of_squares(x / unit))


def _norm_by_sums(x: jax.Array) -> jax.Array:
    return norm_of_sums(sums_of_squares(x, real_dtype(x.dtype)))


def sum_of_squares(x: jax.Array) -> jax.Array:
    """Return Σ|x|² of what was multiplied or divided by a power of two.

    XLA computes (u c)² as u² c² where it knows c, and c² may overflow; not where a maximum comes
    between.
    """
    return jnp.sum(abs_squared(x if jnp.iscomplexobj(x) else jnp.maximum(x, -x)))


class Sums(NamedTuple):
    """Sums of squares of entries as they are, and of scaled ones: `norm_of_sums` takes one."""

    plain: jax.Array  # Σ|x|²
    large: jax.Array  # Σ|x / c|² for a large c
    small: jax.Array  # Σ|x c|²


def sums_of_squares(x: jax.Array, dtype: Any) -> Sums:
    """Return the sums of squares of `x`, from which a norm follows that no size can break.

    One pass, and no condition: on accelerators that costs nothing, as memory sets the time, where
    XLA would run both branches of a condition, or stop reading ahead. XLA on CPU makes three loops
    of the three sums: there, the last two are 0, and what is out of range is for a condition.

    References:
      J. Blue, "A Portable Fortran Program to Find the Euclidean Norm of a Vector", 1978.
    """
    if jnp.iscomplexobj(x):
        parts = sums_of_squares(x.real, dtype), sums_of_squares(x.imag, dtype)
        return Sums(*map(jnp.add, *parts))
    return _three_sums(x.astype(dtype))


@jax.custom_jvp
def _three_sums(x: jax.Array) -> Sums:
    return jax.lax.platform_dependent(x, cpu=_first_sum, tpu=_plain_sums, default=_joint_sums)


@_three_sums.defjvp
def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[Sums, Sums]:
    # Of a reduction of several arrays, JAX knows no derivative.
    return _three_sums(*primals), jax.jvp(_plain_sums, primals, tangents)[1]


def _first_sum(x: jax.Array) -> Sums:
    zero = jnp.zeros((), x.dtype)
    return Sums(jnp.sum(x * x), zero, zero)


def _plain_sums(x: jax.Array) -> Sums:
    return Sums(*(jnp.sum(y * y) for y in _scaled(x)))


def _joint_sums(x: jax.Array) -> Sums:
    return Sums(*_joint_sum([y * y for y in _scaled(x)]))


def _joint_sum(several: Sequence[jax.Array]) -> list[jax.Array]:
    """Return the sums of arrays of one shape and dtype, as one reduction."""

    def add(one: Sequence[jax.Array], other: Sequence[jax.Array]) -> list[jax.Array]:
        return [a + b for a, b in zip(one, other, strict=True)]

    first = several[0]
    zeros = [jnp.zeros((), first.dtype)] * len(several)
    return list(jax.lax.reduce(list(several), zeros, add, tuple(range(first.ndim))))


def _scaled(x: jax.Array) -> list[jax.Array]:
    """Return |x|, |x| / c and |x| c, of which the last is bounded, so that 0 times it is 0."""
    limit = square_limit(x.dtype)
    bound = 2.0 ** (-limit * 3 // 8)
    several = x, x * 2.0**-limit, jnp.clip(x, -bound, bound) * 2.0**limit
    return [jnp.maximum(y, -y) for y in several]  # as in `sum_of_squares`


def least_and_greatest(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the least and the greatest entry of real numbers; NaN where one is NaN."""
    return jax.lax.platform_dependent(x, cpu=_two_ends, tpu=_two_ends, default=_joint_ends)


def _two_ends(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.min(x), jnp.max(x)


def _joint_ends(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    def ends(one: Sequence[jax.Array], other: Sequence[jax.Array]) -> list[jax.Array]:
        return [jnp.minimum(one[0], other[0]), jnp.maximum(one[1], other[1])]

    infinite = jnp.asarray(jnp.inf, x.dtype)
    low, high = jax.lax.reduce([x, x], [infinite, -infinite], ends, tuple(range(x.ndim)))
    return low, high


def counts_below(values: jax.Array, bounds: jax.Array) -> jax.Array:
    """Return for each of the bounds, at least one, how many of the values are less, as int32.

    XLA makes one loop of several sums on CPU and TPU. On GPU each would end in a kernel of its own,
    and with a scatter into few bins all threads would wait for the same addresses.
    """
    return jax.lax.platform_dependent(
        values, bounds, cpu=_several_counts, tpu=_several_counts, default=_joint_counts
    )


def _several_counts(values: jax.Array, bounds: jax.Array) -> jax.Array:
    return jnp.stack([jnp.sum(values < bound, dtype=jnp.int32) for bound in bounds])


def _joint_counts(values: jax.Array, bounds: jax.Array) -> jax.Array:
    return jnp.stack(_joint_sum([(values < bound).astype(jnp.int32) for bound in bounds]))


def norm_of_sums(sums: Sums) -> jax.Array:
    """Return √Σ|x|²."""
    dtype = sums.plain.dtype
    limit = square_limit(dtype)
    is_large, is_small = sums.plain == jnp.inf, sums.plain < 2.0**-limit
    unit = jnp.where(is_large, 2.0**limit, jnp.where(is_small, 2.0**-limit, 1.0)).astype(dtype)
    chosen = jnp.where(is_large, sums.large, jnp.where(is_small, sums.small, sums.plain))
    return sqrt(chosen) * unit


def square_limit(dtype: Any) -> int:
    """Return the exponent of a power of two far above 1, by which squares can be divided."""
    return jnp.finfo(dtype).maxexp * 5 // 8


def square_unit(squares: jax.Array) -> jax.Array:
    """Return by what to divide entries whose sum of squares may have left the dtype's range."""
    limit = square_limit(squares.dtype)
    return power_of_two(squares, limit, limit)


def _stacked(numbers: Sequence[jax.Array]) -> jax.Array:
    """Return numbers as a vector; what `jnp.stack` does takes long to trace."""
    return jax.lax.concatenate([jax.lax.broadcast(x, (1,)) for x in numbers], 0)


def joint_norm(
    each: Sequence[Sums],
    multipliers: Sequence[jax.Array],
    again: Callable[[], Sequence[jax.Array]],
) -> jax.Array:
    """Return √Σ|m u|² of several arrays.

    Args:
      each: the sums of squares of each u.
      multipliers: factors of m, to multiply by one after the other: numbers, or one for each u.
      again: returns Σ|u / `square_unit`|² of each u. On CPU it
        runs where the sum of squares leaves the range of the dtype, as for float32 entries of 1e20
        or 1e-25, and only then.
    """
    squares = _stacked([sums.plain for sums in each])

    def on_cpu() -> jax.Array:
        factor = multiplied(jnp.ones((), squares.dtype), multipliers)
        plain, total = jnp.sum(squares), jnp.sum(squares * (factor * factor))
        low, high = jnp.minimum(plain, total), jnp.maximum(plain, total)
        in_range = (low > 2.0 ** -square_limit(low.dtype)) & (high < jnp.inf)
        return jax.lax.cond(in_range, lambda: sqrt(total), rescaled)

    def rescaled() -> jax.Array:
        # A scale of its own for each array: XLA on CPU would write a shared one out as an array.
        scaled = _stacked(again())
        return norm(multiplied(sqrt(scaled) * square_unit(squares), multipliers))

    def elsewhere() -> jax.Array:
        if multipliers:
            norms = norm_of_sums(Sums(*map(_stacked, zip(*each, strict=True))))
            return norm(multiplied(norms, multipliers))
        return norm_of_sums(functools.reduce(lambda a, b: Sums(*map(jax.lax.add, a, b)), each))

    return jax.lax.platform_dependent(cpu=on_cpu, default=elsewhere)


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
