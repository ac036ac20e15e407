"""The numbers of the complete tree, then the scalars: what a pass needs before its first leaf.

Where a norm is needed, the links before it that change single entries are computed once for the
norm and once again for the update.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optimize_loss._checks import InvalidType
from optimize_loss._engine.arrays import (
    Sums,
    joint_norm,
    square_unit,
    sum_of_squares,
    sums_of_squares,
)
from optimize_loss._engine.by_name import by_numbers
from optimize_loss._engine.health import Health, health
from optimize_loss._engine.kinds import Gate
from optimize_loss._engine.leaf import Leaf, Links, Stored, for_all, updated
from optimize_loss._engine.link import (
    Link,
    Numbers,
    State,
    factors,
    functions_of,
    multiplies,
    passes,
    varies,
)
from optimize_loss._engine.plan import Plan, Segment, lender
from optimize_loss._engine.precision import keys

# For leaves of these numbers, Σ|u|² of each.
Squares = Mapping[tuple[int, ...], list[Sums]]


class Call(NamedTuple):
    """What one call of `update` or `apply` was given; the same for all passes."""

    state: State
    numbers: Mapping[str, Mapping[str, jax.Array]]  # of each link, at this step
    judged: Callable[[], Mapping[str, jax.Array]]  # what a guard sees of scales and schedules
    entries: Mapping[str, Any]  # the links by name
    loss: Any
    weight: Any  # that the loss came with
    empty: jax.Array | None  # whether there was nothing in the batch, whose numbers mean nothing
    extra: Mapping[str, Any]  # for optax transformations
    step: jax.Array  # the number of updates made before this one, an int32


class Prepared(NamedTuple):
    """What a pass needs before its first leaf."""

    links: list[Links]  # of each leaf
    ks: list[tuple[Numbers, ...]]  # for each leaf, what each of its links needs
    shared: list[Numbers]  # for each link, what all of its leaves need
    memories: list[Numbers]  # for each link, its new memory
    squares: Squares  # of updates as they came to the pass


class Totals:
    """The totals of one pass, link after link.

    Links that only look, or multiply by a factor, need no pass of their own: the norm after them
    follows from the norms of the leaves before them.
    """

    def __init__(
        self,
        plan: Plan,
        segment: Segment,
        leaves: Sequence[Leaf],
        call: Call,
        squares: Squares,
    ) -> None:
        self.plan, self.segment, self.leaves, self.call = plan, segment, leaves, call
        self.links: list[Link] = [place.link for place in segment.places]
        self.own, self.owners = segment.own, plan.owners
        self.dtype = plan.params.dtype
        self.ks: list[dict[int, Numbers]] = [{} for _ in leaves]
        self.known = dict(squares)
        self.squares: dict[tuple[tuple[int, ...], ...], list[Sums]] = {
            ((), here): each for here, each in squares.items()
        }

    def prepared(self) -> Prepared:
        """Return what the leaf functions need, and the new memories."""
        shared, memories = list[Numbers](), list[Numbers]()
        for i in range(len(self.links)):
            k, memory = self._link(i)
            shared.append(k)
            memories.append(memory)
        links, ks = list[Links](), list[tuple[Numbers, ...]]()
        for n, own in enumerate(self.own):
            links.append(self._stored(n, own))
            ks.append(tuple([self.ks[n][i] for i in own]))
        return Prepared(links, ks, shared, memories, self.known)

    def _link(self, i: int) -> tuple[Numbers, Numbers]:
        """Compute the scalars of one link; return them, and its new memory."""
        link, place, step = self.links[i], self.segment.places[i], self.call.step
        total = self._total(i)
        state = self.call.state[place.name]
        old = {name: state[name] for name in place.memory}
        here, differs = self._here(i), varies(link)
        names = place.names(self.plan.params) if differs else ()
        k, new, each = dict[str, Any](), old, dict[str, Numbers]()
        for some, own in by_numbers(link, names, dict(self.call.numbers[place.name])):
            k, new = link.scalars(own, old, total, step)
            pairs = zip(some, link.for_each(some, k), strict=True)
            each |= {name: {**k, **mine} for name, mine in pairs}
        for n in here:
            self.ks[n][i] = self.owners[n].own(each) if differs else k
        if link.needs == "random_bits":
            self._draw(i, here, k["seed"])
        return k, self._remembered(link, k, old, new)

    def _draw(self, i: int, here: Sequence[int], seed: jax.Array) -> None:
        """Give a link what keys the random bits of its leaves."""
        draws = keys([self.owners[n] for n in here], "", seed, self.call.step)
        for n, draw in zip(here, draws, strict=True):
            self.ks[n][i] = {**self.ks[n][i], "draw": draw}

    def _total(self, i: int) -> Any:
        """Return what a link needs of the whole tree."""
        needs = self.links[i].needs
        if needs not in TOTALS:
            known = [name for name in TOTALS if name]
            raise InvalidType(
                f"`needs` of the link {self.segment.places[i].name!r} must be one of {known}. "
                f"Received: {needs!r}."
            )
        measure = TOTALS[needs]
        return None if measure is None else measure(self, i)

    def _remembered(self, link: Link, k: Numbers, old: Numbers, new: Numbers) -> Numbers:
        """Return the memory of a link: the old one where there was nothing in the batch.

        What weighs batches counts it.
        """
        new = {name: new[name].astype(x.dtype) for name, x in old.items()}
        empty = self.call.empty
        if empty is None or link.needs == "loss_and_weight":
            return new
        unseen = empty & k["open"] if isinstance(link, Gate) else empty
        return {name: jnp.where(unseen, old[name], x) for name, x in new.items()}

    def _here(self, i: int) -> list[int]:
        """Return the leaves that a link is for."""
        return [n for n, own in enumerate(self.own) if i in own]

    def _stored(self, n: int, which: Sequence[int]) -> Links:
        """Return some links of a leaf."""
        places, j = self.segment.places, self.plan.live[n]
        return tuple([Stored(places[i].link, places[i].codec(j)) for i in which])

    def _picked(self, n: int, which: Sequence[int]) -> tuple[Links, Leaf, tuple[Numbers, ...]]:
        """Return a leaf with some of its links."""
        leaf, own = self.leaves[n], self.own[n]
        at = [m for m, i in enumerate(own) if i in which]
        slots, of_slots = tuple([leaf.slots[m] for m in at]), tuple([leaf.keys[m] for m in at])
        mine = [own[m] for m in at]
        ks = tuple([self.ks[n][i] for i in mine])
        return self._stored(n, mine), leaf._replace(slots=slots, keys=of_slots), ks

    def _changing(self, place: int) -> list[int]:
        """Return the links before one that change updates, or what links behind them see."""
        classes = [type(link) for link in self.links[:place]]
        return [i for i, x in enumerate(classes) if not passes(x) or "before" in functions_of(x)]

    def global_norm(self, place: int) -> jax.Array:
        """Return √Σ|u|² of the updates that reach the link at `place`.

        No size of entries breaks it: see `joint_norm`.
        """
        if not (here := self._here(place)):
            return jnp.zeros((), self.dtype)
        changing, multipliers = self._taken_apart(place, here)
        prefixes = [self._picked(n, changing) for n in here]
        if not changing:  # of the updates as they came
            prefixes = [((), leaf._replace(factor=None), ()) for _, leaf, _ in prefixes]
        owners = [self.owners[n] for n in here]
        key = (tuple(changing), tuple(here))
        if key not in self.squares:
            self.squares[key] = for_all(_squares, self.dtype, prefixes, owners)
            if not changing:
                self.known[tuple(here)] = self.squares[key]

        def again() -> Sequence[jax.Array]:
            arguments = [(*p, x.plain) for p, x in zip(prefixes, self.squares[key], strict=True)]
            return for_all(_scaled_squares, self.dtype, arguments, owners)

        return joint_norm(self.squares[key], multipliers, again)

    def _taken_apart(self, place: int, here: Sequence[int]) -> tuple[list[int], list[jax.Array]]:
        """Return the links that must run before a norm, and by what to multiply it after them."""
        changing, multipliers = self._changing(place), list[jax.Array]()
        while changing and self._multiplies(changing[-1], here):
            multipliers = self._multipliers(changing.pop(), here) + multipliers
        gate = self.leaves[here[0]].factor
        if not changing and gate is not None:
            multipliers = [*self._sizes([gate]), *multipliers]
        return changing, multipliers

    def _multiplies(self, i: int, here: Sequence[int]) -> bool:
        """Return whether a link multiplies every leaf by one number, or passes its update."""
        link = self.links[i]
        if not multiplies(type(link)):
            return passes(type(link))
        if not varies(link):
            return True
        found = [self.ks[n][i] for n in here if self.owners[n].bucket and i in self.own[n]]
        shapes = (jax.eval_shape(functools.partial(factors, link), k) for k in found)
        return all(shape.shape == () for several in shapes for shape in several)

    def _multipliers(self, i: int, here: Sequence[int]) -> list[jax.Array]:
        """Return what a link multiplies by: numbers, or arrays of one for each leaf."""
        link, mine = self.links[i], [i in self.own[n] for n in here]
        if not multiplies(type(link)):
            return []
        if not varies(link) and all(mine):
            return self._sizes(factors(link, self.ks[here[0]][i]))
        each = [
            self._sizes(factors(link, self.ks[n][i])) if own else []
            for n, own in zip(here, mine, strict=True)
        ]
        one = jnp.ones((), self.dtype)
        return [jnp.stack(sizes) for sizes in itertools.zip_longest(*each, fillvalue=one)]

    def _sizes(self, found: Sequence[jax.Array]) -> list[jax.Array]:
        return [jnp.abs(x).astype(self.dtype) for x in found]

    def finite(self, place: int) -> jax.Array:
        """Return whether all entries of the updates that reach a link are finite."""
        changing, here = self._changing(place), self._here(place)
        prefixes = [self._picked(n, changing) for n in here]
        owners = [self.owners[n] for n in here]
        found = for_all(_strayed, self.dtype, prefixes, owners)
        finite = functools.reduce(jnp.add, found, jnp.zeros((), self.dtype)) == 0
        return finite if self.call.empty is None else self.call.empty | finite

    def health(self, place: int) -> Health:
        """Return what a guard judges by."""
        here = self._here(place)
        updates, owners = [self.leaves[n].update for n in here], [self.owners[n] for n in here]
        of_loss = (self.call.loss, self.call.weight)
        found = health(self.global_norm(place), of_loss, updates, owners, self.call.judged())
        return found.without(self.call.empty)

    def loss(self, place: int) -> jax.Array:
        """Return the loss of this step.

        Raises:
          ValueError: there is none.
        """
        if self.call.loss is None:
            raise ValueError(
                f"{self.links[place]!r} needs the loss: pass `value=loss` to `update`."
            )
        return jnp.asarray(self.call.loss, self.dtype)

    def loss_and_weight(self, place: int) -> tuple[Any, Any]:
        """Return the loss and its weight as they were given, None where there is none."""
        return self.call.loss, self.call.weight

    def learning_rate(self, place: int) -> jax.Array:
        """Return the rate of the one link that has one for the same parameters."""
        number = "learning_rate"
        owner = lender(self.call.entries, self.segment.places[place].name, number)
        return self.call.numbers[owner][number]


TOTALS: dict[str | None, Callable[[Totals, int], Any] | None] = {
    None: None,
    "random_bits": None,
    "stored_param": None,
    "global_norm": Totals.global_norm,
    "finite": Totals.finite,
    "health": Totals.health,
    "loss": Totals.loss,
    "loss_and_weight": Totals.loss_and_weight,
    "learning_rate": Totals.learning_rate,
}
"""The totals over all parameters that a link can need, by the name in its `needs`."""


@functools.partial(jax.jit, static_argnums=(0, 1))
def _strayed(links: Links, dtype: Any, leaf: Leaf, ks: tuple[Numbers, ...]) -> jax.Array:
    """Return 0 if all entries of an update are finite, else NaN, as ∞ - ∞ and NaN - NaN are."""
    # XLA on CPU would write `isfinite` out as an array, and forgets a NaN in the maximum.
    update = updated(links, leaf, ks)[0]
    return jnp.sum(jnp.abs(update - update)).astype(dtype)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _squares(links: Links, dtype: Any, leaf: Leaf, ks: tuple[Numbers, ...]) -> Sums:
    """Return Σ|u|² of one leaf, and those of scaled entries, as `sums_of_squares` does."""
    return sums_of_squares(updated(links, leaf, ks)[0], dtype)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _scaled_squares(
    links: Links, dtype: Any, leaf: Leaf, ks: tuple[Numbers, ...], squares: jax.Array
) -> jax.Array:
    """Return Σ|u|² of one leaf once more, of entries divided by its unit."""
    update = updated(links, leaf, ks)[0]
    unit = square_unit(squares).astype(jnp.finfo(update.dtype).dtype).astype(update.dtype)
    return sum_of_squares(update / unit).astype(dtype)
