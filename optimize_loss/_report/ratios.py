"""How much parameters change in a step, as a part of their size."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optimize_loss._checks import TreeMismatch
from optimize_loss._engine.trees import as_array
from optimize_loss._names import leaf_names, same_leaves


class Ratio(NamedTuple):
    """Of one parameter.

    Attributes:
      name: of the parameter, with a remark where there is no ratio.
      value: ‖after - before‖ / ‖before‖; 0 where there is none.
      rank: what a list of them is sorted by.
    """

    name: str
    value: float
    rank: float


def find_ratios(before: Any, after: Any) -> list[Ratio]:
    """Return the ratio of each parameter: what is not finite first, then from large to small.

    Raises:
      InvalidType: a leaf is no array of numbers.
      RuntimeError: a step has taken the memory of a leaf.
      TreeMismatch: the trees have different leaves.
      ValueError: there are none.
    """
    later = same_leaves("after", after, "before", before)
    triples = list(zip(leaf_names(before), jax.tree.leaves(before), later, strict=True))
    ratios = [_ratio(*triple) for triple in triples if not _is_key(triple[1])]
    if not ratios:
        raise ValueError("`before` must have a parameter. Received: a tree without any.")
    return sorted(ratios, key=lambda ratio: -ratio.rank)


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _ratio(name: str, before: Any, after: Any) -> Ratio:
    old, new = _values("before", name, before), _values("after", name, after)
    if old.shape != new.shape:
        raise TreeMismatch(
            f"`after` must have at {name!r} the shape of `before`, {old.shape}. "
            f"Received: shape {new.shape}."
        )
    if not (np.isfinite(old).all() and np.isfinite(new).all()):
        return Ratio(f"{name} (not finite)", 0.0, np.inf)
    if not old.any():
        return Ratio(f"{name} (was 0)", 0.0, -1.0)
    value = float(np.linalg.norm((new - old).ravel()) / np.linalg.norm(old.ravel()))
    return Ratio(name, value, value)


def _values(which: str, name: str, leaf: Any) -> np.ndarray:
    """Return a leaf on the host, in float64 or complex128."""
    leaf = as_array(f"`{which}` at", name, leaf)
    if isinstance(leaf, jax.Array) and leaf.is_deleted():
        raise RuntimeError(
            f"`{which}` was donated: a step gives its memory to the state that it returns. Keep a "
            "copy before the step: `before = jax.device_get(state.params)`."
        )
    array = np.asarray(jax.device_get(leaf))
    return array.astype(np.complex128 if np.iscomplexobj(array) else np.float64)
