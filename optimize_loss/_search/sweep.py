"""The points of a sweep, and the states in which its runs begin."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optimize_loss._checks import (
    AT_LEAST_1,
    SEED,
    InvalidType,
    check_flags,
    check_integer,
    check_takes,
    received,
)
from optimize_loss._engine.trees import PARAMETER, copied, copied_like
from optimize_loss._state.modules import split
from optimize_loss._state.train_state import TrainState
from optimize_loss.transforms import Link


@dataclasses.dataclass(frozen=True)
class Grid:
    """The points of a sweep, and how their states begin."""

    points: tuple[dict[str, Any], ...]
    init: Callable[[Any], Any] | None
    seeded: bool


def check_grid(numbers: Mapping[str, Any], seeds: Any, init: Any, grid: Any) -> Grid:
    """Return the points of a sweep.

    Raises:
      InvalidType: an argument is of the wrong kind.
      ValueError: there is nothing to sweep over, or lists differ in length.
    """
    check_flags(grid=grid)
    lists = {name: _check_values(name, values) for name, values in numbers.items()}
    if init is not None:
        check_takes("`init` must be a function of a random key.", _callable("init", init), None)
        if seeds is None:
            raise ValueError("`seeds` must be given with `init`, which takes a key for each seed.")
    if seeds is not None:
        if "seed" in lists:
            raise ValueError("`seeds` and the number `seed` must not both be given.")
        lists["seed"] = _check_seeds(seeds)
    if not lists:
        raise ValueError(
            "`sweep` must be given lists of numbers, as in `learning_rate=[0.01, 0.1]`, or `seeds`."
        )
    return Grid(_points(lists, grid), init, seeds is not None)


def _points(lists: Mapping[str, list[Any]], grid: bool) -> tuple[dict[str, Any], ...]:
    lengths = {name: len(values) for name, values in lists.items()}
    if not grid and len(set(lengths.values())) > 1:
        raise ValueError(f"Lists must have one length where `grid` is False. Received: {lengths}.")
    rows = itertools.product(*lists.values()) if grid else zip(*lists.values(), strict=True)
    return tuple(dict(zip(lists, row, strict=True)) for row in rows)


def _callable(name: str, value: Any) -> Any:
    if not callable(value):
        raise InvalidType(f"`{name}` must be a function. {received(name, value)}")
    return value


def _check_values(name: str, values: Any) -> list[Any]:
    """Return the values of a number as Python numbers; `state.set` checks each."""
    is_array = isinstance(values, np.ndarray | jax.Array) and not isinstance(values, Tracer)
    if isinstance(values, str | bytes | Mapping | set) or not (
        (is_array and np.ndim(values) == 1) or (isinstance(values, Iterable) and not is_array)
    ):
        raise InvalidType(
            f"`{name}` must be a list of numbers, one for each run. {received(name, values)}"
        )
    values = jax.device_get(values).tolist() if is_array else list(map(_plain, values))
    if not values:
        raise ValueError(f"`{name}` must have a value. {received(name, values)}")
    return values


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _check_seeds(seeds: Any) -> list[int]:
    if isinstance(seeds, int | np.integer):
        return list(range(check_integer("seeds", seeds, AT_LEAST_1)))
    seeds = [check_integer("seeds", seed, SEED) for seed in _check_values("seeds", seeds)]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"`seeds` must differ from each other. {received('seeds', seeds)}")
    return seeds


def starts(state: TrainState, grid: Grid) -> list[TrainState]:
    """Return the state in which each run begins.

    Raises:
      ValueError: runs begin with other parameters, but the state is one of a run already.
    """
    if grid.init is not None:
        _check_first(state)
    if not grid.seeded:
        return [state.set(**point) for point in grid.points]
    seeded = functools.cache(functools.partial(_with_seed, state, init=grid.init))
    return [seeded(numbers.pop("seed")).set(**numbers) for numbers in map(dict, grid.points)]


def _check_first(state: TrainState) -> None:
    """Raise unless all that the state keeps besides parameters is as before the first update."""
    changed = ["step"] if np.any(state.packed_optimizer["step"]) else []
    for name, _ in state.chain.links:
        link = state.chain.link(name)
        memory = link.memory() if isinstance(link, Link) else {}
        now = {key: np.asarray(state.links[name][key]) for key in memory}
        first = {key: np.asarray(memory[key], x.dtype) for key, x in now.items()}
        changed += [f"{name}/{key}" for key in memory if np.any(now[key] != first[key])]
    if changed:
        raise ValueError(
            "`state` must be one that has made no step where `init` is given, such as "
            "`step.init(params)`: runs would begin with the counters, statistics and model state "
            f"of an old one. Received: one in which these are not as at first: {changed}."
        )


def _with_seed(state: TrainState, seed: int, init: Callable[[Any], Any] | None) -> TrainState:
    """Return the state as a step of this seed begins with it.

    Raises:
      ValueError: nothing in it is random.
    """
    chain = state.chain
    kinds = {name: chain.link(name[0]).rule(name[1]).kind for name in chain.all_numbers()}
    numbers = {"/".join(name): seed for name, kind in kinds.items() if kind == "seed"}
    if state.key is None and not numbers and init is None:
        raise ValueError(
            "`seeds` must make a difference: the loss takes no `key`, there is no gradient noise, "
            "and no `init` that makes parameters from a random key."
        )
    if state.key is not None:
        state = dataclasses.replace(state, key=_key_like(state.key, seed))
    if init is not None:
        state = _begun_with(state, init(jax.random.key(seed)))
    return state.set(**numbers)


def _begun_with(state: TrainState, model: Any) -> TrainState:
    """Return the state before the first step of other parameters, or of another module."""
    params, rest, graph = split(model)
    state = state.with_trees(params=copied(PARAMETER, params)).reset("**")
    if graph is None:
        return state
    rest = copied_like("`model_state` at", rest, state.model_state)
    return dataclasses.replace(state, model_state=rest)


def _key_like(key: jax.Array, seed: int) -> jax.Array:
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return jax.random.PRNGKey(seed)
    return jax.random.key(seed, impl=jax.random.key_impl(key))


def stacked(each: list[list[Any]]) -> tuple[tuple[int | None, ...], list[Any]]:
    """Return leaves of several trees as those of one, stacked where they are not the same array.

    The first result has 0 for those that are, None for the others.
    """
    columns = list(zip(*each, strict=True))
    same = [all(x is column[0] for x in column) for column in columns]
    axes = tuple(None if alike else 0 for alike in same)
    pairs = zip(columns, same, strict=True)
    return axes, [column[0] if alike else jnp.stack(column) for column, alike in pairs]
