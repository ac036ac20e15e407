"""One parameter on its way through the links.

One function runs all links over one parameter, so that XLA makes one loop over its entries of them:
a clipped or noisy copy of the gradients is never stored.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from optimize_loss._checks import InvalidType, TreeMismatch
from optimize_loss._engine.arrays import compute_dtype
from optimize_loss._engine.kinds import Averaging
from optimize_loss._engine.link import Link, Numbers, Slots, overrides, passes
from optimize_loss._engine.precision import Encoded
from optimize_loss._engine.trees import Owner

Links = tuple[Link, ...]

Held = Slots | Encoded  # the slots of a link for one parameter, as they are stored

GROUP = 16  # leaves in a call

Wanted = Literal["params", "updates", "rest"]


class Leaf(NamedTuple):
    """One parameter on its way through its links."""

    update: jax.Array  # its gradient, or what is left of it
    param: jax.Array  # as it is stored
    moved: jax.Array | None  # what links before these have moved it by, in float32 or wider
    factor: jax.Array | None  # of a gate that is still to be applied to the update
    slots: tuple[Held, ...]  # for each of its links


@functools.partial(jax.jit, static_argnums=(0, 1))
def run_leaf(
    links: Links, wanted: Wanted, leaf: Leaf, ks: tuple[Numbers, ...]
) -> tuple[jax.Array, jax.Array | None, list[Slots]]:
    """Run all its links over one parameter; traced once per distinct shape.

    Returns:
      What is wanted: for `params` the new parameter, for `updates` what to add to it, for `rest`
      the update so far, as it came or in float32 or wider. For `rest`, also what the parameter has
      moved by before its update. Then the new slots.
    """
    update, moved, new = _updated(links, leaf, ks)
    if wanted == "rest":
        is_same = leaf.factor is None and all(map(passes, links))
        return leaf.update if is_same else update, moved, new
    moved = update if moved is None else moved + update
    for i, (link, k) in enumerate(zip(links, ks, strict=True)):
        if overrides(link, "after"):
            with _about(link, update.dtype):
                moved, new[i] = _run_after(link, moved, leaf.slots[i], k, leaf.param)
    if wanted == "params":
        moved = leaf.param.astype(moved.dtype) + moved
    return moved.astype(leaf.param.dtype), None, new


def averaged_leaf(link: Averaging, param: jax.Array, slots: Slots, state: Numbers) -> jax.Array:
    """Return one parameter as `link` averages it, in the parameter's dtype."""
    dtype = compute_dtype(param.dtype)
    slots = _widened(_opened(link, slots, param), dtype)
    numbers = _widened({name: state[name] for name in link.numbers()}, dtype)
    return link.averaged(param.astype(dtype), slots, numbers).astype(param.dtype)


def update_behind(links: Links, leaf: Leaf, ks: tuple[Numbers, ...]) -> jax.Array:
    """Return the update as a link behind these sees it."""
    return _updated(links, leaf, ks)[0]


def _updated(
    links: Links, leaf: Leaf, ks: tuple[Numbers, ...]
) -> tuple[jax.Array, jax.Array | None, list[Slots]]:
    """Return the update, what the parameter has moved by before it, and the new slots."""
    dtype = compute_dtype(leaf.param.dtype)
    wide = [_widened(k, dtype) for k in ks]
    update, param = leaf.update.astype(dtype), leaf.param.astype(dtype)
    if leaf.factor is not None:
        update = update * leaf.factor.astype(jnp.finfo(dtype).dtype).astype(dtype)
    moved, new = leaf.moved, []
    seen = param if moved is None else param + moved
    for link, held, k in zip(links, leaf.slots, wide, strict=True):
        with _about(link, dtype):
            if overrides(link, "before"):
                shift = link.before(seen, k)
                moved = shift if moved is None else moved + shift
                seen = param + moved
            update, slots = _run_link(link, update, held, seen, k, leaf.param)
        new.append(slots)
    return update.astype(dtype), moved, new


