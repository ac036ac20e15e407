"""What in the options of a step looks like a mistake, although it is allowed."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optimize_loss._checks import AT_LEAST_1, check_integer
from optimize_loss._engine.arrays import is_narrow
from optimize_loss._engine.by_name import numbers_by_name
from optimize_loss._engine.kinds import Averaging
from optimize_loss._engine.link import TreeLink, number_rules
from optimize_loss._engine.numbers import has_rate
from optimize_loss._names import pattern_text
from optimize_loss._state.rules import Rules
from optimize_loss.optimizers._muon import in_stacks
from optimize_loss.schedules import evaluate
from optimize_loss.transforms import (
    AddNoise,
    AddWeightDecay,
    ClipByAdaptiveNorm,
    ClipByGlobalNorm,
    ClipByNorm,
    ClipByValue,
    Link,
    MultiplyGradients,
    RoundParams,
    ScaleByMuon,
    ShrinkParams,
    chain,
)

CLIPS = (ClipByAdaptiveNorm, ClipByGlobalNorm, ClipByNorm, ClipByValue)
POINTS = 64  # of a schedule at once
TRIED = 32  # steps of a rule, to see whether its updates are lost


@dataclasses.dataclass(frozen=True)
class Row:
    """What holds for one parameter.

    Attributes:
      name: of the parameter.
      shape: of the parameter.
      dtype: name of its dtype.
      trained: whether it gets gradients.
      rule: the pattern of its rule; None without one.
      links: the names of the links that it passes through; none if it is not trained.
      moved_by: of these, those that make its update: with memory for it, or else with the rate.
      learning_rate: the rate at the first step, without the multiplier; None if it is not known,
        as that of an optax transformation, or not trained.
      schedule: of the rate, if it goes by one.
      multiplier: of the rate: a number, or one for each layer.
      weight_decay: per unit of the rate for decay that goes by it; 0 for none.
      param_bytes: of the parameter.
      state_bytes: of its slots.
      place: the array that it shares with others, or how it is sharded; "" for an array of its own.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    trained: bool
    rule: str | None
    links: tuple[str, ...]
    moved_by: tuple[str, ...]
    learning_rate: float | None
    schedule: Any
    multiplier: float | tuple[float, ...]
    weight_decay: float
    param_bytes: int
    state_bytes: int
    place: str


@dataclasses.dataclass(frozen=True)
class Horizon:
    """What the schedules will see.

    Attributes:
      first: the step of the first update.
      updates: how many updates there will be; None if that is not known.
    """

    first: int = 0
    updates: int | None = None


def check_horizon(first: int, steps: Any, increments: bool) -> Horizon:
    """Return what schedules will see in so many steps, None if that is not known.

    Raises:
      InvalidType: `steps` is no integer.
      ValueError: `steps` is below 1.
    """
    updates = None if steps is None else check_integer("steps", steps, AT_LEAST_1)
    return Horizon(first, updates if increments else None)


def lint(
    rows: Sequence[Row], links: Sequence[tuple[str, Any, bool]], rules: Rules, horizon: Horizon
) -> Iterator[str]:
    """Yield a sentence or two for each kind of mistake, naming parameters or options.

    Args:
      rows: of all parameters.
      links: in order, the name of each, the link, and whether it is a rule: has memory for
        parameters, or the rate.
      rules: the rules.
      horizon: what the schedules will see.
    """
    yield from _decayed(rows)
    schedules: dict[Any, list[str]] = {}
    for name, link, _ in links:
        if isinstance(link, Link) and "learning_rate" in number_rules(type(link)):
            rate = link.numbers().get("learning_rate")
            if callable(rate):
                schedules.setdefault(rate, []).append(name)
    peaks: dict[Any, float] = {None: 0.0}
    for rate, names in schedules.items():
        schedule = _Schedule(rate)
        peaks[rate] = schedule.peak(horizon)
        yield from _of_schedule(names, schedule, horizon)
    yield from _narrow(rows, links, peaks)
    yield from _stacked(rows, links)
    yield from _clipped_late(links)
    yield from _unused(rows, links, rules)


