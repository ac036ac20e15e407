"""The options that all optimizers share, and the chain that they make."""

import dataclasses
import functools
import inspect
import operator
import typing
from typing import Annotated, Any, ClassVar

import jax
from jax.core import Tracer

from optimize_loss._checks import (
    NOT_NEGATIVE,
    POSITIVE,
    InvalidType,
    check_flags,
    check_options,
    received,
)
from optimize_loss._engine.link import number_rules
from optimize_loss._engine.order import merged
from optimize_loss._engine.transformation import Transformation, made_once
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

# What a learning rate may be when it is given; read back, it is a `Variable` or a schedule's value.
Rate = Annotated[Any, NOT_NEGATIVE]
PositiveRate = Annotated[Any, POSITIVE]

CLIPS = {"clipnorm": ClipByNorm, "global_clipnorm": ClipByGlobalNorm, "clipvalue": ClipByValue}

CLASSES: dict[str, type["Options"]] = {}
"""The optimizers of this package, by name; `optimizers/_get.py` enters them."""


class _LearningRate:
    """What `optimizer.learning_rate` gives and takes, in every subclass."""

    def __init__(self):
        self.__doc__ = "The rate: a `Variable`, or with a schedule that of the last update."

    def __get__(self, optimizer: Any, owner: Any = None) -> Any:
        if optimizer is None:
            raise AttributeError("learning_rate")  # so that dataclasses see no default
        return optimizer._get_learning_rate()

    def __set__(self, optimizer: Any, value: Any) -> None:
        optimizer._set_learning_rate(value)


class _Static:
    """An optimizer in the structure of a tree: equal to itself as long as its chain is."""

    def __init__(self, kept: "Options"):
        self.kept, self.chain = kept, kept.chain

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and (self.kept, self.chain) == (other.kept, other.chain)

    def __hash__(self) -> int:
        return id(self.kept)


def _flattened(optimizer: Any) -> tuple[tuple[()], Any]:
    return (), _Static(optimizer)


def _unflattened(static: Any, nothing: tuple[()]) -> Any:
    return static.kept


def _told_of_wrong_options(init: Any) -> Any:
    """Return a constructor that names the nearest option where there is none of a name."""
    parameters = inspect.signature(init).parameters

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **options: Any) -> None:
        check_options(type(self), options, parameters)
        init(self, *args, **options)

    return __init__


def _completing(init: Any) -> Any:
    """Return a constructor after whose outermost call the optimizer takes no new attributes."""

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **options: Any) -> None:
        is_outermost = self.__dict__.setdefault("_complete", None) is None
        self.__dict__["_complete"] = False
        init(self, *args, **options)
        if is_outermost:
            self.__dict__["_complete"] = True

    return __init__