def _run_link(
    link: Link, update: jax.Array, held: Held, param: jax.Array, k: Numbers, stored: jax.Array
) -> tuple[jax.Array, Slots]:
    """Return the update behind a link, and its new slots as they are stored."""
    if overrides(link, "after"):  # its turn comes when all that the parameter moves by is known
        return update, {}
    slots = _opened(link, held, stored)
    wide = _widened(slots, param.dtype)
    if isinstance(held, Encoded) and held.codec.shows_stored and not overrides(link, "leaf"):
        # The stored array is then one kernel of XLA, and the parameter another, which reads it. An
        # update of the unrounded slots would need the old array in both, and so a copy of it.
        new = _closed(held, slots, link.remember(update, wide, param, k))
        seen = _widened(held.codec.decoded(new), param.dtype)
        return _checked(link.direction(update, seen, param, k), param), new
    k = {**k, "stored": stored} if link.needs == "stored_param" else k
    update, new = _pair(link.leaf(update, wide, param, k))
    return _checked(update, param), _closed(held, slots, new)


def _run_after(
    link: Link, moved: jax.Array, held: Held, k: Numbers, param: jax.Array
) -> tuple[jax.Array, Slots]:
    """Return what a parameter moves by behind a link that sees all of it, and its new slots."""
    slots = _opened(link, held, param)
    wide = _widened(slots, moved.dtype)
    moved, new = _pair(link.after(param, moved, wide, _widened(k, moved.dtype)))
    return _checked(moved, param), _closed(held, slots, new)


@contextlib.contextmanager
def _about(link: Link, dtype: Any) -> Iterator[None]:
    """Name the link in errors; let complex numbers and their absolute values meet.

    Nothing else is ever promoted.
    """
    is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
    promotion = jax.numpy_dtype_promotion("standard") if is_complex else contextlib.nullcontext()
    try:
        with promotion:
            yield
    except Exception as error:
        error.add_note(f"This happened in the link {link!r}.")
        raise


def _pair(result: Any) -> tuple[Any, Any]:
    if not isinstance(result, tuple) or len(result) != 2:
        raise InvalidType(f"`leaf` must return (update, slots). Received: {result!r}.")
    return result


def _checked(update: Any, param: jax.Array) -> jax.Array:
    """Return the update if it has the parameter's shape."""
    if jnp.shape(update) != param.shape:
        raise TreeMismatch(
            f"`leaf` must return an update of the parameter's shape {param.shape}. "
            f"Received: shape {jnp.shape(update)}."
        )
    return update


def _opened(link: Link, held: Held, param: jax.Array) -> Slots:
    """Return slots as the link has them.

    Raises:
      TreeMismatch: the link would make others for this parameter.
    """
    slots = held.codec.decoded(held.stored) if isinstance(held, Encoded) else held
    made = {name: s.shape for name, s in jax.eval_shape(link.slots, param).items()}
    came = {name: s.shape for name, s in slots.items()}
    if made != came:
        raise TreeMismatch(
            f"The state of a parameter of shape {param.shape} must have slots of shapes {made}. "
            f"Received: {came}. Does the state belong to other parameters, or to other options?"
        )
    return slots


def _closed(held: Held, old: Slots, new: Any) -> Slots:
    """Return new slots as they are stored, if they have names and shapes of the old ones."""
    if set(new) != set(old):
        raise TreeMismatch(f"`leaf` must return the slots {sorted(old)}. Received: {sorted(new)}.")
    for name, slot in old.items():
        if new[name].shape != slot.shape:
            raise TreeMismatch(
                f"The slot {name!r} must keep its shape {slot.shape}. Got: {new[name].shape}."
            )
    new = {name: new[name].astype(slot.dtype) for name, slot in old.items()}
    return held.codec.encoded(new, held.key) if isinstance(held, Encoded) else new


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
