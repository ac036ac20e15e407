"""What the TensorBoard writer writes, read back with TensorBoard's own reader."""

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import optimize_loss as ol
from optimize_loss.tensorboard import TensorBoardWriter


def read(folder) -> EventAccumulator:
    everything = {"scalars": 0, "histograms": 0}
    return EventAccumulator(str(folder), size_guidance=everything).Reload()


def points(log: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in log.Scalars(tag)]


HISTOGRAM = (np.array([2.0, 0.0, 1.0]), np.array([-1.0, 0.0, 1.0, 2.0]))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.1, np.float32(0.1)),
        (3, 3.0),
        (True, 1.0),
        (np.float32(1e-30), np.float32(1e-30)),
        (jnp.float32(0.1), np.float32(0.1)),
        (jnp.bfloat16(0.1), np.float32(jnp.bfloat16(0.1))),
        (jnp.int32(-7), -7.0),
        (np.inf, np.inf),
        (1e300, np.inf),
    ],
    ids=["float", "int", "bool", "numpy", "jax", "bfloat16", "int32", "infinite", "beyond-float32"],
)
def test_scalars_come_back_exactly(tmp_path, value, expected):
    with TensorBoardWriter(tmp_path) as writer:
        writer.write(5, {"a/scalar": value})
    assert points(read(tmp_path), "a/scalar") == [(5, expected)]


@pytest.mark.parametrize("step", [7, np.int64(7), jnp.int32(7)], ids=["int", "numpy", "jax"])
def test_a_step_is_any_integer(tmp_path, step):
    with TensorBoardWriter(str(tmp_path)) as writer:
        writer.write(step, {"loss": 0.5})
    assert points(read(tmp_path), "loss") == [(7, 0.5)]


def test_histograms_come_back(tmp_path):
    counts, edges = HISTOGRAM
    with TensorBoardWriter(tmp_path) as writer:
        writer.write(3, {"gradients/w": (jnp.asarray(counts), jnp.asarray(edges))})
    (event,) = read(tmp_path).Histograms("gradients/w")
    histogram = event.histogram_value
    assert event.step == 3
    assert (histogram.min, histogram.max, histogram.num) == (-1.0, 2.0, 3.0)
    # two entries at the centre -0.5, one at 1.5
    assert (histogram.sum, histogram.sum_squares) == (0.5, 2.75)
    assert histogram.bucket_limit == list(edges[1:])
    assert histogram.bucket == list(counts)


def test_a_histogram_of_nan_comes_back(tmp_path):
    with TensorBoardWriter(tmp_path) as writer:
        writer.write(3, {"gradients/w": (np.zeros(2), np.full(3, np.nan)), "loss": np.nan})
    log = read(tmp_path)
    assert np.isnan(log.Histograms("gradients/w")[0].histogram_value.max)
    assert np.isnan(log.Scalars("loss")[0].value)


def test_stacked_metrics_become_one_point_a_step(tmp_path):
    counts, edges = HISTOGRAM
    stacked = {
        "loss": np.array([3.0, 2.0, 1.0]),
        "gradients/w": (np.stack([counts, 2 * counts, 3 * counts]), np.stack([edges] * 3)),
    }
    with TensorBoardWriter(tmp_path) as writer:
        writer.write(12, stacked)
    log = read(tmp_path)
    assert points(log, "loss") == [(10, 3.0), (11, 2.0), (12, 1.0)]
    found = [(e.step, e.histogram_value.bucket) for e in log.Histograms("gradients/w")]
    assert found == [(10, [2, 0, 1]), (11, [4, 0, 2]), (12, [6, 0, 3])]


