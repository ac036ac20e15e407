"""The noise of `AddNoise`: its distribution, and what it may depend on."""

import functools
import itertools
import json
import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import optimize_loss as ol
from optimize_loss import _random
from optimize_loss import transforms as T
from tests.cases import on_eight_devices

N = 2**16
SCALE = 0.5


@functools.cache
def compiled(truncated):
    tx = T.chain(noise=T.AddNoise(SCALE, truncated=truncated))
    return tx, jax.jit(lambda zeros, state: tx.update(zeros, state)[0])


def noise_of(shapes, seed=0, step=0, truncated=True, scale=SCALE):
    """Return the noise of every parameter: what zero gradients become."""
    tx, update = compiled(truncated)
    zeros = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    state = {**tx.set(tx.init(zeros), seed=seed, scale=scale), "step": jnp.int32(step)}
    return {name: np.asarray(x) for name, x in update(zeros, state).items()}


def sample(name="w", **options):
    """Return N numbers of one parameter, in units of the scale."""
    return noise_of({name: (N,)}, **options)[name] / np.float32(SCALE)


# The distribution.

Z = 2 * 0.5 * math.erf(2 / math.sqrt(2))  # probability that |x| < 2
PHI_2 = math.exp(-2) / math.sqrt(2 * math.pi)  # the normal density at 2

# truncated: its distribution function, its standard deviation.
CURVES = {
    True: (lambda x: 0.5 + 0.5 * math.erf(x / math.sqrt(2)) / Z, math.sqrt(1 - 4 * PHI_2 / Z)),
    False: (lambda x: 0.5 + 0.5 * math.erf(x / math.sqrt(2)), 1.0),
}

STREAMS = {
    "w": {"name": "w"},
    "other-name": {"name": "encoder/layer_0/kernel"},
    "other-step": {"name": "w", "step": 1000},
    "other-seed": {"name": "w", "seed": 2**32 - 1},
}


def kolmogorov_smirnov(x, cdf):
    """Return √n · sup |F_n - F|: above 1.95 once in a thousand samples of the distribution F."""
    want = np.array([cdf(v) for v in np.sort(x)])
    grid = np.arange(len(x) + 1) / len(x)
    return math.sqrt(len(x)) * max(np.max(grid[1:] - want), np.max(want - grid[:-1]))


@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
@pytest.mark.parametrize("truncated", CURVES, ids=["truncated", "normal"])
def test_distribution(truncated, stream):
    cdf, std = CURVES[truncated]
    x = sample(truncated=truncated, **stream).astype(np.float64)
    assert kolmogorov_smirnov(x, cdf) < 1.95
    assert abs(x.mean()) < 4 * std / math.sqrt(N)
    assert x.std() == pytest.approx(std, rel=4 / math.sqrt(2 * N))


def test_truncated_noise_is_what_the_documentation_says():
    assert CURVES[True][1] == pytest.approx(0.8796, abs=1e-4)
    x = noise_of({"w": (2**20,)}, scale=0.25)["w"]
    assert np.abs(x).max() <= 0.5
    assert np.abs(x).max() > 0.4999
    assert x.std() == pytest.approx(0.8796 * 0.25, rel=2e-3)


def test_scale_only_multiplies():
    np.testing.assert_array_equal(2 * noise_of({"w": (9,)}, scale=0.25)["w"], sample()[:9] * 0.5)
    np.testing.assert_array_equal(noise_of({"w": (9,)}, scale=0.0)["w"], np.zeros(9))


def test_normal_noise_has_tails():
    """Beyond 3 standard deviations lie 0.27 %."""
    share = np.mean(np.abs(sample(truncated=False)) > 3)
    assert share == pytest.approx(math.erfc(3 / math.sqrt(2)), rel=0.3)


