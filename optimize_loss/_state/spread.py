"""Whether the work of a step is spread over the devices of a mesh."""

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding


def check_spread(params: Any, batch: Any) -> None:
    """Warn if devices of the mesh that the parameters are on would all do the same work.

    They do along an axis over which neither a parameter nor a part of the batch is spread.

    Args:
      params: a tree of arrays.
      batch: a tree of arrays of any kind, and numbers.
    """
    parts = [x for x in jax.tree.leaves(batch) if np.ndim(x)]
    placed = [getattr(x, "sharding", None) for x in (*jax.tree.leaves(params), *parts)]
    mesh = _mesh(params)
    if mesh is not None and parts and (idle := _idle(mesh, placed)):
        axes = ", ".join(map(repr, idle))
        spec = repr(idle[0]) if len(idle) == 1 else f"({axes})"
        warnings.warn(
            f"All devices along the axis {axes} of the mesh do the same work: the parameters are "
            "on them, and neither they nor the batch are spread over it. Spread the batch, as in "
            f"`jax.device_put(batch, NamedSharding(mesh, PartitionSpec({spec})))`; `step.run` does "
            "so with `sharding=`.",
            stacklevel=5,
        )


def _mesh(params: Any) -> Mesh | AbstractMesh | None:
    """Return the mesh of several devices that parameters are on, or None."""
    shardings = (getattr(x, "sharding", None) for x in jax.tree.leaves(params))
    meshes = (x.mesh for x in shardings if isinstance(x, NamedSharding))
    return next((x for x in meshes if x.size > 1), None)


def _idle(mesh: Mesh | AbstractMesh, placed: Iterable[Any]) -> list[str]:
    """Return the axes over which nothing is spread; none where that is not known."""
    spread = [x for x in placed if x is not None and x.num_devices > 1]
    if not all(isinstance(x, NamedSharding) for x in spread):
        return []
    used = set(_axes(spread))
    return [axis for axis, size in mesh.shape.items() if size > 1 and axis not in used]


def _axes(shardings: Iterable[NamedSharding]) -> Iterator[str]:
    """Yield the axes over which arrays are spread."""
    for part in (part for sharding in shardings for part in sharding.spec if part is not None):
        yield from part if isinstance(part, tuple) else (part,)
