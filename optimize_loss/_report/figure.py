"""Figures and axes, in the one look that all pictures have."""

import functools
import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

# colours that the colour-blind can tell apart, of M. Okabe and K. Ito; then with other lines
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
LINES = ("-", "--", ":", "-.")
WIDTH = 9.0  # inches; at 100 dpi as wide as a README
MOST_LINES = 8  # with a label each


def panels(count: int, height: float) -> tuple[Any, list[Any]]:
    """Return a figure with so many axes, at most two in a row; `height` is of a row, in inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "`optimize_loss.plot` needs matplotlib. Install it with: "
            f"pip install matplotlib. ({error})"
        ) from error
    columns = min(2, count)
    rows = -(-count // columns)
    figure: Any = Figure(figsize=(WIDTH, height * rows), dpi=100, layout="constrained")
    # Notebooks look for this method, as no backend knows of a figure made without pyplot.
    figure._repr_png_ = functools.partial(_png, figure)
    every = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for axes in every[count:]:
        axes.remove()
    return figure, every[:count]


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def styled(items: Iterable[Any]) -> list[tuple[dict[str, Any], Any]]:
    """Return each item with a colour, or with a colour and a dash where there are many."""
    return [
        ({"color": COLOURS[i % 7], "ls": LINES[i // 7 % 4]}, item) for i, item in enumerate(items)
    ]


def scale(which: str, axes: Any, values: Sequence[np.ndarray]) -> None:
    """Make an axis logarithmic where that shows more."""
    every = np.concatenate([v[np.isfinite(v)] for v in values])
    above = every[every > 0]
    if not above.size or every.min() < 0 or above.max() <= 10 * above.min():
        return
    if above.size == every.size:
        (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    elif which == "x":
        _symlog(axes, above.min(), above.max())


def _symlog(axes: Any, least: float, most: float) -> None:
    """Let an axis of x show a zero beside values of several magnitudes, and nothing below it."""
    axes.set_xscale("symlog", linthresh=least, linscale=0.5)
    axes.set_xlim(-0.3 * least, most * 1.2 * (most / least) ** 0.05)


def whole_ticks(axes: Any) -> None:
    """Let an axis of y have ticks at integers only, unless it is logarithmic."""
    if axes.get_yscale() == "linear":
        axes.yaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)


def finish(axes: Any, x: str, y: str, legend: bool) -> None:
    """Give axes their labels and a grid; where wanted, with a legend above."""
    axes.set_xlabel(x, fontsize=12)
    axes.set_ylabel(y, fontsize=12)
    axes.tick_params(labelsize=11)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    handles, labels = axes.get_legend_handles_labels()
    if legend and handles:
        handles, labels = handles[:MOST_LINES], labels[:MOST_LINES]
        room = 112 if axes.get_subplotspec().get_gridspec().ncols == 1 else 54  # characters
        columns = max(1, min(len(labels), room // (11 + max(map(len, labels)))))
        above = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2}
        axes.legend(handles, labels, fontsize=10, ncols=columns, frameon=False, **above)
