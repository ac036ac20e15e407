"""`TrainStep.run` where something fails: the state is kept, and no batch is lost."""

import builtins
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from tests.step.looped import Counted, Tensor, linear, ol, start


def fail_after(n, error):
    for _ in range(n):
        yield 1.0
    raise error


def state_of(caught):
    return caught.value.state


def note(error):
    return "".join(getattr(error, "__notes__", []))


@pytest.mark.parametrize("steps_per_call", [1, 2, 4])
def test_an_iterator_that_fails_leaves_the_state_and_calls_the_hooks(steps_per_call):
    step, hooked, error = linear(), [], OSError("disk")
    hooks = [ol.every(1, lambda state, metrics: hooked.append(int(state.step)))]
    with pytest.raises(OSError, match="disk") as caught:
        step.run(start(step), fail_after(3, error), steps_per_call=steps_per_call, hooks=hooks)
    assert caught.value is error
    state = state_of(caught)
    assert state.params["w"] == 97
    assert "state after 3 steps" in note(error)
    assert hooked == [1, 2, 3]
    state, _ = step.run(state, [1.0])
    assert state.params["w"] == 96


@pytest.mark.parametrize(("steps_per_call", "taken"), [(1, 3), (2, 2), (4, 0)])
def test_an_interrupt_is_raised_at_once_with_the_state(steps_per_call, taken):
    step = linear()
    with pytest.raises(KeyboardInterrupt) as caught:
        step.run(start(step), fail_after(3, KeyboardInterrupt()), steps_per_call=steps_per_call)
    assert state_of(caught).step == taken
    assert f"state after {taken} steps" in note(caught.value)


@pytest.mark.parametrize("error", [RuntimeError, StopIteration, KeyboardInterrupt])
def test_a_hook_that_fails_leaves_the_state(error):
    def hook(state, metrics):
        if metrics["global_norm/gradient_norm"][-1] == 4:
            raise error

    step, batches = linear(), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    with pytest.raises(error) as caught:
        step.run(start(step), batches, hooks=[ol.every(2, hook)], steps_per_call=2)
    assert state_of(caught).params["w"] == 90


def test_a_hook_of_the_end_is_not_called_where_an_exception_ends_the_run():
    step, seen = linear(), []
    hook = ol.every(5, lambda state, metrics: seen.append(state.step), at_end=True)
    with pytest.raises(OSError, match="disk"):
        step.run(start(step), fail_after(3, OSError("disk")), hooks=[hook])
    assert not seen


def test_a_state_whose_memory_is_gone_is_not_attached():
    step = linear()

    def greedy(state, metrics):
        step(state, 1.0)

    with pytest.raises(RuntimeError, match="donated") as caught:
        step.run(start(step), [1.0] * 3, hooks=[ol.every(1, greedy)])
    assert not hasattr(caught.value, "state")
    assert not note(caught.value)


def test_a_batch_that_does_not_fit_leaves_the_state():
    step = linear()
    with pytest.raises(ValueError, match=r"takes|take") as caught:
        step.run(start(step), [1.0, 2.0, (3.0, 4.0)], steps_per_call=2)
    assert state_of(caught).params["w"] == 97


def test_a_state_that_the_device_did_not_compute_is_not_attached():
    def refuse(x):
        if x == 3:
            raise KeyError("mine")
        return x

    def loss(params, x):
        return params["w"] * jax.pure_callback(refuse, jax.ShapeDtypeStruct((), "float32"), x)

    step = ol.optimize_loss(loss, learning_rate=1.0, optimizer="SGD")
    with pytest.raises(Exception, match="mine") as caught:
        step.run(start(step), [np.float32(x) for x in range(8)])
    state = getattr(caught.value, "state", None)
    assert state is None or state.step == 3  # of before, if the call failed before it returned


def test_an_error_that_takes_no_attributes_is_raised_as_it_is():
    class Sealed(Exception):
        def __setattr__(self, name, value):
            if name == "state":
                raise AttributeError(name)
            super().__setattr__(name, value)

    step = linear()
    with pytest.raises(Sealed) as caught:
        step.run(start(step), fail_after(1, Sealed()))
    assert not hasattr(caught.value, "state")


def test_an_iterator_that_ends_early_is_told_of():
    step = linear()
    with pytest.warns(UserWarning, match=r"`batches` ended after 3 of 10 steps\.") as told:
        state, metrics = step.run(start(step), [1.0] * 3, steps=10, steps_per_call=2)
    assert told[0].filename == __file__
    assert (state.params["w"], metrics["loss"].shape) == (97, (3,))
    with (
        warnings.catch_warnings(action="error"),
        pytest.raises(UserWarning, match="3 of 10") as caught,
    ):
        step.run(start(step), [1.0] * 3, steps=10)
    assert state_of(caught).params["w"] == 97


@pytest.mark.parametrize("steps", [None, 3])
def test_no_batches_are_an_error_that_leaves_the_state_alone(steps):
    step = linear()
    state = start(step)
    with pytest.raises(ValueError, match="`batches` must hold a batch"):
        step.run(state, iter([]), steps=steps)
    assert step(state, 1.0)[0].params["w"] == 99


