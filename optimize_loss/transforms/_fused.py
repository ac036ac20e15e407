"""One pass: first the numbers of the whole tree, then the scalars, then one function per leaf.

A clipped or noisy copy of the gradients is never stored. Where a norm is needed, the elementwise
links before it are computed once for the norm and once again for the update.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from optimize_loss._checks import InvalidType, TreeMismatch
from optimize_loss.transforms._base import Link, Numbers, abs_squared, compute_dtype, norm, sqrt
from optimize_loss.transforms._bucket import Members
from optimize_loss.transforms._health import health
from optimize_loss.transforms._precision import Encoded, keys

Slots = dict[str, jax.Array]
Links = tuple[Link, ...]

GROUP = 16  # leaves in a call


Wanted = Literal["params", "updates", "rest"]

# For leaves of these numbers, Σ|u|² of each.
Squares = MutableMapping[tuple[int, ...], list[jax.Array]]


class Leaf(NamedTuple):
    """One parameter on its way through the links."""

    update: jax.Array  # its gradient
    param: jax.Array  # as the first of the links sees it
    start: jax.Array | None  # as it is stored, if links of an earlier pass have moved it
    slots: tuple[Slots | Encoded, ...]  # for each link

    @property
    def dtype(self) -> Any:
        """The dtype in which the parameter is stored."""
        return (self.param if self.start is None else self.start).dtype


class Owner(NamedTuple):
    """The parameter that a leaf is, or those in it."""

    names: tuple[str, ...]
    bucket: Members | None

    def __str__(self) -> str:
        first, *rest = map(repr, self.names)
        return f"the parameters {', '.join((first, *rest))}" if rest else f"the parameter {first}"

    def own(self, each: dict[str, Numbers]) -> Numbers:
        """Return what is its own, from that of each parameter by name."""
        if self.bucket is None:
            return each[self.names[0]]
        first, *_ = found = [each[name] for name in self.names]
        return {key: self.bucket.spread([numbers[key] for numbers in found]) for key in first}


class Settings(NamedTuple):
    """What is the same for all parameters."""

    numbers: list[dict[str, jax.Array]]  # for each link, what its `scalars` receives
    memories: list[dict[str, jax.Array]]  # for each link, its memory for the whole tree
    step: jax.Array  # number of updates made before this one, an int32
    loss: jax.Array | None
    weight: jax.Array | None  # that the loss came with
    dtype: Any  # of numbers that are not one parameter's
    squares: Squares  # found by passes before, and by this one, of updates as they come to it


@dataclasses.dataclass(frozen=True)
class Pass(Link):
    """Stands in the place of a link that is not for this parameter."""

    observes = True


PASS = Pass()


@dataclasses.dataclass(frozen=True)
class Behind(Link):
    """Stands at the head of the pass behind a gate, and multiplies by the gate's factor there."""

    gate: Link

    def factor(self, k):
        """Return the factor of the gate."""
        return self.gate.factor(k)


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
    norms = _Norms(links, own, owners, leaves, settings)
    for i, link in enumerate(links):
        here = [j for j, mine in enumerate(own) if mine[i] is not PASS]
        total = None
        if link.measures:
            parts = (_measure(link, *_pick(own[j], leaves[j], ks[j], range(i))) for j in here)
            total = _sum(parts, settings.dtype)
        elif link.needs == "global_norm":
            total = norms.before(i, here, ks)
        elif link.needs == "health":
            updates, mine = [leaves[j].update for j in here], [owners[j] for j in here]
            parts = (settings.loss, settings.weight)
            total = health(norms.before(i, here, ks), parts, updates, mine)
        elif link.needs == "loss":
            if settings.loss is None:
                raise ValueError(f"{link!r} needs the loss: pass `value=loss` to `update`.")
            total = jnp.asarray(settings.loss, settings.dtype)
        elif link.needs == "weight" and settings.weight is not None:
            total = jnp.asarray(settings.weight, settings.dtype)
        k, memory = link.scalars(settings.numbers[i], settings.memories[i], total, settings.step)
        memories.append({m: memory[m].astype(old.dtype) for m, old in settings.memories[i].items()})
        shared.append(k)
        each = dict(zip(meant[i], link.for_each(meant[i], k), strict=True))
        mine = {j: {**k, **owners[j].own(each)} for j in here}
        if link.draws:
            draws = keys([owners[j] for j in here], "", k["seed"], settings.step)
            mine = {j: {**mine[j], "draw": x} for j, x in zip(here, draws, strict=True)}
        ks = [(*old, mine.get(j, {})) for j, old in enumerate(ks)]
    return ks, shared, memories