@typing.dataclass_transform(eq_default=False, field_specifiers=(dataclasses.field,))
@dataclasses.dataclass(eq=False, kw_only=True, init=False, repr=False)
class Options(Transformation):
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
    _given_at_first: ClassVar[tuple[str, ...]] = ()
    """Options that must stay as they were given to the constructor."""
    _from_arrays = False  # whether an option was, and no state has been made since

    @_completing
    @_told_of_wrong_options
    def __init__(
        self,
        name=None,
        weight_decay=None,
        clipnorm=None,
        clipvalue=None,
        global_clipnorm=None,
        use_ema=False,
        ema_momentum=0.99,
        ema_overwrite_frequency=None,
        jit_compile=True,
        *,
        learning_rate=None,
        mesh=None,
        gradient_accumulation_steps=None,
        loss_scale_factor=None,
        axis_name=None,
    ):
        given = dict(locals())
        for option in options_of(Options):
            if option != "learning_rate" or learning_rate is not None:
                setattr(self, option, given[option])
        self.__post_init__()

    def __init_subclass__(cls):
        """Make a dataclass of a subclass that declares options and writes no `__init__`.

        In a tree, an optimizer is a part of the structure.
        """
        super().__init_subclass__()
        jax.tree_util.register_pytree_node(cls, _flattened, _unflattened)
        if "__init__" in vars(cls):
            cls.__init__ = made_once(_completing(cls.__init__))
            return
        if not inspect.get_annotations(cls):
            return
        dataclasses.dataclass(eq=False, repr=False)(cls)
        cls.__init__.__annotations__ = {}  # their rules are for us, not for `help`
        init = _told_of_wrong_options(cls.__init__)
        cls.__init__ = cls._init_of_fields = made_once(_completing(init))
        if "learning_rate" in vars(cls):
            del cls.learning_rate  # the default, which would hide the descriptor

    def __post_init__(self):
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

    def __setattr__(self, name: str, value: Any) -> None:
        if name in options_of(type(self)):
            value = self._checked(name, value)
        object.__setattr__(self, name, value)

    def _note_array(self, value: Any) -> None:
        """Note that an option was given as an array, as `optax.inject_hyperparams` gives all."""
        if isinstance(value, jax.Array) and not isinstance(value, Tracer):
            self._from_arrays = True

    def _checked(self, name: str, value: Any) -> Any:
        """Return the value of an option, if the option's rule allows it."""
        self._note_array(value)
        if isinstance(options_of(type(self))[name], bool):
            check_flags(**{name: value})
        rule = number_rules(type(self)).get(name)
        if value is None and (rule is None or name in _optional(type(self))):
            return value
        if name == "axis_name" and isinstance(value, list):
            value = tuple(value)  # as JSON has it
        kind, words = _KINDS.get(name, (object, rule.words if rule else ""))
        if value is None or not isinstance(value, kind):
            raise InvalidType(f"`{name}` must be {words}. {received(name, value)}")
        scheduled = callable(value) and not isinstance(value, Variable)
        if rule is None or (scheduled and not rule.initial):
            return value
        return rule.check(name, value.value if isinstance(value, Variable) else value)

    def get_config(self) -> dict[str, Any]:
        """Return the options as a dict that JSON can hold."""
        raise NotImplementedError

    def _get_learning_rate(self) -> Any:
        raise NotImplementedError

    def _set_learning_rate(self, value: Any) -> None:
        raise NotImplementedError

    def _rate_boxes(self) -> list[Variable]:
        """Return the variables of the learning rates in the chain."""
        kept = self.__dict__.get("_learning_rate")
        return [kept] if isinstance(kept, Variable) else []

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

    @property
    def chain(self) -> Chain:
        """The chain of all links: those of the options around those of the rule."""
        return self._chains()[0]

    @property
    def _summed_chain(self) -> Chain:
        """The chain for gradients that have been summed over devices."""
        return self._chains()[1]

    def _chains(self) -> tuple[Chain, Chain]:
        """Return both chains, made anew if a rate was assigned since they were made."""
        rates = [box.value for box in self._rate_boxes()]
        kept = self.__dict__.get("_kept_chains")
        if kept is not None and all(map(operator.is_, kept[0], rates)):
            return kept[1]
        whole = summed = chain(**self._links_behind_aggregation())
        if self.axis_name is not None:
            first = {"aggregate": SumOverAxis(self.axis_name)}
            whole = chain(**merged(first, dict(summed.links)))
        self._kept_chains = rates, (whole, summed)
        return whole, summed

    def _links_behind_aggregation(self) -> dict[str, Any]:
        links: dict[str, Any] = {}
        if self.loss_scale_factor is not None:
            links["loss_scale"] = DivideByLossScale(self.loss_scale_factor)
        if self.gradient_accumulation_steps is not None:
            links["accumulate"] = Accumulate(self.gradient_accumulation_steps)
        last: dict[str, Any] = {}
        if self.use_ema:
            last["ema"] = AverageParams(self.ema_momentum, self.ema_overwrite_frequency)
        decays = self.decay_links(self._exclude())
        return merged(links, self._clips(), decays, self._rule(), last)

    def _rule(self) -> dict[str, Any]:
        """Return the links of the rule."""
        return self.links()

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


@functools.cache
def _optional(cls: type["Options"]) -> frozenset[str]:
    """Return the options that may be None."""
    hints = typing.get_type_hints(cls)
    return frozenset(name for name, hint in hints.items() if type(None) in typing.get_args(hint))


_KINDS: dict[str, tuple[Any, str]] = {
    "name": (str, "text; a learning rate is given by keyword"),
    "mesh": (jax.sharding.Mesh, "a `jax.sharding.Mesh`"),
    "axis_name": (str | tuple, "the name of an axis, or a tuple of names"),
}
