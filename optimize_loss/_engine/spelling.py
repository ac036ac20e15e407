"""Which numbers of a chain a name stands for.

`link/number` is one number. A number's name alone is that of the parameters at large: where several
links have such a number, it is not that of links which are for the parameters of rules only.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from optimize_loss._checks import nearest
from optimize_loss._engine.link import Link
from optimize_loss._engine.selection import Sharing, is_of_rules, linked

Entries = Mapping[str, Any]  # the links of a chain, by name
Pair = tuple[str, str]  # a link and the name of a number


def all_numbers(entries: Entries) -> list[Pair]:
    """Return the link and the name of every hyperparameter."""
    links = ((name, link) for name, link in linked(entries) if isinstance(link, Link))
    return [(name, number) for name, link in links for number in link.numbers()]


def at_large(entries: Entries, names: Sequence[str]) -> list[str]:
    """Return of links with something of one name those that the name alone may mean.

    Args:
      entries: the links of a chain, by name.
      names: of the links that have it.
    """
    return [name for name in names if not is_of_rules(entries[name])] or list(names)


def meant(entries: Entries, name: str) -> list[Pair]:
    """Return the link and the number that `name`, or `link/number`, stands for.

    Behind it are the numbers of rules that share it, where the name does not say the link.

    Raises:
      ValueError: there is none, or it is not clear which is meant.
    """
    known = all_numbers(entries)
    found = [pair for pair in known if name in _spellings(*pair)]
    main = at_large(entries, [owner for owner, _ in found])
    if len(main) != 1:
        raise _unclear(name, found, known)
    set_by_it = [pair for pair in found if pair[0] in main or _is_shared(entries, *pair)]
    return sorted(set_by_it, key=lambda pair: pair[0] not in main)


def _unclear(name: str, found: Sequence[Pair], known: Sequence[Pair]) -> ValueError:
    """Return the error for a name that stands for none of the numbers, or for several."""
    full = ["/".join(pair) for pair in found or known]
    if found:
        return ValueError(f"`{name}` is a number of several links: name one of {full}.")
    if not known:
        return ValueError(
            f"No link has a number `{name}`: those of optax are fixed when built. A rate that can "
            "be set is a link of a chain, `rate=ScaleByLearningRate(...)`."
        )
    near = nearest(name, [*full, *(number for _, number in known)])
    return ValueError(f"No link has a number `{name}`. Nearest: {near}. All: {full}.")


def _is_shared(entries: Entries, owner: str, number: str) -> bool:
    entry = entries[owner]
    return isinstance(entry, Sharing) and entry.number == number


def _spellings(owner: str, number: str) -> set[str]:
    """Return by which names a number may be set; that of a pattern also without its field."""
    pattern = number.partition("/")[2]
    return {number, f"{owner}/{number}"} | ({f"{owner}/{pattern}"} if pattern else set())
