"""An optimizer as Keras shows one: its options, its learning rates, its averages."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from optimize_loss._checks import Rule, meant
from optimize_loss._engine.numbers import at_step, replaced, to_array
from optimize_loss.optimizers import LossScaleOptimizer, MultiOptimizer, Optimizer
from optimize_loss.optimizers._boxes import links_of, with_rate
from optimize_loss.optimizers._declaration import SHORT_NAME, options_of
from optimize_loss.transforms import (
    Accumulate,
    AverageParams,
    Chain,
    ClipByGlobalNorm,
    ClipByNorm,
    ClipByValue,
    DivideByLossScale,
    ForParameters,
    ShrinkParams,
)

DEFAULTS = options_of(Optimizer)
"""Options with the values that Keras' own code must see, because the chain applies them."""

# Where a chain has what is an option of an `Optimizer`.
_FIELDS: dict[str, tuple[type, str]] = {
    "weight_decay": (ShrinkParams, "weight_decay"),
    "clipnorm": (ClipByNorm, "max_norm"),
    "clipvalue": (ClipByValue, "max_value"),
    "global_clipnorm": (ClipByGlobalNorm, "max_norm"),
    "ema_momentum": (AverageParams, "decay"),
    "ema_overwrite_frequency": (AverageParams, "overwrite_every"),
    "gradient_accumulation_steps": (Accumulate, "every"),
    "loss_scale_factor": (DivideByLossScale, "loss_scale"),
}


@dataclasses.dataclass(frozen=True)
class FromFirstUpdate:
    """The decay rate of an average that starts at the first new parameters: 0 at step 0."""

    decay: Any

    def __call__(self, step: Any) -> Any:
        """Return the decay rate at `step`."""
        decay: Any = self.decay(step) if callable(self.decay) else self.decay
        return jnp.where(step == 0, 0.0, decay)


def as_keras_3(links: Mapping[str, Any]) -> dict[str, Any]:
    """Return the links of an `Optimizer` with averages that start as those of Keras 3."""

    def changed(entry: Any) -> Any:
        if isinstance(entry, ForParameters):
            return dataclasses.replace(entry, link=changed(entry.link))
        if isinstance(entry, AverageParams):
            return dataclasses.replace(entry, decay=FromFirstUpdate(entry.decay))
        return entry

    return {name: changed(entry) for name, entry in links.items()}


def inside(made: Any) -> Any:
    """Return the optimizer inside of a loss scale; anything else as it is."""
    return made.inner_optimizer if isinstance(made, LossScaleOptimizer) else made


def many(made: Any) -> dict[str, tuple[Any, Optimizer]]:
    """Return the optimizers of a `MultiOptimizer` with their parameters, by name; else none."""
    made = inside(made)
    return made._inner() if isinstance(made, MultiOptimizer) else {}


def option(made: Any, links: Chain, name: str) -> Any:
    """Return an option of an `Optimizer`, or what a chain has in its place."""
    if isinstance(made, Optimizer):
        return getattr(inside(made), name)
    found = links_of(links).values()
    if name == "use_ema":
        return any(isinstance(link, AverageParams) for link in found)
    kind, field = _FIELDS[name]
    return next((getattr(x, field) for x in found if isinstance(x, kind)), DEFAULTS[name])


def rates(made: Any, links: Chain) -> list[list[str]]:
    """Return the names of the links that share a learning rate, for each rate."""
    owners = with_rate(links)
    if groups := many(made):
        return [[n for n in owners if n.startswith(f"{group}.")] for group in groups]
    if isinstance(made, Optimizer):
        return [owners] if owners else []
    return [[name] for name in owners]


def _options(made: Any) -> Mapping[str, Any]:
    """Return the options of an `Optimizer` with their defaults; none of anything else."""
    return options_of(type(made)) if isinstance(made, Optimizer) else {}


def averages(links: Chain, names: list[str], known: Mapping[str, Any]) -> dict[str, str]:
    """Return for each parameter that has an average its name in the state: the last, if several.

    Args:
      links: the chain.
      names: the parameters.
      known: the state by name.
    """
    kept = [name for name, link in links_of(links).items() if isinstance(link, AverageParams)]
    return {n: path for x in kept for n in names if (path := f"{x}/average/{n}") in known}


