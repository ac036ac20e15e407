"""What optax, and code that is written for it, takes for one of its transformations."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any, Self

import optax

FUNCTIONS = {"init", "update"}


class Transformation(optax.GradientTransformationExtraArgs):
    """An object with `init` and `update` that is an optax transformation by class, too.

    optax passes extra arguments, such as the loss, only to instances of its own class, and others
    take nothing else. That class is a named tuple of two functions, which here are methods: the
    object can be unpacked, indexed and counted as such a tuple. It compares, copies and pickles as
    an object with attributes does. Subclasses must be registered with JAX, which would take them
    for trees of their functions.
    """

    def __new__(cls, *args: Any, **options: Any) -> Self:
        if is_asked_back(options):
            return options["init"].__self__
        return tuple.__new__(cls, (None, None))

    # What a tuple has by the values in it.
    __hash__ = object.__hash__
    __ne__ = object.__ne__
    __repr__ = object.__repr__

    def __eq__(self, other: object) -> bool:
        return True if self is other else NotImplemented

    def __iter__(self) -> Iterator[Any]:
        return iter((self.init, self.update))

    def __getitem__(self, index: Any) -> Any:
        return (self.init, self.update)[index]

    def __contains__(self, value: object) -> bool:
        return value in (self.init, self.update)

    def __getnewargs__(self) -> tuple[Any, ...]:
        return ()

    def _asdict(self) -> dict[str, Any]:
        return {"init": self.init, "update": self.update}

    def _replace(self, **functions: Any) -> optax.GradientTransformationExtraArgs:
        """Return an optax transformation of these functions and the others of this object."""
        return optax.GradientTransformationExtraArgs(*self)._replace(**functions)


def is_asked_back(options: Mapping[str, Any]) -> bool:
    """Return whether a class is called with the functions of an instance, as of a named tuple.

    So does Keras with each named tuple that becomes an attribute of a model.
    """
    return options.keys() == FUNCTIONS


def made_once(init: Any) -> Any:
    """Return a constructor that leaves an object alone which its class was asked to give back."""

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **options: Any) -> None:
        if not is_asked_back(options):
            init(self, *args, **options)

    return __init__
