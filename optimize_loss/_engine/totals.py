"""The numbers of the whole tree, then the scalars: what a pass needs before its first leaf.

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
    abs_squared,
    multiplied,
    norm,
    power_of_two,
    sqrt,
    sum_of_squares,
)
from optimize_loss._engine.by_name import by_numbers
from optimize_loss._engine.health import Health, health
from optimize_loss._engine.kinds import Gate
from optimize_loss._engine.leaf import Leaf, Links, for_all, update_behind
from optimize_loss._engine.link import (
    Link,
    Numbers,
    State,
    factors,
    multiplies,
    overrides,
    passes,
    varies,
)
from optimize_loss._engine.order import lender
from optimize_loss._engine.plan import Plan, Segment, parts
from optimize_loss._engine.precision import keys

# For leaves of these numbers, Σ|u|² of each.
Squares = Mapping[tuple[int, ...], list[jax.Array]]


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

    @property
    def step(self) -> jax.Array:
        """The number of updates made before this one, an int32."""
        return self.state["step"]


class Prepared(NamedTuple):
    """What a pass needs before its first leaf."""

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
        self.segment, self.leaves, self.call = segment, leaves, call
        self.links: list[Link] = [place.link for place in segment.places]
        self.own = [segment.own[j] for j in plan.live]
        self.owners = plan.owners
        self.meant = [place.names(plan.params) for place in segment.places]
        self.dtype = plan.params.dtype
        self.ks: list[dict[int, Numbers]] = [{} for _ in leaves]
        self.known = dict(squares)
        self.squares: dict[tuple[tuple[int, ...], ...], list[jax.Array]] = {
            ((), here): each for here, each in squares.items()
        }

    def prepared(self) -> Prepared:
        """Return what the leaf functions need, and the new memories."""
        found = [self._link(i) for i in range(len(self.links))]
        shared, memories = map(list, zip(*found, strict=True))
        ks = [tuple(k[i] for i in own) for k, own in zip(self.ks, self.own, strict=True)]
        return Prepared(ks, shared, memories, self.known)

    def _link(self, i: int) -> tuple[Numbers, Numbers]:
        """Compute the scalars of one link; return them, and its new memory."""
        link, name = self.links[i], self.segment.places[i].name
        if link.needs not in TOTALS:
            known = [needs for needs in TOTALS if needs]
            raise InvalidType(
                f"`needs` of the link {name!r} must be one of {known}. Received: {link.needs!r}."
            )
        total = TOTALS[link.needs](self, i)
        old = parts(link, self.call.state[name]).memory
        here, numbers = self._here(i), dict(self.call.numbers[name])
        k, memory, each = dict[str, Any](), old, dict[str, Numbers]()
        for names, own in by_numbers(link, self.meant[i], numbers):
            k, memory = link.scalars(own, old, total, self.call.step)
            pairs = zip(names, link.for_each(names, k), strict=True)
            each |= {name: {**k, **mine} for name, mine in pairs}
        for j in here:
            self.ks[j][i] = self.owners[j].own(each)
        if link.needs == "random_bits":
            draws = keys([self.owners[j] for j in here], "", k["seed"], self.call.step)
            for j, draw in zip(here, draws, strict=True):
                self.ks[j][i] = {**self.ks[j][i], "draw": draw}
        new = {m: memory[m].astype(x.dtype) for m, x in old.items()}
        return k, self._remembered(link, k, old, new)

    def _remembered(self, link: Link, k: Numbers, old: Numbers, new: Numbers) -> Numbers:
        """Return the memory of a link: the old one where there was nothing in the batch.

        What weighs batches counts it.
        """
        empty = self.call.empty
        if empty is None or link.needs == "loss_and_weight":
            return new
        unseen = empty & k["open"] if isinstance(link, Gate) else empty
        return {name: jnp.where(unseen, old[name], x) for name, x in new.items()}

    def _here(self, i: int) -> list[int]:
        """Return the leaves that a link is for."""
        return [j for j, own in enumerate(self.own) if i in own]

    def _picked(self, j: int, which: Sequence[int]) -> tuple[Links, Leaf, tuple[Numbers, ...]]:
        """Return a leaf with some of its links."""
        own = self.own[j]
        mine = [i for i in own if i in which]
        leaf = self.leaves[j]._replace(
            slots=tuple(self.leaves[j].slots[own.index(i)] for i in mine)
        )
        return tuple(self.links[i] for i in mine), leaf, tuple(self.ks[j][i] for i in mine)

    def _as_it_came(self, j: int) -> Leaf:
        """Return a leaf without any link, whose update is as it came to the pass."""
        return self.leaves[j]._replace(slots=(), factor=None)

    def _changing(self, place: int) -> list[int]:
        """Return the links before one that change updates, or what links behind them see."""
        before = self.links[:place]
        return [i for i, x in enumerate(before) if not passes(x) or overrides(x, "before")]

    def global_norm(self, place: int) -> jax.Array:
        """Return √Σ|u|² of the updates that reach the link at `place`.

        Where the sum of squares leaves the range of the dtype, as for float32 entries of 1e20 or
        1e-25, it is taken again of entries divided by a power of two, and only then.
        """
        if not (here := self._here(place)):
            return jnp.zeros((), self.dtype)
        changing, multipliers = self._changing(place), list[jax.Array]()
        while changing and (passes(self.links[i := changing[-1]]) or self._multiplies(i, here)):
            changing.pop()
            multipliers = self._multipliers(i, here) + multipliers
        gate = self.leaves[here[0]].factor
        if not changing and gate is not None:
            multipliers = [*self._sizes([gate]), *multipliers]
        prefixes = [
            self._picked(j, changing) if changing else ((), self._as_it_came(j), ()) for j in here
        ]
        owners = [self.owners[j] for j in here]
        key = (tuple(changing), tuple(here))
        if key not in self.squares:
            self.squares[key] = for_all(_squares, self.dtype, prefixes, owners)
            if not changing:
                self.known[tuple(here)] = self.squares[key]
        each = self.squares[key]
        squares = jnp.concatenate(each)
        factor = multiplied(jnp.ones((), self.dtype), multipliers)
        plain, total = jnp.sum(squares), jnp.sum(squares * (factor * factor))

        def rescaled() -> jax.Array:
            # A scale of its own for each leaf: XLA on CPU would write a shared one out as an array.
            arguments = [(*p, part) for p, part in zip(prefixes, each, strict=True)]
            scaled = jnp.concatenate(for_all(_scaled_squares, self.dtype, arguments, owners))
            return norm(multiplied(sqrt(scaled) * _unit(squares), multipliers))

        low, high = jnp.minimum(plain, total), jnp.maximum(plain, total)
        in_range = (low > 2.0 ** -_limit(self.dtype)) & (high < jnp.inf)
        return jax.lax.cond(in_range, lambda: sqrt(total), rescaled)

    def _multiplies(self, i: int, here: Sequence[int]) -> bool:
        """Return whether a link multiplies every leaf by one number."""
        link = self.links[i]
        if not multiplies(link) or not varies(link):
            return multiplies(link)
        found = [self.ks[j][i] for j in here if self.owners[j].bucket and i in self.own[j]]
        shapes = (jax.eval_shape(functools.partial(factors, link), k) for k in found)
        return all(shape.shape == () for several in shapes for shape in several)

    def _multipliers(self, i: int, here: Sequence[int]) -> list[jax.Array]:
        """Return what a link multiplies by: numbers, or arrays of one for each leaf."""
        link, mine = self.links[i], [i in self.own[j] for j in here]
        if not multiplies(link):
            return []
        if not varies(link) and all(mine):
            return self._sizes(factors(link, self.ks[here[0]][i]))
        each = [
            self._sizes(factors(link, self.ks[j][i])) if own else []
            for j, own in zip(here, mine, strict=True)
        ]
        one = jnp.ones((), self.dtype)
        return [jnp.stack(sizes) for sizes in itertools.zip_longest(*each, fillvalue=one)]

    def _sizes(self, found: Sequence[jax.Array]) -> list[jax.Array]:
        return [jnp.abs(x).astype(self.dtype) for x in found]

    def finite(self, place: int) -> jax.Array:
        """Return whether all entries of the updates that reach a link are finite."""
        changing = self._changing(place)
        prefixes = [self._picked(j, changing) for j in self._here(place)]
        owners = [self.owners[j] for j in self._here(place)]
        found = for_all(_strayed, self.dtype, prefixes, owners)
        finite = functools.reduce(jnp.add, found, jnp.zeros((), self.dtype)) == 0
        return finite if self.call.empty is None else self.call.empty | finite

    def health(self, place: int) -> Health:
        """Return what a guard judges by."""
        here = self._here(place)
        updates, owners = [self.leaves[j].update for j in here], [self.owners[j] for j in here]
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


TOTALS: dict[str | None, Callable[[Totals, int], Any]] = {
    None: lambda totals, place: None,
    "random_bits": lambda totals, place: None,
    "global_norm": Totals.global_norm,
    "finite": Totals.finite,
    "health": Totals.health,
    "loss": Totals.loss,
    "loss_and_weight": Totals.loss_and_weight,
    "learning_rate": Totals.learning_rate,
}
"""What a link can need of the whole tree, by the name in its `needs`."""


@functools.partial(jax.jit, static_argnums=(0, 1))
def _strayed(links: Links, dtype: Any, leaf: Leaf, ks: tuple[Numbers, ...]) -> jax.Array:
    """Return 0 if all entries of an update are finite, else NaN, as ∞ - ∞ and NaN - NaN are."""
    # XLA on CPU would write `isfinite` out as an array, and forgets a NaN in the maximum.
    update = update_behind(links, leaf, ks)
    return jnp.sum(jnp.abs(update - update)).astype(dtype)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _squares(links: Links, dtype: Any, leaf: Leaf, ks: tuple[Numbers, ...]) -> jax.Array:
    """Return Σ|u|² of one leaf, of shape (1,)."""
    return jnp.sum(abs_squared(update_behind(links, leaf, ks))).astype(dtype)[None]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _scaled_squares(
    links: Links, dtype: Any, leaf: Leaf, ks: tuple[Numbers, ...], squares: jax.Array
) -> jax.Array:
    """Return Σ|u|² of one leaf, of shape (1,), once more, of entries divided by its unit."""
    update = update_behind(links, leaf, ks)
    unit = _unit(squares)[0].astype(jnp.finfo(update.dtype).dtype).astype(update.dtype)
    return sum_of_squares(update / unit).astype(dtype)[None]


def _unit(squares: jax.Array) -> jax.Array:
    """Return by what to divide leaves whose sum of squares may have left the dtype's range."""
    limit = _limit(squares.dtype)
    return power_of_two(squares, limit, limit)


def _limit(dtype: Any) -> int:
    """Return the exponent of a power of two far above 1, by which squares can be divided."""
    return jnp.finfo(dtype).maxexp * 5 // 8
