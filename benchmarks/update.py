"""Time the update alone: global-norm clip, Adam, decay, a warm-up schedule, in float32.

    python -m benchmarks.update [--rounds 11] [--out benchmarks/results]

All sides are compiled and donate parameters and state. Each has a process; they take turns, and
the figure is the median over rounds of the ratio within a round: above 1, ours is faster.
"""

from collections.abc import Sequence
from typing import Any

from benchmarks import _run
from benchmarks._compare import Row
from benchmarks._problems import Problem

TORCH = ("torch-1", "torch-2")


def problem(size: float, leaves: int, **options: Any) -> Problem:
    return Problem("update", int(size), leaves, **options)


ROWS = (
    Row("update, 1e5 parameters, 4 leaves", problem(1e5, 4), {"optax": None}, counted=True),
    Row("update, 1e5 parameters, 100 leaves", problem(1e5, 100), {"optax": None}, counted=True),
    Row(
        "update, 1e7 parameters, 4 leaves",
        problem(1e7, 4),
        {"optax": 1.25, "keras": 2.5, "flax": None, **dict.fromkeys(TORCH), "limit": 0.65},
        counted=True,
    ),
    Row(
        "update, 1e7 parameters, 100 leaves",
        problem(1e7, 100),
        {"optax": 1.25, "keras": 2.5, "flax": None, **dict.fromkeys(TORCH, 0.9), "limit": None},
        counted=True,
    ),
    Row(
        "update, 1e8 parameters, 4 leaves", problem(1e8, 4), {"optax": 1.6, "limit": None}, rounds=7
    ),
    Row("update, 1e8 parameters, 100 leaves", problem(1e8, 100), {"optax": 1.6}, rounds=5),
    Row(
        "update, 1e5 parameters, 100 leaves, packed gradients",
        problem(1e5, 100, packed=True),
        {"optax": 5.0, "keras": None, **dict.fromkeys(TORCH)},
    ),
    # The others have float32.
    Row(
        "update, 1e7 parameters, 4 leaves, bfloat16 pair",
        problem(1e7, 4, precision="bfloat16"),
        {"optax": 2.0, "torch-1": 1.2, "torch-2": 1.2, "limit": 0.9},
        counted=True,
    ),
    Row(
        "update, 1e7 parameters, 100 leaves, bfloat16 pair",
        problem(1e7, 100, precision="bfloat16"),
        {"optax": 2.0, "torch-1": None, "torch-2": None, "limit": None},
        counted=True,
    ),
    Row("error of 200 steps", problem(1e5, 100), {"optax": 1.0, "keras": None}, "error"),
)


def main(arguments: Sequence[str] | None = None) -> None:
    _run.main({"update": ROWS}, arguments, __doc__)


if __name__ == "__main__":
    main()
