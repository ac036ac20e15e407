"""What a link is. Read this first.

A link is one transformation of the gradients, written as a few small functions:

    numbers()                               its hyperparameters, as they enter the state
    slots(param)                            its memory for one parameter: {"m": zeros, "v": zeros}
    memory()                                its memory for the whole tree: scalars
    scalars(numbers, memory, total, step)   once a step: what `leaf` needs, and the new memory
    for_each(names, k)                      what differs from parameter to parameter, as data

and for one parameter, in the order in which they run:

    before(param, k)                        what it moves by before this link and the next see it
    leaf(update, slots, param, k)           one update in, one update and the new slots out
    after(param, moved, slots, k)           what it moves by in all, when that is known

In place of `leaf`, a link may write `factor(k)`, if all it does is multiply, or its two halves:

    remember(update, slots, param, k)       the new slots
    direction(update, slots, param, k)      the new update, from the new slots

    report(name, parts)                     what `optimize_loss` reports of it: {metric: array}

Most links need two or three. `chain` computes the totals, then the scalars, then runs the
functions of all its links over one parameter after another.
"""

import dataclasses
import enum
import functools
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar

import jax

from optimize_loss import _checks
from optimize_loss._checks import Rule, check_flags
from optimize_loss._engine.arrays import multiplied
from optimize_loss._engine.by_name import ByName, by_name, numbers_by_name
from optimize_loss._names import Pattern

Schedule = Callable[[Any], Any]
Number = float | Schedule | Mapping[Pattern, float | Schedule] | ByName

# Types of hyperparameters. The rule is checked when a link is built and when its state is set.
Finite = Annotated[Number, _checks.FINITE]
Positive = Annotated[Number, _checks.POSITIVE]
NotNegative = Annotated[Number, _checks.NOT_NEGATIVE]
NotPositive = Annotated[Number, _checks.NOT_POSITIVE]
Fraction = Annotated[Number, _checks.FRACTION]
Decay = Annotated[Number, _checks.DECAY]
FullDecay = Annotated[Number, _checks.FULL_DECAY]
Count = Annotated[int, _checks.COUNT]
Seed = Annotated[int, _checks.SEED]
Start = Annotated[float, dataclasses.replace(_checks.NOT_NEGATIVE, initial=True)]
PositiveStart = Annotated[float, dataclasses.replace(_checks.POSITIVE, initial=True)]

Numbers = Mapping[str, Any]
State = dict[str, Any]
Slots = Mapping[str, jax.Array]


class Stage(enum.IntEnum):
    """Where a link stands in a chain that is made of options: a lower stage comes first.

    A chain that is written by hand has the order in which it is written.
    """

    SUM = 0  # over devices
    GUARD = 1
    SCALE = 2
    GATHER = 3
    UPDATE = 4  # whatever makes updates of gradients, in the order given
    MULTIPLY = 5  # what a parameter moves by
    AFTER = 6
    ROUND = 7
    AVERAGE = 8  # parameters as they are stored


@functools.cache
def number_rules(cls: type) -> dict[str, Rule]:
    """Return the rule of every field of a link that is a hyperparameter; plain floats count."""
    rules = {}
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        kinds = (hint, *typing.get_args(hint))
        marks = [mark for kind in kinds for mark in getattr(kind, "__metadata__", ())]
        found = [mark for mark in marks if isinstance(mark, Rule)]
        is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        if found or float in (kinds if is_union else [hint]):
            rules[name] = (*found, _checks.FINITE)[0]
    return rules


def check_fields(options: Any) -> None:
    """Check the hyperparameters and the flags among the fields of a frozen dataclass.

    Raises:
      InvalidType: one is no number, or no bool.
      ValueError: the rule of one does not hold.
    """
    for name, rule in number_rules(type(options)).items():
        value = getattr(options, name)
        if value is not None and not isinstance(value, ByName):
            object.__setattr__(options, name, _checked_field(type(options), rule, name, value))
    for field in dataclasses.fields(options):
        if field.type in (bool, "bool"):
            check_flags(**{field.name: getattr(options, field.name)})


