"""Adafactor, Muon and schedule-free Adam: values derived on paper, numpy's SVD, and optax."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optimize_loss import schedules
from optimize_loss import transforms as T
from tests.cases import SHAPES, params, random_like


def adafactor(rate: Any = 0.5, **options):
    return T.StepByAdafactor(rate, **{"clip_threshold": 10.0, **options})


def scaled(momentum=1.0, nesterov=True, coefficients=(1.0, 0.0, 0.0), rms_rate=None):
    """Muon in which X is u / ‖u‖, unless coefficients are given."""
    linear, cubic, quintic = coefficients
    return T.ScaleByMuon(momentum, nesterov, 1, linear, cubic, quintic, rms_rate)


def schedule_free(rate=0.5, beta_1=0.5, **options):
    return T.StepByScheduleFree(rate, beta_1, **{"beta_2": 0.0, "epsilon": 1e-30, **options})


A = adafactor()
ROW = np.sqrt([[3, 3 / 5], [3 / 5, 27 / 25]])  # the roots of g² / (r c / 3) where r = c = (1, 5)
SIDES = np.array([0.6, 0.8])
POLYNOMIAL = 2 * SIDES + 3 * SIDES**3 + 4 * SIDES**5

# link, gradients of one parameter step by step, the parameter, and its updates.
VALUES: dict[str, tuple[T.Link, Any, Any, Any]] = {
    "adafactor-zero-gradient": (A, [[0.0, 0.0]], [3.0, 4.0], [[0.0, 0.0]]),
    "adafactor-zero-matrix": (A, [[[0.0, 0.0]]], [[3.0, 4.0]], [[[0.0, 0.0]]]),
    "adafactor-first-step": (A, [[4.0, -1e-10]], [1.0, 7.0], [[-2.5, 2.5]]),
    "adafactor-scalar": (A, [-2.0], 3.0, [1.5]),
    "adafactor-small-parameter": (adafactor(epsilon_2=0.25), [[4.0]], [0.125], [[-0.125]]),
    "adafactor-at-the-cap": (adafactor(1.0), [[4.0]] * 2, [2.0], [[-2.0], [-2 / np.sqrt(2)]]),
    "adafactor-above-the-cap": (adafactor(9.0), [[4.0]] * 2, [2.0], [[-2.0], [-2 / np.sqrt(2)]]),
    "adafactor-schedule-above-the-cap": (
        adafactor(schedules.PiecewiseConstantDecay([0], [0.5, 9.0])),
        [[4.0]] * 2,
        [2.0],
        [[-1.0], [-2 / np.sqrt(2)]],
    ),
    "adafactor-relative-step-off": (
        adafactor(9.0, relative_step=False),
        [[4.0]] * 2,
        [2.0],
        [[-18.0], [-18.0]],
    ),
    "adafactor-mean-of-all-squares": (
        adafactor(beta_2_decay=-1.0),
        [[3.0], [4.0], [0.0]],
        [2.0],
        [[-1.0], [-4 / np.sqrt((9 + 16) / 2)], [0.0]],
    ),
    "adafactor-newest-square": (adafactor(beta_2_decay=0.0), [[3.0], [4.0]], [2.0], [[-1.0]] * 2),
    "adafactor-below-the-threshold": (adafactor(clip_threshold=2.0), [[3.0]], [2.0], [[-1.0]]),
    "adafactor-above-the-threshold": (adafactor(clip_threshold=0.5), [[3.0]], [2.0], [[-0.5]]),
    "adafactor-matrix": (
        A,
        [[[1.0, 1.0], [-1.0, 3.0]]],
        [[2.0] * 2] * 2,
        [-ROW * [[1, 1], [-1, 1]]],
    ),
    "adafactor-matrix-above-the-threshold": (
        adafactor(clip_threshold=1.0),
        [[[1.0, 1.0], [1.0, 3.0]]],
        [[2.0] * 2] * 2,
        [-ROW / np.sqrt(1.32)],
    ),
    "adafactor-zero-row-and-column": (  # where Keras divides 0 by 0
        A,
        [[[4.0, 0.0], [0.0, 0.0]]],
        [[2.0] * 2] * 2,
        [[[-1.0, 0.0], [0.0, 0.0]]],
    ),
    "adafactor-complex": (A, [[3 + 4j, 0j]], [2 + 0j, 2 + 0j], [[-0.6 - 0.8j, 0j]]),
    "muon-zero-gradient": (T.ScaleByMuon(), [[[0.0, 0.0]]], [[0.0, 0.0]], [[[0.0, 0.0]]]),
    "muon-sum": (
        scaled(nesterov=False),
        [[[3.0, 0.0]], [[0.0, 4.0]]],
        [[0.0, 0.0]],
        [[[1.0, 0.0]], [[0.6, 0.8]]],
    ),
    "muon-nesterov": (
        scaled(),
        [[[3.0, 0.0]], [[0.0, 2.0]]],
        [[0.0, 0.0]],
        [[[1.0, 0.0]], [[0.6, 0.8]]],
    ),
    "muon-without-momentum": (scaled(0.0), [[[3.0, 4.0]]] * 2, [[0.0, 0.0]], [[[0.6, 0.8]]] * 2),
    "muon-polynomial": (
        scaled(coefficients=(2.0, 3.0, 4.0)),
        [[[3.0, 0.0], [0.0, -4.0]]],
        [[0.0] * 2] * 2,
        [np.diag([1, -1] * POLYNOMIAL)],
    ),
    "muon-rms-rate": (
        scaled(rms_rate=0.5),
        [[[3.0, 0, 0, 4.0]]],
        [[0.0] * 4],
        [[[0.6, 0, 0, 0.8]]],
    ),
    "muon-no-overflow": (scaled(), [[[3e30, 4e30]]], [[0.0, 0.0]], [[[0.6, 0.8]]]),
    "schedule-free-zero-gradient": (schedule_free(), [[0.0]] * 2, [2.0], [[0.0]] * 2),
    "schedule-free-first-step": (schedule_free(), [[4.0, -1e-10]], [0.0, 0.0], [[-0.5, 0.5]]),
    "schedule-free-epsilon": (schedule_free(epsilon=1.0), [[4.0]], [0.0], [[-0.5 * 4 / 5]]),
    "schedule-free-complex": (schedule_free(), [[3 + 4j, 0j]], [0j, 0j], [[-0.3 - 0.4j, 0j]]),
}


@pytest.mark.parametrize("name", VALUES)
def test_value(name):
    """The parameter stays where it is."""
    link, grads, p, wanted = VALUES[name]
    p = jnp.array(p, jnp.complex64 if np.iscomplexobj(p) else jnp.float32)
    tx = T.chain(link=link)
    state = tx.init(p)
    for g, update in zip(grads, wanted, strict=True):
        got, state = tx.update(jnp.array(g, p.dtype), state, p)
        np.testing.assert_allclose(got, update, rtol=1e-6, atol=1e-9)


def trajectory(tx, first=None, steps=20):
    """Return parameters and states after every step, stacked; gradients are random."""
    first = params() if first is None else first
    shapes = jax.tree.map(jnp.shape, first)
    grads = [random_like(shapes, 100 + t) for t in range(steps)]

    def step(carry, g):
        p, state = carry
        new = tx.apply(g, state, p)
        return new, new

    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *grads)
    with jax.numpy_dtype_promotion("standard"):  # optax multiplies integers by floats
        return jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), stacked))(first)[1]


def assert_close(got, want, tolerance=1e-6):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), got, want
    )


# ours, optax's; over 20 steps.
EQUAL = {
    "adafactor": (
        T.StepByAdafactor(0.1, relative_step=False),
        optax.adafactor(0.1, min_dim_size_to_factor=1),
    ),
    "schedule-free": (T.StepByScheduleFree(0.01), optax.contrib.schedule_free_adamw(0.01)),
}


@pytest.mark.parametrize("name", EQUAL)
def test_equals_optax(name):
    ours, theirs = (trajectory(T.chain(rule=rule))[0] for rule in EQUAL[name])
    assert_close(ours, theirs, 2e-6)


# Adafactor.


def test_adafactor_keeps_means_of_rows_and_columns_or_all():
    tx, p = T.chain(adafactor=A), random_like({**SHAPES, "stack": (5, 4, 3)}, 0)
    state = jax.eval_shape(tx.init, p)["adafactor"]
    slots = ("row", "column", "v")
    kept = {slot: [x.shape for x in jax.tree.leaves(state[slot])] for slot in slots}
    assert kept == {  # of a bias, a kernel, a scalar and a stack
        "row": [(0,), (8,), (0,), (5, 4)],
        "column": [(0,), (2,), (0,), (5, 3)],
        "v": [(2,), (0,), (), (0,)],
    }


def test_adafactor_of_gradients_of_rank_1_is_that_of_the_entries():
    """Where all g² are multiples of one product of a column and a row, V is exact."""
    tx = T.chain(adafactor=T.StepByAdafactor(0.1))
    g = jnp.outer(jnp.array([1.0, -2.0, 0.5]), jnp.array([3.0, -0.1]))
    p = random_like((3, 2), 0)

    def updates(shape):
        state = tx.init(p.reshape(shape))
        for size in (1.0, -3.0, 0.2):
            update, state = tx.update(size * g.reshape(shape), state, p.reshape(shape))
            yield update.ravel()

    assert_close(list(updates((3, 2))), list(updates((6,))))


def test_adafactor_of_a_stack_is_that_of_each_matrix():
    """But for rms(p) and rms(x), which are of the whole stack, and here have no effect."""
    tx = T.chain(adafactor=adafactor(epsilon_2=100.0, clip_threshold=1e6))
    ps, gs = random_like((5, 4, 3), 0), random_like((5, 4, 3), 1)
    together, _ = tx.update(gs, tx.init(ps), ps)
    pairs = zip(ps, gs, strict=True)
    assert_close(list(together), [tx.update(g, tx.init(p), p)[0] for p, g in pairs])


# Muon.


def rounds(s, coefficients=(3.4445, -4.775, 2.0315), steps=5):
    a, b, c = coefficients
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return s


def muon_of(g, **options):
    tx = T.chain(muon=T.ScaleByMuon(**options))
    return tx.update(g, tx.init(g))[0]


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
@pytest.mark.parametrize("shape", [(4, 4), (4, 7), (7, 4), (1, 5), (1, 1)])
def test_muon_changes_singular_values_alone(shape, dtype):
    """By numpy's decomposition; afterwards all are near 1."""
    g = random_like(shape, 3, dtype)
    u, s, vh = np.linalg.svd(np.asarray(g, np.complex128), full_matrices=False)
    s = rounds(s / np.linalg.norm(s))
    got = muon_of(g, rms_rate=None)
    np.testing.assert_allclose(got, (u * s) @ vh, rtol=0, atol=2e-5)
    assert (s > 0.68).all()
    assert (s < 1.14).all()


