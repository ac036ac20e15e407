"""The installed Keras 3, on JAX, moves a small model as ours does, from the same gradients.

Ours is made twice: with Keras' arguments, and from the configuration that Keras writes. Keras
compiles its own way, `stateless_apply`, into a scan over the steps.

Left out, as ours differs by design (see `test_golden_keras.py`): averages, which are those of Keras
2.15; a schedule with accumulated gradients, which Keras 3 evaluates at the number of calls.
"""

import contextlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optimize_loss as ol
from optimize_loss import optimizers
from tests.golden.golden_data import CLOSE

keras: Any = pytest.importorskip("keras", minversion="3.15")

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:keras")

STEPS = 20

# For every class: with the default rate nothing much would happen in 20 steps.
RATES = {"Adadelta": 1.0, "Adagrad": 0.1, "Adafactor": 0.1}
FOR_ALL = {
    "larger-rate": {},
    "clip-accumulate-scale": {
        "weight_decay": 0.02,
        "global_clipnorm": 0.05,
        "gradient_accumulation_steps": 2,
        "loss_scale_factor": 8.0,
    },
    "schedule-decay": {
        "weight_decay": 0.1,
        "learning_rate": ("ExponentialDecay", 0.1, 5, 0.5),
    },
}
OWN = {
    "SGD-clipnorm": {"clipnorm": 0.02},
    "SGD-clipvalue": {"clipvalue": 0.01},
    "SGD-momentum": {"momentum": 0.9},
    "SGD-nesterov": {"momentum": 0.9, "nesterov": True},
    "SGD-momentum-schedule": {"momentum": 0.9, "learning_rate": ("CosineDecay", 0.05, 15, 0.1)},
    "RMSprop-centered": {"rho": 0.8, "centered": True, "epsilon": 1e-3},
    "RMSprop-momentum-schedule": {
        "momentum": 0.5,
        "learning_rate": ("PiecewiseConstantDecay", [5, 10], [0.1, 0.05, 0.01]),
    },
    "Adam-clipnorm": {"clipnorm": 0.02},
    "Adam-clipvalue": {"clipvalue": 0.01},
    "Adam-epsilon": {"epsilon": 0.1, "beta_1": 0.5, "beta_2": 0.9},
    "Adam-amsgrad": {"amsgrad": True, "beta_2": 0.5},
    "AdamW-amsgrad": {"amsgrad": True, "beta_2": 0.5, "weight_decay": 0.2},
    "Adadelta-epsilon": {"rho": 0.5, "epsilon": 1e-3},
    "Adafactor-own": {"relative_step": False, "clip_threshold": 0.5, "beta_2_decay": -0.5},
    "Adafactor-epsilon": {"epsilon_1": 1e-4, "epsilon_2": 0.5, "learning_rate": 0.5},
    "Adagrad-start": {"initial_accumulator_value": 1e-3, "epsilon": 0.01},
    "Adamax-epsilon": {"epsilon": 0.1, "beta_1": 0.5},
    "Nadam-betas": {"beta_1": 0.5, "beta_2": 0.9, "epsilon": 0.01},
    "Ftrl-strengths": {
        "learning_rate": 0.3,
        "l1_regularization_strength": 0.01,
        "l2_regularization_strength": 0.1,
        "l2_shrinkage_regularization_strength": 0.05,
        "beta": 0.2,
    },
    "Ftrl-power": {"learning_rate_power": -0.3, "initial_accumulator_value": 0.5},
    "Lion-betas": {"beta_1": 0.5, "beta_2": 0.7},
    "Lamb-epsilon": {"epsilon": 0.1, "beta_1": 0.5, "weight_decay": 0.3},
    "Muon-exclude-layers": {"exclude_layers": ["head", "enc.*bias"], "learning_rate": 0.02},
    "Muon-embeddings": {"exclude_embeddings": False, "rms_rate": None, "weight_decay": None},
    "Muon-own": {
        "nesterov": False,
        "momentum": 0.8,
        "ns_steps": 3,
        "adam_lr_ratio": 0.5,
        "adam_weight_decay": 0.2,
        "adam_beta_1": 0.5,
    },
    "ScheduleFreeAdamW-warmup": {"warmup_steps": 5, "beta_1": 0.8, "weight_decay": 0.1},
}
SHARED = sorted(
    name
    for name in optimizers.names()
    if not name.endswith("Optimizer") and hasattr(keras.optimizers, name)
)
CASES = {f"{cls}-{name}": kwargs for cls in SHARED for name, kwargs in FOR_ALL.items()} | OWN

