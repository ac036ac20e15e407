"""The options that a class declares: their rules, constructors, assignment, configurations."""

import dataclasses
import functools
import inspect
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from optimize_loss._checks import (
    NOT_NEGATIVE,
    POSITIVE,
    InvalidType,
    check_flags,
    check_options,
    meant,
    received,
)
from optimize_loss._engine.link import number_rules
from optimize_loss._engine.numbers import to_array
from optimize_loss._engine.transformation import is_asked_back
from optimize_loss.optimizers._update_step import has_variables
from optimize_loss.optimizers._variable import Variable, check_trace, value_of
from optimize_loss.schedules import _config
from optimize_loss.schedules._config import SCHEDULES
from optimize_loss.schedules._config import serialize as serialize

# What a learning rate may be when it is given; read back, it is a `Variable` or a schedule's value.
Rate = Annotated[Any, NOT_NEGATIVE]
PositiveRate = Annotated[Any, POSITIVE]

_KINDS: dict[str, tuple[Any, str]] = {
    "name": (str, "text; a learning rate is given by keyword"),
    "mesh": (jax.sharding.Mesh, "a `jax.sharding.Mesh`"),
    "axis_name": (str | tuple, "the name of an axis, or a tuple of names"),
}


@functools.cache
def options_of(cls: type) -> dict[str, Any]:
    """Return the options of a class with their defaults."""
    return {field.name: field.default for field in dataclasses.fields(cls)}


def signature_of(cls: type, last: str) -> inspect.Signature:
    """Return what a constructor takes: options up to `last` by place, but for the learning rate."""
    options = {name: x for name, x in options_of(cls).items() if name != "learning_rate"}
    by_place, by_name = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    first = [inspect.Parameter(name, by_place, default=x) for name, x in options.items()]
    count = [*options].index(last) + 1
    rate = inspect.Parameter("learning_rate", by_name, default=None)
    others = [rate, *(parameter.replace(kind=by_name) for parameter in first[count:])]
    return inspect.Signature([inspect.Parameter("self", by_place), *first[:count], *others])


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def stays(cls: type, name: str) -> bool:
    """Return whether an option must stay as the constructor was given it: it is `Final`."""
    return typing.get_origin(_hints(cls).get(name)) is typing.Final


def checked(cls: type, name: str, value: Any) -> Any:
    """Return the value of an option, if the option's rule allows it."""
    if isinstance(options_of(cls)[name], bool):
        check_flags(**{name: value})
    rule = number_rules(cls).get(name)
    if value is None and (rule is None or type(None) in typing.get_args(_hints(cls)[name])):
        return value
    if rule is None:
        return _of_kind(name, value)
    if value is None:
        raise InvalidType(f"`{name}` must be {rule.words}. {received(name, value)}")
    return value if is_schedule(value) and not rule.initial else rule.check(name, value_of(value))


def _of_kind(name: str, value: Any) -> Any:
    """Return the value of an option that is no number."""
    if name == "axis_name" and isinstance(value, list):
        value = tuple(value)  # as JSON has it
    kind, words = _KINDS.get(name, (object, ""))
    if not isinstance(value, kind):
        raise InvalidType(f"`{name}` must be {words}. {received(name, value)}")
    return value


@dataclasses.dataclass(frozen=True)
class _Static:
    """An optimizer in the structure of a tree: equal to itself as long as its chain is."""

    kept: Any
    chain: Any = dataclasses.field(hash=False)


def register(cls: type) -> None:
    """Let JAX take the optimizers of a class for parts of a tree's structure."""
    jax.tree_util.register_pytree_node(
        cls, lambda x: ((), _Static(x, x.chain)), lambda static, _: static.kept
    )


def constructor(init: Any, checks: bool = True) -> Any:
    """Return a constructor of optimizers.

    After the outermost one, an optimizer takes no new attributes. One that its class was asked to
    give back stays as it is.

    Args:
      init: an `__init__`.
      checks: whether to name the nearest option where there is none of a name.
    """

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **options: Any) -> None:
        if is_asked_back(options):
            return
        if checks:
            check_options(type(self), options, inspect.signature(__init__).parameters)
        self._held.constructing += 1
        try:
            init(self, *args, **options)
        finally:
            self._held.constructing -= 1

    return __init__


# The learning rate, which is a variable or a schedule.