def _checked_field(cls: Any, rule: Rule, name: str, value: Any) -> Any:
    """Return a hyperparameter that a rule allows; by name with the default for the rest."""
    if not isinstance(value, Mapping) or not _may_vary(rule):
        return checked(rule, name, value)
    default = cls.__dataclass_fields__[name].default
    rest = None if default is dataclasses.MISSING else default
    return by_name(name, value, functools.partial(checked, rule), rest)


def _may_vary(rule: Rule) -> bool:
    """Return whether a number may be a schedule, or be given by name."""
    return not rule.initial and rule.kind in ("real", "decay")


def checked(rule: Rule, name: str, value: Any) -> Any:
    """Return a number that a rule allows; a schedule as it is."""
    return value if callable(value) and _may_vary(rule) else rule.check(name, value)


@dataclasses.dataclass(frozen=True)
class Link:
    """One transformation of the gradients: a value, equal to any other with the same fields.

    Subclass it as a frozen dataclass. Fields annotated with `float` or one of the types of
    `ol.transforms` (`Positive`, `NotNegative`, `Fraction`, `Decay`, …) are hyperparameters:
    checked, kept in the state as numbers, and open to schedules. One may also be given by name, as
    {pattern: number}: the first pattern that matches a parameter decides; what none matches has the
    default, and without one the link leaves it alone. All other fields are structure: they decide
    which program is built. In `leaf`, `k[name]` is a hyperparameter of this step; for
    a `Decay` β it is the pair (β, 1-β). Then write the functions that the link needs:

        slots(param)                           its memory for one parameter: {"m": zeros}
        memory()                               its memory for the whole tree: {"mean": 0.0}
        scalars(numbers, memory, total, step)  once a step: what `leaf` needs, and the memory
        for_each(names, k)                     what differs from parameter to parameter
        before(param, k)                       what a parameter moves by before its next links
        leaf(update, slots, param, k)          one array in, one array and the new slots out
        factor(k)                              in place of `leaf`, if all it does is multiply
        remember, direction                    in place of `leaf`: the new slots, then the update
        after(param, moved, slots, k)          what a parameter moves by in all
        report(name, parts)                    what `optimize_loss` reports of it: {metric: array}

    and set the class attributes `needs`, `means`, `squares`, `elementwise` and `reads_params` where
    they differ from the defaults below.

    Example:
      A link that takes the sign of the gradient where it is large, and sends zero elsewhere:

      >>> import dataclasses, jax.numpy as jnp, optimize_loss as ol
      >>> @dataclasses.dataclass(frozen=True)
      ... class Ternary(ol.transforms.Link):
      ...     threshold: ol.transforms.Positive
      ...     def leaf(self, update, slots, param, k):
      ...         return jnp.where(abs(update) > k["threshold"], jnp.sign(update), 0), slots
      >>> tx = ol.transforms.chain(ternary=Ternary(threshold=0.5))
      >>> params = {"w": jnp.zeros(3)}
      >>> updates, state = tx.update({"w": jnp.array([-2.0, 0.1, 0.6])}, tx.init(params), params)
      >>> print(updates["w"], state["ternary"]["threshold"])
      [-1.  0.  1.] 0.5
    """

    needs: ClassVar[str | None] = None
    """What `scalars` receives as `total`: "global_norm", the L2 norm of all updates at this place
    in the chain, safe from overflow; "finite", whether all entries of these are; "loss", that of
    this step; "loss_and_weight", the pair as it was given, each None where there is none;
    "learning_rate", that of the one link that has one; for guards "health", the `Health` of the
    step. With "random_bits", `k["draw"]` keys bits of each entry, by the seed and the step; with
    "stored_param", `k["stored"]` is the parameter in its own dtype, for `leaf`."""

    means: ClassVar[tuple[str, ...]] = ()
    """Slots that are running means of values of either sign, or sums that decay as these do. A
    `Precision` keeps such in 16 or 8 bits where they are float32 and of the parameter's shape;
    links see them in float32."""

    squares: ClassVar[tuple[str, ...]] = ()
    """The same for means of squares, which are never negative."""

    elementwise: ClassVar[bool] = False
    """Whether the link treats every entry of a leaf independently: the functions of one parameter
    do to an entry what they would do to it alone, and `for_each` gives scalars. `optimize_loss`
    then keeps small parameters in one array. A subclass that defines one of these functions again
    must set it again."""

    stage: ClassVar[Stage] = Stage.UPDATE
    """Where the link stands among those of options; links with `after` stand behind all updates."""

    reads_params: ClassVar[bool] = False
    """Whether the values in `param` are used, so that `update` must be given them. Without it,
    `param` may hold anything."""

    def __post_init__(self):
        check_fields(self)

    def rule(self, name: str) -> Rule:
        """Return what the hyperparameter `name` must satisfy."""
        return number_rules(type(self))[name.partition("/")[0]]

    def numbers(self) -> dict[str, Any]:
        """Return the hyperparameters by name, schedules included; None means absent."""
        rules = number_rules(type(self))
        values = {name: getattr(self, name) for name, rule in rules.items() if not rule.initial}
        found: dict[str, Any] = {}
        for name, value in values.items():
            found |= value.numbers(name) if isinstance(value, ByName) else {name: value}
        return {name: value for name, value in found.items() if value is not None}

    def slots(self, param: jax.Array) -> dict[str, jax.Array]:
        """Return the memory for one parameter, as it is before the first step."""
        return {}

    def memory(self) -> dict[str, float]:
        """Return the memory for the whole tree: numbers, as they are before the first step.

        Integers are kept as int32, all others as the floats of the hyperparameters are.
        """
        return {}

    def scalars(
        self, numbers: Numbers, memory: Numbers, total: Any, step: jax.Array
    ) -> tuple[Numbers, Numbers]:
        """Return what `leaf` needs, and the new memory.

        Args:
          numbers: the hyperparameters at this step; a decay rate β is the array (β, 1-β).
          memory: the memory for the whole tree.
          total: what `needs` names, or None.
          step: the number of updates made before this one, an int32.
        """
        return numbers, memory

    def check_names(self, names: Sequence[str]) -> None:
        """Raise a `ValueError` if a pattern of this link matches none of the parameters."""
        for field, number in numbers_by_name(self).items():
            number.check_names(field, names)

    def for_each(self, names: Sequence[str], k: Numbers) -> Iterator[Numbers]:
        """Return for each parameter what is its own in `k`; equal shapes still share a trace."""
        return iter([{}] * len(names))

    def before(self, param: jax.Array, k: Numbers) -> jax.Array:
        """Return what is added to the parameter before this link and those behind it see it."""
        raise NotImplementedError

    def factor(self, k: Numbers) -> jax.Array | tuple[jax.Array, ...]:
        """Return the scalar that multiplies the update, for links that do nothing else.

        Or several, to multiply by one after the other, where their product may be too small for
        the dtype.

        It takes the place of `leaf`, and spares a pass where the norm after the link is needed.
        """
        raise NotImplementedError

    def remember(self, update: jax.Array, slots: Slots, param: jax.Array, k: Numbers) -> Slots:
        """Return the new slots of one parameter."""
        return slots

    def direction(self, update: jax.Array, slots: Slots, param: jax.Array, k: Numbers) -> jax.Array:
        """Return the new update of one parameter, which may depend on its new slots.

        A `Precision` of 16 bits shows the slots as they are stored.
        """
        own = functions_of(type(self))
        return multiplied(update, factors(self, k)) if "factor" in own else update

    def leaf(
        self, update: jax.Array, slots: Slots, param: jax.Array, k: Numbers
    ) -> tuple[jax.Array, Slots]:
        """Return the new update and the new slots of one parameter, in float32 or wider."""
        new = self.remember(update, slots, param, k)
        return self.direction(update, new, param, k), new

    def after(
        self, param: jax.Array, moved: jax.Array, slots: Slots, k: Numbers
    ) -> tuple[jax.Array, Slots]:
        """Return what the parameter moves by in all, and the new slots.

        Args:
          param: the parameter as it is stored, in its own dtype.
          moved: what is to be added to it, in float32 or wider.
          slots: the slots.
          k: what is needed.
        """
        raise NotImplementedError

    def report(self, name: str, parts: Mapping[str, Any]) -> dict[str, Any]:
        """Return what `optimize_loss` reports of the link after a step, by metric.

        A metric that several links report has "/" and the link's name behind its own.

        Args:
          name: of the link.
          parts: its state: numbers, memory and slots by name, slots as trees like the parameters.
        """
        return {}


