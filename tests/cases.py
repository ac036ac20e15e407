"""One row per transformation: what every law in `links/test_laws.py` runs over.

A new link gets a row here. What it cannot do is a column of its row.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optimize_loss import optimizers as optim
from optimize_loss import schedules
from optimize_loss import transforms as T
from optimize_loss._engine.by_name import ByName
from optimize_loss.transforms._multiply import MultiplySteps
from tests import devices

LOSS = np.float32(2.0)  # what links that read the loss are given
SHAPES = {"encoder": {"layer_0": {"bias": (2,), "kernel": (8, 2)}}, "scale": ()}
SMALL_SHAPES = {"layer": {"bias": (3,)}, "scale": ()}  # for programs that are slow to compile
NAMES = ["encoder/layer_0/bias", "encoder/layer_0/kernel", "scale"]


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    chain: T.Chain
    other: T.Chain  # the same links and schedules; every number has another valid value
    smooth_at_zero: bool = True  # has finite derivatives where all gradients are 0
    complex_ok: bool = True  # takes complex parameters
    empty_ok: bool = True  # takes a tree without parameters; patterns would match nothing there
    integers_ok: bool = True  # takes integer parameters
    is_value: bool = True  # equals its copies and can be pickled
    keeps_slots: bool = True  # leaves slots alone where the gradient is None
    all_float64: bool = True  # computes in nothing narrower where parameters are float64
    nan_shows: bool = True  # a NaN gradient reaches the parameter; guards leave it out
    bounds_entries: bool = False  # an infinite gradient moves the parameter by a finite amount
    quiet: tuple[str, ...] = ()  # numbers that no update of three steps depends on
    rank: int = 0  # takes no arrays of fewer axes: shapes get axes of length 1

    @property
    def numbers(self) -> dict[str, tuple[Any, Any]]:
        """Two valid values for every hyperparameter without a schedule, by `link/number`."""
        first, second = numbers_of(self.chain), numbers_of(self.other)
        assert first.keys() == second.keys()
        return {name: (first[name], second[name]) for name in first}

    def random_like(self, shapes: Any, seed: int, dtype: Any = jnp.float32) -> Any:
        """Return what the function of this name does, with no fewer axes than the links take."""

        def fitted(shape: tuple[int, ...]) -> tuple[int, ...]:
            return shape + (1,) * (self.rank - len(shape))

        shapes = jax.tree.map(fitted, shapes, is_leaf=lambda x: isinstance(x, tuple))
        return random_like(shapes, seed, dtype)

    def params(self) -> Any:
        return self.random_like(SHAPES, 0)

    def grads(self, t: int) -> Any:
        """Return the gradients of step t = 0, 1, …"""
        return self.random_like(SHAPES, 1 + t)


def numbers_of(tx: T.Chain) -> dict[str, Any]:
    return {
        f"{name}/{number}": value
        for name, _ in tx.links
        if isinstance(link := tx.link(name), T.Link)
        for number, value in link.numbers().items()
        if not callable(value)
        if not isinstance(getattr(link, number, None), ByName)  # the default, for the rest
    }


def case(name: str, first: Any, second: Any, **columns: Any) -> Case:
    """A row for a link, which is called `link` in its chain, for an optimizer, or for a chain."""

    def as_chain(tx: Any) -> T.Chain:
        if isinstance(tx, T.Chain):
            return tx
        return tx.chain if isinstance(tx, optim.Optimizer) else T.chain(link=tx)

    return Case(name, as_chain(first), as_chain(second), **columns)


def halve(pairs):
    return [(g / 2, p) for g, p in pairs]


def contrib(noise, clip, adam, decay, rate, average):
    """Everything that `optimize_loss` of contrib does, around Adam."""
    return T.chain(
        noise=T.AddNoise(*noise),
        multiply=T.MultiplyGradients({"**/bias": 0.5 + clip, "scale": 2.0 + clip}),
        clip=T.ClipByGlobalNorm(clip),
        seen=T.ObserveNorm(),
        adam=T.ScaleByAdam(*adam),
        decay=T.AddWeightDecay(decay, exclude=("**/bias",)),
        rate=T.ScaleByLearningRate(rate),
        average=T.AverageParams(average),
    )


def adaptive(std, decay, epsilon, momentum, rate):
    """Links that need norms, the loss and slots, in one pass."""
    return T.chain(
        loss=T.AverageLoss(decay),
        clip=T.ClipByAdaptiveNorm(std, decay, epsilon=epsilon),
        seen=T.ObserveNorms(),
        each=T.ClipByNorm(std),
        again=T.ClipByGlobalNorm(std),
        momentum=T.ScaleByMomentum(momentum),
        rate=T.ScaleByLearningRate(rate),
    )


def by_name(multiplier, decay, added, adam, rate):
    """Links whose number goes by the name of a parameter."""
    return T.chain(
        shrink=T.ShrinkParams({"**/bias": decay}),
        adam=T.ScaleByAdam(adam[0], adam[1], {"scale": adam[2], "**": adam[2] / 2}),
        add=T.AddWeightDecay({"scale": added}),
        rate=T.ScaleByLearningRate(rate),
        multiply=MultiplySteps({"**/bias": multiplier, "scale": 2 * multiplier}),
    )


def scheduled():
    """Numbers that follow schedules: a rate, and a decay rate."""
    rate = schedules.ExponentialDecay(0.1, 5, 0.5)
    return T.chain(
        rate=T.ScaleByLearningRate(rate), average=T.AverageParams(schedules.WarmUpDecay(0.95))
    )


TRACE = optax.trace(0.9)


def around_optax(clip, rate):
    """A link of optax between two of ours."""
    rate = T.ScaleByLearningRate(rate)
    return T.chain(clip=T.ClipByGlobalNorm(clip), trace=TRACE, rate=rate)


def accumulated(every, clip, adam, decay, rate, average):
    """All behind a gate, with a decay that comes first."""
    return T.chain(
        accumulate=T.Accumulate(every),
        clip=T.ClipByGlobalNorm(clip),
        weight_decay=T.ShrinkParams(decay, exclude=("**/bias",)),
        adam=T.ScaleByAdam(*adam),
        rate=T.ScaleByLearningRate(rate),
        average=T.AverageParams(average),
    )


def losses_of_updates(every, decay, rate):
    """A gate that passes a loss on."""
    return T.chain(
        accumulate=T.Accumulate(every),
        loss=T.AverageLoss(decay),
        rate=T.ScaleByLearningRate(rate),
    )


def scaled(initial_scale, growth_steps, decay, ftrl):
    """A gate, a move, and a rule that sees the parameter moved."""
    return T.chain(
        unscale=T.DivideByDynamicLossScale(initial_scale, growth_steps),
        weight_decay=T.ShrinkParams(decay),
        ftrl=T.StepByFtrl(*ftrl),
    )


def gates(initial_scale, growth_steps, every, rate):
    """A gate behind a gate, the second one last."""
    return T.chain(
        rate=T.ScaleByLearningRate(rate),
        unscale=T.DivideByDynamicLossScale(initial_scale, growth_steps),
        accumulate=T.Accumulate(every),
    )


def guarded(spikes, initial_scale, every, rate, average):
    """All that goes around a rule: three gates, and two averages behind it."""
    return T.chain(
        skip=T.SkipSpikes(*spikes),
        unscale=T.DivideByDynamicLossScale(initial_scale, every),
        accumulate=T.Accumulate(every),
        seen=T.ObserveNorm(),
        momentum=T.ScaleByMomentum(average),
        rate=T.ScaleByLearningRate(rate),
        lookahead=T.Lookahead(every, average),
        average=T.AverageParams(average, bias_free=True),
    )


def plateau(*numbers):
    """A loss that is always the same, and a rate that it lowers."""
    rate = T.ScaleByLearningRate(numbers[0])
    return T.chain(link=T.ReduceOnPlateau(*numbers), rate=rate)


def is_no_bias(name, param):
    return not name.endswith("bias")


def in_groups(clip, bias_clip, momentum, adam, decay, rates):
    """Two rules, each with a decay and a rate of its own; a clip over all, and one over some."""
    return T.chain(
        clip_bias=T.ForParameters("**/bias", T.ClipByGlobalNorm(bias_clip)),
        clip=T.ClipByGlobalNorm(clip),
        decay_bias=T.ForParameters("**/bias", T.ShrinkParams(decay)),
        momentum=T.ForParameters("**/bias", T.ScaleByMomentum(momentum)),
        rate_bias=T.ForParameters("**/bias", T.ScaleByLearningRate(rates[0])),
        adam=T.ForParameters(is_no_bias, T.ScaleByAdam(*adam)),
        rate=T.ForParameters(is_no_bias, T.ScaleByLearningRate(rates[1])),
        average=T.AverageParams(0.5 + decay),
    )


@dataclasses.dataclass(frozen=True)
class SubtractMean(T.TreeLink):
    """Subtract a share of the mean of all gradients, and keep the sum of each: a user's link."""

    share: float

    def init(self, params):
        return {"sum": {name: jnp.zeros((), p.dtype) for name, p in params.items()}}

    def run(self, updates, slots, params, k):
        sums = {name: jnp.sum(u) for name, u in updates.items()}
        size = max(sum(u.size for u in updates.values()), 1)
        shift = k["share"] * sum(s.astype(k["share"].dtype) for s in sums.values()) / size
        new = {name: u - shift.astype(u.dtype) for name, u in updates.items()}
        return new, {"sum": slots["sum"] | sums}


