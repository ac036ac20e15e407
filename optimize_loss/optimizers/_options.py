"""The options that all optimizers share, and the chain that they make."""

import copy
import dataclasses
import functools
import inspect
import operator
import sys
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from optimize_loss import transforms
from optimize_loss._checks import InvalidType, received
from optimize_loss._engine.order import merged
from optimize_loss._engine.transformation import Transformation
from optimize_loss._names import Pattern
from optimize_loss.optimizers._boxes import with_rate
from optimize_loss.optimizers._declaration import (
    SHORT_NAME,
    LearningRate,
    as_variable,
    assign,
    check_deletable,
    config_of,
    constructor,
    for_links,
    is_schedule,
    made_from,
    options_of,
    register,
    serialize,
    signature_of,
)
from optimize_loss.optimizers._held import Held, as_a_whole
from optimize_loss.optimizers._update_step import Recipe, UpdateStep, attributes_of
from optimize_loss.optimizers._variable import Variable
from optimize_loss.schedules import evaluate
from optimize_loss.transforms import Chain, Count, FullDecay, NotNegative, Positive, chain

CLIPS = {
    "clipnorm": transforms.ClipByNorm,
    "global_clipnorm": transforms.ClipByGlobalNorm,
    "clipvalue": transforms.ClipByValue,
}