@functools.cache
def functions_of(cls: type) -> frozenset[str]:
    """Return the methods of `Link` that a class of links, or a base of it, defines again."""
    if not issubclass(cls, Link):
        return frozenset()
    return frozenset(n for n, x in vars(Link).items() if getattr(cls, n) is not x and callable(x))


def varies(link: Link) -> bool:
    """Return whether what the functions of one parameter need may differ between parameters."""
    return "for_each" in functions_of(type(link)) or bool(numbers_by_name(link))


_ON_LEAVES = frozenset(
    ("slots", "for_each", "before", "factor", "remember", "direction", "leaf", "after", "averaged")
)


@functools.cache
def by_entry(cls: type[Link]) -> bool:
    """Return whether links of a class treat every entry of a leaf independently.

    A class that defines a function of one parameter says again that it is `elementwise`. One that
    is no link may define such a function, too.
    """
    bases = (vars(base) for base in cls.__mro__)
    first = next(base for base in bases if "elementwise" in base or not _ON_LEAVES.isdisjoint(base))
    return first.get("elementwise", False)


def factors(link: Link, k: Numbers) -> tuple[jax.Array, ...]:
    """Return by what a link multiplies the update, one factor after the other."""
    found = link.factor(k)
    return found if isinstance(found, tuple) else (found,)


