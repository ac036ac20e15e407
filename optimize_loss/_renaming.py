"""New names for what is in a file, proven to fit."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from optimize_loss._checks import InvalidType, nearest, received

Rename = Mapping[str, str] | Callable[[str], str]


def renamed(keys: Sequence[str], wanted: Sequence[str], rename: Rename | None) -> dict[str, str]:
    """Return the new key of each key of a file.

    Names stand behind `params/` and `model_state/`; those of parameters also at the end of
    `optimizer/<link>/<slot>/…`.

    Args:
      keys: of the file.
      wanted: the keys of the state that the file is for.
      rename: new names by name, or by the first parts of names; or a function of a name.

    Raises:
      InvalidType: `rename` is neither, or gives no text.
      ValueError: a name is not in the file, or its new name not in the state; nothing is renamed;
        or two keys become one.

    Example:
      >>> keys = ["params/a/w", "optimizer/adam/m/a/w"]
      >>> renamed(keys, ["params/b/w"], {"a": "b"})
      {'params/a/w': 'params/b/w', 'optimizer/adam/m/a/w': 'optimizer/adam/m/b/w'}
    """
    if rename is None:
        return {key: key for key in keys}
    _check(rename)
    heads = [_head(key) for key in keys]
    parameters = {k[len(h) :] for k, h in zip(keys, heads, strict=True) if h == "params/"}
    tails = [_tail(key, head, parameters) for key, head in zip(keys, heads, strict=True)]
    names = sorted({tail for tail in tails if tail})
    new = _new_names(names, _names_of(wanted), rename)
    result = {
        key: key[: len(key) - len(tail)] + new[tail] if tail else key
        for key, tail in zip(keys, tails, strict=True)
    }
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


def _head(key: str) -> str:
    """Return the part of a key that stands before a name; all of it where there is none."""
    depth = {"params": 1, "model_state": 1, "optimizer": 3}.get(key.partition("/")[0])
    parts = key.split("/")
    return key if depth is None else "".join(f"{part}/" for part in parts[:depth])


def _tail(key: str, head: str, parameters: set[str]) -> str:
    """Return the name at the end of a key, if there is one."""
    rest = key[len(head) :]
    if not key.startswith("optimizer/"):
        return rest
    while rest and rest not in parameters:  # as in those of optax, with more parts before
        rest = rest.partition("/")[2]
    return rest


def _names_of(keys: Sequence[str]) -> set[str]:
    return {key[len(_head(key)) :] for key in keys if not key.startswith("optimizer/")} - {""}


def _new_names(names: Sequence[str], wanted: set[str], rename: Rename) -> dict[str, str]:
    if not isinstance(rename, Mapping):
        new = {name: rename(name) for name in names}
        if strange := [x for x in new.values() if not isinstance(x, str)]:
            raise InvalidType(f"`rename` must return a text. Received: {strange[0]!r}.")
        if all(name == other for name, other in new.items()):
            raise ValueError(f"`rename` must change a name. {received('rename', rename)}")
        return new
    chosen = {name: next((old for old in rename if _fits(old, name)), None) for name in names}
    new = {n: n if old is None else rename[old] + n[len(old) :] for n, old in chosen.items()}
    for old in rename:
        became = [new[name] for name in names if chosen[name] == old]
        if not became:
            raise ValueError(
                f"`rename` must name what is in the file. Received: {old!r}. "
                f"Nearest: {nearest(old, names)}."
            )
        if wanted.isdisjoint(became):
            raise ValueError(
                f"`rename` must give names that `like` has. Received: {became[0]!r}, for {old!r}. "
                f"Nearest: {nearest(became[0], wanted)}."
            )
    return new


def _fits(old: str, name: str) -> bool:
    return name == old or name.startswith(f"{old}/")