ONE = "must be an integer of at least 1"
BAD = {
    "steps-0": ({"steps": 0}, ValueError, rf"`steps` {ONE}. Received: steps=0\."),
    "steps-float": ({"steps": 2.0}, TypeError, f"`steps` {ONE}"),
    "per-call-0": (
        {"steps_per_call": 0},
        ValueError,
        rf"`steps_per_call` {ONE}. Received: steps_per_call=0\.",
    ),
    "per-call-none": ({"steps_per_call": None}, TypeError, f"`steps_per_call` {ONE}"),
    "per-call-bool": ({"steps_per_call": True}, TypeError, f"`steps_per_call` {ONE}"),
    "prefetch-0": ({"prefetch": 0}, ValueError, f"`prefetch` {ONE}"),
    "progress": ({"progress": 1}, TypeError, "`progress` must be True or False"),
    "hooks-list": ({"hooks": [print]}, TypeError, "`hooks` must be a list.*ol.every.*print"),
    "hooks-function": ({"hooks": print}, TypeError, "`hooks` must be a list"),
    "hooks-dict": ({"hooks": {100: print}}, TypeError, "`hooks` must be a list"),
    "sharding": ({"sharding": PartitionSpec("d")}, TypeError, "`sharding` must be a NamedShard"),
    "sharding-part": ({"sharding": (None, "d")}, TypeError, r"sharding='d'\."),
    "batches-array": ({"batches": np.ones(3)}, TypeError, r"\[batch\].*`step.many`.*ndarray\."),
    "batches-jax": ({"batches": jnp.ones(3)}, TypeError, "`batches` must be an iterable"),
    "batches-tensor": ({"batches": Tensor(1)}, TypeError, "Received: Tensor"),
    "batches-dict": ({"batches": {"x": 1}}, TypeError, "Received: dict"),
    "batches-text": ({"batches": "abc"}, TypeError, "Received: str"),
    "batches-number": ({"batches": 3}, TypeError, "Received: int"),
    "state": ({"state": {"w": 1.0}}, TypeError, "`state` must be a TrainState"),
}


@pytest.mark.parametrize(
    ("arguments", "options", "match"),
    [
        ((0, print), {}, rf"`n` {ONE}. Received: n=0\."),
        (("1", print), {}, f"`n` {ONE}"),
        ((1, [print]), {}, r"`function` must be a function of \(state, metrics\)"),
        ((1, lambda state: None), {}, "signature"),
        ((1, print), {"at_end": 1}, "`at_end` must be True or False"),
    ],
)
def test_what_every_refuses(arguments, options, match):
    with pytest.raises(ValueError, match=match):
        ol.every(*arguments, **options)


def test_a_hook_that_waits_for_nothing_is_refused():
    class Now(ol.Hook):
        def wait(self, batches):
            return 0

    with pytest.raises(ValueError, match=rf"`wait` {ONE}"):
        linear().run(start(linear()), [1.0], hooks=[Now()])


@pytest.mark.parametrize("name", BAD)
def test_wrong_arguments_are_refused_before_a_batch_is_pulled(name):
    options, kind, match = BAD[name]
    step = linear()
    state, batches = start(step), Counted([1.0])
    with pytest.raises(kind, match=match) as caught:
        step.run(**{"state": state, "batches": batches, **options})
    assert isinstance(caught.value, ValueError)
    assert batches.pulled == 0
    step(state, 1.0)


def test_a_state_given_away_is_refused_before_a_batch_is_pulled():
    step = linear()
    state, batches = start(step), Counted([1.0])
    step(state, 1.0)
    with pytest.raises(RuntimeError, match="This state was donated"):
        step.run(state, batches)
    assert batches.pulled == 0


def test_a_run_is_not_for_jit():
    step = linear()
    with pytest.raises(ol.InvalidType, match=r"must not be traced.*`step.many` works there"):
        jax.jit(lambda state: step.run(state, [1.0])[0])(start(step))


@pytest.mark.parametrize("item", ["text", np.datetime64("2020-01-01"), object()])
def test_what_is_no_array_is_refused(item):
    step = linear()
    with pytest.raises(ol.InvalidType, match="`batches` must hold arrays and numbers") as caught:
        step.run(start(step), [1.0, item])
    assert state_of(caught).params["w"] == 99


@pytest.mark.parametrize("result", [3.0, {"w": 1.0}, False])
def test_what_a_hook_may_return(result):
    step = linear()
    with pytest.raises(ol.InvalidType, match="A hook must return None or a TrainState"):
        step.run(start(step), [1.0, 2.0], hooks=[ol.every(2, lambda state, metrics: result)])


def test_a_bar_shows_steps_and_loss(monkeypatch):
    import tqdm.auto

    bars = []

    class Bar(tqdm.auto.tqdm):
        def __init__(self, *args, **options):
            super().__init__(*args, mininterval=0, **options)
            bars.append(self)
            self.losses = []

        def set_postfix(self, ordered_dict=None, refresh=True, **values):
            self.losses.append(values["loss"])
            super().set_postfix(ordered_dict, refresh, **values)

        def close(self):
            self.closed = True
            super().close()

    monkeypatch.setattr(tqdm.auto, "tqdm", Bar)
    step = linear(name="task")
    step.run(start(step), [1.0, 2.0, 3.0], steps=3, steps_per_call=2, progress=True)
    with pytest.raises(OSError, match="disk"):
        step.run(start(step), fail_after(2, OSError("disk")), prefetch=1, progress=True)
    assert [(bar.total, bar.closed) for bar in bars] == [(3, True), (None, True)]
    assert [bar.n for bar in bars] == [3, 1]  # what was fetched
    assert bars[0].losses == [99 * 2.0, 97 * 3.0]


def test_a_bar_needs_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    step = linear()
    state, batches = start(step), Counted([1.0])
    with pytest.raises(ImportError, match="pip install tqdm"):
        step.run(state, batches, progress=True)
    assert batches.pulled == 0
    assert step.run(state, batches)[0].params["w"] == 99


def test_no_bar_imports_no_tqdm(monkeypatch):
    plain = builtins.__import__

    def refuse(name, *args, **options):
        assert not name.startswith("tqdm")
        return plain(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    step = linear()
    step.run(start(step), [1.0])
