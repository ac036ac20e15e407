"""A `TrainState` as arrays by name, and back, whatever shares an array inside of it.

By flat names for files, and as nested dicts for tools that save trees of arrays.
"""

import collections
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import multihost_utils

from optimize_loss._checks import CheckpointMismatch, InvalidType
from optimize_loss._engine.device import copy
from optimize_loss._names import leaf_names, leaf_parts
from optimize_loss._state.train_state import TrainState

_FIELDS = ("model_state", "key", "first_step", "batches")  # beside `params` and `optimizer`


def is_key(leaf: Any) -> bool:
    """Return whether a leaf holds typed random keys."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def key_kind(leaf: Any) -> str:
    """Return the name of what makes random bits of typed keys."""
    return str(jax.random.key_impl(leaf))


def check_state(argument: str, state: Any) -> TrainState:
    """Return `state` if it is a TrainState with values.

    Raises:
      InvalidType: it is something else, or traced.
      RuntimeError: it was donated to a step.
    """
    if not isinstance(state, TrainState):
        raise InvalidType(
            f"`{argument}` must be a TrainState, from `step.init(params)` or a step. "
            f"Received: {type(state).__name__}."
        )
    leaves = jax.tree.leaves(state)
    if strange := [x for x in leaves if not isinstance(x, jax.Array) or isinstance(x, Tracer)]:
        raise InvalidType(
            f"`{argument}` must have values, and not be traced by jit or vmap. "
            f"Received: {strange[0]!r} in it."
        )
    if any(leaf.is_deleted() for leaf in leaves):
        raise RuntimeError(
            f"`{argument}` was donated: a step gives its memory to the state that it returns. "
            "Use that one, as in `state, metrics = step(state, batch)`."
        )
    return state


def named(state: TrainState) -> dict[str, Any]:
    """Return the leaves of a state by name, as the user's trees have them.

    They are `params/<name>`, `optimizer/<link>/<slot>/<name>`, `optimizer/<link>/<number>`,
    `optimizer/step`, `model_state/<name>`, `key`, `first_step` and `batches`.

    Raises:
      ValueError: two leaves have one name.
    """
    tree = trees(state)
    return dict(zip(leaf_names(tree), jax.tree.leaves(tree), strict=True))


def trees(state: TrainState) -> dict[str, Any]:
    """Return what a state holds by name, in the user's trees."""
    tree = {"params": state.params, "optimizer": state.optimizer}
    return tree | {name: getattr(state, name) for name in _FIELDS}


def outline(state: TrainState) -> dict[str, Any]:
    """Return the shape and the dtype of every leaf by name; random keys as they are."""

    def shape(x: jax.Array) -> Any:
        return x if is_key(x) else jax.ShapeDtypeStruct(x.shape, x.dtype)

    return named(jax.tree.map(shape, state))


def on_host(state: TrainState) -> dict[str, np.ndarray]:
    """Return all leaves by name as numpy arrays, fetched at once; of random keys, their data.

    Sharded arrays are gathered in every process, so all of them must call it.
    """
    data = jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, state)
    whole = jax.tree.map(_gathered, data)
    return {name: np.asarray(x) for name, x in named(jax.device_get(whole)).items()}


def _gathered(leaf: jax.Array) -> Any:
    """Return an array of which this process has all entries."""
    if leaf.is_fully_addressable or leaf.is_fully_replicated:
        return leaf
    return multihost_utils.process_allgather(leaf, tiled=True)


def first_process() -> bool:
    """Return whether this is the process that writes, of one or of several."""
    return jax.process_index() == 0


def agreed(true_here: bool) -> bool:
    """Return whether this is true in every process. All must call it; each waits for all."""
    if jax.process_count() == 1:
        return true_here
    return bool(multihost_utils.process_allgather(np.asarray(true_here)).all())


