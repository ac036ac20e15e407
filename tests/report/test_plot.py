"""Pictures: what their axes say, and that their lines are the data; nothing else is touched."""

import dataclasses
import pickle
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

import optimize_loss
from optimize_loss._search.results import LearningRateTest, Sweep

ol: Any = optimize_loss  # untyped, since some of what these tests pass is wrong on purpose
plot = ol.plot


def labels(axes):
    return axes.get_xlabel(), axes.get_ylabel()


def scales(axes):
    return axes.get_xscale(), axes.get_yscale()


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def runs(points, losses):
    """Return a sweep with these losses, each at all of ten steps."""
    losses = np.repeat(np.asarray(losses, np.float32)[:, None], 10, 1)
    states: Any = None
    return Sweep(tuple(points), losses, {"loss": losses}, states)


def curve(suggestion: float | None = 0.1):
    rates = np.geomspace(1e-3, 10, 5)
    losses = np.array([3.0, 2.9, 1.0, 2.0, np.nan], np.float32)
    smoothed = np.array([3.0, 2.95, 2.0, 50.0, np.nan], np.float32)
    return LearningRateTest(rates, losses, smoothed, suggestion, True)


SEEN = {
    **dict.fromkeys(("loss", "loss/mean", "learning_rate"), np.arange(1, 100)),
    **{f"global_norm/{name}gradient_norm": np.ones(99) for name in ("", "clipped_")},
    **{f"gradient_norm/{name}": np.ones(99) for name in "abcdefghijk"},
}
GRID = runs(
    [{"learning_rate": rate, "weight_decay": decay} for rate in (0.001, 0.1) for decay in (0, 1)],
    [3.0, 2.0, 0.5, np.nan],
)
ALL = {
    "schedule": lambda: plot.schedule(ol.schedules.CosineDecay(0.1, 10), 10),
    "metrics": lambda: plot.metrics(SEEN),
    "update_ratios": lambda: plot.update_ratios({"a": 1.0}, {"a": 1.1}),
    "sweep": lambda: plot.sweep(GRID),
    "learning_rate": lambda: plot.learning_rate(curve()),
}


def test_every_public_function_is_here():
    assert set(ALL) == set(plot.__all__)
    assert all(getattr(plot, name).__doc__ for name in ALL)


@pytest.mark.parametrize("name", ALL)
def test_a_figure_with_labels_at_the_width_of_a_readme(name, tmp_path):
    settings = dict(matplotlib.rcParams)
    figure = ALL[name]()
    assert figure._repr_png_().startswith(b"\x89PNG")  # for notebooks
    assert isinstance(figure, Figure)
    assert figure.get_size_inches()[0] * figure.dpi == 900
    assert all(all(labels(axes)) for axes in figure.axes)
    figure.savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000
    assert dict(matplotlib.rcParams) == settings
    copy = pickle.loads(pickle.dumps(figure))
    assert len(copy.axes) == len(figure.axes)


@pytest.mark.parametrize("name", ALL)
def test_text_is_large_and_inside_the_picture(name):
    figure = ALL[name]()
    figure.draw_without_rendering()
    width, height = figure.bbox.size
    for axes in figure.axes:
        texts = (
            [axes.xaxis.label, axes.yaxis.label, axes.title, *axes.get_legend().get_texts()]
            if (axes.get_legend())
            else [axes.xaxis.label, axes.yaxis.label]
        )
        for text in filter(lambda t: t.get_text(), texts):
            box = text.get_window_extent()
            assert text.get_fontsize() >= 10
            assert box.x0 >= 0
            assert box.y0 >= 0
            assert box.x1 <= width + 1
            assert box.y1 <= height + 1


