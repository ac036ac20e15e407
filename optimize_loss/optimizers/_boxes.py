"""The state of a chain in variables: what an optimizer keeps between calls."""

import collections
import dataclasses
import functools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from optimize_loss._checks import CheckpointMismatch, InvalidType, nearest, received
from optimize_loss._names import leaf_names
from optimize_loss.optimizers._update_step import UpdateStep
from optimize_loss.optimizers._variable import Variable, placed
from optimize_loss.transforms import Chain, ForParameters, Link

ITERATION = "iteration"


class Boxes:
    """The state of a chain over named parameters, each array of it in a `Variable`.

    Args:
      chain: the chain.
      params: the parameters by name, as they are now.
      boxes: variables that stand for arrays of the state, by their names in it. Others than the
        state has are kept beside it.
      mesh: where given, arrays that are not on a mesh yet are placed there, one copy a device.
    """

    def __init__(
        self,
        chain: Chain,
        params: Mapping[str, jax.Array],
        boxes: Mapping[str, Variable],
        mesh: jax.sharding.Mesh | None,
    ):
        self.chain = self._last = chain  # the one that is compiled, and the one with the numbers
        self._params = {n: jax.ShapeDtypeStruct(p.shape, p.dtype) for n, p in params.items()}
        state = on_mesh(chain.init(self._in_order(params)), mesh)
        leaves, self._structure = jax.tree.flatten(state)
        self._names = leaf_names(state)
        pairs = zip(self._names, leaves, strict=True)
        self._boxes = [boxes[n] if n in boxes else Variable(x, n) for n, x in pairs]
        self._dtypes = [x.dtype for x in leaves]
        self._given = dict(boxes)
        for box, leaf in zip(self._boxes, leaves, strict=True):
            if (value := placed(leaf, box.value)) is not box.value:
                box.assign(value)

    def _in_order(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return a dict in the order of the variables; the leaves of a plain one are sorted."""
        return collections.OrderedDict((name, params.get(name)) for name in self._params)

    @property
    def state(self) -> dict[str, Any]:
        """The state, as the chain knows it."""
        pairs = zip(self._boxes, self._dtypes, strict=True)
        leaves = [box.value if box.dtype == d else box.value.astype(d) for box, d in pairs]
        return jax.tree.unflatten(self._structure, leaves)

    def keep(self, state: Mapping[str, Any], with_numbers: bool = False) -> None:
        """Put another state of the same chain into the boxes; no update changes the numbers."""
        skipped = set() if with_numbers else self._numbers()
        leaves = zip(self._names, self._boxes, jax.tree.leaves(state), self._dtypes, strict=True)
        for name, box, x, dtype in leaves:
            if name not in skipped and box.dtype == dtype:
                box.assign(x)

    def _numbers(self) -> set[str]:
        """Return the names of hyperparameters in the state."""
        found = links_of(self.chain)
        return {f"{name}/{number}" for name, link in found.items() for number in link.numbers()}

    @property
    def variables(self) -> dict[str, Variable]:
        """The boxes by name, without those of hyperparameters; those given come last."""
        numbers, pairs = self._numbers(), zip(self._names, self._boxes, strict=True)
        kept = {n: box for n, box in pairs if n not in numbers}
        steps = {ITERATION: kept.pop("step")}
        given = {n: box for n, box in self._given.items() if n not in numbers and n != "step"}
        return {**steps, **{n: box for n, box in kept.items() if n not in given}, **given}

    def after(
        self, grads: Mapping[str, Any], params: Mapping[str, Any], compiled: bool
    ) -> tuple[dict[str, Any], Any]:
        """Return the parameters and the state after an update; nothing is kept.

        Args:
          grads: the gradients of some of the parameters.
          params: all parameters.
          compiled: whether to compile the update.
        """
        self._check_gradients(grads, params)
        run, before = _apply_compiled if compiled else _apply, [box.value for box in self._boxes]
        result = run(self.chain, self._in_order(grads), self.state, self._in_order(params))
        changed = [b for b, x in zip(self._boxes, before, strict=True) if b.value is not x]
        if changed:
            _put_back(self._boxes, before)
            raise ValueError(
                "`update_step` must assign to variables of the optimizer that it is called on, "
                "`self`, and not through functions that were made for another one. "
                f"Received: a new value for {changed[0].name!r}."
            )
        return result

    def _check_gradients(self, grads: Mapping[str, Any], params: Mapping[str, Any]) -> None:
        """Raise if the parameters are others, or without any gradient; warn if one is missing."""
        self.check_names(params)
        missing = [name for name, grad in grads.items() if grad is None]
        if len(missing) == len(grads):
            raise ValueError(
                f"No gradients: the gradient of every parameter is None. Parameters: {missing}."
            )
        if missing:
            warnings.warn(
                f"There is no gradient for {missing}: they are left as they are.", stacklevel=6
            )

    def averaged(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return all parameters by name, averaged where the chain keeps averages."""
        return self.chain.averaged(self.state, self._in_order(params))

    def check_names(self, names: Iterable[str]) -> None:
        """Raise unless these are the names of all parameters."""
        names = list(names)
        if unknown := [name for name in names if name not in self._params]:
            raise ValueError(
                f"The optimizer was built for other parameters: it has no {unknown}. "
                f"Nearest: {nearest(unknown[0], self._params)}."
            )
        if missing := [name for name in self._params if name not in names]:
            raise ValueError(
                f"The optimizer was built for more parameters. Missing: {missing}. "
                f"Received: {names}."
            )

    def renew(self, chain: Chain) -> None:
        """Go on with a chain that has other numbers, or other attributes of a custom rule.

        Raises:
          ValueError: it differs in more; nothing is changed.
        """
        start = _with_recipes_of(chain, self._last)
        try:
            new, state = start.with_numbers_of(chain, self.state)
            if start is not self._last:
                self._check_same(jax.eval_shape(new.init, self._in_order(self._params)))
        except ValueError as error:
            raise ValueError(
                "Once an optimizer is built, only its numbers can be changed. " + str(error)
            ) from error
        self.chain, self._last = self.chain if new is self._last else new, chain
        self.keep(state, with_numbers=True)

    def _check_same(self, made: Any) -> None:
        """Raise unless another chain has made a state of the same shapes and dtypes."""
        if _shapes(made) != _shapes(self.state):
            raise ValueError(
                f"`build` must make the variables of before, {self._names}. "
                f"Received: {leaf_names(made)}."
            )

    def set(self, weights: Sequence[Any]) -> None:
        """Assign to all variables, in the order of `variables`, or to none.

        Raises:
          ValueError: their number differs.
          TreeMismatch: a shape differs.
        """
        boxes = list(self.variables.values())
        if len(weights) != len(boxes):
            raise ValueError(
                f"`weights` must be as many as the optimizer has variables, {len(boxes)}. "
                f"Received: {len(weights)}."
            )
        before = [box.value for box in boxes]
        try:
            for box, old, weight in zip(boxes, before, weights, strict=True):
                box.assign(placed(old, box.assign(weight).value))
        except Exception:
            _put_back(boxes, before)
            raise

    def save(self, store: Any) -> None:
        """Write all variables into a mapping.

        Raises:
          ValueError: a name is the beginning of another: in h5py it would be an array and a group.
        """
        variables = self.variables
        for name in variables:
            if inside := [other for other in variables if other.startswith(f"{name}/")]:
                raise ValueError(
                    f"The names of variables must not begin with another and '/'. "
                    f"Received: {name!r} and {inside[0]!r}."
                )
        for name, box in variables.items():
            store[name] = box.numpy()

    def load(self, store: Any) -> None:
        """Read all variables from a mapping that has the same ones, or change nothing.

        Raises:
          CheckpointMismatch: names, a shape or a dtype differ.
          InvalidType: `store` is not a mapping.
        """
        if not hasattr(store, "keys"):
            raise InvalidType(f"`store` must be a mapping of arrays. {received('store', store)}")
        own, found = self.variables, flattened(store)
        for name in own.keys() & found.keys():
            # numpy and h5py write bfloat16 as bytes without a name
            if found[name].dtype == np.dtype(f"V{own[name].dtype.itemsize}"):
                found[name] = found[name].view(own[name].dtype)
        missing, extra = sorted(own.keys() - found.keys()), sorted(found.keys() - own.keys())
        if missing or extra:
            raise CheckpointMismatch(
                "The store must have this optimizer's variables. "
                f"Missing: {missing}. Extra: {extra}."
            )
        for name, box in own.items():
            came, wanted = (found[name].shape, found[name].dtype), (box.shape, box.dtype)
            if came != wanted:
                raise CheckpointMismatch(
                    f"The variable {name!r} must have the shape and dtype {wanted}. "
                    f"Received: {came}."
                )
        for name, box in own.items():
            box.assign(placed(box.value, found[name]))


def _shapes(state: Any) -> Any:
    return jax.tree.map(lambda x: (x.shape, x.dtype), state)


def _put_back(boxes: Iterable[Variable], values: Iterable[jax.Array]) -> None:
    for box, value in zip(boxes, values, strict=True):
        box.assign(value)


def links_of(chain: Chain) -> dict[str, Link]:
    """Return the links of a chain by name, also those in a `ForParameters`; none of optax."""
    found = {name: chain.link(name) for name, _ in chain.links}
    return {name: link for name, link in found.items() if isinstance(link, Link)}


def with_rate(chain: Chain) -> list[str]:
    """Return the names of the links that have a learning rate."""
    return [name for name, link in links_of(chain).items() if "learning_rate" in link.numbers()]


def _with_recipes_of(chain: Chain, old: Chain) -> Chain:
    """Return the old chain with the custom rules of a new one, where it has the same classes."""
    entries = dict(chain.links)
    links = tuple((name, _renewed(entry, entries.get(name))) for name, entry in old.links)
    return old if links == old.links else dataclasses.replace(old, links=links)


def _renewed(old: Any, new: Any) -> Any:
    if isinstance(old, ForParameters) and isinstance(new, ForParameters):
        return dataclasses.replace(old, link=_renewed(old.link, new.link))
    if isinstance(old, UpdateStep) and isinstance(new, UpdateStep):
        same_class = old.recipe.cls is new.recipe.cls
        return dataclasses.replace(old, recipe=new.recipe) if same_class else old
    return old


def on_mesh(state: Any, mesh: jax.sharding.Mesh | None) -> Any:
    """Return the state with all arrays on the mesh; what is not sharded over it is copied."""
    if mesh is None:
        return state
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def put(x: Any) -> Any:
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or everywhere)
        there = isinstance(x.sharding, jax.sharding.NamedSharding) and x.sharding.mesh == mesh
        return x if there else jax.device_put(x, everywhere)

    return jax.tree.map(put, state)


def flattened(store: Any, prefix: str = "") -> dict[str, np.ndarray]:
    """Return the arrays of a mapping by name; those of groups in it, as h5py has, by path."""
    arrays = {}
    for name in store:
        value = store[name]
        inside = hasattr(value, "keys")
        arrays |= (
            flattened(value, f"{prefix}{name}/") if inside else {prefix + name: np.asarray(value)}
        )
    return arrays


def _apply(chain: Chain, grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
    return chain.apply(grads, state, params)


_apply_compiled = functools.partial(jax.jit, static_argnums=0)(_apply)