@functools.partial(jax.jit, static_argnums=(0, 1))
def run_leaf(
    links: Links, wanted: Wanted, leaf: Leaf, ks: tuple[Numbers, ...]
) -> tuple[jax.Array, jax.Array | None, list[Slots]]:
    """Run all links over one parameter; traced once per distinct shape.

    Returns:
      What is wanted: for `params` the new parameter, for `updates` what to add to it as it was
      before any link moved it, for `rest` the update so far, as it came or in float32 or wider.
      Then the parameter as the links behind see it, in float32 or wider, if a link of these has
      moved it for them; and the new slots.
    """
    moved, update, slots = _run(links, leaf, ks, more=wanted == "rest")
    if wanted == "rest":
        is_same = all(link.observes for link in links)
        was_moved = any(link.moves for link in links)
        return leaf.update if is_same else update, moved if was_moved else None, slots
    if wanted == "params":
        update = moved + update
    elif leaf.start is not None or any(_moved(links)):
        start = leaf.param if leaf.start is None else leaf.start
        update = update + (moved - start.astype(update.dtype))
    return update.astype(leaf.dtype), None, slots


def averaged_leaf(link: Link, param: jax.Array, slots: Slots, state: Numbers) -> jax.Array:
    """Return one parameter as `link` averages it, in the parameter's dtype."""
    _check_slots(link, slots, param)
    dtype = compute_dtype(param.dtype)
    numbers = _widened({name: state[name] for name in link.numbers()}, dtype)
    return link.averaged(param.astype(dtype), _widened(slots, dtype), numbers).astype(param.dtype)


def _run(
    links: Links, leaf: Leaf, ks: tuple[Numbers, ...], more: bool = False
) -> tuple[jax.Array, jax.Array, list[Slots]]:
    """Return the parameter as it was moved, its update, and the new slots.

    Where no link behind reads the parameter, a move is kept apart and added to the update: the
    sum is then rounded once. `more` tells that links follow which are not among these.
    """
    dtype = compute_dtype(leaf.param.dtype)
    update, param = leaf.update.astype(dtype), leaf.param.astype(dtype)
    start = param if leaf.start is None else leaf.start.astype(dtype)
    moved, move, new_slots = _moved(links), None, []
    for i, (link, old, given) in enumerate(zip(links, leaf.slots, ks, strict=True)):
        k = _widened(given, dtype)
        try:
            if link.needs_stored or link.scales_moves:
                update, move = update if move is None else update + move, None
            if link.needs_stored:
                update = link.rounded(update, param, leaf.dtype, k)
            with _promotion(dtype):
                run = functools.partial(_run_link, link, update, param, k, leaf.param)
                update, new = old.run(run) if isinstance(old, Encoded) else run(old)
                if link.moves:
                    move = link.move(param, k)
            if link.scales_moves and param is not start:
                shift = param - start
                update = update + (link.leaf(shift, old, param, k)[0] - shift)
            if move is not None and (more or moved[i]):
                param, move = param + move, None
        except Exception as error:
            error.add_note(f"This happened in the link {link!r}.")
            raise
        new_slots.append(new)
    return param, (update if move is None else update + move).astype(dtype), new_slots


def _run_link(
    link: Link, update: jax.Array, param: jax.Array, k: Numbers, stored: jax.Array, slots: Slots
) -> tuple[jax.Array, Slots]:
    """Return what the leaf function of a link returns, if all has the right form."""
    _check_slots(link, slots, stored)
    return _check_result(link.leaf(update, _widened(slots, param.dtype), param, k), param, slots)


def _moved(links: Links) -> list[bool]:
    """Return for each link whether it moves the parameter before a link that reads it."""
    reads = [(link.reads_params or link.moves) and not link.needs_stored for link in links]
    return [link.moves and any(reads[i + 1 :]) for i, link in enumerate(links)]


