"""One wording for argument checks, and the package's error classes.

A message names the argument in backticks, states the rule, and shows what came:
`` `max_norm` must be above 0. Received: max_norm=-1.0. ``
"""

import dataclasses
import difflib
import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


class InvalidType(ValueError, TypeError):
    """An argument of the wrong kind; caught as a `ValueError` or as a `TypeError`."""


class TreeMismatch(ValueError):
    """Two trees that must have the same leaves differ; the message names the paths."""


class CheckpointMismatch(ValueError):
    """A file or state is not of what it is loaded into; the message says what differs."""


class CheckpointCorrupt(ValueError):
    """A file is damaged, cut short or of another kind; the message names it and the leaf."""


class CheckpointVersion(ValueError):
    """A file was written by a newer version; the message says which is read here."""


class NonFiniteError(FloatingPointError):
    """Too many batches in a row were skipped; the message says why, `state` is what to go on with.

    Attributes:
      state: the state as it is without these batches, which counts from 0 again.
    """

    state: Any = None


class StopRun(Exception):
    """Raised by a hook to end `TrainStep.run`, which returns the state and the metrics so far.

    The other hooks of this batch are called, and those of the end.

    Example:
      >>> import optimize_loss as ol
      >>> def stop(state, metrics):
      ...     if metrics["loss"][-1] < 8:
      ...         raise ol.StopRun("The loss is below 8.")
      >>> step = ol.optimize_loss(lambda p, x: p["w"] * x, learning_rate=1.0, optimizer="SGD")
      >>> state, metrics = step.run(step.init({"w": 9.0}), [1.0] * 5, hooks=[ol.every(1, stop)])
      >>> print(metrics["loss"])
      [9. 8. 7.]
    """


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a hyperparameter must satisfy, and how it is kept in the state.

    Attributes:
      words: the rule in the words of a message, after "must be".
      holds: True for the values that the rule allows, for numbers and for arrays.
      kind: `real` (a float), `decay` (the pair β, 1-β), `count` (an int32) or `seed` (a uint32).
      initial: True where only `init` reads the number, so that it does not enter the state.
    """

    words: str
    holds: Callable[[Any], Any]
    kind: str = "real"
    initial: bool = False

    def __repr__(self) -> str:
        return f"Rule({self.words})"

    def check(self, name: str, value: Any) -> float:
        """Return `value` as a Python number if the rule allows it; else raise, naming `name`.

        Of a traced scalar only the kind is checked.
        """
        whole = self.kind in ("count", "seed")
        if isinstance(value, Tracer):
            return _check_traced(name, value, jnp.integer if whole else jnp.floating)
        return check_integer(name, value, self) if whole else check_number(name, value, self)


FINITE = Rule("a finite number", lambda x: x == x)
POSITIVE = Rule("above 0", lambda x: x > 0)
NOT_NEGATIVE = Rule("at least 0", lambda x: x >= 0)
NOT_POSITIVE = Rule("at most 0", lambda x: x <= 0)
FRACTION = Rule("in [0, 1]", lambda x: (x >= 0) & (x <= 1))
DECAY = Rule("in [0, 1)", lambda x: (x >= 0) & (x < 1), kind="decay")
INNER_DECAY = Rule("in (0, 1)", lambda x: (x > 0) & (x < 1), kind="decay")
FULL_DECAY = Rule("in [0, 1]", lambda x: (x >= 0) & (x <= 1), kind="decay")
COUNT = Rule(
    "an integer of at least 1 and below 2**31", lambda x: (x >= 1) & (x < 2**31), kind="count"
)
AT_LEAST_1 = Rule("an integer of at least 1", lambda x: x >= 1, kind="count")
STEP = Rule(
    "an integer of at least 0 and below 2**31", lambda x: (x >= 0) & (x < 2**31), kind="count"
)
SEED = Rule("an integer in [0, 2**32)", lambda x: (x >= 0) & (x < 2**32), kind="seed")


def received(name: str, value: Any) -> str:
    """Return the end of every message: what came."""
    shown = repr(value.item() if isinstance(value, np.generic) else value)
    return f"Received: {name}={shown if len(shown) <= 200 else shown[:197] + '...'}."


def check_single(what: str, step: Any) -> None:
    """Raise an `InvalidType` if `step` is that of several states, stacked for `jax.vmap`."""
    if jnp.ndim(step):
        raise InvalidType(
            f"`state` must be one state for {what}; take it under jax.vmap, one state at a time, "
            "as in `jax.vmap(lambda state: state.eval_params)(states)`. "
            f"Received: states of shape {jnp.shape(step)}."
        )


def check_number(name: str, value: Any, rule: Rule = FINITE) -> float:
    """Return `value` as a Python float that `rule` allows.

    Args:
      name: the argument's name, for messages.
      value: a Python, numpy or jax number; arrays must have no dimensions.
      rule: which values are allowed. NaN and infinities never are.

    Raises:
      InvalidType: `value` is a bool, complex, text, None or a traced array, or not a scalar.
      ValueError: `rule` does not hold.

    Example:
      >>> check_number("max_norm", 1, POSITIVE)
      1.0
      >>> check_number("max_norm", -1.0, POSITIVE)
      Traceback (most recent call last):
      ValueError: `max_norm` must be above 0. Received: max_norm=-1.0.
    """
    number = _scalar(name, value)
    if isinstance(number, bool | np.bool_ | complex | np.complexfloating) or not isinstance(
        number, int | float | np.number
    ):
        raise InvalidType(f"`{name}` must be a number. {received(name, value)}")
    try:
        number = float(number)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or not rule.holds(number):
        also = "" if math.isfinite(number) or rule is FINITE else " and finite"
        raise ValueError(f"`{name}` must be {rule.words}{also}. {received(name, value)}")
    return number


def _check_traced(name: str, value: Any, kind: Any) -> Any:
    """Return a traced scalar as it is; where a float is wanted, an integer will do, too."""
    fits = any(jnp.issubdtype(value.dtype, x) for x in (jnp.integer, kind))
    if not fits or value.ndim:
        raise InvalidType(
            f"`{name}` must be a scalar {'integer' if kind is jnp.integer else 'number'}. "
            f"Received: a traced value of dtype {value.dtype} and shape {value.shape}."
        )
    return value


def check_integer(name: str, value: Any, rule: Rule) -> int:
    """Return `value` as a Python int that `rule` allows; floats are rejected, even integral ones.

    Raises:
      InvalidType: `value` is not an integer, or not a scalar.
      ValueError: `rule` does not hold.
    """
    number = _scalar(name, value)
    if isinstance(number, bool | np.bool_) or not isinstance(number, int | np.integer):
        raise InvalidType(f"`{name}` must be {rule.words}. {received(name, value)}")
    if not rule.holds(int(number)):
        raise ValueError(f"`{name}` must be {rule.words}. {received(name, value)}")
    return int(number)


def _scalar(name: str, value: Any) -> Any:
    """Return an array without dimensions as a number, and anything else as it is."""
    if isinstance(value, Tracer):
        raise InvalidType(
            f"`{name}` must be known when it is given; a value traced by jit or vmap is not. "
            "Where it is a number in the state, build with any valid one, then put the traced one "
            f"there: `state.set({name}=...)`. For `optax.inject_hyperparams`, name it in "
            f"`static_args`. {received(name, value)}"
        )
    if isinstance(value, np.ndarray | jax.Array):
        if jnp.issubdtype(value.dtype, jax.dtypes.extended):
            raise InvalidType(f"`{name}` must be a number. {received(name, value)}")
        if value.ndim:
            raise InvalidType(
                f"`{name}` must be a scalar; for many at once, use jax.vmap over states. "
                f"Received: {name} of shape {value.shape}."
            )
        return jax.device_get(value).item()
    return value


def check_takes(rule: str, function: Callable[..., Any], *args: Any, **keywords: Any) -> None:
    """Raise if `function` cannot be called with these arguments, as far as its signature shows.

    Args:
      rule: what the function must take, a sentence for the message.
      function: any callable; one without a signature passes.
      *args: the positional arguments that it will be given.
      **keywords: the keyword arguments.

    Raises:
      InvalidType: the signature has no place for an argument, or wants another one.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*args, **keywords)
    except TypeError as error:
        raise InvalidType(
            f"{rule} Received: {function!r} with signature {_without_types(signature)}, "
            f"but {error}."
        ) from error


