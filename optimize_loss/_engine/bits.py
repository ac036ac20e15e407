"""Numbers of 16 and 8 bits by integer operations, rounded to nearest or stochastically.

Arrays of bfloat16 and float8 are slow on CPU, and loops copy them completely in every iteration.
Here such numbers are unsigned integers, of the same bits.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

HALF = 0x8000  # as the random bits of a number: it rounds to nearest, and up where that is a tie
BLOCK = 256  # entries that share a scale in 8 bits
LARGEST = 448.0  # of e4m3
_SMALLEST = 2.0**-100  # scale of a block: one of zeros alone has it


def bits_of(x: jax.Array) -> jax.Array:
    """Return float32 as uint32."""
    return jax.lax.bitcast_convert_type(x, jnp.uint32)


def float_of(bits: jax.Array) -> jax.Array:
    """Return uint32 as float32."""
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def to_bfloat16(x: jax.Array, random: jax.Array) -> jax.Array:
    """Return float32 as the bits of bfloat16, in the upper half of uint32; below are other bits.

    A number becomes one of its two neighbours, the nearer the more often: its mean is x. Beyond
    the largest finite number it becomes that; infinity and NaN stay what they are.

    Args:
      x: float32.
      random: uint32 below 2**16, uniform; or `HALF`.
    """
    bits = bits_of(x)
    size = bits & jnp.uint32(0x7FFFFFFF)
    is_nan = size > jnp.uint32(0x7F800000)
    kept = jnp.where(is_nan, bits | jnp.uint32(0x00400000), bits)
    return jnp.where(size < jnp.uint32(0x7F7F0000), bits + random, kept)


def round_to(x: jax.Array, dtype: jnp.dtype, random: jax.Array) -> jax.Array:
    """Return float32 rounded stochastically to what a narrower dtype can hold, as float32.

    As `to_bfloat16`, but that a number beyond the largest stays as it is: to become infinity, NaN
    or the largest, as the cast to the dtype has it.

    Args:
      x: float32.
      dtype: a float of at most 16 bits.
      random: uint32, uniform; as many of its upper bits are used as the dtype lacks.
    """
    if dtype == jnp.bfloat16:
        bits = to_bfloat16(x, random >> jnp.uint32(16))
        return float_of(bits & jnp.uint32(0xFFFF0000))
    info = jnp.finfo(dtype)
    size, normal = jnp.abs(x), float(info.smallest_normal)
    lost = 23 - info.nmant  # bits of float32 behind the last that a normal number has
    step = normal * 2.0**-info.nmant  # between all numbers below these
    kept = jnp.uint32(2**32 - 2**lost)
    up = float_of((bits_of(size) + (random >> jnp.uint32(32 - lost))) & kept)
    up = jnp.where(size < float(info.max), up, size)
    share = (random >> jnp.uint32(16)).astype(jnp.float32) * 2.0**-16
    small = jnp.floor(size * (1 / step) + share) * step
    return jnp.copysign(jnp.where(size < normal, small, up), x)


def to_e4m3(x: jax.Array) -> jax.Array:
    """Return float32 as the bits of the nearest float8_e4m3fn, uint32 below 2**8.

    Bit for bit the cast of `ml_dtypes`: ties to even; NaN beyond 464, as it has no infinity.
    """
    bits = bits_of(x)
    size, sign = bits & jnp.uint32(0x7FFFFFFF), (bits >> jnp.uint32(24)) & jnp.uint32(0x80)
    even = (size >> jnp.uint32(20)) & jnp.uint32(1)
    normal = ((size + jnp.uint32(0x7FFFF) + even) >> jnp.uint32(20)) - jnp.uint32(120 << 3)
    # At 2**14 the last bit of float32 is 2**-9, as that of the smallest of e4m3.
    small = bits_of(float_of(size) + 2.0**14) & jnp.uint32(0xFF)
    code = jnp.where(size < jnp.uint32(121 << 23), small, normal)
    return sign | jnp.where(size > bits_of(jnp.float32(464)), jnp.uint32(0x7F), code)


def from_e4m3(code: jax.Array) -> jax.Array:
    """Return the bits of float8_e4m3fn, uint32 below 2**8, as float32."""
    size = code & jnp.uint32(0x7F)
    normal = float_of((size << jnp.uint32(20)) + jnp.uint32(120 << 23))
    small = size.astype(jnp.float32) * 2.0**-9
    value = jnp.where(size < jnp.uint32(8), small, normal)
    value = jnp.where(size == jnp.uint32(0x7F), jnp.nan, value)
    return jnp.where(code >= jnp.uint32(0x80), -value, value)


def block_scales(x: jax.Array) -> jax.Array:
    """Return for each block of entries, in C order, the scale that makes its largest one 448.

    Where one is not finite, the scale is NaN, and so all of the block will be. Every device has
    all scales.
    """
    return _by_xla(_block_scales, x, PartitionSpec(), x)


def _block_scales(x: jax.Array) -> jax.Array:
    x = jnp.pad(x.reshape(-1), (0, -x.size % BLOCK)).reshape(-1, BLOCK)
    # Not the largest of the sizes: XLA on CPU would make an array of these.
    largest = jnp.maximum(jnp.max(x, axis=1), -jnp.min(x, axis=1))
    scale = jnp.maximum(largest / LARGEST, _SMALLEST)
    return jnp.where(jnp.isfinite(largest), scale, jnp.nan)


def spread(scales: jax.Array, like: jax.Array) -> jax.Array:
    """Return for each entry of an array the scale of its block."""
    shape = like.shape

    def each(scales: jax.Array) -> jax.Array:
        entries = jnp.broadcast_to(scales[:, None], (scales.size, BLOCK)).reshape(-1)
        return entries[: math.prod(shape)].reshape(shape)

    return _by_xla(each, like, None, scales)


def _by_xla(
    function: Callable[..., Any], like: jax.Array, spec: PartitionSpec | None, *arrays: jax.Array
) -> Any:
    """Return what a function returns, whose result is spread as `spec`, or else as `like`.

    Blocks run across the axes of an array. Where its type tells how these are spread over devices,
    the types inside do not follow.
    """
    sharding = getattr(jax.typeof(like), "sharding", None)
    if sharding is None or all(part is None for part in sharding.spec):
        return function(*arrays)
    there = NamedSharding(sharding.mesh, sharding.spec if spec is None else spec)
    return jax.sharding.auto_axes(function, out_sharding=there)(*arrays)
