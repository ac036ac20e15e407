"""Wrappers of optimizers: a dynamic loss scale, and different rules by name."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from optimize_loss._checks import InvalidType, received
from optimize_loss._engine.order import merged
from optimize_loss._names import Pattern, check_pattern, first_matches
from optimize_loss.optimizers._declaration import options_of
from optimize_loss.optimizers._optimizer import Optimizer
from optimize_loss.optimizers._variable import Variable, different_names
from optimize_loss.transforms import Count, DivideByDynamicLossScale, ForParameters, PositiveStart

_OF_THE_SHELL = ("name", "jit_compile", "mesh", "axis_name")


def _check_inner(optimizer: Any, argument: str, refused: tuple[str, ...] = ()) -> None:
    """Raise unless it is an optimizer without options that act only outermost.

    Args:
      optimizer: what is inside.
      argument: its name, for messages.
      refused: more options that it must not have.
    """
    if not isinstance(optimizer, Optimizer):
        raise InvalidType(f"`{argument}` must be an `Optimizer`. {received(argument, optimizer)}")
    defaults = options_of(Optimizer)
    for name in ("mesh", "axis_name", *refused):
        if getattr(optimizer, name) != defaults[name]:
            raise ValueError(
                f"`{name}` must be omitted from `{argument}`: give it to the outer optimizer. "
                f"{received(argument, optimizer)}"
            )


def _refuse_options(outer: Optimizer, argument: str) -> None:
    """Raise if an option was given that belongs to the optimizer inside."""
    for name, default in options_of(Optimizer).items():
        if name not in (*_OF_THE_SHELL, "learning_rate") and getattr(outer, name) != default:
            raise ValueError(
                f"`{name}` must be given to `{argument}`, not to {type(outer).__name__}. "
                f"{received(name, getattr(outer, name))}"
            )


def _watch(outer: Optimizer, inner: Optimizer) -> None:
    """Let the optimizer inside tell when its options change."""
    if not any(known is outer for known in inner._held.outers):
        inner._held.outers = (*inner._held.outers, outer)


def _decays_inside(argument: str) -> ValueError:
    return ValueError(
        f"`exclude_from_weight_decay` must be called on what is inside: see `{argument}`."
    )


class LossScaleOptimizer(Optimizer):
    """Scale the loss as far as its gradients stay finite, for training in float16.

        all g finite:      g ← g / scale, and the optimizer inside makes its update;
                           after `dynamic_growth_steps` such calls in a row, scale ← 2 · scale
        not all g finite:  scale ← scale / 2, not below 1; parameters and state stay as they are

    `minimize`, `compute_gradients` and `optimize_loss` multiply the loss by the scale. If you take
    gradients by hand, take those of `opt.scale_loss(loss)`; `apply_gradients` and `apply` divide
    them. A skipped call does not count in `iterations`. The scale grows to at most 2¹²⁶; it is
    among `variables`, as `loss_scale/loss_scale`. `learning_rate` is that of the optimizer inside,
    and can be set; `exclude_from_weight_decay` must be called on that one.

    The keyword options are described in `Optimizer`. Options about devices and compilation, and
    `name`, belong here and are not read from the optimizer inside. All others must be given to that
    one, and see the divided gradients.

    Args:
      inner_optimizer: the optimizer inside, without a `loss_scale_factor`.
      initial_scale: the scale before the first call, above 0. Below 1, it is not halved.
      dynamic_growth_steps: how many calls in a row must be finite before the scale doubles.

    Example:
      The gradient 24 is divided by 8; the next one is infinite, and halves the scale:

      >>> import optimize_loss as ol
      >>> opt = ol.optimizers.LossScaleOptimizer(ol.optimizers.SGD(1.0), initial_scale=8.0)
      >>> v = ol.Variable(10.0)
      >>> opt.minimize(lambda: 3 * v, [v])
      >>> print(v, opt.iterations, opt.scale_loss(1.0))
      7.0 1 8.0
      >>> print(opt.apply_gradients([(float("inf"), v)]), v, opt.scale_loss(1.0))
      1 7.0 4.0

    References:
      P. Micikevicius et al., "Mixed Precision Training", 2018, https://arxiv.org/abs/1710.03740,
      section 3.2. In Keras 2.15 (`mixed_precision.LossScaleOptimizer`), `get_scaled_loss` is our
      `scale_loss`, and `get_unscaled_gradients` must be called before `apply_gradients`; here, as
      in Keras 3, `apply_gradients` divides, so that it does not exist. Keras 2.15 counts skipped
      calls, Keras 3 does not; Keras 3 has no floor of 1. For the `dynamic=False` of 2.15 give any
      optimizer a `loss_scale_factor`.
    """

    learning_rate: Any = dataclasses.field(default=None, init=False)
    inner_optimizer: Final[Optimizer]
    initial_scale: PositiveStart = 2.0**15
    dynamic_growth_steps: Count = 2000

    def __post_init__(self):
        _check_inner(self.inner_optimizer, "inner_optimizer", ("loss_scale_factor",))
        _refuse_options(self, "inner_optimizer")
        super().__post_init__()
        self._held.from_arrays |= self.inner_optimizer._held.from_arrays
        self._held.iterations = self.inner_optimizer._held.iterations

    def links(self):
        """Return the loss scale, then the links of the optimizer inside."""
        _watch(self, self.inner_optimizer)
        scale = DivideByDynamicLossScale(self.initial_scale, self.dynamic_growth_steps)
        return merged({"loss_scale": scale}, self.inner_optimizer._links_behind_aggregation())

    def _rates(self) -> dict[str, Variable]:
        return self.inner_optimizer._rates()

    def _rate_boxes(self) -> list[Variable]:
        return self.inner_optimizer._rate_boxes()

    def _get_learning_rate(self) -> Any:
        return self.inner_optimizer.learning_rate

    def _set_learning_rate(self, value: Any) -> None:
        self.inner_optimizer.learning_rate = value

    def exclude_from_weight_decay(self, var_list: Any = None, var_names: Any = None) -> None:
        """Raise: what decays is the optimizer inside."""
        raise _decays_inside("inner_optimizer")


class _Fixed(Mapping[Pattern, Optimizer]):
    """A mapping that stays as it is; the standard library's cannot be pickled."""

    def __init__(self, items: Mapping[Pattern, Optimizer]):
        self._items = dict(items)

    def __getitem__(self, key: Pattern) -> Optimizer:
        return self._items[key]

    def __iter__(self) -> Iterator[Pattern]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __repr__(self) -> str:
        return repr(self._items)


