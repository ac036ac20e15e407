"""One step among several that share a tree of parameters: what it sees of their joint state."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from optimize_loss._checks import COUNT
from optimize_loss._engine.bucket import Layout
from optimize_loss._engine.kinds import Gate, LossScale, RateScale
from optimize_loss._engine.link import Link
from optimize_loss._engine.selection import ForParameters, link_of, told, where
from optimize_loss._engine.sharding import Placement
from optimize_loss._names import Pattern, first_index, matching
from optimize_loss._random import name_words
from optimize_loss._state.recipe import Recipe, trainable_of
from optimize_loss._state.train_state import TrainState
from optimize_loss._step.advance import advance, count_of

Links = dict[str, Any]  # the state of each link, by name


@dataclasses.dataclass(frozen=True)
class Turn(Link):
    """Counts the updates of a part, and the steps since it had its turn.

    It changes no update. The step looks at it before the part runs.

    Args:
      every: so many steps come to a turn, an integer of at least 1; None where each is one.
    """

    every: Annotated[int, COUNT] | None = None

    elementwise = True

    def memory(self):
        """Return the counts."""
        return {"updates": 0} if self.every is None else {"updates": 0, "waited": 0}


@dataclasses.dataclass(frozen=True)
class Trained:
    """The parameters that a part trains, and of these those that `within` selects.

    Attributes:
      variables: names or patterns; None for all.
      patterns: of the part's rules.
      frozen: whether each rule freezes its parameters.
      within: which of these a link is for; None for all.
    """

    variables: tuple[Pattern, ...] | None
    patterns: tuple[Pattern, ...]
    frozen: tuple[bool, ...]
    within: Any = None

    def takes(self, names: Sequence[str], leaves: Sequence[Any]) -> list[bool]:
        """Return for each parameter whether it is meant."""
        marks = self._are_trained(names)
        if self.within is None:
            return marks
        pairs = zip(names, leaves, strict=True)
        mine = [pair for pair, mark in zip(pairs, marks, strict=True) if mark]
        meant = iter(_told(self.within, [n for n, _ in mine], [x for _, x in mine]))
        return [mark and next(meant) for mark in marks]

    def _are_trained(self, names: Sequence[str]) -> list[bool]:
        chosen = [True] * len(names) if self.variables is None else _any(self.variables, names)
        frozen = (*self.frozen, False)
        index = first_index(self.patterns, tuple(names))
        return [c and not frozen[i] for c, i in zip(chosen, index, strict=True)]


def _told(where: Any, names: Sequence[str], leaves: Sequence[Any]) -> list[bool]:
    """Return for each parameter whether a link is for it; here a pattern need not match any."""
    if not names:
        return []
    return _any(where, names) if isinstance(where, tuple) else told(where, names, leaves)


def _any(patterns: Sequence[Pattern], names: Sequence[str]) -> list[bool]:
    found = [matching(pattern, names) for pattern in patterns]
    return [any(of_name) for of_name in zip(*found, strict=True)]


class Taken(NamedTuple):
    """What a part makes of a step.

    Attributes:
      params: those that it trains, packed as they are in the state.
      links: the state of its links, under its own names, with `step`.
      model_state: the next one.
      metrics: by name.
    """

    params: Any
    links: Links
    model_state: Any
    metrics: dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """A step among several.

    Attributes:
      name: of the part. Its links are `name.link` in the joint state.
      recipe: of the step, whose metrics have the name before theirs.
      every: so many steps come to a turn; None where each is one.
      counts: whether its updates advance the global step.
    """

    name: str
    recipe: Recipe
    every: int | None
    counts: bool

    @property
    def prefix(self) -> str:
        """The prefix of the names of its links."""
        return f"{self.name}."

    @property
    def turn(self) -> str:
        """The name of the link that counts its turns."""
        return f"{self.prefix}turn"

    def links(self) -> Iterator[tuple[str, Any]]:
        """Yield its links as they are in the joint state, each for the parameters it trains."""
        recipe, rules = self.recipe, self.recipe.rules
        frozen = tuple(bool(own.get("freeze", False)) for own in rules.options)
        yield self.turn, Turn(self.every)
        for name, entry in recipe.chain.links:
            inside = link_of(entry)
            if isinstance(inside, Link) and not isinstance(inside, Gate | LossScale | RateScale):
                trained = Trained(recipe.variables, rules.patterns, frozen, where(entry))
                if isinstance(entry, ForParameters):
                    entry = dataclasses.replace(entry, where=trained, optional=True)
                else:
                    entry = ForParameters(trained, inside, optional=True)
            yield f"{self.prefix}{name}", entry

    def own(self, links: Links, layout: Layout | None) -> Links:
        """Return of the state of all links what this part's chain has as its state.

        Args:
          links: the state of all links.
          layout: how this part's chain sees the parameters.
        """
        own = {name: links[f"{self.prefix}{name}"] for name, _ in self.recipe.chain.links}
        own = {"step": links[self.turn]["updates"], **own}
        return own if layout is None else layout.own_slots(own)

    def joined(
        self, own: Links, links: Links, layout: Layout | None, waited: jax.Array | None = None
    ) -> Links:
        """Return the state of all links with that of this part's chain.

        Args:
          own: the state of its chain.
          links: the state of all links.
          layout: how all parameters are packed.
          waited: the steps since its turn; None where each is one.
        """
        own = own if layout is None else layout.all_slots(own)
        turn = {**links[self.turn], "updates": own["step"]}
        turn |= {} if waited is None else {"waited": waited}
        rest = {f"{self.prefix}{name}": x for name, x in own.items() if name != "step"}
        return {**links, self.turn: turn, **rest}

    def key(self, key: Any) -> Any:
        """Return the random key of this part; parts have different ones."""
        if key is None or not self.recipe.loss.takes("key"):
            return None
        return jax.random.fold_in(key, np.uint32(name_words(self.name)[0]))

    def layout(self, layout: Layout | None, params: Any) -> Layout | None:
        """Return how this part's chain sees the parameters that are packed so for all parts."""
        if layout is None:
            return None
        names = set(trainable_of(self.recipe, params).names)
        first = {name: members.names[0] for name, members in layout.buckets}
        trained = frozenset(name for name in layout.trained if first.get(name, name) in names)
        return dataclasses.replace(layout, trained=trained, numbers=())

    def view(self, state: TrainState, links: Links, places: dict[int, Any]) -> TrainState:
        """Return the state that the step of this part takes.

        Args:
          state: the joint state, as the parts before have left it but for its links.
          links: the state of all links.
          places: where arrays of the links are to lie, by their ids; empty where XLA may choose.
        """
        layout = self.layout(state.layout, state.params)
        view = TrainState(
            packed_params=state.packed_params,
            packed_optimizer=self.own(links, layout),
            model_state=state.model_state,
            key=self.key(state.key),
            first_step=state.step,
            batches=state.batches,
            chain=self.recipe.chain,
            increment_step=False,
            layout=layout,
            graph=state.graph,
        )
        if state.placement is None:
            return view
        here = state.placement.shardings[: len(jax.tree.leaves(state.packed_params))]
        there = [places.get(id(x)) for x in jax.tree.leaves(view.packed_optimizer)]
        mesh = next(x.mesh for x in state.placement.shardings if x is not None)
        whole = NamedSharding(mesh, PartitionSpec())
        own = (*here, *(whole if x is None else x for x in there))
        return dataclasses.replace(view, placement=Placement(own, state.placement.parted))

    def take(self, shardings: Any, view: TrainState, batch: Any) -> Taken:
        """Take a step of this part alone, while being traced."""
        new, metrics = advance(self.recipe, shardings, view, batch)
        return self._taken(new, metrics)

    def take_if_due(self, shardings: Any, view: TrainState, batch: Any, due: jax.Array) -> Taken:
        """Take a step of this part alone where it is due; all else stays, and metrics are NaN."""
        take, made = _traced(functools.partial(self.take, shardings, view, batch))

        def wait() -> Taken:
            return self._taken(view, jax.tree.map(_no_value, made.metrics))

        return jax.lax.cond(due, take, wait)

    def _taken(self, state: TrainState, metrics: dict[str, Any]) -> Taken:
        if state.layout is not None:
            params = state.layout.only_trained(state.packed_params)
        else:
            params = trainable_of(self.recipe, state.packed_params).leaves
        own = {tag: x for tag, x in metrics.items() if tag != f"{self.recipe.name}batches"}
        return Taken(params, state.links, state.model_state, own)

    def with_trained(self, state: TrainState, trained: Any) -> Any:
        """Return the packed parameters of a state, with others in place of those it trains."""
        if state.layout is not None:
            return {**state.packed_params, **trained}
        return trainable_of(self.recipe, state.packed_params).replace(trained)


