"""From rules to links: those of the rules, and the optimizer's without what rules take over."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from optimize_loss._checks import InvalidType
from optimize_loss._engine.equal import same
from optimize_loss._engine.kinds import Gate
from optimize_loss._engine.link import Stage, is_transformation
from optimize_loss._engine.numbers import has_rate
from optimize_loss._engine.order import arranged, head, merged, stage_of
from optimize_loss._engine.selection import ByRule, Outside, Sharing, linked, where
from optimize_loss._state.rules import Rules
from optimize_loss.optimizers._optimizer import Optimizer
from optimize_loss.optimizers._resolve import resolve
from optimize_loss.optimizers._variable import different_names
from optimize_loss.transforms import (
    AddWeightDecay,
    ClipByGlobalNorm,
    ClipByNorm,
    ClipByValue,
    ForParameters,
    Link,
    Precision,
    ShrinkParams,
    StepByDualAveraging,
    StepByFtrl,
    StepByProximalAdagrad,
    StepByProximalGradient,
    StepByScheduleFree,
)
from optimize_loss.transforms._multiply import MultiplyLayers, MultiplySteps
from optimize_loss.transforms._run_optax import RunOptax, run_optax

Links = dict[str, Any]

# Rules whose parameters follow from their slots, or from the rate in another way than by a factor.
_OWN_RATE = (
    StepByDualAveraging,
    StepByFtrl,
    StepByProximalAdagrad,
    StepByProximalGradient,
    StepByScheduleFree,
)


def clips(rules: Rules) -> Links:
    """Return a link for each rule that clips its parameters together."""
    named = _named(rules, "clip_norm", rules.having("clip_norm"))
    return {
        name: _only(rules, [i], ClipByGlobalNorm(rules.options[i]["clip_norm"]))
        for name, i in named
    }


def with_rules(rules: Rules, links: Links, rate: Any) -> Links:
    """Return the links of the optimizer, with optimizers, decays and multipliers of rules.

    Args:
      rules: the rules.
      links: of the optimizer for all parameters whose rule has none.
      rate: the learning rate, for optimizers of rules that have none of their own.

    Raises:
      InvalidType: an optimizer of a rule is none, or has links that are for all parameters.
      ValueError: an optimizer does not allow what a rule asks for.
    """
    ruled = head(links)
    rest = {name: link for name, link in links.items() if name not in ruled}
    for group in _groups(rules, rest, rate):
        ruled = merged(ruled, _with_decay(rules, group))
        _check_multipliers(rules, group)
    return arranged(ruled, _multipliers(rules))


class _Group(NamedTuple):
    """Parameters that have one optimizer."""

    prefix: str  # of the names of its links
    indices: list[int]  # of its rules; the index behind the last means parameters without one
    links: Links
    where: ByRule | None  # its parameters, None if these are all

    @property
    def decays(self) -> dict[str, ShrinkParams | AddWeightDecay]:
        """The links that decay parameters."""
        kinds = ShrinkParams | AddWeightDecay
        return {name: link for name, link in linked(self.links) if isinstance(link, kinds)}

    @property
    def decays_all(self) -> list[str]:
        """Of these the names of those that are for all parameters of the group."""
        return [name for name in self.decays if where(self.links[name]) in (None, self.where)]


def _only(rules: Rules, chosen: Sequence[int], entry: Any) -> ForParameters:
    """Return a link, or one for some parameters, only for those of the rules that are chosen."""
    which = ByRule(rules.patterns, tuple(chosen), where(entry))
    link = entry.link if isinstance(entry, ForParameters) else entry
    return ForParameters(which, link if isinstance(link, Link) else run_optax(link), optional=True)


def _without(rules: Rules, chosen: Sequence[int]) -> list[int]:
    return [i for i in range(len(rules.patterns) + 1) if i not in chosen]


def _groups(rules: Rules, links: Links, rate: Any) -> list[_Group]:
    """Return the parameters of the optimizer for all, and those of each rule that has its own."""
    chosen = rules.having("optimizer")
    others = _without(rules, chosen)
    if not chosen:
        return [_Group("", others, links, None)]
    where = ByRule(rules.patterns, tuple(others))
    groups = [_Group("", others, {n: _only(rules, others, x) for n, x in links.items()}, where)]
    taken = [name.split(".")[0] for name in links]
    wanted = [_name(rules.options[i]["optimizer"]) for i in chosen]
    names = different_names([*dict.fromkeys(taken), *wanted])[-len(wanted) :]
    for name, i in zip(names, chosen, strict=True):
        own = {f"{name}.{n}": x for n, x in _own_links(rules, i, rate).items()}
        groups.append(_Group(f"{name}.", [i], own, ByRule(rules.patterns, (i,))))
    return groups


def _name(optimizer: Any) -> str:
    """Return what the links of an optimizer of a rule are called by."""
    if isinstance(optimizer, str):
        return optimizer
    if isinstance(optimizer, Optimizer):
        name = optimizer.name or type(optimizer).__name__
        return name.replace("/", ".")
    return optimizer.__name__ if isinstance(optimizer, type) else "rule"


def _own_links(rules: Rules, i: int, rate: Any) -> Links:
    """Return the links of the optimizer of a rule; one without a rate shares that of all."""
    shared = None if _brings_rate(rules.options[i]["optimizer"]) else rate
    links = _resolved(rules, i, shared).items()
    return {name: _sharing(_only(rules, [i], entry), shared) for name, entry in links}


def _sharing(entry: ForParameters, rate: Any) -> ForParameters:
    """Return a link that shares the learning rate of all if its own is this one."""
    number = "learning_rate"
    if not has_rate(entry.link) or not same(entry.link.numbers()[number], rate):
        return entry
    return Sharing(entry.where, entry.link, entry.optional, number)


def _resolved(rules: Rules, i: int, rate: Any) -> Links:
    """Return the links of the optimizer of a rule, made with a rate or, for None, with its own."""
    optimizer, label = rules.options[i]["optimizer"], f"rules[{rules.texts[i]!r}]['optimizer']"
    try:
        links = resolve(optimizer, rate)
    except ValueError as error:
        error.add_note(f"This is about `{label}`.")
        raise
    for name, link in linked(links):
        if isinstance(link, Gate) or stage_of(link) < Stage.UPDATE:
            raise InvalidType(
                f"`{label}` must have no link that is for all parameters: give its option to the "
                f"`optimizer` of all. Received: {name}={link!r}."
            )
    return links


def _brings_rate(optimizer: Any) -> bool:
    """Return whether an optimizer has a learning rate, or hides it, as one of optax does."""
    if isinstance(optimizer, Optimizer):
        return True
    if isinstance(optimizer, type) or not is_transformation(optimizer):
        return False
    ours = dict(linked(dict(getattr(optimizer, "links", (("rule", optimizer),)))))
    return any(not isinstance(x, Link) or has_rate(x) for x in ours.values())


def _with_decay(rules: Rules, group: _Group) -> Links:
    """Return the links of a group, with the decay of rules in place of the optimizer's."""
    chosen = [i for i in rules.having("weight_decay") if i in group.indices]
    if not chosen:
        return group.links
    _check_decay(rules, chosen, group)
    links = dict(group.links)
    for name, link in group.decays.items():
        rest = None if chosen == group.indices else link.weight_decay
        number = rules.number("weight_decay", chosen, rest)
        links[name] = _replaced(links[name], weight_decay=number)
    return links if group.decays_all else _with_new_decay(rules, chosen, group, links)