class _Option:
    """An option of the optimizer inside, as Keras' own optimizers show theirs."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, optimizer: Any, owner: type | None = None) -> Any:
        if optimizer is None:
            return self
        if optimizer._hidden:
            return DEFAULTS[self.name]
        return option(optimizer._made, optimizer._chain, self.name)

    def __set__(self, optimizer: Any, value: Any) -> None:
        if optimizer._complete:  # before, it is Keras' constructor that sets its own
            optimizer._set_option(self.name, value)


class _Part:
    """One of the optimizers of a `MultiOptimizer`, as Keras' callbacks see theirs.

    Or, of a chain of several rates, a link that has one. Its averages are those of the first.
    """

    def __init__(self, whole: "Shown", name: str, place: int):
        self._whole, self.name, self._place = whole, name, place
        self._group, self._inner = many(whole._made).get(name, (None, None))

    @property
    def learning_rate(self) -> Any:
        """The rate of the next update, as of a `KerasOptimizer`."""
        return self._whole._get_rate(self._whole._rates[self._place])

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        self._whole._set_rate(self._whole._rates[self._place], learning_rate)

    @property
    def iterations(self) -> Any:
        """The number of updates made."""
        return self._whole.iterations

    @property
    def use_ema(self) -> bool:
        """Whether its parameters are averaged, by itself or with all others."""
        return getattr(self._inner, "use_ema", False) or self._whole.use_ema

    def _averaged(self) -> dict[str, Any]:
        named, averages = self._whole._named(), self._whole._averages()
        if self._group is None:
            return {} if self._place else averages
        leaves = [v.value for v in named.values()]
        mine = zip(named, self._group.takes(list(named), leaves), strict=True)
        return {name: averages[name] for name, is_mine in mine if is_mine and name in averages}

    @property
    def _trainable_variables(self) -> list[Any]:
        named = self._whole._named()
        return [named[name] for name in self._averaged()]

    @property
    def _model_variables_moving_average(self) -> list[Any]:
        return list(self._averaged().values())

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in _options(self._inner):
            raise AttributeError(f"`{name}` is not an option of {self.name!r}.")
        return getattr(self._inner, name)


class Shown:
    """What a Keras optimizer shows of the one inside; its constructor sets what stands here."""

    built: bool
    _made: Any
    _chain: Chain
    _names: list[str]
    _iterations: Any
    _trainable_variables: list[Any]
    _named_boxes: dict[str, Any]
    _rates: list[list[str]]
    _rate_boxes: dict[str, Any]
    _complete = False
    _hidden = False

    weight_decay = _Option()
    clipnorm = _Option()
    clipvalue = _Option()
    global_clipnorm = _Option()
    use_ema = _Option()
    ema_momentum = _Option()
    ema_overwrite_frequency = _Option()
    gradient_accumulation_steps = _Option()

    def _links(self) -> Chain:
        raise NotImplementedError

    def _named(self) -> dict[str, Any]:
        """Return the variables of the model by name."""
        return dict(zip(self._names, self._trainable_variables, strict=True))

    @contextlib.contextmanager
    def _as_keras_needs_it(self) -> Iterator[None]:
        """Hide the options from Keras' own code, which would do what the chain does already."""
        before = self._hidden
        self.__dict__["_hidden"] = True
        try:
            yield
        finally:
            self.__dict__["_hidden"] = before

    @property
    def iterations(self) -> Any:
        """The number of updates made; several calls make one if gradients are accumulated."""
        return self._iterations

    @property
    def loss_scale_factor(self) -> Any:
        """The fixed loss scale of the optimizer, or one that was assigned; None for none."""
        if "_scale" in self.__dict__ or self._hidden:
            return self.__dict__.get("_scale")
        return option(self._made, self._chain, "loss_scale_factor")

    @loss_scale_factor.setter
    def loss_scale_factor(self, value: Any) -> None:
        if self._complete:  # as Keras' wrappers do, which scale the loss themselves
            self.__dict__["_scale"] = value

    def _averages(self) -> dict[str, Any]:
        """Return the variables of the averages by parameter."""
        if not self.built:
            return {}
        found = averages(self._chain, self._names, self._named_boxes)
        return {name: self._named_boxes[path] for name, path in found.items()}

    @property
    def _model_variables_moving_average(self) -> list[Any]:
        """The averages of the variables, where Keras' `SwapEMAWeights` looks for them."""
        found = self._averages()
        if not self.use_ema or len(found) < len(self._trainable_variables):
            raise AttributeError("There are no averages of all variables.")
        return [found[name] for name in self._names]

    # Options and learning rates.

    def _set_option(self, name: str, value: Any) -> None:
        if not isinstance(self._made, Optimizer):
            raise AttributeError(f"`{name}` must be given to the links of `optimizer`.")
        if self.built:
            raise ValueError(f"`{name}` must be set before the optimizer is built.")
        setattr(inside(self._made), name, value)
        # A name or a class would not tell of the option in the configuration.
        self.__dict__.update(optimizer=self._made, _given=None)
        self.__dict__["_chain"] = self._links()

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; one that would do nothing raises."""
        new = self._complete and not name.startswith("_") and not hasattr(type(self), name)
        if new and name not in self.__dict__:
            if name not in self._options():
                raise AttributeError(
                    f"`{name}` is not an attribute of {type(self).__name__}, nor an option of its "
                    f"`optimizer`.{meant(name, [*DEFAULTS, *self._options()])}"
                )
            self._set_option(name, value)
            return
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        """Return an option of the optimizer inside that Keras does not know."""
        if name == "learning_rate":
            self._one_rate()
        if name in self._options():
            return getattr(inside(self._made), name)
        raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}.")

    def _options(self) -> Mapping[str, Any]:
        hidden = ("learning_rate", "optimizers", "default_optimizer")
        known = _options(inside(self.__dict__.get("_made")))
        return {name: default for name, default in known.items() if name not in hidden}

    def _one_rate(self) -> list[str]:
        """Return the links that have the learning rate; raise unless there is one."""
        if not self._rates:
            raise AttributeError(
                "`optimizer` has no `learning_rate` that can be read and set. One of optax has "
                "that if it is a number in `optax.inject_hyperparams`."
            )
        if len(self._rates) > 1:
            owners = [part.name for part in self.optimizers]
            raise AttributeError(
                f"There is a `learning_rate` for each of {owners}. Set those of `optimizers`."
            )
        return self._rates[0]

    def _rate_of(self, link: str) -> tuple[Any, Rule]:
        """Return what the learning rate of a link was built with, and its rule."""
        found = self._chain.link(link)
        return found.numbers()["learning_rate"], found.rule("learning_rate")

    def _first_rate(self, link: str) -> jax.Array:
        return to_array("learning_rate", *self._rate_of(link), jnp.float32)

    def _get_rate(self, links: list[str]) -> Any:
        if not links:
            raise AttributeError("This optimizer has no learning rate.")
        field, rule = self._rate_of(links[0])
        box = self._rate_boxes[links[0]]
        if not callable(field):
            return box
        return at_step("learning_rate", field, rule, box.value, self._iterations.value)

    def _set_rate(self, links: list[str], learning_rate: Any) -> None:
        for link in links:
            field, rule = self._rate_of(link)
            box = self._rate_boxes[link]
            box.assign(replaced("learning_rate", learning_rate, field, rule, box.value))

    @property
    def learning_rate(self) -> Any:
        """The rate of the next update: a variable, or what a schedule says."""
        return self._get_rate(self._one_rate())

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        self._set_rate(self._one_rate(), learning_rate)

    lr = SHORT_NAME

    @property
    def optimizers(self) -> list[_Part]:
        """Those of a `MultiOptimizer`, or the links of a chain, that each have a `learning_rate`.

        Where there is one rate, there is no such attribute.
        """
        names = [*many(self._made)]
        if not names and len(self._rates) > 1:
            names = [links[0] for links in self._rates]
        if not names:
            raise AttributeError("There is one optimizer: its `learning_rate` is here.")
        return [_Part(self, name, place) for place, name in enumerate(names)]
