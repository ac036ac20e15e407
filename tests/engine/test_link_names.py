"""Names of links, of their numbers and of what they remember mean nothing to the rest."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

import optimize_loss as ol

T = ol.transforms
TAKEN = ("gradient_norm", "clipped_gradient_norm", "gradient_norms", "gradient_histograms")
OTHERS = ("loss_mean", "loss_scale", "sam", "skip", "plateau", "accumulate", "clip", "rate", "ema")


def linear(params, x):
    return params["w"] * x


def trained(optimizer, learning_rate=None, steps=1, **options):
    """Return state and metrics after a few steps from w = 8 with a gradient of 2."""
    step = ol.optimize_loss(linear, learning_rate=learning_rate, optimizer=optimizer, **options)
    state, metrics = step.many(step.init({"w": 8.0}), np.full(steps, 2, np.float32))
    return state, jax.tree.map(lambda x: np.asarray(x)[-1], metrics)


@dataclasses.dataclass(frozen=True)
class Remember(T.Link):
    """An observer of a user, which remembers a number by any name."""

    key: str

    def memory(self):
        return {self.key: 4.0}


@dataclasses.dataclass(frozen=True)
class Numbered(T.Link):
    """A link of a user, whose numbers have the names of those of ours."""

    loss_scale: T.Positive = 4.0
    rho: T.Positive = 4.0
    scale: T.Positive = 4.0
    seed: T.Positive = 4.0
    norm: T.Positive = 4.0
    scale_shrinks: T.Positive = 4.0
    schedules_hold: T.Positive = 4.0


@pytest.mark.parametrize("name", [*TAKEN, *OTHERS])
def test_any_link_can_have_any_name(name):
    """A clip to 1 and a rate of 1/2 move by 1/2; the name decides on neither step nor metrics."""
    optimizer = T.chain(**{name: T.ClipByGlobalNorm(1.0)}, by=T.ScaleByLearningRate(0.5))
    state, metrics = trained(optimizer, summaries=["loss"])
    assert state.params["w"] == 7.5
    assert set(metrics) == {"loss", "batches"}


@pytest.mark.parametrize("key", ["loss_scale", "scale", "norm", "mean", "seed", "skipped", "rho"])
def test_a_memory_can_have_any_name(key):
    state, metrics = trained(T.chain(seen=Remember(key), by=T.ScaleByLearningRate(0.5)))
    assert (state.params["w"], metrics["global_norm/gradient_norm"]) == (7, 2)
    assert "loss_scale" not in metrics


@pytest.mark.parametrize("skip", [None, "nonfinite", ol.Spike(warmup_steps=1)])
def test_a_number_can_have_any_name(skip):
    optimizer = T.chain(own=Numbered(), by=T.ScaleByLearningRate(0.5))
    state, _ = trained(optimizer, skip=skip, accumulate=1)
    assert state.params["w"] == 7


def test_a_link_of_another_kind_may_be_called_as_the_one_for_sharpness():
    optimizer = T.chain(sam=T.ScaleByAdadelta(rho=0.5), by=T.ScaleByLearningRate(0.5))
    same = T.chain(own=T.ScaleByAdadelta(rho=0.5), by=T.ScaleByLearningRate(0.5))
    assert trained(optimizer)[0].params["w"] == trained(same)[0].params["w"]


def test_sharpness_is_found_beside_other_numbers_of_its_name():
    adadelta = T.chain(own=T.ScaleByAdadelta(rho=0.5), by=T.ScaleByLearningRate(0.5))
    step = ol.optimize_loss(lambda p: p["w"] ** 2, optimizer=adadelta, sam=1.0)
    _, metrics = step(step.init({"w": 2.0}))
    assert metrics["global_norm/gradient_norm"] == 6  # 2 · (2 + ρ)


# Numbers that are called after parameters, by patterns.


def test_a_multiplier_of_a_parameter_is_no_learning_rate():
    """The parameter is called `learning_rate`: a plateau does not lower its multiplier."""
    step = ol.optimize_loss(
        lambda p, x: 2 * (p["learning_rate"] - jax.lax.stop_gradient(p["learning_rate"])) + 0 * x,
        learning_rate=0.5,
        optimizer=T.chain(own=T.MultiplyGradients({"learning_rate": 2.0})),
        plateau=T.ReduceOnPlateau(0.5, patience=0),
    )
    state, _ = step.many(step.init({"learning_rate": 16.0}), np.zeros(3, np.float32))
    assert state.params["learning_rate"] == 16 - 2 * (1 + 1 + 0.5)


def loss_of_one(name):
    return lambda p, x: p[name] * x


def test_the_seeds_of_a_sweep_are_numbers_of_that_kind():
    step = ol.optimize_loss(
        loss_of_one("seed"),
        learning_rate=1.0,
        optimizer="SGD",
        gradient_noise_scale=0.5,
        gradient_multipliers={"seed": 2.0},
    )
    found = step.sweep(step.init({"seed": 1.0}), np.ones(1, np.float32), seeds=[5, 7])
    assert found.states.optimizer["gradient_multipliers"]["multipliers/seed"].tolist() == [2, 2]
    assert found.states.optimizer["gradient_noise"]["seed"].tolist() == [5, 7]


# Names that are taken.


def test_a_rate_is_called_otherwise_where_its_name_is_taken():
    optimizer = T.chain(rate=T.ClipByGlobalNorm(1.0))
    state, _ = trained(optimizer, learning_rate=0.5)
    assert state.params["w"] == 7.5
    assert state.optimizer["rate_1"]["learning_rate"] == 0.5


class Named(ol.optimizers.SGD):
    """An optimizer of a user whose first link has any name."""

    link_name = ""

    def links(self):
        return {self.link_name: T.ClipByGlobalNorm(1.0), "by": T.ScaleByLearningRate(self.rate)}


TWICE: dict[str, dict[str, Any]] = {
    "clip": {"clipnorm": 1.0},
    "weight_decay": {"weight_decay": 0.1},
    "ema": {"use_ema": True},
    "loss_scale": {"loss_scale_factor": 2.0},
    "accumulate": {"gradient_accumulation_steps": 2},
    "aggregate": {"axis_name": "data"},
}


@pytest.mark.parametrize("name", TWICE)
def test_two_links_of_one_name_in_an_optimizer_are_an_error(name):
    kind = type("Kind", (Named,), {"link_name": name})
    with pytest.raises(ValueError, match=f"other names than \\['{name}'\\]"):
        _ = kind(0.5, **TWICE[name]).chain


def test_a_link_that_is_called_as_the_decay_of_rules_is_an_error():
    optimizer = T.chain(**{"rules.weight_decay": T.ScaleByAdam(), "by": T.ScaleByLearningRate(0.5)})
    with pytest.raises(ValueError, match="other names than"):
        trained(optimizer, rules={"w": {"weight_decay": 0.1}})


# What links report.


@dataclasses.dataclass(frozen=True)
class Largest(T.Link):
    """An observer of a user that reports what it keeps."""

    metric: str
    needs = "global_norm"

    def memory(self):
        return {"size": 0.0}

    def scalars(self, numbers, memory, total, step):
        return {}, {"size": total}

    def report(self, name, parts):
        return {self.metric: parts["size"]}


def test_a_link_says_what_is_reported():
    optimizer = T.chain(
        one=T.ObserveNorm("norm"),
        mean=T.AverageLoss(0.5, metric="mean"),
        each=T.ObserveNorms("each"),
        counts=T.ObserveHistograms(1, "counts"),
        by=T.ScaleByLearningRate(0.5),
        own=Largest("largest"),
    )
    _, metrics = trained(optimizer, summaries=["loss"], skip="nonfinite")
    told = {n: float(x) for n, x in metrics.items() if n != "counts/w"}
    assert told == {
        "loss": 16, "norm": 2, "mean": 8, "each/w": 2, "largest": 1,
        "batches": 1, "skipped": 0, "skipped_in_a_row": 0,
    }  # fmt: skip


def test_what_several_links_report_has_their_names():
    optimizer = T.chain(a=Largest("size"), by=T.ScaleByLearningRate(0.5), b=Largest("size"))
    _, metrics = trained(optimizer)
    assert (metrics["size/a"], metrics["size/b"]) == (2, 1)
    assert "size" not in metrics


@pytest.mark.parametrize("metric", ["loss", "learning_rate"])
def test_a_metric_of_the_step_is_not_overwritten(metric):
    with pytest.raises(ValueError, match=f"'own' must report .* Received: '{metric}'"):
        trained(T.chain(own=Largest(metric), by=T.ScaleByLearningRate(0.5)))
