"""The numbers of the whole tree, then the scalars: what a pass needs before its first leaf."""

import functools
import itertools
from collections.abc import MutableMapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optimize_loss._engine.arrays import (
    abs_squared,
    multiplied,
    norm,
    power_of_two,
    sqrt,
    sum_of_squares,
)
from optimize_loss._engine.health import Outlook, health
from optimize_loss._engine.leaf import PASS, Leaf, Links, Owner, for_all, update_behind
from optimize_loss._engine.link import Link, Numbers
from optimize_loss._engine.precision import keys

# For leaves of these numbers, Σ|u|² of each.
Squares = MutableMapping[tuple[int, ...], list[jax.Array]]


class Settings(NamedTuple):
    """What is the same for all parameters."""

    numbers: list[dict[str, jax.Array]]  # for each link, what its `scalars` receives
    memories: list[dict[str, jax.Array]]  # for each link, its memory for the whole tree
    step: jax.Array  # number of updates made before this one, an int32
    loss: jax.Array | None
    weight: jax.Array | None  # that the loss came with
    dtype: Any  # of numbers that are not one parameter's
    squares: Squares  # found by passes before, and by this one, of updates as they come to it
    outlook: Outlook  # what guards are told of the chain
    empty: jax.Array | None  # whether there was nothing in the batch, whose numbers mean nothing


class Norms:
    """The global norms at several places in a chain, with as few passes as possible.

    Links that only look, or multiply by a factor, need no pass of their own: the norm after them
    follows from the norms of the leaves before them.
    """

    def __init__(
        self,
        links: Links,
        own: Sequence[Links],
        owners: Sequence[Owner],
        leaves: Sequence[Leaf],
        settings: Settings,
    ) -> None:
        self.links, self.own, self.owners = links, own, owners
        self.leaves, self.dtype, self.known = leaves, settings.dtype, settings.squares
        self.squares: dict[tuple[tuple[int, ...], ...], list[jax.Array]] = {
            ((), here): parts for here, parts in settings.squares.items()
        }

    def before(
        self, place: int, here: Sequence[int], ks: Sequence[tuple[Numbers, ...]]
    ) -> jax.Array:
        """Return √Σ|u|² of the updates that reach the link at `place`.

        Where the sum of squares leaves the range of the dtype, as for float32 entries of 1e20 or
        1e-25, it is taken again of entries divided by a power of two, and only then.

        Args:
          place: the number of the link.
          here: the numbers of the leaves that it is for.
          ks: for each leaf, what the links before it need.
        """
        if not here:
            return jnp.zeros((), self.dtype)
        changing = [j for j in range(place) if not self.links[j].observes]
        factors: list[jax.Array] = []
        while changing and self._multiplies(changing[-1], here, ks):
            factors = self._factors(changing.pop(), here, ks) + factors
        prefixes = [picked(self.own[i], self.leaves[i], ks[i], changing) for i in here]
        owners = [self.owners[i] for i in here]
        key = (tuple(changing), tuple(here))
        if key not in self.squares:
            self.squares[key] = for_all(_squares, self.dtype, prefixes, owners)
            if not changing:
                self.known[tuple(here)] = self.squares[key]
        parts = self.squares[key]
        squares = jnp.concatenate(parts)
        factor = multiplied(jnp.ones((), self.dtype), factors)
        plain, total = jnp.sum(squares), jnp.sum(squares * (factor * factor))

        def rescaled() -> jax.Array:
            # A scale of its own for each leaf: XLA on CPU would write a shared one out as an array.
            arguments = [(*p, part) for p, part in zip(prefixes, parts, strict=True)]
            scaled = jnp.concatenate(for_all(_scaled_squares, self.dtype, arguments, owners))
            return norm(multiplied(sqrt(scaled) * _unit(squares), factors))

        low, high = jnp.minimum(plain, total), jnp.maximum(plain, total)
        in_range = (low > 2.0 ** -_limit(self.dtype)) & (high < jnp.inf)
        return jax.lax.cond(in_range, lambda: sqrt(total), rescaled)

    def _multiplies(self, j: int, here: Sequence[int], ks: Sequence[tuple[Numbers, ...]]) -> bool:
        """Return whether the link at `j` multiplies every leaf by one number."""
        link = self.links[j]
        if not link.multiplies or type(link).for_each is Link.for_each:
            return link.multiplies
        found = [ks[i][j] for i in here if self.owners[i].bucket and self.own[i][j] is not PASS]
        return all(factor.shape == () for k in found for factor in jax.eval_shape(link.factors, k))

    def _factors(
        self, j: int, here: Sequence[int], ks: Sequence[tuple[Numbers, ...]]
    ) -> list[jax.Array]:
        """Return what the link at `j` multiplies by: numbers, or arrays of one for each leaf."""
        link, own = self.links[j], [self.own[i][j] for i in here]
        if type(link).for_each is Link.for_each and PASS not in own:
            return self._sizes(link.factors(ks[here[0]][j]))
        each = [
            [] if mine is PASS else self._sizes(link.factors(ks[i][j]))
            for i, mine in zip(here, own, strict=True)
        ]
        one = jnp.ones((), self.dtype)
        return [jnp.stack(sizes) for sizes in itertools.zip_longest(*each, fillvalue=one)]

    def _sizes(self, factors: Sequence[jax.Array]) -> list[jax.Array]:
        return [jnp.abs(factor).astype(self.dtype) for factor in factors]