def test_no_figure_stays_behind_and_pyplot_is_not_needed():
    code = (
        "import optimize_loss as ol, sys; figure = ol.plot.schedule(lambda step: 0.5, 10); "
        "print(type(figure).__name__, 'matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["Figure", "False"]


@pytest.mark.parametrize("name", ALL)
def test_without_matplotlib_the_command_is_named(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        ALL[name]()


# --- schedule ---


def test_a_line_for_each_schedule():
    steep = ol.schedules.ExponentialDecay(1.0, 10, 0.5)
    figure = plot.schedule({"steep": steep, "flat": lambda step: 0.25}, steps=20)
    [axes] = figure.axes
    assert labels(axes) == ("step", "value of the schedule")
    assert legend(axes) == ["steep", "flat"]
    steps = np.arange(21)
    np.testing.assert_array_equal(axes.lines[0].get_xdata(), steps)
    np.testing.assert_allclose(axes.lines[0].get_ydata(), 0.5 ** (steps / 10), 1e-6)
    np.testing.assert_array_equal(axes.lines[1].get_ydata(), np.full(21, 0.25, np.float32))


def test_labels_of_a_list_differ():
    def halved(step):
        return 0.5

    figure = plot.schedule([ol.schedules.ExponentialDecay(1.0, 10, 0.5), halved, halved], steps=5)
    assert legend(figure.axes[0])[1:] == ["halved 1", "halved 2"]
    assert legend(figure.axes[0])[0].startswith("ExponentialDecay")


def test_a_long_run_has_at_most_a_thousand_points():
    axes = plot.schedule(lambda step: 0.1, 10**6).axes[0]
    assert len(axes.lines[0].get_xdata()) == 1001
    assert axes.lines[0].get_xdata()[-1] == 10**6


@pytest.mark.parametrize("schedules", [0.1, [], {}, [0.1], {"a": 1}, None])
def test_what_is_no_schedule(schedules):
    with pytest.raises(ol.InvalidType, match="`schedules` must be a function of the step"):
        plot.schedule(schedules)


@pytest.mark.parametrize("steps", [0, 1.5])
def test_a_wrong_number_of_steps(steps):
    with pytest.raises(ValueError, match="`steps` must be"):
        plot.schedule(lambda step: 0.1, steps)


# --- metrics ---


@pytest.mark.parametrize("prefix", ["", "train/"])
def test_a_panel_for_each_kind_of_metric(prefix):
    steps = np.arange(1.0, 51.0)
    seen = {
        "loss": 100 / steps,
        "loss/mean": 90 / steps,
        "learning_rate": np.full(50, 0.1),
        "global_norm/gradient_norm": 1 / steps,
        "global_norm/clipped_gradient_norm": np.full(50, 0.5),
        "gradient_norm/dense/kernel": steps,
        "accuracy": steps / 100 - 0.2,
        "gradients/dense/kernel": (np.zeros((50, 3)), np.zeros((50, 4))),
        "of-one-step": np.float32(1.0),
    }
    figure = plot.metrics({prefix + tag: value for tag, value in seen.items()})
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "loss",
        "learning rate",
        "L2 norm",
        "L2 norm of a gradient",
        "accuracy",
    ]
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "linear", "log", "log", "linear"]
    assert [len(axes.lines) for axes in figure.axes] == [2, 1, 2, 1, 1]
    assert {axes.get_xlabel() for axes in figure.axes} == {"step"}
    assert legend(figure.axes[2]) == ["gradient_norm", "clipped_gradient_norm"]
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_xdata(), np.arange(1, 51))
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), seen["loss"])


def test_rates_of_several_links_share_a_panel():
    figure = plot.metrics({f"learning_rate/{n}": np.ones(3) for n in ("a", "b")})
    assert len(figure.axes) == 1
    assert len(figure.axes[0].lines) == 2


def test_a_long_run_is_drawn_in_groups():
    values = np.tile([1.0, 3.0], 2000)
    [axes] = plot.metrics({"loss": jnp.asarray(values)}).axes
    assert len(axes.lines[0].get_xdata()) == 400
    np.testing.assert_allclose(axes.lines[0].get_ydata(), 2.0)
    np.testing.assert_allclose(axes.lines[0].get_xdata()[0], 5.5)  # of steps 1 to 10
    low, high = np.sort(np.unique(axes.collections[0].get_paths()[0].vertices[:, 1]))[[0, -1]]
    assert (low, high) == (1.0, 3.0)


