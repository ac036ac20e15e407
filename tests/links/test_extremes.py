"""What holds for every link at NaN, infinity, and the largest and smallest numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optimize_loss import optimizers
from optimize_loss import transforms as T
from optimize_loss._engine.link import functions_of
from optimize_loss._names import leaf_names
from optimize_loss.transforms._sharpness import climbed
from tests.cases import CASES, LOSS, Case, rows
from tests.links.law import step_of

law = pytest.mark.parametrize("case", rows())
law_where_nan_shows = pytest.mark.parametrize("case", rows("nan_shows"))
of_all_sizes = pytest.mark.parametrize("size", [1.0, 1e-3])


def scaled(size, tree):
    return jax.tree.map(lambda x: (size * x).astype(x.dtype), tree)


def first_update(link, g, p=None):
    """Return the first update of a chain of one link, in a compiled program."""
    tx = T.chain(link=link)
    return jax.jit(tx.update)(g, tx.init(g), g if p is None else p)[0]


# NaN in a number.


def real_numbers(case: Case):
    """Return the link and the name of every number that can be NaN."""
    state = case.chain.init(case.params())
    kinds = ((link, name, state[link][name].dtype) for link, name in case.chain.all_numbers())
    return [(link, name) for link, name, kind in kinds if jnp.issubdtype(kind, jnp.floating)]


def with_nan(state, link, number):
    bad = jnp.full_like(state[link][number], jnp.nan)
    return {**state, link: {**state[link], number: bad}}


def shows(case, link, number, size):
    """Return whether a number that is NaN makes a whole parameter NaN within three steps.

    Until then the parameters are those that the number itself gives, as it has no effect.
    """
    p = q = case.params()
    state = case.chain.init(p)
    bad = with_nan(state, link, number)
    for t in range(3):
        g = scaled(size, case.grads(t))
        p, state = step_of(case.chain)(p, state, g)
        q, bad = step_of(case.chain)(q, bad, g)
        seen = [np.isnan(x).all() for x in jax.tree.leaves(q)]
        for a, b, nan in zip(jax.tree.leaves(p), jax.tree.leaves(q), seen, strict=True):
            assert nan or np.array_equal(a, b), f"{link}/{number}"
        if any(seen):
            return True
    return False


@pytest.mark.slow
@of_all_sizes
@law_where_nan_shows
def test_a_number_that_is_nan_gives_nan(case, size):
    found = [f"{a}/{b}" for a, b in real_numbers(case) if not shows(case, a, b, size)]
    assert found == list(case.quiet)


@pytest.mark.parametrize("link", [T.ClipByGlobalNorm, T.ClipByNorm, T.ClipByValue])
def test_a_bound_that_a_schedule_brings_to_zero_does_not_let_gradients_through(link):
    """It is 1, then 1/2, then 0, which no bound may be."""
    bound = link(lambda t: jnp.maximum(0.0, 1 - t.astype(float) / 2))
    tx = T.chain(clip=bound, rate=T.ScaleByLearningRate(1.0))
    p, g = jnp.zeros(1), jnp.full(1, 100.0)
    state, found = tx.init(p), []
    for _ in range(3):
        p, state = step_of(tx)(p, state, g)
        found.append(p[0])
    np.testing.assert_allclose(found, [-1.0, -1.5, np.nan], rtol=1e-6)


def test_a_scheduled_number_that_becomes_infinite_is_nan():
    clip = T.ClipByNorm(lambda t: 1 / (1 - t.astype(float)))
    tx = T.chain(clip=clip, rate=T.ScaleByLearningRate(1.0))
    p, g = jnp.zeros(1), jnp.full(1, 100.0)
    p, state = step_of(tx)(p, tx.init(p), g)
    assert np.isnan(step_of(tx)(p, state, g)[0])


@pytest.mark.parametrize("number", ["k_sigma", "min_sigma", "epsilon", "decay"])
def test_a_guard_with_a_number_that_is_nan_lets_nothing_through(number):
    tx = T.chain(skip=T.SkipSpikes(warmup_steps=1))
    state = with_nan(tx.init(jnp.zeros(1)), "skip", number)
    for _ in range(3):
        p, state = step_of(tx)(jnp.zeros(1), state, jnp.ones(1))
    assert p == 0
    assert state["skip"]["skipped"] >= 1


def test_a_threshold_that_is_nan_shows_in_the_learning_rate():
    tx = T.chain(plateau=T.ReduceOnPlateau(), rate=T.ScaleByLearningRate(1.0))
    state = with_nan(tx.init(jnp.zeros(1)), "plateau", "threshold")
    p, state = step_of(tx)(jnp.zeros(1), state, jnp.ones(1))
    p, _ = step_of(tx)(p, state, jnp.ones(1))
    assert np.isnan(p)


# NaN and infinity in a gradient.


def entry_after(case, value):
    """Return an entry after three steps, the first with this gradient for it."""
    p, state = case.params(), case.chain.init(case.params())
    for t in range(3):
        g = case.grads(t)
        kernel = g["encoder"]["layer_0"]["kernel"]
        first = kernel.at[0, 0].set(value)
        g["encoder"]["layer_0"]["kernel"] = first if t == 0 else kernel
        p, state = step_of(case.chain)(p, state, g)
    return p["encoder"]["layer_0"]["kernel"][0, 0]


@law
def test_a_gradient_that_is_nan_gives_nan_unless_it_is_left_out(case):
    assert np.isnan(entry_after(case, np.nan)) == case.nan_shows


@pytest.mark.parametrize("value", [np.inf, -np.inf])
@law_where_nan_shows
def test_an_infinite_gradient_is_not_hidden(case, value):
    assert np.isfinite(entry_after(case, value)) == case.bounds_entries


def test_ftrl_does_not_take_a_nan_for_a_parameter_to_set_to_zero():
    p = jnp.array([1.0, 1.0])
    tx = T.chain(ftrl=T.StepByFtrl(0.1, l1_regularization_strength=100.0))
    p, _ = step_of(tx)(p, tx.init(p), jnp.array([np.nan, 1.0]))
    np.testing.assert_array_equal(p, [np.nan, 0.0])


# The largest and the smallest numbers.

SIZES = [("float32", x) for x in (3e38, 1.5e38, 8e37, 1e25, 1.0, 1e-25, 2e-38)]
SIZES += [("bfloat16", 1.5e38), ("bfloat16", 2e-38), ("float16", 6e4), ("float16", 1e-6)]
of_all_magnitudes = pytest.mark.parametrize(("dtype", "size"), SIZES)
PRECISION = {"float32": 2e-6, "bfloat16": 1e-2, "float16": 2e-3}
CLIPS = {
    "norm": T.ClipByNorm(1.0),
    "global-norm": T.ClipByGlobalNorm(1.0),
    "adaptive": T.ClipByAdaptiveNorm(static_max_norm=1.0),
}


def direction(size, dtype="float32"):
    """Return a vector of this norm, and its norm as rounding has left it."""
    g = jnp.array([0.6 * size, 0.8 * size], dtype)
    return g, float(np.linalg.norm(np.asarray(g, np.float64)))


@of_all_magnitudes
@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
def test_clipped_to_1(clip, dtype, size):
    """A norm is the right one before a clip and behind it."""
    tx = T.chain(before=T.ObserveNorm(), clip=clip, after=T.ObserveNorm(), each=T.ObserveNorms())
    g, norm = direction(size, dtype)
    update, state = jax.jit(tx.update)(g, tx.init(g), g)
    wanted = np.asarray(g, np.float64) / max(norm, 1.0)
    np.testing.assert_allclose(np.float64(update), wanted, PRECISION[dtype])
    found = [state[name]["norm"] for name in ("before", "after", "each")]
    np.testing.assert_allclose(found, [norm, min(norm, 1.0), min(norm, 1.0)], 2e-6)


def test_clips_of_clips_do_not_lose_what_is_left():
    g, _ = direction(3e38)
    tx = T.chain(clip=T.ClipByGlobalNorm(1e30), again=T.ClipByGlobalNorm(1.0), seen=T.ObserveNorm())
    update, state = jax.jit(tx.update)(g, tx.init(g), g)
    np.testing.assert_allclose(update, [0.6, 0.8], 1e-6)
    np.testing.assert_allclose(state["seen"]["norm"], 1.0, 1e-6)


@pytest.mark.parametrize("max_norm", [1e-15, 1.0, 1e30])
def test_any_bound_of_any_norm(max_norm):
    g, _ = direction(3e38)
    for clip in (T.ClipByNorm(max_norm), T.ClipByGlobalNorm(max_norm)):
        np.testing.assert_allclose(first_update(clip, g), direction(max_norm)[0], 2e-6)


def test_a_large_complex_entry_keeps_its_phase():
    update = first_update(T.ClipByValue(1.0), jnp.array([1.5e38 - 2e38j]))
    np.testing.assert_allclose(update, [0.6 - 0.8j], 2e-6)


@of_all_magnitudes
def test_a_climb_is_of_length_rho(dtype, size):
    g, norm = direction(size, dtype)
    (p,) = climbed([jnp.zeros(2)], [g], jnp.float32(0.5))
    np.testing.assert_allclose(p, 0.5 * np.asarray(g, np.float64) / norm, PRECISION[dtype])


# Beside these gradients no ε counts.
SCALE_FREE = {
    "adamax": (T.ScaleByAdamax(), [1.0, -2.0]),
    "lion": (T.ScaleByLion(), [1.0, -2.0]),
    "muon": (T.ScaleByMuon(), [[1.0, 0.5], [0.0, 1.0]]),
    "muon-plain": (T.ScaleByMuon(nesterov=False), [[1.0, 0.5], [0.0, 1.0]]),
}


@pytest.mark.parametrize("size", [1.5e38, 8e37, 1e25, 1e10])
@pytest.mark.parametrize("name", SCALE_FREE)
def test_the_size_of_the_gradients_does_not_count(name, size):
    link, g = SCALE_FREE[name]
    g = jnp.array(g)
    wanted = first_update(link, 1000 * g)
    np.testing.assert_allclose(first_update(link, size * g), wanted, 1e-5, 1e-6)


@pytest.mark.parametrize("size", [3e38, 1e25, 1.0, 1e-25, 2e-38])
@pytest.mark.parametrize("of_gradient", [1e15, 1.0, 1e-15])
def test_lamb_is_as_long_as_the_parameter(of_gradient, size):
    g, p = jnp.full(2, of_gradient), direction(size)[0]
    update = first_update(T.ScaleByLamb(), g, p)
    np.testing.assert_allclose(update, np.full(2, size * 0.5**0.5), 1e-5)


@pytest.mark.slow
@law
def test_zero_gradients_that_are_known_at_compile_time(case):
    p, g = case.params(), jax.tree.map(jnp.zeros_like, case.params())
    state = case.chain.init(p)
    got = jax.jit(lambda p, state: case.chain.apply(g, state, p, value=LOSS))(p, state)
    wanted = step_of(case.chain)(p, state, g)
    for name, a, b in zip(leaf_names(got), *map(jax.tree.leaves, (got, wanted)), strict=True):
        np.testing.assert_allclose(a, b, 1e-5, 1e-6, err_msg=name)


GATED = T.chain(gate=T.Accumulate(1), seen=T.ObserveNorm(), clip=T.ClipByGlobalNorm(1.0))


@pytest.mark.parametrize("value", [0.0, 1e-25, 1e25])
def test_a_program_of_constants_alone(value):
    """XLA joins constant factors, whose product may overflow."""

    @jax.jit
    def norm():
        p = jnp.zeros(4)
        return GATED.update(jnp.full_like(p, value), GATED.init(p), p)[1]["seen"]["norm"]

    np.testing.assert_allclose(norm(), 2 * value, 1e-6)


# Checks that JAX can be told to make.


def reads_params(case):
    links = [link for _, link in case.chain._linked() if isinstance(link, T.Link)]
    return any(link.reads_params or "before" in functions_of(type(link)) for link in links)


WITHOUT_PARAMS = [pytest.param(case, id=case.name) for case in CASES if not reads_params(case)]


@pytest.mark.slow
@pytest.mark.parametrize("case", WITHOUT_PARAMS)
def test_update_without_params_under_the_search_for_nan(case):
    p, g = case.params(), case.grads(0)
    state = case.chain.init(p)
    with jax.debug_nans(True), jax.debug_infs(True):
        updates = case.chain.update, jax.jit(case.chain.update)
        eager, compiled = (update(g, state, value=LOSS) for update in updates)
    for a, b in zip(*map(jax.tree.leaves, (eager, compiled)), strict=True):
        np.testing.assert_allclose(a, b, 1e-5, 1e-6)


GIVEN_NO_LOSS = {
    "optimizer": optimizers.Adam(0.1),
    "schedule": T.chain(rate=T.ScaleByLearningRate(lambda t: 0.1 + 0 * t.astype(float))),
    "accumulate": T.chain(accumulate=T.Accumulate(2), adam=optax.adam(0.1)),
}


@pytest.mark.parametrize("name", GIVEN_NO_LOSS)
def test_updates_without_a_loss_under_the_search_for_nan(name):
    tx, g = GIVEN_NO_LOSS[name], {"w": jnp.ones(3)}
    for update in (tx.update, jax.jit(tx.update)):
        state = tx.init(g)
        with jax.debug_nans(True), jax.numpy_dtype_promotion("standard"):  # optax relies on it
            for _ in range(2):
                updates, state = update(g, state)
        assert (updates["w"] < 0).all()
