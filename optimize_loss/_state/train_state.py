"""Everything that changes during training, as one pytree."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from optimize_loss._checks import STEP, InvalidType, TreeMismatch, check_integer
from optimize_loss._engine.bucket import Layout
from optimize_loss._engine.chain import Chain
from optimize_loss._engine.device import copy, has_values
from optimize_loss._engine.health import blamed
from optimize_loss._engine.kinds import Averaging
from optimize_loss._engine.plan import parts
from optimize_loss._engine.reset import reset
from optimize_loss._engine.sharding import Placement
from optimize_loss._engine.transfers import asked_for
from optimize_loss._engine.trees import as_array, copied_like, distinct, placed_like, spread_like
from optimize_loss._names import (
    Pattern,
    any_matches,
    check_patterns,
    leaf_names,
    leaf_paths,
    same_leaves,
)
from optimize_loss._state.modules import Graph
from optimize_loss._state.shown import arrays_text, as_shape, links_text, parameters_text, shown
from optimize_loss.transforms._guard import guards_of


def averaged_params(chain: Chain, state: dict[str, Any], params: Any) -> Any:
    """Return all parameters, those that a link averages as it has them.

    Args:
      chain: the links.
      state: their state, whose slots are trees like `params`, with None for what is not trained.
      params: all parameters, those that are not trained included.
    """
    leaves, treedef = jax.tree.flatten(params)
    slots = [treedef.flatten_up_to(slot) for slot in _averaging_slots(chain, state)]
    marks = [any(x is not None for x in own) for own in zip(*slots, strict=True)]
    if not any(marks):
        return params
    kept = [x if m else None for x, m in zip(leaves, marks, strict=True)]
    averaged = chain.averaged(state, treedef.unflatten(kept))
    found = treedef.flatten_up_to(averaged)
    return treedef.unflatten(
        new if m else x for new, x, m in zip(found, leaves, marks, strict=True)
    )


def _averaging_slots(chain: Chain, state: dict[str, Any]) -> Iterator[Any]:
    """Yield the slots of the links that average, each a tree."""
    for name, _ in chain.links:
        link = chain.link(name)
        if isinstance(link, Averaging):
            yield from parts(link, state[name]).slots.values()


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "packed_params",
        "packed_optimizer",
        "model_state",
        "key",
        "first_step",
        "batches",
    ],
    meta_fields=["chain", "increment_step", "layout", "placement", "graph"],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Parameters, optimizer state and all else that a step changes; made by `TrainStep.init`.

    An immutable pytree: `step(state, batch)` takes a state and returns the next one, which takes
    over its memory.

    Attributes:
      packed_params: the parameters as a step takes them: the small ones in one array.
      packed_optimizer: the chain's state in the same form, with its numbers in few arrays.
      model_state: the state of the model besides parameters, such as running statistics; or None.
      key: the random key from which the key of each step is derived; or None.
      first_step: the global step before the first update, an int32.
      batches: the number of batches, an int32. It includes skipped batches and every batch of an
        accumulated update; `step` does not.
      chain: the links whose state `optimizer` is. Structure, not data.
      increment_step: whether updates advance the global step. Structure, not data.
      layout: how the parameters are packed; None if they are not.
      placement: the sharding of parameters and slots after a step; None if XLA may choose.
      graph: how to make a flax nnx module from parameters and model state; None without a module.

    Example:
      >>> import optimize_loss as ol
      >>> step = ol.optimize_loss(
      ...     lambda p, x: p["w"] * x, learning_rate=0.5, optimizer="SGD")
      >>> state, _ = step(step.init({"w": 4.0}), 2.0)
      >>> print(state.params["w"], state.step, state.optimizer["rate"]["learning_rate"])
      3.0 1 0.5
    """

    packed_params: Any
    packed_optimizer: dict[str, Any]
    model_state: Any
    key: jax.Array | None
    first_step: jax.Array
    batches: jax.Array
    chain: Chain
    increment_step: bool
    layout: Layout | None = None
    placement: Placement | None = None
    graph: Graph | None = None

    @functools.cached_property
    def params(self) -> Any:
        """The user's tree of parameters."""
        self.check_alive()
        return self.packed_params if self.layout is None else self.layout.unpack(self.packed_params)

    @property
    def model(self) -> Any:
        """The flax nnx module that was passed to `init`, with its current values.

        It shares its arrays with the state, which a step donates: copy it, or get it from the next
        state.

        Raises:
          InvalidType: `init` was not called with a module.
        """
        if self.graph is None:
            raise InvalidType(
                "`model` is for a module of flax nnx that was given to `step.init(model)`. "
                "Received: a state of parameters; they are `state.params`."
            )
        return self.graph.join(self.params, self.model_state)

    @property
    def outline(self) -> Any:
        """The tree of parameters as shapes, dtypes and shardings; does not wait for the device."""
        if not all(map(has_values, jax.tree.leaves(self.packed_params))):
            return self.params
        shapes = jax.tree.map(_outlined, self.packed_params)
        return shapes if self.layout is None else self.layout.unpack(shapes)

    @functools.cached_property
    def optimizer(self) -> dict[str, Any]:
        """The chain's state, a dict by link; `optimizer["step"]` counts the updates.

        The slots of a link are trees like the parameters, with None for what is not trained.
        """
        self.check_alive()
        packed = self.packed_optimizer
        return packed if self.layout is None else self.layout.unpack_state(packed)

    @functools.cached_property
    def links(self) -> dict[str, Any]:
        """The chain's state with slots in the form that a step takes."""
        packed = self.packed_optimizer
        return packed if self.layout is None else self.layout.split_numbers(packed)

    @functools.cached_property
    def is_traced(self) -> bool:
        """Whether an array in it is traced, by jit, vmap or grad."""
        return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(self))

    @property
    def packed(self) -> tuple[Any, dict[str, Any]]:
        """The parameters and the chain's state as a step takes them."""
        return self.packed_params, self.packed_optimizer

    def with_links(self, links: dict[str, Any], packed_params: Any = None) -> "TrainState":
        """Return the state with these, in the form in which a step takes them.

        Args:
          links: in the form of the property of that name.
          packed_params: in the form of that attribute; None for those that stay.
        """
        params = self.packed_params if packed_params is None else packed_params
        packed = links if self.layout is None else self.layout.join_numbers(links)
        return dataclasses.replace(self, packed_params=params, packed_optimizer=packed)

    def with_trees(self, params: Any = None, optimizer: Any = None) -> "TrainState":
        """Return the state with other parameters, or another state of the chain, in these trees.

        Their arrays are copied, because a step donates its state.

        Args:
          params: in the form of the property of that name; None to keep them.
          optimizer: the same for the chain's state.

        Raises:
          TreeMismatch: a tree has other leaves, or one of another shape or dtype.
        """
        if params is not None:
            _check_alike("params", params, self.params)
            params = copied_like("`params` at", params, self.params)
        if optimizer is not None:
            _check_alike("optimizer", optimizer, self.optimizer)
            optimizer = copied_like("`optimizer` at", optimizer, self.optimizer)
        return self._in_place(self.repacked(params, optimizer))

    def check_alive(self) -> None:
        """Raise if a step has taken the memory of this state.

        Raises:
          RuntimeError: it has.
        """
        step = self.packed_optimizer["step"]
        if has_values(step) and step.is_deleted():
            raise RuntimeError(
                "This state was donated: a step gives its memory to the state that it returns. "
                "Use that one, as in `state, metrics = step(state, batch)`, or keep `state.copy()`."
            )

    def _in_place(self, new: "TrainState") -> "TrainState":
        """Return another state of this structure with its arrays spread as they are here."""
        return jax.tree.map(spread_like, new, self)

    def repacked(self, params: Any = None, optimizer: Any = None) -> "TrainState":
        """Return what `with_trees` does, with these arrays themselves, unchecked."""
        packed_params, packed = self.packed
        if params is not None:
            packed_params = self.layout.pack(params) if self.layout else params
        if optimizer is not None:
            packed = self.layout.pack_state(optimizer) if self.layout else optimizer
        return dataclasses.replace(self, packed_params=packed_params, packed_optimizer=packed)

    def __repr__(self) -> str:
        arrays = [*jax.tree.leaves(self.packed), self.first_step, self.batches]
        is_gone = any(x.is_deleted() for x in filter(has_values, arrays))
        has_all = not is_gone and all(map(has_values, arrays))
        now = f"at step {shown(self.step)}" if has_all else "without values"
        shapes = jax.tree.map(as_shape, self.packed_params)
        params = shapes if self.layout is None else self.layout.unpack(shapes)
        lines = [f"TrainState {'that was donated to a step' if is_gone else now}:"]
        lines += parameters_text(leaf_names(params), jax.tree.leaves(params))
        for name, tree in (("model_state", self.model_state), ("key", self.key)):
            lines += [] if tree is None else [arrays_text(name, jax.tree.leaves(tree))]
        links = links_text(dict(self.chain.links), self.links if has_all else None)
        return "\n".join([*lines, "links, in order:", *links])

    def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
        """Return what treescope, which shows this in notebooks, asks for."""
        from treescope import rendering_parts

        return rendering_parts.text(repr(self))

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields, for pickle: the trees that the properties keep follow from them."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def step(self) -> jax.Array:
        """The global step, an int32: what schedules see."""
        self.check_alive()
        if not self.increment_step:
            return self.first_step
        return _sum(self.first_step, self.packed_optimizer["step"])

    @property
    def eval_params(self) -> Any:
        """The parameters to evaluate: the average or the slow parameters, if a link keeps them.

        The result of `ema`, `lookahead` or a schedule-free optimizer; all other parameters are as
        in `params`. For stacked states, use `jax.vmap(lambda state: state.eval_params)`.

        Raises:
          InvalidType: this is a stack of several states, and a link averages.

        Example:
          >>> import jax.numpy as jnp, optimize_loss as ol
          >>> step = ol.optimize_loss(
          ...     lambda p, x: p["w"] * x, learning_rate=1.0, optimizer="SGD", ema=0.5)
          >>> state, _ = step.many(step.init({"w": 4.0}), jnp.array([1.0, 3.0]))
          >>> print(state.eval_params["w"].round(3))  # of 3 and 0, the newest twice
          1.0
        """
        return averaged_params(self.chain, self.optimizer, self.params)

    @property
    def decoded(self) -> dict[str, Any]:
        """The optimizer's state with moments in float32, by slot, as without a `precision`.

        Example:
          >>> import optimize_loss as ol
          >>> step = ol.optimize_loss(
          ...     lambda p, x: p["w"] * x, learning_rate=1.0, precision="bfloat16")
          >>> state, _ = step(step.init({"w": 4.0}), 8.0)
          >>> abs(state.decoded["adam"]["m"]["w"] - 0.8) < 0.8 / 2**7  # a bfloat16 has 8 bits
          Array(True, dtype=bool)
        """
        return self.chain.decoded(self.optimizer, self.params)

    @property
    def offender(self) -> str | None:
        """Why `skip` skipped the last batch: the name of a parameter, or another cause.

        It names the first parameter whose gradient was not finite. "the loss" means that only the
        loss was not finite, "the norm of all gradients" means a spike, and "a schedule" means that
        a schedule had an invalid value. None if no batch was skipped. It waits for the device.

        Raises:
          InvalidType: this is a stack of several states, or it is traced.
        """
        names = leaf_names(self.outline)
        codes = [self.links[name]["offender"] for name, _ in guards_of(self.chain.links)]
        if strange := [code for code in codes if isinstance(code, Tracer) or jnp.ndim(code)]:
            raise InvalidType(
                "`offender` must be asked of one state at a time, outside of jit and vmap, since "
                "it is text: of several, `jax.tree.map(lambda x: x[0], states).offender`. "
                f"Received: {strange[0]}."
            )
        found = (blamed(int(code), names) for code in jax.device_get(codes))
        return next((text for text in found if text is not None), None)

    @asked_for()
    def set(self, *, step: Any = None, batches: Any = None, **values: Any) -> "TrainState":
        """Return the state with another step or other hyperparameters; nothing is traced again.

        Use traced values for a sweep: `jax.vmap(lambda rate: state.set(learning_rate=rate))(rates)`
        has a state for each rate, to step with `jax.vmap(step)`. With a `learning_rate_decay_fn`,
        this sets the rate before decay.

        Args:
          step: the global step that schedules see, an integer of at least 0. Noise and Adam's
            correction still count the updates made.
          batches: the number of batches, an integer of at least 0: 0 to start a new run from this
            state.
          **values: hyperparameters by name, or by `link/number` where several links have that
            name: Python, numpy or jax scalars. None restores the value in the code, such as a
            schedule. A name alone refers to the step; a number of a rule's own optimizer needs its
            link, as in `AdamW.rate/learning_rate`.

        Raises:
          InvalidType: a value is not a scalar number.
          ValueError: no link has such a number, or the name is ambiguous; or the value is out of
            range.

        Example:
          >>> import optimize_loss as ol
          >>> step = ol.optimize_loss(lambda p, x: (p["w"] * x) ** 2, learning_rate=0.1)
          >>> state = step.init({"w": 1.0}).set(learning_rate=0.01, step=7)
          >>> print(state.optimizer["rate"]["learning_rate"], state.step)
          0.01 7
        """
        self.check_alive()
        first_step = self.first_step if step is None else self._first_step_of(step)
        taken = self.batches if batches is None else _count("batches", batches, self.batches)
        new = self.with_links(self.chain.set(self.links, **values))
        return dataclasses.replace(new, first_step=first_step, batches=taken)

    def _first_step_of(self, step: Any) -> jax.Array:
        """Return the step before the first update with which the global step is this one now."""
        step = _count("step", step, self.first_step)
        return step - self.packed_optimizer["step"] if self.increment_step else step

    def copy(self) -> "TrainState":
        """Return a copy that does not share memory with this state.

        A step, `many` and `run` donate their state: the new state takes over its memory. So copy a
        state that you want to keep, for example in a hook.

        Example:
          >>> import optimize_loss as ol
          >>> step = ol.optimize_loss(lambda p, x: p["w"] * x, learning_rate=1.0, optimizer="SGD")
          >>> state = step.init({"w": 4.0})
          >>> kept = state.copy()
          >>> state, _ = step(state, 1.0)
          >>> print(kept.params["w"], state.params["w"])
          4.0 3.0
        """
        self.check_alive()
        return jax.tree.map(copy, self)

    @asked_for()
    def reset(self, *patterns: Pattern) -> "TrainState":
        """Return the state with the initial slots for some parameters.

        The links initialize them for the current parameters: means start again at zero, averages at
        the parameter. The step, the hyperparameters and totals over the tree, such as a running
        mean of the norm, do not change. Adam's bias correction counts the step, so it does not
        start again: late in training, the first update after a reset is (1-β₁) / √(1-β₂) times the
        rate, which is 3.2 with the defaults. The sum in `Accumulate` for these parameters is lost.
        Nothing is traced again.

        Args:
          *patterns: names or patterns of the parameters.

        Raises:
          InvalidType: an argument is not a pattern.
          ValueError: a pattern matches no parameter, or only parameters without slots, which are
            not trained, while others have slots.

        Example:
          >>> import optimize_loss as ol
          >>> step = ol.optimize_loss(lambda p: p["a"] + p["b"], learning_rate=0.1)
          >>> state, _ = step(step.init({"a": 1.0, "b": 1.0}))
          >>> state = state.reset("a")
          >>> print(state.optimizer["adam"]["m"]["a"], state.optimizer["adam"]["m"]["b"].round(3))
          0.0 0.1
        """
        if not patterns:
            raise InvalidType("`patterns` must be given: `reset('**')` is for all parameters.")
        names = leaf_names(self.outline)
        marks = any_matches("reset", check_patterns("reset", patterns), names)
        meant = {name for name, mark in zip(names, marks, strict=True) if mark}
        optimizer, have = reset(self.chain, self.optimizer, self.params, meant)
        if have and not have & meant:
            raise ValueError(
                "`reset` must name a parameter that has slots. "
                f"Received: {sorted(meant)[:5]}, while these have some: {sorted(have)[:5]}."
            )
        _check_alike("optimizer", optimizer, self.optimizer)
        return distinct(self._in_place(self.repacked(optimizer=optimizer)))