def in_bits(adam, momentum, rate, seed):
    """Two links with moments, and one with sums that stay as they are."""
    links = T.chain(
        clip=T.ClipByGlobalNorm(rate),
        adam=T.ScaleByAdam(*adam, amsgrad=True),
        accumulate=T.Accumulate(seed),
        momentum=T.ScaleByMomentum(momentum),
        rate=T.ScaleByLearningRate(rate),
        rounding=T.RoundParams(seed),
        average=T.AverageParams(momentum),
    )
    return T.with_precision(links, "bfloat16")


def around_a_tree_link(share, clip, rate):
    """A link of a user, which sees the whole tree, between others."""
    return T.chain(
        clip=T.ClipByGlobalNorm(clip),
        mean=SubtractMean(share),
        momentum=T.ScaleByMomentum(share),
        rate=T.ScaleByLearningRate(rate),
    )


CASES = [
    case("clip-value", T.ClipByValue(0.3), T.ClipByValue(0.7), bounds_entries=True),
    case("clip-norm", T.ClipByNorm(0.5), T.ClipByNorm(0.25)),
    case("clip-global-norm", T.ClipByGlobalNorm(0.5), T.ClipByGlobalNorm(0.25)),
    case("clip-adaptive", T.ClipByAdaptiveNorm(), T.ClipByAdaptiveNorm(1.0, 0.5, epsilon=1e-6)),
    case(
        "clip-adaptive-static",
        T.ClipByAdaptiveNorm(2.0, 0.9, 0.5, 1e-7),
        T.ClipByAdaptiveNorm(1.0, 0.5, 0.25, 1e-6),
    ),
    case("clip-function", T.ClipByFunction(halve), T.ClipByFunction(halve)),
    case("noise", T.AddNoise(0.1, 1), T.AddNoise(0.2, 2), all_float64=False),
    case(
        "noise-normal",
        T.AddNoise(0.1, 1, truncated=False),
        T.AddNoise(0.2, 2, truncated=False),
        all_float64=False,
    ),
    case(
        "multiply",
        T.MultiplyGradients({"**/bias": 2.0, "scale": -0.5}),
        T.MultiplyGradients({"**/bias": 0.5, "scale": 3.0}),
        empty_ok=False,
    ),
    case("weight-decay", T.AddWeightDecay(0.1), T.AddWeightDecay(0.2)),
    case(
        "weight-decay-exclude",
        T.AddWeightDecay(0.1, exclude=("**/bias",)),
        T.AddWeightDecay(0.2, exclude=("**/bias",)),
        empty_ok=False,
    ),
    case(
        "shrink-params",
        T.chain(link=T.ShrinkParams(0.1), rate=T.ScaleByLearningRate(0.1)),
        T.chain(link=T.ShrinkParams(0.2), rate=T.ScaleByLearningRate(0.2)),
    ),
    case("accumulate", T.Accumulate(1), T.Accumulate(2)),
    case("accumulate-sum", T.Accumulate(1, "sum"), T.Accumulate(2, "sum")),
    case("skip-nonfinite", T.SkipNonFinite(), T.SkipNonFinite(), nan_shows=False),
    case("skip-spikes", T.SkipSpikes(), T.SkipSpikes(3.0, 0.9, 1, 0.2, 1e-6), nan_shows=False),
    case("lookahead", T.Lookahead(2), T.Lookahead(3, 0.25)),
    case("plateau", plateau(0.5, 0, 1e-4, 0, 0.0, 1), plateau(0.1, 1, 1e-3, 1, 0.2, 2)),
    case("sum-over-axis", T.SumOverAxis(()), T.SumOverAxis(())),  # of no mapped axis
    case("loss-scale", T.DivideByLossScale(4.0), T.DivideByLossScale(5.0)),
    case(
        "loss-scale-dynamic",
        T.DivideByDynamicLossScale(4.0, 1),
        T.DivideByDynamicLossScale(5.0, 2),
        nan_shows=False,
    ),
    case("rate", T.ScaleByLearningRate(0.1), T.ScaleByLearningRate(0.2)),
    case("momentum", T.ScaleByMomentum(0.9), T.ScaleByMomentum(0.5)),
    case("nesterov", T.ScaleByMomentum(0.9, nesterov=True), T.ScaleByMomentum(0.5, nesterov=True)),
    case("adam", T.ScaleByAdam(), T.ScaleByAdam(0.8, 0.99, 1e-4)),
    case("amsgrad", T.ScaleByAdam(amsgrad=True), T.ScaleByAdam(0.8, 0.99, 1e-4, amsgrad=True)),
    case("adamax", T.ScaleByAdamax(), T.ScaleByAdamax(0.8, 0.99, 1e-4)),
    case("nadam", T.ScaleByNadam(), T.ScaleByNadam(0.8, 0.99, 1e-4)),
    case("lion", T.ScaleByLion(), T.ScaleByLion(0.8, 0.9)),
    case("lamb", T.ScaleByLamb(), T.ScaleByLamb(0.8, 0.99, 1e-4)),
    case(
        "rms",
        T.ScaleByRMS(0.9, 1e-7),
        T.ScaleByRMS(0.8, 1e-5, initial_accumulator_value=1.0),
    ),
    case(
        "rms-centered",
        T.ScaleByRMS(0.9, 1e-4, centered=True),
        T.ScaleByRMS(0.8, 1e-3, centered=True, initial_accumulator_value=1.0),
    ),
    case("adadelta", T.ScaleByAdadelta(0.95, 1e-6), T.ScaleByAdadelta(0.8, 1e-4)),
    case("adagrad", T.ScaleByAdagrad(), T.ScaleByAdagrad(0.2, 1e-5)),
    case("adagrad-from-0", T.ScaleByAdagrad(0.0, 0.0), T.ScaleByAdagrad(0.1, 1e-3)),
    case(
        "ftrl",
        T.StepByFtrl(0.1, -0.5, 0.1, 0.01, 0.01, 0.01, 0.1),
        T.StepByFtrl(0.2, -0.4, 0.2, 0.02, 0.02, 0.02, 0.2),
        complex_ok=False,
    ),
    case(  # 0 to the power of 1/2 has no derivative
        "ftrl-from-0",
        T.StepByFtrl(0.1, initial_accumulator_value=0.0),
        T.StepByFtrl(0.2, -0.4, 0.0, 0.02, 0.02, 0.02, 0.2),
        smooth_at_zero=False,
        complex_ok=False,
    ),
    case(
        "adafactor",
        T.StepByAdafactor(0.5),
        T.StepByAdafactor(0.2, -0.5, 1e-20, 1e-2, 0.5),
    ),
    case(
        "adafactor-absolute",
        T.StepByAdafactor(0.5, relative_step=False),
        T.StepByAdafactor(0.2, -0.5, 1e-20, 1e-2, 0.5, relative_step=False),
    ),
    case(
        "muon",
        T.ScaleByMuon(),
        T.ScaleByMuon(0.9, linear=3.0, cubic=-3.2, quintic=1.2, rms_rate=0.1),
        rank=2,
    ),
    case(
        "muon-plain",
        T.ScaleByMuon(nesterov=False, ns_steps=2, rms_rate=None),
        T.ScaleByMuon(0.9, False, 2, 3.0, -3.2, 1.2, None),
        rank=2,
    ),
    case(
        "schedule-free",
        T.StepByScheduleFree(0.1),
        T.StepByScheduleFree(0.2, 0.8, 0.99, 1e-4, 3),
    ),
    case(
        "proximal-gradient",
        T.StepByProximalGradient(0.1, 0.01, 0.01),
        T.StepByProximalGradient(0.2, 0.02, 0.02),
        complex_ok=False,
    ),
    case(
        "proximal-adagrad",
        T.StepByProximalAdagrad(0.1, 0.1, 0.01, 0.01),
        T.StepByProximalAdagrad(0.2, 0.2, 0.02, 0.02),
        complex_ok=False,
    ),
    case(
        "dual-averaging",
        T.StepByDualAveraging(0.1, 0.1, 0.01, 0.01),
        T.StepByDualAveraging(0.2, 0.2, 0.02, 0.02),
        complex_ok=False,
    ),
    case("round-params", T.RoundParams(1), T.RoundParams(2)),
    case(
        "chain-bfloat16",
        in_bits((0.9, 0.999, 1e-8), 0.9, 0.1, 1),
        in_bits((0.8, 0.99, 1e-4), 0.5, 0.2, 2),
        all_float64=False,
        quiet=("average/decay",),
    ),
    case("average", T.AverageParams(0.9), T.AverageParams(0.5), quiet=("link/decay",)),
    case(
        "average-bias-free",
        T.AverageParams(0.9, bias_free=True),
        T.AverageParams(0.5, bias_free=True),
        quiet=("link/decay",),
    ),
    case("average-overwrite", T.AverageParams(0.9, 2), T.AverageParams(0.5, 3)),
    case("average-loss", T.AverageLoss(0.9), T.AverageLoss(0.5), quiet=("link/decay",)),
    case("observe-norm", T.ObserveNorm(), T.ObserveNorm()),
    case("observe-norms", T.ObserveNorms(), T.ObserveNorms()),
    case(
        "observe-histograms",
        T.ObserveHistograms(4),
        T.ObserveHistograms(4),
        all_float64=False,
    ),
    case(
        "chain-contrib",
        contrib((0.1, 1), 0.5, (0.9, 0.999, 1e-8), 0.1, 0.1, 0.9),
        contrib((0.2, 2), 0.25, (0.8, 0.99, 1e-4), 0.2, 0.2, 0.5),
        empty_ok=False,
        quiet=("average/decay",),
        all_float64=False,
    ),
    case(
        "chain-adaptive",
        adaptive(2.0, 0.9, 1e-8, 0.9, 0.1),
        adaptive(1.0, 0.5, 1e-6, 0.5, 0.2),
        quiet=("loss/decay",),
    ),
    case(
        "chain-accumulate",
        accumulated(2, 0.5, (0.9, 0.999, 1e-8), 0.1, 0.1, 0.9),
        accumulated(3, 0.25, (0.8, 0.99, 1e-4), 0.2, 0.2, 0.5),
        empty_ok=False,
        quiet=("average/decay",),
    ),
    case(
        "chain-accumulate-loss",
        losses_of_updates(2, 0.5, 0.1),
        losses_of_updates(3, 0.25, 0.2),
        empty_ok=False,
        quiet=("loss/decay",),
    ),
    case(
        "chain-loss-scale",
        scaled(4.0, 1, 0.1, (0.1, -0.5, 0.1, 0.01, 0.01, 0.01, 0.1)),
        scaled(5.0, 2, 0.2, (0.2, -0.4, 0.2, 0.02, 0.02, 0.02, 0.2)),
        complex_ok=False,
        nan_shows=False,
    ),
    case(
        "chain-guarded",
        guarded((6.0, 0.99, 20, 0.1, 1e-8), 4.0, 1, 0.1, 0.9),
        guarded((5.0, 0.9, 2, 0.2, 1e-6), 5.0, 2, 0.2, 0.5),
        nan_shows=False,
    ),
    case("chain-gates", gates(4.0, 1, 1, 0.1), gates(5.0, 2, 2, 0.2), nan_shows=False),
    case(
        "chain-groups",
        in_groups(0.5, 0.25, 0.9, (0.9, 0.999, 1e-8), 0.1, (0.1, 0.2)),
        in_groups(0.25, 0.5, 0.5, (0.8, 0.99, 1e-4), 0.2, (0.2, 0.1)),
        empty_ok=False,
        quiet=("average/decay",),
    ),
    case(
        "chain-around-tree-link",
        around_a_tree_link(0.5, 0.5, 0.1),
        around_a_tree_link(0.25, 0.25, 0.2),
        complex_ok=False,
    ),
    case("chain-schedules", scheduled(), scheduled(), all_float64=False, quiet=("average/decay",)),
    case(
        "chain-around-optax",
        around_optax(0.5, 0.1),
        around_optax(0.25, 0.2),
        integers_ok=False,
        is_value=False,
        keeps_slots=False,
    ),
    case(
        "chain-by-name",
        by_name(0.5, 0.1, 0.2, (0.9, 0.99, 1e-7), 0.1),
        by_name(0.25, 0.2, 0.1, (0.8, 0.9, 1e-3), 0.2),
        empty_ok=False,
    ),
    case(
        "tf1-momentum",
        optim.MomentumOptimizer(0.1, 0.9, use_nesterov=True),
        optim.MomentumOptimizer(0.2, 0.5, use_nesterov=True),
    ),
    case("tf1-adam", optim.AdamOptimizer(), optim.AdamOptimizer(0.1, 0.8, 0.99, 1e-4)),
    case(
        "tf1-rmsprop",
        optim.RMSPropOptimizer(0.1, 0.9, 0.5, 1e-4, centered=True),
        optim.RMSPropOptimizer(0.2, 0.8, 0.9, 1e-3, centered=True),
    ),
    case(
        "tf1-adagrad",
        optim.AdagradOptimizer(0.1),
        T.chain(adagrad=T.ScaleByAdagrad(0.2, 0.1), rate=T.ScaleByLearningRate(0.2)),
    ),
]