@pytest.mark.parametrize("along", ["step", "seed"])
def test_distribution_of_one_entry(along):
    """Over steps, as a scalar parameter sees it, and over seeds."""
    tx, update = compiled(True)
    zero = {"w": jnp.zeros(())}
    state = tx.init(zero)
    states = {
        "step": {**state, "step": jnp.arange(N)},
        "seed": {**state, "noise": {**state["noise"], "seed": jnp.arange(N, dtype=jnp.uint32)}},
    }
    axes = jax.tree.map(lambda x: 0 if x.ndim else None, states[along])
    x = np.asarray(jax.vmap(update, in_axes=(None, axes))(zero, states[along])["w"]) / SCALE
    assert kolmogorov_smirnov(x, CURVES[True][0]) < 1.95
    for lag in (1, 2, 4, 256):
        assert abs(np.corrcoef(x[:-lag], x[lag:])[0, 1]) < 4 / math.sqrt(N - lag)


def test_extreme_bits_give_finite_symmetric_numbers(monkeypatch):
    """All bits 0 and all bits 1, of which few samples have any."""
    extremes = jnp.array([0, 2**32 - 1], jnp.uint32)
    monkeypatch.setattr(_random, "random_bits", lambda key, shape: extremes)
    low, high = _random.normal((extremes, extremes), (2,))
    assert -6 < low < -5
    assert high == -low


# Independence.

PAIRS = {
    "names": ({"name": "w"}, {"name": "v"}),
    "names-that-share-a-path": ({"name": "a/kernel"}, {"name": "a/bias"}),
    "names-that-swap": ({"name": "a/b"}, {"name": "b/a"}),
    "steps": ({"step": 0}, {"step": 1}),
    "steps-far-apart": ({"step": 0}, {"step": 2**16}),
    "seeds": ({"seed": 0}, {"seed": 1}),
    "seed-and-step": ({"seed": 1, "step": 0}, {"seed": 0, "step": 1}),
}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("power", [1, 2])
def test_streams_do_not_correlate(pair, power):
    """Neither the numbers nor their squares, at any of the nearest shifts of the index."""
    first, second = pair
    a, b = sample(**first) ** power, sample(**second) ** power
    for shift in (-2, -1, 0, 1, 2):
        assert abs(np.corrcoef(a, np.roll(b, shift))[0, 1]) < 4 / math.sqrt(N)


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 8, 16, 64, 256, 1024, 2**15])
def test_neighbours_do_not_correlate(lag):
    x = sample()
    for power in (1, 2):
        assert abs(np.corrcoef(x[:-lag] ** power, x[lag:] ** power)[0, 1]) < 4 / math.sqrt(N - lag)


def test_entries_do_not_repeat():
    """As many of 2**16 draws from 2**23 values coincide as chance has it."""
    distinct = len(np.unique(sample(truncated=False)))
    expected = 2**23 * -math.expm1(N * math.log1p(-(2.0**-23)))
    assert abs(distinct - expected) < 6 * math.sqrt(N - expected)


# What it depends on: seed, name, step, index, and nothing else.


def test_adding_a_parameter_changes_no_other_noise():
    shapes = {"b": (3,), "m/w": (4, 5), "z": ()}
    alone = noise_of(shapes)
    more = noise_of({"a": (7,), **shapes, "m/v": (4, 5)})
    for name in shapes:
        np.testing.assert_array_equal(more[name], alone[name])
    assert not np.array_equal(more["m/v"], more["m/w"])


def test_noise_is_that_of_the_index():
    """In C order, whatever the shape."""
    flat = noise_of({"w": (60,)})["w"]
    for shape in ((60,), (4, 15), (3, 4, 5), (60, 1)):
        np.testing.assert_array_equal(noise_of({"w": shape})["w"].ravel(), flat)
    np.testing.assert_array_equal(noise_of({"w": (61,)})["w"][:60], flat)


CHANGED = {"seed": {"seed": 1}, "step": {"step": 1}, "name": {"name": "v"}}


@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED)
def test_all_noise_changes_with(change):
    assert np.mean(sample() == sample(**change)) < 1e-4


def test_noise_does_not_depend_on_the_gradient_dtype():
    """float16 gradients get the noise of float32, rounded."""
    tx, _ = compiled(True)
    zeros = {"w": jnp.zeros(100, jnp.float16)}
    got = tx.update(zeros, tx.init(zeros))[0]["w"]
    np.testing.assert_array_equal(got, noise_of({"w": (100,)})["w"].astype(np.float16))


