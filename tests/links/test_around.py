"""What goes around a rule: loss scales, accumulation, averages, sharpness, plateaus."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optimize_loss as ol
from tests.links.around import (
    T,
    W,
    assert_close,
    build,
    network_params,
    rows,
    small,
    squares,
    weighing,
)

# Where the links go.

ORDERS = {
    "all": (
        {
            "skip": "nonfinite",
            "loss_scale": "dynamic",
            "accumulate": 2,
            "ema": 0.9,
            "lookahead": 5,
            "sam": 0.1,
            "plateau": T.ReduceOnPlateau(),
            "gradient_noise_scale": 0.1,
        },
        "skip loss_scale accumulate gradient_noise gradient_norm rate plateau sam lookahead ema",
    ),
    "around-a-scale-of-the-optimizer": (
        {
            "optimizer": T.chain(scale=T.DivideByLossScale(2.0), momentum=T.ScaleByMomentum()),
            "accumulate": 2,
            "skip": ol.Spike(),
        },
        "skip scale accumulate gradient_norm momentum rate",
    ),
    "behind-sums": (
        {
            "optimizer": T.chain(sums=T.SumOverAxis("data"), momentum=T.ScaleByMomentum()),
            "skip": "nonfinite",
        },
        "sums skip gradient_norm momentum rate",
    ),
    "a-guard-of-the-optimizer": (
        {"optimizer": T.chain(own=T.SkipNonFinite(), rate=T.ScaleByMomentum()), "accumulate": 2},
        "own accumulate gradient_norm rate rate_1",
    ),
}


@pytest.mark.parametrize("case", ORDERS.values(), ids=ORDERS)
def test_order(case):
    options, wanted = case
    assert [name for name, _ in build(**options).chain.links] == wanted.split()


# Bad input: the option, what comes, and what the message says.

BAD = [
    ("skip", "nan", ["`skip`", "'nonfinite'", "'nan'"]),
    ("skip", True, ["`skip`", "Spike", "True"]),
    ("skip", ol.Spike, ["`skip`", "Spike"]),
    ("loss_scale", float("nan"), ["`loss_scale`", "nan"]),
    ("ema", 1.0, ["`ema`", "[0, 1)", "1.0"]),
    ("ema", -0.1, ["`ema`", "[0, 1)", "-0.1"]),
    ("ema", "yes", ["`ema`", "number", "'yes'"]),
    ("lookahead", 0, ["`lookahead`", "at least 1", "0"]),
    ("sam", 0.0, ["`sam`", "above 0", "0.0"]),
    ("plateau", 0.5, ["`plateau`", "ReduceOnPlateau", "0.5"]),
]
WRONG_LINKS = [
    (lambda: T.SkipSpikes(-1.0), ["`k_sigma`", "at least 0", "-1.0"]),
    (lambda: T.SkipSpikes(decay=1.0), ["`decay`", "[0, 1)", "1.0"]),
    (lambda: T.SkipNonFinite(most=0), ["`most`", "at least 1", "0"]),
    (lambda: T.ReduceOnPlateau(1.5), ["`multiplier`", "[0, 1]", "1.5"]),
    (lambda: T.ReduceOnPlateau(patience=-1), ["`patience`", "at least 0", "-1"]),
    (lambda: T.ReduceOnPlateau(relative=1), ["`relative`", "True or False", "1"]),
    (lambda: T.Lookahead(0), ["`every`", "at least 1", "0"]),
    (lambda: build(accumulate=2, optimizer=T.chain(x=T.Accumulate(2))), ["`accumulate`", "'x'"]),
    (lambda: build(ema=0.9, optimizer=T.chain(ema=T.ObserveNorm())), ["`ema`", "'ema'"]),
    (
        lambda: T.chain(adam=T.ScaleByAdam(), plateau=T.ReduceOnPlateau()),
        ["'plateau'", "`learning_rate`"],
    ),
]


@pytest.mark.parametrize(("name", "value", "parts"), BAD)
def test_bad_option(name, value, parts):
    with pytest.raises(ValueError, match=parts[0]) as caught:
        build(**{name: value})
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize(("make", "parts"), WRONG_LINKS)
def test_bad_link(make, parts):
    with pytest.raises(ValueError, match=parts[0]) as caught:
        make()
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize("weight", [np.ones(2), "2", 1j])
def test_a_weight_is_a_number(weight):
    step = weighing(weight)
    with pytest.raises(ValueError, match="`weight` must be a"):
        step(step.init(W), 1.0)


SCALES = {
    "dynamic": ("dynamic", True),
    "dynamic-too-large-at-first": (T.DivideByDynamicLossScale(2.0**40), True),
    "fixed": (2.0**12, True),
    "none": (None, False),
}


@pytest.mark.parametrize("case", SCALES.values(), ids=SCALES)
def test_82_a_loss_scale_trains_float16(case):
    scale, trains = case
    rule = T.chain(adam=T.ScaleByAdam(epsilon=1e-12), rate=T.ScaleByLearningRate(0.05))
    step = build(small, optimizer=rule, learning_rate=None, loss_scale=scale, skip="nonfinite")
    state = step.init({"w": np.ones(3, np.float16)})
    state, metrics = step.many(state, np.full((60, 3), 1e-4, np.float16))
    assert state.params["w"].dtype == jnp.float16
    assert metrics["skipped"][-1] == 0
    assert metrics["loss"].dtype == jnp.float16
    error = np.abs(np.asarray(state.params["w"], np.float32) - 2).max()
    assert (error < 0.2) == trains
    assert (error == 1) == (not trains)


def test_a_fixed_scale_that_the_loss_cannot_hold_is_an_error():
    step = build(small, loss_scale=2.0**17)
    with pytest.raises(
        ValueError, match=r"`loss_scale` must be at most 65504, .* float16"
    ) as caught:
        step(step.init({"w": np.ones(3, np.float16)}), np.ones(3, np.float16))
    assert "loss_scale=131072.0" in str(caught.value)
    step(step.init({"w": np.ones(3, np.float32)}), np.ones(3, np.float32))


@pytest.mark.parametrize("skip", [None, "nonfinite"])
def test_what_a_loss_scale_drops_leaves_no_trace_and_is_seen(skip):
    """At 2¹²⁰ a gradient of 1e3 is infinite, and 2e2 is not after one halving."""

    def counting(params, x, *, model_state):
        return params["w"] * x, ol.Aux(model_state=model_state + 1)

    scale = T.DivideByDynamicLossScale(2.0**120, 1)
    step = build(counting, loss_scale=scale, skip=skip)
    state = step.init(W, model_state=np.int32(0))
    state, metrics = step.many(state, np.array([1e3, 1e3, 1e2, 1e3, 1e-3, 1e-3], np.float32))
    powers = np.log2(np.asarray(metrics["loss_scale"])).tolist()
    assert powers == [119, 118, 119, 118, 119, 120]
    assert (state.model_state, state.step) == (3, 3)


@pytest.mark.parametrize("first", [0.25, 1.0, 1.5, 2.0, 2.0**126])
def test_a_loss_scale_tells_whether_it_let_the_gradients_through(first):
    link = T.DivideByDynamicLossScale(first, 2)
    tx = T.chain(scale=link, rate=T.ScaleByLearningRate(1.0))
    state = tx.init(W)
    for bad in (0, 1, 1, 0, 0, 0, 1, 0, 0):
        old, grad = state, {"w": np.float32(np.inf if bad else 1)}
        _, state = tx.update(grad, old)
        assert bool(link.was_open(old["scale"], state["scale"])) == (state["step"] > old["step"])
        assert (state["step"] > old["step"]) == (not bad)


# Averages.


def test_an_ema_whose_schedule_reaches_1_is_a_mean_of_all():
    """Parameters of 3, 2, 1, 0; at a decay of 1 each has the weight 1/t."""
    step = build(ema=lambda n: jnp.float32(1))
    state, _ = step.many(step.init(W), np.ones(4, np.float32))
    np.testing.assert_allclose(state.eval_params["w"], 1.5, rtol=1e-6)
    step = build(ema=lambda n: jnp.minimum(n / 2, 1.0))
    state, _ = step.many(step.init(W), np.ones(4, np.float32))
    assert 0 <= state.eval_params["w"] <= 3


def test_ema_leaves_the_first_parameters_out():
    """Parameters of 3, 2, 1, 0 with weights that halve going back: (0·8 + 1·4 + 2·2 + 3·1) / 15."""
    step = build(ema=0.5)
    state, _ = step.many(step.init(W), np.ones(4, np.float32))
    np.testing.assert_allclose(state.eval_params["w"], 11 / 15, rtol=1e-6)


def test_ema_of_accumulated_updates_counts_updates():
    once, twice = build(ema=0.5), build(ema=0.5, accumulate=2)
    a, _ = once.many(once.init(W), np.ones(3, np.float32))
    b, _ = twice.many(twice.init(W), np.ones(6, np.float32))
    assert_close(a.eval_params, b.eval_params, 0)


PARAMS = {"a": np.full(2, 2.0, np.float32), "b": np.ones(2, np.float32), "n": np.arange(2)}


def two(params, x):
    return x * jnp.sum(params["a"]) + x * jnp.sum(params["b"])


EVALUATED = {
    "none": ({}, 1.0, 1),
    "ema": ({"ema": 0.0}, 1.0, 1),
    "all": ({"ema": T.AverageParams(0.5)}, None, 1.5),
    "lookahead": ({"lookahead": 2}, 2.0, 2),
    "overwrite": ({"ema": T.AverageParams(0.5, overwrite_every=1)}, None, 1.5),
    "some": ({"optimizer": T.chain(x=T.ScaleByLearningRate(1.0),
                                   e=T.ForParameters("a", T.AverageParams(0.5))),
              "learning_rate": None}, None, 1.5),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("bucket", [None, "auto"])
@pytest.mark.parametrize("variables", [None, ["a"]])
@pytest.mark.parametrize("case", EVALUATED.values(), ids=EVALUATED)
def test_parameters_to_evaluate(case, variables, bucket):
    """After one step of 1, where a was 2 and b was 1."""
    options, _, a = case
    step = build(two, variables=variables, bucket=bucket, **options)
    state, _ = step(step.init(PARAMS), 1.0)
    shown = state.eval_params
    assert jax.tree.structure(shown) == jax.tree.structure(state.params)
    np.testing.assert_array_equal(shown["a"], np.full(2, a, np.float32))
    np.testing.assert_array_equal(shown["n"], PARAMS["n"])
    if variables:
        np.testing.assert_array_equal(shown["b"], PARAMS["b"])


def test_schedule_free_is_evaluated_at_its_mean():
    step = build(two, optimizer=T.StepByScheduleFree(0.1), learning_rate=None)
    state, _ = step.many(step.init(PARAMS), np.ones(5, np.float32))
    wanted = state.chain.averaged(state.optimizer, {**state.params, "n": None})
    assert_close({**state.eval_params, "n": None}, wanted, 0)
    assert np.abs(state.eval_params["a"] - state.params["a"]).max() > 1e-3


@pytest.mark.parametrize(
    "rule",
    [T.StepByScheduleFree(0.1), T.chain(rate=T.ScaleByLearningRate(0.1), ema=T.AverageParams(0.5))],
    ids=["free", "ema"],
)
def test_parameters_to_evaluate_of_several_states(rule):
    step = build(two, optimizer=rule, learning_rate=None)
    first = step.init(PARAMS)
    states = jax.vmap(lambda rate: first.set(learning_rate=rate))(jnp.array([0.1, 0.2]))
    for _ in range(4):
        states, _ = jax.vmap(step, in_axes=(0, None))(states, 1.0)
    with pytest.raises(TypeError, match=r"jax\.vmap\(lambda state: state\.eval_params\)"):
        _ = states.eval_params
    got = jax.vmap(lambda state: state.eval_params)(states)
    for i in range(2):
        at = operator.itemgetter(i)
        assert_close(jax.tree.map(at, got), jax.tree.map(at, states).eval_params)


RULES = ["SGD", "Adam", "Lion", "RMSprop"]


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_lookahead_of_any_rule(rule):
    """The paper's loop around the rule, which keeps its memory."""
    fast = build(squares, optimizer=rule, learning_rate=0.01)
    step = build(squares, optimizer=rule, learning_rate=0.01, lookahead=T.Lookahead(3, 0.25))
    batches = [part[:, 0] for part in rows(9, 1, False)]
    got, _ = step.many(step.init(network_params()), *batches)
    state = fast.init(network_params())
    slow = state.params
    for i in range(9):
        state, _ = fast(state, *(part[i] for part in batches))
        if i % 3 == 2:
            slow = jax.tree.map(lambda s, p: s + 0.25 * (p - s), slow, state.params)
            state = state.with_trees(slow)
    assert_close((got.params, got.eval_params), (state.params, slow), 1e-5)