def _with_new_decay(rules: Rules, chosen: list[int], group: _Group, links: Links) -> Links:
    """Return links with a decay for the parameters that the others do not decay.

    It stands before these, or behind clipping.
    """
    kind = next(map(type, group.decays.values()), ShrinkParams)
    link = kind(rules.number("weight_decay", chosen, None))
    others = tuple(where(links[name]) for name in group.decays)
    which = Outside(others, group.where) if others else group.where
    entry = link if which is None else ForParameters(which, link, optional=True)
    rows = list(links.items())
    here = [n in group.decays or not isinstance(x, _CLIPS) for n, x in linked(links)].index(True)
    added = {f"{group.prefix}rules.weight_decay": entry}
    return merged(dict(rows[:here]), added, dict(rows[here:]))


def _replaced(entry: Any, **numbers: Any) -> Any:
    """Return a link, or one for some parameters, with other numbers."""
    if isinstance(entry, ForParameters):
        return dataclasses.replace(entry, link=dataclasses.replace(entry.link, **numbers))
    return dataclasses.replace(entry, **numbers)


_CLIPS = (ClipByValue, ClipByNorm, ClipByGlobalNorm)


def _check_decay(rules: Rules, chosen: list[int], group: _Group) -> None:
    """Raise unless it is clear where the decay of rules takes the place of the optimizer's."""
    label = f"rules[{rules.texts[chosen[0]]!r}]['weight_decay']"
    links = dict(linked(group.links))
    _check_seen(label, links)
    recomputed = [x for x in links.values() if isinstance(x, StepByFtrl | StepByDualAveraging)]
    if recomputed and any(rules.options[i]["weight_decay"] != 0 for i in chosen):
        raise ValueError(
            f"`{label}` must be omitted, or 0, if the optimizer makes the parameter again from "
            f"its slots: decay would be lost. Received: {recomputed[0]!r}, which has decays of its "
            "own."
        )
    if len({*map(type, group.decays.values())}) > 1 or len(group.decays_all) > 1:
        raise ValueError(
            f"`{label}` must be omitted if the optimizer decays parameters more than once: it "
            f"would not be clear which decay it replaces. Received: {group.decays}."
        )


