"""The main job: a net that paints a photograph, and its training under several settings."""

import contextlib
import dataclasses
import functools
import os
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import optimize_loss as ol
from optimize_loss._demo.photo import Photo, decibels

BATCH = 2048  # pixels a step
PER_CALL = 10  # steps a dispatch, at most
STEPS = 500
CLIP = 0.01
FRAMES = (0, 0.02, 0.1, 0.3, 1)  # shares of the run after which the painting is kept

RATES = {"Adagrad": 10.0, "Ftrl": 1000.0, "Momentum": 3.0, "RMSProp": 0.01, "SGD": 10.0}
RATE = 0.01  # of Adam, and of optimizers that are not in the table


def init_net(seed: int) -> dict[str, Any]:
    """Return the parameters of a net from positions to colours.

    Its first layer is fixed: sines and cosines of 128 random frequencies, a few to some thirty
    waves over the photograph. The layers after it are trained.

    References:
      M. Tancik et al., "Fourier features let networks learn high frequency functions in low
      dimensional domains", 2020, https://arxiv.org/abs/2006.10739.
    """
    random = np.random.default_rng(seed)
    normal = functools.partial(random.standard_normal, dtype=np.float32)
    sizes = [(256, 128), (128, 128), (128, 3)]
    layers = [
        {
            "kernel": normal(size) * np.float32((2 / size[0]) ** 0.5),
            "bias": np.zeros((1, size[1]), np.float32),
        }
        for size in sizes
    ]
    return {"frequencies": 12 * normal((2, 128)), "layers": layers}


def paint(params: dict[str, Any], positions: jax.Array) -> jax.Array:
    """Return the net's colours, of shape (pixels, 3), for positions of shape (pixels, 2)."""
    phase = 2 * jnp.pi * positions @ params["frequencies"]
    x = jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=1)
    *hidden, last = params["layers"]
    for layer in hidden:
        x = jax.nn.gelu(x @ layer["kernel"] + layer["bias"])
    return jax.nn.sigmoid(x @ last["kernel"] + last["bias"])


def loss(params: dict[str, Any], positions: jax.Array, colours: jax.Array) -> jax.Array:
    """Return the mean squared error of the colours that the net paints."""
    return jnp.mean((paint(params, positions) - colours) ** 2)


@dataclasses.dataclass(frozen=True)
class Setting:
    """How one net is trained.

    Attributes:
      label: the setting in a few words.
      step: the training step.
      clip: the bound on the norm of all gradients; None for none.
    """

    label: str
    step: ol.TrainStep
    clip: float | None = None


def settings(
    steps: int,
    optimizer: str,
    learning_rate: float | None,
    clip: float,
    noise: float,
    summaries: Any = None,
) -> list[Setting]:
    """Return the setting asked for, and two to compare it with.

    Args:
      steps: of the run, over which the learning rate decays to 1 % of itself.
      optimizer: its name.
      learning_rate: the first learning rate; None for one that suits the optimizer.
      clip: bound on the norm of all gradients; 0 for none.
      noise: standard deviation of noise on the gradients; 0 for none.
      summaries: of the setting asked for, as `optimize_loss` takes them.

    Raises:
      ValueError: the optimizer is unknown.
    """
    rate = RATES.get(optimizer, RATE) if learning_rate is None else learning_rate
    build = functools.partial(ol.optimize_loss, loss, variables="layers/**")
    chosen = build(
        optimizer=optimizer,
        learning_rate=rate,
        learning_rate_decay_fn=lambda r, n: ol.schedules.cosine_decay(r, n, steps, alpha=0.01),
        clip_gradients=clip or None,
        gradient_noise_scale=noise or None,
        summaries=summaries,
    )
    label = f"{optimizer}, rate {rate:g}, cosine decay"
    label += (f", clip {clip:g}" if clip else "") + (f", noise {noise:g}" if noise else "")
    other = "Adam" if optimizer == "SGD" else "SGD"
    constant = [(optimizer, rate), (other, RATES.get(other, RATE))]
    return [
        Setting(label, chosen, clip or None),
        *(
            Setting(f"{name}, rate {r:g}, constant", build(optimizer=name, learning_rate=r))
            for name, r in constant
        ),
    ]