def test_values_that_are_not_finite_leave_gaps():
    [axes] = plot.metrics({"loss": np.array([100.0, np.nan, 1.0])}).axes
    assert axes.get_yscale() == "log"
    assert np.isnan(axes.lines[0].get_ydata()[1])


@pytest.mark.parametrize("name", [None, "net"])
def test_a_metric_of_the_loss_that_ends_in_loss(name):
    """A program gives tags in their order, so that "aux/loss" comes before "loss"."""

    def loss(params, x):
        value = (params["w"] - x) ** 2
        return value, ol.Aux(metrics={"aux/loss": 3 + value, "learning rate": value})

    step = ol.optimize_loss(loss, learning_rate=0.1, name=name)
    _, seen = step.many(step.init({"w": 0.0}), jnp.ones(5))
    every = {axes.get_ylabel(): axes for axes in plot.metrics(seen).axes}
    assert list(every) == ["loss", "learning rate", "L2 norm", "aux/loss"]
    prefix = f"{name}/" if name else ""
    for label in ("loss", "aux/loss"):
        np.testing.assert_allclose(every[label].lines[0].get_ydata(), seen[prefix + label])
    assert legend(every["learning rate"]) == ["learning rate", "learning_rate"]


def test_what_a_caller_has_added_is_drawn_too():
    seen = {f"net/{tag}": np.ones(3) for tag in ("loss", "learning_rate", "accuracy")}
    figure = plot.metrics(seen | {"learning_rate": np.zeros(3), "accuracy": np.zeros(3)})
    drawn = {axes.get_ylabel(): [x.get_ydata()[0] for x in axes.lines] for axes in figure.axes}
    assert drawn == {
        "loss": [1],
        "learning rate": [1],
        "accuracy": [1, 0],
        "learning_rate": [0],
    }


def test_counters_have_whole_ticks():
    counts = {"skipped": np.zeros(9, np.int32), "seen": np.arange(3), "large": 10 ** np.arange(9)}
    figure = plot.metrics(counts)
    figure.draw_without_rendering()
    for axes in figure.axes[:2]:
        low, high = axes.get_ylim()
        ticks = [tick for tick in axes.get_yticks() if low <= tick <= high]
        assert ticks == sorted(set(map(float, axes.lines[0].get_ydata())))
    assert figure.axes[2].get_yscale() == "log"


def test_metrics_that_cannot_be_drawn():
    with pytest.raises(ol.InvalidType, match="`metrics` must map tags"):
        plot.metrics([1.0])
    with pytest.raises(ValueError, match="those of a single step have none"):
        plot.metrics({"loss": jnp.float32(1.0)})


# --- update_ratios ---


def test_bars_are_ratios_of_norms():
    before = {"a": np.array([3.0, 4.0]), "b": np.float32(1.0), "zero": np.zeros(2), "c": 2 + 0j}
    after = {"a": np.array([3.0, 4.5]), "b": np.float32(1.5), "zero": np.ones(2), "c": 2 + 1j}
    [axes] = plot.update_ratios(before, after, steps=10).axes
    names = [text.get_text() for text in axes.get_yticklabels()]
    # two of the same length stay in the order of the tree
    assert names == ["b", "c", "a", "zero (was 0)"]
    widths = [bar.get_width() for bar in axes.patches]
    np.testing.assert_allclose(widths, [0.05, 0.05, 0.01, 0.0])
    assert scales(axes) == ("log", "linear")
    assert axes.lines[0].get_xdata()[0] == 1e-3
    assert axes.get_xlim()[0] < 1e-3 < axes.get_xlim()[1]


def test_the_forty_largest_of_many():
    before = {f"p{i:03}": jnp.float32(1.0) for i in range(100)}
    after = {f"p{i:03}": jnp.float32(1.0 + i / 100) for i in range(100)}
    [axes] = plot.update_ratios(before, after).axes
    assert len(axes.patches) == 40
    assert axes.get_yticklabels()[0].get_text() == "p099"
    assert axes.get_ylabel() == "parameter (the 40 largest of 100)"


