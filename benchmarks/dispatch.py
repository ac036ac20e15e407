"""Time a step of small arrays, where calling it costs more than computing it.

    python -m benchmarks.dispatch

The loss reads all parameters as one vector, so next to nothing is left but the dispatch. optax,
flax and Keras go step by step; `many` of ours takes 100 steps in a call.
"""

from collections.abc import Sequence

from benchmarks import _run
from benchmarks._compare import Row
from benchmarks._problems import Problem

EACH = 8  # parameters in a leaf


def row(leaves: int, steps_per_call: int, peers: dict[str, float | None]) -> Row:
    how = "single steps" if steps_per_call == 1 else f"`many`, {steps_per_call} steps a call"
    problem = Problem("vector", EACH * leaves, leaves, steps_per_call)
    return Row(f"{how}, {leaves} small leaves", problem, peers)


ROWS = (
    row(10, 1, {"optax": 2.0, "keras": None, "flax": None}),
    row(100, 1, {"optax": 20.0, "keras": None, "flax": None}),
    row(1000, 1, {"optax": 200.0}),
    row(10, 100, {"optax": 40.0, "keras": None, "flax": None}),
    row(100, 100, {"optax": 250.0, "keras": None, "flax": None}),
)


def main(arguments: Sequence[str] | None = None) -> None:
    _run.main({"dispatch": ROWS}, arguments, __doc__)


if __name__ == "__main__":
    main()
