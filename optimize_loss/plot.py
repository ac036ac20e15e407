"""Pictures of training: each function returns a matplotlib figure.

Nothing is shown, and no matplotlib setting changes: `figure.savefig("loss.png")` writes a file, and
a notebook shows a figure on the last line of a cell. It needs the extra `demo`.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from optimize_loss._checks import AT_LEAST_1, InvalidType, TreeMismatch, check_integer, received
from optimize_loss._engine.trees import as_array
from optimize_loss._names import leaf_names, same_leaves
from optimize_loss._report.figure import COLOURS, finish, panels, scale, styled, whole_ticks
from optimize_loss.schedules import evaluate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["learning_rate", "metrics", "schedule", "sweep", "update_ratios"]

MOST_POINTS = 400  # of a line
MOST_BARS = 40


class _Curve(Protocol):
    @property
    def rates(self) -> np.ndarray: ...
    @property
    def losses(self) -> np.ndarray: ...
    @property
    def smoothed(self) -> np.ndarray: ...
    @property
    def suggestion(self) -> float | None: ...
    @property
    def still_falling(self) -> bool: ...
    @property
    def number(self) -> str: ...


class _Runs(Protocol):
    @property
    def points(self) -> tuple[dict[str, Any], ...]: ...
    @property
    def final(self) -> np.ndarray: ...


def schedule(schedules: Any, steps: int = 1000) -> "Figure":
    """Draw one or several schedules over the step.

    Args:
      schedules: a function of the step, a list of them, or {label: function}.
      steps: how many steps, at least 1.

    Returns:
      A `matplotlib.figure.Figure`.

    Raises:
      ImportError: matplotlib is not installed.
      InvalidType: `schedules` is not one of these, or a schedule does not return a number.

    Example:
      >>> import optimize_loss as ol
      >>> figure = ol.plot.schedule({"cosine": ol.schedules.CosineDecay(0.1, 100)}, steps=100)
      >>> line = figure.axes[0].lines[0]
      >>> print(line.get_ydata()[0], line.get_ydata()[50].round(3), line.get_ydata()[-1])
      0.1 0.05 0.0
    """
    steps = check_integer("steps", steps, AT_LEAST_1)
    at = np.unique(np.linspace(0, steps, min(steps + 1, 1001)).astype(np.int32))
    figure, [axes] = panels(1, height=3.6)
    values = []
    for style, (label, function) in styled(_labelled(schedules).items()):
        rate = functools.partial(evaluate, label, function, dtype=jnp.float32)
        values.append(np.asarray(jax.vmap(rate)(jnp.asarray(at))))
        axes.plot(at, values[-1], label=label, lw=2, **style)
    finish(axes, "step", "value of the schedule", legend=True)
    return figure


def _labelled(schedules: Any) -> dict[str, Callable[[Any], Any]]:
    each = [schedules] if callable(schedules) else schedules
    if isinstance(each, Iterable) and not isinstance(each, Mapping):
        functions = list(each)
        each = dict(zip(_labels(functions), functions, strict=True))
    if not isinstance(each, Mapping) or not each or not all(map(callable, each.values())):
        raise InvalidType(
            "`schedules` must be a function of the step, a list of them, or {label: function}. "
            f"{received('schedules', each)}"
        )
    return {str(label): function for label, function in each.items()}


def _labels(functions: Sequence[Any]) -> list[str]:
    """Return a label for each function, with a number where several are called the same."""
    names = [_short(x) for x in functions]
    return [f"{n} {i}" if names.count(n) > 1 else n for i, n in enumerate(names)]


def _short(function: Any) -> str:
    shown = repr(function)
    if hasattr(function, "__dataclass_fields__") and len(shown) <= 60:
        return shown
    return getattr(function, "__name__", type(function).__name__)


def metrics(metrics: Mapping[str, Any]) -> "Figure":
    """Draw the metrics of a run over its steps: losses, rates, norms, then each of the others.

    An axis is logarithmic if all values are above 0 and the greatest is more than 10 times the
    least. Above 400 steps, lines are means over groups of steps, and a band shows the minimum and
    maximum of each group. Metrics that are not one number per step, such as histograms, are
    skipped.

    Args:
      metrics: {tag: array of shape (steps,)}, as `step.run` and `step.many` return them.

    Returns:
      A `matplotlib.figure.Figure`.

    Raises:
      ImportError: matplotlib is not installed.
      InvalidType: `metrics` is not a mapping.
      ValueError: no metric has one number per step.

    Example:
      >>> import jax.numpy as jnp, optimize_loss as ol
      >>> step = ol.optimize_loss(lambda p, x: (p["w"] * x) ** 2, learning_rate=0.1)
      >>> state, metrics = step.many(step.init({"w": 1.0}), jnp.ones(20))
      >>> figure = ol.plot.metrics(metrics)
      >>> [axes.get_ylabel() for axes in figure.axes]
      ['loss', 'learning rate', 'L2 norm']
    """
    if not isinstance(metrics, Mapping):
        raise InvalidType(f"`metrics` must map tags to arrays. {received('metrics', metrics)}")
    lines = {str(tag): np.asarray(value) for tag, value in metrics.items() if _is_line(value)}
    if not lines:
        raise ValueError(
            "`metrics` must have an array of shape (steps,), as `step.run` and `step.many` return; "
            f"those of a single step have none. Received: {list(metrics)}."
        )
    grouped = _grouped(lines)
    figure, every = panels(len(grouped), height=3.0)
    for axes, (label, members) in zip(every, grouped.items(), strict=True):
        _draw_panel(axes, members)
        finish(axes, "step", label, legend=len(members) > 1)
    return figure


def _is_line(value: Any) -> bool:
    """Return whether a metric has one number a step."""
    return isinstance(value, np.ndarray | jax.Array) and np.ndim(value) == 1 and np.size(value) > 0


_GROUPS = {
    "loss": ("loss", "loss/mean"),
    "learning rate": ("learning_rate",),
    "L2 norm": ("global_norm/",),
    "L2 norm of a gradient": ("gradient_norm/",),
}


def _grouped(lines: dict[str, np.ndarray]) -> dict[str, list[tuple[str, np.ndarray]]]:
    """Return the lines of each panel, by its label: pairs of a label of their own and values."""
    # The name of a step stands before all its tags, so it is what the shortest `loss` begins with.
    prefix = min((t[:-4] for t in lines if t == "loss" or t.endswith("/loss")), default="", key=len)
    panels: dict[str, list[tuple[str, np.ndarray]]] = {label: [] for label in _GROUPS}
    for full, values in lines.items():
        tag = full.removeprefix(prefix)
        label, short = _place(tag) if full.startswith(prefix) else (full, full)
        panels.setdefault(label, []).append((short, values))
    panels.pop("batches", None)  # a count from one batch to the next
    return {label: members for label, members in panels.items() if members}


def _place(tag: str) -> tuple[str, str]:
    """Return the label of the panel that a metric belongs to, and its own."""
    for label, starts in _GROUPS.items():
        for start in starts:
            if tag == start or tag.startswith(start.rstrip("/") + "/"):
                return label, tag.removeprefix(start) if start.endswith("/") else tag
    return tag, tag


def _draw_panel(axes: Any, members: Sequence[tuple[str, np.ndarray]]) -> None:
    for style, (tag, values) in styled(members):
        _draw_steps(axes, values.astype(np.float64), tag, style)
    scale("y", axes, [values.astype(np.float64) for _, values in members])
    if all(np.issubdtype(values.dtype, np.integer) for _, values in members):
        whole_ticks(axes)


def _draw_steps(axes: Any, values: np.ndarray, label: str, style: Mapping[str, Any]) -> None:
    """Draw a line over the steps; of many, the means of groups before their least and greatest."""
    starts = np.arange(0, len(values), -(-len(values) // MOST_POINTS))
    sizes = np.diff(starts, append=len(values))
    at = starts + (sizes + 1) / 2
    means = np.add.reduceat(values, starts) / sizes
    if len(starts) < len(values):
        low, high = np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)
        axes.fill_between(at, low, high, color=style["color"], alpha=0.2, lw=0)
    marker = "o" if len(starts) == 1 else None
    axes.plot(at, means, label=label, lw=1.6, marker=marker, **style)


def update_ratios(before: Any, after: Any, *, steps: int = 1) -> "Figure":
    """Draw how much each parameter has changed, relative to its size.

        ratio = ‖after - before‖ / (‖before‖ · steps)

    A ratio of about 0.001 per step is usual, and is marked in the picture. With much less a
    parameter hardly trains; much more is unstable. A parameter that was zero has no ratio, and is
    listed without a bar. So is one that is not finite, at the top. With more than 40 parameters,
    those that are not finite and those with the largest ratios are shown. Random keys are skipped.

    Args:
      before: a tree of parameters. A step donates its state, so copy them first:
        `jax.device_get(state.params)`.
      after: the same parameters, later.
      steps: the number of updates between the two, at least 1.

    Returns:
      A `matplotlib.figure.Figure`.

    Raises:
      ImportError: matplotlib is not installed.
      InvalidType: a leaf is not an array of numbers.
      RuntimeError: `before` was donated to a step.
      TreeMismatch: the trees have different leaves, or leaves of different shapes.
      ValueError: there is no parameter.

    Example:
      >>> import optimize_loss as ol
      >>> figure = ol.plot.update_ratios({"a": 2.0, "b": 1.0}, {"a": 2.5, "b": 1.1})
      >>> [round(float(bar.get_width()), 3) for bar in figure.axes[0].patches]
      [0.25, 0.1]
    """
    steps = check_integer("steps", steps, AT_LEAST_1)
    found = _ratios(before, after)
    shown = np.array([ratio.value for ratio in found[:MOST_BARS]]) / steps
    figure, [axes] = panels(1, height=1.2 + 0.26 * len(shown))
    axes.barh(range(len(shown)), shown, color=COLOURS[0], height=0.7)
    axes.axvline(1e-3, color=COLOURS[5], ls="--", lw=1.5, label="0.001")
    axes.set_yticks(range(len(shown)), [ratio.name for ratio in found[:MOST_BARS]])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    label = "parameter"
    if np.any(shown > 0):
        axes.set_xscale("log")
        low = min(1e-3, float(np.min(shown[shown > 0])))
        axes.set_xlim(low / 3, max(1e-3, float(np.max(shown))) * 3)
    if len(shown) < len(found):
        label = f"parameter (the {len(shown)} largest of {len(found)})"
    finish(axes, "‖change in a step‖ / ‖parameter‖, no unit", label, legend=True)
    return figure


class _Ratio(NamedTuple):
    """Of one parameter.

    Attributes:
      name: of the parameter, with a remark where there is no ratio.
      value: ‖after - before‖ / ‖before‖; 0 where there is none.
      rank: what a list of them is sorted by.
    """

    name: str
    value: float
    rank: float


def _ratios(before: Any, after: Any) -> list[_Ratio]:
    """Return the ratio of each parameter: what is not finite first, then from large to small.

    Raises:
      InvalidType: a leaf is not an array of numbers.
      RuntimeError: a step has taken the memory of a leaf.
      TreeMismatch: the trees have different leaves.
      ValueError: there are none.
    """
    later = same_leaves("after", after, "before", before)
    triples = list(zip(leaf_names(before), jax.tree.leaves(before), later, strict=True))
    ratios = [_ratio(*triple) for triple in triples if not _is_key(triple[1])]
    if not ratios:
        raise ValueError("`before` must have a parameter. Received: a tree without any.")
    return sorted(ratios, key=lambda ratio: -ratio.rank)


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _ratio(name: str, before: Any, after: Any) -> _Ratio:
    old, new = _values("before", name, before), _values("after", name, after)
    if old.shape != new.shape:
        raise TreeMismatch(
            f"`after` must have at {name!r} the shape of `before`, {old.shape}. "
            f"Received: shape {new.shape}."
        )
    if not (np.isfinite(old).all() and np.isfinite(new).all()):
        return _Ratio(f"{name} (not finite)", 0.0, np.inf)
    if not old.any():
        return _Ratio(f"{name} (was 0)", 0.0, -1.0)
    value = float(np.linalg.norm((new - old).ravel()) / np.linalg.norm(old.ravel()))
    return _Ratio(name, value, value)


def _values(which: str, name: str, leaf: Any) -> np.ndarray:
    """Return a leaf on the host, in float64 or complex128."""
    leaf = as_array(f"`{which}` at", name, leaf)
    if isinstance(leaf, jax.Array) and leaf.is_deleted():
        raise RuntimeError(
            f"`{which}` was donated: a step gives its memory to the state that it returns. Keep a "
            "copy before the step: `before = jax.device_get(state.params)`."
        )
    array = np.asarray(jax.device_get(leaf))
    return array.astype(np.complex128 if np.iscomplexobj(array) else np.float64)


def sweep(result: _Runs) -> "Figure":
    """Draw the loss of a sweep over each of its numbers.

    Each dot is a run, at its mean loss over the last tenth of the steps. The line connects the best
    runs of each value; with seeds, the best means over seeds. A ring marks the best run, and
    crosses at the top mark runs whose loss was not finite.

    Args:
      result: from `step.sweep`.

    Returns:
      A `matplotlib.figure.Figure`, with a panel for each number that has several values.

    Raises:
      ImportError: matplotlib is not installed.

    Example:
      >>> import jax.numpy as jnp, optimize_loss as ol
      >>> step = ol.optimize_loss(lambda p, x: p["w"] * x, learning_rate=1.0, optimizer="SGD")
      >>> found = step.sweep(step.init({"w": 1.0}), jnp.ones(2), learning_rate=[0.25, 0.5, 1.0])
      >>> print(ol.plot.sweep(found).axes[0].lines[0].get_ydata())
      [0.75 0.5  0.  ]
    """
    names = _varied(result.points)
    figure, every = panels(len(names), height=3.4)
    for axes, name in zip(every, names, strict=True):
        _draw_number(axes, result, name)
        finish(axes, name, "loss, mean of the last steps", legend=True)
    return figure


def _varied(points: Sequence[dict[str, Any]]) -> list[str]:
    """Return the numbers with several values; the seed, or all numbers, if there are no others."""
    varied = [name for name in points[0] if len({point[name] for point in points}) > 1]
    return [name for name in varied if name != "seed"] or varied or list(points[0])


def _draw_number(axes: Any, result: _Runs, name: str) -> None:
    losses = result.final
    values = [point[name] for point in result.points]
    x, good = _positions(values), np.isfinite(losses)
    line = _through_the_best(result.points, name, losses)
    where = np.array([x[values.index(v)] for v in line])
    order = np.argsort(where)
    heights = np.array(list(line.values()))[order]
    label = "best, mean over seeds" if "seed" in result.points[0] and name != "seed" else "best"
    axes.plot(where[order], heights, "-", color=COLOURS[0], lw=2, label=label)
    axes.plot(x[good], losses[good], "o", color=COLOURS[4], ms=5, alpha=0.8, label="run", zorder=1)
    if np.any(good):
        best = int(np.where(good, losses, np.inf).argmin())
        ring = {"mfc": "none", "mec": COLOURS[5], "mew": 2, "ms": 11}
        axes.plot([x[best]], [losses[best]], "o", label="best of all", **ring)
        scale("y", axes, [losses[good]])
    if not np.all(good):
        top = np.full((~good).sum(), 0.97)
        cross = {"color": COLOURS[6], "ms": 7, "label": "not finite"}
        axes.plot(x[~good], top, "x", transform=axes.get_xaxis_transform(), **cross)
    scale("x", axes, [x])


def _positions(values: Sequence[Any]) -> np.ndarray:
    """Return where values are on an axis; None, as built, is at the left of the numbers."""
    x = np.array([np.nan if v is None else float(v) for v in values])
    least = np.nanmin(x) if np.any(np.isfinite(x)) else 0.0
    return np.where([v is None for v in values], least / 2, x)


def _through_the_best(points: Sequence[dict[str, Any]], name: str, losses: np.ndarray) -> dict:
    """Return for each value the least loss over the other numbers, of means over the seeds."""
    groups: dict[Any, dict[Any, list[float]]] = {}
    for point, loss in zip(points, losses, strict=True):
        others = tuple(v for n, v in point.items() if n not in (name, "seed"))
        groups.setdefault(point[name], {}).setdefault(others, []).append(float(loss))
    means = {v: [np.mean(each) for each in found.values()] for v, found in groups.items()}
    return {
        v: min((m for m in each if np.isfinite(m)), default=np.nan) for v, each in means.items()
    }


def learning_rate(result: _Curve) -> "Figure":
    """Draw a learning-rate range test: the loss over the rate, with the rate that is suggested.

    Args:
      result: from `step.find_learning_rate`.

    Returns:
      A `matplotlib.figure.Figure`.

    Raises:
      ImportError: matplotlib is not installed.

    Example:
      >>> import optimize_loss as ol
      >>> step = ol.optimize_loss(lambda p, x: (p["w"] - x) ** 2, learning_rate=1.0)
      >>> found = step.find_learning_rate(step.init({"w": 0.0}), [3.0])
      >>> figure = ol.plot.learning_rate(found)
      >>> figure.axes[0].get_xlabel(), figure.axes[0].get_xscale()
      ('learning rate', 'log')
    """
    figure, [axes] = panels(1, height=3.6)
    losses, smoothed = np.asarray(result.losses), np.asarray(result.smoothed)
    axes.plot(result.rates, losses, color=COLOURS[4], lw=1.2, label="loss")
    axes.plot(result.rates, smoothed, color=COLOURS[0], lw=2.4, label="smoothed loss")
    if result.suggestion is not None:
        label = f"suggestion {result.suggestion:.2g}"
        label += ", where the loss still falls" if result.still_falling else ""
        axes.axvline(result.suggestion, color=COLOURS[5], ls="--", lw=1.8, label=label)
    axes.set_xscale("log")
    shown = smoothed[np.isfinite(smoothed)]
    low, first = min(shown.min(), losses[np.isfinite(losses)].min()), shown[0]
    room = max(first - low, 1e-3 * abs(first), 1e-12)
    axes.set_ylim(low - 0.15 * room, first + 0.6 * room)  # where it diverges, it leaves the picture
    finish(axes, result.number.replace("_", " "), "loss", legend=True)
    return figure
