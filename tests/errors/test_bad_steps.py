"""A bad loss and a bad call of a step raise the right class, and the message names the place."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.errors.wrong import (
    KIND,
    RUN,
    TREE,
    VALUE,
    Row,
    T,
    W,
    build,
    check,
    init,
    loss,
    ol,
    run,
)


def print_the_loss(params, x):
    value = jnp.abs(params["w"] * x)
    print(float(value))
    return value


def use_numpy(params, x):
    return np.exp(params["w"] * x)


def branch_on_the_loss(params, x):
    return params["w"] if params["w"] > x else x


@dataclasses.dataclass(frozen=True)
class Hoard(T.Link):
    """A link that keeps a traced value after its trace has ended, and uses it in the next."""

    kept: list[Any] = dataclasses.field(default_factory=list, compare=False)

    def leaf(self, update, slots, param, k):
        self.kept.append(update)
        return update + jnp.sum(self.kept[0]), slots


def leak() -> None:
    tx = T.chain(hoard=Hoard(), rate=T.ScaleByLearningRate(0.1))
    tx.update({"w": jnp.ones(2)}, tx.init({"w": jnp.ones(2)}))
    tx.update({"w": jnp.ones(3)}, tx.init({"w": jnp.ones(3)}))


def step_twice_with_one_state() -> None:
    step = build()
    state = step.init(W)
    step(state, 5.0)
    step(state, 5.0)


def run_with_model_state(new: Any) -> None:
    def keeps(params, x, *, model_state):
        return params["w"] * x, ol.Aux(model_state=new)

    step = build(keeps)
    step(step.init(W, model_state={"mean": np.float32(0)}), 5.0)


def many(*batches: Any) -> None:
    step = build(lambda p, x, y: jnp.sum(p["w"] * x * y))
    step.many(step.init(W), *batches)


ROWS: dict[str, Row] = {
    # 4. Loss and step.
    "63-loss-shape-2": Row(
        lambda: run(lambda p, x: p["w"] * x, np.ones(2, np.float32)), VALUE, ("`loss`", "(2,)")
    ),
    "63-loss-shape-1": Row(
        lambda: run(lambda p, x: (p["w"] * x)[None]), VALUE, ("`loss`", "scalar", "(1,)")
    ),
    **{
        f"64-loss-{kind}": Row(functools.partial(run, function), KIND, ("`loss`", *shown))
        for kind, function, shown in (
            ("int", lambda p, x: (p["w"] * x).astype("int32"), ("float", "int32")),
            ("bool", lambda p, x: p["w"] > x, ("float", "bool")),
            ("complex", lambda p, x: jax.lax.complex(p["w"], p["w"]), ("float", "complex64")),
            ("none", lambda p, x: None, ("scalar", "None")),
            ("text", lambda p, x: "nan", ("scalar", "'nan'")),
            ("dict", lambda p, x: {"loss": p["w"] * x}, ("scalar", "dict")),
            ("list", lambda p, x: [p["w"] * x], ("scalar", "list")),
            ("pair", lambda p, x: (p["w"] * x, {"seen": x}), ("Aux", "dict")),
            ("pair-of-scalars", lambda p, x: (p["w"] * x, x), ("Aux",)),
            ("pair-of-aux-class", lambda p, x: (p["w"] * x, ol.Aux), ("Aux",)),
            ("pair-reversed", lambda p, x: (ol.Aux(), p["w"] * x), ("Aux",)),
            ("triple", lambda p, x: (p["w"] * x, x, x), ("scalar", "tuple")),
            ("aux-alone", lambda p, x: ol.Aux({"seen": x}), ("scalar", "Aux")),
        )
    },
    "64-metrics-list": Row(
        lambda: run(lambda p, x: (p["w"] * x, ol.Aux(metrics=[x]))),
        KIND,
        ("`metrics`", "names"),
    ),
    "64-metrics-taken": Row(
        lambda: run(lambda p, x: (p["w"] * x, ol.Aux({"loss": x}))), VALUE, ("`metrics`", "'loss'")
    ),
    "64-metrics-key": Row(
        lambda: run(lambda p, x: (p["w"] * x, ol.Aux({3: x}))),
        KIND,
        ("`metrics`", "3"),
    ),
    "64-metrics-text": Row(
        lambda: run(lambda p, x: (p["w"] * x, ol.Aux({"note": "fine"}))),
        KIND,
        ("`metrics`", "'note'", "'fine'"),
    ),
    "64-model-state-in-vain": Row(
        lambda: run(lambda p, x: (p["w"] * x, ol.Aux(model_state={"mean": x}))),
        TREE,
        ("model_state", "step.init(params, model_state="),
    ),
    **{
        f"64-model-state-{kind}": Row(functools.partial(run_with_model_state, new), error, shown)
        for kind, new, error, shown in (
            ("dtype", {"mean": jnp.int32(1)}, TREE, ("`model_state`", "float32[]", "int32[]")),
            (
                "shape",
                {"mean": jnp.ones(2, "float32")},
                TREE,
                ("`model_state`", "float32[]", "float32[2]"),
            ),
            ("structure", {"sum": 1.0}, TREE, ("`model_state`", "'mean'", "'sum'")),
            ("none", {"mean": None}, TREE, ("`model_state`", "mean", "None")),
            ("text", {"mean": "1.0"}, KIND, ("`model_state`", "mean", "'1.0'")),
            ("names-alike", {"a/b": 1.0, "a": {"b": 1.0}}, TREE, ("`model_state`", "'mean'")),
        )
    },
    "65-loss-value": Row(lambda: build(jnp.float32(1)), KIND, ("`loss`", "function", "1.")),
    "65-loss-none": Row(lambda: build(None), KIND, ("`loss`", "function", "None")),
    "65-loss-of-params-alone": Row(
        lambda: run(lambda p: p["w"]), KIND, ("`loss`", "(params, *batch)", "1 part", "(p)")
    ),
    "65-loss-of-three": Row(
        lambda: run(lambda p, x, y: p["w"]), KIND, ("`loss`", "1 part", "(p, x, y)")
    ),
    "65-loss-of-keywords": Row(
        lambda: run(lambda p, *, x: p["w"] * x), KIND, ("`loss`", "(p, *, x)")
    ),
    "65-loss-with-positional-key": Row(
        lambda: run(lambda p, x, key: p["w"] * x), KIND, ("`loss`", "(p, x, key)", "keyword-only")
    ),
    "66-loss-float": Row(
        lambda: run(print_the_loss),
        jax.errors.ConcretizationTypeError,
        ("inside jit", "`loss`", "Aux(metrics=...)"),
    ),
    "66-loss-numpy": Row(
        lambda: run(use_numpy),
        jax.errors.TracerArrayConversionError,
        ("inside jit", "`loss`", "use jnp for np"),
    ),
    "66-loss-branches": Row(
        lambda: run(branch_on_the_loss),
        jax.errors.TracerBoolConversionError,
        ("inside jit", "`loss`", "jnp.where"),
    ),
    "67-loss-uses-no-params": Row(
        lambda: run(lambda p, x: x * 2.0, params={"w": 1.0, "v": 2.0}),
        VALUE,
        ("No gradients", "['v', 'w']"),
    ),
    "68-batches-of-two-lengths": Row(
        lambda: many(jnp.ones(3), jnp.ones(2)), VALUE, ("`batches`", "(3,)", "(2,)")
    ),
    "68-batches-without-axis": Row(lambda: many(1.0, 2.0), VALUE, ("`batches`", "()")),
    "68-batches-with-and-without": Row(
        lambda: many(jnp.ones(3), 2.0), VALUE, ("`batches`", "(3,)", "()")
    ),
    "68-no-batches": Row(lambda: many(), VALUE, ("`batches`",)),
    "68-batch-text": Row(lambda: run(loss, "five"), KIND, ("batch", "str")),
    "69-donated": Row(step_twice_with_one_state, RUN, ("donated", "state, metrics = step(")),
    "72-params-for-state": Row(
        lambda: build()(W, 5.0),
        KIND,
        ("`state`", "step.init(params)", "dict"),
    ),
    "72-pair-for-state": Row(lambda: build()(run(), 5.0), KIND, ("`state`", "TrainState", "tuple")),
    "72-state-for-params": Row(lambda: build().init(init()), KIND, ("`params`", "TrainState")),
    "72-model-state-missing": Row(
        lambda: init(function=lambda p, x, *, model_state: p["w"]), VALUE, ("`model_state`", "must")
    ),
    "72-model-state-in-vain": Row(
        lambda: build().init({"w": 1.0}, model_state={"mean": np.float32(0)}),
        VALUE,
        ("`model_state`", "not"),
    ),
    "72-key-in-vain": Row(
        lambda: build().init({"w": 1.0}, key=jax.random.key(0)), VALUE, ("`key`", "not")
    ),
    "72-key-number": Row(
        lambda: build(lambda p, x, *, key: p["w"]).init({"w": 1.0}, key=3), KIND, ("`key`", "3")
    ),
    "72-keys": Row(
        lambda: build(lambda p, x, *, key: p["w"]).init(
            {"w": 1.0}, key=jax.random.split(jax.random.key(0))
        ),
        KIND,
        ("`key`", "(2,)"),
    ),
    "72-model-state-text": Row(
        lambda: build(update_ops=[lambda old: old]).init({"w": 1.0}, model_state={"mean": "0"}),
        KIND,
        ("`model_state`", "mean", "'0'"),
    ),
    "73-leaked-tracer": Row(leak, jax.errors.UnexpectedTracerError, ("Hoard",)),
    # What contrib itself refuses; the classes and words may be ours.
    "contrib-loss-none": Row(lambda: run(lambda p, x: None), KIND, ("`loss`", "None")),
    "contrib-loss-rank": Row(
        lambda: run(lambda p, x: (p["w"] * x).reshape(1, 1)), VALUE, ("`loss`", "(1, 1)")
    ),
    "contrib-loss-integer": Row(
        lambda: run(lambda p, x: p["w"].astype("int32")), KIND, ("`loss`", "int32")
    ),
    "contrib-step-text": Row(lambda: build(global_step="0"), KIND, ("`global_step`", "'0'")),
    "contrib-step-float": Row(lambda: build(global_step=0.0), KIND, ("`global_step`", "0.0")),
    "contrib-step-shape": Row(
        lambda: build(global_step=np.zeros(1, int)), KIND, ("`global_step`", "(1,)")
    ),
    "contrib-step-bool": Row(lambda: build(global_step=True), KIND, ("`global_step`", "True")),
    "contrib-step-negative": Row(lambda: build(global_step=-1), VALUE, ("`global_step`", "-1")),
    "contrib-step-too-large": Row(
        lambda: build(global_step=2**31), VALUE, ("`global_step`", "2147483648")
    ),
    "contrib-rate-shape": Row(
        lambda: build(learning_rate=np.ones(1)), KIND, ("`learning_rate`", "(1,)")
    ),
    "contrib-rate-none-class": Row(
        lambda: build(learning_rate=None, optimizer=ol.optimizers.GradientDescentOptimizer),
        VALUE,
        ("`learning_rate`", "GradientDescentOptimizer"),
    ),
    "contrib-optimizer-unknown": Row(
        lambda: build(optimizer="blah"),
        VALUE,
        ("`optimizer`", "'blah'", "'Adagrad', 'Adam', ", "'Momentum', ", "'RMSProp', 'RMSprop'"),
    ),
    "contrib-optimizer-object": Row(
        lambda: build(optimizer=object()), KIND, ("`optimizer`", "object")
    ),
    "contrib-summary-unknown": Row(
        lambda: build(summaries=["bad"]), VALUE, ("`summaries`", "'bad'", "'global_gradient_norm'")
    ),
    "contrib-clip-array": Row(
        lambda: build(clip_gradients=jnp.ones(2)), KIND, ("`clip_gradients`", "(2,)")
    ),
    "contrib-no-gradients": Row(
        lambda: run(lambda p, x: x, params={"w": 1.0}), VALUE, ("No gradients", "['w']")
    ),
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.filterwarnings("ignore:The loss does not depend")
def test_bad_input(name):
    check(ROWS[name])


def test_the_traceback_of_a_loss_that_needs_values_shows_its_line():
    with pytest.raises(jax.errors.ConcretizationTypeError) as caught:
        run(print_the_loss)
    assert "print_the_loss" in {entry.name for entry in caught.traceback}
