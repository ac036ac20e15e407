"""From a case to two programs that are lowered for devices that are not here."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import optimize_loss as ol
from benchmarks.compiled.cases import Case
from benchmarks.compiled.targets import Target, mesh_of


def ours(case: Case, target: Target) -> jax.stages.Lowered:
    """Return our step.

    The state is made on devices that are here, one for each of those of the target.
    """
    here, there = mesh_of(jax.devices()[: target.count]), target.mesh()
    options = dict(case.ours)
    if case.layout == "zero1":
        options["shard_state"] = "data"
    step = ol.optimize_loss(case.model.loss, **options)
    if target.count == 1:
        state = jax.eval_shape(step.init, case.model.params())
    else:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), case.model.params())
        state = step.init(jax.device_put(zeros, _shardings(case.layout, here, zeros)))
    if state.placement is not None:
        spread, parted = (
            tuple(_moved(x, there) for x in places)
            for places in (state.placement.shardings, state.placement.parted)
        )
        placement = dataclasses.replace(state.placement, shardings=spread, parted=parted)
        state = dataclasses.replace(state, placement=placement)
    state, batch = _on(there, state), _batch(case, there)
    if case.many is None:
        return step.lower(state, *batch)
    stacked = [_stack(case.many, x) for x in batch]
    return jax.jit(lambda s, *b: step.many(s, *b), donate_argnums=0).lower(state, *stacked)


def with_optax(case: Case, target: Target) -> jax.stages.Lowered:
    """Return the step that one writes by hand."""
    there, tx = target.mesh(), case.optax()
    params = case.model.params()
    places = _shardings("fsdp" if case.layout == "fsdp" else "replicated", there, params)
    slots = jax.eval_shape(tx.init, params)
    spread = _shardings("replicated" if case.layout == "replicated" else "fsdp", there, slots)

    def one(params: Any, state: Any, *batch: Any) -> Any:
        loss, grads = jax.value_and_grad(case.model.loss)(params, *batch)
        updates, state = tx.update(grads, state, params)
        metrics = case.after(params, grads) if case.after else None
        return optax.apply_updates(params, updates), state, (loss, metrics)

    def several(params: Any, state: Any, *batches: Any) -> Any:
        def body(carry: Any, batch: Any) -> Any:
            *carry, metrics = one(*carry, *batch)
            return tuple(carry), metrics

        (params, state), metrics = jax.lax.scan(body, (params, state), batches)
        return params, state, metrics

    batch: Any = _batch(case, there)
    if case.many is not None:
        batch = [_stack(case.many, x) for x in batch]
    results = (places, spread, None) if target.count > 1 else None
    program = jax.jit(several if case.many else one, donate_argnums=(0, 1), out_shardings=results)
    return program.lower(_put(params, places), _put(slots, spread), *batch)


def _stack(count: int, tree: Any) -> Any:
    def one(x: Any) -> Any:
        return jax.ShapeDtypeStruct((count, *x.shape), x.dtype, sharding=x.sharding)

    return jax.tree.map(one, tree)


def _shardings(layout: str, mesh: Mesh, tree: Any) -> Any:
    """Return where arrays lie: whole everywhere, or over all devices along the first dimension."""

    def one(x: Any) -> NamedSharding:
        parted = layout == "fsdp" and x.ndim and x.shape[0] % mesh.size == 0
        return NamedSharding(mesh, PartitionSpec("data") if parted else PartitionSpec())

    return jax.tree.map(one, tree)


def _put(tree: Any, shardings: Any) -> Any:
    def one(x: Any, there: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there)

    return jax.tree.map(one, tree, shardings)


def _moved(sharding: Any, mesh: Mesh) -> NamedSharding:
    """Return the same sharding over other devices."""
    spec = sharding.spec if isinstance(sharding, NamedSharding) else PartitionSpec()
    return NamedSharding(mesh, spec)


def _on(mesh: Mesh, tree: Any) -> Any:
    """Return a tree as shapes on other devices."""

    def one(x: Any) -> Any:
        there = _moved(getattr(x, "sharding", None), mesh)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there)

    return jax.tree.map(one, tree)


def _batch(case: Case, mesh: Mesh) -> tuple[Any, ...]:
    """Return a batch, spread over the devices; gradients lie as parameters do."""
    batch = case.model.batches()
    if case.model.batch is None:
        layout = "fsdp" if case.layout == "fsdp" else "replicated"
        return tuple(_put(x, _shardings(layout, mesh, x)) for x in batch)
    return tuple(_put(x, _shardings("fsdp", mesh, x)) for x in batch)
