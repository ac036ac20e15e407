"""The state of a chain in boxes: what an optimizer keeps between calls."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from optimize_loss._checks import CheckpointMismatch
from optimize_loss._names import leaf_names
from optimize_loss.optimizers._variable import Variable
from optimize_loss.transforms import Chain, Link

ITERATION = "iteration"


class Held:
    """The state of a chain over named parameters, each array of it in a `Variable`.

    Args:
      chain: the chain.
      params: the parameters by name, as they are now.
      boxes: variables that stand for arrays of the state, by their names in it.
      mesh: where given, arrays that are not on a mesh yet are placed there, one copy a device.
    """

    def __init__(
        self,
        chain: Chain,
        params: Mapping[str, jax.Array],
        boxes: Mapping[str, Variable],
        mesh: jax.sharding.Mesh | None,
    ):
        self.chain = chain
        state = on_mesh(chain.init(dict(params)), mesh)
        leaves, self._structure = jax.tree.flatten(state)
        pairs = zip(leaf_names(state), leaves, strict=True)
        self._boxes = [boxes[n] if n in boxes else Variable(x, n) for n, x in pairs]
        self._names = leaf_names(state)
        self._dtypes = [x.dtype for x in leaves]
        self.names = list(params)

    @property
    def state(self) -> dict[str, Any]:
        """The state, as the chain knows it."""
        pairs = zip(self._boxes, self._dtypes, strict=True)
        return jax.tree.unflatten(self._structure, [box.value.astype(d) for box, d in pairs])

    def keep(self, state: Mapping[str, Any]) -> None:
        """Put another state of the same chain into the boxes."""
        for box, x, dtype in zip(self._boxes, jax.tree.leaves(state), self._dtypes, strict=True):
            if box.dtype == dtype:
                box.assign(x)

    @property
    def variables(self) -> dict[str, Variable]:
        """The boxes by name, without those of hyperparameters."""
        numbers = {
            f"{name}/{number}"
            for name, _ in self.chain.links
            if isinstance(link := self.chain.link(name), Link)
            for number in link.numbers()
        }
        pairs = zip(self._names, self._boxes, strict=True)
        kept = {ITERATION if n == "step" else n: box for n, box in pairs if n not in numbers}
        return {ITERATION: kept.pop(ITERATION), **kept}

    def apply(
        self, grads: Mapping[str, Any], params: Mapping[str, Any], compiled: bool
    ) -> dict[str, Any]:
        """Return the new parameters, and keep the new state.

        Args:
          grads: the gradients of some of the parameters.
          params: all parameters.
          compiled: whether to compile the update.
        """
        run = _apply_compiled if compiled else _apply
        given = {name: grads.get(name) for name in params}
        new, state = run(self.chain, given, self.state, dict(params))
        self.keep(state)
        return new

    def save(self, store: Any) -> None:
        """Write all variables into a mapping."""
        for name, box in self.variables.items():
            store[name] = box.numpy()

    def load(self, store: Any) -> None:
        """Read all variables from a mapping that has the same ones, or change nothing.

        Raises:
          CheckpointMismatch: names, a shape or a dtype differ.
        """
        own, found = self.variables, flattened(store)
        missing, extra = sorted(own.keys() - found.keys()), sorted(found.keys() - own.keys())
        if missing or extra:
            raise CheckpointMismatch(
                "The store must have this optimizer's variables. "
                f"Missing: {missing}. Extra: {extra}."
            )
        for name, box in own.items():
            came, wanted = (np.shape(found[name]), found[name].dtype), (box.shape, box.dtype)
            if came != wanted:
                raise CheckpointMismatch(
                    f"The variable {name!r} must have the shape and dtype {wanted}. "
                    f"Received: {came}."
                )
        for name, box in own.items():
            box.assign(placed(box, found[name]))


def placed(box: Variable, value: Any) -> jax.Array:
    """Return `value` where the value of the box is."""
    old = box.value
    return jax.device_put(value, old.sharding) if old.committed else jax.numpy.asarray(value)


def on_mesh(state: Any, mesh: jax.sharding.Mesh | None) -> Any:
    """Return the state with all arrays on the mesh; what is not sharded over it is copied."""
    if mesh is None:
        return state
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def put(x: jax.Array) -> jax.Array:
        there = isinstance(x.sharding, jax.sharding.NamedSharding) and x.sharding.mesh == mesh
        return x if there else jax.device_put(x, everywhere)

    return jax.tree.map(put, state)


def flattened(store: Any, prefix: str = "") -> dict[str, Any]:
    """Return the arrays of a mapping by name; those of groups in it, as h5py has, by path."""
    arrays = {}
    for name in store:
        value = store[name]
        inside = hasattr(value, "keys")
        arrays |= flattened(value, f"{prefix}{name}/") if inside else {prefix + name: value}
    return arrays


def _apply(chain: Chain, grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
    return chain.apply(grads, state, params)


_apply_compiled = functools.partial(jax.jit, static_argnums=0)(_apply)
