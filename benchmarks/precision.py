"""Train with moments and weights in fewer bits: bytes a parameter, and what it does to the loss.

    python -m benchmarks.precision [--seeds 5] [--out benchmarks/results]

AdamW behind a clip, on an MLP on digits and a small transformer on characters of Python's own
documentation. Nothing is timed: the losses of a seed are compared with those of float32. The digits
are scikit-learn's, of which only the file is needed: `pip install --no-deps scikit-learn`.
"""

import argparse
import dataclasses
import gzip
import importlib.util
import itertools
import json
import math
import pathlib
import platform
import pydoc_data.topics
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optimize_loss as ol
from benchmarks import _report
from benchmarks._losses import cross_entropy, transformer
from benchmarks._problems import Problem

CALL = 50  # steps in a call


@dataclasses.dataclass(frozen=True)
class Way:
    """How weights and moments are kept."""

    name: str
    precision: Any = None
    weights: Any = jnp.float32
    pure: bool = False  # optax's moments, of the dtype of the weights


WAYS = (
    Way("float32"),
    Way("bfloat16 pair", "bfloat16"),
    Way("8-bit", "float8"),
    Way("bfloat16 pair, bfloat16 weights", "bfloat16", jnp.bfloat16),
    Way("8-bit, bfloat16 weights", "float8", jnp.bfloat16),
    Way("bfloat16 throughout, to nearest", None, jnp.bfloat16, pure=True),
)
SMALLEST = WAYS[4]


@dataclasses.dataclass(frozen=True)
class Task:
    """Something to learn.

    Attributes:
      name: of it.
      loss: of float32 parameters and a batch.
      params: from a seed.
      batches: an endless iterator over training batches, from a seed.
      test: the batch to judge by.
      steps: how many to take, a multiple of `CALL`.
      rate: the learning rate at its peak.
      within: the gap that `SMALLEST` may have.
      seeds: the most seeds to take.
    """

    name: str
    loss: Callable[..., jax.Array]
    params: Callable[[int], dict[str, np.ndarray]]
    batches: Callable[[int], Iterator[tuple[np.ndarray, ...]]]
    test: tuple[np.ndarray, ...]
    steps: int
    rate: float
    within: float
    seeds: int

    def widened(self, params: Any, *batch: Any) -> jax.Array:
        """Return the loss, computed in float32 whatever the weights are."""
        return self.loss(jax.tree.map(lambda x: x.astype(jnp.float32), params), *batch)

    def step(self, way: Way, steps: int) -> ol.TrainStep:
        """Return a training step."""
        rate = ol.schedules.CosineDecay(self.rate, steps, warmup_steps=0)
        rule: Any = ol.optimizers.AdamW(rate, weight_decay=0.01)
        if way.pure:
            rule = optax.adamw(rate, weight_decay=0.01)
        return ol.optimize_loss(
            self.widened,
            optimizer=rule,
            clip_gradients=1.0,
            precision=way.precision,
            summaries=["loss"],
        )

    def trained(self, step: ol.TrainStep, way: Way, seed: int, steps: int) -> tuple[float, float]:
        """Return the loss after training, and the bytes that a parameter takes."""
        params = jax.tree.map(lambda x: jnp.asarray(x).astype(way.weights), self.params(seed))
        state = step.init(params)
        held = sum(x.nbytes for x in jax.tree.leaves((state.packed_params, state.packed_optimizer)))
        size = sum(x.size for x in jax.tree.leaves(params))
        batches = self.batches(seed)
        for _ in range(0, steps, CALL):
            stacked = [np.stack(x) for x in zip(*(next(batches) for _ in range(CALL)), strict=True)]
            state, _ = step.many(state, *stacked)
        return float(jax.jit(self.widened)(state.params, *self.test)), held / size


def digits_loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    for i in range(2):
        x = jax.nn.relu(x @ params[f"w{i}"] + params[f"b{i}"])
    return cross_entropy(x @ params["w2"] + params["b2"], y)


def mlp(seed: int) -> dict[str, np.ndarray]:
    generator, sizes = np.random.default_rng(seed), (64, 256, 256, 10)
    params = {}
    for i, (rows, columns) in enumerate(itertools.pairwise(sizes)):
        w = generator.normal(size=(rows, columns)) * math.sqrt(2 / rows)
        params |= {f"w{i}": w.astype(np.float32), f"b{i}": np.zeros(columns, np.float32)}
    return params