def test_bfloat16_and_nothing_changed():
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    [axes] = plot.update_ratios(params, params).axes
    assert [bar.get_width() for bar in axes.patches] == [0.0]
    assert axes.get_xscale() == "linear"


def test_other_parameters():
    with pytest.raises(ol.TreeMismatch):
        plot.update_ratios({"a": 1.0}, {"b": 1.0})


def test_what_is_not_finite_comes_first_and_says_so():
    before = {"zero": np.zeros(2), "a": np.ones(2), "nan": np.ones(2), "was": np.array([np.inf])}
    after = {
        "zero": np.ones(2),
        "a": np.full(2, 2),
        "nan": np.array([1, np.nan]),
        "was": np.ones(1),
    }
    [axes] = plot.update_ratios(before, after).axes
    names = [text.get_text() for text in axes.get_yticklabels()]
    assert names == ["nan (not finite)", "was (not finite)", "a", "zero (was 0)"]
    assert [bar.get_width() for bar in axes.patches] == [0.0, 0.0, 1.0, 0.0]


def test_large_complex_numbers_and_several_axes():
    before = {"w": np.full((2, 2, 2), 1e30, np.complex64)}
    [axes] = plot.update_ratios(before, {"w": 1.5 * before["w"]}).axes
    np.testing.assert_allclose(axes.patches[0].get_width(), 0.5, 1e-6)


@pytest.mark.parametrize("shape", [(1,), (2,), ()])
def test_other_shapes(shape):
    with pytest.raises(ol.TreeMismatch, match=r"`after` must have at 'w' the shape .*\(3,\)"):
        plot.update_ratios({"w": np.ones(3)}, {"w": np.ones(shape)})


def test_parameters_that_a_step_has_taken():
    step = ol.optimize_loss(lambda p, x: (p["w"] - x) ** 2, learning_rate=0.1, bucket=None)
    state = step.init({"w": 1.0})
    before = state.params
    state, _ = step(state, 0.0)
    with pytest.raises(RuntimeError, match=r"before = jax.device_get\(state.params\)"):
        plot.update_ratios(before, state.params)


def test_leaves_that_have_no_size():
    params = {"w": jnp.ones(2), "key": jax.random.key(0)}
    [axes] = plot.update_ratios(params, params).axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["w"]
    with pytest.raises(ValueError, match="`before` must have a parameter"):
        plot.update_ratios({"key": params["key"]}, {"key": params["key"]})
    with pytest.raises(ol.InvalidType, match="`after` at 'w' must be an array of numbers"):
        plot.update_ratios({"w": jnp.ones(2)}, {"w": "text"})


# --- sweep ---


def test_a_panel_for_each_number_that_varies():
    figure = plot.sweep(GRID)
    rate, decay = figure.axes
    assert labels(rate) == ("learning_rate", "loss, mean of the last steps")
    assert labels(decay) == ("weight_decay", "loss, mean of the last steps")
    assert (rate.get_xscale(), decay.get_xscale()) == ("log", "linear")
    assert legend(rate) == ["best", "run", "best of all", "not finite"]
    line, dots, ring, crosses = rate.lines
    np.testing.assert_allclose(line.get_xydata(), [[0.001, 2.0], [0.1, 0.5]])
    np.testing.assert_allclose(dots.get_xydata(), [[0.001, 3.0], [0.001, 2.0], [0.1, 0.5]])
    np.testing.assert_allclose(ring.get_xydata(), [[0.1, 0.5]])
    assert crosses.get_xdata().tolist() == [0.1]
    np.testing.assert_allclose(decay.lines[0].get_ydata(), [0.5, 2.0])