def _promotion(dtype: Any) -> contextlib.AbstractContextManager[Any]:
    """Let complex numbers and their real absolute values meet; nothing else is ever promoted."""
    is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
    return jax.numpy_dtype_promotion("standard") if is_complex else contextlib.nullcontext()


def _check_result(result: Any, param: jax.Array, old: Slots) -> tuple[jax.Array, Slots]:
    """Return what a leaf function returned, its slots in their dtypes, if it has the right form."""
    if not isinstance(result, tuple) or len(result) != 2:
        raise InvalidType(f"`leaf` must return (update, slots). Received: {result!r}.")
    update, new = result
    if jnp.shape(update) != param.shape:
        raise TreeMismatch(
            f"`leaf` must return an update of the parameter's shape {param.shape}. "
            f"Received: shape {jnp.shape(update)}."
        )
    if set(new) != set(old):
        raise TreeMismatch(f"`leaf` must return the slots {sorted(old)}. Received: {sorted(new)}.")
    return update, {name: _stored(name, new[name], slot) for name, slot in old.items()}


def _check_slots(link: Link, slots: Slots, param: jax.Array) -> None:
    """Raise unless the slots are those that the link would make for this parameter."""
    made = {name: s.shape for name, s in jax.eval_shape(link.slots, param).items()}
    came = {name: s.shape for name, s in slots.items()}
    if made != came:
        raise TreeMismatch(
            f"The state of a parameter of shape {param.shape} must have slots of shapes {made}. "
            f"Received: {came}. Does the state belong to other parameters, or to other options?"
        )


def _stored(name: str, new: jax.Array, old: jax.Array) -> jax.Array:
    if new.shape != old.shape:
        raise TreeMismatch(f"The slot {name!r} must keep its shape {old.shape}. Got: {new.shape}.")
    return new.astype(old.dtype)


