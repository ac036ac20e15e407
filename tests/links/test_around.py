"""What goes around a rule: loss scales, accumulation, averages, sharpness, plateaus."""

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optimize_loss as ol
from optimize_loss._step.advance import advance, advance_many

T: Any = ol.transforms
W = {"w": np.float32(4)}


def assert_close(got, want, relative=1e-6):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        size = np.max(np.abs(np.asarray(b)), initial=0)
        np.testing.assert_allclose(a, b, rtol=relative, atol=relative * size)


def loss(params, x):
    return params["w"] * x


def build(function: Any = loss, **options: Any) -> Any:
    return ol.optimize_loss(function, **{"learning_rate": 1.0, "optimizer": "SGD", **options})


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


def weighing(weight, **options):
    return build(lambda p, x: (p["w"] * x, ol.Aux(weight=weight)), **options)


@pytest.mark.parametrize("weight", [np.ones(2), "2", 1j])
def test_a_weight_is_a_number(weight):
    step = weighing(weight)
    with pytest.raises(ValueError, match="`weight` must be a"):
        step(step.init(W), 1.0)


# Accumulation.


def squares(params, x, y, mask):
    """A mean over the rows that the mask leaves, and how many these are."""
    error = jnp.tanh(x @ params["kernel"] + params["bias"]) @ params["out"] - y
    weight = jnp.sum(mask)
    mean = jnp.sum(mask * jnp.sum(error * error, 1)) / jnp.maximum(weight, 1)
    return mean, ol.Aux(weight=weight)


def network_params():
    rng = np.random.default_rng(0)
    shapes = {"kernel": (3, 8), "bias": (1, 8), "out": (8, 2)}
    return {name: rng.normal(size=s).astype(np.float32) for name, s in shapes.items()}


def rows(updates, k, ragged):
    """Return k batches of 6 rows for each update; ragged, a random number of them counts."""
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(updates, k, 6, 3)), rng.normal(size=(updates, k, 6, 2))
    counts = rng.integers(0, 7, (updates, k, 1)) if ragged else np.full((updates, k, 1), 6)
    return [part.astype(np.float32) for part in (x, y, np.arange(6) < counts)]


@pytest.mark.parametrize("bucket", [None, "auto"])
@pytest.mark.parametrize("reduce", ["mean", "weighted", "sum"])
def test_accumulation_equals_the_big_batch(reduce, bucket):
    k, updates = 4, 3
    options = {
        "learning_rate": ol.schedules.ExponentialDecay(0.01, 1, 0.5),
        "optimizer": "Adam" if reduce == "weighted" else "SGD",
        "clip_gradients": None if reduce == "sum" else 1.0,
        "ema": 0.9,
        "bucket": bucket,
    }
    small = build(squares, accumulate=T.Accumulate(k, reduce), skip="nonfinite", **options)
    large = build(squares, **options)
    batches = rows(updates, k, reduce == "weighted")
    micro = [part.reshape(updates * k, *part.shape[2:]) for part in batches]
    whole = [part.reshape(updates, k * part.shape[2], *part.shape[3:]) for part in batches]
    got, _ = small.many(small.init(network_params()), *micro)
    first = large.init(network_params())
    if reduce == "sum":  # of four means is four times the mean
        wanted, _ = build(lambda *a: (4 * squares(*a)[0], ol.Aux()), **options).many(first, *whole)
    else:
        wanted, _ = large.many(first, *whole)
    assert_close((got.params, got.eval_params), (wanted.params, wanted.eval_params))
    assert got.step == wanted.step == updates


def test_weights_of_zero_make_an_update_of_zero():
    step = weighing(0, accumulate=T.Accumulate(2, "weighted"))
    state, _ = step.many(step.init(W), np.ones(2, np.float32))
    assert (state.params["w"], state.step) == (4, 1)


def test_what_has_no_weight_is_not_looked_at():
    """A mean over no rows is 0/0: the update is that of the other batch alone."""

    def of_rows(params, x):
        rows = jnp.sum(x != 0).astype(x.dtype)
        return params["w"] * jnp.sum(x) / rows, ol.Aux(weight=rows)

    step = build(of_rows, accumulate=T.Accumulate(2, "weighted"), moving_average_decay=0.0)
    batches = np.array([[1, 3], [0, 0]], np.float32)
    for some in (batches, batches[::-1]):
        state, metrics = step.many(step.init(W), some)
        assert (state.params["w"], state.step) == (2, 1)
        assert metrics["loss/mean"].tolist() == [0, 8]


# How losses make one, their weights, and the loss that links behind have seen after each.
GATHERED = {
    "mean": ("mean", [100, 1, 20, 4], [1, 1, 1, 1], [0, 50.5, 50.5, 12]),
    "sum": ("sum", [100, 1, 20, 4], [1, 1, 1, 1], [0, 101, 101, 24]),
    "weighted": ("weighted", [100, 1, 20, 4], [3, 1, 1, 3], [0, 75.25, 75.25, 8]),
    "weighted-by-0": ("weighted", [100, np.nan, 1, 2], [1, 0, 0, 7], [0, 100, 100, 2]),
    "all-by-0": ("weighted", [100, 1, np.nan, 2], [1, 1, 0, 0], [0, 50.5, 50.5, 50.5]),
}


