"""One process for each peer: a JSON line in, a JSON line out.

    python -m benchmarks._worker MODULE

The module has `VERSIONS` and `Peer(problem)`, with `run(steps)` and `values()`; peers on JAX also
have `built(stage)` and `counts()`.
"""

import dataclasses
import gc
import importlib
import json
import os
import pathlib
import select
import subprocess
import sys
import time
from typing import Any

from benchmarks._problems import Problem

ROOT = pathlib.Path(__file__).parent.parent
PATIENCE = 240  # seconds


@dataclasses.dataclass(frozen=True)
class Name:
    """Which file a peer is in, how many threads it may have (0: all), and whose Python runs it.

    `setting` is a variable of its environment.
    """

    module: str
    threads: int = 0
    python: str = sys.executable
    setting: tuple[str, str] | None = None


class Missing(Exception):
    """A peer that is not installed."""


class Late(Exception):
    """A peer that did not answer in time."""


class Worker:
    """The near end: starts a peer's process and asks it."""

    def __init__(self, name: Name) -> None:
        self.name = name
        quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        threads = {"OMP_NUM_THREADS": str(name.threads)} if name.threads else {}
        own = dict([name.setting]) if name.setting else {}
        self.process = subprocess.Popen(
            [name.python, "-m", "benchmarks._worker", name.module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "KERAS_BACKEND": "jax", **quiet, **threads, **own},
        )
        self.versions: dict[str, Any] = {}

    def started(self) -> dict[str, str]:
        """Wait until the peer is there, and return its versions."""
        self.versions = self._answer()["versions"]
        return self.versions

    def ask(self, what: str, **arguments: Any) -> Any:
        """Have the server do something, and return its answer.

        Raises:
          Late: there is none in time; the process is ended.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"what": what, **arguments}) + "\n")
        self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], PATIENCE)[0]:
            self.process.kill()
            self.close()
            raise Late(f"{self.name.module} did not answer in {PATIENCE} s")
        return self._answer()["result"]

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"A worker died: {self.process.args}, code {self.process.wait()}.")
        answer = json.loads(line)
        if "missing" in answer:
            raise Missing(answer["missing"])
        return answer

    def close(self) -> None:
        """End the process, by ending what it reads."""
        self.process.communicate()


class Server:
    """The far end: holds one problem at a time."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.peer: Any = None

    def prepare(self, problem: dict[str, Any]) -> str:
        """Set up a problem, and return what the peer has to say of it."""
        self.release()
        self.problem = Problem(**problem)
        self.peer = self.module.Peer(self.problem)
        return getattr(self.peer, "note", "")

    def release(self) -> None:
        self.peer = None
        gc.collect()

    def advance(self, steps: int) -> list[float] | None:
        """Take steps, and return some elements of the parameters."""
        self.peer.run(steps)
        values = self.peer.values()
        return None if values is None else self.problem.sampled(values).tolist()

    def first(self) -> list[float]:
        return self.problem.sampled(self.problem.params()).tolist()

    def timed(self, steps: int, seconds: float) -> list[float]:
        """Take so many steps until the time is over; return what one took: wall, processor."""
        start, cpu, taken = time.perf_counter(), time.process_time(), 0
        while not taken or time.perf_counter() - start < seconds:
            self.peer.run(steps)
            taken += steps
        return [(time.perf_counter() - start) / taken, (time.process_time() - cpu) / taken]

    def build(self, stage: str) -> list[float]:
        """Return the seconds from nothing to a stage of compilation."""
        import jax

        jax.config.update("jax_enable_compilation_cache", False)
        jax.clear_caches()
        start, cpu = time.perf_counter(), time.process_time()
        self.peer.built(stage)
        return [time.perf_counter() - start, time.process_time() - cpu]

    def counts(self) -> dict[str, int]:
        return self.peer.counts() if hasattr(self.peer, "counts") else {}

    def device(self) -> str:
        import jax

        return jax.devices()[0].device_kind


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        module = importlib.import_module(f"benchmarks.peers.{sys.argv[1]}")
    except ImportError as error:
        say({"missing": str(error)})
        return
    server = Server(module)
    say({"versions": module.VERSIONS})
    for line in sys.stdin:
        request = json.loads(line)
        say({"result": getattr(server, request.pop("what"))(**request)})


if __name__ == "__main__":
    main()