# Sharpness.


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bucket", [None, "auto"])
def test_sam_of_any_rule(rule, bucket):
    """The rule on gradients of where ρ up the gradient leads; two products by hand."""
    plain = build(lambda p, g: sum(jnp.sum(p[k] * g[k]) for k in g), optimizer=rule)
    step = build(squares, optimizer=rule, sam=0.5, bucket=bucket)
    x = [part[0, 0] for part in rows(1, 1, False)]
    first = network_params()
    mean = lambda p: squares(p, *x)[0]
    g = jax.grad(mean)(first)
    size = np.sqrt(sum(np.sum(np.square(v)) for v in g.values()))
    g = jax.grad(mean)({k: first[k] + 0.5 * g[k] / size for k in first})
    wanted, _ = plain(plain.init(first), g)
    got, metrics = step(step.init(first), *x)
    assert_close(got.params, wanted.params, 1e-5)
    np.testing.assert_allclose(metrics["loss"], mean(first), rtol=1e-6)
    assert sum(v.size for v in jax.tree.leaves(got.packed_params)) == sum(
        v.size for v in first.values()
    )


def test_sam_by_hand():
    """|p|²/2 at p = (3, 4): ρ = 5 leads to 2p, of gradient 2p."""
    step = build(lambda p, x: x * jnp.sum(p["w"] ** 2) / 2, learning_rate=0.1, sam=5.0)
    first = step.init({"w": np.array([3.0, 4.0], np.float32)})
    state, metrics = step(first, 1.0)
    np.testing.assert_allclose(state.params["w"], [2.4, 3.2], rtol=1e-6)
    assert metrics["loss"] == 12.5
    still, _ = step(step.init({"w": np.zeros(2, np.float32)}), 1.0)
    np.testing.assert_array_equal(still.params["w"], [0, 0])
    none, _ = step(state.set(rho=0.0), 1.0)
    np.testing.assert_allclose(none.params["w"], [2.16, 2.88], rtol=1e-6)


