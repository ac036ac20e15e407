"""The parameters to evaluate, where some link of a chain keeps better ones."""

from typing import Any

import jax

from optimize_loss.transforms._base import Link
from optimize_loss.transforms._chain import Chain


def averaged_params(chain: Chain, state: dict[str, Any], params: Any) -> Any:
    """Return all parameters, those that a link averages as it has them.

    Args:
      chain: the links.
      state: their state, whose slots are trees like `params`, with None for what is not trained.
      params: all parameters, those that are not trained included.
    """
    leaves, treedef = jax.tree.flatten(params)
    marks = [False] * len(leaves)
    for name, _ in chain.links:
        link = chain.link(name)
        if isinstance(link, Link) and link.averages:
            numbers = {*link.numbers(), *link.memory()}
            for slot in (tree for key, tree in state[name].items() if key not in numbers):
                kept = treedef.flatten_up_to(slot)
                marks = [m or x is not None for m, x in zip(marks, kept, strict=True)]
    if not any(marks):
        return params
    kept = [x if m else None for x, m in zip(leaves, marks, strict=True)]
    averaged = chain.averaged(state, treedef.unflatten(kept))
    found = treedef.flatten_up_to(averaged)
    return treedef.unflatten(
        new if m else x for new, x, m in zip(found, leaves, marks, strict=True)
    )
