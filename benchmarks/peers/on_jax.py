"""What peers on JAX share: a rule, compiled alone or behind a loss, donating what it replaces."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks._losses import loss_of
from benchmarks._problems import Problem

Update = Callable[[Any, Any, Any], tuple[Any, Any]]  # (grads, params, state) to the new two


def batches_of(problem: Problem) -> list[Any]:
    """Return the batches one by one, on the device."""
    stacked = jax.tree.map(jnp.asarray, problem.batches())
    return list(zip(*stacked, strict=True))


def counted(compiled: Any) -> dict[str, int]:
    """Return what a program needs, in bytes."""
    memory = compiled.memory_analysis()
    if memory is None:
        return {}
    return {"temporary": memory.temp_size_in_bytes, "donated": memory.alias_size_in_bytes}


class JaxPeer:
    """A rule as a user would compile it: `params, state = program(grads or batch, params, state)`.

    Subclasses say what the rule is.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.params = jax.tree.map(jnp.asarray, problem.params())
        self.state, self.update = self.rule(self.params)
        if problem.kind == "update":
            self.inputs: list[Any] = [jax.tree.map(jnp.asarray, problem.grads())]
        else:
            self.inputs = batches_of(problem)
        self.turns = itertools.cycle(self.inputs)
        self.program: Any = None

    def rule(self, params: Any) -> tuple[Any, Update]:
        """Return the first state, and the function that updates."""
        raise NotImplementedError

    def jitted(self) -> Any:
        """Return the program, not traced before."""
        update, kind = self.update, self.problem.kind
        if kind == "update":
            return jax.jit(lambda g, p, s: update(g, p, s), donate_argnums=(1, 2))
        gradient = jax.value_and_grad(loss_of(self.problem))

        def step(batch: Any, params: Any, state: Any) -> Any:
            loss, grads = gradient(params, *batch)
            return *update(grads, params, state), loss

        return jax.jit(step, donate_argnums=(1, 2))

    def built(self, stage: str) -> Any:
        """Return the program anew, up to a stage: "trace", "lower" or "compile"."""
        arguments = self.inputs[0], self.params, self.state
        if stage == "trace":
            return self.jitted().trace(*arguments)
        lowered = self.jitted().lower(*arguments)
        return lowered.compile() if stage == "compile" else lowered

    def counts(self) -> dict[str, int]:
        return counted(self.built("compile"))

    def run(self, steps: int) -> None:
        self.program = self.program or self.jitted()
        for _ in range(steps):
            self.params, self.state, *_ = self.program(next(self.turns), self.params, self.state)
        jax.block_until_ready(self.params)

    def values(self) -> Any:
        return self.params


def versions(*modules: Any) -> dict[str, str]:
    return {m.__name__: m.__version__ for m in (jax, *modules)}


def device() -> str:
    return jax.devices()[0].device_kind
