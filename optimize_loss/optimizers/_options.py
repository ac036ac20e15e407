"""The options that all optimizers share, and the chain that they make."""

import dataclasses
import functools
import inspect
import typing
from typing import Annotated, Any, ClassVar

import jax
from jax.core import Tracer

from optimize_loss._checks import (
    NOT_NEGATIVE,
    POSITIVE,
    InvalidType,
    check_flags,
    nearest,
    received,
)
from optimize_loss._names import Pattern
from optimize_loss.optimizers._variable import Variable
from optimize_loss.transforms import (
    Accumulate,
    AverageParams,
    Chain,
    ClipByGlobalNorm,
    ClipByNorm,
    ClipByValue,
    Count,
    DivideByLossScale,
    FullDecay,
    NotNegative,
    Positive,
    ShrinkParams,
    SumOverAxis,
    chain,
)
from optimize_loss.transforms._base import number_rules

# What a learning rate may be when it is given; read back, it is a `Variable` or a schedule's value.
Rate = Annotated[Any, NOT_NEGATIVE]
PositiveRate = Annotated[Any, POSITIVE]

CLIPS = {"clipnorm": ClipByNorm, "global_clipnorm": ClipByGlobalNorm, "clipvalue": ClipByValue}

CLASSES: dict[str, type["Options"]] = {}
"""The optimizers of this package, by name."""


class _LearningRate:
    """What `optimizer.learning_rate` gives and takes, in every subclass."""

    def __get__(self, optimizer: Any, owner: Any = None) -> Any:
        if optimizer is None:
            raise AttributeError("learning_rate")  # so that dataclasses see no default
        return optimizer._get_learning_rate()

    def __set__(self, optimizer: Any, value: Any) -> None:
        optimizer._set_learning_rate(value)


