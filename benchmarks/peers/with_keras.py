"""Keras 3 on JAX: `stateless_apply`, jitted and donating; `fit` for the digits.

`fit` takes as many steps in an execution as the worker's environment says in KERAS_STEPS.
"""

import os
from typing import Any

import jax
import keras
import numpy as np

from benchmarks._problems import (
    BATCH,
    BETA_1,
    BETA_2,
    CLIP,
    DECAY,
    EPSILON,
    PEAK,
    STEPS,
    WARM_UP,
    Problem,
)
from benchmarks.peers import on_jax

VERSIONS = on_jax.versions(keras)


def optimizer() -> Any:
    rate: Any = keras.optimizers.schedules.CosineDecay(
        0.0, STEPS - WARM_UP, warmup_target=PEAK, warmup_steps=WARM_UP
    )
    return keras.optimizers.AdamW(rate, DECAY, BETA_1, BETA_2, EPSILON, global_clipnorm=CLIP)


class Stateless(on_jax.JaxPeer):
    def rule(self, params: Any) -> Any:
        keras_optimizer = optimizer()
        keras_optimizer.build([keras.Variable(p, name=n) for n, p in params.items()])

        def update(grads: Any, params: Any, state: Any) -> Any:
            leaves, tree = jax.tree.flatten(params)
            leaves, state = keras_optimizer.stateless_apply(state, jax.tree.leaves(grads), leaves)
            return tree.unflatten(leaves), state

        return [variable.value for variable in keras_optimizer.variables], update


class Fit:
    """`model.fit`."""

    def __init__(self, problem: Problem) -> None:
        params = problem.params()
        dense = [keras.layers.Dense(n, activation=a) for n, a in DENSE]
        self.model = keras.Sequential([keras.Input((64,)), *dense])
        self.model.set_weights([params[f"{n}{i}"] for i in range(3) for n in "wb"])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        steps = int(os.environ.get("KERAS_STEPS", "1"))
        self.model.compile(optimizer(), loss, steps_per_execution=steps)
        x, y = problem.batches()
        self.x, self.y = x.reshape(-1, 64), y.reshape(-1)

    def run(self, steps: int) -> None:
        """Take steps: whole epochs, then part of one. Calls begin at the first batch."""
        epochs, rest = divmod(steps * BATCH, len(self.x))
        fit = {"batch_size": BATCH, "shuffle": False, "verbose": 0}
        if epochs:
            self.model.fit(self.x, self.y, epochs=epochs, **fit)
        if rest:
            self.model.fit(self.x[:rest], self.y[:rest], **fit)

    def values(self) -> Any:
        weights = [np.asarray(w) for w in self.model.get_weights()]
        return {f"{n}{i}": weights[2 * i + j] for i in range(3) for j, n in enumerate("wb")}


DENSE = ((128, "relu"), (128, "relu"), (10, None))


def Peer(problem: Problem) -> Stateless | Fit:
    return Fit(problem) if problem.kind == "digits" else Stateless(problem)
