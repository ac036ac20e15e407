"""Random numbers as a function of (seed, name, step, index): a counter-based hash.

No key is kept and no order of draws matters, so a resumed run, another sharding or another
parameter beside this one changes nothing. Everything here is elementwise: it fuses into the pass
that uses it and takes no memory.
"""

import hashlib
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def name_words(name: str) -> tuple[int, int]:
    """Return 64 bits of a name as two unsigned 32-bit integers, the same on every machine."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def mix(x: jax.Array) -> jax.Array:
    """Return a bijective scramble of uint32: every input bit flips each output bit half the time.

    References:
      C. Wellons, "Prospecting for hash functions", 2018, the constants named `triple32`,
      https://nullprogram.com/blog/2018/07/31/
    """
    for shift, factor in ((17, 0xED5AD4BB), (11, 0xAC4C1B51), (15, 0x31848BAB)):
        x = (x ^ (x >> jnp.uint32(shift))) * jnp.uint32(factor)
    return x ^ (x >> jnp.uint32(14))


def stream(seed: jax.Array, name: str, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the two uint32 words that key the numbers of one parameter at one step."""
    low, high = name_words(name)
    first = mix(mix(seed ^ jnp.uint32(low)) + step.astype(jnp.uint32))
    return first, mix(mix(seed ^ jnp.uint32(high)) ^ first)


def streams(seed: jax.Array, names: Sequence[str], step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return what `stream` does, for many names at once: two arrays of uint32."""
    low, high = np.array([name_words(name) for name in names], np.uint32).reshape(-1, 2).T
    first = mix(mix(seed ^ low) + step.astype(jnp.uint32))
    return first, mix(mix(seed ^ high) ^ first)


def random_bits(key: tuple[jax.Array, jax.Array], shape: tuple[int, ...]) -> jax.Array:
    """Return uniform uint32 of `shape`; the index, in C order, repeats after 2**32 elements."""
    first, second = key
    return mix(mix(_index(shape) + first) ^ second)


def quick_bits(key: tuple[jax.Array, jax.Array], shape: tuple[int, ...]) -> jax.Array:
    """Return uniform uint32 of `shape`, a third of the work of `random_bits`: for rounding.

    The words of the key are scalars or, where the entries are those of several parameters, arrays
    of `shape`.

    References:
      C. Wellons, "Prospecting for hash functions", 2018, the best of two multiplications found
      since, https://github.com/skeeto/hash-prospector/issues/19
    """
    first, second = key
    x = _index(shape) + first
    x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x21F0AAAD) ^ second
    x = (x ^ (x >> jnp.uint32(15))) * jnp.uint32(0xD35A2D97)
    return x ^ (x >> jnp.uint32(15))


def _index(shape: tuple[int, ...]) -> jax.Array:
    """Return the number of each entry, in C order, modulo 2**32."""
    index = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = jnp.uint32(math.prod(shape[axis + 1 :]) % 2**32)
        index = index + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
    return index


def uniform(key: tuple[jax.Array, jax.Array], shape: tuple[int, ...]) -> jax.Array:
    """Return float32 in (0, 1), symmetric about 1/2, in steps of 2**-23."""
    return ((random_bits(key, shape) >> jnp.uint32(9)).astype(jnp.float32) + 0.5) * 2.0**-23


def normal(
    key: tuple[jax.Array, jax.Array], shape: tuple[int, ...], bound: float = math.inf
) -> jax.Array:
    """Return standard normal float32 numbers, conditioned on lying within ±`bound`.

    x = √2 · erf⁻¹((2u - 1) · erf(bound / √2)), with u uniform in (0, 1).
    """
    x = (uniform(key, shape) * 2.0 - 1.0) * math.erf(bound / math.sqrt(2.0))
    x = jax.lax.erf_inv(x) * math.sqrt(2.0)
    return x if math.isinf(bound) else jnp.clip(x, -bound, bound)