class Frame:
    """A state whose leaves can be replaced by name. With several processes, all must make it.

    Attributes:
      outline: the shape and the dtype of every leaf by name; random keys as they are.
    """

    def __init__(self, state: TrainState):
        self.outline = outline(state)
        self._leaves, self._structure = jax.tree.flatten(state)
        self._replaced: set[int] = set()
        self._places = named(self._structure.unflatten(range(len(self._leaves))))
        found = collections.Counter(self._places.values())
        shared = {
            i
            for name, i in self._places.items()
            if found[i] > 1 or self.outline[name].shape != self._leaves[i].shape
        }
        # Parameters, slots or numbers in one array: their parts are views of it.
        self._buffers = {i: np.array(_gathered(self._leaves[i])) for i in shared}
        self._views = named(
            self._structure.unflatten([self._buffers.get(i, i) for i in range(len(self._leaves))])
        )

    def get(self, name: str) -> Any:
        """Return a leaf, all of it; one of a shared array as a copy. All processes must call it."""
        place = self._places[name]
        if place in self._buffers:
            return self._views[name].copy()
        leaf = self._leaves[place]
        return leaf if leaf.is_fully_addressable else np.asarray(_gathered(leaf))

    def put(self, name: str, array: Any) -> None:
        """Replace a leaf by an array of its shape and dtype; random keys are given by their data.

        It goes where the leaf is: to the same device, or spread over the same devices.
        """
        place = self._places[name]
        if place in self._buffers:
            self._views[name][...] = np.asarray(array)
        else:
            new = _placed(array, self._leaves[place])
            # So that the memory of one array is free before the next one is read.
            self._leaves[place] = jax.block_until_ready(new)
            self._replaced.add(place)

    def state(self) -> TrainState:
        """Return the state with all that was put into it, and copies of all else.

        A step donates its state, and must not donate the first one with it.
        """
        new = list(self._leaves)
        for i, leaf in enumerate(self._leaves):
            if i in self._buffers:
                new[i] = _placed(self._buffers[i], leaf)
            elif i not in self._replaced:
                new[i] = copy(leaf)
        return self._structure.unflatten(jax.block_until_ready(new))


def _placed(array: Any, like: jax.Array) -> jax.Array:
    """Return an array where another one is."""
    if is_key(like):
        keys = jax.random.wrap_key_data(jnp.array(array), impl=key_kind(like))
        return jax.device_put(keys, like.sharding) if like.committed else keys
    if isinstance(array, jax.Array) and array.sharding == like.sharding:
        return jnp.copy(array)  # a step donates the state, not the caller's array
    if not like.is_fully_addressable:
        whole = np.asarray(array)
        return jax.make_array_from_callback(like.shape, like.sharding, lambda i: whole[i])
    place = like.sharding if like.committed else None
    new = jax.device_put(copy(array) if isinstance(array, jax.Array) else array, place)
    if new.dtype != like.dtype:
        raise CheckpointMismatch(
            f"`like` must be of this mode of JAX: {like.dtype} becomes {new.dtype} in it. Restore "
            "with `jax_enable_x64` as it was when `like` was made."
        )
    return new


def to_state_dict(state: TrainState) -> dict[str, Any]:
    """Return a state as nested dicts of arrays by name, even if parameters share arrays in it.

    The keys are `params`, `optimizer`, `model_state`, `key`, `first_step` and `batches`; below them
    are the keys of the user's trees. Typed random keys are stored as their data, under the name of
    their kind. Orbax and other tools that save trees of arrays can save the dict, and
    `from_state_dict` turns it back into a state.

    Args:
      state: from `TrainStep.init` or a step; or its shapes, from `jax.eval_shape`. The dict may
        share arrays with the state: save it, or copy it, before the next step donates the state.

    Raises:
      InvalidType: `state` is not a TrainState.
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
    """Return the state from which `to_state_dict` made these dicts.

    Args:
      like: a state with the structure wanted, as `step.init(params)` returns it. It is not changed,
        and you can still use it.
      tree: nested dicts of jax or numpy arrays; they are copied. If a tool needs the expected
        structure, pass it `ol.to_state_dict(like)`.

    Returns:
      The state, with the sharding of `like`.

    Raises:
      CheckpointMismatch: a name, a shape, a dtype or the kind of a random key differs; nothing is
        cast.
      InvalidType: `like` is not a TrainState, or is traced; or `tree` is not a dict.
      RuntimeError: `like` was donated to a step.

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
    """Register the state with `flax.serialization` if flax has been imported."""
    serialization = sys.modules.get("flax.serialization")
    register = getattr(serialization, "register_serialization_state", None)
    if serialization and register and not serialization.is_serializable(TrainState):
        register(TrainState, to_state_dict, from_state_dict)


register_with_flax()