SHAPES = {
    "embedding": (5, 3),
    "encoder/kernel": (3, 4),
    "encoder/bias": (4,),
    "mixing": (2, 4, 2),
    "head/kernel": (2, 3),
    "scale": (),
}


def close(name):
    return {**CLOSE, **({"atol": 1e-5} if "Muon" in name else {})}


def initial_params():
    rng = np.random.default_rng(0)
    return {n: jnp.float32(rng.normal(1 if s == () else 0, 1, s)) for n, s in SHAPES.items()}


def batches():
    rng = np.random.default_rng(1)
    targets = rng.normal(0, 1, (STEPS, 4, 2, 3)).astype(np.float32)
    return rng.integers(0, 5, (STEPS, 4)).astype(np.int32), targets


def loss(params, index, target):
    h = jnp.tanh(
        params["embedding"][index] @ params["encoder/kernel"] + params["encoder/bias"][None]
    )
    out = jnp.einsum("bi,cij->bcj", h, params["mixing"]) @ params["head/kernel"]
    return jnp.mean((params["scale"] * out - target) ** 2)


def keras_variables():
    made = []
    for name, value in initial_params().items():
        scope, _, last = name.rpartition("/")
        with keras.name_scope(scope) if scope else contextlib.nullcontext():
            made.append(keras.Variable(value, name=last))
    return made


class Run(NamedTuple):
    grads: dict[str, jax.Array]  # of every step, as both optimizers are given them
    params: dict[str, jax.Array]  # after every step


def keras_run(optimizer, change=lambda grads, t: grads):
    """Return what Keras does, with gradients at the parameters that it comes to."""
    variables = keras_variables()
    names = list(SHAPES)
    optimizer.build(variables)

    def step(carried, batch):
        values, state, t = carried
        scaled = lambda *args: optimizer.scale_loss(loss(*args))
        grads = change(jax.grad(scaled)(dict(zip(names, values, strict=True)), *batch), t)
        values, state = optimizer.stateless_apply(state, [grads[n] for n in names], values)
        return (values, state, t + 1), Run(grads, dict(zip(names, values, strict=True)))

    first = [v.value for v in variables], [v.value for v in optimizer.variables], jnp.int32(0)
    with jax.numpy_dtype_promotion("standard"):  # which Keras relies on
        return jax.jit(lambda first, data: jax.lax.scan(step, first, data)[1])(first, batches())


def our_params(optimizer, grads):
    """Return the parameters after every step with these gradients."""
    params, rows = initial_params(), []
    for t in range(STEPS):
        params = optimizer.apply({n: g[t] for n, g in grads.items()}, params)
        rows.append(params)
    return {n: np.stack([row[n] for row in rows]) for n in SHAPES}


def assert_same_params(ours, theirs, **tolerance):
    for name in SHAPES:
        np.testing.assert_allclose(ours[name], theirs[name], **tolerance, err_msg=name)


def made_by(module, cls, kwargs):
    """Return an optimizer of Keras or of ours."""
    kwargs = {"learning_rate": RATES.get(cls, 0.05), **kwargs}
    if isinstance(kwargs["learning_rate"], tuple):
        schedule, *args = kwargs["learning_rate"]
        schedules = getattr(module, "schedules", ol.schedules)
        kwargs["learning_rate"] = getattr(schedules, schedule)(*args)
    return getattr(module, cls)(**kwargs)


