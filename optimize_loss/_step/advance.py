"""The first state of a step, and the function that is compiled: from a state to the next one."""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optimize_loss._checks import InvalidType, received
from optimize_loss._engine.bucket import Layout, unpacked
from optimize_loss._engine.device import copy, is_elsewhere
from optimize_loss._engine.kinds import weighs_nothing
from optimize_loss._engine.sharding import init_spread
from optimize_loss._engine.trees import owned
from optimize_loss._state.gradients import (
    Trainable,
    colocated,
    flat_gradients,
    for_line_searches,
    radius,
    told,
)
from optimize_loss._state.loss import Aux, run_update_ops
from optimize_loss._state.metrics import joined, rates, read
from optimize_loss._state.recipe import Recipe, layout_of, trainable_of
from optimize_loss._state.train_state import TrainState
from optimize_loss.transforms import Accumulate, Chain
from optimize_loss.transforms._guard import kept, was_open

logger = logging.getLogger("optimize_loss")
Values = dict[str, Any]  # by name


def first_arrays(recipe: Recipe, trainable: Trainable) -> tuple[Any, Values, Layout | None]:
    """Return the parameters and the chain's first state as a step takes them, and the layout."""
    chain, axis, layout = recipe.chain, recipe.shard_state, layout_of(recipe, trainable)
    make = functools.partial(init_spread, chain, axis=axis) if axis else chain.init
    if layout is None:
        return trainable.params, owned(make(trainable.tree(trainable.leaves))), None
    packed = layout.pack(trainable.params)
    optimizer = owned(make(layout.only_trained(packed)))
    layout = layout.with_numbers(optimizer)
    return packed, layout.join_numbers(optimizer), layout


def first_key(takes_key: bool, seed: int, key: Any) -> Any:
    """Return a random key where the loss takes one: that given, or one made from the seed."""
    if key is None:
        return jax.random.key(seed) if takes_key else None
    if not takes_key:
        raise ValueError("`key` must not be given: the loss does not take one.")
    if not isinstance(key, jax.Array):
        raise InvalidType(f"`key` must be a random key. {received('key', key)}")
    if not _is_one_key(key):
        raise InvalidType(
            f"`key` must be one random key. Received: shape {key.shape}, dtype {key.dtype}."
        )
    return copy(key)


def _is_one_key(array: jax.Array) -> bool:
    """Return whether an array is a random key, typed or of the raw kind that JAX is set to."""
    if not jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        try:
            array = jax.random.wrap_key_data(array)
        except TypeError:
            return False
    return not array.shape


def advance_many(
    one: Callable[..., Any], shardings: Any, state: TrainState, batches: Any
) -> tuple[TrainState, Values]:
    """Take as many steps as the batches have entries, while being traced; `one` takes each."""
    state, metrics = jax.lax.scan(functools.partial(one, shardings), state, batches)
    if state.placement is not None:
        state = _with_packed(state, state.placement.constrain(state.packed))
    return state, metrics


def advance(
    recipe: Recipe, shardings: tuple[Any, ...] | None, state: TrainState, batch: tuple[Any, ...]
) -> tuple[TrainState, Values]:
    """Take one step, while being traced.

    Args:
      recipe: of the step.
      shardings: where gradients are to lie; None where XLA may choose.
      state: the state.
      batch: what the loss takes after the parameters.

    Returns:
      The next state, and the metrics.
    """
    shapes = jax.tree.map(lambda x: jax.typeof(x).str_short(), batch)
    logger.info("tracing a step for a batch of %s", shapes)
    chain = recipe.chain
    model_state = run_update_ops(recipe.update_ops, state.model_state, batch)
    key = _key_of_step(chain, state)
    trainable = trainable_of(recipe, state.params)
    _check_on_device([*trainable.leaves, *jax.tree.leaves(state.packed_optimizer)])

    def loss_of(params: Any) -> tuple[jax.Array, Aux]:
        return recipe.loss(params, batch, model_state, _again(key), state.graph)

    scale = chain.loss_scale(state.links, state.step)
    rho = radius(chain, state.links, state.step)
    loss, aux, grads = flat_gradients(loss_of, trainable, scale, rho)
    grads = grads if shardings is None else colocated(grads, shardings)
    extra = told(loss, aux, chain)
    if state.placement is None and rho is None:
        extra |= for_line_searches(chain, trainable, loss_of, grads, scale)
    new = _updated(recipe, state, grads, extra)
    model_state = kept(_counts(chain, state, new, extra), state.model_state, aux.model_state)
    new = dataclasses.replace(new, model_state=model_state, batches=count_of(state))
    return new, joined(_metrics(recipe, state, new, loss), aux.metrics, recipe.name)