@typing.dataclass_transform(eq_default=False, field_specifiers=(dataclasses.field,))
@dataclasses.dataclass(eq=False, kw_only=True, init=False, repr=False)
class Options(Transformation):
    """The options that every optimizer takes by keyword, checked whenever they are assigned."""

    learning_rate: Any
    name: str | None = None
    weight_decay: NotNegative | None = None
    clipnorm: Positive | None = None
    clipvalue: Positive | None = None
    global_clipnorm: Positive | None = None
    use_ema: bool = False
    ema_momentum: FullDecay = 0.99
    ema_overwrite_frequency: Count | None = None
    jit_compile: bool = True
    mesh: jax.sharding.Mesh | None = None
    gradient_accumulation_steps: Count | None = None
    loss_scale_factor: Positive | None = None
    axis_name: str | None = None

    _init_of_fields: ClassVar[Any] = None

    @constructor
    def __init__(self, *args: Any, **options: Any):
        given = inspect.signature(Options).bind(*args, **options).arguments
        for name, default in options_of(Options).items():
            if name in given or default is not dataclasses.MISSING:
                setattr(self, name, given.get(name, default))
        self.__post_init__()

    def __init_subclass__(cls):
        """Make a dataclass of a subclass that declares options and writes no `__init__`.

        In a tree, an optimizer is a part of the structure.
        """
        super().__init_subclass__()
        register(cls)
        if "build" in vars(cls):
            cls.build = as_a_whole(cls.build)
        if "__init__" in vars(cls):
            cls.__init__ = constructor(cls.__init__, checks=False)
        elif inspect.get_annotations(cls):
            dataclasses.dataclass(eq=False, repr=False)(cls)
            cls.__init__.__annotations__ = {}  # their rules are for us, not for `help`
            cls.__init__ = cls._init_of_fields = constructor(cls.__init__)
            if "learning_rate" in vars(cls):
                del cls.learning_rate  # the default, which would hide the property

    def __post_init__(self):
        self._variables: list[Variable] = []
        self._clips()
        if type(self).__init__ is type(self)._init_of_fields:
            _ = self.chain  # building the links checks the rest

    def _clips(self) -> dict[str, Any]:
        """Return the link of the one clip that is given, if any."""
        given = {name: getattr(self, name) for name in CLIPS if getattr(self, name) is not None}
        if len(given) > 1:
            raise ValueError(
                f"At most one of {', '.join(f'`{name}`' for name in CLIPS)} can be given, as one "
                f"would hide the others. Received: {given}."
            )
        links = [CLIPS[name](bound) for name, bound in given.items()]
        return {"clip": links[0]} if links else {}

    @functools.cached_property
    def _held(self) -> Held:
        """What the optimizer keeps beside its options and its rule."""
        return Held()

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an option or an attribute; raise, and change nothing, if it must stay."""
        assign(self, name, value)

    def __delattr__(self, name: str) -> None:
        """Delete an attribute; raise where the optimizer is complete, which needs all it has."""
        check_deletable(self, name)
        super().__delattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes; a shallow copy shares the variables, and keeps its own notes."""
        return {**vars(self), "_held": copy.copy(self._held)}

    # The learning rate.

    def _get_learning_rate(self) -> Any:
        kept = self._held.rate
        if kept is None:
            raise ValueError(
                f"{type(self).__name__} has no learning rate: give `learning_rate`, or set "
                "`self._learning_rate = self._build_learning_rate(...)` in its `__init__`."
            )
        if isinstance(kept, Variable):
            return kept
        last = jnp.maximum(self._held.iterations.value - 1, 0)
        return evaluate("learning_rate", kept, last, jnp.float32)

    def _set_learning_rate(self, value: Any) -> None:
        held = self._held
        if value is None and held.rate is None:
            return  # a rule may do without
        scheduled = is_schedule(value)
        if isinstance(held.rate, Variable) and not scheduled:
            held.rate.assign(self._build_learning_rate(value).value.astype(held.rate.dtype))
        elif scheduled or not held.built:
            held.rate = self._build_learning_rate(value)
            self._chain_changed()
        else:
            raise InvalidType(
                f"`learning_rate` must stay a schedule, as the optimizer was built with "
                f"{held.rate!r}. Assign another schedule, or build the optimizer with a number. "
                f"{received('learning_rate', value)}"
            )

    def _build_learning_rate(self, learning_rate: Any) -> Any:
        """Return a variable for a number, and a schedule as it is."""
        if is_schedule(learning_rate):
            return learning_rate
        self._held.note_array(learning_rate)
        return as_variable(learning_rate)

    @property
    def _learning_rate(self) -> Any:
        """The variable or the schedule, where a constructor as for Keras puts it."""
        return self._held.rate

    @_learning_rate.setter
    def _learning_rate(self, value: Any) -> None:
        self._held.rate = value

    lr = SHORT_NAME

    @property
    def rate(self) -> Any:
        """The learning rate as links take it: a number or a schedule; None if there is none."""
        return for_links(self._held.rate)

    def _rate_boxes(self) -> list[Variable]:
        """Return the variables of the learning rates in the chain."""
        return [self._held.rate] if isinstance(self._held.rate, Variable) else []

    def _rates(self) -> dict[str, Variable]:
        """Return the variables of learning rates, by the names of their numbers in the state."""
        owners = with_rate(self.chain)
        return {f"{n}/learning_rate": box for box in self._rate_boxes() for n in owners}

    def __repr__(self) -> str:
        plain = {n: x for n, x in options_of(type(self)).items() if n != "learning_rate"}
        own = {n: getattr(self, n) for n, x in plain.items() if getattr(self, n) != x}
        if self._held.rate is not None:
            own = {"learning_rate": self.rate, **own}
        shown = ", ".join(f"{name}={value!r}" for name, value in own.items())
        return f"{type(self).__name__}({shown})"

    def __format__(self, spec: str) -> str:
        """Return the optimizer as text; for a message of Keras with what to write there."""
        text = format(repr(self), spec)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if not caller.startswith("keras."):
            return text
        return f"{text}. In Keras write `optimize_loss.keras.KerasOptimizer({text})`"

    # The chain.

    def links(self) -> dict[str, Any]:
        """Return the links of the rule, by name, in order, with the one that has the rate."""
        raise NotImplementedError(
            f"{type(self).__name__} must define `links`, or `build` and `update_step`."
        )

    def update_step(self, gradient: jax.Array, variable: Variable) -> None:
        """Update one variable and what belongs to it, in place; for subclasses to define.

        It may take `learning_rate` as a third parameter, as in Keras 3.

        Args:
          gradient: its gradient, after clipping.
          variable: a box around its value, after weight decay.
        """
        raise NotImplementedError(
            f"{type(self).__name__} is made of links and has no `update_step` to call. To change "
            "what it does, add links of your own to those that `links` returns."
        )

    @property
    def chain(self) -> Chain:
        """The chain of all links: those of the options around those of the rule."""
        return self._chains()[0]

    @property
    def _summed_chain(self) -> Chain:
        """The chain for gradients that have been summed over devices."""
        return self._chains()[1]

    def _chains(self) -> tuple[Chain, Chain]:
        """Return both chains, made again if a rate was assigned since they were made."""
        rates = [box.value for box in self._rate_boxes()]
        kept = self._held.chains
        if kept is None or not all(map(operator.is_, kept[0], rates)):
            whole = summed = chain(**self._links_behind_aggregation())
            if self.axis_name is not None:
                first = {"aggregate": transforms.SumOverAxis(self.axis_name)}
                whole = chain(**merged(first, dict(summed.links)))
            kept = self._held.chains = rates, (whole, summed)
        return kept[1]

    def _chain_changed(self) -> None:
        """Make the chain again after something in it has changed, if it was made."""
        held = self._held
        if held.chains is not None:
            held.chains = None
            _ = self.chain
        if held.boxes is not None:
            held.boxes.renew(self._summed_chain)
        for outer in held.outers:
            outer._chain_changed()

    def _links_behind_aggregation(self) -> dict[str, Any]:
        links: dict[str, Any] = {}
        if self.loss_scale_factor is not None:
            links["loss_scale"] = transforms.DivideByLossScale(self.loss_scale_factor)
        if self.gradient_accumulation_steps is not None:
            links["accumulate"] = transforms.Accumulate(self.gradient_accumulation_steps)
        last: dict[str, Any] = {}
        if self.use_ema:
            momentum, frequency = self.ema_momentum, self.ema_overwrite_frequency
            last["ema"] = transforms.AverageParams(momentum, frequency)
        decays = self.decay_links(self._held.exclude())
        return merged(links, self._clips(), decays, self._rule(), last)

    def _rule(self) -> dict[str, Any]:
        """Return the links, or the `update_step` where a subclass defines that above them."""
        first = next(c for c in type(self).__mro__ if {"links", "update_step"} & vars(c).keys())
        if "links" in vars(first):
            return self.links()
        unbuilt = self._held.unbuilt
        attributes = attributes_of(self) if unbuilt is None else unbuilt
        return {"update_step": UpdateStep(Recipe.of(self, attributes), self.rate)}

    def decay_links(self, exclude: tuple[Pattern, ...]) -> dict[str, Any]:
        """Return the links that decay the parameters, except those that `exclude` names."""
        if self.weight_decay is None:
            return {}
        return {"weight_decay": transforms.ShrinkParams(self.weight_decay, exclude)}

    # Configurations.

    def get_config(self) -> dict[str, Any]:
        """Return the options as a dict that JSON can hold: plain values, and dicts for schedules.

        Subclasses with an `__init__` of their own add their options to what `super()` returns; if
        they do not define `get_config`, options are read from attributes of the same names.
        `mesh` belongs to this process, and is not included.

        Raises:
          InvalidType: a value has no configuration, as plain functions have none.
          NotImplementedError: an option of a subclass without `get_config` is not an attribute.
        """
        return config_of(self, is_complete=type(self).get_config is not Options.get_config)

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], custom_objects: Mapping[str, type] | None = None
    ) -> Self:
        """Return an optimizer with these options; the inverse of `get_config`.

        Args:
          config: as `get_config` returns it, from here or from Keras. It is not changed.
          custom_objects: classes by name, for schedules and optimizers in it that are not of this
            package.

        Raises:
          InvalidType: `config` is not a dict, or an option is unknown.
          ValueError: it is of one of Keras' legacy optimizers, or the value of an option is wrong.
        """
        return made_from(cls, config, custom_objects)

    def _serialize_hyperparameter(self, hyperparameter: Any) -> Any:
        """Return a rate or another hyperparameter for a configuration, as Keras' helper does."""
        return serialize(hyperparameter)


vars(Options.__init__)["__signature__"] = signature_of(Options, "jit_compile")
Options.learning_rate = LearningRate(  # afterwards: it is no default
    lambda optimizer: optimizer._get_learning_rate(),
    lambda optimizer, value: optimizer._set_learning_rate(value),
    doc="The rate: a `Variable`, or with a schedule that of the last update.",
)
