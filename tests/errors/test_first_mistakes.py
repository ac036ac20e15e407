"""Mistakes that newcomers make: each raises at once, and the message says what to write instead."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.errors.wrong import KIND, RUN, VALUE, Row, build, check, init, loss, ol

NET = {"body": {"kernel": np.ones(2, np.float32)}, "head": {"bias": np.ones(2, np.float32)}}
W = {"w": np.ones(2, np.float32)}


def summed(params: Any, x: Any) -> Any:
    return jnp.sum(params["w"] * x)


def pair(params: Any, x: Any, y: Any) -> Any:
    return jnp.sum(params["w"] * x * y)


def used() -> Any:
    """Return a state that a step was given before."""
    step = build(summed, bucket=None)
    state = step.init(W)
    step(state, 5.0)
    return state


def run_with(*hooks: Any) -> Any:
    step = build(summed)
    return step.run(step.init(W), [5.0] * 2, hooks=hooks[0] if len(hooks) == 1 else hooks)


def rule(pattern: str, **options: Any) -> Any:
    return init(NET, rules={pattern: options or {"freeze": True}})


OPTION = "It is an option of the optimizer"
DONATED = ("donated", "state, metrics = step(state, batch)", "state.copy()")
HOOKS = ("`hooks`", "list of hooks", "ol.every(100, function)")
ROWS: dict[str, Row] = {
    # By position.
    "rate-second": Row(lambda: ol.optimize_loss(loss, 0.1), KIND, ("`learning_rate=…`", "0.1")),
    "optimizer-second": Row(
        lambda: ol.optimize_loss(loss, optax.adam(0.1)), KIND, ("`optimizer=…`", "global_step")
    ),
    # By another name.
    "lr": Row(lambda: ol.optimize_loss(loss, lr=0.1), KIND, ("`learning_rate`?", "lr=0.1")),
    "weight-decay": Row(
        lambda: ol.optimize_loss(loss, weight_decay=0.1),
        KIND,
        (OPTION, "AdamW(learning_rate=…, weight_decay=…)"),
    ),
    "momentum": Row(lambda: build(momentum=0.9), KIND, (OPTION, "momentum=…")),
    "ema-decay": Row(lambda: build(ema_decay=0.9), KIND, ("Did you mean `ema`?",)),
    "accumulation-steps": Row(
        lambda: build(accumulation_steps=2), KIND, ("Did you mean `accumulate`?",)
    ),
    "mask": Row(lambda: build(mask=None), KIND, ("Did you mean `rules`?",)),
    "callbacks": Row(
        lambda: build(callbacks=[]), KIND, ("`hooks`? It is an argument of `step.run`",)
    ),
    "has-aux": Row(lambda: build(has_aux=True), KIND, ("(value, ol.Aux(metrics=…",)),
    "epochs": Row(lambda: build(epochs=3), KIND, ("ol.Epochs(data, count=…)", "epochs=3")),
    # The optimizer and its rate.
    "no-rate": Row(lambda: ol.optimize_loss(loss), VALUE, ("`learning_rate` must be given",)),
    "two-rates": Row(
        lambda: build(optimizer=ol.optimizers.Adam(0.1)), VALUE, ("`learning_rate` must be None",)
    ),
    "two-rates-of-optax": Row(
        lambda: build(optimizer=optax.chain(optax.adam(0.1))),
        VALUE,
        ("optax.adam(0.1)", "Received: learning_rate=0.1."),
    ),
    "rate-missing-of-optax": Row(
        lambda: ol.optimize_loss(loss, optimizer=optax.adamw),
        KIND,
        ("no learning rate", "(learning_rate, b1=0.9, b2=0.999,"),
    ),
    "rate-of-optax": Row(
        lambda: init(learning_rate=None, optimizer=optax.adam(0.1)).set(learning_rate=0.2),
        VALUE,
        ("fixed when built", "rate=ScaleByLearningRate(...)"),
    ),
    "name": Row(lambda: build(optimizer="adamw"), VALUE, ("Nearest: 'AdamW'",)),
    # Patterns.
    "last-part": Row(lambda: rule("bias"), VALUE, ("'head/bias'", "Did you mean '**/bias'?")),
    "first-part": Row(lambda: rule("head"), VALUE, ("Did you mean 'head/**'?",)),
    "dots": Row(lambda: rule("head.bias"), VALUE, ("Did you mean 'head/bias'?",)),
    "expression": Row(lambda: rule(".*bias"), VALUE, ("Did you mean '**/*bias'?",)),
    "misspelt": Row(lambda: rule("haed/**"), VALUE, ("matches no parameter: 'haed/**'",)),
    "key-of-a-rule": Row(
        lambda: rule("**/bias", learning_rate=0.1), VALUE, ("'learning_rate_multiplier'",)
    ),
    "multipliers": Row(
        lambda: init(NET, gradient_multipliers={"head": 0.1}), VALUE, ("Did you mean 'head/**'?",)
    ),
    "frozen": Row(lambda: rule("**"), VALUE, ("no float parameter that `rules` do not freeze.",)),
    # Hooks.
    "hooks-dict": Row(lambda: run_with({"a": ol.every(1, print)}), KIND, (*HOOKS, "'a'")),
    "hooks-function": Row(lambda: run_with([lambda state, metrics: None]), KIND, HOOKS),
    "hooks-class": Row(lambda: run_with([ol.Checkpoints]), KIND, HOOKS),
    "hook-never-called": Row(
        lambda: run_with(ol.StopEarly("loss", patience=1), ol.every(1, lambda *seen: None)),
        VALUE,
        ("`every`", "`then` of an `Evaluate`", "StopEarly"),
    ),
    # A state that is used twice.
    "twice-params": Row(lambda: used().params, RUN, DONATED),
    "twice-optimizer": Row(lambda: used().optimizer, RUN, DONATED),
    "twice-eval-params": Row(lambda: used().eval_params, RUN, DONATED),
    "twice-step": Row(lambda: used().step, RUN, DONATED),
    "twice-set": Row(lambda: used().set(learning_rate=0.2), RUN, DONATED),
    "twice-reset": Row(lambda: used().reset("w"), RUN, DONATED),
    "twice-copy": Row(lambda: used().copy(), RUN, DONATED),
    # Batches.
    "batch-tuple": Row(
        lambda: (step := build(pair))(step.init(W), (1.0, 2.0)),
        KIND,
        ("1 part, a tuple", "`step(state, *batch)`"),
    ),
    "batch-two-parts": Row(
        lambda: (step := build(pair))(step.init(W), 1.0, 2.0, 3.0), KIND, ("has 3 parts; ",)
    ),
}


@pytest.mark.parametrize("case", ROWS)
def test_the_message_says_what_to_write(case):
    check(ROWS[case])


def test_no_pattern_is_advised_where_none_matches():
    for pattern in ("haed", "**/haed/**", "*/*/*", "."):
        with pytest.raises(ValueError, match="matches no parameter") as caught:
            rule(pattern)
        assert "Did you mean" not in str(caught.value)


def test_a_hook_of_the_end_alone_is_a_hook():
    seen: list[int] = []

    class End(ol.Hook):
        def __call__(self, state, metrics):
            seen.append(int(state.batches))

    run_with([End()])
    assert seen == [2]
