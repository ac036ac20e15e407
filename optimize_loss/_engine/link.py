"""What a link is. Read this first.

A link is one transformation of the gradients, written as a few small functions:

    numbers()                              its hyperparameters, as they enter the state
    slots(param)                           its memory for one parameter: {"m": zeros, "v": zeros}
    memory()                               its memory for the whole tree: scalars
    measure(update)                        one number per leaf, summed over the tree
    scalars(numbers, memory, total, step)  once a step: what `leaf` needs, and the new memory
    for_each(names, k)                     what differs from parameter to parameter, as data
    leaf(update, slots, param, k)          one array in, one array and the new slots out
    factor(k)                              in place of `leaf`, if all it does is multiply
    move(param, k)                         what the parameter moves by before the links behind
    report(name, parts)                    what `optimize_loss` reports of it: {metric: array}

Most links need two or three. `chain` computes the totals, then the scalars, then runs the leaf
functions of all its links in one pass over the parameters.
"""

import dataclasses
import functools
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import jax

from optimize_loss import _checks
from optimize_loss._checks import Rule, check_flags
from optimize_loss._engine.arrays import multiplied, stored_as

Schedule = Callable[[Any], Any]
Number = float | Schedule

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
Slots = Mapping[str, jax.Array]


@functools.cache
def number_rules(cls: type) -> dict[str, Rule]:
    """Return the rule of every field of a link that is a hyperparameter; plain floats count."""
    rules = {}
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        parts = typing.get_args(hint)
        found = [r for part in (hint, *parts) for r in getattr(part, "__metadata__", ())]
        if rule := next((r for r in found if isinstance(r, Rule)), None):
            rules[name] = rule
        elif hint is float or float in parts:
            rules[name] = _checks.FINITE
    return rules


def check_fields(options: Any) -> None:
    """Check the hyperparameters and the flags among the fields of a frozen dataclass.

    Raises:
      InvalidType: one is no number, or no bool.
      ValueError: the rule of one does not hold.
    """
    for name, rule in number_rules(type(options)).items():
        value = getattr(options, name)
        may_be_scheduled = not rule.initial and rule.kind in ("real", "decay")
        if value is not None and not (may_be_scheduled and callable(value)):
            object.__setattr__(options, name, rule.check(name, value))
    for field in dataclasses.fields(options):
        if field.type in (bool, "bool"):
            check_flags(**{field.name: getattr(options, field.name)})


