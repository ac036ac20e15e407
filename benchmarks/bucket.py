"""What the bucket for small parameters saves: `python -m benchmarks.bucket`.

A step whose loss is cheap, with small parameters in one array and each by itself, in turns. The
medians of the ratios tell where the default bound of `optimize_loss(bucket=...)` should lie.
"""

import statistics
import time

import jax
import jax.numpy as jnp

import optimize_loss as ol
from benchmarks._report import RESULTS, tag

ROUNDS = 11
VECTORS = [(10, 16), (100, 16), (300, 16), (30, 1024), (30, 4096), (30, 16384), (30, 65536)]
MATRICES = [(20, 16), (20, 32), (20, 64), (20, 96), (20, 128), (20, 256)]


def of_vectors(params, x):
    """A loss that reads every leaf once."""
    return sum(jnp.sum(jnp.sin(v * x)) for v in params.values())


def of_matrices(params, x):
    """A loss with a product for each leaf, which must be an array of its own for that."""
    for matrix in params.values():
        x = jnp.tanh(x @ matrix)
    return jnp.sum(x * x)


def compare(loss, params, x):
    """Return seconds a step without the bucket and with it, and the median of their ratios."""
    runs = []
    for bucket in (None, 1 << 30):
        step = ol.optimize_loss(loss, learning_rate=1e-3, optimizer="AdamW", bucket=bucket)
        state, _ = step(step.init(params), x)
        runs.append([step, state])
    entries = sum(leaf.size for leaf in params.values())
    repeats = max(3, 2_000_000 // (entries + 2000 * len(params)))
    rounds = []
    for i in range(ROUNDS):
        seconds = [0.0, 0.0]
        for j in (0, 1) if i % 2 else (1, 0):
            step, state = runs[j]
            start = time.perf_counter()
            for _ in range(repeats):
                state, _ = step(state, x)
            jax.block_until_ready(state)
            seconds[j] = (time.perf_counter() - start) / repeats
            runs[j][1] = state
        rounds.append(seconds)
    plain, packed = (statistics.median(column) for column in zip(*rounds, strict=True))
    return plain, packed, statistics.median(a / b for a, b in rounds)


def main():
    lines = [f"{jax.devices()[0].device_kind}, jax {jax.__version__}: without / with, in ratio"]
    for count, size in VECTORS:
        params = {f"p{i:04}": jnp.full((size,), 0.01) for i in range(count)}
        lines.append(report(f"{count} vectors of {size}", *compare(of_vectors, params, 0.5)))
    for count, size in MATRICES:
        params = {f"p{i:04}": jnp.eye(size) * 0.9 for i in range(count)}
        x = jnp.ones((8, size))
        lines.append(report(f"{count} matrices of {size}x{size}", *compare(of_matrices, params, x)))
    path = RESULTS / f"bucket-{tag(jax.devices()[0].device_kind)}.txt"
    path.write_text("\n".join(lines) + "\n")


def report(what, plain, packed, ratio):
    print(f"{what:28} {plain * 1e6:9.0f} us {packed * 1e6:9.0f} us   x {ratio:.2f}", flush=True)
    return f"{what:28} {ratio:.2f}"


if __name__ == "__main__":
    main()
