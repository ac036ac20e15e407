"""Names of parameters, and patterns that are proven to match them.

A parameter's name is its path in the tree joined by `/`: `encoder/layer_0/kernel`.
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from optimize_loss._checks import InvalidType, TreeMismatch, nearest

Pattern = str | re.Pattern[str]


def leaf_names(tree: Any) -> list[str]:
    """Return the name of every leaf of `tree`, in the order of `jax.tree.leaves`.

    Keys of dicts, indices of sequences and names of attributes are joined by `/`. The attribute
    in which flax nnx keeps a variable's array does not show. A tree that is one array is `params`.

    Raises:
      InvalidType: the keys of a dict cannot be sorted, such as 1 and "a".
      ValueError: two leaves have one name, as in `{"a/b": x, "a": {"b": y}}`.

    Example:
      >>> leaf_names({"dense": {"kernel": 1.0, "bias": 2.0}, "scale": 3.0})
      ['dense/bias', 'dense/kernel', 'scale']
    """
    names = leaf_paths(tree)
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"Parameter names must differ. Names that appear twice: {twice}.")
    return names


def leaf_paths(tree: Any) -> list[str]:
    """Return what `leaf_names` does, also where two are the same."""
    return [_name(path) for path in _paths(tree)]


def leaf_parts(tree: Any) -> list[tuple[str, ...]]:
    """Return the parts of the name of every leaf of a tree.

    Example:
      >>> leaf_parts({"a/b": [1.0, 2.0]})
      [('a/b', '0'), ('a/b', '1')]
    """
    return [tuple(_name((key,)) for key in path) for path in _paths(tree)]


def _paths(tree: Any) -> list[tuple[Any, ...]]:
    """Return the path of every leaf, up to the variable of flax nnx that it may be in."""
    try:
        pairs = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_nnx)
    except (ValueError, TypeError):
        check_keys(tree)
        raise
    return [path for path, leaf in pairs for _ in jax.tree.leaves(leaf)]


def flatten(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> tuple[list[Any], Any]:
    """Return what `jax.tree.flatten` does, with an error that names the path.

    Raises:
      InvalidType: the keys of a dict cannot be sorted, such as 1 and "a".
    """
    try:
        return jax.tree.flatten(tree, is_leaf)
    except (ValueError, TypeError):
        check_keys(tree)
        raise


def check_keys(tree: Any, path: str = "") -> None:
    """Raise if a dict in a tree has keys that cannot be sorted, so that it is no pytree.

    Args:
      tree: any tree.
      path: where the tree is in a larger one, for the message.

    Raises:
      InvalidType: there is such a dict; the message names its path.
    """
    if isinstance(tree, dict):
        try:
            sorted(tree)
        except TypeError as error:
            raise InvalidType(
                "A dict in a tree must have keys that can be sorted, such as texts alone. "
                f"Received: the keys {list(tree)[:5]} at {path or 'the top of the tree'}."
            ) from error
    children = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: node is not tree)
    for key, child in children:
        if child is not tree:
            check_keys(child, path + jax.tree_util.keystr(key))


def is_nnx(node: Any, *kinds: str) -> bool:
    """Return whether `node` is a variable of flax nnx, of one of these kinds; needs no flax."""
    mine = _nnx_classes(type(node))
    return "Variable" in mine and (not kinds or not mine.isdisjoint(kinds))


@functools.lru_cache(maxsize=1024)
def _nnx_classes(kind: type) -> frozenset[str]:
    """Return the names of the classes of flax nnx that a class is made of."""
    return frozenset(c.__name__ for c in kind.__mro__ if c.__module__.startswith("flax.nnx"))


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/") or "params"


def check_pattern(argument: str, pattern: Any) -> Pattern:
    """Return `pattern` if it is text or a compiled regular expression."""
    if not isinstance(pattern, str | re.Pattern):
        raise InvalidType(
            f"`{argument}` must be a pattern: a text or a compiled regular expression. "
            f"Received: {pattern!r} of type {type(pattern).__name__}."
        )
    return pattern


def check_patterns(argument: str, patterns: Pattern | Iterable[Pattern]) -> tuple[Pattern, ...]:
    """Return one pattern, or several, as a tuple."""
    if isinstance(patterns, str | re.Pattern) or not isinstance(patterns, Iterable):
        patterns = [patterns]
    return tuple(check_pattern(argument, pattern) for pattern in patterns)


def pattern_text(pattern: Pattern) -> str:
    """Return a pattern as it appears in names of numbers and in messages."""
    return pattern.pattern if isinstance(pattern, re.Pattern) else pattern


@functools.lru_cache(maxsize=4096)
def compile_pattern(pattern: Pattern) -> re.Pattern[str]:
    """Return the regular expression for a pattern.

    `*` stands for anything within one part of a name, `**` for any number of parts, `|` for
    either side. The complete name must match. A trailing `:0`, as TensorFlow writes it, need not be
    in the name. A compiled regular expression is taken as it is, and may match anywhere in the
    name.

    Example:
      >>> matches = compile_pattern("**/bias|head/*").fullmatch
      >>> [bool(matches(n)) for n in ("bias", "encoder/bias", "head/kernel", "head/a/kernel")]
      [True, True, True, False]
    """
    if isinstance(pattern, re.Pattern):
        return pattern
    return re.compile("|".join(_glob(part.strip()) for part in pattern.split("|")))


def _glob(text: str) -> str:
    stem = text.removesuffix(":0")
    expression = re.escape(stem)
    expression = expression.replace(r"\*\*/", "(?:.*/)?").replace(r"/\*\*", "(?:/.*)?")
    expression = expression.replace(r"\*\*", ".*").replace(r"\*", "[^/]*")
    return expression if stem == text else f"{expression}(?::0)?"


def matching(pattern: Pattern, names: Sequence[str]) -> list[bool]:
    """Return for each name whether the pattern means it; a name itself means only itself."""
    if isinstance(pattern, re.Pattern):
        return [pattern.search(name) is not None for name in names]
    if pattern in names:
        return [name == pattern for name in names]
    expression = compile_pattern(pattern)
    return [expression.fullmatch(name) is not None for name in names]


def any_matches(argument: str, patterns: Iterable[Pattern], names: Sequence[str]) -> list[bool]:
    """Return for each name whether one of the patterns matches it.

    Raises:
      ValueError: a pattern matches no parameter.

    Example:
      >>> any_matches("exclude", ["**/bias", "head/**"], ["head/bias", "body/bias", "body/kernel"])
      [True, True, False]
    """
    found = [matching(pattern, names) for pattern in patterns]
    for pattern, of_pattern in zip(patterns, found, strict=True):
        if not any(of_pattern):
            raise _matches_nothing(argument, pattern, names)
    return [any(marks) for marks in zip(*found, strict=True)] if found else [False] * len(names)


def _matches_nothing(argument: str, pattern: Pattern, names: Sequence[str]) -> ValueError:
    text = pattern_text(pattern)
    near = ", ".join(map(repr, nearest(text, names))) or "there are no parameters"
    question = "" if (meant := _meant(pattern, names)) is None else f" Did you mean {meant!r}?"
    return ValueError(
        f"`{argument}` has a pattern that matches no parameter: {text!r}. Nearest names: {near}."
        f"{question}"
    )


def _meant(pattern: Pattern, names: Sequence[str]) -> str | None:
    """Return a pattern that matches: one for a part of a path, with dots, or an expression."""
    if not isinstance(pattern, str) or not pattern.strip("*./"):
        return None
    text = pattern.replace(".*", "*").replace(".", "/").strip("/")
    others = (text, f"**/{text}", f"{text}/**", f"**/{text}/**")
    return next((other for other in others if any(matching(other, names))), None)


def first_matches(
    argument: str, patterns: Iterable[Pattern], names: Sequence[str]
) -> list[Pattern | None]:
    """Return for each name the first pattern that matches it, or None.

    Raises:
      ValueError: a pattern decides for no parameter, because none has such a name or because
        earlier patterns take them all; a pattern without effect is a mistake.

    Example:
      >>> first_matches("variables", ["head/**"], ["head/bias", "body/bias"])
      ['head/**', None]
      >>> first_matches("variables", ["haed/bias"], ["head/bias", "body/bias"])
      Traceback (most recent call last):
      ValueError: `variables` has a pattern that matches no parameter: 'haed/bias'. \
