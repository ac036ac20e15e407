"""Run all benchmarks: `python -m benchmarks`, or one: `python -m benchmarks.update`."""

from collections.abc import Sequence

from benchmarks import _run, compile, dispatch, memory, step, update

ALL: dict[str, Sequence[_run.Row]] = {
    "memory": memory.ROWS,
    "update": update.ROWS,
    "dispatch": dispatch.ROWS,
    "step": step.ROWS,
    "compile": compile.ROWS,
}


def main(arguments: Sequence[str] | None = None) -> None:
    _run.main(ALL, arguments, __doc__)


if __name__ == "__main__":
    main()