def rows(capability: str | None = None) -> list[Any]:
    """The cases, or those that have a capability, as parameters of a test."""
    return [
        pytest.param(c, id=c.name) for c in CASES if capability is None or getattr(c, capability)
    ]


def random_like(shapes: Any, seed: int, dtype: Any = jnp.float32) -> Any:
    """Return a tree of normal numbers of these shapes, complex ones for a complex dtype."""
    rng = np.random.default_rng(seed)

    def leaf(shape: tuple[int, ...]) -> jax.Array:
        x = rng.normal(size=(2, *shape))
        is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
        return jnp.asarray((x[0] + 1j * x[1] if is_complex else x[0]).astype(dtype))

    return jax.tree.map(leaf, shapes, is_leaf=lambda x: isinstance(x, tuple))


def params() -> Any:
    return random_like(SHAPES, 0)


def grads(t: int) -> Any:
    """Return the gradients of step t = 0, 1, …"""
    return random_like(SHAPES, 1 + t)


# What eight devices show is what lies where; their programs run once, and compile faster so.
QUICKLY_COMPILED = "--xla_backend_optimization_level=0"


def on_eight_devices(
    module: str,
    function: str,
    *arguments: Any,
    flags: str = QUICKLY_COMPILED,
    alone: bool = False,
) -> Any:
    """Call a function of a module that returns JSON, in a process with eight CPU devices.

    Other tests share it, unless this one measures the process and must be alone.
    """
    if not alone:
        return devices.shared(flags).call(module, function, *arguments)
    process = devices.Devices(flags)
    try:
        return process.call(module, function, *arguments)
    finally:
        process.close()
