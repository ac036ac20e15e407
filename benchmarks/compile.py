"""Time how long the update of many small arrays takes to compile.

    python -m benchmarks.compile

Nothing is kept between measurements, on disk or in memory. "lower" is tracing and lowering; the
whole is of our training step, whose loss is linear and reads all parameters as one vector.
"""

from collections.abc import Sequence

from benchmarks import _run
from benchmarks._compare import Row
from benchmarks._problems import Problem


def problem(leaves: int, packed: bool = False) -> Problem:
    return Problem("update", 8 * leaves, leaves, packed=packed)


ROWS = (
    Row("trace and lower, 1000 leaves", problem(1000), {"optax": 1 / 0.3}, "lower", rounds=5),
    Row("compile, 100 small leaves", problem(100, True), {"optax": None}, "compile", rounds=5),
    Row("compile, 1000 small leaves", problem(1000, True), {"optax": 10.0}, "compile", rounds=3),
)


def main(arguments: Sequence[str] | None = None) -> None:
    _run.main({"compile": (ROWS, None)}, arguments, __doc__)


if __name__ == "__main__":
    main()
