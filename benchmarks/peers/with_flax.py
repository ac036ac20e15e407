"""flax: `nnx.Optimizer` around the optax rule, under `nnx.jit`, donating."""

import itertools
from typing import Any

import flax
import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks._losses import loss_of
from benchmarks._problems import Problem
from benchmarks.peers import on_jax, with_optax

VERSIONS = on_jax.versions(flax)


class Model(nnx.Module):
    def __init__(self, params: Any) -> None:
        self.params = nnx.Dict({n: nnx.Param(jnp.asarray(p)) for n, p in params.items()})


class Peer:
    def __init__(self, problem: Problem) -> None:
        self.model = Model(problem.params())
        self.optimizer = nnx.Optimizer(self.model, with_optax.transformation(), wrt=nnx.Param)
        if problem.kind == "update":
            like = nnx.state(self.model, nnx.Param)
            grads = jax.tree.leaves(jax.tree.map(jnp.asarray, problem.grads()))
            self.inputs: list[Any] = [jax.tree.unflatten(jax.tree.structure(like), grads)]
            self.program: Any = nnx.jit(self._update, donate_argnums=(0, 1))
        else:
            self.inputs = on_jax.batches_of(problem)
            self.loss = loss_of(problem)
            self.program = nnx.jit(self._step, donate_argnums=(0, 1))
        self.turns = itertools.cycle(self.inputs)

    @staticmethod
    def _update(model: Model, optimizer: Any, grads: Any) -> None:
        optimizer.update(model, grads)

    def _step(self, model: Model, optimizer: Any, batch: Any) -> Any:
        def loss(model: Model) -> Any:
            return self.loss({n: p[...] for n, p in model.params.items()}, *batch)

        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.program(self.model, self.optimizer, next(self.turns))
        jax.block_until_ready(nnx.state(self.model))

    def values(self) -> Any:
        return {n: p[...] for n, p in self.model.params.items()}
