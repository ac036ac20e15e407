"""A folder of checkpoints: what is kept, what is found again, and what is left alone."""

import itertools
import json
import os
import pathlib
import pickle
import signal
import socket
import subprocess
import sys
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import optimize_loss
from optimize_loss._engine import sharding
from optimize_loss._engine.bucket import Bucket
from optimize_loss._files.named import on_host

ROOT = pathlib.Path(__file__).parent.parent.parent

# Untyped, since what some of these tests pass is wrong on purpose.
ol: Any = optimize_loss
STEP = ol.optimize_loss(lambda p, x: jnp.sum((p["w"] * x) ** 2), learning_rate=0.1)


def init(w=1.0):
    return STEP.init({"w": jnp.full(3, float(w))})


def at(step, w=1.0):
    return init(w).set(step=step)


def names(folder):
    return sorted(x.name for x in pathlib.Path(folder).iterdir())


def damage(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("keep", "saved", "kept"),
    [
        (1, range(1, 6), [5]),
        (2, range(1, 6), [4, 5]),
        (2, [100, 1000, 10_000], [1000, 10_000]),  # by number, not by text
    ],
)
def test_the_newest_are_kept(tmp_path, keep, saved, kept):
    checkpoints = ol.Checkpoints(tmp_path, keep=keep)
    for step in saved:
        checkpoints.save(at(step))
    assert checkpoints.steps == tuple(kept)
    assert sorted(names(tmp_path)) == sorted(f"step_{n}.safetensors" for n in kept)


@pytest.mark.parametrize(
    ("every", "at_end", "saved"),
    [
        (2, True, [2, 4, 5]),
        (2, False, [2, 4]),
        (5, True, [5]),
        (10, True, [5]),
        (10, False, []),
        (None, True, [5]),
    ],
)
def test_when_a_run_saves(tmp_path, every, at_end, saved):
    checkpoints = ol.Checkpoints(tmp_path, keep=9, every=every, at_end=at_end)
    STEP.run(init(), [1.0] * 5, hooks=[checkpoints])
    assert checkpoints.steps == tuple(saved)


def test_a_run_that_is_taken_up_is_the_straight_run(tmp_path):
    x = [*np.linspace(0.5, 1.5, 30).astype(np.float32)]
    straight, _ = STEP.run(init(), x, steps_per_call=5)
    checkpoints = ol.Checkpoints(tmp_path / "a" / "b", keep=2, every=10)
    STEP.run(init(), x[:20], steps_per_call=5, hooks=[checkpoints])
    assert checkpoints.steps == (10, 20)
    again = ol.Checkpoints(tmp_path / "a" / "b", keep=2, every=10)  # in a new process
    state, report = again.newest(like=init(7.0))
    assert (int(state.step), report.new, report.unused) == (20, (), ())
    state, _ = STEP.run(state, x[20:], steps_per_call=5, hooks=[again])
    wanted = on_host(straight)
    for name, array in on_host(state).items():
        assert array.tobytes() == wanted[name].tobytes(), name
    assert again.steps == (20, 30)


def test_a_state_that_was_just_restored_is_not_saved_again(tmp_path):
    ol.Checkpoints(tmp_path).save(at(10))
    before = (tmp_path / "step_10.safetensors").stat().st_mtime_ns
    again = ol.Checkpoints(tmp_path, every=10)
    state, _ = again.newest(init())
    again(state, {})
    assert (tmp_path / "step_10.safetensors").stat().st_mtime_ns == before


def test_an_empty_folder_has_no_newest(tmp_path):
    assert ol.Checkpoints(tmp_path / "new").newest(like=init()) is None
    assert names(tmp_path) == ["new"]


def test_a_damaged_newest_is_passed_over_with_a_warning(tmp_path):
    checkpoints = ol.Checkpoints(tmp_path, every=1)
    for step in (1, 2, 3):
        checkpoints.save(at(step, w=step))
    damage(checkpoints.path(3))
    checkpoints.path(2).write_bytes(b"")
    with pytest.warns(UserWarning, match=r"is skipped.*step_\d") as seen:
        state, _ = checkpoints.newest(like=init())
    assert [("step_3." in str(w.message), "step_2." in str(w.message)) for w in seen] == [
        (True, False),
        (False, True),
    ]
    np.testing.assert_array_equal(state.params["w"], np.full(3, 1.0))
    with pytest.raises(ol.CheckpointCorrupt, match=r"step_3\.safetensors"):
        checkpoints.newest(like=init(), strict=True)
    # The run writes the files anew as it comes to these steps.
    with pytest.warns(UserWarning, match=r"later steps than 2 .*\[3\]"):
        checkpoints(at(2, w=2))
    checkpoints(at(3, w=3))
    state, _ = checkpoints.newest(like=init())
    np.testing.assert_array_equal(state.params["w"], np.full(3, 3.0))
    assert checkpoints.steps == (1, 2, 3)


