"""What a step will do with each parameter, before anything is allocated."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding

from optimize_loss._engine.bucket import Layout, shown_name
from optimize_loss._engine.by_name import numbers_by_name
from optimize_loss._engine.kinds import Averaging, Gate
from optimize_loss._engine.link import TreeLink, number_rules, passes
from optimize_loss._engine.numbers import has_rate
from optimize_loss._engine.plan import parts, takes
from optimize_loss._engine.reset import owners_of
from optimize_loss._engine.selection import linked
from optimize_loss._engine.sharding import devices_along, is_spread, spread_shardings
from optimize_loss._engine.trees import PARAMETER, as_array, take_apart
from optimize_loss._names import leaf_names
from optimize_loss._report.lint import Horizon, Row, lint
from optimize_loss._state.gradients import Trainable
from optimize_loss._state.recipe import Recipe, trainable_of
from optimize_loss.schedules import evaluate
from optimize_loss.transforms import Accumulate, AddWeightDecay, Chain, Link, ShrinkParams
from optimize_loss.transforms._multiply import MultiplyLayers, MultiplySteps


@dataclasses.dataclass(frozen=True)
class Explanation:
    """A description of a step; `print` shows it as a table.

    Attributes:
      rows: one `Row` for each parameter.
      links: the name and description of each link, in the order in which gradients pass.
      warnings: likely mistakes.
      parameters: the number of entries of all parameters.
      trained: the number of entries of trained parameters.
      param_bytes: the bytes of all parameters.
      state_bytes: the bytes of the optimizer's state, including its numbers.
      total_bytes: the bytes of all arrays in the `TrainState`.
      device_bytes: the bytes on one device if `shard_state` shards the optimizer's state; otherwise
        None. All other figures are bytes of complete arrays.
    """

    rows: tuple[Row, ...]
    links: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]
    parameters: int
    trained: int
    param_bytes: int
    state_bytes: int
    total_bytes: int
    device_bytes: int | None = None

    def __str__(self) -> str:
        heads = (
            "parameter", "shape", "dtype", "rule", "moved by", "rate", "decay", "state", "place",
        )  # fmt: skip
        table = [heads, *map(_cells, self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
            for cells in table
        ]
        lines += ["", "links, in order:", *(f"  {name}: {text}" for name, text in self.links), ""]
        lines += [
            f"{self.parameters:,} parameters, {self.trained:,} trained; bytes: "
            f"{self.param_bytes:,} parameters + {self.state_bytes:,} optimizer, "
            f"{self.total_bytes:,} in all"
            + ("" if self.device_bytes is None else f", {self.device_bytes:,} on each device")
        ]
        return "\n".join([*lines, *(f"warning: {text}" for text in self.warnings)])


def _cells(row: Row) -> tuple[str, ...]:
    """Return a row of the table."""
    rate = "?" if row.learning_rate is None else f"{row.learning_rate:.3g}"
    if isinstance(row.multiplier, tuple):
        rate += f" × {min(row.multiplier):.3g} … {max(row.multiplier):.3g}"
    elif row.multiplier != 1:
        rate += f" × {row.multiplier:.3g}"
    shape = " × ".join(map(str, row.shape)) or "scalar"
    rest = (rate, f"{row.weight_decay:.3g}") if row.trained else ("not trained", "")
    first = row.name, shape, row.dtype, row.rule or "", ", ".join(row.moved_by)
    return *first, *rest, f"{row.state_bytes:,}", row.place


Layouts = Callable[[Trainable], Layout | None]  # how they share arrays, from which are trained


class _Made(NamedTuple):
    """What `init` would make, as shapes."""

    trainable: Trainable
    layout: Layout | None
    state: dict[str, Any]


def explain(
    recipe: Recipe,
    params: Any,
    horizon: Horizon,
    rest: Any,
    layout: Layouts,
) -> Explanation:
    """Return what a step will do with these parameters, with values or without.

    Args:
      recipe: the step.
      params: the parameters.
      horizon: what the schedules will see.
      rest: the arrays in a state besides parameters and what the chain keeps.
      layout: from which are trained, how small parameters share arrays.
    """
    made = _made(recipe, params, layout)
    has_slots = _has_slots(recipe.chain, made.state)
    links = [(n, link, has_slots[n] or _has_rate(link)) for n, link in _linked(recipe.chain)]
    rows = tuple(_rows(recipe, made, _movers(recipe.chain, has_slots), horizon.first))
    param_bytes, state_bytes = sum(row.param_bytes for row in rows), _bytes(made.state)
    sizes = [(math.prod(row.shape), row.trained) for row in rows]
    return Explanation(
        rows=rows,
        links=tuple((name, _described(link)) for name, link, _ in links),
        warnings=tuple(lint(rows, links, recipe.rules, _updates(recipe.chain, horizon))),
        parameters=sum(size for size, _ in sizes),
        trained=sum(size for size, trained in sizes if trained),
        param_bytes=param_bytes,
        state_bytes=state_bytes,
        total_bytes=param_bytes + state_bytes + _bytes(rest),
        device_bytes=_device_bytes(recipe, made, rest),
    )


def _made(recipe: Recipe, params: Any, layout: Layouts) -> _Made:
    names, (leaves, treedef) = leaf_names(params), jax.tree.flatten(params)
    shapes = [_as_in_a_state(n, x) for n, x in zip(names, leaves, strict=True)]
    params = jax.tree.unflatten(treedef, shapes)
    recipe.rules.check(params)

    def init(params: Any) -> Any:
        trainable = trainable_of(recipe, params)
        return recipe.chain.init(trainable.tree(trainable.leaves))

    trainable = trainable_of(recipe, params)
    return _Made(trainable, layout(trainable), jax.eval_shape(init, params))


def _device_bytes(recipe: Recipe, made: _Made, rest: Any) -> int | None:
    """Return the bytes on one device of a state whose slots are spread over a mesh axis."""
    axis, leaves = recipe.shard_state, made.trainable.leaves
    if axis is None or any(devices_along(axis, x) < 2 for x in leaves):
        return None
    params, state = made.trainable.params, made.state
    trained = made.trainable.tree(leaves)
    if made.layout is not None:
        params = made.layout.pack_shapes(params)
        trained = made.layout.only_trained(params)
        state = jax.eval_shape(recipe.chain.init, trained)
    slots = _parts(state, spread_shardings(recipe.chain, state, trained, axis))
    return slots + _parts(params, jax.tree.map(lambda x: x.sharding, params)) + _bytes(rest)


def _parts(tree: Any, places: Any) -> int:
    """Return the bytes on one device of arrays that lie in these places."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(places), strict=True)
    return sum(math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize for x, s in pairs)