class LearningRate(property):
    """A property that a class does not show, so that dataclasses see no default."""

    def __get__(self, optimizer: Any, owner: Any = None) -> Any:
        if optimizer is None:
            raise AttributeError("learning_rate")
        return super().__get__(optimizer, owner)


SHORT_NAME = property(
    lambda optimizer: optimizer.learning_rate,
    lambda optimizer, value: setattr(optimizer, "learning_rate", value),
    doc="The `learning_rate`, as code for Keras 2 calls it.",
)


def is_schedule(rate: Any) -> bool:
    """Return whether a learning rate is a function of the step."""
    return callable(rate) and not isinstance(rate, Variable)


def as_variable(learning_rate: Any) -> Variable:
    """Return a new variable for a number."""
    value, dtype = value_of(learning_rate), jnp.result_type(float)
    value = NOT_NEGATIVE.check("learning_rate", value)
    if not isinstance(value, Tracer):
        with jax.ensure_compile_time_eval():
            value = to_array("learning_rate", value, NOT_NEGATIVE, dtype)
    return Variable(value, "learning_rate", dtype)


def for_links(rate: Any) -> Any:
    """Return the number in a variable; a schedule, or None, as it is."""
    if not isinstance(rate, Variable):
        return rate
    # The shortest number that rounds to what is kept: 0.001 and not 0.0010000000475.
    return rate.value if isinstance(rate.value, Tracer) else float(str(rate.numpy()[()]))


# Assignment: what may change, and what follows.


def assign(optimizer: Any, name: str, value: Any) -> None:
    """Set an option or an attribute; raise, and change nothing, if the variables forbid it."""
    held, there = optimizer._held, inspect.getattr_static(type(optimizer), name, None)
    if held.is_closed:
        _check_settable(optimizer, name, there)
    is_plain = not held.building and not isinstance(there, property)
    if is_plain:
        _check_change(optimizer, name, value)
    if name in options_of(type(optimizer)):
        held.note_array(value)
        value = checked(type(optimizer), name, value)
    if is_plain:
        _exchange(optimizer, name, value)
    else:
        object.__setattr__(optimizer, name, value)


def _exchange(optimizer: Any, name: str, value: Any) -> None:
    """Set an attribute and renew the chain, or do nothing if no chain can be made of it."""
    held, own = optimizer._held, vars(optimizer)
    before = {n: own[n] for n in (name,) if n in own}, held.unbuilt
    object.__setattr__(optimizer, name, value)
    if held.unbuilt is not None:
        held.unbuilt = {**held.unbuilt, name: value}
    try:
        optimizer._chain_changed()
    except Exception:
        own.pop(name, None)
        own.update(before[0])
        held.unbuilt = before[1]
        optimizer._chain_changed()
        raise


def _check_settable(optimizer: Any, name: str, there: Any) -> None:
    """Raise an `AttributeError` if to set this attribute would do nothing, or harm."""
    cls = type(optimizer)
    read_only = isinstance(there, property) and there.fset is None
    if name == "built" or read_only or stays(cls, name):
        raise AttributeError(f"`{name}` of {cls.__name__} can be read, but not set.")
    known = [n for n in (*options_of(cls), *vars(optimizer)) if not n.startswith("_")]
    if name not in (*known, *dir(cls)) and not name.startswith("_"):
        raise AttributeError(
            f"`{name}` is not an attribute of {cls.__name__}.{meant(name, known)} "
            "Set new attributes in `__init__` or `build` of a subclass."
        )


def _check_change(optimizer: Any, name: str, value: Any) -> None:
    """Raise if the variables of an optimizer forbid another value."""
    if isinstance(value, Tracer):
        check_trace(optimizer, [value])
    if not optimizer.built:
        return
    if name == "mesh" and value != optimizer.mesh:
        raise ValueError("`mesh` must be set before the optimizer is built.")
    if has_variables(vars(optimizer).get(name)):
        raise ValueError(
            f"`{name}` must stay: it has variables of the optimizer. Give them other values "
            f"with `assign`. {received(name, value)}"
        )


def check_deletable(optimizer: Any, name: str) -> None:
    """Raise an `AttributeError` if an optimizer needs an attribute, as a complete one needs all."""
    if optimizer._held.is_closed and name in (*vars(optimizer), *options_of(type(optimizer))):
        raise AttributeError(
            f"`{name}` must stay, as the state was made with it. Assign another value; None "
            "where an option may be absent."
        )


