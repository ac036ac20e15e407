"""A sequence of named links: one optax transformation whose state is a dict."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optimize_loss._checks import InvalidType, TreeMismatch, check_single
from optimize_loss._engine import numbers, spelling
from optimize_loss._engine.device import from_host
from optimize_loss._engine.equal import same, structural_hash
from optimize_loss._engine.exchange import exchanged, settled
from optimize_loss._engine.first_state import init_link
from optimize_loss._engine.kinds import weighs_nothing
from optimize_loss._engine.leaf import Wanted
from optimize_loss._engine.link import Link, State, functions_of, is_transformation
from optimize_loss._engine.order import check_last, check_order, with_losses
from optimize_loss._engine.passes import averaged, decoded, run
from optimize_loss._engine.plan import Place, Plan, kind_of, takes
from optimize_loss._engine.precision import Precision, check_used, codecs
from optimize_loss._engine.selection import ForParameters, link_of, linked
from optimize_loss._engine.totals import Call
from optimize_loss._engine.transfers import asked_for
from optimize_loss._engine.transformation import Transformation, made_once
from optimize_loss._engine.trees import (
    Params,
    distinct,
    is_inexact,
    placed_like,
    take_apart,
    with_strangers,
    without_strangers,
)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Chain(Transformation):
    """A sequence of links, as one optax transformation. Build it with `chain`.

    Neighbouring links run in one pass over the parameters. An optax transformation among them, or
    any other object with `init` and `update`, sees the complete tree and splits that pass in two.
    The state is a dict: `step`, the number of updates made, and for each link a dict of its
    hyperparameters, its memory, and its slots, which are trees like the parameters.

    Example:
      >>> import optimize_loss as ol
      >>> tx = ol.transforms.chain(rate=ol.transforms.ScaleByLearningRate(0.5))
      >>> params, state = tx.apply({"w": 4.0}, tx.init({"w": 3.0}), {"w": 3.0})
      >>> print(params["w"], state["step"], sorted(state))
      1.0 1 ['rate', 'step']
    """

    links: tuple[tuple[str, Any], ...] = ()
    precision: Precision | None = None

    def __eq__(self, other: object) -> bool:
        if self is other or not isinstance(other, Chain):
            return self is other
        mine, theirs = ((x.links, x.precision) for x in (self, other))
        return type(self) is type(other) and same(mine, theirs)

    def __hash__(self) -> int:
        return structural_hash((self.links, self.precision))

    def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
        """Return what treescope, which shows this in notebooks, asks for."""
        from treescope import repr_lib

        precision = {} if self.precision is None else {"precision": self.precision}
        attributes = {**dict(self.links), **precision}
        return repr_lib.render_object_constructor(Chain, attributes, path, subtree_renderer)

    def link(self, name: str) -> Any:
        """Return the link of this name, without its `ForParameters`."""
        return dict(self._linked())[name]

    @asked_for()
    def init(self, params: Any) -> State:
        """Return the state before the first update.

        Raises:
          InvalidType: a leaf of `params` is neither a number nor an array.
          ValueError: a pattern of a link matches no parameter.
        """
        taken = take_apart(params)
        state: State = {"step": from_host(0, jnp.int32)}
        places = self._places(taken)
        check_last(places)
        check_used(self.precision, places, taken)
        for place in places:
            ours = isinstance(place.link, Link)
            state[place.name] = (
                init_link(place, taken, self.precision) if ours else place.link.init(params)
            )
        return placed_like(params, distinct(state))

    def kinds(self, params: Any) -> list[Any]:
        """Return for each parameter what those share that may lie in one array; None for none.

        Raises:
          ValueError: as `init`.
        """
        taken = take_apart(params)
        places = self._places(taken)
        check_last(places)
        if any(kind_of(type(place.link)) != "leaf" for place in places):  # they see the user's tree
            return [None] * len(taken.leaves)
        plan = Plan(taken, tuple(places))
        return [plan.kind(j) for j in range(len(taken.leaves))]

    def update(
        self, updates: Any, state: State, params: Any = None, **extra: Any
    ) -> tuple[Any, State]:
        """Return what to add to the parameters, and the new state.

        Args:
          updates: the gradients, a tree like the parameters. A parameter whose gradient is None
            does not change, and neither do its slots. An integer parameter gets a zero update.
          state: from `init`, or from the update before.
          params: the parameters. Optional if no link reads them.
          **extra: arguments of optax transformations in the chain; our links read `value`, the
            loss.

        Returns:
          Updates in the dtype of the parameters, and the state.

        Raises:
          TreeMismatch: the trees have different leaves or shapes; or the state belongs to another
            chain.
        """
        return self._run(updates, state, params, "updates", **extra)

    def apply(
        self, grads: Any, state: State, params: Any, *, schedule_step: Any = None, **extra: Any
    ) -> tuple[Any, State]:
        """Return the new parameters and the new state.

        The same as adding what `update` returns, except that the sum is taken in float32 and
        rounded once, which matters for bfloat16 and float16.

        Args:
          grads: the gradients, as for `update`.
          state: from `init`, or from the update before.
          params: the parameters.
          schedule_step: the step that schedules see; `state["step"]` unless given.
          **extra: as for `update`.
        """
        return self._run(grads, state, params, "params", schedule_step=schedule_step, **extra)

    def numbers_named(self, name: str, state: State, schedule_step: Any = None) -> State:
        """Return the hyperparameter `name` of every link that has it, at this step, by link."""
        return numbers.named_at(self._ours, name, state, _step(state, schedule_step))

    @asked_for()
    def set(self, state: State, **values: Any) -> State:
        """Return the state with other hyperparameters; nothing is traced again.

        Args:
          state: a state of this chain.
          **values: number by name, or by `link/number` where several links have that name.
            None restores the value of the link, such as its schedule.

        Raises:
          ValueError: no link, or more than one, has such a number; or the value is out of range.

        Example:
          >>> import optimize_loss as ol
          >>> tx = ol.transforms.chain(clip=ol.transforms.ClipByGlobalNorm(1.0))
          >>> state = tx.set(tx.init({"w": 0.0}), max_norm=2.0)
          >>> print(state["clip"]["max_norm"])
          2.0
          >>> tx.set(state, max_norm=-1)
          Traceback (most recent call last):
          ValueError: `max_norm` must be above 0. Received: max_norm=-1.
        """
        return numbers.set_numbers(dict(self.links), state, values)

    def with_own_numbers(self, state: State) -> State:
        """Return the state with all numbers as the links were built with them."""
        names = ("/".join(pair) for pair in self.all_numbers())
        return numbers.set_numbers(dict(self.links), state, dict.fromkeys(names))

    @functools.cached_property
    def traced_numbers(self) -> list[str]:
        """The numbers that are traced values, as `link/number`."""
        return numbers.traced_numbers(self._ours)

    def all_numbers(self) -> list[tuple[str, str]]:
        """Return the link and the name of every hyperparameter."""
        return spelling.all_numbers(dict(self.links))

    def meant(self, name: str) -> list[tuple[str, str]]:
        """Return the link and the number that `name` stands for, and those that share it.

        Raises:
          ValueError: there is none, or it is not clear which is meant.
        """
        return spelling.meant(dict(self.links), name)

    @asked_for()
    def averaged(self, state: State, params: Any) -> Any:
        """Return the parameters to use after training: an average if a link keeps one.

        Raises:
          InvalidType: this is a stack of several states.
          TreeMismatch: the state belongs to another chain or to other parameters.

        Example:
          >>> import optimize_loss as ol
          >>> tx = ol.transforms.chain(
          ...     rate=ol.transforms.ScaleByLearningRate(1.0), ema=ol.transforms.AverageParams(0.5))
          >>> params, state = tx.apply({"w": 1.0}, tx.init({"w": 2.0}), {"w": 2.0})
          >>> print(params["w"], tx.averaged(state, params)["w"])
          1.0 1.5
        """
        _check_state(self, state)
        check_single("the average of the parameters", state["step"])
        taken = take_apart(params)
        return taken.unflatten(averaged(self._plan(taken), state))

    @asked_for()
    def decoded(self, state: State, params: Any) -> State:
        """Return the state with all moments in float32, as without a precision.

        Raises:
          TreeMismatch: the state belongs to another chain or to other parameters.
        """
        _check_state(self, state)
        taken = take_apart(params)
        return {**state, **decoded(self._plan(taken), state)}

    def loss_scale(self, state: State, schedule_step: Any = None) -> jax.Array | None:
        """Return what the loss must be multiplied by before its gradients come here, or None."""
        return numbers.loss_scale(self._ours, state, _step(state, schedule_step))

    def dynamic_loss_scale(self, state: State) -> jax.Array | None:
        """Return the product of the loss scales that change by themselves, or None."""
        return numbers.dynamic_loss_scale(self._ours, state)

    def with_numbers_of(self, other: "Chain", state: State) -> tuple["Chain", State]:
        """Return the chain and the state that go on from `state` with the numbers of `other`.

        The chain is this one, so that nothing is traced again, unless a schedule comes or goes.

        Raises:
          ValueError: `other` has other links than this chain, or differs in more than numbers.
        """
        if self.precision != other.precision:
            raise ValueError(
                f"The precision must stay {self.precision}. Received: {other.precision}."
            )
        state, retraced = exchanged(dict(self.links), dict(other.links), state)
        return (other if retraced else self), state

    @functools.cached_property
    def _ours(self) -> dict[str, Link]:
        """The links of ours, by name."""
        return {name: link for name, link in self._linked() if isinstance(link, Link)}

    def _linked(self) -> Iterator[tuple[str, Any]]:
        return linked(dict(self.links))

    def _plan(self, params: Params, live: tuple[int, ...] = ()) -> Plan:
        seed = (self.precision and self.precision.seed) or 0
        places = (
            dataclasses.replace(place, link=settled(place.link)) for place in self._places(params)
        )
        return Plan(params, tuple(places), live, seed)

    def _call(self, state: State, schedule_step: Any, extra: Mapping[str, Any]) -> Call:
        ours = self._ours
        own = numbers.numbers_at(ours, state, _step(state, schedule_step))
        weight = extra.get("weight")
        return Call(
            state=state,
            numbers=own,
            judged=lambda: numbers.judged(ours, own, state),
            entries=dict(self.links),
            loss=extra.get("value"),
            weight=weight,
            empty=weighs_nothing((link for _, link in self.links), weight),
            extra=extra,
            step=state["step"],
        )

    def _places(self, params: Params) -> list[Place]:
        """Return the links with the parameters that they are for."""
        marks = [is_inexact(p) for p in params.leaves]
        coded = self.precision is not None and not params.are_unknown
        formats = self.precision.formats(params) if self.precision and coded else []
        places = []
        for name, entry in self.links:
            link, mine = link_of(entry), takes(name, entry, params, marks)
            of_slots = codecs(link, mine, formats, params) if coded else ()
            places.append(Place(name, link, mine, of_slots))
        return places

    def _run(
        self,
        updates: Any,
        state: State,
        params: Any,
        wanted: Wanted,
        *,
        schedule_step: Any = None,
        **extra: Any,
    ) -> tuple[Any, State]:
        _check_state(self, state)
        if traced := self.traced_numbers:
            state = numbers.set_numbers(dict(self.links), state, dict.fromkeys(traced))
        given = jax.tree.map(_unknown, updates) if params is None else params
        known = without_strangers(updates, given)
        taken = take_apart(known)
        flat = taken.check_updates(updates)
        plan = self._plan(taken, taken.live(flat))
        if params is None:
            _check_not_read(plan.places)
        call = self._call(state, schedule_step, extra)
        results, new_state = run(plan, call, [flat[j] for j in plan.live], wanted)
        done = dict(zip(plan.live, results, strict=True))
        others = taken.leaves if wanted == "params" else flat
        result = taken.unflatten([done.get(j, x) for j, x in enumerate(others)])
        if known is not given and wanted == "params":
            result = with_strangers(result, given)
        return result, new_state


Chain.__init__ = made_once(Chain.__init__)


def chain(*unnamed: Any, **links: Any) -> Chain:
    """Compose links, by name, into one optax transformation.

    Args:
      *unnamed: empty; give links by name, which is their key in states and files.
      **links: each a `Link`, or any object with optax's `init` and `update`, in the order in which
        gradients pass.

    Returns:
      A transformation for `optax.chain`, flax's `TrainState`, `nnx.Optimizer` or `optimize_loss`.

    Raises:
      InvalidType: there are no links, one has no name, or one is a class or a plain function.

    Example:
      Gradients of norm 5 are shrunk to norm 1, then multiplied by -0.1:

      >>> import jax.numpy as jnp, optimize_loss as ol
      >>> tx = ol.transforms.chain(
      ...     clip=ol.transforms.ClipByGlobalNorm(1.0), rate=ol.transforms.ScaleByLearningRate(0.1))
      >>> params = {"w": jnp.zeros(2)}
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"w": jnp.array([3.0, 4.0])}, state, params)
      >>> print(updates["w"].round(6), state["step"])
      [-0.06 -0.08] 1
    """
    if unnamed or not links:
        raise InvalidType(
            "Give links by name: chain(clip=ClipByGlobalNorm(1.0), adam=ScaleByAdam()). "
            f"Received: {len(unnamed)} without a name, {len(links)} with one."
        )
    for name, link in links.items():
        if not (isinstance(link, ForParameters) or is_transformation(link)):
            raise InvalidType(
                f"The link {name!r} must be an instance of `Link`, or have optax's `init` and "
                f"`update`. Received: {link!r}."
            )
        if "/" in name or name == "step":
            raise ValueError(f"A link's name has no '/' and is not 'step'. Received: {name!r}.")
    check_order(links)
    return Chain(tuple(with_losses(links).items()))


def _step(state: State, schedule_step: Any) -> Any:
    """Return the step that schedules see."""
    return state["step"] if schedule_step is None else schedule_step


def _check_not_read(places: Sequence[Place]) -> None:
    """Raise a `ValueError` if a link reads parameters that were not given."""
    for place in places:
        moves = "before" in functions_of(type(place.link))
        reads = getattr(place.link, "reads_params", False) or moves
        if reads and any(place.takes):
            raise ValueError(f"`params` must be given: the link {place.name!r} reads them.")


def _unknown(update: Any) -> Any:
    """Return what stands for the value of a parameter that was not given: NaN where it can."""
    if not jnp.issubdtype(jnp.result_type(update), jnp.inexact):
        return update
    with jax.debug_nans(False):
        return jnp.full_like(update, jnp.nan)


def _check_state(links: Chain, state: Any) -> None:
    wanted = {"step", *(name for name, _ in links.links)}
    if not isinstance(state, Mapping) or set(state) != wanted:
        got = sorted(state) if isinstance(state, Mapping) else type(state).__name__
        raise TreeMismatch(
            f"`state` must come from this chain's `init`, with the keys {sorted(wanted)}. "
            f"Received: {got}."
        )
    for name, link in links._linked():
        if isinstance(link, Link):
            own = {*link.numbers(), *link.memory()}
            if not isinstance(state[name], Mapping) or own - set(state[name]):
                raise TreeMismatch(
                    f"`state` of the link {name!r} must have {sorted(own)}, as {link!r} makes it. "
                    f"Received: {state[name]!r}."
                )