def _widened(values: Numbers, dtype: Any) -> dict[str, Any]:
    """Return slots or scalars in the dtype of the computation; integers stay as they are."""

    def cast(x: jax.Array) -> jax.Array:
        if jnp.issubdtype(x.dtype, jnp.complexfloating):
            return x.astype(dtype)
        return x.astype(jnp.finfo(dtype).dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return {name: jax.tree.map(cast, value) for name, value in values.items()}


def _pick(links: Links, leaf: Leaf, ks: tuple[Numbers, ...], which: Sequence[int]) -> Any:
    """Return the arguments of `_run` for some of the links."""
    slots = tuple(leaf.slots[j] for j in which)
    return tuple(links[j] for j in which), leaf._replace(slots=slots), tuple(ks[j] for j in which)


def _update_behind(links: Links, leaf: Leaf, ks: tuple[Numbers, ...]) -> jax.Array:
    """Return the update as a link behind these sees it, without what they move."""
    return _run(links, leaf, ks, more=True)[1]


def _sum(parts: Any, dtype: Any) -> jax.Array:
    return functools.reduce(jnp.add, (p.astype(dtype) for p in parts), jnp.zeros((), dtype))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _measure(link: Link, links: Links, leaf: Leaf, ks: tuple[Numbers, ...]) -> jax.Array:
    return link.measure(_update_behind(links, leaf, ks))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _squares(links: Links, dtype: Any, leaf: Leaf, ks: tuple[Numbers, ...]) -> jax.Array:
    """Return Σ|u|² of one leaf, of shape (1,)."""
    return jnp.sum(abs_squared(_update_behind(links, leaf, ks))).astype(dtype)[None]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _scaled_squares(
    links: Links, dtype: Any, leaf: Leaf, ks: tuple[Numbers, ...], squares: jax.Array
) -> jax.Array:
    """Return Σ|u|² of one leaf, of shape (1,), once more, of entries times the scale for it."""
    update = _update_behind(links, leaf, ks)
    scale = _scale(squares)[0].astype(jnp.finfo(update.dtype).dtype).astype(update.dtype)
    return jnp.sum(abs_squared(update * scale)).astype(dtype)[None]


def for_all(
    function: Callable[..., Any],
    option: Any,
    arguments: Sequence[Any],
    owners: Sequence[Owner],
) -> list[Any]:
    """Return `function(links, option, *rest)` for each of the arguments, `(links, *rest)`.

    Leaves that are alike go in groups, each of which is one call to trace and to lower.
    """
    groups: dict[Any, list[int]] = {}
    for i, (links, *rest) in enumerate(arguments):
        leaves, structure = jax.tree.flatten(rest)
        groups.setdefault((links, structure, *map(jax.typeof, leaves)), []).append(i)
    results: list[Any] = [None] * len(arguments)
    for (links, *_), found in groups.items():
        for start in range(0, len(found), GROUP):
            some = found[start : start + GROUP]
            try:
                group = _group(function, links, option, [arguments[i][1:] for i in some])
            except Exception as error:
                error.add_note(f"This is about {owners[some[0]]}.")
                raise
            for i, result in zip(some, group, strict=True):
                results[i] = result
    return results


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _group(function: Callable[..., Any], links: Links, option: Any, each: Any) -> list[Any]:
    return [function(links, option, *rest) for rest in each]


def _scale(squares: jax.Array) -> jax.Array:
    """Return by what to multiply leaves whose sum of squares may have left the dtype's range."""
    big = _safe_power(squares.dtype)
    return jnp.where(squares > big, 1 / big, jnp.where(squares < 1 / big, big, 1))


def _safe_power(dtype: Any) -> float:
    """Return a power of two far above 1, by which squares of this dtype can be divided."""
    return 2.0 ** (jnp.finfo(dtype).maxexp * 5 // 8)


class _Norms:
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
        1e-25, it is taken again of entries scaled by a power of two, and only then.

        Args:
          place: the number of the link.
          here: the numbers of the leaves that it is for.
          ks: for each leaf, what the links before it need.
        """
        if not here:
            return jnp.zeros((), self.dtype)
        changing = [j for j in range(place) if not self.links[j].observes]
        factor = jnp.ones((), self.dtype)
        while changing and self._multiplies(changing[-1], here, ks):
            factor = factor * self._factor(changing.pop(), here, ks)
        prefixes = [_pick(self.own[i], self.leaves[i], ks[i], changing) for i in here]
        owners = [self.owners[i] for i in here]
        key = (tuple(changing), tuple(here))
        if key not in self.squares:
            self.squares[key] = for_all(_squares, self.dtype, prefixes, owners)
            if not changing:
                self.known[tuple(here)] = self.squares[key]
        parts = self.squares[key]
        squares = jnp.concatenate(parts)
        plain, total = jnp.sum(squares), jnp.sum(squares * (factor * factor))

        def rescaled() -> jax.Array:
            # A scale of its own for each leaf: XLA on CPU would write a shared one out as an array.
            arguments = [(*p, part) for p, part in zip(prefixes, parts, strict=True)]
            scaled = jnp.concatenate(for_all(_scaled_squares, self.dtype, arguments, owners))
            return norm(sqrt(scaled) / _scale(squares) * factor)

        low, high = jnp.minimum(plain, total), jnp.maximum(plain, total)
        in_range = (low > 1 / _safe_power(self.dtype)) & (high < jnp.inf)
        return jax.lax.cond(in_range, lambda: sqrt(total), rescaled)

    def _multiplies(self, j: int, here: Sequence[int], ks: Sequence[tuple[Numbers, ...]]) -> bool:
        """Return whether the link at `j` multiplies every leaf by one number."""
        link = self.links[j]
        if not link.multiplies or type(link).for_each is Link.for_each:
            return link.multiplies
        found = [ks[i][j] for i in here if self.owners[i].bucket and self.own[i][j] is not PASS]
        return all(jax.eval_shape(link.factor, k).shape == () for k in found)

    def _factor(self, j: int, here: Sequence[int], ks: Sequence[tuple[Numbers, ...]]) -> jax.Array:
        """Return what the link at `j` multiplies by: one number, or one for each leaf."""
        link, own = self.links[j], [self.own[i][j] for i in here]
        if type(link).for_each is Link.for_each and PASS not in own:
            return jnp.abs(link.factor(ks[here[0]][j])).astype(self.dtype)
        one = jnp.ones((), self.dtype)
        factors = [
            one if mine is PASS else jnp.abs(link.factor(ks[i][j])).astype(self.dtype)
            for i, mine in zip(here, own, strict=True)
        ]
        return jnp.stack(factors)
