"""Bad options raise the right class, and the message names the place and shows what came."""

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.errors.wrong import (
    KIND,
    PARAMS,
    TREE,
    VALUE,
    Row,
    T,
    W,
    build,
    check,
    init,
    ol,
    run,
    set_number,
)


def needs_two(rate, momentum):
    return optax.sgd(rate, momentum)


@dataclasses.dataclass(frozen=True)
class Options:
    """A class that is no optimizer."""

    rate: float


def run_op(op: Any) -> None:
    step = build(update_ops=[op])
    step(step.init(W, model_state={"mean": np.float32(0)}), 5.0)


ROWS: dict[str, Row] = {
    "16-decay-negative": Row(lambda: T.AddWeightDecay(-0.1), VALUE, ("`weight_decay`", "-0.1")),
    "16-decay-bool": Row(lambda: T.AddWeightDecay(True), KIND, ("`weight_decay`", "True")),
    **{
        f"17-average-decay-{value}": Row(
            functools.partial(T.AverageParams, value), VALUE, ("`decay`", "[0, 1]", str(value))
        )
        for value in (1.5, -0.1, math.nan)
    },
    "17-average-decay-1-bias-free": Row(
        lambda: T.AverageParams(1.0, bias_free=True), VALUE, ("`decay`", "[0, 1)", "1.0")
    ),
    **{
        f"17-moving-average-decay-{value}": Row(
            functools.partial(build, moving_average_decay=value),
            VALUE,
            ("`moving_average_decay`", "[0, 1)", str(value)),
        )
        for value in (1.0, -0.5, math.nan)
    },
    "17-moving-average-decay-text": Row(
        lambda: build(moving_average_decay="0.9"), KIND, ("`moving_average_decay`", "'0.9'")
    ),
    "17-moving-average-decay-bool": Row(
        lambda: build(moving_average_decay=True), KIND, ("`moving_average_decay`", "True")
    ),
    **{
        f"18-overwrite-every-{value}": Row(
            functools.partial(T.AverageParams, 0.9, value),
            error,
            ("`overwrite_every`", str(value)),
        )
        for value, error in ((0, VALUE), (-1, VALUE), (1.5, KIND), (True, KIND))
    },
    "19-beta-1": Row(lambda: T.ScaleByAdam(beta_1=1.0), VALUE, ("`beta_1`", "[0, 1)", "1.0")),
    "19-beta-2": Row(lambda: T.ScaleByAdam(beta_2=-0.1), VALUE, ("`beta_2`", "[0, 1)", "-0.1")),
    "19-beta-2-set": Row(
        lambda: init(optimizer="Adam").set(beta_2=1.0), VALUE, ("`beta_2`", "[0, 1)", "1.0")
    ),
    "19-beta-1-optimizer": Row(
        lambda: ol.optimizers.AdamOptimizer(beta1=1.0), VALUE, ("`beta1`", "[0, 1)", "1.0")
    ),
    "19-beta-2-optimizer": Row(
        lambda: ol.optimizers.AdamOptimizer(beta2=1.5), VALUE, ("`beta2`", "[0, 1)", "1.5")
    ),
    "19-beta-2-almost-1": Row(
        lambda: ol.optimizers.AdamOptimizer(beta2=1 - 1e-9), VALUE, ("`beta2`", "0.999999999")
    ),
    "19-decay-optimizer": Row(
        lambda: ol.optimizers.RMSPropOptimizer(0.1, decay=1.5), VALUE, ("`decay`", "1.5")
    ),
    "19-rho-optimizer": Row(
        lambda: ol.optimizers.AdadeltaOptimizer(0.1, rho=1.5), VALUE, ("`rho`", "1.5")
    ),
    "19-rho-complex": Row(lambda: T.ScaleByAdadelta(rho=1j), KIND, ("`rho`", "1j")),
    **{
        f"20-{link.__name__}-epsilon-{value}": Row(
            functools.partial(link, epsilon=value), VALUE, ("`epsilon`", "above 0", str(value))
        )
        for link in (T.ScaleByAdam, T.ScaleByRMS, T.ScaleByAdadelta, T.ClipByAdaptiveNorm)
        for value in (0.0, -1e-8)
    },
    "20-adagrad-epsilon": Row(
        lambda: T.ScaleByAdagrad(epsilon=-1e-8), VALUE, ("`epsilon`", "at least 0", "-1e-08")
    ),
    "20-epsilon-zero-in-float32": Row(
        lambda: T.chain(adam=T.ScaleByAdam(epsilon=1e-60)).init(PARAMS),
        VALUE,
        ("epsilon`", "float32", "1e-60"),
    ),
    "20-adagrad-accumulator": Row(
        lambda: ol.optimizers.AdagradOptimizer(0.1, initial_accumulator_value=0.0),
        VALUE,
        ("`initial_accumulator_value`", "above 0", "0.0"),
    ),
    "20-dual-averaging-accumulator": Row(
        lambda: ol.optimizers.AdagradDAOptimizer(0.1, 0.0),
        VALUE,
        ("`initial_gradient_squared_accumulator_value`", "above 0", "0.0"),
    ),
    "20-ftrl-power": Row(
        lambda: ol.optimizers.FtrlOptimizer(0.1, learning_rate_power=0.5),
        VALUE,
        ("`learning_rate_power`", "at most 0", "0.5"),
    ),
    "20-ftrl-l1": Row(
        lambda: ol.optimizers.FtrlOptimizer(0.1, l1_regularization_strength=-1.0),
        VALUE,
        ("`l1_regularization_strength`", "-1.0"),
    ),
    "21-momentum-2": Row(lambda: T.ScaleByMomentum(2.0), VALUE, ("`momentum`", "[0, 1]", "2.0")),
    "21-momentum-negative": Row(
        lambda: ol.optimizers.MomentumOptimizer(0.1, -1.0), VALUE, ("`momentum`", "[0, 1]", "-1.0")
    ),
    "21-nesterov-text": Row(
        lambda: T.ScaleByMomentum(0.9, nesterov="no"),
        KIND,
        ("`nesterov`", "'no'"),
    ),
    "22-accumulate-0": Row(
        lambda: build(accumulate=0), VALUE, ("`accumulate`", "at least 1", "accumulate=0")
    ),
    "22-accumulate-float": Row(
        lambda: build(accumulate=1.5), KIND, ("`accumulate`", "integer", "accumulate=1.5")
    ),
    "22-accumulate-bool": Row(
        lambda: build(accumulate=True), KIND, ("`accumulate`", "integer", "accumulate=True")
    ),
    "22-accumulate-link": Row(lambda: T.Accumulate(0), VALUE, ("`every`", "at least 1", "0")),
    "22-accumulate-reduce": Row(
        lambda: T.Accumulate(2, "median"), VALUE, ("`reduce`", "'weighted'", "'median'")
    ),
    "22-accumulate-no-weight": Row(
        lambda: run(accumulate=T.Accumulate(2, "weighted")), VALUE, ("weight", "`Aux(weight=...)`")
    ),
    "22-loss-scale-0": Row(
        lambda: build(loss_scale=0.0), VALUE, ("`loss_scale`", "above 0", "loss_scale=0.0")
    ),
    "22-loss-scale-negative": Row(
        lambda: build(loss_scale=-8), VALUE, ("`loss_scale`", "above 0", "loss_scale=-8")
    ),
    "22-loss-scale-text": Row(
        lambda: build(loss_scale="auto"), VALUE, ("`loss_scale`", "'dynamic'", "'auto'")
    ),
    "23-name-misspelt": Row(
        lambda: build(optimizer="adaam"), VALUE, ("`optimizer`", "'adaam'", "'Adam'", "'RMSProp'")
    ),
    "23-name-lower-case": Row(
        lambda: build(optimizer="sgd"), VALUE, ("`optimizer`", "'sgd'", "Nearest: 'SGD'")
    ),
    "23-name-of-a-class": Row(
        lambda: build(optimizer="AdamOptimizer"), VALUE, ("`optimizer`", "Nearest: 'Adam'")
    ),
    "23-name-empty": Row(lambda: build(optimizer=""), VALUE, ("`optimizer`", "''", "'Adam'")),
    **{
        f"24-optimizer-{kind}": Row(
            functools.partial(build, optimizer=value), KIND, ("`optimizer`", shown)
        )
        for kind, value, shown in (
            ("number", 3, "3"),
            ("none", None, "None"),
            ("module", optax, "optax"),
            ("bytes", b"SGD", "b'SGD'"),
            ("list", ["SGD"], "['SGD']"),
            ("class", dict, "dict"),
            ("own-class", Options, "Options"),
            ("link-class", T.ScaleByAdam, "ScaleByAdam"),
            ("class-of-two", ol.optimizers.MomentumOptimizer, "momentum"),
            ("function-of-two", needs_two, "momentum"),
            ("function-of-none", lambda: optax.sgd(0.1), "()"),
        )
    },
    "25-returns-none": Row(
        lambda: build(optimizer=lambda rate: None), KIND, ("`optimizer`", "return", "None")
    ),
    "25-returns-a-class": Row(
        lambda: build(optimizer=lambda rate: ol.optimizers.AdamOptimizer),
        KIND,
        ("`optimizer`", "return", "AdamOptimizer"),
    ),
    "25-returns-a-name": Row(
        lambda: build(optimizer=lambda rate: "SGD"), KIND, ("`optimizer`", "return", "'SGD'")
    ),
    "25-returns-init-alone": Row(
        lambda: build(optimizer=lambda rate: optax.sgd(rate).init), KIND, ("`optimizer`", "return")
    ),
    "26-keyword": Row(lambda: build(clip_gradient=1.0), KIND, ("`clip_gradient`", "1.0")),
    "26-keyword-link": Row(
        lambda: T.ScaleByAdam(beta1=0.9),
        TypeError,
        ("'beta1'",),
    ),
    "26-summary": Row(
        lambda: build(summaries=["losss"]), VALUE, ("`summaries`", "'losss'", "'loss'", "gradients")
    ),
    "26-summary-text": Row(lambda: build(summaries="loss"), KIND, ("`summaries`", "'loss'")),
    "26-summary-number": Row(lambda: build(summaries=[3]), KIND, ("`summaries`", "3")),
    "26-set-unknown": Row(
        lambda: set_number(lerning_rate=0.1), VALUE, ("`lerning_rate`", "'learning_rate'")
    ),
    "26-set-of-two-links": Row(
        lambda: init(optimizer=T.chain(a=T.ScaleByMomentum(), b=T.ScaleByMomentum())).set(
            momentum=0.5
        ),
        VALUE,
        ("`momentum`", "'a/momentum'", "'b/momentum'"),
    ),
    "26-set-step-negative": Row(lambda: set_number(step=-1), VALUE, ("`step`", "-1")),
    "26-set-step-float": Row(lambda: set_number(step=1.0), KIND, ("`step`", "1.0")),
    "26-set-step-shape": Row(lambda: set_number(step=np.array([1])), KIND, ("`step`", "(1,)")),
    "26-set-step-traced-shape": Row(
        lambda: jax.jit(lambda step: init().set(step=step))(jnp.array([1])),
        KIND,
        ("`step`", "scalar", "(1,)"),
    ),
    "26-set-step-traced-float": Row(
        lambda: jax.jit(lambda step: init().set(step=step))(1.5), KIND, ("`step`", "float32")
    ),
    "26-set-count-float": Row(
        lambda: init(optimizer=T.chain(ema=T.AverageParams(0.9, 2))).set(overwrite_every=2.0),
        KIND,
        ("`overwrite_every`", "2.0"),
    ),
    "27-multiplier-of-nothing": Row(
        lambda: init(gradient_multipliers={"v": 2.0}),
        VALUE,
        ("`gradient_multipliers`", "'v'", "'w'"),
    ),
    "27-multiplier-of-nothing-nearest": Row(
        lambda: init(PARAMS, gradient_multipliers={"dens/kernel:0": 2.0}),
        VALUE,
        ("`gradient_multipliers`", "'dens/kernel:0'", "Nearest names: 'dense/kernel'"),
    ),
    "27-multiplier-never-decides": Row(
        lambda: init(PARAMS, gradient_multipliers={"**": 2.0, "dense/bias": 1.0}),
        VALUE,
        ("`gradient_multipliers`", "'dense/bias'", "Earlier"),
    ),
    "27-multiplier-of-untrained": Row(
        lambda: init(PARAMS, variables="dense/bias", gradient_multipliers={"dense/kernel": 2.0}),
        VALUE,
        ("`gradient_multipliers`", "'dense/kernel'", "'dense/bias'"),
    ),
    "27-regex-of-nothing": Row(
        lambda: init(gradient_multipliers={re.compile("^v$"): 2.0}),
        VALUE,
        ("`gradient_multipliers`", "'^v$'", "'w'"),
    ),
    "27-exclude-of-nothing": Row(
        lambda: T.chain(decay=T.AddWeightDecay(0.1, exclude=("**/baias",))).init(PARAMS),
        VALUE,
        ("`exclude`", "'**/baias'", "'dense/bias'"),
    ),
    "27-exclude-number": Row(
        lambda: T.AddWeightDecay(0.1, exclude=[3]),
        KIND,
        ("`exclude`", "3"),
    ),
    **{
        f"28-multiplier-{value!r}": Row(
            functools.partial(build, gradient_multipliers={"w": value}),
            error,
            ("`gradient_multipliers['w']`", shown),
        )
        for value, error, shown in (
            (math.nan, VALUE, "nan"),
            (math.inf, VALUE, "inf"),
            ("2", KIND, "'2'"),
            (None, KIND, "None"),
            (True, KIND, "True"),
            (1j, KIND, "1j"),
        )
    },
    "28-multiplier-shape": Row(
        lambda: build(gradient_multipliers={"w": np.ones(2)}),
        KIND,
        ("`gradient_multipliers['w']`", "scalar", "(2,)"),
    ),
    "28-multipliers-number": Row(
        lambda: build(gradient_multipliers=2.0), KIND, ("`gradient_multipliers`", "2.0")
    ),
    "28-multipliers-list": Row(
        lambda: build(gradient_multipliers=["w"]), KIND, ("`gradient_multipliers`", "['w']")
    ),
    "28-multipliers-tuple": Row(
        lambda: build(gradient_multipliers=("w", 2.0)), KIND, ("`gradient_multipliers`", "'w'")
    ),
    "28-multiplier-key": Row(
        lambda: build(gradient_multipliers={3: 2.0}), KIND, ("`gradient_multipliers`", "3")
    ),
    "28-multipliers-of-one-text": Row(
        lambda: build(gradient_multipliers={"w": 2.0, re.compile("w"): 3.0}),
        VALUE,
        ("`gradient_multipliers`", "'w'"),
    ),
    "28-multiplier-set": Row(
        lambda: init(gradient_multipliers={"w": 2.0}).set(**{"gradient_multipliers/w": math.nan}),
        VALUE,
        ("`gradient_multipliers/w`", "nan"),
    ),
    "30-empty": Row(T.chain, KIND, ("chain(clip=",)),
    "30-no-names": Row(lambda: T.chain(T.ScaleByAdam()), KIND, ("name", "chain(clip=")),
    "30-class": Row(lambda: T.chain(adam=T.ScaleByAdam), KIND, ("'adam'", "ScaleByAdam")),
    "30-function": Row(lambda: T.chain(clip=optax.adam), KIND, ("'clip'", "function adam")),
    "30-none": Row(lambda: T.chain(clip=None), KIND, ("'clip'", "None")),
    "30-name-step": Row(lambda: T.chain(step=T.ScaleByAdam()), VALUE, ("'step'",)),
    "30-name-slash": Row(lambda: T.chain(**{"a/b": T.ScaleByAdam()}), VALUE, ("'a/b'",)),
    "30-name-taken": Row(
        lambda: build(
            clip_gradients=1.0,
            learning_rate=None,
            optimizer=T.chain(clip_gradients=T.ClipByValue(1.0), rate=T.ScaleByLearningRate(0.1)),
        ),
        VALUE,
        ("`optimizer`", "'clip_gradients'"),
    ),
    "31-variables-empty": Row(lambda: build(variables=[]), VALUE, ("`variables`", "empty")),
    "31-variables-of-nothing": Row(
        lambda: init(variables=["v"]), VALUE, ("`variables`", "'v'", "'w'")
    ),
    "31-variables-number": Row(lambda: build(variables=[3]), KIND, ("`variables`", "3")),
    "31-variables-array": Row(
        lambda: build(variables=[jnp.ones(2)]), KIND, ("`variables`", "pattern")
    ),
    "31-nothing-to-train": Row(
        lambda: init({"w": 3}), VALUE, ("variables to optimize", "`params`")
    ),
    "31-nothing-to-train-named": Row(
        lambda: init({"w": 1.0, "n": 3}, variables="n"), VALUE, ("`variables`", "'n'")
    ),
    "31-no-params": Row(lambda: init({}), VALUE, ("variables to optimize", "`params`")),
    "31-params-none": Row(lambda: build().init(None), VALUE, ("variables to optimize", "`params`")),
    # Arguments that the list does not number.
    "0-update-ops-number": Row(lambda: build(update_ops=3), KIND, ("`update_ops`", "3")),
    "0-update-ops-of-numbers": Row(lambda: build(update_ops=[3]), KIND, ("`update_ops`", "3")),
    "0-update-ops-function": Row(
        lambda: build(update_ops=jnp.tanh), KIND, ("`update_ops`", "list", "tanh")
    ),
    "0-colocate-number": Row(
        lambda: build(colocate_gradients_with_ops=1), KIND, ("`colocate_gradients_with_ops`", "1")
    ),
    "0-increment-text": Row(
        lambda: build(increment_global_step="no"), KIND, ("`increment_global_step`", "'no'")
    ),
    "0-name-number": Row(lambda: build(name=3), KIND, ("`name`", "3")),
    "0-update-op-of-none": Row(
        lambda: run_op(lambda: {"mean": 0.0}), KIND, ("`update_ops`", "model_state", "()")
    ),
    "0-update-op-of-keywords": Row(
        lambda: run_op(lambda old, *, x: old), KIND, ("`update_ops`", "(old, *, x)")
    ),
    "0-update-op-of-three": Row(
        lambda: run_op(lambda params, old, x: old), KIND, ("`update_ops`", "(params, old, x)")
    ),
    "0-update-op-returns-none": Row(
        lambda: run_op(lambda old: None), TREE, ("`update_ops`", "'mean'")
    ),
    "0-update-op-changes-dtype": Row(
        lambda: run_op(lambda old: {"mean": jnp.int32(3)}),
        TREE,
        ("`model_state`", "mean", "float32[]", "int32[]"),
    ),
    "0-update-op-without-model-state": Row(
        lambda: init(update_ops=[lambda old: {"mean": old["mean"] + 1}]),
        VALUE,
        ("`model_state`", "`update_ops`"),
    ),
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.filterwarnings("ignore:The loss does not depend")
def test_bad_input(name):
    check(ROWS[name])