Nearest names: 'head/bias', 'body/bias'.
    """
    patterns = tuple(dict.fromkeys(patterns))
    chosen = [(*patterns, None)[i] for i in first_index(patterns, tuple(names))]
    for pattern in patterns:
        if pattern not in chosen:
            raise _never_decides(argument, pattern, names)
    return chosen


def _never_decides(argument: str, pattern: Pattern, names: Sequence[str]) -> ValueError:
    taken = list(itertools.compress(names, matching(pattern, names)))
    if not taken:
        return _matches_nothing(argument, pattern, names)
    return ValueError(
        f"`{argument}` has a pattern that never decides: {pattern_text(pattern)!r}. Earlier "
        f"patterns match all its parameters: {', '.join(map(repr, taken[:3]))}."
    )


@functools.lru_cache(maxsize=64)
def first_index(patterns: tuple[Pattern, ...], names: tuple[str, ...]) -> list[int]:
    """Return for each name the index of the first pattern that matches; behind the last for none.

    Unlike in `first_matches`, a pattern may match nothing.

    Example:
      >>> first_index(("head/**", "**/bias"), ("head/bias", "body/bias", "body/kernel"))
      [0, 1, 2]
    """
    found = [matching(pattern, names) for pattern in patterns]
    pairs = zip(*found, [True] * len(names), strict=True)
    return [marks.index(True) for marks in pairs]


def same_leaves(what: str, tree: Any, reference: str, expected: Any) -> list[Any]:
    """Return the leaves of `tree` in the order of `expected`, None where it has None.

    Raises:
      TreeMismatch: a leaf is missing, extra or elsewhere, or a container is of another kind.
    """
    treedef = jax.tree.structure(expected)
    try:
        return treedef.flatten_up_to(tree)
    except (ValueError, TypeError) as error:
        got, wanted = set(leaf_paths(tree)), set(leaf_paths(expected))
        parts = [f"`{what}` must have the structure of `{reference}`."]
        if missing := sorted(wanted - got):
            parts.append(f"Missing: {missing[:5]}.")
        if extra := sorted(got - wanted):
            parts.append(f"Extra: {extra[:5]}.")
        if not missing and not extra:
            parts.append(f"Received: {jax.tree.structure(tree)}, expected: {treedef}.")
        raise TreeMismatch(" ".join(parts)) from error
