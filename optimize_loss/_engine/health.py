"""Whether a step is sound: its loss, the norm of its gradients, and whose gradient is not."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optimize_loss._engine.members import Members
from optimize_loss._random import name_words

NOBODY, THE_LOSS, THE_NORM, A_SCHEDULE = 0, -1, -2, -3  # where no parameter is to blame


class Health(NamedTuple):
    """What a guard judges by.

    Attributes:
      norm: the L2 norm of all gradients, as they come.
      loss_is_finite: whether the loss and its weight are finite; true where there is none.
      offender: the mark of the first parameter whose gradient is not finite; 0 for none.
      loss_scale: by which the gradients come multiplied; None where there is none.
      scale_shrinks: whether that is dynamic, and above its least.
      schedules_hold: whether every schedule has a value that its number may have.
    """

    norm: jax.Array
    loss_is_finite: jax.Array
    offender: jax.Array
    loss_scale: jax.Array | None
    scale_shrinks: jax.Array
    schedules_hold: jax.Array

    def without(self, empty: jax.Array | None) -> "Health":
        """Return what counts: that there was nothing where the batch was empty."""
        if empty is None:
            return self
        return self._replace(
            norm=jnp.where(empty, 0, self.norm),
            loss_is_finite=empty | self.loss_is_finite,
            offender=jnp.where(empty, NOBODY, self.offender),
        )


def mark(name: str) -> int:
    """Return a positive int32 of a parameter's name, which outlives edits of the tree."""
    return name_words(name)[0] % (2**31 - 1) + 1


def blamed(code: int, names: Sequence[str]) -> str | None:
    """Return who is meant by an offender's code: a name, or words; None for nobody."""
    words = {
        NOBODY: None,
        THE_LOSS: "the loss",
        THE_NORM: "the norm of all gradients",
        A_SCHEDULE: "a schedule",
    }
    if code in words:
        return words[code]
    found = [name for name in names if mark(name) == code]
    return " or ".join(found) or "a parameter that is no longer there"


def health(
    norm: jax.Array,
    parts: Any,
    updates: Sequence[jax.Array],
    owners: Any,
    judged: Mapping[str, jax.Array],
) -> Health:
    """Return what a guard judges by; the gradients are read again only if the norm is not finite.

    Args:
      norm: of all gradients.
      parts: the loss and its weight, or None.
      updates: the gradients.
      owners: for each gradient, the names of its parameters, and where each is in it.
      judged: what else `Health` has.
    """
    finite = jnp.isfinite(norm)
    fine = [jnp.all(jnp.isfinite(part)) for part in parts if part is not None]
    sound = jnp.all(jnp.stack(fine)) if fine else jnp.array(True)
    if not updates:
        return Health(norm, sound, jnp.zeros((), jnp.int32), **judged)
    nobody = jnp.full((), NOBODY, jnp.int32)
    found = jax.lax.cond(finite, lambda: nobody, lambda: _offender(updates, owners))
    return Health(norm, sound, found, **judged)


def _offender(updates: Sequence[jax.Array], owners: Any) -> jax.Array:
    """Return the mark of the first parameter, by name, with an entry that is not finite."""
    names = sorted(name for owner in owners for name in owner.names)
    ranks = {name: rank for rank, name in enumerate(names)}
    found = [
        _rank(update, [ranks[name] for name in owner.names], owner.bucket, len(names))
        for update, owner in zip(updates, owners, strict=True)
    ]
    marks = np.array([*map(mark, names), NOBODY], np.int32)
    return jnp.asarray(marks)[jnp.min(jnp.stack(found))]


def _rank(update: jax.Array, ranks: list[int], members: Members | None, none: int) -> jax.Array:
    """Return the rank of the parameter that has the first entry which is not finite."""
    if members is None or not update.size:
        return jnp.where(_is_bad(update), ranks[0], none).astype(jnp.int32)
    ends = np.cumsum(members.sizes).astype(np.int32)
    index = jax.lax.iota(jnp.int32, update.size)
    first = jnp.min(jnp.where(update - update == 0, update.size - 1, index))
    which = jnp.sum(first >= jnp.asarray(ends), dtype=jnp.int32)
    rank = jnp.asarray(np.array(ranks, np.int32))[which]
    return jnp.where(_is_bad(update), rank, none).astype(jnp.int32)


@jax.jit
def _is_bad(update: jax.Array) -> jax.Array:
    # XLA on CPU would write `isfinite` out as an array.
    return jnp.sum(jnp.abs(update - update)) != 0