@typing.dataclass_transform(eq_default=False, field_specifiers=(dataclasses.field,))
@dataclasses.dataclass(eq=False, kw_only=True, init=False, repr=False)
class Options:
    """What every optimizer can be told by keyword. Assigning checks as building does."""

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

    def __init__(self, name: str | None = None, **options: Any):
        if name is not None and not isinstance(name, str):
            raise InvalidType(
                "`name` must be text; a learning rate is given by keyword. "
                f"{received('name', name)}"
            )
        known = dict(options_of(Options))
        for wrong in options.keys() - known.keys():
            raise InvalidType(
                f"`{wrong}` is no option of {type(self).__name__}. Nearest: "
                f"{nearest(wrong, known, most=1)[0]!r}. {received(wrong, options[wrong])}"
            )
        if options.get("learning_rate") is None:
            options.pop("learning_rate", None)
            del known["learning_rate"]
        for option, value in {**known, **options, "name": name}.items():
            setattr(self, option, value)
        self.__post_init__()

    def __init_subclass__(cls, abstract: bool = False):
        """Make a dataclass of a subclass that declares options and writes no `__init__`."""
        super().__init_subclass__()
        if cls.__module__.startswith("optimize_loss.") and not abstract:
            CLASSES[cls.__name__] = cls
        if "__init__" in vars(cls) or not inspect.get_annotations(cls):
            return
        dataclasses.dataclass(eq=False, repr=False)(cls)
        cls._init_of_fields = cls.__init__
        cls.__init__.__annotations__ = {}  # their rules are for us, not for `help`
        if "learning_rate" in vars(cls):
            del cls.learning_rate  # the default, which would hide the descriptor

    def __post_init__(self):
        given = {name: getattr(self, name) for name in CLIPS if getattr(self, name) is not None}
        if len(given) > 1:
            raise ValueError(
                f"At most one of {', '.join(f'`{name}`' for name in CLIPS)} can be given, as one "
                f"would hide the others. Received: {given}."
            )
        if type(self).__init__ is type(self)._init_of_fields:
            _ = self.chain  # building the links checks the rest

    def __setattr__(self, name: str, value: Any) -> None:
        options = options_of(type(self))
        if name not in options:
            object.__setattr__(self, name, value)
            return
        before = self.__dict__.get(name)
        object.__setattr__(self, name, self._checked(name, value))
        if "chain" in self.__dict__ and name != "learning_rate":
            try:
                self._chain_changed()
            except Exception:
                object.__setattr__(self, name, before)
                raise

    def _checked(self, name: str, value: Any) -> Any:
        """Return the value of an option, if the option's rule allows it."""
        if isinstance(options_of(type(self))[name], bool):
            check_flags(**{name: value})
        rule = number_rules(type(self)).get(name)
        scheduled = callable(value) and not isinstance(value, Variable)
        if rule is None or value is None or (scheduled and not rule.initial):
            return value
        return rule.check(name, value.value if isinstance(value, Variable) else value)

    def get_config(self) -> dict[str, Any]:
        """Return the options as a dict that JSON can hold."""
        raise NotImplementedError

    def _get_learning_rate(self) -> Any:
        raise NotImplementedError

    def _set_learning_rate(self, value: Any) -> None:
        raise NotImplementedError

    def _chain_changed(self) -> None:
        """Build the chain anew after an option was assigned, if it was built."""
        self.__dict__.pop("_summed_chain", None)
        if self.__dict__.pop("chain", None) is not None:
            _ = self.chain

    def __repr__(self) -> str:
        plain = {n: x for n, x in options_of(type(self)).items() if n != "learning_rate"}
        own = {n: getattr(self, n) for n, x in plain.items() if getattr(self, n) != x}
        if "_learning_rate" in self.__dict__:
            own = {"learning_rate": self.rate, **own}
        shown = ", ".join(f"{name}={value!r}" for name, value in own.items())
        return f"{type(self).__name__}({shown})"

    @property
    def rate(self) -> Any:
        """The learning rate as links take it: a number or a schedule; None if there is none."""
        kept = self.__dict__.get("_learning_rate")
        if not isinstance(kept, Variable):
            return kept
        # The shortest number that rounds to what is kept: 0.001 and not 0.0010000000475.
        return kept.value if isinstance(kept.value, Tracer) else float(str(kept.numpy()[()]))

    def links(self) -> dict[str, Any]:
        """Return the links of the rule, by name, in order, with the one that has the rate."""
        raise NotImplementedError(
            f"{type(self).__name__} must define `links`, or `build` and `update_step`."
        )

    @functools.cached_property
    def chain(self) -> Chain:
        """The chain of all links: those of the options around those of the rule."""
        if self.axis_name is None:
            return self._summed_chain
        return chain(aggregate=SumOverAxis(self.axis_name), **dict(self._summed_chain.links))

    @functools.cached_property
    def _summed_chain(self) -> Chain:
        """The chain for gradients that have been summed over devices."""
        return chain(**self._links_behind_aggregation())

    def _links_behind_aggregation(self) -> dict[str, Any]:
        links: dict[str, Any] = {}
        if self.loss_scale_factor is not None:
            links["loss_scale"] = DivideByLossScale(self.loss_scale_factor)
        if self.gradient_accumulation_steps is not None:
            links["accumulate"] = Accumulate(self.gradient_accumulation_steps)
        for name, clip in CLIPS.items():
            if (bound := getattr(self, name)) is not None:
                links["clip"] = clip(bound)
        links |= self.decay_links(self._exclude()) | self.links()
        if self.use_ema:
            links["ema"] = AverageParams(self.ema_momentum, self.ema_overwrite_frequency)
        return links

    def _exclude(self) -> tuple[Pattern, ...]:
        """Return the names or patterns of the parameters that are not decayed."""
        return ()

    def decay_links(self, exclude: tuple[Pattern, ...]) -> dict[str, Any]:
        """Return the links that decay the parameters, but for those that `exclude` names."""
        if self.weight_decay is None:
            return {}
        return {"weight_decay": ShrinkParams(self.weight_decay, exclude)}


Options.learning_rate = _LearningRate()  # afterwards: it is no default


@functools.cache
def options_of(cls: type["Options"]) -> dict[str, Any]:
    """Return the options of a class with their defaults."""
    return {field.name: field.default for field in dataclasses.fields(cls)}