def _check_seen(label: str, links: Links) -> None:
    """Raise if a link may have a decay that is not seen."""
    if any(not isinstance(x, Link) or isinstance(x, RunOptax) for x in links.values()):
        raise ValueError(
            f"`{label}` must be omitted if the optimizer has an optax transformation, whose "
            "decay cannot be seen. Give the rule an `optimizer` of its own, or use one of "
            f"`ol.optimizers`. Received: {links}."
        )


def _check_multipliers(rules: Rules, group: _Group) -> None:
    """Raise if a rate is to be multiplied that is no factor of the update."""
    chosen = [i for i in rules.having("learning_rate_multiplier") if i in group.indices]
    for name, link in linked(group.links):
        if chosen and isinstance(link, _OWN_RATE):
            label = f"rules[{rules.texts[chosen[0]]!r}]['learning_rate_multiplier']"
            raise ValueError(
                f"`{label}` must be omitted if the learning rate is not a factor of the update, "
                "as it is in Adam. Give the rule an `optimizer` with another rate. "
                f"Received: {name}={link!r}."
            )


def _multipliers(rules: Rules) -> Links:
    """Return the links that multiply the steps of parameters, whole or by layers."""
    key = "learning_rate_multiplier"
    chosen = rules.having(key)
    stacked = [i for i in chosen if isinstance(rules.options[i][key], tuple)]
    whole = [i for i in chosen if i not in stacked]
    links: Links = {}
    if whole:
        links[f"rules.{key}"] = MultiplySteps(rules.number(key, whole, None))
    for name, i in _named(rules, key, stacked):
        links[name] = _only(rules, [i], MultiplyLayers(rules.options[i][key]))
    return links


def _named(rules: Rules, key: str, chosen: Sequence[int]) -> Iterator[tuple[str, int]]:
    """Yield a name for the link of each of some rules, and the rule's index."""
    names = different_names(f"rules.{key}.{rules.texts[i].replace('/', '.')}" for i in chosen)
    return zip(names, chosen, strict=True)


def precision_of(rules: Rules, chosen: Precision | None) -> Precision | None:
    """Return the option `precision` with the `state_dtype` of the rules, which comes before it.

    Raises:
      ValueError: both depend on the parameter.
    """
    if not rules.having("state_dtype"):
        return chosen
    plain = chosen or Precision("float32", params="nearest")
    if not isinstance(plain.state, str):
        raise ValueError(
            "`precision` must be one format for all where `rules` have a `state_dtype`. "
            f"Received: {plain}."
        )
    pairs = zip(rules.patterns, rules.options, strict=True)
    own = {p: x.get("state_dtype", plain.state) for p, x in pairs if not x.get("freeze", False)}
    if chosen is None and set(own.values()) == {"float32"}:
        return None
    return dataclasses.replace(plain, state=own, rest=plain.state)