# Configurations: options as dicts that JSON can hold, and back.

CLASSES: dict[str, type] = {}
"""The optimizers of this package, by name; `optimizers/_resolve.py` enters them."""

_ELSEWHERE = ("learning_rate", "mesh")
_IF_GIVEN = ("gradient_accumulation_steps", "loss_scale_factor", "axis_name")


def deserialize(config: Any, custom_objects: Mapping[str, type] | None = None) -> Any:
    """Return what `serialize` made a dict of; dicts that Keras wrote are read too.

    Args:
      config: a dict with `class_name` and `config`. It is not changed.
      custom_objects: classes by name, for those that are not of this package.

    Raises:
      InvalidType: it is no such dict.
      ValueError: the class is unknown.

    Example:
      >>> import optimize_loss as ol
      >>> ol.optimizers.deserialize({"class_name": "SGD", "config": {"learning_rate": 0.5}})
      SGD(learning_rate=0.5)
    """
    return _config.deserialize(config, custom_objects, {**SCHEDULES, **CLASSES})


def plain(value: Any, custom_objects: Mapping[str, type] | None = None) -> Any:
    """Return a value of a configuration with the objects in it made."""
    return _config.plain(value, custom_objects, {**SCHEDULES, **CLASSES})


def config_of(optimizer: Any, is_complete: bool) -> dict[str, Any]:
    """Return the options of an optimizer as a dict that JSON can hold.

    Args:
      optimizer: the optimizer.
      is_complete: whether its class adds the options that its constructor takes beside.
    """
    given = _given_options(optimizer)
    parameters = inspect.signature(type(optimizer)).parameters
    if not _takes_any(parameters):
        given = {name: x for name, x in given.items() if name in parameters}
    if not is_complete:
        absent = (*given, *_ELSEWHERE, *_IF_GIVEN)
        given |= _own_options(optimizer, [n for n in _named(parameters) if n not in absent])
    return {name: serialize(x) for name, x in given.items()}


def _given_options(optimizer: Any) -> dict[str, Any]:
    """Return the options that a class declares, with the learning rate and a name."""
    names = sorted(options_of(type(optimizer)), key=_IF_GIVEN.__contains__)
    values = {name: getattr(optimizer, name) for name in names if name not in _ELSEWHERE}
    given = {n: x for n, x in values.items() if x is not None or n not in _IF_GIVEN}
    rate = {} if optimizer.rate is None else {"learning_rate": optimizer.rate}
    return {**given, **rate, "name": optimizer.name or type(optimizer).__name__}


def _own_options(optimizer: Any, names: Iterable[str]) -> dict[str, Any]:
    """Return options of a subclass, which are attributes of the same names."""
    found = {name.removeprefix("_"): x for name, x in vars(optimizer).items()} | vars(optimizer)
    for name in names:
        if name not in found:
            raise NotImplementedError(
                f"`get_config` of {type(optimizer).__name__} must be defined: its constructor "
                f"takes `{name}`, which is not an attribute of it."
            )
    return {name: found[name] for name in names}


def made_from(
    cls: Any, config: Mapping[str, Any], custom_objects: Mapping[str, type] | None
) -> Any:
    """Return an optimizer; arguments as of `Optimizer.from_config`."""
    if not isinstance(config, Mapping):
        raise InvalidType(f"`config` must be a dict. {received('config', config)}")
    if config.get("is_legacy_optimizer"):
        raise ValueError("`config` must not be of one of Keras' legacy optimizers.")
    given = {name: plain(x, custom_objects) for name, x in config.items()}
    given.pop("is_legacy_optimizer", None)
    parameters = inspect.signature(cls).parameters
    if not _takes_any(parameters):
        check_options(cls, given, parameters)
    return cls(**given)


def _named(parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    """Return the names of parameters, but for those that take any arguments."""
    return [name for name, parameter in parameters.items() if not is_any(parameter)]


def _takes_any(parameters: Mapping[str, inspect.Parameter]) -> bool:
    """Return whether a function with these parameters takes any keyword."""
    return any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def is_any(parameter: inspect.Parameter) -> bool:
    """Return whether a parameter takes any arguments, by place or by keyword."""
    return parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
