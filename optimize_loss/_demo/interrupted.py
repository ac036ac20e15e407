"""One line for a Ctrl-C while `python -m optimize_loss` still imports, as for a later one.

Python imports the package before its `__main__`, where no `try` could catch that. So the package
imports this file first.
"""

import sys
from typing import Any

INTERRUPTED = "python -m optimize_loss: interrupted"


def _is_command() -> bool:
    """Return whether this process is `python -m optimize_loss`, and looks for the module yet."""
    given = sys.orig_argv
    module = given[given.index("-m") + 1 :][:1] if "-m" in given else []
    return module == ["optimize_loss"] and sys.argv[:1] == ["-m"]


def _show(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print(INTERRUPTED, file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


if _is_command():
    sys.excepthook = _show
