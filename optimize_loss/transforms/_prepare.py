"""What a pass needs before its first leaf: the numbers of the whole tree, then the scalars.

Where a norm is needed, the elementwise links before it are computed once for the norm and once
again for the update.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optimize_loss.transforms._base import Link, Numbers
from optimize_loss.transforms._health import health
from optimize_loss.transforms._leaf import PASS, Leaf, Links, Owner, update_behind
from optimize_loss.transforms._norms import Norms, Settings, picked
from optimize_loss.transforms._precision import keys


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
