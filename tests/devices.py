"""A process with eight CPU devices, which runs functions of the tests that it is given by name.

JAX has as many devices as its process began with. One process serves all tests of a worker, so JAX
is imported once for them, and what one of them has compiled is there for the next.
"""

import atexit
import functools
import importlib
import json
import os
import subprocess
import sys
import traceback
from typing import Any

from tests.layout import ROOT

ANSWER = "answer: "  # begins the lines that are answers, as functions may print too


class Devices:
    """A process with eight devices, under some flags of XLA."""

    def __init__(self, flags: str) -> None:
        environment = {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "8",
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip(),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.devices"],
            cwd=ROOT,
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def call(self, module: str, function: str, *arguments: Any) -> Any:
        """Return what a function of a module returns as JSON, given arguments that JSON has."""
        assert self.process.stdin
        assert self.process.stdout
        print(json.dumps([module, function, *arguments]), file=self.process.stdin, flush=True)
        printed = []
        for line in self.process.stdout:
            if line.startswith(ANSWER):
                break
            printed.append(line)
        else:
            raise ChildProcessError("".join(printed))
        result, error = json.loads(line.removeprefix(ANSWER))
        assert not error, error
        return result

    def close(self) -> None:
        self.process.communicate()


@functools.cache
def shared(flags: str) -> Devices:
    """Return the process of these flags, which ends with this one."""
    process = Devices(flags)
    atexit.register(process.close)
    return process


def answer(module: str, function: str, *arguments: Any) -> tuple[Any, str]:
    """Return the result of a function, and the error in place of it."""
    try:
        return json.loads(getattr(importlib.import_module(module), function)(*arguments)), ""
    except Exception:
        return None, traceback.format_exc()


def serve() -> None:
    """Answer calls until the input ends."""
    importlib.import_module("tests.conftest")
    for line in sys.stdin:
        print("\n" + ANSWER + json.dumps(answer(*json.loads(line))), flush=True)


if __name__ == "__main__":
    serve()