def _check_group(optimizer: Any, argument: str) -> None:
    """Raise unless an optimizer can be one of several."""
    if isinstance(optimizer, LossScaleOptimizer | MultiOptimizer):
        raise InvalidType(
            f"`{argument}` must be no wrapper around optimizers. {received(argument, optimizer)}"
        )
    _check_inner(optimizer, argument, ("gradient_accumulation_steps", "loss_scale_factor"))


@dataclasses.dataclass(frozen=True)
class Group:
    """Selects the parameters for which the pattern at `index` is the first that matches.

    The index after the last pattern means all other parameters.
    """

    patterns: tuple[Pattern, ...]
    index: int
    has_default: bool

    def takes(self, names: Sequence[str], leaves: Sequence[Any]) -> list[bool]:
        """Return for each parameter whether it is meant; raise if one is nobody's."""
        chosen = first_matches("optimizers", self.patterns, names)
        if not self.has_default and (
            left := [n for n, c in zip(names, chosen, strict=True) if c is None]
        ):
            raise ValueError(
                f"`optimizers` must have a pattern for every parameter, or `default_optimizer` be "
                f"given. Received: {list(self.patterns)}. Parameters without one: {left[:5]}."
            )
        wanted = (*self.patterns, None)[self.index]
        return [c is wanted for c in chosen]


