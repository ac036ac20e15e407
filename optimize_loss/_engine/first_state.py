"""The state of a link before the first update."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import partial_eval

from optimize_loss._engine.device import from_host
from optimize_loss._engine.link import Link, State, TreeLink
from optimize_loss._engine.numbers import to_array
from optimize_loss._engine.plan import Place
from optimize_loss._engine.precision import Precision, codec_for
from optimize_loss._engine.trees import Params


def init_link(place: Place, params: Params, precision: Precision | None) -> State:
    """Return the numbers, the memory and the slots of a link.

    Of parameters that are not known, each slot that there may be is the tree that stands for them.

    Raises:
      ValueError: a pattern of the link matches no parameter, or two of these have one name.
    """
    link = place.link
    arrays = {
        name: to_array(name, value, link.rule(name), params.dtype)
        for name, value in link.numbers().items()
    }
    memory = {name: _memory(value, params.dtype) for name, value in link.memory().items()}
    find = _trees_of_whole if isinstance(link, TreeLink) else _trees_of_leaves
    trees = _unknown_trees(link, params, precision) if params.are_unknown else find(place, params)
    if len({**arrays, **memory, **trees}) < len(arrays) + len(memory) + len(trees):
        raise ValueError(
            f"Numbers, memory and slots of a link must have different names: {link!r}."
        )
    return {**arrays, **memory, **trees}


def _trees_of_whole(place: Place, params: Params) -> State:
    """Return what a link keeps that sees all its parameters at once."""
    trios = zip(params.names, params.leaves, place.takes, strict=True)
    return made_from(place.link.init, {name: p for name, p, takes in trios if takes})


def _trees_of_leaves(place: Place, params: Params) -> State:
    """Return the slots of a link, each a tree like the parameters."""
    slots = []
    for j, (param, takes) in enumerate(zip(params.leaves, place.takes, strict=True)):
        own, codec = made_from(place.link.slots, param) if takes else {}, place.codec(j)
        slots.append(own if codec is None else codec.encoded(own))
    kinds = dict.fromkeys(name for own in slots for name in own)
    return {name: params.unflatten([own.get(name) for own in slots]) for name in kinds}


def _unknown_trees(link: Link, params: Params, precision: Precision | None) -> State:
    """Return, for each slot that there may be, the tree that stands for the parameters."""
    if isinstance(link, TreeLink):
        made = made_from(link.init, {})
        return {name: x if jax.tree.leaves(x) else params.tree for name, x in made.items()}
    names = dict.fromkeys(name for own in possible_slots(link, precision) for name in own)
    return {name: params.unflatten([]) for name in names}


def made_from(function: Callable[[Any], Any], params: Any) -> Any:
    """Return what a function returns for parameters, or for shapes that stand for some.

    Of shapes, what would depend on the parameters' values is a shape, too; all else has values.
    """
    shapes = [x for x in jax.tree.leaves(params) if isinstance(x, jax.ShapeDtypeStruct)]
    if not shapes:
        return function(params)
    jaxpr = jax.make_jaxpr(function)(params).jaxpr
    marks = np.eye(len(jaxpr.outvars), dtype=bool).tolist()
    depends = [any(partial_eval.dce_jaxpr(jaxpr, mark)[1]) for mark in marks]
    values, structure = jax.tree.flatten(function(jax.tree.map(_zeros, params)))
    placed = any(x.sharding is not None for x in shapes)
    return structure.unflatten(
        _shape(x, placed) if of_values else x for x, of_values in zip(values, depends, strict=True)
    )


def _zeros(leaf: Any) -> Any:
    is_shape = isinstance(leaf, jax.ShapeDtypeStruct)
    return jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding) if is_shape else leaf


def _shape(value: jax.Array, placed: bool) -> jax.ShapeDtypeStruct:
    sharding = value.sharding if placed else None
    return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)


def possible_slots(link: Link, precision: Precision | None) -> list[Any]:
    """Return the slots, without values, of float32 parameters of any rank and precision."""
    forms = {"float32"}
    if precision is not None:
        forms = {precision.rest} if not isinstance(precision.state, str) else set()
        forms |= {name for _, name in precision.by_pattern}
    forms |= {"bfloat16"} if "float8" in forms else set()
    found = []
    for rank in range(4):
        param = jax.ShapeDtypeStruct((1,) * rank, jnp.float32)
        try:
            slots = jax.eval_shape(link.slots, param)
        except ValueError:  # it is not for this rank
            continue
        for form in forms:
            codec = codec_for(link, form, param.shape, param.dtype)
            found.append(slots if codec is None else jax.eval_shape(codec.encoded, slots))
    return found


def _memory(value: float, dtype: Any) -> jax.Array:
    return from_host(value, jnp.int32 if isinstance(value, int) else dtype)
