"""What is computed: parameters, gradients and batches as numpy arrays, the same for every peer.

The rule is AdamW behind a clip of the global norm, with a warm-up and cosine schedule, in float32.
"""

import dataclasses
import functools
import math
from typing import Any, Literal

import numpy as np

CLIP, DECAY, BETA_1, BETA_2 = 1.0, 1e-2, 0.9, 0.999
EPSILON = 1e-12  # rules add it in different places: only where it counts for nothing do they agree
PEAK, WARM_UP, STEPS = 1e-3, 100, 100_000
BATCHES, BATCH = 100, 64  # different batches, and their size for the digits
TRANSFORMER = {"width": 64, "tokens": 16, "vocabulary": 64, "heads": 4}

Arrays = dict[str, np.ndarray]


def rate(step: int) -> float:
    """Return the learning rate of the update that `step` others came before."""
    if step < WARM_UP:
        return PEAK * step / WARM_UP
    done = min(1.0, (step - WARM_UP) / (STEPS - WARM_UP))
    return PEAK * 0.5 * (1 + math.cos(math.pi * done))


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something to optimize.

    Attributes:
      kind: "update" (gradients are given), "vector" (the loss reads all leaves as one vector),
        "digits" (an MLP, 64-128-128-10) or "transformer" (written out layer by layer).
      size: how many parameters, for the first two; for digits, the width of the hidden layers.
      leaves: in how many arrays; for a transformer, how many layers.
      steps_per_call: how many steps ours takes in a call; the others have their own ways.
      packed: whether ours is given the gradients as one vector, by a loss that costs nothing.
      metrics: whether ours reports the metrics that it does by default, and not only the loss.
      precision: of ours; the others have float32 whatever it is.
    """

    kind: str
    size: int = 0
    leaves: int = 0
    steps_per_call: int = 1
    packed: bool = False
    metrics: bool = False
    precision: Literal["float32", "bfloat16", "float8"] | None = None

    def tiny(self) -> "Problem":
        """Return a problem of the same kind, for tests of the benchmarks themselves."""
        leaves = min(self.leaves, 1 if self.kind == "transformer" else 4)
        k = min(self.steps_per_call, 5)
        return dataclasses.replace(self, size=min(self.size, 400), leaves=leaves, steps_per_call=k)

    def params(self) -> Arrays:
        return _transformer(self.leaves) if self.kind == "transformer" else self._flat_params()

    def _flat_params(self) -> Arrays:
        if self.kind == "digits":
            return _digits_params(self.size or 128)
        each, repeated = self.size // self.leaves, _noise()
        names = [f"p{i:04d}" for i in range(self.leaves)]
        return {n: np.resize(repeated, each) + np.float32(i % 7) for i, n in enumerate(names)}

    def grads(self) -> Arrays:
        """Return the gradients of an "update"."""
        return {n: np.float32(0.1) * abs(p) + np.float32(0.01) for n, p in self.params().items()}

    def batches(self) -> tuple[np.ndarray, ...]:
        """Return what the loss takes after the parameters, batches stacked along the first axis."""
        generator = np.random.default_rng(1)
        if self.kind == "update":
            return (np.concatenate(list(self.grads().values()))[None],)
        if self.kind == "vector":
            return (generator.normal(size=BATCHES).astype(np.float32) * 5,)
        if self.kind == "digits":
            x = generator.uniform(size=(BATCHES, BATCH, 64)).astype(np.float32)
            y = (x @ generator.normal(size=(64, 10)).astype(np.float32)).argmax(-1)
            return x, y.astype(np.int32)
        tokens, vocabulary = TRANSFORMER["tokens"], TRANSFORMER["vocabulary"]
        return (generator.integers(vocabulary, size=(BATCHES, 1, tokens + 1)).astype(np.int32),)

    def sampled(self, params: Any) -> np.ndarray:
        """Return some elements of every parameter, by name, in float64: what peers agree on."""
        most = max(1, 10_000 // len(params))
        parts = [np.asarray(params[n]).ravel()[:most].astype(np.float64) for n in sorted(params)]
        return np.concatenate(parts)


@functools.cache
def _noise() -> np.ndarray:
    return np.random.default_rng(0).normal(size=65_521).astype(np.float32)


def _matrix(generator: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    return (generator.normal(size=(rows, columns)) / math.sqrt(rows)).astype(np.float32)


def _digits_params(width: int) -> Arrays:
    generator, sizes = np.random.default_rng(2), (64, width, width, 10)
    params = {}
    for i in range(3):
        params[f"w{i}"] = _matrix(generator, sizes[i], sizes[i + 1])
        params[f"b{i}"] = np.zeros(sizes[i + 1], np.float32)
    return params


def _transformer(layers: int) -> Arrays:
    generator, d = np.random.default_rng(3), TRANSFORMER["width"]
    one, zero = np.ones(d, np.float32), np.zeros(d, np.float32)
    params = {"embed": _matrix(generator, TRANSFORMER["vocabulary"], d)}
    params |= {"scale": one, "shift": zero}
    for i in range(layers):
        params |= {f"{i}/q": _matrix(generator, d, d), f"{i}/k": _matrix(generator, d, d)}
        params |= {f"{i}/v": _matrix(generator, d, d), f"{i}/out": _matrix(generator, d, d)}
        params |= {
            f"{i}/up": _matrix(generator, d, 4 * d),
            f"{i}/down": _matrix(generator, 4 * d, d),
        }
        params |= {f"{i}/up_bias": np.zeros(4 * d, np.float32), f"{i}/down_bias": zero}
        params |= {f"{i}/scale_1": one, f"{i}/shift_1": zero}
        params |= {f"{i}/scale_2": one, f"{i}/shift_2": zero}
    return params
