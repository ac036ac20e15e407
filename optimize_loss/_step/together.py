"""Several losses, each with its optimizer, over one tree of parameters: one step of many."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optimize_loss._checks import COUNT, InvalidType, check_integer, received
from optimize_loss._engine.bucket import Layout, find_layout
from optimize_loss._engine.device import from_host
from optimize_loss._engine.link import Link, TreeLink
from optimize_loss._engine.selection import linked
from optimize_loss._engine.sharding import init_spread, placement_of
from optimize_loss._engine.transfers import asked_for
from optimize_loss._engine.trees import PARAMETER, copied, distinct, owned, placed_like
from optimize_loss._files.named import register_with_flax
from optimize_loss._report.explain import Explanation, explain
from optimize_loss._report.lint import Row
from optimize_loss._state.form import Form
from optimize_loss._state.gradients import Trainable
from optimize_loss._state.modules import Graph
from optimize_loss._state.recipe import check_model_state, kinds_of, parted, trainable_of
from optimize_loss._state.train_state import TrainState
from optimize_loss._step.advance import first_key
from optimize_loss._step.evaluation import Evaluated
from optimize_loss._step.parts import Part, Turn, advance_parts
from optimize_loss._step.step import Step
from optimize_loss._step.train_step import TrainStep
from optimize_loss.transforms import Chain


def together(*, every: Mapping[str, int] | None = None, **steps: TrainStep) -> "JointStep":
    """Join several losses, each with its own optimizer, into one step over one tree of parameters.

    All steps get the same batch, and run in the given order: each one sees the parameters and the
    model state after the steps before it. Each one trains the parameters that its `variables` and
    `rules` select.

    Args:
      every: {name: n}: the step of this name runs only in every n-th step, n at least 1: in the
        steps n, 2n, … counted from 1. All others run in every step. So `every={"actor": 5}` makes
        one update of the actor for five updates of the critic, on the fifth batch. When a step does
        not run, it changes nothing, and its metrics are NaN, or 0 if they are integers.
        `state.set(**{"actor.turn/every": 2})` sets n.
      **steps: the steps that `optimize_loss` returned, by name, in order. The name is a prefix of
        the names of its metrics, as in `critic/loss`, and of its links, as in `critic.adam`.

    Returns:
      A `JointStep`: one compiled program, used like a `TrainStep`.

    Raises:
      InvalidType: there are no steps, one is not a `TrainStep`, or `every` does not map names to
        integers.
      ValueError: `every` names no step or is out of range; a name is empty or has "/" or "." in
        it; or steps differ in `global_step` or `precision`.

    Example:
      Two players of a game: u moves to v, then v away from u, at a rate of 1/2 each.

      >>> import optimize_loss as ol
      >>> def built(loss, variables):
      ...     return ol.optimize_loss(
      ...         loss, learning_rate=0.5, optimizer="SGD", variables=variables)
      >>> step = ol.together(
      ...     u=built(lambda p: (p["u"] - p["v"]) ** 2 / 2, "u"),
      ...     v=built(lambda p: -((p["u"] - p["v"]) ** 2) / 2, "v"))
      >>> state, metrics = step(step.init({"u": 4.0, "v": 0.0}))
      >>> print(metrics["u/loss"], metrics["v/loss"])
      8.0 -2.0
      >>> print(state.params, state.step)
      {'u': Array(2., dtype=float32), 'v': Array(-1., dtype=float32)} 1
    """
    if not steps:
        raise InvalidType("Give steps by name: `together(critic=step_d, actor=step_g)`.")
    for name, step in steps.items():
        if not isinstance(step, TrainStep):
            raise InvalidType(
                f"`{name}` must be a TrainStep, from `optimize_loss`. {received(name, step)}"
            )
        if not name or {*name} & {"/", "."}:
            raise ValueError(f"A step's name has no '/' and no '.' in it. Received: {name!r}.")
    _check_alike("global_step", {name: step.first_step for name, step in steps.items()})
    _check_alike("precision", {name: _precision(step) for name, step in steps.items()})
    return JointStep(steps=steps, every=_check_every(every, steps))


def _check_every(every: Any, steps: Mapping[str, TrainStep]) -> dict[str, int]:
    if every is None:
        return {}
    if not isinstance(every, Mapping):
        raise InvalidType(
            f"`every` must map names of steps to integers. {received('every', every)}"
        )
    for name in every:
        if name not in steps:
            raise ValueError(f"`every` must name steps of {[*steps]}. Received: {name!r}.")
    return {name: check_integer(f"every[{name!r}]", n, COUNT) for name, n in every.items()}


def _check_alike(option: str, values: Mapping[str, Any]) -> None:
    if any(value != next(iter(values.values())) for value in values.values()):
        raise ValueError(f"`{option}` must be the same in all steps. Received: {values}.")


def _precision(step: TrainStep) -> Any:
    precision = step.chain.precision
    return None if precision is None else dataclasses.replace(precision, seed=None)


@dataclasses.dataclass(frozen=True, eq=False)
class JointStep(Step):
    """Several training steps as one: `state, metrics = step(state, batch)`. `together` makes it.

    Use it like a `TrainStep`. Its state is a `TrainState`, with one tree of parameters, the links
    of all steps, and one global step. The global step advances when any step without
    `increment_global_step=False` makes an update. Corrections such as Adam's count the updates of
    their own step. `sweep` and `find_learning_rate` use the loss of the first step.

    Attributes:
      steps: by name, in the order in which they run.
      every: for each step that does not run every time, the number n of `together`.

    Example:
      >>> import optimize_loss as ol
      >>> one = ol.optimize_loss(lambda p, x: p["w"] * x, learning_rate=1.0, optimizer="SGD")
      >>> step = ol.together(one=one, every={"one": 2})
      >>> state, metrics = step.run(step.init({"w": 0.0}), [1.0, 2.0, 3.0, 4.0])
      >>> print(state.params["w"], state.step, metrics["one/loss"])
      -6.0 2 [nan  0. nan -8.]
    """

    steps: Mapping[str, TrainStep]
    every: Mapping[str, int]

    @asked_for()
    def init(self, params: Any, *, model_state: Any = None, key: Any = None) -> TrainState:
        """Return the state before the first step.

        Args:
          params: the parameters of all losses: a tree of arrays and numbers, or of flax nnx
            modules, as for `TrainStep.init`. They are copied.
          model_state: the first model state, shared by all losses that take one.
          key: a random key, from which each loss that takes one gets its own key; by default made
            from the `seed` of the first such loss.

        Raises:
          InvalidType: a leaf of `params` is neither an array nor a number.
          ValueError: as `TrainStep.init`; or two steps train the same parameter, and one of them
            does not name it in `variables`.
        """
        if isinstance(params, TrainState):
            raise InvalidType("`params` must be a tree of arrays. Received: a TrainState.")
        register_with_flax()
        params, model_state, graph = self._parted(params, model_state)
        params = copied(PARAMETER, params)
        trainable = {name: step._checked(params) for name, step in self.steps.items()}
        self._check_owners(trainable)
        layout = self._layout(trainable)
        packed = params if layout is None else layout.pack(params)
        optimizer = self._first_links(packed, layout, trainable)
        if layout is not None:
            layout = layout.with_numbers(optimizer)
            optimizer = layout.join_numbers(optimizer)
        seeds = [step.seed for step in self.steps.values() if step.loss.takes("key")]
        state = TrainState(
            packed_params=packed,
            packed_optimizer=optimizer,
            model_state=copied("`model_state` at", model_state),
            key=first_key(bool(seeds), seeds[0] if seeds else 0, key),
            first_step=from_host(self._first.first_step, jnp.int32),
            batches=from_host(0, jnp.int32),
            chain=self._form.chain,
            increment_step=self._form.increment_step,
            layout=layout,
            graph=graph,
        )
        state = placed_like(params, distinct(state))
        placement = (
            placement_of(state.packed_params, state.packed_optimizer, self._axis)
            if self._form.spread
            else None
        )
        return dataclasses.replace(state, placement=placement)

    @asked_for()
    def explain(
        self, params: Any, *, steps: int | None = None, model_state: Any = None
    ) -> Explanation:
        """Describe what this step will do with each parameter, before anything is allocated.

        Args:
          params: as for `init`; or `jax.ShapeDtypeStruct`s.
          steps: the number of steps of the planned run, at least 1; None if it is not known.
          model_state: as for `init`; it counts in `total_bytes`.

        Raises:
          InvalidType, ValueError: as `init`.
        """
        params, model_state, _ = parted(self._first, params, model_state)

        def layout(mine: Trainable) -> Layout | None:
            trainable = {n: trainable_of(x, mine.params) for n, x in self.steps.items()}
            self._check_owners(trainable)
            return self._layout(trainable)

        found = {
            name: explain(step, params, step._horizon(steps), (), layout)
            for name, step in self.steps.items()
        }
        takes_key = any(step.loss.takes("key") for step in self.steps.values())
        rest = [np.zeros(2, np.int32), jax.random.key(0) if takes_key else None, model_state]
        return _joined(found, sum(map(_bytes, jax.tree.leaves(rest))), 4 + 8 * len(self.every))

    @property
    def _first(self) -> TrainStep:
        return next(iter(self.steps.values()))

    @functools.cached_property
    def _parts(self) -> tuple[Part, ...]:
        return tuple(
            Part(
                name=name,
                recipe=dataclasses.replace(step, name=f"{name}/{step.name}"),
                every=self.every.get(name),
                counts=step.increment_step,
            )
            for name, step in self.steps.items()
        )

    @property
    def _axis(self) -> str | None:
        """The mesh axis over which all steps spread their slots; None where they differ."""
        axes = {step.shard_state for step in self.steps.values()}
        return axes.pop() if len(axes) == 1 else None

    @functools.cached_property
    def _form(self) -> Form:
        steps = self.steps.values()
        links = tuple(pair for part in self._parts for pair in part.links())
        return Form(
            increment_step=any(step.increment_step for step in steps),
            missing=(),
            spread=any(step.shard_state is not None for step in steps),
            chain=Chain(links, self._first.chain.precision),
        )

    @functools.cached_property
    def _needed(self) -> tuple[str, ...]:
        return tuple({name: None for step in self.steps.values() for name in step._needed})

    @functools.cached_property
    def _prefixes(self) -> dict[str, str]:
        return {part.recipe.name: part.prefix for part in self._parts}

    def _advance(self, shardings: Any, state: TrainState, batch: Any) -> Any:
        return advance_parts(self._parts, shardings, state, batch)

    def _evaluated(self, state: TrainState) -> tuple[Evaluated, ...]:
        return tuple(
            Evaluated(part.recipe.name, part.recipe.loss, part.key(state.key))
            for part in self._parts
        )

    def _shardings(self, state: TrainState) -> tuple[Any, ...] | None:
        found = tuple(step._shardings(state) for step in self.steps.values())
        return None if all(each is None for each in found) else found

    def _check_owners(self, trainable: Mapping[str, Trainable]) -> None:
        """Raise if a step trains a parameter that another one trains, too, and does not say so."""
        for name, step in self.steps.items():
            mine = trainable[name].names if step.variables is None else []
            for other, its in trainable.items():
                if other != name and (both := sorted({*mine} & {*its.names})):
                    raise ValueError(
                        f"`variables` of {name!r} must name what it trains, as {other!r} trains "
                        f"some of that, too: {both[:5]}. Write '**' if all are meant."
                    )

    def _parted(self, params: Any, model_state: Any) -> tuple[Any, Any, Graph | None]:
        """Return the parameters, the first model state, and the structure of modules."""
        steps = self.steps.values()
        takers = [s for s in steps if s.loss.takes("model_state") or s.update_ops] or [self._first]
        params, model_state, graph = parted(takers[0], params, model_state)
        if graph is None:
            check_model_state(takers[0], model_state)
        return params, model_state, graph

    @property
    def _bound(self) -> int | None:
        """The most entries of a parameter that shares an array with others; None for none."""
        steps = self.steps.values()
        bounds = [step.bucket for step in steps if step.bucket is not None]
        sees_whole = any(_sees_the_tree(step.chain) for step in steps)
        return None if sees_whole or len(bounds) < len(steps) else min(bounds)

    def _layout(self, trainable: Mapping[str, Trainable]) -> Layout | None:
        """Return how parameters that go through the same links of all steps share arrays."""
        if (bound := self._bound) is None:
            return None
        each = [kinds_of(s, trainable[n]) for n, s in self.steps.items()]
        kinds = [None if None in own else own for own in zip(*each, strict=True)]
        marks = map(any, zip(*(x.marks for x in trainable.values()), strict=True))
        params = trainable[next(iter(trainable))].params
        return find_layout(params, kinds, list(marks), bound)

    def _first_links(
        self, packed: Any, layout: Layout | None, trainable: Mapping[str, Trainable]
    ) -> dict[str, Any]:
        """Return the state of all links before the first step."""
        links: dict[str, Any] = {"step": from_host(0, jnp.int32)}
        for part, step in zip(self._parts, self.steps.values(), strict=True):
            mine, axis = trainable[part.name], step.shard_state
            own = part.layout(layout, mine.params)
            tree = mine.tree(mine.leaves) if own is None else own.only_trained(packed)
            first = init_spread(step.chain, tree, axis) if axis else step.chain.init(tree)
            turn = Turn(part.every)
            numbers = {n: from_host(x, jnp.int32) for n, x in turn.numbers().items()}
            memory = {n: from_host(0, jnp.int32) for n in turn.memory()}
            links[part.turn] = numbers | memory
            links = part.joined(owned(first), links, layout)
        return links


def _sees_the_tree(chain: Chain) -> bool:
    """Return whether a link sees the user's tree, so that nothing in it may share an array."""
    links = (link for _, link in linked(dict(chain.links)))
    return any(isinstance(link, TreeLink) or not isinstance(link, Link) for link in links)


