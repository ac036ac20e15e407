"""Limits. Of the update: AdamW in C, one pass in place; on other devices, arrays scaled in place.

Of whole steps: the loss and its gradients, which are none of an optimizer's business.
"""

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

from benchmarks._losses import loss_of
from benchmarks._problems import BETA_1, BETA_2, CLIP, DECAY, EPSILON, PEAK, Problem, rate

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


def _addresses(arrays: dict[str, np.ndarray]) -> Any:
    return (ctypes.c_void_p * len(arrays))(*(x.ctypes.data for x in arrays.values()))


class InC:
    def __init__(self, problem: Problem) -> None:
        self.params, self.grads = problem.params(), problem.grads()
        self.m, self.v = ({n: np.zeros_like(p) for n, p in self.params.items()} for _ in "mv")
        self.taken = 0
        sizes = [p.size for p in self.params.values()]
        self.sizes = ctypes.c_long(len(sizes)), (ctypes.c_long * len(sizes))(*sizes)
        self.arrays = [_addresses(x) for x in (self.params, self.m, self.v, self.grads)]

    def run(self, steps: int) -> None:
        library: Any = LIBRARY
        for _ in range(steps):
            lr, n = rate(self.taken), self.taken + 1
            norm = library.squares(*self.sizes, self.arrays[-1])
            correction = (1 - BETA_2**n) ** 0.5
            numbers = (
                min(1.0, CLIP / norm**0.5),
                BETA_1,
                BETA_2,
                lr * correction / (1 - BETA_1**n),
                EPSILON * correction,
                lr * DECAY,
            )
            library.adamw(*self.sizes, *self.arrays, (ctypes.c_float * 6)(*numbers))
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


class Gradients:
    """The loss and its gradients, with plain gradient descent, many steps a call."""

    def __init__(self, problem: Problem) -> None:
        loss, k = loss_of(problem), problem.steps_per_call

        def advance(params: Any, batch: Any) -> Any:
            value, grads = jax.value_and_grad(loss)(params, *batch)
            return jax.tree.map(lambda p, g: p - PEAK * g, params, grads), value

        self.params = jax.tree.map(jnp.asarray, problem.params())
        self.program = jax.jit(lambda *x: jax.lax.scan(advance, *x), donate_argnums=0)
        self.batches = jax.tree.map(lambda x: jnp.asarray(x[:k]), problem.batches())
        self.steps_per_call = k

    def run(self, steps: int) -> None:
        for _ in range(steps // self.steps_per_call):
            self.params, _ = self.program(self.params, self.batches)
        jax.block_until_ready(self.params)

    def values(self) -> Any:
        return None


def Peer(problem: Problem) -> Any:
    if problem.kind != "update":
        return Gradients(problem)
    return (InC if ON_CPU else Scaled)(problem)