def test_seeds_are_repetitions():
    points = [{"learning_rate": rate, "seed": seed} for rate in (0.1, 0.2) for seed in (0, 1)]
    figure = plot.sweep(runs(points, [1.0, 3.0, 1.5, 1.5]))
    [axes] = figure.axes
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[0.1, 2.0], [0.2, 1.5]])
    assert legend(axes)[0] == "best, mean over seeds"
    [axes] = plot.sweep(runs([{"seed": 3}, {"seed": 1}], [1.0, 2.0])).axes
    assert axes.get_xlabel() == "seed"
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[1, 2.0], [3, 1.0]])


def test_a_number_as_it_was_built_stands_left():
    [axes] = plot.sweep(runs([{"learning_rate": r} for r in (0.2, None)], [1.0, 2.0])).axes
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[0.1, 2.0], [0.2, 1.0]])


def test_a_zero_among_several_magnitudes():
    values = (0.0, 1e-3, 1e-1, 1e3)
    figure = plot.sweep(runs([{"weight_decay": v} for v in values], [1.0, 2.0, 3.0, 0.5]))
    [axes] = figure.axes
    assert axes.get_xscale() == "symlog"
    low = axes.get_xlim()[0]
    assert -1e-3 < low < 0
    figure.draw_without_rendering()
    assert min(tick for tick in axes.get_xticks() if tick >= low) == 0
    ring = axes.transData.transform([[0.0, 1.0], [1e3, 0.5]])[:, 0]
    radius = 0.5 * 11 * figure.dpi / 72
    assert axes.bbox.x0 + radius < ring[0]
    assert ring[1] < axes.bbox.x1 - radius


def test_a_sweep_in_which_all_diverged():
    [axes] = plot.sweep(runs([{"learning_rate": r} for r in (1.0, 2.0)], [np.inf, np.nan])).axes
    assert axes.lines[-1].get_xdata().tolist() == [1.0, 2.0]


def test_the_method_of_a_sweep():
    step = ol.optimize_loss(lambda p, x: (p["w"] - x) ** 2, learning_rate=0.1)
    found = step.sweep(step.init({"w": 0.0}), jnp.ones(20), learning_rate=[0.1, 0.2])
    np.testing.assert_allclose(found.plot().axes[0].lines[0].get_ydata(), found.final, 1e-6)


# --- learning_rate ---


def test_the_curve_and_the_suggestion():
    [axes] = plot.learning_rate(curve()).axes
    assert labels(axes) == ("learning rate", "loss")
    assert axes.get_xscale() == "log"
    assert legend(axes) == ["loss", "smoothed loss", "suggestion 0.1"]
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), curve().losses)
    np.testing.assert_array_equal(axes.lines[1].get_ydata(), curve().smoothed)
    assert axes.lines[2].get_xdata()[0] == 0.1
    assert axes.get_ylim()[1] < 50  # where it diverges, it leaves the picture
    assert legend(plot.learning_rate(curve(None)).axes[0]) == ["loss", "smoothed loss"]
    falling = dataclasses.replace(curve(), still_falling=True)
    told = legend(plot.learning_rate(falling).axes[0])[2]
    assert told == "suggestion 0.1, where the loss still falls"


def test_the_method_of_a_range_test():
    step = ol.optimize_loss(lambda p, x: (p["w"] - x) ** 2, learning_rate=0.1)
    found = step.find_learning_rate(step.init({"w": 0.0}), [1.0])
    np.testing.assert_array_equal(found.plot().axes[0].lines[0].get_ydata(), found.losses)


def test_metrics_of_a_real_run():
    step = ol.optimize_loss(
        lambda p, x: jnp.mean((p["w"] - x) ** 2),
        learning_rate=0.1,
        summaries=ol.OPTIMIZER_SUMMARIES,
        name="net",
    )
    _, seen = step.many(step.init({"w": jnp.zeros(3)}), jnp.ones((20, 3)))
    before = jax.device_get(seen)
    figure = plot.metrics(seen)
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "loss",
        "learning rate",
        "L2 norm",
        "L2 norm of a gradient",
    ]
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), before["net/loss"])
