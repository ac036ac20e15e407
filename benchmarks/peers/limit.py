"""The machine's limit: AdamW in C, one pass in place; on other devices, arrays scaled in place."""

import ctypes
import os
import pathlib
import shutil
import subprocess
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._problems import BETA_1, BETA_2, CLIP, DECAY, EPSILON, Problem, rate

FLAGS = ("-O3", "-march=native", "-ffast-math", "-shared", "-fPIC")
SOURCE = pathlib.Path(__file__).with_suffix(".c")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # on a busy machine, waiting costs others
ON_CPU = jax.default_backend() == "cpu"


def _library() -> Any:
    compiler = shutil.which("cc")
    if compiler is None:
        raise ImportError("no C compiler: there is no command `cc`")
    with tempfile.TemporaryDirectory() as folder:
        target = f"{folder}/limit.so"
        command = [compiler, *FLAGS, str(SOURCE), "-o", target, "-lm"]
        for openmp in (["-fopenmp"], []):
            if subprocess.run([*command, *openmp], capture_output=True).returncode == 0:
                library = ctypes.CDLL(target)
                library.squares.restype = ctypes.c_double
                return library
    raise ImportError("the C compiler `cc` fails")


LIBRARY = _library() if ON_CPU else None
VERSIONS: dict[str, str] = {}


def _at(array: np.ndarray) -> Any:
    return ctypes.c_void_p(array.ctypes.data)


class InC:
    def __init__(self, problem: Problem) -> None:
        self.params, self.grads = problem.params(), problem.grads()
        self.m, self.v = ({n: np.zeros_like(p) for n, p in self.params.items()} for _ in "mv")
        self.taken = 0

    def run(self, steps: int) -> None:
        library: Any = LIBRARY
        for _ in range(steps):
            lr, n = rate(self.taken), self.taken + 1
            norm = sum(library.squares(ctypes.c_long(g.size), _at(g)) for g in self.grads.values())
            correction = (1 - BETA_2**n) ** 0.5
            numbers = (
                min(1.0, CLIP / norm**0.5),
                BETA_1,
                BETA_2,
                lr * correction / (1 - BETA_1**n),
                EPSILON * correction,
                lr * DECAY,
            )
            for name, p in self.params.items():
                arrays = p, self.m[name], self.v[name], self.grads[name]
                library.adamw(
                    ctypes.c_long(p.size), *map(_at, arrays), *map(ctypes.c_float, numbers)
                )
            self.taken = n

    def values(self) -> Any:
        return self.params


class Scaled:
    """Four arrays read and written: 32 bytes a parameter. It computes nothing to agree on."""

    def __init__(self, problem: Problem) -> None:
        self.arrays = [jnp.ones(problem.size) for _ in range(4)]
        self.program = jax.jit(lambda arrays: [1.0001 * x for x in arrays], donate_argnums=0)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.arrays = self.program(self.arrays)
        jax.block_until_ready(self.arrays)

    def values(self) -> Any:
        return None


Peer = InC if ON_CPU else Scaled
