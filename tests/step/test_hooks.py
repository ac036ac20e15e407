"""What is around a step: evaluation, early stopping, a profile, epochs."""

import gzip
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.step.looped import linear, ol, start

BATCHES = [np.array(x, np.float32) for x in ([1, 1, 1], [5], [2, 4])]


def test_a_mean_counts_examples_and_shows_the_average():
    step = linear(ema=0.5)
    state, _ = step(start(step, 4.0), np.float32(2))  # w is 2, its average 2
    state, _ = step(state, np.float32(1))  # w is 1
    average = float(state.eval_params["w"])
    assert average not in (1, 2)
    found = step.evaluate(state, BATCHES)
    np.testing.assert_allclose(found["loss"], average * (3 + 5 + 6) / 6, rtol=1e-6)
    assert step(state, np.float32(1))[0].params["w"] == 0  # the state was not taken


def test_a_loss_of_ones_own_has_weights_metrics_and_state():
    def loss(params, x, *, model_state, key):
        return jnp.mean(params["w"] * x), ol.Aux(model_state=model_state)

    def accuracy(params, x, *, model_state, key):
        mean = jnp.mean(x) + model_state["shift"]
        draw = jax.random.uniform(key)
        return mean, ol.Aux(metrics={"right": {"of": x > 1.5}, "draw": draw}, weight=x[0])

    step = ol.optimize_loss(loss, learning_rate=1.0)
    state = step.init({"w": 1.0}, model_state={"shift": 10.0})
    batches = [np.array(x, np.float32) for x in ([1, 1], [3, 1])]
    found = step.evaluate(state, batches, loss=accuracy)
    assert found["loss"] == 10 + (1 * 1 + 3 * 2) / 4
    assert found["right"]["of"].tolist() == [0.75, 0.0]
    assert 0 < found["draw"] < 1
    assert found["draw"] == step.evaluate(state, batches, loss=accuracy)["draw"]
    with pytest.raises(ValueError, match="`state` must have a `model_state`"):
        linear().evaluate(start(linear()), batches, loss=accuracy)


def test_one_program_for_each_shape():
    traced = []

    def loss(params, x):
        traced.append(x.shape)
        return jnp.mean(params["w"] * x)

    step = ol.optimize_loss(loss, learning_rate=1.0)
    state = start(step)
    for _ in range(2):
        step.evaluate(state, [*BATCHES, *BATCHES])
    assert traced == [(3,), (1,), (2,)]


@pytest.mark.parametrize(
    ("batches", "match"),
    [([], "`batches` must hold a batch"), (np.ones(3), r"write \[batch\]")],
)
def test_what_cannot_be_evaluated(batches, match):
    step = linear()
    with pytest.raises(ValueError, match=match):
        step.evaluate(start(step), batches)


def test_a_run_evaluates_keeps_the_best_and_stops_early(tmp_path):
    """w falls from 3 by 1 a batch, and the loss on ±1 is its distance from 1."""
    step, told = linear(), []
    distance = lambda params, x: jnp.abs(params["w"] - 1.0) * x
    best = ol.Checkpoints(tmp_path, keep=1, best="eval/loss")
    log = ol.every(1, lambda state, metrics: told.append(float(metrics["eval/loss"])))
    evaluate = ol.Evaluate(
        step,
        lambda: iter([1.0]),
        every=1,
        loss=distance,
        then=[ol.StopEarly("eval/loss", patience=2), best, log],
    )
    state, metrics = step.run(start(step, 3.0), itertools.repeat(1.0), hooks=[evaluate])
    assert told == [1, 0, 1, 2]
    assert (state.params["w"], len(metrics["loss"])) == (-1, 4)
    assert best.resume(start(step)).params["w"] == 1
    assert evaluate.latest == {"eval/loss": 2.0}


def test_a_hook_behind_an_evaluation_may_change_the_state():
    step = linear()
    halve = ol.every(1, lambda state, metrics: state.set(learning_rate=0.5))
    state, _ = step.run(
        start(step), [1.0] * 4, hooks=[ol.Evaluate(step, [1.0], 2, then=[halve], at_end=False)]
    )
    assert state.params["w"] == 97


def test_early_stopping_remembers_over_a_restart():
    see = lambda hook, *values: [hook(None, {"loss": np.array([x, x], np.float32)}) for x in values]
    first = ol.StopEarly("loss", patience=3, change=0.5)
    see(first, 9.0, 8.6, 8.7)
    second = ol.StopEarly("loss", patience=3, change=0.5)
    second.set_state(first.get_state())
    with pytest.raises(ol.StopRun, match=r"'loss' has not become better than 9.0 in 3 calls"):
        see(second, float("nan"))
    see(second := ol.StopEarly("loss", patience=1), 9.0, 8.9)
    with pytest.raises(ol.StopRun):
        see(second, 8.9)


BAD = {
    "metric": (lambda: ol.StopEarly(1, 2), "`metric` must be the tag"),
    "patience": (lambda: ol.StopEarly("loss", 0), "`patience` must be"),
    "change": (lambda: ol.StopEarly("loss", 1, change=-1), "`change` must be at least 0"),
    "mode": (lambda: ol.StopEarly("loss", 1, mode="least"), "`mode` must be one of"),
    "iterator": (lambda: ol.Evaluate(linear(), iter([1.0]), 1), "`batches` must be iterable again"),
    "then": (
        lambda: ol.Evaluate(linear(), [1.0], 1, then=[print]),
        "`then` must be a list of hooks",
    ),
    "start": (lambda: ol.Profile("x", 0, 2), "`start` must be"),
    "stop": (lambda: ol.Profile("x", 2, 2), "`stop` must be above `start`"),
    "epochs": (lambda: ol.Epochs(iter([1.0])), "`batches` must be iterable again"),
    "epochs-number": (lambda: ol.Epochs(3), "`batches` must be iterable again"),
    "count": (lambda: ol.Epochs([1.0], 0), "`count` must be"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused(name):
    call, match = BAD[name]
    with pytest.raises(ValueError, match=match):
        call()


def test_a_profile_has_the_names_of_links(tmp_path):
    step = linear(optimizer="Adam", clip_gradients=1.0)
    text = step.lower(start(step), 1.0).as_text(debug_info=True)
    for link in ("ScaleByAdam", "ClipByGlobalNorm", "ScaleByLearningRate"):
        assert f"{link}/mul" in text
    step.run(start(step), [1.0] * 6, hooks=[ol.Profile(tmp_path, 2, 4)])
    assert [*pathlib.Path(tmp_path).rglob("*.xplane.pb")]
    traces = [gzip.decompress(p.read_bytes()) for p in tmp_path.rglob("*.trace.json.gz")]
    assert traces
    step.run(start(step), [1.0] * 3, hooks=[profile := ol.Profile(tmp_path / "b", 2, 9)])
    assert not profile._running  # the end of the run is the end of the profile


def test_epochs_come_in_order_and_can_be_resumed():
    shuffled = lambda epoch: np.random.default_rng(epoch).permutation(5).astype(np.float32)
    straight = [*ol.Epochs(shuffled, 3)]
    assert len(straight) == 15
    assert straight[:5] != straight[5:10]
    for taken in (0, 3, 5, 14, 15):
        data = ol.Epochs(shuffled, 3)
        for _ in range(taken):
            next(data)
        again = ol.Epochs(shuffled, 3)
        again.set_state(data.get_state())
        assert [*again] == straight[taken:]
    assert [*itertools.islice(ol.Epochs([1, 2]), 5)] == [1, 2, 1, 2, 1]
    assert [*ol.Epochs([], 3)] == []