def test_muon_of_the_transpose_is_the_transpose():
    g = random_like((3, 8), 0)
    assert_close(muon_of(g.T), muon_of(g).T)


@pytest.mark.parametrize("shape", [(2, 9), (9, 2), (3, 3)])
def test_muon_scales_by_the_longer_side(shape):
    g = random_like(shape, 0)
    assert_close(muon_of(g), 0.2 * np.sqrt(max(shape)) * muon_of(g, rms_rate=None))


@pytest.mark.parametrize("shape", [(), (3,), (2, 2, 2)])
def test_muon_is_for_matrices(shape):
    with pytest.raises(ValueError, match=r"matrices alone.*`ForParameters`.*Received.*shape \("):
        T.chain(muon=T.ScaleByMuon()).init(jnp.zeros(shape))


@pytest.mark.parametrize("steps", [0, -1, 2.5, True])
def test_muon_needs_a_round(steps):
    with pytest.raises(ValueError, match="`ns_steps` must be an integer of at least 1"):
        T.ScaleByMuon(ns_steps=steps)


# Schedule-free Adam.


def test_schedule_free_averages_all_z():
    """And p is between z and their mean."""
    tx = T.chain(free=T.StepByScheduleFree(0.1, 0.75))
    ps, states = trajectory(tx, steps=5)
    last = jax.tree.map(lambda x: x[-1], (ps, states))
    mean = jax.tree.map(lambda z: jnp.mean(z, 0), states["free"]["z"])
    between = jax.tree.map(lambda z, x: 0.25 * z[-1] + 0.75 * x, states["free"]["z"], mean)
    assert_close(tx.averaged(last[1], last[0]), mean)
    assert_close(last[0], between)