def _as_in_a_state(name: str, leaf: Any) -> Any:
    """Return the shape of a parameter, its dtype and where it will be."""
    leaf = as_array(PARAMETER, name, leaf)
    if isinstance(leaf, Tracer) or jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        return leaf
    place = getattr(leaf, "sharding", None) or jnp.zeros(()).sharding
    return jax.ShapeDtypeStruct(leaf.shape, jnp.result_type(leaf), sharding=place)


def _bytes(tree: Any) -> int:
    """Return the bytes of arrays, or of what only has shapes."""
    return sum(x.size * x.dtype.itemsize for x in map(_shaped, jax.tree.leaves(tree)))


def _shaped(leaf: Any) -> Any:
    return leaf if hasattr(leaf, "dtype") else np.asarray(leaf, jnp.result_type(leaf))


def _updates(chain: Chain, horizon: Horizon) -> Horizon:
    """Return what schedules see, which go by updates where several batches make one."""
    for _, link in chain.links:
        if isinstance(link, Accumulate) and horizon.updates is not None:
            updates = max(horizon.updates // int(link.every), 1)
            horizon = dataclasses.replace(horizon, updates=updates)
    return horizon


def _linked(chain: Chain) -> Iterator[tuple[str, Any]]:
    return linked(dict(chain.links))


def _has_rate(link: Any) -> bool:
    return not isinstance(link, Link) or "learning_rate" in number_rules(type(link))


def _has_slots(chain: Chain, state: dict[str, Any]) -> dict[str, bool]:
    """Return for each link whether it has memory for parameters, gates left out."""
    found = {}
    for name, link in _linked(chain):
        slots = parts(link, state[name]).slots if isinstance(link, Link) else state[name]
        found[name] = not isinstance(link, Gate) and (bool(slots) or not isinstance(link, Link))
    return found


def _movers(chain: Chain, has_slots: dict[str, bool]) -> dict[str, bool]:
    """Return the links that make the updates, and for each whether it has memory for parameters.

    The others of them have the rate.
    """
    found = {}
    for name, link in _linked(chain):
        ours = isinstance(link, Link)
        looks = ours and (
            passes(type(link)) or (isinstance(link, Averaging) and not _has_rate(link))
        )
        if not looks and (has_slots[name] or _has_rate(link)):
            found[name] = has_slots[name]
    return found


def _described(link: Any) -> str:
    """Return a link with its numbers, as it would be written."""
    if not isinstance(link, Link):
        return type(link).__name__
    numbers = (f"{name}={_short(value)}" for name, value in link.numbers().items())
    return f"{type(link).__name__}({', '.join(numbers)})"


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else repr(value)


def _rows(recipe: Recipe, made: _Made, movers: dict[str, bool], first: int) -> Iterator[Row]:
    params, marks = made.trainable.params, made.trainable.marks
    names, texts = leaf_names(params), [*recipe.rules.texts, None]
    numbers = _numbers(recipe.chain, made.trainable, first)
    sizes = _slot_bytes(recipe.chain, params, made.state)
    each = zip(names, jax.tree.leaves(params), marks, recipe.rules.index(names), strict=True)
    for (name, leaf, trained, i), place in zip(each, _places(recipe, made), strict=True):
        links = tuple(numbers[name].pop("links"))
        moving = [link for link in links if link in movers]
        yield Row(
            name=name,
            shape=tuple(leaf.shape),
            dtype=leaf.dtype.name,
            trained=trained,
            rule=texts[i],
            links=links,
            moved_by=tuple(link for link in moving if movers[link]) or tuple(moving),
            param_bytes=_bytes(leaf),
            state_bytes=sizes[name],
            place=place,
            **numbers[name],
        )


def _places(recipe: Recipe, made: _Made) -> Iterator[str]:
    """Yield for each parameter the array that it shares, or its sharding, and that of its slots."""
    params, marks = made.trainable.params, made.trainable.marks
    buckets = made.layout.buckets if made.layout else ()
    shared = {name: shown_name(key) for key, members in buckets for name in members.names}
    for name, leaf, trained in zip(leaf_names(params), jax.tree.leaves(params), marks, strict=True):
        alone = (_sharding(leaf), _of_slots(recipe.shard_state, leaf) if trained else "")
        yield shared.get(name) or ", ".join(filter(None, alone))


def _of_slots(axis: str | None, leaf: Any) -> str:
    return f"slots over {axis!r}" if axis and is_spread(leaf, axis) else ""


def _sharding(leaf: Any) -> str:
    sharding = getattr(leaf, "sharding", None)
    sharded = isinstance(sharding, NamedSharding) and not sharding.is_fully_replicated
    return str(sharding.spec) if isinstance(sharding, NamedSharding) and sharded else ""


def _slot_bytes(chain: Chain, params: Any, state: dict[str, Any]) -> dict[str, int]:
    """Return the bytes of the slots of each parameter, by name."""
    sizes = dict.fromkeys(leaf_names(params), 0)
    for name, link in _linked(chain):
        for owner, slot in _owned(link, state[name], params):
            sizes[owner] += _bytes(slot)
    return sizes


def _owned(link: Any, state: Any, params: Any) -> Iterator[tuple[str, Any]]:
    """Yield the slots of a link, each with the parameter whose it is."""
    names = leaf_names(params)
    if isinstance(link, Link) and not isinstance(link, TreeLink):
        for slot in parts(link, state).slots.values():
            leaves = jax.tree.structure(params).flatten_up_to(slot)
            yield from zip(names, leaves, strict=True)
    else:
        for owner, leaf in zip(owners_of(state, names), jax.tree.leaves(state), strict=True):
            if owner is not None:
                yield owner, leaf


def _numbers(chain: Chain, trainable: Trainable, first: int) -> dict[str, dict[str, Any]]:
    """Return for each trained parameter its links, and rate, multiplier and decay at first."""
    taken = take_apart(trainable.tree(trainable.leaves))
    found: dict[str, dict[str, Any]] = {n: {"links": []} for n in leaf_names(trainable.params)}
    marks = [True] * len(taken.names)
    for name, entry in chain.links:
        link = chain.link(name)
        meant = takes(name, entry, taken, marks)
        here = [n for n, t in zip(taken.names, meant, strict=True) if t]
        for parameter in here:
            found[parameter]["links"].append(name)
        for key, value in _of_link(link, here, first):
            for parameter, number in value.items():
                found[parameter][key] = number
    return found


def _of_link(link: Any, here: Sequence[str], first: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what a link gives its parameters: a key, and {name: number}.

    Args:
      link: the link.
      here: its parameters.
      first: the first step.
    """
    if has_rate(link):
        rate = link.numbers()["learning_rate"]
        yield "learning_rate", dict.fromkeys(here, _at(rate, first))
        yield "schedule", dict.fromkeys(here, rate if callable(rate) else None)
    if isinstance(link, ShrinkParams | AddWeightDecay):
        decays, spared = _numbers_of(link, "weight_decay", here, first), link.spared(here)
        yield "weight_decay", decays | {n: 0.0 for n, x in zip(here, spared, strict=True) if x}
    if isinstance(link, MultiplySteps):
        yield "multiplier", _numbers_of(link, "multiplier", here, first)
    if isinstance(link, MultiplyLayers):
        yield "multiplier", dict.fromkeys(here, tuple(_at(x, first) for x in link.multipliers))


def _numbers_of(link: Link, field: str, here: Sequence[str], first: int) -> dict[str, float]:
    """Return a number of a link for each of its parameters, as it is at the first step."""
    numbers = link.numbers()
    by_name = numbers_by_name(link).get(field)
    keys = by_name.chosen(field, here) if by_name else [field] * len(here)
    return {n: _at(numbers[k], first) for n, k in zip(here, keys, strict=True) if k is not None}


def _at(value: Any, first: int) -> float:
    """Return a number, or what a schedule gives at the first step."""
    if not callable(value):
        return value
    return float(evaluate("schedule", value, first, jnp.float32))
