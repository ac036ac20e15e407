"""The state of a link before the first update."""

from typing import Any

import jax
import jax.numpy as jnp

from optimize_loss.transforms import _numbers
from optimize_loss.transforms._arrays import from_host
from optimize_loss.transforms._base import TreeLink
from optimize_loss.transforms._params import Params
from optimize_loss.transforms._pass import Place, State


def init_link(place: Place, params: Params) -> State:
    """Return the numbers, the memory and the slots of a link.

    Raises:
      ValueError: a pattern of the link matches no parameter, or two of these have one name.
    """
    link = place.link
    names = [n for n, takes in zip(params.names, place.takes, strict=True) if takes]
    link.check_names(place.names(params))
    arrays = {
        name: _numbers.to_array(name, value, link.rule(name), params.dtype)
        for name, value in link.numbers().items()
    }
    memory = {name: _memory(value, params.dtype) for name, value in link.memory().items()}
    pairs = list(zip(params.leaves, place.takes, strict=True))
    if isinstance(link, TreeLink):
        trees = link.init(dict(zip(names, (p for p, takes in pairs if takes), strict=True)))
    else:
        slots = [link.slots(p) if takes else {} for p, takes in pairs]
        slots = [
            own if (codec := place.codec(j)) is None else codec.encoded(own)
            for j, own in enumerate(slots)
        ]
        kinds = dict.fromkeys(name for own in slots for name in own)
        trees = {n: params.unflatten([own.get(n) for own in slots]) for n in kinds}
    if len({**arrays, **memory, **trees}) < len(arrays) + len(memory) + len(trees):
        raise ValueError(
            f"Numbers, memory and slots of a link must have different names: {link!r}."
        )
    return {**arrays, **memory, **trees}


def _memory(value: float, dtype: Any) -> jax.Array:
    return from_host(value, jnp.int32 if isinstance(value, int) else dtype)
