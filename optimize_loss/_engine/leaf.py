"""One parameter on its way through the links of a pass.

One function runs all links over one parameter, so that XLA makes one loop over its entries of them:
a clipped or noisy copy of the gradients is never stored.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from optimize_loss._checks import InvalidType, TreeMismatch
from optimize_loss._engine.arrays import compute_dtype, is_narrow
from optimize_loss._engine.link import Link, Numbers
from optimize_loss._engine.members import Members
from optimize_loss._engine.precision import Encoded

Slots = dict[str, jax.Array]

Links = tuple[Link, ...]

GROUP = 16  # leaves in a call

Wanted = Literal["params", "updates", "rest"]


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


def update_behind(links: Links, leaf: Leaf, ks: tuple[Numbers, ...]) -> jax.Array:
    """Return the update as a link behind these sees it, without what they move."""
    return _run(links, leaf, ks, more=True)[1]


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
                update = update + (link.leaf(shift, {}, param, k)[0] - shift)
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
    wide = _widened(slots, param.dtype)
    if is_narrow(stored.dtype):
        result = link.narrow_leaf(update, wide, param, k, stored.dtype)
    else:
        result = link.leaf(update, wide, param, k)
    return _check_result(result, param, slots)


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