# Plateaus.

HALF = {"multiplier": 0.5, "patience": 1}
# Options, the losses that come, and the scale after each.
PLATEAUS = {
    "falls": (HALF, [3, 2, 1, 0.5, 0.2], [1, 1, 1, 1, 1]),
    "stays": (HALF, [3, 3, 3, 3, 3], [1, 1, 0.5, 0.5, 0.25]),
    "negative-falls": (HALF, [-1, -2, -3, -4, -5], [1, 1, 1, 1, 1]),
    "negative-stays": (HALF, [-3, -3, -3, -3, -3], [1, 1, 0.5, 0.5, 0.25]),
    "negative-rises": (HALF, [-3, -2, -1, 0, 1], [1, 1, 0.5, 0.5, 0.25]),
    "through-zero": (HALF, [1, 0, -1, -2, -3], [1, 1, 1, 1, 1]),
    "threshold": ({**HALF, "threshold": 0.5}, [-4, -5, -5.9, -6.1, -7], [1, 1, 0.5, 0.5, 0.5]),
    "absolute": ({**HALF, "threshold": 2, "relative": False}, [-4, -5, -5.9, -6.1, -9],
                 [1, 1, 0.5, 0.5, 0.5]),
    "patience-0": ({"multiplier": 0.5, "patience": 0}, [1, 1, 1], [1, 0.5, 0.25]),
    "cooldown": ({"multiplier": 0.5, "patience": 0, "cooldown": 2}, [1] * 6,
                 [1, 0.5, 0.5, 0.5, 0.25, 0.25]),
    "least": ({"multiplier": 0.5, "patience": 0, "min_scale": 0.4}, [1] * 4, [1, 0.5, 0.4, 0.4]),
    "means": ({"multiplier": 0.5, "patience": 0, "every": 2}, [5, -1, 3, 1, 9, -9], [1, 1, 1, 0.5,
              0.5, 0.5]),
    "not-finite": (HALF, [np.nan, 2, np.inf, np.nan, 1], [1, 1, 1, 0.5, 0.5]),
}  # fmt: skip


