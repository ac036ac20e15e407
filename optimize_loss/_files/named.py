"""A `TrainState` as arrays by name, and back, whatever shares an array inside of it."""

import collections
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import multihost_utils

from optimize_loss._checks import CheckpointMismatch, InvalidType
from optimize_loss._engine.device import copy
from optimize_loss._names import leaf_names
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
      RuntimeError: its memory was given to a step.
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

    What is spread over devices comes whole, in every process: all of them must call it.
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
