"""Time how long the update of many small arrays takes to compile.

    python -m benchmarks.compile

Nothing is kept between measurements, on disk or in memory, so that "trace and lower" is both, and
"compile" is all three. "Packed" is our training step, given
gradients as one vector by a loss that costs nothing, against the update alone of optax, given a
tree.
A loss that reads all leaves as one vector is itself slow to compile: in the last row both have it.
"""

from collections.abc import Sequence

from benchmarks import _run
from benchmarks._compare import Row
from benchmarks._problems import Problem


def problem(leaves: int, packed: bool = False) -> Problem:
    return Problem("update", 8 * leaves, leaves, packed=packed)


STEP = Problem("vector", 800, 100)

ROWS = (
    Row("trace the update, 1000 leaves", problem(1000), {"optax": None}, "trace", rounds=5),
    Row(
        "trace and lower the update, 1000 leaves",
        problem(1000),
        {"optax": 1 / 0.3},
        "lower",
        rounds=5,
    ),
    Row("trace the update, 100 leaves", problem(100), {"optax": None}, "trace", rounds=5),
    Row("trace and lower the update, 100 leaves", problem(100), {"optax": None}, "lower", rounds=5),
    Row("compile the update, 100 leaves", problem(100), {"optax": None}, "compile", rounds=3),
    Row("compile it packed, 100 leaves", problem(100, True), {"optax": None}, "compile", rounds=3),
    Row(
        "compile it packed, 1000 leaves", problem(1000, True), {"optax": 10.0}, "compile", rounds=3
    ),
    Row("compile a step, 100 leaves", STEP, {"optax": None}, "compile", rounds=3),
)


def main(arguments: Sequence[str] | None = None) -> None:
    _run.main({"compile": ROWS}, arguments, __doc__)


if __name__ == "__main__":
    main()