def _without_types(signature: inspect.Signature) -> inspect.Signature:
    plain = [x.replace(annotation=x.empty) for x in signature.parameters.values()]
    return signature.replace(parameters=plain, return_annotation=signature.empty)


def check_flags(**flags: Any) -> None:
    """Raise unless every one of `flags` is a bool."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise InvalidType(f"`{name}` must be True or False. {received(name, value)}")


def nearest(wanted: str, known: Iterable[str], most: int = 3) -> list[str]:
    """Return the names in `known` that look most like `wanted`, best first."""
    known = list(known)
    return _close(wanted, known, most) or sorted(known)[:most]


def _close(wanted: str, known: Iterable[str], most: int) -> list[str]:
    """Return the names that are like `wanted`, whatever the case, best first."""
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(wanted.lower(), by_lower, n=most, cutoff=0.4)
    return [by_lower[name] for name in close]


def check_choice(name: str, value: str, choices: Iterable[str]) -> str:
    """Return `value` if it is one of `choices`; else raise, naming the nearest and all of them.

    Example:
      >>> check_choice("kind", "trunc", ["normal", "truncated"])
      Traceback (most recent call last):
      ValueError: `kind` must be one of ['normal', 'truncated']. Received: kind='trunc'. \
Nearest: 'truncated'.
    """
    choices = list(choices)
    if value not in choices:
        near = ", ".join(map(repr, nearest(str(value), choices, most=1)))
        raise ValueError(
            f"`{name}` must be one of {choices}. {received(name, value)} Nearest: {near}."
        )
    return value


def check_options(cls: type, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise an `InvalidType` unless all names of options are known."""
    known = [name for name in known if name != "self"]
    for wrong in given:
        if wrong not in known:
            raise InvalidType(
                f"`{wrong}` is not an option of {cls.__name__}.{meant(wrong, known)} "
                f"Options: {known}."
            )


def meant(wrong: str, known: Iterable[str]) -> str:
    """Return a question for a message about a wrong name: which of those known was meant.

    Nothing if none is like it.

    Example:
      >>> meant("wd", ["learning_rate", "weight_decay"])
      ' Did you mean `weight_decay`?'
    """
    found = likely(wrong, known)
    return "" if found is None else f" Did you mean `{found}`?"


def likely(wrong: str, known: Iterable[str]) -> str | None:
    """Return the name that is like a wrong one, or has its letters as initials; None for none."""
    known = list(known)
    initials = {"".join(part[:1] for part in name.split("_")): name for name in known}
    return initials.get(wrong) or next(iter(_close(wrong, known, 1)), None)