@functools.cache
def multiplies(cls: type) -> bool:
    """Return whether all that links of a class do to an update is to multiply it by `factor`."""
    own = functions_of(cls)
    return "factor" in own and own.isdisjoint(("leaf", "direction"))


@functools.cache
def passes(cls: type) -> bool:
    """Return whether updates leave links of a class as they came; `after` may change them."""
    changes = issubclass(cls, TreeLink) or functions_of(cls) & {"leaf", "direction", "factor"}
    return issubclass(cls, Link) and not changes


@dataclasses.dataclass(frozen=True)
class TreeLink(Link):
    """A link that sees all parameters at once, by name, outside the one pass.

    Subclass it where a parameter's update depends on other parameters in a way that no total
    tells. Write `init` and `run` in place of `slots` and `leaf`; the rest is as in `Link`.

    Example:
      A link that gives every parameter the update of the first one by name:

      >>> import dataclasses, optimize_loss as ol
      >>> @dataclasses.dataclass(frozen=True)
      ... class Follow(ol.transforms.TreeLink):
      ...     def run(self, updates, slots, params, k):
      ...         return dict.fromkeys(updates, updates[min(updates)]), slots
      >>> tx, params = ol.transforms.chain(follow=Follow()), {"a": 0.0, "b": 0.0}
      >>> updates, _ = tx.update({"a": 1.0, "b": 2.0}, tx.init(params), params)
      >>> print(updates["a"], updates["b"])
      1.0 1.0
    """

    reads_params = True

    def init(self, params: Mapping[str, jax.Array]) -> dict[str, Any]:
        """Return the memory before the first step, any tree of arrays for each name in it."""
        return {}

    def run(
        self,
        updates: Mapping[str, jax.Array],
        slots: Mapping[str, Any],
        params: Mapping[str, jax.Array],
        k: Numbers,
    ) -> tuple[Mapping[str, jax.Array], Mapping[str, Any]]:
        """Return the new updates and the new memory.

        Args:
          updates: for each parameter that has a gradient, in float32 or wider.
          slots: the memory.
          params: the parameters by name, in float32 or wider.
          k: what `scalars` returned.
        """
        raise NotImplementedError


def is_transformation(made: Any) -> bool:
    """Return whether `made` is a link, or an instance with optax's `init` and `update`."""
    has_both = all(callable(getattr(made, name, None)) for name in ("init", "update"))
    return not isinstance(made, type) and (isinstance(made, Link) or has_both)
