"""Numbers of 16 and 8 bits: the bits themselves, and that rounding has no bias."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from optimize_loss._engine.bits import HALF, from_e4m3, round_to, to_bfloat16, to_e4m3
from optimize_loss._random import quick_bits, streams

EVERY_BFLOAT16 = (np.arange(2**16, dtype=np.uint32) << 16).view(np.float32)


# Numbers of 16 and 8 bits.


def test_e4m3_is_bit_equal_to_the_cast_of_ml_dtypes():
    random = np.random.default_rng(0).normal(size=200_000).astype(np.float32)
    edges = np.array([464, 464.00003, 2.0**-6, 2.0**-10], np.float32)
    values = np.concatenate([EVERY_BFLOAT16, random * 10, random / 100, edges], dtype=np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        native = values.astype(ml_dtypes.float8_e4m3fn)
    want = native.view(np.uint8)
    got = np.asarray(jax.jit(to_e4m3)(values))
    not_nan = ~np.isnan(native.astype(np.float32))
    np.testing.assert_array_equal(got[not_nan], want[not_nan])
    assert (got[~not_nan] & 0x7F == 0x7F).all()


def test_all_numbers_of_8_bits_come_back():
    codes = np.arange(256, dtype=np.uint32)
    want = codes.astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(from_e4m3(jnp.asarray(codes))), want)


@pytest.mark.parametrize("random", [0, 1, HALF, 0xFFFF])
def test_every_bfloat16_rounds_to_itself(random):
    """Infinities, subnormal numbers, -0.0 and the largest: whatever the random bits are."""
    got = np.asarray(to_bfloat16(jnp.asarray(EVERY_BFLOAT16), jnp.uint32(random)))
    number = ~np.isnan(EVERY_BFLOAT16)
    want = EVERY_BFLOAT16.view(np.uint32)
    np.testing.assert_array_equal(got[number] & 0xFFFF0000, want[number])
    assert np.isnan((got[~number] & 0xFFFF0000).view(np.float32)).all()


@pytest.mark.parametrize("random", [0, HALF, 0xFFFF])
def test_nothing_finite_becomes_infinite_and_no_nan_a_number(random):
    bits = np.array([0x7F7FFFFF, 0xFF7FFFFF, 0x7F800001, 0xFFFFFFFF, 0x7FC00000], np.uint32)
    got = to_bfloat16(jnp.asarray(bits.view(np.float32)), jnp.uint32(random))
    values = (np.asarray(got) & 0xFFFF0000).view(np.float32)
    largest = float(jnp.finfo(jnp.bfloat16).max)
    np.testing.assert_array_equal(values, [largest, -largest, np.nan, np.nan, np.nan])


EDGES = {
    jnp.bfloat16: [0.0, -0.0, np.inf, -np.inf, np.nan, 2.0**-133, -(2.0**-126), 3.3895314e38],
    jnp.float16: [0.0, -0.0, np.inf, -np.inf, np.nan, 2.0**-24, -(2.0**-14), 65504.0, 1e6],
}


@pytest.mark.parametrize("dtype", EDGES)
def test_edges_survive_rounding(dtype):
    x = np.array(EDGES[dtype], np.float32)
    want = np.asarray(jnp.asarray(x).astype(dtype).astype(jnp.float32))
    for random in (0, 0xFFFFFFFF):
        got = round_to(jnp.asarray(x), jnp.dtype(dtype), jnp.uint32(random))
        got = np.asarray(got.astype(dtype).astype(jnp.float32))
        np.testing.assert_array_equal(got, want)
        assert (np.signbit(got) == np.signbit(want))[~np.isnan(want)].all()


def bits(count, name="w", step=0):
    first, second = streams(jnp.uint32(0), [name], jnp.int32(step))
    return quick_bits((first[0], second[0]), (count,))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("x", [1.0003, -0.3333, 1e-3, -3e-6, 100.17])
def test_rounding_is_unbiased_and_to_a_neighbour(dtype, x):
    """Of 2**18 entries so many go up that the mean is right to six of its standard deviations."""
    count = 2**18
    got = np.asarray(round_to(jnp.full(count, x), jnp.dtype(dtype), bits(count)))
    values = np.unique(got).astype(np.float64)
    stored = np.asarray(jnp.asarray(values, jnp.float32).astype(dtype).astype(jnp.float32))
    np.testing.assert_array_equal(stored, values.astype(np.float32))
    low, high = values
    assert low < np.float32(x) < high
    near = np.float64(np.asarray(jnp.asarray(x).astype(dtype).astype(jnp.float32)))
    assert near in (low, high)
    assert high - low <= 2 * float(jnp.finfo(dtype).eps) * abs(x) + 2.0**-24
    share = (np.float64(np.float32(x)) - low) / (high - low)
    deviation = np.sqrt(share * (1 - share) / count)
    assert abs((got == np.float32(high)).mean() - share) < 6 * deviation


def test_random_bits_are_even_and_independent():
    """Each bit, and each pair of one bit in neighbours, of parameters and of steps."""
    count = 2**18
    drawn = np.asarray(bits(count))
    others = [np.roll(drawn, 1), np.asarray(bits(count, step=1)), np.asarray(bits(count, "v"))]
    for words in (drawn, *(drawn ^ other for other in others)):
        shares = [(words >> i & 1).mean() for i in range(32)]
        assert np.abs(np.array(shares) - 0.5).max() < 6 * 0.5 / np.sqrt(count)