def count_of(state: TrainState) -> jax.Array:
    """Return how many batches have been taken with the one of this step."""
    return jnp.minimum(state.batches, jnp.iinfo(jnp.int32).max - 1) + 1


def _key_of_step(chain: Chain, state: TrainState) -> Any:
    """Return the random key of this step; None where the state has none."""
    if state.key is None:
        return None
    key = jax.random.fold_in(state.key, state.packed_optimizer["step"])
    for name, link in chain.links:
        if isinstance(link, Accumulate):  # calls between two updates
            key = jax.random.fold_in(key, state.links[name]["gathered"])
    return key


def _again(key: Any) -> Any:
    """Return a key for one more evaluation of the loss, which uses the same numbers on purpose."""
    return None if key is None else jax.random.clone(key)


def _check_on_device(leaves: list[Any]) -> None:
    """Raise a `ValueError` if a part of a state that a step changes is in the host's memory."""
    if any(map(is_elsewhere, leaves)):
        raise ValueError(
            "`state` must be in the memory of its device to be stepped. Received: one of which a "
            "part is in the memory of the host. Move it, as in "
            "`jax.device_put(state, jax.memory.Space.Device)`."
        )


def _updated(recipe: Recipe, state: TrainState, grads: list[Any], extra: Values) -> TrainState:
    """Return the state after an update, its arrays where they are to stay."""
    if state.placement is None:
        return _moved(recipe, state, grads, extra)

    part, run = state.placement.part, state.placement.run

    def update(state: TrainState, grads: list[Any], extra: Values) -> tuple[Any, Values]:
        state = _with_packed(state, (part(state.packed_params), state.packed_optimizer))
        params, optimizer = _moved(recipe, state, grads, extra).packed
        return part(params), optimizer

    return _with_packed(state, run(update, state.packed, state, grads, extra))


def _with_packed(state: TrainState, packed: tuple[Any, Values]) -> TrainState:
    return dataclasses.replace(state, packed_params=packed[0], packed_optimizer=packed[1])


def _moved(recipe: Recipe, state: TrainState, grads: list[Any], extra: Values) -> TrainState:
    """Return the state with the parameters and the optimizer's state after an update."""
    trainable = trainable_of(recipe, state.params)
    apply = functools.partial(recipe.chain.apply, schedule_step=state.step, **extra)
    packed, layout = state.packed_params, state.layout
    if layout is None or not layout.trains(trainable.names):
        tree = trainable.tree
        trained, optimizer = apply(tree(grads), state.optimizer, tree(trainable.leaves))
        return state.repacked(trainable.replace(jax.tree.leaves(trained)), optimizer)
    by_name = dict(zip(trainable.names, grads, strict=True))
    parted = layout.parted(by_name)
    if parted == layout:
        old = layout.only_trained(packed)
        trained, links = apply(layout.gather_grads(by_name), state.links, old)
    else:
        old = parted.gather(dict(zip(trainable.names, trainable.leaves, strict=True)))
        links = parted.regather_state(state.links)
        trained, links = apply(parted.gather_grads(by_name), links, old)
        trained = layout.gather(unpacked(trained))
        links = layout.regather_state(links)
    return state.with_links(links, {**packed, **trained})


def _counts(chain: Chain, state: TrainState, new: TrainState, extra: Values) -> jax.Array | None:
    """Return whether the batch was let through, and weighs something; None if it always is."""
    is_open = was_open(chain.links, state.links, new.links)
    empty = weighs_nothing((link for _, link in chain.links), extra.get("weight"))
    if empty is None:
        return is_open
    return ~empty if is_open is None else is_open & ~empty


def _metrics(recipe: Recipe, state: TrainState, new: TrainState, loss: jax.Array) -> Values:
    """Return what the step and its links report."""
    metrics: Values = {"loss": loss, "batches": new.batches}
    if "learning_rate" in recipe.summaries:
        metrics |= rates(recipe.chain, state.links, state.step, recipe.learning_rate)
    return metrics | read(recipe.chain, new.links, metrics)