def _outlined(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _count(name: str, value: Any, like: jax.Array) -> jax.Array:
    """Return a count as an int32, where another one is."""
    if not isinstance(value, Tracer):
        value = check_integer(name, value, STEP)
    elif value.shape or not jnp.issubdtype(value.dtype, jnp.integer):
        raise InvalidType(
            f"`{name}` must be a scalar integer. Received: shape {value.shape}, {value.dtype}."
        )
    return placed_like(like, jnp.asarray(value, jnp.int32))


@functools.partial(jax.jit, inline=True)
def _sum(first_step: jax.Array, updates: jax.Array) -> jax.Array:
    """Return first_step + updates, at most the largest int32."""
    most = jnp.iinfo(jnp.int32).max - jnp.maximum(first_step, 0)
    return first_step + jnp.minimum(updates, most)


def _check_alike(what: str, new: Any, old: Any) -> None:
    """Raise unless two trees have the same leaves, of the same shapes and dtypes."""
    pairs = zip(same_leaves(what, new, f"state.{what}", old), jax.tree.leaves(old), strict=True)
    for name, (mine, theirs) in zip(leaf_paths(old), pairs, strict=True):
        mine = as_array(f"`{what}` at", name, mine)
        if (mine.shape, mine.dtype) != (theirs.shape, theirs.dtype):
            raise TreeMismatch(
                f"`{what}` must have at {name!r} shape {theirs.shape} and dtype {theirs.dtype}. "
                f"Received: shape {mine.shape}, dtype {mine.dtype}."
            )
