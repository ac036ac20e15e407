"""What a file holds beside a state: a run that goes on reads the batches that would have come."""

import itertools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optimize_loss._files import parts as parts_module
from tests.files.saved import assert_equal, ol

STEP = ol.optimize_loss(
    lambda p, x: jnp.mean((p["w"] * x) ** 2), learning_rate=0.1, skip="nonfinite", accumulate=2
)


def init():
    return STEP.init({"w": jnp.full(4, 2.0)})


class Shuffled:
    """Batches in an order of their own; of several sizes, so that calls end early."""

    def __init__(self, seed=0):
        self.random, self.taken = np.random.default_rng(seed), 0

    def __iter__(self):
        return self

    def __next__(self):
        self.taken += 1
        size = 4 if self.taken % 5 else 1
        scale = np.nan if self.taken % 7 == 0 else 1
        return (scale * self.random.normal(size=size)).astype(np.float32)

    def get_state(self):
        return {"random": self.random.bit_generator.state, "taken": self.taken}

    def set_state(self, state):
        self.random.bit_generator.state, self.taken = state["random"], state["taken"]


class Dict(Shuffled):
    """The other pair of names, and a state of other kinds."""

    get_state: Any = None
    set_state: Any = None

    def state_dict(self):
        return (Shuffled.get_state(self), b"\x00\xff", np.arange(3), {1: (2, [None, True])})

    def load_state_dict(self, state):
        mine, data, array, rest = state
        assert (data, rest) == (b"\x00\xff", {1: (2, [None, True])})
        assert (array.dtype, array.tolist()) == (np.int64, [0, 1, 2])
        Shuffled.set_state(self, mine)


@pytest.mark.parametrize("steps_per_call", [1, 4])
@pytest.mark.parametrize("kind", [Shuffled, Dict])
def test_a_run_that_resumes_is_the_straight_run(tmp_path, kind, steps_per_call):
    straight, _ = STEP.run(init(), kind(), steps=30)
    data = kind()
    checkpoints = ol.Checkpoints(tmp_path, every=6, parts={"data": data})

    def stop(state, metrics):
        raise KeyError("the machine")

    with pytest.raises(KeyError):
        STEP.run(
            init(), data, steps_per_call=steps_per_call, hooks=[checkpoints, ol.every(18, stop)]
        )
    data = kind(seed=1)
    again = ol.Checkpoints(tmp_path, every=6, parts={"data": data})
    state = again.resume(init())
    assert (int(state.batches), data.taken) == (18, 18)
    assert int(state.step) < 9
    state, _ = STEP.run(state, data, steps=12, steps_per_call=steps_per_call, hooks=[again])
    assert_equal(state, straight)
    assert again.resume(init()).batches == data.taken == 30  # of the end


def test_values_and_functions_are_in_the_report(tmp_path):
    path, count = tmp_path / "a.safetensors", itertools.count(5)
    config = {"width": 4, "names": ["a", "b"]}
    ol.save(path, init(), parts={"config": config, "count": lambda: next(count)})
    config["width"] = 8
    state, report = ol.restore(path, init(), strict=True)
    assert report.parts == {"config": {"width": 4, "names": ["a", "b"]}, "count": 5}
    assert_equal(state, init())


def test_a_part_that_the_file_lacks_stays(tmp_path):
    path, data = tmp_path / "a.safetensors", Shuffled()
    ol.save(path, init())
    with pytest.warns(UserWarning, match="The file has no part 'data'"):
        _, report = ol.restore(path, init(), parts={"data": data})
    assert (report.parts, data.taken) == ({}, 0)
    with pytest.raises(ol.CheckpointMismatch, match="The file has no part 'data'"):
        ol.restore(path, init(), parts={"data": data}, strict=True)


def test_a_failed_restore_leaves_the_iterator(tmp_path):
    path, data = tmp_path / "a.safetensors", Shuffled()
    next(data)
    ol.save(path, init(), parts={"data": data})
    next(data)
    with pytest.raises(ol.CheckpointMismatch):
        ol.restore(path, STEP.init({"w": jnp.ones(3)}), parts={"data": data})
    assert data.taken == 2


@pytest.mark.parametrize(
    ("parts", "match"),
    [
        ([1], "`parts` must map names"),
        ({"a/b": 1}, "`parts` must map names.*'a/b'"),
        ({1: 1}, "`parts` must map names"),
        ({"a": object()}, "`parts` must give numbers.*for 'a'.*object"),
        ({"a": np.array(["x"])}, "`parts` must give numbers.*an array of <U1"),
    ],
)
def test_what_is_no_part(tmp_path, parts, match):
    with pytest.raises(ol.InvalidType, match=match):
        ol.save(tmp_path / "a.safetensors", init(), parts=parts)
    assert not [*tmp_path.iterdir()]


def test_each_process_has_its_own(monkeypatch):
    """As `process_allgather` gives what several processes have."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    texts = [b'{"dict": [["at", 1]]}', b'{"dict": [["at", 200]]}']
    gathered = iter([np.array([len(x) for x in texts]), np.array([[*x.ljust(23)] for x in texts])])
    monkeypatch.setattr(
        parts_module.multihost_utils, "process_allgather", lambda x: next(gathered).astype(x.dtype)
    )
    found = parts_module.packed({"data": {"at": 200}})
    assert [x.tobytes() for x in found.values()] == texts
    for process, at in ((0, 1), (1, 200)):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert parts_module.unpacked(found) == {"data": {"at": at}}
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    with pytest.raises(ol.CheckpointMismatch, match="'data' of 2 processes, in one of 3"):
        parts_module.check_processes({"data": Shuffled()}, found)
    parts_module.check_processes({"data": {"at": 1}}, found)


def test_grain_resumes_with_workers(tmp_path):
    grain = pytest.importorskip("grain")
    pytest.importorskip("absl.flags").FLAGS.mark_as_parsed()  # as in `absl.app.run`

    def data():
        numbers = np.arange(64, dtype=np.float32)
        set_of = grain.MapDataset.source(numbers).seed(0).shuffle().repeat()
        batched = set_of.to_iter_dataset().batch(4)
        return iter(batched.mp_prefetch(grain.MultiprocessingOptions(num_workers=2)))

    step = ol.optimize_loss(lambda p, x: jnp.mean((p["w"] - x) ** 2), learning_rate=0.1)
    start = lambda: step.init({"w": jnp.zeros(4)})
    straight, _ = step.run(start(), data(), steps=20, steps_per_call=3)
    first = data()
    step.run(
        start(),
        first,
        steps=11,
        steps_per_call=3,
        hooks=[ol.Checkpoints(tmp_path, every=4, parts={"data": first})],
    )
    second = data()
    state = ol.Checkpoints(tmp_path, parts={"data": second}).resume(start())
    assert state.batches == 11
    state, _ = step.run(state, second, steps=9, steps_per_call=3)
    assert_equal(state, straight)


def test_kinds_come_back_from_json():
    value = {"a": (1, [2.5, None]), 3: np.float32(1.5), "big": 2**100, "c": np.array([1 + 2j])}
    text = json.dumps(parts_module._marked(value))
    back = parts_module._unmarked(json.loads(text))
    assert (back["a"], back[3], back["big"]) == ((1, [2.5, None]), np.float32(1.5), 2**100)
    assert back["c"].tolist() == [1 + 2j]
