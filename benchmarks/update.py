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
        {"optax": 2.0, "torch-1": None, "torch-2": None, "limit": 0.8},
        counted=True,
    ),
    Row("error of 200 steps", problem(1e5, 100), {"optax": 0.99, "keras": None}, "error"),
    Row("trace of the update, 300 leaves", problem(2400, 300), {"optax": None}, "trace", rounds=5),
)


def finish(result: dict[str, Any]) -> None:
    """Add what the README shows: the rows against optax, and the tracing."""
    against_optax = [r for r in result["rows"] if r["peer"] == "optax" and "ratio" in r]
    plain = [r for r in against_optax if r["measure"] == "run" and not r["problem"]["packed"]]
    plain = [r for r in plain if r["problem"]["precision"] is None]
    counted = {(r["problem"]["size"], r["problem"]["leaves"]): r for r in plain if "temporary" in r}
    result["update"] = [
        {
            "parameters": size,
            "leaves": leaves,
            "ratio": row["ratio"],
            "quartiles": row["quartiles"],
            "ours_ms": 1e3 * row["ours"],
            "optax_ms": 1e3 * row["theirs"],
            "ours_temporary_bytes_per_parameter": row["temporary"]["ours"],
            "optax_temporary_bytes_per_parameter": row["temporary"]["peer"],
        }
        for (size, leaves), row in counted.items()
    ]
    for row in against_optax:
        if row["measure"] == "trace":
            result["tracing"] = {
                "leaves": row["problem"]["leaves"],
                "ours_over_optax": 1 / row["ratio"],
                "ours_ms": 1e3 * row["ours"],
                "optax_ms": 1e3 * row["theirs"],
            }
    print(table(result["update"]))


def table(rows: list[dict[str, Any]]) -> str:
    head = (
        "| parameters | leaves | optax / ours | quartiles | temporaries, B/parameter: ours, optax |"
    )
    lines = [head, "|---:|---:|---:|---:|---:|"]
    for row in rows:
        low, high = row["quartiles"]
        lines.append(
            f"| {row['parameters']:.0e} | {row['leaves']} | {row['ratio']:.2f} "
            f"| {low:.2f}-{high:.2f} | {row['ours_temporary_bytes_per_parameter']:.2f}, "
            f"{row['optax_temporary_bytes_per_parameter']:.2f} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    _run.main({"update": (ROWS, finish)}, arguments, __doc__)


if __name__ == "__main__":
    main()
