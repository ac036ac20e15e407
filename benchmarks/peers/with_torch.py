"""torch: the best of its AdamW's three implementations, on the threads that the worker is given."""

import importlib
import itertools
import os
import time
from typing import Any

import numpy as np

from benchmarks._problems import BETA_1, BETA_2, CLIP, DECAY, EPSILON, Problem, rate

torch: Any = importlib.import_module("torch")  # by name: type checkers need not have it
VERSIONS = {"torch": torch.__version__}
WAYS: dict[str, dict[str, bool]] = {
    "default": {},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class One:
    """One implementation."""

    def __init__(self, problem: Problem, way: str) -> None:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        self.params = {n: self._tensor(p).requires_grad_() for n, p in problem.params().items()}
        arguments: Any = {"betas": (BETA_1, BETA_2), "eps": EPSILON, "weight_decay": DECAY}
        self.leaves = list(self.params.values())
        self.optimizer = torch.optim.AdamW(self.leaves, 0.0, **arguments, **WAYS[way])
        self.taken = 0
        self.turns: Any = None
        if problem.kind == "update":
            for param, grad in zip(self.leaves, problem.grads().values(), strict=True):
                param.grad = self._tensor(grad)
        else:
            batches = zip(*(self._tensor(x) for x in problem.batches()), strict=True)
            self.turns = itertools.cycle([(x, y.long()) for x, y in batches])

    @staticmethod
    def _tensor(array: np.ndarray) -> Any:
        return torch.from_numpy(np.array(array)).to(DEVICE)

    def _backward(self) -> None:
        self.optimizer.zero_grad()
        x, y = next(self.turns)
        for i in range(2):
            x = torch.relu(torch.addmm(self.params[f"b{i}"], x, self.params[f"w{i}"]))
        logits = torch.addmm(self.params["b2"], x, self.params["w2"])
        torch.nn.functional.cross_entropy(logits, y).backward()

    def run(self, steps: int) -> None:
        for _ in range(steps):
            if self.turns:
                self._backward()
            torch.nn.utils.clip_grad_norm_(self.leaves, CLIP)
            self.optimizer.param_groups[0]["lr"] = rate(self.taken)
            self.optimizer.step()
            self.taken += 1
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    def values(self) -> Any:
        return {n: p.detach().cpu().numpy() for n, p in self.params.items()}


def _seconds(problem: Problem, way: str) -> float:
    """Return the least time of a few steps in one way."""
    one = One(problem, way)
    one.run(2)
    took = []
    for _ in range(3):
        start = time.perf_counter()
        one.run(3)
        took.append(time.perf_counter() - start)
    return min(took)


class Peer(One):
    def __init__(self, problem: Problem) -> None:
        self.note = min(WAYS, key=lambda way: _seconds(problem, way))
        super().__init__(problem, self.note)
