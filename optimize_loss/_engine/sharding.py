"""Slots spread over the devices of a mesh axis, beside parameters that are replicated.

Each device keeps and updates its part of the slots, and the new parameters are gathered (ZeRO-1:
Rajbhandari et al., 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models",
section 5.1).
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from optimize_loss._checks import InvalidType, received
from optimize_loss._engine.chain import Chain
from optimize_loss._engine.device import axes_of
from optimize_loss._engine.link import Link, TreeLink
from optimize_loss._engine.members import Static
from optimize_loss._engine.plan import parts

State = dict[str, Any]

LEAST = 65_536
"""The fewest entries of a shard of a vector. A vector with smaller shards, such as an array that
small parameters share, is replicated: XLA for TPU would take more steps to exchange it than it is
worth."""


@dataclasses.dataclass(frozen=True, eq=False)
class Placement(Static):
    """Where parameters and slots lie; None for those that lie where they happen to.

    Attributes:
      shardings: of all leaves, after a step.
      parted: of the parameters, in parts, while they are updated.
    """

    shardings: tuple[NamedSharding | None, ...]
    parted: tuple[NamedSharding | None, ...]

    def _key(self) -> Any:
        return self.shardings, self.parted

    def __reduce__(self) -> Any:  # other processes have other devices
        return Placement, ((None,) * len(self.shardings), (None,) * len(self.parted))

    def part(self, params: Any) -> Any:
        """Return parameters of which each device has a part, as it has of their slots.

        A device then computes its part of the new parameters, and these are gathered. Otherwise
        XLA gathers what they move by, and each device adds it to all of them.
        """
        leaves, treedef = jax.tree.flatten(params)
        pairs = zip(leaves, self.parted, strict=True)
        return treedef.unflatten([x if s is None else _part_of(x, s) for x, s in pairs])

    def constrain(self, tree: Any) -> Any:
        """Return a tree of these leaves, which are to lie there in a compiled program."""
        leaves, treedef = jax.tree.flatten(tree)
        pairs = zip(leaves, self.shardings, strict=True)
        return treedef.unflatten([x if s is None else _put(x, s) for x, s in pairs])

    def run(self, function: Callable[..., Any], like: Any, *arguments: Any) -> Any:
        """Return what a function returns, a tree as `like`, whose leaves are to lie there.

        If types show how arrays are sharded over an axis, those that are spread otherwise do not
        mix: inside the function, they do not show it.
        """
        placed = [x for x in self.shardings if x is not None]
        if len(placed) < len(self.shardings) or not any(_explicit(x.mesh) for x in placed):
            return self.constrain(function(*arguments))
        there = jax.tree.structure(like).unflatten([_over(x, _explicit(x.mesh)) for x in placed])
        return self.constrain(jax.sharding.auto_axes(function, out_sharding=there)(*arguments))


def _put(leaf: Any, sharding: NamedSharding) -> Any:
    """Return a leaf that is to lie there: over explicit axes by its type, over others for XLA."""
    explicit = _explicit(sharding.mesh)
    if explicit:
        leaf = jax.sharding.reshard(leaf, _over(sharding, explicit))
    if set(sharding.mesh.axis_names) - explicit:
        rest = _over(sharding, set(sharding.mesh.axis_names) - explicit)
        leaf = jax.lax.with_sharding_constraint(leaf, rest)
    return leaf


def _over(sharding: NamedSharding, names: Collection[str]) -> NamedSharding:
    """Return a sharding without the axes that have other names."""
    parts = (tuple(name for name in axes_of(part) if name in names) for part in sharding.spec)
    return NamedSharding(sharding.mesh, PartitionSpec(*map(_part, parts)))


def _part_of(leaf: Any, sharding: NamedSharding) -> Any:
    """Return a leaf that is to lie there, inside of a function that `Placement.run` runs."""
    there = sharding.spec if _explicit(sharding.mesh) else sharding
    return jax.lax.with_sharding_constraint(leaf, there)


def placement_of(params: Any, slots: Any, axis: str | None) -> Placement:
    """Return where parameters and slots lie now, and the parameters in parts along an axis."""
    places = [_place(leaf) for leaf in jax.tree.leaves(params)]
    parted = (
        None if place is None or axis is None else _Spread(leaf.sharding.mesh, axis).one(leaf, leaf)
        for leaf, place in zip(jax.tree.leaves(params), places, strict=True)
    )
    return Placement((*places, *map(_place, jax.tree.leaves(slots))), tuple(parted))


def _place(leaf: Any) -> NamedSharding | None:
    sharding = getattr(leaf, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None


def check_axis(axis: Any) -> str | None:
    """Return the option `shard_state`.

    Raises:
      InvalidType: it is neither None nor text.
      ValueError: it is empty.
    """
    if axis is not None and not isinstance(axis, str):
        raise InvalidType(
            f"`shard_state` must be the name of an axis of a mesh. {received('shard_state', axis)}"
        )
    if axis == "":
        raise ValueError("`shard_state` must be the name of an axis of a mesh. Received: ''.")
    return axis


def check_on_mesh(axis: str, names: Sequence[str], leaves: Sequence[Any]) -> None:
    """Raise unless all parameters are on a mesh with this axis.

    Raises:
      InvalidType: the parameters are traced, so that it is not known where they are.
      ValueError: a parameter is on no mesh, or on one without this axis.
    """
    for name, leaf in zip(names, leaves, strict=True):
        if isinstance(leaf, Tracer):
            raise InvalidType(
                "`params` must be arrays, not traced, where `shard_state` is given: it is not "
                f"known where the parameter {name!r} will be."
            )
        if axis not in _mesh_axes(leaf):
            raise ValueError(
                "`shard_state` must be an axis of the mesh that the parameters are on. "
                f"Received: shard_state={axis!r}, and {name!r} on {leaf.sharding}. Put them on "
                "one, as in `jax.device_put(params, NamedSharding(mesh, PartitionSpec()))`."
            )


def devices_along(axis: str, leaf: Any) -> int:
    """Return the number of devices along an axis of the mesh of a leaf; 1 where it has none."""
    return _mesh_axes(leaf).get(axis, 1)


def _mesh_axes(leaf: Any) -> dict[str, int]:
    sharding = None if isinstance(leaf, Tracer) else getattr(leaf, "sharding", None)
    return dict(sharding.mesh.shape) if isinstance(sharding, NamedSharding) else {}


def is_spread(leaf: Any, axis: str) -> bool:
    """Return whether slots like a parameter on a mesh are spread over an axis."""
    spread = _Spread(leaf.sharding.mesh, axis)
    return axis in itertools.chain(*map(axes_of, spread.one(leaf, leaf).spec))


def init_spread(chain: Chain, params: Any, axis: str) -> State:
    """Return what `chain.init` does, with the slots made where they will lie.

    Args:
      chain: the links.
      params: the parameters, all on one mesh with this axis.
      axis: its name.
    """
    made = jax.eval_shape(chain.init, params)
    shardings = spread_shardings(chain, made, params, axis)
    return jax.jit(chain.init, out_shardings=shardings)(params)


def spread_shardings(chain: Chain, made: State, params: Any, axis: str) -> State:
    """Return where each array of a chain's state lies: a tree like the state.

    Args:
      chain: the links.
      made: their state, with or without values.
      params: the parameters, all on one mesh with this axis.
      axis: its name.
    """
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    whole = NamedSharding(mesh, PartitionSpec())
    shardings = jax.tree.map(lambda _: whole, made)
    for name, _ in chain.links:
        shardings[name] = _of_link(chain.link(name), made[name], params, _Spread(mesh, axis))
    return shardings


def _of_link(link: Any, state: Any, params: Any, spread: "_Spread") -> Any:
    """Return where what a link keeps will lie: numbers whole everywhere, all else in parts."""
    if not isinstance(link, Link):
        return jax.tree.map(spread.one, state)
    slots = parts(link, state).slots
    like = {name: None if isinstance(link, TreeLink) else params for name in state}
    return {
        name: spread.tree(x, like[name]) if name in slots else spread.whole
        for name, x in state.items()
    }


@dataclasses.dataclass(frozen=True)
class _Spread:
    """Says where arrays lie that are spread over one more axis of a mesh."""

    mesh: Mesh
    axis: str

    @property
    def whole(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def tree(self, slots: Any, params: Any) -> Any:
        """Return where slots lie: as their parameters of the same shape, and over the axis."""
        if params is None:
            return jax.tree.map(self.one, slots)
        leaves, treedef = jax.tree.flatten(slots, is_leaf=_is_none)
        pairs = zip(leaves, jax.tree.leaves(params, is_leaf=_is_none), strict=True)
        return treedef.unflatten([s if s is None else self.one(s, p) for s, p in pairs])

    def one(self, slot: Any, param: Any = None) -> NamedSharding:
        """Return where one array lies: over the axis along the first dimension that can be."""
        there = param.sharding if param is not None and param.shape == slot.shape else self.whole
        axes = [axes_of(part) for part in there.spec] + [()] * (slot.ndim - len(there.spec))
        if self.axis in itertools.chain(*axes):
            return there
        fewest = (
            sorted(range(slot.ndim), key=lambda i: len(axes[i])) if self._is_worth(slot) else []
        )
        along = next((i for i in fewest if self._divides(slot.shape[i], axes[i])), None)
        if along is not None:
            axes[along] = (*axes[along], self.axis)
        return NamedSharding(self.mesh, PartitionSpec(*map(_part, self._as_written(axes))))

    def _is_worth(self, slot: Any) -> bool:
        return slot.size >= (LEAST * self.mesh.shape[self.axis] if slot.ndim == 1 else 1)

    def _divides(self, size: int, axes: tuple[str, ...]) -> bool:
        """Return whether a dimension that is spread over some axes can be over one more."""
        return size % math.prod(self.mesh.shape[name] for name in (*axes, self.axis)) == 0

    def _as_written(self, axes: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
        """Return axes as results are written: what differs is compiled again."""
        while axes and not axes[-1] and _explicit(self.mesh) < {*self.mesh.axis_names}:
            axes = axes[:-1]
        return axes


def _explicit(mesh: Mesh | AbstractMesh) -> set[str]:
    """Return the axes of which types tell how arrays are spread over them."""
    pairs = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name for name, kind in pairs if kind == AxisType.Explicit}


def _part(axes: tuple[str, ...]) -> Any:
    """Return an entry of a `PartitionSpec`, as XLA writes it."""
    return axes[0] if len(axes) == 1 else axes or None


def _is_none(x: Any) -> bool:
    return x is None
