"""Signals while `TrainStep.run` goes on: each one is raised, with a living state.

OPTIMIZE_LOSS_SIGNALS=200 sends that many where a test sends a few.
"""

import contextlib
import itertools
import os
import queue
import random
import signal
import sys
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optimize_loss
from optimize_loss import _signals

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
