"""What a file lacks of the optimizer's state, made of the parameters that it has."""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optimize_loss._checks import TreeMismatch
from optimize_loss._named_state import Frame, is_key
from optimize_loss._names import leaf_names
from optimize_loss._state import TrainState
from optimize_loss.transforms import Link, TreeLink
from optimize_loss.transforms._reset import made_of


def begun(state: TrainState, frame: Frame, names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yield leaves as the links make them of the parameters that are in a frame now.

    Those that no link makes of parameters, such as numbers, are left out. There is a warning if a
    link cannot be told to begin anew.

    Args:
      state: of which the frame is; it tells the links.
      frame: the parameters.
      names: of the leaves wanted, as in `frame.outline`.
    """
    by_link: dict[str, list[str]] = {}
    for name in names:
        kind, _, rest = name.partition("/")
        link_name, _, slot = rest.partition("/")
        if kind == "optimizer" and slot:
            by_link.setdefault(link_name, []).append(name)
    for link_name, own in by_link.items():
        link = state.chain.link(link_name)
        if isinstance(link, Link) and not isinstance(link, TreeLink):
            yield from _of_link(link, frame, own)
        else:
            yield from _of_whole(link_name, link, state, frame, own)


def _of_link(link: Link, frame: Frame, names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    for name in names:
        slot, _, parameter = name.split("/", 2)[2].partition("/")
        parameter = f"params/{parameter}" if parameter else "params"
        if slot in {*link.numbers(), *link.memory()} or parameter not in frame.outline:
            continue
        made = link.slots(jnp.asarray(frame.get(parameter))).get(slot)
        if made is not None:
            yield name, made


def _of_whole(
    link_name: str, link: Any, state: TrainState, frame: Frame, names: Sequence[str]
) -> Iterator[tuple[str, Any]]:
    leaves = [jnp.asarray(frame.get(name)) for name in leaf_names({"params": state.params})]
    params = jax.tree.unflatten(jax.tree.structure(state.params), leaves)
    try:
        slots = made_of(link_name, link, state.optimizer[link_name], params)
    except TreeMismatch as error:
        warnings.warn(
            f"What the file lacks of the link {link_name!r} stays as in `like`, and does not begin "
            f"from the restored parameters: {[*names]}. {error}",
            stacklevel=2,
        )
        return
    tree = {"optimizer": {link_name: slots}}
    for name, leaf in zip(leaf_names(tree), jax.tree.leaves(tree), strict=True):
        if name in names and not is_key(frame.outline[name]):
            yield name, jnp.asarray(leaf).astype(frame.outline[name].dtype)
