"""Observe the updates at a place in the chain, and keep statistics in the state."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from optimize_loss._checks import COUNT, check_integer
from optimize_loss._engine.arrays import (
    compute_dtype,
    counts_below,
    least_and_greatest,
    norm,
    real_dtype,
)
from optimize_loss._engine.link import Link, Numbers, Slots
from optimize_loss._names import leaf_names


@dataclasses.dataclass(frozen=True)
class ObserveNorm(Link):
    """Keep the joint L2 norm of all updates at this place in the chain, as `norm`.

    A norm that a neighbouring link needs as well is computed once.

    Args:
      metric: the name under which `optimize_loss` reports it; None for no report.

    Example:
      >>> import jax.numpy as jnp, optimize_loss as ol
      >>> tx = ol.transforms.chain(seen=ol.transforms.ObserveNorm())
      >>> g = {"w": jnp.array([3.0, 4.0])}
      >>> print(tx.update(g, tx.init(g))[1]["seen"]["norm"])
      5.0
    """

    metric: str | None = None
    needs = "global_norm"
    elementwise = True

    def memory(self) -> dict[str, float]:
        """Return the norm."""
        return {"norm": 0.0}

    def report(self, name: str, parts: Mapping[str, Any]) -> dict[str, Any]:
        """Return the norm."""
        return {} if self.metric is None else {self.metric: parts["norm"]}

    def scalars(
        self, numbers: Numbers, memory: Numbers, total: Any, step: jax.Array
    ) -> tuple[Numbers, Numbers]:
        """Keep the norm."""
        return {}, {"norm": total}


@dataclasses.dataclass(frozen=True)
class ObserveNorms(Link):
    """Keep the L2 norm of each parameter's update at this place in the chain, as the slot `norm`.

    Args:
      metric: the name under which `optimize_loss` reports each norm, followed by "/" and the
        parameter's name; None for no report.

    Example:
      >>> import jax.numpy as jnp, optimize_loss as ol
      >>> tx = ol.transforms.chain(seen=ol.transforms.ObserveNorms())
      >>> g = {"w": jnp.array([3.0, 4.0])}
      >>> print(tx.update(g, tx.init(g))[1]["seen"]["norm"]["w"])
      5.0
    """

    metric: str | None = None

    def report(self, name: str, parts: Mapping[str, Any]) -> dict[str, Any]:
        """Return the norm of each parameter."""
        return _by_name(self.metric, parts["norm"], jax.tree.leaves(parts["norm"]))

    def slots(self, param: jax.Array) -> dict[str, jax.Array]:
        """Return the norm."""
        return {"norm": jnp.zeros((), real_dtype(compute_dtype(param.dtype)))}

    def remember(self, update: jax.Array, slots: Slots, param: jax.Array, k: Numbers) -> Slots:
        """Keep the norm of one update."""
        return {"norm": norm(update)}


@dataclasses.dataclass(frozen=True)
class ObserveHistograms(Link):
    """Keep a histogram of each parameter's update: the slots `counts` and `edges`.

    `edges`, of shape (bins + 1,), are equally spaced from the least to the greatest entry of this
    step; `counts`, of shape (bins,), are floats that sum to the number of entries. For complex
    entries the absolute values are counted.

    Args:
      bins: the number of bins, at least 1.
      metric: the name under which `optimize_loss` reports each pair of counts and edges, followed
        by "/" and the parameter's name; None for no report.

    Example:
      >>> import jax.numpy as jnp, optimize_loss as ol
      >>> tx = ol.transforms.chain(seen=ol.transforms.ObserveHistograms(bins=2))
      >>> g = {"w": jnp.array([0.0, 1.0, 4.0])}
      >>> seen = tx.update(g, tx.init(g))[1]["seen"]
      >>> print(seen["counts"]["w"], seen["edges"]["w"])
      [2. 1.] [0. 2. 4.]
    """

    bins: int = 30
    metric: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "bins", check_integer("bins", self.bins, COUNT))

    def report(self, name: str, parts: Mapping[str, Any]) -> dict[str, Any]:
        """Return the histogram of each parameter."""
        counts, edges = (jax.tree.leaves(parts[slot]) for slot in ("counts", "edges"))
        return _by_name(self.metric, parts["counts"], zip(counts, edges, strict=True))

    def slots(self, param: jax.Array) -> dict[str, jax.Array]:
        """Return empty bins."""
        dtype = jnp.float32
        return {"counts": jnp.zeros(self.bins, dtype), "edges": jnp.zeros(self.bins + 1, dtype)}

    def remember(self, update: jax.Array, slots: Slots, param: jax.Array, k: Numbers) -> Slots:
        """Count the entries of one update."""
        values = jnp.abs(update) if jnp.iscomplexobj(update) else update
        if not values.size:
            return slots
        low, high = least_and_greatest(values)
        half = jnp.where(low == high, 0.5, 0).astype(low.dtype)
        edges = jnp.linspace(low - half, high + half, self.bins + 1)
        below = jnp.array([0, values.size], jnp.int32)
        if self.bins > 1:
            inner = counts_below(values, edges[1:-1])
            below = jnp.concatenate([below[:1], inner, below[1:]])
        return {"counts": jnp.diff(below), "edges": edges}


def _by_name(metric: str | None, tree: Any, values: Iterable[Any]) -> dict[str, Any]:
    """Return the values, one for each leaf of a tree, by metric and name of the leaf."""
    if metric is None:
        return {}
    return {f"{metric}/{n}": x for n, x in zip(leaf_names(tree), values, strict=True)}
