"""The definition of a link. Read this first.

A link is one transformation of the gradients, written as a few small functions:

    numbers()                               its hyperparameters, as they enter the state
    slots(param)                            its memory for one parameter: {"m": zeros, "v": zeros}
    memory()                                its memory for the complete tree: scalars
    scalars(numbers, memory, total, step)   once per step: scalars for `leaf`, and the new memory
    for_each(names, k)                      data that differs from parameter to parameter

and for one parameter, in the order in which they run:

    before(param, k)                        a change that this link and later ones already see
    leaf(update, slots, param, k)           one update in, one update and the new slots out
    after(param, moved, slots, k)           the complete update, from the sum of all updates

Instead of `leaf`, a link may define `factor(k)`, if it only multiplies, or two halves of `leaf`:

    remember(update, slots, param, k)       the new slots
    direction(update, slots, param, k)      the new update, from the new slots

    report(name, parts)                     its metrics for `optimize_loss`: {metric: array}

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
    """The place of a link in a chain that is made from options: a lower stage comes first.

    A chain that you write yourself keeps its order.
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
      InvalidType: a field is not a number, or not a bool.
      ValueError: a value is out of range.
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
    """Return a number after checking its rule; a schedule unchanged."""
    return value if callable(value) and _may_vary(rule) else rule.check(name, value)


@dataclasses.dataclass(frozen=True)
class Link:
    """One transformation of the gradients: a value, equal to any other with the same fields.

    Subclass it as a frozen dataclass. Fields annotated with `float` or one of the types of
    `ol.transforms` (`Positive`, `NotNegative`, `Fraction`, `Decay`, …) are hyperparameters:
    checked, kept in the state as numbers, and open to schedules. A hyperparameter may also be
    {pattern: number}: the first pattern that matches a parameter decides. Parameters that no
    pattern matches have the default; if there is no default, the link skips them. All other fields
    are structure: they decide which program is built. In `leaf`, `k[name]` is a hyperparameter of
    this step; for a `Decay` β it is the pair (β, 1-β). Then write the functions that the link
    needs:

        slots(param)                           its memory for one parameter: {"m": zeros}
        memory()                               its memory for the complete tree: {"mean": 0.0}
        scalars(numbers, memory, total, step)  once per step: scalars for `leaf`, and the memory
        for_each(names, k)                     data that differs from parameter to parameter
        before(param, k)                       a change that later links already see leaf(update,
        slots, param, k)          one array in, one array and the new slots out factor(k)
        instead of `leaf`, if it only multiplies remember, direction                    instead of
        `leaf`: the new slots, then the update after(param, moved, slots, k)          the complete
        update of a parameter report(name, parts)                    its metrics for
        `optimize_loss`: {metric: array}

    and set the class attributes `needs`, `means`, `squares`, `elementwise` and `reads_params` if
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
    """The `total` that `scalars` receives: "global_norm", the L2 norm of all updates at this place
    in the chain, without overflow; "finite", whether all their entries are finite; "loss", the loss
    of this step; "loss_and_weight", the pair that the caller passed, each None if absent;
    "learning_rate", that of the only link that has one; for guards "health", the `Health` of the
    step. With "random_bits", `k["draw"]` is a key for random bits of each entry, from the seed and
    the step; with "stored_param", `k["stored"]` is the parameter in its own dtype, for `leaf`."""

    means: ClassVar[tuple[str, ...]] = ()
    """Slots that are running means of signed values, or decaying sums of them. A `Precision` stores
    them in 16 or 8 bits if they are float32 and have the parameter's shape; links see them in
    float32."""

    squares: ClassVar[tuple[str, ...]] = ()
    """The same for means of squares, which are never negative."""

    elementwise: ClassVar[bool] = False
    """True if the link treats every entry independently: its functions of one parameter act entry
    by entry, and `for_each` returns scalars. `optimize_loss` then stores small parameters in one
    array. A subclass that redefines one of these functions must set it again."""

    stage: ClassVar[Stage] = Stage.UPDATE
    """The place of the link among those of options; links with `after` come after all updates."""

    reads_params: ClassVar[bool] = False
    """Whether the link reads the values in `param`, so that `update` needs the parameters. Without
    it, `param` may hold anything."""

    def __post_init__(self):
        check_fields(self)

    def rule(self, name: str) -> Rule:
        """Return the rule of the hyperparameter `name`."""
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
        """Return the initial memory for one parameter."""
        return {}

    def memory(self) -> dict[str, float]:
        """Return the initial memory for the complete tree: numbers.

        Integers are stored as int32, all others in the float dtype of the hyperparameters.
        """
        return {}

    def scalars(
        self, numbers: Numbers, memory: Numbers, total: Any, step: jax.Array
    ) -> tuple[Numbers, Numbers]:
        """Return the scalars that `leaf` needs, and the new memory.

        Args:
          numbers: the hyperparameters at this step; a decay rate β is the array (β, 1-β).
          memory: the memory for the complete tree.
          total: the total that `needs` names, or None.
          step: the number of updates made before this one, an int32.
        """
        return numbers, memory

    def check_names(self, names: Sequence[str]) -> None:
        """Raise a `ValueError` if a pattern of this link matches none of the parameters."""
        for field, number in numbers_by_name(self).items():
            number.check_names(field, names)

    def for_each(self, names: Sequence[str], k: Numbers) -> Iterator[Numbers]:
        """Return the entries of `k` that differ between parameters; equal shapes share a trace."""
        return iter([{}] * len(names))

    def before(self, param: jax.Array, k: Numbers) -> jax.Array:
        """Return a change that is added to the parameter before this link and later ones see it."""
        raise NotImplementedError

    def factor(self, k: Numbers) -> jax.Array | tuple[jax.Array, ...]:
        """Return the scalar that multiplies the update, for links that do nothing else.

        Or several factors, if their product may underflow in the dtype.

        It replaces `leaf`, and saves a pass if a later link needs the norm.
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
        """Return the complete update of the parameter, and the new slots.

        Args:
          param: the parameter as it is stored, in its own dtype.
          moved: the sum of all updates so far, in float32 or wider.
          slots: the slots.
          k: the scalars.
        """
        raise NotImplementedError

    def report(self, name: str, parts: Mapping[str, Any]) -> dict[str, Any]:
        """Return the metrics that `optimize_loss` reports for the link after a step.

        If several links report the same metric, its name is followed by "/" and the link's name.

        Args:
          name: the name of the link.
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
    """A link that sees all parameters at once, by name, outside the fused pass.

    Subclass it if a parameter's update depends on other parameters in a way that no total
    describes. Define `init` and `run` instead of `slots` and `leaf`; the rest is as in `Link`.

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
          updates: the update of each parameter that has a gradient, in float32 or wider.
          slots: the memory.
          params: the parameters by name, in float32 or wider.
          k: the scalars that `scalars` returned.
        """
        raise NotImplementedError


def is_transformation(made: Any) -> bool:
    """Return whether `made` is a link, or an instance with optax's `init` and `update`."""
    has_both = all(callable(getattr(made, name, None)) for name in ("init", "update"))
    return not isinstance(made, type) and (isinstance(made, Link) or has_both)
