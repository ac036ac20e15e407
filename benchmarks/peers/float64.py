"""The answer that all must agree on: gradients by JAX in float64, AdamW in numpy. Never timed."""

from typing import Any

import jax
import numpy as np

from benchmarks._losses import loss_of
from benchmarks._problems import BETA_1, BETA_2, CLIP, DECAY, EPSILON, Problem, rate

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_enable_x64", True)
VERSIONS: dict[str, str] = {}


def widened(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64) if x.dtype == np.float32 else x


class Peer:
    def __init__(self, problem: Problem) -> None:
        self.params = problem.params()
        self.taken = 0
        if problem.kind == "update":
            grads = problem.grads()
            self.norm = sum(float(np.sum(g * g, dtype=np.float64)) for g in grads.values()) ** 0.5
            few = max(1, 10_000 // len(grads))  # no sampled element depends on the others
            self.params = {n: p[:few] for n, p in self.params.items()}
            self.grads = {n: widened(g[:few]) for n, g in grads.items()}
        else:
            self.batches = tuple(widened(x) for x in problem.batches())
            self.gradient = jax.jit(jax.grad(loss_of(problem)))
        self.params = {n: widened(p) for n, p in self.params.items()}
        self.m, self.v = ({n: np.zeros_like(p) for n, p in self.params.items()} for _ in "mv")
        self.given = problem.kind == "update"

    def _grads(self) -> tuple[dict[str, Any], float]:
        if self.given:
            return self.grads, self.norm
        i = self.taken % len(self.batches[0])
        grads = self.gradient(self.params, *(x[i] for x in self.batches))
        grads = {n: np.asarray(g) for n, g in grads.items()}
        return grads, sum(float(np.sum(g * g)) for g in grads.values()) ** 0.5

    def run(self, steps: int) -> None:
        for _ in range(steps):
            grads, norm = self._grads()
            lr, n = rate(self.taken), self.taken + 1
            for name, p in self.params.items():
                g = min(1.0, CLIP / norm) * grads[name]
                self.m[name] = BETA_1 * self.m[name] + (1 - BETA_1) * g
                self.v[name] = BETA_2 * self.v[name] + (1 - BETA_2) * g * g
                m, v = self.m[name] / (1 - BETA_1**n), self.v[name] / (1 - BETA_2**n)
                self.params[name] = p - lr * (m / (np.sqrt(v) + EPSILON) + DECAY * p)
            self.taken = n

    def values(self) -> Any:
        return self.params
