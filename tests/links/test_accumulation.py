"""Accumulation: many small batches are one large batch, with its weights and its loss."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optimize_loss as ol
from optimize_loss._step.advance import advance, advance_many
from tests.links.around import T, W, assert_close, build, network_params, rows, squares, weighing


@pytest.mark.slow
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
        traced = jax.make_jaxpr(lambda s, x: advance(step, None, s, x))
        return products(traced(step.init(params), (np.ones((2, 4), np.float32),)).jaxpr)

    (loss_and_rule, _), (loss_alone, rule) = counted(), counted(accumulate=4)
    assert rule > 0
    assert loss_alone + rule == loss_and_rule
    assert counted(accumulate=4, skip="nonfinite").tolist() == [loss_alone, rule]


@pytest.mark.slow
def test_accumulation_adds_no_operations_to_those_of_the_rule():
    """By XLA's count, in which a branch is always taken and the body of a loop runs once.

    So it tells that the rule is in the program once; that it is in a branch, the test above.
    """
    params = {"w": np.eye(32, dtype=np.float32)}

    def counted(optimizer, **options):
        step = build(lambda p, x: jnp.sum((x @ p["w"]) ** 2), optimizer=optimizer, **options)
        many = jax.jit(lambda s, x: advance_many(functools.partial(advance, step), None, s, x))
        lowered = many.lower(step.init(params), (np.ones((8, 2, 32), np.float32),))
        cost: Any = lowered.compile().cost_analysis()
        return cost["flops"]

    without, gathers = counted("Muon"), counted("Muon", accumulate=4)
    assert without > 500_000 > counted("SGD")
    assert without < gathers < without + 10 * 32**2
