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
from optimize_loss._engine.arrays import compute_dtype, widened
from optimize_loss._engine.kinds import Averaging
from optimize_loss._engine.link import Link, Numbers, Slots, functions_of, passes
from optimize_loss._engine.precision import Codec, Key
from optimize_loss._engine.trees import Owner

GROUP = 16  # leaves in a call

Wanted = Literal["params", "updates", "rest"]


class Stored(NamedTuple):
    """A link, and how its slots of one parameter are stored; None for as they are."""

    link: Link
    codec: Codec | None


Links = tuple[Stored, ...]


class Leaf(NamedTuple):
    """One parameter on its way through its links."""

    update: jax.Array  # its gradient, or what is left of it
    param: jax.Array  # as it is stored
    moved: jax.Array | None  # what links before these have moved it by, in float32 or wider
    factor: jax.Array | None  # of a gate that is still to be applied to the update
    slots: tuple[Slots, ...]  # of each of its links, as they are stored
    keys: tuple[Key | None, ...]  # of the bits by which these are rounded


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
    update, moved, new = updated(links, leaf, ks)
    if wanted == "rest":
        is_same = leaf.factor is None and all(passes(type(link)) for link, _ in links)
        return leaf.update if is_same else update, moved, new
    moved = update if moved is None else moved + update
    for i, (link, codec) in enumerate(links):
        if "after" in functions_of(type(link)):
            with _about(link, update.dtype):
                slots, wide = _opened(link, codec, leaf.slots[i], leaf.param)
                k = widened(ks[i], moved.dtype)
                moved, own = _pair(link.after(leaf.param, moved, wide, k), leaf.param)
                new[i] = _closed(codec, leaf.keys[i], slots, own)
    if wanted == "params":
        moved = leaf.param.astype(moved.dtype) + moved
    return moved.astype(leaf.param.dtype), None, new


def updated(
    links: Links, leaf: Leaf, ks: tuple[Numbers, ...]
) -> tuple[jax.Array, jax.Array | None, list[Slots]]:
    """Return the update, what the parameter has moved by before it, and the new slots."""
    dtype = compute_dtype(leaf.param.dtype)
    update, param = leaf.update.astype(dtype), leaf.param.astype(dtype)
    if leaf.factor is not None:
        update = update * leaf.factor.astype(jnp.finfo(dtype).dtype).astype(dtype)
    moved, new = leaf.moved, list[Slots]()
    seen = param if moved is None else param + moved
    wide = widened(ks, dtype)
    for i, ((link, _), k) in enumerate(zip(links, wide, strict=True)):
        with _about(link, dtype):
            if "before" in functions_of(type(link)):
                shift = link.before(seen, k)
                moved = shift if moved is None else moved + shift
                seen = param + moved
            update, slots = _run_link(links[i], i, update, seen, leaf, k)
        new.append(slots)
    return update.astype(dtype), moved, new


def _run_link(
    stored: Stored, i: int, update: jax.Array, param: jax.Array, leaf: Leaf, k: Numbers
) -> tuple[jax.Array, Slots]:
    """Return the update behind a link of a leaf, and the link's new slots as they are stored."""
    (link, codec), own = stored, functions_of(type(stored.link))
    if "after" in own:  # its turn comes when all that the parameter moves by is known
        return update, {}
    slots, wide = _opened(link, codec, leaf.slots[i], leaf.param)
    if codec is not None and codec.shows_stored and "leaf" not in own:
        # The stored array is then one kernel of XLA, and the parameter another, which reads it. An
        # update of the unrounded slots would need the old array in both, and so a copy of it.
        new = _closed(codec, leaf.keys[i], slots, link.remember(update, wide, param, k))
        seen = widened(codec.decoded(new), param.dtype)
        return _pair((link.direction(update, seen, param, k), new), param)
    k = {**k, "stored": leaf.param} if link.needs == "stored_param" else k
    update, new = _pair(link.leaf(update, wide, param, k), param)
    return update, _closed(codec, leaf.keys[i], slots, new)


def averaged_leaf(stored: Stored, param: jax.Array, slots: Slots, state: Numbers) -> jax.Array:
    """Return one parameter as a link averages it, in the parameter's dtype."""
    assert isinstance(stored.link, Averaging)
    dtype = compute_dtype(param.dtype)
    _, wide = _opened(*stored, slots, param)
    numbers = widened({name: state[name] for name in stored.link.numbers()}, dtype)
    return stored.link.averaged(param.astype(dtype), wide, numbers).astype(param.dtype)


@contextlib.contextmanager
def _about(link: Link, dtype: Any) -> Iterator[None]:
    """Name the link in errors; let complex numbers and their absolute values meet.

    Nothing else is ever promoted.
    """
    is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
    promotion = jax.numpy_dtype_promotion("standard") if is_complex else contextlib.nullcontext()
    try:
        with promotion, jax.named_scope(type(link).__name__):  # for profiles
            yield
    except Exception as error:
        error.add_note(f"This happened in the link {link!r}.")
        raise


def _pair(result: Any, param: jax.Array) -> tuple[jax.Array, Slots]:
    """Return what a link returned, if it is an update of the parameter's shape, and slots."""
    if not isinstance(result, tuple) or len(result) != 2:
        raise InvalidType(f"`leaf` must return (update, slots). Received: {result!r}.")
    if jnp.shape(result[0]) != param.shape:
        raise TreeMismatch(
            f"`leaf` must return an update of the parameter's shape {param.shape}. "
            f"Received: shape {jnp.shape(result[0])}."
        )
    return result


def _opened(
    link: Link, codec: Codec | None, stored: Slots, param: jax.Array
) -> tuple[Slots, Slots]:
    """Return slots as the link has them, and these in the dtype of the computation.

    Raises:
      TreeMismatch: the link would make others for this parameter.
    """
    slots = codec.decoded(stored) if codec is not None else stored
    made = slot_shapes(link, param.shape, param.dtype)
    came = {name: s.shape for name, s in slots.items()}
    if made != came:
        raise TreeMismatch(
            f"The state of a parameter of shape {param.shape} must have slots of shapes {made}. "
            f"Received: {came}. Does the state belong to other parameters, or to other options?"
        )
    return slots, widened(slots, compute_dtype(param.dtype))


@functools.lru_cache(maxsize=4096)
def slot_shapes(link: Link, shape: tuple[int, ...], dtype: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the slots that a link has for such a parameter."""
    slots = jax.eval_shape(link.slots, jax.ShapeDtypeStruct(shape, dtype))
    return {name: slot.shape for name, slot in slots.items()}


def _closed(codec: Codec | None, key: Key | None, old: Slots, new: Any) -> Slots:
    """Return new slots as they are stored, if they have names and shapes of the old ones."""
    if set(new) != set(old):
        raise TreeMismatch(f"`leaf` must return the slots {sorted(old)}. Received: {sorted(new)}.")
    for name, slot in old.items():
        if new[name].shape != slot.shape:
            raise TreeMismatch(
                f"The slot {name!r} must keep its shape {slot.shape}. Got: {new[name].shape}."
            )
    new = {name: new[name].astype(slot.dtype) for name, slot in old.items()}
    return new if codec is None else codec.encoded(new, key)


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
