"""Arguments of `optimize_loss` by names that it does not have: where each belongs."""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

from optimize_loss import optimizers
from optimize_loss._checks import InvalidType, likely, received
from optimize_loss._state.rules import KEYS

P = ParamSpec("P")
R = TypeVar("R")

_OTHER_NAMES = {
    "clip": "clip_gradients",
    "clip_norm": "clip_gradients",
    "global_clipnorm": "clip_gradients",
    "max_grad_norm": "clip_gradients",
    "max_norm": "clip_gradients",
    "gradient_accumulation_steps": "accumulate",
    "accumulation_steps": "accumulate",
    "grad_accum": "accumulate",
    "loss_scale_factor": "loss_scale",
    "noise_scale": "gradient_noise_scale",
    "use_ema": "ema",
    "ema_momentum": "ema",
    "ema_decay": "ema",
    "mask": "rules",
    "callbacks": "hooks",
    "num_steps": "steps",
    "max_steps": "steps",
    "eps": "epsilon",
    "betas": "beta_1",
    "schedule": "learning_rate",
    "scheduler": "learning_rate",
    "lr_scheduler": "learning_rate",
}
_ADVICE = {
    "has_aux": " A loss may return `(value, ol.Aux(metrics=…, model_state=…))`.",
    "epochs": " Write `step.run(state, ol.Epochs(data, count=…))`.",
}
_KNOWN_BEST = ("RMSprop", "SGD", "AdamW", "Adam")  # the last one most


def checked_names(
    *methods: Callable[..., Any],
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator: a function reports where an argument belongs that it does not have.

    Its signature stays for `help()` and type checkers.

    Args:
      *methods: those of a step, whose arguments may be given to the function by mistake.
    """

    def decorated(function: Callable[P, R]) -> Callable[P, R]:
        known = inspect.signature(function).parameters

        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            for name, value in kwargs.items():
                if name not in known:
                    places = {**_of_rules(), **_of_optimizers(kwargs.get("optimizer"))}
                    places |= {**_of_methods(methods), **dict.fromkeys(known, "")}
                    raise InvalidType(f"{_advice(name, places, [*known])} {received(name, value)}")
            return function(*args, **kwargs)

        return checked

    return decorated


def _advice(wrong: str, places: Mapping[str, str], known: Sequence[str]) -> str:
    """Return what to write in place of an argument that `optimize_loss` does not have."""
    if wrong in _ADVICE:
        return f"`optimize_loss` has no argument `{wrong}`.{_ADVICE[wrong]}"
    meant: str | None = _OTHER_NAMES.get(wrong, wrong)
    if meant not in places:
        meant = likely(wrong, places)
    if meant is None:
        return f"`optimize_loss` has no argument `{wrong}`, only {known}."
    question = "" if meant == wrong else f" Did you mean `{meant}`?"
    return f"`optimize_loss` has no argument `{wrong}`.{question}{places[meant]}"


def _of_rules() -> dict[str, str]:
    return {key: f" It is a key of a rule: `rules={{pattern: dict({key}=…)}}`." for key in KEYS}


def _of_methods(methods: Iterable[Callable[..., Any]]) -> dict[str, str]:
    return {
        name: f" It is an argument of `step.{method.__name__}`."
        for method in methods
        for name in inspect.signature(method).parameters
    }


def _of_optimizers(given: Any) -> dict[str, str]:
    """Return for each option of an optimizer how to give it, to the one given if that has it."""
    classes = {name: vars(optimizers)[name] for name in optimizers.names()}
    rows = [(n, x) for n in classes for x in inspect.signature(classes[n]).parameters.values()]

    def weight(row: tuple[str, inspect.Parameter]) -> tuple[bool, bool, int]:
        name, option = row
        best = _KNOWN_BEST.index(name) if name in _KNOWN_BEST else -1
        return name == given, option.kind is not option.KEYWORD_ONLY, best

    return {
        x.name: " It is an option of the optimizer, to be given with the learning rate: "
        f"`optimizer=ol.optimizers.{n}(learning_rate=…, {x.name}=…)`."
        for n, x in sorted(rows, key=weight)  # the last one of a name stays
    }