class MultiOptimizer(Optimizer):
    """Train different parameters with different optimizers.

    The first pattern that matches the name of a parameter decides its optimizer; all other
    parameters use `default_optimizer`. Each optimizer clips, decays and averages its own parameters
    with its own options: its `global_clipnorm` bounds their joint norm. All share the same
    `iterations`.

    The keyword options, described in `Optimizer`, can be given here too, for all parameters
    together, except for `weight_decay`, which needs a rate. They come before those of the
    optimizers inside, `use_ema` after. The loss scale, the accumulation, and what is about devices
    can only be given here. There is no `learning_rate` here: set those of the optimizers inside, at
    any time, as `opt.optimizers["**/bias"].learning_rate = 0.1`; `exclude_from_weight_decay` must
    be called on them too.

    Args:
      optimizers: {name or pattern: optimizer}. In a pattern, `*` stands for anything within one
        part of a name, `**` for any number of parts, `|` for either side; a compiled regular
        expression is searched for. One that decides for no parameter raises a `ValueError` when
        the parameters are known.
      default_optimizer: the optimizer of all other parameters; None if every parameter must match a
        pattern.

    Example:
      >>> import optimize_loss as ol
      >>> sgd, lion = ol.optimizers.SGD(0.5), ol.optimizers.Lion(0.25)
      >>> opt = ol.optimizers.MultiOptimizer({"**/bias": sgd}, default_optimizer=lion)
      >>> params = {"dense": {"kernel": 1.0, "bias": 1.0}}
      >>> params = opt.apply({"dense": {"kernel": 8.0, "bias": 2.0}}, params)
      >>> print(params["dense"]["kernel"], params["dense"]["bias"])
      0.75 0.0

    References:
      Keras 3, `MultiOptimizer(OptimizerMap(default_optimizer, {expression: optimizer}))`, whose
      keys are regular expressions for the complete path. There, an expression that matches nothing
      is ignored, and a path with two matches is an error. Keras also accepts a function of the
      variable; here, use `ForParameters` for that.
    """

    learning_rate: Any = dataclasses.field(default=None, init=False)
    optimizers: Final[Mapping[Pattern, Optimizer]]
    default_optimizer: Final[Optimizer | None] = None

    def __post_init__(self):
        if not isinstance(self.optimizers, Mapping) or not self.optimizers:
            raise InvalidType(
                "`optimizers` must map names or patterns to optimizers, and have at least one. "
                f"{received('optimizers', self.optimizers)}"
            )
        for pattern, inner in self.optimizers.items():
            _check_group(inner, f"optimizers[{check_pattern('optimizers', pattern)!r}]")
        if self.default_optimizer is not None:
            _check_group(self.default_optimizer, "default_optimizer")
        if self.weight_decay is not None:
            raise ValueError(
                "`weight_decay` must be given to the optimizers inside, as it is per unit of their "
                f"learning rates. {received('weight_decay', self.weight_decay)}"
            )
        object.__setattr__(self, "optimizers", _Fixed(self.optimizers))
        super().__post_init__()
        for _, inner in self._inner().values():
            inner._held.iterations = self._held.iterations
            self._held.from_arrays |= inner._held.from_arrays

    def _inner(self) -> dict[str, tuple[Group, Optimizer]]:
        """Return the optimizers with their parameters, by a name for their links."""
        inner = list(self.optimizers.values())
        if self.default_optimizer is not None:
            inner.append(self.default_optimizer)
        names = different_names([x.name or type(x).__name__ for x in inner])
        has_default = self.default_optimizer is not None
        groups = [Group(tuple(self.optimizers), i, has_default) for i in range(len(inner))]
        return dict(zip(names, zip(groups, inner, strict=True), strict=True))

    def links(self):
        """Return the links of all optimizers, each for its parameters."""
        for _, inner in self._inner().values():
            _watch(self, inner)
        return {
            f"{name}.{link_name}": ForParameters(group, link)
            for name, (group, inner) in self._inner().items()
            for link_name, link in inner._links_behind_aggregation().items()
        }

    def _rates(self) -> dict[str, Variable]:
        return {
            f"{name}.{path}": box
            for name, (_, inner) in self._inner().items()
            for path, box in inner._rates().items()
        }

    def _rate_boxes(self) -> list[Variable]:
        return [box for _, inner in self._inner().values() for box in inner._rate_boxes()]

    def exclude_from_weight_decay(self, var_list: Any = None, var_names: Any = None) -> None:
        """Raise: what decays are the optimizers inside."""
        raise _decays_inside("optimizers")

    def _get_learning_rate(self) -> Any:
        raise AttributeError(
            "A MultiOptimizer has no `learning_rate` of its own: see those of its `optimizers`."
        )

    def _set_learning_rate(self, value: Any) -> None:
        self._get_learning_rate()
