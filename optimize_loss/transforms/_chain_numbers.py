"""The hyperparameters of all links of a chain: by name, and at a step."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from optimize_loss._checks import nearest
from optimize_loss.transforms import _numbers
from optimize_loss.transforms._base import Link, Numbers, number_rules
from optimize_loss.transforms._health import Outlook
from optimize_loss.transforms._loss_scale import DivideByDynamicLossScale, LossScale
from optimize_loss.transforms._pass import State
from optimize_loss.transforms._places import has_rate, lender, linked
from optimize_loss.transforms._plateau import ReduceOnPlateau


@dataclasses.dataclass(frozen=True)
class ChainNumbers:
    """The hyperparameters of links.

    Attributes:
      entries: the links by name, those for some parameters with which these are.
    """

    entries: dict[str, Any]

    @property
    def links(self) -> dict[str, Link]:
        """The links of ours, by name."""
        return {name: link for name, link in linked(self.entries) if isinstance(link, Link)}

    def all(self) -> Iterator[tuple[str, str]]:
        """Yield the link and the name of every hyperparameter."""
        for name, link in self.links.items():
            yield from ((name, number) for number in link.numbers())

    def find(self, name: str) -> tuple[str, str]:
        """Return the link and the number that `name`, or `link/number`, stands for.

        Raises:
          ValueError: there is none, or more than one.
        """
        known = list(self.all())
        found = [p for p in known if name == "/".join(p) or (name == p[1] and self._declared(*p))]
        if len(found) == 1:
            return found[0]
        full = ["/".join(pair) for pair in found or known]
        if found:
            raise ValueError(f"`{name}` is a number of several links: name one of {full}.")
        if not known:
            raise ValueError(f"No link has a number `{name}`: those of optax are fixed when built.")
        near = nearest(name, [*full, *(number for _, number in known)])
        raise ValueError(f"No link has a number `{name}`. Nearest: {near}. All: {full}.")

    def replaced(self, state: State, values: dict[str, Any]) -> State:
        """Return the state with other values, by name; None gives back that of the link."""
        state = dict(state)
        for name, value in values.items():
            owner, number = self.find(name)
            link, mine = self.links[owner], state[owner]
            field = link.numbers()[number]
            if value is not None and isinstance(field, Tracer):
                raise ValueError(
                    f"`{name}` cannot be set: the link was built with a traced value of it, which "
                    "each update takes. Build with a number, and set that in the state."
                )
            new = _numbers.replaced(name, value, field, link.rule(number), mine[number])
            state[owner] = {**mine, number: new}
        return state

    def traced(self) -> list[str]:
        """Return which numbers the links were given as traced values, as `link/number`."""
        return [
            f"{name}/{number}"
            for name, link in self.links.items()
            for number, value in link.numbers().items()
            if isinstance(value, Tracer)
        ]

    def given(self, state: State, names: Iterable[str]) -> State:
        """Return the state with the values that the links were given for some numbers."""
        return self.replaced(state, dict.fromkeys(names))

    def named(self, name: str, state: State, step: Any) -> State:
        """Return the hyperparameter `name` of every link that has it, at this step, by link."""
        owners = [owner for owner, n in self.all() if n == name and self._declared(owner, n)]
        own = self._own(state, step, owners)
        return {owner: own[owner][name] for owner in owners}

    def at_step(self, state: State, step: Any) -> tuple[dict[str, Numbers], Outlook]:
        """Return for each link its numbers at this step, with those of others that it borrows.

        The second result is what guards are told beside these.
        """
        own = self._own(state, step, self.links)

        def borrowed(name: str, link: Link) -> Numbers:
            lenders = {number: lender(self.entries, name, number) for number in link.borrows}
            return {number: own[owner][number] for number, owner in lenders.items()}

        judged = any(link.needs == "health" for link in self.links.values())
        outlook = self._outlook(state, own) if judged else Outlook()
        return {n: {**own[n], **borrowed(n, x)} for n, x in self.links.items()}, outlook

    def loss_scale(self, state: State, step: Any) -> jax.Array | None:
        """Return what the loss must be multiplied by before its gradients come here, or None."""
        scaling = [name for name, link in self.links.items() if isinstance(link, LossScale)]
        return self._loss_scale(state, self._own(state, step, scaling))

    def dynamic_loss_scale(self, state: State) -> jax.Array | None:
        """Return the product of the loss scales that change by themselves, or None."""
        scales = list(self._scales(DivideByDynamicLossScale, state, {}))
        return functools.reduce(jnp.multiply, scales) if scales else None

    def _declared(self, owner: str, number: str) -> bool:
        """Return whether a number is a field of its link, and not named after a parameter."""
        return number in number_rules(type(self.links[owner]))

    def _own(self, state: State, step: Any, owners: Any) -> dict[str, Numbers]:
        """Return the numbers of links at this step, by link, the rates lowered by plateaus."""
        links = self.links
        scales = [
            link.scale(state[name])
            for name, link in links.items()
            if isinstance(link, ReduceOnPlateau)
        ]
        own = {n: _numbers.all_at_step(n, links[n], state[n], step) for n in owners}
        return {n: _lowered(x, scales) if has_rate(links[n]) else x for n, x in own.items()}

    def _scales(self, kind: type[LossScale], state: State, own: Any) -> Iterator[jax.Array]:
        """Yield the loss scale of each link of a kind, from the numbers of links at this step."""
        for name, link in self.links.items():
            if isinstance(link, kind):
                yield link.factor_of_loss(own.get(name, {}), state[name])

    def _loss_scale(self, state: State, own: dict[str, Numbers]) -> jax.Array | None:
        """Return the product of all loss scales, from the numbers of links at this step."""
        scales = list(self._scales(LossScale, state, own))
        return functools.reduce(jnp.multiply, scales) if scales else None

    def _outlook(self, state: State, own: dict[str, Numbers]) -> Outlook:
        """Return what guards are told, from the numbers of links at this step."""
        dynamic = [x > 1 for x in self._scales(DivideByDynamicLossScale, state, own)]
        scheduled = [
            jnp.all(jnp.isfinite(own[name][number]))
            for name, link in self.links.items()
            for number, value in link.numbers().items()
            if callable(value)
        ]
        outlook = Outlook(self._loss_scale(state, own))
        if dynamic:
            outlook = outlook._replace(scale_shrinks=functools.reduce(jnp.logical_or, dynamic))
        if scheduled:
            outlook = outlook._replace(schedules_hold=jnp.all(jnp.stack(scheduled)))
        return outlook


def _lowered(numbers: Numbers, scales: list[jax.Array]) -> Numbers:
    """Return the numbers of a link, its learning rate multiplied by what lowers it."""
    rate = numbers["learning_rate"]
    for scale in scales:
        rate = rate * scale.astype(rate.dtype)
    return {**numbers, "learning_rate": rate}