def shown(names: Sequence[str]) -> str:
    """Return a few of many names."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(repr, names[:3])) + more


def _decayed(rows: Sequence[Row]) -> Iterator[str]:
    found = [row.name for row in rows if row.weight_decay > 0 and len(row.shape) < 2]
    if found:
        yield (
            f"Parameters of at most one axis are decayed: {shown(found)}. Biases and scales mostly "
            "are not: give them a rule with `weight_decay=0`."
        )


def _narrow(
    rows: Sequence[Row], links: Sequence[tuple[str, Any, bool]], peaks: Mapping[Any, float]
) -> Iterator[str]:
    rounding = {name for name, link, _ in links if isinstance(link, RoundParams)}
    rules = {name: link for name, link, is_rule in links if is_rule and _can_be_tried(link)}
    known: dict[Any, bool] = {}
    found = []
    for row in rows:
        if not (row.trained and is_narrow(jnp.dtype(row.dtype))) or rounding & {*row.links}:
            continue
        peak = max(row.learning_rate or 0.0, peaks.get(row.schedule, 0.0))
        rate = peak * float(np.max(row.multiplier))
        mine = {name: rules[name] for name in row.links if name in rules}
        key = (*mine, row.dtype, min(len(row.shape), 2), rate)
        if row.learning_rate is None or not mine.keys() >= {*row.moved_by}:
            known[key] = rate < float(jnp.finfo(row.dtype).eps) / 2
        elif key not in known:
            known[key] = _stands_still(mine, row.dtype, min(len(row.shape), 2), rate)
        found += [row.name] if known[key] else []
    if found:
        yield (
            f"16-bit parameters may stand still: {shown(found)}. Without stochastic rounding, an "
            "update below half of their precision is lost. Keep them in float32, or give "
            "`precision`, which has them rounded stochastically."
        )


def _can_be_tried(link: Any) -> bool:
    """Return whether a link makes an update of one parameter alone, and does not only average."""
    is_plain = isinstance(link, Link) and not isinstance(link, TreeLink)
    return is_plain and (has_rate(link) or not isinstance(link, Averaging))


def _stands_still(links: Mapping[str, Any], dtype: str, rank: int, rate: float) -> bool:
    """Return whether a few steps of gradients of size 1 move a parameter of size 1.5 hardly.

    That is by less than a quarter of what they move it by in float32. The matrix is orthogonal, so
    that rules for matrices make the update of usual size.
    """
    signs = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], np.float32)
    grads = signs if rank == 2 else signs[1] if rank else signs[0, 0]
    tx = chain(**links)

    @jax.jit
    def moved(param: jax.Array) -> jax.Array:
        state = tx.init(param)
        for name in (name for name, link in links.items() if has_rate(link)):
            state = tx.set(state, **{f"{name}/learning_rate": rate})
        g = jnp.asarray(grads, param.dtype)
        new, _ = jax.lax.fori_loop(
            0, TRIED, lambda _, now: tx.apply(g, now[1], now[0]), (param, state)
        )
        return jnp.mean(jnp.abs(new.astype(jnp.float32) - 1.5))

    wanted, got = (float(moved(jnp.full(grads.shape, 1.5, x))) for x in (jnp.float32, dtype))
    return got <= wanted / 4


def _stacked(rows: Sequence[Row], links: Sequence[tuple[str, Any, bool]]) -> Iterator[str]:
    """Yield that matrices of stacked layers are not Muon's, where their biases tell a stack."""
    muon = {name for name, link, _ in links if isinstance(link, ScaleByMuon)}
    mine = [row for row in rows if row.trained] if muon else []
    marks = in_stacks([row.name for row in mine], mine)
    stacked = [row for row, mark in zip(mine, marks, strict=True) if mark]
    lengths = {row.shape[0] for row in stacked if len(row.shape) == 2}
    left = [x for x in stacked if len(x.shape) > 2 and x.shape[0] in lengths]
    if found := [row.name for row in left if not muon & {*row.moved_by}]:
        yield (
            f"Muon leaves stacked matrices to another rule: {shown(found)}. It is for parameters "
            "of two axes: make each layer a parameter of its own, or choose another optimizer."
        )


