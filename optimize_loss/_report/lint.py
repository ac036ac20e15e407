"""Warnings about options of a step that are allowed, but are likely mistakes."""

import dataclasses
import functools
import itertools
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
from optimize_loss.transforms._muon import in_stacks

CLIPS = (ClipByAdaptiveNorm, ClipByGlobalNorm, ClipByNorm, ClipByValue)
POINTS = 64  # of a schedule at once
TRIED = 32  # steps of a rule, to see whether its updates are lost
NEUTRAL = {"freeze": False, "learning_rate_multiplier": 1, "noise_scale": 0, "weight_decay": 0}

Links = Sequence[tuple[str, Any, bool]]  # the name of each, the link, and whether it is a rule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One parameter in an `Explanation`.

    Attributes:
      name: of the parameter.
      shape: of the parameter.
      dtype: name of its dtype.
      trained: whether it gets gradients.
      rule: the pattern of its rule; None without a rule.
      links: the names of the links that it passes through; empty if it is not trained.
      moved_by: the links among these that make its update: those with slots for it, or otherwise
        the rate.
      learning_rate: the rate at the first step, without the multiplier; None if it is not known, as
        for an optax transformation, or if the parameter is not trained.
      schedule: the schedule of the rate, if any.
      multiplier: the learning rate multiplier: a number, or one number per layer.
      weight_decay: the weight decay, per unit of the rate if it is multiplied by the rate; 0 for no
        decay.
      param_bytes: of the parameter.
      state_bytes: of its slots.
      place: the array that it shares with others, or its sharding; "" if it has its own array.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    trained: bool
    rule: str | None
    links: tuple[str, ...]
    moved_by: tuple[str, ...]
    learning_rate: float | None = None
    schedule: Any = None
    multiplier: float | tuple[float, ...] = 1.0
    weight_decay: float = 0.0
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
      InvalidType: `steps` is not an integer.
      ValueError: `steps` is below 1.
    """
    updates = None if steps is None else check_integer("steps", steps, AT_LEAST_1)
    return Horizon(first, updates if increments else None)


def lint(rows: Sequence[Row], links: Links, rules: Rules, horizon: Horizon) -> Iterator[str]:
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


def _narrow(rows: Sequence[Row], links: Links, peaks: Mapping[Any, float]) -> Iterator[str]:
    rules = {name: link for name, link, is_rule in links if is_rule and _can_be_tried(link)}
    if found := list(_lost(_not_rounded(rows, links), rules, peaks)):
        yield (
            f"16-bit parameters may stand still: {shown(found)}. Without stochastic rounding, an "
            "update below half of their precision is lost. Keep them in float32, or give "
            "`precision`, which has them rounded stochastically."
        )


def _not_rounded(rows: Sequence[Row], links: Links) -> list[Row]:
    """Return the narrow parameters that are trained without stochastic rounding."""
    rounding = {name for name, link, _ in links if isinstance(link, RoundParams)}
    narrow = [row for row in rows if row.trained and is_narrow(jnp.dtype(row.dtype))]
    return [row for row in narrow if rounding.isdisjoint(row.links)]


def _lost(
    rows: Sequence[Row], rules: Mapping[str, Any], peaks: Mapping[Any, float]
) -> Iterator[str]:
    """Yield the names of parameters whose dtype loses the updates that rules make."""

    @functools.cache
    def stands_still(names: tuple[str, ...], dtype: str, rank: int, rate: float) -> bool:
        return _stands_still({name: rules[name] for name in names}, dtype, rank, rate)

    for row in rows:
        tried = tuple(name for name in row.links if name in rules)
        peak = max(row.learning_rate or 0.0, peaks.get(row.schedule, 0.0))
        rate = peak * float(np.max(row.multiplier))
        if row.learning_rate is None or not {*row.moved_by} <= {*tried}:
            is_lost = rate < float(jnp.finfo(row.dtype).eps) / 2
        else:
            is_lost = stands_still(tried, row.dtype, min(len(row.shape), 2), rate)
        yield from [row.name] * is_lost


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


def _stacked(rows: Sequence[Row], links: Links) -> Iterator[str]:
    """Yield that matrices of stacked layers are not Muon's, where their biases tell a stack."""
    muon = {name for name, link, _ in links if isinstance(link, ScaleByMuon)}
    left = _stacked_matrices(rows) if muon else []
    if found := [row.name for row in left if muon.isdisjoint(row.moved_by)]:
        yield (
            f"Muon leaves stacked matrices to another rule: {shown(found)}. It is for parameters "
            "of two axes: make each layer a parameter of its own, or choose another optimizer."
        )


