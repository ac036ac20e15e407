"""States and chains as text that fits on a screen."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from optimize_loss._engine.device import fetched, has_values
from optimize_loss._engine.link import Link
from optimize_loss._engine.numbers import FOLLOW_SCHEDULE
from optimize_loss._engine.selection import linked

_MOST = 20  # parameters, in lines of their own


def parameters_text(names: Sequence[str], leaves: Sequence[Any]) -> Iterator[str]:
    """Yield lines: how many parameters there are, then each with its dtype and shape."""
    yield arrays_text("params", leaves)
    few = names if len(names) <= _MOST else names[: _MOST - 1]
    width = max(map(len, few), default=0)
    yield from (
        f"  {n.ljust(width)}  {shown(as_shape(x))}" for n, x in zip(few, leaves, strict=False)
    )
    if len(few) < len(names):
        yield f"  … and {len(names) - len(few):,} more"


def arrays_text(name: str, leaves: Sequence[Any]) -> str:
    """Return a line on some arrays: how many there are, and how many entries they have."""
    sizes = [math.prod(leaf.shape) for leaf in leaves if hasattr(leaf, "shape")]
    return f"{name}: {len(leaves):,}, {sum(sizes):,} entries"


def as_shape(x: Any) -> Any:
    """Return the shape and the dtype of an array, traced or not; what is none as it is."""
    has_both = hasattr(x, "shape") and hasattr(x, "dtype")
    return jax.ShapeDtypeStruct(x.shape, x.dtype) if has_both else x


def shown(x: Any) -> str:
    """Return a number as text; what is no single one as its dtype and shape."""
    if has_values(x) and not x.shape and x.is_fully_replicated:
        x = np.asarray(x).item()
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"{x.dtype.name}[{','.join(map(str, x.shape))}]"
    return f"{x:.6g}" if isinstance(x, float) else repr(x)


def links_text(links: Mapping[str, Any], state: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield a line for each link: its name, and what it is with its numbers as they are now.

    Args:
      links: the links of a chain.
      state: the state of the chain; None where it has no values.
    """
    for name, link in linked(links):
        numbers = {}
        if isinstance(link, Link):
            now = link.numbers() if state is None else {n: state[name][n] for n in link.numbers()}
            numbers = {n: _number(x, link.rule(n).kind) for n, x in now.items()}
        inside = ", ".join(f"{n}={text}" for n, text in numbers.items())
        yield f"  {name}: {type(link).__name__}({inside})"


def _number(number: Any, kind: str) -> str:
    if has_values(number):
        array = fetched([number])[0]
        array = array[..., 0] if kind == "decay" else array  # of the pair
        number = array if array.ndim else array.item()
    is_scheduled = callable(number) or (isinstance(number, float) and number == FOLLOW_SCHEDULE)
    return "schedule" if is_scheduled else shown(number)