class _Schedule:
    """A schedule at many steps at once."""

    def __init__(self, schedule: Callable[[Any], Any]) -> None:
        self._values = jax.jit(
            jax.vmap(lambda step: evaluate("learning_rate", schedule, step, jnp.float32))
        )

    def at(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Return steps from the first to the last, and the values there."""
        steps = np.linspace(first, last, POINTS).round().astype(np.int32)
        return steps, np.asarray(self._values(steps))

    def peak(self, horizon: Horizon) -> float:
        """Return the largest value, as far as it is known."""
        last = horizon.first + (horizon.updates or 10_000) - 1
        return float(np.max(self.at(horizon.first, last)[1], initial=0.0))

    def end(self, first: int, last: int) -> int:
        """Return the step from which the value is that of the last step."""
        final = self.at(last, last)[1][0]
        low, high = first, last
        while low < high:
            steps, values = self.at(low, high)
            others = np.flatnonzero(values[:-1] != final)
            if not len(others):
                return low
            low, high = int(steps[others[-1]]) + 1, int(steps[others[-1] + 1])
        return high


def _of_schedule(names: list[str], schedule: _Schedule, horizon: Horizon) -> Iterator[str]:
    if schedule.at(horizon.first, horizon.first)[1][0] == 0 and schedule.peak(horizon) > 0:
        yield (
            f"The schedule of `learning_rate` of {shown(names)} is 0 at the first step, whose "
            "update changes nothing. Let it begin above 0."
        )
    if horizon.updates is None:
        return
    last = horizon.first + horizon.updates - 1
    end = schedule.end(horizon.first, last)
    before = max(horizon.first, end - 1 - max(1, (end - horizon.first) // 50))
    steps, values = schedule.at(before, end)
    # A rate that falls up to its end, unlike a staircase, a warm-up or a constant.
    falls = values[0] > values[steps < end][-1] > values[-1] if (steps < end).any() else False
    if falls and last - end > max(1, horizon.updates // 100):
        yield (
            f"The schedule of `learning_rate` of {shown(names)} ends at step {end}, before the "
            f"run, whose last step is {last}: it stays at {values[-1]:.3g} from there on."
        )


def _clipped_late(links: Sequence[tuple[str, Any, bool]]) -> Iterator[str]:
    rule = None
    for name, link, is_rule in links:
        if rule is not None and isinstance(link, CLIPS):
            yield (
                f"The link {name!r} clips behind the rule {rule!r}: it shrinks the updates, not "
                "the gradients. Let it stand before."
            )
        rule = name if is_rule and rule is None else rule


def _unused(
    rows: Sequence[Row], links: Sequence[tuple[str, Any, bool]], rules: Rules
) -> Iterator[str]:
    of_rows = rules.index([row.name for row in rows])
    replaced = {
        "weight_decay": any(isinstance(x, ShrinkParams | AddWeightDecay) for _, x, _ in links),
        "noise_scale": any(isinstance(link, AddNoise) for _, link, _ in links),
    }
    for i, (text, own) in enumerate(zip(rules.texts, rules.options, strict=True)):
        mine = [row for row, j in zip(rows, of_rows, strict=True) if j == i]
        names = [row.name for row in mine]
        later = Rules(rules.patterns[i + 1 :], rules.options[i + 1 :])
        exempt = any(j < len(later.patterns) for j in later.index(names))
        if not exempt and any(row.trained for row in mine) and not own:
            yield f"`rules[{text!r}]` has no effect: it is empty, and no later rule matches."
        for key in sorted(_idle(own, mine, exempt, replaced)):
            yield f"`rules[{text!r}][{key!r}]` has no effect on {shown(names)}."
    for name, link, _ in links:
        if isinstance(link, MultiplyGradients):
            for pattern, value in numbers_by_name(link)["multipliers"].pairs:
                if not callable(value) and value == 1:
                    text = pattern_text(pattern)
                    yield f"`{name}` has no effect for {text!r}: its number is 1."


def _idle(
    own: Mapping[str, Any], mine: Sequence[Row], exempt: bool, replaced: Mapping[str, bool]
) -> set[str]:
    """Return the keys of a rule that change nothing.

    Args:
      own: the rule.
      mine: its parameters.
      exempt: whether a later rule would have one of them.
      replaced: for some keys, whether there is for all parameters what a 0 would switch off.
    """
    if not any(row.trained for row in mine):
        return {*own} - {"freeze"}
    idle = {key for key, is_there in replaced.items() if own.get(key) == 0 and not is_there}
    idle |= {"freeze"} if own.get("freeze") is False and not exempt else set()
    return idle | ({"learning_rate_multiplier"} if _is_one(own) and not exempt else set())


def _is_one(own: Any) -> bool:
    value = own.get("learning_rate_multiplier")
    return value is not None and not callable(value) and bool(np.all(np.asarray(value) == 1))
