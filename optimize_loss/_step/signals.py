"""Signals while a run goes on: none is lost, and none takes the state with it.

Python runs the handler of a signal between two instructions of the main thread, and raises there
the handler's exception. In a loop of donating calls, that is a bad place twice over:

- Between the end of a call and the assignment of its result, no variable holds a living state.
- JAX has a function in `gc.callbacks`. An exception raised while it runs is printed and lost.

So a run puts functions of its own before all handlers that are written in Python. They call the
handler at once, and keep its exception. The run raises that between two calls, where the state is
at hand. Three rules more:

- A batch may never come, and a hook may take long. If the run does not come to its next call
  within `GRACE` seconds, the exception is raised in the code of the iterator or the hook, again and
  again until it comes out of there. Before that, an iterator is not harmed.
- A second Ctrl-C raises at once, wherever that is. Within `GRACE` seconds it is not one by hand:
  a terminal and a parent process may both send the first.
- Python allows handlers in the main thread only. A run in another thread changes nothing.
"""

import _thread
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

GRACE = 0.1  # seconds
_NUMBERS = sorted(signal.valid_signals())


class Handler:
    """A function before a handler, during a run; later, too, where another one still calls it."""

    def __init__(self, signals: "Signals", theirs: Callable[[int, Any], Any]):
        self.signals = signals
        self.theirs = theirs

    def __call__(self, number: int, frame: Any) -> None:
        """Call the handler that was there."""
        self.signals.arrived(self.theirs, number, frame)


class Signals:
    """The exception that a handler has raised and a run has not yet.

    Runs within runs share one of these: the innermost raises.
    """

    def __init__(self):
        self._runs = 0
        self._process = 0
        self._put: dict[int, Handler] = {}
        self._error: BaseException | None = None
        self._since = 0.0
        self._hurried = False  # whether to raise wherever that is
        self._is_safe: Callable[[], bool] | None = None  # given while code of the user's runs
        self._lock = threading.Lock()
        self._knocks = False  # whether `_insist` may send signals
        self._on_its_way: int | None = None  # one that it has sent and that has not arrived

    @property
    def active(self) -> bool:
        """Whether a run goes on, in this process rather than in one that it was forked from."""
        return self._runs > 0 and self._process == os.getpid()

    def install(self) -> None:
        """Run before all handlers that are written in Python, among them those that are new."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _NUMBERS:
            theirs = signal.getsignal(number)
            if callable(theirs) and not isinstance(theirs, Handler):
                self._put[number] = Handler(self, theirs)
                with contextlib.suppress(ValueError):  # an interpreter that is not the main one
                    signal.signal(number, self._put[number])

    def check(self) -> None:
        """Raise the exception of a handler, if there is one."""
        if self._error is not None:
            raise self._error

    def within(self, is_safe: Callable[[], bool], function: Callable[..., Any], *args: Any) -> Any:
        """Return the result of code of the user's, which may be left where `is_safe()`."""
        self._is_safe = is_safe
        try:
            return function(*args)
        finally:
            self._is_safe = None

    def arrived(self, theirs: Callable[[int, Any], Any], number: int, frame: Any) -> None:
        """Call a handler and keep its exception, or raise one that was kept."""
        if not self.active:
            theirs(number, frame)
        elif number == self._on_its_way:
            self._on_its_way = None
            if self._error is not None and self._may_raise():
                raise self._error
        else:
            try:
                theirs(number, frame)
            except BaseException as error:
                self._keep(error, number)
                if self._hurried:
                    raise

    def _may_raise(self) -> bool:
        return self._hurried or (self._is_safe is not None and self._is_safe())

    def _keep(self, error: BaseException, number: int) -> None:
        own_frame = error.__traceback__
        error.__traceback__ = own_frame and own_frame.tb_next
        first, self._error = self._error is None, error
        if first:
            self._since, self._hurried = time.monotonic(), False
            _thread.start_new_thread(self._insist, (number, self._since))  # which does not wait
        elif number == signal.SIGINT and time.monotonic() - self._since > GRACE:
            self._hurried = True

    def _insist(self, number: int, since: float) -> None:
        """Send the signal until its exception is raised; that ends a wait in the system, too."""
        while True:
            time.sleep(GRACE)
            with self._lock:
                ours = isinstance(signal.getsignal(number), Handler)
                if self._error is None or self._since != since:
                    return  # raised; there may be another one already
                if not (ours and self._knocks and self.active):
                    return
                if self._hurried or self._is_safe is not None:
                    self._on_its_way = number
                    _send(number)

    def enter(self) -> None:
        """Begin a run, or one within a run."""
        if not self.active:
            self._runs, self._process = 0, os.getpid()
            self._error = self._on_its_way = None
        self._runs += 1
        self._is_safe, self._knocks = None, True
        if self._runs == 1:
            self.install()

    def leave(self, runs: int, is_safe: Callable[[], bool] | None) -> None:
        """Go back to a number of runs; at 0, handlers are put back unless others are there."""
        self._hurried, self._is_safe = False, None
        with self._lock:
            self._knocks = False
        waited = 0
        while (
            self._on_its_way is not None and waited < 1000
        ):  # or the user's handler would be called once more
            time.sleep(0.001)
            waited += 1
        self._runs, self._is_safe, self._knocks = runs, is_safe, runs > 0
        if not runs:
            for number, handler in self._put.items():
                if signal.getsignal(number) is handler:
                    signal.signal(number, handler.theirs)
            self._put.clear()

    @contextlib.contextmanager
    def during_run(self, leaves: Callable[[BaseException], Any]) -> Iterator[None]:
        """Keep exceptions of handlers during a run; raise the one that is kept at its end.

        Args:
          leaves: what to do with an exception that leaves the run, before it does.
        """
        before = self._runs if self.active else 0, self._is_safe
        try:
            self.enter()
            yield
        except BaseException as error:
            if error is self._error:
                self._error = None
            leaves(error)
            raise
        finally:
            try:
                self.leave(*before)
            finally:  # again, where a handler has raised in the middle
                self.leave(*before)
            self._raise_last(leaves)

    def _raise_last(self, leaves: Callable[[BaseException], Any]) -> None:
        error, self._error = self._error, None
        try:
            if error is not None:
                leaves(error)
                raise error
        finally:
            del error  # which holds this frame


def _send(number: int) -> None:
    """Send a signal to the main thread."""
    to_thread = getattr(signal, "pthread_kill", None)
    if to_thread is None:
        _thread.interrupt_main(signal.Signals(number))
    else:
        to_thread(threading.main_thread().ident, number)


_OF_MAIN_THREAD = Signals()


def signals() -> Signals:
    """Return the signals that a run in this thread keeps."""
    is_main = threading.current_thread() is threading.main_thread()
    return _OF_MAIN_THREAD if is_main else Signals()