ZEROS = {"w": np.zeros((8, 6), np.float32), "b": np.zeros(5, np.float32)}


def states(tx):
    for seed, step in itertools.product((0, 7), (0, 3)):
        yield {**tx.set(tx.init(ZEROS), seed=seed), "step": jnp.int32(step)}


def test_eager_equals_jit():
    tx, update = compiled(True)
    for state in states(tx):
        got, _ = tx.update(ZEROS, state)
        jax.tree.map(np.testing.assert_array_equal, got, update(ZEROS, state))


def test_vmap_equals_separate_runs():
    tx, update = compiled(True)
    stacked = jax.tree.map(lambda *xs: np.stack(xs), *states(tx))
    got = jax.jit(jax.vmap(update, in_axes=(None, 0)))(ZEROS, stacked)
    separate = [update(ZEROS, state) for state in states(tx)]
    wanted = jax.tree.map(lambda *xs: np.stack(xs), *separate)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def noise_on_eight_devices():
    """Return, as JSON, the noise of a matrix split either way, and of one on one device."""
    tx, update = compiled(True)
    mesh = jax.make_mesh((4, 2), ("x", "y"), (jax.sharding.AxisType.Auto,) * 2)
    noise = {}
    for spec in (P(), P("x"), P(None, "y"), P("x", "y"), P(("x", "y"))):
        zeros = {"w": jax.device_put(jnp.zeros((8, 6)), NamedSharding(mesh, spec))}
        noise[str(spec)] = np.asarray(update(zeros, tx.init(zeros))["w"]).tolist()
    return json.dumps(noise)


@pytest.mark.slow
def test_sharded_equals_unsharded():
    wanted = noise_of({"w": (8, 6)})["w"]
    for spec, got in on_eight_devices(__name__, "noise_on_eight_devices", flags="").items():
        np.testing.assert_array_equal(np.float32(got), wanted, err_msg=spec)


def test_a_resumed_run_repeats_the_noise():
    """A run that is saved as plain numpy and resumed in a new chain ends bit for bit the same."""

    def build():
        noise, rate = T.AddNoise(0.1, seed=3), T.ScaleByLearningRate(0.1)
        return T.chain(noise=noise, adam=T.ScaleByAdam(), rate=rate)

    def train(tx, params, state, steps):
        apply = jax.jit(tx.apply)
        for _ in range(steps):
            params, state = apply(jax.tree.map(lambda p: p - 1, params), state, params)
        return params, state

    first = {"w": jnp.zeros((4, 3)), "b": jnp.zeros(())}
    straight = train(build(), first, build().init(first), 10)
    saved = pickle.dumps(jax.tree.map(np.asarray, train(build(), first, build().init(first), 5)))
    params, state = pickle.loads(saved)
    resumed = train(build(), params, state, 5)
    jax.tree.map(np.testing.assert_array_equal, resumed, straight)


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg", "threefry2x32"])
def test_a_key_of_the_kind_that_jax_is_told_to_use(impl):
    """Raw or typed, it gives the loss the same numbers; noise and rounding need none of it."""

    def loss(params, batch, *, key):
        return jnp.sum(params["w"] * jax.random.normal(key, (4,), jnp.bfloat16)).astype(jnp.float32)

    options = {"gradient_noise_scale": 0.1, "precision": "bfloat16"}
    step = ol.optimize_loss(loss, learning_rate=0.1, optimizer="SGD", **options)
    params = {"w": jnp.ones(4, jnp.bfloat16)}
    with jax.default_prng_impl(impl):
        keys = [jax.random.PRNGKey(0), jax.random.key(0), None]
        losses = [step.many(step.init(params, key=key), jnp.zeros(2)) for key in keys]
    first, second, third = (np.asarray(metrics["loss"]) for _, metrics in losses)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, third)
    with jax.default_prng_impl(impl), pytest.raises(ol.InvalidType, match="one random key"):
        step.init(params, key=jnp.zeros(3, jnp.uint32))
