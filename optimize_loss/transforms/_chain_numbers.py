"""The hyperparameters of all links of a chain: by name, and at a step."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from optimize_loss._checks import nearest
from optimize_loss.transforms import _numbers
from optimize_loss.transforms._base import Link, Numbers, number_rules
from optimize_loss.transforms._pass import State
from optimize_loss.transforms._places import lender, linked


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

    def at_step(self, state: State, step: Any) -> dict[str, Numbers]:
        """Return for each link its numbers at this step, with those of others that it sees."""
        own = self._own(state, step, self.links)

        def seen(name: str, link: Link) -> Numbers:
            lenders = {number: lender(self.entries, name, number) for number in link.borrows}
            borrowed = {number: own[owner][number] for number, owner in lenders.items()}
            if not link.judges:
                return borrowed
            return {**borrowed, **self._scale_seen(state, step), **self._schedules_seen(own)}

        return {name: {**own[name], **seen(name, link)} for name, link in self.links.items()}

    def loss_scale(self, state: State, step: Any) -> jax.Array | None:
        """Return what the loss must be multiplied by before its gradients come here, or None."""
        scales = [*self.named("loss_scale", state, step).values(), *self._dynamic_scales(state)]
        return functools.reduce(jnp.multiply, scales) if scales else None

    def _declared(self, owner: str, number: str) -> bool:
        """Return whether a number is a field of its link, and not named after a parameter."""
        return number in number_rules(type(self.links[owner]))

    def _own(self, state: State, step: Any, owners: Any) -> dict[str, Numbers]:
        """Return the numbers of links at this step, by link, multiplied by what lowers them."""
        lowered = self._lowered(state)
        links = self.links
        return {n: lowered(_numbers.all_at_step(n, links[n], state[n], step)) for n in owners}

    def _lowered(self, state: State) -> Callable[[Numbers], Numbers]:
        """Return the function that multiplies the numbers of a link by what lowers them."""
        scales = [
            (number, state[name]["scale"])
            for name, link in self.links.items()
            for number in link.lowers
        ]

        def lowered(numbers: Numbers) -> Numbers:
            for name, scale in scales:
                if name in numbers:
                    numbers = {**numbers, name: numbers[name] * scale.astype(numbers[name].dtype)}
            return numbers

        return lowered

    def _dynamic_scales(self, state: State) -> list[jax.Array]:
        """Return the loss scales that links keep in their memory."""
        keeps = [name for name, link in self.links.items() if "loss_scale" in link.memory()]
        return [state[name]["loss_scale"] for name in keeps]

    def _scale_seen(self, state: State, step: Any) -> dict[str, jax.Array]:
        """Return the loss scale of all links, and whether it is one that can shrink."""
        scale = self.loss_scale(state, step)
        dynamic = [x > 1 for x in self._dynamic_scales(state)]
        can_shrink = {"scale_shrinks": functools.reduce(jnp.logical_or, dynamic)} if dynamic else {}
        return {} if scale is None else {"loss_scale": scale, **can_shrink}

    def _schedules_seen(self, own: dict[str, Numbers]) -> dict[str, jax.Array]:
        """Return whether every schedule has a value that its number may have."""
        scheduled = [
            jnp.all(jnp.isfinite(own[name][number]))
            for name, link in self.links.items()
            for number, value in link.numbers().items()
            if callable(value)
        ]
        return {"schedules_hold": jnp.all(jnp.stack(scheduled))} if scheduled else {}
