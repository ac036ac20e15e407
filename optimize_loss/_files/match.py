"""New names for what is in a file, proven to fit."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optimize_loss._checks import InvalidType, TreeMismatch, nearest, received
from optimize_loss._engine.reset import made_of, owners_of
from optimize_loss._engine.selection import linked
from optimize_loss._files.named import Frame, is_key
from optimize_loss._names import leaf_names
from optimize_loss._state.train_state import TrainState
from optimize_loss.transforms import Chain, Link, TreeLink

Rename = Mapping[str, str] | Callable[[str], str]


def renamed(
    found: Mapping[str, Any], wanted: Sequence[str], rename: Rename | None, chain: Chain
) -> dict[str, str]:
    """Return the new key of each key of a file.

    Names come after `params/` and `model_state/`; those of parameters also at the end of
    `optimizer/<link>/<slot>/…`. Numbers of links stay as they are called.

    Args:
      found: what is in the file by key: whatever has a `shape` and a `dtype`.
      wanted: the keys of the state that the file is for.
      rename: new names by name, or by the first parts of names; or a function of a name.
      chain: the links of the state that the file is for.

    Raises:
      InvalidType: `rename` is neither, or gives no text.
      ValueError: a name is not in the file, or its new name not in the state; nothing is renamed;
        or two keys become one.

    Example:
      >>> import numpy as np
      >>> from optimize_loss.transforms import ScaleByAdam, chain
      >>> found = dict.fromkeys(["params/a/w", "optimizer/adam/m/a/w"], np.zeros(2))
      >>> renamed(found, ["params/b/w"], {"a": "b"}, chain(adam=ScaleByAdam()))
      {'params/a/w': 'params/b/w', 'optimizer/adam/m/a/w': 'optimizer/adam/m/b/w'}
    """
    if rename is None:
        return {key: key for key in found}
    _check(rename)
    numbers = _numbers(chain)
    tails = _names_in(found, numbers, chain)
    new = _new_names(sorted({*tails.values()}), {*_names_of(wanted).values()}, rename)
    result = {key: key for key in found}
    for key, tail in tails.items():
        other = key.removesuffix(tail) + new[tail]
        result[key] = key if other in numbers else other
    came: dict[str, str] = {}
    for key, other in result.items():
        if came.setdefault(other, key) != key:
            raise ValueError(
                f"`rename` must give different names. Received: {other!r} for {came[other]!r} "
                f"and {key!r}."
            )
    return result


def _check(rename: Any) -> None:
    pairs = rename.items() if isinstance(rename, Mapping) else ()
    if not callable(rename) and not isinstance(rename, Mapping):
        raise InvalidType(
            "`rename` must be {name: new name}, or a function of a name. "
            f"{received('rename', rename)}"
        )
    if not all(isinstance(x, str) for pair in pairs for x in pair):
        raise InvalidType(f"`rename` must map texts to texts. {received('rename', rename)}")


def _names_of(keys: Iterable[str]) -> dict[str, str]:
    """Return the names at the end of the keys of parameters and of the model state, by key."""
    pairs = ((key, key.partition("/")) for key in keys)
    return {
        key: name for key, (kind, _, name) in pairs if name and kind in ("params", "model_state")
    }


def _names_in(found: Mapping[str, Any], numbers: set[str], chain: Chain) -> dict[str, str]:
    """Return the name at the end of each key that has one."""
    names = _names_of(found)
    parameters = {name for key, name in names.items() if key.startswith("params/")}
    links = dict(linked(dict(chain.links)))
    for link_name, keys in _by_link(key for key in found if key not in numbers).items():
        if _is_leafwise(links.get(link_name)):
            owned = _of_slots(keys, parameters)
        else:
            owned = _of_whole({key: found[key] for key in keys}, parameters)
        names |= dict(owned)
    return names


def _by_link(keys: Iterable[str]) -> dict[str, list[str]]:
    """Return the keys `optimizer/<link>/…` by link."""
    found: dict[str, list[str]] = {}
    for key in keys:
        kind, link_name, rest = (*key.split("/", 2), "", "")[:3]
        if kind == "optimizer" and rest:
            found.setdefault(link_name, []).append(key)
    return found


def _numbers(chain: Chain) -> set[str]:
    """Return the keys of numbers and of memories for the whole tree."""
    links = ((name, x) for name, x in linked(dict(chain.links)) if isinstance(x, Link))
    return {f"optimizer/{n}/{key}" for n, x in links for key in (*x.numbers(), *x.memory())}


def _is_leafwise(link: Any) -> bool:
    return isinstance(link, Link) and not isinstance(link, TreeLink)


def _of_slots(keys: Iterable[str], parameters: set[str]) -> Iterator[tuple[str, str]]:
    """Yield the parameter that stands behind `optimizer/<link>/<slot>/`, with the key."""
    pairs = ((key, key.split("/", 3)[3:]) for key in keys)
    return ((key, name) for key, names in pairs for name in names if name in parameters)


def _of_whole(found: Mapping[str, Any], parameters: set[str]) -> Iterator[tuple[str, str]]:
    """Yield the parameter whose slot it is by key, as its place among others tells."""
    shapes = {key: jax.ShapeDtypeStruct(x.shape, x.dtype) for key, x in found.items()}
    owners = zip(sorted(shapes), owners_of(shapes, parameters), strict=True)  # as jax sorts them
    return ((key, name) for key, name in owners if name is not None)


def _new_names(names: Sequence[str], wanted: set[str], rename: Rename) -> dict[str, str]:
    if isinstance(rename, Mapping):
        return _by_table(names, wanted, rename)
    new = {name: rename(name) for name in names}
    if strange := [x for x in new.values() if not isinstance(x, str)]:
        raise InvalidType(f"`rename` must return a text. Received: {strange[0]!r}.")
    if all(name == other for name, other in new.items()):
        raise ValueError(f"`rename` must change a name. {received('rename', rename)}")
    return new


def _by_table(names: Sequence[str], wanted: set[str], rename: Mapping[str, str]) -> dict[str, str]:
    """Return the new names by the first entry that fits each; all entries must have an effect."""
    new: dict[str, str] = {}
    for old, other in rename.items():
        became = {n: other + n[len(old) :] for n in names if n not in new and _fits(old, n)}
        if not became:
            raise ValueError(
                f"`rename` must name what is in the file. Received: {old!r}. "
                f"Nearest: {nearest(old, names)}."
            )
        if wanted.isdisjoint(became.values()):
            first = next(iter(became.values()))
            raise ValueError(
                f"`rename` must give names that `like` has. Received: {first!r}, for {old!r}. "
                f"Nearest: {nearest(first, wanted)}."
            )
        new |= became
    return {name: name for name in names} | new


def _fits(old: str, name: str) -> bool:
    return name == old or name.startswith(f"{old}/")


def begun(state: TrainState, frame: Frame, names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yield leaves as the links make them of the parameters that are in a frame now.

    Leaves that no link makes from parameters, such as numbers, are skipped. There is a warning if a
    link cannot be initialized again.

    Args:
      state: the state of the frame, which has the links.
      frame: the parameters.
      names: of the leaves wanted, as in `frame.outline`.
    """
    for link_name, own in _by_link(names).items():
        link = state.chain.link(link_name)
        if _is_leafwise(link):
            yield from _of_link(link, frame, own)
        else:
            yield from _of_tree(link_name, link, state, frame, own)