@dataclasses.dataclass(frozen=True)
class Frame:
    """A painting: its step, its PSNR in dB, and the colours of its pixels."""

    step: int
    psnr: float
    colours: np.ndarray

    @property
    def quality(self) -> str:
        """The PSNR in words."""
        return f"{self.psnr:.1f} dB" if np.isfinite(self.psnr) else "diverged"


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained net.

    Attributes:
      setting: how it was trained.
      metrics: {tag: array of shape (steps,)}.
      frames: paintings, from that of the untrained net to the last.
      seconds: the time it took, with compilation.
    """

    setting: Setting
    metrics: dict[str, np.ndarray]
    frames: list[Frame]
    seconds: float


def train(setting: Setting, photo: Photo, steps: int, seed: int, log: str | None) -> Run:
    """Train a net to paint a photograph; stop early where the loss is no longer finite.

    Args:
      setting: how.
      photo: what to paint.
      steps: how many, at least 1.
      seed: of the net and of the pixels that each step sees.
      log: folder for a TensorBoard log; None for none.
    """
    start = time.perf_counter()
    state, done = setting.step.init(init_net(seed)), 0
    frames, kept = [_frame(photo, 0, state)], []
    wanted = np.array(FRAMES) * steps
    with _progress(setting.label, steps) as report, _writer(log) as write:
        for batches in _batches(photo, steps, seed):
            state, metrics = setting.step.many(state, *batches)
            write(state.step, metrics)
            kept.append(metrics)
            before, done, last = done, int(state.step), float(metrics["loss"][-1])
            diverged = not np.isfinite(last)
            if diverged or np.any((before < wanted) & (wanted <= done)):
                frames.append(_frame(photo, done, state))
            report(done, last)
            if diverged:
                break
    curves = {tag: np.concatenate([part[tag] for part in kept]) for tag in _TAGS if tag in kept[0]}
    return Run(setting, curves, frames, time.perf_counter() - start)


_TAGS = ("loss", "global_norm/gradient_norm", "learning_rate")  # of the metrics that are drawn

_paint = jax.jit(paint)


def _frame(photo: Photo, step: int, state: ol.TrainState) -> Frame:
    colours = np.asarray(_paint(state.params, photo.positions))
    return Frame(step, photo.psnr(colours), colours)


def _batches(photo: Photo, steps: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield positions and colours of random pixels, those of several steps at a time."""
    random = np.random.default_rng(seed)
    # calls of one length: another one would be compiled again
    length = max(n for n in range(1, PER_CALL + 1) if steps % n == 0)
    for _ in range(steps // length):
        pixels = random.integers(len(photo.colours), size=(length, BATCH))
        yield photo.positions[pixels], photo.colours[pixels]


@contextlib.contextmanager
def _writer(log: str | None) -> Iterator[Any]:
    if log is None:
        yield lambda step, metrics: None
        return
    from optimize_loss.tensorboard import TensorBoardWriter

    with TensorBoardWriter(log) as writer:
        yield writer.write


def run_folder(folder: str, setting: Setting) -> str:
    """Return the folder for a setting's TensorBoard log."""
    return os.path.join(folder, re.sub(r"[^\w.]+", "-", setting.label))


@contextlib.contextmanager
def _progress(label: str, steps: int) -> Iterator[Any]:
    """Show a bar on a terminal; elsewhere print a line for each tenth of the way."""
    from tqdm import tqdm

    with tqdm(total=steps, unit=" steps", disable=None) as bar:
        if not bar.disable:
            bar.write(label, file=sys.stderr)
        shown, before, since = -1, 0, time.perf_counter()

        def report(done: int, last: float) -> None:
            nonlocal shown, before, since
            now = f"loss {last:.5f}, PSNR {decibels(last):.1f} dB"
            if not bar.disable:
                bar.set_postfix_str(now, refresh=False)
                bar.update(done - bar.n)
            elif (tenth := 10 * done // steps) > shown:
                rate = (done - before) / (time.perf_counter() - since)
                print(f"{label}: {10 * tenth} %, {now}, {rate:.0f} steps/s", file=sys.stderr)
                shown, before, since = tenth, done, time.perf_counter()

        yield report


WIDTH = 1200  # pixels

# colours that the colour-blind can tell apart; of M. Okabe and K. Ito
STYLES = (("#0072B2", "-"), ("#E69F00", "--"), ("#009E73", "-."))

_CURVES = (
    ("loss", "loss", "mean squared error"),
    ("global_norm/gradient_norm", "gradient norm", "L2 norm, before clipping"),
    ("learning_rate", "learning rate", "rate"),
)


def save_picture(path: str, photo: Photo, runs: list[Run]) -> None:
    """Draw the paintings of the first run and the curves of all, and save them as one PNG.

    The file is written atomically: to a temporary file next to it, which is then renamed.

    Args:
      path: of the PNG.
      photo: what was to be painted.
      runs: the first one is shown in paintings.

    Raises:
      OSError: the file cannot be written.
    """
    figure = _figure(photo, runs)
    beside = f"{path}.{os.getpid()}.tmp"
    try:
        with open(beside, "wb") as file:
            figure.savefig(file, format="png", pil_kwargs={"optimize": True})
        os.replace(beside, path)
    finally:
        if os.path.exists(beside):
            os.remove(beside)


def _figure(photo: Photo, runs: list[Run]) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    images = [(f"step {f.step}\nPSNR {f.quality}", f.colours) for f in runs[0].frames]
    images.append((f"photograph\n{photo.width} × {photo.height} pixels", photo.colours))
    width = 12.0
    shape = min(2.0, max(0.4, photo.height / photo.width))
    top = width / max(4, len(images)) * shape + 0.65
    layout = ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.06, rect=(0, 0, 1, 0.985))
    figure = Figure(figsize=(width, top + 3.9), dpi=WIDTH / width, layout=layout)
    upper, lower = np.asarray(figure.subfigures(2, 1, height_ratios=[top, 3.9]))
    for axes, (title, colours) in zip(upper.subplots(1, len(images)), images, strict=True):
        axes.imshow(np.nan_to_num(photo.image(colours)), interpolation="nearest")
        axes.set_title(title, fontsize=13)
        axes.set_axis_off()
    _draw_curves(lower, runs)
    return figure


def _draw_curves(figure: Any, runs: list[Run]) -> None:
    panels = figure.subplots(1, 3)
    for axes, (tag, title, unit) in zip(panels, _CURVES, strict=True):
        for run, (colour, line) in zip(runs, STYLES, strict=True):
            label = f"{run.setting.label}: {run.frames[-1].quality}"
            steps, values = _means(run.metrics[tag])
            marker = "o" if len(steps) == 1 else None
            axes.plot(steps, values, line, marker=marker, color=colour, lw=2, label=label)
        axes.set_yscale("log")
        axes.set_title(title, fontsize=13)
        axes.set_xlabel("step", fontsize=12)
        axes.set_ylabel(unit, fontsize=12)
        axes.tick_params(labelsize=11)
        axes.grid(alpha=0.3)
    if (clip := runs[0].setting.clip) is not None:
        line = panels[1].axhline(clip, color=STYLES[0][0], lw=1.5, ls=":", label=f"clip {clip:g}")
        panels[1].legend(handles=[line], loc="upper right", fontsize=11)
    lines, labels = panels[0].get_legend_handles_labels()
    columns = 3 if sum(map(len, labels)) < 120 else 1
    where = {"loc": "outside lower center", "ncols": columns}
    figure.legend(lines, labels, fontsize=11, frameon=False, **where)


def _means(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the middle steps of some 50 groups of steps, and the means over these groups."""
    starts = np.arange(0, len(values), max(1, len(values) // 50))
    sizes = np.diff(starts, append=len(values))
    return starts + (sizes + 1) / 2, np.add.reduceat(values, starts) / sizes
