"""The options that a class of optimizers declares: their defaults, rules and constructors."""

import dataclasses
import functools
import inspect
import typing
from typing import Any

import jax

from optimize_loss._checks import InvalidType, check_flags, check_options, received
from optimize_loss._engine.link import number_rules
from optimize_loss._engine.transformation import is_asked_back
from optimize_loss.optimizers._rate import is_schedule
from optimize_loss.optimizers._variable import value_of

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
