"""This package: the chain for updates alone, `optimize_loss` for the rest."""

import itertools
import os
from typing import Any

import jax
import jax.numpy as jnp

import optimize_loss as ol
from benchmarks._losses import loss_of
from benchmarks._problems import BETA_1, BETA_2, CLIP, DECAY, EPSILON, PEAK, STEPS, WARM_UP, Problem
from benchmarks.peers import on_jax

VERSIONS = on_jax.versions(ol)
T = ol.transforms
BUCKET = None if "OURS_BUCKET" in os.environ else "auto"
OF_LOSS = "OURS_SUMMARIES" in os.environ


def schedule() -> Any:
    return ol.schedules.CosineDecay(
        0.0, decay_steps=STEPS - WARM_UP, warmup_target=PEAK, warmup_steps=WARM_UP
    )


def adamw() -> dict[str, Any]:
    return {"adam": T.ScaleByAdam(BETA_1, BETA_2, EPSILON), "decay": T.AddWeightDecay(DECAY)}


class Update(on_jax.JaxPeer):
    """The chain by itself: gradients in, parameters out."""

    def rule(self, params: Any) -> Any:
        rate = T.ScaleByLearningRate(schedule())
        tx = T.chain(clip=T.ClipByGlobalNorm(CLIP), **adamw(), rate=rate)
        tx = T.with_precision(tx, self.problem.precision)
        return tx.init(params), lambda grads, params, state: tx.apply(grads, state, params)


class Step:
    """The training step, as the user gets it."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.step = self.made()
        self.state = self.step.init(problem.params())
        self.batches = on_jax.batches_of(problem)
        self.turns: Any = itertools.cycle(self.batches)
        self.feed: Any = None
        k = problem.steps_per_call
        if problem.kind == "digits" and k > 1:  # from the host, as `run` takes them
            self.feed = itertools.cycle(zip(*problem.batches(), strict=True))
        elif k > 1:
            some = [self.batches[i : i + k] for i in range(0, len(self.batches) - k + 1, k)]
            calls = [jax.tree.map(lambda *x: jnp.stack(x), *batches) for batches in some]
            self.turns = itertools.cycle(calls)

    def made(self) -> ol.TrainStep:
        return ol.optimize_loss(
            loss_of(self.problem),
            learning_rate=schedule(),
            optimizer=T.chain(**adamw()),
            clip_gradients=CLIP,
            summaries=None if self.problem.metrics and not OF_LOSS else ["loss"],
            bucket=BUCKET,
            precision=self.problem.precision,
        )

    def built(self, stage: str) -> Any:
        lowered = self.made().lower(self.state, *self.batches[0])
        return lowered.compile() if stage == "compile" else lowered

    def counts(self) -> dict[str, int]:
        return on_jax.counted(self.built("compile"))

    def run(self, steps: int) -> None:
        k = self.problem.steps_per_call
        if self.feed is not None:
            self.state, _ = self.step.run(self.state, self.feed, steps=steps, steps_per_call=k)
        else:
            call = self.step.many if k > 1 else self.step
            for _ in range(steps // k):
                self.state, _ = call(self.state, *next(self.turns))
        jax.block_until_ready(self.state)

    def values(self) -> Any:
        return self.state.params


def Peer(problem: Problem) -> Update | Step:
    return Step(problem) if problem.packed or problem.kind != "update" else Update(problem)