def test_all_damaged_is_an_error_and_no_new_beginning(tmp_path):
    checkpoints = ol.Checkpoints(tmp_path)
    checkpoints.save(at(4))
    damage(checkpoints.path(4))
    message = r"`folder` must have an intact checkpoint.*\[4\]"
    with (
        pytest.warns(UserWarning, match="is skipped"),
        pytest.raises(ol.CheckpointCorrupt, match=message),
    ):
        checkpoints.newest(like=init())


def test_what_does_not_fit_is_not_passed_over(tmp_path):
    checkpoints = ol.Checkpoints(tmp_path)
    checkpoints.save(at(4))
    with pytest.raises(ol.CheckpointMismatch, match=r"params/w' is float32\[3\] in the file"):
        checkpoints.newest(like=STEP.init({"w": jnp.ones(4)}))
    with pytest.raises(ol.CheckpointMismatch, match="must have a parameter of the file"):
        checkpoints.newest(like=STEP.init({"v": jnp.ones(3)}))
    state, _ = checkpoints.newest(like=STEP.init({"v": jnp.ones(3)}), rename={"w": "v"})
    np.testing.assert_array_equal(state.params["v"], np.ones(3))


def test_a_number_of_the_file_is_told_of(tmp_path):
    checkpoints = ol.Checkpoints(tmp_path)
    checkpoints.save(at(4).set(learning_rate=0.7))
    with pytest.warns(UserWarning, match=r"state\.set\(learning_rate=None\)"):
        state, report = checkpoints.newest(like=init())
    assert report.from_file == ("optimizer/rate/learning_rate",)
    assert state.optimizer["rate"]["learning_rate"] == np.float32(0.7)


def test_files_of_others_stay(tmp_path):
    others = [
        "step_.safetensors",
        "step_01.safetensors",
        "step_-1.safetensors",
        "step_1.safetensors.bak",
        "my_step_1.safetensors",
        "step_1.pt",
        "best.safetensors",
    ]
    for name in others:
        (tmp_path / name).touch()
    (tmp_path / "step_2.safetensors").mkdir()
    (tmp_path / "step_3.safetensors").symlink_to(tmp_path / "best.safetensors")
    checkpoints = ol.Checkpoints(tmp_path, keep=1)
    assert checkpoints.newest(like=init()) is None
    for step in (5, 6):
        checkpoints.save(at(step))
    kept = [*others, "step_2.safetensors", "step_3.safetensors", "step_6.safetensors"]
    assert names(tmp_path) == sorted(kept)


def test_files_of_others_with_such_names_stay(tmp_path):
    safetensors.numpy.save_file({"w": np.ones(3)}, tmp_path / "step_1.safetensors")
    (tmp_path / "step_2.safetensors").write_bytes(pickle.dumps([1, 2]))
    (tmp_path / "step_3.safetensors").touch()
    checkpoints = ol.Checkpoints(tmp_path, keep=1)
    for step in (4, 5, 6):
        checkpoints.save(at(step))
    assert checkpoints.steps == (1, 2, 3, 6)


def test_an_older_step_after_a_newer_one(tmp_path):
    checkpoints = ol.Checkpoints(tmp_path, keep=2)
    for step in (10, 20):
        checkpoints.save(at(step))
    with pytest.warns(UserWarning, match=r"files of later steps than 5 .*\[10, 20\]"):
        path = checkpoints.save(at(5))
    assert path.exists()  # what was just saved is there
    assert checkpoints.steps == (5, 10, 20)
    with pytest.warns(UserWarning, match="later steps"):
        checkpoints.save(at(6))
    assert checkpoints.steps == (6, 10, 20)


def test_one_step_twice_is_the_last_one(tmp_path):
    checkpoints = ol.Checkpoints(tmp_path)
    checkpoints.save(at(5, w=1.0))
    checkpoints.save(at(5, w=2.0))
    state, _ = checkpoints.newest(like=init())
    np.testing.assert_array_equal(state.params["w"], np.full(3, 2.0))
    assert checkpoints.steps == (5,)


def test_a_step_that_does_not_advance_goes_by_the_updates(tmp_path):
    step = ol.optimize_loss(lambda p, x: p["w"] * x, learning_rate=0.1, global_step=None)
    checkpoints = ol.Checkpoints(tmp_path, keep=2, every=2)
    state, _ = step.run(step.init({"w": 1.0}), [1.0] * 5, hooks=[checkpoints])
    assert checkpoints.steps == (4, 5)
    assert int(state.step) == 0


