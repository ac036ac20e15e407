"""Signals while `TrainStep.run` goes on: each one is raised, with a living state.

OPTIMIZE_LOSS_SIGNALS=200 sends that many where a test sends a few.
"""

import contextlib
import gc
import itertools
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import optimize_loss
from optimize_loss._step.signals import GRACE

# Where a machine is slow, an exception is raised in an iterator, and in a callback of the collector
# Python prints it as ignored; it is raised again.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
ol: Any = optimize_loss
COUNT = int(os.environ.get("OPTIMIZE_LOSS_SIGNALS", "10"))
PYTHON_HANDLERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM)


class Preempted(Exception):
    """Raised by a handler of the user's."""


def preempt(number, frame):
    raise Preempted(number)


@pytest.fixture(autouse=True)
def handlers():
    """Begin with Python's own handlers, and put everything back."""
    before = {number: signal.getsignal(number) for number in PYTHON_HANDLERS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@contextlib.contextmanager
def sent(batches, *delays, number=signal.SIGINT):
    """Give the batches; so many seconds after the first one, signals are sent to the process."""

    def send():
        for delay in delays:
            if done.wait(delay):
                return
            os.kill(os.getpid(), number)

    def pulled():
        for i, batch in enumerate(batches):
            if not i:
                thread.start()
            yield batch

    done = threading.Event()
    thread = threading.Thread(target=send)
    try:
        yield pulled()
    finally:
        done.set()
        thread.join()


def state_of(caught):
    return caught.value.state


def matrix(size):
    """Return a step of a matrix, the batch that it takes, and what gives the first state."""
    step = ol.optimize_loss(lambda p, x: jnp.mean((p["w"] @ x) ** 2), learning_rate=0.1)
    w = np.eye(size, dtype=np.float32)
    return step, np.ones((size, 1), np.float32), lambda: step.init({"w": w})


def garbage(batch):
    """Yield a batch for ever, with so much garbage that the collector runs often."""
    while True:
        for _ in range(300):
            knot: list[Any] = []
            knot.append(knot)
        yield batch


@pytest.mark.parametrize("steps_per_call", [1, 4])
@pytest.mark.parametrize("size", [32, 512])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_any_moment_leaves_the_state(number, size, steps_per_call):
    step, batch, init = matrix(size)
    options = {"steps_per_call": steps_per_call}
    step.run(init(), [batch] * 5, **options)  # compiled
    if number != signal.SIGINT:
        signal.signal(number, preempt)
    kind = KeyboardInterrupt if number == signal.SIGINT else Preempted
    before = signal.getsignal(number)
    for i in range(COUNT):
        batches = itertools.repeat(batch) if i % 2 else garbage(batch)
        delay = random.Random(i).uniform(0.001, 0.03)
        with sent(batches, delay, number=number) as batches, pytest.raises(kind) as caught:
            step.run(init(), batches, **options)
        state = state_of(caught)
        wanted = init()
        if state.step:
            wanted, _ = step.run(wanted, [batch] * int(state.step), **options)
        np.testing.assert_array_equal(state.params["w"], wanted.params["w"])
        assert f"after {state.step} steps" in caught.value.__notes__[-1]
        assert signal.getsignal(number) is before


def ignore(number, frame):
    """A handler that returns."""


def scalar():
    """Return a step that subtracts x from w, and its first state."""
    step = ol.optimize_loss(lambda p, x: p["w"] * x, learning_rate=1.0, optimizer="SGD")
    return step, step.init({"w": np.float32(0)})


def hang(kind):
    """Yield a batch, then none: by a wait of the system, of a lock, or in Python."""
    yield 1.0
    if kind == "sleep":
        time.sleep(60)
    elif kind == "queue":
        queue.Queue().get()
    else:
        while True:
            sum(range(100))


@pytest.mark.parametrize("kind", ["sleep", "queue", "loop"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_batch_that_never_comes_does_not_hold_a_signal_back(kind, number):
    if number != signal.SIGINT:
        signal.signal(number, preempt)
    step, state = scalar()
    with sent(hang(kind), 0.05, number=number) as batches:
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else Preempted) as caught:
            step.run(state, batches)
    assert state_of(caught).step == 1
    assert time.monotonic() - start < 10


def test_an_iterator_that_does_not_wait_is_not_harmed():
    def count():
        for i in itertools.count():
            pulled.append(i)
            if i == 3:
                os.kill(os.getpid(), signal.SIGINT)
            yield 1.0

    pulled: list[int] = []
    step, state = scalar()
    batches = count()
    with pytest.raises(KeyboardInterrupt) as caught:
        step.run(state, batches)
    assert (state_of(caught).step, pulled) == (3, [0, 1, 2, 3])
    step.run(state_of(caught), batches, steps=2)
    assert pulled == [0, 1, 2, 3, 4, 5]


def test_an_exception_that_is_swallowed_is_raised_all_the_same():
    def stubborn():
        while True:
            with contextlib.suppress(KeyboardInterrupt):
                time.sleep(0.3)
            yield 1.0

    step, state = scalar()
    with sent(stubborn(), 0.05) as batches, pytest.raises(KeyboardInterrupt) as caught:
        step.run(state, batches)
    assert state_of(caught).step <= 1


@pytest.mark.parametrize(("seconds", "ended"), [(0.0, [2]), (30.0, [])])
def test_a_long_hook_is_left_and_a_short_one_is_not(seconds, ended):
    def hook(state, metrics):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(seconds)
        seen.append(int(state.step))

    seen: list[int] = []
    step, state = scalar()
    with pytest.raises(KeyboardInterrupt) as caught:
        step.run(state, itertools.repeat(1.0), hooks=[ol.every(2, hook)])
    assert (state_of(caught).step, seen) == (2, ended)


def test_a_hook_that_took_the_state_is_not_left():
    def hook(state, metrics):
        state, _ = step(state, 1.0)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(3 * GRACE)
        return state

    step, state = scalar()
    with pytest.raises(KeyboardInterrupt) as caught:
        step.run(state, itertools.repeat(1.0), hooks=[ol.every(2, hook)])
    assert state_of(caught).step == 3


def test_a_run_within_a_run_raises_with_its_state_and_the_outer_one_with_its_own():
    def hook(state, metrics):
        try:
            with sent(itertools.repeat(1.0), 0.01) as batches:
                inner.run(first, batches)
        except KeyboardInterrupt as error:
            seen.append(vars(error)["state"].params["w"].sum() < 0)
            raise

    seen: list[Any] = []
    inner, first = scalar()
    step, state = scalar()
    with pytest.raises(KeyboardInterrupt) as caught:
        step.run(state, itertools.repeat(0.0), hooks=[ol.every(3, hook)])
    assert (seen, state_of(caught).step, state_of(caught).params["w"]) == ([True], 3, 0)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_raises_at_once():
    def slow(x):
        for _ in range(600):
            time.sleep(0.1)
        return x

    step = ol.optimize_loss(lambda p, x: p["w"] * slow(x), learning_rate=1.0)  # while traced
    state = step.init({"w": np.float32(0)})
    start = time.monotonic()
    with sent(itertools.repeat(1.0), 0.1, 0.5) as batches, pytest.raises(KeyboardInterrupt):
        step.run(state, batches)
    assert time.monotonic() - start < 20


def test_the_same_signal_twice_within_a_moment_is_one():
    step, state = scalar()
    with sent(itertools.repeat(1.0), 0.02, 0.001, 0.001) as batches:
        with pytest.raises(KeyboardInterrupt) as caught:
            step.run(state, batches)
        time.sleep(0.01)
    assert state_of(caught).params["w"] == -int(state_of(caught).step)


def test_handlers_that_return_are_called_at_once_and_the_run_goes_on():
    frames = []
    signal.signal(signal.SIGUSR1, lambda number, frame: frames.append((number, frame)))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    step, state = scalar()

    def count():
        for _ in range(5):
            for number in (signal.SIGUSR1, signal.SIGINT):
                os.kill(os.getpid(), number)
            assert frames[-1][1].f_code is count.__code__
            yield 1.0

    state, _ = step.run(state, count())
    assert (state.step, len(frames)) == (5, 5)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_handlers_that_were_put_meanwhile_stay_and_default_ones_are_not_touched():
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, ignore)
    seen = []

    def hook(state, metrics):
        seen.append(signal.getsignal(signal.SIGTERM))
        signal.signal(signal.SIGUSR1, preempt)

    step, state = scalar()
    step.run(state, [1.0], hooks=[ol.every(1, hook)])
    assert seen == [signal.SIG_DFL]
    assert signal.getsignal(signal.SIGUSR1) is preempt


def test_a_handler_of_a_loader_that_calls_the_one_before_is_held_too():
    def loader():
        before = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, lambda *args: callable(before) and before(*args))
        yield 1.0
        os.kill(os.getpid(), signal.SIGTERM)
        yield 1.0

    signal.signal(signal.SIGTERM, preempt)
    step, state = scalar()
    with pytest.raises(Preempted) as caught:
        step.run(state, loader())
    assert state_of(caught).step == 1
    with pytest.raises(Preempted):  # outside of a run, at once
        signal.raise_signal(signal.SIGTERM)


