"""What a sweep of 16 points saves over 16 separate runs: `python -m benchmarks.sweep`.

A network of 10296 parameters under AdamW and a clip of the norm, 100 steps. In turns, with all
programs compiled before: 16 runs in a loop over batches, 16 runs of one call of `many`, and one
`sweep`, each from the same parameters. The medians of the ratios, of time and of processor time.
"""

import itertools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import optimize_loss as ol
from benchmarks._report import RESULTS, tag

ROUNDS, STEPS = 11, 100
RATES, DECAYS = np.geomspace(1e-4, 1e-2, 8), (0.0, 0.01)
BATCHES = (1, 8, 32)
SIZES = (64, 80, 56, 10)


def loss(params, x, y):
    for layer in (0, 1):
        x = jnp.tanh(x @ params[f"kernel_{layer}"] + params[f"bias_{layer}"])
    scores = jax.nn.log_softmax(x @ params["kernel_2"])
    return -jnp.mean(jnp.take_along_axis(scores, y[:, None], 1))


def problem(batch):
    """Return parameters, and batches stacked along the first axis."""
    random = np.random.default_rng(0)
    params = {}
    for i, (rows, columns) in enumerate(itertools.pairwise(SIZES)):
        params[f"kernel_{i}"] = random.normal(size=(rows, columns)) / rows**0.5
        params[f"bias_{i}"] = np.zeros(columns)
    del params["bias_2"]
    x = random.normal(size=(STEPS, batch, SIZES[0]))
    y = (x @ random.normal(size=(SIZES[0], SIZES[-1]))).argmax(-1).astype(np.int32)
    return jax.tree.map(np.float32, params), (jnp.asarray(x, jnp.float32), jnp.asarray(y))


class Runs:
    """Three ways to take the steps of all points; each returns the losses, (points, steps)."""

    def __init__(self, batch):
        self.params, self.batches = problem(batch)
        self.single = list(zip(*self.batches, strict=True))
        self.step = ol.optimize_loss(
            loss, learning_rate=1e-3, optimizer="AdamW", clip_gradients=1.0
        )

    def starts(self):
        for rate in RATES:
            for decay in DECAYS:
                yield self.step.init(self.params).set(learning_rate=rate, weight_decay=decay)

    def in_a_loop(self):
        seen = []
        for state in self.starts():
            losses = []
            for batch in self.single:
                state, metrics = self.step(state, *batch)
                losses.append(metrics["loss"])
            seen.append(jax.device_get(losses))
        return np.asarray(seen)

    def of_one_call(self):
        every = [self.step.many(state, *self.batches)[1]["loss"] for state in self.starts()]
        return np.asarray(jax.device_get(every))

    def side_by_side(self):
        state = self.step.init(self.params)
        found = self.step.sweep(state, *self.batches, learning_rate=RATES, weight_decay=DECAYS)
        return found.losses


def compare(batch):
    """Return ratios of time and of processor time, (rounds, 2, 2), to loops and to calls."""
    runs = Runs(batch)
    ways = (runs.in_a_loop, runs.of_one_call, runs.side_by_side)
    losses = [way() for way in ways]
    for other in losses[:2]:  # Adam makes more of last bits with every step
        np.testing.assert_allclose(losses[2][:, :20], other[:, :20], 1e-4)
    ratios = []
    for i in range(ROUNDS):
        seconds = np.zeros((3, 2))
        for j in (0, 1, 2) if i % 2 else (2, 1, 0):
            start = time.perf_counter(), time.process_time()
            ways[j]()
            seconds[j] = time.perf_counter() - start[0], time.process_time() - start[1]
        ratios.append(seconds[2] / seconds[:2])
    return np.asarray(ratios)


def main():
    lines = [
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}: time of a sweep of 16 points over "
        f"that of 16 runs, medians of {ROUNDS} rounds, in brackets of processor time",
        f"{'batch':>5} {'runs in a loop':>18} {'runs of `many`':>18}",
    ]
    for batch in BATCHES:
        ratios = compare(batch)
        cells = [
            f"{statistics.median(ratios[:, k, 0]):.2f} ({statistics.median(ratios[:, k, 1]):.2f})"
            for k in (0, 1)
        ]
        lines.append(f"{batch:5} {cells[0]:>18} {cells[1]:>18}")
        print(lines[-1], flush=True)
    path = RESULTS / f"sweep-{tag(jax.devices()[0].device_kind)}.txt"
    path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