@pytest.mark.parametrize("bucket", [None, "auto"])
@pytest.mark.parametrize("case", GATHERED.values(), ids=GATHERED)
def test_links_behind_see_the_loss_of_the_update(case, bucket):
    reduce, losses, weights, wanted = case
    step = build(
        lambda p, x, w: (p["w"] * 0 + x, ol.Aux(weight=w)),
        accumulate=T.Accumulate(2, reduce),
        moving_average_decay=0.0,
        bucket=bucket,
    )
    parts = (np.array(part, np.float32) for part in (losses, weights))
    _, metrics = step.many(step.init(W), *parts)
    assert metrics["loss/mean"].tolist() == wanted
    np.testing.assert_array_equal(metrics["loss"], np.array(losses, np.float32))


def test_a_plateau_goes_by_the_mean_loss_of_updates():
    """It falls from 7 to 4.25 to 1.5, while the last batch of each has 1, 2 and 3."""
    step = build(
        lambda p, x: p["w"] * 0 + x, accumulate=4, plateau=T.ReduceOnPlateau(0.5, patience=0)
    )
    losses = np.array([9, 9, 9, 1, 5, 5, 5, 2, 1, 1, 1, 3], np.float32)
    state, metrics = step.many(step.init(W), losses)
    assert metrics["plateau_scale"].tolist() == [1] * 12
    assert state.optimizer["plateau"]["best"] == 1.5


def recorder():
    """Return a transformation of optax whose state is the loss that it was given last."""

    def update(updates, state, params=None, *, value=None, **_):
        return updates, state if value is None else value

    function: Any = update
    return optax.GradientTransformationExtraArgs(lambda params: jnp.zeros(()), function)


def test_the_loss_of_the_update_reaches_optax_and_a_second_accumulation():
    tx = T.chain(one=T.Accumulate(2), two=T.Accumulate(2), seen=recorder())
    state = tx.init(W)
    for value in (1.0, 3.0, 5.0, 9.0):
        _, state = tx.update(W, state, W, value=jnp.float32(value))
    assert (state["seen"], state["step"]) == (4.5, 1)


def test_a_loss_that_is_missing_is_not_left_out_of_the_mean_in_silence():
    tx = T.chain(gather=T.Accumulate(3), seen=recorder(), rate=T.ScaleByLearningRate(1.0))
    state = tx.init(W)
    for value in (1.0, None, 3.0):
        given = {} if value is None else {"value": jnp.float32(value)}
        _, state = tx.update(W, state, W, **given)
    assert (bool(jnp.isnan(state["seen"])), state["step"]) == (True, 1)
    tx = T.chain(gather=T.Accumulate(2), seen=T.AverageLoss(0.5))
    state = tx.init(W)
    with pytest.raises(ValueError, match="needs the loss"):
        tx.update(W, state, W)


def test_no_loss_is_kept_where_no_link_behind_needs_one():
    front = T.chain(loss=T.AverageLoss(0.5), gather=T.Accumulate(2), adam=T.ScaleByAdam())
    behind = T.chain(gather=T.Accumulate(2), loss=T.AverageLoss(0.5), adam=T.ScaleByAdam())
    assert set(front.init(W)["gather"]) == {"every", "gathered", "sum"}
    assert set(behind.init(W)["gather"]) == {"every", "gathered", "sum", "loss"}
    assert front.link("gather") == T.Accumulate(2)


def products(jaxpr, inside=False):
    """Return how many products of matrices there are outside of branches, and inside of them."""
    counts = np.zeros(2, int)
    for equation in jaxpr.eqns:
        counts[int(inside)] += equation.primitive.name == "dot_general"
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    counts += products(inner, inside or equation.primitive.name == "cond")
    return counts


def test_the_rule_runs_once_for_so_many_batches():
    """Muon's products of matrices are behind the gate, as many as without one, and none before."""
    params = {"w": np.eye(4, dtype=np.float32), "v": np.ones((4, 3), np.float32)}

    def counted(**options):
        step = build(lambda p, x: jnp.sum((x @ p["w"] @ p["v"]) ** 2), optimizer="Muon", **options)
        traced = jax.make_jaxpr(lambda s, x: advance(step._recipe, None, s, x))
        return products(traced(step.init(params), (np.ones((2, 4), np.float32),)).jaxpr)

    (loss_and_rule, _), (loss_alone, rule) = counted(), counted(accumulate=4)
    assert rule > 0
    assert loss_alone + rule == loss_and_rule
    assert counted(accumulate=4, skip="nonfinite").tolist() == [loss_alone, rule]


def test_accumulation_adds_no_operations_to_those_of_the_rule():
    """By XLA's count, in which a branch is always taken and the body of a loop runs once.

    So it tells that the rule is in the program once; that it is in a branch, the test above.
    """
    params = {"w": np.eye(32, dtype=np.float32)}

    def counted(optimizer, **options):
        step = build(lambda p, x: jnp.sum((x @ p["w"]) ** 2), optimizer=optimizer, **options)
        many = jax.jit(lambda s, x: advance_many(step._recipe, None, s, x))
        lowered = many.lower(step.init(params), (np.ones((8, 2, 32), np.float32),))
        cost: Any = lowered.compile().cost_analysis()
        return cost["flops"]

    without, gathers = counted("Muon"), counted("Muon", accumulate=4)
    assert without > 500_000 > counted("SGD")
    assert without < gathers < without + 10 * 32**2


# Loss scale.


def small(params, x):
    """A loss of float16 whose gradient, 2e-8, float16 does not have."""
    error = x * params["w"] - 2 * x
    return jnp.mean(error * error)


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
