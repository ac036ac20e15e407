"""Run all benchmarks: `python -m benchmarks`, or one: `python -m benchmarks.update`."""

from collections.abc import Sequence

from benchmarks import _run, compile, dispatch, memory, step, update

ALL: dict[str, tuple[Sequence[_run.Row], _run.Finish | None]] = {
    "memory": (memory.ROWS, None),
    "update": (update.ROWS, update.finish),
    "dispatch": (dispatch.ROWS, None),
    "step": (step.ROWS, None),
    "compile": (compile.ROWS, None),
}


def main(arguments: Sequence[str] | None = None) -> None:
    _run.main(ALL, arguments, __doc__)


if __name__ == "__main__":
    main()