def _traced(function: Callable[[], Taken]) -> tuple[Callable[[], Taken], Taken]:
    """Return a function that is traced once, and the shapes of what it returns."""
    jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)()
    structure = jax.tree.structure(shapes)
    return lambda: structure.unflatten(jax.extend.core.jaxpr_as_fun(jaxpr)()), shapes


def _no_value(metric: jax.ShapeDtypeStruct) -> jax.Array:
    """Return what stands for a metric without a value: NaN, or 0 where that cannot be."""
    is_float = jnp.issubdtype(metric.dtype, jnp.inexact)
    return jnp.full(metric.shape, jnp.nan if is_float else 0, metric.dtype)


def advance_parts(
    parts: Sequence[Part], shardings: Any, state: TrainState, batch: Any
) -> tuple[TrainState, dict[str, Any]]:
    """Take one step of each part that is due, one after the other, while being traced.

    Args:
      parts: in order; each sees the parameters and the model state that those before have left.
      shardings: for each, where gradients are to lie; None where XLA may choose for all.
      state: the joint state.
      batch: that of all losses.
    """
    links, metrics, advanced = state.links, {}, []
    places = {}
    if state.placement is not None:
        arrays = map(id, jax.tree.leaves(state.packed))
        places = dict(zip(arrays, state.placement.shardings, strict=True))
    now, any_counts = state, any(part.counts for part in parts)
    for part, colocated in zip(parts, shardings or [None] * len(parts), strict=True):
        view, waited = part.view(now, links, places), None
        if part.every is None:
            taken = part.take(colocated, view, batch)
        else:
            turn = links[part.turn]
            due = turn["waited"] + 1 >= turn["every"]
            waited = jnp.where(due, 0, turn["waited"] + 1)
            taken = part.take_if_due(colocated, view, batch, due)
        if part.counts or not any_counts:
            advanced.append(taken.links["step"] != view.packed_optimizer["step"])
        metrics |= taken.metrics
        params = part.with_trained(now, taken.params)
        now = dataclasses.replace(now, packed_params=params, model_state=taken.model_state)
        links = part.joined(taken.links, links, state.layout, waited)
    made = links["step"]
    moved = functools.reduce(jnp.logical_or, advanced)
    links = {**links, "step": jnp.where(moved, optax.safe_increment(made), made)}
    batches = count_of(state)
    new = dataclasses.replace(now.with_links(links), batches=batches)
    if state.placement is not None:
        packed = state.placement.constrain(new.packed)
        new = dataclasses.replace(new, packed_params=packed[0], packed_optimizer=packed[1])
    return new, {**metrics, "batches": batches}
