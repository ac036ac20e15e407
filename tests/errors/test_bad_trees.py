"""Bad schedules and trees raise the right class, and the message names the place."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optimize_loss import schedules
from tests.errors.wrong import KIND, PARAMS, TREE, VALUE, Row, T, build, check, init, run, update

GRADS = {"dense": {"bias": np.ones(3, np.float32), "kernel": np.ones((2, 3), np.float32)}}


def follow(schedule: Any) -> Any:
    return run(learning_rate=schedule)


def branch_on_the_step(step):
    return 0.1 if step < 3 else 0.01


@dataclasses.dataclass(frozen=True)
class Widen(T.Link):
    """A link that returns more entries than it was given."""

    def leaf(self, update, slots, param, k):
        return jnp.concatenate([update] * 3), slots


def step_with_the_state_of(params: Any = None, **options: Any) -> None:
    build()(init(params, **options), 5.0)


def update_with_the_state_of(other: Any, params: Any = PARAMS) -> None:
    tx = T.chain(clip=T.ClipByGlobalNorm(1.0), adam=T.ScaleByAdam())
    tx.update(GRADS, other.init(params), PARAMS)


def product(params, x):
    return params["w"] * params["v"] * x


ROWS: dict[str, Row] = {
    # 2. Schedules, checked at the first trace.
    "32-schedule-shape-1": Row(
        lambda: follow(lambda step: jnp.ones(1)), VALUE, ("`learning_rate`", "scalar", "(1,)")
    ),
    "32-schedule-shape-2": Row(
        lambda: follow(lambda step: np.ones(2)), VALUE, ("`learning_rate`", "scalar", "(2,)")
    ),
    "32-decay-fn-shape-1": Row(
        lambda: run(learning_rate_decay_fn=lambda rate, step: rate[None]),
        VALUE,
        ("`learning_rate`", "scalar", "(1,)"),
    ),
    "32-schedule-of-noise-shape-1": Row(
        lambda: run(gradient_noise_scale=lambda step: jnp.ones(1)),
        VALUE,
        ("gradient_noise", "scalar", "(1,)"),
    ),
    "32-schedule-of-beta-shape-1": Row(
        lambda: update(GRADS, adam=T.ScaleByAdam(beta_1=lambda step: jnp.ones(1))),
        VALUE,
        ("beta_1`", "scalar", "(1,)"),
    ),
    **{
        f"33-schedule-returns-{shown}": Row(
            functools.partial(follow, lambda step, value=value: value),
            KIND,
            ("`learning_rate`", "number", shown),
        )
        for value, shown in ((None, "None"), ("0.1", "'0.1'"), (1j, "1j"), (True, "True"))
    },
    "33-decay-fn-returns-none": Row(
        lambda: run(learning_rate_decay_fn=lambda rate, step: None),
        KIND,
        ("`learning_rate`", "None"),
    ),
    "35-schedule-branches": Row(
        lambda: follow(branch_on_the_step),
        KIND,
        ("`learning_rate`", "traced", "jnp.where", "branch_on_the_step"),
    ),
    "35-schedule-uses-math": Row(
        lambda: follow(lambda step: math.exp(-step)), KIND, ("`learning_rate`", "jax.numpy")
    ),
    "35-schedule-uses-float": Row(
        lambda: follow(lambda step: 0.1 / (1 + float(step))), KIND, ("`learning_rate`", "jnp.where")
    ),
    "36-schedule-of-none": Row(
        lambda: follow(lambda: 0.1), KIND, ("`learning_rate`", "(step)", "signature ()")
    ),
    "36-schedule-of-two": Row(
        lambda: follow(lambda rate, step: rate), KIND, ("`learning_rate`", "(step)", "(rate, step)")
    ),
    "36-decay-fn-of-one": Row(
        lambda: run(learning_rate_decay_fn=lambda step: 0.1),
        KIND,
        ("`learning_rate`", "(learning_rate, step)", "(step)"),
    ),
    "36-schedule-class": Row(
        lambda: follow(schedules.ExponentialDecay), KIND, ("`learning_rate`", "ExponentialDecay")
    ),
    "37-decay-steps-0": Row(
        lambda: schedules.ExponentialDecay(0.1, 0, 0.5), VALUE, ("`decay_steps`", "at least 1", "0")
    ),
    "37-decay-rate-negative": Row(
        lambda: schedules.ExponentialDecay(0.1, 10, -0.5), VALUE, ("`decay_rate`", "-0.5")
    ),
    "37-decay-steps-0-in-decay-fn": Row(
        lambda: run(
            learning_rate_decay_fn=lambda rate, step: schedules.exponential_decay(rate, step, 0, 1)
        ),
        VALUE,
        ("`decay_steps`", "at least 1"),
    ),
    "37-boundaries-unsorted": Row(
        lambda: schedules.PiecewiseConstantDecay([9, 5], [1.0, 2.0, 3.0]),
        VALUE,
        ("`boundaries`", "(9, 5)"),
    ),
    "37-values-too-few": Row(
        lambda: schedules.PiecewiseConstantDecay([5, 9], [1.0, 2.0]),
        VALUE,
        ("`values`", "`boundaries`", "2"),
    ),
    # 3. Trees and leaves.
    "40-missing": Row(
        lambda: update({"dense": {"bias": GRADS["dense"]["bias"]}}),
        TREE,
        ("`updates`", "`params`", "Missing", "'dense/kernel'"),
    ),
    "40-extra": Row(
        lambda: update({**GRADS, "scale": np.float32(1)}),
        TREE,
        ("`updates`", "`params`", "Extra", "'scale'"),
    ),
    "40-renamed": Row(
        lambda: update({"Dense": GRADS["dense"]}),
        TREE,
        ("`updates`", "'dense/bias'", "'dense/kernel'", "'Dense/bias'", "'Dense/kernel'"),
    ),
    "40-names-alike": Row(
        lambda: update({"dense/bias": np.ones(3, np.float32), **GRADS}),
        TREE,
        ("`updates`", "`params`", "'dense/bias'"),
    ),
    "41-list-for-dict": Row(
        lambda: update({"dense": [*GRADS["dense"].values()]}),
        TREE,
        ("`updates`", "'dense/kernel'", "'dense/0'"),
    ),
    "41-tuple-for-list": Row(
        lambda: update(([1.0], [2.0]), [[1.0], [2.0]]),
        TREE,
        ("`updates`", "`params`", "(", "[["),
    ),
    "41-leaf-for-dict": Row(
        lambda: update({"dense": np.ones(3, np.float32)}), TREE, ("`updates`", "'dense'", "Missing")
    ),
    "42-broadcastable": Row(
        lambda: update({"dense": {**GRADS["dense"], "kernel": np.ones((1, 3), np.float32)}}),
        TREE,
        ("'dense/kernel'", "(2, 3)", "(1, 3)"),
    ),
    "42-scalar": Row(
        lambda: update({"dense": {**GRADS["dense"], "kernel": 1.0}}),
        TREE,
        ("'dense/kernel'", "(2, 3)", "()"),
    ),
    "43-larger": Row(
        lambda: update({"w": np.ones(3, np.float32)}, {"w": np.ones(1, np.float32)}),
        TREE,
        ("'w'", "(1,)", "(3,)"),
    ),
    "43-transposed": Row(
        lambda: update({"dense": {**GRADS["dense"], "kernel": np.ones((3, 2), np.float32)}}),
        TREE,
        ("'dense/kernel'", "(2, 3)", "(3, 2)"),
    ),
    "43-a-link-changes-the-shape": Row(
        lambda: update({"w": np.ones(1, np.float32)}, {"w": np.ones(1, np.float32)}, x=Widen()),
        TREE,
        ("Widen", "(1,)", "(3,)"),
    ),
    "44-no-gradients": Row(
        lambda: run(lambda params, x: x), VALUE, ("No gradients", "loss", "['w']")
    ),
    "44-gradients-stopped": Row(
        lambda: run(lambda params, x: jax.lax.stop_gradient(params["w"]) * x),
        VALUE,
        ("No gradients", "loss", "['w']"),
    ),
    "44-params-missing": Row(
        lambda: (tx := T.chain(decay=T.AddWeightDecay(0.1))).update(GRADS, tx.init(PARAMS)),
        VALUE,
        ("`params`", "'decay'"),
    ),
    "48-complex-for-real": Row(
        lambda: update({"w": np.ones(2, np.complex64)}, {"w": np.ones(2, np.float32)}),
        KIND,
        ("'w'", "real", "complex64"),
    ),
    "49-empty-tree": Row(lambda: run(params={}), VALUE, ("`params`",)),
    **{
        f"50-{kind}-{where}": Row(
            functools.partial(start, {"dense": {"kernel": 1.0, "name": value}}),
            KIND,
            ("'dense/name'", shown),
        )
        for kind, value, shown in (
            ("text", "relu", "'relu'"),
            ("object", object(), "object"),
            ("function", jnp.tanh, "tanh"),
            ("object-array", np.array([None, 1]), "object"),
            ("text-array", np.array(["relu"]), "<U4"),
        )
        for where, start in (("chain", T.chain(adam=T.ScaleByAdam()).init), ("step", init))
    },
    "50-text-gradient": Row(
        lambda: update({"w": "1.0"}, {"w": 1.0}), KIND, ("'w'", "'1.0'", "update")
    ),
    "50-text-array-gradient": Row(
        lambda: update({"w": np.array("1.0")}, {"w": 1.0}), KIND, ("'w'", "<U3", "update")
    ),
    "50-shape-without-values": Row(
        lambda: init({"w": jax.ShapeDtypeStruct((), "float32")}),
        KIND,
        ("'w'", "ShapeDtypeStruct", "jax.eval_shape"),
    ),
    "59-other-optimizer": Row(
        lambda: step_with_the_state_of(optimizer="Momentum"), TREE, ("`state`", "momentum")
    ),
    "59-other-rate": Row(
        lambda: step_with_the_state_of(learning_rate=0.2), TREE, ("`state`", "'rate'", "0.2", "0.1")
    ),
    "59-longer-chain": Row(
        lambda: step_with_the_state_of(clip_gradients=1.0), TREE, ("`state`", "clip_gradients")
    ),
    "59-other-increment": Row(
        lambda: step_with_the_state_of(increment_global_step=False),
        TREE,
        ("`state`", "increment_global_step"),
    ),
    "59-fewer-variables": Row(
        lambda: build(product, optimizer="Adam")(
            init({"w": 1.0, "v": 1.0}, product, optimizer="Adam", variables="w"), 5.0
        ),
        TREE,
        ("state", "'v'"),
    ),
    "59-more-variables": Row(
        lambda: build(product, optimizer="Adam", variables="w")(
            init({"w": 1.0, "v": 1.0}, product, optimizer="Adam"), 5.0
        ),
        TREE,
        ("adam/m", "'v'"),
    ),
    "59-without-model-state": Row(
        lambda: build(lambda p, x, *, model_state: p["w"] * model_state["mean"])(init(), 5.0),
        TREE,
        ("`state`", "model_state"),
    ),
    "59-without-key": Row(
        lambda: build(lambda p, x, *, key: p["w"] * jax.random.normal(key))(init(), 5.0),
        TREE,
        ("`state`", "key"),
    ),
    "59-chain-missing-link": Row(
        lambda: update_with_the_state_of(T.chain(adam=T.ScaleByAdam())),
        TREE,
        ("`state`", "'clip'", "['adam', 'step']"),
    ),
    "59-chain-extra-link": Row(
        lambda: update_with_the_state_of(
            T.chain(clip=T.ClipByGlobalNorm(1.0), adam=T.ScaleByAdam(), ema=T.AverageParams())
        ),
        TREE,
        ("`state`", "'ema'"),
    ),
    "59-chain-same-names-other-rules": Row(
        lambda: update_with_the_state_of(T.chain(clip=T.ClipByNorm(1.0), adam=T.ScaleByMomentum())),
        TREE,
        ("state", "adam"),
    ),
    "59-chain-other-options": Row(
        lambda: update_with_the_state_of(
            T.chain(clip=T.ClipByGlobalNorm(1.0), adam=T.ScaleByAdam(amsgrad=True))
        ),
        TREE,
        ("state", "adam", "v_max"),
    ),
    "59-chain-other-params": Row(
        lambda: update_with_the_state_of(
            T.chain(clip=T.ClipByGlobalNorm(1.0), adam=T.ScaleByAdam()),
            {"dense": {"bias": np.ones(3, np.float32)}},
        ),
        TREE,
        ("adam/m", "'dense/kernel'"),
    ),
    "59-chain-other-shapes": Row(
        lambda: update_with_the_state_of(
            T.chain(clip=T.ClipByGlobalNorm(1.0), adam=T.ScaleByAdam()),
            {"dense": {**PARAMS["dense"], "kernel": np.ones((1, 3), np.float32)}},
        ),
        TREE,
        ("'m'", "'dense/kernel'", "(1, 3)", "(2, 3)"),
    ),
    "59-optax-state": Row(
        lambda: T.chain(adam=T.ScaleByAdam()).update(
            GRADS,
            optax.adam(0.1).init(PARAMS),
            PARAMS,
        ),
        TREE,
        ("`state`", "tuple"),
    ),
    "59-params-as-state": Row(
        lambda: (tx := T.chain(adam=T.ScaleByAdam())).update(GRADS, PARAMS, tx.init(PARAMS)),
        TREE,
        ("`state`", "'dense'"),
    ),
    "61-names-alike": Row(
        lambda: init({"a/b": 1.0, "a": {"b": 2.0}}), VALUE, ("Parameter names", "'a/b'")
    ),
    "61-names-alike-index": Row(
        lambda: T.chain(adam=T.ScaleByAdam()).init({"a": [1.0], "a/0": 2.0}),
        VALUE,
        ("Parameter names", "'a/0'"),
    ),
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.filterwarnings("ignore:The loss does not depend")
def test_bad_input(name):
    check(ROWS[name])