def test_schedule_free_warms_up():
    """With gradients of 1 and no memory of squares, z moves by 1/4, 2/4, 3/4, 1, 1."""
    tx = T.chain(free=schedule_free(1.0, warmup_steps=4))
    p = jnp.zeros(())
    state, seen = tx.init(p), []
    for _ in range(5):
        p, state = tx.apply(jnp.ones(()), state, p)
        seen.append((state["free"]["z"], tx.averaged(state, p)))
    zs = -np.cumsum([0.25, 0.5, 0.75, 1.0, 1.0])
    assert_close(seen, list(zip(zs, np.cumsum(zs) / range(1, 6), strict=True)))


def test_schedule_free_corrects_the_mean_of_squares():
    """With gradients 3 and 4 and β₂ = 1/2, v is 9/2, then 9/4 + 16/2, over 1/2 and 3/4."""
    tx = T.chain(free=schedule_free(beta_2=0.5))
    p, state = tx.apply(jnp.float32(3.0), tx.init(jnp.float32(0.0)), jnp.float32(0.0))
    _, state = tx.apply(jnp.float32(4.0), state, p)
    wanted = -0.5 - 0.5 * 4 / np.sqrt((9 / 4 + 16 / 2) / 0.75)
    np.testing.assert_allclose(state["free"]["z"], wanted, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "complex64"])
def test_schedule_free_average_has_the_dtype_of_the_parameter(dtype):
    tx = T.chain(free=T.StepByScheduleFree())
    p = random_like((3,), 0, dtype)
    start = tx.averaged(tx.init(p), p)
    assert start.dtype == p.dtype
    np.testing.assert_array_equal(start, p)


@pytest.mark.parametrize("beta_1", [0.0, 1.0, -0.5, 1.5, schedules.WarmUpDecay(0.9)])
def test_schedule_free_needs_a_number_between_0_and_1(beta_1):
    with pytest.raises(ValueError, match=r"`beta_1` must be (in \(0, 1\)|a number)"):
        T.StepByScheduleFree(beta_1=beta_1)


@pytest.mark.parametrize("steps", [-1, 2.5])
def test_schedule_free_warms_up_in_whole_steps(steps):
    with pytest.raises(ValueError, match="`warmup_steps` must be an integer of at least 0"):
        T.StepByScheduleFree(warmup_steps=steps)