def _stacked_matrices(rows: Sequence[Row]) -> list[Row]:
    """Return the matrices among layers that are stacked along a first axis, as their biases are."""
    mine = [row for row in rows if row.trained]
    stacked = list(itertools.compress(mine, in_stacks([row.name for row in mine], mine)))
    lengths = {row.shape[0] for row in stacked if len(row.shape) == 2}
    return [row for row in stacked if len(row.shape) > 2 and row.shape[0] in lengths]


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


def _clipped_late(links: Links) -> Iterator[str]:
    rule = None
    for name, link, is_rule in links:
        if rule is not None and isinstance(link, CLIPS):
            yield (
                f"The link {name!r} clips after the rule {rule!r}: it shrinks the updates, not "
                "the gradients. Put it before the rule."
            )
        rule = name if is_rule and rule is None else rule


def _unused(rows: Sequence[Row], links: Links, rules: Rules) -> Iterator[str]:
    of_rules: list[list[Row]] = [[] for _ in (*rules.options, None)]
    for row, i in zip(rows, rules.index([row.name for row in rows]), strict=True):
        of_rules[i].append(row)
    for i, (text, own) in enumerate(zip(rules.texts, rules.options, strict=True)):
        yield from _unused_rule(text, own, of_rules[i], _in_use(rules, i, of_rules[i], links))
    for name, link, _ in links:
        if isinstance(link, MultiplyGradients):
            yield from _unused_multipliers(name, link)


def _unused_multipliers(name: str, link: MultiplyGradients) -> Iterator[str]:
    for pattern, value in numbers_by_name(link)["multipliers"].pairs:
        if _is(value, 1):
            yield f"`{name}` has no effect for {pattern_text(pattern)!r}: its number is 1."


def _in_use(rules: Rules, i: int, mine: Sequence[Row], links: Links) -> set[str]:
    """Return the keys that a rule may give a neutral number to switch something off.

    That is a later rule, which would have one of its parameters, or a link for all parameters.
    """
    later = Rules(rules.patterns[i + 1 :], rules.options[i + 1 :])
    exempt = any(j < len(later.patterns) for j in later.index([row.name for row in mine]))
    found = {"freeze", "learning_rate_multiplier"} if exempt else set()
    for _, link, _ in links:
        if isinstance(link, AddNoise | ShrinkParams | AddWeightDecay):
            own = {"scale": "noise_scale", "weight_decay": "weight_decay"}
            found |= {own[number] for number in own.keys() & link.numbers()}
    return found


def _unused_rule(
    text: str, own: Mapping[str, Any], mine: Sequence[Row], in_use: set[str]
) -> Iterator[str]:
    """Yield which keys of a rule change nothing for its parameters."""
    idle = {*own} - {"freeze"}
    if any(row.trained for row in mine):
        idle = {key for key in NEUTRAL.keys() & own if _is(own[key], NEUTRAL[key])}
        idle -= in_use
        if not own and "freeze" not in in_use:
            yield f"`rules[{text!r}]` has no effect: it is empty, and no later rule matches."
    for key in sorted(idle):
        yield f"`rules[{text!r}][{key!r}]` has no effect on {shown([row.name for row in mine])}."


def _is(value: Any, number: float) -> bool:
    """Return whether a value, or each of several, is a number rather than a schedule of it."""
    return not callable(value) and bool(np.all(np.asarray(value) == number))