def test_a_save_that_fails_deletes_nothing(tmp_path, monkeypatch):
    checkpoints = ol.Checkpoints(tmp_path, keep=1)
    checkpoints.save(at(1))

    def fails(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        with pytest.raises(OSError, match=r"No space left on device.*step_2\.safetensors"):
            checkpoints.save(at(2))
    assert names(tmp_path) == ["step_1.safetensors"]


def test_a_file_that_goes_while_it_is_looked_for(tmp_path, monkeypatch):
    """As in a process that evaluates, while the one that trains keeps only the newest."""
    trains, evaluates = ol.Checkpoints(tmp_path, keep=1), ol.Checkpoints(tmp_path, keep=1)
    trains.save(at(1))
    path = ol.Checkpoints.path

    def late(self, step):
        monkeypatch.setattr(ol.Checkpoints, "path", path)
        trains.save(at(2))
        return path(self, step)

    monkeypatch.setattr(ol.Checkpoints, "path", late)
    state, _ = evaluates.newest(like=init())
    assert int(state.step) == 2


def test_strays_of_killed_runs_are_swept(tmp_path):
    stray = tmp_path / ".step_3.safetensors.tmp-dead"
    other = tmp_path / ".best.safetensors.tmp-dead"
    stray.touch()
    other.touch()
    ol.Checkpoints(tmp_path).save(at(4))
    assert names(tmp_path) == [other.name, "step_4.safetensors"]


BAD = {
    "keep-0": ({"keep": 0}, ValueError, "`keep` must be an integer of at least 1.*keep=0"),
    "keep-float": ({"keep": 1.5}, TypeError, "`keep` must be.*1.5"),
    "every-0": ({"every": 0}, ValueError, "`every` must be an integer of at least 1.*every=0"),
    "every-bool": ({"every": True}, TypeError, "`every` must be.*True"),
    "folder": ({"folder": 3}, TypeError, "`folder` must be the path of a folder.*folder=3"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(tmp_path, name):
    options, error, message = BAD[name]
    with pytest.raises(error, match=message):
        ol.Checkpoints(**{"folder": tmp_path / "new", **options})
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="file"):
        ol.Checkpoints(tmp_path / "file")
    checkpoints = ol.Checkpoints(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for call in (lambda: checkpoints.newest(init()), lambda: checkpoints.save(init())):
        with pytest.raises(FileNotFoundError, match="gone"):
            call()


@pytest.mark.parametrize("what", [None, {"w": 1.0}])
def test_what_is_no_state(tmp_path, what):
    checkpoints = ol.Checkpoints(tmp_path)
    for call in (checkpoints.save, checkpoints, checkpoints.newest):
        if call == checkpoints.newest:
            checkpoints.save(at(1))
        with pytest.raises(ol.InvalidType, match="must be a TrainState"):
            call(what)


def test_it_prints(tmp_path):
    assert repr(ol.Checkpoints(tmp_path, 2, 5)) == (
        f"Checkpoints({str(tmp_path)!r}, keep=2, every=5)"
    )


def train_until_killed(folder):
    """Train and save at every second step; tell of each file that is on the disk."""
    checkpoints = ol.Checkpoints(folder, keep=2, every=2)
    found = checkpoints.newest(like=init())
    state = init() if found is None else found[0]

    def save(state, metrics):
        checkpoints(state, metrics)
        if int(state.step) in checkpoints.steps:
            print(int(state.step), flush=True)

    STEP.run(state, iter(lambda: 1.0, None), hooks=[ol.every(2, save)])


def test_a_trainer_that_is_killed_goes_on_where_it_was(tmp_path):
    code = f"from tests.files import test_checkpoints as t; t.train_until_killed({str(tmp_path)!r})"
    acknowledged = 0
    for lines in (3, 5):
        with subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            text=True,
        ) as child:
            assert child.stdout is not None
            told = [int(child.stdout.readline()) for _ in range(lines)]
            child.send_signal(signal.SIGKILL)
            told += [int(line) for line in child.stdout.read().split()]
        assert told[0] == acknowledged + 2  # from where it was
        assert all(b - a == 2 for a, b in itertools.pairwise(told))
        acknowledged = told[-1]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            state, _ = ol.Checkpoints(tmp_path).newest(like=init(), strict=True)
        # A file may be whole before the child could tell of it.
        assert int(state.step) in (acknowledged, acknowledged + 2)
        acknowledged = int(state.step)
    straight, _ = STEP.run(init(), [1.0] * acknowledged)
    np.testing.assert_array_equal(state.params["w"], straight.params["w"])


def in_two_processes(folder, shard_state):
    """Save parameters that lie in two processes, from both; then go on in both."""
    sharding.LEAST = 1  # in this process: the array that small parameters share is spread, too
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def init(values, ema=None):
        step = made(ema)
        w = jax.make_array_from_callback((4,), spread, lambda i: values[i])
        return step.init({"w": w, **dict.fromkeys("ab", jax.device_put(values[:2], whole))})

    def made(ema):
        return ol.optimize_loss(
            lambda p, x: jnp.sum((p["w"] * x) ** 2) + jnp.sum(p["a"] * p["b"]),
            learning_rate=0.1,
            shard_state=shard_state,
            ema=ema,
        )

    step = made(None)
    checkpoints = ol.Checkpoints(folder, keep=1, every=2)
    first = np.arange(1.0, 5.0, dtype=np.float32)
    state, _ = step.run(init(first), [np.float32(1)] * 4, hooks=[checkpoints])
    again, report = checkpoints.newest(like=init(np.zeros(4, np.float32)), strict=True)
    wanted, got = on_host(state), on_host(again)
    equal = all(got[name].tobytes() == wanted[name].tobytes() for name in wanted)
    all_matched = len(report.matched) == len(wanted)
    shards = len(again.params["w"].addressable_shards)
    pairs = zip(*(jax.tree.leaves(x.packed_optimizer) for x in (again, state)), strict=True)
    placed = again.placement == state.placement and all(a.sharding == b.sharding for a, b in pairs)
    (bucket,) = (x for x in again.packed_optimizer["adam"]["m"].values() if isinstance(x, Bucket))
    parted = not bucket.buffer.is_fully_replicated
    back = state.with_trees(state.params, state.optimizer).reset("w")
    pairs = zip(*(jax.tree.leaves(x.packed) for x in (back, state)), strict=True)
    placed = placed and all(a.sharding == b.sharding for a, b in pairs)
    got = on_host(back)
    kept = [name for name in wanted if not name.endswith(("/m/w", "/v/w"))]
    equal = equal and all(got[name].tobytes() == wanted[name].tobytes() for name in kept)
    averaged, _ = checkpoints.newest(like=init(np.zeros(4, np.float32), ema=0.9))
    averages = {n: x for n, x in on_host(averaged).items() if "/average/" in n}
    begun = len(averages) == 3 and all(
        x.tobytes() == wanted[f"params/{n.rpartition('/')[2]}"].tobytes()
        for n, x in averages.items()
    )
    one, _ = step(again, np.float32(1))
    two, _ = step(state, np.float32(1))
    later = on_host(one)["params/w"].tobytes() == on_host(two)["params/w"].tobytes()
    try:  # what fails in the first process fails in both
        ol.save(f"{folder}/nowhere/a.safetensors", one)
        failed = ""
    except OSError as error:
        failed = type(error).__name__
    print(json.dumps([equal, later, all_matched, begun, shards, placed, parted, failed]))


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.parametrize("axis", [None, "d"])
def test_two_processes_write_one_file(tmp_path, axis):
    port = free_port()
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    children = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                f"import jax; jax.distributed.initialize('127.0.0.1:{port}', 2, {rank}); "
                f"from tests import conftest; import {__name__} as t; "
                f"t.in_two_processes({str(tmp_path)!r}, {axis!r})",
            ],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    found = [child.communicate(timeout=100) for child in children]
    assert [child.returncode for child in children] == [0, 0], found[0][1] + found[1][1]
    of_both = [json.loads(out.splitlines()[-1]) for out, _ in found]
    assert of_both == [
        [True, True, True, True, 1, True, axis is not None, error]
        for error in ("FileNotFoundError", "OSError")
    ]
    assert names(tmp_path) == ["step_4.safetensors"]


@pytest.mark.parametrize(("mode", "kept"), [("min", [1, 3]), ("max", [1, 2, 5])])
def test_the_best_are_kept(tmp_path, mode, kept):
    values = [3.0, 4.0, 2.0, float("nan"), 5.0]
    for step, value in enumerate(values, 1):
        checkpoints = ol.Checkpoints(tmp_path, keep=9, best="eval/loss", mode=mode)
        checkpoints(at(step), {"eval/loss": value, "loss": 0.0})  # each in a new process
    assert checkpoints.steps == tuple(kept)
    assert int(checkpoints.resume(init()).step) == kept[-1]
    with pytest.raises(ValueError, match=r"'eval/loss'.*Nearest"):
        checkpoints(at(9), {"loss": 1.0})
    with pytest.raises(ValueError, match=r"`mode` must be one of \['min', 'max'\]"):
        ol.Checkpoints(tmp_path, mode="least")
    with pytest.raises(ol.InvalidType, match="`best` must be the tag"):
        ol.Checkpoints(tmp_path, best=1)
