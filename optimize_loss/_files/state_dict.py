"""A `TrainState` as nested dicts by name, for tools that save trees of arrays."""

import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optimize_loss._checks import CheckpointMismatch, InvalidType
from optimize_loss._files.named import Frame, check_state, is_key, key_kind, trees
from optimize_loss._names import leaf_names, leaf_parts
from optimize_loss._state.train_state import TrainState


def to_state_dict(state: TrainState) -> dict[str, Any]:
    """Return a state as nested dicts of arrays by name, whatever shares an array inside of it.

    The keys are `params`, `optimizer`, `model_state`, `key`, `first_step` and `batches`; below
    them, those of the user's trees. Of typed random keys the dict has the data, under the name of
    their kind. Orbax and other tools that save trees of arrays can keep it. What they give back is
    readable, and `from_state_dict` makes a state of it.

    Args:
      state: what `TrainStep.init` or a step returned; of shapes, too, as `jax.eval_shape` makes
        them. The dict may have arrays of the state: save it, or copy them, before the state is
        given to a step.

    Raises:
      InvalidType: `state` is no TrainState.
      ValueError: two leaves have one name.

    Example:
      >>> import optimize_loss as ol
      >>> step = ol.optimize_loss(lambda p, x: p["w"] * x, learning_rate=0.5, optimizer="SGD")
      >>> tree = ol.to_state_dict(step.init({"w": 10.0}))
      >>> print(tree["params"], sorted(tree["optimizer"]))
      {'w': Array(10., dtype=float32)} ['gradient_norm', 'rate', 'step']
    """
    if not isinstance(state, TrainState):
        raise InvalidType(
            "`state` must be a TrainState, from `step.init(params)` or a step. "
            f"Received: {type(state).__name__}."
        )
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(state)):
        return jax.eval_shape(to_state_dict, state)
    tree = trees(state)
    leaf_names(tree)  # two of one name would become one
    made: dict[str, Any] = {}
    for parts, leaf in zip(leaf_parts(tree), jax.tree.leaves(tree), strict=True):
        if is_key(leaf):
            parts, leaf = (*parts, key_kind(leaf)), jax.random.key_data(leaf)
        inner = made
        for part in parts[:-1]:
            inner = inner.setdefault(part, {})
        inner[parts[-1]] = leaf
    return made


def from_state_dict(like: TrainState, tree: Mapping[str, Any]) -> TrainState:
    """Return the state of which `to_state_dict` made these dicts.

    Args:
      like: a state with the structure wanted, as `step.init(params)` returns it. It is not
        changed, and may be used on.
      tree: nested dicts of jax or numpy arrays; they are copied. `ol.to_state_dict(like)` has
        the form that a tool may want to be told.

    Returns:
      The state, with every leaf where that of `like` is.

    Raises:
      CheckpointMismatch: a name, a shape, a dtype or the kind of a random key differs; nothing is
        cast.
      InvalidType: `like` is no TrainState, or traced; or `tree` is no dict.
      RuntimeError: the memory of `like` was given to a step.

    Example:
      >>> import optimize_loss as ol
      >>> step = ol.optimize_loss(lambda p, x: p["w"] * x, learning_rate=0.5, optimizer="SGD")
      >>> state, _ = step(step.init({"w": 10.0}), 4.0)
      >>> again = ol.from_state_dict(step.init({"w": 0.0}), ol.to_state_dict(state))
      >>> print(again.params["w"], again.step)
      8.0 1
    """
    if not isinstance(tree, Mapping):
        raise InvalidType(f"`tree` must be a dict. Received: {tree!r:.200}.")
    frame = Frame(check_state("like", like))
    wanted = {_key_in_tree(name, leaf): name for name, leaf in frame.outline.items()}
    found = dict(zip(leaf_names(tree), jax.tree.leaves(tree), strict=True))
    found.setdefault("batches", found.get("optimizer/step"))  # an older one counts updates alone
    _check_names(set(wanted), set(found))
    for key, name in wanted.items():
        _check_kind(name, frame.outline[name], found[key])
        frame.put(name, found[key])
    return frame.state()


def _key_in_tree(name: str, leaf: Any) -> str:
    return f"{name}/{key_kind(leaf)}" if is_key(leaf) else name


def _check_names(wanted: set[str], found: set[str]) -> None:
    if wanted != found:
        pairs = (("`like`", sorted(wanted - found)), ("`tree`", sorted(found - wanted)))
        only = [f"Only in {where}: {names[:10]}." for where, names in pairs if names]
        raise CheckpointMismatch(
            f"`tree` must have the leaves of `like`. {' '.join(only)} Make `like` with a step that "
            "has the options and parameters of the one that made `tree`. For a state whose links "
            "have changed since, use `ol.save` and `ol.restore`, which match what has a place."
        )


def _check_kind(name: str, like: Any, leaf: Any) -> None:
    if is_key(like):
        like = jax.eval_shape(jax.random.key_data, like)
    came = np.shape(leaf), jnp.result_type(leaf)
    if came != (like.shape, like.dtype):
        raise CheckpointMismatch(
            f"`tree` must have at {name!r} shape {like.shape} and dtype {like.dtype}: nothing is "
            f"cast. Received: shape {came[0]}, dtype {came[1]}. Make `like` with parameters and a "
            "`precision` as they were, or cast the array in `tree`."
        )


def register_with_flax() -> None:
    """Tell flax how to serialize a state, if flax is there: it is not imported for this."""
    serialization = sys.modules.get("flax.serialization")
    register = getattr(serialization, "register_serialization_state", None)
    if serialization and register and not serialization.is_serializable(TrainState):
        register(TrainState, to_state_dict, from_state_dict)


register_with_flax()
