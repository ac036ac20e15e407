"""Models of other libraries: which of their arrays are trained, and modules of flax nnx."""

import dataclasses
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from optimize_loss._checks import InvalidType
from optimize_loss._names import is_nnx, leaf_paths

KEPT_BY_FLAX = ("BatchStat", "Cache", "Intermediate", "RngState")
COLLECTIONS = ("batch_stats", "cache", "intermediates", "perturbations")  # of linen
MOVING_MEAN = re.compile(r"/~/(mean|var)_ema/(average|counter|hidden)$")  # of Haiku

_NNX = (
    "Give the module itself, as in `step.init(model)`, with a loss of `(model, *batch)`. Or split "
    "it, `graph, params, rest = nnx.split(model, nnx.Param, ...)`, and give the rest as the model "
    "state: `step.init(params, model_state=rest)`."
)
_LINEN = (
    "Give them apart, as in `step.init(variables['params'], model_state=variables['batch_stats'])`."
    " The loss declares `*, model_state`, applies the model with `mutable=['batch_stats']`, and "
    "returns the new ones in `Aux(model_state=...)`."
)
_HAIKU = (
    "Give them apart, as in `params, rest = model.init(key, x)` and "
    "`step.init(params, model_state=rest)`. The loss declares `*, model_state` and returns the new "
    "one in `Aux(model_state=...)`."
)
_EQUINOX = (
    "Give it apart, as in `model, rest = eqx.nn.make_with_state(Model)(...)` and "
    "`step.init(params, model_state=rest)`, where `params, static = eqx.partition(model, "
    "eqx.is_inexact_array)`. The loss declares `*, model_state` and returns the new one in "
    "`Aux(model_state=...)`."
)


@dataclasses.dataclass(frozen=True)
class Graph:
    """How parameters and all other state make up a module of flax nnx, or a tree of modules.

    Attributes:
      graph: what `nnx.split` says of the structure.
    """

    graph: Any

    def join(self, params: Any, rest: Any) -> Any:
        """Return the module; its variables are its own, so that the loss may write to them."""
        return _nnx().merge(self.graph, fresh(params), fresh(rest))

    def rest(self, module: Any, params: Any) -> Any:
        """Return all state of a module but for its parameters, after the loss has used it.

        Args:
          module: as `join` returned it.
          params: those that it was made of. There is a warning if the loss has written to them.
        """
        _, written, rest = _nnx().split(module, _nnx().Param, ...)
        names, leaves = leaf_paths(params), jax.tree.leaves(params)
        now = dict(zip(leaf_paths(written), jax.tree.leaves(written), strict=True))
        changed = [n for n, x in zip(names, leaves, strict=True) if now.get(n) is not x]
        if changed:
            warnings.warn(
                f"The loss writes to parameters, which has no effect: {changed[:5]}. Only the "
                "update changes them; make state of another kind than `nnx.Param` of what the "
                "loss is to change.",
                stacklevel=2,
            )
        return rest


def split(params: Any) -> tuple[Any, Any, Graph | None]:
    """Return the parameters of modules of flax nnx, all their other state, and the structure.

    A tree without such a module is returned as it is, with None for the others.

    Raises:
      InvalidType: there is something else beside modules.
    """
    if "flax.nnx" not in sys.modules:
        return params, None, None
    paths = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_module)
    if not any(_is_module(node) for _, node in paths):
        return params, None, None
    if others := [jax.tree_util.keystr(path) for path, node in paths if not _is_module(node)]:
        raise InvalidType(
            "`params` must be a module of flax nnx, or a tree of modules alone. "
            f"Received: something else at {others[:5]}. Make it an `nnx.Param` of a module."
        )
    graph, trained, rest = _nnx().split(params, _nnx().Param, ...)
    return trained, rest, Graph(graph)


def fresh(tree: Any) -> Any:
    """Return a tree with the same arrays in nodes of its own.

    A loss may change the nodes that it is given, such as the variables of flax nnx and the `State`
    of Equinox.
    """
    return jax.tree.map(lambda x: x, tree)


def check_trained(params: Any) -> None:
    """Raise if there is state among the parameters that a library keeps apart from them.

    Raises:
      InvalidType: there is; the message names it, and says what to write.
    """
    for found, advice in (
        (_of_nnx(params), _NNX),
        (_of_linen(params), _LINEN),
        (_of_haiku(params), _HAIKU),
        (_of_equinox(params), _EQUINOX),
    ):
        if some := list(found):
            more = f" and {len(some) - 5} more" if len(some) > 5 else ""
            raise InvalidType(
                "`params` must be parameters alone: all else would be trained as if it were one, "
                f"and not change as its library says. Received: {', '.join(some[:5])}{more}. "
                f"{advice}"
            )


def _nnx() -> Any:
    return sys.modules["flax.nnx"]


def _is_module(node: Any) -> bool:
    return isinstance(node, _nnx().Module)


def _of_nnx(params: Any) -> Iterator[str]:
    """Yield variables that are no parameters, where others are, or flax keeps such as state."""
    pairs = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_nnx)
    pairs = [(path, node) for path, node in pairs if is_nnx(node)]
    others = [(path, node) for path, node in pairs if not is_nnx(node, "Param")]
    is_mixed = len(others) < len(pairs)
    for path, node in others:
        if is_mixed or is_nnx(node, *KEPT_BY_FLAX):
            yield f"{type(node).__name__} {_name(path)!r}"


def _of_linen(params: Any) -> Iterator[str]:
    if isinstance(params, Mapping) and ("params" in params or "batch_stats" in params):
        yield from (f"the collection {name!r}" for name in COLLECTIONS if name in params)


def _of_haiku(params: Any) -> Iterator[str]:
    return (f"the state {name!r}" for name in leaf_paths(params) if MOVING_MEAN.search(name))


def _of_equinox(params: Any) -> Iterator[str]:
    pairs = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_equinox_state)
    for path, node in pairs:
        if _is_equinox_state(node) and jax.tree.leaves(node):
            yield f"{type(node).__name__} at {_name(path)!r}"


def _is_equinox_state(node: Any) -> bool:
    kind = type(node)
    return kind.__name__ in ("State", "StateIndex") and kind.__module__.startswith("equinox.")


def _name(path: Sequence[Any]) -> str:
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")
