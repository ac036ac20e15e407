"""What loggers write by batch, read back from the real trackers where they are installed."""

import json
import os

import jax.numpy as jnp
import numpy as np
import pytest

import optimize_loss as ol
from optimize_loss import loggers
from optimize_loss.tensorboard import TensorBoardWriter

STEP = ol.optimize_loss(
    lambda params, x: jnp.mean(params["w"] * x),
    learning_rate=1.0,
    optimizer="SGD",
    accumulate=3,
    skip="nonfinite",
    summaries=["loss", "gradients"],
)
BATCHES = [1.0, 1.0, np.nan, 1.0, 1.0, 1.0, 1.0]
WANTED = [9.0, 9.0, 9.0, 8.0, 8.0, 8.0]  # of those that are finite


def run(log, batches=BATCHES):
    return STEP.run(STEP.init({"w": 9.0}), batches, steps_per_call=2, hooks=[log])


def finite():
    return [x for x in BATCHES if np.isfinite(x)]


def test_lines_of_json_are_by_batch(tmp_path):
    path = tmp_path / "log.jsonl"
    with loggers.JsonLines(path, every=3) as log:
        state, _ = run(log)
        log.write(state.batches, {"eval/loss": np.float64(0.5)})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["batch"] for line in lines] == [1, 2, 3, 4, 5, 6, 7, 7]
    assert lines[-1] == {"batch": 7, "eval/loss": 0.5}
    assert [line["loss"] for line in lines[:-1] if line["batch"] != 3] == WANTED
    assert lines[2]["loss"] is None
    assert not any("gradients" in tag for tag in lines[0])
    with loggers.JsonLines(path) as log:  # a run that resumes
        log.write(8, {"loss": 1})
    assert len(path.read_text().splitlines()) == 9


def test_a_line_that_was_cut_short_stays_alone(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"batch": 1, "lo')
    with loggers.JsonLines(path) as log:
        log.write(2, {"loss": 0.5})
    assert path.read_text().splitlines() == ['{"batch": 1, "lo', '{"batch": 2, "loss": 0.5}']


def test_values_that_are_not_finite_are_null(tmp_path):
    path = tmp_path / "log.jsonl"
    with loggers.JsonLines(path) as log:
        log.write(1, {"loss": np.float32(np.nan), "norm": np.float32(np.inf), "rate": 0.5})
    assert json.loads(path.read_text()) == {"batch": 1, "loss": None, "norm": None, "rate": 0.5}
    with pytest.raises(OSError, match="missing"):
        loggers.JsonLines(tmp_path / "missing" / "log.jsonl")


def test_tensorboard_takes_gathered_and_skipped_batches(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with TensorBoardWriter(tmp_path, every=3) as writer:
        run(writer)
    found = EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert [event.step for event in found] == [1, 2, 3, 4, 5, 6, 7]


def test_wandb(tmp_path):
    wandb = pytest.importorskip("wandb")
    with wandb.init(mode="offline", dir=tmp_path, settings=wandb.Settings(silent=True)) as mine:
        run(loggers.Wandb(mine, every=3), finite())
        assert mine.summary["loss"] == WANTED[-1]
        assert mine.summary["batches"] in (5, 6)  # the last one waits for more of its step


def test_mlflow(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow = pytest.importorskip("mlflow")
    mlflow.set_tracking_uri(f"file:{tmp_path}")
    mlflow.set_experiment("test")
    with mlflow.start_run() as mine:
        run(loggers.Mlflow(mlflow, every=3), finite())
    found = mlflow.MlflowClient().get_metric_history(mine.info.run_id, "loss")
    assert [(x.step, x.value) for x in found] == [*enumerate(WANTED, 1)]


def test_aim(tmp_path):
    aim = pytest.importorskip("aim")
    mine = aim.Run(repo=os.fspath(tmp_path), system_tracking_interval=None)
    run(loggers.Aim(mine, every=3), finite())
    (metric,) = (m for m in mine.metrics() if m.name == "loss")
    _, values = metric.values.sparse_numpy()  # in no order
    assert sorted(values.tolist()) == sorted(WANTED)
    mine.close()


@pytest.mark.parametrize("every", [0, 1.5, "1"])
def test_what_every_must_be(tmp_path, every):
    with pytest.raises(ValueError, match="`every` must be"):
        loggers.JsonLines(tmp_path / "a", every=every)