def without_names(config):
    """Return a config without names; and without a default of Keras 2, which Keras 3 dropped."""
    if not isinstance(config, dict):
        return config
    left_out = {"name", "ema_overwrite_frequency"}
    kept = {n: without_names(x) for n, x in config.items() if n not in left_out}
    if isinstance(rate := kept.get("learning_rate"), float):
        kept["learning_rate"] = np.float32(rate)  # the precision in which Keras writes it
    return kept


def assert_same_options(one, other):
    assert type(one) is type(other)
    assert without_names(one.get_config()) == without_names(other.get_config())


def test_all_classes_of_keras_are_here():
    theirs = {n for n, x in vars(keras.optimizers).items() if isinstance(x, type)}
    assert theirs - {"Optimizer", "OptimizerMap"} <= set(optimizers.names())
    assert len(SHARED) == 14


@pytest.mark.parametrize("name", sorted(CASES))
def test_moves_as_keras_does(name):
    cls = name.partition("-")[0]
    theirs = made_by(keras.optimizers, cls, CASES[name])
    ours = made_by(optimizers, cls, CASES[name])
    read = optimizers.deserialize(keras.optimizers.serialize(theirs))
    assert_same_options(read, ours)
    recorded = keras_run(theirs)
    assert_same_params(our_params(read, recorded.grads), recorded.params, **close(name))
    moved = {n: np.abs(p[-1] - initial_params()[n]).max() for n, p in recorded.params.items()}
    assert min(moved.values()) > 1e-4
    k = CASES[name].get("gradient_accumulation_steps", 1)
    assert int(read.iterations) == STEPS // k


@pytest.mark.parametrize("cls", ["SGD", "Ftrl", "Muon"])
def test_parameters_are_left_out_of_decay_as_in_keras(cls):
    pair = [
        made_by(module, cls, {"weight_decay": 0.3}) for module in (keras.optimizers, optimizers)
    ]
    for optimizer in pair:
        optimizer.exclude_from_weight_decay(var_names=["bias$", "scale"])
    recorded = keras_run(pair[0])
    assert_same_params(our_params(pair[1], recorded.grads), recorded.params, **close(cls))


def test_a_dynamic_loss_scale_moves_as_in_keras():
    inner = {"momentum": 0.9, "weight_decay": 0.1}
    theirs, ours = (
        module.LossScaleOptimizer(made_by(module, "SGD", inner), 8.0, dynamic_growth_steps=3)
        for module in (keras.optimizers, optimizers)
    )
    infinite = lambda grads, t: {
        n: jnp.where((n == "scale") & ((t == 5) | (t == 11)), jnp.inf, g) for n, g in grads.items()
    }
    recorded = keras_run(theirs, infinite)  # of the loss times 8, whatever the scale is by then
    assert_same_params(our_params(ours, recorded.grads), recorded.params, **CLOSE)
    assert int(ours.iterations) == 18
    read = optimizers.deserialize(keras.optimizers.serialize(theirs))
    assert_same_options(read, ours)


def test_many_optimizers_move_as_in_keras():
    layers = {"encoder/.*": ("Adam", {"weight_decay": 0.1}), "head/.*": ("SGD", {"momentum": 0.9})}
    default = ("RMSprop", {"clipnorm": 0.02})
    theirs = keras.optimizers.MultiOptimizer(
        keras.optimizers.OptimizerMap(
            made_by(keras.optimizers, *default),
            {layer: made_by(keras.optimizers, *inner) for layer, inner in layers.items()},
        )
    )
    ours = optimizers.MultiOptimizer(
        {layer.replace(".*", "*"): made_by(optimizers, *inner) for layer, inner in layers.items()},
        made_by(optimizers, *default),
    )
    recorded = keras_run(theirs)
    assert_same_params(our_params(ours, recorded.grads), recorded.params, **CLOSE)
    with pytest.raises(ValueError, match="'OptimizerMap'"):  # its patterns are regular expressions
        optimizers.deserialize(keras.optimizers.serialize(theirs))