def _joined(each: Mapping[str, Explanation], rest: int, counts: int) -> Explanation:
    """Return what several steps do, as one; with the bytes of all else, and of their counts."""
    first, *_ = found = [*each.values()]
    columns = zip(*(_named(name, x.rows) for name, x in each.items()), strict=True)
    rows = tuple(map(_joined_row, columns))
    links = (_named(name, x.links) for name, x in each.items())
    warnings = (_named(name, x.warnings) for name, x in each.items())
    state_bytes = sum(x.state_bytes for x in found) + counts
    return Explanation(
        rows=rows,
        links=tuple((f"{n}.{link}", text) for n, (link, text) in itertools.chain(*links)),
        warnings=tuple(f"{name}: {text}" for name, text in itertools.chain(*warnings)),
        parameters=first.parameters,
        trained=sum(math.prod(row.shape) for row in rows if row.trained),
        param_bytes=first.param_bytes,
        state_bytes=state_bytes,
        total_bytes=first.param_bytes + state_bytes + rest,
    )


def _named(name: str, things: Iterable[Any]) -> list[tuple[str, Any]]:
    return [(name, thing) for thing in things]


def _joined_row(rows: Sequence[tuple[str, Row]]) -> Row:
    """Return what holds for a parameter in all steps; where several train it, in the first."""
    trained = [(name, row) for name, row in rows if row.trained]
    _, first = (trained or rows)[0]
    return dataclasses.replace(
        first,
        links=tuple(f"{name}.{link}" for name, row in trained for link in row.links),
        moved_by=tuple(f"{name}.{link}" for name, row in trained for link in row.moved_by),
        state_bytes=sum(row.state_bytes for _, row in trained),
    )


def _bytes(leaf: Any) -> int:
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf, jnp.result_type(leaf))
    return leaf.size * leaf.dtype.itemsize