def test_the_metrics_of_a_training_step(tmp_path):
    step = ol.optimize_loss(
        lambda params, x: jnp.sum((params["w"] - x) ** 2),
        learning_rate=0.25,
        optimizer="SGD",
        summaries=ol.OPTIMIZER_SUMMARIES,
    )
    state = step.init({"w": jnp.array([3.0, 4.0])})
    with TensorBoardWriter(tmp_path) as writer:
        state, metrics = step(state, jnp.zeros(2))
        writer.write(state.batches, metrics)
        state, metrics = step.many(state, jnp.zeros((2, 2)))
        writer.write(state.batches, metrics)
    log = read(tmp_path)
    # w halves at every step, so that the loss is 25 / 4ⁿ and its gradient's norm 10 / 2ⁿ
    assert points(log, "loss") == [(1, 25.0), (2, 25 / 4), (3, 25 / 16)]
    assert points(log, "global_norm/gradient_norm") == [(1, 10.0), (2, 5.0), (3, 2.5)]
    assert points(log, "learning_rate") == [(1, 0.25), (2, 0.25), (3, 0.25)]
    found = log.Histograms("gradients/w")
    assert [(e.step, e.histogram_value.min, e.histogram_value.max) for e in found] == [
        (1, 6.0, 8.0),
        (2, 3.0, 4.0),
        (3, 1.5, 2.0),
    ]
    assert [sum(e.histogram_value.bucket) for e in found] == [2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("metrics", "tag"),
    [
        ({"a": None}, "'a'"),
        ({"a": "0.5"}, "'a'"),
        ({"a": 1j}, "'a'"),
        ({"a": np.complex64(1j)}, "'a'"),
        ({"a": np.array("0.5")}, "'a'"),
        ({"a": [1.0, 2.0]}, "'a'"),
        ({"a": {"b": 1.0}}, "'a'"),
        ({"a": (1.0, 2.0)}, "'a'"),
        ({"a": (np.ones(3), np.ones(3))}, "'a'"),
        ({"a": (np.ones(3), np.ones(4), np.ones(4))}, "'a'"),
        ({"a": (np.ones((2, 3)), np.ones((3, 4)))}, "'a'"),
        ({"a": np.ones((2, 2))}, "'a'"),
        ({"loss": 1.0, "a": np.ones(2)}, "'a'"),
        ({"loss": np.ones(3), "a": np.ones(2)}, "'a'"),
        ({"loss": 1.0, "a": (np.ones((2, 3)), np.ones((2, 4)))}, "'a'"),
        ({"a": jax.random.key(0)}, "'a'"),
        ({7: 1.0}, "tag=7"),
    ],
    ids=[
        "none",
        "text",
        "complex",
        "numpy-complex",
        "numpy-text",
        "list",
        "dict",
        "pair-of-scalars",
        "too-few-edges",
        "triple",
        "unlike-stacks",
        "matrix",
        "vector-beside-a-scalar",
        "stacks-of-two-lengths",
        "stacked-beside-a-scalar",
        "random-key",
        "tag-no-text",
    ],
)
def test_other_values_are_refused_by_tag(tmp_path, metrics, tag):
    with TensorBoardWriter(tmp_path) as writer:
        with pytest.raises(ol.InvalidType, match=tag):
            writer.write(9, metrics | {"fine": 1.0})
        writer.write(9, {"after": 1.0})
    assert read(tmp_path).Tags()["scalars"] == ["after"]  # a failed call writes nothing


def test_traced_metrics_are_refused(tmp_path):
    with TensorBoardWriter(tmp_path) as writer:

        @jax.jit
        def inside(x):
            writer.write(1, {"loss": x})
            return x

        with pytest.raises(ol.InvalidType, match=r"outside jit.*'loss'"):
            inside(1.0)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda w: w.write(-1, {"a": 1.0}), ValueError, "`batch` must be .* at least 0"),
        (lambda w: w.write(1.0, {"a": 1.0}), ol.InvalidType, "`batch` must be an integer"),
        (lambda w: w.write(1, {"a": np.ones(3)}), ValueError, "metrics of 3 batches"),
        (lambda w: (w.close(), w.write(1, {"a": 1.0})), ValueError, "closed"),
    ],
    ids=["negative", "float", "fewer-than-stacked", "closed"],
)
def test_wrong_calls(tmp_path, call: Callable[[Any], Any], error: type[Exception], match: str):
    with TensorBoardWriter(tmp_path) as writer, pytest.raises(error, match=match):
        call(writer)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"folder": 3}, ol.InvalidType, "`folder` must be a path"),
        ({"flush_secs": 0}, ValueError, "`flush_secs` must be above 0"),
        ({"flush_secs": "1"}, ol.InvalidType, "`flush_secs` must be a number"),
    ],
)
def test_wrong_arguments(tmp_path, arguments: dict[str, Any], error: type[Exception], match: str):
    with pytest.raises(error, match=match):
        TensorBoardWriter(**{"folder": tmp_path, **arguments})


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        TensorBoardWriter(tmp_path / "file" / "log")


def test_the_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match="pip install tensorboardX"):
        TensorBoardWriter(tmp_path)


def test_no_metrics_and_a_second_close_are_fine(tmp_path):
    with TensorBoardWriter(tmp_path) as writer:
        writer.write(0, {})
        writer.close()
    writer.close()


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with TensorBoardWriter(tmp_path / "log") as writer:
        writer.write(1, {"loss": 1.0})
        with pytest.raises(ol.InvalidType, match="'loss'"):
            writer.write(1, {"loss": None})
    assert not (tmp_path / "log").exists()


def test_two_writers_may_share_a_folder(tmp_path):
    for step in (1, 2):
        with TensorBoardWriter(tmp_path) as writer:
            writer.write(step, {"loss": float(step)})
    assert len(list(tmp_path.iterdir())) == 2
    assert points(read(tmp_path), "loss") == [(1, 1.0), (2, 2.0)]


def test_flush_secs_reaches_the_log(tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr(
        "tensorboardX.SummaryWriter", lambda folder, **options: given.update(options)
    )
    TensorBoardWriter(tmp_path, flush_secs=2.5)
    assert given["flush_secs"] == 2.5
