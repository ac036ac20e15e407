"""What a training step is made of, its first state, and the function that is compiled."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from optimize_loss._checks import InvalidType, received
from optimize_loss._engine.bucket import Layout, find_layout, unpacked
from optimize_loss._engine.device import copy, from_host, is_elsewhere
from optimize_loss._engine.kinds import weighs_nothing
from optimize_loss._engine.sharding import check_on_mesh, devices_along, init_spread
from optimize_loss._engine.transfers import asked_for
from optimize_loss._engine.trees import (
    PARAMETER,
    check_on_device,
    copied,
    distinct,
    owned,
    placed_like,
)
from optimize_loss._files.state_dict import register_with_flax
from optimize_loss._names import Pattern
from optimize_loss._state.gradients import (
    Trainable,
    colocated,
    find_trainable,
    flat_gradients,
    for_line_searches,
    radius,
    told,
)
from optimize_loss._state.loss import Aux, Loss, run_update_ops
from optimize_loss._state.metrics import joined, rates, read
from optimize_loss._state.rules import NO_RULES, Rules
from optimize_loss._state.train_state import TrainState
from optimize_loss.transforms import Accumulate, Chain
from optimize_loss.transforms._guard import kept, was_open

logger = logging.getLogger("optimize_loss")


@dataclasses.dataclass(frozen=True, eq=False)
class PureStep:
    """The functional core of a `TrainStep`, which says what the fields are."""

    loss: Loss
    chain: Chain
    variables: tuple[Pattern, ...] | None
    update_ops: tuple[Callable[..., Any], ...]
    summaries: tuple[str, ...]
    name: str
    first_step: int
    increment_step: bool
    colocate_gradients: bool
    seed: int
    learning_rate: Any
    bucket: int | None
    shard_state: str | None = None
    rules: Rules = NO_RULES

    @asked_for()
    def init(self, params: Any, *, model_state: Any = None, key: Any = None) -> TrainState:
        """Return the state before the first step.

        Args:
          params: the parameters, a tree of arrays and numbers. They are copied, as a step takes
            the memory of the state that it is given.
          model_state: the first model state, for losses and update ops that take one.
          key: a random key, for losses that take one; made from `seed` if not given.

        Raises:
          InvalidType: a leaf of `params` is no array and no number.
          ValueError: a pattern matches no parameter; there is nothing to train; a parameter to
            train is in the memory of the host; or `model_state` or `key` is missing or given in
            vain.
        """
        if isinstance(params, TrainState):
            raise InvalidType("`params` must be a tree of arrays. Received: a TrainState.")
        register_with_flax()
        params = copied(PARAMETER, params)
        self.rules.check(params)
        trainable = self._trainable(params)
        trained = trainable.tree(trainable.leaves)
        check_on_device(trainable.names, trainable.leaves)
        if self.shard_state:
            check_on_mesh(self.shard_state, trainable.names, trainable.leaves)
        try:
            layout = self._layout(trainable)
            packed = params if layout is None else layout.pack(params)
            inner = trained if layout is None else layout.only_trained(packed)
            axis = self.shard_state
            optimizer = owned(
                init_spread(self.chain, inner, axis) if axis else self.chain.init(inner)
            )
            if layout is not None:
                layout = layout.with_numbers(optimizer)
                optimizer = layout.join_numbers(optimizer)
        except ValueError as error:
            if self.variables is not None:
                error.add_note(f"Only these parameters are trained: {trainable.names}.")
            raise
        state = TrainState(
            packed_params=packed,
            packed_optimizer=optimizer,
            model_state=copied("`model_state` at", self._check_model_state(model_state)),
            key=self._check_key(key),
            first_step=from_host(self.first_step, jnp.int32),
            chain=self.chain,
            increment_step=self.increment_step,
            layout=layout,
        )
        state = placed_like(params, distinct(state))
        return state.placed() if self.shard_state else state

    def _trainable(self, params: Any) -> Trainable:
        """Return the parameters with a mark for those that are trained."""
        frozen = self.rules.frozen if self.rules.having_frozen else None
        return find_trainable(params, self.variables, frozen)

    def _layout(self, trainable: Trainable) -> Layout | None:
        """Return how small parameters lie in one array; None where each lies by itself."""
        if self.bucket is None:
            return None
        kinds: Iterator[Any] = iter(self.chain.kinds(trainable.tree(trainable.leaves)))
        if axis := self.shard_state:  # members that can be parted equally have an array that can
            pairs = zip(kinds, trainable.leaves, strict=True)
            kinds = (kind and (kind, x.size % devices_along(axis, x) == 0) for kind, x in pairs)
        of_all = [next(kinds) if trained else () for trained in trainable.marks]
        return find_layout(trainable.params, of_all, trainable.marks, self.bucket)

    def _check_model_state(self, model_state: Any) -> Any:
        """Return the first model state if there is one exactly where something takes it."""
        takers = ["the loss"] if self.loss.takes("model_state") else []
        takers += ["`update_ops`"] if self.update_ops else []
        if takers and model_state is None:
            raise ValueError(
                "`model_state` must be given, as in `step.init(params, model_state=...)`: "
                f"needed by {' and '.join(takers)}."
            )
        if model_state is not None and not takers:
            raise ValueError(
                "`model_state` must not be given: the loss does not take one. It would declare it "
                "by keyword only, as in `loss(params, x, *, model_state)`."
            )
        return model_state

    def _check_key(self, key: Any) -> Any:
        """Return a random key where the loss takes one: that given, or one made from the seed."""
        takes_key = self.loss.takes("key")
        if key is None:
            return jax.random.key(self.seed) if takes_key else None
        if not takes_key:
            raise ValueError("`key` must not be given: the loss does not take one.")
        if not isinstance(key, jax.Array):
            raise InvalidType(f"`key` must be a random key. {received('key', key)}")
        if not _is_one_key(key):
            raise InvalidType(
                f"`key` must be one random key. Received: shape {key.shape}, dtype {key.dtype}."
            )
        return copy(key)

    def _shardings(self, state: TrainState) -> tuple[Any, ...] | None:
        if not self.colocate_gradients:
            return None
        trained = self._trainable(state.outline).leaves
        return tuple(getattr(leaf, "sharding", None) for leaf in trained)

    def _advance(
        self, shardings: tuple[Any, ...] | None, state: TrainState, batch: tuple[Any, ...]
    ) -> tuple[TrainState, dict[str, Any]]:
        """Take one step, while being traced."""
        shapes = jax.tree.map(lambda x: jax.typeof(x).str_short(), batch)
        logger.info("tracing a step for a batch of %s", shapes)
        model_state = run_update_ops(self.update_ops, state.model_state, batch)
        key = state.key
        if key is not None:
            key = jax.random.fold_in(key, state.packed_optimizer["step"])
            for name, link in self.chain.links:
                if isinstance(link, Accumulate):  # calls between two updates
                    key = jax.random.fold_in(key, state.links[name]["gathered"])
        trainable = self._trainable(state.params)
        _check_on_device([*trainable.leaves, *jax.tree.leaves(state.packed_optimizer)])
        scale = self.chain.loss_scale(state.links, state.step)

        def loss_of(params: Any) -> tuple[jax.Array, Aux]:
            return self.loss(params, batch, model_state, _again(key))

        rho = radius(self.chain, state.links, state.step)
        loss, aux, grads = flat_gradients(loss_of, trainable, scale, rho)
        if shardings is not None:
            grads = colocated(grads, shardings)
        extra = told(loss, aux, self.chain)
        if state.placement is None:
            if rho is None:
                extra |= for_line_searches(self.chain, trainable, loss_of, grads, scale)
            new = self._updated(state, grads, extra)
        else:

            def update(*arguments: Any) -> Any:
                return self._updated(*arguments).packed

            packed = state.placement.run(update, state.packed, state, grads, extra)
            new = state.with_packed(packed)
        is_open = was_open(self.chain.links, state.links, new.links)
        empty = weighs_nothing((link for _, link in self.chain.links), extra.get("weight"))
        if empty is not None:
            is_open = ~empty if is_open is None else is_open & ~empty
        model_state = kept(is_open, state.model_state, aux.model_state)
        new = dataclasses.replace(new, model_state=model_state)
        metrics = {"loss": loss}
        if "learning_rate" in self.summaries:
            metrics |= rates(self.chain, state.links, state.step, self.learning_rate)
        metrics |= read(self.chain, new.links, metrics)
        return new, joined(metrics, aux.metrics, self.name)

    def _updated(self, state: TrainState, grads: list[Any], extra: dict[str, Any]) -> TrainState:
        """Return the state with the parameters and the optimizer's state after an update."""
        trainable = self._trainable(state.params)
        apply = functools.partial(self.chain.apply, schedule_step=state.step, **extra)
        packed, optimizer, layout = state.packed_params, state.links, state.layout
        if layout is None or not layout.trains(trainable.names):
            tree = trainable.tree
            trained, optimizer = apply(tree(grads), state.optimizer, tree(trainable.leaves))
            return state.repacked(trainable.replace(jax.tree.leaves(trained)), optimizer)
        by_name = dict(zip(trainable.names, grads, strict=True))
        parted = layout.parted(by_name)
        if parted == layout:
            old = layout.only_trained(packed)
            trained, optimizer = apply(layout.gather_grads(by_name), optimizer, old)
        else:
            old = parted.gather(dict(zip(trainable.names, trainable.leaves, strict=True)))
            optimizer = parted.regather_state(optimizer)
            trained, optimizer = apply(parted.gather_grads(by_name), optimizer, old)
            trained = layout.gather(unpacked(trained))
            optimizer = layout.regather_state(optimizer)
        new = dataclasses.replace(state, packed_params={**packed, **trained})
        return new.with_links(optimizer)

    def _advance_many(self, shardings: Any, state: TrainState, batches: Any) -> Any:
        """Take as many steps as the batches have entries, while being traced."""
        step = functools.partial(self._advance, shardings)
        state, metrics = jax.lax.scan(step, state, batches)
        if state.placement is not None:
            state = state.with_packed(state.placement.constrain(state.packed))
        return state, metrics


def _check_on_device(leaves: list[Any]) -> None:
    """Raise a `ValueError` if a part of a state that a step changes is in the host's memory."""
    if any(map(is_elsewhere, leaves)):
        raise ValueError(
            "`state` must be in the memory of its device to be stepped. Received: one of which a "
            "part is in the memory of the host. Move it, as in "
            "`jax.device_put(state, jax.memory.Space.Device)`."
        )


def _is_one_key(array: jax.Array) -> bool:
    """Return whether an array is a random key, typed or of the raw kind that JAX is set to."""
    if not jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        try:
            array = jax.random.wrap_key_data(array)
        except TypeError:
            return False
    return not array.shape


def _again(key: Any) -> Any:
    """Return a key for one more evaluation of the loss, which uses the same numbers on purpose."""
    return None if key is None else jax.random.clone(key)