def digits() -> Task | None:
    """Return 1797 images of 8 by 8, every fifth for the test; None where the file is missing."""
    package = importlib.util.find_spec("sklearn")
    if package is None or not package.submodule_search_locations:
        return None
    folder = pathlib.Path(package.submodule_search_locations[0])
    with gzip.open(folder / "datasets" / "data" / "digits.csv.gz", "rt") as file:
        table = np.loadtxt(file, delimiter=",")
    x, y = (table[:, :-1] / 16).astype(np.float32), table[:, -1].astype(np.int32)
    tests = np.arange(len(x)) % 5 == 0

    def batches(seed: int) -> Iterator[tuple[np.ndarray, ...]]:
        generator = np.random.default_rng(100 + seed)
        while True:
            some = generator.choice(np.flatnonzero(~tests), 64, replace=False)
            yield x[some], y[some]

    return Task(
        name="digits, MLP 64-256-256-10",
        loss=digits_loss,
        params=mlp,
        batches=batches,
        test=(x[tests], y[tests]),
        steps=1000,
        rate=1e-3,
        within=0.05,
        seeds=5,
    )


def characters() -> Task:
    """Return the text of Python's topics of help, the last tenth for the test."""
    text = "".join(pydoc_data.topics.topics.values())
    _, tokens = np.unique(np.array([*text]), return_inverse=True)
    tokens, length = tokens.astype(np.int32), 65
    end = len(tokens) * 9 // 10
    test = np.lib.stride_tricks.sliding_window_view(tokens[end:], length)[:: length * 2][:256]

    def params(seed: int) -> dict[str, np.ndarray]:
        known = Problem("transformer", leaves=2).params()
        generator = np.random.default_rng(seed)
        matrices = {n: p.shape for n, p in known.items() if p.ndim == 2}
        matrices["embed"] = (int(tokens.max()) + 1, 64)
        drawn = {n: generator.normal(size=s) / math.sqrt(s[0]) for n, s in matrices.items()}
        return {**known, **{n: x.astype(np.float32) for n, x in drawn.items()}}

    def batches(seed: int) -> Iterator[tuple[np.ndarray, ...]]:
        generator = np.random.default_rng(100 + seed)
        while True:
            starts = generator.integers(end - length, size=16)
            yield (tokens[starts[:, None] + np.arange(length)],)

    return Task(
        name="characters, transformer of 2 layers",
        loss=transformer,
        params=params,
        batches=batches,
        test=(test,),
        steps=400,
        rate=3e-3,
        within=0.01,
        seeds=3,
    )


def compared(task: Task, way: Way, seeds: int, steps: int, base: list[float]) -> dict[str, Any]:
    """Train on every seed, and return what is told of it; `base` gets the losses of float32."""
    step = task.step(way, steps)
    results = [task.trained(step, way, seed, steps) for seed in range(seeds)]
    losses = [loss for loss, _ in results]
    base[:] = base or losses
    gaps = [loss / was - 1 for loss, was in zip(losses, base, strict=True)]
    mean = statistics.mean(losses)
    gap = mean / statistics.mean(base) - 1
    record = {
        "what": task.name,
        "way": way.name,
        "bytes": results[0][1],
        "losses": losses,
        "loss": mean,
        "gap": gap,
        "spread": statistics.stdev(gaps) if seeds > 1 else 0.0,
    }
    if way is SMALLEST:
        record |= {"within": task.within, "met": gap <= task.within and results[0][1] <= 5.1}
    return record


def table(rows: Sequence[dict[str, Any]]) -> str:
    head = (
        "| | moments and weights | B/parameter | loss | gap to float32 | of single seeds | wanted |"
    )
    lines = [head, "|---|---|---:|---:|---:|---:|---|"]
    for row in rows:
        wanted = ""
        if "within" in row:
            met = "met" if row["met"] else "**not met**"
            wanted = f"5.1 B, {row['within']:+.0%}: {met}"
        lines.append(
            f"| {row['what']} | {row['way']} | {row['bytes']:.2f} | {row['loss']:.4f} "
            f"| {row['gap']:+.2%} | ±{row['spread']:.2%} | {wanted} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, default=_report.RESULTS, help="a folder")
    parser.add_argument("--tiny", action="store_true", help="few steps, for tests")
    parser.add_argument("--only", default="", help="tasks whose name contains this")
    chosen = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    tasks = [digits(), characters()]
    if None in tasks:
        print("MISSING: the digits of scikit-learn")
    for task in filter(None, tasks):
        if chosen.only not in task.name:
            continue
        base: list[float] = []
        for way in WAYS:
            steps = CALL if chosen.tiny else task.steps
            rows.append(compared(task, way, min(chosen.seeds, task.seeds), steps, base))
            print(table(rows).splitlines()[-1], flush=True)
    device = _report.tag(jax.devices()[0].device_kind)
    chosen.out.mkdir(parents=True, exist_ok=True)
    result = {"python": platform.python_version(), "jax": jax.__version__, "rows": rows}
    (chosen.out / f"precision-{device}.json").write_text(json.dumps(result, indent=1) + "\n")
    (chosen.out / f"precision-{device}.md").write_text(table(rows) + "\n")


if __name__ == "__main__":
    main()
