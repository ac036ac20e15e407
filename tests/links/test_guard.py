"""The guard: a batch that is left out leaves no trace but for being counted."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optimize_loss as ol
from optimize_loss._engine.health import mark
from optimize_loss._names import leaf_names
from optimize_loss._state.skips import check_ready

T: Any = ol.transforms
NAN, INF = np.nan, np.inf
COUNTS = ("skipped", "skipped_in_a_row", "offender")


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for name, a, b in zip(leaf_names(want), *map(jax.tree.leaves, (got, want)), strict=True):
        if jnp.issubdtype(b.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=name, strict=True)


def seen(state):
    """Return all that a user sees of a state but for what the guard counts."""
    guard = {k: x for k, x in state.optimizer["skip"].items() if k not in COUNTS}
    optimizer = {**state.optimizer, "skip": guard}
    return state.params, optimizer, state.model_state, state.key, state.step, state.eval_params


# The proof: 500 runs, each with bad batches at places of its own.

GOOD, BAD, CALM = 18, 6, 5


def network(params, x, y, size, *, model_state, key):
    """A loss with statistics, a random mask, and a factor that makes spikes."""
    kept = jax.random.bernoulli(key, 0.8, (4, 1)).astype(x.dtype)
    mean = 0.9 * model_state["mean"] + 0.1 * jnp.mean(x)
    hidden = jnp.tanh(x @ params["in"]["kernel"] + params["in"]["bias"]) * kept
    error = hidden @ params["out"] - y - 0.01 * mean
    return size * jnp.mean(error * error), ol.Aux(model_state={"mean": mean})


def network_params():
    rng = np.random.default_rng(0)
    kernel, out = rng.normal(size=(3, 5)), rng.normal(size=(5, 2))
    inner = {"bias": np.zeros((1, 5), np.float32), "kernel": kernel.astype(np.float32)}
    return {"in": inner, "out": out.astype(np.float32)}


def batches_of(seed, kinds):
    """Return good batches, and the same with bad ones between them, a kind of each at least."""
    rng = np.random.default_rng(seed)

    def batch(size=1.0):
        x, y = rng.normal(size=(4, 3)), rng.normal(size=(4, 2))
        return [x.astype(np.float32), y.astype(np.float32), np.float32(size)]

    good = [batch() for _ in range(GOOD)]
    spoilt = []
    for kind in [*kinds, *rng.choice(kinds, BAD - len(kinds))]:
        bad = batch()
        if kind == "spike":
            bad[2] = np.float32(10.0 ** rng.integers(3, 30))
        else:
            part = bad[rng.integers(2)]
            part[tuple(rng.integers(part.shape))] = {"nan": NAN, "inf": INF, "-inf": -INF}[kind]
        least = CALM if kind == "spike" else 0  # so many good ones come before
        spoilt.append((rng.integers(least, GOOD + 1), bad))
    every = [(i, 1, b) for i, b in enumerate(good)] + [(i, 0, b) for i, b in spoilt]
    every = [b for *_, b in sorted(every, key=lambda entry: entry[:2])]
    stack = lambda some: [np.stack(parts) for parts in zip(*some, strict=True)]
    return stack(good), stack(every)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("accumulate", "scaled", "bucket", "seeds"),
    [
        (1, False, "auto", 500),
        (4, False, "auto", 500),
        (1, True, "auto", 100),
        (4, True, "auto", 100),
        (4, False, None, 100),
    ],
)
def test_runs_are_bit_equal_to_those_that_never_saw_the_bad_batches(
    accumulate, scaled, bucket, seeds
):
    # Scaled, an infinite entry that leaves the loss finite would be the loss scale's.
    kinds = ["nan"] if scaled else ["nan", "inf", "-inf", "spike"]
    step = ol.optimize_loss(
        network,
        learning_rate=ol.schedules.ExponentialDecay(0.01, 2, 0.9),
        gradient_noise_scale=0.01,
        clip_gradients=ol.adaptive_clipping_fn(),
        moving_average_decay=0.5,
        skip="nonfinite" if scaled else ol.Spike(6.0, warmup_steps=CALM),
        loss_scale=T.DivideByDynamicLossScale(8.0, 3) if scaled else None,
        accumulate=accumulate,
        ema=0.9,
        lookahead=2,
        plateau=T.ReduceOnPlateau(0.5, patience=0),
        bucket=bucket,
    )
    first = step.init(network_params(), model_state={"mean": 0.0})

    def run(batches):
        state, metrics = step.many(jax.tree.map(jnp.copy, first), *batches)
        return seen(state), state.optimizer["skip"]["skipped"], metrics

    @jax.jit
    def runs(good, every):
        """One after the other, as under vmap a condition is a choice."""
        return jax.lax.map(lambda pair: tuple(map(run, pair)), (good, every))

    good, every = zip(*(batches_of(seed, kinds) for seed in range(seeds)), strict=True)
    stack = lambda some: [np.stack(parts) for parts in zip(*some, strict=True)]
    (wanted, already, without), (found, left_out, metrics) = runs(stack(good), stack(every))
    assert_same(found, wanted)
    assert_same(left_out, BAD + already)
    assert_same(left_out, metrics["skipped"][:, -1])
    assert set(metrics) == set(without)
    *_, steps, _ = wanted
    assert_same(steps, (GOOD - already) // accumulate)


def test_the_program_of_many_leaves_out_what_single_steps_do():
    step = ol.optimize_loss(network, learning_rate=0.01, skip=ol.Spike(warmup_steps=CALM))
    _, every = batches_of(0, ["nan", "inf", "spike"])
    many = step.init(network_params(), model_state={"mean": 0.0})
    one = jax.tree.map(jnp.copy, many)
    for i in range(GOOD + BAD):
        one, _ = step(one, *(part[i] for part in every))
    many, _ = step.many(many, *every)
    assert_same((seen(one), one.optimizer["skip"]), (seen(many), many.optimizer["skip"]))


# All options at once, in every dtype.

KINDS = [  # any two of these are together in one of them
    ("float32", "Adam", "auto"),
    ("float32", "Muon", None),
    ("bfloat16", "Adam", None),
    ("bfloat16", "Muon", "auto"),
    ("float16", "Adam", "auto"),
    ("float16", "Muon", None),
]


def masked(params, x, *, model_state, key):
    """A loss with statistics and a random mask; a parameter of it is frozen, one not in it."""
    kept = jax.random.bernoulli(key, 0.8, (1, 4)).astype(x.dtype)
    hidden = jnp.tanh(x @ params["a"] + params["b"][None]) * kept
    mean = 0.9 * model_state["mean"] + 0.1 * jnp.mean(x).astype(jnp.float32)
    value = jnp.mean(hidden * hidden) + jnp.sum(params["frozen"]) * jnp.mean(x)
    return value, ol.Aux(model_state={"mean": mean}, weight=jnp.sum(x != 0))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The loss does not depend")
@pytest.mark.parametrize(("dtype", "optimizer", "bucket"), KINDS)
def test_all_options_together_leave_no_trace_of_a_bad_batch(dtype, optimizer, bucket):
    rng = np.random.default_rng(0)
    params = {"a": (3, 4), "b": (4,), "frozen": (3,), "unused": (2,)}
    params = {k: jnp.asarray(rng.normal(size=s), dtype) for k, s in params.items()}
    params["n"] = jnp.arange(2)
    good = rng.normal(size=(12, 5, 3))
    every = np.insert(good, [2, 5, 5, 9], np.full((4, 5, 3), NAN), 0)
    step = ol.optimize_loss(
        masked,
        learning_rate=0.01,
        optimizer=optimizer,
        skip="nonfinite",
        loss_scale="dynamic",
        accumulate=T.Accumulate(3, "weighted"),
        ema=0.9,
        lookahead=2,
        sam=0.05,
        plateau=T.ReduceOnPlateau(0.5, patience=0),
        gradient_noise_scale=0.01,
        clip_gradients=1.0,
        moving_average_decay=0.5,
        rules={"frozen": {"freeze": True}},
        bucket=bucket,
    )

    def after(batches):
        state = step.init(params, model_state={"mean": 0.0})
        for some in np.split(batches, len(batches) // 4):
            state, metrics = step.many(state, jnp.asarray(some, dtype))
        return state, metrics

    (wanted, _), (state, metrics) = after(good), after(every)
    assert_same(seen(state), seen(wanted))
    assert (state.step, metrics["skipped"][-1]) == (4, 4)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(state.params))
    assert bool(jnp.any(state.params["a"] != params["a"]))
    for name in ("frozen", "unused", "n"):
        assert_same(state.eval_params[name], params[name])


# One batch.

# What comes as gradients of a, b and c, the loss that is 0 with it, and who is named.
CULPRITS = {
    "first": ([NAN, 1, 1], 0, "a"),
    "last": ([1, 1, INF], 0, "c"),
    "two": ([1, -INF, NAN], 0, "b"),
    "all-and-the-loss": ([NAN, NAN, NAN], NAN, "a"),
    "the-loss": ([1, 1, 1], NAN, "the loss"),
    "the-loss-is-infinite": ([1, 1, 1], INF, "the loss"),
    "the-sum-of-squares": ([3e38, 3e38, 3e38], 0, "the norm of all gradients"),
    "none": ([1, 1, 1], 0, None),
    "large": ([1e25, 1e25, 1], 0, None),
}


@pytest.mark.parametrize("bucket", [None, "auto"])
@pytest.mark.parametrize("case", CULPRITS.values(), ids=CULPRITS)
def test_who_is_to_blame(case, bucket):
    grads, loss, name = case
    given = {k: np.full(2, g, np.float32) for k, g in zip("abc", grads, strict=True)}

    # Gradients as given beside a loss as given, whatever the parameters are.
    @jax.custom_vjp
    def tied(params, grads, value):
        return value

    tied.defvjp(
        lambda params, grads, value: (value, grads),
        lambda grads, c: (jax.tree.map(lambda g: g * c, grads), None, None),
    )
    step = ol.optimize_loss(
        tied, learning_rate=0.5, optimizer="SGD", skip="nonfinite", bucket=bucket, summaries=[]
    )
    first = {k: np.ones(2, np.float32) for k in "abc"}
    state, metrics = step(step.init(first), given, np.float32(loss))
    assert state.offender == name
    counted = [int(metrics["skipped"]), int(metrics["skipped_in_a_row"]), int(state.step)]
    assert counted == ([0, 0, 1] if name is None else [1, 1, 0])
    if name is not None:
        assert_same(state.params, jax.tree.map(jnp.asarray, first))


FAULTS = {
    "74-nan": (NAN, 0.0, "w"),
    "75-infinity": (INF, 0.0, "w"),
    "75-minus-infinity": (-INF, 0.0, "w"),
    "76-loss": (1.0, NAN, "the loss"),
}


@pytest.mark.parametrize("case", FAULTS.values(), ids=FAULTS)
def test_one_bad_batch_among_good_ones_changes_nothing(case):
    """Where a clip would make 0 · ∞ of an infinite gradient; its factor comes behind the guard."""
    grad, loss, culprit = case

    def function(params, size, extra):  # at w = 1 the gradient is `size`
        return jnp.sum(size * params["w"] + params["v"] ** 2) + extra

    step = ol.optimize_loss(
        function, learning_rate=0.1, optimizer="Adam", clip_gradients=0.5, ema=0.9, skip="nonfinite"
    )
    state = step.init({"w": np.ones(3, np.float32), "v": np.ones(2, np.float32)[:1]})
    state, _ = step(state, np.float32(1), np.float32(0))
    before = jax.tree.map(jnp.copy, state)
    state, _ = step(state, np.array([1, grad, 1], np.float32), np.float32(loss))
    assert_same(seen(state), seen(before))
    assert (state.optimizer["skip"]["skipped"], state.offender) == (1, culprit)


@pytest.mark.parametrize("bad", [-0.1, NAN, INF])
def test_34_a_schedule_with_a_bad_value_stops_training(bad):
    """Steps 0 and 1 are made; from then on all is left out, and after three times an error."""
    step = ol.optimize_loss(
        lambda p, x: p["w"] * x,
        learning_rate=lambda n: jnp.where(n < 2, 1.0, bad),
        optimizer="SGD",
        skip=T.SkipNonFinite(most=3),
    )
    with pytest.raises(ol.NonFiniteError, match=r"before step 2\. .* because of: 'a schedule'"):
        step.run(step.init({"w": np.float32(4)}), [np.float32(1)] * 20)
    state, metrics = step.many(step.init({"w": np.float32(4)}), np.ones(4, np.float32))
    assert (state.params["w"], state.step, state.offender) == (2, 2, "a schedule")
    assert metrics["skipped"].tolist() == [0, 0, 1, 2]
    state, _ = step(state.set(learning_rate=1.0), 1.0)
    assert state.params["w"] == 1


def test_marks_of_names_are_positive_and_stay():
    marks = [mark(f"layer_{i}/kernel") for i in range(10_000)]
    assert len(set(marks)) == len(marks)
    assert all(0 < m < 2**31 for m in marks)


def test_without_a_guard_there_is_no_offender_and_no_metric():
    step = ol.optimize_loss(lambda p, x: p["w"] * x, learning_rate=0.1)
    state, metrics = step(step.init({"w": 1.0}), 1.0)
    assert state.offender is None
    assert not any("skipped" in tag for tag in metrics)


def test_guard_in_a_chain_of_optax_judges_gradients_alone():
    tx = T.chain(skip=T.SkipNonFinite(), rate=T.ScaleByLearningRate(1.0))
    p = {"w": jnp.ones(2)}
    updates, state = tx.update({"w": jnp.array([1.0, NAN])}, tx.init(p), p)
    assert_same(updates, {"w": jnp.zeros(2)})
    assert (state["skip"]["skipped"], state["step"]) == (1, 0)


# Spikes.

# Norms that come, and which of them are left out; usual is 1, so 6 · 0.1 is a factor of 1.8.
SPIKES = {
    "steady": ([1, 1, 1, 1, 1, 1], []),
    "below-the-bound": ([1, 1, 1, 1.7, 1, 1], []),
    "above-the-bound": ([1, 1, 1, 1.9, 1, 1], [3]),
    "in-warm-up": ([1, 9, 1, 1, 1, 1], []),
    "small-is-no-spike": ([1, 1, 1, 1e-9, 1, 1], []),
    "zero-is-no-spike": ([1, 1, 1, 0, 1, 1], []),
    "leaves-no-trace": ([1, 1, 1, 1e9, 1e9, 1.9], [3, 4, 5]),
    "not-finite": ([1, NAN, INF, 1, 1, 1e3], [1, 2, 5]),
}


@pytest.mark.parametrize("case", SPIKES.values(), ids=SPIKES)
def test_spikes(case):
    norms, wanted = case
    tx = T.chain(skip=T.SkipSpikes(6.0, warmup_steps=3), rate=T.ScaleByLearningRate(1.0))
    state, left_out = tx.init({"w": jnp.ones(2)}), []
    for i, norm in enumerate(norms):
        before = int(state["skip"]["skipped"])
        g = {"w": jnp.array([0.6 * norm, 0.8 * norm], jnp.float32)}
        _, state = tx.update(g, state, value=jnp.float32(1))
        left_out += [i] if int(state["skip"]["skipped"]) > before else []
    assert left_out == wanted
    assert state["skip"]["seen"] == len(norms) - len(wanted)


@pytest.mark.parametrize("warmup_steps", [0, 1])
def test_the_first_batch_is_no_spike(warmup_steps):
    """There is no usual norm yet to judge it by; the second one has that of the first."""
    tx = T.chain(skip=T.SkipSpikes(warmup_steps=warmup_steps), rate=T.ScaleByLearningRate(1.0))
    state, skipped = tx.init({"w": jnp.ones(())}), []
    for norm in (1e6, 1e6, 2e6, 1e6):
        _, state = tx.update({"w": jnp.float32(norm)}, state)
        skipped.append(int(state["skip"]["skipped"]))
    assert skipped == [0, 0, 1, 1]


def test_running_means_are_those_of_the_log_norm():
    """With a decay of min(0.5, t / (t + 1)): ℓ₁, then two means with weights of one half."""
    tx = T.chain(skip=T.SkipSpikes(decay=0.5), rate=T.ScaleByLearningRate(1.0))
    state, norms = tx.init({"w": jnp.ones(())}), (2.0, 8.0, 32.0)
    for norm in norms:
        _, state = tx.update({"w": jnp.float32(norm)}, state)
    a, b, c = np.log(norms)
    wanted = ((a + b) / 2 + c) / 2, ((a * a + b * b) / 2 + c * c) / 2
    got = state["skip"]["mean"], state["skip"]["sq_mean"]
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


def test_a_spike_is_one_of_the_gradients_without_their_loss_scale():
    step = ol.optimize_loss(
        lambda p, x: p["w"] * x,
        learning_rate=1e-3,
        skip=ol.Spike(warmup_steps=1),
        loss_scale=T.DivideByDynamicLossScale(4.0, 1),  # doubles in every step
    )
    state, metrics = step.many(step.init({"w": 1.0}), np.ones(8, np.float32))
    assert metrics["skipped"][-1] == 0
    assert state.optimizer["loss_scale"]["loss_scale"] == 4 * 2**8


# With a loss scale.


def test_infinite_gradients_are_the_loss_scales_until_it_is_1():
    def loss(p, x):
        return jnp.sum(jnp.where(x > 0, jnp.sqrt(p["w"] - 1), p["w"]))  # 1/0 at w = 1

    step = ol.optimize_loss(
        loss, learning_rate=0.0, skip="nonfinite", loss_scale=T.DivideByDynamicLossScale(4.0)
    )
    state, metrics = step.many(step.init({"w": jnp.ones(2)}), np.ones(4, np.float32))
    assert metrics["skipped"].tolist() == [0, 0, 1, 2]  # at 4 and 2, it shrinks
    assert state.optimizer["loss_scale"]["loss_scale"] == 1
    assert state.offender == "w"
    assert state.step == 0


# Errors.


def bad_step(bucket, **options):
    step = ol.optimize_loss(
        lambda p, x: jnp.sum(p["a"] * x) + jnp.sum(p["b"]),
        learning_rate=0.5,
        optimizer="SGD",
        bucket=bucket,
        **{"skip": T.SkipNonFinite(most=3), **options},
    )
    return step, step.init({"a": jnp.ones(2), "b": jnp.ones(2)})


@pytest.mark.parametrize("bucket", [None, "auto"])
def test_77_so_many_in_a_row_raise_and_one_can_go_on(bucket):
    step, state = bad_step(bucket)
    for x in (NAN, NAN, 1.0, NAN, NAN, NAN):
        state, _ = step(state, x)
        jax.block_until_ready(state)
    with pytest.raises(ol.NonFiniteError, match=r"^3 batches in a row .* of 5 so far") as caught:
        step(state, 1.0)
    assert "before step 1" in str(caught.value)
    assert "'a'" in str(caught.value)
    before = step._programs[False, True]._cache_size()
    state, metrics = step(caught.value.state, 1.0)
    assert (state.step, metrics["skipped"], metrics["skipped_in_a_row"]) == (2, 5, 0)
    assert step._programs[False, True]._cache_size() == before


@pytest.mark.parametrize("steps_per_call", [1, 2, 7])
@pytest.mark.parametrize("name", [None, "model"])
def test_a_run_raises_from_the_metrics_that_it_fetches(steps_per_call, name):
    step, state = bad_step("auto", name=name)
    every = [1.0, NAN, NAN, 1.0, *[NAN] * 20]
    with pytest.raises(ol.NonFiniteError) as caught:
        step.run(state, every, steps_per_call=steps_per_call)
    assert caught.value.state.step == 2
    assert caught.value.state.offender == "a"
    state, metrics = step.run(caught.value.state, [1.0, NAN, NAN, 1.0])
    assert state.step == 4
    tag = "skipped_in_a_row" if name is None else f"{name}/skipped_in_a_row"
    assert metrics[tag].tolist() == [0, 1, 2, 0]


def test_no_error_where_none_is_wanted():
    step, state = bad_step("auto", skip=T.SkipNonFinite(most=None))
    state, metrics = step.run(state, [NAN] * 40)
    assert metrics["skipped_in_a_row"][-1] == 40
    step(state, 1.0)


def test_a_state_that_is_not_ready_is_not_waited_for():
    step, state = bad_step(None)
    for _ in range(3):
        state, _ = step(state, NAN)

    @dataclasses.dataclass
    class InFlight:
        ready: bool

        def is_ready(self):
            return self.ready

        def __array__(self, *_, **__):
            assert self.ready, "waited for the device"
            return np.array(2)

    def with_count(count):
        guard = {**state.packed_optimizer["skip"], "skipped_in_a_row": count}
        return dataclasses.replace(
            state, packed_optimizer={**state.packed_optimizer, "skip": guard}
        )

    check_ready(with_count(InFlight(False)))
    check_ready(with_count(InFlight(True)))
    jax.block_until_ready(state)
    with pytest.raises(ol.NonFiniteError):
        check_ready(state)


@pytest.mark.parametrize("bucket", [None, "auto"])
def test_a_state_of_numpy_arrays_is_ready(bucket):
    step, state = bad_step(bucket)
    state, _ = step(jax.device_get(state), 1.0)
    assert state.step == 1
    state, _ = step.many(state, np.full(3, NAN, np.float32))
    with pytest.raises(ol.NonFiniteError, match=r"^3 batches in a row"):
        step(jax.device_get(state), 1.0)


def test_a_row_that_ended_within_a_call_is_in_the_metrics():
    step, state = bad_step("auto")
    batches = np.array([NAN] * 5 + [1.0], np.float32)
    state, metrics = step.many(state, batches)
    jax.block_until_ready(state)
    state, _ = step(state, 1.0)  # the state does not show it
    assert metrics["skipped_in_a_row"].tolist() == [1, 2, 3, 4, 5, 0]
    step, state = bad_step("auto")
    with pytest.raises(ol.NonFiniteError, match=r"^5 batches in a row"):
        step.run(state, list(batches), steps_per_call=6)


@pytest.mark.parametrize("bucket", [None, "auto"])
def test_many_states_at_once_are_guarded_each(bucket):
    step, state = bad_step(bucket, skip=T.SkipNonFinite(most=1))
    states = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    for count in (1, 2):  # they only count, whatever `most` is
        states, metrics = jax.vmap(step)(states, jnp.array([NAN, 1.0]))
        assert metrics["skipped"].tolist() == [count, 0]
        assert states.step.tolist() == [0, count]
        jax.block_until_ready(states)
    with pytest.raises(TypeError, match="one state at a time"):
        _ = states.offender
    assert jax.tree.map(lambda x: x[0], states).offender == "a"
    assert jax.tree.map(lambda x: x[1], states).offender is None


@pytest.mark.parametrize("spoilt", [[0, 0, 0, 0], [0, 0, NAN, 0], [INF, 0, -INF, 0]])
def test_devices_agree_where_the_loss_of_one_is_not_finite(spoilt):
    """Its gradient does not show it; without the others' consent only that one would skip."""
    step = ol.optimize_loss(
        lambda p, x, more: jnp.sum(p["w"] * x) + more,
        learning_rate=None,
        optimizer=T.chain(sums=T.SumOverAxis("data"), rate=T.ScaleByLearningRate(0.25)),
        skip="nonfinite",
        plateau=T.ReduceOnPlateau(0.5, patience=0),
    )
    state = step.init({"w": np.float32(4)})
    each = jax.vmap(step, in_axes=(None, 0, 0), axis_name="data")
    ones = np.ones(4, np.float32)
    states, _ = each(state, ones, np.array(spoilt, np.float32))
    skipped = not np.all(np.isfinite(spoilt))
    np.testing.assert_array_equal(states.params["w"], (4 if skipped else 3) * ones)
    np.testing.assert_array_equal(states.optimizer["skip"]["skipped"], skipped * ones)
    np.testing.assert_array_equal(states.optimizer["plateau"]["means"], (not skipped) * ones)


def test_the_guard_comes_first():
    for first in (T.Accumulate(2), T.DivideByLossScale(2.0), T.DivideByDynamicLossScale()):
        with pytest.raises(ValueError, match=r"'skip' must come before \['first'\]"):
            T.chain(first=first, skip=T.SkipNonFinite(), rate=T.ScaleByLearningRate(1.0))