@pytest.mark.parametrize("case", PLATEAUS.values(), ids=PLATEAUS)
def test_plateau(case):
    options, losses, wanted = case
    step = build(lambda p, x: p["w"] * 0 + x, plateau=T.ReduceOnPlateau(**options))
    state, metrics = step.many(step.init(W), np.array(losses, np.float32))
    np.testing.assert_allclose(metrics["plateau_scale"], wanted)
    np.testing.assert_allclose(metrics["learning_rate"], [1, *wanted[:-1]])
    assert state.optimizer["plateau"]["scale"] == np.float32(wanted[-1])


def test_a_plateau_lowers_every_rate_and_what_borrows_it():
    """Decay by the rate, and a schedule that is set: 1 and 0.5 times 0.5, then 0.25."""
    step = build(
        lambda p, x: p["w"] * 0 + x,
        optimizer=T.chain(decay=T.ShrinkParams(1.0), rate=T.ScaleByLearningRate(lambda t: 0.5)),
        learning_rate=None,
        plateau=T.ReduceOnPlateau(0.5, patience=0),
    )
    state = step.init(W)
    state, _ = step(state, -1.0)
    assert state.params["w"] == 2
    state, _ = step(state, -1.0)
    assert state.params["w"] == 1
    state, metrics = step(state, -1.0)
    assert (state.params["w"], metrics["learning_rate"]) == (0.75, 0.25)
    state, _ = step(state.set(learning_rate=1.0), -1.0)
    assert state.params["w"] == 0.75 * (1 - 0.25)


# Metrics.


def test_metrics_have_one_structure_from_the_first_step():
    step = build(
        squares, skip=ol.Spike(), loss_scale="dynamic", accumulate=2, ema=0.9, lookahead=2,
        sam=0.1, plateau=T.ReduceOnPlateau(), name="m",
    )  # fmt: skip
    state, seen = step.init(network_params()), []
    x = [part[0, 0] for part in rows(1, 1, False)]
    for _ in range(4):
        state, metrics = step(state, *x)
        seen.append(jax.tree.map(lambda v: (v.shape, v.dtype), metrics))
    assert all(s == seen[0] for s in seen)
    wanted = {"m/skipped", "m/skipped_in_a_row", "m/plateau_scale", "m/loss_scale"}
    assert wanted <= set(seen[0])
    assert step._programs[False, True]._cache_size() == 1