def _unit(squares: jax.Array) -> jax.Array:
    """Return by what to divide leaves whose sum of squares may have left the dtype's range."""
    limit = _limit(squares.dtype)
    return power_of_two(squares, limit, limit)


def _limit(dtype: Any) -> int:
    """Return the exponent of a power of two far above 1, by which squares can be divided."""
    return jnp.finfo(dtype).maxexp * 5 // 8


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


def picked(links: Links, leaf: Leaf, ks: tuple[Numbers, ...], which: Sequence[int]) -> Any:
    """Return the arguments of `_run` for some of the links."""
    slots = tuple(leaf.slots[j] for j in which)
    return tuple(links[j] for j in which), leaf._replace(slots=slots), tuple(ks[j] for j in which)


def prepare(
    links: Links,
    own: Sequence[Links],
    owners: Sequence[Owner],
    meant: Sequence[Sequence[str]],
    leaves: Sequence[Leaf],
    settings: Settings,
) -> tuple[list[tuple[Numbers, ...]], list[Numbers], list[dict[str, jax.Array]]]:
    """Compute the totals and the scalars, link after link.

    Args:
      links: the links.
      own: for each leaf the same, with `PASS` in the place of those that are not for it.
      owners: which parameters they are.
      meant: for each link the names of all parameters that it is for, also without gradient.
      leaves: the leaves.
      settings: what is the same for all.

    Returns:
      For each leaf, what the leaf function of each link needs; for each link, what all its
      leaves need, and its new memory.
    """
    ks: list[tuple[Numbers, ...]] = [() for _ in leaves]
    shared, memories = [], []
    norms = Norms(links, own, owners, leaves, settings)
    for i, link in enumerate(links):
        here = [j for j, mine in enumerate(own) if mine[i] is not PASS]
        total = None
        if link.measures:
            parts = (_measure(link, *picked(own[j], leaves[j], ks[j], range(i))) for j in here)
            total = _or_zero(_sum(parts, settings.dtype), settings.empty)
        elif link.needs == "global_norm":
            total = norms.before(i, here, ks)
        elif link.needs == "health":
            updates, mine = [leaves[j].update for j in here], [owners[j] for j in here]
            parts = (settings.loss, settings.weight)
            found = health(norms.before(i, here, ks), parts, updates, mine)
            total = found.without(settings.empty)._replace(outlook=settings.outlook)
        elif link.needs == "loss":
            if settings.loss is None:
                raise ValueError(f"{link!r} needs the loss: pass `value=loss` to `update`.")
            total = jnp.asarray(settings.loss, settings.dtype)
        elif link.needs == "loss_and_weight":
            total = settings.loss, settings.weight
        k, memory = link.scalars(settings.numbers[i], settings.memories[i], total, settings.step)
        new = {m: memory[m].astype(old.dtype) for m, old in settings.memories[i].items()}
        memories.append(_remembered(link, k, settings.memories[i], new, settings.empty))
        shared.append(k)
        each = dict(zip(meant[i], link.for_each(meant[i], k), strict=True))
        mine = {j: {**k, **owners[j].own(each)} for j in here}
        if link.draws:
            draws = keys([owners[j] for j in here], "", k["seed"], settings.step)
            mine = {j: {**mine[j], "draw": x} for j, x in zip(here, draws, strict=True)}
        ks = [(*old, mine.get(j, {})) for j, old in enumerate(ks)]
    return ks, shared, memories


@functools.partial(jax.jit, static_argnums=(0, 1))
def _measure(link: Link, links: Links, leaf: Leaf, ks: tuple[Numbers, ...]) -> jax.Array:
    return link.measure(update_behind(links, leaf, ks))


def _sum(parts: Any, dtype: Any) -> jax.Array:
    return functools.reduce(jnp.add, (p.astype(dtype) for p in parts), jnp.zeros((), dtype))


def _or_zero(total: jax.Array, empty: jax.Array | None) -> jax.Array:
    """Return the sum of what was measured; 0 where there was nothing in the batch."""
    return total if empty is None else jnp.where(empty, 0, total)


def _remembered(
    link: Link, k: Numbers, old: Numbers, new: Numbers, empty: jax.Array | None
) -> dict[str, jax.Array]:
    """Return the memory of a link: the old one where there was nothing in the batch.

    What weighs batches counts it, and what only shows a norm shows it.
    """
    shows = link.observes and link.needs == "global_norm"
    if empty is None or shows or link.needs == "loss_and_weight":
        return dict(new)
    unseen = empty & k["open"] if link.gates else empty
    return {name: jnp.where(unseen, old[name], x) for name, x in new.items()}
