"""Count the bytes of the update: temporaries, and what is written over what was given.

    python -m benchmarks.memory

By XLA's own account of the compiled program; nothing is timed.
"""

from collections.abc import Sequence

from benchmarks import _run
from benchmarks._compare import Row
from benchmarks._problems import Problem

PROBLEMS = {leaves: Problem("update", 10_000_000, leaves) for leaves in (4, 100)}
AT_LEAST = 80.0  # times less than a model-sized array of optax's: none, but for scalars
ALL = 12.0  # bytes a parameter: p, m and v

ROWS = tuple(
    Row(f"{measure}, {leaves} leaves", problem, {"optax": wanted, "keras": None}, measure)
    for leaves, problem in PROBLEMS.items()
    for measure, wanted in (("temporary", AT_LEAST), ("donated", ALL))
)


def main(arguments: Sequence[str] | None = None) -> None:
    _run.main({"memory": ROWS}, arguments, __doc__)


if __name__ == "__main__":
    main()