def test_a_run_in_another_thread_changes_no_handler():
    seen = []

    def hook(state, metrics):
        seen.append(signal.getsignal(signal.SIGINT))

    def run():
        step, state = scalar()
        step.run(state, [1.0], hooks=[ol.every(1, hook)])

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]


def test_a_process_that_is_forked_in_a_run_has_the_handlers_of_before():
    code = """
import os, signal, sys, numpy as np
from optimize_loss._step.signals import signals
def batches():
    child = os.fork()
    if not child:
        try: signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt: os._exit(7)
        os._exit(1)
    yield os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
with signals().during_run(print):
    sys.exit(next(batches()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 7, done.stderr


@pytest.mark.parametrize("name", ["end", "iterator", "hook", "signal"])
def test_no_cycle_holds_the_state_of_a_run_that_ended(name):
    def batches():
        yield 1.0
        if name == "iterator":
            raise OSError("disk")
        if name == "signal":
            os.kill(os.getpid(), signal.SIGINT)
            yield 1.0

    def hook(state, metrics):
        if name == "hook":
            raise OSError("disk")

    class Here:
        """An object in the frame of the caller."""

    def run():
        here = Here()
        step, state = scalar()
        try:
            state, _ = step.run(state, batches(), hooks=[ol.every(1, hook)])
        except (OSError, KeyboardInterrupt) as error:
            state = vars(error)["state"]
        return weakref.ref(state), weakref.ref(here)

    gc.collect()
    gc.disable()
    try:
        assert [ref() for ref in run()] == [None, None]
    finally:
        gc.enable()