def _of_link(link: Link, frame: Frame, names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    for name in names:
        slot, _, parameter = name.split("/", 2)[2].partition("/")
        parameter = f"params/{parameter}" if parameter else "params"
        if slot in {*link.numbers(), *link.memory()} or parameter not in frame.outline:
            continue
        made = link.slots(jnp.asarray(frame.get(parameter))).get(slot)
        if made is not None:
            yield name, made


def _of_tree(
    link_name: str, link: Any, state: TrainState, frame: Frame, names: Sequence[str]
) -> Iterator[tuple[str, Any]]:
    leaves = [jnp.asarray(frame.get(name)) for name in leaf_names({"params": state.params})]
    params = jax.tree.unflatten(jax.tree.structure(state.params), leaves)
    try:
        slots = made_of(link_name, link, state.optimizer[link_name], params)
    except TreeMismatch as error:
        warnings.warn(
            f"Leaves of the link {link_name!r} that the file lacks stay as in `like`, and do not "
            f"start from the restored parameters: {[*names]}. {error}",
            stacklevel=2,
        )
        return
    tree = {"optimizer": {link_name: slots}}
    for name, leaf in zip(leaf_names(tree), jax.tree.leaves(tree), strict=True):
        if name in names and not is_key(frame.outline[name]):
            yield name, jnp.asarray(leaf).astype(frame.outline[name].dtype)