_ON_LEAVES = {
    "slots", "measure", "for_each", "factor", "leaf", "narrow_leaf", "move", "averaged", "rounded",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Link:
    """One transformation of the gradients: a value, equal to any other with the same fields.

    Subclass it as a frozen dataclass. Fields annotated with `float` or one of the types of
    `ol.transforms` (`Positive`, `NotNegative`, `Fraction`, `Decay`, …) are hyperparameters:
    checked, kept in the state as numbers, and open to schedules. All other fields are structure:
    they decide which program is built. In `leaf`, `k[name]` is a hyperparameter of this step; for
    a `Decay` β it is the pair (β, 1-β). Then write the functions that the link needs:

        slots(param)                           its memory for one parameter: {"m": zeros}
        memory()                               its memory for the whole tree: {"mean": 0.0}
        measure(update)                        one number per leaf, summed over the tree
        scalars(numbers, memory, total, step)  once a step: what `leaf` needs, and the memory
        for_each(names, k)                     what differs from parameter to parameter
        leaf(update, slots, param, k)          one array in, one array and the new slots out
        factor(k)                              in place of `leaf`, if all it does is multiply
        move(param, k)                         what the parameter moves by before the links behind
        report(name, parts)                    what `optimize_loss` reports of it: {metric: array}

    and set the class attributes `needs`, `borrows`, `observes`, `gates`, `needs_stored`,
    `means`, `squares`, `elementwise`, `scales_moves`, `reads_params` where they differ from the
    defaults below.

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

    needs: ClassVar[Literal["global_norm", "loss", "loss_and_weight", "health"] | None] = None
    """What `scalars` receives as `total` where there is no `measure`: the L2 norm of all updates
    at this place in the chain, safe from overflow; the loss of this step; a pair of the loss and
    the weight that it came with, as given, each None where there is none; or, for guards, the
    `Health` of the step. A link with "health" stands before all gates and loss scales."""

    borrows: ClassVar[tuple[str, ...]] = ()
    """Numbers of other links that `scalars` receives with its own, such as `learning_rate`."""

    observes: ClassVar[bool] = False
    """True where `leaf` returns the update as it came."""

    gates: ClassVar[bool] = False
    """True where `scalars` returns `open`, a bool, among what `leaf` needs. Unless it is true, the
    links behind do not run: parameters, their slots and the count of updates stay as they are.
    Of a gate that needs "loss_and_weight", a `loss_behind` among it is the loss which these links
    see, and `empty_behind` tells whether nothing was gathered, so that they keep their memory."""

    needs_stored: ClassVar[bool] = False
    """True where `leaf` must see an update after which the parameter is as it will be stored,
    rounded to its dtype. Such a link stands behind those that change the update."""

    means: ClassVar[tuple[str, ...]] = ()
    """Slots that are running means of values of either sign, or sums that decay as these do. A
    `Precision` keeps such in 16 or 8 bits where they are float32 and of the parameter's shape;
    `leaf` sees them in float32."""

    squares: ClassVar[tuple[str, ...]] = ()
    """The same for means of squares, which are never negative."""

    draws: ClassVar[bool] = False
    """True where `k["draw"]` keys random bits of each entry, as `seed` and the step have them."""

    elementwise: ClassVar[bool] = False
    """True where every entry of a leaf and its slots goes its own way: `slots`, `leaf`, `factor`,
    `move` and `averaged` do to an entry what they would do to it alone, `measure` is a sum over
    entries, and `for_each` gives scalars. `optimize_loss` then keeps small parameters in one array.
    It must be set anew by a subclass that defines one of these functions anew."""

    scales_moves: ClassVar[bool] = False
    """True where `leaf` multiplies, and what links before have moved the parameter by, too: as if
    that were part of the update."""

    reads_params: ClassVar[bool] = False
    """True where `leaf` uses the values in `param`, so that `update` must be given them. Without
    it, `param` may hold NaN."""

    def __post_init__(self):
        check_fields(self)

    def rule(self, name: str) -> Rule:
        """Return what the hyperparameter `name` must satisfy."""
        return number_rules(type(self))[name]

    def numbers(self) -> dict[str, Any]:
        """Return the hyperparameters by name, schedules included; None means absent."""
        rules = number_rules(type(self))
        values = {name: getattr(self, name) for name, rule in rules.items() if not rule.initial}
        return {name: value for name, value in values.items() if value is not None}

    def slots(self, param: jax.Array) -> dict[str, jax.Array]:
        """Return the memory for one parameter, as it is before the first step."""
        return {}

    def memory(self) -> dict[str, float]:
        """Return the memory for the whole tree: numbers, as they are before the first step.

        Integers are kept as int32, all others as the floats of the hyperparameters are.
        """
        return {}

    def measure(self, update: jax.Array) -> jax.Array:
        """Return one number for a leaf; `scalars` receives the sum over all leaves as `total`."""
        raise NotImplementedError

    def scalars(
        self, numbers: Numbers, memory: Numbers, total: Any, step: jax.Array
    ) -> tuple[Numbers, Numbers]:
        """Return what `leaf` needs, and the new memory.

        Args:
          numbers: the hyperparameters at this step; a decay rate β is the array (β, 1-β).
          memory: the memory for the whole tree.
          total: the sum of `measure` over the leaves, or what `needs` names, or None.
          step: the number of updates made before this one, an int32.
        """
        return numbers, memory

    def suits(self, param: jax.Array) -> bool:
        """Return whether the link is for such a parameter at all; others pass."""
        return True

    def rounded(self, update: jax.Array, param: jax.Array, dtype: Any, k: Numbers) -> jax.Array:
        """Return the update to what is stored as `dtype`; for links that are `needs_stored`."""
        return stored_as(param + update, dtype) - param

    def check_names(self, names: Sequence[str]) -> None:
        """Raise a `ValueError` if a pattern of this link matches none of the parameters."""

    def for_each(self, names: Sequence[str], k: Numbers) -> Iterator[Numbers]:
        """Return for each parameter what is its own in `k`; equal shapes still share a trace."""
        return iter([{}] * len(names))

    def factor(self, k: Numbers) -> jax.Array | tuple[jax.Array, ...]:
        """Return the scalar that multiplies the update, for links that do nothing else.

        Or several, to multiply by one after the other, where their product may be too small for
        the dtype.

        It takes the place of `leaf`, and spares a pass where the norm after the link is needed.
        Of a gate it multiplies what `leaf` returns, and only behind it, where it is open: no copy
        of all updates is made for the links there.
        """
        raise NotImplementedError

    def leaf(
        self, update: jax.Array, slots: Slots, param: jax.Array, k: Numbers
    ) -> tuple[jax.Array, Slots]:
        """Return the new update and the new slots of one parameter, in float32 or wider."""
        if self.multiplies and not self.gates:
            update = multiplied(update, self.factors(k))
        return update, slots

    def narrow_leaf(
        self, update: jax.Array, slots: Slots, param: jax.Array, k: Numbers, dtype: Any
    ) -> tuple[jax.Array, Slots]:
        """Return what `leaf` does, for a parameter that is stored as a `dtype` of few bits.

        For links that must know the parameter better than its 16 bits or fewer tell.
        """
        return self.leaf(update, slots, param, k)

    def move(self, param: jax.Array, k: Numbers) -> jax.Array:
        """Return what is added to the parameter before the links behind see it."""
        raise NotImplementedError

    def report(self, name: str, parts: Mapping[str, Any]) -> dict[str, Any]:
        """Return what `optimize_loss` reports of the link after a step, by metric.

        A metric that several links report has "/" and the link's name behind its own.

        Args:
          name: of the link.
          parts: its state: numbers, memory and slots by name, slots as trees like the parameters.
        """
        return {}

    def averaged(self, param: jax.Array, slots: Slots, numbers: Numbers) -> jax.Array:
        """Return the parameter to use after training, where the link keeps a better one."""
        raise NotImplementedError

    def factors(self, k: Numbers) -> tuple[jax.Array, ...]:
        """Return what `factor` returns, as a tuple."""
        found = self.factor(k)
        return found if isinstance(found, tuple) else (found,)

    @property
    def by_entry(self) -> bool:
        """Whether the class that says so, or a base of it, defines all that runs on a leaf."""
        for cls in type(self).__mro__:
            if "elementwise" in vars(cls):
                return cls.elementwise
            if not vars(cls).keys().isdisjoint(_ON_LEAVES):
                return False
        return False

    @property
    def multiplies(self) -> bool:
        """Whether this class or a base of it defines `factor`."""
        return type(self).factor is not Link.factor

    @property
    def measures(self) -> bool:
        """Whether this class or a base of it defines `measure`."""
        return type(self).measure is not Link.measure

    @property
    def moves(self) -> bool:
        """Whether this class or a base of it defines `move`."""
        return type(self).move is not Link.move

    @property
    def averages(self) -> bool:
        """Whether this class or a base of it defines `averaged`."""
        return type(self).averaged is not Link.averaged


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
