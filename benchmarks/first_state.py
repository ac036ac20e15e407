"""How long the first state takes, and the first look at it: `python -m benchmarks.first_state`.

For trees of small parameters, each by itself and in one array, in turns. Caches of compiled
programs are empty each time, as in a new process. The least of the rounds counts.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

import optimize_loss as ol
from benchmarks._report import RESULTS, tag

COUNTS = {100: 3, 1000: 3, 10_000: 2}  # leaves, and rounds
SIZES = (16, 24, 32)


def loss(params):
    """A loss that reads every leaf; no step is taken."""
    return sum(jnp.sum(p * p) for p in params.values())


def seconds(params, bucket):
    """Return the time of `init`, of the first look at the parameters, and at all slots."""
    step = ol.optimize_loss(loss, learning_rate=1e-3, optimizer="AdamW", bucket=bucket)
    jax.clear_caches()
    start = time.perf_counter()
    state = jax.block_until_ready(step.init(params))
    made = time.perf_counter()
    jax.block_until_ready(state.params)
    seen = time.perf_counter()
    jax.block_until_ready(state.optimizer)
    return made - start, seen - made, time.perf_counter() - seen


def main():
    jax.config.update("jax_enable_compilation_cache", False)
    lines = [
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}: seconds of init, of the first "
        "look at the parameters, and at the slots",
        f"{'':14}{'each by itself':>25}{'in one array':>25}",
    ]
    for count, rounds in COUNTS.items():
        arrays = (np.full(SIZES[i % len(SIZES)], 0.01, np.float32) for i in range(count))
        params = jax.device_put({f"p{i:05}": x for i, x in enumerate(arrays)})
        found = {None: [], 4096: []}
        for _ in range(rounds):
            for bucket, times in found.items():
                times.append(seconds(params, bucket))
        least = [min(column) for times in found.values() for column in zip(*times, strict=True)]
        texts = "".join(f"{x:8.2f}" + " " * (i == 2) for i, x in enumerate(least))
        lines.append(f"{count:7,} leaves{texts}")
        print(lines[-1], flush=True)
    path = RESULTS / f"first-state-{tag(jax.devices()[0].device_kind)}.txt"
    path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
